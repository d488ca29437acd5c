//! Matrices that are kept in panels give the bits they give in rows, to every operation, and read
//! back as they were written.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::philox::Stream;
use pontoon_ops::{
    Accumulate, Backend, BufferId, Copy, DType, Embed, Layout, Matmul, MatmulQuant, Op,
    TokenLogProb, View,
};

/// A device, and random numbers to fill it with.
struct Bench {
    device: CpuBackend,
    random: Stream,
    drawn: u64,
}

impl Bench {
    fn new(isa: Isa, threads: usize, seed: u64) -> Bench {
        let options = CpuOptions { threads: Some(threads), isa: Some(isa) };
        let device = CpuBackend::new(options).unwrap();
        Bench { device, random: Stream::new(seed, 0), drawn: 0 }
    }

    /// A tensor of random values below 1, or of random bytes other than -128.
    fn tensor(&mut self, dtype: DType, dims: &[usize]) -> View {
        let count: usize = dims.iter().product();
        let mut bytes = Vec::new();
        for _ in 0..count.max(1) {
            self.drawn += 1;
            let value = 2.0 * self.random.uniform(self.drawn) - 1.0;
            match dtype {
                DType::F32 => bytes.extend(value.to_le_bytes()),
                DType::Bf16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
                _ => bytes.push((self.random.below(self.drawn, 255) as u8).wrapping_sub(127)),
            }
        }
        bytes.truncate(dtype.bytes(count));
        self.holding(dtype, dims, &bytes)
    }

    fn holding(&mut self, dtype: DType, dims: &[usize], bytes: &[u8]) -> View {
        let buffer = self.device.alloc(bytes.len().max(1)).unwrap();
        self.device.upload(buffer, 0, bytes).unwrap();
        View::contiguous(buffer, dtype, dims)
    }

    fn bytes(&mut self, view: &View) -> Vec<u8> {
        let mut bytes = vec![0; view.span_bytes()];
        self.device.download(view.buffer, view.byte_offset, &mut bytes).unwrap();
        bytes
    }

    /// What an operation writes, started from the same contents.
    fn written(&mut self, op: &Op, result: &View) -> Vec<u8> {
        let before = self.bytes(result);
        op.check().unwrap();
        self.device.launch(op).unwrap();
        let after = self.bytes(result);
        self.device.upload(result.buffer, result.byte_offset, &before).unwrap();
        after
    }

    /// Checks that an operation gives the same with its matrix in panels.
    fn check(&mut self, op: &Op, result: &View, what: &str) {
        let matrix = *op.matrix().unwrap();
        let (want, stored) = (self.written(op, result), self.bytes(&matrix));
        self.device.prepack(op).unwrap();
        assert!(self.written(op, result) == want, "{what} in panels ({:?})", self.random);
        assert!(self.bytes(&matrix) == stored, "{what}: the matrix read back");
        assert!(self.written(op, result) == want, "{what} in rows again");
    }

    fn free(&mut self, views: &[View]) {
        views.iter().for_each(|view| self.device.free(view.buffer).unwrap());
    }
}

/// Rows on both sides of every boundary: of groups, of the register tile, of the streamed path.
const ROWS: [usize; 12] = [1, 2, 3, 5, 8, 9, 12, 16, 23, 64, 65, 200];

#[test]
fn products_have_the_same_bits_in_panels() {
    for isa in Isa::available() {
        let mut bench = Bench::new(isa, 2, 7);
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for (turn, m) in ROWS.into_iter().enumerate() {
                let (n, k) = [(32, 2), (64, 130), (352, 96), (96, 333), (33, 64)][turn % 5];
                let (a, b) = (bench.tensor(dtype, &[m, k]), bench.tensor(dtype, &[n, k]));
                let bias = (turn % 2 == 0).then(|| bench.tensor(dtype, &[n]));
                let c = bench.tensor(if turn % 3 == 0 { DType::F32 } else { dtype }, &[m, n]);
                let accumulate = [Accumulate::Overwrite, Accumulate::Add][turn / 2 % 2];
                let op = Matmul { layout: Layout::Nt, a, b, bias, c, accumulate };
                let what = format!("{} {dtype} [{m}, {k}] x [{n}, {k}]", isa.name());
                bench.check(&op.into(), &c, &what);
                bench.free(&[a, b, c]);
                bias.iter().for_each(|bias| bench.free(&[*bias]));
            }
        }
    }
}

#[test]
fn products_with_integers_have_the_same_bits_in_panels() {
    for isa in Isa::available() {
        let mut bench = Bench::new(isa, 2, 11);
        for (dtype, integers) in [
            (DType::Bf16, DType::I8),
            (DType::Bf16, DType::I4),
            (DType::F32, DType::I8),
            (DType::F16, DType::I4),
        ] {
            for (turn, m) in ROWS.into_iter().enumerate() {
                let (n, k) = [(32, 64), (96, 192), (352, 128), (64, 100), (40, 64)][turn % 5];
                let block_k = [32, 64][turn % 2];
                let (x, weight) = (bench.tensor(dtype, &[m, k]), bench.tensor(integers, &[n, k]));
                let scales = bench.tensor(DType::F32, &[n, k.div_ceil(block_k)]);
                let bias = (turn % 2 == 0).then(|| bench.tensor(dtype, &[n]));
                let c = bench.tensor(if turn % 3 == 0 { DType::F32 } else { dtype }, &[m, n]);
                let op = MatmulQuant { x, weight, scales, block_n: 1, block_k, bias, c };
                let what = format!("{} {dtype} [{m}, {k}] x {integers} [{n}, {k}]", isa.name());
                bench.check(&op.into(), &c, &what);
                bench.free(&[x, weight, scales, c]);
                bias.iter().for_each(|bias| bench.free(&[*bias]));
            }
        }
    }
}

#[test]
fn a_tied_head_is_scored_and_looked_up_in_panels() {
    for isa in Isa::available() {
        let mut bench = Bench::new(isa, 2, 13);
        for dtype in [DType::F32, DType::Bf16] {
            let (rows, width, vocabulary) = (5, 64, 96);
            let head = bench.tensor(dtype, &[vocabulary, width]);
            let x = bench.tensor(dtype, &[rows, width]);
            let ids: Vec<u8> =
                [0_i32, 95, 33, -1, 31].iter().flat_map(|id| id.to_le_bytes()).collect();
            let ids = bench.holding(DType::I32, &[rows], &ids);
            let [logprob, entropy] = [(); 2].map(|()| bench.tensor(DType::F32, &[rows]));
            let (y, targets) = (bench.tensor(dtype, &[rows, width]), ids);
            let score = Op::from(TokenLogProb {
                x,
                head,
                scales: None,
                block_k: 0,
                targets,
                temperature: 0.7,
                logprob,
                entropy,
            });
            let embed = Op::from(Embed { ids, table: head, y });
            let embedded = bench.written(&embed, &y);
            bench.check(&score, &logprob, isa.name());
            bench.device.prepack(&score).unwrap();
            assert!(bench.written(&embed, &y) == embedded, "{} {dtype}", isa.name());
        }
    }
}

#[test]
fn whoever_uses_a_part_of_the_matrix_finds_it_in_rows() {
    let isa = *Isa::available().last().unwrap();
    let mut bench = Bench::new(isa, 2, 17);
    let (m, n, k) = (3, 128, 64);
    let (a, b) = (bench.tensor(DType::F32, &[m, k]), bench.tensor(DType::F32, &[n, k]));
    let c = bench.tensor(DType::F32, &[m, n]);
    let accumulate = Accumulate::Overwrite;
    let product =
        |b: View, c: View| Op::from(Matmul { layout: Layout::Nt, a, b, bias: None, c, accumulate });
    let (whole, stored) = (product(b, c), bench.bytes(&b));
    let want = bench.written(&whole, &c);

    // A product with some of its rows, and a copy of one.
    bench.device.prepack(&whole).unwrap();
    let some = bench.tensor(DType::F32, &[m, 32]);
    let sums = bench.written(&product(b.slice(0, 32, 32), some), &some);
    for row in 0..m {
        assert!(sums[row * 128..][..128] == want[row * 512 + 128..][..128], "row {row}");
    }
    bench.device.prepack(&whole).unwrap();
    let row = bench.tensor(DType::F32, &[1, k]);
    let copy = Op::from(Copy { src: b.slice(0, 70, 1), dst: row });
    assert!(bench.written(&copy, &row) == stored[70 * 256..][..256]);

    // A new row: the product sees it.
    bench.device.prepack(&whole).unwrap();
    bench.device.upload(b.buffer, 5 * 256, &stored[..256]).unwrap();
    let changed = bench.written(&whole, &c);
    for row in 0..m {
        assert!(changed[row * 512 + 20..][..4] == want[row * 512..][..4], "column 5 of row {row}");
        assert!(changed[row * 512 + 24..][..4] == want[row * 512 + 24..][..4]);
    }

    // The same in place: the host sees rows, and the product sees what it changed.
    bench.device.prepack(&whole).unwrap();
    let row = bench.device.mapped(b.buffer, 70 * 256, 256).unwrap().unwrap();
    assert!(row == &stored[70 * 256..][..256]);
    row.copy_from_slice(&stored[..256]);
    let changed = bench.written(&whole, &c);
    for row in 0..m {
        assert!(
            changed[row * 512 + 280..][..4] == want[row * 512..][..4],
            "column 70 of row {row}"
        );
    }

    // The next buffer of that number begins without panels.
    bench.device.prepack(&whole).unwrap();
    bench.device.free(b.buffer).unwrap();
    let next: BufferId = bench.device.alloc(n * k * 4).unwrap();
    assert_eq!(next, b.buffer);
    bench.device.upload(next, 0, &stored).unwrap();
    assert!(bench.written(&whole, &c) == want);
}
