//! Prints the speed of a decode step of a small model as a list of operations, against memory
//! bandwidth, with weights in rows and in panels in turn, and the time of each kind of operation.
//!
//! Run with `cargo run --release -p pontoon-cpu --example decode_bench [-- FORMAT SEQUENCES CONTEXT
//! SIZE]`, FORMAT one of bf16, f32, int8, int4, SIZE one of 30m, 0.5b. `pontoon bench decode`
//! measures the whole engine; this needs the backend alone. Results are not checked here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pontoon_cpu::peak::measure_bandwidth;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{
    Accumulate, AddRmsNorm, Backend, BufferId, DType, KvWrite, Layout, Matmul, MatmulQuant, Op,
    PagedAttention, SwiGlu, View,
};

/// Sizes of a model.
#[derive(Clone, Copy)]
struct Shape {
    width: usize,
    heads: usize,
    kv_heads: usize,
    inner: usize,
    layers: usize,
    vocabulary: usize,
}

/// Values of a head.
const HEAD: usize = 64;
/// The preset `llama-30m`.
const SMALL: Shape =
    Shape { width: 512, heads: 8, kv_heads: 8, inner: 1376, layers: 8, vocabulary: 8192 };
/// Six layers as in models of half a billion parameters.
const LARGE: Shape =
    Shape { width: 896, heads: 14, kv_heads: 2, inner: 4864, layers: 6, vocabulary: 151_936 };
/// Positions of a block of the cache.
const BLOCK: usize = 16;
/// Bytes for weights, cache and temporaries.
const MEMORY: usize = 1 << 30;
const ROUNDS: usize = 5;
const STEPS: usize = 100;

/// How weights are stored.
#[derive(Clone, Copy)]
enum Format {
    Float(DType),
    /// With a scale for so many values.
    Integer(DType, usize),
}

struct Step {
    shape: Shape,
    backend: CpuBackend,
    format: Format,
    ops: Vec<Op>,
    weight_bytes: usize,
    memory: BufferId,
    used: usize,
}

impl Step {
    fn dtype(&self) -> DType {
        match self.format {
            Format::Float(dtype) => dtype,
            Format::Integer(..) => DType::Bf16,
        }
    }

    /// Everything lies in one buffer, as the weights and temporaries of a model do.
    fn tensor(&mut self, dtype: DType, dims: &[usize]) -> View {
        let bytes = dtype.bytes(dims.iter().product());
        let start = self.used.next_multiple_of(64);
        self.used = start + bytes;
        // Memory that was never written is one page of zeros, which lies in the cache.
        self.backend.upload(self.memory, start, &vec![1; bytes]).expect("there is room");
        View::contiguous(self.memory, dtype, dims).rebased(self.memory, start)
    }

    fn integers(&mut self, values: &[i32], dims: &[usize]) -> View {
        let view = self.tensor(DType::I32, dims);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.backend.upload(view.buffer, view.byte_offset, &bytes).expect("it fits");
        view
    }

    fn floats(&mut self, dims: &[usize]) -> View {
        self.tensor(self.dtype(), dims)
    }

    fn product(&mut self, a: View, n: usize) -> View {
        let k = a.dim(1);
        let c = self.floats(&[a.dim(0), n]);
        let op: Op = match self.format {
            Format::Float(dtype) => {
                let (layout, accumulate) = (Layout::Nt, Accumulate::Overwrite);
                let b = self.tensor(dtype, &[n, k]);
                self.weight_bytes += dtype.bytes(n * k);
                Matmul { layout, a, b, bias: None, c, accumulate }.into()
            }
            Format::Integer(dtype, block_k) => {
                let weight = self.tensor(dtype, &[n, k]);
                let scales = self.tensor(DType::F32, &[n, k.div_ceil(block_k)]);
                self.weight_bytes += dtype.bytes(n * k) + n * k.div_ceil(block_k) * 4;
                MatmulQuant { x: a, weight, scales, block_n: 1, block_k, bias: None, c }.into()
            }
        };
        self.ops.push(op);
        c
    }

    fn norm(&mut self, x: View, residual: View) -> [View; 2] {
        let (weight, sum, y) =
            (self.floats(&[x.dim(1)]), self.floats(x.dims()), self.floats(x.dims()));
        let rstd = self.tensor(DType::F32, &[x.dim(0)]);
        self.ops.push(AddRmsNorm { x, residual, weight, eps: 1e-5, sum, y, rstd }.into());
        [sum, y]
    }

    fn build(&mut self, sequences: usize, context: usize) {
        let Shape { width, heads, kv_heads, inner, layers, vocabulary } = self.shape;
        let per_sequence = context.div_ceil(BLOCK);
        let count = sequences * per_sequence;
        let blocks: Vec<i32> = (0..count as i32).collect();
        let blocks = self.integers(&blocks, &[sequences, per_sequence]);
        let lengths = self.integers(&vec![context as i32; sequences], &[sequences]);
        let queries: Vec<i32> = (0..=sequences as i32).collect();
        let queries = self.integers(&queries, &[sequences + 1]);
        let last = |sequence: usize| (sequence * per_sequence * BLOCK + context - 1) as i32;
        let slots: Vec<i32> = (0..sequences).map(last).collect();
        let slots = self.integers(&slots, &[sequences]);
        let mut x = self.floats(&[sequences, width]);
        let mut residual = self.floats(&[sequences, width]);
        for _ in 0..layers {
            let [sum, y] = self.norm(x, residual);
            let [q, k, v] = [heads, kv_heads, kv_heads]
                .map(|heads| self.product(y, heads * HEAD).reshape([sequences, heads, HEAD]));
            let cache = [count, BLOCK, kv_heads, HEAD];
            let (k_cache, v_cache) = (self.floats(&cache), self.floats(&cache));
            self.ops.push(KvWrite { k, v, slots, k_cache, v_cache }.into());
            let mixed = self.floats(&[sequences, heads, HEAD]);
            let scale = 0.125;
            let attention =
                PagedAttention { q, k_cache, v_cache, blocks, lengths, queries, scale, out: mixed };
            self.ops.push(attention.into());
            let mixed = mixed.reshape([sequences, heads * HEAD]);
            let out = self.product(mixed, width);
            let [sum, y] = self.norm(out, sum);
            let (gate, up) = (self.product(y, inner), self.product(y, inner));
            let mixed = self.floats(&[sequences, inner]);
            self.ops.push(SwiGlu { gate, up, y: mixed }.into());
            x = self.product(mixed, width);
            residual = sum;
        }
        let [_, y] = self.norm(x, residual);
        self.product(y, vocabulary);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, or: usize| {
        arguments.get(at).map_or(or, |text| text.parse().expect("a whole number"))
    };
    let format = match arguments.first().map_or("bf16", String::as_str) {
        "f32" => Format::Float(DType::F32),
        "int8" => Format::Integer(DType::I8, 64),
        "int4" => Format::Integer(DType::I4, 32),
        _ => Format::Float(DType::Bf16),
    };
    let (sequences, context) = (number(1, 1), number(2, 64));
    let mut backend = CpuBackend::new(CpuOptions::default()).expect("a known instruction set");
    let memory = backend.alloc(MEMORY).expect("there is memory");
    let (ops, weight_bytes, used) = (Vec::new(), 0, 0);
    let shape = if arguments.get(3).is_some_and(|name| name == "0.5b") { LARGE } else { SMALL };
    let mut step = Step { shape, backend, format, ops, weight_bytes, memory, used };
    step.build(sequences, context);
    let Step { mut backend, ops, weight_bytes, .. } = step;
    for round in 0..2 * ROUNDS {
        let order = if round % 2 == 0 { "rows" } else { "panels" };
        for op in ops.iter().filter(|op| op.matrix().is_some()) {
            if order == "panels" {
                backend.prepack(op).expect("the operands fit");
            } else if let Some(matrix) = op.matrix() {
                // A matrix that is read is put back.
                backend.download(matrix.buffer, matrix.byte_offset, &mut [0]).expect("it fits");
            }
        }
        let bandwidth = measure_bandwidth(backend.pool(), backend.isa());
        let mut times: Vec<Duration> = (0..STEPS)
            .map(|_| {
                let started = Instant::now();
                backend.launch_all(&ops).expect("the operands fit");
                started.elapsed()
            })
            .collect();
        times.sort();
        let median = times[STEPS / 2].as_secs_f64();
        println!(
            "weights in {order}: step {:.0} us, {:.0}% of {:.1} GB/s",
            1e6 * median,
            100.0 * weight_bytes as f64 / median / bandwidth,
            bandwidth / 1e9
        );
    }
    let mut sums: BTreeMap<String, (usize, Duration)> = BTreeMap::new();
    for _ in 0..STEPS {
        for op in &ops {
            let started = Instant::now();
            backend.launch(op).expect("the operands fit");
            let name = match op {
                Op::Matmul(op) => format!("Matmul {} x {}", op.b.dim(0), op.b.dim(1)),
                Op::MatmulQuant(op) => {
                    format!("MatmulQuant {} x {}", op.weight.dim(0), op.x.dim(1))
                }
                _ => format!("{:?}", op.name()),
            };
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + 1, sum.1 + started.elapsed());
        }
    }
    println!("each launched alone, nothing foreseen:");
    for (name, (count, time)) in sums {
        let us = 1e6 * time.as_secs_f64() / count as f64;
        println!("{name:24} {us:7.1} us  {:4} a step", count / STEPS);
    }
}
