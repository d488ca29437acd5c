//! Checks of a product while it is computed and right after: word sums of its operands, and whether
//! its f32 sums add up.
//!
//! For `C = A B` the sum of row i of C must be row i of A times the vector of B's row sums, which
//! costs two passes over the operands instead of a second product. The two sides are rounded in
//! different orders, so they differ a little: a row beyond [`limit`] is computed once more, and as
//! an element's bits depend on nothing but its row and column, an honest row then gives the same
//! sum to the last bit. So a check can cost time but never accuses an honest product.
//!
//! The tile loop feeds a [`Watch`]; `kernels/linear.rs` and `kernels/loss.rs` decide who is
//! watched.

use std::sync::atomic::{AtomicU32, Ordering};

use pontoon_ops::sums::of_row;

use super::{Data, DataMut, GemmArgs, Layout, Matrix, MatrixMut, Store};
use crate::ffi::{PARTS_MAX, Parts};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};

/// A flipped bit in a product's f32 sums before they are stored, to try the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// Row of C.
    pub row: usize,
    /// Column of C.
    pub column: usize,
    /// Bit of the f32.
    pub bit: u32,
}

/// What a product tells while it is computed.
pub(crate) struct Watch {
    /// Of the words of C that were there before, where they are added to.
    pub(super) before: AtomicU32,
    /// Of the words that were stored.
    pub(super) stored: AtomicU32,
    /// The f32 sums of each row within each column of tiles, as bits.
    rows: Vec<AtomicU32>,
    m: usize,
    pub(super) flip: Option<Flip>,
}

/// The word sums of one product, as operands are read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProductSums {
    /// Of A.
    pub a: u32,
    /// Of B.
    pub b: u32,
    /// Of C before, where it is added to.
    pub before: u32,
    /// Of C after.
    pub stored: u32,
}

/// A row whose sums are not those of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongRow(pub usize);

impl Watch {
    pub(super) fn new(m: usize, tile_columns: usize, flip: Option<Flip>) -> Watch {
        let rows = (0..m * tile_columns).map(|_| AtomicU32::new(0)).collect();
        Watch { before: AtomicU32::new(0), stored: AtomicU32::new(0), rows, m, flip }
    }

    /// Takes in a row's sum within a column of tiles.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, tile_column: usize, sum: f32) {
        self.rows[tile_column * self.m + row].store(sum.to_bits(), Ordering::Relaxed);
    }

    /// A row's sums within each column of tiles, as bits.
    fn parts(&self, row: usize) -> impl Iterator<Item = u32> {
        let parts = self.rows.iter().skip(row).step_by(self.m.max(1));
        parts.map(|part| part.load(Ordering::Relaxed))
    }

    fn row_sum(&self, row: usize) -> f64 {
        self.parts(row).map(|bits| f64::from(f32::from_bits(bits))).sum()
    }
}

/// Vectors of one strip of columns: as many sums and squares as there are registers.
const STRIP_VECTORS: usize = 8;
/// Vectors of a row that are summed side by side.
const ROW_VECTORS: usize = 4;
/// Rows that one task takes at least.
const ROWS_PER_TASK: usize = 32;

/// What a pass over a row finds.
#[derive(Clone, Copy, Default)]
struct Found {
    sum: f32,
    squares: f32,
    words: u32,
}

/// One row times a vector, or its plain sum; its norm and words beside it.
struct RowPass<'a, T> {
    row: &'a [T],
    times: Option<&'a [f32]>,
}

impl<T: Element> Kernel for RowPass<'_, T> {
    type Output = Found;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Found {
        let (sum, squares) = match self.times {
            Some(times) => sum_row(simd, self.row, |at| simd.load(&times[at..])),
            None => sum_row(simd, self.row, |_| simd.splat(1.0)),
        };
        Found { sum, squares, words: of_row(bytemuck::cast_slice(self.row)) }
    }
}

#[inline(always)]
fn sum_row<S: Simd, T: Element>(
    simd: S,
    row: &[T],
    factor: impl Fn(usize) -> S::F32,
) -> (f32, f32) {
    let mut sums = [simd.zero(); ROW_VECTORS];
    let mut squares = [simd.zero(); ROW_VECTORS];
    let width = ROW_VECTORS * S::LANES;
    let whole = row.len() / width * width;
    for (index, values) in row.chunks_exact(width).enumerate() {
        for vector in 0..ROW_VECTORS {
            let at = vector * S::LANES;
            let value = T::load(simd, &values[at..][..S::LANES]);
            sums[vector] = simd.fma(value, factor(index * width + at), sums[vector]);
            squares[vector] = simd.fma(value, value, squares[vector]);
        }
    }
    for (index, values) in row[whole..].chunks(S::LANES).enumerate() {
        let value = T::load(simd, values);
        // Lanes past the end are zero in `value`, so they add nothing whatever the factor is.
        sums[0] = simd.fma(value, factor(whole + index * S::LANES), sums[0]);
        squares[0] = simd.fma(value, value, squares[0]);
    }
    let fold = |v: [S::F32; ROW_VECTORS]| {
        simd.reduce_sum(simd.add(simd.add(v[0], v[1]), simd.add(v[2], v[3])))
    };
    (fold(sums), fold(squares))
}

/// Columns of a matrix: each times a vector, or its plain sum; norms and words beside them.
struct ColumnPass<'a, T> {
    data: &'a [T],
    stride: usize,
    rows: usize,
    times: Option<&'a [f32]>,
    sums: &'a mut [f32],
    squares: &'a mut [f32],
}

impl<T: Element> Kernel for ColumnPass<'_, T> {
    type Output = u32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u32 {
        let width = STRIP_VECTORS * S::LANES;
        let strips = self.sums.chunks_mut(width).zip(self.squares.chunks_mut(width));
        let mut words = 0_u32;
        for (strip, (sums, squares)) in strips.enumerate() {
            let data = &self.data[strip * width..];
            let strip = Strip { data, stride: self.stride, rows: self.rows, times: self.times };
            let of_strip = if sums.len() == width {
                strip.whole(simd, sums, squares)
            } else {
                strip.part(simd, sums, squares)
            };
            words = words.wrapping_add(of_strip);
        }
        words
    }
}

/// A strip of columns, from its first element on.
struct Strip<'a, T> {
    data: &'a [T],
    stride: usize,
    rows: usize,
    times: Option<&'a [f32]>,
}

impl<T: Element> Strip<'_, T> {
    #[inline(always)]
    fn whole<S: Simd>(&self, simd: S, to_sums: &mut [f32], to_squares: &mut [f32]) -> u32 {
        let mut sums = [simd.zero(); STRIP_VECTORS];
        let mut squares = [simd.zero(); STRIP_VECTORS];
        let mut words = 0_u32;
        for row in 0..self.rows {
            let values = &self.data[row * self.stride..][..STRIP_VECTORS * S::LANES];
            words = words.wrapping_add(of_row(bytemuck::cast_slice(values)));
            let factor = simd.splat(self.times.map_or(1.0, |times| times[row]));
            for vector in 0..STRIP_VECTORS {
                let value = T::load(simd, &values[vector * S::LANES..][..S::LANES]);
                sums[vector] = simd.fma(value, factor, sums[vector]);
                squares[vector] = simd.fma(value, value, squares[vector]);
            }
        }
        for vector in 0..STRIP_VECTORS {
            simd.store(sums[vector], &mut to_sums[vector * S::LANES..][..S::LANES]);
            simd.store(squares[vector], &mut to_squares[vector * S::LANES..][..S::LANES]);
        }
        words
    }

    /// The last strip, which may be narrower.
    #[inline(always)]
    fn part<S: Simd>(&self, simd: S, to_sums: &mut [f32], to_squares: &mut [f32]) -> u32 {
        let width = to_sums.len();
        let mut words = 0_u32;
        to_sums.fill(0.0);
        to_squares.fill(0.0);
        for row in 0..self.rows {
            let values = &self.data[row * self.stride..][..width];
            words = words.wrapping_add(of_row(bytemuck::cast_slice(values)));
            let factor = simd.splat(self.times.map_or(1.0, |times| times[row]));
            for at in (0..width).step_by(S::LANES) {
                let end = (at + S::LANES).min(width);
                let value = T::load(simd, &values[at..end]);
                let sum = simd.fma(value, factor, simd.load(&to_sums[at..end]));
                let square = simd.fma(value, value, simd.load(&to_squares[at..end]));
                simd.store(sum, &mut to_sums[at..end]);
                simd.store(square, &mut to_squares[at..end]);
            }
        }
        words
    }
}

/// How an operand's elements lie around the dimension that is kept.
#[derive(Clone, Copy)]
enum Kept {
    /// One result for each row.
    Rows,
    /// One result for each column.
    Columns,
}

/// The shape `[rows, columns]` of an operand, and what is kept of it.
#[derive(Clone, Copy)]
struct Shaped {
    rows: usize,
    columns: usize,
    kept: Kept,
}

/// Sums an operand over one dimension, weighted by `times`; gives its word sum. `results` and
/// `squares` are as long as the other dimension.
fn pass(
    (pool, isa): (&Pool, Isa),
    matrix: Matrix<'_>,
    shaped: Shaped,
    times: Option<&[f32]>,
    (results, squares): (&mut [f32], &mut [f32]),
) -> u32 {
    match matrix.data {
        Data::F32(data) => typed((pool, isa), (data, matrix.row_stride), shaped, times, (results, squares)),
        Data::Bf16(data) => typed((pool, isa), (data, matrix.row_stride), shaped, times, (results, squares)),
        Data::F16(data) => typed((pool, isa), (data, matrix.row_stride), shaped, times, (results, squares)),
    }
}

fn typed<T: Element>(
    (pool, isa): (&Pool, Isa),
    (data, stride): (&[T], usize),
    Shaped { rows, columns, kept }: Shaped,
    times: Option<&[f32]>,
    (results, squares): (&mut [f32], &mut [f32]),
) -> u32 {
    if results.is_empty() {
        return 0;
    }
    let words = AtomicU32::new(0);
    let strip = STRIP_VECTORS * isa.geometry().lanes;
    let least = results.len().div_ceil(PARTS_MAX);
    let step = match kept {
        Kept::Rows => ROWS_PER_TASK.max(least),
        Kept::Columns => least.next_multiple_of(strip).max(strip),
    };
    let (results, squares) = (Parts::new(results, step), Parts::new(squares, step));
    pool.run(results.count(), |task| {
        let (sums, squares) = (results.take(task), squares.take(task));
        let first = task * step;
        let found = match kept {
            Kept::Rows => {
                let mut all = 0_u32;
                for (index, (sum, square)) in sums.iter_mut().zip(squares).enumerate() {
                    let row = match columns {
                        0 => &[],
                        _ => &data[(first + index) * stride..][..columns],
                    };
                    let found = dispatch(isa, RowPass { row, times });
                    (*sum, *square) = (found.sum, found.squares);
                    all = all.wrapping_add(found.words);
                }
                all
            }
            Kept::Columns => {
                let data = &data[first.min(data.len())..];
                dispatch(isa, ColumnPass { data, stride, rows, times, sums, squares })
            }
        };
        words.fetch_add(found, Ordering::Relaxed);
    });
    words.into_inner()
}

/// How far a row's two sums may be apart before it is computed again: the spread of rounding errors
/// of a chain of k, none larger than half a unit of |a_row| |b_column|, over n columns.
fn limit(k: usize, n: usize, row_squares: f32, all_squares: f64) -> f64 {
    const UNIT: f64 = 0.29 * f32::EPSILON as f64;
    let chain = (k as f64).sqrt() + (n as f64).sqrt();
    // Products below the smallest normal number may be taken as zero.
    let floor = f64::from(f32::MIN_POSITIVE) * (k * n) as f64;
    UNIT * chain * (f64::from(row_squares) * all_squares).sqrt() + floor
}

/// Compares a computed product with its operands; gives their word sums, or a row that is wrong.
pub(super) fn verify(
    (pool, isa): (&Pool, Isa),
    scratch: &mut Scratch,
    product: &Operands<'_>,
    watch: &Watch,
) -> Result<ProductSums, WrongRow> {
    let Operands { layout, m, n, k, a, b } = *product;
    let mut work = vec![0.0_f32; 2 * k + 2 * m];
    let (of_b, of_a) = work.split_at_mut(2 * k);
    let (b_sums, b_squares) = of_b.split_at_mut(k);
    let shaped = match layout {
        Layout::Nt => Shaped { rows: n, columns: k, kept: Kept::Columns },
        Layout::Nn | Layout::Tn => Shaped { rows: k, columns: n, kept: Kept::Rows },
    };
    let b_words = pass((pool, isa), b, shaped, None, (b_sums, b_squares));
    let all_squares: f64 = b_squares.iter().map(|square| f64::from(*square)).sum();
    let (a_sums, a_squares) = of_a.split_at_mut(m);
    let shaped = match layout {
        Layout::Tn => Shaped { rows: k, columns: m, kept: Kept::Columns },
        Layout::Nt | Layout::Nn => Shaped { rows: m, columns: k, kept: Kept::Rows },
    };
    let a_words = pass((pool, isa), a, shaped, Some(b_sums), (a_sums, a_squares));
    for row in 0..m {
        let (computed, expected) = (watch.row_sum(row), f64::from(a_sums[row]));
        let apart = (computed - expected).abs();
        let limit = limit(k, n, a_squares[row], all_squares);
        // Operands that are not finite are someone else's finding: nothing can be said of them.
        let knows = all_squares.is_finite() && a_squares[row].is_finite() && expected.is_finite();
        let fits = apart <= limit;
        if knows && !fits && !row_again(pool, isa, scratch, product, row, watch) {
            return Err(WrongRow(row));
        }
    }
    let load = |of: &AtomicU32| of.load(Ordering::Relaxed);
    Ok(ProductSums { a: a_words, b: b_words, before: load(&watch.before), stored: load(&watch.stored) })
}

/// The operands of a product.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub layout: Layout,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
}

/// Computes a row once more; whether it has the sums it had before, to the last bit.
fn row_again(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    product: &Operands<'_>,
    row: usize,
    watch: &Watch,
) -> bool {
    let Operands { layout, n, k, a, b, .. } = *product;
    let start = if layout == Layout::Tn { row } else { row * a.row_stride };
    let again = Watch::new(1, n.div_ceil(super::tile::TILE_COLUMNS), None);
    let mut sums = vec![0.0_f32; n];
    let args = GemmArgs {
        layout,
        m: 1,
        n,
        k,
        a: Matrix { data: a.data.from(start), row_stride: a.row_stride },
        b,
        bias: None,
        c: MatrixMut { data: DataMut::F32(&mut sums), row_stride: n.max(1) },
        store: Store::Overwrite,
    };
    super::run_watched(pool, isa, scratch, args, Some(&again));
    watch.parts(row).eq(again.parts(0))
}
