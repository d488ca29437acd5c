//! `kill -9` at any moment, then `--resume`: the final weights are those of a run left in peace.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

mod common;

use std::path::Path;

use common::{json, pontoon, prepared};

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Starts or resumes the run and kills it once `metrics.jsonl` has this many lines.
fn kill_at(folder: &Path, arguments: &[&str], count: usize) {
    let mut child = pontoon(folder, arguments).spawn().unwrap();
    while lines(&folder.join("killed/metrics.jsonl")) < count {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_run_killed_three_times_on_other_threads_ends_with_the_same_hash() {
    let folder = prepared();
    let folder = folder.path();
    let whole = json(folder, &["train", "run.toml", "--dir", "whole", "--in-process", "--json"]);
    let train = ["train", "run.toml", "--dir", "killed", "--device"];
    kill_at(folder, &[&train[..], &["cpu:threads=1"]].concat(), 2);
    kill_at(folder, &[&train[..], &["cpu:threads=2", "--in-process", "--resume"]].concat(), 8);
    kill_at(folder, &[&train[..], &["cpu:threads=1", "--resume"]].concat(), 14);
    let resumed = json(folder, &[&train[..], &["cpu:threads=3", "--resume", "--json"]].concat());
    assert_eq!(resumed["weights_blake3"], whole["weights_blake3"]);
    assert_eq!((&resumed["steps"], &resumed["finished"]), (&16.into(), &true.into()));
    assert_eq!(lines(&folder.join("killed/metrics.jsonl")), 16, "each step stands there once");
    let status = json(folder, &["status", "killed", "--json"]);
    assert_eq!((&status["step"], &status["finished"]), (&16.into(), &true.into()));
}

#[test]
fn a_run_goes_on_from_its_folder_alone() {
    let folder = prepared();
    let folder = folder.path();
    json(folder, &["train", "run.toml", "--dir", "run", "--steps", "5", "--json"]);
    let more = json(folder, &["train", "run", "--resume", "--steps", "9", "--json"]);
    assert_eq!(more["steps"], 9);
    let loss = more["loss"].as_f64().unwrap();
    let first = std::fs::read_to_string(folder.join("run/metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(first.lines().next().unwrap()).unwrap();
    assert!(loss < first["loss"].as_f64().unwrap() - 0.5, "it learns: {first} then {loss}");
}
