//! The `match` over operations: which kernels each one runs.
//!
//! Meanings are in `pontoon_ops::contract`, arithmetic in `../kernels/`. Nothing here computes.

mod attention;
pub mod linear;
mod loss;
mod memory;
mod moe;
mod norm;
mod optim;
mod sample;

use pontoon_ops::{DeviceError, DeviceErrorKind, Op};

use crate::core::{Core, Done};

/// Starts an operation.
pub fn run(core: &mut Core, op: &Op) -> Done {
    match op {
        Op::Copy(op) => memory::copy(core, op),
        Op::Cast(op) => memory::cast(core, op),
        Op::Fill(op) => memory::fill(core, op),
        Op::Add(op) => memory::add(core, op),
        Op::Scale(op) => memory::scale(core, op),
        Op::Embed(op) => memory::embed(core, op),
        Op::EmbedBwd(op) => memory::embed_bwd(core, op),
        Op::RmsNorm(op) => norm::rms_norm(core, op),
        Op::RmsNormBwd(op) => norm::rms_norm_bwd(core, op),
        Op::AddRmsNorm(op) => norm::add_rms_norm(core, op),
        Op::AddRmsNormBwd(op) => norm::add_rms_norm_bwd(core, op),
        Op::Matmul(op) => linear::matmul(core, op),
        Op::MatmulQuant(op) => linear::matmul_quant(core, op),
        Op::GroupedMatmul(op) => linear::grouped_matmul(core, op),
        Op::GroupedMatmulQuant(op) => linear::grouped_matmul_quant(core, op),
        Op::Rope(op) => attention::rope(core, op),
        Op::Attention(op) => attention::attention(core, op),
        Op::AttentionBwd(op) => attention::attention_bwd(core, op),
        Op::PagedAttention(op) => attention::paged_attention(core, op),
        Op::KvWrite(op) => attention::kv_write(core, op),
        Op::SwiGlu(op) => memory::swiglu(core, op),
        Op::SwiGluBwd(op) => memory::swiglu_bwd(core, op),
        Op::RouterTopK(op) => moe::router(core, op),
        Op::RouterTopKBwd(op) => moe::router_bwd(core, op),
        Op::Permute(op) => moe::permute(core, op),
        Op::PermuteBwd(op) => moe::permute_bwd(core, op),
        Op::Unpermute(op) => moe::unpermute(core, op),
        Op::UnpermuteBwd(op) => moe::unpermute_bwd(core, op),
        Op::CrossEntropy(op) => loss::cross_entropy(core, op),
        Op::CrossEntropyBwd(op) => loss::cross_entropy_bwd(core, op),
        Op::TokenLogProb(op) => loss::token_log_prob(core, op),
        Op::TokenLogProbBwd(op) => loss::token_log_prob_bwd(core, op),
        Op::AdamW(op) => optim::adamw(core, op),
        Op::Muon(op) => optim::muon(core, op),
        Op::SumSquares(op) => optim::sum_squares(core, op),
        Op::ReduceTree(op) => optim::reduce_tree(core, op),
        Op::Sample(op) => sample::sample(core, op),
        Op::AllReduce(_) | Op::AllGather(_) | Op::ReduceScatter(_) => {
            let text = format!("{} needs a group", op.name().name());
            Err(DeviceError::new(DeviceErrorKind::Unsupported, text))
        }
    }
}
