//! Attention over packed documents and over a paged cache, with one inner tile for both, so that
//! training, prefill and decoding agree bit for bit.
//!
//! Products run on the inner loop of `gemm`, on bf16 pairs where the CPU multiplies those; there
//! probabilities are rounded to bf16 before they meet the values, but summed unrounded. Scores,
//! maxima and sums are f32. A task owns one head of one range of query rows. Keys are taken in
//! tiles of `KEY_TILE` from the document's start; per row, every tile does the same arithmetic
//! whatever other rows are present.

use std::cell::RefCell;

use half::bf16;
use pontoon_ops::sums::of_row;
use pontoon_ops::{self as ops, DeviceError, KEY_TILE, View};

use super::attention_cache::{Cached, CachedHead, ROWS_APART};
use super::product::{Divide, Product, SumsRow, all_finite, within};
use super::{Context, Done, row_stride, with_float};
use crate::ffi::Scattered;
use crate::gemm::pack::{PackColumns, PackRows, PackRowsAsColumns, Source};
use crate::gemm::{Unit, is_dot, units};
use crate::simd::micro::{LeftUnits, Start};
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Query rows of one task: enough to share a packed key tile, few enough to balance threads.
const QUERY_ROWS: usize = 128;

/// Rows of one head that lie `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
}

/// Where one head of one sequence finds its keys and values by position.
#[derive(Clone, Copy)]
enum KeyValues<'a, T> {
    /// In rows of a tensor.
    InRows { k: Rows<'a, T>, v: Rows<'a, T> },
    /// In blocks of a cache.
    InBlocks(Cached<'a, T>),
}

impl<'a, T: Unit> KeyValues<'a, T> {
    /// The keys and values of `count` positions from `start` on; from a cache they are copied into
    /// `memory` first.
    fn tile<'b>(
        &self,
        (start, count): (usize, usize),
        (qk_width, v_width): (usize, usize),
        memory: &'b mut Vec<u32>,
    ) -> [Rows<'b, T>; 2]
    where
        'a: 'b,
    {
        match *self {
            KeyValues::InRows { k, v } => {
                let from =
                    |rows: Rows<'a, T>| Rows { data: &rows.data[start * rows.stride..], ..rows };
                [from(k), from(v)]
            }
            KeyValues::InBlocks(cached) => {
                let memory = grown(memory, KEY_TILE * (qk_width + v_width));
                let (keys, values) =
                    bytemuck::cast_slice_mut::<u32, T>(memory).split_at_mut(KEY_TILE * qk_width);
                for index in 0..count {
                    let slot = cached.head.slot(start + index);
                    let copy = |from: Rows<'_, T>, to: &mut [T], width: usize| {
                        let from = &from.data[slot * from.stride..][..width];
                        to[index * width..][..width].copy_from_slice(from);
                    };
                    copy(cached.head.k, keys, qk_width);
                    copy(cached.head.v, values, v_width);
                }
                [Rows { data: keys, stride: qk_width }, Rows { data: values, stride: v_width }]
            }
        }
    }
}

/// One head's share of one range of query rows of one sequence.
#[derive(Clone, Copy)]
struct Work<'a, T> {
    isa: Isa,
    /// The query rows.
    q: Rows<'a, T>,
    keys: KeyValues<'a, T>,
    /// The position of the first query row in its sequence.
    first: usize,
    rows: usize,
    qk_width: usize,
    v_width: usize,
    scale: f32,
}

/// Working memory of one thread, grown once.
#[derive(Default)]
struct Memory {
    gathered: Vec<u32>,
    q: Vec<u32>,
    k: Vec<u32>,
    v: Vec<u32>,
    p: Vec<u32>,
    scores: Vec<u32>,
    out: Vec<u32>,
    /// The running maximum and sum of each row.
    softmax: Vec<u32>,
    result: Vec<u32>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// The first `len` words, contents arbitrary.
pub(super) fn grown(memory: &mut Vec<u32>, len: usize) -> &mut [u32] {
    if memory.len() < len {
        memory.resize(len, 0);
    }
    &mut memory[..len]
}

fn floats(memory: &mut Vec<u32>, len: usize) -> &mut [f32] {
    bytemuck::cast_slice_mut(grown(memory, len))
}

impl<T: Unit> Work<'_, T> {
    /// Calls `finish(row, output row, lse)` for every row when all keys have been seen.
    fn run(&self, mut finish: impl FnMut(usize, &[T], f32)) {
        match self.keys {
            KeyValues::InBlocks(cached)
                if self.rows <= ROWS_APART && cached.streams(self.isa, self.qk_width) =>
            {
                for row in 0..self.rows {
                    let q = Rows { data: &self.q.data[row * self.q.stride..], ..self.q };
                    let one = Work { q, first: self.first + row, rows: 1, ..*self };
                    one.tiles(Some(cached), |_, result, log_sum| finish(row, result, log_sum));
                }
            }
            _ => self.tiles(None, finish),
        }
    }

    /// All rows against tile after tile; the keys and values of `in_place`, where given, are read
    /// where they lie, by a single row.
    fn tiles(&self, in_place: Option<Cached<'_, T>>, mut finish: impl FnMut(usize, &[T], f32)) {
        MEMORY.with_borrow_mut(|memory| {
            let geometry = self.isa.geometry();
            let (width, dot) = (geometry.micro_columns, is_dot(T::KIND, self.isa));
            let qk_units = units(T::KIND, self.isa, self.qk_width);
            let key_units = units(T::KIND, self.isa, KEY_TILE);
            let v_panels = self.v_width.div_ceil(width);
            let q = grown(&mut memory.q, self.rows * qk_units);
            let from = self.source(self.q, self.rows, self.qk_width);
            dispatch(self.isa, PackRows { from, row_words: qk_units.max(1), to: &mut *q });
            let k = grown(&mut memory.k, KEY_TILE * qk_units);
            let v = grown(&mut memory.v, v_panels * width * key_units);
            let p = grown(&mut memory.p, geometry.micro_rows * key_units);
            let scores = floats(&mut memory.scores, geometry.micro_rows * KEY_TILE);
            let out = floats(&mut memory.out, v_panels * width * self.rows);
            let (peak, sum) = floats(&mut memory.softmax, 2 * self.rows).split_at_mut(self.rows);
            out.fill(0.0);
            peak.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let end = self.first + self.rows;
            for start in (0..end).step_by(KEY_TILE) {
                let keys = KEY_TILE.min(end - start);
                if in_place.is_none() {
                    let widths = (self.qk_width, self.v_width);
                    let tile = self.keys.tile((start, keys), widths, &mut memory.gathered);
                    self.pack(tile, keys, (&mut *k, &mut *v));
                }
                let (p, scores) = (&mut *p, &mut *scores);
                let softmax = Softmax { peak: &mut *peak, sum: &mut *sum, scale: self.scale };
                let (first, out) = (self.first, &mut *out);
                let step =
                    Step { q, k, v, qk_units, p, scores, out, softmax, start, keys, first, dot };
                match in_place {
                    Some(cached) => dispatch(self.isa, CachedStep { step, cached }),
                    None => dispatch(self.isa, step),
                }
            }
            let result = grown(&mut memory.result, self.v_width.max(1));
            for row in 0..self.rows {
                let to = &mut bytemuck::cast_slice_mut::<u32, T>(result)[..self.v_width];
                let sums = SumsRow { sums: out, step: self.rows * width, row };
                dispatch(self.isa, Divide { sums, divisor: sum[row], to: &mut *to });
                finish(row, to, peak[row] + sum[row].ln());
            }
        });
    }

    /// Rows as the source of packing, k along the row.
    fn source<'b>(&self, rows: Rows<'b, T>, count: usize, width: usize) -> Source<'b, T> {
        Source {
            data: rows.data,
            stride: rows.stride,
            first: 0,
            count,
            k: width,
            units: units(T::KIND, self.isa, width),
            dot: is_dot(T::KIND, self.isa),
        }
    }

    /// Packs a tile: keys as columns, values as rows of units of neighbouring keys.
    fn pack(
        &self,
        [keys, values]: [Rows<'_, T>; 2],
        count: usize,
        (k, v): (&mut [u32], &mut [u32]),
    ) {
        let width = self.isa.geometry().micro_columns;
        let from = self.source(keys, count, self.qk_width);
        let panels = count.div_ceil(width);
        if from.units > 0 {
            dispatch(
                self.isa,
                PackRowsAsColumns { from, to: &mut k[..panels * width * from.units] },
            );
        }
        let from = Source {
            count: self.v_width,
            k: count,
            units: units(T::KIND, self.isa, count),
            ..self.source(values, count, self.v_width)
        };
        let panel_words = units(T::KIND, self.isa, KEY_TILE) * width;
        dispatch(self.isa, PackColumns { from, width, panel_words, to: v });
    }
}

/// The running softmax of all rows.
struct Softmax<'a> {
    peak: &'a mut [f32],
    sum: &'a mut [f32],
    scale: f32,
}

/// One tile of keys against all query rows, a block of rows at a time, so that a block's scores
/// and probabilities stay in the first-level cache.
struct Step<'a> {
    /// Rows of units.
    q: &'a [u32],
    /// Panels of keys.
    k: &'a [u32],
    /// Panels of values.
    v: &'a [u32],
    /// Units of a query row.
    qk_units: usize,
    /// Room for the probabilities of a block of rows, in units.
    p: &'a mut [u32],
    /// Room for the scores of a block of rows, panel after panel.
    scores: &'a mut [f32],
    /// Sums of all rows, panel after panel.
    out: &'a mut [f32],
    softmax: Softmax<'a>,
    /// Position of the tile's first key.
    start: usize,
    /// Keys in the tile.
    keys: usize,
    /// Position of the first query row.
    first: usize,
    /// Units are bf16 pairs.
    dot: bool,
}

impl Kernel for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.dot {
            self.step::<S, true>(simd);
        } else {
            self.step::<S, false>(simd);
        }
    }
}

/// One tile of keys in a cache against a single query row.
struct CachedStep<'a, T> {
    step: Step<'a>,
    cached: Cached<'a, T>,
}

impl<T: Unit> Kernel for CachedStep<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.step.dot {
            self.run_as::<S, true>(simd);
        } else {
            self.run_as::<S, false>(simd);
        }
    }
}

impl<T: Unit> CachedStep<'_, T> {
    #[inline(always)]
    fn run_as<S: Simd, const DOT: bool>(self, simd: S) {
        let CachedStep { mut step, cached } = self;
        let (start, width) = (step.start, 2 * S::LANES);
        let tile = cached.tile(start, step.first + 1);
        for at in (0..step.keys).step_by(S::LANES) {
            let scores = tile.scores::<S, DOT>(simd, step.q, at);
            let place = at / width * S::MICRO_ROWS * width + at % width;
            simd.store(scores, &mut step.scores[place..][..S::LANES]);
        }
        step.soften::<S, DOT>(simd, 0, 0);
        tile.mix::<S, DOT>(simd, step.p, step.out);
    }
}

impl Step<'_> {
    #[inline(always)]
    fn step<S: Simd, const DOT: bool>(mut self, simd: S) {
        let rows = self.softmax.peak.len();
        // Rows before the tile's first key see none of it.
        let skipped = self.start.saturating_sub(self.first).min(rows);
        let all_whole = self.visible(skipped) == KEY_TILE;
        let clean = all_whole || self.is_clean::<S, DOT>();
        for row in (skipped..rows).step_by(S::MICRO_ROWS) {
            let count = S::MICRO_ROWS.min(rows - row);
            self.score::<S, DOT>(simd, row, count);
            for index in 0..count {
                self.soften::<S, DOT>(simd, row + index, index);
            }
            self.mix::<S, DOT>(simd, (row, count), clean);
        }
    }

    /// How many of the tile's keys a row sees.
    #[inline(always)]
    fn visible(&self, row: usize) -> usize {
        (self.first + row + 1 - self.start).min(KEY_TILE)
    }

    /// Whether all values are finite.
    #[inline(always)]
    fn is_clean<S: Simd, const DOT: bool>(&self) -> bool {
        let (units, width) = (self.keys.div_ceil(if DOT { 2 } else { 1 }), 2 * S::LANES);
        let panel_words = width * KEY_TILE / if DOT { 2 } else { 1 };
        self.v.chunks(panel_words).all(|panel| all_finite::<DOT>(&panel[..units * width]))
    }

    /// The scores of a block of rows against the keys that its last row sees.
    #[inline(always)]
    fn score<S: Simd, const DOT: bool>(&mut self, simd: S, row: usize, count: usize) {
        let (width, row_bytes) = (2 * S::LANES, self.qk_units * 4);
        let bytes = bytemuck::cast_slice(self.q);
        let mut product = Product {
            left: LeftUnits { bytes, start: row * row_bytes, row_bytes, unit_bytes: 4 },
            rows: count,
            right: self.k,
            panel_words: self.qk_units * width,
            panels: 0..self.visible(row + count - 1).div_ceil(width),
            sums: &mut *self.scores,
            sums_step: S::MICRO_ROWS * width,
            start: Start::Zero,
        };
        product.run::<S, DOT>(simd, 0..self.qk_units);
    }

    /// Turns one row's scores into unnormalised probabilities under the running maximum, and
    /// rescales what was summed before. `index` is the row's place in its block.
    #[inline(always)]
    fn soften<S: Simd, const DOT: bool>(&mut self, simd: S, row: usize, index: usize) {
        let visible = self.visible(row);
        let width = 2 * S::LANES;
        let place = |at: usize| at / width * S::MICRO_ROWS * width + index * width + at % width;
        let factor = simd.splat(self.softmax.scale);
        let none = simd.splat(f32::NEG_INFINITY);
        let mut best = none;
        for at in (0..visible).step_by(S::LANES) {
            let line = &mut self.scores[place(at)..][..S::LANES];
            let score = simd.mul(simd.load(line), factor);
            let score = within(simd, at, &(0..visible), score, none);
            simd.store(score, line);
            best = simd.max(score, best);
        }
        let (peak, sum) = (&mut self.softmax.peak[row], &mut self.softmax.sum[row]);
        let new_peak = simd.reduce_max(best).max(*peak);
        let shift = simd.splat(new_peak);
        let mut total = simd.zero();
        let row_words = self.p.len() / S::MICRO_ROWS;
        let p = &mut self.p[index * row_words..][..row_words];
        for at in (0..KEY_TILE).step_by(S::LANES) {
            let mut probability = simd.zero();
            if at < visible {
                let line = &self.scores[place(at)..][..S::LANES];
                probability = simd.exp(simd.sub(simd.load(line), shift));
                total = simd.add(total, probability);
            }
            store_units::<S, DOT>(simd, probability, p, at);
        }
        if new_peak != *peak {
            let correction =
                if new_peak == f32::NEG_INFINITY { 0.0 } else { (*peak - new_peak).exp() };
            *sum *= correction;
            *peak = new_peak;
            let again = simd.splat(correction);
            let rows = self.softmax.peak.len();
            for panel in self.out.chunks_mut(rows * width) {
                for chunk in panel[row * width..][..width].chunks_mut(S::LANES) {
                    simd.store(simd.mul(simd.load(chunk), again), chunk);
                }
            }
        }
        self.softmax.sum[row] += simd.reduce_sum(total);
    }

    /// Adds a block of rows' probabilities times the values to their sums.
    #[inline(always)]
    fn mix<S: Simd, const DOT: bool>(
        &mut self,
        simd: S,
        (row, count): (usize, usize),
        clean: bool,
    ) {
        let (per_unit, width) = (if DOT { 2 } else { 1 }, 2 * S::LANES);
        let rows = self.softmax.peak.len();
        let (first, last) = (self.visible(row), self.visible(row + count - 1));
        let row_bytes = self.p.len() / S::MICRO_ROWS * 4;
        let panel_words = width * KEY_TILE / per_unit;
        let start = self.start;
        let mut product = Product {
            left: LeftUnits {
                bytes: bytemuck::cast_slice(self.p),
                start: 0,
                row_bytes,
                unit_bytes: 4,
            },
            rows: count,
            right: self.v,
            panel_words,
            panels: 0..self.v.len() / panel_words,
            sums: &mut self.out[row * width..],
            sums_step: rows * width,
            start: Start::Resume,
        };
        // A key that a row does not see has probability zero, which leaves the sum as it is unless
        // the value is infinite or NaN.
        if first == KEY_TILE || clean {
            product.run::<S, DOT>(simd, 0..last.div_ceil(per_unit));
        } else {
            let first = self.first + row + 1 - start;
            product.run_apart::<S, DOT>(simd, |index| 0..(first + index).min(KEY_TILE));
        }
    }
}

/// Writes a vector of elements at `at` of a row of units.
#[inline(always)]
pub(super) fn store_units<S: Simd, const DOT: bool>(
    simd: S,
    value: S::F32,
    row: &mut [u32],
    at: usize,
) {
    if DOT {
        let row: &mut [bf16] = bytemuck::cast_slice_mut(row);
        simd.store_bf16(value, &mut row[at..][..S::LANES]);
    } else {
        let row: &mut [f32] = bytemuck::cast_slice_mut(row);
        simd.store(value, &mut row[at..][..S::LANES]);
    }
}

/// One task: a head and a range of rows within one sequence.
#[derive(Clone, Copy)]
struct Range {
    /// Row of the tensor at which the sequence's positions start (documents), or 0 (caches).
    origin: usize,
    /// Row of the first query.
    row: usize,
    /// Its position.
    position: usize,
    rows: usize,
    sequence: usize,
}

/// Cuts sequences into ranges of at most [`QUERY_ROWS`] rows.
fn cut(ranges: &mut Vec<Range>, whole: Range) {
    for skip in (0..whole.rows).step_by(QUERY_ROWS) {
        let rows = QUERY_ROWS.min(whole.rows - skip);
        let (row, position) = (whole.row + skip, whole.position + skip);
        ranges.push(Range { row, position, rows, ..whole });
    }
}

/// The documents as `(start, rows)`, from cumulative starts that the host may have got wrong.
pub(super) fn documents(starts: &[i32], rows: usize) -> Result<Vec<(usize, usize)>, DeviceError> {
    let mut documents = Vec::new();
    let mut from = 0;
    for &start in starts {
        let to = usize::try_from(start).ok().filter(|to| (from..=rows).contains(to));
        let Some(to) = to else {
            let text = format!("document starts should rise from 0 to {rows} but hold {start}");
            return Err(DeviceError::new(ops::DeviceErrorKind::BadArgument, text));
        };
        if to > from {
            documents.push((from, to - from));
        }
        from = to;
    }
    if from != rows {
        let text = format!("document starts should end at {rows} but end at {from}");
        return Err(DeviceError::new(ops::DeviceErrorKind::BadArgument, text));
    }
    Ok(documents)
}

pub(super) fn attention(context: &mut Context<'_>, op: &ops::Attention) -> Done {
    with_float!(op.q.dtype, T => attention_as::<T>(context, op))
}

fn head_stride(view: &View) -> usize {
    view.stride(1)
}

fn attention_as<T: Unit>(context: &mut Context<'_>, op: &ops::Attention) -> Done {
    let q = context.operands.read::<T>(&op.q)?;
    let k = context.operands.read::<T>(&op.k)?;
    let v = context.operands.read::<T>(&op.v)?;
    let starts = context.operands.read::<i32>(&op.documents)?;
    let out = context.operands.write::<T>(&op.out)?;
    let lse = context.operands.write::<f32>(&op.lse)?;
    let (rows, heads, qk_width) = (op.q.dim(0), op.q.dim(1), op.q.dim(2));
    let (group, v_width) = (heads / op.k.dim(1), op.v.dim(2));
    let mut ranges = Vec::new();
    for (origin, rows) in documents(starts, rows)? {
        cut(&mut ranges, Range { origin, row: origin, position: 0, rows, sequence: 0 });
    }
    let (q_row, k_row, v_row) = (row_stride(&op.q), row_stride(&op.k), row_stride(&op.v));
    let (out_row, lse_row) = (row_stride(&op.out), row_stride(&op.lse));
    let (outs, lses) = (Scattered::new(out), Scattered::new(lse));
    let (isa, tally) = (context.isa, context.tally());
    context.pool.run(ranges.len() * heads, |task| {
        let (range, head) = (ranges[task / heads], task % heads);
        let k = &k[range.origin * k_row + head / group * head_stride(&op.k)..];
        let v = &v[range.origin * v_row + head / group * head_stride(&op.v)..];
        let (k, v) = (Rows { data: k, stride: k_row }, Rows { data: v, stride: v_row });
        let work = Work {
            isa,
            q: Rows { data: &q[range.row * q_row + head * head_stride(&op.q)..], stride: q_row },
            keys: KeyValues::InRows { k, v },
            first: range.position,
            rows: range.rows,
            qk_width,
            v_width,
            scale: op.scale,
        };
        let mut sums = tally.task();
        let is_summed = sums.wants_written(4);
        work.run(|row, result, log_sum| {
            let at = range.row + row;
            let start = at * out_row + head * head_stride(&op.out);
            outs.store(start, result);
            lses.store(at * lse_row + head, &[log_sum]);
            if is_summed {
                sums.add_written(4, of_row(bytemuck::cast_slice(result)));
            }
            sums.add_written(5, log_sum.to_bits());
        });
    });
    context.note(tally);
    Ok(())
}

pub(super) fn paged_attention(context: &mut Context<'_>, op: &ops::PagedAttention) -> Done {
    with_float!(op.q.dtype, T => paged_attention_as::<T>(context, op))
}

/// The ranges of all sequences, with every length, bound and block checked.
fn paged_ranges(
    op: &ops::PagedAttention,
    (blocks, lengths, queries): (&[i32], &[i32], &[i32]),
) -> Result<Vec<Range>, DeviceError> {
    let bad = |text| Err(DeviceError::new(ops::DeviceErrorKind::BadArgument, text));
    let (count, block, blocks_max) = (op.k_cache.dim(0), op.k_cache.dim(1), op.blocks.dim(1));
    let mut ranges = Vec::new();
    for (sequence, &length) in lengths.iter().enumerate() {
        let (from, to) = (queries[sequence], queries[sequence + 1]);
        if from < 0 || to < from || to as usize > op.q.dim(0) || length < to - from {
            return bad(format!("sequence {sequence}: rows {from}..{to} of length {length}"));
        }
        let (rows, length) = ((to - from) as usize, length as usize);
        let used = length.div_ceil(block);
        let table = &blocks[sequence * blocks_max..][..blocks_max];
        let exists = |&b: &i32| usize::try_from(b).is_ok_and(|b| b < count);
        if rows > 0 && (used > blocks_max || !table[..used].iter().all(exists)) {
            return bad(format!("sequence {sequence}: its {used} blocks are not all in the cache"));
        }
        let position = length - rows;
        cut(&mut ranges, Range { origin: 0, row: from as usize, position, rows, sequence });
    }
    Ok(ranges)
}

fn paged_attention_as<T: Unit>(context: &mut Context<'_>, op: &ops::PagedAttention) -> Done {
    let q = context.operands.read::<T>(&op.q)?;
    let k = context.operands.read::<T>(&op.k_cache)?;
    let v = context.operands.read::<T>(&op.v_cache)?;
    let blocks = context.operands.read::<i32>(&op.blocks)?;
    let lengths = context.operands.read::<i32>(&op.lengths)?;
    let queries = context.operands.read::<i32>(&op.queries)?;
    let out = context.operands.write::<T>(&op.out)?;
    let ranges = paged_ranges(op, (blocks, lengths, queries))?;
    let (heads, qk_width) = (op.q.dim(1), op.q.dim(2));
    let (block, kv_heads, v_width) = (op.k_cache.dim(1), op.k_cache.dim(2), op.v_cache.dim(3));
    let (group, blocks_max) = (heads / kv_heads, op.blocks.dim(1));
    let (q_row, out_row) = (row_stride(&op.q), row_stride(&op.out));
    let outs = Scattered::new(out);
    let isa = context.isa;
    let (threads, count) = (context.pool.threads(), ranges.len() * heads);
    // A task's head, and its positions.
    let head_of = |task: usize| {
        let (range, head) = (ranges[task / heads], task % heads / group);
        let k = Rows { data: &k[head * qk_width..], stride: kv_heads * qk_width };
        let v = Rows { data: &v[head * v_width..], stride: kv_heads * v_width };
        let blocks = &blocks[range.sequence * blocks_max..][..blocks_max];
        (CachedHead { k, v, blocks, block }, range.position + range.rows)
    };
    context.pool.run(count, |task| {
        let (range, head) = (ranges[task / heads], task % heads);
        // As long as threads take turns.
        let after = (task + threads < count).then(|| head_of(task + threads));
        let (head_here, cold) = (head_of(task).0, task < threads);
        let keys = KeyValues::InBlocks(Cached { head: head_here, after, cold, v_width });
        let work = Work {
            isa,
            q: Rows { data: &q[range.row * q_row + head * head_stride(&op.q)..], stride: q_row },
            keys,
            first: range.position,
            rows: range.rows,
            qk_width,
            v_width,
            scale: op.scale,
        };
        work.run(|row, result, _| {
            let start = (range.row + row) * out_row + head * head_stride(&op.out);
            outs.store(start, result);
        });
    });
    Ok(())
}

pub(super) fn kv_write(context: &mut Context<'_>, op: &ops::KvWrite) -> Done {
    with_float!(op.k.dtype, T => kv_write_as::<T>(context, op))
}

fn kv_write_as<T: Unit>(context: &mut Context<'_>, op: &ops::KvWrite) -> Done {
    let k = context.operands.read::<T>(&op.k)?;
    let v = context.operands.read::<T>(&op.v)?;
    let slots = context.operands.read::<i32>(&op.slots)?;
    let k_cache = context.operands.write::<T>(&op.k_cache)?;
    let v_cache = context.operands.write::<T>(&op.v_cache)?;
    let (rows, heads) = (op.k.dim(0), op.k.dim(1));
    let (k_width, v_width) = (op.k.dim(2), op.v.dim(2));
    let slot_count = op.k_cache.dim(0) * op.k_cache.dim(1);
    for (row, &slot) in slots.iter().enumerate().take(rows) {
        let Some(slot) = usize::try_from(slot).ok().filter(|&slot| slot < slot_count) else {
            continue;
        };
        for head in 0..heads {
            let from = row * row_stride(&op.k) + head * head_stride(&op.k);
            let to = (slot * heads + head) * k_width;
            k_cache[to..to + k_width].copy_from_slice(&k[from..from + k_width]);
            let from = row * row_stride(&op.v) + head * head_stride(&op.v);
            let to = (slot * heads + head) * v_width;
            v_cache[to..to + v_width].copy_from_slice(&v[from..from + v_width]);
        }
    }
    Ok(())
}
