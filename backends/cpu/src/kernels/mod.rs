//! The operations of the waist, one file per group, and the match that reaches them.
//!
//! A kernel takes the operation and a [`Context`], gets slices from it and splits the work into
//! tasks that each own a part of the output. How work is split never changes bits: sums run in an
//! order that the operation's contract fixes.

mod attention;
mod attention_bwd;
mod attention_cache;
mod elementwise;
mod embed;
mod exchange;
mod grouped_quant;
mod linear;
mod loss;
mod moe;
mod norm;
mod optim;
mod product;
mod router;
mod sample;
pub(crate) mod sums;
pub(crate) mod watched;

use pontoon_ops::{DeviceError, DeviceErrorKind, Op, View};

use crate::group::Rendezvous;
use crate::memory::Operands;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::Isa;

pub(crate) use elementwise::handles_in_place;

/// What every kernel gets.
pub(crate) struct Context<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Instruction set.
    pub isa: Isa,
    /// Working memory of matrix products.
    pub gemm_scratch: &'a mut Scratch,
    /// Working memory of operations.
    pub work: &'a mut Scratch,
    /// The operation's memory.
    pub operands: Operands<'a>,
    /// The group the device is in.
    pub group: Option<&'a Rendezvous>,
    /// Whether products are checked, and what they told.
    pub checks: watched::Checks,
}

type Done = Result<(), DeviceError>;

/// Runs a block with `$type` bound to the storage type of a float dtype.
macro_rules! with_float {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            pontoon_ops::DType::F32 => {
                type $type = f32;
                $body
            }
            pontoon_ops::DType::Bf16 => {
                type $type = half::bf16;
                $body
            }
            pontoon_ops::DType::F16 => {
                type $type = half::f16;
                $body
            }
            other => Err($crate::kernels::unsupported(other)),
        }
    };
}
pub(crate) use with_float;

pub(crate) fn unsupported(dtype: pontoon_ops::DType) -> DeviceError {
    let text = format!("{dtype} is not a dtype of this operation");
    DeviceError::new(DeviceErrorKind::Unsupported, text)
}

/// Elements one task has where there are many.
pub(crate) const TASK_ELEMENTS: usize = 16 * 1024;
/// Elements one task should have at least: below that, a second thread costs more than it brings.
const TASK_ELEMENTS_MIN: usize = 4 * 1024;

/// Elements per task, so that tasks are neither tiny nor so large that threads go without.
pub(crate) fn elements_per_task(elements: usize) -> usize {
    (elements / 8).clamp(TASK_ELEMENTS_MIN, TASK_ELEMENTS)
}

/// Rows per task for rows of `width` elements, so that tasks are neither tiny nor too many.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    let by_size = elements_per_task(rows * width).div_ceil(width.max(1)).max(1);
    by_size.max(rows.div_ceil(crate::ffi::PARTS_MAX))
}

/// The distance from row to row of a view of two or more dimensions, all but the first dense.
pub(crate) fn row_stride(view: &View) -> usize {
    // A single row may carry any stride; its own width is always right.
    if view.dim(0) <= 1 { view.elements().max(1) } else { view.stride(0).max(1) }
}

/// Runs one operation.
pub(crate) fn run(context: &mut Context<'_>, op: &Op) -> Done {
    // Nothing is written, so there is nothing to do; kernels need not think of empty tensors.
    let empty = op.operands().iter().all(|o| !o.access.writes() || o.view.elements() == 0);
    if empty {
        return Ok(());
    }
    match op {
        Op::Copy(op) => elementwise::copy(context, op),
        Op::Cast(op) => elementwise::cast(context, op),
        Op::Fill(op) => elementwise::fill(context, op),
        Op::Add(op) => elementwise::add(context, op),
        Op::Scale(op) => elementwise::scale(context, op),
        Op::SwiGlu(op) => elementwise::swiglu(context, op),
        Op::SwiGluBwd(op) => elementwise::swiglu_bwd(context, op),
        Op::Embed(op) => embed::embed(context, op),
        Op::EmbedBwd(op) => embed::embed_bwd(context, op),
        Op::Rope(op) => embed::rope(context, op),
        Op::RmsNorm(op) => norm::rms_norm(context, op),
        Op::RmsNormBwd(op) => norm::rms_norm_bwd(context, op),
        Op::AddRmsNorm(op) => norm::add_rms_norm(context, op),
        Op::AddRmsNormBwd(op) => norm::add_rms_norm_bwd(context, op),
        Op::Matmul(op) => linear::matmul(context, op),
        Op::MatmulQuant(op) => linear::matmul_quant(context, op),
        Op::GroupedMatmul(op) => linear::grouped_matmul(context, op),
        Op::GroupedMatmulQuant(op) => grouped_quant::grouped_matmul_quant(context, op),
        Op::Attention(op) => attention::attention(context, op),
        Op::PagedAttention(op) => attention::paged_attention(context, op),
        Op::KvWrite(op) => attention::kv_write(context, op),
        Op::AttentionBwd(op) => attention_bwd::attention_bwd(context, op),
        Op::RouterTopK(op) => router::router_top_k(context, op),
        Op::RouterTopKBwd(op) => router::router_top_k_bwd(context, op),
        Op::Permute(op) => moe::permute(context, op),
        Op::PermuteBwd(op) => moe::permute_bwd(context, op),
        Op::Unpermute(op) => moe::unpermute(context, op),
        Op::UnpermuteBwd(op) => moe::unpermute_bwd(context, op),
        Op::CrossEntropy(op) => loss::cross_entropy(context, op),
        Op::CrossEntropyBwd(op) => loss::cross_entropy_bwd(context, op),
        Op::TokenLogProb(op) => loss::token_log_prob(context, op),
        Op::TokenLogProbBwd(op) => loss::token_log_prob_bwd(context, op),
        Op::AdamW(op) => optim::adamw(context, op),
        Op::Muon(op) => optim::muon(context, op),
        Op::SumSquares(op) => optim::sum_squares(context, op),
        Op::ReduceTree(op) => optim::reduce_tree(context, op),
        Op::Sample(op) => sample::sample(context, op),
        Op::AllReduce(op) => exchange::all_reduce(context, op),
        Op::AllGather(op) => exchange::all_gather(context, op),
        Op::ReduceScatter(op) => exchange::reduce_scatter(context, op),
    }
}
