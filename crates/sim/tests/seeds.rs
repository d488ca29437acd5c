//! Runs drawn from seeds: whatever goes wrong in them, no promise is broken.

use pontoon_sim::{Long, Scenario, Summary, published_rate, replay_command, simulate};

/// Trials of one test run; they take a few seconds.
const TRIALS: u64 = 400;

#[test]
fn in_hundreds_of_simulated_runs_no_promise_is_broken() {
    let mut broken = Vec::new();
    for seed in 0..TRIALS {
        if let Err(violation) = simulate(&Scenario::trial(seed)) {
            broken.push(format!("{}   # {violation}", replay_command(seed)));
        }
    }
    assert!(broken.is_empty(), "{} of {TRIALS} seeds:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    let again = |seed| {
        let outcome = simulate(&Scenario::trial(seed)).unwrap();
        (outcome.wall, outcome.inputs, outcome.events, format!("{:?}", outcome.struck))
    };
    for seed in 0..20 {
        assert_eq!(again(seed), again(seed), "{}", replay_command(seed));
    }
}

#[test]
fn hundreds_of_workers_live_through_a_day_of_published_interruptions() {
    let long = Long {
        seed: 3,
        workers: 512,
        days: 0.5,
        // Four times as often as published, to see some of each in half a day.
        faults_a_day: 4.0 * published_rate(None),
        step_seconds: 60.0,
        snapshot_minutes: 15.0,
        audit: 0.01,
    };
    let outcome = simulate(&Scenario::long(&long)).unwrap();
    let summary = Summary::of(&outcome);
    assert!(summary.faults >= 8, "{summary:?}");
    assert!(summary.goodput > 0.9, "{summary:?}");
    let accounted =
        summary.goodput * summary.days * 86_400.0 + summary.lost_s.values().sum::<f64>();
    assert!((accounted / (summary.days * 86_400.0) - 1.0).abs() < 1e-6, "{summary:?}");
}

#[test]
fn audits_make_steps_longer_by_their_share_and_the_account_says_so() {
    let share = 0.05;
    let run = |audit| {
        let long = Long {
            seed: 5,
            workers: 64,
            days: 1.0,
            faults_a_day: 0.0,
            step_seconds: 60.0,
            snapshot_minutes: 1e6,
            audit,
        };
        Summary::of(&simulate(&Scenario::long(&long)).unwrap())
    };
    let (without, with) = (run(0.0), run(share));
    let longer = without.steps as f64 / with.steps as f64 - 1.0;
    assert!((0.5 * share..1.5 * share).contains(&longer), "{longer} longer for {share}");
    let charged = with.lost_s["audit"] / (with.days * 86_400.0);
    let cost = 1.0 - with.steps as f64 / without.steps as f64;
    assert!((charged / cost - 1.0).abs() < 0.15, "{charged} charged for {cost}");
}
