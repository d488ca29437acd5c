//! Products of few rows with a matrix that is kept in panels, as in serving: panels are streamed
//! from front to back, each met by all rows, a group of them in registers at a time.
//!
//! Nothing is transposed or copied but the few rows themselves, whose units are laid side by side,
//! group by group, so that the inner loop finds them at fixed distances. Chains are those of every
//! other product. Read `prepack.rs` for panels, `simd/panels.rs` for the inner loop.

use super::{DataMut, MatrixMut, Product, Store, Unit};
use crate::ffi::{Grid, PARTS_MAX, Parts, Tile, Tiles};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::panels::{Asks, Runway, panel_chains};
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};
use crate::soon::Ranges;

/// Most rows of a group: with the two vectors of a panel they fill half of the registers.
pub(super) const GROUP_MAX: usize = 8;
/// The same where there are few registers.
const GROUP_MAX_NARROW: usize = 4;
/// Rows of the register tile from which on there are enough registers for large groups.
const MANY_REGISTERS: usize = 8;
/// Bytes of a unit.
pub(crate) const WORD: usize = size_of::<u32>();
/// Rounds in which panels are shared out.
const ROUNDS: usize = 5;

/// How rows are taken together.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    rows: usize,
    most: usize,
}

impl Groups {
    pub fn new(isa: Isa, rows: usize) -> Groups {
        let many = isa.geometry().micro_rows >= MANY_REGISTERS;
        Groups { rows, most: if many { GROUP_MAX } else { GROUP_MAX_NARROW } }
    }

    /// How many groups there are.
    pub fn count(self) -> usize {
        self.rows.div_ceil(self.most)
    }

    /// The first row of a group and its size, filled up to a power of two.
    pub fn of(self, group: usize) -> (usize, usize) {
        let first = group * self.most;
        (first, self.most.min(self.rows - first).next_power_of_two())
    }

    /// Rows that there are.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// The groups of some rows from `first` on, which begins one.
    pub fn between(self, first: usize, rows: usize) -> std::ops::Range<usize> {
        first / self.most..(first + rows).div_ceil(self.most)
    }

    /// Rows of all groups, filled up.
    pub fn padded(self) -> usize {
        let (first, size) = self.of(self.count() - 1);
        first + size
    }
}

/// Units of a row that are moved together: a cache line.
const UNITS_TOGETHER: usize = 16;

/// Lays units of rows side by side, group by group, with zeros where rows end. `raw` says that the
/// rows' memory is units already.
pub(super) fn pack_left<T: Unit>(
    pool: &Pool,
    (rows, stride, raw): (&[T], usize, bool),
    groups: Groups,
    units: usize,
    to: &mut [u32],
) {
    let per_group = groups.most.min(groups.padded()) * units;
    let together = groups.count().div_ceil(PARTS_MAX);
    let parts = Parts::new(to, (together * per_group).max(1));
    pool.run(parts.count(), |part| {
        for (index, to) in parts.take(part).chunks_mut(per_group).enumerate() {
            let (first, size) = groups.of(part * together + index);
            for (line, to) in to.chunks_mut(UNITS_TOGETHER * size).enumerate() {
                for row in 0..size {
                    let places = to.iter_mut().skip(row).step_by(size);
                    if first + row >= groups.rows {
                        places.for_each(|to| *to = 0);
                        continue;
                    }
                    let row = &rows[(first + row) * stride..];
                    place_units(row, line * UNITS_TOGETHER, raw, places);
                }
            }
        }
    });
}

/// Puts a row's units from unit `first` on into places.
fn place_units<'t, T: Unit>(
    row: &[T],
    first: usize,
    raw: bool,
    places: impl Iterator<Item = &'t mut u32>,
) {
    if raw {
        let bytes: &[u8] = bytemuck::cast_slice(row);
        places.zip(bytes[first * WORD..].chunks_exact(WORD)).for_each(|(to, word)| {
            *to = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        });
        return;
    }
    places.zip(&row[first..]).for_each(|(to, value)| *to = value.to_f32().to_bits());
}

/// The panels of a matrix as they are shared out: in rounds, each of half of what is left and the
/// last of all of it, a part for every thread. So threads read long stretches as long as there is
/// much, and end together.
#[derive(Clone, Copy)]
pub(crate) struct Shares {
    /// Panels of a granule.
    pub granule: usize,
    /// Tasks there are.
    pub tasks: usize,
    granules: usize,
    threads: usize,
}

impl Shares {
    pub fn new(pool: &Pool, panels: usize) -> Shares {
        let granule = panels.div_ceil(PARTS_MAX).max(1);
        let threads = pool.threads();
        Shares { granule, tasks: threads * ROUNDS, granules: panels.div_ceil(granule), threads }
    }

    /// The granules before a task.
    fn before(self, task: usize) -> usize {
        let (round, part) = (task / self.threads, task % self.threads);
        let done = |round: usize| match round {
            ROUNDS => self.granules,
            _ => self.granules - (self.granules >> round),
        };
        match part {
            0 => done(round),
            _ => done(round) + part * (done(round + 1) - done(round)) / self.threads,
        }
    }

    /// The granules of a task; there may be none.
    pub fn of(self, task: usize) -> std::ops::Range<usize> {
        self.before(task)..self.before(task + 1)
    }

    /// Where the first round's tasks begin, for those who foresee them.
    pub fn ranges(self, panel_bytes: usize) -> Ranges {
        let piece_bytes = self.granule * panel_bytes;
        Ranges { pieces: self.before(self.threads), piece_bytes, count: self.threads }
    }

    /// What lies ahead of a task in the memory of the panels.
    pub fn runway(self, pool: &Pool, memory: &[u8], panel_bytes: usize, task: usize) -> Runway {
        let granule_bytes = self.granule * panel_bytes;
        let end = (self.of(task).end * granule_bytes).min(memory.len());
        // This thread's next task, as long as threads take turns; then the next product's.
        let later = task + pool.threads();
        let after = if later < self.tasks && !self.of(later).is_empty() {
            Some(memory[self.of(later).start * granule_bytes..].as_ptr())
        } else {
            pool.soon().at(task % self.threads)
        };
        Runway::new(memory[end..].as_ptr(), after)
    }
}

/// Computes a product of few rows with panels.
pub(super) fn run<T: Unit>(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    product: &Product<'_, T>,
    mut c: MatrixMut<'_>,
) {
    let (m, n, units) = (product.m, product.n, product.units);
    let groups = Groups::new(isa, m);
    let bias_words = if product.bias.is_some() { n } else { 0 };
    let [left, bias] = scratch.words([groups.padded() * units, bias_words]);
    let bias: &mut [f32] = bytemuck::cast_slice_mut(bias);
    super::fill_bias(product.bias, bias);
    pack_left(pool, (product.a, product.a_stride, true), groups, units, left);
    let width = isa.geometry().micro_columns;
    let shares = Shares::new(pool, n / width);
    let tile_columns = shares.granule * width;
    let grid = Grid { rows: m, columns: n, row_stride: c.row_stride, tile_rows: m, tile_columns };
    let shared = Shared {
        left: bytemuck::cast_slice(left),
        groups,
        right: bytemuck::cast_slice(&product.b[..n * product.k]),
        units,
        dot: product.dot,
        bias: if bias.is_empty() { None } else { Some(bias) },
        store: product.store,
        shares,
    };
    match c.data.from(0) {
        DataMut::F32(c) => stream(pool, isa, &shared, Tiles::new(c, grid)),
        DataMut::Bf16(c) => stream(pool, isa, &shared, Tiles::new(c, grid)),
        DataMut::F16(c) => stream(pool, isa, &shared, Tiles::new(c, grid)),
    }
}

/// What all tasks share.
struct Shared<'a> {
    /// The rows' units, group by group.
    left: &'a [f32],
    groups: Groups,
    /// Panels.
    right: &'a [u32],
    units: usize,
    dot: bool,
    bias: Option<&'a [f32]>,
    store: Store,
    shares: Shares,
}

fn stream<C: Element>(pool: &Pool, isa: Isa, shared: &Shared<'_>, tiles: Tiles<'_, C>) {
    let panel_bytes = shared.units * isa.geometry().micro_columns * WORD;
    pool.run_in_turn(shared.shares.tasks, |task| {
        let memory = bytemuck::cast_slice(shared.right);
        let runway = shared.shares.runway(pool, memory, panel_bytes, task);
        dispatch(isa, Task { shared, tiles: &tiles, task, runway });
    });
}

/// Some granules of C's columns.
struct Task<'a, 't, C> {
    shared: &'a Shared<'a>,
    tiles: &'a Tiles<'t, C>,
    task: usize,
    runway: Runway,
}

impl<C: Element> Kernel for Task<'_, '_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::BF16_DOT && self.shared.dot {
            self.panels::<S, true>(simd);
        } else {
            self.panels::<S, false>(simd);
        }
    }
}

impl<C: Element> Task<'_, '_, C> {
    #[inline(always)]
    fn panels<S: Simd, const DOT: bool>(self, simd: S) {
        let Shared { shares, groups, .. } = *self.shared;
        let panels = self.shared.right.len() / (self.shared.units * 2 * S::LANES).max(1);
        for granule in shares.of(self.task) {
            let mut tile = self.tiles.take(0, granule);
            let first = granule * shares.granule;
            for panel in first..(first + shares.granule).min(panels) {
                let column = (panel - first) * 2 * S::LANES;
                for group in 0..groups.count() {
                    let (row, size) = groups.of(group);
                    let at = Place { panel, group, row, column };
                    match size {
                        1 => self.group::<S, DOT, 1>(simd, at, &mut tile),
                        2 => self.group::<S, DOT, 2>(simd, at, &mut tile),
                        4 => self.group::<S, DOT, 4>(simd, at, &mut tile),
                        _ => self.group::<S, DOT, GROUP_MAX>(simd, at, &mut tile),
                    }
                }
            }
        }
    }

    /// A group of rows and a panel.
    #[inline(always)]
    fn group<S: Simd, const DOT: bool, const ROWS: usize>(
        &self,
        simd: S,
        at: Place,
        tile: &mut Tile<'_, C>,
    ) {
        let Shared { left, right, units, bias, store, groups, .. } = *self.shared;
        let panel_words = units * 2 * S::LANES;
        let right = &right[at.panel * panel_words..][..panel_words];
        let left = &left[at.row * units..][..ROWS * units];
        let asks = Asks::of_group(self.runway, (at.group, groups.count()), right);
        let mut sums = [[simd.zero(); 2]; ROWS];
        panel_chains::<S, DOT, ROWS>(simd, left, right, asks, &mut sums);
        for (row, sums) in sums.into_iter().enumerate().take(groups.rows - at.row) {
            for (vector, sums) in sums.into_iter().enumerate() {
                let first = at.panel * 2 * S::LANES + vector * S::LANES;
                let bias = bias.map(|bias| &bias[first..][..S::LANES]);
                let to = &mut tile.row(at.row + row)[at.column + vector * S::LANES..][..S::LANES];
                super::write_vector(simd, sums, bias, store, to);
            }
        }
    }
}

/// Where a group of rows meets a panel.
#[derive(Clone, Copy)]
struct Place {
    panel: usize,
    group: usize,
    /// The group's first row.
    row: usize,
    /// The panel's first column in its tile.
    column: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panel_is_shared_out_once_and_the_last_shares_are_small() {
        for threads in 1..4 {
            let pool = Pool::new(threads);
            for panels in [1, 2, 4, 16, 43, 256, 4748, 3 * PARTS_MAX + 1] {
                let shares = Shares::new(&pool, panels);
                let mut next = 0;
                for task in 0..shares.tasks {
                    assert_eq!(shares.of(task).start, next, "{panels} panels, task {task}");
                    next = shares.of(task).end;
                }
                let granules = panels.div_ceil(shares.granule);
                assert_eq!(next, granules);
                let last = shares.of(shares.tasks - 1).len();
                assert!(last <= granules.div_ceil(threads << (ROUNDS - 1)), "{last} of {granules}");
            }
        }
    }
}
