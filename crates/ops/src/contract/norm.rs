//! Root-mean-square normalisation, alone and fused with the residual addition before it.

use serde::{Deserialize, Serialize};

use super::Accumulate;
use crate::dtype::DType;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// Normalises each row: `y = x * rstd * weight`, where `rstd = 1 / sqrt(mean(x^2) + eps)`.
///
/// Shapes    x, y [rows, width]; weight [width]; rstd [rows]
/// Dtypes    x, y, weight: f32, bf16 or f16, all equal; rstd f32
/// Writes    y, rstd (backward reads rstd)
/// Numerics  squares summed in f32; in 16-bit dtypes `x * rstd` is rounded before `weight`
///           multiplies it, as the published models do
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RmsNorm {
    /// Input rows.
    pub x: View,
    /// One factor per column.
    pub weight: View,
    /// Added to the mean square.
    pub eps: f32,
    /// Normalised rows.
    pub y: View,
    /// Each row's reciprocal root mean square.
    pub rstd: View,
}
contract!(RmsNorm |op, check| { x: Read, weight: Read, y: Write, rstd: Write } {
    check.rank("x", &op.x, 2)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dense_rows("x", &op.x)?;
    let (rows, width) = (op.x.dim(0), op.x.dim(1));
    check.tensor("weight", &op.weight, op.x.dtype, [width])?;
    check.tensor("y", &op.y, op.x.dtype, [rows, width])?;
    check.tensor("rstd", &op.rstd, DType::F32, [rows])?;
    check.that(op.eps >= 0.0, || format!("eps should not be negative but is {}", op.eps))?;
});

/// Gradient of [`RmsNorm`]: with `n = x * rstd`, `g = dy * weight`:
/// `dx = rstd * (g - n * mean(g * n))`, `dweight (+)= sum over rows of dy * n`.
///
/// Shapes    dy, x, dx [rows, width]; weight, dweight [width]; rstd [rows]
/// Dtypes    dy, x, weight, dx: equal floats; rstd, dweight f32
/// Writes    dx overwritten; dweight by `accumulate`
/// Numerics  dweight sums rows in fixed blocks of [`ROW_BLOCK`] rows, then the blocks in order
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RmsNormBwd {
    /// Gradient of the output.
    pub dy: View,
    /// The forward's input.
    pub x: View,
    /// The forward's weight.
    pub weight: View,
    /// The forward's reciprocal root mean squares.
    pub rstd: View,
    /// Gradient of the input.
    pub dx: View,
    /// Gradient of the weight.
    pub dweight: View,
    /// What happens to the weight gradient's old contents.
    pub accumulate: Accumulate,
}
contract!(RmsNormBwd |op, check| {
    dy: Read, x: Read, weight: Read, rstd: Read, dx: Write, dweight: op.accumulate.access(),
} {
    check.rank("x", &op.x, 2)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dense_rows("x", &op.x)?;
    let (rows, width) = (op.x.dim(0), op.x.dim(1));
    check.tensor("dy", &op.dy, op.x.dtype, [rows, width])?;
    check.tensor("weight", &op.weight, op.x.dtype, [width])?;
    check.tensor("rstd", &op.rstd, DType::F32, [rows])?;
    check.tensor("dx", &op.dx, op.x.dtype, [rows, width])?;
    check.tensor("dweight", &op.dweight, DType::F32, [width])?;
});

/// Rows summed together before blocks are, in reductions over rows.
pub const ROW_BLOCK: usize = 64;

/// Adds, then normalises: `sum = x + residual`, `y = RmsNorm(sum)`.
///
/// Shapes    x, residual, sum, y [rows, width]; weight [width]; rstd [rows]
/// Dtypes    x, residual, weight, sum, y: equal floats; rstd f32
/// Writes    sum (may be the same view as x or residual), y, rstd
/// Numerics  the sum is rounded to its dtype first; y is computed from the rounded sum
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddRmsNorm {
    /// What the last layer computed.
    pub x: View,
    /// The residual stream before it.
    pub residual: View,
    /// One factor per column.
    pub weight: View,
    /// Added to the mean square.
    pub eps: f32,
    /// The residual stream after it.
    pub sum: View,
    /// The normalised sum.
    pub y: View,
    /// Each row's reciprocal root mean square.
    pub rstd: View,
}
contract!(AddRmsNorm |op, check| {
    x: Read, residual: Read, weight: Read, sum: Write, y: Write, rstd: Write,
} {
    check.rank("x", &op.x, 2)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dense_rows("x", &op.x)?;
    let (rows, width) = (op.x.dim(0), op.x.dim(1));
    check.tensor("residual", &op.residual, op.x.dtype, [rows, width])?;
    check.tensor("weight", &op.weight, op.x.dtype, [width])?;
    check.tensor("sum", &op.sum, op.x.dtype, [rows, width])?;
    check.tensor("y", &op.y, op.x.dtype, [rows, width])?;
    check.tensor("rstd", &op.rstd, DType::F32, [rows])?;
    check.that(op.eps >= 0.0, || format!("eps should not be negative but is {}", op.eps))?;
});

/// Gradient of [`AddRmsNorm`]: `dx = dsum + RmsNormBwd(dy)`, which is the gradient of both
/// summands; `dweight` as in [`RmsNormBwd`].
///
/// Shapes    dy, dsum, sum, dx [rows, width]; weight, dweight [width]; rstd [rows]
/// Dtypes    dy, dsum, sum, weight, dx: equal floats; rstd, dweight f32
/// Writes    dx overwritten; dweight by `accumulate`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddRmsNormBwd {
    /// Gradient of the normalised output.
    pub dy: View,
    /// Gradient that reaches the sum by its other uses; absent where it has none.
    pub dsum: Option<View>,
    /// The forward's sum.
    pub sum: View,
    /// The forward's weight.
    pub weight: View,
    /// The forward's reciprocal root mean squares.
    pub rstd: View,
    /// Gradient of both summands.
    pub dx: View,
    /// Gradient of the weight.
    pub dweight: View,
    /// What happens to the weight gradient's old contents.
    pub accumulate: Accumulate,
}
contract!(AddRmsNormBwd |op, check| {
    dy: Read, dsum: Read, sum: Read, weight: Read, rstd: Read, dx: Write,
    dweight: op.accumulate.access(),
} {
    check.rank("sum", &op.sum, 2)?;
    check.dtype("sum", &op.sum, &DType::FLOATS)?;
    check.dense_rows("sum", &op.sum)?;
    let (rows, width) = (op.sum.dim(0), op.sum.dim(1));
    check.tensor("dy", &op.dy, op.sum.dtype, [rows, width])?;
    if let Some(dsum) = &op.dsum {
        check.tensor("dsum", dsum, op.sum.dtype, [rows, width])?;
    }
    check.tensor("weight", &op.weight, op.sum.dtype, [width])?;
    check.tensor("rstd", &op.rstd, DType::F32, [rows])?;
    check.tensor("dx", &op.dx, op.sum.dtype, [rows, width])?;
    check.tensor("dweight", &op.dweight, DType::F32, [width])?;
});
