//! The inner loop of packing columns: neighbours in memory stay neighbours, rows become units.
//!
//! Only whole vectors that can be read in place are packed here, without a branch per vector; the
//! edges are left to `gemm/pack.rs`, which also says what panels are.

use super::{Element, Simd};

/// How many units ahead of its use a row is asked for: rows are a stride apart, often a page, and
/// the hardware does not foresee them.
const UNITS_AHEAD: usize = 12;
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Panels to be filled from columns.
pub(crate) struct Columns<'a, T> {
    /// Memory that begins with the first column's first element.
    pub(crate) from: &'a [T],
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// Units whose rows all exist.
    pub(crate) units: usize,
    /// Columns of a panel.
    pub(crate) width: usize,
    /// Words from one panel to the next, with room for one vector after the last unit.
    pub(crate) panel_words: usize,
    /// The panels: a whole number of them.
    pub(crate) to: &'a mut [f32],
}

/// Packs units from the first on and returns how many: all but those whose vectors would reach past
/// the memory. Vectors may reach past the last column; what they bring from there is no use and no
/// harm. `DOT` says that two rows make a unit.
#[inline(always)]
pub(crate) fn pack_columns<S: Simd, T: Element, const DOT: bool>(
    simd: S,
    columns: &mut Columns<'_, T>,
) -> usize {
    let Columns { from, stride, units, width, panel_words, .. } = *columns;
    let panels = columns.to.len() / panel_words.max(1);
    if panels == 0 || width == 0 {
        return 0;
    }
    let rows_per_unit = if DOT { 2 } else { 1 };
    // Elements of a row that the vectors of all panels touch.
    let reach = (panels - 1) * width + width.next_multiple_of(S::LANES);
    let rows = if reach > from.len() { 0 } else { (from.len() - reach) / stride.max(1) + 1 };
    let units = units.min(rows / rows_per_unit);
    if units == 0 {
        return 0;
    }
    let end = (panels - 1) * panel_words + (units - 1) * width + width.next_multiple_of(S::LANES);
    assert!(end <= columns.to.len(), "panels end at {end} of {}", columns.to.len());
    let lines = (reach * size_of::<T>()).div_ceil(LINE_BYTES);
    let ahead = UNITS_AHEAD * rows_per_unit * stride;
    // SAFETY: row < rows_per_unit * units <= rows, so every vector of a row ends within `from`;
    // `end` bounds the stores; prefetches may go anywhere.
    unsafe {
        let load = |from: *const T| T::load(simd, std::slice::from_raw_parts(from, S::LANES));
        for unit in 0..units {
            let row = from.as_ptr().add(unit * rows_per_unit * stride);
            for row_ahead in 0..rows_per_unit {
                let next = row.wrapping_add(ahead + row_ahead * stride).cast::<u8>();
                for line in 0..lines {
                    simd.prefetch(next.wrapping_add(line * LINE_BYTES));
                }
            }
            let to = columns.to.as_mut_ptr().add(unit * width);
            for panel in 0..panels {
                for column in (0..width).step_by(S::LANES) {
                    let row = row.add(panel * width + column);
                    let vector = if DOT {
                        simd.merge_pairs(load(row), load(row.add(stride)))
                    } else {
                        load(row)
                    };
                    simd.store_raw(vector, to.add(panel * panel_words + column).cast());
                }
            }
        }
    }
    units
}
