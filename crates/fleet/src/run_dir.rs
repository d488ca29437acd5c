//! A run's folder: its lock, and its files of one JSON object a line.
//!
//! Lines are appended and never rewritten; a kill may tear the last one, and opening cuts it off.
//! Snapshots have their own file. Read next: `world.rs`, `snapshot.rs`.

use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::FleetError;
use crate::world::{Clock, Disk, DiskFile, Locking};

/// A run folder that is ours until this value is dropped.
pub struct RunDir {
    path: PathBuf,
    /// Held, never read: dropping it frees the run folder.
    _lock: Box<dyn Send>,
}

impl RunDir {
    /// Creates the folder where it is missing and takes its lock; `process_id` is what another one
    /// that tries will be told.
    pub fn open(disk: &dyn Disk, path: &Path, process_id: u32) -> Result<Self, FleetError> {
        disk.create_dir_all(path).map_err(FleetError::io("create", path))?;
        let lock_path = path.join("run.lock");
        let locking = disk.try_lock(&lock_path, &format!("{process_id}\n"));
        match locking.map_err(FleetError::io("lock", &lock_path))? {
            Locking::Held(lock) => Ok(RunDir { path: path.to_path_buf(), _lock: lock }),
            Locking::Busy { holder } => {
                Err(FleetError::Locked { path: path.to_path_buf(), holder })
            }
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One object a step: loss, speed and the like.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// One object an event: see [`Event`].
    pub fn events(&self) -> PathBuf {
        self.path.join("events.jsonl")
    }

    /// The folder of snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }
}

/// A file of one JSON object a line, open to append.
pub struct JsonLines<'d> {
    disk: &'d dyn Disk,
    path: PathBuf,
    file: Box<dyn DiskFile>,
    /// Bytes of whole lines; what lies beyond is torn.
    length: u64,
}

/// The part of a line that resuming needs.
#[derive(Deserialize)]
struct LineStep {
    step: Option<u64>,
}

impl<'d> JsonLines<'d> {
    /// Opens a file, creates it where it is missing, and cuts off a torn end.
    pub fn open(disk: &'d dyn Disk, path: &Path) -> Result<Self, FleetError> {
        let file = disk.append_file(path).map_err(FleetError::io("open", path))?;
        let mut whole = 0;
        let length = scan(disk, path, |line, end| {
            if line.is_some() {
                whole = end;
            }
        })?;
        if whole < length {
            disk.truncate(path, whole).map_err(FleetError::io("truncate", path))?;
        }
        Ok(JsonLines { disk, path: path.to_path_buf(), file, length: whole })
    }

    /// Appends one object. After an error the file holds whole lines only.
    pub fn append(&mut self, object: &impl Serialize) -> Result<(), FleetError> {
        let text = serde_json::to_vec(object);
        let mut line =
            text.map_err(|source| FleetError::Line { path: self.path.clone(), source })?;
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line).and_then(|()| self.file.flush()) {
            // A courtesy to the next line: where it fails too, the next `open` cuts the torn end.
            let _ = self.disk.truncate(&self.path, self.length);
            return Err(FleetError::io("append to", &self.path)(error));
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// Returns once all lines will survive a power cut.
    pub fn sync(&mut self) -> Result<(), FleetError> {
        self.file.sync().map_err(FleetError::io("sync", &self.path))
    }

    /// Cuts the file before the first line of a later step, so that a run that goes on from `step`
    /// writes no step twice. Lines without a step stay if they stand before it.
    pub fn truncate_after_step(&mut self, step: u64) -> Result<(), FleetError> {
        let mut kept = 0;
        let mut found_later = false;
        scan(self.disk, &self.path, |line, end| {
            let later = line.and_then(|line| line.step).is_some_and(|of_line| of_line > step);
            found_later |= later;
            if !found_later {
                kept = end;
            }
        })?;
        if kept < self.length {
            let cut = self.disk.truncate(&self.path, kept);
            cut.map_err(FleetError::io("truncate", &self.path))?;
            self.length = kept;
        }
        Ok(())
    }
}

/// Shows each line and where it ends; a line that is torn or no JSON object is shown as nothing.
/// Returns the file's length.
fn scan(
    disk: &dyn Disk,
    path: &Path,
    mut show: impl FnMut(Option<LineStep>, u64),
) -> Result<u64, FleetError> {
    let file = disk.open_file(path).map_err(FleetError::io("open", path))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    let mut end = 0;
    loop {
        line.clear();
        let count = reader.read_until(b'\n', &mut line).map_err(FleetError::io("read", path))?;
        if count == 0 {
            return Ok(end);
        }
        end += count as u64;
        let is_whole = line.ends_with(b"}\n");
        show(is_whole.then(|| serde_json::from_slice(&line).ok()).flatten(), end);
    }
}

/// What can happen to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The run began.
    Started,
    /// A snapshot was written.
    Snapshot,
    /// A worker's process ended.
    Crash,
    /// A worker fell silent.
    Hang,
    /// A worker fell behind.
    Slow,
    /// A result was wrong.
    Corrupt,
    /// A device reported a bad access.
    MemoryFault,
    /// A connection broke.
    LinkDown,
    /// An allocation did not fit.
    OutOfMemory,
    /// A snapshot could not be written.
    SnapshotFailed,
    /// A worker was taken out.
    Evicted,
    /// A worker came in.
    Joined,
    /// The run went to other devices.
    Moved,
    /// Other devices were tried and not taken.
    MoveRefused,
    /// Another numeric class applies the steps from here on.
    TookOver,
    /// The run went back to an earlier step.
    RolledBack,
    /// A step's data was passed over.
    Skipped,
    /// The run went on after a stop.
    Resumed,
    /// The run is done.
    Finished,
}

impl EventKind {
    /// Its name in `events.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Started => "started",
            EventKind::Snapshot => "snapshot",
            EventKind::Crash => "crash",
            EventKind::Hang => "hang",
            EventKind::Slow => "slow",
            EventKind::Corrupt => "corrupt",
            EventKind::MemoryFault => "memory_fault",
            EventKind::LinkDown => "link_down",
            EventKind::OutOfMemory => "out_of_memory",
            EventKind::SnapshotFailed => "snapshot_failed",
            EventKind::Evicted => "evicted",
            EventKind::Joined => "joined",
            EventKind::Moved => "moved",
            EventKind::MoveRefused => "move_refused",
            EventKind::TookOver => "took_over",
            EventKind::RolledBack => "rolled_back",
            EventKind::Skipped => "skipped",
            EventKind::Resumed => "resumed",
            EventKind::Finished => "finished",
        }
    }
}

/// One line of `events.jsonl`, its time apart: that comes from the clock.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// The step at which it happened.
    pub step: u64,
    /// What happened.
    pub kind: EventKind,
    /// The worker concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<u32>,
    /// The device concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Why it happened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// Milliseconds from an injected fault to its detection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detected_ms: Option<u64>,
    /// Micro-batches computed again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_micro_batches: Option<u64>,
    /// Milliseconds until the run went on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_ms: Option<u64>,
    /// What other devices were held against before the run went to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<serde_json::Value>,
}

impl Event {
    /// An event with nothing more to say.
    pub fn new(step: u64, kind: EventKind) -> Self {
        Event {
            step,
            kind,
            worker: None,
            device: None,
            cause: None,
            action: None,
            detected_ms: None,
            lost_micro_batches: None,
            recovery_ms: None,
            certificate: None,
        }
    }
}

/// An event with its time in seconds since 1970-01-01 UTC.
#[derive(Serialize)]
struct TimedEvent<'a> {
    time: f64,
    #[serde(flatten)]
    event: &'a Event,
}

/// The run's history. Nothing is ever cut from it but a torn end.
pub struct EventLog<'d> {
    clock: &'d dyn Clock,
    lines: JsonLines<'d>,
}

impl<'d> EventLog<'d> {
    /// Opens the file of events.
    pub fn open(disk: &'d dyn Disk, clock: &'d dyn Clock, path: &Path) -> Result<Self, FleetError> {
        Ok(EventLog { clock, lines: JsonLines::open(disk, path)? })
    }

    /// Appends an event with the clock's time; events are rare, so each is synced.
    pub fn append(&mut self, event: &Event) -> Result<(), FleetError> {
        let time = self.clock.unix_time().as_millis() as f64 / 1000.0;
        self.lines.append(&TimedEvent { time, event })?;
        self.lines.sync()
    }
}

/// Reads all whole lines of a file, for viewers; a missing file has none.
pub fn read_lines(disk: &dyn Disk, path: &Path) -> Result<Vec<serde_json::Value>, FleetError> {
    let file = match disk.open_file(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FleetError::io("open", path)(error)),
    };
    let mut lines = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(FleetError::io("read", path))?;
        // The writer may be in the middle of the last line.
        lines.extend(serde_json::from_slice::<serde_json::Value>(&line));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;
    use crate::snapshot::testing::{Fault, FaultDisk};
    use crate::world::RealDisk;

    struct FixedClock;

    impl Clock for FixedClock {
        fn now(&self) -> Instant {
            unreachable!("events are stamped with the calendar's time")
        }

        fn unix_time(&self) -> Duration {
            Duration::from_micros(1_500_250_999)
        }
    }

    fn write_steps(path: &Path, steps: std::ops::RangeInclusive<u64>) {
        let mut lines = JsonLines::open(&RealDisk, path).unwrap();
        for step in steps {
            lines.append(&json!({ "step": step, "loss": 0.5 })).unwrap();
        }
    }

    fn steps(path: &Path) -> Vec<u64> {
        let lines = read_lines(&RealDisk, path).unwrap();
        lines.iter().map(|line| line["step"].as_u64().unwrap()).collect()
    }

    #[test]
    fn a_second_supervisor_is_told_the_process_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::open(&RealDisk, dir.path(), 4711).unwrap();
        let refused = RunDir::open(&RealDisk, dir.path(), 4712).err().unwrap().to_string();
        assert!(refused.contains("process 4711") && refused.contains("stop"), "{refused}");
        drop(run);
        RunDir::open(&RealDisk, dir.path(), 4712).unwrap();
    }

    #[test]
    fn wherever_the_last_line_is_torn_the_lines_before_it_stay_and_new_ones_follow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        write_steps(&path, 1..=3);
        let full = fs::read(&path).unwrap();
        let two_lines = full.len() / 3 * 2;
        for cut in two_lines..full.len() {
            fs::write(&path, &full[..cut]).unwrap();
            write_steps(&path, 3..=4);
            assert_eq!(steps(&path), [1, 2, 3, 4], "cut at {cut}");
        }
        // A power cut can leave zeros where the line should be.
        fs::write(&path, [&full[..two_lines], &[0; 20], b"\n"].concat()).unwrap();
        write_steps(&path, 3..=3);
        assert_eq!(fs::read(&path).unwrap(), full);
    }

    #[test]
    fn resuming_leaves_no_step_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        write_steps(&path, 1..=9);
        let mut lines = JsonLines::open(&RealDisk, &path).unwrap();
        lines.truncate_after_step(20).unwrap();
        lines.truncate_after_step(6).unwrap();
        lines.append(&json!({ "step": 7 })).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4, 5, 6, 7]);
        lines.truncate_after_step(0).unwrap();
        assert!(steps(&path).is_empty());
    }

    #[test]
    fn a_full_disk_tears_no_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        for bytes in 0..20 {
            fs::write(&path, "{\"step\":1}\n").unwrap();
            let disk = FaultDisk::new(Fault::FullAfter { bytes });
            let mut lines = JsonLines::open(&disk, &path).unwrap();
            let result = lines.append(&json!({ "step": 2, "loss": 0.5 }));
            assert!(result.unwrap_err().to_string().contains("metrics.jsonl"));
            assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
        }
    }

    #[test]
    fn an_event_carries_the_clocks_time_and_only_what_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&RealDisk, &FixedClock, &path).unwrap();
        let event = Event { worker: Some(1), ..Event::new(17, EventKind::RolledBack) };
        log.append(&event).unwrap();
        let want = "{\"time\":1500.25,\"step\":17,\"kind\":\"rolled_back\",\"worker\":1}\n";
        assert_eq!(fs::read_to_string(&path).unwrap(), want);
    }
}
