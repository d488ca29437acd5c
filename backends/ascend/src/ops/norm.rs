//! Root-mean-square normalisation and its gradients.

use pontoon_ops::{self as ops, Accumulate, View};

use crate::core::{Core, Done};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;
use crate::tensor::{Kind, Tensor};

fn normalise(core: &mut Core, x: Tensor, weight: &View, eps: f32, out: (&View, &View)) -> Done {
    let (gamma, y) = (core.tensor(weight)?, core.tensor(out.0)?);
    let rstd = core.tensor(out.1)?.widen(1);
    let target = core.target(y)?;
    let eps = Argument::F64(f64::from(eps));
    core.call(Operator::RmsNorm, &[x.into(), gamma.into(), eps, target.into(), rstd.into()])?;
    core.settle(target, y)
}

pub(super) fn rms_norm(core: &mut Core, op: &ops::RmsNorm) -> Done {
    let x = core.tensor(&op.x)?;
    normalise(core, x, &op.weight, op.eps, (&op.y, &op.rstd))
}

/// Two calls: the vendor's fused one does not say whether it normalises the rounded sum.
pub(super) fn add_rms_norm(core: &mut Core, op: &ops::AddRmsNorm) -> Done {
    let (x, residual) = (core.tensor(&op.x)?, core.tensor(&op.residual)?);
    let sum = core.tensor(&op.sum)?;
    core.add(x, residual, sum)?;
    normalise(core, sum, &op.weight, op.eps, (&op.y, &op.rstd))
}

/// What both gradients read.
struct Backward {
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    rstd: Tensor,
}

impl Backward {
    /// Writes `dx` without the other uses' part, and the weight's gradient.
    fn run(&self, core: &mut Core, dx: Tensor, dweight: &View, accumulate: Accumulate) -> Done {
        let dweight = core.tensor(dweight)?;
        let own = match accumulate {
            Accumulate::Overwrite => dweight,
            Accumulate::Add => core.scratch(Kind::F32, dweight.dims())?,
        };
        let Backward { dy, x, gamma, rstd } = *self;
        let arguments = [dy, x, rstd, gamma, dx, own].map(Argument::from);
        core.call(Operator::RmsNormGrad, &arguments)?;
        match accumulate {
            Accumulate::Overwrite => Ok(()),
            Accumulate::Add => core.add(dweight, own, dweight),
        }
    }
}

pub(super) fn rms_norm_bwd(core: &mut Core, op: &ops::RmsNormBwd) -> Done {
    let [dy, x, gamma, dx] = tensors(core, [&op.dy, &op.x, &op.weight, &op.dx])?;
    let rstd = core.tensor(&op.rstd)?.widen(1);
    let target = core.target(dx)?;
    Backward { dy, x, gamma, rstd }.run(core, target, &op.dweight, op.accumulate)?;
    core.settle(target, dx)
}

pub(super) fn add_rms_norm_bwd(core: &mut Core, op: &ops::AddRmsNormBwd) -> Done {
    let [dy, x, gamma, dx] = tensors(core, [&op.dy, &op.sum, &op.weight, &op.dx])?;
    let rstd = core.tensor(&op.rstd)?.widen(1);
    let Some(dsum) = &op.dsum else {
        let target = core.target(dx)?;
        Backward { dy, x, gamma, rstd }.run(core, target, &op.dweight, op.accumulate)?;
        return core.settle(target, dx);
    };
    let dsum = core.tensor(dsum)?;
    // Two roundings to 16 bits would be one too many, so the norm's part is kept in f32.
    let (dy, x, gamma) = (core.wide(dy)?, core.wide(x)?, core.wide(gamma)?);
    let part = core.scratch(Kind::F32, dx.dims())?;
    Backward { dy, x, gamma, rstd }.run(core, part, &op.dweight, op.accumulate)?;
    core.add(part, dsum, dx)
}

fn tensors<const N: usize>(
    core: &Core,
    views: [&View; N],
) -> Result<[Tensor; N], pontoon_ops::DeviceError> {
    let mut found = [Tensor::contiguous(0, Kind::F32, &[]); N];
    for (tensor, view) in found.iter_mut().zip(views) {
        *tensor = core.tensor(view)?;
    }
    Ok(found)
}
