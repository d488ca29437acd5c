//! One query row against keys and values where they lie in a cache, as in decoding: a tile that
//! only one row needs is not worth copying and packing.
//!
//! Scores and sums are the chains of the packed tile in `attention.rs`, element for element, so
//! both ways give the same bits.

use super::attention::Rows;
use crate::gemm::{Unit, is_dot, units};
use crate::simd::micro::{Stream, fetch, stream_squares};
use crate::simd::{Isa, Simd};
use pontoon_ops::KEY_TILE;

/// Most query rows of a sequence that are taken one by one.
pub(super) const ROWS_APART: usize = 4;

/// One head of one sequence in a cache, by position.
#[derive(Clone, Copy)]
pub(super) struct Cached<'a, T> {
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    /// The blocks of the cache that hold the sequence, in order.
    pub blocks: &'a [i32],
    /// Positions in a block.
    pub block: usize,
    /// Values of a head.
    pub v_width: usize,
}

impl<'a, T: Unit> Cached<'a, T> {
    /// Where in the cache a position lies, in rows.
    pub fn slot(&self, position: usize) -> usize {
        self.blocks[position / self.block] as usize * self.block + position % self.block
    }

    /// Where the positions of a tile lie, `count` of them.
    #[inline(always)]
    fn slots(&self, position: usize, count: usize) -> [u32; KEY_TILE] {
        let mut slots = [0; KEY_TILE];
        let (mut block, mut within) = (position / self.block, position % self.block);
        for slot in &mut slots[..count] {
            *slot = self.blocks[block] as u32 * self.block as u32 + within as u32;
            within += 1;
            if within == self.block {
                (block, within) = (block + 1, 0);
            }
        }
        slots
    }

    /// Asks for the rows of `count` positions: those of a head lie far apart, which the hardware
    /// does not foresee.
    #[inline(always)]
    fn fetch<S: Simd>(
        &self,
        simd: S,
        rows: Rows<'a, T>,
        (position, count): (usize, usize),
        width: usize,
    ) {
        for slot in &self.slots(position, count)[..count] {
            let row = &rows.data[*slot as usize * rows.stride..][..width];
            fetch(simd, bytemuck::cast_slice(row));
        }
    }

    /// Whether rows of these widths are whole vectors of units that need no conversion, and no
    /// vector of keys is cut by a block's end.
    pub fn streams(&self, isa: Isa, qk_width: usize) -> bool {
        let (lanes, dot) = (isa.geometry().lanes, is_dot(T::KIND, isa));
        let whole = if dot { 2 * lanes } else { lanes };
        (dot || size_of::<T>() == 4)
            && self.block.is_multiple_of(lanes)
            && qk_width.is_multiple_of(whole)
            && self.v_width.is_multiple_of(2 * lanes)
            && units(T::KIND, isa, qk_width) > 0
    }

    /// The scores of `LANES` keys from a position on; those past the sequence's end are arbitrary.
    /// Meanwhile the keys a tile later are asked for, and the first tile's values.
    #[inline(always)]
    pub fn scores<S: Simd, const DOT: bool>(
        &self,
        simd: S,
        q: &[u32],
        (position, end): (usize, usize),
    ) -> S::F32 {
        let later = position + KEY_TILE;
        if later < end {
            let width = q.len() * 4 / size_of::<T>();
            self.fetch(simd, self.k, (later, S::LANES.min(end - later)), width);
        }
        if position < KEY_TILE {
            self.fetch(simd, self.v, (position, S::LANES.min(end - position)), self.v_width);
        }
        let row_bytes = self.k.stride * size_of::<T>();
        let stream = Stream {
            left: bytemuck::cast_slice(q),
            left_stride: q.len(),
            right: bytemuck::cast_slice(self.k.data),
            right_start: self.slot(position) * row_bytes,
            right_row_bytes: row_bytes,
            squares: q.len() / S::LANES,
            next: None,
        };
        let mut sums = [[simd.zero(); 1]; 1];
        stream_squares::<S, DOT, 1, 1>(simd, &stream, &mut sums);
        sums[0][0]
    }

    /// Some values of a row of the cache.
    #[inline(always)]
    fn values<S: Simd>(&self, simd: S, slot: u32, column: usize) -> S::F32 {
        let start = slot as usize * self.v.stride + column;
        T::load(simd, &self.v.data[start..][..S::LANES])
    }

    /// Adds `count` values from a position on, times their probabilities `p` in units, to a row of
    /// sums that lie panel after panel. Meanwhile the values a tile later are asked for.
    #[inline(always)]
    pub fn mix<S: Simd, const DOT: bool>(
        &self,
        simd: S,
        p: &[u32],
        (position, end): (usize, usize),
        sums: &mut [f32],
    ) {
        let per_unit = if DOT { 2 } else { 1 };
        let (count, later) = (KEY_TILE.min(end - position), position + KEY_TILE);
        let slots = self.slots(position, count);
        let next_count = KEY_TILE.min(end.saturating_sub(later));
        let next = if next_count > 0 { self.slots(later, next_count) } else { slots };
        for (panel, sums) in sums.chunks_exact_mut(2 * S::LANES).enumerate() {
            let column = panel * 2 * S::LANES;
            let mut totals = [simd.load(sums), simd.load(&sums[S::LANES..])];
            for (unit, &p) in p.iter().enumerate().take(count.div_ceil(per_unit)) {
                let p = simd.splat(f32::from_bits(p));
                // A panel of halves is a cache line.
                for slot in &next[per_unit * unit..per_unit * (unit + 1)] {
                    let row = &self.v.data[*slot as usize * self.v.stride + column..];
                    simd.prefetch(row.as_ptr().cast());
                }
                for (half, total) in totals.iter_mut().enumerate() {
                    let column = column + half * S::LANES;
                    *total = if DOT {
                        let even = self.values(simd, slots[2 * unit], column);
                        let odd = if 2 * unit + 1 < count {
                            self.values(simd, slots[2 * unit + 1], column)
                        } else {
                            simd.zero()
                        };
                        simd.dot_pairs(*total, p, simd.merge_pairs(even, odd))
                    } else {
                        simd.fma(p, self.values(simd, slots[unit], column), *total)
                    };
                }
            }
            simd.store(totals[0], sums);
            simd.store(totals[1], &mut sums[S::LANES..]);
        }
    }
}
