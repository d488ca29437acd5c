//! The sums of a launch with checks are those of its operands as they stand before and after, for
//! every operation, on every instruction set: whether its kernel forms them or a pass.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::fmt::LowerHex;

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::digest::{BLOCK, Blocks};
use pontoon_ops::sums::{Ask, Sums, adds_to_rows, of_view, runs};
use pontoon_ops::{AdamW, Backend, DType, DeviceError, Op, View, hyper};
use pontoon_qualify::cases;
use pontoon_qualify::conformance::check;

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_126;

/// Asks for every sum, and compares it with one made by way of the host.
struct Auditor {
    inner: CpuBackend,
    compared: usize,
    wrong: Vec<String>,
}

impl Auditor {
    /// The sums of all operands that have one.
    fn by_host(&mut self, op: &Op) -> Vec<u32> {
        let operands = op.operands();
        operands.iter().map(|operand| of_view(&mut self.inner, &operand.view).unwrap()).collect()
    }

    /// The digests of all contiguous operands.
    fn digests_by_host(&mut self, op: &Op) -> Vec<u64> {
        let mut digest = |View { buffer, byte_offset, .. }: View, bytes: usize| {
            let mut content = vec![0; bytes];
            self.inner.download(buffer, byte_offset, &mut content).unwrap();
            let mut blocks = Blocks::default();
            content.chunks(BLOCK).for_each(|block| blocks.push(block));
            blocks.finish()
        };
        let views = op.operands().into_iter().map(|operand| operand.view);
        let sizes = views.map(|view| match view.is_contiguous() {
            true => (view, view.dtype.bytes(view.elements())),
            false => (view, 0),
        });
        sizes.map(|(view, bytes)| digest(view, bytes)).collect()
    }

    fn compare<T: PartialEq + LowerHex>(
        &mut self,
        op: &Op,
        what: &str,
        place: usize,
        (got, want): (T, T),
    ) {
        self.compared += 1;
        if got != want {
            let (isa, operand) = (&self.inner.info().numeric_class, op.operands()[place].name);
            let text = format!("{isa} {:?} {what} {operand}: {got:#x}, not {want:#x}", op.name());
            self.wrong.push(text);
        }
    }
}

impl Backend for Auditor {
    pontoon_ops::delegate!(inner: info alloc free upload download supports wait memory_used);

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        let mut ask = Ask::default();
        let operands = op.operands();
        for (place, operand) in operands.iter().enumerate() {
            let bit = u32::from(runs(&operand.view).is_some()) << place;
            let writes = operand.access.writes();
            let changes = writes && adds_to_rows(op) == Some(place);
            ask.read |= if operand.access.reads() && !changes { bit } else { 0 };
            ask.changed |= if changes { bit } else { 0 };
            ask.written |= if writes && !changes { bit } else { 0 };
            ask.digested |= u32::from(operand.view.is_contiguous()) << place;
        }
        let (before, digests_before) = (self.by_host(op), self.digests_by_host(op));
        let Sums { read, written, digest_read, digest_written } =
            self.inner.launch_summed(op, ask)?;
        let (after, digests_after) = (self.by_host(op), self.digests_by_host(op));
        for (place, operand) in operands.iter().enumerate() {
            let digested = ask.digested >> place & 1 == 1;
            if digested && operand.access.reads() {
                let pair = (digest_read[place], digests_before[place]);
                self.compare(op, "reads, digested,", place, pair);
            }
            if digested && operand.access.writes() {
                let pair = (digest_written[place], digests_after[place]);
                self.compare(op, "writes, digested,", place, pair);
            }
            let (old, new) = (before[place], after[place]);
            for (mask, what, got, want) in [
                (ask.read, "reads", read[place], old),
                (ask.written, "writes", written[place], new),
                (ask.changed, "changes", written[place], new.wrapping_sub(old)),
            ] {
                if mask >> place & 1 == 1 {
                    self.compare(op, what, place, (got, want));
                }
            }
        }
        Ok(())
    }
}

#[test]
fn a_launch_with_checks_tells_the_sums_of_what_it_reads_and_writes() {
    for isa in Isa::available() {
        let inner = CpuBackend::new(CpuOptions { threads: Some(2), isa: Some(isa) }).unwrap();
        let mut auditor = Auditor { inner, compared: 0, wrong: Vec::new() };
        for case in cases::all(SEED) {
            let (findings, _) = check(&mut auditor, &case).unwrap();
            for finding in findings.iter().filter(|finding| !finding.ok) {
                auditor.wrong.push(format!("{:?} {}: {finding:?}", case.op.name(), case.name));
            }
        }
        assert!(auditor.compared > 1000, "{} sums were compared", auditor.compared);
        assert!(auditor.wrong.is_empty(), "seed {SEED}\n{}", auditor.wrong.join("\n"));
    }
}

#[test]
fn an_update_of_many_blocks_tells_the_digests_of_its_state() {
    for compute in [None, Some(DType::Bf16)] {
        let inner = CpuBackend::new(CpuOptions { threads: Some(2), isa: None }).unwrap();
        let mut auditor = Auditor { inner, compared: 0, wrong: Vec::new() };
        // Two blocks of bf16, and a piece of a third that ends within a word.
        let elements = BLOCK + 12_345;
        let mut tensor = |dtype: DType, elements: usize, seed: u32| {
            let buffer = auditor.inner.alloc(dtype.bytes(elements)).unwrap();
            let value = |index: u32| (index.wrapping_mul(2_654_435_761) ^ seed) as f32 / 4e9;
            let values: Vec<f32> = (0..elements as u32).map(value).collect();
            if dtype == DType::F32 {
                auditor.inner.upload(buffer, 0, bytemuck::cast_slice(&values)).unwrap();
            }
            View::contiguous(buffer, dtype, [elements])
        };
        let op = AdamW {
            weight: tensor(DType::F32, elements, 1),
            grad: tensor(DType::F32, elements, 2),
            m: tensor(DType::F32, elements, 3),
            v: tensor(DType::F32, elements, 4),
            compute: compute.map(|dtype| tensor(dtype, elements, 5)),
            hyper: tensor(DType::F32, hyper::COUNT, 6),
        };
        let op = Op::from(op);
        op.check().unwrap();
        auditor.launch(&op).unwrap();
        assert!(auditor.compared > 12, "{} were compared", auditor.compared);
        assert!(auditor.wrong.is_empty(), "{}", auditor.wrong.join("\n"));
    }
}
