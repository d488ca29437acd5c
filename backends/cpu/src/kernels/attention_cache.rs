//! One query row against keys and values where they lie in a cache, as in decoding: a tile that
//! only one row needs is not worth copying and packing.
//!
//! Scores and sums are the chains of the packed tile in `attention.rs`, element for element, so
//! both ways give the same bits.

use pontoon_ops::KEY_TILE;

use super::attention::Rows;
use crate::gemm::{Unit, is_dot, units};
use crate::simd::micro::{Ahead, Stream, fetch, stream_squares};
use crate::simd::{Isa, Simd};

/// Most query rows of a sequence that are taken one by one.
pub(super) const ROWS_APART: usize = 4;

/// One head of one sequence in a cache, by position.
#[derive(Clone, Copy)]
pub(super) struct Cached<'a, T> {
    pub head: CachedHead<'a, T>,
    /// What this thread will read next, and how many positions it has.
    pub after: Option<(CachedHead<'a, T>, usize)>,
    /// Nobody has asked for its first rows.
    pub cold: bool,
    /// Values of a head.
    pub v_width: usize,
}

/// Where a head's keys and values lie.
#[derive(Clone, Copy)]
pub(super) struct CachedHead<'a, T> {
    pub k: Rows<'a, T>,
    pub v: Rows<'a, T>,
    /// The blocks of the cache that hold the sequence, in order.
    pub blocks: &'a [i32],
    /// Positions in a block.
    pub block: usize,
}

impl<T> CachedHead<'_, T> {
    /// Where in the cache a position lies, in rows.
    pub fn slot(&self, position: usize) -> usize {
        self.blocks[position / self.block] as usize * self.block + position % self.block
    }

    /// Where the positions of the tile that starts at one lie, up to the sequence's end.
    #[inline(always)]
    fn slots(&self, position: usize, end: usize) -> Slots {
        let mut slots =
            Slots { rows: [0; KEY_TILE], count: KEY_TILE.min(end.max(position) - position) };
        let (mut block, mut within) = (position / self.block, position % self.block);
        for slot in &mut slots.rows[..slots.count] {
            *slot = self.blocks[block] as u32 * self.block as u32 + within as u32;
            within += 1;
            if within == self.block {
                (block, within) = (block + 1, 0);
            }
        }
        slots
    }
}

impl<T: Unit> Cached<'_, T> {
    /// The tile that starts at a position, of a sequence that ends at one, and what is read next.
    #[inline(always)]
    pub fn tile(&self, start: usize, end: usize) -> CachedTile<'_, T> {
        let (next_of, next) = match self.after {
            Some((after, positions)) if start + KEY_TILE >= end => {
                (after, after.slots(0, positions))
            }
            _ => (self.head, self.head.slots(start + KEY_TILE, end)),
        };
        let (here, cold) = (self.head.slots(start, end), self.cold && start == 0);
        CachedTile { of: self, here, next_of, next, cold }
    }

    /// Whether rows of these widths are whole vectors of units that need no conversion, and no
    /// vector of keys is cut by a block's end.
    pub fn streams(&self, isa: Isa, qk_width: usize) -> bool {
        let (lanes, dot) = (isa.geometry().lanes, is_dot(T::KIND, isa));
        let whole = if dot { 2 * lanes } else { lanes };
        (dot || size_of::<T>() == 4)
            && self.head.block.is_multiple_of(lanes)
            && qk_width.is_multiple_of(whole)
            && self.v_width.is_multiple_of(2 * lanes)
            && units(T::KIND, isa, qk_width) > 0
    }
}

/// Rows of a cache.
struct Slots {
    rows: [u32; KEY_TILE],
    count: usize,
}

impl Slots {
    /// `count` of them from `at` on, or fewer at the end.
    #[inline(always)]
    fn some(&self, at: usize, count: usize) -> &[u32] {
        let rows = &self.rows[..self.count];
        &rows[at.min(rows.len())..(at + count).min(rows.len())]
    }
}

/// One tile of a sequence in a cache.
pub(super) struct CachedTile<'a, T> {
    of: &'a Cached<'a, T>,
    here: Slots,
    /// The tile that is read next.
    next_of: CachedHead<'a, T>,
    next: Slots,
    /// Nobody has asked for its rows.
    cold: bool,
}

impl<T: Unit> CachedTile<'_, T> {
    /// Asks for some rows: those of a head lie far apart, which the hardware does not foresee.
    #[inline(always)]
    fn fetch(&self, rows: Rows<'_, T>, slots: &[u32], width: usize) {
        for slot in slots {
            let row = &rows.data[*slot as usize * rows.stride..][..width];
            fetch(bytemuck::cast_slice(row));
        }
    }

    /// The scores of `LANES` keys from place `at` on; those past the sequence's end are arbitrary.
    /// Meanwhile the keys of the next tile are asked for, and the first tile's values.
    #[inline(always)]
    pub fn scores<S: Simd, const DOT: bool>(&self, simd: S, q: &[u32], at: usize) -> S::F32 {
        let (CachedHead { k, v, .. }, v_width) = (self.of.head, self.of.v_width);
        let width = q.len() * 4 / size_of::<T>();
        self.fetch(self.next_of.k, self.next.some(at, S::LANES), width);
        if self.cold {
            self.fetch(v, self.here.some(at, S::LANES), v_width);
        }
        let row_bytes = k.stride * size_of::<T>();
        let stream = Stream {
            left: bytemuck::cast_slice(q),
            left_stride: q.len(),
            right: bytemuck::cast_slice(k.data),
            right_start: self.here.rows[at] as usize * row_bytes,
            right_row_bytes: row_bytes,
            squares: q.len() / S::LANES,
            next: Ahead::default(),
        };
        let mut sums = [[simd.zero(); 1]; 1];
        stream_squares::<S, DOT, 1, 1>(simd, &stream, &mut sums);
        sums[0][0]
    }

    /// Some values of a row of the cache.
    #[inline(always)]
    fn values<S: Simd>(&self, simd: S, slot: u32, column: usize) -> S::F32 {
        let Rows { data, stride } = self.of.head.v;
        T::load(simd, &data[slot as usize * stride + column..][..S::LANES])
    }

    /// Adds the tile's values, times their probabilities `p` in units, to a row of sums that lie
    /// panel after panel. Meanwhile the values of the next tile are asked for.
    #[inline(always)]
    pub fn mix<S: Simd, const DOT: bool>(&self, simd: S, p: &[u32], sums: &mut [f32]) {
        let per_unit = if DOT { 2 } else { 1 };
        let slots = self.here.some(0, KEY_TILE);
        for (panel, sums) in sums.chunks_exact_mut(2 * S::LANES).enumerate() {
            let column = panel * 2 * S::LANES;
            let mut totals = [simd.load(sums), simd.load(&sums[S::LANES..])];
            for (unit, (&p, slots)) in p.iter().zip(slots.chunks(per_unit)).enumerate() {
                let p = simd.splat(f32::from_bits(p));
                // A panel of halves is a cache line.
                for slot in self.next.some(per_unit * unit, per_unit) {
                    let Rows { data, stride } = self.next_of.v;
                    let row = &data[*slot as usize * stride + column..];
                    simd.prefetch(row.as_ptr().cast());
                }
                for (half, total) in totals.iter_mut().enumerate() {
                    let column = column + half * S::LANES;
                    let first = self.values(simd, slots[0], column);
                    *total = if DOT {
                        let odd = match slots.get(1) {
                            Some(slot) => self.values(simd, *slot, column),
                            None => simd.zero(),
                        };
                        simd.dot_pairs(*total, p, simd.merge_pairs(first, odd))
                    } else {
                        simd.fma(p, first, *total)
                    };
                }
            }
            simd.store(totals[0], sums);
            simd.store(totals[1], &mut sums[S::LANES..]);
        }
    }
}
