//! The conformance suite on the CPU backend: every operation against its f64 twin on every
//! instruction set of this machine, and the same bits on any number of threads.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::OpName;
use pontoon_qualify::cases::{self, Case};
use pontoon_qualify::conformance::{Finding, check, covers};
use pontoon_qualify::memory::Memory;

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_124;

fn run(isa: Isa, threads: usize, cases: &[Case]) -> (Vec<Finding>, Vec<Memory>) {
    let options = CpuOptions { threads: Some(threads), isa: Some(isa) };
    let mut backend = CpuBackend::new(options).unwrap();
    let (mut findings, mut left) = (Vec::new(), Vec::new());
    for case in cases {
        let (found, memory) = check(&mut backend, case).unwrap();
        findings.extend(found);
        left.push(memory);
    }
    (findings, left)
}

#[test]
fn every_operation_is_what_its_contract_says_on_every_instruction_set() {
    let cases = cases::all(SEED);
    let exchanges = [OpName::AllReduce, OpName::AllGather, OpName::ReduceScatter];
    for op in OpName::ALL.iter().filter(|op| !exchanges.contains(op)) {
        assert!(covers(&cases, *op), "{op:?} has no case");
    }
    let mut bad = Vec::new();
    for isa in Isa::available() {
        let (findings, one) = run(isa, 1, &cases);
        let failed = findings.into_iter().filter(|finding| !finding.ok);
        bad.extend(failed.map(|f| {
            let Finding { op, dtype, check, case, worst_error, detail, .. } = f;
            format!("{} {op} {dtype} {check} ({case}): {worst_error:.3} {detail}", isa.name())
        }));
        for threads in [2, 3] {
            let (_, other) = run(isa, threads, &cases);
            for (case, (one, other)) in cases.iter().zip(one.iter().zip(&other)) {
                if one != other {
                    let (isa, op) = (isa.name(), case.op.name());
                    bad.push(format!("{isa} {op:?} ({}): {threads} threads differ", case.name));
                }
            }
        }
    }
    assert!(bad.is_empty(), "seed {SEED}: {} findings\n{}", bad.len(), bad.join("\n"));
}
