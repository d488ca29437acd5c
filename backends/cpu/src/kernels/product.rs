//! The products inside attention: a tile of rows in units times panels that lie in cache, on the
//! inner loop of matrix products.
//!
//! Every element is one chain over ascending units, continued from what stands in the sums, so
//! results do not depend on how many rows are taken together. Units, panels and their packing are
//! described in `gemm/pack.rs`.

use std::ops::Range;

use crate::gemm::Unit;
use crate::simd::micro::{LeftUnits, MicroTile, Start, micro_tile};
use crate::simd::{Kernel, Simd};

/// Rows of units times panels, added to sums.
pub(super) struct Product<'a> {
    /// The rows; in units that follow each other, or in panels of `MICRO_ROWS`.
    pub left: LeftUnits<'a>,
    /// Rows to take, at most `MICRO_ROWS`.
    pub rows: usize,
    /// Packed panels; their units are counted like those of `left`.
    pub right: &'a [u32],
    /// Words from one panel to the next.
    pub panel_words: usize,
    /// The panels to take.
    pub panels: Range<usize>,
    /// Rows of two vectors, panel after panel.
    pub sums: &'a mut [f32],
    /// Floats from one panel's sums to the next.
    pub sums_step: usize,
    /// What the sums start from.
    pub start: Start,
}

impl Product<'_> {
    /// Runs the chains of all rows over the same units.
    #[inline(always)]
    pub(super) fn run<S: Simd, const DOT: bool>(&mut self, simd: S, units: Range<usize>) {
        let width = 2 * S::LANES;
        for panel in self.panels.clone() {
            let mut left = self.left;
            left.start += units.start * left.unit_bytes;
            let from = panel * self.panel_words + units.start * width;
            let tile = MicroTile {
                left,
                right: &self.right[from..][..units.len() * width],
                units: units.len(),
                sums: &mut self.sums[panel * self.sums_step..],
                start: self.start,
            };
            micro_tile::<S, DOT>(simd, self.rows, tile);
        }
    }

    /// Runs each row's chain over its own elements of k and over nothing else: for operands in
    /// which a product with zero is not zero.
    #[inline(always)]
    pub(super) fn run_apart<S: Simd, const DOT: bool>(
        &mut self,
        simd: S,
        elements: impl Fn(usize) -> Range<usize>,
    ) {
        let per_unit = if DOT { 2 } else { 1 };
        for row in 0..self.rows {
            let Range { start, end } = elements(row);
            for unit in start / per_unit..end.div_ceil(per_unit) {
                let lanes = start.max(unit * per_unit)..end.min((unit + 1) * per_unit);
                let kept = match (lanes.len() == per_unit, lanes.start % per_unit) {
                    (true, _) => u32::MAX,
                    (false, 0) => LOW_HALF,
                    (false, _) => !LOW_HALF,
                };
                self.run_unit::<S, DOT>(simd, row, unit, kept);
            }
        }
    }

    /// Continues one row's chains by one unit, of whose words only the bits `kept` count.
    #[inline(always)]
    fn run_unit<S: Simd, const DOT: bool>(&mut self, simd: S, row: usize, unit: usize, kept: u32) {
        let width = 2 * S::LANES;
        for panel in self.panels.clone() {
            let mut right = [0; WIDTH_MAX];
            let words = &self.right[panel * self.panel_words + unit * width..][..width];
            for (to, word) in right.iter_mut().zip(words) {
                *to = word & kept;
            }
            let mut left = self.left;
            left.start += row * left.row_bytes + unit * left.unit_bytes;
            let sums = &mut self.sums[panel * self.sums_step + row * width..];
            let tile =
                MicroTile { left, right: &right[..width], units: 1, sums, start: Start::Resume };
            micro_tile::<S, DOT>(simd, 1, tile);
        }
    }
}

/// The first element of a pair.
const LOW_HALF: u32 = 0xffff;
/// Most columns of a panel of any set.
const WIDTH_MAX: usize = 32;

/// Whether no unit holds an infinity or NaN, so that a product with zero is zero.
#[inline(always)]
pub(super) fn all_finite<const DOT: bool>(words: &[u32]) -> bool {
    let (mut high, mut low) = (0, 0);
    for &word in words {
        high = high.max(word & 0x7fff_ffff);
        low = low.max(word & 0x7fff);
    }
    high < 0x7f80_0000 && (!DOT || low < 0x7f80)
}

/// Positions 0 to 63 in a tile, to compare lanes with bounds.
static POSITIONS: [f32; 64] = {
    let mut positions = [0.0; 64];
    let mut index = 0;
    while index < 64 {
        positions[index] = index as f32;
        index += 1;
    }
    positions
};

/// `value` in the lanes from `at` on whose positions lie in `range`, `other` in the rest.
#[inline(always)]
pub(super) fn within<S: Simd>(
    simd: S,
    at: usize,
    range: &Range<usize>,
    value: S::F32,
    other: S::F32,
) -> S::F32 {
    if range.start <= at && at + S::LANES <= range.end {
        return value;
    }
    let position = simd.load(&POSITIONS[at..]);
    let value = simd.select_gt(simd.splat(range.end as f32), position, value, other);
    simd.select_gt(position, simd.splat(range.start as f32 - 0.5), value, other)
}

/// One row of sums that lie panel after panel.
#[derive(Clone, Copy)]
pub(super) struct SumsRow<'a> {
    pub sums: &'a [f32],
    /// Floats from one panel to the next.
    pub step: usize,
    pub row: usize,
}

/// Rounds a row of sums over a divisor to the storage type.
pub(super) struct Divide<'a, T> {
    pub sums: SumsRow<'a>,
    pub divisor: f32,
    pub to: &'a mut [T],
}

impl<T: Unit> Kernel for Divide<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = 2 * S::LANES;
        let divisor = simd.splat(self.divisor);
        for (index, to) in self.to.chunks_mut(S::LANES).enumerate() {
            let at = index * S::LANES;
            let from = at / width * self.sums.step + self.sums.row * width + at % width;
            let sum = simd.load(&self.sums.sums[from..][..S::LANES]);
            // Adding zero makes a negative zero positive: whether a sum of zeros has a sign may
            // depend on keys that the row does not see.
            T::store(simd, simd.add(simd.div(sum, divisor), simd.zero()), to);
        }
    }
}
