//! Prints the speed of attention and of the loss at the shapes of a training step, against the
//! machine's measured peak.
//!
//! Run with `cargo run --release -p pontoon-cpu --example op_bench [-- THREADS]`. Times are the
//! best of many runs. Results are not checked here: `tests/qualify.rs` does that. Products alone
//! are in `gemm_bench.rs`.

use std::time::{Duration, Instant};

use half::bf16;
use pontoon_cpu::peak::{PeakType, measure_peak};
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{
    Accumulate, Attention, AttentionBwd, Backend, CrossEntropyBwd, DType, Fill, Op, View,
    cost::cost,
};

/// A step of the 30M-parameter model: 8 sequences of 256 tokens, 8 heads of 64, 8192 tokens.
const SEQUENCES: usize = 8;
const TOKENS: usize = 256;
const HEADS: usize = 8;
const WIDTH: usize = 64;
const VOCABULARY: usize = 8192;
/// Time spent on each operation.
const TIME_PER_OP: Duration = Duration::from_millis(1500);

struct Bench {
    backend: CpuBackend,
    other: View,
}

/// More elements than any cache holds.
const OTHER: usize = 32 << 20;

impl Bench {
    fn tensor(&mut self, dtype: DType, dims: &[usize]) -> View {
        let elements: usize = dims.iter().product();
        let buffer = self.backend.alloc(dtype.bytes(elements)).expect("there is memory");
        let value = |index: usize| ((index * 7919 + index / 13) % 251) as f32 / 251.0 - 0.5;
        let bytes: Vec<u8> = match dtype {
            DType::F32 => (0..elements).flat_map(|index| value(index).to_le_bytes()).collect(),
            DType::Bf16 => {
                (0..elements).flat_map(|index| bf16::from_f32(value(index)).to_le_bytes()).collect()
            }
            _ => (0..elements).flat_map(|index| (index as i32 % 8192).to_le_bytes()).collect(),
        };
        self.backend.upload(buffer, 0, &bytes).expect("it fits");
        View::contiguous(buffer, dtype, dims)
    }

    /// Fills the caches with something else, as the rest of a step does.
    fn forget(&mut self) {
        let fill = Op::from(Fill { dst: self.other, value: 1.0 });
        self.backend.launch(&fill).expect("the operands fit");
    }

    fn time(&mut self, name: &str, op: &Op, flops: f64, peak: f64) {
        let (begin, mut best) = (Instant::now(), Duration::MAX);
        while begin.elapsed() < TIME_PER_OP {
            self.forget();
            let start = Instant::now();
            self.backend.launch(op).expect("the operands fit");
            best = best.min(start.elapsed());
        }
        let seconds = best.as_secs_f64();
        println!(
            "  {name:16} {:8.2} ms  {:6.1} GFLOP/s  {:5.1}%",
            1e3 * seconds,
            flops / seconds / 1e9,
            100.0 * flops / seconds / peak
        );
    }

    fn attention(&mut self, dtype: DType, peak: f64) {
        let rows = SEQUENCES * TOKENS;
        let [q, k, v, out, dout, dq, dk, dv] =
            [(); 8].map(|()| self.tensor(dtype, &[rows, HEADS, WIDTH]));
        let lse = self.tensor(DType::F32, &[rows, HEADS]);
        let documents = self.tensor(DType::I32, &[SEQUENCES + 1]);
        let starts: Vec<u8> =
            (0..=SEQUENCES).flat_map(|at| ((at * TOKENS) as i32).to_le_bytes()).collect();
        self.backend.upload(documents.buffer, 0, &starts).expect("it fits");
        let scale = 0.125;
        let forward = Op::from(Attention { q, k, v, documents, scale, out, lse });
        // Both products, each pair of a row and a key that it sees counted once.
        let flops = 2.0 * 2.0 * (rows * HEADS * (TOKENS + 1) / 2 * WIDTH) as f64;
        self.time("Attention", &forward, flops, peak);
        let backward =
            Op::from(AttentionBwd { q, k, v, documents, scale, out, lse, dout, dq, dk, dv });
        self.time("AttentionBwd", &backward, 2.5 * flops, peak);
    }

    fn loss(&mut self, dtype: DType, peak: f64) {
        let (rows, width) = (SEQUENCES * TOKENS, HEADS * WIDTH);
        let [x, dx] = [(); 2].map(|()| self.tensor(dtype, &[rows, width]));
        let head = self.tensor(dtype, &[VOCABULARY, width]);
        let dhead = self.tensor(DType::F32, &[VOCABULARY, width]);
        let targets = self.tensor(DType::I32, &[rows]);
        let [dloss, loss, lse] = [(); 3].map(|()| self.tensor(DType::F32, &[rows]));
        let accumulate = Accumulate::Overwrite;
        let op =
            Op::from(CrossEntropyBwd { x, head, targets, dloss, loss, lse, dx, dhead, accumulate });
        let flops = cost(&op).matrix_flops;
        self.time("CrossEntropyBwd", &op, flops, peak);
    }
}

fn main() {
    let threads = std::env::args().nth(1).map(|text| text.parse().expect("a thread count"));
    let options = CpuOptions { threads, isa: None };
    let mut backend = CpuBackend::new(options).expect("a CPU");
    let buffer = backend.alloc(DType::F32.bytes(OTHER)).expect("there is memory");
    let other = View::contiguous(buffer, DType::F32, [OTHER]);
    let mut bench = Bench { backend, other };
    for (dtype, kind) in [(DType::F32, PeakType::F32), (DType::Bf16, PeakType::Bf16)] {
        let peak = measure_peak(bench.backend.pool(), bench.backend.isa(), kind);
        println!("{dtype}: register peak {:.0} GFLOP/s", peak / 1e9);
        bench.attention(dtype, peak);
        bench.loss(dtype, peak);
    }
}
