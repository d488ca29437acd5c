//! What this machine can do at most: multiply-adds from registers and bytes read from memory.
//!
//! Reports are fractions of these. They read the clock, so nothing that decides anything may call
//! them; the benchmark command and `examples/gemm_bench.rs` do.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::ffi::Parts;
use crate::pool::Pool;
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Operand type of a peak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeakType {
    /// f32 fused multiply-adds.
    F32,
    /// bf16 products summed in f32: pair dot products where the set has them, else as f32.
    Bf16,
}

/// Steps of one timed stretch, about 0.1 ms: short enough to fall between two time slices.
const PEAK_STEPS: usize = 16_384;
/// Stretches timed per measurement; the fastest counts, because others may share the cores.
const PEAK_TRIES: usize = 60;
/// Bytes read per pass: far more than any third-level cache share.
const BANDWIDTH_BYTES: usize = 256 << 20;
/// Passes per measurement; the fastest counts.
const BANDWIDTH_TRIES: usize = 8;
/// Tasks per thread in a pass, so that a thread that is held up can be helped out.
const TASKS_PER_THREAD: usize = 16;

/// Floating-point operations per second of all threads of the pool, from registers.
pub fn measure_peak(pool: &Pool, isa: Isa, kind: PeakType) -> f64 {
    let dot = kind == PeakType::Bf16 && isa.has_bf16_dot();
    let mut best = Duration::MAX;
    let mut operations = 0;
    for _ in 0..PEAK_TRIES {
        let mut slots = vec![(0, Duration::MAX); pool.threads()];
        let parts = Parts::new(&mut slots, 1);
        pool.run(pool.threads(), |task| {
            let start = Instant::now();
            let operations = dispatch(isa, Spin { dot });
            parts.take(task)[0] = (operations, start.elapsed());
        });
        // Each thread is timed alone, as a late start of one says nothing about its arithmetic.
        let slowest = slots.iter().map(|slot| slot.1).max().expect("a pool has a thread");
        best = best.min(slowest);
        operations = slots.iter().map(|slot| slot.0).sum();
    }
    operations as f64 / best.as_secs_f64()
}

/// Multiply-adds on independent sums, as many as a register tile has.
struct Spin {
    dot: bool,
}

impl Kernel for Spin {
    type Output = usize;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        match S::MICRO_ROWS {
            12.. => self.spin::<S, 24>(simd),
            6.. => self.spin::<S, 12>(simd),
            _ => self.spin::<S, 8>(simd),
        }
    }
}

impl Spin {
    #[inline(always)]
    fn spin<S: Simd, const SUMS: usize>(self, simd: S) -> usize {
        // Pairs of bf16 equal to one, or an f32 near one.
        let value = black_box(f32::from_bits(0x3f80_3f80));
        let (a, b) = (simd.splat(value), simd.splat(value));
        let mut sums = [simd.zero(); SUMS];
        for _ in 0..PEAK_STEPS {
            for sum in &mut sums {
                *sum = if S::BF16_DOT && self.dot {
                    simd.dot_pairs(*sum, a, b)
                } else {
                    simd.fma(a, b, *sum)
                };
            }
        }
        let total = sums.into_iter().fold(simd.zero(), |total, sum| simd.add(total, sum));
        black_box(simd.reduce_sum(total));
        let products = if S::BF16_DOT && self.dot { 2 } else { 1 };
        PEAK_STEPS * SUMS * S::LANES * products * 2
    }
}

/// Bytes per second that all threads of the pool read from memory, in order.
pub fn measure_bandwidth(pool: &Pool, isa: Isa) -> f64 {
    let memory = vec![1.0f32; BANDWIDTH_BYTES / size_of::<f32>()];
    let tasks = pool.threads() * TASKS_PER_THREAD;
    let len = memory.len().div_ceil(tasks);
    let mut best = Duration::MAX;
    for _ in 0..BANDWIDTH_TRIES {
        let start = Instant::now();
        pool.run(tasks, |task| {
            let from = &memory[task * len..];
            black_box(dispatch(isa, Read(&from[..len.min(from.len())])));
        });
        best = best.min(start.elapsed());
    }
    BANDWIDTH_BYTES as f64 / best.as_secs_f64()
}

/// Sums a slice in no meaningful order.
struct Read<'a>(&'a [f32]);

impl Kernel for Read<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.zero(); 8];
        for chunk in self.0.chunks_exact(8 * S::LANES) {
            for (sum, values) in sums.iter_mut().zip(chunk.chunks_exact(S::LANES)) {
                *sum = simd.add(*sum, simd.load(values));
            }
        }
        let total = sums.into_iter().fold(simd.zero(), |total, sum| simd.add(total, sum));
        simd.reduce_sum(total)
    }
}
