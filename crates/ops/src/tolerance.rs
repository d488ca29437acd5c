//! How far a backend's result may lie from the f64 reference, per operation and dtype.
//!
//! The reference computes, beside each value, its magnitude: the sum of the absolute terms that
//! went into it. A result may err by the rounding of its own dtype, by the rounding of
//! intermediates stored in the compute dtype, and by f32 accumulation:
//! `limit = output * eps(out) * |value| + (intermediate * eps(compute) + accumulate * eps(f32)) *
//! magnitude`.

use crate::dtype::DType;
use crate::op::OpName;

/// The three factors of an operation's error limit, in units of the epsilons.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Roundings of the result to its own dtype.
    pub output: f64,
    /// Roundings of intermediates to the compute dtype.
    pub intermediate: f64,
    /// f32 accumulation steps, in units of eps(f32) times the magnitude.
    pub accumulate: f64,
}

impl Tolerance {
    /// The largest error allowed for a result of dtype `out` computed in dtype `compute`.
    pub fn limit(&self, out: DType, compute: DType, value: f64, magnitude: f64) -> f64 {
        let accumulate = self.accumulate * DType::F32.epsilon();
        let intermediate = self.intermediate * compute.epsilon();
        self.output * out.epsilon() * value.abs() + (intermediate + accumulate) * magnitude
    }
}

const fn row(output: f64, intermediate: f64, accumulate: f64) -> Tolerance {
    Tolerance { output, intermediate, accumulate }
}

/// The tolerance of an operation. Half an epsilon is one correct rounding; what stands above that
/// is explained beside the number.
pub const fn tolerance(op: OpName) -> Tolerance {
    match op {
        // Bits are moved, not computed.
        OpName::Copy | OpName::Fill | OpName::Embed | OpName::Permute | OpName::KvWrite => {
            row(0.0, 0.0, 0.0)
        }
        OpName::AllGather => row(0.0, 0.0, 0.0),
        OpName::Cast => row(0.5, 0.0, 0.0),
        OpName::Add | OpName::Scale | OpName::AllReduce | OpName::ReduceScatter => {
            row(0.51, 0.0, 4.0)
        }
        OpName::ReduceTree | OpName::SumSquares => row(0.51, 0.0, 64.0),
        OpName::EmbedBwd | OpName::PermuteBwd | OpName::Unpermute => row(0.51, 0.0, 64.0),
        OpName::UnpermuteBwd => row(0.51, 0.0, 64.0),
        // Two roundings in 16-bit dtypes (before and after the weight), f32 square root.
        OpName::RmsNorm => row(1.1, 0.0, 64.0),
        OpName::AddRmsNorm => row(1.1, 0.0, 64.0),
        OpName::RmsNormBwd | OpName::AddRmsNormBwd => row(0.6, 0.0, 128.0),
        // A chain over k: the error grows at most linearly in k, in practice as its root.
        OpName::Matmul
        | OpName::GroupedMatmul
        | OpName::MatmulQuant
        | OpName::GroupedMatmulQuant => row(0.51, 0.0, 64.0),
        OpName::Rope => row(0.51, 0.0, 4.0),
        // Probabilities (and ds) may be rounded to the dtype before they meet a product.
        OpName::Attention | OpName::PagedAttention => row(0.6, 0.6, 64.0),
        OpName::AttentionBwd => row(0.6, 1.2, 256.0),
        // Two roundings in 16-bit dtypes, and an exponential.
        OpName::SwiGlu => row(1.1, 0.0, 16.0),
        OpName::SwiGluBwd => row(0.6, 0.0, 32.0),
        OpName::RouterTopK | OpName::RouterTopKBwd => row(1.0, 0.0, 64.0),
        OpName::CrossEntropy | OpName::TokenLogProb => row(0.6, 0.0, 128.0),
        // dlogits is rounded to the dtype before it meets the products.
        OpName::CrossEntropyBwd | OpName::TokenLogProbBwd => row(0.6, 0.6, 128.0),
        OpName::AdamW => row(1.0, 0.0, 32.0),
        // Five Newton-Schulz steps amplify early errors; judged against the update's size.
        OpName::Muon => row(1.0, 0.0, 4096.0),
        OpName::Sample => row(0.6, 0.0, 128.0),
    }
}
