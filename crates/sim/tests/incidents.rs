//! Single incidents, most of which a simulated seed found first.

use std::time::Duration;

use pontoon_sim::chaos::{self, Plan};
use pontoon_sim::fault_plan::{Planned, SimFault, Target};
use pontoon_sim::{Outcome, Scenario, Speeds, simulate_seen};

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// A step of about 600 ms on four workers and 16 micro-batches, and nothing that goes wrong.
fn scenario(workers: usize) -> Scenario {
    Scenario {
        seed: 5,
        workers,
        leaves: 16,
        steps: 40,
        speeds: Speeds {
            leaf: ms(100),
            jitter: 0.0,
            combine: ms(100),
            apply: ms(100),
            copy: ms(50),
            score: ms(100),
            start: ms(3000),
            replace: ms(0),
            save: ms(500),
            notice: ms(20),
            pause: ms(50),
            resume: ms(1000),
            slow_factor: 4.0,
        },
        classes: Vec::new(),
        faults: Vec::new(),
        snapshot_every: 10,
        ..Scenario::trial(5)
    }
    .quiet()
}

fn fault(at: u64, fault: SimFault, workers: &[usize]) -> Planned {
    let (at, workers) = (ms(at), workers.to_vec());
    Planned { at, fault, workers, lasts: ms(10_000), breaks_device: false }
}

/// Runs it; returns its outcome and the events, one line each.
fn run(scenario: &Scenario) -> (Outcome, Vec<String>) {
    let mut events = Vec::new();
    let outcome = simulate_seen(scenario, &mut |_, line| {
        events.extend(line.strip_prefix("event: ").map(str::to_owned));
    });
    (outcome.unwrap_or_else(|violation| panic!("{violation}; {events:#?}")), events)
}

fn has(events: &[String], what: &str) -> bool {
    events.iter().any(|event| event.contains(what))
}

#[test]
fn as_long_as_one_replica_is_left_nothing_goes_back_to_a_snapshot() {
    for lost in 1..64 {
        let mut scenario = scenario(64);
        (scenario.leaves, scenario.steps) = (64, 20);
        // Three kinds of loss, all at the same moment.
        let kinds = [SimFault::Crash, SimFault::Hang, SimFault::MemoryFault];
        for (index, kind) in kinds.into_iter().enumerate() {
            let workers: Vec<usize> = (0..lost).filter(|of| of % 3 == index).collect();
            scenario.faults.push(fault(5_000, kind, &workers));
        }
        let (outcome, events) = run(&scenario);
        assert!(outcome.finished);
        assert!(!has(&events, "rolled_back"), "{lost} of 64 were lost: {events:#?}");
        let joined = events.iter().filter(|event| event.contains("joined")).count();
        assert_eq!(joined, lost, "all come back");
    }
}

#[test]
fn when_all_replicas_are_lost_the_newest_snapshot_is_taken() {
    let mut scenario = scenario(4);
    scenario.faults.push(fault(13_000, SimFault::Crash, &[0, 1, 2, 3]));
    let (outcome, events) = run(&scenario);
    assert!(outcome.finished && has(&events, "all go on from step 10"), "{events:#?}");
    assert!(has(&events, "step 10 resumed"), "{events:#?}");
    assert!(outcome.lost_s["rolled_back"] > 0.0, "{:?}", outcome.lost_s);
}

#[test]
fn a_peer_that_has_just_taken_the_state_carries_the_run_when_its_donor_is_lost() {
    let mut scenario = scenario(2);
    // Worker 0 is back at about 8 s, takes the state, and is alone once its donor is gone.
    scenario.faults.push(fault(5_000, SimFault::Crash, &[0]));
    let joined = joined_at(&scenario);
    scenario.faults.push(fault(joined + 5, SimFault::Crash, &[1]));
    let (_, events) = run(&scenario);
    assert!(!has(&events, "rolled_back"), "{events:#?}");
}

/// When a worker joins, in milliseconds.
#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn joined_at(scenario: &Scenario) -> u64 {
    let mut joined = None;
    let outcome = simulate_seen(scenario, &mut |at, line| {
        if line.contains(" joined ") {
            joined.get_or_insert(at.as_millis() as u64);
        }
    });
    outcome.unwrap();
    joined.unwrap()
}

#[test]
fn a_snapshot_on_its_way_is_waited_for_before_all_go_back() {
    let mut scenario = scenario(1);
    scenario.speeds.save = ms(8_000);
    scenario.leaves = 4;
    // Step 10 is being saved when the only worker is lost.
    scenario.faults.push(fault(13_000, SimFault::Crash, &[0]));
    let (outcome, events) = run(&scenario);
    assert!(has(&events, "all go on from step 10, if it is saved"), "{events:#?}");
    assert!(has(&events, "step 10 resumed") && outcome.finished, "{events:#?}");
}

#[test]
fn a_snapshot_that_rots_while_all_restart_does_not_keep_them_restarting() {
    let mut scenario = scenario(2);
    scenario.snapshot_every = 2;
    scenario.steps = 12;
    scenario.faults.push(fault(9_000, SimFault::MemoryFault, &[0, 1]));
    // One of them dies as it loads, and finds the snapshot damaged when it loads again.
    scenario.faults.push(fault(11_900, SimFault::Crash, &[0]));
    scenario.faults.push(fault(12_100, SimFault::DamagedSnapshot, &[]));
    let (outcome, events) = run(&scenario);
    assert!(outcome.finished, "{events:#?}");
}

#[test]
fn one_that_copies_its_state_for_others_is_not_taken_for_slow() {
    let mut scenario = scenario(4);
    scenario.speeds.copy = ms(9_000);
    scenario.faults.push(fault(5_000, SimFault::Crash, &[2]));
    let (_, events) = run(&scenario);
    assert!(!has(&events, "evicted") && !has(&events, "hang"), "{events:#?}");
}

#[test]
fn one_that_hangs_as_it_loads_is_found_by_what_loading_took_others() {
    let mut scenario = scenario(4);
    scenario.steps = 120;
    scenario.faults.push(fault(5_000, SimFault::Crash, &[2]));
    scenario.faults.push(fault(6_000, SimFault::Hang, &[2]));
    let (outcome, events) = run(&scenario);
    assert!(has(&events, "hang worker 2"), "{events:#?}");
    let hang = outcome.struck.iter().find(|of| of.fault == SimFault::Hang).unwrap();
    assert!(hang.found.unwrap() - hang.at < ms(31_000), "{hang:?}");
}

#[test]
fn a_full_disk_is_tried_again_in_growing_pauses_and_the_run_ends_once_it_is_free() {
    let mut scenario = scenario(2);
    scenario.steps = 10;
    scenario
        .faults
        .push(Planned { lasts: Duration::from_secs(60), ..fault(8_000, SimFault::DiskFull, &[]) });
    let (outcome, events) = run(&scenario);
    let failures = events.iter().filter(|event| event.contains("snapshot_failed")).count();
    assert!(outcome.finished && (3..=12).contains(&failures), "{events:#?}");
}

#[test]
fn however_often_a_random_plan_strikes_the_disk_the_last_snapshot_is_written() {
    let text = "rate = 1.0\nkinds = [\"disk_full\", \"damaged_snapshot\"]\n";
    for seed in 0..100 {
        for snapshot_every in [0, 3, 10, 40] {
            let mut scenario = scenario(2);
            scenario.snapshot_every = snapshot_every;
            let of = chaos::Run { workers: 2, steps: scenario.steps, snapshot_every };
            let text = format!("[random]\nseed = {seed}\n{text}");
            scenario.storage = Some(Plan::parse(&text, "a random plan", of).unwrap());
            let (outcome, events) = run(&scenario);
            let seen = format!("seed {seed}, every {snapshot_every}: {events:#?}");
            assert!(outcome.finished && has(&events, "snapshot_failed"), "{seen}");
        }
    }
}

#[test]
fn a_killed_supervisor_is_followed_by_another_and_every_step_is_there_once() {
    for at in (4_000..20_000).step_by(137) {
        let mut scenario = scenario(3);
        scenario.faults.push(fault(at, SimFault::SupervisorKilled, &[]));
        let (outcome, _) = run(&scenario);
        assert!(outcome.finished && outcome.lives == 2, "killed at {at} ms");
    }
}

#[test]
fn a_bit_that_flips_anywhere_in_a_replica_is_pinned_on_it() {
    let targets = [
        Target::Weights,
        Target::State,
        Target::Gradient,
        Target::Published,
        Target::Sum,
        Target::Update,
    ];
    for target in targets {
        let mut scenario = scenario(3);
        scenario.audit = 1.0;
        scenario.faults.push(fault(8_000, SimFault::Flip(target), &[1]));
        let (_, events) = run(&scenario);
        assert!(has(&events, "corrupt worker 1"), "{target:?}: {events:#?}");
    }
}

#[test]
fn a_wrong_product_of_a_lone_worker_costs_its_step_and_two_in_one_step_a_new_process() {
    let mut scenario = scenario(1);
    (scenario.checksums, scenario.leaves) = (true, 4);
    scenario.faults.push(fault(13_000, SimFault::Flip(Target::Gradient), &[0]));
    let (outcome, events) = run(&scenario);
    assert!(has(&events, "computed again by the same worker"), "{events:#?}");
    assert!(!has(&events, "rolled_back") && outcome.finished, "{events:#?}");
    assert!(outcome.lost_s["corrupt"] < 0.7, "{:?}", outcome.lost_s);
    scenario.faults.push(fault(13_010, SimFault::Flip(Target::Gradient), &[0]));
    let (outcome, events) = run(&scenario);
    assert!(has(&events, "a new process") && has(&events, "step 10 resumed"), "{events:#?}");
    assert!(outcome.finished, "{events:#?}");
}

#[test]
fn workers_of_two_classes_hold_the_same_bits_audit_each_other_and_outlive_either_class() {
    let mixed = |classes: &[u8]| {
        let mut scenario = scenario(classes.len());
        (scenario.classes, scenario.audit) = (classes.to_vec(), 0.5);
        scenario
    };
    let (outcome, events) = run(&mixed(&[0, 1, 0, 1]));
    assert!(outcome.finished && !has(&events, "corrupt"), "{events:#?}");
    // The class that applies the steps goes for good; the other goes on from the state it was
    // handed.
    let mut scenario = mixed(&[1, 0, 0]);
    scenario.faults.push(fault(8_000, SimFault::Crash, &[1, 2]));
    let (outcome, events) = run(&scenario);
    assert!(outcome.finished && !has(&events, "rolled_back"), "{events:#?}");
    assert!(has(&events, "no worker of simulated-0 is left"), "{events:#?}");
    // A gradient that is beyond what rounding explains is told by the other class.
    let mut scenario = mixed(&[0, 1, 1]);
    scenario.audit = 1.0;
    scenario.faults.push(fault(8_000, SimFault::Flip(Target::Gradient), &[0]));
    let (outcome, events) = run(&scenario);
    assert!(outcome.finished && has(&events, "corrupt worker 0"), "{events:#?}");
}

#[test]
fn a_gradient_spoilt_on_its_way_to_another_class_is_no_fault_of_whoever_reads_it() {
    for at in (8_000..8_600).step_by(50) {
        for worker in 0..3 {
            let mut scenario = scenario(3);
            (scenario.classes, scenario.audit) = (vec![0, 0, 1], 1.0);
            scenario.faults.push(fault(at, SimFault::Flip(Target::Published), &[worker]));
            let (outcome, events) = run(&scenario);
            assert!(outcome.finished && has(&events, "changed on its way"), "{events:#?}");
        }
    }
}
