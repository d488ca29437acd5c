//! Runs of several kinds of devices, and live runs that go to others: the kinds here are
//! instruction sets of one CPU, whose bf16 products differ or, where the CPU has no such products,
//! whose class alone does.

mod common;

use std::path::Path;
use std::process::{Child, Stdio};

use common::{json, output, pontoon, prepared};
use serde_json::Value;

/// The second kind of device: the portable instructions everyone has would be too slow.
const OTHER: &str = if cfg!(target_arch = "x86_64") { "cpu:isa=avx2" } else { "cpu:isa=portable" };
const MORE: [&str; 8] = [
    "--set",
    "train.micro_batches=4",
    "--set",
    "train.micro_batch=1",
    "--set",
    "train.schedule=constant",
    "--set",
    "snapshot.every=20",
];

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn train<'a>(dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "run.toml", "--dir", dir, "--json"], &MORE[..], more].concat()
}

/// A run that goes on until it is asked to stop.
#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn endless(folder: &Path, dir: &str, more: &[&str]) -> Child {
    let arguments = [&train(dir, more)[..], &["--steps", "1000000"]].concat();
    let child = pontoon(folder, &arguments).stdout(Stdio::piped()).spawn().unwrap();
    await_step(folder, dir, 3);
    child
}

fn await_step(folder: &Path, dir: &str, step: usize) {
    while lines(&folder.join(dir).join("metrics.jsonl")).len() < step {
        std::thread::yield_now();
    }
}

#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn stop(mut child: Child) -> Value {
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let out = child.stdout.take().unwrap();
    assert!(child.wait().unwrap().success());
    serde_json::from_reader(out).unwrap()
}

/// Nothing went wrong; on a busy machine one may be slow.
fn assert_no_alarm(run: &Path) {
    let alarms = ["crash", "hang", "corrupt", "rolled_back", "out_of_memory", "took_over"];
    let kinds = kinds(run);
    assert!(!kinds.iter().any(|kind| alarms.contains(&kind.as_str())), "{kinds:?}");
}

fn kinds(run: &Path) -> Vec<String> {
    let events = lines(&run.join("events.jsonl"));
    events.iter().map(|event| event["kind"].as_str().unwrap_or("?").to_owned()).collect()
}

#[test]
fn devices_of_two_kinds_train_one_run_and_audit_each_other() {
    let folder = prepared();
    let folder = folder.path();
    // At three times this rate the loss leaps, and who computed what decides when.
    let steady = ["--steps", "16", "--set", "train.lr=1e-3"];
    let plain = json(folder, &train("plain", &[&steady[..], &["--in-process"]].concat()));
    let more = ["--device", "cpu", "--device", OTHER, "--set", "fleet.audit=1.0"];
    let mixed = json(folder, &train("mixed", &[&steady[..], &more].concat()));
    let (loss, want) = (mixed["loss"].as_f64().unwrap(), plain["loss"].as_f64().unwrap());
    assert!((loss / want - 1.0).abs() < 0.02, "{loss} {want}");
    assert_no_alarm(&folder.join("mixed"));
    let metrics = lines(&folder.join("mixed/metrics.jsonl"));
    assert!(metrics.iter().all(|line| line["class_error"].as_f64().unwrap() < 0.05));
    let both = metrics.iter().filter(|line| line["classes"].as_object().unwrap().len() == 2);
    assert!(both.count() > 0, "{metrics:?}");
    let state = folder.join("mixed/snapshots/step-00000016/state.json");
    let state: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    assert_eq!(state["extra"]["classes"].as_array().unwrap().len(), 2);
}

#[test]
fn a_move_within_a_kind_changes_no_bit() {
    let folder = prepared();
    let folder = folder.path();
    let child = endless(folder, "run", &["--workers", "2"]);
    let moved = json(folder, &["move", "run", "--to", "cpu,cpu,cpu:threads=1", "--json"]);
    let step = moved["certificate"]["step"].as_u64().unwrap() as usize;
    await_step(folder, "run", step + 3);
    let summary = stop(child);
    let steps = summary["steps"].to_string();
    let plain = json(folder, &train("plain", &["--in-process", "--steps", &steps]));
    assert_eq!(summary["weights_blake3"], plain["weights_blake3"]);
    let trials = moved["certificate"]["trials"].as_array().unwrap();
    assert!(trials.len() == 3 && trials.iter().all(|of| of["identical"] == true), "{moved}");
    assert_no_alarm(&folder.join("run"));
    let metrics = lines(&folder.join("run/metrics.jsonl"));
    let steps: Vec<u64> = metrics.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert!(steps.iter().copied().eq(1..=steps.len() as u64), "each step stands there once");
    assert_eq!(metrics.last().unwrap()["workers"], 3);
}

#[test]
fn a_move_to_another_kind_stays_within_the_certificates_band_and_is_resumed_there() {
    let folder = prepared();
    let folder = folder.path();
    // At three times this rate the loss leaps.
    let steady = ["--set", "train.lr=1e-3"];
    let more = ["--workers", "2", "--set", "fleet.audit=0.2"];
    let child = endless(folder, "run", &[&steady[..], &more].concat());
    await_step(folder, "run", 8);
    let to = format!("{OTHER},{OTHER}");
    let moved = json(folder, &["move", "run", "--to", &to, "--json"]);
    let certificate = &moved["certificate"];
    let step = certificate["step"].as_u64().unwrap() as usize;
    let band = &certificate["band"];
    let window = band["window"].as_u64().unwrap() as usize;
    await_step(folder, "run", step + window + 4);
    let summary = stop(child);
    let steps = summary["steps"].to_string();
    json(folder, &train("plain", &[&steady[..], &["--in-process", "--steps", &steps]].concat()));
    let [run, plain] = ["run", "plain"].map(|dir| lines(&folder.join(dir).join("metrics.jsonl")));
    let number = |of: &Value| of.as_f64().unwrap();
    let losses = |of: &[Value]| of.iter().map(|line| number(&line["loss"])).collect::<Vec<_>>();
    let (a, b) = (losses(&run), losses(&plain));
    assert_eq!(a[..step], b[..step]);
    for end in step + 1..=a.len() {
        let begin = step.max(end.saturating_sub(window));
        let sum = |of: &[f64]| of[begin..end].iter().sum::<f64>();
        let apart = (sum(&a) - sum(&b)).abs() / sum(&b);
        let chance = number(&band["scatter"]) * (2.0 / (end - begin) as f64).sqrt();
        let allowed = number(&band["rounding"]) + number(&band["deviations"]) * chance;
        assert!(apart <= allowed, "step {end}: {apart} {band}");
    }
    let class = |of: &Value| of["classes"].as_object().unwrap().keys().next().unwrap().clone();
    assert_ne!(class(&run[step - 1]), class(&run[step]), "{certificate}");
    let file = folder.join(format!("run/certificates/move-{step:08}.json"));
    let kept: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!((&kept["step"], &kept["agree"]), (&certificate["step"], &Value::Bool(true)));
    let events = lines(&folder.join("run/events.jsonl"));
    let event = events.iter().find(|event| event["kind"] == "moved").unwrap();
    assert_eq!(event["certificate"], *certificate);
    // The run's settings name the new devices, and it goes on there without a change of class.
    let more = (summary["steps"].as_u64().unwrap() + 2).to_string();
    json(folder, &["train", "run", "--resume", "--json", "--steps", &more]);
    assert!(!kinds(&folder.join("run")).contains(&"took_over".to_owned()));
    let more = (summary["steps"].as_u64().unwrap() + 4).to_string();
    let back = ["train", "run", "--resume", "--json", "--steps", &more, "--device", "cpu"];
    json(folder, &[&back[..], &["--workers", "2"]].concat());
    let event = lines(&folder.join("run/events.jsonl"));
    let event = event.iter().find(|event| event["kind"] == "took_over").unwrap();
    assert!(event["cause"].as_str().unwrap().contains("the snapshot was written by"), "{event}");
}

#[test]
fn a_run_started_with_nothing_but_its_settings_is_moved_live_to_another_kind() {
    let folder = prepared();
    let folder = folder.path();
    let child = endless(folder, "run", &[]);
    let moved = json(folder, &["move", "run", "--to", OTHER, "--json"]);
    let certificate = &moved["certificate"];
    assert_eq!((&moved["ok"], &certificate["agree"]), (&true.into(), &true.into()), "{moved}");
    let step = certificate["step"].as_u64().unwrap() as usize;
    await_step(folder, "run", step + 3);
    let status = json(folder, &["status", "run", "--json"]);
    let fleet: Vec<&str> =
        status["fleet"].as_array().unwrap().iter().filter_map(|of| of["device"].as_str()).collect();
    let isa = OTHER.split_once(':').unwrap().1;
    assert!(fleet.len() == 1 && fleet[0].contains(isa), "{status}");
    let summary = stop(child);
    assert_no_alarm(&folder.join("run"));
    let metrics = lines(&folder.join("run/metrics.jsonl"));
    let class = |of: &Value| of["classes"].as_object().unwrap().keys().next().unwrap().clone();
    assert_ne!(class(&metrics[step - 1]), class(&metrics[step]), "{certificate}");
    assert!(metrics.iter().all(|line| line["mfu"].is_f64() && line["workers"] == 1));
    assert_eq!(metrics.len() as u64, summary["steps"].as_u64().unwrap());
}

#[test]
fn what_cannot_be_moved_is_one_line_and_changes_nothing() {
    let folder = prepared();
    let folder = folder.path();
    let refused = |dir: &str, to: &str, want: &str| {
        let output = output(folder, &["move", dir, "--to", to]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error:")).collect();
        assert!(errors.len() == 1 && errors[0].contains(want), "{text}");
    };
    refused("nowhere", "cpu", "`nowhere` is no run folder");
    let child = endless(folder, "run", &["--workers", "2", "--set", "fleet.audit=0.5"]);
    refused("run", "chip:7,cpu", "there is no device `chip:7`");
    refused("run", "cpu", "second worker");
    refused("run", "cpu,cpu,cpu,cpu,cpu", "more devices than micro-batches");
    stop(child);
    assert_no_alarm(&folder.join("run"));
    refused("run", "cpu,cpu", "--resume --device cpu --device cpu");
    let child = endless(folder, "alone", &["--in-process"]);
    refused("alone", "cpu", "started with --in-process");
    stop(child);
    assert!(!folder.join("run/certificates").exists());
}
