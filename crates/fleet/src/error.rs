//! What can go wrong with a run's state on disk, and what to do about it.
//!
//! Read next: `snapshot.rs`.

use std::io;
use std::path::PathBuf;

/// A failure of the run folder or of a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The disk refused something.
    #[error("cannot {action} `{path}`: {source}; {}", self.remedy())]
    Io {
        /// What was tried, as in `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A snapshot does not fit on the disk.
    #[error(
        "disk full: the snapshot of step {step} in `{dir}` needs {needed_bytes} bytes and \
         {free_bytes} are free; {}",
        self.remedy()
    )]
    DiskFull {
        /// The step whose state was to be written.
        step: u64,
        /// The folder of snapshots.
        dir: PathBuf,
        /// Bytes the whole snapshot takes.
        needed_bytes: u64,
        /// Bytes the file system had left for it.
        free_bytes: u64,
    },
    /// A snapshot is not what was written.
    #[error("snapshot `{folder}` is damaged: {part} {problem}; {}", self.remedy())]
    Damaged {
        /// The snapshot's folder.
        folder: PathBuf,
        /// The file, and the tensor where it is one tensor.
        part: String,
        /// What is wrong with it, as in `is missing`.
        problem: String,
    },
    /// What was given to write cannot be a snapshot.
    #[error("cannot write a snapshot: {part} {problem}; {}", self.remedy())]
    Contents {
        /// The tensor or file.
        part: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Another process works in the run folder.
    #[error("run folder `{path}` is in use by process {holder}; {}", self.remedy())]
    Locked {
        /// The run folder.
        path: PathBuf,
        /// The process id that the lock file names.
        holder: String,
    },
    /// A store of snapshots cannot be used as it is named.
    #[error("cannot keep snapshots in `{url}`: {problem}; {}", self.remedy())]
    Store {
        /// As in the settings.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// The memory that workers share cannot be read.
    #[error("cannot read the memory shared between workers: {source}; {}", self.remedy())]
    Shared {
        /// What the system said.
        source: io::Error,
    },
    /// A line could not be written as JSON.
    #[error("cannot write a line of `{path}` as JSON: {source}; {}", self.remedy())]
    Line {
        /// The file of lines.
        path: PathBuf,
        /// What the serialiser said.
        source: serde_json::Error,
    },
}

impl FleetError {
    /// What the user or the supervisor should do.
    pub fn remedy(&self) -> &'static str {
        match self {
            FleetError::Io { path, .. } if path.to_string_lossy().contains("://") => {
                "check AWS_ENDPOINT, the credentials, the bucket and the network, then resume"
            }
            FleetError::Store { .. } => "give a folder or s3://BUCKET/PREFIX as snapshot.to",
            FleetError::Io { .. } => "check the path, its permissions and the disk, then resume",
            FleetError::DiskFull { .. } => {
                "free some space or lower `snapshot.keep`, then resume; older snapshots are \
                 untouched"
            }
            FleetError::Damaged { .. } => {
                "use an older snapshot, and check the disk if this comes again"
            }
            FleetError::Contents { .. } => "correct the caller: nothing was written",
            FleetError::Locked { .. } => "stop that process first, or use another folder",
            FleetError::Shared { .. } => "free some memory, then resume",
            FleetError::Line { .. } => "correct the caller: a line is one JSON object",
        }
    }

    /// Names the action and the path of a failed call; for `map_err`.
    pub(crate) fn io(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> FleetError {
        let path = path.to_path_buf();
        move |source| FleetError::Io { action, path, source }
    }

    /// Whether the disk, or the user's share of it, is full.
    pub(crate) fn is_disk_full(&self) -> bool {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        matches!(self, FleetError::Io { source, .. } if full.contains(&source.kind()))
    }
}
