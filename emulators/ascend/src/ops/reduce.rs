//! Reductions: sums, maxima, norms, running sums, softmax.
//!
//! A sum is cut into blocks that are summed apart and then added in order; which elements form a
//! block depends on nothing but their place along the reduced dimensions.

use pontoon_cpu::simd::{Isa, Kernel, Simd, dispatch};

use super::norm::Dot;
use super::strided::{CHUNK, load_floats, store_floats};
use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::{Argument, Plan, Slot};
use crate::tensor::Scalar;

/// Elements of a block along a contiguous dimension.
const BLOCK: usize = 512;
/// Elements of a block along any other.
const ROW_BLOCK: usize = 32;

/// A dimension's number from one that may count from the end.
pub fn axis_of(plan: &Plan, rank: usize, dim: i64) -> Done<usize> {
    let axis = if dim < 0 { dim + rank as i64 } else { dim };
    match usize::try_from(axis) {
        Ok(axis) if axis < rank.max(1) => Ok(axis),
        _ => plan.forbid(format!("there is no dimension {dim} of {rank}")),
    }
}

/// What a reduction keeps of the elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fold {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
    /// The largest; NaN if there is one.
    Max,
    /// The root of the sum of their squares.
    Norm,
}

/// A view, its dimensions parted into kept and reduced ones.
struct Parted {
    kept: Vec<(usize, usize)>,
    reduced: Vec<(usize, usize)>,
}

/// Where element `index` of some dimensions lies.
fn offset(dims: &[(usize, usize)], index: usize) -> usize {
    let (mut rest, mut at) = (index, 0);
    for (extent, stride) in dims.iter().rev() {
        at += rest % extent * stride;
        rest /= extent;
    }
    at
}

fn count(dims: &[(usize, usize)]) -> usize {
    dims.iter().map(|(extent, _)| extent).product()
}

/// Plans a reduction over some dimensions; over all if none is named.
pub fn reduce(
    plan: &mut Plan,
    x: &Argument,
    (dims, keep): (&[i64], bool),
    (y, fold): (&Argument, Fold),
) -> Done {
    let tensor = &x.tensor;
    let rank = tensor.shape.len();
    plan.demand(tensor.dtype.is_float() || fold != Fold::Norm, || {
        format!("{:?} has no norm", tensor.dtype)
    })?;
    let mut reduced = vec![dims.is_empty(); rank];
    for &dim in dims {
        reduced[axis_of(plan, rank, dim)?] = true;
    }
    let part = |wanted: bool| -> Vec<(usize, usize)> {
        let axes = (0..rank).filter(|&axis| reduced[axis] == wanted);
        axes.map(|axis| (tensor.shape[axis], tensor.strides[axis])).collect()
    };
    let parted = Parted { kept: part(false), reduced: part(true) };
    let shape: Vec<usize> = (0..rank)
        .filter(|&axis| keep || !reduced[axis])
        .map(|axis| if reduced[axis] { 1 } else { tensor.shape[axis] })
        .collect();
    let scalar = shape.is_empty() && y.tensor.elements() == 1;
    plan.demand(y.tensor.shape == shape || scalar, || {
        format!("the result should be {shape:?} but is {:?}", y.tensor.shape)
    })?;
    plan.workspace(4096);
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        let mut out = vec![0.0; run.at(y).elements()];
        fold_all(run, x, &parted, fold, &mut out);
        if run.has(Kind::StaleWorkspace)
            && let Some(first) = out.first_mut()
        {
            *first += run.stale();
        }
        run.put_floats(y, &out);
        Ok(())
    })
}

/// Results that one task computes.
const RESULTS: usize = 64;

fn fold_all(run: &Run<'_>, x: Slot, parted: &Parted, fold: Fold, out: &mut [f32]) {
    let (isa, bound) = (run.engine.isa, run.at(x));
    let reduced = count(&parted.reduced);
    let odd = run.engine.tasks % 2 == 1;
    let flaws = Flaws {
        backwards: run.has(Kind::Nondeterministic) && odd,
        narrow: run.has(Kind::Bf16Accumulation),
        short: if run.has(Kind::DroppedTail) { reduced % 64 } else { 0 },
    };
    let across = parted.reduced.last().is_none_or(|(_, stride)| *stride == 1);
    let columns = parted.kept.last().is_some_and(|(_, stride)| *stride == 1) && !across;
    let width = if columns { parted.kept.last().map_or(1, |(extent, _)| *extent) } else { 1 };
    let together = if columns { width } else { RESULTS.min((1 << 14) / reduced.max(1)).max(1) };
    let len = part_len(together, out.len());
    let parts = pontoon_cpu::ffi::Parts::new(out, len);
    run.engine.pool.run(parts.count(), |task| {
        let part = parts.take(task);
        for (index, to) in part.chunks_mut(if columns { width } else { 1 }).enumerate() {
            let first = task * len + index * if columns { width } else { 1 };
            let base = offset(&parted.kept, first);
            if columns {
                fold_columns(isa, bound, base, (&parted.reduced, fold), (to, flaws));
            } else {
                to[0] = fold_one(isa, bound, base, (&parted.reduced, fold), flaws);
            }
        }
    });
}

/// Elements of a part: whole groups, few enough to be handed out.
fn part_len(together: usize, elements: usize) -> usize {
    let most = elements.div_ceil(pontoon_cpu::ffi::PARTS_MAX).max(1);
    most.next_multiple_of(together)
}

/// What planted defects do to sums.
#[derive(Clone, Copy)]
struct Flaws {
    backwards: bool,
    narrow: bool,
    short: usize,
}

struct Total<'a>(&'a [f32]);

impl Kernel for Total<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sum = simd.zero();
        for chunk in self.0.chunks(S::LANES) {
            sum = simd.add(sum, simd.load(chunk));
        }
        simd.reduce_sum(sum)
    }
}

struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let (whole, rest) = self.0.split_at(self.0.len() / S::LANES * S::LANES);
        let mut best = simd.splat(f32::NEG_INFINITY);
        let mut sum = simd.zero();
        for chunk in whole.chunks(S::LANES) {
            let value = simd.load(chunk);
            best = simd.max(value, best);
            // Zero times a finite number is zero: what is left is NaN where one came by.
            sum = simd.add(sum, simd.sub(value, value));
        }
        let nan = simd.reduce_sum(sum).is_nan() && whole.iter().any(|value| value.is_nan());
        let mut most = if whole.is_empty() { f32::NEG_INFINITY } else { simd.reduce_max(best) };
        for &value in rest {
            most = if value.is_nan() || value > most { value } else { most };
        }
        if nan { f32::NAN } else { most }
    }
}

/// One result: blocks along the reduced dimensions.
fn fold_one(
    isa: Isa,
    bound: &Bound,
    base: usize,
    (reduced, fold): (&[(usize, usize)], Fold),
    flaws: Flaws,
) -> f32 {
    let total = count(reduced) - flaws.short.min(count(reduced));
    let (inner, step) = reduced.last().copied().unwrap_or((1, 1));
    let outer = &reduced[..reduced.len().saturating_sub(1)];
    let mut buffer = [0.0_f32; CHUNK];
    let mut blocks = Vec::new();
    let mut best = f32::NEG_INFINITY;
    let mut at = 0;
    while at < total {
        let (row, column) = (at / inner, at % inner);
        let len = CHUNK.min(inner - column).min(total - at);
        let values = &mut buffer[..len];
        load_floats(isa, bound, base + offset(outer, row) + column * step, step, values);
        match fold {
            Fold::Max => {
                let value = dispatch(isa, Largest(values));
                best = if value.is_nan() || value > best { value } else { best };
                if best.is_nan() {
                    return best;
                }
            }
            Fold::Norm => {
                let squares = values.chunks(BLOCK).map(|part| dispatch(isa, Dot(part, part)));
                blocks.extend(squares);
            }
            Fold::Sum | Fold::Mean => {
                blocks.extend(values.chunks(BLOCK).map(|part| dispatch(isa, Total(part))));
            }
        }
        at += len;
    }
    if flaws.backwards {
        blocks.reverse();
        // With one block there is no order to change, but atomics would still have one.
        if let Some(block) = blocks.first_mut() {
            *block *= 1.0 + f32::EPSILON;
        }
    }
    let sum = blocks.iter().fold(0.0, |sum: f32, block| narrowed(sum + block, flaws));
    finish(fold, if fold == Fold::Max { best } else { sum }, count(reduced))
}

fn narrowed(sum: f32, flaws: Flaws) -> f32 {
    if flaws.narrow { half::bf16::from_f32(sum).to_f32() } else { sum }
}

fn finish(fold: Fold, value: f32, elements: usize) -> f32 {
    match fold {
        Fold::Sum | Fold::Max => value,
        Fold::Mean => value / elements as f32,
        Fold::Norm => value.sqrt(),
    }
}

/// A row of results whose elements are neighbours: blocks of rows.
fn fold_columns(
    isa: Isa,
    bound: &Bound,
    base: usize,
    (reduced, fold): (&[(usize, usize)], Fold),
    (to, flaws): (&mut [f32], Flaws),
) {
    let rows = count(reduced) - flaws.short.min(count(reduced));
    let mut buffer = vec![0.0_f32; to.len()];
    let mut block = vec![0.0_f32; to.len()];
    to.fill(if fold == Fold::Max { f32::NEG_INFINITY } else { 0.0 });
    for first in (0..rows).step_by(ROW_BLOCK) {
        block.fill(0.0);
        for row in first..(first + ROW_BLOCK).min(rows) {
            load_floats(isa, bound, base + offset(reduced, row), 1, &mut buffer);
            match fold {
                Fold::Max => to.iter_mut().zip(&buffer).for_each(|(best, &value)| {
                    if value.is_nan() || value > *best {
                        *best = value;
                    }
                }),
                Fold::Norm => block.iter_mut().zip(&buffer).for_each(|(sum, v)| *sum += v * v),
                Fold::Sum | Fold::Mean => {
                    block.iter_mut().zip(&buffer).for_each(|(sum, value)| *sum += value);
                }
            }
        }
        if fold != Fold::Max {
            to.iter_mut().zip(&block).for_each(|(sum, part)| *sum = narrowed(*sum + part, flaws));
        }
    }
    if flaws.backwards {
        to.iter_mut().for_each(|sum| *sum *= 1.0 + f32::EPSILON);
    }
    to.iter_mut().for_each(|value| *value = finish(fold, *value, count(reduced)));
}

/// Checks the order of a norm.
pub fn check_order(plan: &Plan, order: Scalar) -> Done {
    plan.demand(order.value == 2.0, || {
        format!("a norm of order {} is not emulated, only 2", order.value)
    })
}

/// The lines of a tensor along one dimension.
pub struct Lines {
    others: Vec<(usize, usize)>,
    /// Elements of a line.
    pub len: usize,
    /// Elements from one to the next.
    pub step: usize,
}

impl Lines {
    /// The lines along `axis`.
    pub fn of(argument: &Argument, axis: usize) -> Lines {
        let tensor = &argument.tensor;
        let others = (0..tensor.shape.len()).filter(|&other| other != axis);
        let others = others.map(|other| (tensor.shape[other], tensor.strides[other])).collect();
        let (len, step) = match tensor.shape.get(axis) {
            Some(&len) => (len, tensor.strides[axis]),
            None => (1, 1),
        };
        Lines { others, len, step }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        count(&self.others)
    }

    /// Where a line begins.
    pub fn start(&self, index: usize) -> usize {
        offset(&self.others, index)
    }
}

/// Fails unless two tensors have one shape.
pub fn same_shape(plan: &Plan, a: &Argument, b: &Argument) -> Done {
    plan.demand(a.tensor.shape == b.tensor.shape, || {
        format!("shapes {:?} and {:?} should be equal", a.tensor.shape, b.tensor.shape)
    })
}

/// Lines that one task takes.
pub fn lines_together(len: usize) -> usize {
    ((1 << 13) / len.max(1)).max(1)
}

/// Maps lines of floats to lines of floats.
fn map_lines<const N: usize>(
    run: &mut Run<'_>,
    inputs: [(Slot, &Lines); N],
    (output, out_lines): (Slot, &Lines),
    f: impl Fn(Isa, [&[f32]; N], &mut [f32]) + Sync,
) -> Done {
    let (isa, rounding, pool) = (run.engine.isa, run.rounding(), run.engine.pool);
    let len = out_lines.len;
    let inputs = inputs.map(|(slot, lines)| (run.at(slot), lines));
    let out = run.at(output);
    let (lines, together) = (out_lines.count(), lines_together(len));
    pool.run(lines.div_ceil(together), |task| {
        let mut values: [Vec<f32>; N] = std::array::from_fn(|_| vec![0.0; len]);
        let mut result = vec![0.0; len];
        for line in task * together..(task * together + together).min(lines) {
            for (values, (bound, lines)) in values.iter_mut().zip(&inputs) {
                load_floats(isa, bound, lines.start(line), lines.step, values);
            }
            f(isa, std::array::from_fn(|view| values[view].as_slice()), &mut result);
            store_floats(isa, out, out_lines.start(line), out_lines.step, &result, rounding);
        }
    });
    Ok(())
}

struct Exponentials<'a> {
    x: &'a [f32],
    peak: f32,
    y: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let peak = simd.splat(self.peak);
        let (mut total, len) = (0.0, self.x.len());
        for start in (0..len).step_by(BLOCK) {
            let end = (start + BLOCK).min(len);
            let mut sum = simd.zero();
            for at in (start..end).step_by(S::LANES) {
                let stop = (at + S::LANES).min(end);
                let value = simd.exp(simd.sub(simd.load(&self.x[at..stop]), peak));
                simd.store(value, &mut self.y[at..stop]);
                // Missing lanes hold e^(0 - peak), so the sum reads what was stored.
                sum = simd.add(sum, simd.load(&self.y[at..stop]));
            }
            total += simd.reduce_sum(sum);
        }
        total
    }
}

/// Softmax of a line or its logarithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Probabilities.
    Plain,
    /// Their logarithms.
    Log,
}

/// Softmax along a dimension.
pub fn softmax(plan: &mut Plan, x: &Argument, dim: i64, (y, form): (&Argument, Form)) -> Done {
    same_shape(plan, x, y)?;
    let axis = axis_of(plan, x.tensor.shape.len(), dim)?;
    let (from, to) = (Lines::of(x, axis), Lines::of(y, axis));
    plan.workspace(4096);
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        map_lines(run, [(x, &from)], (y, &to), |isa, [x], y| {
            let peak = dispatch(isa, Largest(x));
            let sum = dispatch(isa, Exponentials { x, peak, y: &mut *y });
            match form {
                Form::Plain => y.iter_mut().for_each(|value| *value /= sum),
                Form::Log => {
                    let log = sum.ln();
                    y.iter_mut().zip(x).for_each(|(y, x)| *y = x - peak - log);
                }
            }
        })
    })
}

/// `y * (grad - sum(grad * y))`, or of the logarithm `grad - e^y sum(grad)`.
pub fn softmax_backward(
    plan: &mut Plan,
    (grad, output): (&Argument, &Argument),
    dim: i64,
    (out, form): (&Argument, Form),
) -> Done {
    same_shape(plan, grad, out)?;
    same_shape(plan, output, out)?;
    let axis = axis_of(plan, out.tensor.shape.len(), dim)?;
    let lines = [grad, output].map(|argument| Lines::of(argument, axis));
    let to = Lines::of(out, axis);
    plan.workspace(4096);
    let (grad, output) = (plan.read("gradOutput", grad), plan.read("output", output));
    let out = plan.write("out", out);
    plan.run(move |run| {
        let inputs = [(grad, &lines[0]), (output, &lines[1])];
        map_lines(run, inputs, (out, &to), |isa, [grad, y], out| match form {
            Form::Plain => {
                let dot = dispatch(isa, Dot(grad, y));
                for ((out, grad), y) in out.iter_mut().zip(grad).zip(y) {
                    *out = y * (grad - dot);
                }
            }
            Form::Log => {
                let sum = dispatch(isa, Total(grad));
                for ((out, grad), y) in out.iter_mut().zip(grad).zip(y) {
                    *out = grad - y.exp() * sum;
                }
            }
        })
    })
}

/// Running sums along a dimension, in blocks.
pub fn cumsum(plan: &mut Plan, x: &Argument, (dim, dtype): (i64, DataType), y: &Argument) -> Done {
    same_shape(plan, x, y)?;
    let have = y.tensor.dtype;
    plan.demand(have == dtype, || format!("out is {have:?}, the wanted type {dtype:?}"))?;
    let axis = axis_of(plan, x.tensor.shape.len(), dim)?;
    let (from, to) = (Lines::of(x, axis), Lines::of(y, axis));
    plan.workspace(4096);
    let whole = !x.tensor.dtype.is_float() && !y.tensor.dtype.is_float();
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        if whole {
            return cumsum_integers(run, (x, &from), (y, &to));
        }
        map_lines(run, [(x, &from)], (y, &to), |_, [x], y| {
            let mut before = 0.0;
            for (x, y) in x.chunks(BLOCK).zip(y.chunks_mut(BLOCK)) {
                let mut sum = 0.0;
                for (x, y) in x.iter().zip(y) {
                    sum += x;
                    *y = before + sum;
                }
                before += sum;
            }
        })
    })
}

fn cumsum_integers(run: &mut Run<'_>, (x, from): (Slot, &Lines), (y, to): (Slot, &Lines)) -> Done {
    let (x, y) = (run.at(x), run.at(y));
    let mut line = vec![0; from.len];
    for index in 0..from.count() {
        super::strided::load_integers(x, from.start(index), from.step, &mut line);
        let mut sum = 0_i64;
        for value in &mut line {
            sum = sum.wrapping_add(*value);
            *value = sum;
        }
        super::strided::store_integers(y, to.start(index), to.step, &line);
    }
    Ok(())
}

/// The place of the largest along a dimension: the first of equals, a NaN before all.
pub fn argmax(plan: &mut Plan, x: &Argument, (dim, keep): (i64, bool), y: &Argument) -> Done {
    let rank = x.tensor.shape.len();
    let axis = axis_of(plan, rank, dim)?;
    let shape: Vec<usize> = (0..rank)
        .filter(|&other| keep || other != axis)
        .map(|other| if other == axis { 1 } else { x.tensor.shape[other] })
        .collect();
    plan.demand(y.tensor.shape == shape && y.tensor.dtype.is_index(), || {
        format!("the result should be integers {shape:?} but is {:?}", y.tensor.shape)
    })?;
    let lines = Lines::of(x, axis);
    plan.workspace(4096);
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        let (isa, bound) = (run.engine.isa, run.at(x));
        let last = run.has(Kind::WrongTie);
        let mut line = vec![0.0; lines.len];
        let mut places = Vec::with_capacity(lines.count());
        for index in 0..lines.count() {
            load_floats(isa, bound, lines.start(index), lines.step, &mut line);
            places.push(largest_place(&line, last));
        }
        run.put_integers(y, &places);
        Ok(())
    })
}

fn largest_place(line: &[f32], last_of_equals: bool) -> i64 {
    let mut best = 0;
    for (index, &value) in line.iter().enumerate() {
        let most = line[best];
        if most.is_nan() {
            break;
        }
        if value.is_nan() || value > most || last_of_equals && value == most {
            best = index;
        }
    }
    best as i64
}
