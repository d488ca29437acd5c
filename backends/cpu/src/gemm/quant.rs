//! Products with a matrix of small integers that have one scale per row and block, as in serving
//! quantised weights: `c = x · (integers * scales)^T + bias`.
//!
//! The matrix is streamed in place, `LANES` of its rows at a time, and meets all rows of x before
//! the next come, a few at a time; nothing is unpacked into memory. Integers are exact in bf16 and
//! f32, so a block's sum is that of an ordinary product, and `simd/quantised.rs` says in which
//! order blocks are added. The path never depends on the number of rows.

use super::pack::{PackRows, Source};
use super::stretch::{Stretch, rows_of_task};
use super::{Data, DataMut, Matrix, MatrixMut, Store, Unit, is_dot, quant_panels, units};
use crate::ffi::{Grid, Parts, Tile, Tiles};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::micro::{Ahead, LANES_MAX};
use crate::simd::quantised::{
    Bytes, HalfBytes, QuantStream, SQUARE_BYTES, Stored, stream_quantised,
};
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};

/// Rows of x that meet a vector of columns in registers.
const ROWS_TOGETHER: usize = 16;
/// Words of x that are kept near while a range of columns passes: a quarter of the second level.
pub(super) const LEFT_WORDS_NEAR: usize = 64 << 10;
/// Bytes of the largest block: what an edge is copied into.
const BLOCK_BYTES_MAX: usize = 256;

/// How the integers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Integers {
    /// Signed bytes, none of them -128.
    Bytes,
    /// Signed half bytes, the lower half of a byte first.
    HalfBytes,
}

impl Integers {
    fn per_byte(self) -> usize {
        match self {
            Integers::Bytes => 1,
            Integers::HalfBytes => 2,
        }
    }

    /// Whether blocks of so many integers can be streamed.
    pub fn streams(self, block: usize) -> bool {
        let bytes = block / self.per_byte();
        block.is_multiple_of(SQUARE_BYTES * self.per_byte()) && bytes <= BLOCK_BYTES_MAX
    }
}

/// One product.
#[derive(Debug)]
pub struct QuantArgs<'a> {
    /// Rows of x and c.
    pub m: usize,
    /// Rows of the matrix, columns of c.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Left operand.
    pub x: Matrix<'a>,
    /// How the matrix is stored.
    pub integers: Integers,
    /// The matrix, row after row without gaps.
    pub weight: &'a [u8],
    /// One scale per row and block.
    pub scales: &'a [f32],
    /// Integers of a row that share a scale; [`Integers::streams`] must hold.
    pub block: usize,
    /// Matrix and scales are kept in panels, as `prepack.rs` leaves them.
    pub panels: bool,
    /// Added to every row before rounding.
    pub bias: Option<Data<'a>>,
    /// The result.
    pub c: MatrixMut<'a>,
}

/// Computes one product on all threads of the pool.
///
/// Panics if an operand is smaller than its shape.
pub fn quant_gemm(pool: &Pool, isa: Isa, scratch: &mut Scratch, args: QuantArgs<'_>) {
    let QuantArgs { m, n, k, block, integers, .. } = args;
    assert!(integers.streams(block), "blocks of {block} {integers:?} cannot be streamed");
    assert!(k.is_multiple_of(integers.per_byte()), "a row of {k} {integers:?} is no whole bytes");
    assert!(args.weight.len() >= n * k / integers.per_byte(), "the matrix is too short");
    assert!(args.scales.len() >= n * k.div_ceil(block), "the scales are too few");
    if m == 0 || n == 0 {
        return;
    }
    match (args.x.data, integers) {
        (Data::F32(x), Integers::Bytes) => typed::<f32, Bytes>(pool, isa, scratch, args, x),
        (Data::F32(x), Integers::HalfBytes) => typed::<f32, HalfBytes>(pool, isa, scratch, args, x),
        (Data::Bf16(x), Integers::Bytes) => typed::<_, Bytes>(pool, isa, scratch, args, x),
        (Data::Bf16(x), Integers::HalfBytes) => typed::<_, HalfBytes>(pool, isa, scratch, args, x),
        (Data::F16(x), Integers::Bytes) => typed::<_, Bytes>(pool, isa, scratch, args, x),
        (Data::F16(x), Integers::HalfBytes) => typed::<_, HalfBytes>(pool, isa, scratch, args, x),
    }
}

/// The rows a chunk of `rest` rows takes in registers.
fn rows_together(rest: usize) -> usize {
    rest.min(ROWS_TOGETHER).next_power_of_two()
}

fn typed<T: Unit, W: Stored>(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    mut args: QuantArgs<'_>,
    x: &[T],
) {
    let (m, n, k) = (args.m, args.n, args.k);
    if args.panels {
        return quant_panels::run::<T, W>(pool, isa, scratch, args, x);
    }
    let blocks = k.div_ceil(args.block);
    let row_words = units(T::KIND, isa, blocks * args.block);
    let rest = m % ROWS_TOGETHER;
    let rows_padded = m - rest + if rest == 0 { 0 } else { rows_together(rest) };
    let bias_words = if args.bias.is_some() { n } else { 0 };
    let range = rows_of_task(pool, isa, n, 1);
    let sums_words = n.div_ceil(range) * range * rows_near(row_words).min(rows_padded);
    let [left, bias, sums] = scratch.words([rows_padded * row_words, bias_words, sums_words]);
    let bias: &mut [f32] = bytemuck::cast_slice_mut(bias);
    super::fill_bias(args.bias, bias);
    let from = Source {
        data: x,
        stride: args.x.row_stride,
        first: 0,
        count: m,
        k,
        units: units(T::KIND, isa, k),
        dot: is_dot(T::KIND, isa),
    };
    pack_left(pool, isa, from, row_words, left);
    let shared = Shared {
        left: bytemuck::cast_slice(left),
        row_words,
        rows_near: rows_near(row_words).min(rows_padded),
        m,
        n,
        k,
        weight: args.weight,
        scales: args.scales,
        block: args.block,
        dot: from.dot,
        bias: if bias.is_empty() { None } else { Some(bias) },
        range,
    };
    let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
    let row_stride = args.c.row_stride;
    let grid = Grid { rows: m, columns: n, row_stride, tile_rows: m, tile_columns: range };
    match args.c.data.from(0) {
        DataMut::F32(c) => run::<W, f32>(pool, isa, &shared, Tiles::new(c, grid), sums),
        DataMut::Bf16(c) => run::<W, _>(pool, isa, &shared, Tiles::new(c, grid), sums),
        DataMut::F16(c) => run::<W, _>(pool, isa, &shared, Tiles::new(c, grid), sums),
    }
}

/// Rows of x that are taken before the next columns come.
fn rows_near(row_words: usize) -> usize {
    (LEFT_WORDS_NEAR / row_words.max(1) / ROWS_TOGETHER).max(1) * ROWS_TOGETHER
}

/// Brings the rows of x into units, with zeros up to whole blocks and whole chunks of rows.
fn pack_left<T: Unit>(
    pool: &Pool,
    isa: Isa,
    from: Source<'_, T>,
    row_words: usize,
    left: &mut [u32],
) {
    if row_words == 0 {
        return;
    }
    left[from.count * row_words..].fill(0);
    let parts = Parts::new(&mut left[..from.count * row_words], ROWS_TOGETHER * row_words);
    pool.run(parts.count(), |part| {
        let to = parts.take(part);
        for row in to.chunks_exact_mut(row_words) {
            row[from.units..].fill(0);
        }
        let first = part * ROWS_TOGETHER;
        let from = Source { first, count: ROWS_TOGETHER.min(from.count - first), ..from };
        dispatch(isa, PackRows { from, row_words, to });
    });
}

/// What all ranges of columns share.
struct Shared<'a> {
    left: &'a [f32],
    row_words: usize,
    rows_near: usize,
    m: usize,
    n: usize,
    k: usize,
    weight: &'a [u8],
    scales: &'a [f32],
    block: usize,
    dot: bool,
    bias: Option<&'a [f32]>,
    /// Columns of a task.
    range: usize,
}

fn run<W: Stored, C: Element>(
    pool: &Pool,
    isa: Isa,
    shared: &Shared<'_>,
    tiles: Tiles<'_, C>,
    sums: &mut [f32],
) {
    let Shared { m, n, range, rows_near, .. } = *shared;
    let parts = Parts::new(sums, range * rows_near);
    let matrix = (shared.weight, shared.k / W::PER_BYTE);
    pool.run_in_turn(n.div_ceil(range), |index| {
        let stretch = Stretch::new(pool, matrix, index, (n, range));
        let (sums, mut tile) = (parts.take(index), tiles.take(0, index));
        for near in (0..m).step_by(rows_near) {
            let rows = rows_near.min(m - near);
            let part = Part { near, rows, stretch };
            let stored = std::marker::PhantomData::<W>;
            dispatch(isa, Sums { shared, part, sums: &mut *sums, stored });
            dispatch(isa, Write { shared, part, sums: &*sums, tile: &mut tile });
        }
    });
}

/// A part of C.
#[derive(Clone, Copy)]
struct Part<'a> {
    /// Its first row.
    near: usize,
    rows: usize,
    /// The rows of the matrix that make its columns.
    stretch: Stretch<'a>,
}

/// Computes a part of C in f32, `range` values a row.
struct Sums<'a, W> {
    shared: &'a Shared<'a>,
    part: Part<'a>,
    sums: &'a mut [f32],
    stored: std::marker::PhantomData<W>,
}

impl<W: Stored> Kernel for Sums<'_, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        if S::BF16_DOT && self.shared.dot {
            self.columns::<S, true>(simd);
        } else {
            self.columns::<S, false>(simd);
        }
    }
}

impl<W: Stored> Sums<'_, W> {
    #[inline(always)]
    fn columns<S: Simd, const DOT: bool>(&mut self, simd: S) {
        let Part { rows, stretch, .. } = self.part;
        let columns = stretch.rows;
        let vectors = if rows <= 2 { 2 } else { 1 };
        stretch.open(vectors * S::LANES);
        let mut column = 0;
        while column < columns {
            if rows <= 2 && columns - column >= 2 * S::LANES {
                match rows {
                    1 => self.rows::<S, DOT, 1, 2>(simd, 0, column),
                    _ => self.rows::<S, DOT, 2, 2>(simd, 0, column),
                };
                column += 2 * S::LANES;
                continue;
            }
            let mut row = 0;
            while row < rows {
                row += match rows_together(rows - row) {
                    1 => self.rows::<S, DOT, 1, 1>(simd, row, column),
                    2 => self.rows::<S, DOT, 2, 1>(simd, row, column),
                    4 => self.rows::<S, DOT, 4, 1>(simd, row, column),
                    8 => self.rows::<S, DOT, 8, 1>(simd, row, column),
                    _ => self.rows::<S, DOT, ROWS_TOGETHER, 1>(simd, row, column),
                };
            }
            column += S::LANES;
        }
    }

    /// A chunk of rows and some vectors of columns; returns how many rows the chunk holds.
    #[inline(always)]
    fn rows<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) -> usize {
        let Shared { k, block, row_words, range, .. } = *self.shared;
        let stretch = &self.part.stretch;
        let first = stretch.first + column;
        let lanes = (VECTORS * S::LANES).min(stretch.rows - column);
        let row_bytes = k / W::PER_BYTE;
        let blocks = k.div_ceil(block);
        let next = stretch.next(column, VECTORS * S::LANES);
        let whole = if lanes == VECTORS * S::LANES { k / block } else { 0 };
        let stream = QuantStream {
            left: &self.shared.left[(self.part.near + row) * row_words..],
            left_stride: row_words,
            right: self.shared.weight,
            right_start: first * row_bytes,
            right_row_bytes: row_bytes,
            scales: self.shared.scales,
            scales_start: first * blocks,
            scales_stride: blocks,
            blocks: whole,
            block_bytes: block / W::PER_BYTE,
            next: if row == 0 { next } else { Ahead::default() },
        };
        let mut totals = [[simd.zero(); ROWS]; VECTORS];
        stream_quantised::<S, W, DOT, ROWS, VECTORS>(simd, &stream, &mut totals);
        for (vector, totals) in totals.iter_mut().enumerate() {
            let lanes = S::LANES.min(lanes - vector * S::LANES);
            for block in whole..blocks {
                let at = Edge { block, first: vector * S::LANES, lanes };
                edge::<S, W, DOT, ROWS>(simd, &stream, at, totals);
            }
            let column = column + vector * S::LANES;
            for (index, total) in totals.iter().enumerate().take(self.part.rows - row) {
                simd.store(*total, &mut self.sums[(row + index) * range + column..][..S::LANES]);
            }
        }
        ROWS
    }
}

/// Rounds a part's sums into C.
struct Write<'a, 'c, C> {
    shared: &'a Shared<'a>,
    part: Part<'a>,
    sums: &'a [f32],
    tile: &'a mut Tile<'c, C>,
}

impl<C: Element> Kernel for Write<'_, '_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Part { near, rows, stretch } = self.part;
        let Stretch { first, rows: columns, .. } = stretch;
        let bias = self.shared.bias.map(|bias| &bias[first..][..columns]);
        for row in 0..rows {
            let sums = &self.sums[row * self.shared.range..][..columns];
            super::write_row(simd, sums, bias, Store::Overwrite, self.tile.row(near + row));
        }
    }
}

/// A block that the matrix's last row or column cuts off.
#[derive(Clone, Copy)]
struct Edge {
    block: usize,
    /// The first row of the matrix after those of the stream.
    first: usize,
    /// Rows of the matrix that exist.
    lanes: usize,
}

/// Adds one block, filled with zeros where the matrix has ended. A chain ends with zero products
/// then, and begins with zero, so only zeros of either sign could differ from a shorter chain's.
#[inline(always)]
fn edge<S: Simd, W: Stored, const DOT: bool, const ROWS: usize>(
    simd: S,
    stream: &QuantStream<'_>,
    at: Edge,
    totals: &mut [S::F32; ROWS],
) {
    let QuantStream { block_bytes, right_row_bytes, .. } = *stream;
    let mut copy = [0_u8; LANES_MAX * BLOCK_BYTES_MAX];
    let mut scales = [0.0_f32; LANES_MAX];
    let start = at.block * block_bytes;
    let bytes = block_bytes.min(right_row_bytes - start);
    for row in 0..at.lanes {
        let from = stream.right_start + (at.first + row) * right_row_bytes + start;
        copy[row * block_bytes..][..bytes].copy_from_slice(&stream.right[from..][..bytes]);
        let from = stream.scales_start + (at.first + row) * stream.scales_stride;
        scales[row] = stream.scales[from + at.block];
    }
    let units = start * W::PER_BYTE / if DOT { 2 } else { 1 };
    let part = QuantStream {
        left: &stream.left[units..],
        right: &copy,
        right_start: 0,
        right_row_bytes: block_bytes,
        scales: &scales,
        scales_start: 0,
        scales_stride: 1,
        blocks: 1,
        next: Ahead::default(),
        ..*stream
    };
    let mut sums = [*totals];
    stream_quantised::<S, W, DOT, ROWS, 1>(simd, &part, &mut sums);
    *totals = sums[0];
}
