//! The inner loop of products with quantised weights: rows of small integers are streamed in place,
//! widened in registers and multiplied with a few rows of units.
//!
//! A block of a row has one scale. Within a block every element is one chain over ascending units
//! from zero; the block's sum times its scale is then added to what stands in the total, blocks in
//! ascending order, each with one rounding. So an element's bits depend on its rows alone. What is
//! streamed when is decided in `gemm/quant.rs`.

use super::Simd;
use super::micro::{Ahead, LANES_MAX};

/// Bytes of a row that are read together.
pub(crate) const SQUARE_BYTES: usize = 16;

/// How integers are stored.
pub(crate) trait Stored: Copy + Send + Sync {
    /// Integers in one byte.
    const PER_BYTE: usize;

    /// Continues the chains by the integers of one 32-bit lane per row of the matrix.
    ///
    /// # Safety
    /// `left` must be readable for as many 4-byte units as a lane makes, in each of `ROWS` rows.
    unsafe fn multiply<S: Simd, const DOT: bool, const ROWS: usize>(
        simd: S,
        raw: S::F32,
        left: Left,
        sums: &mut [S::F32; ROWS],
    );

    /// Writes the units of one 32-bit lane per row of the matrix, `step` bytes apart.
    ///
    /// # Safety
    /// `to` must be writable for a vector at each of as many places as a lane makes units.
    unsafe fn unpack<S: Simd, const DOT: bool>(simd: S, raw: S::F32, to: *mut u8, step: usize);

    /// Units that a lane makes.
    #[inline(always)]
    fn lane_units(dot: bool) -> usize {
        if dot { 2 * Self::PER_BYTE } else { 4 * Self::PER_BYTE }
    }
}

/// Rows of units, as a place in memory.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(super) from: *const u8,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    /// Bytes from one unit to the next.
    pub(super) unit: usize,
}

/// One signed byte each.
#[derive(Clone, Copy)]
pub(crate) struct Bytes;

/// One signed half byte each, the lower half first.
#[derive(Clone, Copy)]
pub(crate) struct HalfBytes;

impl Stored for Bytes {
    const PER_BYTE: usize = 1;
    #[inline(always)]
    unsafe fn multiply<S: Simd, const DOT: bool, const ROWS: usize>(
        simd: S,
        raw: S::F32,
        left: Left,
        sums: &mut [S::F32; ROWS],
    ) {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            if DOT {
                chains::<S, DOT, ROWS, 2>(simd, simd.pair_bytes(raw), left, sums);
            } else {
                chains::<S, DOT, ROWS, 4>(simd, simd.widen_bytes(raw), left, sums);
            }
        }
    }
    #[inline(always)]
    unsafe fn unpack<S: Simd, const DOT: bool>(simd: S, raw: S::F32, to: *mut u8, step: usize) {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            if DOT {
                store_each(simd, simd.pair_bytes(raw), to, step);
            } else {
                store_each(simd, simd.widen_bytes(raw), to, step);
            }
        }
    }
}

impl Stored for HalfBytes {
    const PER_BYTE: usize = 2;
    #[inline(always)]
    unsafe fn multiply<S: Simd, const DOT: bool, const ROWS: usize>(
        simd: S,
        raw: S::F32,
        left: Left,
        sums: &mut [S::F32; ROWS],
    ) {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            if DOT {
                chains::<S, DOT, ROWS, 4>(simd, simd.pair_half_bytes(raw), left, sums);
            } else {
                chains::<S, DOT, ROWS, 8>(simd, simd.widen_half_bytes(raw), left, sums);
            }
        }
    }
    #[inline(always)]
    unsafe fn unpack<S: Simd, const DOT: bool>(simd: S, raw: S::F32, to: *mut u8, step: usize) {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            if DOT {
                store_each(simd, simd.pair_half_bytes(raw), to, step);
            } else {
                store_each(simd, simd.widen_half_bytes(raw), to, step);
            }
        }
    }
}

/// # Safety
/// As [`Stored::unpack`] says, for `UNITS` units.
#[inline(always)]
unsafe fn store_each<S: Simd, const UNITS: usize>(
    simd: S,
    units: [S::F32; UNITS],
    to: *mut u8,
    step: usize,
) {
    for (unit, vector) in units.into_iter().enumerate() {
        // SAFETY: the caller promises the places.
        unsafe { simd.store_raw(vector, to.add(unit * step)) };
    }
}

/// # Safety
/// As [`Stored::multiply`] says, for `UNITS` units.
#[inline(always)]
unsafe fn chains<S: Simd, const DOT: bool, const ROWS: usize, const UNITS: usize>(
    simd: S,
    weights: [S::F32; UNITS],
    left: Left,
    sums: &mut [S::F32; ROWS],
) {
    for (unit, weights) in weights.into_iter().enumerate() {
        for (row, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller promises the units.
            let value =
                unsafe { simd.splat_raw(left.from.add(row * left.stride + unit * left.unit)) };
            *sum = if DOT {
                simd.dot_pairs(*sum, value, weights)
            } else {
                simd.fma(value, weights, *sum)
            };
        }
    }
}

/// Whole blocks of some rows of a quantised matrix, with few rows on the left.
#[derive(Clone, Copy)]
pub(crate) struct QuantStream<'a> {
    /// Rows of units, filled with zeros up to a whole block.
    pub(crate) left: &'a [f32],
    /// Units from one left row to the next.
    pub(crate) left_stride: usize,
    /// Memory that holds the matrix.
    pub(crate) right: &'a [u8],
    /// Where the first row's first block starts.
    pub(crate) right_start: usize,
    /// Bytes from one row to the next.
    pub(crate) right_row_bytes: usize,
    /// One scale per row and block.
    pub(crate) scales: &'a [f32],
    /// Where the first row's first block has its scale.
    pub(crate) scales_start: usize,
    /// Scales from one row to the next.
    pub(crate) scales_stride: usize,
    /// Blocks to take.
    pub(crate) blocks: usize,
    /// Bytes of a block, a multiple of `SQUARE_BYTES`.
    pub(crate) block_bytes: usize,
    /// As many bytes that are asked for meanwhile.
    pub(crate) next: Ahead,
}

/// Adds the blocks' products to the totals of `ROWS` left rows, for `VECTORS * LANES` rows of the
/// matrix: one left row alone is a single chain per vector, which must not be waited for.
#[inline(always)]
pub(crate) fn stream_quantised<
    S: Simd,
    W: Stored,
    const DOT: bool,
    const ROWS: usize,
    const VECTORS: usize,
>(
    simd: S,
    stream: &QuantStream<'_>,
    totals: &mut [[S::F32; ROWS]; VECTORS],
) {
    let QuantStream { blocks, block_bytes, right_row_bytes, .. } = *stream;
    if blocks == 0 {
        return;
    }
    assert!(block_bytes.is_multiple_of(SQUARE_BYTES));
    let lane_units = W::lane_units(DOT);
    let units = blocks * block_bytes / 4 * lane_units;
    assert!((ROWS - 1) * stream.left_stride + units <= stream.left.len());
    let last = VECTORS * S::LANES - 1;
    let end = stream.right_start + last * right_row_bytes + blocks * block_bytes;
    assert!(end <= stream.right.len(), "rows end at {end} of {}", stream.right.len());
    let end = stream.scales_start + last * stream.scales_stride + blocks;
    assert!(end <= stream.scales.len(), "scales end at {end} of {}", stream.scales.len());
    let mut values = *totals;
    let squares = block_bytes / SQUARE_BYTES;
    // SAFETY: the assertions bound every address that is read: four scales are read at once only
    // where four blocks are left; prefetches may go anywhere.
    unsafe {
        let mut left = stream.left.as_ptr().cast::<u8>();
        let mut right = stream.right.as_ptr().add(stream.right_start);
        let mut next = stream.next;
        for first in (0..blocks).step_by(4) {
            let count = (blocks - first).min(4);
            let scales = scales_of::<S, VECTORS>(simd, stream, first, count);
            for block in 0..count {
                let mut sums = [[simd.zero(); ROWS]; VECTORS];
                for _ in 0..squares {
                    next.ask(simd, VECTORS * S::LANES * SQUARE_BYTES);
                    for (vector, sums) in sums.iter_mut().enumerate() {
                        let rows = right.add(vector * S::LANES * right_row_bytes);
                        let columns = simd.load_columns(rows, right_row_bytes);
                        for (column, raw) in columns.into_iter().enumerate() {
                            let from = left.wrapping_add(column * lane_units * 4);
                            let rows = Left { from, stride: stream.left_stride * 4, unit: 4 };
                            W::multiply::<S, DOT, ROWS>(simd, raw, rows, sums);
                        }
                    }
                    left = left.wrapping_add(4 * lane_units * 4);
                    right = right.wrapping_add(SQUARE_BYTES);
                }
                for ((values, sums), scales) in values.iter_mut().zip(sums).zip(&scales) {
                    for (value, sum) in values.iter_mut().zip(sums) {
                        *value = simd.fma(sum, scales[block], *value);
                    }
                }
            }
        }
    }
    *totals = values;
}

/// The scales of up to four blocks from `first` on, in lanes; those beyond `count` are zero.
///
/// # Safety
/// The stream must have scales for them.
#[inline(always)]
unsafe fn scales_of<S: Simd, const VECTORS: usize>(
    simd: S,
    stream: &QuantStream<'_>,
    first: usize,
    count: usize,
) -> [[S::F32; 4]; VECTORS] {
    let stride = stream.scales_stride;
    let mut scales = [[simd.zero(); 4]; VECTORS];
    for (vector, scales) in scales.iter_mut().enumerate() {
        let here = stream.scales_start + vector * S::LANES * stride + first;
        *scales = if count == 4 {
            // SAFETY: the caller promises four scales in each row.
            unsafe { simd.load_columns(stream.scales.as_ptr().add(here).cast(), stride * 4) }
        } else {
            few_scales(simd, &stream.scales[here..], stride, count)
        };
    }
    scales
}

/// The scales of fewer than four blocks; the rest is zero.
#[inline(always)]
fn few_scales<S: Simd>(simd: S, from: &[f32], stride: usize, count: usize) -> [S::F32; 4] {
    let mut lanes = [[0.0; LANES_MAX]; 4];
    for (block, lanes) in lanes.iter_mut().enumerate().take(count) {
        for (row, lane) in lanes.iter_mut().enumerate().take(S::LANES) {
            *lane = from[row * stride + block];
        }
    }
    lanes.map(|lanes| simd.load(&lanes))
}
