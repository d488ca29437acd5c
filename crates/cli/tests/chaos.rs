//! Faults injected into real worker processes: each is found by its kind and none reaches the
//! weights.

mod common;

use std::path::Path;

use common::{json, output, prepared};
use serde_json::Value;

const FOUR: [&str; 4] = ["--set", "train.micro_batches=4", "--set", "train.micro_batch=1"];

#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn events(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("events.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn train<'a>(dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "run.toml", "--dir", dir, "--json"], &FOUR[..], more].concat()
}

#[test]
fn every_kind_of_fault_is_found_and_the_weights_are_those_of_the_undisturbed_run() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(folder, &train("plain", &["--in-process"]));
    let faults = [
        (0, 2, "crash", "", "crash"),
        (1, 3, "memory_fault", "", "memory_fault"),
        (2, 4, "link_down", "", "link_down"),
        (1, 6, "bitflip", "tensor = \"weights\"", "corrupt"),
        (0, 8, "out_of_memory", "", "out_of_memory"),
        (0, 9, "damaged_snapshot", "", "snapshot_failed"),
        (2, 10, "bitflip", "tensor = \"gradients\"\nbit = 25", "corrupt"),
        (1, 11, "hang", "", "hang"),
        (0, 12, "disk_full", "", "snapshot_failed"),
        (0, 13, "bitflip", "tensor = \"moments\"\nbit = 3", "corrupt"),
    ];
    let plan: String = faults
        .iter()
        .map(|(worker, step, kind, more, _)| {
            format!("[[fault]]\nworker = {worker}\nstep = {step}\nkind = \"{kind}\"\n{more}\n")
        })
        .collect();
    std::fs::write(folder.join("chaos.toml"), plan).unwrap();
    let more = ["--workers", "3", "--chaos", "chaos.toml", "--set", "fleet.audit=0.5"];
    let run = json(folder, &train("run", &more));
    let events = events(&folder.join("run"));
    assert_eq!(run["weights_blake3"], plain["weights_blake3"], "{events:#?}");
    for kind in ["crash", "memory_fault", "link_down", "out_of_memory", "hang"] {
        let found: Vec<&Value> = events.iter().filter(|event| event["kind"] == kind).collect();
        assert_eq!(found.len(), 1, "{kind}: {events:#?}");
        assert!(found[0]["detected_ms"].is_u64(), "{}", found[0]);
        assert!(found[0]["recovery_ms"].is_u64(), "{}", found[0]);
    }
    let count = |kind: &str| events.iter().filter(|event| event["kind"] == kind).count();
    assert_eq!(count("corrupt"), 3, "{events:#?}");
    assert_eq!(count("snapshot_failed"), 2, "{events:#?}");
    assert_eq!(run["faults"].as_u64().unwrap(), faults.len() as u64, "{events:#?}");
    assert!(run["goodput"].as_f64().unwrap() < 1.0);
    every_second_is_accounted_for(&run, &events);
}

/// What was useful and what was lost to causes is all of the time.
#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn every_second_is_accounted_for(run: &Value, events: &[Value]) {
    let number = |key: &str| run[key].as_f64().unwrap();
    let lost: f64 = run["lost_s"].as_object().unwrap().values().filter_map(Value::as_f64).sum();
    let open = number("wall_s") - number("useful_s") - lost;
    assert!(open.abs() < 1e-6 * number("wall_s"), "{open} s of {run}");
    let finished = events.iter().find(|event| event["kind"] == "finished").unwrap();
    let account = finished["action"].as_str().unwrap();
    assert!(account.starts_with("useful ") && account.contains("; lost "), "{account}");
}

#[test]
fn flips_in_products_activations_and_their_gradients_are_found_without_audits() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(folder, &train("plain", &["--in-process"]));
    let tensors = ["Matmul", "SwiGlu", "Attention", "CrossEntropyBwd", "Rope", "AddRmsNormBwd"];
    let fault = |(place, tensor): (usize, &&str)| {
        let (worker, step, bit) = (place % 3, 3 + 2 * place, 31 - place % 3);
        format!(
            "[[fault]]\nworker = {worker}\nstep = {step}\nkind = \"bitflip\"\n\
             tensor = \"{tensor}\"\nbit = {bit}\n"
        )
    };
    let plan: String = tensors.iter().enumerate().map(fault).collect();
    std::fs::write(folder.join("chaos.toml"), plan).unwrap();
    let run = json(folder, &train("run", &["--workers", "3", "--chaos", "chaos.toml"]));
    let events = events(&folder.join("run"));
    assert_eq!(run["weights_blake3"], plain["weights_blake3"], "{events:#?}");
    let found: Vec<&Value> = events.iter().filter(|event| event["kind"] == "corrupt").collect();
    for event in &found {
        let cause = event["cause"].as_str().unwrap();
        assert!(cause.contains("changed in memory before"), "{cause}");
        assert!(event["detected_ms"].is_u64() && event["recovery_ms"].is_u64(), "{event}");
    }
    // A bit of something nobody reads any more does no harm and is not found.
    assert!(found.len() >= tensors.len() - 1, "{events:#?}");
}

#[test]
fn a_lone_worker_computes_a_step_again_that_it_found_wrong_and_nothing_is_rolled_back() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(folder, &train("plain", &["--in-process"]));
    let flip = |step, tensor| {
        format!("[[fault]]\nstep = {step}\nkind = \"bitflip\"\ntensor = \"{tensor}\"\nbit = 30\n")
    };
    let plan = [flip(5, "Matmul"), flip(8, "SwiGlu"), flip(11, "CrossEntropyBwd")].concat();
    std::fs::write(folder.join("chaos.toml"), plan).unwrap();
    let run = json(folder, &train("run", &["--chaos", "chaos.toml"]));
    let events = events(&folder.join("run"));
    assert_eq!(run["weights_blake3"], plain["weights_blake3"], "{events:#?}");
    let found: Vec<&Value> = events.iter().filter(|event| event["kind"] == "corrupt").collect();
    assert!(found.len() == 3 && !events.iter().any(|event| event["kind"] == "rolled_back"));
    for event in found {
        assert!(event["action"].as_str().unwrap().contains("by the same worker"), "{event}");
        assert!(event["detected_ms"].is_u64() && event["recovery_ms"].is_u64(), "{event}");
    }
}

#[test]
fn a_plan_that_cannot_be_is_one_line_and_changes_nothing() {
    let folder = prepared();
    let folder = folder.path();
    let fault = "[[fault]]\nworker = 2\nstep = 3\nkind = \"crash\"\n";
    std::fs::write(folder.join("absent.toml"), fault).unwrap();
    std::fs::write(folder.join("typing.toml"), fault.replace("crash", "crush")).unwrap();
    for (workers, plan, want) in [
        (&["--workers", "2"][..], "absent.toml", "there is no worker 2; the run has 0 to 1"),
        (&["--workers", "3"], "typing.toml", "line 4: unknown variant `crush`"),
        (&["--workers", "2"], "nowhere.toml", "cannot read the plan of faults `nowhere.toml`"),
        (&["--in-process"], "absent.toml", "leave --in-process out"),
    ] {
        let output = output(folder, &train("never", &[workers, &["--chaos", plan]].concat()));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(want) && text.lines().count() == 1, "{text}");
        assert!(!folder.join("never").exists());
    }
}
