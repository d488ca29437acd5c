//! Every planted defect is caught by the conformance suite and bisected to its operation, through
//! the backend that runs on the emulated device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

#[path = "../../../crates/qualify/tests/common/mod.rs"]
mod common;

use std::sync::{Arc, Mutex, PoisonError};

use common::{Defect, Liar, training};
use pontoon_ascend::{AscendBackend, Library};
use pontoon_emu_ascend::fault::{Fault, Kind};
use pontoon_ops::{DType, OpName};
use pontoon_qualify::bisect::{Which, bisect};
use pontoon_qualify::cases;
use pontoon_qualify::conformance::check;
use pontoon_qualify::step::Step;

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_125;
const DEVICE: i32 = 2;

/// The device's faults are the process's, so its tests take turns.
static TURN: Mutex<()> = Mutex::new(());

fn device() -> AscendBackend {
    let library = Arc::new(Library::linked(pontoon_emu_ascend::symbol));
    AscendBackend::open(&library, &format!("emu-ascend:{DEVICE}"), DEVICE).unwrap()
}

/// Each defect, the operator it is planted in, and the operation in which it must be found.
const PLANTED: [(Kind, &str, OpName); 8] = [
    (Kind::WrongRounding, "aclnnMatmul", OpName::Matmul),
    (Kind::DroppedTail, "aclnnMatmul", OpName::Matmul),
    (Kind::CausalEdge, "aclnnFlashAttention", OpName::Attention),
    (Kind::StaleWorkspace, "aclnnRmsNormGrad", OpName::RmsNormBwd),
    (Kind::Nondeterministic, "aclnnRmsNormGrad", OpName::RmsNormBwd),
    (Kind::SwappedRope, "aclnnSub", OpName::Rope),
    (Kind::Bf16Accumulation, "aclnnMatmul", OpName::Matmul),
    (Kind::WrongTie, "aclnnSort", OpName::RouterTopK),
];

#[test]
fn the_suite_catches_every_planted_defect_at_its_operation() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let all = cases::all(SEED);
    for (kind, operator, op) in PLANTED {
        let mut backend = device();
        pontoon_emu_ascend::inject(&Fault::new(kind).on(DEVICE).about(operator));
        let findings = all.iter().filter(|case| case.op.name() == op).flat_map(|case| {
            let (findings, _) = check(&mut backend, case).unwrap();
            findings
        });
        let bad = findings.filter(|finding| !finding.ok).count();
        pontoon_emu_ascend::clear(DEVICE).unwrap();
        assert!(bad > 0, "seed {SEED}: {kind:?} in {operator} was missed at {op:?}");
    }
}

#[test]
fn every_planted_defect_is_bisected_to_its_operation_on_a_real_model() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let dense = [DType::F32, DType::Bf16].map(|dtype| training("qwen3-1m", 2, 24, dtype));
    let experts = training("qwen3-moe-8m", 2, 24, DType::F32);
    for (kind, operator, op) in PLANTED {
        let step: &Step = match kind {
            Kind::WrongRounding => &dense[1],
            Kind::WrongTie => &experts,
            _ => &dense[0],
        };
        let (mut good, mut bad) = (Liar::new(Defect::None), device());
        pontoon_emu_ascend::inject(&Fault::new(kind).on(DEVICE).about(operator));
        let divergence = bisect(step, &mut good, &mut bad, &mut |_| {}).unwrap().divergence;
        let divergence = divergence.unwrap_or_else(|| panic!("{kind:?} was missed"));
        // The backward pass first meets the last norm, which is joined with an addition: another
        // operation, but the same operator.
        let op = if op == OpName::RmsNormBwd { OpName::AddRmsNormBwd } else { op };
        assert_eq!(divergence.op, op.name(), "{kind:?} in {}", divergence.op);
        assert_eq!(divergence.device, Which::Second, "{kind:?}: {}", divergence.detail);
        let case = divergence.case.expect("a defect that shows alone has a case");
        let (findings, _) = check(&mut bad, &case).unwrap();
        assert!(findings.iter().any(|finding| !finding.ok), "{kind:?} is not replayed");
        pontoon_emu_ascend::clear(DEVICE).unwrap();
        let (findings, _) = check(&mut bad, &case).unwrap();
        assert!(findings.iter().all(|finding| finding.ok), "{kind:?}: {findings:?}");
    }
}

#[test]
fn without_a_defect_the_devices_agree_and_nothing_stands_in_the_strict_log() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    pontoon_emu_ascend::strict::take(Some(DEVICE));
    for (name, dtype) in [("qwen3-1m", DType::Bf16), ("qwen3-moe-8m", DType::F32)] {
        let step = training(name, 2, 24, dtype);
        let (mut good, mut emulated) = (Liar::new(Defect::None), device());
        let outcome = bisect(&step, &mut good, &mut emulated, &mut |_| {}).unwrap();
        assert!(outcome.divergence.is_none(), "{name}: {:?}", outcome.divergence);
        // Sums are taken in another order, so not everything is equal.
        assert!(outcome.identical < outcome.ops, "{name}");
    }
    let entries = pontoon_emu_ascend::strict::take(Some(DEVICE));
    let real = entries.iter().filter(|entry| !entry.text.starts_with("left "));
    assert_eq!(real.count(), 0, "{entries:?}");
}
