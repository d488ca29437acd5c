//! An emulated device as a user calls it: listed as what it is, trained on, generated on, and in
//! agreement with the CPU. Which one it is, `pontoon devices` tells: no vendor is named here.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]
#![allow(dead_code, reason = "the common part serves other files of tests too")]

mod common;

use std::path::Path;

use common::{json, output, prepared};

/// The first emulated device that is listed.
fn emulated(folder: &Path) -> String {
    let found = json(folder, &["devices", "--json"]);
    let devices = found["devices"].as_array().unwrap();
    let device = devices.iter().find(|device| device["emulated"] == true).unwrap();
    assert!(device["chip"].as_str().unwrap().to_lowercase().contains("emulat"), "{device}");
    device["device"].as_str().unwrap().to_owned()
}

#[test]
fn devices_are_listed_with_what_they_are_or_why_they_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let found = json(folder.path(), &["devices", "--json"]);
    let name = emulated(folder.path());
    for other in found["unusable"].as_array().unwrap() {
        let (device, reason) = (&other["device"], other["reason"].as_str().unwrap());
        assert_ne!(*device, name.as_str());
        assert!(!reason.is_empty() && !reason.contains('\n'), "{device}: {reason}");
        // Asking for it says the same, in one line.
        let arguments =
            ["compare", "qwen3-1m", "--devices", &format!("cpu,{}", &device.as_str().unwrap())];
        let refused = output(folder.path(), &arguments);
        let errors = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1));
        assert!(errors.lines().last().unwrap().contains(reason), "{errors}");
    }
    let text = common::succeed(folder.path(), &["devices"]);
    assert!(
        text.lines().any(|line| line.starts_with(&name) && line.ends_with("emulated on the host"))
    );
}

#[test]
fn a_run_ends_within_the_certificate_of_the_cpus_and_its_weights_generate() {
    let folder = prepared();
    let folder = folder.path();
    let device = emulated(folder);
    for dtype in ["f32", "bf16"] {
        let pair = format!("cpu,{device}");
        let arguments = ["compare", "qwen3-1m", "--devices", &pair, "--dtype", dtype, "--json"];
        let certificate = json(folder, &arguments);
        assert_eq!(certificate["agree"], true, "{dtype}: {}", certificate["reasons"]);
        let band = certificate["limits"]["loss_drift"].as_f64().unwrap();
        let setting = format!("train.dtype={dtype}");
        let loss = |device: &str| {
            let dir = format!("{dtype}-{}", device.replace(':', "-"));
            let arguments = [
                "train", "run.toml", "--dir", &dir, "--device", device, "--json", "--set", &setting,
            ];
            json(folder, &arguments)["loss"].as_f64().unwrap()
        };
        let (here, there) = (loss("cpu"), loss(&device));
        let apart = (here - there).abs() / here.abs();
        assert!(
            apart <= band,
            "{dtype}: losses {here} and {there} are {apart} apart, {band} allowed"
        );
    }
    let run = format!("bf16-{}", device.replace(':', "-"));
    let arguments =
        ["generate", &run, "-p", "After one", "-n", "8", "--seed", "3", "--json", "--logprobs"];
    let made = json(folder, &[&arguments[..], &["--device", &device]].concat());
    assert_eq!(made["tokens"].as_array().unwrap().len(), 8);
    assert!(made["logprobs"].as_array().unwrap().iter().all(|one| one.as_f64().unwrap() <= 0.0));
    let again = json(folder, &[&arguments[..], &["--device", &device]].concat());
    assert_eq!((&made["tokens"], &made["logprobs"]), (&again["tokens"], &again["logprobs"]));
}
