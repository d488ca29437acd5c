//! Products of few rows with an `[n, k]` matrix, as in decoding: the matrix is streamed once, in
//! place.
//!
//! A square of `LANES` weight rows by `LANES` units is transposed in registers, so that lanes are
//! columns of C and every column keeps its own chain over ascending k: the bits are those of the
//! blocked product. More rows than fit the registers take turns at the same squares, which lie in
//! the cache by then.

use super::pack::{PackRows, Source, units_square};
use super::stretch::{Stretch, rows_of_task};
use super::{DataMut, MatrixMut, Product, Store, Unit};
use crate::ffi::{Grid, Tile, Tiles};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::micro::{Ahead, Stream, stream_squares};
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};

/// Rows that meet a vector of columns in registers.
const ROWS_TOGETHER: usize = 16;
/// Vectors of columns that a task's range holds a whole number of: what narrow sets take at a time.
pub(crate) const VECTORS_MAX: usize = 2;

/// Computes a product with at most `GEMV_ROWS_MAX` rows.
pub(super) fn run<T: Unit>(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    product: &Product<'_, T>,
    mut c: MatrixMut<'_>,
) {
    let (m, n, units) = (product.m, product.n, product.units);
    let lanes = isa.geometry().lanes;
    let row_words = units.next_multiple_of(lanes);
    let rest = m % ROWS_TOGETHER;
    let rows_padded = m - rest + if rest == 0 { 0 } else { rest.next_power_of_two() };
    let bias_words = if product.bias.is_some() { n } else { 0 };
    let [left, bias] = scratch.words([rows_padded * row_words, bias_words]);
    let bias: &mut [f32] = bytemuck::cast_slice_mut(bias);
    super::fill_bias(product.bias, bias);
    left[m * row_words..].fill(0);
    let source = |data, stride, first, count| Source {
        data,
        stride,
        first,
        count,
        k: product.k,
        units,
        dot: product.dot,
    };
    let to = &mut left[..m * row_words];
    dispatch(isa, PackRows { from: source(product.a, product.a_stride, 0, m), row_words, to });
    let range = rows_of_task(pool, isa, n, VECTORS_MAX);
    let grid =
        Grid { rows: m, columns: n, row_stride: c.row_stride, tile_rows: m, tile_columns: range };
    let shared = Shared {
        left: bytemuck::cast_slice(left),
        row_words,
        right: source(product.b, product.b_stride, 0, n),
        bias: if bias.is_empty() { None } else { Some(bias) },
        store: product.store,
    };
    match c.data.from(0) {
        DataMut::F32(c) => stream(pool, isa, &shared, Tiles::new(c, grid), range),
        DataMut::Bf16(c) => stream(pool, isa, &shared, Tiles::new(c, grid), range),
        DataMut::F16(c) => stream(pool, isa, &shared, Tiles::new(c, grid), range),
    }
}

/// What all ranges of columns share.
struct Shared<'a, T> {
    /// The left operand's rows of units, the last ones filled up to a power of two.
    left: &'a [f32],
    row_words: usize,
    right: Source<'a, T>,
    bias: Option<&'a [f32]>,
    store: Store,
}

fn stream<T: Unit, C: Element>(
    pool: &Pool,
    isa: Isa,
    shared: &Shared<'_, T>,
    tiles: Tiles<'_, C>,
    range: usize,
) {
    let Source { data, stride, count, .. } = shared.right;
    let matrix = (bytemuck::cast_slice(data), stride * size_of::<T>());
    pool.run_in_turn(count.div_ceil(range), |index| {
        let stretch = Stretch::new(pool, matrix, index, (count, range));
        let right = Source { first: stretch.first, count: stretch.rows, ..shared.right };
        dispatch(isa, Range { shared, right, stretch, tile: tiles.take(0, index) });
    });
}

/// A range of columns of C.
struct Range<'a, T, C> {
    shared: &'a Shared<'a, T>,
    right: Source<'a, T>,
    stretch: Stretch<'a>,
    tile: Tile<'a, C>,
}

impl<T: Unit, C: Element> Kernel for Range<'_, T, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.right.dot {
            self.rows::<S, true>(simd);
        } else {
            self.rows::<S, false>(simd);
        }
    }
}

impl<T: Unit, C: Element> Range<'_, T, C> {
    /// Chooses how many rows and column vectors are in registers.
    #[inline(always)]
    fn rows<S: Simd, const DOT: bool>(self, simd: S) {
        // One wide vector's chains keep up with memory, and fewer rows at once leave more of the
        // cache to what is prefetched; narrow vectors need two.
        let wide = S::LANES >= 16;
        // What is converted is not streamed.
        if DOT || size_of::<T>() == 4 {
            self.stretch.open(S::LANES);
        }
        match self.tile.rows() {
            1 if wide => self.columns::<S, DOT, 1, 1>(simd),
            1 => self.columns::<S, DOT, 1, 2>(simd),
            2 if wide => self.columns::<S, DOT, 2, 1>(simd),
            2 => self.columns::<S, DOT, 2, 2>(simd),
            3 | 4 => self.columns::<S, DOT, 4, 1>(simd),
            _ => self.turns::<S, DOT>(simd),
        }
    }

    /// Many rows, some at a time.
    #[inline(always)]
    fn turns<S: Simd, const DOT: bool>(mut self, simd: S) {
        let rows = self.tile.rows();
        for column in (0..self.right.count).step_by(S::LANES) {
            for row in (0..rows).step_by(ROWS_TOGETHER) {
                match rows - row {
                    1 => self.rows_at::<S, DOT, 1, 1>(simd, row, column),
                    2 => self.rows_at::<S, DOT, 2, 1>(simd, row, column),
                    3 | 4 => self.rows_at::<S, DOT, 4, 1>(simd, row, column),
                    5..=8 => self.rows_at::<S, DOT, 8, 1>(simd, row, column),
                    _ => self.rows_at::<S, DOT, ROWS_TOGETHER, 1>(simd, row, column),
                }
            }
        }
    }

    #[inline(always)]
    fn columns<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
        mut self,
        simd: S,
    ) {
        for column in (0..self.right.count).step_by(VECTORS * S::LANES) {
            self.rows_at::<S, DOT, ROWS, VECTORS>(simd, 0, column);
        }
    }

    /// Computes and writes some rows of some columns.
    #[inline(always)]
    fn rows_at<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        simd: S,
        first: usize,
        column: usize,
    ) {
        let sums = self.sums::<S, DOT, ROWS, VECTORS>(simd, first, column);
        for (row, sums) in sums.iter().enumerate().take(self.tile.rows() - first) {
            for (vector, sums) in sums.iter().enumerate() {
                let column = column + vector * S::LANES;
                if column < self.right.count {
                    self.write(simd, first + row, column, *sums);
                }
            }
        }
    }

    /// The chains of `ROWS` rows and `VECTORS` vectors of columns.
    #[inline(always)]
    fn sums<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        row: usize,
        column: usize,
    ) -> [[S::F32; VECTORS]; ROWS] {
        let mut sums = [[simd.zero(); VECTORS]; ROWS];
        let (left, right) = (&self.shared.left[row * self.shared.row_words..], &self.right);
        let raw = DOT || size_of::<T>() == 4;
        let whole_units = if DOT { right.k / 2 } else { right.k };
        let mut unit = 0;
        if raw && right.count - column >= VECTORS * S::LANES {
            let squares = whole_units / S::LANES;
            let next = self.stretch.next(column, VECTORS * S::LANES);
            let stream = Stream {
                left,
                left_stride: self.shared.row_words,
                right: bytemuck::cast_slice(right.data),
                right_start: (right.first + column) * right.stride * size_of::<T>(),
                right_row_bytes: right.stride * size_of::<T>(),
                squares,
                next: if row == 0 { next } else { Ahead::default() },
            };
            stream_squares::<S, DOT, ROWS, VECTORS>(simd, &stream, &mut sums);
            unit = squares * S::LANES;
        }
        while unit < right.units {
            self.edge::<S, DOT, ROWS, VECTORS>(simd, left, (column, unit), &mut sums);
            unit += S::LANES;
        }
        sums
    }

    /// Continues the chains by one square that may be cut off by the matrix's end or need
    /// conversion.
    #[inline(always)]
    fn edge<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
        &self,
        simd: S,
        left: &[f32],
        (column, unit): (usize, usize),
        sums: &mut [[S::F32; VECTORS]; ROWS],
    ) {
        let (row_words, right) = (self.shared.row_words, &self.right);
        // A chain ends at the last unit: further zero products could change a zero's sign.
        let steps = S::LANES.min(right.units - unit);
        for vector in 0..VECTORS {
            let first = column + vector * S::LANES;
            if first >= right.count {
                break;
            }
            let square = units_square::<S, T, DOT>(simd, right, first, unit);
            let square = simd.transpose(square);
            for (step, weights) in square.as_ref().iter().enumerate().take(steps) {
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = simd.splat(left[row * row_words + unit + step]);
                    let sum = &mut sums[vector];
                    *sum = if DOT {
                        simd.dot_pairs(*sum, value, *weights)
                    } else {
                        simd.fma(value, *weights, *sum)
                    };
                }
            }
        }
    }

    #[inline(always)]
    fn write<S: Simd>(&mut self, simd: S, row: usize, column: usize, sums: S::F32) {
        let (first, count) = (self.right.first + column, S::LANES.min(self.right.count - column));
        let bias = self.shared.bias.map(|bias| &bias[first..][..count]);
        let to = &mut self.tile.row(row)[column..][..count];
        super::write_vector(simd, sums, bias, self.shared.store, to);
    }
}
