//! Copy, Cast, Fill, Add, Scale and the gated activation: work that is bound by memory.

use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::Pod;
use pontoon_ops::sums::of_row;
use pontoon_ops::{self as ops, DType, Op, View};

use super::{Context, Done, elements_per_task, row_stride, rows_per_task, unsupported, with_float};
use crate::ffi::Parts;
use crate::simd::{Element, Kernel, Simd, dispatch};

/// Whether an operation whose output is one of its inputs needs no copy of that input.
pub(crate) fn handles_in_place(op: &Op) -> bool {
    matches!(op, Op::Add(add) if (add.y == add.a || add.y == add.b) && add.y.is_contiguous()
        && add.a.is_contiguous() && add.b.is_contiguous() && add.a != add.b)
}

/// Elements that are added and summed while they are in the nearest cache.
const SUMMED_TOGETHER: usize = 2048;

/// Elements per task of contiguous work: whole parts, few enough to be handed out.
fn part_len(elements: usize) -> usize {
    elements_per_task(elements).max(elements.div_ceil(crate::ffi::PARTS_MAX)).next_multiple_of(64)
}

pub(super) fn copy(context: &mut Context<'_>, op: &ops::Copy) -> Done {
    match op.src.dtype.bits() {
        32 => copy_as::<u32>(context, op),
        16 => copy_as::<u16>(context, op),
        8 => copy_as::<u8>(context, op),
        _ => Err(unsupported(op.src.dtype)),
    }
}

fn copy_as<T: Pod + Send + Sync>(context: &mut Context<'_>, op: &ops::Copy) -> Done {
    let src = context.operands.read::<T>(&op.src)?;
    let dst = context.operands.write::<T>(&op.dst)?;
    if op.src.is_contiguous() && op.dst.is_contiguous() {
        let len = part_len(dst.len());
        let parts = Parts::new(dst, len);
        context.pool.run(parts.count(), |task| {
            let to = parts.take(task);
            to.copy_from_slice(&src[task * len..][..to.len()]);
        });
        return Ok(());
    }
    by_outer_rows(context, &op.dst, dst, &|to, first, rows| {
        copy_rows(src, &op.src, first, to, &op.dst, rows);
    });
    Ok(())
}

/// Splits a strided output along its first dimension where rows follow one another in memory, and
/// calls `work(part, first row, rows)`; else calls it once.
fn by_outer_rows<T: Send + Sync>(
    context: &Context<'_>,
    view: &View,
    slice: &mut [T],
    work: &(dyn Fn(&mut [T], usize, usize) + Sync),
) {
    let rows = if view.shape.rank() == 0 { 1 } else { view.dim(0) };
    let inner = view.elements().checked_div(rows).unwrap_or(0);
    let span: usize = (1..view.shape.rank()).map(|a| (view.dim(a) - 1) * view.stride(a)).sum();
    let stride = if rows > 1 { view.stride(0) } else { span + 1 };
    if rows <= 1 || stride < span + 1 {
        work(slice, 0, rows);
        return;
    }
    let per_task = rows_per_task(rows, inner);
    let parts = Parts::new(slice, stride * per_task);
    context.pool.run(rows.div_ceil(per_task), |task| {
        let first = task * per_task;
        work(parts.take(task), first, per_task.min(rows - first));
    });
}

/// The dimensions and strides of a view, padded in front to four.
fn padded(view: &View) -> ([usize; 4], [usize; 4]) {
    let rank = view.shape.rank();
    let (mut dims, mut strides) = ([1; 4], [0; 4]);
    dims[4 - rank..].copy_from_slice(view.dims());
    strides[4 - rank..].copy_from_slice(view.strides());
    (dims, strides)
}

/// Calls `row(destination offset, source offsets)` for each innermost row of `rows` outer rows.
fn each_row<const N: usize>(
    target: &View,
    sources: [&View; N],
    (first, rows): (usize, usize),
    mut row: impl FnMut(usize, [usize; N]),
) {
    let rank = target.shape.rank();
    let (mut dims, to) = padded(target);
    let from = sources.map(|source| padded(source).1);
    let outer = 4 - rank.max(1);
    let mut starts = [0; N];
    if rank > 1 {
        dims[outer] = rows;
        starts = from.map(|strides| first * strides[outer]);
    } else {
        assert!(first == 0, "a view of one row is not split");
    }
    for i in 0..dims[0] {
        for j in 0..dims[1] {
            for k in 0..dims[2] {
                let at = |s: &[usize; 4]| i * s[0] + j * s[1] + k * s[2];
                let mut offsets = starts;
                for (offset, strides) in offsets.iter_mut().zip(&from) {
                    *offset += at(strides);
                }
                row(at(&to), offsets);
            }
        }
    }
}

fn copy_rows<T: Pod>(
    src: &[T],
    src_view: &View,
    first: usize,
    dst: &mut [T],
    dst_view: &View,
    rows: usize,
) {
    let width = padded(dst_view).0[3];
    let (from_step, to_step) = (padded(src_view).1[3], padded(dst_view).1[3]);
    if dst_view.shape.rank() <= 1 {
        for index in 0..width {
            dst[index * to_step] = src[index * from_step];
        }
        return;
    }
    each_row(dst_view, [src_view], (first, rows), |to, [from]| {
        if from_step == 1 && to_step == 1 {
            dst[to..to + width].copy_from_slice(&src[from..from + width]);
            return;
        }
        for index in 0..width {
            dst[to + index * to_step] = src[from + index * from_step];
        }
    });
}

struct Map1<'a, A, B, F> {
    x: &'a [A],
    y: &'a mut [B],
    f: F,
}

/// A function of one vector.
trait Lanes1: Copy {
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32;
}

#[derive(Clone, Copy)]
struct Times(f32);

impl Lanes1 for Times {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.mul(simd.splat(self.0), x)
    }
}

#[derive(Clone, Copy)]
struct Same;

impl Lanes1 for Same {
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, x: S::F32) -> S::F32 {
        x
    }
}

impl<A: Element, B: Element, F: Lanes1> Kernel for Map1<'_, A, B, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, y) in self.x.chunks(S::LANES).zip(self.y.chunks_mut(S::LANES)) {
            B::store(simd, self.f.apply(simd, A::load(simd, x)), y);
        }
    }
}

fn map<A: Element, B: Element, F: Lanes1 + Send + Sync>(
    context: &mut Context<'_>,
    x: &View,
    y: &View,
    f: F,
) -> Done {
    let (x, y) = (context.operands.read::<A>(x)?, context.operands.write::<B>(y)?);
    let len = part_len(y.len());
    let parts = Parts::new(y, len);
    let isa = context.isa;
    context.pool.run(parts.count(), |task| {
        let y = parts.take(task);
        let x = &x[task * len..][..y.len()];
        dispatch(isa, Map1 { x, y, f });
    });
    Ok(())
}

pub(super) fn cast(context: &mut Context<'_>, op: &ops::Cast) -> Done {
    with_float!(op.src.dtype, A => {
        with_float!(op.dst.dtype, B => map::<A, B, Same>(context, &op.src, &op.dst, Same))
    })
}

pub(super) fn scale(context: &mut Context<'_>, op: &ops::Scale) -> Done {
    with_float!(op.x.dtype, T => map::<T, T, Times>(context, &op.x, &op.y, Times(op.factor)))
}

pub(super) fn fill(context: &mut Context<'_>, op: &ops::Fill) -> Done {
    let value = op.value;
    match op.dst.dtype {
        DType::I32 => fill_as(context, &op.dst, value.round_ties_even() as i32),
        dtype => with_float!(dtype, T => fill_as(context, &op.dst, T::from_f32(value))),
    }
}

fn fill_as<T: Pod + Send + Sync>(context: &mut Context<'_>, view: &View, value: T) -> Done {
    let dst = context.operands.write::<T>(view)?;
    if view.is_contiguous() {
        let parts = Parts::new(dst, part_len(view.elements()));
        context.pool.run(parts.count(), |task| parts.take(task).fill(value));
        return Ok(());
    }
    let (width, step) = (padded(view).0[3], padded(view).1[3]);
    if view.shape.rank() <= 1 {
        (0..width).for_each(|index| dst[index * step] = value);
        return Ok(());
    }
    each_row(view, [], (0, view.dim(0)), |to, []| {
        (0..width).for_each(|index| dst[to + index * step] = value);
    });
    Ok(())
}

struct AddRows<'a, T> {
    a: &'a [T],
    b: &'a [T],
    y: &'a mut [T],
}

impl<T: Element> Kernel for AddRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let inputs = self.a.chunks(S::LANES).zip(self.b.chunks(S::LANES));
        for ((a, b), y) in inputs.zip(self.y.chunks_mut(S::LANES)) {
            T::store(simd, simd.add(T::load(simd, a), T::load(simd, b)), y);
        }
    }
}

struct AddInto<'a, T> {
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Element> Kernel for AddInto<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, y) in self.x.chunks(S::LANES).zip(self.y.chunks_mut(S::LANES)) {
            let sum = simd.add(T::load(simd, y), T::load(simd, x));
            T::store(simd, sum, y);
        }
    }
}

/// [`AddInto`], with the word sums of x, of y before and of y after.
struct AddSummed<'a, T> {
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Element> Kernel for AddSummed<'_, T> {
    type Output = [u32; 3];
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [u32; 3] {
        let mut sums = [0_u32; 3];
        for (x, y) in self.x.chunks(SUMMED_TOGETHER).zip(self.y.chunks_mut(SUMMED_TOGETHER)) {
            let before = [of_row(bytemuck::cast_slice(x)), of_row(bytemuck::cast_slice(y))];
            AddInto { x, y: &mut *y }.run(simd);
            let found = [before[0], before[1], of_row(bytemuck::cast_slice(y))];
            sums.iter_mut().zip(found).for_each(|(sum, part)| *sum = sum.wrapping_add(part));
        }
        sums
    }
}

pub(super) fn add(context: &mut Context<'_>, op: &ops::Add) -> Done {
    with_float!(op.a.dtype, T => add_as::<T>(context, op))
}

fn add_as<T: Element>(context: &mut Context<'_>, op: &ops::Add) -> Done {
    let isa = context.isa;
    if handles_in_place(&Op::Add(op.clone())) {
        let other = if op.y == op.a { &op.b } else { &op.a };
        let (x, y) = (context.operands.read::<T>(other)?, context.operands.write::<T>(&op.y)?);
        let len = part_len(y.len());
        let parts = Parts::new(y, len);
        if context.checks.on {
            let sums: [AtomicU32; 3] = Default::default();
            context.pool.run(parts.count(), |task| {
                let y = parts.take(task);
                let x = &x[task * len..][..y.len()];
                let found = dispatch(isa, AddSummed { x, y });
                sums.iter().zip(found).for_each(|(sum, part)| {
                    sum.fetch_add(part, Ordering::Relaxed);
                });
            });
            let [of_x, before, after] = sums.map(AtomicU32::into_inner);
            let (first, second) = if op.y == op.a { (before, of_x) } else { (of_x, before) };
            context.checks.read(0, first);
            context.checks.read(1, second);
            context.checks.written(2, after);
            return Ok(());
        }
        context.pool.run(parts.count(), |task| {
            let y = parts.take(task);
            let x = &x[task * len..][..y.len()];
            dispatch(isa, AddInto { x, y });
        });
        return Ok(());
    }
    let a = context.operands.read::<T>(&op.a)?;
    let b = context.operands.read::<T>(&op.b)?;
    let y = context.operands.write::<T>(&op.y)?;
    let width = padded(&op.y).0[3];
    let steps = [&op.a, &op.b, &op.y].map(|view| padded(view).1[3]);
    let add_row = |a: &[T], b: &[T], y: &mut [T]| {
        if width <= 1 || steps == [1; 3] {
            dispatch(isa, AddRows { a: &a[..width], b: &b[..width], y: &mut y[..width] });
            return;
        }
        for index in 0..width {
            let sum = a[index * steps[0]].to_f32() + b[index * steps[1]].to_f32();
            y[index * steps[2]] = T::from_f32(sum);
        }
    };
    if op.y.shape.rank() <= 1 {
        add_row(a, b, y);
        return Ok(());
    }
    by_outer_rows(context, &op.y, y, &|to, first, rows| {
        each_row(&op.y, [&op.a, &op.b], (first, rows), |target, [left, right]| {
            add_row(&a[left..], &b[right..], &mut to[target..]);
        });
    });
    Ok(())
}

struct Gate<'a, T> {
    gate: &'a [T],
    up: &'a [T],
    y: &'a mut [T],
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
fn sigmoid<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    simd.div(one, simd.add(one, simd.exp(simd.neg(x))))
}

impl<T: Element> Kernel for Gate<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let inputs = self.gate.chunks(S::LANES).zip(self.up.chunks(S::LANES));
        for ((gate, up), y) in inputs.zip(self.y.chunks_mut(S::LANES)) {
            let gate = T::load(simd, gate);
            let silu = simd.div(gate, simd.add(simd.splat(1.0), simd.exp(simd.neg(gate))));
            // Rounded here in 16-bit dtypes, as the contract says.
            T::store(simd, silu, y);
            let product = simd.mul(T::load(simd, y), T::load(simd, up));
            T::store(simd, product, y);
        }
    }
}

pub(super) fn swiglu(context: &mut Context<'_>, op: &ops::SwiGlu) -> Done {
    with_float!(op.gate.dtype, T => swiglu_as::<T>(context, op))
}

fn swiglu_as<T: Element>(context: &mut Context<'_>, op: &ops::SwiGlu) -> Done {
    let gate = context.operands.read::<T>(&op.gate)?;
    let up = context.operands.read::<T>(&op.up)?;
    let y = context.operands.write::<T>(&op.y)?;
    let (rows, width) = (op.y.dim(0), op.y.dim(1));
    let strides = [&op.gate, &op.up, &op.y].map(row_stride);
    let per_task = rows_per_task(rows, width);
    let parts = Parts::new(y, strides[2] * per_task);
    let (isa, tally) = (context.isa, context.tally());
    context.pool.run(rows.div_ceil(per_task), |task| {
        let mut sums = tally.task();
        let y = parts.take(task);
        for row in 0..per_task.min(rows - task * per_task) {
            let at = task * per_task + row;
            let gate = &gate[at * strides[0]..][..width];
            let up = &up[at * strides[1]..][..width];
            let y = &mut y[row * strides[2]..][..width];
            dispatch(isa, Gate { gate, up, y: &mut *y });
            sums.row([(0, gate), (1, up)], [(2, &*y)]);
        }
    });
    context.note(tally);
    Ok(())
}

struct GateBwd<'a, T> {
    dy: &'a [T],
    gate: &'a [T],
    up: &'a [T],
    dgate: &'a mut [T],
    dup: &'a mut [T],
}

impl<T: Element> Kernel for GateBwd<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let one = simd.splat(1.0);
        for start in (0..self.dy.len()).step_by(S::LANES) {
            let end = (start + S::LANES).min(self.dy.len());
            let dy = T::load(simd, &self.dy[start..end]);
            let gate = T::load(simd, &self.gate[start..end]);
            let up = T::load(simd, &self.up[start..end]);
            let s = sigmoid(simd, gate);
            let slope = simd.fma(gate, simd.sub(one, s), one);
            let dgate = simd.mul(simd.mul(dy, up), simd.mul(s, slope));
            T::store(simd, dgate, &mut self.dgate[start..end]);
            let dup = simd.mul(dy, simd.mul(gate, s));
            T::store(simd, dup, &mut self.dup[start..end]);
        }
    }
}

pub(super) fn swiglu_bwd(context: &mut Context<'_>, op: &ops::SwiGluBwd) -> Done {
    with_float!(op.gate.dtype, T => swiglu_bwd_as::<T>(context, op))
}

fn swiglu_bwd_as<T: Element>(context: &mut Context<'_>, op: &ops::SwiGluBwd) -> Done {
    let dy = context.operands.read::<T>(&op.dy)?;
    let gate = context.operands.read::<T>(&op.gate)?;
    let up = context.operands.read::<T>(&op.up)?;
    let dgate = context.operands.write::<T>(&op.dgate)?;
    let dup = context.operands.write::<T>(&op.dup)?;
    let (rows, width) = (op.dy.dim(0), op.dy.dim(1));
    let [dy_s, gate_s, up_s, dgate_s, dup_s] =
        [&op.dy, &op.gate, &op.up, &op.dgate, &op.dup].map(row_stride);
    let per_task = rows_per_task(rows, width);
    let dgates = Parts::new(dgate, dgate_s * per_task);
    let dups = Parts::new(dup, dup_s * per_task);
    let (isa, tally) = (context.isa, context.tally());
    context.pool.run(rows.div_ceil(per_task), |task| {
        let mut sums = tally.task();
        let (dgate, dup) = (dgates.take(task), dups.take(task));
        for row in 0..per_task.min(rows - task * per_task) {
            let at = task * per_task + row;
            let dy = &dy[at * dy_s..][..width];
            let gate = &gate[at * gate_s..][..width];
            let up = &up[at * up_s..][..width];
            let dgate = &mut dgate[row * dgate_s..][..width];
            let dup = &mut dup[row * dup_s..][..width];
            dispatch(isa, GateBwd { dy, gate, up, dgate: &mut *dgate, dup: &mut *dup });
            sums.row([(0, dy), (1, gate), (2, up)], [(3, &*dgate), (4, &*dup)]);
        }
    });
    context.note(tally);
    Ok(())
}
