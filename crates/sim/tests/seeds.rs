//! Runs drawn from seeds: whatever goes wrong in them, no promise is broken.

use pontoon_sim::{Scenario, replay_command, simulate, simulate_seen};

/// Trials of one test run; they take a few seconds.
const TRIALS: u64 = 400;
fn trials() -> u64 { std::env::var("TRIALS").map_or(TRIALS, |t| t.parse().unwrap()) }

#[test]
fn in_hundreds_of_simulated_runs_no_promise_is_broken() {
    let mut broken = Vec::new();
    for seed in 0..trials() {
        if let Err(violation) = simulate(&Scenario::trial(seed)) {
            broken.push(format!("{}   # {violation}", replay_command(seed)));
        }
    }
    assert!(broken.is_empty(), "{} of {TRIALS} seeds:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn zz_debug() {
    let Ok(seed) = std::env::var("SEED") else { return };
    let scenario = Scenario::trial(seed.parse().unwrap());
    println!("{scenario:#?}");
    let end = simulate_seen(&scenario, &mut |at, line| println!("{:9.3} {line}", at.as_secs_f64()));
    println!("{end:#?}");
}
