//! Bringing operands into the inner loop's format: 32-bit units, panels as wide as the register
//! tile.
//!
//! Right panels hold, per unit, `2 * LANES` columns; left panels hold, per unit, `MICRO_ROWS` rows.
//! Left operands whose memory already is rows of units are not packed at all. Columns and rows past
//! the matrix hold anything and only feed results that are thrown away; a missing last half of a
//! pair is zero, and does take part in the chain.

use half::bf16;

use super::Unit;
use crate::simd::columns::{Columns, pack_columns};
use crate::simd::micro::load_square;
use crate::simd::{Kernel, Simd};
use crate::words::RowWords;

/// Where a stretch of an operand comes from.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, T> {
    /// Elements of the operand.
    pub(crate) data: &'a [T],
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    /// First of the rows (k is along a row) or columns (k is across rows) to take.
    pub(crate) first: usize,
    /// How many of them.
    pub(crate) count: usize,
    /// Length of the chain in elements.
    pub(crate) k: usize,
    /// Length of the chain in units.
    pub(crate) units: usize,
    /// Units are bf16 pairs.
    pub(crate) dot: bool,
}

impl<'a, T> Source<'a, T> {
    /// Its words, where k is along a row of `width` elements.
    pub(super) fn words_along(&self, width: usize) -> RowWords<'a, T> {
        let data = &self.data[self.first * self.stride..];
        RowWords { data, stride: self.stride, rows: self.count, width }
    }

    /// Its words, where k is across rows.
    pub(super) fn words_across(&self) -> RowWords<'a, T> {
        let data = &self.data[self.first..];
        RowWords { data, stride: self.stride, rows: self.k, width: self.count }
    }
}

/// `LANES` units of one row from unit `unit` on; zero past the end.
#[inline(always)]
pub(super) fn row_units<S: Simd, T: Unit, const DOT: bool>(
    simd: S,
    row: &[T],
    unit: usize,
) -> S::F32 {
    if DOT {
        // Only bf16 operands are pairs, so this cast changes nothing.
        simd.load_pairs(bytemuck::cast_slice::<T, bf16>(&row[2 * unit..]))
    } else {
        T::load(simd, &row[unit..])
    }
}

/// A square of units: up to `LANES` rows, `LANES` units each; zero where the matrix ends.
#[inline(always)]
pub(crate) fn units_square<S: Simd, T: Unit, const DOT: bool>(
    simd: S,
    from: &Source<'_, T>,
    row: usize,
    unit: usize,
) -> S::Square {
    let rows = from.count - row;
    let raw = DOT || size_of::<T>() == 4;
    let whole_units = if DOT { from.k / 2 } else { from.k };
    if raw && rows >= S::LANES && unit + S::LANES <= whole_units {
        let start = (from.first + row) * from.stride * size_of::<T>() + unit * 4;
        let bytes = bytemuck::cast_slice(from.data);
        return load_square(simd, bytes, start, from.stride * size_of::<T>());
    }
    let mut square = simd.square();
    for (index, vector) in square.as_mut().iter_mut().enumerate() {
        if index < rows {
            let start = (from.first + row + index) * from.stride;
            *vector = row_units::<S, T, DOT>(simd, &from.data[start..][..from.k], unit);
        }
    }
    square
}

/// `LANES` neighbours across rows at one unit.
#[inline(always)]
fn column_units<S: Simd, T: Unit, const DOT: bool>(
    simd: S,
    from: &Source<'_, T>,
    unit: usize,
    offset: usize,
) -> S::F32 {
    if offset >= from.count {
        return simd.zero();
    }
    let row = |k: usize| {
        let start = k * from.stride + from.first;
        T::load(simd, &from.data[start + offset..start + from.count])
    };
    if DOT {
        let odd = if 2 * unit + 1 < from.k { row(2 * unit + 1) } else { simd.zero() };
        simd.merge_pairs(row(2 * unit), odd)
    } else {
        row(unit)
    }
}

/// Packs rows of an operand, k along the row, into right panels (the transposing case).
pub(crate) struct PackRowsAsColumns<'a, T> {
    pub(crate) from: Source<'a, T>,
    /// Panels of `units * 2 * LANES`.
    pub(crate) to: &'a mut [u32],
}

impl<T: Unit> Kernel for PackRowsAsColumns<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.from.dot {
            pack_rows_as_columns::<S, T, true>(simd, &self.from, self.to);
        } else {
            pack_rows_as_columns::<S, T, false>(simd, &self.from, self.to);
        }
    }
}

#[inline(always)]
fn pack_rows_as_columns<S: Simd, T: Unit, const DOT: bool>(
    simd: S,
    from: &Source<'_, T>,
    to: &mut [u32],
) {
    let width = 2 * S::LANES;
    let to: &mut [f32] = bytemuck::cast_slice_mut(to);
    for (panel, to) in to.chunks_exact_mut(from.units * width).enumerate() {
        for (group, to) in to.chunks_mut(S::LANES * width).enumerate() {
            for half in 0..2 {
                let row = panel * width + half * S::LANES;
                if row >= from.count {
                    to.chunks_exact_mut(width).for_each(|to| to[half * S::LANES..].fill(0.0));
                    break;
                }
                let square = units_square::<S, T, DOT>(simd, from, row, group * S::LANES);
                let square = simd.transpose(square);
                for (to, vector) in to.chunks_exact_mut(width).zip(square.as_ref()) {
                    simd.store(*vector, &mut to[half * S::LANES..][..S::LANES]);
                }
            }
        }
    }
}

/// Packs columns of an operand, k across rows, into panels of any width.
pub(crate) struct PackColumns<'a, T> {
    pub(crate) from: Source<'a, T>,
    /// Columns of a panel.
    pub(crate) width: usize,
    /// Words from one panel to the next: at least `units * width`, and room for one vector more
    /// where the width is no multiple of `LANES`.
    pub(crate) panel_words: usize,
    /// The panels.
    pub(crate) to: &'a mut [u32],
}

impl<T: Unit> Kernel for PackColumns<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.from.dot {
            self.pack::<S, true>(simd);
        } else {
            self.pack::<S, false>(simd);
        }
    }
}

impl<T: Unit> PackColumns<'_, T> {
    #[inline(always)]
    fn pack<S: Simd, const DOT: bool>(self, simd: S) {
        let to: &mut [f32] = bytemuck::cast_slice_mut(self.to);
        let from = &self.from;
        let mut columns = Columns {
            from: &from.data[from.first.min(from.data.len())..],
            stride: from.stride,
            units: if DOT { from.k / 2 } else { from.k },
            width: self.width,
            panel_words: self.panel_words,
            to: &mut *to,
        };
        let packed = pack_columns::<S, T, DOT>(simd, &mut columns);
        for unit in packed..self.from.units {
            for (panel, to) in to.chunks_exact_mut(self.panel_words).enumerate() {
                let mut column = 0;
                // A vector may reach past the width into the next unit, which is written later.
                while column < self.width {
                    let offset = panel * self.width + column;
                    let vector = column_units::<S, T, DOT>(simd, &self.from, unit, offset);
                    simd.store(vector, &mut to[unit * self.width + column..][..S::LANES]);
                    column += S::LANES;
                }
            }
        }
    }
}

/// Copies rows of an operand, k along the row, into rows of units.
pub(crate) struct PackRows<'a, T> {
    pub(crate) from: Source<'a, T>,
    /// Words from one row to the next, at least `units`.
    pub(crate) row_words: usize,
    /// The rows.
    pub(crate) to: &'a mut [u32],
}

impl<T: Unit> Kernel for PackRows<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.from.dot {
            self.pack::<S, true>(simd);
        } else {
            self.pack::<S, false>(simd);
        }
    }
}

impl<T: Unit> PackRows<'_, T> {
    #[inline(always)]
    fn pack<S: Simd, const DOT: bool>(self, simd: S) {
        let from = &self.from;
        let to: &mut [f32] = bytemuck::cast_slice_mut(self.to);
        for (row, to) in to.chunks_mut(self.row_words).take(from.count).enumerate() {
            let start = (from.first + row) * from.stride;
            let row = &from.data[start..][..from.k];
            for (group, to) in to[..from.units].chunks_mut(S::LANES).enumerate() {
                simd.store(row_units::<S, T, DOT>(simd, row, group * S::LANES), to);
            }
        }
    }
}
