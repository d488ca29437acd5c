//! What the sums of a product's columns should be: A's column sums times B.
//!
//! The tasks of a product hand in A's sums as they finish them, and whoever hands in the last makes
//! weights of them; the same parallel run multiplies those with B's panels, at its end or, where B
//! is large, while each block of columns is near. So no thread waits for another longer than the
//! product itself makes it wait. Read next: `verify.rs`, which compares.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Product;
use crate::ffi::{PARTS_MAX, Parts};
use crate::pool::pause;
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Parts of a weight where units are bf16 pairs: each has the upper bits of what the ones before
/// left, rounded. What two of them lose is lost in the limit of chains as long as [`LONG_CHAIN`];
/// three are an f32 to the last bit.
pub(super) const SPLITS_MAX: usize = 3;
/// The parts for a chain of at least [`LONG_CHAIN`].
const SPLITS_OF_LONG: usize = 2;
/// The error of two parts is about 2^-19 |weights| |column| / sqrt(k), the limit at least
/// 2^-25 |weights| |column| sqrt(k).
const LONG_CHAIN: usize = 256;
/// Panels that one task multiplies.
const PANELS_PER_TASK: usize = 4;
/// Words of panels that may wait until all tiles are done: they are still in a near cache then, and
/// threads that come to the end at different times share what is left.
const NEAR_WORDS: usize = 512 << 10;
/// Units whose sums go on side by side, to hide one another's latency.
const ABREAST: usize = 2;

/// Elements of the chain, a missing half of a last pair included.
pub(super) fn elements<T>(product: &Product<'_, T>) -> usize {
    if product.dot { 2 * product.units } else { product.units }
}

/// A's sums on their way to become weights. Pairs have the sums of even elements first, then those
/// of odd ones.
pub(super) struct Weights<'a> {
    k: usize,
    units: usize,
    dot: bool,
    pending: Mutex<Pending<'a>>,
    ready: OnceLock<Ready<'a>>,
    given_up: AtomicBool,
}

/// What is not all there yet.
struct Pending<'a> {
    /// By row of tiles: sums, and the sum of squares.
    parts: Vec<Option<(&'a [f32], f32)>>,
    missing: usize,
    rows: Option<&'a mut [u32]>,
}

/// A's sums as rows of units.
pub(super) struct Ready<'a> {
    rows: &'a [u32],
    /// The sum of A's squares.
    pub left_squares: f64,
    /// The sum of the squares of A's sums.
    pub sum_squares: f64,
}

impl<'a> Weights<'a> {
    /// Of a product whose A is summed in so many parts; `rows` has [`SPLITS_MAX`] rows of units.
    pub fn new<T>(product: &Product<'_, T>, parts: usize, rows: &'a mut [u32]) -> Weights<'a> {
        Weights {
            k: product.k,
            units: product.units,
            dot: product.dot,
            pending: Mutex::new(Pending {
                parts: vec![None; parts],
                missing: parts,
                rows: Some(rows),
            }),
            ready: OnceLock::new(),
            given_up: AtomicBool::new(false),
        }
    }

    /// A task's promise to hand in a part.
    pub fn promise<'w>(&'w self, part: usize) -> Promise<'w, 'a> {
        Promise { weights: self, part, kept: false }
    }

    /// All of A's sums at once.
    pub fn set(&self, sums: Vec<f32>, left_squares: f64) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rows) = pending.rows.take() {
            let _ = self.ready.set(self.weigh(sums, left_squares, rows));
        }
    }

    /// The weights, if they are there.
    pub fn ready(&self) -> Option<&Ready<'a>> {
        self.ready.get()
    }

    fn hand_in(&self, part: usize, sums: &'a [f32], squares: f32) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.parts[part] = Some((sums, squares));
        pending.missing -= 1;
        if pending.missing > 0 {
            return;
        }
        let mut total = vec![0.0_f32; sums.len()];
        let mut left_squares = 0.0;
        for (sums, squares) in pending.parts.iter().flatten() {
            total.iter_mut().zip(*sums).for_each(|(total, sum)| *total += sum);
            left_squares += f64::from(*squares);
        }
        drop(pending);
        self.set(total, left_squares);
    }

    /// Writes A's sums as rows of units.
    fn weigh(&self, mut sums: Vec<f32>, left_squares: f64, rows: &'a mut [u32]) -> Ready<'a> {
        let sum_squares = sums.iter().map(|sum| f64::from(*sum).powi(2)).sum();
        if !self.dot {
            rows[..self.units].copy_from_slice(bytemuck::cast_slice(&sums));
            return Ready { rows, left_squares, sum_squares };
        }
        // The upper half, rounded; what is left is exact.
        let cut = |rest: &mut f32| {
            let part = rest.to_bits().wrapping_add(0x8000) & 0xffff_0000;
            *rest -= f32::from_bits(part);
            part
        };
        let (even, odd) = sums.split_at_mut(self.units);
        for row in rows.chunks_exact_mut(self.units.max(1)).take(splits(self.k)) {
            for ((to, even), odd) in row.iter_mut().zip(&mut *even).zip(&mut *odd) {
                *to = cut(odd) | cut(even) >> 16;
            }
        }
        Ready { rows, left_squares, sum_squares }
    }

    /// Waits for the weights; nothing if whoever promised them failed.
    fn wait(&self) -> Option<&Ready<'a>> {
        let mut polls = 0;
        loop {
            if let Some(ready) = self.ready() {
                return Some(ready);
            }
            if self.given_up.load(Ordering::Acquire) {
                return None;
            }
            pause(polls);
            polls += 1;
        }
    }
}

/// Parts of the weights of a chain of k.
fn splits(k: usize) -> usize {
    if k < LONG_CHAIN { SPLITS_MAX } else { SPLITS_OF_LONG }
}

/// A task's promise of a part of A's sums. A task that panics breaks it, so that nobody waits for
/// ever.
pub(super) struct Promise<'w, 'a> {
    weights: &'w Weights<'a>,
    part: usize,
    kept: bool,
}

impl<'a> Promise<'_, 'a> {
    /// Hands in the sums and the sum of squares.
    pub fn keep(mut self, sums: &'a [f32], squares: f32) {
        self.weights.hand_in(self.part, sums, squares);
        self.kept = true;
    }
}

impl Drop for Promise<'_, '_> {
    fn drop(&mut self) {
        if !self.kept {
            self.weights.given_up.store(true, Ordering::Release);
        }
    }
}

/// The tasks that multiply the weights with the packed panels of some columns: best soon after the
/// product used them, as a large operand fits no cache. The rest may wait for promises, so it must
/// come after the tasks that made them.
pub(super) struct Expecting<'w, 'a> {
    weights: &'w Weights<'a>,
    right: &'w [u32],
    /// Panels of a task.
    per_task: usize,
    panel_columns: usize,
    /// Which tasks are somebody's.
    claimed: Vec<AtomicBool>,
    sums: Parts<'w, f32>,
    squares: Parts<'w, f32>,
}

impl<'w, 'a> Expecting<'w, 'a> {
    /// For as many columns as there is room for: for what each column's sum should be, and for the
    /// squares of B's column.
    pub fn new(
        isa: Isa,
        weights: &'w Weights<'a>,
        right: &'w [u32],
        [sums, squares]: [&'w mut [f32]; 2],
    ) -> Expecting<'w, 'a> {
        let panel_columns = isa.geometry().micro_columns;
        let per_task = PANELS_PER_TASK.max(sums.len().div_ceil(panel_columns * PARTS_MAX));
        if weights.units == 0 {
            sums.fill(0.0);
            squares.fill(0.0);
        }
        let sums = Parts::new(sums, per_task * panel_columns);
        let tasks = if weights.units == 0 { 0 } else { sums.count() };
        Expecting {
            weights,
            right,
            per_task,
            panel_columns,
            claimed: (0..tasks).map(|_| AtomicBool::new(false)).collect(),
            sums,
            squares: Parts::new(squares, per_task * panel_columns),
        }
    }

    /// Does what nobody has claimed of the first columns, whose panels were just used, if that is
    /// better done early and the weights are there already.
    pub fn run_ready(&self, isa: Isa, columns: usize) {
        if self.right.len() > NEAR_WORDS && self.weights.ready().is_some() {
            self.run_first(isa, columns.div_ceil(self.per_task * self.panel_columns));
        }
    }

    /// Does what nobody has claimed; waits for the weights.
    pub fn run_rest(&self, isa: Isa) {
        self.run_first(isa, self.claimed.len());
    }

    fn run_first(&self, isa: Isa, count: usize) {
        for (task, claimed) in self.claimed.iter().enumerate().take(count) {
            if !claimed.swap(true, Ordering::Relaxed) {
                self.run(isa, task);
            }
        }
    }

    fn run(&self, isa: Isa, task: usize) {
        let Some(ready) = self.weights.wait() else { return };
        let (sums, squares) = (self.sums.take(task), self.squares.take(task));
        let Weights { k, units, dot, .. } = *self.weights;
        let panel_words = units * self.panel_columns;
        let words = sums.len().div_ceil(self.panel_columns) * panel_words;
        let right = &self.right[task * self.per_task * panel_words..][..words];
        dispatch(isa, Weighted { right, weights: ready.rows, k, units, dot, sums, squares });
    }
}

/// Panels of the packed right operand, times A's sums.
struct Weighted<'a> {
    right: &'a [u32],
    weights: &'a [u32],
    k: usize,
    units: usize,
    dot: bool,
    sums: &'a mut [f32],
    squares: &'a mut [f32],
}

impl Kernel for Weighted<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if !(S::BF16_DOT && self.dot) {
            self.sum::<S, false, 1>(simd);
        } else if splits(self.k) == SPLITS_MAX {
            self.sum::<S, true, SPLITS_MAX>(simd);
        } else {
            self.sum::<S, true, SPLITS_OF_LONG>(simd);
        }
    }
}

impl Weighted<'_> {
    #[inline(always)]
    fn sum<S: Simd, const DOT: bool, const SPLITS: usize>(self, simd: S) {
        let width = 2 * S::LANES;
        let weights: &[f32] = bytemuck::cast_slice(self.weights);
        let weights: [&[f32]; SPLITS] =
            std::array::from_fn(|split| &weights[split * self.units..][..self.units]);
        let right: &[f32] = bytemuck::cast_slice(self.right);
        let panels = right.chunks_exact((self.units * width).max(1));
        let results = self.sums.chunks_mut(width).zip(self.squares.chunks_mut(width));
        for (panel, (to_sums, to_squares)) in panels.zip(results) {
            let mut chains = [WeightedChain::<S::F32, SPLITS>::new(simd.zero()); ABREAST];
            for (group, values) in panel.chunks(ABREAST * width).enumerate() {
                for (place, chain) in chains.iter_mut().enumerate().take(values.len() / width) {
                    let unit = ABREAST * group + place;
                    let values = &values[place * width..][..width];
                    let values = [simd.load(&values[..S::LANES]), simd.load(&values[S::LANES..])];
                    let weights = weights.map(|weights| simd.splat(weights[unit]));
                    chain.add::<S, DOT>(simd, values, weights);
                }
            }
            let [first, second] = chains;
            for half in 0..2 {
                let at = (half * S::LANES).min(to_sums.len());
                let end = (at + S::LANES).min(to_sums.len());
                // The smallest part first.
                let mut sum = simd.zero();
                for split in (0..SPLITS).rev() {
                    sum = simd.add(sum, second.sums[split][half]);
                    sum = simd.add(sum, first.sums[split][half]);
                }
                simd.store(sum, &mut to_sums[at..end]);
                let squares = simd.add(first.squares[half], second.squares[half]);
                simd.store(squares, &mut to_squares[at..end]);
            }
        }
    }
}

/// Sums of a panel's columns, times each part of the weights, and their squares.
#[derive(Clone, Copy)]
struct WeightedChain<V, const SPLITS: usize> {
    sums: [[V; 2]; SPLITS],
    squares: [V; 2],
}

impl<V: Copy, const SPLITS: usize> WeightedChain<V, SPLITS> {
    #[inline(always)]
    fn new(zero: V) -> Self {
        WeightedChain { sums: [[zero; 2]; SPLITS], squares: [zero; 2] }
    }

    /// Adds a unit of all columns.
    #[inline(always)]
    fn add<S: Simd<F32 = V>, const DOT: bool>(
        &mut self,
        simd: S,
        values: [V; 2],
        weights: [V; SPLITS],
    ) {
        let multiply_add = |sum, a, b| {
            if DOT { simd.dot_pairs(sum, a, b) } else { simd.fma(a, b, sum) }
        };
        for (half, value) in values.into_iter().enumerate() {
            for (sums, weight) in self.sums.iter_mut().zip(weights) {
                sums[half] = multiply_add(sums[half], weight, value);
            }
            self.squares[half] = multiply_add(self.squares[half], value, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::gemm::{Layout, Store};
    use crate::pool::Pool;

    fn product() -> Product<'static, f32> {
        Product {
            layout: Layout::Nt,
            m: 2,
            n: 1,
            k: 2,
            units: 2,
            dot: false,
            a: &[],
            a_stride: 2,
            b: &[],
            b_stride: 2,
            bias: None,
            store: Store::Overwrite,
        }
    }

    #[test]
    fn the_last_part_that_is_handed_in_makes_the_weights() {
        let (product, mut rows) = (product(), [0; 6]);
        let weights = Weights::new(&product, 2, &mut rows);
        weights.promise(1).keep(&[1.0, 2.0], 5.0);
        assert!(weights.ready().is_none());
        weights.promise(0).keep(&[0.5, 4.0], 16.25);
        let ready = weights.ready().expect("all parts are there");
        assert_eq!(ready.rows[..2], [1.5_f32, 6.0].map(f32::to_bits));
        assert_eq!((ready.left_squares, ready.sum_squares), (21.25, 38.25));
    }

    #[test]
    fn nobody_waits_for_a_task_that_failed() {
        let (product, mut rows) = (product(), [0; 6]);
        let weights = Weights::new(&product, 1, &mut rows);
        let failed = catch_unwind(AssertUnwindSafe(|| {
            Pool::new(2).run(2, |task| match task {
                0 => {
                    let _promise = weights.promise(0);
                    panic!("the task that promised");
                }
                _ => assert!(weights.wait().is_none()),
            });
        }));
        let payload = failed.expect_err("the first task panicked");
        assert_eq!(payload.downcast_ref(), Some(&"the task that promised"));
    }
}
