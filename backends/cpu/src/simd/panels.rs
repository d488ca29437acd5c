//! The inner loop of products with a matrix that is kept in panels: some rows, whose units lie side
//! by side, meet a panel that is read from front to back.
//!
//! Chains run over ascending units, as in `micro.rs`. What is shared out to whom is decided in
//! `gemm/panels.rs` and `gemm/quant_panels.rs`.

use super::Simd;
use super::micro::{Ahead, LINE_BYTES};
use super::quantised::{Left, Stored};

/// How far ahead of its use memory is asked for: what arrives while one request is under way, and
/// some more, as the hardware foresees the rest of a page by itself.
const AHEAD_BYTES: usize = 8 << 10;

/// What lies ahead of a task that reads memory from front to back: its own bytes up to `end`, then
/// those of whatever this thread will read next.
#[derive(Clone, Copy)]
pub(crate) struct Runway {
    end: usize,
    after: Option<usize>,
}

impl Runway {
    /// Up to `end`, and `after` it.
    pub(crate) fn new(end: *const u8, after: Option<*const u8>) -> Runway {
        Runway { end: end.addr(), after: after.map(|after| after.addr()) }
    }

    /// The same with nothing after it.
    pub(crate) fn alone(self) -> Runway {
        Runway { after: None, ..self }
    }

    /// Where what would lie at an address is: behind the end it is elsewhere.
    #[inline(always)]
    fn at(&self, address: *const u8) -> Option<*const u8> {
        match address.addr().checked_sub(self.end) {
            None => Some(address),
            Some(beyond) => self.after.map(|after| address.with_addr(after + beyond)),
        }
    }

    /// Asks for as many bytes as are read at `at`.
    #[inline(always)]
    fn ask<S: Simd>(&self, simd: S, at: *const u8, bytes: usize) {
        if let Some(ahead) = self.at(at.wrapping_add(AHEAD_BYTES)) {
            for line in 0..bytes / LINE_BYTES {
                simd.prefetch(ahead.wrapping_add(line * LINE_BYTES));
            }
        }
    }
}

/// What a group of rows asks for while it meets a panel.
#[derive(Clone, Copy)]
pub(crate) enum Asks {
    /// A single group: what lies shortly ahead.
    Near(Runway),
    /// One of several: its share of the next panel, so that memory never rests.
    Share(Ahead, usize),
    /// Nothing.
    Nothing,
}

impl Asks {
    /// Those of group `index` of `groups` at a panel of `panel_bytes`.
    #[inline(always)]
    pub(crate) fn of_group(runway: Runway, (index, groups): (usize, usize), panel: &[u32]) -> Asks {
        if groups == 1 {
            return Asks::Near(runway);
        }
        let share = size_of_val(panel).div_ceil(groups).next_multiple_of(LINE_BYTES);
        let next = runway.at(panel.as_ptr_range().end.cast());
        match next {
            Some(next) => Asks::Share(Ahead::at(next.wrapping_add(index * share)), groups),
            None => Asks::Nothing,
        }
    }

    /// Asks for what goes with `bytes` that are read at `at`.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, simd: S, at: *const u8, bytes: usize) {
        match self {
            Asks::Near(runway) => runway.ask(simd, at, bytes),
            Asks::Share(next, groups) => {
                next.ask(simd, bytes.div_ceil(*groups).next_multiple_of(LINE_BYTES));
            }
            Asks::Nothing => {}
        }
    }
}

/// Units between two looks at what lies ahead.
const UNITS_TOGETHER: usize = 8;

/// Continues the chains of `ROWS` rows with a panel.
#[inline(always)]
pub(crate) fn panel_chains<S: Simd, const DOT: bool, const ROWS: usize>(
    simd: S,
    left: &[f32],
    panel: &[u32],
    mut asks: Asks,
    sums: &mut [[S::F32; 2]; ROWS],
) {
    let unit_bytes = 8 * S::LANES;
    let units = panel.len() / (2 * S::LANES);
    assert!(left.len() >= ROWS * units);
    let mut values = *sums;
    let mut left = left.as_ptr().cast::<u8>();
    let mut right = panel.as_ptr().cast::<u8>();
    let mut unit = 0;
    // SAFETY: `units` whole units are in the panel and in each row, as checked above; prefetches
    // may go anywhere.
    unsafe {
        while unit + UNITS_TOGETHER <= units {
            asks.ask(simd, right, UNITS_TOGETHER * unit_bytes);
            for step in 0..UNITS_TOGETHER {
                let (left, right) = (left.add(4 * ROWS * step), right.add(unit_bytes * step));
                unit_of::<S, DOT, ROWS>(simd, left, right, &mut values);
            }
            left = left.add(4 * ROWS * UNITS_TOGETHER);
            right = right.add(unit_bytes * UNITS_TOGETHER);
            unit += UNITS_TOGETHER;
        }
        for _ in unit..units {
            unit_of::<S, DOT, ROWS>(simd, left, right, &mut values);
            left = left.add(4 * ROWS);
            right = right.add(unit_bytes);
        }
    }
    *sums = values;
}

/// Continues the chains by one unit.
///
/// # Safety
/// `left` must be readable for `ROWS` words and `right` for two vectors.
#[inline(always)]
unsafe fn unit_of<S: Simd, const DOT: bool, const ROWS: usize>(
    simd: S,
    left: *const u8,
    right: *const u8,
    sums: &mut [[S::F32; 2]; ROWS],
) {
    // SAFETY: the caller promises the memory.
    unsafe {
        let columns = [simd.load_raw(right), simd.load_raw(right.add(4 * S::LANES))];
        for (row, sums) in sums.iter_mut().enumerate() {
            let value = simd.splat_raw(left.add(4 * row));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = if DOT {
                    simd.dot_pairs(*sum, value, column)
                } else {
                    simd.fma(value, column, *sum)
                };
            }
        }
    }
}

/// A panel of small integers, one scale per row of the matrix and block.
#[derive(Clone, Copy)]
pub(crate) struct QuantPanel<'a> {
    /// Per word along the rows, the rows' words side by side.
    pub(crate) words: &'a [u32],
    /// Per block, the rows' scales side by side.
    pub(crate) scales: &'a [f32],
    /// Words of a row in a block.
    pub(crate) block_words: usize,
    /// What lies ahead of the words and of the scales.
    pub(crate) runways: [Runway; 2],
}

impl QuantPanel<'_> {
    /// Blocks of a row, after a check that the words belong to as many.
    #[inline(always)]
    pub(crate) fn blocks<S: Simd>(&self) -> usize {
        let blocks = self.scales.len() / (2 * S::LANES);
        let words = self.words.len() / (2 * S::LANES);
        assert!(words > (blocks.max(1) - 1) * self.block_words);
        blocks
    }

    /// Words of a row in a block: the last may have fewer.
    #[inline(always)]
    pub(crate) fn words_of<S: Simd>(&self, block: usize) -> usize {
        let words = self.words.len() / (2 * S::LANES);
        self.block_words.min(words - block * self.block_words)
    }

    /// A block's scales.
    #[inline(always)]
    pub(crate) fn scales_of<S: Simd>(&self, simd: S, block: usize) -> [S::F32; 2] {
        let scales = &self.scales[block * 2 * S::LANES..][..2 * S::LANES];
        self.runways[1].ask(simd, scales.as_ptr().cast(), size_of_val(scales));
        [simd.load(scales), simd.load(&scales[S::LANES..])]
    }
}

/// Adds all blocks' products to the totals of `ROWS` rows, integers widened in registers.
#[inline(always)]
pub(crate) fn quant_chains<S: Simd, W: Stored, const DOT: bool, const ROWS: usize>(
    simd: S,
    left: &[f32],
    panel: &QuantPanel<'_>,
    totals: &mut [[S::F32; ROWS]; 2],
) {
    let (blocks, words_bytes) = (panel.blocks::<S>(), 8 * S::LANES);
    let lane_bytes = 4 * ROWS * W::lane_units(DOT);
    assert!(size_of_val(left) >= panel.words.len() / (2 * S::LANES) * lane_bytes);
    let mut left = left.as_ptr().cast::<u8>();
    let mut right = panel.words.as_ptr().cast::<u8>();
    for block in 0..blocks {
        let scales = panel.scales_of(simd, block);
        let mut sums = [[simd.zero(); ROWS]; 2];
        for _ in 0..panel.words_of::<S>(block) {
            panel.runways[0].ask(simd, right, words_bytes);
            let rows = Left { from: left, stride: 4, unit: 4 * ROWS };
            for (vector, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the blocks' words are all in the panel, and `left` has units for them.
                unsafe {
                    let raw = simd.load_raw(right.add(vector * 4 * S::LANES));
                    W::multiply::<S, DOT, ROWS>(simd, raw, rows, sums);
                }
            }
            left = left.wrapping_add(lane_bytes);
            right = right.wrapping_add(words_bytes);
        }
        for ((totals, sums), scales) in totals.iter_mut().zip(sums).zip(scales) {
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = simd.fma(sum, scales, *total);
            }
        }
    }
}

/// Widens a block of a panel into units, for many rows to meet.
#[inline(always)]
pub(crate) fn unpack_block<S: Simd, W: Stored, const DOT: bool>(
    simd: S,
    panel: &QuantPanel<'_>,
    block: usize,
    to: &mut [u32],
) {
    let (words_bytes, lane_units) = (8 * S::LANES, W::lane_units(DOT));
    assert!(block < panel.blocks::<S>());
    let words = panel.words_of::<S>(block);
    assert!(to.len() >= words * lane_units * 2 * S::LANES);
    let mut right = panel.words[block * panel.block_words * 2 * S::LANES..].as_ptr().cast::<u8>();
    let mut to = to.as_mut_ptr().cast::<u8>();
    for _ in 0..words {
        panel.runways[0].ask(simd, right, words_bytes);
        for vector in 0..2 {
            let at = vector * 4 * S::LANES;
            // SAFETY: the block lies in the panel and its units in `to`, as checked above.
            unsafe {
                W::unpack::<S, DOT>(simd, simd.load_raw(right.add(at)), to.add(at), words_bytes)
            };
        }
        to = to.wrapping_add(lane_units * words_bytes);
        right = right.wrapping_add(words_bytes);
    }
}

/// Adds a widened block's products, times its scales, to the totals of `ROWS` rows.
#[inline(always)]
pub(crate) fn block_chains<S: Simd, const DOT: bool, const ROWS: usize>(
    simd: S,
    left: &[f32],
    (units, scales): (&[u32], [S::F32; 2]),
    totals: &mut [f32],
) {
    let mut sums = [[simd.zero(); 2]; ROWS];
    panel_chains::<S, DOT, ROWS>(simd, left, units, Asks::Nothing, &mut sums);
    for (sums, totals) in sums.into_iter().zip(totals.chunks_exact_mut(2 * S::LANES)) {
        for (vector, (sum, scale)) in sums.into_iter().zip(scales).enumerate() {
            let total = &mut totals[vector * S::LANES..][..S::LANES];
            simd.store(simd.fma(sum, scale, simd.load(total)), total);
        }
    }
}
