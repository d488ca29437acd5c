//! Runs that meet emulated devices which fail, from inside their library: a run on two of them ends
//! with the weights of an undisturbed run, a move to bad ones is refused and changes nothing, and a
//! group of them is judged. No vendor is named here; `pontoon devices` tells the device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]
#![allow(dead_code, reason = "the common part serves other files of tests too")]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{json, output, pontoon, prepared};
use serde_json::Value;

/// The environment variable that arms faults in the emulated device's library.
const FAULTS: &str = "PONTOON_EMU_FAULTS";
/// The one that says how much memory its devices have.
const MEMORY: &str = "PONTOON_EMU_MEMORY_BYTES";
/// A rate that does not depend on how many steps are asked for.
const CONSTANT: [&str; 2] = ["--set", "train.schedule=constant"];

/// The first emulated device and the one after it.
fn pair(folder: &Path) -> [String; 2] {
    let found = json(folder, &["devices", "--json"]);
    let devices = found["devices"].as_array().unwrap();
    let device = devices.iter().find(|device| device["emulated"] == true).unwrap();
    let first = device["device"].as_str().unwrap();
    let (kind, _) = first.split_once(':').unwrap();
    [first.to_owned(), format!("{kind}:1")]
}

/// Trains on both devices; gives what the run prints at its end.
fn train(folder: &Path, dir: &str, devices: &[String; 2], faults: &str) -> serde_json::Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pontoon"));
    command.current_dir(folder).args(["train", "run.toml", "--dir", dir, "--workers", "2"]);
    command.args(["--device", &devices[0], "--device", &devices[1], "--json"]);
    if !faults.is_empty() {
        command.env(FAULTS, faults);
    }
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{faults}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_device_that_fails_inside_its_library_costs_no_bit_of_the_weights() {
    let folder = prepared();
    let folder = folder.path();
    let devices = pair(folder);
    let undisturbed = train(folder, "good", &devices, "");
    for kind in ["hang", "lost_heartbeat", "hbm_fault"] {
        // Some steps into the run, on the second device only; a new process counts anew.
        let faults = format!(r#"{{"kind": "{kind}", "device": 1, "after": 6000}}"#);
        let disturbed = train(folder, kind, &devices, &faults);
        assert_eq!(disturbed["weights_blake3"], undisturbed["weights_blake3"], "{kind}");
        assert_eq!(disturbed["steps"], undisturbed["steps"], "{kind}");
        // A memory fault is repaired in place and its step computed again.
        let faults = disturbed["faults"].as_u64().unwrap();
        assert!(faults > 0 || kind == "hbm_fault", "{kind} did not strike");
    }
}

/// A run on the CPU that goes on until it is asked to stop; its new workers would find devices as
/// the variable makes them.
fn endless(folder: &Path, dir: &str, variable: &str, value: &str) -> Child {
    let run = ["train", "run.toml", "--dir", dir, "--json"];
    let more = ["--workers", "2", "--steps", "1000000"];
    let mut command = pontoon(folder, &[&run[..], &CONSTANT, &more].concat());
    let child = command.env(variable, value).stdout(Stdio::piped()).spawn().unwrap();
    await_step(folder, dir, 3);
    child
}

fn steps(folder: &Path, dir: &str) -> usize {
    let text = std::fs::read_to_string(folder.join(dir).join("metrics.jsonl"));
    text.unwrap_or_default().lines().count()
}

fn await_step(folder: &Path, dir: &str, step: usize) {
    while steps(folder, dir) < step {
        std::thread::yield_now();
    }
}

fn stop(mut child: Child) -> Value {
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let out = child.stdout.take().unwrap();
    assert!(child.wait().unwrap().success());
    serde_json::from_reader(out).unwrap()
}

#[test]
fn a_move_to_a_device_that_lies_or_is_too_small_is_one_line_and_changes_no_bit() {
    let folder = prepared();
    let folder = folder.path();
    let pair = pair(folder);
    let lie = r#"{"kind": "swapped_rope", "device": 1}"#;
    for (dir, variable, value, want) in [
        ("lies", FAULTS, lie, "apart in the gradient of"),
        ("small", MEMORY, "6000000", "OutOfMemory"),
    ] {
        let child = endless(folder, dir, variable, value);
        let output = output(folder, &["move", dir, "--to", &pair.join(",")]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error:")).collect();
        let stays = format!("the run in `{dir}` stays where it is");
        assert!(errors.len() == 1 && errors[0].contains(&stays), "{text}");
        assert!(errors[0].contains(want), "{text}");
        let named = pair.each_ref().map(|device| errors[0].contains(device));
        assert!(named == [false, true] || (dir == "small" && named != [false; 2]), "{text}");
        await_step(folder, dir, steps(folder, dir) + 3);
        let summary = stop(child);
        let plain = format!("{dir}-plain");
        let steps = summary["steps"].to_string();
        let plain = ["train", "run.toml", "--dir", &plain, "--json", "--steps", &steps];
        let plain = json(folder, &[&plain[..], &CONSTANT].concat());
        assert_eq!(summary["weights_blake3"], plain["weights_blake3"], "{dir}");
        let events = std::fs::read_to_string(folder.join(dir).join("events.jsonl")).unwrap();
        assert!(events.contains("move_refused") && !events.contains("\"moved\""), "{events}");
    }
}

#[test]
fn several_devices_are_qualified_together_with_their_exchanges_and_the_one_that_lies_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let devices = pair(folder).join(",");
    let ask = ["qualify", "--device", &devices, "--quick", "--json", "--report", "two.json"];
    let lie = r#"{"kind": "wrong_rounding", "device": 1}"#;
    let output = pontoon(folder, &ask).env(FAULTS, lie).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.lines().last().unwrap().starts_with("error: not all of"), "{errors}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["verdict"], "unfit", "{}", found["reasons"]);
    assert_eq!(found["devices"][0]["verdict"], "fit");
    let reasons = found["reasons"].to_string();
    let [first, second] = pair(folder);
    assert!(reasons.contains(&format!("{second}: bf16: ")), "{reasons}");
    assert!(reasons.contains("as a group of 2: bf16 AllReduce computed wrongly"), "{reasons}");
    assert!(!reasons.contains(&format!("{first}: ")), "one of them is good: {reasons}");
    let exchange = &found["exchange"];
    assert_eq!((&exchange["devices"], &exchange["failure"]), (&2.into(), &Value::Null));
    let rows = exchange["rows"].as_array().unwrap();
    for op in ["AllReduce", "AllGather", "ReduceScatter"] {
        for check in ["correct", "repeat"] {
            let row = rows.iter().find(|row| row["op"] == op && row["check"] == check);
            assert!(row.is_some_and(|row| row["cases"].as_u64().unwrap() >= 9), "{op} {check}");
        }
        let speed = exchange["speed"].as_array().unwrap().iter().find(|row| row["op"] == op);
        assert!(speed.unwrap()["link_bytes_per_s"].as_f64().unwrap() > 0.0, "{op}");
    }
    let mut of_f32 = rows.iter().filter(|row| row["dtype"] == "f32");
    assert!(of_f32.all(|row| row["ok"] == true), "f32 is not rounded: {rows:?}");
    assert_eq!(found["devices"].as_array().unwrap().len(), 2);
    let ops = found["ops"].as_array().unwrap();
    assert!(ops.iter().any(|row| row["device"] == second.as_str() && row["ok"] == false));
    let page = std::fs::read_to_string(folder.join("two.html")).unwrap();
    assert!(page.contains("Exchange in a group of 2") && page.contains("GB/s on each link"));
}
