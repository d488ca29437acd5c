//! Word sums while data passes: what a sum is stands in `pontoon_ops::sums`.
//!
//! Whoever has a tensor in hand adds it up here: kernels their rows, products their tiles, and
//! `kernels/sums.rs` what nobody else summed.

use bytemuck::Pod;
use pontoon_ops::sums::of_row;

use crate::simd::{Kernel, Simd};

/// Bytes that are added at a time: a cache line, and the longest vector.
const STEP: usize = 64;

/// A word sum that is being formed, in lanes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Words([u32; STEP / 4]);

impl Words {
    /// Adds a row, or a piece of one that only at the row's end breaks a word off.
    #[inline(always)]
    pub(crate) fn add<T: Pod>(&mut self, row: &[T]) {
        let lines = bytemuck::cast_slice::<T, u8>(row).chunks_exact(STEP);
        let rest = lines.remainder();
        for line in lines {
            for (lane, word) in self.0.iter_mut().zip(line.chunks_exact(4)) {
                let word = u32::from_le_bytes(word.try_into().expect("chunks of four"));
                *lane = lane.wrapping_add(word);
            }
        }
        if !rest.is_empty() {
            self.0[0] = self.0[0].wrapping_add(of_row(rest));
        }
    }

    /// The sum.
    #[inline(always)]
    pub(crate) fn total(self) -> u32 {
        self.0.into_iter().fold(0, u32::wrapping_add)
    }
}

/// Rows of `width` elements, each `stride` after the last, with the chosen instruction set.
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
        let mut words = Words::default();
        for row in 0..self.rows {
            words.add(&self.data[row * self.stride..][..self.width]);
        }
        words.total()
    }
}
