//! Times operations on a device: products of 4096 x 4096 x 4096 in each layout, then one of each
//! operation as large as a model's. Prints one JSON object a line.

#![expect(clippy::unwrap_used, reason = "a measurement may fail loudly")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use pontoon_cuda::{CudaBackend, Library};
use pontoon_ops::{Accumulate, Backend, DType, Layout, Matmul, Op, Support, View, cost};
use pontoon_qualify::cases::{Case, Size, sized};

/// Longest one measurement may take on a device that works.
const DEADLINE: Duration = Duration::from_secs(60);
/// Runs that are timed together, after some that warm up.
const TIMES: u32 = 20;

fn seconds(backend: &mut CudaBackend, op: &Op) -> f64 {
    for _ in 0..3 {
        backend.launch(op).unwrap();
    }
    backend.wait(DEADLINE).unwrap();
    let start = Instant::now();
    for _ in 0..TIMES {
        backend.launch(op).unwrap();
    }
    backend.wait(DEADLINE).unwrap();
    start.elapsed().as_secs_f64() / f64::from(TIMES)
}

fn print(backend: &mut CudaBackend, name: &str, dtype: DType, op: &Op) {
    let seconds = seconds(backend, op);
    let cost = cost::cost(op);
    let (tflops, gbs) = (cost.matrix_flops / seconds / 1e12, cost.bytes / seconds / 1e9);
    let micros = seconds * 1e6;
    println!(
        "{{\"op\": \"{name}\", \"dtype\": \"{dtype}\", \"us\": {micros:.1}, \"tflops\": \
         {tflops:.1}, \"gb_s\": {gbs:.0}}}"
    );
}

fn square(backend: &mut CudaBackend, dtype: DType, extent: usize) {
    let mut matrix = |dtype: DType| {
        let buffer = backend.alloc(dtype.bytes(extent * extent)).unwrap();
        let values = (0..extent * extent).map(|i| ((i * 2_654_435_761) >> 7 & 0xff) as f32 / 256.0);
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values.flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
        };
        backend.upload(buffer, 0, &bytes).unwrap();
        View::contiguous(buffer, dtype, [extent, extent])
    };
    let (a, b, c, sum) = (matrix(dtype), matrix(dtype), matrix(dtype), matrix(DType::F32));
    for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
        let accumulate = Accumulate::Overwrite;
        let op = Matmul { layout, a, b, bias: None, c, accumulate }.into();
        print(backend, &format!("Matmul {layout:?} {extent}"), dtype, &op);
    }
    let (layout, accumulate) = (Layout::Tn, Accumulate::Add);
    let op = Matmul { layout, a, b, bias: None, c: sum, accumulate }.into();
    print(backend, &format!("Matmul Tn {extent} added to f32"), dtype, &op);
    for view in [a, b, c, sum] {
        backend.free(view.buffer).unwrap();
    }
}

fn case(backend: &mut CudaBackend, case: &Case, dtype: DType) {
    if matches!(backend.supports(&case.op), Support::No(_)) {
        return;
    }
    let mut op = case.op.clone();
    let mut buffers = Vec::new();
    for bytes in case.memory.buffers() {
        let buffer = backend.alloc(bytes.len()).unwrap();
        backend.upload(buffer, 0, bytes).unwrap();
        buffers.push(buffer);
    }
    for view in op.views_mut() {
        *view = view.rebased(buffers[view.buffer.0 as usize], 0);
    }
    let name = format!("{} {}", op.name().name(), case.name);
    print(backend, &name, dtype, &op);
    buffers.into_iter().for_each(|buffer| backend.free(buffer).unwrap());
}

fn main() {
    let library = Arc::new(Library::open().unwrap());
    let mut backend = CudaBackend::open(&library, "cuda:0", 0).unwrap();
    println!("{{\"chip\": \"{}\"}}", backend.info().chip);
    for (dtype, extent) in [(DType::Bf16, 4096), (DType::Bf16, 8192), (DType::F32, 4096)] {
        square(&mut backend, dtype, extent);
    }
    for dtype in [DType::Bf16, DType::F32] {
        for one in sized(dtype, Size::Full) {
            case(&mut backend, &one, dtype);
        }
    }
}
