//! Whole runs of a small model on the CPU backend: they learn, and their final weights are the
//! same bits however they were interrupted and on however many threads they ran.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_fleet::run_dir::{Event, EventKind};
use pontoon_fleet::world::{RealDisk, SystemClock, Unattended};
use pontoon_models::Model;
use pontoon_ops::Backend;
use pontoon_ops::philox::Stream;
use pontoon_train::data::{Batch, ShardWriter, WholeDocuments};
use pontoon_train::{
    Beginning, Metrics, Observer, Run, RunConfig, Start, Summary, TrainError, TrainingState,
};

/// Documents in which each token decides the next, up to one bit.
fn write_data(folder: &Path) {
    write_data_for(folder, 1024);
}

fn write_data_for(folder: &Path, vocabulary: usize) {
    let mut writer = ShardWriter::create(&folder.join("data.bin"), vocabulary).unwrap();
    let stream = Stream::new(1, 2);
    for document in 0..60 {
        let mut token = stream.below(document, 50) as u32;
        let mut tokens = vec![token];
        for index in 0..5 + 3 * document {
            token = (token * 7 + 3 + stream.below(1000 * document + index, 2) as u32) % 50;
            tokens.push(token);
        }
        writer.push(&tokens).unwrap();
    }
    writer.finish().unwrap();
}

const SETTINGS: &str = r#"
[model]
preset = "qwen3-1m"
[data]
train = ["data.bin"]
valid = ["data.bin"]
sequence = 32
[train]
steps = 12
micro_batch = 2
micro_batches = 4
lr = 3e-3
warmup = 2
dtype = "f32"
[snapshot]
every = 4
keep = 2
"#;

/// Remembers what it saw, and stops the run after a step.
#[derive(Default)]
struct Watcher<'a> {
    metrics: Vec<Metrics>,
    events: Vec<EventKind>,
    stop_after: Option<(u64, &'a AtomicBool)>,
}

impl Observer for Watcher<'_> {
    fn begin(&mut self, _: &Beginning) {}

    fn step(&mut self, metrics: &Metrics) {
        self.metrics.push(metrics.clone());
        if let Some((step, stop)) = self.stop_after {
            stop.store(metrics.step >= step, Ordering::Relaxed);
        }
    }

    fn event(&mut self, event: &Event) {
        self.events.push(event.kind);
    }

    fn note(&mut self, line: &str) {
        panic!("a quiet run says nothing, but: {line}");
    }
}

struct Setting<'a> {
    folder: &'a Path,
    dir: &'a str,
    changes: &'a [&'a str],
    threads: usize,
    start: Start,
    stop_after: Option<u64>,
}

fn run(setting: &Setting<'_>) -> (Result<Summary, TrainError>, Vec<Metrics>, Vec<EventKind>) {
    let stop = AtomicBool::new(false);
    let changes: Vec<String> = setting.changes.iter().map(|&change| change.to_owned()).collect();
    let run = Run {
        config: RunConfig::parse(SETTINGS, &changes, "run.toml").unwrap(),
        base: setting.folder.to_owned(),
        dir: setting.folder.join(setting.dir),
        start: setting.start,
        peak_flops: None,
        stop: &stop,
        disk: &RealDisk,
        clock: &SystemClock,
        control: &Unattended,
    };
    let stop_after = setting.stop_after.map(|step| (step, &stop));
    let mut watcher = Watcher { stop_after, ..Watcher::default() };
    let options = CpuOptions { threads: Some(setting.threads), ..CpuOptions::default() };
    let mut backend = CpuBackend::new(options).unwrap();
    let summary = pontoon_train::train(&run, &mut backend, &mut watcher);
    (summary, watcher.metrics, watcher.events)
}

fn plain<'a>(folder: &'a Path, dir: &'a str, changes: &'a [&'a str]) -> Setting<'a> {
    Setting { folder, dir, changes, threads: 2, start: Start::Fresh, stop_after: None }
}

#[test]
fn a_stopped_and_resumed_run_on_other_threads_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    for changes in [
        ["train.dtype=f32", "train.optimizer=adamw"],
        ["train.dtype=bf16", "train.optimizer=adamw"],
        ["train.dtype=bf16", "train.optimizer=muon"],
    ] {
        let name = changes.concat();
        let (whole, metrics, events) = run(&plain(folder.path(), &name, &changes));
        let whole = whole.unwrap();
        assert!(whole.finished);
        assert_eq!(metrics.len(), 12);
        let (first, last) = (metrics[0].loss, metrics[11].loss);
        assert!(last < first - 1.0, "{name}: the loss went from {first} to {last}");
        let valid = whole.valid_loss.unwrap();
        assert!((valid - last).abs() < 1.0, "{name}: {valid} validating, {last} training");
        assert_eq!(events.last(), Some(&EventKind::Finished));

        let dir = format!("{name}-again");
        let again =
            Setting { threads: 1, stop_after: Some(6), ..plain(folder.path(), &dir, &changes) };
        let (stopped, ..) = run(&again);
        let stopped = stopped.unwrap();
        assert_eq!((stopped.steps, stopped.finished), (6, false));
        let resume = Setting { start: Start::Resume, ..plain(folder.path(), &dir, &changes) };
        let (resumed, rest, events) = run(&resume);
        assert_eq!(resumed.unwrap().weights_blake3, whole.weights_blake3, "{name}");
        assert_eq!(events[0], EventKind::Resumed);
        let losses = |metrics: &[Metrics]| metrics.iter().map(|m| m.loss).collect::<Vec<_>>();
        assert_eq!(losses(&rest), losses(&metrics[6..]));
        let lines =
            std::fs::read_to_string(folder.path().join(&dir).join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 12, "every step stands there once");
    }
}

#[test]
fn routers_are_balanced_by_their_load_and_resumed_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    write_data_for(folder.path(), 8192);
    let model = ["model.preset=deepseek-8m", "train.steps=6", "train.balance=0.01"];
    let (whole, metrics, _) = run(&plain(folder.path(), "whole", &model));
    let whole = whole.unwrap().weights_blake3;
    assert!(metrics.iter().all(|of| of.imbalance.is_some_and(|share| share > 0.0)));
    let again =
        Setting { threads: 1, stop_after: Some(3), ..plain(folder.path(), "again", &model) };
    run(&again).0.unwrap();
    let resume = Setting { start: Start::Resume, ..plain(folder.path(), "again", &model) };
    assert_eq!(run(&resume).0.unwrap().weights_blake3, whole);
    let still = ["model.preset=deepseek-8m", "train.steps=6", "train.balance=0"];
    let (without, unmoved, _) = run(&plain(folder.path(), "still", &still));
    assert_ne!(without.unwrap().weights_blake3, whole);
    assert_eq!(unmoved[0].imbalance, metrics[0].imbalance, "the first step sees the same loads");
    let last = |of: &[Metrics]| of.last().and_then(|of| of.imbalance).unwrap();
    let (balanced, left) = (last(&metrics), last(&unmoved));
    assert!(balanced < left, "{balanced} balanced, {left} left alone");
}

#[test]
fn a_damaged_snapshot_is_passed_over_and_the_run_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let (whole, ..) = run(&plain(folder.path(), "whole", &[]));
    let (stopped, ..) = run(&Setting { stop_after: Some(9), ..plain(folder.path(), "cut", &[]) });
    assert_eq!(stopped.unwrap().steps, 9);
    let weights = folder.path().join("cut/snapshots/step-00000009/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&weights, bytes).unwrap();
    let resume = Setting { start: Start::Resume, ..plain(folder.path(), "cut", &[]) };
    let (resumed, metrics, events) = run(&resume);
    assert_eq!(metrics[0].step, 9, "it goes on from the snapshot of step 8");
    assert_eq!(resumed.unwrap().weights_blake3, whole.unwrap().weights_blake3);
    assert_eq!(events[0], EventKind::Resumed);
    let log = std::fs::read_to_string(folder.path().join("cut/events.jsonl")).unwrap();
    assert!(log.contains("rolled_back") && log.contains("model.safetensors"), "{log}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_with_the_good_state_kept() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let changes = ["train.lr=1e38", "train.clip=0", "train.warmup=0"];
    let (result, ..) = run(&plain(folder.path(), "wild", &changes));
    let error = result.unwrap_err();
    assert!(matches!(error, TrainError::NonFinite { .. }), "{error}");
    let TrainError::NonFinite { kept, .. } = error else { unreachable!("asserted above") };
    let kept = folder.path().join(format!("wild/snapshots/step-{kept:08}/state.json"));
    assert!(kept.is_file());
}

#[test]
fn steps_without_a_number_are_passed_over_if_asked_but_not_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let changes = ["train.lr=1e38", "train.clip=0", "train.warmup=0", "train.non_finite=skip"];
    let (result, metrics, events) = run(&plain(folder.path(), "wild", &changes));
    let Err(TrainError::NonFinite { step, .. }) = result else { panic!("{result:?}") };
    let skipped = events.iter().filter(|kind| **kind == EventKind::Skipped).count();
    assert_eq!(skipped, 10);
    assert_eq!(step, metrics.len() as u64 + 1);
    assert!(metrics.iter().rev().take(10).all(|of| of.loss.is_nan() && of.lr == 0.0));
}

#[test]
fn a_run_folder_is_not_overwritten_and_not_resumed_with_other_settings() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let (first, ..) = run(&Setting { stop_after: Some(2), ..plain(folder.path(), "run", &[]) });
    first.unwrap();
    let error = run(&plain(folder.path(), "run", &[])).0.unwrap_err().to_string();
    assert!(error.contains("--resume"), "{error}");
    let changes = ["train.micro_batch=4"];
    let other = Setting { start: Start::Resume, ..plain(folder.path(), "run", &changes) };
    let error = run(&other).0.unwrap_err().to_string();
    assert!(error.contains("micro_batch = 2") && error.contains("4"), "{error}");
    let changes = ["data.sequence=50000"];
    let error = run(&plain(folder.path(), "long", &changes)).0.unwrap_err().to_string();
    assert!(error.contains("50000"), "{error}");
}

#[test]
fn steps_after_the_first_take_no_more_memory_of_the_device() {
    for (preset, dtype) in [("qwen3-1m", "bf16"), ("deepseek-8m", "f32")] {
        let settings = format!(
            "[data]\nsequence = 32\n[train]\nmicro_batch = 2\nmicro_batches = 2\n\
             dtype = \"{dtype}\"\n"
        );
        let config = RunConfig::parse(&settings, &[], "settings").unwrap();
        let model = Model::new(pontoon_models::preset(preset).unwrap()).unwrap();
        let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
        let weights = model.initialise(1);
        let mut state = TrainingState::load(&mut backend, &model, &config, &weights).unwrap();
        let documents = WholeDocuments { count: 2, tokens: 32 };
        let batch = Batch::of(documents, |row| row as i32 * 7 % 900);
        let batches = [batch.clone(), batch];
        let mut used = Vec::new();
        for step in 1..=3 {
            state.step(&mut backend, step, &batches).unwrap();
            used.push(backend.memory_used());
        }
        assert_eq!(used, [used[0]; 3], "{preset}");
    }
}
