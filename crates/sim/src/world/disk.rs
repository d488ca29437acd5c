//! A disk in memory that can be full, rot, and be written by a process that dies half way.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pontoon_fleet::world::{Disk, DiskFile, Entry, EntryKind, Locking};

/// What an empty disk says it has left.
const FREE_BYTES: u64 = 1 << 40;

type Bytes = Arc<Mutex<Vec<u8>>>;

/// The disk; clones are the same disk.
#[derive(Clone, Default)]
pub struct SimDisk {
    inside: Arc<Mutex<Inside>>,
}

#[derive(Default)]
struct Inside {
    files: BTreeMap<PathBuf, Bytes>,
    folders: BTreeSet<PathBuf>,
    locks: BTreeMap<PathBuf, String>,
    full: bool,
    /// Changes that the writing process still makes before it dies; none if it lives.
    changes_left: Option<u64>,
}

fn taken<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

fn dead() -> io::Error {
    io::Error::other("the process that wrote was killed")
}

impl Inside {
    /// Called before every change.
    fn change(&mut self) -> io::Result<()> {
        match &mut self.changes_left {
            Some(0) => Err(dead()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn exists(&self, path: &Path) -> bool {
        self.files.contains_key(path) || self.folders.contains(path)
    }

    /// What lies below a folder, the folder itself first.
    fn below(&self, path: &Path) -> Vec<PathBuf> {
        let folders = self.folders.iter().filter(|folder| folder.starts_with(path));
        folders.chain(self.files.keys().filter(|file| file.starts_with(path))).cloned().collect()
    }
}

impl SimDisk {
    /// Whether nothing more fits.
    pub fn set_full(&self, full: bool) {
        taken(&self.inside).full = full;
    }

    /// The process that writes dies after so many more changes; `None` for a new process.
    pub fn die_after(&self, changes: Option<u64>) {
        taken(&self.inside).changes_left = changes;
    }

    /// Changes a byte in the middle of a file.
    pub fn damage(&self, path: &Path) {
        if let Some(bytes) = taken(&self.inside).files.get(path) {
            let mut bytes = taken(bytes);
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 0x10;
            }
        }
    }

    fn file(&self, path: &Path) -> io::Result<Bytes> {
        let inside = taken(&self.inside);
        inside.files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

struct SimFile {
    bytes: Bytes,
    inside: Arc<Mutex<Inside>>,
    in_snapshot: bool,
}

impl Write for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inside = taken(&self.inside);
        inside.change()?;
        // Logs are small and are given up last by whoever frees space.
        if inside.full && self.in_snapshot {
            return Err(io::ErrorKind::StorageFull.into());
        }
        taken(&self.bytes).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn sync(&mut self) -> io::Result<()> {
        taken(&self.inside).change()
    }
}

/// A lock, free again once this is dropped.
struct SimLock {
    inside: Arc<Mutex<Inside>>,
    path: PathBuf,
}

impl Drop for SimLock {
    fn drop(&mut self) {
        taken(&self.inside).locks.remove(&self.path);
    }
}

fn in_snapshot(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "snapshots")
}

impl Disk for SimDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut inside = taken(&self.inside);
        inside.change()?;
        for folder in path.ancestors() {
            inside.folders.insert(folder.to_path_buf());
        }
        Ok(())
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut inside = taken(&self.inside);
        inside.change()?;
        let bytes = Bytes::default();
        inside.files.insert(path.to_path_buf(), Arc::clone(&bytes));
        let in_snapshot = in_snapshot(path);
        Ok(Box::new(SimFile { bytes, inside: Arc::clone(&self.inside), in_snapshot }))
    }

    fn append_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut inside = taken(&self.inside);
        inside.change()?;
        let bytes = Arc::clone(inside.files.entry(path.to_path_buf()).or_default());
        let in_snapshot = in_snapshot(path);
        Ok(Box::new(SimFile { bytes, inside: Arc::clone(&self.inside), in_snapshot }))
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        let bytes = taken(&*self.file(path)?).clone();
        Ok(Box::new(Cursor::new(bytes)))
    }

    fn truncate(&self, path: &Path, length: u64) -> io::Result<()> {
        let bytes = self.file(path)?;
        taken(&self.inside).change()?;
        taken(&bytes).truncate(length as usize);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inside = taken(&self.inside);
        inside.change()?;
        if inside.folders.contains(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if !inside.exists(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        for old in inside.below(from) {
            let new = match old.strip_prefix(from) {
                Ok(rest) if rest.as_os_str().is_empty() => to.to_path_buf(),
                Ok(rest) => to.join(rest),
                Err(_) => continue,
            };
            if let Some(bytes) = inside.files.remove(&old) {
                inside.files.insert(new, bytes);
            } else if inside.folders.remove(&old) {
                inside.folders.insert(new);
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inside = taken(&self.inside);
        inside.change()?;
        if !inside.exists(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        for gone in inside.below(path) {
            inside.files.remove(&gone);
            inside.folders.remove(&gone);
        }
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let inside = taken(&self.inside);
        if !inside.folders.contains(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into();
        let files = inside.files.keys().map(|file| (file, EntryKind::File));
        let folders = inside.folders.iter().map(|folder| (folder, EntryKind::Folder));
        let here = files.chain(folders).filter(|(of, _)| of.parent() == Some(path));
        let mut entries: Vec<Entry> =
            here.map(|(of, kind)| Entry { name: name(of), kind }).collect();
        entries.sort();
        Ok(entries)
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        Ok(if taken(&self.inside).full { 0 } else { FREE_BYTES })
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        taken(&self.inside).change()
    }

    fn try_lock(&self, path: &Path, holder: &str) -> io::Result<Locking> {
        let mut inside = taken(&self.inside);
        if let Some(holder) = inside.locks.get(path) {
            return Ok(Locking::Busy { holder: holder.trim().to_owned() });
        }
        inside.locks.insert(path.to_path_buf(), holder.to_owned());
        let (inside, path) = (Arc::clone(&self.inside), path.to_path_buf());
        Ok(Locking::Held(Box::new(SimLock { inside, path })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_moves_with_what_is_in_it_and_a_lock_is_one_holders() {
        let disk = SimDisk::default();
        disk.create_dir_all(Path::new("run/.tmp")).unwrap();
        disk.create_file(Path::new("run/.tmp/a")).unwrap().write_all(b"xyz").unwrap();
        disk.rename(Path::new("run/.tmp"), Path::new("run/step")).unwrap();
        let mut text = String::new();
        disk.open_file(Path::new("run/step/a")).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "xyz");
        assert_eq!(disk.list(Path::new("run")).unwrap().len(), 1);
        let held = disk.try_lock(Path::new("run/lock"), "1\n").unwrap();
        assert!(matches!(
            disk.try_lock(Path::new("run/lock"), "2\n").unwrap(),
            Locking::Busy { holder } if holder == "1"
        ));
        drop(held);
        assert!(matches!(disk.try_lock(Path::new("run/lock"), "2").unwrap(), Locking::Held(_)));
    }

    #[test]
    fn a_process_that_dies_changes_nothing_more() {
        let disk = SimDisk::default();
        disk.create_dir_all(Path::new("run")).unwrap();
        disk.die_after(Some(1));
        disk.create_file(Path::new("run/a")).unwrap();
        assert!(disk.create_file(Path::new("run/b")).is_err());
        disk.die_after(None);
        assert_eq!(disk.list(Path::new("run")).unwrap().len(), 1);
    }
}
