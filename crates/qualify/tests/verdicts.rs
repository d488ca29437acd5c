//! The verdict on whole devices: a good one is fit, one that lies once or hangs is not, and every
//! planted defect shows in the suite.

mod common;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Duration;

use common::{Defect, LASTING, Liar};
use pontoon_qualify::cases::Size;
use pontoon_qualify::speed::{Roofs, SpeedOptions};
use pontoon_qualify::stress::StressOptions;
use pontoon_qualify::suite::Conformance;
use pontoon_qualify::verdict::{Evidence, Fitness, Verdict, judge};
use pontoon_qualify::{speed, stress, suite};

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_127;

/// A clock that a look moves by a millisecond: soaks end after so many rounds on any machine.
fn clock() -> impl Fn() -> Duration {
    let now = Cell::new(0);
    move || {
        now.set(now.get() + 1);
        Duration::from_millis(now.get())
    }
}

fn soaked(defect: Defect) -> (stress::Stability, Verdict) {
    let options = StressOptions {
        soak: Duration::from_millis(40),
        memory_bytes: 1 << 20,
        deadline: Duration::from_secs(30),
    };
    let seen = stress::run(&mut Liar::new(defect), &options, &clock(), &mut |_| {});
    let verdict = judge(&Evidence {
        conformance: &Conformance::default(),
        stability: &seen,
        speed: None,
        speed_failure: None,
        forecast: None,
        needed: &BTreeSet::new(),
    });
    (seen, verdict)
}

#[test]
fn a_good_device_is_fit_and_its_soak_repeats_one_hash() {
    let (one, verdict) = soaked(Defect::None);
    assert_eq!((verdict.verdict, one.faults()), (Fitness::Fit, 0), "{:?}", verdict.reasons);
    assert!(one.rounds > 10 && one.ops_per_round >= 8, "{} rounds", one.rounds);
    assert_eq!(one.hash, soaked(Defect::None).0.hash);
}

#[test]
fn a_device_that_lies_once_in_the_soak_is_unfit() {
    let (seen, verdict) = soaked(Defect::LiesOnce(100));
    assert_eq!((seen.lies, verdict.verdict), (1, Fitness::Unfit));
    assert!(seen.lies_detail[0].contains("Matmul"), "{:?}", seen.lies_detail);
}

#[test]
fn a_device_that_hangs_is_unfit_and_the_suite_stops_there() {
    let (seen, verdict) = soaked(Defect::Hangs(50));
    assert_eq!((seen.hang.is_some(), verdict.verdict), (true, Fitness::Unfit));
    let found = suite::run(&mut Liar::new(Defect::Hangs(50)), SEED, &mut |_| {});
    assert!(found.stopped.is_some() && found.rows.len() < 60, "{:?}", found.stopped);
}

#[test]
fn every_planted_defect_fails_the_suite_at_its_operation() {
    for (defect, op) in LASTING {
        let found = suite::run(&mut Liar::new(defect), SEED, &mut |_| {});
        let failed: BTreeSet<&str> =
            found.rows.iter().filter(|row| !row.ok).map(|row| row.op).collect();
        assert_eq!(failed, BTreeSet::from([op.name()]), "seed {SEED}, {defect:?}");
    }
}

#[test]
fn every_operation_is_measured_and_a_fit_device_is_called_fit() {
    let mut backend = Liar::new(Defect::None);
    let conformance = suite::run(&mut backend, SEED, &mut |_| {});
    let wrong: Vec<_> = conformance.rows.iter().filter(|row| !row.ok).collect();
    assert!(wrong.is_empty() && conformance.rows.len() > 200, "{wrong:?}");
    let options = SpeedOptions {
        dtypes: vec![pontoon_ops::DType::F32],
        size: Size::Small,
        budget: Duration::ZERO,
        known: Roofs::default(),
    };
    let speed = speed::run(&mut backend, &options, &clock(), &mut |_| {}).unwrap();
    assert_eq!(speed.rows.len(), 39);
    assert!(speed.roofs.memory > 0.0 && speed.roofs.matrix["f32"] > 0.0);
    let verdict = judge(&Evidence {
        conformance: &conformance,
        stability: &stress::Stability::default(),
        speed: Some(&speed),
        speed_failure: None,
        forecast: None,
        needed: &BTreeSet::new(),
    });
    assert_eq!(verdict.verdict, Fitness::Fit, "{:?}", verdict.reasons);
}
