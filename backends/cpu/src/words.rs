//! Word sums and digests while data passes: what they are stands in `pontoon_ops::{sums, digest}`.
//!
//! Whoever has a tensor in hand adds it up here: kernels their rows, products their operands, and
//! `kernels/sums.rs` what nobody else summed.

use bytemuck::Pod;
use pontoon_ops::digest::Digest;
use pontoon_ops::sums::of_row;

use crate::simd::micro::{LANES_MAX, load_units};
use crate::simd::{Kernel, Simd};

/// Chains in which words are summed side by side.
const CHAINS: usize = 4;

/// A word sum that stays in registers from row to row.
#[derive(Clone, Copy)]
pub(crate) struct WordSum<V> {
    chains: [V; CHAINS],
    /// Of words that fill no vector.
    rest: u32,
}

impl<V: Copy> WordSum<V> {
    /// Of nothing.
    #[inline(always)]
    pub(crate) fn new<S: Simd<F32 = V>>(simd: S) -> Self {
        WordSum { chains: [simd.zero(); CHAINS], rest: 0 }
    }

    /// Adds a row.
    #[inline(always)]
    pub(crate) fn add<S: Simd<F32 = V>>(&mut self, simd: S, row: &[u8]) {
        let strips = row.chunks_exact(4 * S::LANES * CHAINS);
        let rest = strips.remainder();
        for strip in strips {
            for (index, chain) in self.chains.iter_mut().enumerate() {
                *chain = simd.add_words(*chain, load_units(simd, strip, index * S::LANES));
            }
        }
        if rest.is_empty() {
            return;
        }
        let vectors = rest.chunks_exact(4 * S::LANES);
        self.rest = self.rest.wrapping_add(of_row(vectors.remainder()));
        for (vector, chain) in vectors.zip(&mut self.chains) {
            *chain = simd.add_words(*chain, load_units(simd, vector, 0));
        }
    }

    /// The sum.
    #[inline(always)]
    pub(crate) fn finish<S: Simd<F32 = V>>(self, simd: S) -> u32 {
        of_chains(simd, self.chains).wrapping_add(self.rest)
    }
}

/// A word sum that is kept lane by lane between short rows or the parts of a tile: to add up its
/// lanes would take as long as to sum a row.
#[derive(Clone, Copy)]
pub(crate) struct LaneSums {
    lanes: [f32; LANES_MAX],
    /// Of words that fill no vector.
    rest: u32,
}

impl LaneSums {
    /// Of nothing.
    pub(crate) const NONE: LaneSums = LaneSums { lanes: [0.0; LANES_MAX], rest: 0 };

    /// Adds what was summed elsewhere.
    #[inline(always)]
    pub(crate) fn add(&mut self, sum: u32) {
        self.rest = self.rest.wrapping_add(sum);
    }

    /// Adds a row.
    #[inline(always)]
    pub(crate) fn add_row<S: Simd>(&mut self, simd: S, row: &[u8]) {
        let mut sum = WordSum::new(simd);
        sum.add(simd, row);
        self.add_lanes(simd, joined(simd, sum.chains));
        self.add(sum.rest);
    }

    /// Adds the lanes of a vector.
    #[inline(always)]
    pub(crate) fn add_lanes<S: Simd>(&mut self, simd: S, words: S::F32) {
        let lanes = &mut self.lanes[..S::LANES];
        simd.store(simd.add_words(simd.load(lanes), words), lanes);
    }

    /// The sum.
    pub(crate) fn total(&self) -> u32 {
        of_row(bytemuck::bytes_of(&self.lanes)).wrapping_add(self.rest)
    }
}

/// The chains added up, lane by lane.
#[inline(always)]
fn joined<S: Simd>(simd: S, [a, b, c, d]: [S::F32; CHAINS]) -> S::F32 {
    simd.add_words(simd.add_words(a, b), simd.add_words(c, d))
}

/// The sum of the words of all chains.
#[inline(always)]
pub(crate) fn of_chains<S: Simd>(simd: S, chains: [S::F32; CHAINS]) -> u32 {
    simd.reduce_words(joined(simd, chains))
}

/// Rows of `width` elements, each `stride` after the last, with the chosen instruction set. A row
/// may be a piece of one that only at the row's end breaks a word off.
#[derive(Clone, Copy)]
pub(crate) struct RowWords<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub rows: usize,
    pub width: usize,
}

impl<'a, T> RowWords<'a, T> {
    /// A single row.
    pub(crate) fn one(data: &'a [T]) -> Self {
        RowWords { data, stride: data.len(), rows: 1, width: data.len() }
    }
}

impl<T: Pod> Kernel for RowWords<'_, T> {
    type Output = u32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u32 {
        let mut sum = WordSum::new(simd);
        // Rows of whole words without gaps are one, such as the heads of a token.
        let whole = (self.width * size_of::<T>()).is_multiple_of(4) && self.stride == self.width;
        let (rows, width) =
            if whole { (1, self.rows * self.width) } else { (self.rows, self.width) };
        for row in 0..rows {
            let row = &self.data[row * self.stride..][..width];
            sum.add(simd, bytemuck::cast_slice(row));
        }
        sum.finish(simd)
    }
}

/// Takes bytes into a digest, with the chosen instruction set.
pub(crate) struct Digesting<'a> {
    pub digest: &'a mut Digest,
    pub bytes: &'a [u8],
}

impl Kernel for Digesting<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.digest.update(self.bytes);
    }
}
