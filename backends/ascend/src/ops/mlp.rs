//! The gated feed-forward's elementwise part.

use pontoon_ops as ops;

use crate::core::{Core, Done};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;

/// Two calls, so that the gate is rounded before it multiplies, as the contract says.
pub(super) fn swiglu(core: &mut Core, op: &ops::SwiGlu) -> Done {
    let (gate, up, y) = (core.tensor(&op.gate)?, core.tensor(&op.up)?, core.tensor(&op.y)?);
    let gated = core.scratch(gate.kind, gate.dims())?;
    core.call(Operator::Silu, &[gate.into(), gated.into()])?;
    core.mul(gated, up, y)
}

pub(super) fn swiglu_bwd(core: &mut Core, op: &ops::SwiGluBwd) -> Done {
    let (dy, gate, up) = (core.tensor(&op.dy)?, core.tensor(&op.gate)?, core.tensor(&op.up)?);
    let (dgate, dup) = (core.tensor(&op.dgate)?, core.tensor(&op.dup)?);
    let (rows, width) = (gate.dim(0), gate.dim(1));
    // The vendor wants gate and up side by side.
    let inputs = core.scratch(gate.kind, &[rows, 2 * width])?;
    core.copy(inputs.slice(1, 0, width), gate)?;
    core.copy(inputs.slice(1, width, width), up)?;
    let gradients = core.scratch(gate.kind, &[rows, 2 * width])?;
    let axis = Argument::I64(-1);
    core.call(Operator::SwiGluGrad, &[dy.into(), inputs.into(), axis, gradients.into()])?;
    core.copy(dgate, gradients.slice(1, 0, width))?;
    core.copy(dup, gradients.slice(1, width, width))
}
