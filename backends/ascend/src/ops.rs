//! The compositions: which vendor calls each operation of the waist is made of.
//!
//! One file for each group of operations, as in the waist's `contract/`. Nothing here is unsafe
//! and nothing checks shapes: the waist has. `ABI.md` has the same as a table.

mod attention;
mod exchange;
mod linear;
mod loss;
mod memory;
mod mlp;
mod moe;
mod norm;
mod optim;
mod sample;

use pontoon_ops::Op;

use crate::core::{Core, Done};

/// Starts an operation.
pub fn run(core: &mut Core, op: &Op) -> Done {
    let operands = op.operands();
    let mut written = operands.iter().filter(|operand| operand.access.writes());
    // The vendor's calls refuse empty tensors; where nothing is written, nothing is to be done.
    if written.all(|operand| operand.view.elements() == 0) {
        return Ok(());
    }
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
        Op::SwiGlu(op) => mlp::swiglu(core, op),
        Op::SwiGluBwd(op) => mlp::swiglu_bwd(core, op),
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
        Op::AllReduce(op) => exchange::all_reduce(core, op),
        Op::AllGather(op) => exchange::all_gather(core, op),
        Op::ReduceScatter(op) => exchange::reduce_scatter(core, op),
    }
}
