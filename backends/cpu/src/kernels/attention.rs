//! Attention over packed documents and over a paged cache, with one inner tile for both, so that
//! training, prefill and decoding agree bit for bit.
//!
//! Scores, probabilities and sums are f32. A task owns one head of one range of query rows. Keys
//! are taken in tiles of `KEY_TILE` from the document's start; per row, every tile does the same
//! arithmetic whatever other rows are present.

use std::cell::RefCell;

use pontoon_ops::{self as ops, DeviceError, KEY_TILE, View};

use super::product::{Left, multiply_add, padded_width};
use super::{Context, Done, row_stride, with_float};
use crate::ffi::Scattered;
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};

/// Query rows of one task: enough to share a widened key tile, few enough to balance threads.
const QUERY_ROWS: usize = 128;

/// Where one head of one sequence finds its keys and values by position.
pub(super) trait KeyValues: Sync {
    /// Widens the key at `position` into `to`.
    fn key(&self, position: usize, to: &mut [f32]);
    /// Widens the value at `position` into `to`.
    fn value(&self, position: usize, to: &mut [f32]);
}

/// Keys and values that lie in rows of a tensor.
struct InRows<'a, T> {
    k: &'a [T],
    v: &'a [T],
    k_row: usize,
    v_row: usize,
}

impl<T: Element> KeyValues for InRows<'_, T> {
    fn key(&self, position: usize, to: &mut [f32]) {
        widen(&self.k[position * self.k_row..][..to.len()], to);
    }

    fn value(&self, position: usize, to: &mut [f32]) {
        widen(&self.v[position * self.v_row..][..to.len()], to);
    }
}

/// Keys and values that lie in blocks of a cache.
struct InBlocks<'a, T> {
    k: &'a [T],
    v: &'a [T],
    blocks: &'a [i32],
    /// Positions in a block.
    block: usize,
    k_row: usize,
    v_row: usize,
}

impl<T> InBlocks<'_, T> {
    fn slot(&self, position: usize) -> usize {
        self.blocks[position / self.block] as usize * self.block + position % self.block
    }
}

impl<T: Element> KeyValues for InBlocks<'_, T> {
    fn key(&self, position: usize, to: &mut [f32]) {
        widen(&self.k[self.slot(position) * self.k_row..][..to.len()], to);
    }

    fn value(&self, position: usize, to: &mut [f32]) {
        widen(&self.v[self.slot(position) * self.v_row..][..to.len()], to);
    }
}

pub(super) fn widen<T: Element>(from: &[T], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// One head's share of one range of query rows of one sequence.
struct Work<'a, T, K> {
    isa: Isa,
    /// The first query row's elements.
    q: &'a [T],
    q_row: usize,
    keys: K,
    /// The position of the first query row in its sequence.
    first: usize,
    rows: usize,
    qk_width: usize,
    v_width: usize,
    scale: f32,
}

/// Working memory of one thread, grown once.
#[derive(Default)]
struct Tile {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    peak: Vec<f32>,
    sum: Vec<f32>,
    line: Vec<f32>,
}

thread_local! {
    static TILE: RefCell<Tile> = RefCell::default();
}

fn grown(memory: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    &mut memory[..len]
}

impl<T: Element, K: KeyValues> Work<'_, T, K> {
    /// Calls `finish(row, output row, lse)` for every row when all keys have been seen.
    fn run(&self, mut finish: impl FnMut(usize, &[f32], f32)) {
        TILE.with_borrow_mut(|tile| {
            let v_padded = padded_width(self.v_width);
            let q = grown(&mut tile.q, self.rows * self.qk_width);
            for (row, to) in q.chunks_mut(self.qk_width).enumerate() {
                widen(&self.q[row * self.q_row..][..self.qk_width], to);
            }
            let out = grown(&mut tile.out, self.rows * v_padded);
            let peak = grown(&mut tile.peak, self.rows);
            let sum = grown(&mut tile.sum, self.rows);
            out.fill(0.0);
            peak.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let k = grown(&mut tile.k, self.qk_width * KEY_TILE);
            let v = grown(&mut tile.v, KEY_TILE * v_padded);
            let scores = grown(&mut tile.scores, self.rows * KEY_TILE);
            let line = grown(&mut tile.line, self.qk_width.max(v_padded));
            let end = self.first + self.rows;
            for start in (0..end).step_by(KEY_TILE) {
                let keys = KEY_TILE.min(end - start);
                load_tile(&self.keys, start, keys, (&mut *k, &mut *v, &mut *line), self.widths());
                let step = Step {
                    q,
                    k,
                    v,
                    scores,
                    out,
                    peak,
                    sum,
                    start,
                    first: self.first,
                    qk_width: self.qk_width,
                    v_padded,
                    scale: self.scale,
                };
                dispatch(self.isa, step);
            }
            for row in 0..self.rows {
                let (total, out) = (sum[row], &mut out[row * v_padded..][..self.v_width]);
                out.iter_mut().for_each(|value| *value /= total);
                finish(row, out, peak[row] + total.ln());
            }
        });
    }

    fn widths(&self) -> (usize, usize) {
        (self.qk_width, self.v_width)
    }
}

/// Widens one tile: keys transposed `[qk_width, KEY_TILE]`, values `[KEY_TILE, padded width]`;
/// missing keys and columns are zero.
pub(super) fn load_tile(
    keys: &impl KeyValues,
    start: usize,
    count: usize,
    (k, v, line): (&mut [f32], &mut [f32], &mut [f32]),
    (qk_width, v_width): (usize, usize),
) {
    let v_padded = padded_width(v_width);
    if count < KEY_TILE {
        k.fill(0.0);
    }
    v[count * v_padded..].fill(0.0);
    for index in 0..count {
        let line = &mut line[..qk_width];
        keys.key(start + index, line);
        for (element, value) in line.iter().enumerate() {
            k[element * KEY_TILE + index] = *value;
        }
        let row = &mut v[index * v_padded..][..v_padded];
        keys.value(start + index, &mut row[..v_width]);
        row[v_width..].fill(0.0);
    }
}

/// One tile of keys against all query rows.
struct Step<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    scores: &'a mut [f32],
    out: &'a mut [f32],
    peak: &'a mut [f32],
    sum: &'a mut [f32],
    /// Position of the tile's first key.
    start: usize,
    /// Position of the first query row.
    first: usize,
    qk_width: usize,
    v_padded: usize,
    scale: f32,
}

impl Kernel for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.peak.len();
        // Rows before the tile's first key see none of it.
        let skipped = self.start.saturating_sub(self.first).min(rows);
        let seen = rows - skipped;
        let (q, out) =
            (&self.q[skipped * self.qk_width..], &mut self.out[skipped * self.v_padded..]);
        let scores = &mut self.scores[..seen * KEY_TILE];
        scores.fill(0.0);
        let left = Left { a: q, row_step: self.qk_width, k_step: 1 };
        multiply_add(simd, left, self.k, scores, (seen, 0..self.qk_width, KEY_TILE));
        for row in 0..seen {
            let position = self.first + skipped + row;
            let visible = (position + 1 - self.start).min(KEY_TILE);
            let line = &mut scores[row * KEY_TILE..][..KEY_TILE];
            line[visible..].fill(f32::NEG_INFINITY);
            let at = skipped + row;
            let out = &mut out[row * self.v_padded..][..self.v_padded];
            soften(simd, line, self.scale, (&mut self.peak[at], &mut self.sum[at]), out);
        }
        // Rows that see the whole tile go together; the others stop at their own key.
        let full_from = (self.start + KEY_TILE).saturating_sub(self.first + skipped + 1).min(seen);
        for row in 0..full_from {
            let visible = self.first + skipped + row + 1 - self.start;
            let left = Left { a: &scores[row * KEY_TILE..], row_step: KEY_TILE, k_step: 1 };
            let out = &mut out[row * self.v_padded..];
            multiply_add(simd, left, self.v, out, (1, 0..visible, self.v_padded));
        }
        let left = Left { a: &scores[full_from * KEY_TILE..], row_step: KEY_TILE, k_step: 1 };
        let out = &mut out[full_from * self.v_padded..];
        multiply_add(simd, left, self.v, out, (seen - full_from, 0..KEY_TILE, self.v_padded));
    }
}

/// Turns one row's scores into unnormalised probabilities under the running maximum, and rescales
/// what was summed before.
#[inline(always)]
fn soften<S: Simd>(
    simd: S,
    line: &mut [f32],
    scale: f32,
    (peak, sum): (&mut f32, &mut f32),
    out: &mut [f32],
) {
    let factor = simd.splat(scale);
    let mut best = simd.splat(f32::NEG_INFINITY);
    for chunk in line.chunks_mut(S::LANES) {
        let score = simd.mul(simd.load(chunk), factor);
        simd.store(score, chunk);
        best = simd.max(score, best);
    }
    let new_peak = simd.reduce_max(best).max(*peak);
    let correction = if new_peak == f32::NEG_INFINITY { 0.0 } else { (*peak - new_peak).exp() };
    let shift = simd.splat(new_peak);
    let mut total = simd.zero();
    for chunk in line.chunks_mut(S::LANES) {
        let probability = simd.exp(simd.sub(simd.load(chunk), shift));
        simd.store(probability, chunk);
        total = simd.add(total, probability);
    }
    *sum = *sum * correction + simd.reduce_sum(total);
    *peak = new_peak;
    let again = simd.splat(correction);
    for chunk in out.chunks_mut(S::LANES) {
        let value = simd.mul(simd.load(chunk), again);
        simd.store(value, chunk);
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

fn attention_as<T: Element>(context: &mut Context<'_>, op: &ops::Attention) -> Done {
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
    let isa = context.isa;
    context.pool.run(ranges.len() * heads, |task| {
        let (range, head) = (ranges[task / heads], task % heads);
        let keys = InRows {
            k: &k[range.origin * k_row + head / group * head_stride(&op.k)..],
            v: &v[range.origin * v_row + head / group * head_stride(&op.v)..],
            k_row,
            v_row,
        };
        let work = Work {
            isa,
            q: &q[range.row * q_row + head * head_stride(&op.q)..],
            q_row,
            keys,
            first: range.position,
            rows: range.rows,
            qk_width,
            v_width,
            scale: op.scale,
        };
        work.run(|row, result, log_sum| {
            let at = range.row + row;
            let start = at * out_row + head * head_stride(&op.out);
            outs.store(start, result);
            lses.store(at * lse_row + head, &[log_sum]);
        });
    });
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

fn paged_attention_as<T: Element>(context: &mut Context<'_>, op: &ops::PagedAttention) -> Done {
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
    context.pool.run(ranges.len() * heads, |task| {
        let (range, head) = (ranges[task / heads], task % heads);
        let keys = InBlocks {
            k: &k[head / group * qk_width..],
            v: &v[head / group * v_width..],
            blocks: &blocks[range.sequence * blocks_max..][..blocks_max],
            block,
            k_row: kv_heads * qk_width,
            v_row: kv_heads * v_width,
        };
        let work = Work {
            isa,
            q: &q[range.row * q_row + head * head_stride(&op.q)..],
            q_row,
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

fn kv_write_as<T: Element>(context: &mut Context<'_>, op: &ops::KvWrite) -> Done {
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
