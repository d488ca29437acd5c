//! A run is watched and stopped from outside, as a user does it.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{json, output, pontoon, prepared, succeed};
use serde_json::Value;

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Starts a long run and waits for its first steps.
#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn started(folder: &Path, dir: &str, more: &[&str]) -> Child {
    let arguments = [&["train", "run.toml", "--dir", dir, "--json", "--steps", "4000"], more];
    let mut command = pontoon(folder, &arguments.concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    while lines(&folder.join(dir).join("metrics.jsonl")) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
        std::thread::yield_now();
    }
    child
}

#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn summary(child: Child) -> Value {
    serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap()
}

fn said(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_is_stopped_with_its_state_saved_alone_and_with_workers() {
    let folder = prepared();
    let folder = folder.path();
    for (dir, more) in [("alone", &["--in-process"][..]), ("fleet", &["--workers", "2"])] {
        let child = started(folder, dir, more);
        let running = json(folder, &["status", dir, "--json"]);
        assert_eq!((&running["state"], &running["steps"]), (&"running".into(), &4000.into()));
        let devices = running["fleet"].as_array().map_or(0, Vec::len);
        assert!(dir == "fleet" || devices == 1, "{running}");
        let stopped = output(folder, &["stop", dir]);
        assert!(stopped.status.success(), "{}", said(&stopped));
        let summary = summary(child);
        assert_eq!(summary["finished"], false);
        let text = String::from_utf8_lossy(&stopped.stdout).into_owned();
        assert!(text.contains(&format!("stopped at step {}", summary["steps"])), "{text}");
        assert!(said(&stopped).contains("--resume"), "{}", said(&stopped));
        let status = json(folder, &["status", dir, "--json"]);
        assert_eq!(status["state"], "stopped");
        assert_eq!(status["snapshots"][0], summary["steps"]);
        let again = output(folder, &["stop", dir]);
        assert_eq!(again.status.code(), Some(1));
        assert!(said(&again).contains("nothing runs in"), "{}", said(&again));
    }
    let nowhere = output(folder, &["stop", "nowhere"]);
    assert!(said(&nowhere).contains("no run folder") && said(&nowhere).lines().count() == 1);
}

#[test]
fn ctrl_c_stops_a_run_at_a_step_and_a_second_supervisor_is_refused() {
    let folder = prepared();
    let folder = folder.path();
    let child = started(folder, "run", &["--workers", "2"]);
    let second = output(folder, &["train", "run", "--resume", "--workers", "2"]);
    assert_eq!(second.status.code(), Some(1));
    let text = said(&second);
    assert!(text.contains(&format!("in use by process {}", child.id())), "{text}");
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let summary = summary(child);
    assert_eq!(summary["finished"], false);
    let status = json(folder, &["status", "run", "--json"]);
    assert_eq!((&status["state"], &status["step"]), (&"stopped".into(), &summary["steps"]));
}

#[test]
fn a_run_is_watched_until_it_ends_in_a_pipe_and_in_a_terminal() {
    let folder = prepared();
    let folder = folder.path();
    let child = started(folder, "run", &["--workers", "2"]);
    let piped = pontoon(folder, &["status", "run", "--watch"]).stdout(Stdio::piped()).spawn();
    // `script` gives a command a terminal of its own.
    let program = env!("CARGO_BIN_EXE_pontoon");
    let command =
        format!("stty cols 100 rows 30; {program} status run --watch; echo left; stty -a");
    let screen = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(folder)
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    // Both have looked once before the run ends: the view in the terminal has asked the run.
    while json(folder, &["status", "run", "--json"])["step"].as_u64() < Some(40) {}
    succeed(folder, &["stop", "run"]);
    let steps = summary(child)["steps"].clone();
    let text = String::from_utf8(piped.unwrap().wait_with_output().unwrap().stdout).unwrap();
    assert!(text.lines().count() >= 2, "{text}");
    assert!(text.contains("running  ETA ") && text.contains("stopped"), "{text}");
    assert!(text.contains(&format!("step {steps}/4000")), "{text}");
    assert!(!text.contains('\u{1b}'), "control characters in a pipe: {text}");
    // Where there is no such command, the drawing is tested under `watch.rs`.
    let Ok(screen) = screen else { return };
    let text = String::from_utf8_lossy(&screen.wait_with_output().unwrap().stdout).into_owned();
    let (view, after) = text.split_once("\u{1b}[?1049l").expect("it leaves the second screen");
    assert!(view.contains("\u{1b}[?1049h"), "it entered it: {text}");
    for what in ["loss", "workers", "member", "micro-batches/s", "ETA"] {
        assert!(view.contains(what), "no {what} in {view}");
    }
    assert!(after.contains("stopped") && after.contains("left"), "{after}");
    assert!(after.contains(" echo ") && after.contains(" icanon "), "raw mode stays: {after}");
}

#[test]
fn a_run_that_died_says_so_and_how_it_goes_on() {
    let folder = prepared();
    let folder = folder.path();
    let more = ["--set", "snapshot.every=1000"];
    let mut child = started(folder, "run", &more);
    child.kill().unwrap();
    child.wait().unwrap();
    let text = succeed(folder, &["status", "run", "--watch"]);
    assert!(text.contains("died") && text.contains("pontoon train run --resume"), "{text}");
    assert_eq!(json(folder, &["status", "run", "--json"])["state"], "died");
}

#[test]
fn promises_are_tried_by_seed_and_a_long_run_is_told_in_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let sweep = json(folder, &["simulate", "--seeds", "20", "--json"]);
    assert_eq!((&sweep["seeds"], sweep["broken"].as_array().map(Vec::len)), (&20.into(), Some(0)));
    let told = output(folder, &["simulate", "--seed", "7"]);
    assert!(told.status.success() && said(&told).contains("strikes"), "{}", said(&told));
    let long = ["simulate", "--workers", "16", "--days", "1", "--rate", "40", "--json"];
    let run = json(folder, &long);
    assert!(run["result"]["goodput"].as_f64().unwrap() > 0.5, "{run}");
    assert!(run["result"]["lost_s"].is_object() && run["result"]["by_kind"].is_object(), "{run}");
    for (arguments, want) in [
        (&["--days", "1", "--rate", "often"][..], "--rate is `often`"),
        (&["--days", "0"], "--days should be above 0"),
        (&["--days", "1", "--workers", "1", "--audit", "0.1"], "second worker"),
        (&["--seeds", "0"], "at least 1"),
    ] {
        let refused = output(folder, &[&["simulate"], arguments].concat());
        let text = said(&refused);
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(text.contains(want) && text.lines().count() == 1, "{text}");
    }
}
