//! Experts with quantised weights have the bits that the product of each one alone has.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::philox::Stream;
use pontoon_ops::{Backend, DType, GroupedMatmulQuant, MatmulQuant, Op, View};

/// Printed with every failure; the numbers follow from it.
const SEED: u64 = 20_261_125;
const OFFSETS: [i32; 5] = [0, 1, 1, 19, 22];

struct Rig {
    backend: CpuBackend,
    drawn: u64,
}

impl Rig {
    fn filled(&mut self, dtype: DType, shape: &[usize], bytes: &[u8]) -> View {
        let buffer = self.backend.alloc(bytes.len()).unwrap();
        self.backend.upload(buffer, 0, bytes).unwrap();
        View::contiguous(buffer, dtype, shape)
    }

    fn floats(&mut self, shape: &[usize]) -> View {
        let stream = Stream::new(SEED, self.drawn);
        self.drawn += 1;
        let count = shape.iter().product::<usize>() as u64;
        let bytes: Vec<u8> = (0..count).flat_map(|at| stream.normal(at).to_le_bytes()).collect();
        self.filled(DType::F32, shape, &bytes)
    }

    fn integers(&mut self, dtype: DType, shape: &[usize]) -> View {
        let stream = Stream::new(SEED, self.drawn);
        self.drawn += 1;
        let count = dtype.bytes(shape.iter().product()) as u64;
        // -128 is no value of a quantised byte.
        let bytes: Vec<u8> =
            (0..count).map(|at| (stream.below(at, 255) as u8).wrapping_sub(127)).collect();
        self.filled(dtype, shape, &bytes)
    }

    fn read(&mut self, view: &View) -> Vec<u8> {
        let mut bytes = vec![0; view.dtype.bytes(view.elements())];
        self.backend.download(view.buffer, view.byte_offset, &mut bytes).unwrap();
        bytes
    }

    fn run(&mut self, op: impl Into<Op>) {
        let op = op.into();
        op.check().unwrap();
        self.backend.launch(&op).unwrap();
    }
}

#[test]
fn a_groups_rows_have_the_bits_of_the_product_with_its_own_weight() {
    let (groups, rows, n) = (OFFSETS.len() - 1, 23, 37);
    for isa in Isa::available() {
        let options = CpuOptions { threads: Some(2), isa: Some(isa) };
        let mut rig = Rig { backend: CpuBackend::new(options).unwrap(), drawn: 0 };
        for (dtype, k, block_n, block_k) in
            [(DType::I8, 200, 1, 64), (DType::I4, 136, 1, 32), (DType::I8, 40, 5, 8)]
        {
            let x = rig.floats(&[rows, k]);
            let weight = rig.integers(dtype, &[groups, n, k]);
            let own = [usize::div_ceil(n, block_n), usize::div_ceil(k, block_k)];
            let scales = rig.floats(&[groups, own[0], own[1]]);
            let offsets: Vec<u8> = OFFSETS.iter().flat_map(|at| at.to_le_bytes()).collect();
            let offsets = rig.filled(DType::I32, &[groups + 1], &offsets);
            let [c, alone] = [rig.floats(&[rows, n]), rig.floats(&[rows, n])];
            let before = rig.read(&c);
            rig.run(GroupedMatmulQuant { x, weight, scales, block_n, block_k, offsets, c });
            for group in 0..groups {
                let (first, end) = (OFFSETS[group] as usize, OFFSETS[group + 1] as usize);
                let part = |view: &View| view.slice(0, first, end - first);
                let (x, c) = (part(&x), part(&alone));
                let weight = weight.slice(0, group, 1).reshape([n, k]);
                let scales = scales.slice(0, group, 1).reshape(own);
                rig.run(MatmulQuant { x, weight, scales, block_n, block_k, bias: None, c });
            }
            let (got, want) = (rig.read(&c), rig.read(&alone));
            let grouped = 4 * n * OFFSETS[groups] as usize;
            let case = format!("seed {SEED}, {}, {dtype} {k}", isa.name());
            assert_eq!(got[..grouped], want[..grouped], "{case}");
            assert_eq!(got[grouped..], before[grouped..], "{case}: rows of no group");
        }
    }
}
