//! A run on two emulated devices of which one fails, from inside its library: it ends with the
//! weights of an undisturbed run. No vendor is named here; `pontoon devices` tells the device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]
#![allow(dead_code, reason = "the common part serves other files of tests too")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{json, prepared};

/// The environment variable that arms faults in the emulated device's library.
const FAULTS: &str = "PONTOON_EMU_FAULTS";

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
