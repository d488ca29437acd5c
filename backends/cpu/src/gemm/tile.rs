//! The blocked product: pack the right operand once, then compute tiles of C on all threads.
//!
//! A tile of C is one task. Inside it a right panel stays in the first-level cache while the tile's
//! rows pass, and the tile's rows stay in the second level while the panels pass. Long chains are
//! cut at `CHAIN_UNITS_MAX`, with the f32 sums kept in the thread's scratch between the cuts.

use std::sync::atomic::Ordering;

use super::expect::{self, Expecting, Promise, Weights};
use super::pack::{PackColumns, PackRows, PackRowsAsColumns, Source};
use super::verify::{self, Flip, LeftRows, SumDown, Suspect, Watch};
use super::{DataMut, Layout, MatrixMut, Product, Store, Unit, UnitKind};
use crate::dealing::{Dealing, share};
use crate::ffi::{Grid, Parts, Tile, Tiles};
use crate::pool::{Pool, Tasks};
use crate::scratch::Scratch;
use crate::simd::micro::{LeftUnits, MicroTile, Start, micro_tile};
use crate::simd::{Element, Geometry, Isa, Kernel, Simd, dispatch};
use crate::words::{LaneSums, WordSum};

/// Rows of a task's tile: a multiple of every set's register tile, small enough to share out
/// evenly.
pub(super) const TILE_ROWS: usize = 48;
/// Columns of a task's tile.
const TILE_COLUMNS: usize = 256;
/// Longest stretch of a chain between two visits to the sums: a right panel of this many units is
/// 32 KB with AVX-512, the size of the first-level cache.
const CHAIN_UNITS_MAX: usize = 256;
/// Packed right operand at a time: half of the smallest third-level cache worth tuning for.
const RIGHT_WORDS_MAX: usize = 2 << 20;
/// Packed left operand at a time.
const LEFT_WORDS_MAX: usize = 1 << 20;
/// Rows of C at a time; with `COLUMNS_MAX` it keeps the tiles below `PARTS_MAX`.
const ROWS_MAX: usize = 48 * 64;
/// Columns of C at a time.
const COLUMNS_MAX: usize = 256 * 64;
/// Panels that one packing task takes, so that it reads several cache lines of a row at once.
const PANELS_PER_TASK: usize = 4;
/// Columns of the left operand that one packing task takes: a multiple of every set's panel and of
/// a cache line of any type, so that no line is read by two tasks.
const LEFT_COLUMNS_PER_TASK: usize = 96;

/// The left operand in units.
#[derive(Clone, Copy)]
enum Left<'a> {
    /// Rows of units, `row_bytes` apart: the caller's memory or a converted copy.
    Rows { bytes: &'a [u8], row_bytes: usize },
    /// Panels of `MICRO_ROWS` rows.
    Panels { bytes: &'a [u8], panel_bytes: usize },
}

impl Left<'_> {
    /// The units from (row, unit) on; `row` is a multiple of `micro_rows`.
    #[inline(always)]
    fn at(&self, row: usize, unit: usize, micro_rows: usize) -> LeftUnits<'_> {
        match *self {
            Left::Rows { bytes, row_bytes } => {
                LeftUnits { bytes, start: row * row_bytes + unit * 4, row_bytes, unit_bytes: 4 }
            }
            Left::Panels { bytes, panel_bytes } => LeftUnits {
                bytes,
                start: row / micro_rows * panel_bytes + unit * 4 * micro_rows,
                row_bytes: 4,
                unit_bytes: 4 * micro_rows,
            },
        }
    }
}

/// How the left operand gets into units.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LeftForm {
    /// It is rows of units already.
    InPlace,
    /// It is converted row by row.
    Converted,
    /// It is packed into panels.
    Packed,
}

/// Sizes of the blocks of one product.
struct Blocks {
    rows: usize,
    columns: usize,
    left: LeftForm,
    panel_words: usize,
    left_words: usize,
    right_words: usize,
    chain_units: usize,
    sums_words: usize,
}

impl Blocks {
    fn new<T: Unit>(product: &Product<'_, T>, geometry: Geometry) -> Self {
        let units = product.units;
        let in_place = T::KIND == UnitKind::F32 || (product.dot && product.k.is_multiple_of(2));
        let left = match product.layout {
            Layout::Tn => LeftForm::Packed,
            Layout::Nt | Layout::Panels | Layout::Nn if in_place => LeftForm::InPlace,
            Layout::Nt | Layout::Panels | Layout::Nn => LeftForm::Converted,
        };
        let fitting = |words: usize, step: usize, most: usize, have: usize| {
            (words / units.max(1) / step * step).clamp(step, most).min(have.next_multiple_of(step))
        };
        let columns = fitting(RIGHT_WORDS_MAX, TILE_COLUMNS, COLUMNS_MAX, product.n);
        let rows = match left {
            LeftForm::InPlace => ROWS_MAX.min(product.m.next_multiple_of(TILE_ROWS)),
            _ => fitting(LEFT_WORDS_MAX, TILE_ROWS, ROWS_MAX, product.m),
        };
        let panel_words =
            (units * geometry.micro_rows + geometry.lanes).next_multiple_of(geometry.lanes);
        let left_words = match left {
            LeftForm::InPlace => 0,
            LeftForm::Converted => rows.min(product.m) * units,
            LeftForm::Packed => rows / geometry.micro_rows * panel_words,
        };
        let columns_packed = columns.min(product.n.next_multiple_of(geometry.micro_columns));
        let stretches = units.div_ceil(CHAIN_UNITS_MAX).max(1);
        let micro_words = geometry.micro_rows * geometry.micro_columns;
        let sums_words = if stretches == 1 { micro_words } else { TILE_ROWS * TILE_COLUMNS };
        Self {
            rows,
            columns,
            left,
            panel_words,
            left_words,
            right_words: if product.layout == Layout::Panels { 0 } else { columns_packed * units },
            chain_units: units.div_ceil(stretches),
            sums_words,
        }
    }
}

/// Computes a product by tiles.
pub(super) fn run<T: Unit>(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    product: &Product<'_, T>,
    mut c: MatrixMut<'_>,
    watch: Option<&mut Watch>,
) {
    let blocks = Blocks::new(product, isa.geometry());
    let (threads, n) = (pool.threads(), product.n);
    let bias_words = if product.bias.is_some() { n } else { 0 };
    let [w0, w1, w2, w3] =
        if watch.is_some() { verify::work_words(product) } else { Default::default() };
    let sums_words = blocks.sums_words * threads;
    let words = [blocks.right_words, blocks.left_words, sums_words, bias_words, w0, w1, w2, w3];
    let [right, left, sums, bias, w0, w1, w2, w3] = scratch.words(words);
    let mut check = watch.as_deref().map(|watch| Check::new(product, watch, [w0, w1, w2, w3]));
    let bias: &mut [f32] = bytemuck::cast_slice_mut(bias);
    super::fill_bias(product.bias, bias);
    let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
    for column in (0..n).step_by(blocks.columns) {
        let columns = blocks.columns.min(n - column);
        for row in (0..product.m).step_by(blocks.rows) {
            let rows = blocks.rows.min(product.m - row);
            let block = ((row, column), (rows, columns));
            pack((pool, isa), product, &blocks, block, (&mut *left, &mut *right), &mut check);
            let grid = Grid {
                rows,
                columns,
                row_stride: c.row_stride,
                tile_rows: TILE_ROWS,
                tile_columns: TILE_COLUMNS,
            };
            let right = right_panels(product, column, right);
            let region = Region {
                left: left_units(product, &blocks, row, left),
                right,
                in_place: blocks.left == LeftForm::InPlace,
                units: product.units,
                chain_units: blocks.chain_units,
                dot: product.dot,
                bias: if bias.is_empty() { None } else { Some(&bias[column..][..columns]) },
                store: product.store,
                watch: check.as_ref().map(|check| (check.watch, (row, column))),
            };
            let seen = check.as_mut().map(|check| check.seen(isa, product, block, right));
            let to = c.data.from(row * c.row_stride + column);
            compute((pool, isa), &region, (to, grid), sums, seen);
        }
    }
    let suspects = check.map(|check| check.suspects(product));
    if let (Some(watch), Some(suspects)) = (watch, suspects) {
        watch.suspects = suspects;
    }
}

/// A block of C: its first row and column, and how many there are.
type Block = ((usize, usize), (usize, usize));

/// Brings the operands of a block of C into units, as far as they are not there yet, and sums the
/// rows of a transposed left operand: all that can be done side by side before the product.
fn pack<T: Unit>(
    (pool, isa): (&Pool, Isa),
    product: &Product<'_, T>,
    blocks: &Blocks,
    ((row, column), (rows, columns)): Block,
    (left, right): (&mut [u32], &mut [u32]),
    check: &mut Option<Check<'_>>,
) {
    let watch = check.as_ref().map(|check| check.watch);
    let mut left_rows = check.as_mut().and_then(|check| check.left_rows.take());
    let packing = match row {
        0 => pack_right((pool.threads(), isa), product, (column, columns), right, watch),
        _ => Tasks::none(),
    };
    let telling = watch.filter(|_| column == 0);
    let converting = pack_left(isa, product, blocks, (row, rows), left, telling);
    let summing = match (&mut left_rows, watch) {
        (Some(left_rows), Some(watch)) => left_rows.tasks(isa, product, watch),
        _ => Tasks::none(),
    };
    pool.run_all(&[packing, converting, summing]);
    if let (Some(left_rows), Some(check)) = (left_rows, check) {
        left_rows.weigh(product, &check.weights);
    }
}

/// Packs columns `first..first + count` of B into panels, where they are not kept in panels.
fn pack_right<'t, T: Unit>(
    (threads, isa): (usize, Isa),
    product: &'t Product<'_, T>,
    (first, count): (usize, usize),
    to: &'t mut [u32],
    watch: Option<&'t Watch>,
) -> Tasks<'t> {
    let width = isa.geometry().micro_columns;
    let panel_words = product.units * width;
    if product.layout == Layout::Panels || panel_words == 0 {
        return Tasks::none();
    }
    let per_task = PANELS_PER_TASK.min(count.div_ceil(width).div_ceil(threads));
    let parts = Parts::new(&mut to[..count.div_ceil(width) * panel_words], per_task * panel_words);
    Tasks::new(parts.count(), move |task| {
        let to = parts.take(task);
        let offset = task * per_task * width;
        let from = Source {
            data: product.b,
            stride: product.b_stride,
            first: first + offset,
            count: (per_task * width).min(count - offset),
            k: product.k,
            units: product.units,
            dot: product.dot,
        };
        let along = matches!(product.layout, Layout::Nt | Layout::Panels);
        match along {
            true => dispatch(isa, PackRowsAsColumns { from, to }),
            false => dispatch(isa, PackColumns { from, width, panel_words, to }),
        }
        if let Some(watch) = watch {
            let words = if along { from.words_along(product.k) } else { from.words_across() };
            watch.operand(isa, 1, words);
        }
    })
}

/// The panels of B from column `first` on: those that were packed or those it is kept in.
fn right_panels<'r, T: Unit>(
    product: &'r Product<'_, T>,
    first: usize,
    packed: &'r [u32],
) -> &'r [u32] {
    match product.layout {
        Layout::Panels => &bytemuck::cast_slice(product.b)[first * product.units..],
        _ => packed,
    }
}

/// Brings rows `first..first + count` of A (columns, in TN) into units; what is converted is told.
fn pack_left<'t, T: Unit>(
    isa: Isa,
    product: &'t Product<'_, T>,
    blocks: &Blocks,
    (first, count): (usize, usize),
    to: &'t mut [u32],
    watch: Option<&'t Watch>,
) -> Tasks<'t> {
    let (units, panel_words) = (product.units, blocks.panel_words);
    let source = move |offset: usize, most: usize| Source {
        data: product.a,
        stride: product.a_stride,
        first: first + offset,
        count: most.min(count - offset),
        k: product.k,
        units,
        dot: product.dot,
    };
    match blocks.left {
        _ if units == 0 => Tasks::none(),
        LeftForm::InPlace => Tasks::none(),
        LeftForm::Converted => {
            let parts = Parts::new(&mut to[..count * units], TILE_ROWS * units);
            Tasks::new(parts.count(), move |task| {
                let from = source(task * TILE_ROWS, TILE_ROWS);
                dispatch(isa, PackRows { from, row_words: units, to: parts.take(task) });
                if let Some(watch) = watch {
                    watch.operand(isa, 0, from.words_along(product.k));
                }
            })
        }
        LeftForm::Packed => {
            let width = isa.geometry().micro_rows;
            let per_task = LEFT_COLUMNS_PER_TASK / width;
            let words = count.div_ceil(width) * panel_words;
            let parts = Parts::new(&mut to[..words], per_task * panel_words);
            Tasks::new(parts.count(), move |task| {
                let from = source(task * LEFT_COLUMNS_PER_TASK, LEFT_COLUMNS_PER_TASK);
                let to = parts.take(task);
                dispatch(isa, PackColumns { from, width, panel_words, to });
            })
        }
    }
}

/// Rows of A from `first` on in units: the caller's memory, or what was packed of them.
fn left_units<'a, T: Unit>(
    product: &Product<'a, T>,
    blocks: &Blocks,
    first: usize,
    packed: &'a [u32],
) -> Left<'a> {
    let (a, stride) = (product.a, product.a_stride);
    let bytes = bytemuck::cast_slice(packed);
    match blocks.left {
        LeftForm::InPlace => {
            let bytes = bytemuck::cast_slice(&a[(first * stride).min(a.len())..]);
            Left::Rows { bytes, row_bytes: stride * size_of::<T>() }
        }
        LeftForm::Converted => Left::Rows { bytes, row_bytes: product.units * 4 },
        LeftForm::Packed => Left::Panels { bytes, panel_bytes: blocks.panel_words * 4 },
    }
}

/// The packed operands of a part of C that is computed in one parallel run.
struct Region<'a> {
    left: Left<'a>,
    right: &'a [u32],
    /// The left operand is the caller's memory.
    in_place: bool,
    units: usize,
    chain_units: usize,
    dot: bool,
    bias: Option<&'a [f32]>,
    store: Store,
    /// Who is told of the words, and the region's place in C.
    watch: Option<(&'a Watch, (usize, usize))>,
}

/// What a product's check collects.
struct Check<'a> {
    watch: &'a Watch,
    /// Of A.
    weights: Weights<'a>,
    /// Sums of rows of the left operand, by row of tiles.
    left: Option<Parts<'a, f32>>,
    /// Those of a transposed one, until they are weights.
    left_rows: Option<LeftRows>,
    /// Sums of C's columns within each row of tiles.
    columns: &'a mut [f32],
    /// What each column's sum should be, and the squares of B's columns.
    expected: &'a mut [f32],
}

impl<'a> Check<'a> {
    /// With the memory that `verify::work_words` asks for.
    fn new<T>(
        product: &Product<'_, T>,
        watch: &'a Watch,
        [columns, left, expected, weights]: [&'a mut [u32]; 4],
    ) -> Check<'a> {
        let left = bytemuck::cast_slice_mut(left);
        let parts = product.m.div_ceil(TILE_ROWS);
        Check {
            watch,
            weights: Weights::new(product, parts, weights),
            left: (!left.is_empty()).then(|| Parts::new(left, expect::elements(product))),
            left_rows: (product.layout == Layout::Tn).then(|| LeftRows::new(product.k)),
            columns: bytemuck::cast_slice_mut(columns),
            expected: bytemuck::cast_slice_mut(expected),
        }
    }

    /// What a block of C takes part in; its columns are multiplied with the weights after its last
    /// rows.
    fn seen<'w, T>(
        &'w mut self,
        isa: Isa,
        product: &Product<'_, T>,
        ((row, column), (rows, columns)): Block,
        right: &'w [u32],
    ) -> Seen<'w, 'a> {
        let grid = Grid {
            rows: rows.div_ceil(TILE_ROWS),
            columns,
            row_stride: product.n,
            tile_rows: 1,
            tile_columns: TILE_COLUMNS,
        };
        let first_row = row / TILE_ROWS;
        let (sums, squares) = self.expected.split_at_mut(product.n);
        let expected = [sums, squares].map(|all| &mut all[column..][..columns]);
        let is_last = row + rows == product.m;
        Seen {
            columns: Tiles::new(&mut self.columns[first_row * product.n + column..], grid),
            weights: &self.weights,
            left: self.left.as_ref().filter(|_| column == 0),
            first_row,
            expecting: is_last.then(|| Expecting::new(isa, &self.weights, right, expected)),
        }
    }

    /// The columns that do not add up.
    fn suspects<T>(self, product: &Product<'_, T>) -> Vec<Suspect> {
        verify::compare(product, self.columns, self.expected, &self.weights)
    }
}

/// The sums of a region for its check, tile by tile.
struct Seen<'w, 'a> {
    columns: Tiles<'w, f32>,
    weights: &'w Weights<'a>,
    /// Where the region's first tiles put the sums of the left operand's rows.
    left: Option<&'w Parts<'a, f32>>,
    /// The region's first row of tiles.
    first_row: usize,
    /// What is done after all tiles.
    expecting: Option<Expecting<'w, 'a>>,
}

impl<'w, 'a> Seen<'w, 'a> {
    fn tile(&self, row: usize, column: usize) -> SeenTile<'w, 'a> {
        let part = self.first_row + row;
        let left = self.left.filter(|_| column == 0);
        SeenTile {
            left: left.map(|sums| (self.weights.promise(part), sums.take(part))),
            columns: self.columns.take(row, column),
        }
    }
}

/// The sums of one tile.
struct SeenTile<'w, 'a> {
    columns: Tile<'w, f32>,
    left: Option<(Promise<'w, 'a>, &'a mut [f32])>,
}

/// Computes all tiles of a region, whatever its type.
fn compute(
    (pool, isa): (&Pool, Isa),
    region: &Region<'_>,
    (to, grid): (DataMut<'_>, Grid),
    sums: &mut [f32],
    seen: Option<Seen<'_, '_>>,
) {
    match to {
        DataMut::F32(c) => compute_as(pool, isa, region, Tiles::new(c, grid), grid, sums, seen),
        DataMut::Bf16(c) => compute_as(pool, isa, region, Tiles::new(c, grid), grid, sums, seen),
        DataMut::F16(c) => compute_as(pool, isa, region, Tiles::new(c, grid), grid, sums, seen),
    }
}

/// Computes all tiles of a region.
fn compute_as<C: Element>(
    pool: &Pool,
    isa: Isa,
    region: &Region<'_>,
    tiles: Tiles<'_, C>,
    grid: Grid,
    sums: &mut [f32],
    seen: Option<Seen<'_, '_>>,
) {
    let tile_rows = grid.rows.div_ceil(TILE_ROWS);
    let tile_columns = grid.columns.div_ceil(TILE_COLUMNS);
    let expecting = seen.as_ref().and_then(|seen| seen.expecting.as_ref());
    let workers = pool.threads().min(tile_rows * tile_columns);
    let sums = Parts::new(sums, sums.len() / pool.threads());
    let dealing = Dealing::new(workers);
    let rows_of = |of: usize| share(tile_rows, workers, of);
    pool.run(workers, |worker| {
        let sums = sums.take(worker);
        // A share is some rows of tiles: their part of A stays in the cache from column to column.
        let tiles_of = |of: usize| rows_of(of).len() * tile_columns;
        dealing.take(worker, tiles_of, |of, place| {
            // Neighbouring tasks share their columns, so the right panels stay there as well.
            let rows = rows_of(of);
            let (row, column) = (rows.start + place % rows.len(), place / rows.len());
            let (tile, at) = (tiles.take(row, column), (row * TILE_ROWS, column * TILE_COLUMNS));
            let words = [LaneSums::NONE; 2];
            let mut task = TileTask { region, tile, row: at.0, column: at.1, sums, words };
            match &seen {
                Some(seen) => task.watched(isa, seen.tile(row, column)),
                None => dispatch(isa, Tiling::<_, false> { task: &mut task, seen: &mut [] }),
            }
            if let Some(expecting) = expecting.filter(|_| row + 1 == rows.end) {
                expecting.run_ready(isa, (column + 1) * TILE_COLUMNS);
            }
        });
        if let Some(expecting) = expecting {
            // All tiles are taken now, so what these wait for is on its way.
            expecting.run_rest(isa);
        }
    });
}

/// One tile of C.
struct TileTask<'a, C> {
    region: &'a Region<'a>,
    tile: Tile<'a, C>,
    row: usize,
    column: usize,
    sums: &'a mut [f32],
    /// Sums of a watched tile's words before and after, if it holds words.
    words: [LaneSums; 2],
}

/// Computes a tile; `WATCHED` says whether the sums of its columns are added to `seen`.
struct Tiling<'t, 'a, C, const WATCHED: bool> {
    task: &'t mut TileTask<'a, C>,
    seen: &'t mut [f32],
}

impl<C: Element, const WATCHED: bool> Kernel for Tiling<'_, '_, C, WATCHED> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.task.compute::<S, WATCHED>(simd, self.seen);
    }
}

/// The word sum of a tile as it stands, for elements that fill no word.
struct TileWords<'t, 'a, C>(&'t mut Tile<'a, C>);

impl<C: Element> Kernel for TileWords<'_, '_, C> {
    type Output = u32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u32 {
        let mut sum = WordSum::new(simd);
        for row in 0..self.0.rows() {
            sum.add(simd, bytemuck::cast_slice(self.0.row(row)));
        }
        sum.finish(simd)
    }
}

impl<C: Element> TileTask<'_, C> {
    /// Elements are words, which are summed in registers as they are stored.
    const HOLDS_WORDS: bool = size_of::<C>() == size_of::<u32>();

    /// Computes the tile and the sums of a check. What is summed before and after runs in kernels
    /// of its own: the inner loop is better compiled alone.
    fn watched(&mut self, isa: Isa, mut seen: SeenTile<'_, '_>) {
        let region = self.region;
        let Some((watch, _)) = region.watch else { return };
        let mut before = 0;
        if region.store == Store::Accumulate && !Self::HOLDS_WORDS {
            before = dispatch(isa, TileWords(&mut self.tile));
        }
        let columns = seen.columns.row(0);
        columns.fill(0.0);
        dispatch(isa, Tiling::<_, true> { task: self, seen: columns });
        if let Some((promise, sums)) = seen.left.take() {
            let left = region.left.at(self.row, 0, isa.geometry().micro_rows);
            let rows = self.tile.rows();
            let sum = SumDown { left, rows, dot: region.dot, to: &mut *sums };
            let (squares, words) = dispatch(isa, sum);
            promise.keep(sums, squares);
            // What was converted was told from where it came.
            if region.in_place {
                watch.add_operand(0, || words);
            }
        }
        let [before, stored] = if Self::HOLDS_WORDS {
            self.words.map(|sums| sums.total())
        } else {
            [before, dispatch(isa, TileWords(&mut self.tile))]
        };
        watch.before.fetch_add(before, Ordering::Relaxed);
        watch.stored.fetch_add(stored, Ordering::Relaxed);
    }

    #[inline(always)]
    fn compute<S: Simd, const WATCHED: bool>(&mut self, simd: S, seen: &mut [f32]) {
        let (width, region) = (2 * S::LANES, self.region);
        let units = region.units;
        let micro_words = S::MICRO_ROWS * width;
        let flip = region.watch.and_then(|(watch, first)| Some((watch.asked.flip?, first)));
        let mut unit = 0;
        loop {
            let stretch = region.chain_units.min(units - unit);
            let start = if unit == 0 { Start::Zero } else { Start::Resume };
            let is_last = unit + stretch == units;
            let mut slot = 0;
            for column in (0..self.tile.columns()).step_by(width) {
                let panel = (self.column + column) / width * units * width;
                let right = &region.right[panel + unit * width..][..stretch * width];
                for row in (0..self.tile.rows()).step_by(S::MICRO_ROWS) {
                    let rows = S::MICRO_ROWS.min(self.tile.rows() - row);
                    let left = region.left.at(self.row + row, unit, S::MICRO_ROWS);
                    let sums = &mut self.sums[slot..][..micro_words];
                    let tile = MicroTile { left, right, units: stretch, sums, start };
                    if S::BF16_DOT && region.dot {
                        micro_tile::<S, true>(simd, rows, tile);
                    } else {
                        micro_tile::<S, false>(simd, rows, tile);
                    }
                    if is_last {
                        if let Some(flip) = flip.filter(|_| WATCHED) {
                            self.spoil(flip, (row, rows), (column, slot), width);
                        }
                        let seen = if WATCHED { &mut seen[column..] } else { &mut [] };
                        self.write::<S, WATCHED>(simd, (row, rows), (column, slot), seen);
                    }
                    if stretch < units {
                        slot += micro_words;
                    }
                }
            }
            unit += stretch;
            if unit >= units {
                break;
            }
        }
    }

    /// Flips a bit of a sum if it is in this register tile; `first` is the region's place in C.
    fn spoil(
        &mut self,
        (flip, first): (Flip, (usize, usize)),
        (row, rows): (usize, usize),
        (column, slot): (usize, usize),
        width: usize,
    ) {
        let (row, column) = (first.0 + self.row + row, first.1 + self.column + column);
        let is_here = (row..row + rows).contains(&flip.row)
            && (column..column + width).contains(&flip.column);
        if is_here {
            let sum = &mut self.sums[slot + (flip.row - row) * width + flip.column - column];
            *sum = f32::from_bits(sum.to_bits() ^ 1 << flip.bit);
        }
    }

    /// Rounds the sums of one register tile into C; `WATCHED` says to add them to those of their
    /// columns, even rows and odd ones in a chain each.
    #[inline(always)]
    fn write<S: Simd, const WATCHED: bool>(
        &mut self,
        simd: S,
        (row, rows): (usize, usize),
        (column, slot): (usize, usize),
        seen: &mut [f32],
    ) {
        let width = 2 * S::LANES;
        let columns = width.min(self.tile.columns() - column);
        let bias = self.region.bias.map(|bias| &bias[self.column + column..][..columns]);
        let mut chains = [[simd.zero(); 2]; 2];
        let mut words = [simd.zero(); 2];
        for index in 0..rows {
            let sums = &self.sums[slot + index * width..][..width];
            let to = &mut self.tile.row(row + index)[column..][..columns];
            let told = super::write_row(simd, &sums[..columns], bias, self.region.store, to);
            if WATCHED {
                words = [simd.add_words(words[0], told[0]), simd.add_words(words[1], told[1])];
                // The chain of this row comes first.
                let [mine, other] = chains;
                let left = simd.add(mine[0], simd.load(&sums[..S::LANES]));
                let right = simd.add(mine[1], simd.load(&sums[S::LANES..]));
                chains = [other, [left, right]];
            }
        }
        if WATCHED {
            if Self::HOLDS_WORDS {
                for (sums, words) in self.words.iter_mut().zip(words) {
                    sums.add_lanes(simd, words);
                }
            }
            // Of an even number of rows the even ones' chain is first again.
            let (left, right) = seen.split_at_mut(S::LANES.min(seen.len()));
            for (half, to) in [left, right].into_iter().enumerate() {
                let sum = simd.add(chains[0][half], chains[1][half]);
                simd.store(simd.add(simd.load(to), sum), to);
            }
        }
    }
}
