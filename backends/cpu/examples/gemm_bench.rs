//! Prints the speed of matrix products against the machine's measured peaks.
//!
//! Run with `cargo run --release -p pontoon-cpu --example gemm_bench [-- MODE [THREADS]]`, MODE one
//! of `all`, `gemm`, `gemv`, `quant`, `pool`. Times are the best of many runs, because others may
//! share the cores. Results are not checked here: `gemm/tests.rs` does that.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use half::bf16;
use pontoon_cpu::gemm::{
    Data, DataMut, GemmArgs, Integers, Layout, Matrix, MatrixMut, QuantArgs, Store, gemm,
    quant_gemm,
};
use pontoon_cpu::peak::{PeakType, measure_bandwidth, measure_peak};
use pontoon_cpu::pool::Pool;
use pontoon_cpu::scratch::Scratch;
use pontoon_cpu::simd::Isa;

/// Rows, columns and length of the sums: m, n, k.
type Shape = (usize, usize, usize);

/// The shapes of the three layouts in a step of a 30M-parameter model with 2048 tokens.
const SHAPES: [(Layout, [Shape; 4]); 3] = [
    (Layout::Nt, [(2048, 512, 512), (2048, 1376, 512), (2048, 512, 1376), (2048, 8192, 512)]),
    (Layout::Nn, [(2048, 512, 512), (2048, 512, 1376), (2048, 1376, 512), (2048, 512, 8192)]),
    (Layout::Tn, [(512, 512, 2048), (1376, 512, 2048), (512, 1376, 2048), (8192, 512, 2048)]),
];
/// Weight shapes (n, k) of a decode step.
const VECTOR_SHAPES: [(usize, usize); 4] = [(512, 1376), (1376, 512), (2048, 2048), (8192, 512)];
/// Sequences decoded together, and the tokens of a prompt.
const ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 65, 512];
/// Time spent on each shape.
const TIME_PER_SHAPE: Duration = Duration::from_millis(350);
/// Weights to rotate over, so that they come from memory.
const ROTATED_BYTES: usize = 160 << 20;

struct Bench {
    pool: Pool,
    isa: Isa,
    scratch: Scratch,
    floats: Vec<f32>,
    brains: Vec<bf16>,
}

impl Bench {
    fn best(&mut self, mut run: impl FnMut(&mut Self)) -> Duration {
        let (begin, mut best) = (Instant::now(), Duration::MAX);
        while begin.elapsed() < TIME_PER_SHAPE {
            let start = Instant::now();
            run(self);
            best = best.min(start.elapsed());
        }
        best
    }

    fn gemm(&mut self, kind: PeakType, layout: Layout, (m, n, k): Shape) -> f64 {
        let (a_stride, b_stride) = match layout {
            Layout::Nt | Layout::Panels => (k, k),
            Layout::Nn => (k, n),
            Layout::Tn => (m, n),
        };
        let mut c32 = vec![0.0f32; m * n];
        let mut c16 = vec![bf16::ZERO; m * n];
        let time = self.best(|bench| {
            let (data, c) = match kind {
                PeakType::F32 => (Data::F32(&bench.floats), DataMut::F32(&mut c32)),
                // Weight gradients are summed in f32.
                PeakType::Bf16 if layout == Layout::Tn => {
                    (Data::Bf16(&bench.brains), DataMut::F32(&mut c32))
                }
                PeakType::Bf16 => (Data::Bf16(&bench.brains), DataMut::Bf16(&mut c16)),
            };
            let args = GemmArgs {
                layout,
                m,
                n,
                k,
                a: Matrix { data, row_stride: a_stride },
                b: Matrix { data: data.from(m * k), row_stride: b_stride },
                bias: None,
                c: MatrixMut { data: c, row_stride: n },
                store: Store::Overwrite,
            };
            gemm(&bench.pool, bench.isa, &mut bench.scratch, args);
        });
        2.0 * (m * n * k) as f64 / time.as_secs_f64()
    }

    /// Bytes of weights per second over several turns through all of them.
    fn gemv(&mut self, rows: usize, (n, k): (usize, usize)) -> f64 {
        let count = ROTATED_BYTES / (n * k * 2);
        let mut c = vec![bf16::ZERO; rows * n];
        let time = self.best(|bench| {
            for index in 0..count {
                let weights = Data::Bf16(&bench.brains[index * n * k..]);
                let args = GemmArgs {
                    layout: Layout::Nt,
                    m: rows,
                    n,
                    k,
                    a: Matrix { data: Data::Bf16(&bench.brains), row_stride: k },
                    b: Matrix { data: weights, row_stride: k },
                    bias: None,
                    c: MatrixMut { data: DataMut::Bf16(&mut c), row_stride: n },
                    store: Store::Overwrite,
                };
                gemm(&bench.pool, bench.isa, &mut bench.scratch, args);
            }
        });
        (count * n * k * 2) as f64 / time.as_secs_f64()
    }

    /// The same with integers of 8 or 4 bits and a scale per group.
    fn quant(&mut self, rows: usize, (n, k): (usize, usize), integers: Integers) -> f64 {
        let (block, row_bytes) = match integers {
            Integers::Bytes => (64, k),
            Integers::HalfBytes => (32, k / 2),
        };
        let scale_bytes = n * k.div_ceil(block) * 4;
        let matrix_bytes = n * row_bytes + scale_bytes;
        let count = ROTATED_BYTES / matrix_bytes;
        let mut c = vec![bf16::ZERO; rows * n];
        let memory: Vec<u8> = (0..ROTATED_BYTES).map(|index| (index % 251) as u8 / 2).collect();
        let time = self.best(|bench| {
            for index in 0..count {
                let here = &memory[index * matrix_bytes / 4 * 4..];
                let args = QuantArgs {
                    m: rows,
                    n,
                    k,
                    x: Matrix { data: Data::Bf16(&bench.brains), row_stride: k },
                    integers,
                    weight: &here[..n * row_bytes],
                    scales: bytemuck::cast_slice(&here[n * row_bytes..][..scale_bytes]),
                    block,
                    panels: false,
                    bias: None,
                    c: MatrixMut { data: DataMut::Bf16(&mut c), row_stride: n },
                };
                quant_gemm(&bench.pool, bench.isa, &mut bench.scratch, args);
            }
        });
        (count * matrix_bytes) as f64 / time.as_secs_f64()
    }

    fn print_gemm(&mut self) {
        for kind in [PeakType::F32, PeakType::Bf16] {
            let peak = measure_peak(&self.pool, self.isa, kind);
            println!("{kind:?}: register peak {:.0} GFLOP/s", peak / 1e9);
            for (layout, shapes) in SHAPES {
                for shape in shapes {
                    let speed = self.gemm(kind, layout, shape);
                    println!(
                        "  {layout:?} m {:5} n {:5} k {:5}  {:6.1} GFLOP/s  {:5.1}%",
                        shape.0,
                        shape.1,
                        shape.2,
                        speed / 1e9,
                        100.0 * speed / peak
                    );
                }
            }
        }
    }

    fn print_gemv(&mut self) {
        let peak = measure_bandwidth(&self.pool, self.isa);
        println!("read bandwidth {:.1} GB/s", peak / 1e9);
        for rows in ROWS {
            for shape in VECTOR_SHAPES {
                let speed = self.gemv(rows, shape);
                print_vector("bf16", rows, shape, (speed, peak), 2.0);
            }
        }
    }

    fn print_quant(&mut self) {
        let peak = measure_bandwidth(&self.pool, self.isa);
        println!("read bandwidth {:.1} GB/s", peak / 1e9);
        let widths = [(Integers::Bytes, 1.0625, "int8"), (Integers::HalfBytes, 0.625, "int4")];
        for (integers, bytes, name) in widths {
            for rows in ROWS {
                for shape in VECTOR_SHAPES {
                    let speed = self.quant(rows, shape, integers);
                    print_vector(name, rows, shape, (speed, peak), bytes);
                }
            }
        }
    }

    fn print_pool(&mut self) {
        const RUNS: u32 = 1000;
        let threads = self.pool.threads();
        let time = self.best(|bench| {
            for _ in 0..RUNS {
                // Each task waits for the others, so that no thread can do the work of two.
                let arrived = AtomicUsize::new(0);
                bench.pool.run(threads, |_| {
                    arrived.fetch_add(1, Ordering::Relaxed);
                    while arrived.load(Ordering::Relaxed) < threads {
                        std::hint::spin_loop();
                    }
                });
            }
        });
        println!(
            "parallel run that all threads join: {:.2} us",
            time.as_secs_f64() * 1e6 / f64::from(RUNS)
        );
    }
}

/// One line: bytes of weights per second, and the arithmetic that is done with them.
fn print_vector(
    name: &str,
    rows: usize,
    shape: (usize, usize),
    (speed, peak): (f64, f64),
    element_bytes: f64,
) {
    println!(
        "  {name} m {rows:3} n {:5} k {:5}  {:6.1} GB/s  {:5.1}%  {:7.1} GFLOP/s",
        shape.0,
        shape.1,
        speed / 1e9,
        100.0 * speed / peak,
        2.0 * rows as f64 * speed / element_bytes / 1e9,
    );
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mode = arguments.next().unwrap_or_else(|| "all".to_owned());
    let cores = std::thread::available_parallelism().map_or(1, |count| count.get());
    let threads = arguments.next().map_or(cores, |text| text.parse().expect("a thread count"));
    let isa = Isa::detect().unwrap_or_else(|error| panic!("{error}"));
    let value = |index: usize| (index % 251) as f32 / 251.0 - 0.5;
    let most = 2048 * 8192 + 8192 * 512;
    let mut bench = Bench {
        pool: Pool::new(threads),
        isa,
        scratch: Scratch::new(),
        floats: (0..most).map(value).collect(),
        brains: (0..ROTATED_BYTES / 2).map(|index| bf16::from_f32(value(index))).collect(),
    };
    println!("{} with {threads} threads", isa.name());
    if mode == "all" || mode == "pool" {
        bench.print_pool();
    }
    if mode == "all" || mode == "gemm" {
        bench.print_gemm();
    }
    if mode == "all" || mode == "gemv" {
        bench.print_gemv();
    }
    if mode == "all" || mode == "quant" {
        bench.print_quant();
    }
}
