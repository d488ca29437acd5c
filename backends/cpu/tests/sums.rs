//! The sums of a launch with checks are those of its operands as they stand before and after, for
//! every operation, on every instruction set: whether its kernel forms them or a pass.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::sums::{Ask, Sums, adds_to_rows, of_view, runs};
use pontoon_ops::{Backend, DeviceError, Op};
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

    fn compare(&mut self, op: &Op, what: &str, place: usize, (got, want): (u32, u32)) {
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
        }
        let before = self.by_host(op);
        let Sums { read, written } = self.inner.launch_summed(op, ask)?;
        let after = self.by_host(op);
        for place in 0..operands.len() {
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
