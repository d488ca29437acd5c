//! A disk that is full, or damages a snapshot, as a plan says.
//!
//! Only paths inside a snapshot's folder are struck. Read next: `plan.rs`.

use std::io::{self, Read};
use std::path::{Component, Path};
use std::sync::{Mutex, PoisonError};

use pontoon_fleet::world::{Disk, DiskFile, Entry, Locking};

use super::plan::{Fault, FaultKind, Numbered};

/// A disk with faults.
pub struct ChaosDisk<'d> {
    inner: &'d dyn Disk,
    faults: Mutex<Vec<Fault>>,
}

impl<'d> ChaosDisk<'d> {
    /// Wraps a disk.
    pub fn new<'f>(
        inner: &'d dyn Disk,
        faults: impl Iterator<Item = &'f Numbered>,
    ) -> ChaosDisk<'d> {
        let faults = faults.map(|(_, fault)| fault.clone()).collect();
        ChaosDisk { inner, faults: Mutex::new(faults) }
    }

    /// Whether a fault of this kind strikes the snapshot that a path belongs to; uses it up.
    fn strikes(&self, kind: FaultKind, path: &Path) -> bool {
        let Some(step) = snapshot_step(path) else { return false };
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let due = |fault: &Fault| fault.kind == kind && fault.step <= step;
        let Some(place) = faults.iter().position(due) else { return false };
        faults[place].for_steps -= 1;
        if faults[place].for_steps == 0 {
            faults.remove(place);
        }
        true
    }

    /// Changes a byte in the middle of the model's file.
    fn damage(&self, folder: &Path) -> io::Result<()> {
        let path = folder.join("model.safetensors");
        let mut bytes = Vec::new();
        self.inner.open_file(&path)?.read_to_end(&mut bytes)?;
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.get_mut(middle) {
            *byte ^= 0x10;
        }
        let mut file = self.inner.create_file(&path)?;
        file.write_all(&bytes)?;
        file.sync()
    }
}

/// The step in the name of a snapshot's folder, finished or not.
fn snapshot_step(path: &Path) -> Option<u64> {
    path.components().rev().find_map(|component| match component {
        Component::Normal(name) => name.to_str()?.split_once("step-")?.1.parse().ok(),
        _ => None,
    })
}

impl Disk for ChaosDisk<'_> {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dir_all(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        if self.strikes(FaultKind::DiskFull, path) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "injected: no space left"));
        }
        self.inner.create_file(path)
    }

    fn append_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.inner.append_file(path)
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        self.inner.open_file(path)
    }

    fn truncate(&self, path: &Path, length: u64) -> io::Result<()> {
        self.inner.truncate(path, length)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)?;
        let finished =
            to.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-"));
        if finished && self.strikes(FaultKind::DamagedSnapshot, to) {
            self.damage(to)?;
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.inner.list(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.inner.free_bytes(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_dir(path)
    }

    fn try_lock(&self, path: &Path, holder: &str) -> io::Result<Locking> {
        self.inner.try_lock(path, holder)
    }
}
