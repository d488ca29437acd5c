//! The gradient of attention: probabilities are computed again tile by tile from the saved
//! log-sums.
//!
//! A task owns one key head of one document, so that its key and value gradients are summed by one
//! thread in a fixed order: query heads of the group ascending, query rows ascending. Scores are
//! computed with keys as rows, so that probabilities and score gradients already are the left
//! operands of the gradients of values and keys. They are rounded to bf16 where the CPU multiplies
//! bf16 pairs; all sums are f32. Masked pairs bring nothing, not even where they hold NaN.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;
use pontoon_ops as ops;
use pontoon_ops::sums::of_row;

use super::attention::{Rows, documents, grown, store_units};
use super::product::{Divide, Product, SumsRow, all_finite, within};
use super::watched::TaskSums;
use super::{Context, Done, row_stride, with_float};
use crate::ffi::Scattered;
use crate::gemm::pack::{PackColumns, PackRows, PackRowsAsColumns, Source};
use crate::gemm::{Unit, is_dot, units};
use crate::simd::micro::{LeftUnits, Start};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::words::RowWords;

/// Rows and keys of a tile; the same, so that exactly the tiles on the diagonal are partly masked.
const TILE: usize = 64;

/// Working memory of one thread, grown once. `rows` are left operands; `turned` and `columns` are
/// right operands, per tile: rows as columns, and rows as units.
#[derive(Default)]
struct Memory {
    k_rows: Vec<u32>,
    v_rows: Vec<u32>,
    k_columns: Vec<u32>,
    q_turned: Vec<u32>,
    q_columns: Vec<u32>,
    dout_turned: Vec<u32>,
    dout_columns: Vec<u32>,
    dq: Vec<u32>,
    dk: Vec<u32>,
    dv: Vec<u32>,
    lse: Vec<u32>,
    delta: Vec<u32>,
    p: Vec<u32>,
    ds: Vec<u32>,
    ds_panels: Vec<u32>,
    scores: Vec<u32>,
    slopes: Vec<u32>,
    result: Vec<u32>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

fn floats(memory: &mut Vec<u32>, len: usize) -> &mut [f32] {
    bytemuck::cast_slice_mut(grown(memory, len))
}

/// The rows of one head from row `start` on.
fn head_rows<'a, T>(data: &'a [T], view: &ops::View, start: usize, head: usize) -> Rows<'a, T> {
    Rows { data: &data[place(view, start, head)..], stride: row_stride(view) }
}

/// Where a head's part of a row begins.
fn place(view: &ops::View, row: usize, head: usize) -> usize {
    row * row_stride(view) + head * view.stride(1)
}

pub(super) fn attention_bwd(context: &mut Context<'_>, op: &ops::AttentionBwd) -> Done {
    with_float!(op.q.dtype, T => attention_bwd_as::<T>(context, op))
}

fn attention_bwd_as<T: Unit>(context: &mut Context<'_>, op: &ops::AttentionBwd) -> Done {
    let read = |view| context.operands.read::<T>(view);
    let (q, k, v) = (read(&op.q)?, read(&op.k)?, read(&op.v)?);
    let (out, dout) = (read(&op.out)?, read(&op.dout)?);
    let starts = context.operands.read::<i32>(&op.documents)?;
    let lse = context.operands.read::<f32>(&op.lse)?;
    let dq = Scattered::new(context.operands.write::<T>(&op.dq)?);
    let dk = Scattered::new(context.operands.write::<T>(&op.dk)?);
    let dv = Scattered::new(context.operands.write::<T>(&op.dv)?);
    let (heads, kv_heads) = (op.q.dim(1), op.k.dim(1));
    let documents = documents(starts, op.q.dim(0))?;
    let (isa, tally) = (context.isa, context.tally());
    let (qk, v_side) = (Side::new::<T>(isa, op.q.dim(2)), Side::new::<T>(isa, op.v.dim(2)));
    context.pool.run(documents.len() * kv_heads, |task| {
        let ((start, rows), kv_head) = (documents[task / kv_heads], task % kv_heads);
        MEMORY.with_borrow_mut(|memory| {
            let mut told = tally.task();
            let mut document = Document { isa, rows, qk, v: v_side, scale: op.scale, memory };
            let keys = head_rows(k, &op.k, start, kv_head);
            document.begin([keys, head_rows(v, &op.v, start, kv_head)], &mut told);
            let group = heads / kv_heads;
            for head in kv_head * group..(kv_head + 1) * group {
                let of_head = [(q, &op.q), (dout, &op.dout), (out, &op.out)];
                let of_head = of_head.map(|(data, view)| head_rows(data, view, start, head));
                document.load_query(of_head, &mut told);
                let to = floats(&mut document.memory.lse, rows.next_multiple_of(TILE));
                for (row, to) in to.iter_mut().take(rows).enumerate() {
                    *to = lse[place(&op.lse, start + row, head)];
                    told.add_read(LSE, to.to_bits());
                }
                document.run::<T>();
                let sums = bytemuck::cast_slice(&document.memory.dq);
                let result = &mut document.memory.result;
                finish((isa, rows, qk), sums, result, (DQ, &mut told), |row, values: &[T]| {
                    dq.store(place(&op.dq, start + row, head), values);
                });
            }
            let Memory { dk: k_sums, dv: v_sums, result, .. } = document.memory;
            let sides = [(DK, &dk, &op.dk, k_sums, qk), (DV, &dv, &op.dv, v_sums, v_side)];
            for (operand, to, view, sums, side) in sides {
                let sums = bytemuck::cast_slice(sums);
                let told = (operand, &mut told);
                finish((isa, rows, side), sums, result, told, |row, values: &[T]| {
                    to.store(place(view, start + row, kv_head), values);
                });
            }
        });
    });
    context.note(tally);
    Ok(())
}

/// The places of operands that are summed on their way.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const OUT: usize = 4;
const LSE: usize = 5;
const DOUT: usize = 6;
const DQ: usize = 7;
const DK: usize = 8;
const DV: usize = 9;

/// Rounds sums that lie tile after tile, hands out their rows and tells what was in them.
fn finish<T: Unit>(
    (isa, rows, side): (Isa, usize, Side),
    sums: &[f32],
    result: &mut Vec<u32>,
    (operand, told): (usize, &mut TaskSums<'_>),
    mut store: impl FnMut(usize, &[T]),
) {
    let is_summed = told.wants_written(operand);
    let to = grown(result, side.width);
    let to = &mut bytemuck::cast_slice_mut::<u32, T>(to)[..side.width];
    for row in 0..rows {
        let sums = &sums[row / TILE * side.sums_len()..][..side.sums_len()];
        let sums = SumsRow { sums, step: TILE * side.panel_width, row: row % TILE };
        dispatch(isa, Divide { sums, divisor: 1.0, to: &mut *to });
        store(row, to);
        if is_summed {
            told.add_written(operand, of_row(bytemuck::cast_slice(to)));
        }
    }
}

/// The widths of a head's rows: of queries and keys, or of values.
#[derive(Clone, Copy)]
struct Side {
    /// Elements.
    width: usize,
    /// Units.
    units: usize,
    /// Panels that the elements fill.
    panels: usize,
    /// Columns of a panel.
    panel_width: usize,
    /// Units of a tile's rows.
    tile_units: usize,
}

impl Side {
    fn new<T: Unit>(isa: Isa, width: usize) -> Self {
        let panel_width = isa.geometry().micro_columns;
        Side {
            width,
            units: units(T::KIND, isa, width),
            panels: width.div_ceil(panel_width),
            panel_width,
            tile_units: units(T::KIND, isa, TILE),
        }
    }

    /// Words of one tile's rows as columns.
    fn turned_words(&self) -> usize {
        TILE * self.units
    }

    /// Words of one tile's rows as units.
    fn columns_words(&self) -> usize {
        self.panels * self.panel_words()
    }

    fn panel_words(&self) -> usize {
        self.panel_width * self.tile_units
    }

    /// Sums of one tile.
    fn sums_len(&self) -> usize {
        self.panels * self.panel_width * TILE
    }
}

/// One key head of one document.
struct Document<'a> {
    isa: Isa,
    rows: usize,
    qk: Side,
    v: Side,
    scale: f32,
    memory: &'a mut Memory,
}

impl Document<'_> {
    fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Packs keys and values, and clears their gradients.
    fn begin<T: Unit>(&mut self, [k, v]: [Rows<'_, T>; 2], told: &mut TaskSums<'_>) {
        let (isa, rows, tiles) = (self.isa, self.rows, self.tiles());
        let memory = &mut *self.memory;
        for (from, side, to) in [(k, self.qk, &mut memory.k_rows), (v, self.v, &mut memory.v_rows)]
        {
            let to = grown(to, rows * side.units);
            let from = source(isa, from, rows, side.width);
            dispatch(isa, PackRows { from, row_words: side.units.max(1), to });
        }
        let columns = grown(&mut memory.k_columns, tiles * self.qk.columns_words());
        pack_tiles(isa, k, (rows, self.qk), &mut [], columns);
        told.read_rows(K, words(k, rows, self.qk));
        told.read_rows(V, words(v, rows, self.v));
        floats(&mut memory.dk, tiles * self.qk.sums_len()).fill(0.0);
        floats(&mut memory.dv, tiles * self.v.sums_len()).fill(0.0);
    }

    /// Packs one query head, and sums `dout * out` per row.
    fn load_query<T: Unit>(&mut self, [q, dout, out]: [Rows<'_, T>; 3], told: &mut TaskSums<'_>) {
        let (isa, rows, tiles) = (self.isa, self.rows, self.tiles());
        let memory = &mut *self.memory;
        let turned = grown(&mut memory.q_turned, tiles * self.qk.turned_words());
        let columns = grown(&mut memory.q_columns, tiles * self.qk.columns_words());
        pack_tiles(isa, q, (rows, self.qk), turned, columns);
        let turned = grown(&mut memory.dout_turned, tiles * self.v.turned_words());
        let columns = grown(&mut memory.dout_columns, tiles * self.v.columns_words());
        pack_tiles(isa, dout, (rows, self.v), turned, columns);
        floats(&mut memory.dq, tiles * self.qk.sums_len()).fill(0.0);
        let delta = floats(&mut memory.delta, tiles * TILE);
        for (row, delta) in delta.iter_mut().take(rows).enumerate() {
            let a = &dout.data[row * dout.stride..][..self.v.width];
            let b = &out.data[row * out.stride..][..self.v.width];
            *delta = dispatch(isa, RowDot { a, b });
        }
        told.read_rows(Q, words(q, rows, self.qk));
        told.read_rows(DOUT, words(dout, rows, self.v));
        told.read_rows(OUT, words(out, rows, self.v));
    }

    /// All tiles of one query head.
    fn run<T: Unit>(&mut self) {
        let (qk, v) = (self.qk, self.v);
        let geometry = self.isa.geometry();
        let left_words = qk.tile_units * geometry.micro_rows + geometry.lanes;
        let block = geometry.micro_rows;
        let memory = &mut *self.memory;
        for (query_tile, query) in (0..self.rows).step_by(TILE).enumerate() {
            for (key_tile, key) in (0..=query).step_by(TILE).enumerate() {
                let (queries, keys) = (TILE.min(self.rows - query), TILE.min(self.rows - key));
                let float = bytemuck::cast_slice::<u32, f32>;
                let tile = Tile {
                    k_rows: &memory.k_rows[key * qk.units..][..keys * qk.units],
                    v_rows: &memory.v_rows[key * v.units..][..keys * v.units],
                    k_columns: of_tile(&memory.k_columns, key_tile, qk.columns_words()),
                    q_turned: of_tile(&memory.q_turned, query_tile, qk.turned_words()),
                    q_columns: of_tile(&memory.q_columns, query_tile, qk.columns_words()),
                    dout_turned: of_tile(&memory.dout_turned, query_tile, v.turned_words()),
                    dout_columns: of_tile(&memory.dout_columns, query_tile, v.columns_words()),
                    lse: float(&memory.lse[query..][..TILE]),
                    delta: float(&memory.delta[query..][..TILE]),
                    dq: sums_of_tile(&mut memory.dq, query_tile, qk),
                    dk: sums_of_tile(&mut memory.dk, key_tile, qk),
                    dv: sums_of_tile(&mut memory.dv, key_tile, v),
                    p: grown(&mut memory.p, block * qk.tile_units),
                    ds: grown(&mut memory.ds, TILE * qk.tile_units),
                    ds_panels: grown(&mut memory.ds_panels, TILE.div_ceil(block) * left_words),
                    scores: floats(&mut memory.scores, block * TILE),
                    slopes: floats(&mut memory.slopes, block * TILE),
                    sides: (qk, v),
                    queries,
                    keys,
                    diagonal: query == key,
                    scale: self.scale,
                    dot: is_dot(T::KIND, self.isa),
                };
                dispatch(self.isa, tile);
            }
        }
    }
}

/// The words of a head's rows.
fn words<T>(rows: Rows<'_, T>, count: usize, side: Side) -> RowWords<'_, T> {
    RowWords { data: rows.data, stride: rows.stride, rows: count, width: side.width }
}

fn of_tile(words: &[u32], tile: usize, tile_words: usize) -> &[u32] {
    &words[tile * tile_words..][..tile_words]
}

fn sums_of_tile(words: &mut [u32], tile: usize, side: Side) -> &mut [f32] {
    bytemuck::cast_slice_mut(&mut words[tile * side.sums_len()..][..side.sums_len()])
}

/// Rows as the source of packing, k along the row.
fn source<T: Unit>(isa: Isa, rows: Rows<'_, T>, count: usize, width: usize) -> Source<'_, T> {
    Source {
        data: rows.data,
        stride: rows.stride,
        first: 0,
        count,
        k: width,
        units: units(T::KIND, isa, width),
        dot: is_dot(T::KIND, isa),
    }
}

/// Packs rows tile by tile: as columns into `turned`, unless that is empty, and as units into
/// `columns`.
fn pack_tiles<T: Unit>(
    isa: Isa,
    from: Rows<'_, T>,
    (rows, side): (usize, Side),
    turned: &mut [u32],
    columns: &mut [u32],
) {
    let (width, panel_words) = (side.panel_width, side.panel_words());
    for (tile, start) in (0..rows).step_by(TILE).enumerate() {
        let count = TILE.min(rows - start);
        let from = Rows { data: &from.data[start * from.stride..], ..from };
        let from = source(isa, from, count, side.width);
        if !turned.is_empty() {
            let to = &mut turned[tile * side.turned_words()..][..side.turned_words()];
            let used = count.div_ceil(width) * width * side.units;
            dispatch(isa, PackRowsAsColumns { from, to: &mut to[..used] });
        }
        let to = &mut columns[tile * side.columns_words()..][..side.columns_words()];
        let units = units(T::KIND, isa, count);
        let from = Source { count: side.width, k: count, units, ..from };
        dispatch(isa, PackColumns { from, width, panel_words, to });
    }
}

/// The sum of the products of two rows' elements, in vector lanes, added by a fixed tree.
struct RowDot<'a, T> {
    a: &'a [T],
    b: &'a [T],
}

impl<T: Unit> Kernel for RowDot<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sum = simd.zero();
        for (a, b) in self.a.chunks(S::LANES).zip(self.b.chunks(S::LANES)) {
            sum = simd.fma(T::load(simd, a), T::load(simd, b), sum);
        }
        simd.reduce_sum(sum)
    }
}

/// One tile of keys against one tile of query rows, a block of keys at a time.
struct Tile<'a> {
    k_rows: &'a [u32],
    v_rows: &'a [u32],
    k_columns: &'a [u32],
    q_turned: &'a [u32],
    q_columns: &'a [u32],
    dout_turned: &'a [u32],
    dout_columns: &'a [u32],
    lse: &'a [f32],
    delta: &'a [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Room for the probabilities of a block of keys: rows of query units.
    p: &'a mut [u32],
    /// Room for the score gradients of all keys, likewise.
    ds: &'a mut [u32],
    /// Room for the same with queries as rows.
    ds_panels: &'a mut [u32],
    /// Room for the scores of a block of keys, panel after panel.
    scores: &'a mut [f32],
    /// Room for `v dout^T` of a block of keys.
    slopes: &'a mut [f32],
    /// Of queries and keys, and of values.
    sides: (Side, Side),
    queries: usize,
    keys: usize,
    /// Whether key i of the tile is seen only by queries from i on.
    diagonal: bool,
    scale: f32,
    /// Units are bf16 pairs.
    dot: bool,
}

impl Kernel for Tile<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.dot {
            self.tile::<S, true>(simd);
        } else {
            self.tile::<S, false>(simd);
        }
    }
}

impl Tile<'_> {
    #[inline(always)]
    fn tile<S: Simd, const DOT: bool>(mut self, simd: S) {
        let (per_unit, width) = (if DOT { 2 } else { 1 }, 2 * S::LANES);
        let (qk, v) = self.sides;
        let clean = |words: &[u32], side: Side, count: usize| {
            let used = count.div_ceil(per_unit) * width;
            words.chunks(side.panel_words()).all(|panel| all_finite::<DOT>(&panel[..used]))
        };
        let clean = !self.diagonal
            || (clean(self.q_columns, qk, self.queries)
                && clean(self.dout_columns, v, self.queries)
                && clean(self.k_columns, qk, self.keys));
        for key in (0..self.keys).step_by(S::MICRO_ROWS) {
            let count = S::MICRO_ROWS.min(self.keys - key);
            self.score::<S, DOT>(simd, key, count);
            for index in 0..count {
                self.differentiate::<S, DOT>(simd, key + index, index);
            }
            let p = LeftUnits {
                bytes: bytemuck::cast_slice(self.p),
                start: 0,
                row_bytes: qk.tile_units * 4,
                unit_bytes: 4,
            };
            let ds = LeftUnits {
                bytes: bytemuck::cast_slice(self.ds),
                start: key * qk.tile_units * 4,
                ..p
            };
            let seen = self.seen(key).start / per_unit..self.queries.div_ceil(per_unit);
            let operands =
                [(p, self.dout_columns, &mut *self.dv, v), (ds, self.q_columns, &mut *self.dk, qk)];
            for (left, right, sums, side) in operands {
                let sums = &mut sums[key * width..];
                let mut product = to_sums(left, count, right, sums, side);
                // A masked pair has zeros on the left, which leave the sums as they are unless the
                // right side is infinite or NaN.
                if clean {
                    product.run::<S, DOT>(simd, seen.clone());
                } else {
                    product.run_apart::<S, DOT>(simd, |index| key + index..self.queries);
                }
            }
        }
        self.turn::<S, DOT>(simd);
        self.sum_dq::<S, DOT>(simd, clean);
    }

    /// The queries that see a key.
    #[inline(always)]
    fn seen(&self, key: usize) -> Range<usize> {
        if self.diagonal { key..self.queries } else { 0..self.queries }
    }

    /// Scores, and `v dout^T`, of a block of keys against the queries that see its first key.
    #[inline(always)]
    fn score<S: Simd, const DOT: bool>(&mut self, simd: S, key: usize, count: usize) {
        let width = 2 * S::LANES;
        let (qk, v) = self.sides;
        let seen = self.seen(key);
        let panels = seen.start / width..seen.end.div_ceil(width);
        let operands = [
            (self.k_rows, self.q_turned, &mut *self.scores, qk.units),
            (self.v_rows, self.dout_turned, &mut *self.slopes, v.units),
        ];
        for (left, right, sums, units) in operands {
            let bytes = bytemuck::cast_slice(left);
            let row_bytes = units * 4;
            let mut product = Product {
                left: LeftUnits { bytes, start: key * row_bytes, row_bytes, unit_bytes: 4 },
                rows: count,
                right,
                panel_words: units * width,
                panels: panels.clone(),
                sums,
                sums_step: S::MICRO_ROWS * width,
                start: Start::Zero,
            };
            product.run::<S, DOT>(simd, 0..units);
        }
    }

    /// Turns one key's scores into probabilities, and `v dout^T` into `scale * ds`; zero where
    /// masked. `index` is the key's place in its block.
    #[inline(always)]
    fn differentiate<S: Simd, const DOT: bool>(&mut self, simd: S, key: usize, index: usize) {
        let width = 2 * S::LANES;
        let seen = self.seen(key);
        let scale = simd.splat(self.scale);
        let row_words = self.sides.0.tile_units;
        let p = &mut self.p[index * row_words..][..row_words];
        let ds = &mut self.ds[key * row_words..][..row_words];
        for at in (0..TILE).step_by(S::LANES) {
            let (mut probability, mut slope) = (simd.zero(), simd.zero());
            if at + S::LANES > seen.start && at < seen.end {
                let from = at / width * S::MICRO_ROWS * width + index * width + at % width;
                let score = simd.mul(simd.load(&self.scores[from..][..S::LANES]), scale);
                let all = simd.exp(simd.sub(score, simd.load(&self.lse[at..][..S::LANES])));
                let delta = simd.load(&self.delta[at..][..S::LANES]);
                let apart = simd.sub(simd.load(&self.slopes[from..][..S::LANES]), delta);
                let gradient = simd.mul(simd.mul(all, apart), scale);
                probability = within(simd, at, &seen, all, probability);
                slope = within(simd, at, &seen, gradient, slope);
            }
            store_units::<S, DOT>(simd, probability, p, at);
            store_units::<S, DOT>(simd, slope, ds, at);
        }
    }

    /// Brings the score gradients into panels with queries as rows.
    #[inline(always)]
    fn turn<S: Simd, const DOT: bool>(&mut self, simd: S) {
        let width = S::MICRO_ROWS;
        let panel_words = self.sides.0.tile_units * width + S::LANES;
        let to = &mut self.ds_panels[..self.queries.div_ceil(width) * panel_words];
        let (count, k) = (self.queries, self.keys);
        if DOT {
            let data: &[bf16] = bytemuck::cast_slice(self.ds);
            let units = k.div_ceil(2);
            let from = Source { data, stride: TILE, first: 0, count, k, units, dot: true };
            PackColumns { from, width, panel_words, to }.run(simd);
        } else {
            let data: &[f32] = bytemuck::cast_slice(self.ds);
            let from = Source { data, stride: TILE, first: 0, count, k, units: k, dot: false };
            PackColumns { from, width, panel_words, to }.run(simd);
        }
    }

    /// Adds `ds k` to the query gradients.
    #[inline(always)]
    fn sum_dq<S: Simd, const DOT: bool>(&mut self, simd: S, clean: bool) {
        let (per_unit, width) = (if DOT { 2 } else { 1 }, 2 * S::LANES);
        let side = self.sides.0;
        let panel_words = side.tile_units * S::MICRO_ROWS + S::LANES;
        for query in (0..self.queries).step_by(S::MICRO_ROWS) {
            let count = S::MICRO_ROWS.min(self.queries - query);
            let left = LeftUnits {
                bytes: bytemuck::cast_slice(self.ds_panels),
                start: query / S::MICRO_ROWS * panel_words * 4,
                row_bytes: 4,
                unit_bytes: 4 * S::MICRO_ROWS,
            };
            let sums = &mut self.dq[query * width..];
            let mut product = to_sums(left, count, self.k_columns, sums, side);
            let last = if self.diagonal { (query + count).min(self.keys) } else { self.keys };
            if clean {
                product.run::<S, DOT>(simd, 0..last.div_ceil(per_unit));
            } else {
                product.run_apart::<S, DOT>(simd, |index| 0..query + index + 1);
            }
        }
    }
}

/// A block of rows times a tile's columns, added to the tile's sums.
#[inline(always)]
fn to_sums<'a>(
    left: LeftUnits<'a>,
    rows: usize,
    right: &'a [u32],
    sums: &'a mut [f32],
    side: Side,
) -> Product<'a> {
    Product {
        left,
        rows,
        right,
        panel_words: side.panel_words(),
        panels: 0..side.panels,
        sums,
        sums_step: TILE * side.panel_width,
        start: Start::Resume,
    }
}
