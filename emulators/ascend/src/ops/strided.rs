//! Walking over views: any strides, broadcasts, and every dtype as f32 or as integers.
//!
//! Work is cut into chunks that stay in the first-level cache: operands are widened into a chunk,
//! a function works on whole chunks, and the result is rounded into place. An output may be exactly
//! one of the inputs, because a chunk is read before it is written.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};
use pontoon_cpu::simd::{Element, Isa, Kernel, Simd, dispatch};

use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::Slot;

/// Elements of a chunk: four f32 chunks fill a first-level cache.
pub const CHUNK: usize = 2048;

/// Most dimensions of a view.
const RANK_MAX: usize = 8;

/// How results are rounded to 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, ties to even.
    Nearest,
    /// The lower bits are cut off: a planted defect.
    Cut,
}

/// The common shape of some views and how each steps through it; dimensions that all views step
/// through alike are one.
pub struct Space<const N: usize> {
    dims: Vec<usize>,
    steps: Vec<[usize; N]>,
}

impl<const N: usize> Space<N> {
    /// Broadcasts views to a shape.
    pub fn new(shape: &[usize], views: [(&[usize], &[usize]); N]) -> Option<Space<N>> {
        let mut dims: Vec<usize> = Vec::new();
        let mut steps: Vec<[usize; N]> = Vec::new();
        for (axis, &extent) in shape.iter().enumerate() {
            let mut step = [0; N];
            for (step, (dims, strides)) in step.iter_mut().zip(&views) {
                let Some(own) = (axis + dims.len()).checked_sub(shape.len()) else { continue };
                *step = match dims[own] {
                    1 => 0,
                    have if have == extent => strides[own],
                    _ => return None,
                };
            }
            if extent == 1 {
                continue;
            }
            let merges = |last: &[usize; N]| (0..N).all(|view| last[view] == step[view] * extent);
            match steps.last_mut() {
                Some(last) if merges(last) => {
                    *dims.last_mut()? *= extent;
                    *last = step;
                }
                _ => {
                    dims.push(extent);
                    steps.push(step);
                }
            }
        }
        if dims.is_empty() {
            dims.push(1);
            steps.push([0; N]);
        }
        Some(Space { dims, steps })
    }

    /// Elements of the innermost dimension.
    pub fn inner(&self) -> usize {
        self.dims[self.dims.len() - 1]
    }

    /// How each view steps in it.
    pub fn inner_steps(&self) -> [usize; N] {
        self.steps[self.steps.len() - 1]
    }

    /// Rows: all other dimensions together.
    pub fn rows(&self) -> usize {
        self.dims[..self.dims.len() - 1].iter().product()
    }

    /// Where a row begins in each view.
    pub fn row(&self, index: usize) -> [usize; N] {
        let (mut rest, mut at) = (index, [0; N]);
        for axis in (0..self.dims.len() - 1).rev() {
            let coordinate = rest % self.dims[axis];
            rest /= self.dims[axis];
            for (at, step) in at.iter_mut().zip(&self.steps[axis]) {
                *at += coordinate * step;
            }
        }
        at
    }
}

/// One piece of a walk: some rows, or a part of one.
#[derive(Clone, Copy)]
struct Piece {
    row: usize,
    rows: usize,
    start: usize,
    len: usize,
}

fn pieces(rows: usize, inner: usize) -> (usize, impl Fn(usize) -> Piece) {
    let parts = inner.div_ceil(CHUNK).max(1);
    let together = if parts > 1 { 1 } else { (CHUNK / inner.max(1)).max(1) };
    let count = rows.div_ceil(together) * parts;
    let piece = move |index: usize| {
        let row = index / parts * together;
        let start = index % parts * CHUNK;
        let len = (inner - start).min(CHUNK);
        Piece { row, rows: together.min(rows - row), start, len }
    };
    (count, piece)
}

thread_local! {
    /// A thread's chunks, so that they are not cleared for every piece.
    static CHUNKS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Applies `f` to chunks of f32 of all inputs.
pub fn map_floats<const N: usize, const M: usize>(
    run: &mut Run<'_>,
    inputs: [Slot; N],
    output: Slot,
    f: impl Fn(Isa, [&[f32]; N], &mut [f32]) + Sync,
) -> Done {
    let (isa, rounding) = (run.engine.isa, run.rounding());
    let inputs = inputs.map(|slot| run.at(slot));
    let out = run.at(output);
    let space = space::<N, M>(&inputs, out);
    let tail = dropped_tail(run, out.elements());
    let (count, piece) = pieces(space.rows(), space.inner());
    let last = count - 1;
    run.engine.pool.run(count, |index| {
        let piece = piece(index);
        let mut total = piece.rows * piece.len;
        CHUNKS.with_borrow_mut(|chunks| {
            chunks.resize(CHUNK * M, 0.0);
            let (result, chunks) = chunks.split_at_mut(CHUNK);
            for (view, chunk) in chunks.chunks_mut(CHUNK).enumerate() {
                load(isa, inputs[view], &space, view, piece, &mut chunk[..total]);
            }
            let of = |view: usize| &chunks[view * CHUNK..][..total];
            f(isa, std::array::from_fn(of), &mut result[..total]);
            if index == last && tail > 0 && piece.rows == 1 {
                total = total.saturating_sub(tail);
            }
            let kept = Piece { len: total / piece.rows.max(1), ..piece };
            store(isa, out, &space, N, kept, &result[..total], rounding);
        });
    });
    Ok(())
}

/// Elements that a defect leaves out at the end of a run of elements that is no whole tile.
fn dropped_tail(run: &Run<'_>, elements: usize) -> usize {
    if run.has(Kind::DroppedTail) { elements % 64 } else { 0 }
}

fn space<const N: usize, const M: usize>(inputs: &[&Bound; N], out: &Bound) -> Space<M> {
    assert!(M == N + 1, "a space has a view for every input and the output");
    let views = std::array::from_fn(|view| {
        let tensor = inputs.get(view).map_or(&out.tensor, |input| &input.tensor);
        (tensor.shape.as_slice(), tensor.strides.as_slice())
    });
    Space::new(out.shape(), views).expect("shapes were checked when the operator was planned")
}

/// Applies `f` to chunks of integers of all inputs.
pub fn map_integers<const N: usize, const M: usize>(
    run: &mut Run<'_>,
    inputs: [Slot; N],
    output: Slot,
    f: impl Fn([&[i64]; N], &mut [i64]) + Sync,
) -> Done {
    let inputs = inputs.map(|slot| run.at(slot));
    let out = run.at(output);
    let space = space::<N, M>(&inputs, out);
    let (count, piece) = pieces(space.rows(), space.inner());
    run.engine.pool.run(count, |index| {
        let piece = piece(index);
        let total = piece.rows * piece.len;
        let mut chunks = [[0_i64; CHUNK]; N];
        let mut result = [0_i64; CHUNK];
        for (view, chunk) in chunks.iter_mut().enumerate() {
            for_rows(&space, view, piece, |row, at, step| {
                let to = &mut chunk[row * piece.len..][..piece.len];
                load_integers(inputs[view], at, step, to);
            });
        }
        f(std::array::from_fn(|view| &chunks[view][..total]), &mut result[..total]);
        for_rows(&space, N, piece, |row, at, step| {
            store_integers(out, at, step, &result[row * piece.len..][..piece.len]);
        });
    });
    Ok(())
}

/// Calls `row(index, first element, step)` for the rows of a piece.
fn for_rows<const M: usize>(
    space: &Space<M>,
    view: usize,
    piece: Piece,
    mut row: impl FnMut(usize, usize, usize),
) {
    let step = space.inner_steps()[view];
    let outer = space.dims.len() - 1;
    let (mut rest, mut at) = (piece.row, piece.start * step);
    let mut place = [0; RANK_MAX];
    for axis in (0..outer).rev() {
        place[axis] = rest % space.dims[axis];
        rest /= space.dims[axis];
        at += place[axis] * space.steps[axis][view];
    }
    for index in 0..piece.rows {
        row(index, at, step);
        for axis in (0..outer).rev() {
            place[axis] += 1;
            at += space.steps[axis][view];
            if place[axis] < space.dims[axis] {
                break;
            }
            at -= space.dims[axis] * space.steps[axis][view];
            place[axis] = 0;
        }
    }
}

/// Widens the rows of a piece, one after the other.
fn load<const M: usize>(
    isa: Isa,
    from: &Bound,
    space: &Space<M>,
    view: usize,
    piece: Piece,
    to: &mut [f32],
) {
    let dense = space.inner_steps()[view] == 1;
    match from.dtype() {
        DataType::Bf16 if dense => load_rows::<bf16, M>(isa, from, (space, view, piece), to),
        DataType::F16 if dense => load_rows::<f16, M>(isa, from, (space, view, piece), to),
        _ => for_rows(space, view, piece, |row, at, step| {
            load_floats(isa, from, at, step, &mut to[row * piece.len..][..piece.len]);
        }),
    }
}

/// Rows whose elements are neighbours, gathered first and widened together.
fn load_rows<T: Element, const M: usize>(
    isa: Isa,
    from: &Bound,
    (space, view, piece): (&Space<M>, usize, Piece),
    to: &mut [f32],
) {
    let mut raw = [T::zeroed(); CHUNK];
    for_rows(space, view, piece, |row, at, _| {
        from.load(at, &mut raw[row * piece.len..][..piece.len]);
    });
    dispatch(isa, Widen { from: &raw[..to.len()], to });
}

/// Rounds the rows of a piece into place.
fn store<const M: usize>(
    isa: Isa,
    to: &Bound,
    space: &Space<M>,
    view: usize,
    piece: Piece,
    from: &[f32],
    rounding: Rounding,
) {
    let dense = space.inner_steps()[view] == 1 && rounding == Rounding::Nearest;
    match to.dtype() {
        DataType::Bf16 if dense => store_rows::<bf16, M>(isa, to, (space, view, piece), from),
        DataType::F16 if dense => store_rows::<f16, M>(isa, to, (space, view, piece), from),
        _ => for_rows(space, view, piece, |row, at, step| {
            store_floats(isa, to, at, step, &from[row * piece.len..][..piece.len], rounding);
        }),
    }
}

/// Rows whose elements are neighbours, rounded together and then put into place.
fn store_rows<T: Element, const M: usize>(
    isa: Isa,
    to: &Bound,
    (space, view, piece): (&Space<M>, usize, Piece),
    from: &[f32],
) {
    let mut raw = [T::zeroed(); CHUNK];
    dispatch(isa, Narrow { from, to: &mut raw[..from.len()] });
    for_rows(space, view, piece, |row, at, _| {
        to.store(at, &raw[row * piece.len..][..piece.len]);
    });
}

struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Element> Kernel for Widen<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            simd.store(T::load(simd, from), to);
        }
    }
}

struct Narrow<'a, T> {
    from: &'a [f32],
    to: &'a mut [T],
}

impl<T: Element> Kernel for Narrow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            T::store(simd, simd.load(from), to);
        }
    }
}

/// Reads each element as its own type and converts it.
macro_rules! load_as {
    (($from:ident, $at:ident, $step:ident, $to:ident) $type:ty, $value:ident => $convert:expr) => {
        for (index, to) in $to.iter_mut().enumerate() {
            let mut raw = [<$type as bytemuck::Zeroable>::zeroed()];
            $from.load($at + index * $step, &mut raw);
            let [$value] = raw;
            *to = $convert;
        }
    };
}

/// Converts each number to the elements' type and writes it.
macro_rules! store_as {
    (($from:ident, $at:ident, $step:ident, $to:ident) $value:ident => $convert:expr) => {
        for (index, &$value) in $from.iter().enumerate() {
            $to.store($at + index * $step, &[$convert]);
        }
    };
}

/// Narrow elements converted at a time; room for one head, so that clearing it costs little.
const RAW: usize = 256;

fn widen<T: Element>(isa: Isa, from: &Bound, at: usize, to: &mut [f32]) {
    let mut raw = [T::zeroed(); RAW];
    for (index, to) in to.chunks_mut(RAW).enumerate() {
        let raw = &mut raw[..to.len()];
        from.load(at + index * RAW, raw);
        dispatch(isa, Widen { from: &*raw, to });
    }
}

fn narrow<T: Element>(isa: Isa, to: &Bound, at: usize, from: &[f32]) {
    let mut raw = [T::zeroed(); RAW];
    for (index, from) in from.chunks(RAW).enumerate() {
        let raw = &mut raw[..from.len()];
        dispatch(isa, Narrow { from, to: &mut *raw });
        to.store(at + index * RAW, raw);
    }
}

/// Widens elements `at`, `at + step`, ... of an operand.
pub fn load_floats(isa: Isa, from: &Bound, at: usize, step: usize, to: &mut [f32]) {
    match (from.dtype(), step) {
        (DataType::F32, 1) => from.load(at, to),
        (DataType::Bf16, 1) => widen::<bf16>(isa, from, at, to),
        (DataType::F16, 1) => widen::<f16>(isa, from, at, to),
        (_, 0) => {
            let mut value = [0.0];
            load_each(from, at, 1, &mut value);
            to.fill(value[0]);
        }
        _ => load_each(from, at, step, to),
    }
}

fn load_each(from: &Bound, at: usize, step: usize, to: &mut [f32]) {
    match from.dtype() {
        DataType::F32 => load_as!((from, at, step, to) f32, v => v),
        DataType::Bf16 => load_as!((from, at, step, to) bf16, v => bf16::to_f32(v)),
        DataType::F16 => load_as!((from, at, step, to) f16, v => f16::to_f32(v)),
        DataType::F64 => load_as!((from, at, step, to) f64, v => v as f32),
        DataType::I8 => load_as!((from, at, step, to) i8, v => f32::from(v)),
        DataType::U8 | DataType::F8e4m3 | DataType::I4 => {
            load_as!((from, at, step, to) u8, v => f32::from(v))
        }
        DataType::Bool => load_as!((from, at, step, to) u8, v => f32::from(u8::from(v != 0))),
        DataType::I16 => load_as!((from, at, step, to) i16, v => f32::from(v)),
        DataType::I32 => load_as!((from, at, step, to) i32, v => v as f32),
        DataType::U32 => load_as!((from, at, step, to) u32, v => v as f32),
        DataType::I64 => load_as!((from, at, step, to) i64, v => v as f32),
        DataType::U64 => load_as!((from, at, step, to) u64, v => v as f32),
    }
}

/// Rounds numbers to elements `at`, `at + step`, ... of an operand.
pub fn store_floats(
    isa: Isa,
    to: &Bound,
    at: usize,
    step: usize,
    from: &[f32],
    rounding: Rounding,
) {
    let cut = rounding == Rounding::Cut && matches!(to.dtype(), DataType::Bf16);
    match (to.dtype(), step) {
        (DataType::F32, 1) => to.store(at, from),
        (DataType::Bf16, 1) if !cut => narrow::<bf16>(isa, to, at, from),
        (DataType::F16, 1) => narrow::<f16>(isa, to, at, from),
        _ => store_each(to, at, step, from, cut),
    }
}

fn store_each(to: &Bound, at: usize, step: usize, from: &[f32], cut: bool) {
    match to.dtype() {
        DataType::F32 => store_as!((from, at, step, to) v => v),
        DataType::Bf16 if cut => {
            store_as!((from, at, step, to) v => bf16::from_bits((v.to_bits() >> 16) as u16))
        }
        DataType::Bf16 => store_as!((from, at, step, to) v => bf16::from_f32(v)),
        DataType::F16 => store_as!((from, at, step, to) v => f16::from_f32(v)),
        DataType::F64 => store_as!((from, at, step, to) v => f64::from(v)),
        DataType::I8 => store_as!((from, at, step, to) v => v as i8),
        DataType::U8 | DataType::F8e4m3 | DataType::I4 => {
            store_as!((from, at, step, to) v => v as u8)
        }
        DataType::Bool => store_as!((from, at, step, to) v => u8::from(v != 0.0)),
        DataType::I16 => store_as!((from, at, step, to) v => v as i16),
        DataType::I32 => store_as!((from, at, step, to) v => v as i32),
        DataType::U32 => store_as!((from, at, step, to) v => v as u32),
        DataType::I64 => store_as!((from, at, step, to) v => v as i64),
        DataType::U64 => store_as!((from, at, step, to) v => v as u64),
    }
}

/// Reads elements `at`, `at + step`, ... of an operand as integers.
pub fn load_integers(from: &Bound, at: usize, step: usize, to: &mut [i64]) {
    match from.dtype() {
        DataType::F32 => load_as!((from, at, step, to) f32, v => v as i64),
        DataType::Bf16 => load_as!((from, at, step, to) bf16, v => v.to_f32() as i64),
        DataType::F16 => load_as!((from, at, step, to) f16, v => v.to_f32() as i64),
        DataType::F64 => load_as!((from, at, step, to) f64, v => v as i64),
        DataType::I8 => load_as!((from, at, step, to) i8, v => i64::from(v)),
        DataType::U8 | DataType::F8e4m3 | DataType::I4 => {
            load_as!((from, at, step, to) u8, v => i64::from(v))
        }
        DataType::Bool => load_as!((from, at, step, to) u8, v => i64::from(v != 0)),
        DataType::I16 => load_as!((from, at, step, to) i16, v => i64::from(v)),
        DataType::I32 => load_as!((from, at, step, to) i32, v => i64::from(v)),
        DataType::U32 => load_as!((from, at, step, to) u32, v => i64::from(v)),
        DataType::I64 => load_as!((from, at, step, to) i64, v => v),
        DataType::U64 => load_as!((from, at, step, to) u64, v => v as i64),
    }
}

/// Writes integers to elements `at`, `at + step`, ... of an operand.
pub fn store_integers(to: &Bound, at: usize, step: usize, from: &[i64]) {
    match to.dtype() {
        DataType::F32 => store_as!((from, at, step, to) v => v as f32),
        DataType::Bf16 => store_as!((from, at, step, to) v => bf16::from_f32(v as f32)),
        DataType::F16 => store_as!((from, at, step, to) v => f16::from_f32(v as f32)),
        DataType::F64 => store_as!((from, at, step, to) v => v as f64),
        DataType::I8 => store_as!((from, at, step, to) v => v as i8),
        DataType::U8 | DataType::F8e4m3 | DataType::I4 => {
            store_as!((from, at, step, to) v => v as u8)
        }
        DataType::Bool => store_as!((from, at, step, to) v => u8::from(v != 0)),
        DataType::I16 => store_as!((from, at, step, to) v => v as i16),
        DataType::I32 => store_as!((from, at, step, to) v => v as i32),
        DataType::U32 => store_as!((from, at, step, to) v => v as u32),
        DataType::I64 => store_as!((from, at, step, to) v => v),
        DataType::U64 => store_as!((from, at, step, to) v => v as u64),
    }
}

/// Walks over an operand in row-major order: where each row begins, its step, and which elements
/// it holds.
fn rows_of(bound: &Bound, elements: usize, mut row: impl FnMut(usize, usize, Range<usize>)) {
    let tensor = &bound.tensor;
    let space = Space::new(&tensor.shape, [(&tensor.shape, &tensor.strides)]);
    let space: Space<1> = space.expect("a view fits itself");
    let ([step], inner) = (space.inner_steps(), space.inner());
    for (index, from) in (0..elements).step_by(inner).enumerate() {
        row(space.row(index)[0], step, from..elements.min(from + inner));
    }
}

/// All elements in row-major order, as f32.
pub fn gather_floats(isa: Isa, from: &Bound, to: &mut [f32]) {
    rows_of(from, to.len(), |at, step, part| load_floats(isa, from, at, step, &mut to[part]));
}

/// All elements in row-major order, as integers.
pub fn gather_integers(from: &Bound, to: &mut [i64]) {
    rows_of(from, to.len(), |at, step, part| load_integers(from, at, step, &mut to[part]));
}

/// Rounds numbers in row-major order into an operand.
pub fn scatter_floats(isa: Isa, to: &Bound, from: &[f32], rounding: Rounding) {
    rows_of(to, from.len(), |at, step, part| {
        store_floats(isa, to, at, step, &from[part], rounding);
    });
}

/// Puts integers in row-major order into an operand.
pub fn scatter_integers(to: &Bound, from: &[i64]) {
    rows_of(to, from.len(), |at, step, part| store_integers(to, at, step, &from[part]));
}
