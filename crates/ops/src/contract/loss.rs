//! Losses, fused with the output head so that logits never stand whole in memory.

use serde::{Deserialize, Serialize};

use super::Accumulate;
use crate::dtype::DType;
use crate::error::OpError;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// The target that counts for nothing: its row's loss and gradient are zero.
pub const IGNORED: i32 = -100;

/// `loss[r] = lse[r] - logits[r, targets[r]]`, where `logits = x head^T` and
/// `lse = log(sum(exp(logits)))`.
///
/// Shapes    x [rows, width]; head [vocabulary, width]; targets, loss, lse [rows]
/// Dtypes    x, head: f32, bf16 or f16, equal; targets i32; loss, lse f32
/// Writes    loss (0 where the target is [`IGNORED`]; NaN where it lies outside the vocabulary),
///           lse
/// Numerics  logits as [`super::Matmul`] with an f32 result, in chunks; sums of exponentials in
///           f32 over fixed chunks of the vocabulary
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossEntropy {
    /// The last layer's rows.
    pub x: View,
    /// Output head, one row per token of the vocabulary.
    pub head: View,
    /// The right next token of each row.
    pub targets: View,
    /// Each row's loss.
    pub loss: View,
    /// Logarithm of each row's sum of exponentials.
    pub lse: View,
}
contract!(CrossEntropy |op, check| {
    x: Read, head: Read, targets: Read, loss: Write, lse: Write,
} {
    let rows = head_fits(&check, &op.x, &op.head, &op.targets)?;
    check.tensor("loss", &op.loss, DType::F32, [rows])?;
    check.tensor("lse", &op.lse, DType::F32, [rows])?;
});

fn head_fits(
    check: &crate::check::Check,
    x: &View,
    head: &View,
    targets: &View,
) -> Result<usize, OpError> {
    check.dtype("head", head, &[x.dtype])?;
    head_shape_fits(check, x, head, targets)
}

fn head_shape_fits(
    check: &crate::check::Check,
    x: &View,
    head: &View,
    targets: &View,
) -> Result<usize, OpError> {
    check.rank("x", x, 2)?;
    check.rank("head", head, 2)?;
    check.dtype("x", x, &DType::FLOATS)?;
    check.dense_rows("x", x)?;
    let (rows, width) = (x.dim(0), x.dim(1));
    check.packed("head", head, [head.dim(0), width])?;
    check.tensor("targets", targets, DType::I32, [rows])?;
    Ok(rows)
}

/// Loss and gradients in one pass over the head: the forward's results, and with
/// `dlogits[r] = dloss[r] * (softmax(logits[r]) - onehot(targets[r]))`:
/// `dx = dlogits head`, `dhead (+)= dlogits^T x`.
///
/// A training program holds this operation in place of [`CrossEntropy`], so that logits are
/// computed once. Logits exist for a chunk of rows at a time.
///
/// Shapes    as [`CrossEntropy`]; dloss [rows]; dx [rows, width]; dhead [vocabulary, width]
/// Dtypes    as [`CrossEntropy`]; dloss, dhead f32; dx as x
/// Writes    loss, lse, dx overwritten; dhead by `accumulate`
/// Numerics  dlogits is rounded to x's dtype before it meets the products
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CrossEntropyBwd {
    /// The last layer's rows.
    pub x: View,
    /// Output head.
    pub head: View,
    /// The right next token of each row.
    pub targets: View,
    /// Gradient of each row's loss.
    pub dloss: View,
    /// Each row's loss.
    pub loss: View,
    /// Logarithm of each row's sum of exponentials.
    pub lse: View,
    /// Gradient of the rows.
    pub dx: View,
    /// Gradient of the head.
    pub dhead: View,
    /// What happens to the head gradient's old contents.
    pub accumulate: Accumulate,
}
contract!(CrossEntropyBwd |op, check| {
    x: Read, head: Read, targets: Read, dloss: Read, loss: Write, lse: Write, dx: Write,
    dhead: op.accumulate.access(),
} {
    let rows = head_fits(&check, &op.x, &op.head, &op.targets)?;
    check.tensor("dloss", &op.dloss, DType::F32, [rows])?;
    check.tensor("loss", &op.loss, DType::F32, [rows])?;
    check.tensor("lse", &op.lse, DType::F32, [rows])?;
    check.tensor("dx", &op.dx, op.x.dtype, [rows, op.x.dim(1)])?;
    check.tensor("dhead", &op.dhead, DType::F32, [op.head.dim(0), op.head.dim(1)])?;
});

/// Log-probability of each row's target at a temperature, and the entropy of the distribution;
/// what reinforcement learning and scoring read.
/// `logprob[r] = logits[r, t] / temperature - log(sum(exp(logits[r] / temperature)))`.
///
/// Shapes    x [rows, width]; head [vocabulary, width]; targets, logprob, entropy [rows]; scales as
///           [`super::MatmulQuant`] with one row to a scale
/// Dtypes    as [`CrossEntropy`]; logprob, entropy f32; with scales, head i8 or i4
/// Writes    logprob (0 where [`IGNORED`]), entropy
/// Numerics  as [`CrossEntropy`]; logits of a quantised head as [`super::MatmulQuant`]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogProb {
    /// The last layer's rows.
    pub x: View,
    /// Output head.
    pub head: View,
    /// One scale per row and block of a quantised head.
    pub scales: Option<View>,
    /// Columns of the head that share a scale, a multiple of 32 up to 256; 0 without scales.
    pub block_k: usize,
    /// The token of each row.
    pub targets: View,
    /// Divides the logits; positive.
    pub temperature: f32,
    /// Each token's log-probability.
    pub logprob: View,
    /// Each distribution's entropy in nats.
    pub entropy: View,
}
contract!(TokenLogProb |op, check| {
    x: Read, head: Read, scales: Read, targets: Read, logprob: Write, entropy: Write,
} {
    let rows = match &op.scales {
        None => head_fits(&check, &op.x, &op.head, &op.targets)?,
        Some(scales) => {
            let rows = head_shape_fits(&check, &op.x, &op.head, &op.targets)?;
            check.dtype("head", &op.head, &[DType::I8, DType::I4])?;
            check.that(op.block_k > 0 && op.block_k <= 256 && op.block_k.is_multiple_of(32), || {
                format!("block_k should be a multiple of 32 up to 256 but is {}", op.block_k)
            })?;
            let blocks = op.x.dim(1).div_ceil(op.block_k);
            check.tensor("scales", scales, DType::F32, [op.head.dim(0), blocks])?;
            rows
        }
    };
    check.tensor("logprob", &op.logprob, DType::F32, [rows])?;
    check.tensor("entropy", &op.entropy, DType::F32, [rows])?;
    check.that(op.temperature > 0.0, || {
        format!("temperature should be positive but is {}", op.temperature)
    })?;
});

/// [`TokenLogProb`] with the gradient of its log-probabilities:
/// `dlogits[r] = dlogprob[r] * (onehot - softmax(logits[r] / temperature)) / temperature`.
///
/// Shapes    as [`TokenLogProb`]; dlogprob [rows]; dx [rows, width]; dhead [vocabulary, width]
/// Dtypes    as [`CrossEntropyBwd`]
/// Writes    dx overwritten; dhead by `accumulate`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogProbBwd {
    /// The last layer's rows.
    pub x: View,
    /// Output head.
    pub head: View,
    /// The token of each row.
    pub targets: View,
    /// Divides the logits; positive.
    pub temperature: f32,
    /// Gradient of each log-probability.
    pub dlogprob: View,
    /// Gradient of the rows.
    pub dx: View,
    /// Gradient of the head.
    pub dhead: View,
    /// What happens to the head gradient's old contents.
    pub accumulate: Accumulate,
}
contract!(TokenLogProbBwd |op, check| {
    x: Read, head: Read, targets: Read, dlogprob: Read, dx: Write,
    dhead: op.accumulate.access(),
} {
    let rows = head_fits(&check, &op.x, &op.head, &op.targets)?;
    check.tensor("dlogprob", &op.dlogprob, DType::F32, [rows])?;
    check.tensor("dx", &op.dx, op.x.dtype, [rows, op.x.dim(1)])?;
    check.tensor("dhead", &op.dhead, DType::F32, [op.head.dim(0), op.head.dim(1)])?;
    check.that(op.temperature > 0.0, || {
        format!("temperature should be positive but is {}", op.temperature)
    })?;
});
