//! Mixtures of experts: choosing experts, sorting rows by expert and joining the results.
//!
//! Choices are made by stable sorts, because the vendor does not say how its own top-k breaks
//! ties, and the lower expert must win.

use pontoon_ops::{self as ops, DeviceError, Renormalise, Scoring};

use crate::core::{Core, Done, Order};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;
use crate::tensor::{Kind, Tensor};

/// What sigmoid scores' sum is added to, by contract.
const SIGMOID_SUM_EPS: f32 = 1e-20;

fn scores(core: &mut Core, logits: Tensor, scoring: Scoring) -> Result<Tensor, DeviceError> {
    if scoring == Scoring::Softmax {
        return core.softmax(logits);
    }
    let out = core.scratch(Kind::F32, logits.dims())?;
    core.sigmoid(logits, out)?;
    Ok(out)
}

/// Rows that hold a NaN, `[rows, 1]`.
fn rows_with_nan(core: &mut Core, values: Tensor) -> Result<Tensor, DeviceError> {
    let nan = core.is_nan(values)?;
    let counted = core.wide(nan)?;
    let count = core.sum(counted, 1)?;
    core.is_positive(count)
}

/// Sets to minus infinity all but the best groups, by the sum of their two best scores.
fn limit_groups(core: &mut Core, biased: Tensor, groups: usize, kept: usize) -> Done {
    let (rows, experts) = (biased.dim(0), biased.dim(1));
    let grouped = biased.reshape(&[rows, groups, experts / groups]);
    let (best, _) = core.sorted(grouped, Order::Falling)?;
    let ranks = core.sum(best.slice(2, 0, 2), 2)?.reshape(&[rows, groups]);
    let (_, order) = core.sorted(ranks, Order::Falling)?;
    let chosen = core.scratch(Kind::F32, &[rows, groups])?;
    core.zero(chosen)?;
    let ones = core.scratch(Kind::F32, &[rows, kept])?;
    core.fill(ones, 1.0)?;
    let places = core.dense(order.slice(1, 0, kept))?;
    core.scatter(chosen, places, ones)?;
    let dropped = core.is_zero(chosen)?.widen(2);
    core.fill_where(grouped, dropped, f32::NEG_INFINITY)
}

/// The chosen scores divided by their sum, if the rule says so, and scaled.
fn weighed(core: &mut Core, picked: Tensor, rule: &ops::RouterRule, weights: Tensor) -> Done {
    if rule.renormalise == Renormalise::Yes {
        let total = total(core, picked, rule)?;
        core.div(picked, total, picked)?;
    }
    core.scale(picked, rule.scale, weights)
}

/// The sum of the chosen scores, `[rows, 1]`.
fn total(core: &mut Core, picked: Tensor, rule: &ops::RouterRule) -> Result<Tensor, DeviceError> {
    let total = core.sum(picked, 1)?;
    if rule.scoring == Scoring::Sigmoid {
        core.shift(total, SIGMOID_SUM_EPS, total)?;
    }
    Ok(total)
}

pub(super) fn router(core: &mut Core, op: &ops::RouterTopK) -> Done {
    let (weights, experts) = (core.tensor(&op.weights)?, core.tensor(&op.experts)?);
    let given = core.tensor(&op.logits)?;
    let (rows, count, chosen) = (given.dim(0), given.dim(1), op.rule.chosen);
    let bad = rows_with_nan(core, given)?;
    let logits = core.scratch(Kind::F32, &[rows, count])?;
    core.copy(logits, given)?;
    core.fill_where(logits, bad, 0.0)?;
    let scores = scores(core, logits, op.rule.scoring)?;
    let biased = core.scratch(Kind::F32, &[rows, count])?;
    match &op.bias {
        Some(bias) => {
            let bias = core.tensor(bias)?.widen(0);
            core.add(scores, bias, biased)?;
        }
        None => core.copy(biased, scores)?,
    }
    if op.rule.groups > 1 {
        limit_groups(core, biased, op.rule.groups, op.rule.groups_kept)?;
    }
    let (_, order) = core.sorted(biased, Order::Falling)?;
    let best = core.dense(order.slice(1, 0, chosen))?;
    let picked = core.gather(scores, best)?;
    weighed(core, picked, &op.rule, weights)?;
    core.fill_where(weights, bad, f32::NAN)?;
    let best = core.converted(best, Kind::I32)?;
    let first: Vec<i32> = (0..chosen as i32).collect();
    let first = core.integers(&[1, chosen], &first)?;
    core.choose(bad, first, best, experts)
}

pub(super) fn router_bwd(core: &mut Core, op: &ops::RouterTopKBwd) -> Done {
    let (logits, dlogits) = (core.tensor(&op.logits)?, core.tensor(&op.dlogits)?);
    let (dweights, experts) = (core.tensor(&op.dweights)?, core.tensor(&op.experts)?);
    let scores = scores(core, logits, op.rule.scoring)?;
    let chosen = core.dense(experts)?;
    let chosen = core.converted(chosen, Kind::I64)?;
    let dscores = core.scratch(Kind::F32, dweights.dims())?;
    match op.rule.renormalise {
        Renormalise::No => core.scale(dweights, op.rule.scale, dscores)?,
        Renormalise::Yes => {
            let picked = core.gather(scores, chosen)?;
            let total = total(core, picked, &op.rule)?;
            core.mul(picked, dweights, dscores)?;
            let mean = core.sum(dscores, 1)?;
            core.div(mean, total, mean)?;
            core.sub(dweights, mean, dscores)?;
            core.div(dscores, total, dscores)?;
            core.scale(dscores, op.rule.scale, dscores)?;
        }
    }
    let spread = core.scratch(Kind::F32, scores.dims())?;
    core.zero(spread)?;
    core.scatter(spread, chosen, dscores)?;
    let target = core.target(dlogits)?;
    match op.rule.scoring {
        Scoring::Softmax => {
            let axis = Argument::I64(1);
            let arguments = [spread.into(), scores.into(), axis, target.into()];
            core.call(Operator::SoftmaxBackward, &arguments)?;
        }
        Scoring::Sigmoid => {
            let arguments = [spread, scores, target].map(Argument::from);
            core.call(Operator::SigmoidBackward, &arguments)?;
        }
    }
    core.settle(target, dlogits)
}

/// The host's own numbers `0..count`, as f32 `[1, count]`.
fn counting(core: &mut Core, count: usize) -> Result<Tensor, DeviceError> {
    let numbers: Vec<f32> = (0..count).map(|number| number as f32).collect();
    core.floats(&[1, count], &numbers)
}

pub(super) fn permute(core: &mut Core, op: &ops::Permute) -> Done {
    let (x, y) = (core.tensor(&op.x)?, core.tensor(&op.y)?);
    let (offsets, slots) = (core.tensor(&op.offsets)?, core.tensor(&op.slots)?);
    let experts = core.tensor(&op.experts)?;
    let (chosen, copies) = (experts.dim(1), experts.elements());
    let count = offsets.dim(0) - 1;
    // Expert numbers and rows are exact in f32, in which the vendor sorts on its own cores.
    let experts = core.dense(experts)?.reshape(&[copies]);
    let bad = core.outside(experts, count)?;
    let last = core.integers(&[1], &[count as i32 - 1])?;
    let safe = core.scratch(Kind::I32, &[copies])?;
    core.choose(bad, last, experts, safe)?;
    let keys = core.wide(safe)?.reshape(&[1, copies]);
    let (_, order) = core.sorted(keys, Order::Rising)?;
    let rows: Vec<i32> = (0..copies).map(|copy| (copy / chosen) as i32).collect();
    let rows = core.integers(&[copies], &rows)?;
    let source = core.scratch(Kind::I32, &[copies])?;
    core.select(rows, 0, order.reshape(&[copies]), source)?;
    let target = core.target(y)?;
    core.select(x, 0, source, target)?;
    core.settle(target, y)?;
    let places = core.wide(order)?;
    let (_, inverse) = core.sorted(places, Order::Rising)?;
    core.cast(inverse.reshape(slots.dims()), slots)?;
    let bounds = counting(core, count + 1)?;
    let before = core.scratch(Kind::Bool, &[copies, count + 1])?;
    core.less(keys.reshape(&[copies, 1]), bounds, before)?;
    let before = core.wide(before)?;
    let starts = core.sum(before, 0)?.reshape(&[count + 1]);
    core.cast(starts, offsets)
}

/// The rows at the slots, `[rows, chosen, width]`.
fn at_slots(core: &mut Core, rows: Tensor, slots: Tensor) -> Result<Tensor, DeviceError> {
    let flat = core.dense(slots)?.reshape(&[slots.elements()]);
    let picked = core.scratch(rows.kind, &[slots.elements(), rows.dim(1)])?;
    core.select(rows, 0, flat, picked)?;
    Ok(picked.reshape(&[slots.dim(0), slots.dim(1), rows.dim(1)]))
}

pub(super) fn permute_bwd(core: &mut Core, op: &ops::PermuteBwd) -> Done {
    let (dy, slots, dx) = (core.tensor(&op.dy)?, core.tensor(&op.slots)?, core.tensor(&op.dx)?);
    let picked = at_slots(core, dy, slots)?;
    let picked = core.wide(picked)?;
    let sum = core.sum(picked, 1)?;
    core.copy(dx, sum.reshape(dx.dims()))
}

pub(super) fn unpermute(core: &mut Core, op: &ops::Unpermute) -> Done {
    let (x, slots, y) = (core.tensor(&op.x)?, core.tensor(&op.slots)?, core.tensor(&op.y)?);
    let weights = core.tensor(&op.weights)?.widen(2);
    let picked = at_slots(core, x, slots)?;
    let products = core.scratch(Kind::F32, picked.dims())?;
    core.mul(picked, weights, products)?;
    let sum = core.sum(products, 1)?;
    core.copy(y, sum.reshape(y.dims()))
}

pub(super) fn unpermute_bwd(core: &mut Core, op: &ops::UnpermuteBwd) -> Done {
    let (dy, x, slots) = (core.tensor(&op.dy)?, core.tensor(&op.x)?, core.tensor(&op.slots)?);
    let (dx, dweights) = (core.tensor(&op.dx)?, core.tensor(&op.dweights)?);
    let weights = core.tensor(&op.weights)?.widen(2);
    let (rows, chosen, width) = (dy.dim(0), slots.dim(1), dy.dim(1));
    let spread = core.scratch(dy.kind, &[rows, chosen, width])?;
    core.mul(weights, dy.widen(1), spread)?;
    let index = core.dense(slots)?.reshape(&[rows * chosen, 1]);
    let target = core.target(dx)?;
    core.place_rows(target, index, spread.reshape(&[rows * chosen, width]))?;
    core.settle(target, dx)?;
    let picked = at_slots(core, x, slots)?;
    let picked = core.wide(picked)?;
    let products = core.scratch(Kind::F32, &[rows, chosen, width])?;
    core.mul(picked, dy.widen(1), products)?;
    let sums = core.sum(products, 2)?;
    core.copy(dweights, sums.reshape(dweights.dims()))
}
