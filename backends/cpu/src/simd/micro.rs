//! The inner loops of matrix products: a register tile of rows by two vectors of columns.
//!
//! Operands are 32-bit *units*: one f32, or a pair of bf16 that are neighbours in k. Every element
//! of the tile is one chain of fused multiply-adds (or pair dot products) over ascending units,
//! whatever the number of rows, so the result's bits do not depend on how the matrix was tiled.
//! Packing, blocking and the rounding of results are in `gemm/`.

use super::{Simd, prefetch};

/// Left operand: a window of `ROWS` rows of units inside `bytes`.
#[derive(Clone, Copy)]
pub(crate) struct LeftUnits<'a> {
    /// Memory that holds the window.
    pub(crate) bytes: &'a [u8],
    /// Where its first unit starts.
    pub(crate) start: usize,
    /// Bytes from one row to the next.
    pub(crate) row_bytes: usize,
    /// Bytes from one unit to the next.
    pub(crate) unit_bytes: usize,
}

/// What the tile's accumulators start from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Zero: the chain begins here.
    Zero,
    /// The stored partial sums: the chain continues.
    Resume,
}

/// One tile's work.
pub(crate) struct MicroTile<'a> {
    /// Rows of the left operand.
    pub(crate) left: LeftUnits<'a>,
    /// Packed right operand: per unit, two vectors of columns.
    pub(crate) right: &'a [u32],
    /// Units of this stretch of the chain.
    pub(crate) units: usize,
    /// Partial sums, two vectors per row.
    pub(crate) sums: &'a mut [f32],
    /// What the sums start from.
    pub(crate) start: Start,
}

/// Runs a tile of `rows` (at most `MICRO_ROWS`) rows. `DOT` says that units are bf16 pairs.
#[inline(always)]
pub(crate) fn micro_tile<S: Simd, const DOT: bool>(simd: S, rows: usize, mut tile: MicroTile<'_>) {
    assert!(rows <= S::MICRO_ROWS && tile.right.len() >= tile.units * 2 * S::LANES);
    assert!(tile.sums.len() >= rows * 2 * S::LANES);
    let mut done = 0;
    while done < rows {
        let left = rows - done;
        let step = match left {
            12.. => micro_rows::<S, DOT, 12>(simd, &mut tile),
            8.. => micro_rows::<S, DOT, 8>(simd, &mut tile),
            6.. => micro_rows::<S, DOT, 6>(simd, &mut tile),
            4.. => micro_rows::<S, DOT, 4>(simd, &mut tile),
            2.. => micro_rows::<S, DOT, 2>(simd, &mut tile),
            _ => micro_rows::<S, DOT, 1>(simd, &mut tile),
        };
        done += step;
        tile.left.start += step * tile.left.row_bytes;
        tile.sums = &mut std::mem::take(&mut tile.sums)[step * 2 * S::LANES..];
    }
}

/// Runs `ROWS` rows; returns how many that were.
#[inline(always)]
fn micro_rows<S: Simd, const DOT: bool, const ROWS: usize>(
    simd: S,
    tile: &mut MicroTile<'_>,
) -> usize {
    if ROWS > S::MICRO_ROWS {
        unreachable!("more rows than the tile has");
    }
    let packed = tile.left.row_bytes == 4 && tile.left.unit_bytes == 4 * S::MICRO_ROWS;
    if packed {
        micro_loop::<S, DOT, ROWS, true>(simd, tile);
    } else {
        assert_eq!(tile.left.unit_bytes, 4, "units of a row follow each other");
        micro_loop::<S, DOT, ROWS, false>(simd, tile);
    }
    ROWS
}

/// The loop over units. `PACKED` fixes the left operand's strides at compile time.
#[inline(always)]
fn micro_loop<S: Simd, const DOT: bool, const ROWS: usize, const PACKED: bool>(
    simd: S,
    tile: &mut MicroTile<'_>,
) {
    let LeftUnits { bytes, start, row_bytes, .. } = tile.left;
    let (row_bytes, unit_bytes) = if PACKED { (4, 4 * S::MICRO_ROWS) } else { (row_bytes, 4) };
    let units = tile.units;
    assert!(tile.right.len() >= units * 2 * S::LANES && tile.sums.len() >= ROWS * 2 * S::LANES);
    if units > 0 {
        let end = start + (ROWS - 1) * row_bytes + (units - 1) * unit_bytes + 4;
        assert!(end <= bytes.len(), "left window ends at {end} of {}", bytes.len());
    }
    let mut sums = [[simd.zero(); 2]; ROWS];
    if tile.start == Start::Resume {
        for (row, sums) in sums.iter_mut().enumerate() {
            let from = &tile.sums[row * 2 * S::LANES..][..2 * S::LANES];
            *sums = [simd.load(from), simd.load(&from[S::LANES..])];
        }
    }
    // SAFETY: the assertions above bound every address: row < ROWS and unit < units.
    unsafe {
        let mut left = bytes.as_ptr().add(start);
        let mut right = tile.right.as_ptr().cast::<u8>();
        for _ in 0..units {
            let columns = [simd.load_raw(right), simd.load_raw(right.add(4 * S::LANES))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = simd.splat_raw(left.add(row * row_bytes));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = if DOT {
                        simd.dot_pairs(*sum, value, column)
                    } else {
                        simd.fma(value, column, *sum)
                    };
                }
            }
            left = left.wrapping_add(unit_bytes);
            right = right.add(8 * S::LANES);
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        let to = &mut tile.sums[row * 2 * S::LANES..][..2 * S::LANES];
        simd.store(sums[0], to);
        simd.store(sums[1], &mut to[S::LANES..]);
    }
}

/// Reads `LANES` rows of `LANES` raw units, without conversion.
///
/// Panics unless the whole square lies in `bytes`.
#[inline(always)]
pub(crate) fn load_square<S: Simd>(
    simd: S,
    bytes: &[u8],
    start: usize,
    row_bytes: usize,
) -> S::Square {
    let end = start + (S::LANES - 1) * row_bytes + 4 * S::LANES;
    assert!(end <= bytes.len(), "square ends at {end} of {}", bytes.len());
    let mut square = simd.square();
    for (row, vector) in square.as_mut().iter_mut().enumerate() {
        // SAFETY: the last row's last byte was checked above.
        *vector = unsafe { simd.load_raw(bytes.as_ptr().add(start + row * row_bytes)) };
    }
    square
}

/// Most lanes of any set.
pub(crate) const LANES_MAX: usize = 16;

/// Reads `LANES` raw units from unit `unit` on; zero past the end of `bytes`.
#[inline(always)]
pub(crate) fn load_units<S: Simd>(simd: S, bytes: &[u8], unit: usize) -> S::F32 {
    let rest = &bytes[(4 * unit).min(bytes.len())..];
    if rest.len() >= 4 * S::LANES {
        // SAFETY: the length was checked just above.
        return unsafe { simd.load_raw(rest.as_ptr()) };
    }
    let mut units = [0.0_f32; LANES_MAX];
    let whole = rest.len() / 4 * 4;
    bytemuck::cast_slice_mut::<f32, u8>(&mut units)[..whole].copy_from_slice(&rest[..whole]);
    simd.load(&units[..S::LANES])
}

/// A one in the lower and in the upper half of a pair of bf16.
pub(crate) const PAIRED_ONES: [u32; 2] = [0x3f80, 0x3f80 << 16];

/// What is added up of a column of vectors: of pairs, even elements to the first sum and odd ones
/// to the second; squares; and raw words.
#[derive(Clone, Copy)]
pub(crate) struct Column<V> {
    pub(crate) sums: [V; 2],
    pub(crate) squares: V,
    pub(crate) words: V,
}

impl<V: Copy> Column<V> {
    /// Nothing yet.
    #[inline(always)]
    pub(crate) fn new(zero: V) -> Self {
        Column { sums: [zero; 2], squares: zero, words: zero }
    }

    /// Adds a vector of units.
    #[inline(always)]
    pub(crate) fn add<S: Simd<F32 = V>, const DOT: bool>(
        &mut self,
        simd: S,
        value: V,
        ones: [V; 2],
    ) {
        self.words = simd.add_words(self.words, value);
        if DOT {
            self.sums[0] = simd.dot_pairs(self.sums[0], value, ones[0]);
            self.sums[1] = simd.dot_pairs(self.sums[1], value, ones[1]);
            self.squares = simd.dot_pairs(self.squares, value, value);
        } else {
            self.sums[0] = simd.add(self.sums[0], value);
            self.squares = simd.fma(value, value, self.squares);
        }
    }
}

/// Adds `VECTORS` vectors of units from `unit` on of each row to their columns.
#[inline(always)]
pub(crate) fn sum_strip<S: Simd, const DOT: bool, const VECTORS: usize>(
    simd: S,
    (left, rows): (LeftUnits<'_>, usize),
    unit: usize,
    columns: &mut [Column<S::F32>; VECTORS],
) {
    if rows == 0 {
        return;
    }
    let start = left.start + 4 * unit;
    let end = start + (rows - 1) * left.row_bytes + 4 * VECTORS * S::LANES;
    assert!(end <= left.bytes.len(), "rows end at {end} of {}", left.bytes.len());
    let first = simd.splat(f32::from_bits(PAIRED_ONES[0]));
    let second = simd.splat(f32::from_bits(PAIRED_ONES[1]));
    let mut totals = *columns;
    for row in 0..rows {
        for (vector, column) in totals.iter_mut().enumerate() {
            let at = start + row * left.row_bytes + 4 * vector * S::LANES;
            // SAFETY: the last row's last vector was checked above.
            let value = unsafe { simd.load_raw(left.bytes.as_ptr().add(at)) };
            column.add::<S, DOT>(simd, value, [first, second]);
        }
    }
    *columns = totals;
}

/// Rows that lie a multiple of this apart compete for the same places of the first-level cache: a
/// line of theirs is read once and whole.
const ALIASED_BYTES: usize = 4096;

/// Bytes of a cache line, for prefetching.
pub(crate) const LINE_BYTES: usize = 64;

/// Memory that is asked for little by little while other memory is worked on.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ahead(Option<*const u8>);

impl Ahead {
    /// From the beginning of some bytes on.
    #[inline(always)]
    pub(crate) fn of(bytes: &[u8]) -> Ahead {
        Ahead::at(bytes.as_ptr())
    }

    /// From an address on; any is allowed.
    #[inline(always)]
    pub(crate) fn at(address: *const u8) -> Ahead {
        Ahead(Some(address))
    }

    /// Asks for the next `bytes` bytes.
    #[inline(always)]
    pub(crate) fn ask<S: Simd>(&mut self, simd: S, bytes: usize) {
        if let Some(next) = &mut self.0 {
            for line in 0..bytes / LINE_BYTES {
                simd.prefetch(next.wrapping_add(line * LINE_BYTES));
            }
            *next = next.wrapping_add(bytes);
        }
    }
}

/// Asks for memory that will be streamed, where no earlier rows have asked for it.
#[inline(always)]
pub(crate) fn fetch(bytes: &[u8]) {
    bytes.chunks(LINE_BYTES).for_each(|line| prefetch(line.as_ptr()));
}

/// Whole squares of a right operand that is streamed in place, with few rows on the left.
pub(crate) struct Stream<'a> {
    /// Rows of units.
    pub(crate) left: &'a [f32],
    /// Units from one left row to the next.
    pub(crate) left_stride: usize,
    /// Memory that holds the rows of the right operand; they become columns of the result.
    pub(crate) right: &'a [u8],
    /// Where the first of them starts.
    pub(crate) right_start: usize,
    /// Bytes from one of them to the next.
    pub(crate) right_row_bytes: usize,
    /// How many squares follow each other along the rows.
    pub(crate) squares: usize,
    /// As many bytes that are asked for meanwhile.
    pub(crate) next: Ahead,
}

/// Continues the chains of `ROWS` left rows and `VECTORS * LANES` right rows over whole squares.
///
/// As many bytes as are used are prefetched, in order of address, from `next`: the hardware does
/// not foresee this many short streams. They go to the second level, as a block of rows would push
/// the one in use out of the first.
#[inline(always)]
pub(crate) fn stream_squares<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    stream: &Stream<'_>,
    sums: &mut [[S::F32; VECTORS]; ROWS],
) {
    let Stream { left, left_stride, right, right_start, right_row_bytes, squares, .. } = *stream;
    if squares == 0 {
        return;
    }
    let square_bytes = 4 * S::LANES;
    let end = right_start + (VECTORS * S::LANES - 1) * right_row_bytes + squares * square_bytes;
    assert!(end <= right.len(), "squares end at {end} of {}", right.len());
    assert!((ROWS - 1) * left_stride + squares * S::LANES <= left.len());
    let mut values = *sums;
    // SAFETY: the assertions bound every address that is read; prefetches may go anywhere.
    unsafe {
        let mut left = left.as_ptr().cast::<u8>();
        let mut right = right.as_ptr().add(right_start);
        let mut next = stream.next;
        for _ in 0..squares {
            for vector in 0..VECTORS {
                let rows = right.add(vector * S::LANES * right_row_bytes);
                if right_row_bytes.is_multiple_of(ALIASED_BYTES) {
                    next.ask(simd, S::LANES * square_bytes);
                    let start = rows.offset_from_unsigned(stream.right.as_ptr());
                    let square = load_square(simd, stream.right, start, right_row_bytes);
                    for (step, weights) in simd.transpose(square).as_ref().iter().enumerate() {
                        let left = (left.add(step * 4), left_stride * 4);
                        multiply::<S, DOT, ROWS, VECTORS>(
                            simd,
                            left,
                            *weights,
                            vector,
                            &mut values,
                        );
                    }
                    continue;
                }
                for quad in 0..S::LANES / 4 {
                    next.ask(simd, S::LANES * 16);
                    let columns = simd.load_columns(rows.add(quad * 16), right_row_bytes);
                    for (step, weights) in columns.into_iter().enumerate() {
                        let left = (left.add((quad * 4 + step) * 4), left_stride * 4);
                        multiply::<S, DOT, ROWS, VECTORS>(simd, left, weights, vector, &mut values);
                    }
                }
            }
            left = left.wrapping_add(square_bytes);
            right = right.wrapping_add(square_bytes);
        }
    }
    *sums = values;
}

/// Continues the chains of one vector of columns by one unit of each left row.
///
/// # Safety
/// `left.0` must be readable for 4 bytes in each of `ROWS` rows that are `left.1` bytes apart.
#[inline(always)]
unsafe fn multiply<S: Simd, const DOT: bool, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    left: (*const u8, usize),
    weights: S::F32,
    vector: usize,
    sums: &mut [[S::F32; VECTORS]; ROWS],
) {
    for (row, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller promises the rows.
        let value = unsafe { simd.splat_raw(left.0.add(row * left.1)) };
        let sum = &mut sums[vector];
        *sum =
            if DOT { simd.dot_pairs(*sum, value, weights) } else { simd.fma(value, weights, *sum) };
    }
}
