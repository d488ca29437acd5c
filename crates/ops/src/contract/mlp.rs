//! The gated feed-forward's elementwise part.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// `y = gate * sigmoid(gate) * up`.
///
/// Shapes    gate, up, y [rows, width]
/// Dtypes    f32, bf16 or f16, equal
/// Writes    y; y may be the same view as gate or up
/// Numerics  in f32; in 16-bit dtypes `gate * sigmoid(gate)` is rounded before `up` multiplies it,
///           as the published models do
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwiGlu {
    /// What the sigmoid is taken of.
    pub gate: View,
    /// What is gated.
    pub up: View,
    /// Result.
    pub y: View,
}
contract!(SwiGlu |op, check| { gate: Read, up: Read, y: Write } {
    check.rank("gate", &op.gate, 2)?;
    check.dtype("gate", &op.gate, &DType::FLOATS)?;
    check.dense_rows("gate", &op.gate)?;
    check.tensor("up", &op.up, op.gate.dtype, op.gate.shape)?;
    check.tensor("y", &op.y, op.gate.dtype, op.gate.shape)?;
});

/// Gradient of [`SwiGlu`]: with `s = sigmoid(gate)`:
/// `dgate = dy * up * s * (1 + gate * (1 - s))`, `dup = dy * gate * s`.
///
/// Shapes    all [rows, width]
/// Dtypes    f32, bf16 or f16, equal
/// Writes    dgate, dup; each may be the same view as one of the inputs
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwiGluBwd {
    /// Gradient of the result.
    pub dy: View,
    /// The forward's gate.
    pub gate: View,
    /// The forward's up.
    pub up: View,
    /// Gradient of the gate.
    pub dgate: View,
    /// Gradient of up.
    pub dup: View,
}
contract!(SwiGluBwd |op, check| {
    dy: Read, gate: Read, up: Read, dgate: Write, dup: Write,
} {
    check.rank("gate", &op.gate, 2)?;
    check.dtype("gate", &op.gate, &DType::FLOATS)?;
    check.dense_rows("gate", &op.gate)?;
    let views =
        [("dy", &op.dy), ("up", &op.up), ("dgate", &op.dgate), ("dup", &op.dup)];
    for (name, view) in views {
        check.tensor(name, view, op.gate.dtype, op.gate.shape)?;
    }
});
