//! The naive f64 twin of every operation: what each output element should be, and the magnitude
//! its tolerance is measured against.
//!
//! Written from the contracts alone, one loop per formula, with no regard for speed. It reads
//! [`Memory`] and writes nothing. Read next: `pontoon_ops::tolerance`, then `conformance.rs`.

mod attention;
mod linear;
mod loss;
mod memory;
mod mlp;
mod moe;
mod norm;
mod optim;
mod sample;

use pontoon_ops::{Accumulate, Op, View};

use crate::memory::Memory;

/// What one output element should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Want {
    /// This value, within the operation's tolerance.
    Near {
        /// The exact result.
        value: f64,
        /// The sum of the absolute terms that went into it.
        magnitude: f64,
        /// Terms times the size of the argument of the exponential they went through: what one
        /// rounding of that argument to f32 changes, in units of eps(f32).
        argument: f64,
    },
    /// Exactly the bits that stood there before.
    Kept,
    /// A choice so close that f32 may decide either way.
    Unjudged,
}

/// What one written operand should hold, element by element in row-major order.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Where it lies.
    pub view: View,
    /// What it should hold.
    pub wants: Vec<Want>,
}

/// A value and the magnitude it is judged by.
pub(crate) fn near(value: f64, magnitude: f64) -> Want {
    Want::Near { value, magnitude, argument: 0.0 }
}

/// A value that must be met exactly.
pub(crate) fn exact(value: f64) -> Want {
    near(value, 0.0)
}

/// An f32 value as f64.
pub(crate) fn wide(value: f32) -> f64 {
    f64::from(value)
}

pub(crate) fn expected(view: &View, wants: Vec<Want>) -> Expected {
    assert_eq!(view.elements(), wants.len(), "the reference left out elements of {view:?}");
    Expected { view: *view, wants }
}

/// Adds the old contents where the operation says so.
pub(crate) fn accumulated(
    memory: &Memory,
    view: &View,
    wants: Vec<Want>,
    accumulate: Accumulate,
) -> Expected {
    if accumulate == Accumulate::Overwrite {
        return expected(view, wants);
    }
    let add = |(want, old): (Want, f64)| match want {
        Want::Near { value, magnitude, argument } => {
            Want::Near { value: value + old, magnitude: magnitude + old.abs(), argument }
        }
        other => other,
    };
    expected(view, wants.into_iter().zip(memory.read(view)).map(add).collect())
}

/// The same with close choices made as f64 makes them: one step of a program in f64.
pub fn decided(op: &Op, memory: &Memory) -> Vec<Expected> {
    match op {
        Op::RouterTopK(op) => moe::router(op, memory, moe::Close::Made),
        _ => reference(op, memory),
    }
}

/// What `op` should leave in each of its written operands. Exchanges need a group: they give none.
pub fn reference(op: &Op, memory: &Memory) -> Vec<Expected> {
    match op {
        Op::Copy(op) => memory::copy(op, memory),
        Op::Cast(op) => memory::cast(op, memory),
        Op::Fill(op) => memory::fill(op),
        Op::Add(op) => memory::add(op, memory),
        Op::Scale(op) => memory::scale(op, memory),
        Op::Embed(op) => memory::embed(op, memory),
        Op::EmbedBwd(op) => memory::embed_bwd(op, memory),
        Op::RmsNorm(op) => norm::rms_norm(op, memory),
        Op::RmsNormBwd(op) => norm::rms_norm_bwd(op, memory),
        Op::AddRmsNorm(op) => norm::add_rms_norm(op, memory),
        Op::AddRmsNormBwd(op) => norm::add_rms_norm_bwd(op, memory),
        Op::Matmul(op) => linear::matmul(op, memory),
        Op::MatmulQuant(op) => linear::matmul_quant(op, memory),
        Op::GroupedMatmul(op) => linear::grouped_matmul(op, memory),
        Op::GroupedMatmulQuant(op) => linear::grouped_matmul_quant(op, memory),
        Op::Rope(op) => attention::rope(op, memory),
        Op::Attention(op) => attention::attention(op, memory),
        Op::AttentionBwd(op) => attention::attention_bwd(op, memory),
        Op::PagedAttention(op) => attention::paged_attention(op, memory),
        Op::KvWrite(op) => attention::kv_write(op, memory),
        Op::SwiGlu(op) => mlp::swiglu(op, memory),
        Op::SwiGluBwd(op) => mlp::swiglu_bwd(op, memory),
        Op::RouterTopK(op) => moe::router(op, memory, moe::Close::Unjudged),
        Op::RouterTopKBwd(op) => moe::router_bwd(op, memory),
        Op::Permute(op) => moe::permute(op, memory),
        Op::PermuteBwd(op) => moe::permute_bwd(op, memory),
        Op::Unpermute(op) => moe::unpermute(op, memory),
        Op::UnpermuteBwd(op) => moe::unpermute_bwd(op, memory),
        Op::CrossEntropy(op) => loss::cross_entropy(op, memory),
        Op::CrossEntropyBwd(op) => loss::cross_entropy_bwd(op, memory),
        Op::TokenLogProb(op) => loss::token_log_prob(op, memory),
        Op::TokenLogProbBwd(op) => loss::token_log_prob_bwd(op, memory),
        Op::AdamW(op) => optim::adamw(op, memory),
        Op::Muon(op) => optim::muon(op, memory),
        Op::SumSquares(op) => optim::sum_squares(op, memory),
        Op::ReduceTree(op) => optim::reduce_tree(op, memory),
        Op::Sample(op) => sample::sample(op, memory),
        Op::AllReduce(_) | Op::AllGather(_) | Op::ReduceScatter(_) => Vec::new(),
    }
}
