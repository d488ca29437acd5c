//! Small f32 products inside attention: a few rows times a tile that lies in cache.
//!
//! Every element is one chain over `k` in ascending order, continued from what stands in `c`, so
//! results do not depend on how many rows are taken together.

use crate::simd::Simd;

/// Where the left operand's elements lie: `a[row * row_step + k * k_step]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub a: &'a [f32],
    pub row_step: usize,
    pub k_step: usize,
}

/// Rows taken together: with two vectors of columns each, twelve accumulators.
const ROWS: usize = 6;

/// `c[row, n] += sum over k in range of a[row, k] * b[k, n]`; `b` and `c` are dense with `columns`
/// a multiple of two vectors.
#[inline(always)]
pub(super) fn multiply_add<S: Simd>(
    simd: S,
    left: Left<'_>,
    b: &[f32],
    c: &mut [f32],
    (rows, range, columns): (usize, std::ops::Range<usize>, usize),
) {
    let mut row = 0;
    while row + ROWS <= rows {
        block::<S, ROWS>(simd, left, b, c, (row, range.clone(), columns));
        row += ROWS;
    }
    while row < rows {
        block::<S, 1>(simd, left, b, c, (row, range.clone(), columns));
        row += 1;
    }
}

/// `R` rows against all columns, two vectors at a time.
#[inline(always)]
fn block<S: Simd, const R: usize>(
    simd: S,
    left: Left<'_>,
    b: &[f32],
    c: &mut [f32],
    (row, range, columns): (usize, std::ops::Range<usize>, usize),
) {
    let width = 2 * S::LANES;
    for column in (0..columns).step_by(width) {
        let mut sums = [[simd.zero(); 2]; R];
        for (r, pair) in sums.iter_mut().enumerate() {
            let from = &c[(row + r) * columns + column..][..width];
            *pair = [simd.load(&from[..S::LANES]), simd.load(&from[S::LANES..])];
        }
        for k in range.clone() {
            let right = &b[k * columns + column..][..width];
            let low = simd.load(&right[..S::LANES]);
            let high = simd.load(&right[S::LANES..]);
            for (r, pair) in sums.iter_mut().enumerate() {
                let factor = simd.splat(left.a[(row + r) * left.row_step + k * left.k_step]);
                pair[0] = simd.fma(factor, low, pair[0]);
                pair[1] = simd.fma(factor, high, pair[1]);
            }
        }
        for (r, pair) in sums.iter().enumerate() {
            let to = &mut c[(row + r) * columns + column..][..width];
            let (low, high) = to.split_at_mut(S::LANES);
            simd.store(pair[0], low);
            simd.store(pair[1], high);
        }
    }
}

/// The next width that [`multiply_add`] takes for any instruction set.
pub(super) fn padded_width(width: usize) -> usize {
    width.next_multiple_of(32)
}
