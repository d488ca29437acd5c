//! Word sums and digests while data passes: what they are stands in `pontoon_ops::{sums, digest}`.
//!
//! Whoever has a tensor in hand adds it up here: kernels their rows, products their operands, and
//! `kernels/sums.rs` what nobody else summed.

use bytemuck::Pod;
use pontoon_ops::digest::Digest;
use pontoon_ops::sums::of_row;

use crate::simd::{Kernel, Simd};

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
    fn run<S: Simd>(self, _: S) -> u32 {
        let mut sum = 0_u32;
        for row in 0..self.rows {
            let row = &self.data[row * self.stride..][..self.width];
            sum = sum.wrapping_add(of_row(bytemuck::cast_slice(row)));
        }
        sum
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
