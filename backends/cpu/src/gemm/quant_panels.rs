//! Products with a matrix of small integers that is kept in panels, as its scales are.
//!
//! Up to a few rows meet the integers while these are widened in registers. For more, a block of a
//! panel is widened once into memory that stays in the first-level cache, and all rows meet it
//! there, on the inner loop of ordinary panels. Chains and the order of blocks are those of
//! `quant.rs`, and so are the bits.

use std::marker::PhantomData;

use super::panels::{GROUP_MAX, Groups, Shares, pack_left};
use super::quant::{LEFT_WORDS_NEAR, QuantArgs};
use super::{DataMut, Store, Unit, UnitKind, is_dot, units};
use crate::ffi::{Grid, Parts, Tile, Tiles};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::panels::{QuantPanel, Runway, block_chains, quant_chains, unpack_block};
use crate::simd::quantised::Stored;
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};

/// Most rows for which integers are widened in registers.
const ROWS_IN_REGISTERS: usize = 4;

/// Computes one product.
pub(super) fn run<T: Unit, W: Stored>(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    mut args: QuantArgs<'_>,
    x: &[T],
) {
    let (m, n, k) = (args.m, args.n, args.k);
    let (dot, units) = (is_dot(T::KIND, isa), units(T::KIND, isa, k));
    let width = isa.geometry().micro_columns;
    let groups = Groups::new(isa, m);
    let near = (LEFT_WORDS_NEAR / units / GROUP_MAX).max(1) * GROUP_MAX;
    let shares = Shares::new(pool, n / width);
    let block_words = args.block / (W::PER_BYTE * size_of::<u32>());
    // Room of a task: a widened block, and the totals of a panel.
    let block_units = block_words * W::lane_units(dot);
    let room = (block_units + near.min(groups.padded())) * width;
    let bias_words = if args.bias.is_some() { n } else { 0 };
    let lens = [groups.padded() * units, bias_words, room * shares.tasks];
    let [left, bias, rooms] = scratch.words(lens);
    let bias: &mut [f32] = bytemuck::cast_slice_mut(bias);
    super::fill_bias(args.bias, bias);
    let raw = dot || T::KIND == UnitKind::F32;
    pack_left(pool, (x, args.x.row_stride, raw), groups, units, left);
    let shared = Shared {
        left: bytemuck::cast_slice(left),
        groups,
        near,
        words: bytemuck::cast_slice(&args.weight[..n * k / W::PER_BYTE]),
        scales: &args.scales[..n * k.div_ceil(args.block)],
        panels: n / width,
        units,
        block_words,
        dot,
        bias: if bias.is_empty() { None } else { Some(bias) },
        shares,
    };
    let (row_stride, tile_columns) = (args.c.row_stride, shares.granule * width);
    let grid = Grid { rows: m, columns: n, row_stride, tile_rows: near, tile_columns };
    let rooms = (rooms, room);
    match args.c.data.from(0) {
        DataMut::F32(c) => stream::<W, f32>(pool, isa, &shared, rooms, Tiles::new(c, grid)),
        DataMut::Bf16(c) => stream::<W, _>(pool, isa, &shared, rooms, Tiles::new(c, grid)),
        DataMut::F16(c) => stream::<W, _>(pool, isa, &shared, rooms, Tiles::new(c, grid)),
    }
}

/// What all tasks share.
struct Shared<'a> {
    /// The rows' units, group by group.
    left: &'a [f32],
    groups: Groups,
    /// Rows that meet all panels before the next rows do: a multiple of a group.
    near: usize,
    words: &'a [u32],
    scales: &'a [f32],
    panels: usize,
    units: usize,
    block_words: usize,
    dot: bool,
    bias: Option<&'a [f32]>,
    shares: Shares,
}

fn stream<W: Stored, C: Element>(
    pool: &Pool,
    isa: Isa,
    shared: &Shared<'_>,
    (rooms, room): (&mut [u32], usize),
    tiles: Tiles<'_, C>,
) {
    let Shared { shares, groups, near, panels, words, scales, .. } = *shared;
    for first in (0..groups.rows()).step_by(near) {
        let rooms = Parts::new(&mut *rooms, room);
        pool.run_in_turn(shares.tasks, |index| {
            let (words, scales) = (bytemuck::cast_slice(words), bytemuck::cast_slice(scales));
            let runways = [
                shares.runway(pool, words, words.len() / panels, index),
                shares.runway(pool, scales, scales.len() / panels, index).alone(),
            ];
            let stored = PhantomData::<W>;
            let room = rooms.take(index);
            dispatch(isa, Task { shared, tiles: &tiles, index, first, runways, room, stored });
        });
    }
}

/// Some granules of C's columns, for the rows that are near.
struct Task<'a, 't, C, W> {
    shared: &'a Shared<'a>,
    tiles: &'a Tiles<'t, C>,
    index: usize,
    /// The first of the rows.
    first: usize,
    runways: [Runway; 2],
    room: &'a mut [u32],
    stored: PhantomData<W>,
}

impl<C: Element, W: Stored> Kernel for Task<'_, '_, C, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.shared.dot {
            self.granules::<S, true>(simd);
        } else {
            self.granules::<S, false>(simd);
        }
    }
}

impl<C: Element, W: Stored> Task<'_, '_, C, W> {
    #[inline(always)]
    fn granules<S: Simd, const DOT: bool>(mut self, simd: S) {
        let Shared { shares, panels, words, scales, block_words, near, .. } = *self.shared;
        let (panel_words, panel_scales) = (words.len() / panels, scales.len() / panels);
        for granule in shares.of(self.index) {
            let mut tile = self.tiles.take(self.first / near, granule);
            let start = granule * shares.granule;
            for index in start..(start + shares.granule).min(panels) {
                let panel = QuantPanel {
                    words: &words[index * panel_words..][..panel_words],
                    scales: &scales[index * panel_scales..][..panel_scales],
                    block_words,
                    runways: self.runways,
                };
                let at = Columns {
                    first: index * 2 * S::LANES,
                    in_tile: (index - start) * 2 * S::LANES,
                };
                self.panel::<S, DOT>(simd, &panel, at, &mut tile);
            }
        }
    }

    /// Computes and writes the columns of one panel.
    #[inline(always)]
    fn panel<S: Simd, const DOT: bool>(
        &mut self,
        simd: S,
        panel: &QuantPanel<'_>,
        at: Columns,
        tile: &mut Tile<'_, C>,
    ) {
        let block_units = self.shared.block_words * W::lane_units(DOT);
        let (block, totals) = self.room.split_at_mut(block_units * 2 * S::LANES);
        let totals: &mut [f32] = bytemuck::cast_slice_mut(totals);
        let work = Work { shared: self.shared, first: self.first, rows: tile.rows() };
        match self.shared.groups.padded() {
            1 => work.in_registers::<S, W, DOT, 1>(simd, panel, totals),
            2 => work.in_registers::<S, W, DOT, 2>(simd, panel, totals),
            4 => work.in_registers::<S, W, DOT, ROWS_IN_REGISTERS>(simd, panel, totals),
            _ => work.by_blocks::<S, W, DOT>(simd, panel, block, totals),
        }
        for (row, sums) in totals.chunks_exact(2 * S::LANES).take(tile.rows()).enumerate() {
            let bias = self.shared.bias.map(|bias| &bias[at.first..][..2 * S::LANES]);
            let to = &mut tile.row(row)[at.in_tile..][..2 * S::LANES];
            super::write_row(simd, sums, bias, Store::Overwrite, to);
        }
    }
}

/// Where a panel's columns are.
#[derive(Clone, Copy)]
struct Columns {
    first: usize,
    in_tile: usize,
}

/// The rows that meet a panel.
#[derive(Clone, Copy)]
struct Work<'a> {
    shared: &'a Shared<'a>,
    first: usize,
    rows: usize,
}

impl Work<'_> {
    #[inline(always)]
    fn in_registers<S: Simd, W: Stored, const DOT: bool, const ROWS: usize>(
        self,
        simd: S,
        panel: &QuantPanel<'_>,
        totals: &mut [f32],
    ) {
        let mut sums = [[simd.zero(); ROWS]; 2];
        quant_chains::<S, W, DOT, ROWS>(simd, self.shared.left, panel, &mut sums);
        for (vector, sums) in sums.into_iter().enumerate() {
            for (row, sum) in sums.into_iter().enumerate() {
                simd.store(sum, &mut totals[(2 * row + vector) * S::LANES..][..S::LANES]);
            }
        }
    }

    #[inline(always)]
    fn by_blocks<S: Simd, W: Stored, const DOT: bool>(
        self,
        simd: S,
        panel: &QuantPanel<'_>,
        widened: &mut [u32],
        totals: &mut [f32],
    ) {
        let Shared { left, groups, units, .. } = *self.shared;
        let block_units = widened.len() / (2 * S::LANES);
        totals.fill(0.0);
        for block in 0..panel.blocks::<S>() {
            unpack_block::<S, W, DOT>(simd, panel, block, widened);
            let count = panel.words_of::<S>(block) * W::lane_units(DOT);
            let block_of = (&widened[..count * 2 * S::LANES], panel.scales_of(simd, block));
            for group in groups.between(self.first, self.rows) {
                let (row, size) = groups.of(group);
                let left = &left[row * units + block * block_units * size..][..count * size];
                let totals = &mut totals[(row - self.first) * 2 * S::LANES..];
                match size {
                    1 => block_chains::<S, DOT, 1>(simd, left, block_of, totals),
                    2 => block_chains::<S, DOT, 2>(simd, left, block_of, totals),
                    4 => block_chains::<S, DOT, 4>(simd, left, block_of, totals),
                    _ => block_chains::<S, DOT, GROUP_MAX>(simd, left, block_of, totals),
                }
            }
        }
    }
}
