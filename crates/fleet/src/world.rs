//! The outside world as traits (INV-4): time, disk, processes and people, and the real ones of
//! time and disk.
//!
//! Nothing else in this crate reads a clock or touches a file, so that a simulated world can stand
//! in. Decides nothing. Read next: `snapshot.rs` and `run_dir.rs`, the users.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock, statvfs};

use crate::control::{Answer, Asked, Request};
use crate::protocol::Command;
use crate::supervisor::Input;

/// Tells the time.
pub trait Clock: Send + Sync {
    /// A time that never goes back; only differences mean something.
    fn now(&self) -> Instant;
    /// The time since 1970-01-01 UTC, for people; it may jump.
    fn unix_time(&self) -> Duration;
}

/// A file being written.
pub trait DiskFile: Write + Send {
    /// Returns once what was written will survive a power cut.
    fn sync(&mut self) -> io::Result<()>;
}

/// A name in a folder.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The name without its folder.
    pub name: String,
    /// Whether it is a folder itself.
    pub kind: EntryKind,
}

/// What a name in a folder stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryKind {
    /// A file, or anything that is not a folder.
    File,
    /// A folder.
    Folder,
}

/// The outcome of asking for a lock.
pub enum Locking {
    /// The lock is ours until this value is dropped or the process ends, however it ends.
    Held(Box<dyn Send>),
    /// Another one has it and wrote this into the file.
    Busy {
        /// The text of the holder.
        holder: String,
    },
}

/// Files and folders.
pub trait Disk: Send + Sync {
    /// Creates a folder and those above it; one that exists is fine.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Creates a file, or empties it.
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file to write at its end, and creates it where it is missing.
    fn append_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file to read from its start.
    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read + Send>>;
    /// Cuts a file to a length in bytes.
    fn truncate(&self, path: &Path, length: u64) -> io::Result<()>;
    /// Renames a file or a folder in one step. A folder must not replace another.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file, or a folder and all in it.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// The names in a folder, in order.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;
    /// Bytes that may still be written where a folder lies.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Returns once a folder's names will survive a power cut.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Takes the lock that a file stands for, without waiting, and writes `holder` into it.
    fn try_lock(&self, path: &Path, holder: &str) -> io::Result<Locking>;
}

/// What a worker's process is started for.
#[derive(Clone, Debug)]
pub struct Launching {
    /// Which worker.
    pub worker: usize,
    /// Of its processes, counted from 1.
    pub incarnation: u32,
    /// Its device.
    pub device: String,
    /// The step at which it may take part.
    pub step: u64,
    /// The number by which it opens the exchange.
    pub exchange: i32,
    /// Faults that were injected so far, by their places in the plan.
    pub injected: BTreeSet<usize>,
}

/// Starts workers.
pub trait Launcher {
    /// Starts one; what it says and its end are sent to `to`.
    fn launch(&mut self, what: &Launching, to: Sender<Input>) -> io::Result<Box<dyn Link>>;
}

/// The way to a worker.
pub trait Link {
    /// Tells it something.
    fn send(&mut self, command: &Command) -> io::Result<()>;
    /// Ends it; returns when it is gone.
    fn kill(&mut self);
}

/// Where people reach a live run.
pub trait Control: Send + Sync {
    /// Takes requests to the run in a folder, which must be ours, until what is returned is
    /// dropped.
    fn listen(&self, dir: &Path, to: Sender<Asked>) -> io::Result<Box<dyn Send>>;
    /// Asks the run in a folder and waits for its answer; `None` if no run is live there.
    fn ask(&self, dir: &Path, request: &Request) -> io::Result<Option<Answer>>;
}

/// Nobody reaches a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unattended;

impl Control for Unattended {
    fn listen(&self, _dir: &Path, _to: Sender<Asked>) -> io::Result<Box<dyn Send>> {
        Ok(Box::new(()))
    }

    fn ask(&self, _dir: &Path, _request: &Request) -> io::Result<Option<Answer>> {
        Ok(None)
    }
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn unix_time(&self) -> Duration {
        // A clock set before 1970 is wrong, but no reason to stop a run.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }
}

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl DiskFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Disk for RealDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(File::create(path)?))
    }

    fn append_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(OpenOptions::new().append(true).create(true).open(path)?))
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(File::open(path)?))
    }

    fn truncate(&self, path: &Path, length: u64) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.set_len(length)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if fs::symlink_metadata(path)?.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours.
            let Ok(name) = entry.file_name().into_string() else { continue };
            let is_folder = entry.file_type()?.is_dir();
            let kind = if is_folder { EntryKind::Folder } else { EntryKind::File };
            entries.push(Entry { name, kind });
        }
        entries.sort();
        Ok(entries)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let file_system = statvfs(path)?;
        Ok(file_system.f_bavail.saturating_mul(file_system.f_frsize))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn try_lock(&self, path: &Path, holder: &str) -> io::Result<Locking> {
        let mut options = OpenOptions::new();
        // Not emptied on opening: the text may belong to the holder.
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)?;
                return Ok(Locking::Busy { holder: holder.trim().to_owned() });
            }
            Err(error) => return Err(error.into()),
        }
        file.set_len(0)?;
        file.write_all(holder.as_bytes())?;
        Ok(Locking::Held(Box::new(file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_with_the_first_ones_text_until_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.lock");
        let first = RealDisk.try_lock(&path, "41\n").unwrap();
        assert!(matches!(&first, Locking::Held(_)));
        match RealDisk.try_lock(&path, "42\n").unwrap() {
            Locking::Busy { holder } => assert_eq!(holder, "41"),
            Locking::Held(_) => panic!("two holders"),
        }
        drop(first);
        assert!(matches!(RealDisk.try_lock(&path, "42\n").unwrap(), Locking::Held(_)));
        assert_eq!(fs::read_to_string(&path).unwrap(), "42\n");
    }

    #[test]
    fn files_and_folders_are_listed_in_order_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        RealDisk.create_dir_all(&dir.path().join("b/c")).unwrap();
        RealDisk.create_file(&dir.path().join("a")).unwrap().write_all(b"x").unwrap();
        let list = || RealDisk.list(dir.path()).unwrap();
        let names: Vec<_> = list().into_iter().map(|entry| (entry.name, entry.kind)).collect();
        assert_eq!(names, [("a".into(), EntryKind::File), ("b".into(), EntryKind::Folder)]);
        RealDisk.remove(&dir.path().join("b")).unwrap();
        RealDisk.remove(&dir.path().join("a")).unwrap();
        assert!(list().is_empty());
        assert!(RealDisk.free_bytes(dir.path()).unwrap() > 0);
    }
}
