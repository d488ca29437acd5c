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
//! Read next: `expect.rs`, what the sums should be.

use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::Pod;

use super::expect::{SPLITS_MAX, Weights, elements};
use super::pack::{Source, row_units};
use super::tile::TILE_ROWS;
use super::{DataMut, GemmArgs, Layout, Matrix, MatrixMut, Product, Store, Unit};
use crate::ffi::{PARTS_MAX, Parts};
use crate::pool::{Pool, Tasks};
use crate::scratch::Scratch;
use crate::simd::micro::{Column, LeftUnits, PAIRED_ONES, load_units, sum_strip};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::words::{RowWords, of_chains};

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

/// A column whose two sums are too far apart, with its sums within each row of tiles.
pub(super) type Suspect = (usize, Vec<u32>);

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
    /// Columns whose two sums are too far apart.
    pub(super) suspects: Vec<Suspect>,
}

impl Watch {
    /// Adds up words of A (0) or B (1) on their way, if they are asked for.
    pub(super) fn operand<T: Pod>(&self, isa: Isa, place: usize, rows: RowWords<'_, T>) {
        self.add_operand(place, || dispatch(isa, rows));
    }

    /// The same for words that somebody summed.
    pub(super) fn add_operand(&self, place: usize, words: impl FnOnce() -> u32) {
        if [self.asked.a, self.asked.b][place] {
            self.operands[place].fetch_add(words(), Ordering::Relaxed);
        }
    }
}

/// Columns that are computed again at most, the worst ones first: where more are beyond the limit,
/// either the first of them is wrong or errors of rounding all go one way.
const SUSPECTS_MAX: usize = 32;
/// Vectors of units that are summed at a time, each in a chain of its own.
const STRIP: usize = 4;
/// Rows of the left operand that one task sums at least.
const ROWS_PER_TASK: usize = 32;

/// Words of working memory: for sums of C's columns within each row of tiles, `[row tiles, n]`; for
/// sums of A's elements over rows within each row of tiles, `[row tiles, elements]`; for what each
/// column's sum should be and the squares of B's column, `[2, n]`; and for A's sums as rows of
/// units.
pub(super) fn work_words<T>(product: &Product<'_, T>) -> [usize; 4] {
    let tiles = product.m.div_ceil(TILE_ROWS);
    // The transposed operand is summed as a whole.
    let parts = if product.layout == Layout::Tn { 0 } else { tiles };
    let left = parts * elements(product);
    [tiles * product.n, left, 2 * product.n, SPLITS_MAX * product.units]
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
    let squares = all::<S>(simd, columns.map(|column| column.squares));
    (simd.reduce_sum(squares), of_chains(simd, columns.map(|column| column.words)))
}

/// The sum of each row of a left operand whose rows are the chain's elements (the transposed one),
/// and all squares. Where units are the operand's own words, their sum as well.
struct SumRows<'a, T> {
    from: Source<'a, T>,
    sums: &'a mut [f32],
}

impl<T: Unit> Kernel for SumRows<'_, T> {
    type Output = (f32, Option<u32>);
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> (f32, Option<u32>) {
        if S::BF16_DOT && self.from.dot {
            self.sum::<S, true>(simd)
        } else {
            self.sum::<S, false>(simd)
        }
    }
}

impl<T: Unit> SumRows<'_, T> {
    #[inline(always)]
    fn sum<S: Simd, const DOT: bool>(self, simd: S) -> (f32, Option<u32>) {
        let ones = simd.splat(f32::from_bits(0x3f80_3f80));
        let per_vector = if DOT { 2 * S::LANES } else { S::LANES };
        let mut totals =
            [RowTotals { sums: simd.zero(), squares: simd.zero(), words: simd.zero() }; STRIP];
        for (index, to) in self.sums.iter_mut().enumerate() {
            let row = &self.from.data[(self.from.first + index) * self.from.stride..];
            let row = &row[..self.from.k];
            let strips = row.chunks_exact(STRIP * per_vector);
            let rest = strips.remainder();
            for strip in strips.map(|strip| strip.chunks_exact(per_vector)) {
                for (values, totals) in strip.zip(&mut totals) {
                    totals.add::<S, DOT>(simd, row_units::<S, T, DOT>(simd, values, 0), ones);
                }
            }
            for values in rest.chunks(per_vector) {
                totals[0].add::<S, DOT>(simd, row_units::<S, T, DOT>(simd, values, 0), ones);
            }
            // Squares and words go on from row to row.
            let sums = |totals: &mut RowTotals<_>| std::mem::replace(&mut totals.sums, simd.zero());
            *to = simd.reduce_sum(all::<S>(simd, totals.each_mut().map(sums)));
        }
        let squares = simd.reduce_sum(all::<S>(simd, totals.map(|totals| totals.squares)));
        let raw = DOT || size_of::<T>() == 4;
        (squares, raw.then(|| of_chains(simd, totals.map(|totals| totals.words))))
    }
}

/// What is added up of the vectors of a row.
#[derive(Clone, Copy)]
struct RowTotals<V> {
    sums: V,
    squares: V,
    words: V,
}

impl<V: Copy> RowTotals<V> {
    #[inline(always)]
    fn add<S: Simd<F32 = V>, const DOT: bool>(&mut self, simd: S, value: V, ones: V) {
        self.words = simd.add_words(self.words, value);
        if DOT {
            self.sums = simd.dot_pairs(self.sums, value, ones);
            self.squares = simd.dot_pairs(self.squares, value, value);
        } else {
            self.sums = simd.add(self.sums, value);
            self.squares = simd.fma(value, value, self.squares);
        }
    }
}

/// The sum of some vectors.
#[inline(always)]
fn all<S: Simd>(simd: S, parts: [S::F32; STRIP]) -> S::F32 {
    let [first, second, third, fourth] = parts;
    simd.add(simd.add(first, second), simd.add(third, fourth))
}

/// Sums of the rows of a transposed left operand, to be formed by tasks.
pub(super) struct LeftRows {
    sums: Vec<f32>,
    squares: Vec<f32>,
    per_task: usize,
}

impl LeftRows {
    pub fn new(k: usize) -> LeftRows {
        let per_task = ROWS_PER_TASK.max(k.div_ceil(PARTS_MAX));
        LeftRows { sums: vec![0.0; k], squares: vec![0.0; k.div_ceil(per_task)], per_task }
    }

    /// The tasks.
    pub fn tasks<'t, T: Unit>(
        &'t mut self,
        isa: Isa,
        product: &'t Product<'_, T>,
        watch: &'t Watch,
    ) -> Tasks<'t> {
        let per_task = self.per_task;
        let sums = Parts::new(&mut self.sums, per_task);
        let squares = Parts::new(&mut self.squares, 1);
        Tasks::new(sums.count(), move |task| {
            let sums = sums.take(task);
            let from = Source {
                data: product.a,
                stride: product.a_stride,
                first: task * per_task,
                count: sums.len(),
                k: product.m,
                units: product.m,
                dot: product.dot,
            };
            let (of_squares, words) = dispatch(isa, SumRows { from, sums });
            squares.take(task)[0] = of_squares;
            match words {
                Some(words) => watch.add_operand(0, || words),
                None => watch.operand(isa, 0, from.words_along(product.m)),
            }
        })
    }

    /// Makes weights of what the tasks formed.
    pub fn weigh<T>(self, product: &Product<'_, T>, weights: &Weights<'_>) {
        let squares: f32 = self.squares.iter().sum();
        if !product.dot {
            weights.set(self.sums, f64::from(squares));
            return;
        }
        let mut sums = vec![0.0; elements(product)];
        let (even, odd) = sums.split_at_mut(product.units);
        for ((pair, even), odd) in self.sums.chunks(2).zip(even).zip(odd) {
            *even = pair[0];
            *odd = pair.get(1).copied().unwrap_or(0.0);
        }
        weights.set(sums, f64::from(squares));
    }
}

/// How far a column's two sums may be apart before it is computed again, by the norm of the column
/// of B: the spread of rounding errors of chains of k, none larger than half a unit of
/// |row of A| |column of B|, over m rows. Rows that are alike, as those of like tokens, have like
/// errors that do not cancel: how much they are alike shows in the norm of A's sums, and both sums
/// have such errors, so there several standard deviations are allowed.
fn limit((m, k): (usize, usize), left_squares: f64, sum_squares: f64) -> impl Fn(f32) -> f32 {
    const UNIT: f64 = 0.29 * f32::EPSILON as f64;
    const ALIKE: f64 = 4.0;
    let chain = (k as f64).sqrt();
    let spread = (chain + (m as f64).sqrt()) * left_squares.sqrt();
    let spread = spread + ALIKE * chain * sum_squares.sqrt();
    // Products below the smallest normal number may be taken as zero.
    let floor = f32::MIN_POSITIVE * (k * m).max(1) as f32;
    let unit = (UNIT * spread) as f32;
    move |column_squares| unit * column_squares.sqrt() + floor
}

/// Compares the sums of all columns with what they should be; gives those that are too far apart,
/// the worst first.
pub(super) fn compare<T>(
    product: &Product<'_, T>,
    columns: &[f32],
    expected: &[f32],
    weights: &Weights<'_>,
) -> Vec<Suspect> {
    let (n, m, k) = (product.n, product.m, product.k);
    let norms = weights.ready().map(|ready| (ready.left_squares, ready.sum_squares));
    let (left_squares, sum_squares) = norms.unwrap_or_default();
    // Operands that are not finite are someone else's finding: nothing can be said of them.
    if !left_squares.is_finite() {
        return Vec::new();
    }
    let mut sums = columns[..n].to_vec();
    for part in columns[n..].chunks_exact(n) {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    let (expected, squares) = expected.split_at(n);
    let limit = limit((m, k), left_squares, sum_squares);
    let apart = |column: usize| (sums[column] - expected[column]).abs();
    // All of them in one simple loop; what is not a number does not fit.
    let fit = (0..n).fold(true, |fit, column| fit & (apart(column) <= limit(squares[column])));
    if fit {
        return Vec::new();
    }
    let mut suspects: Vec<(usize, f32)> = Vec::new();
    for column in 0..n {
        let knows = squares[column].is_finite() && expected[column].is_finite();
        let excess = apart(column) / limit(squares[column]);
        let fits = excess <= 1.0;
        if knows && !fits {
            suspects.push((column, excess));
        }
    }
    suspects.sort_by(|a, b| b.1.total_cmp(&a.1));
    suspects.truncate(SUSPECTS_MAX);
    let parts =
        |column: usize| columns[column..].iter().step_by(n).map(|part| part.to_bits()).collect();
    suspects.into_iter().map(|(column, _)| (column, parts(column))).collect()
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
