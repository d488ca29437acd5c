//! Whether a product's f32 sums add up, checked while it is computed.
//!
//! For `C = A B` the sum of column j of C must be the vector of A's column sums times column j of
//! B. The left side is added up tile by tile while the sums are in the nearest cache; the right one
//! is one more row through the packed operand. The two are rounded in different orders, so they
//! differ a little: a column beyond [`limit`] is computed once more, and as an element's bits
//! depend on nothing but its row and column, an honest column then gives the same sums to the last
//! bit. So a check can cost time but never accuses an honest product.
//!
//! The tile loop owns the memory and calls this file; `kernels/watched.rs` decides what is checked.

use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::Pod;

use super::pack::{Source, row_units};
use super::tile::TILE_ROWS;
use super::{DataMut, GemmArgs, Layout, Matrix, MatrixMut, Product, Store, Unit};
use crate::ffi::{PARTS_MAX, Parts};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::micro::{Column, LeftUnits, PAIRED_ONES, load_units, sum_strip};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::words::RowWords;

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

/// What is asked of a checked product besides whether it adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The word sum of A as it is read.
    pub a: bool,
    /// The word sum of B as it is read.
    pub b: bool,
    /// Spoils the product on purpose.
    pub flip: Option<Flip>,
}

/// The word sums of a checked product: of the operands that were asked for, and of the result.
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

/// A column whose sums are not those of its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongColumn(pub usize);

/// What a product tells while it is computed.
#[derive(Default)]
pub(crate) struct Watch {
    pub(super) asked: Asked,
    /// Of the words of A and B, where they are asked for.
    pub(super) operands: [AtomicU32; 2],
    /// Of the words of C that were there before, where they are added to.
    pub(super) before: AtomicU32,
    /// Of the words that were stored.
    pub(super) stored: AtomicU32,
    /// Columns whose two sums are too far apart, with their sums within each row of tiles.
    pub(super) suspects: Vec<(usize, Vec<u32>)>,
}

impl Watch {
    /// Adds up words of A (0) or B (1) on their way, if they are asked for.
    pub(super) fn operand<T: Pod>(&self, isa: Isa, place: usize, rows: RowWords<'_, T>) {
        if [self.asked.a, self.asked.b][place] {
            self.operands[place].fetch_add(dispatch(isa, rows), Ordering::Relaxed);
        }
    }
}

/// Rows of the weights' three parts: together they are an f32 to the last bit.
const SPLITS: usize = 3;
/// Columns that are computed again at most, the worst ones first: where more are beyond the limit,
/// either the first of them is wrong or errors of rounding all go one way.
const SUSPECTS_MAX: usize = 32;
/// Vectors of units that are summed at a time, each in a chain of its own.
const STRIP: usize = 4;
/// Rows of the left operand that one task sums at least.
const ROWS_PER_TASK: usize = 32;
/// Panels that one task checks.
const PANELS_PER_TASK: usize = 4;

/// Working memory of a check, all of it overwritten.
pub(super) struct Work<'a> {
    /// Sums of C's columns within each row of tiles, `[row tiles, n]`.
    pub columns: &'a mut [f32],
    /// Sums of A's elements over rows within each row of tiles: `[row tiles, elements]`.
    pub left: &'a mut [f32],
    /// Sums of A's squares within each row of tiles.
    pub squares: &'a mut [f32],
    /// What each column's sum should be, and the squares of B's column: `[2, n]`.
    pub expected: &'a mut [f32],
    /// A's sums as rows of units.
    pub weights: &'a mut [u32],
    /// The sum of their squares.
    pub sum_squares: f64,
}

impl<'a> Work<'a> {
    /// From slices as long as [`work_words`] says.
    pub fn new([columns, left, squares, expected, weights]: [&'a mut [u32]; 5]) -> Work<'a> {
        Work {
            columns: bytemuck::cast_slice_mut(columns),
            left: bytemuck::cast_slice_mut(left),
            squares: bytemuck::cast_slice_mut(squares),
            expected: bytemuck::cast_slice_mut(expected),
            weights,
            sum_squares: 0.0,
        }
    }
}

/// Words of working memory, in the order of [`Work`].
pub(super) fn work_words<T>(product: &Product<'_, T>) -> [usize; 5] {
    let tiles = product.m.div_ceil(TILE_ROWS);
    // The transposed operand is summed as a whole.
    let parts = if product.layout == Layout::Tn { 1 } else { tiles };
    let elements = elements(product);
    [tiles * product.n, parts * elements, parts, 2 * product.n, SPLITS * product.units]
}

/// Elements of the chain, a missing half of a last pair included.
pub(super) fn elements<T>(product: &Product<'_, T>) -> usize {
    if product.dot { 2 * product.units } else { product.units }
}

/// Sums rows of units down the rows: one sum for each element of the chain. Pairs give the sums of
/// even elements in the first half of `to`, those of odd ones in the second. Returns the sum of
/// squares and that of raw words.
pub(super) struct SumDown<'a, 'b> {
    pub left: LeftUnits<'a>,
    pub rows: usize,
    /// Units are bf16 pairs.
    pub dot: bool,
    pub to: &'b mut [f32],
}

impl Kernel for SumDown<'_, '_> {
    type Output = (f32, u32);
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, u32) {
        let SumDown { left, rows, dot, to } = self;
        if S::BF16_DOT && dot {
            sum_down::<S, true>(simd, left, rows, to)
        } else {
            sum_down::<S, false>(simd, left, rows, to)
        }
    }
}

#[inline(always)]
fn sum_down<S: Simd, const DOT: bool>(
    simd: S,
    left: LeftUnits<'_>,
    rows: usize,
    to: &mut [f32],
) -> (f32, u32) {
    let units = if DOT { to.len() / 2 } else { to.len() };
    let (even, odd) = to.split_at_mut(units);
    // Squares and words go on from strip to strip, sums begin anew.
    let mut columns = [Column::new(simd.zero()); STRIP];
    let mut unit = 0;
    while unit + STRIP * S::LANES <= units {
        sum_strip::<S, DOT, STRIP>(simd, (left, rows), unit, &mut columns);
        for column in &mut columns {
            let sums = std::mem::replace(&mut column.sums, [simd.zero(); 2]);
            simd.store(sums[0], &mut even[unit..]);
            if DOT {
                simd.store(sums[1], &mut odd[unit..]);
            }
            unit += S::LANES;
        }
    }
    let first = simd.splat(f32::from_bits(PAIRED_ONES[0]));
    let second = simd.splat(f32::from_bits(PAIRED_ONES[1]));
    while unit < units {
        let column = &mut columns[0];
        for row in 0..rows {
            let start = left.start + row * left.row_bytes + 4 * unit;
            let bytes = &left.bytes[start..][..4 * (units - unit).min(S::LANES)];
            column.add::<S, DOT>(simd, load_units(simd, bytes, 0), [first, second]);
        }
        let end = units.min(unit + S::LANES);
        let sums = std::mem::replace(&mut column.sums, [simd.zero(); 2]);
        simd.store(sums[0], &mut even[unit..end]);
        if DOT {
            simd.store(sums[1], &mut odd[unit..end]);
        }
        unit += S::LANES;
    }
    let [a, b, c, d] = columns;
    let squares = all::<S>(simd, [a.squares, b.squares, c.squares, d.squares]);
    let words = simd.add_words(simd.add_words(a.words, b.words), simd.add_words(c.words, d.words));
    (simd.reduce_sum(squares), simd.reduce_words(words))
}

/// The sum of each row of a left operand whose rows are the chain's elements (the transposed one),
/// and all squares.
struct SumRows<'a, T> {
    from: Source<'a, T>,
    sums: &'a mut [f32],
}

impl<T: Unit> Kernel for SumRows<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        if S::BF16_DOT && self.from.dot {
            self.sum::<S, true>(simd)
        } else {
            self.sum::<S, false>(simd)
        }
    }
}

impl<T: Unit> SumRows<'_, T> {
    #[inline(always)]
    fn sum<S: Simd, const DOT: bool>(self, simd: S) -> f32 {
        let ones = simd.splat(f32::from_bits(0x3f80_3f80));
        let per_vector = if DOT { 2 * S::LANES } else { S::LANES };
        let mut squares = [simd.zero(); STRIP];
        for (index, to) in self.sums.iter_mut().enumerate() {
            let row = &self.from.data[(self.from.first + index) * self.from.stride..];
            let row = &row[..self.from.k];
            let mut sums = [simd.zero(); STRIP];
            let strips = row.chunks_exact(STRIP * per_vector);
            let rest = strips.remainder();
            for strip in strips.map(|strip| strip.chunks_exact(per_vector)) {
                for ((values, sum), square) in strip.zip(&mut sums).zip(&mut squares) {
                    let value = row_units::<S, T, DOT>(simd, values, 0);
                    (*sum, *square) = add_units::<S, DOT>(simd, value, ones, (*sum, *square));
                }
            }
            for values in rest.chunks(per_vector) {
                let value = row_units::<S, T, DOT>(simd, values, 0);
                (sums[0], squares[0]) =
                    add_units::<S, DOT>(simd, value, ones, (sums[0], squares[0]));
            }
            *to = simd.reduce_sum(all::<S>(simd, sums));
        }
        simd.reduce_sum(all::<S>(simd, squares))
    }
}

/// Adds a vector of units to a sum and its squares to theirs.
#[inline(always)]
fn add_units<S: Simd, const DOT: bool>(
    simd: S,
    value: S::F32,
    ones: S::F32,
    (sum, square): (S::F32, S::F32),
) -> (S::F32, S::F32) {
    if DOT {
        (simd.dot_pairs(sum, value, ones), simd.dot_pairs(square, value, value))
    } else {
        (simd.add(sum, value), simd.fma(value, value, square))
    }
}

/// The sum of some vectors.
#[inline(always)]
fn all<S: Simd>(simd: S, parts: [S::F32; STRIP]) -> S::F32 {
    let [first, second, third, fourth] = parts;
    simd.add(simd.add(first, second), simd.add(third, fourth))
}

/// Sums the rows of a transposed left operand into the first row of tiles of `work`.
pub(super) fn sum_left_rows<T: Unit>(
    (pool, isa): (&Pool, Isa),
    product: &Product<'_, T>,
    work: &mut Work<'_>,
    watch: &Watch,
) {
    let (k, m) = (product.k, product.m);
    work.left.fill(0.0);
    work.squares.fill(0.0);
    let mut sums = vec![0.0_f32; k];
    let per_task = ROWS_PER_TASK.max(k.div_ceil(PARTS_MAX));
    let mut squares = vec![0.0_f32; k.div_ceil(per_task)];
    if k == 0 {
        return;
    }
    let (parts, of_parts) = (Parts::new(&mut sums, per_task), Parts::new(&mut squares, 1));
    pool.run(parts.count(), |task| {
        let sums = parts.take(task);
        let from = Source {
            data: product.a,
            stride: product.a_stride,
            first: task * per_task,
            count: sums.len(),
            k: m,
            units: m,
            dot: product.dot,
        };
        of_parts.take(task)[0] = dispatch(isa, SumRows { from, sums });
        watch.operand(isa, 0, from.words_along(m));
    });
    work.squares[0] = squares.iter().sum();
    let units = product.units;
    for (element, sum) in sums.iter().enumerate() {
        let place = if product.dot { element % 2 * units + element / 2 } else { element };
        work.left[place] = *sum;
    }
}

/// Adds up A's sums over all rows of tiles and writes them as rows of units.
fn weigh<T>(product: &Product<'_, T>, work: &mut Work<'_>) {
    let (elements, units) = (elements(product), product.units);
    if units == 0 {
        return;
    }
    let (sums, rest) = work.left.split_at_mut(elements);
    for part in rest.chunks_exact(elements) {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    work.sum_squares = sums.iter().map(|sum| f64::from(*sum).powi(2)).sum();
    if !product.dot {
        work.weights[..units].copy_from_slice(bytemuck::cast_slice(&sums[..units]));
        return;
    }
    let (even, odd) = sums.split_at(units);
    // The upper halves of what is left are exact to subtract.
    let cut = |rest: &mut f32| {
        let high = rest.to_bits() & 0xffff_0000;
        *rest -= f32::from_bits(high);
        high
    };
    for (unit, (even, odd)) in even.iter().zip(odd).enumerate() {
        let (mut even, mut odd) = (*even, *odd);
        for split in 0..SPLITS {
            work.weights[split * units + unit] = cut(&mut odd) | cut(&mut even) >> 16;
        }
    }
}

/// Panels of the packed right operand, times A's sums.
struct Weighted<'a> {
    right: &'a [u32],
    weights: &'a [u32],
    units: usize,
    dot: bool,
    sums: &'a mut [f32],
    squares: &'a mut [f32],
}

impl Kernel for Weighted<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.dot { self.sum::<S, true>(simd) } else { self.sum::<S, false>(simd) }
    }
}

impl Weighted<'_> {
    #[inline(always)]
    fn sum<S: Simd, const DOT: bool>(self, simd: S) {
        let width = 2 * S::LANES;
        let weights: &[f32] = bytemuck::cast_slice(self.weights);
        let right: &[f32] = bytemuck::cast_slice(self.right);
        let panels = right.chunks_exact((self.units * width).max(1));
        let results = self.sums.chunks_mut(width).zip(self.squares.chunks_mut(width));
        for (panel, (to_sums, to_squares)) in panels.zip(results) {
            let mut sums = [[simd.zero(); 2]; SPLITS];
            let mut squares = [simd.zero(); 2];
            for (unit, values) in panel.chunks_exact(width).enumerate() {
                let values = [simd.load(&values[..S::LANES]), simd.load(&values[S::LANES..])];
                for (half, value) in values.into_iter().enumerate() {
                    if !DOT {
                        let weight = simd.splat(weights[unit]);
                        sums[0][half] = simd.fma(weight, value, sums[0][half]);
                        squares[half] = simd.fma(value, value, squares[half]);
                        continue;
                    }
                    for (split, sums) in sums.iter_mut().enumerate() {
                        let weight = simd.splat(weights[split * self.units + unit]);
                        sums[half] = simd.dot_pairs(sums[half], weight, value);
                    }
                    squares[half] = simd.dot_pairs(squares[half], value, value);
                }
            }
            for half in 0..2 {
                let at = (half * S::LANES).min(to_sums.len());
                let end = (at + S::LANES).min(to_sums.len());
                // The smallest part first.
                let low = simd.add(sums[2][half], sums[1][half]);
                simd.store(simd.add(low, sums[0][half]), &mut to_sums[at..end]);
                simd.store(squares[half], &mut to_squares[at..end]);
            }
        }
    }
}

/// Computes what the sums of columns `first..first + count` should be from their packed panels; the
/// first ones come first.
pub(super) fn expect<T>(
    (pool, isa): (&Pool, Isa),
    product: &Product<'_, T>,
    right: &[u32],
    (first, count): (usize, usize),
    work: &mut Work<'_>,
) {
    if first == 0 {
        weigh(product, work);
    }
    let width = isa.geometry().micro_columns;
    let (sums, squares) = work.expected.split_at_mut(product.n);
    let (sums, squares) = (&mut sums[first..][..count], &mut squares[first..][..count]);
    if product.units == 0 {
        sums.fill(0.0);
        squares.fill(0.0);
        return;
    }
    let per_task = PANELS_PER_TASK.max(count.div_ceil(width * PARTS_MAX));
    let (sums, squares) =
        (Parts::new(sums, per_task * width), Parts::new(squares, per_task * width));
    let panel_words = product.units * width;
    let (weights, units, dot) = (&*work.weights, product.units, product.dot);
    pool.run(sums.count(), |task| {
        let (sums, squares) = (sums.take(task), squares.take(task));
        let words = sums.len().div_ceil(width) * panel_words;
        let right = &right[task * per_task * panel_words..][..words];
        dispatch(isa, Weighted { right, weights, units, dot, sums, squares });
    });
}

/// How far a column's two sums may be apart before it is computed again, by the norm of the column
/// of B: the spread of rounding errors of chains of k, none larger than half a unit of
/// |row of A| |column of B|, over m rows. Rows that are alike, as those of like tokens, have like
/// errors that do not cancel; how much they are alike shows in the norm of A's sums.
fn limit((m, k): (usize, usize), left_squares: f64, sum_squares: f64) -> impl Fn(f32) -> f64 {
    const UNIT: f64 = 0.29 * f32::EPSILON as f64;
    let chain = (k as f64).sqrt();
    let spread = (chain + (m as f64).sqrt()) * left_squares.sqrt() + chain * sum_squares.sqrt();
    // Products below the smallest normal number may be taken as zero.
    let floor = f64::from(f32::MIN_POSITIVE) * (k * m).max(1) as f64;
    move |column_squares| UNIT * spread * f64::from(column_squares).sqrt() + floor
}

/// Compares the sums of all columns with what they should be.
pub(super) fn compare<T>(product: &Product<'_, T>, work: &mut Work<'_>, watch: &mut Watch) {
    let (n, m, k) = (product.n, product.m, product.k);
    let left_squares: f64 = work.squares.iter().map(|square| f64::from(*square)).sum();
    // Operands that are not finite are someone else's finding: nothing can be said of them.
    if !left_squares.is_finite() {
        return;
    }
    let mut sums = work.columns[..n].to_vec();
    for part in work.columns[n..].chunks_exact(n) {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    let (expected, squares) = work.expected.split_at(n);
    let limit = limit((m, k), left_squares, work.sum_squares);
    let mut suspects: Vec<(usize, f64)> = Vec::new();
    for (column, ((sum, expected), squares)) in sums.iter().zip(expected).zip(squares).enumerate() {
        let knows = squares.is_finite() && expected.is_finite();
        let apart = (f64::from(*sum) - f64::from(*expected)).abs();
        let excess = apart / limit(*squares);
        let fits = excess <= 1.0;
        if knows && !fits {
            suspects.push((column, excess));
        }
    }
    suspects.sort_by(|a, b| b.1.total_cmp(&a.1));
    suspects.truncate(SUSPECTS_MAX);
    let parts = |column: usize| {
        work.columns[column..].iter().step_by(n).map(|part| part.to_bits()).collect()
    };
    watch.suspects = suspects.into_iter().map(|(column, _)| (column, parts(column))).collect();
}

/// The operands of a product.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub layout: Layout,
    pub m: usize,
    pub k: usize,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
}

/// Adds up a register tile's rows as the tile loop does: even and odd ones in a chain each.
fn chains(rows: impl Iterator<Item = f32>) -> f32 {
    let mut chains = [0.0_f32; 2];
    rows.enumerate().for_each(|(row, value)| chains[row % 2] += value);
    chains[0] + chains[1]
}

/// Computes the suspected columns once more; gives the first that has other sums than before.
pub(super) fn confirm(
    (pool, isa): (&Pool, Isa),
    scratch: &mut Scratch,
    product: &Operands<'_>,
    watch: &Watch,
) -> Result<ProductSums, WrongColumn> {
    let Operands { layout, m, k, a, b } = *product;
    let mut result = vec![0.0_f32; if watch.suspects.is_empty() { 0 } else { m }];
    for (column, parts) in &watch.suspects {
        let start = if layout == Layout::Nt { column * b.row_stride } else { *column };
        let args = GemmArgs {
            layout,
            m,
            n: 1,
            k,
            a,
            b: Matrix { data: b.data.from(start), row_stride: b.row_stride },
            bias: None,
            c: MatrixMut { data: DataMut::F32(&mut result), row_stride: 1 },
            store: Store::Overwrite,
        };
        // The result is the f32 sums themselves; a column's tiles add them in this order.
        super::gemm(pool, isa, scratch, args);
        let micro_rows = isa.geometry().micro_rows;
        let again = result.chunks(TILE_ROWS).map(|rows| {
            let of_tile = |rows: &[f32]| chains(rows.iter().copied());
            rows.chunks(micro_rows).map(of_tile).fold(0.0, |sum, part| sum + part).to_bits()
        });
        if !again.eq(parts.iter().copied()) {
            return Err(WrongColumn(*column));
        }
    }
    let load = |of: &AtomicU32| of.load(Ordering::Relaxed);
    let [a, b] = [0, 1].map(|place| load(&watch.operands[place]));
    Ok(ProductSums { a, b, before: load(&watch.before), stored: load(&watch.stored) })
}
