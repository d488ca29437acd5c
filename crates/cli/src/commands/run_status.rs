//! Where a run stands: from the files in its folder and, while it lives, from itself.
//!
//! Prints nothing. Read next: `status.rs`, which does; `watch.rs`, which keeps looking.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Result, ensure};
use pontoon_fleet::control::{Answer, ControlSocket, Request};
use pontoon_fleet::run_dir::read_lines;
use pontoon_fleet::snapshot::{SnapshotReader, is_url, place};
use pontoon_fleet::world::{Control, Disk, Locking, RealDisk};
use pontoon_train::RunConfig;
use serde_json::{Value, json};

use super::faults;

/// A run that is in the middle of a step answers at its end; no viewer waits longer than this.
const PATIENCE: Duration = Duration::from_millis(500);
/// Steps whose time says how long the rest will take.
const LATEST: usize = 20;

/// Whether a run lives, and how it ended if not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A process works in the folder.
    Running,
    /// All steps are done.
    Finished,
    /// It was stopped, its state is saved.
    Stopped,
    /// It ended in the middle of something.
    Died,
}

impl Standing {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Standing::Running => "running",
            Standing::Finished => "finished",
            Standing::Stopped => "stopped",
            Standing::Died => "died",
        }
    }
}

/// What is known of a run.
pub struct RunStatus {
    /// Its folder.
    pub dir: PathBuf,
    /// Whether it lives.
    pub standing: Standing,
    /// Steps in all, if its settings can be read.
    pub steps: Option<u64>,
    /// One object a step.
    pub metrics: Vec<Value>,
    /// One object an event.
    pub events: Vec<Value>,
    /// Steps with a snapshot, newest first.
    pub snapshots: Vec<u64>,
    /// Its workers, as it told just now.
    pub fleet: Vec<Value>,
}

/// One line for a folder that is none.
pub fn expect_run(dir: &Path) -> Result<()> {
    let is_run = dir.join("metrics.jsonl").is_file();
    ensure!(is_run, "`{}` is no run folder: it has no metrics.jsonl", dir.display());
    Ok(())
}

/// Whether a run lives, from its folder.
pub fn standing(dir: &Path) -> Result<Standing> {
    Ok(RunStatus::read(dir)?.standing)
}

/// Whether some process has the folder's lock.
fn is_locked(dir: &Path) -> bool {
    let path = dir.join("run.lock");
    // Without the file nobody has it, and asking would make one.
    path.is_file() && matches!(RealDisk.try_lock(&path, "looking\n"), Ok(Locking::Busy { .. }))
}

/// Steps whose snapshots were uploaded and not yet removed, newest first.
fn uploaded(events: &[Value], keep: usize) -> Vec<u64> {
    let saved = events.iter().filter(|event| event["kind"] == "snapshot");
    let mut steps: Vec<u64> = saved.filter_map(|event| event["step"].as_u64()).collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    steps.dedup();
    steps.truncate(keep);
    steps
}

/// Asks the run itself; nothing if it does not live or is busy.
fn ask(dir: &Path) -> Option<Answer> {
    let (to, answered) = mpsc::channel();
    let dir = dir.to_owned();
    std::thread::spawn(move || {
        let answer = ControlSocket.ask(&dir, &Request::Status).ok().flatten();
        // Nobody waits for a late one.
        let _ = to.send(answer);
    });
    answered.recv_timeout(PATIENCE).ok().flatten().filter(|answer| answer.ok)
}

impl RunStatus {
    /// Reads a run folder.
    pub fn read(dir: &Path) -> Result<RunStatus> {
        expect_run(dir)?;
        let running = is_locked(dir);
        let metrics = read_lines(&RealDisk, &dir.join("metrics.jsonl"))?;
        let events = read_lines(&RealDisk, &dir.join("events.jsonl"))?;
        let settings = RunConfig::read(&dir.join("run.toml"), &[]).ok();
        let to = settings.as_ref().and_then(|settings| settings.snapshot.to.as_deref());
        let place = place(to, dir, dir);
        let snapshots = match is_url(&place) {
            // A view must not wait for a network: what was uploaded is in the events.
            true => uploaded(&events, settings.as_ref().map_or(1, |of| of.snapshot.keep)),
            false => SnapshotReader::new(&RealDisk, &place).list()?,
        };
        let answer = if running { ask(dir) } else { None };
        let micro_batches = settings.as_ref().map(|settings| settings.train.micro_batches);
        let fleet = answer.and_then(|answer| answer.facts.get("workers")?.as_array().cloned());
        let mut status = RunStatus {
            dir: dir.to_owned(),
            standing: Standing::Running,
            steps: settings.map(|settings| settings.train.steps),
            metrics,
            events,
            snapshots,
            fleet: fleet.unwrap_or_default(),
        };
        if !running {
            status.standing = status.how_it_ended();
        } else if status.fleet.is_empty() {
            status.fleet.extend(status.only_worker(micro_batches));
        }
        Ok(status)
    }

    /// A run in one process, as if it were its worker.
    fn only_worker(&self, micro_batches: Option<usize>) -> Option<Value> {
        let begun = self.events.iter().rev().find(|event| event["device"].is_string())?;
        let alone = begun["kind"] == "started" || begun["kind"] == "resumed";
        let seconds = self.last()["step_ms"].as_f64().zip(micro_batches);
        let seconds = seconds.map(|(ms, count)| ms / 1e3 / count as f64);
        alone.then(|| {
            json!({ "worker": 0, "device": begun["device"], "state": "member",
                    "seconds": seconds, "processes": 1 })
        })
    }

    fn how_it_ended(&self) -> Standing {
        let last = self.events.last().and_then(|event| event["kind"].as_str());
        if last == Some("finished") {
            Standing::Finished
        } else if self.snapshots.first().copied() == self.last()["step"].as_u64() {
            Standing::Stopped
        } else {
            Standing::Died
        }
    }

    /// The newest step's metrics.
    pub fn last(&self) -> &Value {
        self.metrics.last().unwrap_or(&Value::Null)
    }

    /// The events that are faults.
    pub fn faults(&self) -> Vec<Value> {
        self.events.iter().filter(|event| faults::is_fault(event)).cloned().collect()
    }

    /// Seconds until all steps are done, if it lives and goes on like this.
    pub fn rest_s(&self) -> Option<f64> {
        let left = self.steps?.checked_sub(self.last()["step"].as_u64()?)?;
        let latest = &self.metrics[self.metrics.len().saturating_sub(LATEST)..];
        let mut ms: Vec<f64> = latest.iter().filter_map(|line| line["step_ms"].as_f64()).collect();
        ms.sort_by(f64::total_cmp);
        let median = ms.get(ms.len() / 2)?;
        (self.standing == Standing::Running).then_some(left as f64 * median / 1e3)
    }

    /// All of it for programs.
    pub fn to_json(&self) -> Value {
        let last = self.last();
        json!({
            "state": self.standing.name(),
            "step": last["step"],
            "steps": self.steps,
            "loss": last["loss"],
            "tokens_per_s": last["tokens_per_s"],
            "goodput": last["goodput"],
            "workers": last["workers"],
            "fleet": self.fleet,
            "faults": self.faults().len(),
            "snapshots": self.snapshots,
            "rest_s": self.rest_s(),
            "finished": self.standing == Standing::Finished,
        })
    }
}
