//! A supervised run ends with the weights of an undisturbed one, whoever computed what.

mod common;

use std::path::Path;

use common::{json, output, pontoon, prepared};
use serde_json::Value;

const FOUR: [&str; 4] = ["--set", "train.micro_batches=4", "--set", "train.micro_batch=1"];

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn train<'a>(dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "run.toml", "--dir", dir, "--json"], &FOUR[..], more].concat()
}

/// The children of a process, by their command lines.
fn workers_of(parent: u32) -> Vec<i32> {
    let children = format!("/proc/{parent}/task/{parent}/children");
    let text = std::fs::read_to_string(children).unwrap_or_default();
    text.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

#[test]
fn any_number_of_workers_gives_the_same_hash_and_so_does_one_that_is_killed() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(folder, &train("plain", &["--in-process"]));
    for (workers, more) in [("1", &[][..]), ("3", &["--workers", "3"])] {
        let run = json(folder, &train(workers, more));
        assert_eq!(run["weights_blake3"], plain["weights_blake3"], "{workers} workers");
        assert_eq!(run["finished"], true);
        let events = lines(&folder.join(workers).join("events.jsonl"));
        let wrong = ["crash", "hang", "corrupt", "rolled_back"];
        let alarm = events.iter().find(|event| wrong.iter().any(|kind| event["kind"] == *kind));
        assert_eq!(alarm, None, "a false alarm");
    }
    let more = ["--workers", "2", "--set", "fleet.audit=1.0"];
    let child = pontoon(folder, &train("killed", &more))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = folder.join("killed/metrics.jsonl");
    while lines(&metrics).len() < 3 {
        std::thread::yield_now();
    }
    let victim = workers_of(child.id())[0];
    assert!(
        std::process::Command::new("kill")
            .args(["-9", &victim.to_string()])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    let run: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(run["weights_blake3"], plain["weights_blake3"]);
    assert!(run["faults"].as_u64().unwrap() >= 1);
    let events = lines(&folder.join("killed/events.jsonl"));
    let crash = events.iter().find(|event| event["kind"] == "crash").unwrap();
    assert!(crash["cause"].as_str().unwrap().contains("signal: 9"), "{crash}");
    assert_eq!(lines(&metrics).len(), 16, "each step stands there once");
}

#[test]
fn a_killed_supervisor_leaves_no_workers_and_its_run_goes_on() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(folder, &train("plain", &["--in-process"]));
    let mut child = pontoon(folder, &train("run", &["--workers", "2"]))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while lines(&folder.join("run/metrics.jsonl")).len() < 5 {
        std::thread::yield_now();
    }
    let workers = workers_of(child.id());
    assert_eq!(workers.len(), 2);
    child.kill().unwrap();
    child.wait().unwrap();
    while workers.iter().any(|id| Path::new(&format!("/proc/{id}/exe")).exists()) {
        std::thread::yield_now();
    }
    let run = json(folder, &train("run", &["--workers", "2", "--resume"]));
    assert_eq!(run["weights_blake3"], plain["weights_blake3"]);
}

#[test]
fn settings_that_no_fleet_can_have_are_one_line() {
    let folder = prepared();
    for (more, want) in [
        (&["--workers", "5"][..], "more workers than train.micro_batches"),
        (&["--workers", "1", "--set", "fleet.audit=0.5"], "second worker"),
        (&["--workers", "2", "--device", "chip:7"], "no device `chip:7`"),
        (&["--workers", "2", "--set", "fleet.hang_after=\"soon\""], "hang_after"),
    ] {
        let output = output(folder.path(), &train("never", more));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(want) && text.lines().count() == 1, "{text}");
        assert!(!folder.path().join("never/metrics.jsonl").exists());
    }
}

#[test]
fn a_second_supervisor_on_the_same_run_is_refused_and_the_first_goes_on() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(folder, &train("plain", &["--in-process"]));
    let first = pontoon(folder, &train("run", &["--workers", "2"]))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while lines(&folder.join("run/metrics.jsonl")).is_empty() {
        std::thread::yield_now();
    }
    for more in [&["--workers", "2", "--resume"][..], &["--resume"]] {
        let second = output(folder, &train("run", more));
        let text = String::from_utf8_lossy(&second.stderr);
        // It may come when all is done; then there is nothing left to refuse.
        if second.status.code() == Some(1) {
            let says = text.contains(&first.id().to_string()) || text.contains("all steps");
            assert!(says && text.lines().count() == 1, "{text}");
        }
    }
    let run: Value = serde_json::from_slice(&first.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(run["weights_blake3"], plain["weights_blake3"]);
}
