//! Every planted defect is bisected to its operation on a real model, written to a file, and shown
//! again by replaying the file.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

mod common;

use common::{Defect, LASTING, Liar, training};
use pontoon_cpu::simd::Isa;
use pontoon_ops::{DType, OpName};
use pontoon_qualify::bisect::{Divergence, Which, Wrong, bisect};
use pontoon_qualify::conformance::check;
use pontoon_qualify::reproducer::{Origin, Outcomes, read, write};
use pontoon_qualify::step::Step;

fn found(step: &Step, defect: Defect) -> Option<Divergence> {
    let (mut good, mut bad) = (Liar::new(Defect::None), Liar::new(defect));
    bisect(step, &mut good, &mut bad, &mut |_| {}).unwrap().divergence
}

#[test]
fn every_planted_defect_is_bisected_to_its_operation_and_replayed_from_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reproducer.safetensors");
    let dense = [DType::F32, DType::Bf16].map(|dtype| training("qwen3-1m", 2, 24, dtype));
    let experts = training("qwen3-moe-8m", 2, 24, DType::F32);
    for (defect, op) in LASTING {
        let step = match defect {
            Defect::WrongRounding => &dense[1],
            Defect::WrongExpertOnTies => &experts,
            _ => &dense[0],
        };
        let divergence = found(step, defect).unwrap_or_else(|| panic!("{defect:?} was missed"));
        let first = step.program.ops.iter().position(|other| other.name() == op).unwrap();
        assert_eq!(divergence.op, op.name(), "{defect:?}: {divergence:?}");
        // Products with f32 results come late in the list; all other defects show at once.
        if !matches!(defect, Defect::Bf16Accumulation | Defect::DroppedTail) {
            assert_eq!(divergence.op_index, first, "{defect:?}");
        }
        assert_eq!(divergence.device, Which::Second, "{defect:?}: {}", divergence.detail);
        let case = divergence.case.expect("a defect that shows alone has a case");
        let origin = Origin { finding: divergence.detail, ..Origin::default() };
        write(&path, &case, &origin, &Outcomes { first: None, second: None }).unwrap();
        let (case, _) = read(&path).unwrap();
        let (findings, _) = check(&mut Liar::new(defect), &case).unwrap();
        assert!(findings.iter().any(|finding| !finding.ok), "{defect:?} is not replayed");
        let (findings, _) = check(&mut Liar::new(Defect::None), &case).unwrap();
        assert!(findings.iter().all(|finding| finding.ok), "{defect:?}: {findings:?}");
    }
}

#[test]
fn other_instruction_sets_agree_within_tolerance_and_the_same_one_bit_for_bit() {
    for dtype in DType::FLOATS {
        let step = training("qwen3-1m", 2, 24, dtype);
        for isa in Isa::available() {
            let (mut one, mut two) = (Liar::new(Defect::None), Liar::on(isa, Defect::None));
            let outcome = bisect(&step, &mut one, &mut two, &mut |_| {}).unwrap();
            assert!(outcome.divergence.is_none(), "{dtype} {isa:?}: {:?}", outcome.divergence);
            assert_eq!(outcome.ops, step.program.ops.len());
            if isa == Isa::detect().unwrap() {
                assert_eq!(outcome.identical, outcome.ops, "{dtype}");
            }
        }
    }
}

#[test]
fn a_defect_of_the_first_device_is_laid_at_its_door() {
    let step = training("qwen3-1m", 1, 8, DType::F32);
    let (mut bad, mut good) = (Liar::new(Defect::SwappedRopeHalves), Liar::new(Defect::None));
    let outcome = bisect(&step, &mut bad, &mut good, &mut |_| {}).unwrap();
    let divergence = outcome.divergence.expect("the first device is wrong");
    assert_eq!((divergence.op, divergence.device), (OpName::Rope.name(), Which::First));
    assert_eq!(divergence.wrong, Wrong::Result);
    assert!(divergence.errors[0].unwrap() > 1.0 && divergence.errors[1].unwrap() <= 1.0);
}
