//! Backward operations are the gradients of the forward operations, by central differences.

use std::collections::BTreeSet;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::Op;
use pontoon_qualify::{cases, conformance, gradient};

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_126;

#[test]
fn every_backward_operation_is_the_gradient_of_its_forward_operation() {
    let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let (mut bad, mut seen) = (Vec::new(), BTreeSet::new());
    for case in cases::all(SEED) {
        let Some(finding) = gradient::check(&mut backend, &case).unwrap() else { continue };
        seen.insert(finding.op);
        if !finding.ok {
            let text = format!("{} ({})", finding.op, finding.case);
            bad.push(format!("{text}: {:.2} {}", finding.worst_error, finding.detail));
        }
    }
    assert_eq!(seen.len(), 11, "gradients of {seen:?}");
    assert!(bad.is_empty(), "seed {SEED}: {} findings\n{}", bad.len(), bad.join("\n"));
}

#[test]
fn a_gradient_of_another_function_is_found_though_the_reference_agrees_with_it() {
    let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let cases = cases::all(SEED).into_iter();
    let norms = cases.filter(|case| matches!(case.op, Op::RmsNormBwd(_)));
    let mut checked = 0;
    for mut case in norms {
        let Op::RmsNormBwd(op) = case.op.clone() else { unreachable!("filtered above") };
        let wrong: Vec<f64> = case.memory.read(&op.rstd).iter().map(|rstd| rstd * 1.01).collect();
        case.memory.write(&op.rstd, &wrong);
        let Some(finding) = gradient::check(&mut backend, &case).unwrap() else { continue };
        assert!(!finding.ok, "{} passed with a wrong statistic", finding.case);
        let (findings, _) = conformance::check(&mut backend, &case).unwrap();
        assert!(findings.iter().all(|finding| finding.ok), "{findings:?}");
        checked += 1;
    }
    assert!(checked > 0, "no case was checked");
}
