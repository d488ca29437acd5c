//! Optimisers and the reductions around them. Everything here is f32: masters, moments, gradients.

use serde::{Deserialize, Serialize};

use super::Accumulate;
use crate::dtype::DType;
use crate::error::OpError;
use crate::op::Access::{Read, ReadWrite, Write};
use crate::op::contract;
use crate::view::View;

/// Where each number stands in an optimiser's `hyper` operand, which the host rewrites every step
/// so that the program itself never changes.
pub mod hyper {
    /// Learning rate.
    pub const LR: usize = 0;
    /// Decay of the first moment (AdamW) or of the momentum (Muon).
    pub const BETA1: usize = 1;
    /// Decay of the second moment.
    pub const BETA2: usize = 2;
    /// Added to the root of the second moment.
    pub const EPS: usize = 3;
    /// Decoupled weight decay.
    pub const WEIGHT_DECAY: usize = 4;
    /// `1 - beta1^t`.
    pub const BIAS1: usize = 5;
    /// `1 - beta2^t`.
    pub const BIAS2: usize = 6;
    /// Factor on the gradient (clipping).
    pub const GRAD_SCALE: usize = 7;
    /// Numbers in all.
    pub const COUNT: usize = 8;
}

/// AdamW with decoupled weight decay. With `g = grad_scale * grad`:
/// `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`,
/// `weight = weight (1 - lr wd) - lr (m / bias1) / (sqrt(v / bias2) + eps)`; then
/// `compute = weight`, rounded.
///
/// Shapes    weight, grad, m, v, compute: equal, contiguous; hyper [hyper::COUNT]
/// Dtypes    f32; compute bf16 or f16
/// Writes    weight, m, v in place; compute
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Master weight.
    pub weight: View,
    /// Its gradient.
    pub grad: View,
    /// First moment.
    pub m: View,
    /// Second moment.
    pub v: View,
    /// The rounded copy that the model computes with; absent in an f32 run.
    pub compute: Option<View>,
    /// This step's numbers, placed as [`hyper`] says.
    pub hyper: View,
}
contract!(AdamW |op, check| {
    weight: ReadWrite, grad: Read, m: ReadWrite, v: ReadWrite, compute: Write, hyper: Read,
} {
    masters_fit(&check, &op.weight, &op.compute, &op.hyper)?;
    for (name, view) in [("grad", &op.grad), ("m", &op.m), ("v", &op.v)] {
        check.packed(name, view, op.weight.shape)?;
        check.dtype(name, view, &[DType::F32])?;
    }
});

fn masters_fit(
    check: &crate::check::Check,
    weight: &View,
    compute: &Option<View>,
    hyper: &View,
) -> Result<(), OpError> {
    check.contiguous("weight", weight)?;
    check.dtype("weight", weight, &[DType::F32])?;
    if let Some(compute) = compute {
        check.packed("compute", compute, weight.shape)?;
        check.dtype("compute", compute, &[DType::Bf16, DType::F16])?;
    }
    check.tensor("hyper", hyper, DType::F32, [hyper::COUNT])
}

/// Newton-Schulz steps of [`Muon`]; five bring singular values near one.
pub const MUON_STEPS: usize = 5;
/// Coefficients of the quintic `a x + b x^3 + c x^5` of each step (Jordan et al., "Muon: an
/// optimizer for hidden layers in neural networks", 2024).
pub const MUON_COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Added to the Frobenius norm before it divides.
pub const MUON_EPS: f32 = 1e-7;
/// Matches the update's size to AdamW's: `lr` is multiplied by this times
/// `sqrt(max(rows, columns))` (Liu et al., "Muon is scalable for LLM training", 2025).
pub const MUON_RMS: f32 = 0.2;

/// Muon: momentum, orthogonalised. With `g = grad_scale * grad`: `momentum = b1 momentum + (1-b1)
/// g`, `u = (1-b1) g + b1 momentum` (Nesterov), `o` = [`MUON_STEPS`] Newton-Schulz steps on
/// `u / (|u| + eps)`, `weight = weight (1 - lr wd) - lr * 0.2 sqrt(max(rows, columns)) * o`.
/// A leading third dimension stacks independent matrices.
///
/// Shapes    weight, grad, momentum, compute: [rows, columns] or [stack, rows, columns], equal,
///           contiguous; hyper [hyper::COUNT]
/// Dtypes    f32; compute bf16 or f16
/// Writes    weight, momentum in place; compute
/// Numerics  products as [`super::Matmul`] in f32
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Muon {
    /// Master weight.
    pub weight: View,
    /// Its gradient.
    pub grad: View,
    /// Momentum.
    pub momentum: View,
    /// The rounded copy that the model computes with; absent in an f32 run.
    pub compute: Option<View>,
    /// This step's numbers, placed as [`hyper`] says.
    pub hyper: View,
}
contract!(Muon |op, check| {
    weight: ReadWrite, grad: Read, momentum: ReadWrite, compute: Write, hyper: Read,
} {
    let rank = op.weight.shape.rank();
    check.that(rank == 2 || rank == 3, || {
        format!("weight should be a matrix or a stack of them but is {:?}", op.weight.shape)
    })?;
    masters_fit(&check, &op.weight, &op.compute, &op.hyper)?;
    for (name, view) in [("grad", &op.grad), ("momentum", &op.momentum)] {
        check.packed(name, view, op.weight.shape)?;
        check.dtype(name, view, &[DType::F32])?;
    }
});

/// Elements summed one after the other before partial sums are, in [`SumSquares`].
pub const SUM_BLOCK: usize = 4096;

/// `y = sum of x^2`: blocks of [`SUM_BLOCK`] elements, then the blocks by [`ReduceTree`]'s order.
///
/// Shapes    x any, contiguous; y [1]
/// Dtypes    x f32, bf16 or f16; y f32
/// Writes    y
/// Numerics  in f32, within a block in any fixed order
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SumSquares {
    /// What is squared.
    pub x: View,
    /// The sum.
    pub y: View,
}
contract!(SumSquares |op, check| { x: Read, y: Write } {
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.contiguous("x", &op.x)?;
    check.tensor("y", &op.y, DType::F32, [1])?;
});

/// Sums over the first dimension along one fixed binary tree: the parts `0..n` are split at the
/// largest power of two below n, each side is summed, then the two sums are added.
///
/// Shapes    x [parts, ...]; y [...]; any strides
/// Dtypes    x: f32, bf16 or f16; y: the same or f32
/// Writes    y by `accumulate`
/// Numerics  in f32, rounded once at the end
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReduceTree {
    /// The parts.
    pub x: View,
    /// Their sum.
    pub y: View,
    /// What happens to the sum's old contents.
    pub accumulate: Accumulate,
}
contract!(ReduceTree |op, check| { x: Read, y: op.accumulate.access() } {
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dtype("y", &op.y, &[op.x.dtype, DType::F32])?;
    check.that(op.x.shape.rank() >= 1 && op.x.dims()[1..] == *op.y.dims(), || {
        format!("x {:?} should be parts of y {:?}", op.x.shape, op.y.shape)
    })?;
});
