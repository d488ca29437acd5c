//! A disk that is full when a snapshot is due ends a run with one line; the snapshots before it
//! stay whole, nothing half-written is left, and the run goes on from there.

mod common;

use std::path::Path;

use common::{json, output, prepared};

const FOUR: [&str; 4] = ["--set", "train.micro_batches=4", "--set", "train.micro_batch=1"];

fn train<'a>(dir: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "run.toml", "--dir", dir, "--json"], &FOUR[..], more].concat()
}

/// Everything in the folder of snapshots, hidden or not.
#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn snapshots(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("snapshots")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_run_on_a_full_disk_ends_with_one_line_and_goes_on_from_its_last_snapshot() {
    let folder = prepared();
    let folder = folder.path();
    let alone = ["--in-process"];
    let plain = json(folder, &train("plain", &alone));
    // Snapshots are due every third step and at the end.
    for (name, workers, first, left, want) in [
        ("early", &alone[..], 1, &[][..], "disk full: the snapshot of step 3"),
        ("late", &alone, 6, &["step-00000003"], "disk full: the snapshot of step 6"),
        (
            "fleet",
            &["--workers", "2", "--set", "snapshot.patience=0.5"],
            4,
            &["step-00000003"],
            "last snapshot could not be written",
        ),
    ] {
        let plan = format!("[[fault]]\nkind = \"disk_full\"\nstep = {first}\nfor_steps = 1000\n");
        std::fs::write(folder.join("chaos.toml"), plan).unwrap();
        let struck = [workers, &["--chaos", "chaos.toml"]].concat();
        let output = output(folder, &train(name, &struck));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}: {text}");
        let last = text.lines().last().unwrap();
        assert!(last.starts_with("error: ") && last.contains(want), "{name}: {text}");
        assert!(last.contains("free some space"), "{name}: {text}");
        let run = folder.join(name);
        assert_eq!(snapshots(&run), left, "{name}");
        let events = std::fs::read_to_string(run.join("events.jsonl")).unwrap();
        assert!(events.contains("\"snapshot_failed\""), "{name}: {events}");
        if name == "fleet" {
            // It was tried again before it was given up.
            assert!(events.contains("tried again") && events.contains("given up"), "{events}");
        }
        let resumed = json(folder, &train(name, &[workers, &["--resume"]].concat()));
        assert_eq!(resumed["weights_blake3"], plain["weights_blake3"], "{name}");
    }
}
