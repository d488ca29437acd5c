//! Snapshots under faults: a disk that fills up, or stops at any operation and loses what was not
//! synced.
//!
//! The files are real ones in a temporary folder; only the faults are made up. Read next:
//! `write.rs`, whose order of operations is what is tried here.

#![cfg(test)]

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::world::{Disk, DiskFile, Entry, Locking, RealDisk};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing; the operations are counted.
    None,
    /// Only so many bytes can be written.
    FullAfter { bytes: u64 },
    /// The process is killed, or the power cut, in the middle of an operation.
    Crash { operation: usize, loss: Loss },
}

/// What a crash takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Nothing: the process was killed, the system lives.
    Nothing,
    /// The second half of every file that was not synced.
    Contents,
    /// That, and every name whose folder was not synced.
    ContentsAndNames,
}

/// A change of a folder that its sync has not made durable yet.
enum Change {
    Created { path: PathBuf },
    Renamed { from: PathBuf, to: PathBuf },
}

/// A real disk with a fault.
#[derive(Clone)]
pub(crate) struct FaultDisk {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    fault: Fault,
    operations: usize,
    bytes_written: u64,
    crashed: bool,
    unsynced_files: Vec<PathBuf>,
    unsynced_names: Vec<Change>,
}

impl FaultDisk {
    pub fn new(fault: Fault) -> Self {
        let shared = Shared {
            fault,
            operations: 0,
            bytes_written: 0,
            crashed: false,
            unsynced_files: Vec::new(),
            unsynced_names: Vec::new(),
        };
        FaultDisk { shared: Arc::new(Mutex::new(shared)) }
    }

    /// How many operations that change something were asked for.
    pub fn operations(&self) -> usize {
        self.shared().operations
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no test panics while it holds this")
    }

    /// Counts an operation; crashes before it where its turn has come.
    fn enter(&self) -> io::Result<MutexGuard<'_, Shared>> {
        let mut shared = self.shared();
        if shared.crashed || shared.is_turn() {
            shared.crash();
            return Err(crash_error());
        }
        shared.operations += 1;
        Ok(shared)
    }
}

fn crash_error() -> io::Error {
    io::Error::other("the process is dead")
}

/// A path after a folder above it, or itself, was renamed.
fn moved(path: &mut PathBuf, from: &Path, to: &Path) {
    if let Ok(rest) = path.strip_prefix(from) {
        *path = if rest.as_os_str().is_empty() { to.to_path_buf() } else { to.join(rest) };
    }
}

impl Shared {
    fn is_turn(&self) -> bool {
        matches!(self.fault, Fault::Crash { operation, .. } if operation == self.operations)
    }

    fn follow(&mut self, from: &Path, to: &Path) {
        self.unsynced_files.iter_mut().for_each(|path| moved(path, from, to));
        for change in &mut self.unsynced_names {
            if let Change::Created { path } = change {
                moved(path, from, to);
            }
        }
    }

    /// Takes away what a crash takes, once.
    fn crash(&mut self) {
        let Fault::Crash { loss, .. } = self.fault else { return };
        if std::mem::replace(&mut self.crashed, true) || loss == Loss::Nothing {
            return;
        }
        for path in &self.unsynced_files {
            if let Ok(content) = fs::read(path) {
                fs::write(path, &content[..content.len() / 2]).unwrap();
            }
        }
        if loss == Loss::Contents {
            return;
        }
        while let Some(change) = self.unsynced_names.pop() {
            match change {
                Change::Created { path } => drop(fs::remove_file(path)),
                Change::Renamed { from, to } => {
                    fs::rename(&to, &from).unwrap();
                    self.follow(&to, &from);
                }
            }
        }
    }
}

struct FaultFile {
    disk: FaultDisk,
    path: PathBuf,
    inner: Box<dyn DiskFile>,
}

impl Write for FaultFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shared = self.disk.shared();
        if !shared.crashed && shared.is_turn() {
            // The write itself is torn.
            self.inner.write_all(&bytes[..bytes.len() / 2])?;
        }
        drop(shared);
        shared = self.disk.enter()?;
        let mut count = bytes.len();
        if let Fault::FullAfter { bytes: limit } = shared.fault {
            count = count.min((limit - shared.bytes_written) as usize);
            if count == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        shared.bytes_written += count as u64;
        self.inner.write_all(&bytes[..count])?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for FaultFile {
    fn sync(&mut self) -> io::Result<()> {
        let mut shared = self.disk.enter()?;
        shared.unsynced_files.retain(|path| *path != self.path);
        Ok(())
    }
}

impl Disk for FaultDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let _shared = self.enter()?;
        RealDisk.create_dir_all(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut shared = self.enter()?;
        shared.unsynced_files.push(path.to_path_buf());
        shared.unsynced_names.push(Change::Created { path: path.to_path_buf() });
        let inner = RealDisk.create_file(path)?;
        Ok(Box::new(FaultFile { disk: self.clone(), path: path.to_path_buf(), inner }))
    }

    fn append_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let _shared = self.enter()?;
        let inner = RealDisk.append_file(path)?;
        Ok(Box::new(FaultFile { disk: self.clone(), path: path.to_path_buf(), inner }))
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        RealDisk.open_file(path)
    }

    fn truncate(&self, path: &Path, length: u64) -> io::Result<()> {
        let _shared = self.enter()?;
        RealDisk.truncate(path, length)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut shared = self.enter()?;
        RealDisk.rename(from, to)?;
        shared.follow(from, to);
        let (from, to) = (from.to_path_buf(), to.to_path_buf());
        shared.unsynced_names.push(Change::Renamed { from, to });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut shared = self.shared();
        if !shared.crashed && shared.is_turn() && path.is_dir() {
            // Removing a folder is no single step: the crash finds it half done.
            let first = fs::read_dir(path)?.next();
            if let Some(entry) = first {
                fs::remove_file(entry?.path())?;
            }
        }
        drop(shared);
        shared = self.enter()?;
        shared.unsynced_files.retain(|file| !file.starts_with(path));
        shared.unsynced_names.retain(|change| match change {
            Change::Created { path: created } => !created.starts_with(path),
            Change::Renamed { to, .. } => !to.starts_with(path),
        });
        RealDisk.remove(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        RealDisk.list(path)
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        // The fault is found by writing, as under a quota that the file system does not tell.
        Ok(u64::MAX)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut shared = self.enter()?;
        shared.unsynced_names.retain(|change| match change {
            Change::Created { path: created } => created.parent() != Some(path),
            Change::Renamed { to, .. } => to.parent() != Some(path),
        });
        Ok(())
    }

    fn try_lock(&self, path: &Path, holder: &str) -> io::Result<Locking> {
        let _shared = self.enter()?;
        RealDisk.try_lock(path, holder)
    }
}

mod tests {
    use std::num::NonZeroUsize;

    use serde_json::json;

    use super::*;
    use crate::FleetError;
    use crate::snapshot::*;

    /// The values of a small model; another seed gives other weights and another optimiser state.
    struct Sample {
        state: State,
        model: Vec<Tensor>,
        optimizer: Vec<Tensor>,
    }

    fn tensor(name: &str, dtype: ElementType, shape: &[usize], fill: u8) -> Tensor {
        let count = shape.iter().product::<usize>() * dtype.bytes();
        let bytes = (0..count).map(|at| fill.wrapping_mul(31).wrapping_add(at as u8)).collect();
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }

    fn sample(step: u64, fill: u8) -> Sample {
        let state = State {
            step,
            seed: 7,
            position: step * 64,
            backend: "cpu".to_owned(),
            version: "0.1.0".to_owned(),
            extra: json!({ "fill": fill, "loss": 0.1 + 0.2 }),
        };
        let model = vec![
            tensor("model.norm.weight", ElementType::F32, &[6], fill),
            tensor("lm_head.weight", ElementType::Bf16, &[3, 5], fill ^ 1),
            tensor("model.embed_tokens.weight", ElementType::F32, &[3, 2], fill ^ 2),
        ];
        let optimizer = vec![tensor("m.model.norm.weight", ElementType::F32, &[6], fill ^ 3)];
        Sample { state, model, optimizer }
    }

    const FILES: [ExtraFile<'static>; 2] = [
        ExtraFile { name: "config.json", bytes: b"{\"model_type\":\"llama\"}" },
        ExtraFile { name: "tokenizer.json", bytes: b"{\"version\":\"1.0\"}" },
    ];

    fn save(disk: &dyn Disk, dir: &Path, sample: &Sample) -> Result<Written, FleetError> {
        let model: Vec<_> = sample.model.iter().map(Tensor::as_ref).collect();
        let optimizer: Vec<_> = sample.optimizer.iter().map(Tensor::as_ref).collect();
        SnapshotWriter::open(disk, dir)?.write(&Contents {
            state: &sample.state,
            model: &model,
            optimizer: &optimizer,
            files: &FILES,
        })
    }

    fn newest(dir: &Path) -> Newest {
        SnapshotReader::new(&RealDisk, dir).read_newest(Parts::All).unwrap()
    }

    fn steps(dir: &Path) -> Vec<u64> {
        SnapshotReader::new(&RealDisk, dir).list().unwrap()
    }

    fn assert_holds(snapshot: &Snapshot, sample: &Sample) {
        let by_name = |tensors: &[Tensor]| {
            let mut tensors = tensors.to_vec();
            tensors.sort_by(|a, b| a.name.cmp(&b.name));
            tensors
        };
        assert_eq!(snapshot.state, sample.state);
        assert_eq!(by_name(&snapshot.model), by_name(&sample.model));
        assert_eq!(by_name(&snapshot.optimizer), by_name(&sample.optimizer));
        assert_eq!(snapshot.files["config.json"], FILES[0].bytes);
    }

    fn no_leftovers(dir: &Path) -> bool {
        let names = RealDisk.list(dir).unwrap();
        names.iter().all(|entry| entry.name.starts_with("step-"))
    }

    #[test]
    fn a_snapshot_comes_back_as_it_was_and_the_newest_first() {
        let dir = tempfile::tempdir().unwrap();
        for step in [200, 1000, 30] {
            let written = save(&RealDisk, dir.path(), &sample(step, step as u8)).unwrap();
            let sample = sample(step, step as u8);
            let want = weights_blake3(sample.model.iter().map(Tensor::as_ref)).unwrap();
            assert_eq!(written.weights_blake3, want);
        }
        assert_eq!(steps(dir.path()), [1000, 200, 30]);
        let newest = newest(dir.path());
        assert!(newest.rejected.is_empty());
        let newest = newest.snapshot.unwrap();
        assert_holds(&newest, &sample(1000, 1000_u64 as u8));
        let reader = SnapshotReader::new(&RealDisk, dir.path());
        let outline = reader.newest_outline().unwrap().unwrap();
        assert_eq!((&outline.folder, &outline.state), (&newest.folder, &newest.state));
        assert_eq!(outline.weights_blake3, newest.weights_blake3);
        assert!(outline.model.contains(&("model.norm.weight".to_owned(), vec![6])));
        check_folder(&RealDisk, &newest.folder).unwrap();
        let model_only = reader.read(200, Parts::Model).unwrap();
        assert_eq!((model_only.model.len(), model_only.optimizer.len()), (3, 0));
    }

    #[test]
    fn the_safetensors_library_reads_the_files_and_state_json_holds_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        let sample = sample(200, 5);
        let written = save(&RealDisk, dir.path(), &sample).unwrap();
        let bytes = fs::read(dir.path().join("step-00000200/model.safetensors")).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.len(), 3);
        for tensor in &sample.model {
            let view = read.tensor(&tensor.name).unwrap();
            assert_eq!((view.shape(), view.data()), (&tensor.shape[..], &tensor.bytes[..]));
        }
        let state = fs::read(dir.path().join("step-00000200/state.json")).unwrap();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
        assert_eq!(state["step"], 200);
        assert_eq!(state["position"], 200 * 64);
        assert_eq!(state["backend"], "cpu");
        assert_eq!(state["weights_blake3"], written.weights_blake3);
        let norm = &state["tensor_files"]["model.safetensors"]["blake3"]["model.norm.weight"];
        let want = blake3::hash(&sample.model[0].bytes).to_hex().to_string();
        assert_eq!(norm, &want);
    }

    /// Crashes at every operation of `act`, with every kind of loss, and then asks `judge`.
    fn crash_everywhere(
        prepare: impl Fn(&Path),
        act: impl Fn(&dyn Disk, &Path) -> Result<(), FleetError>,
        judge: impl Fn(&Path, &str),
    ) {
        let count = {
            let dir = tempfile::tempdir().unwrap();
            prepare(dir.path());
            let disk = FaultDisk::new(Fault::None);
            act(&disk, dir.path()).unwrap();
            disk.operations()
        };
        assert!(count > 5, "only {count} operations");
        for loss in [Loss::Nothing, Loss::Contents, Loss::ContentsAndNames] {
            for operation in 0..count {
                let dir = tempfile::tempdir().unwrap();
                prepare(dir.path());
                let disk = FaultDisk::new(Fault::Crash { operation, loss });
                let result = act(&disk, dir.path());
                assert!(result.is_err(), "operation {operation} of {count} was not tried");
                judge(dir.path(), &format!("{loss:?} at operation {operation} of {count}"));
            }
        }
    }

    fn save_real(dir: &Path, step: u64, fill: u8) {
        // Without real syncs: thousands of them would make this slow, and prove nothing here.
        save(&FaultDisk::new(Fault::None), dir, &sample(step, fill)).unwrap();
    }

    #[test]
    fn inv_5_after_a_crash_at_any_operation_the_old_or_the_new_snapshot_is_complete() {
        let judge = |dir: &Path, place: &str| {
            // First as a viewer sees it, then as the next writer leaves it.
            for after_open in [false, true] {
                if after_open {
                    SnapshotWriter::open(&FaultDisk::new(Fault::None), dir).unwrap();
                    assert!(no_leftovers(dir), "{place}");
                }
                let newest = newest(dir);
                assert!(newest.rejected.is_empty(), "{place}: {:?}", newest.rejected);
                let snapshot = newest.snapshot.expect(place);
                let step = snapshot.state.step;
                assert!(step == 100 || step == 200, "{place}");
                assert_holds(&snapshot, &sample(step, step as u8));
                assert!(steps(dir).contains(&100), "{place}");
            }
        };
        let act = |disk: &dyn Disk, dir: &Path| save(disk, dir, &sample(200, 200)).map(drop);
        crash_everywhere(|dir| save_real(dir, 100, 100), act, judge);
    }

    #[test]
    fn inv_5_a_snapshot_being_replaced_is_never_lost() {
        let prepare = |dir: &Path| {
            save_real(dir, 100, 100);
            save_real(dir, 200, 1);
        };
        let judge = |dir: &Path, place: &str| {
            let viewed = newest(dir);
            assert!(viewed.rejected.is_empty() && viewed.snapshot.is_some(), "{place}");
            SnapshotWriter::open(&FaultDisk::new(Fault::None), dir).unwrap();
            assert!(no_leftovers(dir), "{place}");
            let snapshot = newest(dir).snapshot.expect(place);
            assert_eq!(snapshot.state.step, 200, "{place}");
            let fill = snapshot.state.extra["fill"].as_u64().unwrap() as u8;
            assert!(fill == 1 || fill == 2, "{place}");
            assert_holds(&snapshot, &sample(200, fill));
        };
        crash_everywhere(prepare, |disk, dir| save(disk, dir, &sample(200, 2)).map(drop), judge);
    }

    #[test]
    fn inv_5_a_crash_while_old_snapshots_are_removed_leaves_none_half_removed() {
        let prepare = |dir: &Path| (1..=4).for_each(|step| save_real(dir, step, step as u8));
        let keep = NonZeroUsize::new(2).unwrap();
        let act =
            |disk: &dyn Disk, dir: &Path| SnapshotWriter::open(disk, dir)?.retain(keep).map(drop);
        crash_everywhere(prepare, act, |dir, place| {
            let reader = SnapshotReader::new(&RealDisk, dir);
            let steps = reader.list().unwrap();
            assert!(steps.starts_with(&[4, 3]), "{place}: {steps:?}");
            for step in steps {
                reader.read(step, Parts::All).expect(place);
            }
        });
    }

    #[test]
    fn the_newest_are_kept_and_the_others_removed() {
        let dir = tempfile::tempdir().unwrap();
        (1..=5).for_each(|step| save_real(dir.path(), step, 0));
        let writer = SnapshotWriter::open(&RealDisk, dir.path()).unwrap();
        assert_eq!(writer.retain(NonZeroUsize::new(3).unwrap()).unwrap(), [2, 1]);
        assert_eq!(steps(dir.path()), [5, 4, 3]);
        assert!(writer.retain(NonZeroUsize::new(3).unwrap()).unwrap().is_empty());
        assert!(no_leftovers(dir.path()));
    }

    #[test]
    fn a_full_disk_at_any_byte_leaves_the_older_snapshot_and_says_what_was_needed() {
        let dir = tempfile::tempdir().unwrap();
        save_real(dir.path(), 100, 100);
        let folder = dir.path().join("step-00000100");
        let files = RealDisk.list(&folder).unwrap();
        let size = |entry: Entry| fs::metadata(folder.join(entry.name)).unwrap().len();
        let total: u64 = files.into_iter().map(size).sum();
        // The texts of the two states differ in a few digits: stay a little below the total.
        for bytes in (0..total - 16).step_by(7) {
            let disk = FaultDisk::new(Fault::FullAfter { bytes });
            let error = save(&disk, dir.path(), &sample(200, 200)).unwrap_err();
            let FleetError::DiskFull { needed_bytes, .. } = &error else { panic!("{error}") };
            assert!(*needed_bytes >= total, "{needed_bytes} of {total}");
            let text = error.to_string();
            assert!(text.contains(&format!("needs {needed_bytes} bytes")), "{text}");
            assert!(text.contains("step 200") && text.contains("snapshot.keep"), "{text}");
            assert_eq!(RealDisk.list(dir.path()).unwrap().len(), 1, "byte {bytes}");
        }
        assert_holds(&newest(dir.path()).snapshot.unwrap(), &sample(100, 100));
    }

    #[test]
    fn damage_in_any_byte_of_any_file_is_named_and_the_older_snapshot_is_used() {
        let dir = tempfile::tempdir().unwrap();
        save_real(dir.path(), 100, 100);
        save_real(dir.path(), 200, 200);
        let folder = dir.path().join("step-00000200");
        for entry in RealDisk.list(&folder).unwrap() {
            let path = folder.join(&entry.name);
            let good = fs::read(&path).unwrap();
            let check = |damaged: Option<&[u8]>, what: String| {
                match damaged {
                    Some(bytes) => fs::write(&path, bytes).unwrap(),
                    None => fs::remove_file(&path).unwrap(),
                }
                let newest = newest(dir.path());
                assert_eq!(newest.snapshot.unwrap().state.step, 100, "{what}");
                assert_eq!(newest.rejected[0].step, 200);
                let reason = newest.rejected[0].reason.to_string();
                assert!(reason.contains(&entry.name), "{what}: {reason}");
                let checked = check_folder(&RealDisk, &folder).unwrap_err().to_string();
                assert_eq!(checked, reason, "{what}");
            };
            for at in (0..good.len()).step_by(3) {
                let mut damaged = good.clone();
                damaged[at] ^= 1 << (at % 8);
                check(Some(&damaged), format!("{} byte {at}", entry.name));
                check(Some(&good[..at]), format!("{} cut at {at}", entry.name));
            }
            check(Some(&[&good[..], b"x"].concat()), format!("{} longer", entry.name));
            check(None, format!("{} missing", entry.name));
            fs::write(&path, &good).unwrap();
        }
        assert_eq!(newest(dir.path()).snapshot.unwrap().state.step, 200);
    }

    #[test]
    fn a_damaged_tensor_is_named() {
        let dir = tempfile::tempdir().unwrap();
        save_real(dir.path(), 200, 200);
        let path = dir.path().join("step-00000200/model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        // The one tensor of narrow elements stands last.
        *bytes.last_mut().unwrap() ^= 4;
        fs::write(&path, bytes).unwrap();
        let newest = newest(dir.path());
        assert!(newest.snapshot.is_none());
        let reason = newest.rejected[0].reason.to_string();
        assert!(reason.contains("model.safetensors, tensor `lm_head.weight`"), "{reason}");
    }

    #[test]
    fn what_cannot_be_a_snapshot_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let state = sample(1, 1).state;
        let writer = SnapshotWriter::open(&RealDisk, dir.path()).unwrap();
        let good = tensor("a", ElementType::F32, &[2], 0);
        let short = Tensor { shape: vec![3], ..good.clone() };
        let huge = Tensor { shape: vec![usize::MAX, 2], ..good.clone() };
        let own_name = [ExtraFile { name: "state.json", bytes: b"" }];
        let outside = [ExtraFile { name: "../a", bytes: b"" }];
        let cases: [(&[TensorRef<'_>], &[ExtraFile<'_>], &str); 5] = [
            (&[good.as_ref(), good.as_ref()], &[], "given twice"),
            (&[short.as_ref()], &[], "F32 [3] but has 8 bytes"),
            (&[huge.as_ref()], &[], "has 8 bytes"),
            (&[], &own_name, "`state.json`"),
            (&[], &outside, "plain file name"),
        ];
        for (model, files, want) in cases {
            let contents = Contents { state: &state, model, optimizer: &[], files };
            let error = writer.write(&contents).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
            assert!(RealDisk.list(dir.path()).unwrap().is_empty());
        }
    }
}
