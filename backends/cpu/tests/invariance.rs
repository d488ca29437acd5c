//! A row's bits do not depend on the rest of its batch, on any instruction set.

use std::collections::BTreeSet;

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_qualify::{cases, invariance};

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_125;

#[test]
fn a_rows_bits_do_not_depend_on_the_rest_of_its_batch() {
    let cases = cases::all(SEED);
    let (mut bad, mut seen) = (Vec::new(), BTreeSet::new());
    for isa in Isa::available() {
        let options = CpuOptions { threads: Some(2), isa: Some(isa) };
        let mut backend = CpuBackend::new(options).unwrap();
        for case in &cases {
            let Some(finding) = invariance::check(&mut backend, case).unwrap() else { continue };
            seen.insert(finding.op);
            if !finding.ok {
                let text = format!("{} {} {}", isa.name(), finding.op, finding.dtype);
                bad.push(format!("{text} ({}): {}", finding.case, finding.detail));
            }
        }
    }
    assert!(seen.len() >= 23, "rows of {} operations only: {seen:?}", seen.len());
    assert!(bad.is_empty(), "seed {SEED}: {} findings\n{}", bad.len(), bad.join("\n"));
}
