//! Optimisers and the reductions around them, all in f32.
//!
//! The hyper-parameters of a step are read on the host, which uploaded them; they enter the
//! vendor's calls as numbers.

use pontoon_ops::{
    self as ops, Accumulate, DeviceError, MUON_COEFFICIENTS, MUON_EPS, MUON_RMS, MUON_STEPS, View,
    hyper,
};

use crate::core::{Core, Done};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;
use crate::tensor::{Kind, Tensor};

/// A step so late that the vendor's own bias corrections are one: the waist's are in the numbers.
const LATE_STEP: f32 = 1e9;

fn numbers(core: &mut Core, view: &View) -> Result<[f64; hyper::COUNT], DeviceError> {
    let mut all = [0.0; hyper::COUNT];
    let given = core.fetch_floats(view)?;
    all.iter_mut().zip(given).for_each(|(to, number)| *to = f64::from(number));
    Ok(all)
}

/// A tensor without gaps as one row.
fn flat(core: &Core, view: &View) -> Result<Tensor, DeviceError> {
    let tensor = core.tensor(view)?;
    Ok(tensor.reshape(&[tensor.elements()]))
}

/// The gradient with this step's factor on it.
fn scaled(core: &mut Core, grad: Tensor, factor: f64) -> Result<Tensor, DeviceError> {
    if factor == 1.0 {
        return Ok(grad);
    }
    let own = core.scratch(Kind::F32, grad.dims())?;
    core.scale_once(grad, factor as f32, own)?;
    Ok(own)
}

fn rounded(core: &mut Core, weight: Tensor, compute: &Option<View>) -> Done {
    let Some(compute) = compute else { return Ok(()) };
    let compute = flat(core, compute)?;
    core.cast(weight.reshape(&[weight.elements()]), compute)
}

/// With bias corrections b1 and b2, `lr (m / b1) / (sqrt(v / b2) + eps)` equals
/// `lr' m / (sqrt(v) + eps')` for `lr' = lr sqrt(b2) / b1`, `eps' = eps sqrt(b2)`.
pub(super) fn adamw(core: &mut Core, op: &ops::AdamW) -> Done {
    let given = numbers(core, &op.hyper)?;
    let (weight, grad) = (flat(core, &op.weight)?, flat(core, &op.grad)?);
    let (m, v) = (flat(core, &op.m)?, flat(core, &op.v)?);
    let grad = scaled(core, grad, given[hyper::GRAD_SCALE])?;
    let root = given[hyper::BIAS2].sqrt();
    let rate = given[hyper::LR] * root / given[hyper::BIAS1];
    let decay = given[hyper::WEIGHT_DECAY] * given[hyper::BIAS1] / root;
    let step = core.floats(&[1], &[LATE_STEP])?;
    let mut arguments: Vec<Argument> = vec![weight.into(), m.into(), v.into(), Argument::Absent];
    arguments.extend([grad.into(), step.into()]);
    let attributes =
        [rate, given[hyper::BETA1], given[hyper::BETA2], decay, given[hyper::EPS] * root];
    arguments.extend(attributes.map(|number| Argument::F32(number as f32)));
    arguments.extend([false, false].map(Argument::Flag));
    core.call_once(Operator::ApplyAdamWV2, &arguments)?;
    rounded(core, weight, &op.compute)
}

pub(super) fn muon(core: &mut Core, op: &ops::Muon) -> Done {
    let given = numbers(core, &op.hyper)?;
    let shape = core.tensor(&op.weight)?;
    let stacked = |tensor: Tensor| if tensor.rank() == 2 { tensor.widen(0) } else { tensor };
    let (stack, rows, columns) = match shape.dims() {
        [rows, columns] => (1, *rows, *columns),
        dims => (dims[0], dims[1], dims[2]),
    };
    let (weight, momentum) = (stacked(shape), stacked(core.tensor(&op.momentum)?));
    let grad = stacked(core.tensor(&op.grad)?);
    let decay = given[hyper::BETA1];
    // `(1 - b1) g`, which both the momentum and the update take.
    let part = core.scratch(Kind::F32, grad.dims())?;
    core.scale_once(grad, (given[hyper::GRAD_SCALE] * (1.0 - decay)) as f32, part)?;
    core.scale_once(momentum, decay as f32, momentum)?;
    core.add(momentum, part, momentum)?;
    let update = core.scratch(Kind::F32, grad.dims())?;
    core.scale_once(momentum, decay as f32, update)?;
    core.add(update, part, update)?;
    let norms = core.norm(update.reshape(&[stack, rows * columns]))?;
    core.shift(norms, MUON_EPS, norms)?;
    core.div(update, norms.reshape(&[stack, 1, 1]), update)?;
    // The Gram matrix of the shorter side is the smaller one.
    let thin = if rows > columns { update.transpose(1, 2) } else { update };
    orthogonalise(core, thin)?;
    let rate = given[hyper::LR];
    let size = f64::from(MUON_RMS) * (rows.max(columns) as f64).sqrt();
    core.scale_once(weight, (1.0 - rate * given[hyper::WEIGHT_DECAY]) as f32, weight)?;
    core.scale_once(update, (rate * size) as f32, update)?;
    core.sub(weight, update, weight)?;
    rounded(core, weight, &op.compute)
}

/// Newton-Schulz steps on each matrix of a stack, in place.
fn orthogonalise(core: &mut Core, x: Tensor) -> Done {
    let (stack, rows) = (x.dim(0), x.dim(1));
    let gram = core.scratch(Kind::F32, &[stack, rows, rows])?;
    let square = core.scratch(Kind::F32, &[stack, rows, rows])?;
    let product = core.scratch(Kind::F32, x.dims())?;
    let [first, third, fifth] = MUON_COEFFICIENTS;
    for _ in 0..MUON_STEPS {
        core.product(x, x.transpose(1, 2), gram)?;
        core.product(gram, gram, square)?;
        core.scale(gram, third, gram)?;
        core.scale(square, fifth, square)?;
        core.add(gram, square, gram)?;
        core.product(gram, x, product)?;
        core.scale(x, first, x)?;
        core.add(x, product, x)?;
    }
    Ok(())
}

pub(super) fn sum_squares(core: &mut Core, op: &ops::SumSquares) -> Done {
    let (x, y) = (flat(core, &op.x)?, core.tensor(&op.y)?);
    if x.elements() == 0 {
        return core.zero(y);
    }
    let root = core.norm(x.widen(0))?;
    core.mul(root, root, y)
}

pub(super) fn reduce_tree(core: &mut Core, op: &ops::ReduceTree) -> Done {
    let (x, y) = (core.tensor(&op.x)?, core.tensor(&op.y)?);
    tree(core, x, y, op.accumulate)
}

/// Sums the first dimension along the contract's tree.
pub(super) fn tree(core: &mut Core, x: Tensor, y: Tensor, accumulate: Accumulate) -> Done {
    let parts = core.wide(x)?;
    // The parts' dimension stays with extent one.
    let y = if y.rank() < x.rank() { y.widen(0) } else { y };
    let total = branch(core, parts, 0, x.dim(0))?;
    match accumulate {
        Accumulate::Overwrite => core.copy(y, total),
        Accumulate::Add => core.add(y, total, y),
    }
}

fn branch(
    core: &mut Core,
    parts: Tensor,
    first: usize,
    count: usize,
) -> Result<Tensor, DeviceError> {
    if count == 1 {
        return Ok(parts.slice(0, first, 1));
    }
    let left_count = count.next_power_of_two() / 2;
    let left = branch(core, parts, first, left_count)?;
    let right = branch(core, parts, first + left_count, count - left_count)?;
    let sum = core.scratch(Kind::F32, left.dims())?;
    core.add(left, right, sum)?;
    Ok(sum)
}
