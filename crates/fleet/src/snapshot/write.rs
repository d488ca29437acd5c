//! Writing snapshots: all or nothing, without a second copy of the tensors in memory.
//!
//! The order that makes it so: every file into a temporary folder, each synced; the folder synced;
//! renamed; the parent synced; only then is anything older removed. Does not decide when to write.
//! Read next: `read.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use super::manifest::{Hashes, Manifest, PlainFile, TensorFile};
use super::{
    Bytes, MODEL_FILE, OPTIMIZER_FILE, REPLACED_PREFIX, STATE_FILE, SnapshotReader, State,
    TEMPORARY_PREFIX, TensorRef, folder_name, step_of, weights_blake3,
};
use crate::error::FleetError;
use crate::world::{Disk, DiskFile, Entry};

/// Bytes of `state.json` for each tensor, hash and name included, rounded up: for the estimate of
/// what a snapshot needs.
const MANIFEST_BYTES_PER_TENSOR: u64 = 256;
/// Bytes of `state.json` and of folders besides; also an estimate.
const MANIFEST_BYTES: u64 = 16 * 1024;

/// A small file that is copied into the snapshot.
#[derive(Clone, Copy, Debug)]
pub struct ExtraFile<'a> {
    /// The file's name, without folders.
    pub name: &'a str,
    /// Its content.
    pub bytes: &'a [u8],
}

/// What a snapshot is made of. Everything is borrowed and streamed.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// Where the run stands.
    pub state: &'a State,
    /// The weights, under their Hugging Face names.
    pub model: &'a [TensorRef<'a>],
    /// The optimiser's state.
    pub optimizer: &'a [TensorRef<'a>],
    /// `config.json`, `tokenizer.json` and the like.
    pub files: &'a [ExtraFile<'a>],
}

/// A snapshot that stands on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its folder.
    pub folder: PathBuf,
    /// The hash over all weights.
    pub weights_blake3: String,
}

/// Writes the snapshots of one run. Only the holder of the run's lock may have one.
pub struct SnapshotWriter<'d> {
    disk: &'d dyn Disk,
    dir: PathBuf,
}

impl<'d> SnapshotWriter<'d> {
    /// Opens a folder of snapshots, creates it where it is missing, and clears away what a writer
    /// that was killed left behind.
    pub fn open(disk: &'d dyn Disk, dir: &Path) -> Result<Self, FleetError> {
        disk.create_dir_all(dir).map_err(FleetError::io("create", dir))?;
        let writer = SnapshotWriter { disk, dir: dir.to_path_buf() };
        writer.clear_stale()?;
        Ok(writer)
    }

    /// Writes a snapshot. One of the same step is replaced. After an error the older snapshots are
    /// as they were and nothing half-written is left.
    pub fn write(&self, contents: &Contents<'_>) -> Result<Written, FleetError> {
        let step = contents.state.step;
        let plan = Plan::new(contents)?;
        let free_bytes = self.disk.free_bytes(&self.dir).map_err(self.io("measure"))?;
        let full = |free_bytes| FleetError::DiskFull {
            step,
            dir: self.dir.clone(),
            needed_bytes: plan.needed_bytes,
            free_bytes,
        };
        if free_bytes < plan.needed_bytes {
            return Err(full(free_bytes));
        }
        let temporary = self.dir.join(format!("{TEMPORARY_PREFIX}{}", folder_name(step)));
        let written =
            self.fill(&temporary, contents, &plan).and_then(|hash| self.publish(step, hash));
        written.map_err(|error| {
            // A courtesy: what this leaves, the next `open` clears.
            let _ = self.disk.remove(&temporary);
            if error.is_disk_full() { full(free_bytes) } else { error }
        })
    }

    /// Removes all snapshots but the newest `keep`; returns the removed steps.
    pub fn retain(&self, keep: NonZeroUsize) -> Result<Vec<u64>, FleetError> {
        let steps = SnapshotReader::new(self.disk, &self.dir).list()?;
        let removed: Vec<u64> = steps.into_iter().skip(keep.get()).collect();
        for step in &removed {
            let folder = self.dir.join(folder_name(*step));
            // Renamed first: half a snapshot must never stand under a finished one's name.
            let doomed = self.dir.join(format!("{TEMPORARY_PREFIX}{}", folder_name(*step)));
            self.disk.rename(&folder, &doomed).map_err(FleetError::io("rename", &folder))?;
            self.sync()?;
            self.disk.remove(&doomed).map_err(FleetError::io("remove", &doomed))?;
        }
        Ok(removed)
    }

    /// Writes and syncs every file of the snapshot; returns the hash over the weights.
    fn fill(
        &self,
        folder: &Path,
        contents: &Contents<'_>,
        plan: &Plan<'_>,
    ) -> Result<String, FleetError> {
        self.disk.create_dir_all(folder).map_err(FleetError::io("create", folder))?;
        let mut hashes = Hashes {
            weights_blake3: weights_blake3(contents.model.iter().copied())?,
            tensor_files: BTreeMap::new(),
            files: BTreeMap::new(),
        };
        for file in &plan.tensor_files {
            let hashed = self.write_tensors(folder, file)?;
            hashes.tensor_files.insert(file.name.to_owned(), hashed);
        }
        for file in contents.files {
            let hash = self.write_file(folder, *file)?;
            let plain = PlainFile { bytes: file.bytes.len() as u64, blake3: hash };
            hashes.files.insert(file.name.to_owned(), plain);
        }
        let manifest = Manifest::new(contents.state, hashes);
        self.write_file(folder, ExtraFile { name: STATE_FILE, bytes: &manifest.to_bytes() })?;
        self.disk.sync_dir(folder).map_err(FleetError::io("sync", folder))?;
        Ok(manifest.weights_blake3)
    }

    fn write_tensors(&self, folder: &Path, file: &FilePlan<'_>) -> Result<TensorFile, FleetError> {
        let mut stream = Stream::create(self.disk, &folder.join(file.name))?;
        let header_blake3 = stream.write(Bytes::Held(&file.header))?;
        let mut blake3 = BTreeMap::new();
        for tensor in &file.tensors {
            blake3.insert(tensor.name.to_owned(), stream.write(tensor.bytes)?);
        }
        stream.finish()?;
        Ok(TensorFile { header_bytes: file.header.len() as u64, header_blake3, blake3 })
    }

    fn write_file(&self, folder: &Path, file: ExtraFile<'_>) -> Result<String, FleetError> {
        let mut stream = Stream::create(self.disk, &folder.join(file.name))?;
        let hash = stream.write(Bytes::Held(file.bytes))?;
        stream.finish()?;
        Ok(hash)
    }

    /// Gives the finished temporary folder its name.
    fn publish(&self, step: u64, weights_blake3: String) -> Result<Written, FleetError> {
        let name = folder_name(step);
        let temporary = self.dir.join(format!("{TEMPORARY_PREFIX}{name}"));
        let replaced = self.dir.join(format!("{REPLACED_PREFIX}{name}"));
        let folder = self.dir.join(&name);
        let replaces = self.entries()?.iter().any(|entry| entry.name == name);
        if replaces {
            // A folder cannot be renamed onto another. A crash between the two renames leaves the
            // old one aside; the next `open` puts it back.
            self.disk.rename(&folder, &replaced).map_err(FleetError::io("rename", &folder))?;
        }
        if let Err(error) = self.disk.rename(&temporary, &folder) {
            if replaces {
                // A courtesy, as above: the next `open` does the same.
                let _ = self.disk.rename(&replaced, &folder);
            }
            return Err(FleetError::io("rename", &temporary)(error));
        }
        self.sync()?;
        if replaces {
            self.disk.remove(&replaced).map_err(FleetError::io("remove", &replaced))?;
        }
        Ok(Written { folder, weights_blake3 })
    }

    /// Puts back what was being replaced and removes what was being written or removed.
    fn clear_stale(&self) -> Result<(), FleetError> {
        let entries = self.entries()?;
        for entry in &entries {
            let path = self.dir.join(&entry.name);
            let replaced = entry.name.strip_prefix(REPLACED_PREFIX);
            let is_temporary = entry.name.strip_prefix(TEMPORARY_PREFIX).and_then(step_of);
            match replaced.filter(|name| step_of(name).is_some()) {
                Some(name) if !entries.iter().any(|other| other.name == name) => {
                    let back = self.dir.join(name);
                    self.disk.rename(&path, &back).map_err(FleetError::io("rename", &path))?;
                }
                Some(_) => self.disk.remove(&path).map_err(FleetError::io("remove", &path))?,
                None if is_temporary.is_some() => {
                    self.disk.remove(&path).map_err(FleetError::io("remove", &path))?;
                }
                None => {}
            }
        }
        self.sync()
    }

    fn entries(&self) -> Result<Vec<Entry>, FleetError> {
        self.disk.list(&self.dir).map_err(self.io("list"))
    }

    fn sync(&self) -> Result<(), FleetError> {
        self.disk.sync_dir(&self.dir).map_err(self.io("sync"))
    }

    fn io(&self, action: &'static str) -> impl FnOnce(std::io::Error) -> FleetError {
        FleetError::io(action, &self.dir)
    }
}

/// A file being written and hashed piece by piece.
struct Stream {
    path: PathBuf,
    file: Box<dyn DiskFile>,
}

impl Stream {
    fn create(disk: &dyn Disk, path: &Path) -> Result<Self, FleetError> {
        let file = disk.create_file(path).map_err(FleetError::io("create", path))?;
        Ok(Stream { path: path.to_path_buf(), file })
    }

    /// Writes a piece and returns its hash.
    fn write(&mut self, bytes: Bytes<'_>) -> Result<String, FleetError> {
        let mut hasher = blake3::Hasher::new();
        bytes.pieces(|piece| {
            hasher.update(piece);
            self.file.write_all(piece).map_err(FleetError::io("write", &self.path))
        })?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn finish(mut self) -> Result<(), FleetError> {
        self.file.flush().map_err(FleetError::io("write", &self.path))?;
        self.file.sync().map_err(FleetError::io("sync", &self.path))
    }
}

/// What will be written, checked before the disk is touched.
struct Plan<'a> {
    tensor_files: [FilePlan<'a>; 2],
    needed_bytes: u64,
}

/// A safetensors file: its header, and its tensors in the order of the file.
struct FilePlan<'a> {
    name: &'static str,
    header: Vec<u8>,
    tensors: Vec<TensorRef<'a>>,
}

impl<'a> Plan<'a> {
    fn new(contents: &Contents<'a>) -> Result<Self, FleetError> {
        check_names(contents.files)?;
        let tensor_files = [
            FilePlan::new(MODEL_FILE, contents.model)?,
            FilePlan::new(OPTIMIZER_FILE, contents.optimizer)?,
        ];
        let tensor_count = contents.model.len() + contents.optimizer.len();
        let tensors = tensor_files.iter().flat_map(|file| {
            let header = std::iter::once(file.header.len());
            header.chain(file.tensors.iter().map(|tensor| tensor.bytes.count()))
        });
        let extras = contents.files.iter().map(|file| file.bytes.len());
        let data: u64 = tensors.chain(extras).map(|bytes| bytes as u64).sum();
        let manifest = MANIFEST_BYTES + MANIFEST_BYTES_PER_TENSOR * tensor_count as u64;
        Ok(Plan { tensor_files, needed_bytes: data + manifest })
    }
}

impl<'a> FilePlan<'a> {
    /// Orders the tensors, wide elements first so that each stays aligned, then by name.
    fn new(name: &'static str, tensors: &[TensorRef<'a>]) -> Result<Self, FleetError> {
        let mut tensors = tensors.to_vec();
        tensors.sort_by_key(|tensor| (std::cmp::Reverse(tensor.dtype.bytes()), tensor.name));
        let mut offset = 0;
        let mut infos = Vec::with_capacity(tensors.len());
        let mut names = BTreeSet::new();
        for tensor in &tensors {
            let bad = |problem: String| FleetError::Contents {
                part: format!("tensor `{}` of {name}", tensor.name),
                problem,
            };
            if !names.insert(tensor.name) {
                return Err(bad("is given twice".to_owned()));
            }
            let elements = tensor
                .shape
                .iter()
                .try_fold(1_usize, |product, extent| product.checked_mul(*extent));
            let want = elements.and_then(|count| count.checked_mul(tensor.dtype.bytes()));
            if want != Some(tensor.bytes.count()) {
                let (dtype, got) = (tensor.dtype.name(), tensor.bytes.count());
                return Err(bad(format!("is {dtype} {:?} but has {got} bytes", tensor.shape)));
            }
            let end = offset + tensor.bytes.count();
            let info = TensorInfo {
                dtype: tensor.dtype.to_file(),
                shape: tensor.shape.to_vec(),
                data_offsets: (offset, end),
            };
            infos.push((tensor.name.to_owned(), info));
            offset = end;
        }
        Ok(FilePlan { name, header: header(name, infos)?, tensors })
    }
}

/// The length field and the header of a safetensors file.
fn header(name: &str, infos: Vec<(String, TensorInfo)>) -> Result<Vec<u8>, FleetError> {
    let bad = |problem: String| FleetError::Contents { part: name.to_owned(), problem };
    // Hugging Face's loaders refuse a file that does not say this.
    let note = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(note), infos).map_err(|error| bad(error.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|error| bad(error.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    Ok(header)
}

/// Checks that the added files can stand beside ours.
fn check_names(files: &[ExtraFile<'_>]) -> Result<(), FleetError> {
    let mut names = BTreeSet::from([MODEL_FILE, OPTIMIZER_FILE, STATE_FILE]);
    for file in files {
        let bad = |problem: &str| FleetError::Contents {
            part: format!("file `{}`", file.name),
            problem: problem.to_owned(),
        };
        if file.name.is_empty() || file.name.starts_with('.') || file.name.contains(['/', '\\']) {
            return Err(bad("is not a plain file name"));
        }
        if !names.insert(file.name) {
            return Err(bad("is given twice, or is one of the snapshot's own"));
        }
    }
    Ok(())
}
