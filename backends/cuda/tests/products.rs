//! Products as large as a model's, on the largest tiles, which the common cases do not reach: some
//! elements against f64, and every row with the bits it has among few rows, where smaller tiles
//! take it. Says so and passes where there is no device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::sync::Arc;
use std::time::Duration;

use pontoon_cuda::{CudaBackend, Library};
use pontoon_ops::philox::Stream;
use pontoon_ops::tolerance::tolerance;
use pontoon_ops::{Accumulate, Backend, BufferId, DType, Layout, Matmul, OpName, View};
use pontoon_qualify::memory::Memory;

/// Printed with every failure; the numbers follow from it.
const SEED: u64 = 20_261_126;
/// Elements that are computed again in f64.
const LOOKED_AT: usize = 400;

struct Device {
    backend: CudaBackend,
    host: Memory,
    drawn: u64,
}

impl Device {
    fn matrix(&mut self, dtype: DType, [rows, columns]: [usize; 2], more: usize) -> View {
        let bytes = dtype.bytes(rows * (columns + more)) + 64;
        let (buffer, copy) = (self.backend.alloc(bytes).unwrap(), self.host.add(vec![0; bytes]));
        assert_eq!(buffer, copy, "both count alike");
        let whole = View::contiguous(buffer, dtype, [rows, columns + more]);
        let view = whole.rebased(buffer, 32).slice(1, 0, columns);
        self.drawn += 1 << 32;
        let stream = Stream::new(SEED, 2);
        // A few thousand numbers over and over: a prime, so that rows differ.
        let some: Vec<f64> = (0..4099).map(|i| f64::from(stream.normal(self.drawn + i))).collect();
        let values: Vec<f64> = (0..rows * columns).map(|i| some[i % some.len()]).collect();
        self.host.write(&view, &values);
        let content = &self.host.buffers()[buffer.0 as usize];
        self.backend.upload(buffer, 0, content).unwrap();
        view
    }

    fn result(&mut self, op: &Matmul) -> Vec<u32> {
        let op: pontoon_ops::Op = op.clone().into();
        op.check().unwrap();
        self.backend.launch(&op).unwrap();
        self.backend.wait(Duration::from_secs(60)).unwrap();
        let pontoon_ops::Op::Matmul(op) = &op else { unreachable!("made above") };
        let mut bytes = self.host.buffers()[op.c.buffer.0 as usize].clone();
        self.backend.download(op.c.buffer, 0, &mut bytes).unwrap();
        let mut after = Memory::default();
        let copy = after.add(bytes);
        let bits = after.bits(&op.c.rebased(copy, 0));
        // What is accumulated into is put back for the next product.
        let content = &self.host.buffers()[op.c.buffer.0 as usize];
        self.backend.upload(op.c.buffer, 0, content).unwrap();
        bits
    }
}

/// The worst error of some elements, as a share of what is allowed.
fn worst(host: &Memory, op: &Matmul, bits: &[u32], dtype: DType) -> f64 {
    let (a, b, old) = (host.read(&op.a), host.read(&op.b), host.read(&op.c));
    let bias = op.bias.map(|bias| host.read(&bias));
    let pontoon_ops::Extents { m, n, k } = op.extents();
    let value = |bits: u32| match op.c.dtype {
        DType::F32 => f64::from(f32::from_bits(bits)),
        DType::Bf16 => f64::from(f32::from_bits(bits << 16)),
        _ => f64::from(half(bits as u16)),
    };
    let mut worst: f64 = 0.0;
    for turn in 0..LOOKED_AT {
        let (row, column) = ((turn * 7919 + 5) % m, (turn * 104_729 + 11) % n);
        let (mut sum, mut size) = (0.0, 0.0);
        for i in 0..k {
            let left = if op.layout == Layout::Tn { a[i * m + row] } else { a[row * k + i] };
            let right = if op.layout == Layout::Nt { b[column * k + i] } else { b[i * n + column] };
            sum += left * right;
            size += (left * right).abs();
        }
        let mut more = bias.as_ref().map_or(0.0, |bias| bias[column]);
        if op.accumulate == Accumulate::Add {
            more += old[row * n + column];
        }
        let limit = tolerance(OpName::Matmul).limit(op.c.dtype, dtype, sum + more, size + 2.0);
        worst = worst.max((value(bits[row * n + column]) - sum - more).abs() / limit);
    }
    worst
}

/// The value of a half-precision number that is not subnormal, infinite or NaN.
fn half(bits: u16) -> f32 {
    let (sign, rest) = (u32::from(bits >> 15) << 31, u32::from(bits & 0x7fff));
    if rest == 0 { 0.0 } else { f32::from_bits(sign | ((rest << 13) + (112 << 23))) }
}

fn try_one(device: &mut Device, dtype: DType, layout: Layout, more: usize) -> Vec<String> {
    let (m, n, k) = (1500, 1610, 331);
    device.host = Memory::default();
    let a = device.matrix(dtype, if layout == Layout::Tn { [k, m] } else { [m, k] }, more);
    let b = device.matrix(dtype, if layout == Layout::Nt { [n, k] } else { [k, n] }, more);
    let bias = (layout == Layout::Nt).then(|| device.matrix(dtype, [1, n], 0).reshape([n]));
    let out = if layout == Layout::Tn { DType::F32 } else { dtype };
    let c = device.matrix(out, [m, n], more);
    let accumulate = if layout == Layout::Nn { Accumulate::Overwrite } else { Accumulate::Add };
    let op = Matmul { layout, a, b, bias, c, accumulate };
    let whole = device.result(&op);
    let mut bad = Vec::new();
    let worst = worst(&device.host, &op, &whole, dtype);
    if worst.is_nan() || worst > 1.0 {
        bad.push(format!("{dtype} {layout:?} {more}: error {worst:.3}"));
    }
    for rows in [0..1, 700..716, 1300..1364, 1499..1500] {
        let axis = usize::from(layout == Layout::Tn);
        let part = Matmul {
            a: a.slice(axis, rows.start, rows.len()),
            c: c.slice(0, rows.start, rows.len()),
            ..op.clone()
        };
        if device.result(&part) != whole[rows.start * n..rows.end * n] {
            bad.push(format!("{dtype} {layout:?} {more}: rows {rows:?} have other bits alone"));
        }
    }
    // The last one first, so that numbers begin at 0 again.
    let buffers = 0..device.host.buffers().len() as u32;
    buffers.rev().for_each(|buffer| device.backend.free(BufferId(buffer)).unwrap());
    bad
}

#[test]
fn large_products_are_right_and_give_rows_the_bits_that_small_ones_give() {
    let opened =
        Library::open().and_then(|library| CudaBackend::open(&Arc::new(library), "cuda:0", 0));
    let backend = match opened {
        Ok(backend) => backend,
        Err(error) => return eprintln!("not run: {}", error.text),
    };
    let mut device = Device { backend, host: Memory::default(), drawn: 0 };
    let mut bad = Vec::new();
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            for more in [0, 5, 6] {
                bad.extend(try_one(&mut device, dtype, layout, more));
            }
        }
    }
    bad.iter().for_each(|line| println!("BAD products {line}"));
    assert!(bad.is_empty(), "seed {SEED}: {} findings", bad.len());
}
