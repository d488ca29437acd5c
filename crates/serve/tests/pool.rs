//! The pool: who may join, who is caught, and what a request says of where it was answered.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use common::{Failure, Faults, Small, collect, generate, submit};
use pontoon_models::SamplingSettings;
use pontoon_serve::engine::request::Scored;
use pontoon_serve::pool::Pool;
use pontoon_serve::pool::events::EventKind;
use serde_json::{Value, json};

fn settings(seed: u64) -> SamplingSettings {
    SamplingSettings { seed, tokens_max: 24, ..SamplingSettings::default() }
}

fn ask(pool: &Pool, seed: u64) -> (Vec<Scored>, Vec<String>) {
    let prompt = (0..20).map(|at| ((at + seed) % 90) as u32).collect();
    collect(submit(pool, generate(prompt, settings(seed))))
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what} takes too long");
        std::thread::yield_now();
    }
}

fn all_serve(pool: &Pool) -> bool {
    pool.devices().iter().all(|state| state.phase == "serving")
}

fn phase(pool: &Pool, device: &str) -> (&'static str, String) {
    let states = pool.devices();
    let state = states.iter().find(|state| state.name == device).unwrap();
    (state.phase, state.reason.clone())
}

/// Lets one of several devices lie, and asks until it is caught.
fn caught(devices: &[&str], liar: &str) {
    let small = Small { audit_share: 1.0, ..Small::new() };
    let faults = Faults::none();
    let pool = small.pool(devices, small.options(), &faults);
    wait("starting", || all_serve(&pool));
    let truth: Vec<(Vec<Scored>, Vec<String>)> = (0..4).map(|seed| ask(&pool, seed)).collect();
    faults.set(liar, 0, Failure::Lie);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut seed = 0;
    while phase(&pool, liar).0 == "serving" {
        assert!(Instant::now() < deadline, "the liar is not caught");
        // Several at once, so that every device has some.
        let running: Vec<_> = (0..4)
            .map(|at| submit(&pool, generate(vec![5, 6, at], settings(seed + u64::from(at)))))
            .collect();
        running.into_iter().for_each(|receiver| assert_eq!(collect(receiver).0.len(), 24));
        seed += 4;
    }
    let (state, reason) = phase(&pool, liar);
    assert_eq!(state, "down");
    assert!(reason.contains("log-probability"), "{reason}");
    for device in devices.iter().filter(|device| **device != liar) {
        assert_eq!(phase(&pool, device).0, "serving", "{device} is innocent");
    }
    let events = pool.events();
    let event = events.iter().find(|event| event.kind == EventKind::Corrupt).unwrap();
    assert_eq!((event.device.as_str(), event.cause.as_str()), (liar, reason.as_str()));
    assert!(pool.audits().disagreed.load(Relaxed) > 0);
    // What is left tells the truth, and the liar does not come back.
    let stranger = |device: &String| device.ends_with("/portable");
    for (seed, (truth, told_by)) in truth.iter().enumerate() {
        let (tokens, on) = ask(&pool, seed as u64);
        assert!(!on.iter().any(|device| device == liar));
        // Only within a class are bits equal.
        assert!(told_by.iter().any(stranger) || tokens == *truth, "seed {seed}");
    }
    pool.stop();
}

#[test]
fn a_device_that_lies_leaves_with_evidence_and_the_others_go_on() {
    caught(&["a", "b"], "a");
    caught(&["a", "b", "c"], "b");
}

#[test]
fn a_device_of_another_class_that_lies_leaves_too() {
    caught(&["a", "c/portable"], "c/portable");
}

#[test]
fn honest_devices_of_two_classes_agree_on_every_request() {
    let small = Small { audit_share: 1.0, ..Small::new() };
    let pool = small.pool(&["a", "b/portable"], small.options(), &Faults::none());
    wait("starting", || all_serve(&pool));
    (0..8).for_each(|seed| drop(ask(&pool, seed)));
    wait("auditing", || pool.audits().agreed.load(Relaxed) == 8);
    assert_eq!(pool.audits().disagreed.load(Relaxed), 0);
    assert!(all_serve(&pool));
    pool.stop();
}

#[test]
fn a_device_that_comes_back_wrong_is_not_let_in() {
    let small = Small::new();
    let faults = Faults::none();
    let pool = small.pool(&["a", "b"], small.options(), &faults);
    wait("starting", || all_serve(&pool));
    // It fails once, and is wrong from its next start on.
    faults.set("b", 0, Failure::Error);
    faults.set("b", 1, Failure::Lie);
    wait("refusing", || {
        // Two at once, so that both devices have one.
        let both = [1, 2].map(|seed| submit(&pool, generate(vec![5, 6], settings(seed))));
        both.into_iter().for_each(|receiver| drop(collect(receiver)));
        pool.events().iter().any(|event| event.kind == EventKind::Refused)
    });
    let (state, reason) = phase(&pool, "b");
    assert_eq!(state, "down");
    assert!(reason.contains("does not agree") && reason.contains("of the probe"), "{reason}");
    assert_eq!(ask(&pool, 2).0.len(), 24);
    pool.stop();
}

#[test]
fn an_answer_says_which_devices_and_numeric_classes_it_met() {
    let small = Small::new();
    let faults = Faults::none();
    let pool = small.pool(&["a", "b/portable"], small.options(), &faults);
    wait("starting", || all_serve(&pool));
    let classes: Vec<String> =
        pool.devices().into_iter().map(|state| state.numeric_class).collect();
    let server = small.server(pool);
    let body = json!({ "prompt": "A bridge", "max_tokens": 40, "seed": 1 });
    let value = server.post("/v1/completions", &body);
    assert!(classes.contains(&value["system_fingerprint"].as_str().unwrap().to_owned()));
    // Whichever has it fails on the way; the other one, of another class, goes on.
    faults.set("a", 10, Failure::Error);
    faults.set("b/portable", 10, Failure::Error);
    let moved = |value: &Value| value["system_fingerprint"].as_str().unwrap().contains(" + ");
    wait("moving", || {
        let value = server.post("/v1/completions", &body);
        assert_eq!(value["usage"]["completion_tokens"], 40);
        moved(&value) && value["device"].as_str().unwrap().contains(", ")
    });
}
