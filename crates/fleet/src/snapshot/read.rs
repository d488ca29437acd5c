//! Reading snapshots: each byte is checked against its hash before it is handed out.
//!
//! Files are read plainly and never mapped, so a truncated one is an error and not a crash. Nothing
//! on disk is changed: a viewer may read while a run writes. Read next: `testing.rs`, how crashes
//! and full disks are tried.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use super::manifest::{Manifest, PlainFile, TensorFile};
use super::{
    CHUNK_BYTES, ElementType, MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, State, Tensor, WeightsHasher,
    folder_name, step_of, weights_blake3,
};
use crate::error::FleetError;
use crate::world::{Disk, EntryKind};

/// How much of a snapshot to read and to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parts {
    /// Everything, to go on training.
    All,
    /// Everything but the optimiser's state, to use the model.
    Model,
}

/// A snapshot in memory, checked.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Where it lies.
    pub folder: PathBuf,
    /// Where the run stood.
    pub state: State,
    /// The hash over all weights.
    pub weights_blake3: String,
    /// The weights, in the order of the file.
    pub model: Vec<Tensor>,
    /// The optimiser's state; empty where only the model was asked for.
    pub optimizer: Vec<Tensor>,
    /// The other files.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// A snapshot that was passed over.
#[derive(Debug)]
pub struct Rejected {
    /// Its step.
    pub step: u64,
    /// Why; names the file, and the tensor where it is one tensor.
    pub reason: FleetError,
}

/// The newest usable snapshot and the newer ones that are not usable.
#[derive(Debug)]
pub struct Newest {
    /// Nothing where no usable one exists.
    pub snapshot: Option<Snapshot>,
    /// Newest first.
    pub rejected: Vec<Rejected>,
}

/// What a snapshot holds, without its tensors' values.
#[derive(Clone, Debug)]
pub struct Outline {
    /// Where it lies.
    pub folder: PathBuf,
    /// Where the run stood.
    pub state: State,
    /// The hash over all weights, as written down.
    pub weights_blake3: String,
    /// The names and extents of the weights.
    pub model: Vec<(String, Vec<usize>)>,
}

/// Reads the snapshots of one run.
pub struct SnapshotReader<'d> {
    disk: &'d dyn Disk,
    dir: PathBuf,
}

impl<'d> SnapshotReader<'d> {
    /// Looks at a folder of snapshots, which need not exist yet.
    pub fn new(disk: &'d dyn Disk, dir: &Path) -> Self {
        SnapshotReader { disk, dir: dir.to_path_buf() }
    }

    /// The steps that have a snapshot, newest first. Not checked yet.
    pub fn list(&self) -> Result<Vec<u64>, FleetError> {
        let entries = match self.disk.list(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(FleetError::io("list", &self.dir)(error)),
        };
        let folders = entries.iter().filter(|entry| entry.kind == EntryKind::Folder);
        let mut steps: Vec<u64> = folders.filter_map(|entry| step_of(&entry.name)).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Reads and checks the snapshot of one step.
    pub fn read(&self, step: u64, parts: Parts) -> Result<Snapshot, FleetError> {
        let snapshot = read_folder(self.disk, &self.dir.join(folder_name(step)), parts)?;
        if snapshot.state.step != step {
            let problem = format!("belongs to step {}", snapshot.state.step);
            let folder = snapshot.folder;
            return Err(FleetError::Damaged { folder, part: STATE_FILE.to_owned(), problem });
        }
        Ok(snapshot)
    }

    /// Reads the newest snapshot that passes all checks, and says which were passed over and why.
    pub fn read_newest(&self, parts: Parts) -> Result<Newest, FleetError> {
        let mut rejected = Vec::new();
        for step in self.list()? {
            match self.read(step, parts) {
                Ok(snapshot) => return Ok(Newest { snapshot: Some(snapshot), rejected }),
                // One that cannot be reached may be good: an older one must not take its place.
                Err(unreachable @ FleetError::Io { .. }) => return Err(unreachable),
                Err(reason) => rejected.push(Rejected { step, reason }),
            }
        }
        Ok(Newest { snapshot: None, rejected })
    }

    /// What the newest snapshot holds that can be read that far; its values are not checked.
    pub fn newest_outline(&self) -> Result<Option<Outline>, FleetError> {
        for step in self.list()? {
            match self.outline(step) {
                Ok(outline) => return Ok(Some(outline)),
                Err(unreachable @ FleetError::Io { .. }) => return Err(unreachable),
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// What the snapshot of one step holds; its values are not checked.
    pub fn outline(&self, step: u64) -> Result<Outline, FleetError> {
        Folder { disk: self.disk, path: &self.dir.join(folder_name(step)) }.outline()
    }
}

impl SnapshotReader<'_> {
    /// Copies what it takes to use the model of the snapshot of `step`, or of the newest that
    /// passes all checks, to a folder of another disk. The copy is what is checked.
    pub fn fetch(
        &self,
        step: Option<u64>,
        disk: &dyn Disk,
        to: &Path,
    ) -> Result<Newest, FleetError> {
        let mut rejected = Vec::new();
        let steps = step.map_or_else(|| self.list(), |step| Ok(vec![step]))?;
        for of in steps {
            let (from, copy) = (self.dir.join(folder_name(of)), to.join(folder_name(of)));
            let fetched = copy_folder(self.disk, &from, disk, &copy);
            match fetched.and_then(|()| read_folder(disk, &copy, Parts::Model)) {
                Ok(snapshot) => return Ok(Newest { snapshot: Some(snapshot), rejected }),
                Err(reason @ FleetError::Damaged { .. }) if step.is_none() => {
                    rejected.push(Rejected { step: of, reason });
                }
                Err(reason) => return Err(reason),
            }
        }
        Ok(Newest { snapshot: None, rejected })
    }
}

/// Copies a snapshot without the optimiser's state.
fn copy_folder(
    from: &dyn Disk,
    folder: &Path,
    disk: &dyn Disk,
    to: &Path,
) -> Result<(), FleetError> {
    let source = Folder { disk: from, path: folder };
    let manifest = source.manifest()?;
    disk.create_dir_all(to).map_err(FleetError::io("create", to))?;
    let others = manifest.files.keys().map(String::as_str);
    for name in others.chain([MODEL_FILE, STATE_FILE]) {
        // A name must not lead out of the folder, whoever wrote it.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(source.damaged(STATE_FILE, &format!("names a file `{name}`")));
        }
        let path = to.join(name);
        let mut reader = source.open(name)?;
        let mut file = disk.create_file(&path).map_err(FleetError::io("create", &path))?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match reader.read(&mut chunk).map_err(|error| source.unreadable(name, &error))? {
                0 => break,
                count => {
                    file.write_all(&chunk[..count]).map_err(FleetError::io("write", &path))?;
                }
            }
        }
    }
    Ok(())
}

/// Reads and checks a snapshot folder, wherever it lies.
pub fn read_folder(disk: &dyn Disk, folder: &Path, parts: Parts) -> Result<Snapshot, FleetError> {
    let folder = Folder { disk, path: folder };
    let manifest = folder.manifest()?;
    let mut files = BTreeMap::new();
    for (name, plain) in &manifest.files {
        files.insert(name.clone(), folder.plain_file(name, plain)?);
    }
    let model = folder.tensors(&manifest, MODEL_FILE)?;
    let weights_blake3 = weights_blake3(model.iter().map(Tensor::as_ref))?;
    if weights_blake3 != manifest.weights_blake3 {
        return Err(folder.damaged(MODEL_FILE, "does not match `weights_blake3`"));
    }
    let optimizer = match parts {
        Parts::All => folder.tensors(&manifest, OPTIMIZER_FILE)?,
        Parts::Model => Vec::new(),
    };
    let path = folder.path.to_path_buf();
    Ok(Snapshot { folder: path, state: manifest.state(), weights_blake3, model, optimizer, files })
}

/// Checks all of a snapshot folder as reading it does, but holds no more of it than a tensor at a
/// time.
pub fn check_folder(disk: &dyn Disk, folder: &Path) -> Result<(), FleetError> {
    let folder = Folder { disk, path: folder };
    let manifest = folder.manifest()?;
    for (name, plain) in &manifest.files {
        folder.plain_file(name, plain)?;
    }
    // The hash is over tensors in the order of their names, which is not always that of the file.
    let hashes = manifest.tensor_files.get(MODEL_FILE);
    let mut names = hashes.map(|of| of.blake3.keys()).into_iter().flatten().peekable();
    let mut early: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut hasher = WeightsHasher::default();
    folder.each_tensor(&manifest, MODEL_FILE, |tensor| {
        early.insert(tensor.name.clone(), tensor);
        while let Some(next) = names.peek().and_then(|name| early.remove(*name)) {
            hasher.begin(&next.name, next.dtype, &next.shape);
            hasher.add(&next.bytes);
            names.next();
        }
    })?;
    if hasher.finish() != manifest.weights_blake3 {
        return Err(folder.damaged(MODEL_FILE, "does not match `weights_blake3`"));
    }
    folder.each_tensor(&manifest, OPTIMIZER_FILE, drop)
}

/// A snapshot's folder being read.
#[derive(Clone, Copy)]
struct Folder<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
}

impl Folder<'_> {
    fn manifest(&self) -> Result<Manifest, FleetError> {
        let mut bytes = Vec::new();
        let read = self.open(STATE_FILE)?.read_to_end(&mut bytes);
        read.map_err(|error| self.unreadable(STATE_FILE, &error))?;
        Manifest::from_bytes(&bytes).map_err(|problem| self.damaged(STATE_FILE, &problem))
    }

    fn outline(&self) -> Result<Outline, FleetError> {
        let manifest = self.manifest()?;
        let Some(hashes) = manifest.tensor_files.get(MODEL_FILE) else {
            return Err(self.damaged(STATE_FILE, &format!("has no hashes of {MODEL_FILE}")));
        };
        let infos = self.header(&mut self.open(MODEL_FILE)?, MODEL_FILE, hashes)?;
        let model = infos.into_iter().map(|(name, info)| (name, info.shape)).collect();
        let (folder, state) = (self.path.to_path_buf(), manifest.state());
        Ok(Outline { folder, state, weights_blake3: manifest.weights_blake3, model })
    }

    fn plain_file(&self, name: &str, plain: &PlainFile) -> Result<Vec<u8>, FleetError> {
        let mut file = self.open(name)?;
        let (bytes, hash) = self.take(&mut file, plain.bytes, name)?;
        self.expect_hash(name, &hash, &plain.blake3)?;
        self.expect_end(&mut file, name)?;
        Ok(bytes)
    }

    fn tensors(&self, manifest: &Manifest, name: &str) -> Result<Vec<Tensor>, FleetError> {
        let mut tensors = Vec::new();
        self.each_tensor(manifest, name, |tensor| tensors.push(tensor))?;
        Ok(tensors)
    }

    /// Hands out the tensors of a file one by one, each after its check.
    fn each_tensor(
        &self,
        manifest: &Manifest,
        name: &str,
        mut take: impl FnMut(Tensor),
    ) -> Result<(), FleetError> {
        let Some(hashes) = manifest.tensor_files.get(name) else {
            return Err(self.damaged(STATE_FILE, &format!("has no hashes of {name}")));
        };
        let mut file = self.open(name)?;
        let infos = self.header(&mut file, name, hashes)?;
        let count = infos.len();
        for (tensor_name, info) in infos {
            let part = format!("{name}, tensor `{tensor_name}`,");
            let Some(want) = hashes.blake3.get(&tensor_name) else {
                return Err(self.damaged(&part, "has no hash"));
            };
            let Some(dtype) = ElementType::from_file(info.dtype) else {
                return Err(self.damaged(&part, "has an element type no snapshot has"));
            };
            let (start, end) = info.data_offsets;
            let (bytes, hash) = self.take(&mut file, (end - start) as u64, &part)?;
            self.expect_hash(&part, &hash, want)?;
            take(Tensor { name: tensor_name, dtype, shape: info.shape, bytes });
        }
        if count != hashes.blake3.len() {
            return Err(self.damaged(name, "has fewer tensors than it should"));
        }
        self.expect_end(&mut file, name)
    }

    /// The tensors of a safetensors file in the order of their bytes. The header is checked against
    /// its hash before any number in it is believed.
    fn header(
        &self,
        file: &mut dyn Read,
        name: &str,
        hashes: &TensorFile,
    ) -> Result<Vec<(String, TensorInfo)>, FleetError> {
        let part = format!("the header of {name}");
        let (bytes, hash) = self.take(file, hashes.header_bytes, &part)?;
        self.expect_hash(&part, &hash, &hashes.header_blake3)?;
        let text = bytes.get(size_of::<u64>()..).unwrap_or_default();
        let metadata: Metadata = serde_json::from_slice(text)
            .map_err(|error| self.damaged(&part, &format!("is not readable: {error}")))?;
        let names = metadata.offset_keys().into_iter();
        let infos = names.filter_map(|name| metadata.info(&name).cloned().map(|info| (name, info)));
        Ok(infos.collect())
    }

    /// Reads a number of bytes and hashes them.
    fn take(
        &self,
        file: &mut dyn Read,
        count: u64,
        part: &str,
    ) -> Result<(Vec<u8>, String), FleetError> {
        let count = usize::try_from(count)
            .map_err(|_| self.damaged(part, "is larger than this machine's memory"))?;
        let mut bytes = vec![0; count];
        let mut hasher = blake3::Hasher::new();
        for chunk in bytes.chunks_mut(CHUNK_BYTES) {
            file.read_exact(chunk).map_err(|error| self.unreadable(part, &error))?;
            hasher.update(chunk);
        }
        Ok((bytes, hasher.finalize().to_hex().to_string()))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Read + Send>, FleetError> {
        let opened = self.disk.open_file(&self.path.join(name));
        opened.map_err(|error| self.unreadable(name, &error))
    }

    fn expect_hash(&self, part: &str, got: &str, want: &str) -> Result<(), FleetError> {
        if got == want { Ok(()) } else { Err(self.damaged(part, "does not match its hash")) }
    }

    fn expect_end(&self, file: &mut dyn Read, name: &str) -> Result<(), FleetError> {
        match file.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.damaged(name, "is longer than it should be")),
            Err(error) => Err(self.unreadable(name, &error)),
        }
    }

    fn unreadable(&self, part: &str, error: &io::Error) -> FleetError {
        match error.kind() {
            io::ErrorKind::NotFound => self.damaged(part, "is missing"),
            io::ErrorKind::UnexpectedEof => self.damaged(part, "is truncated"),
            io::ErrorKind::NetworkDown | io::ErrorKind::PermissionDenied => {
                let source = io::Error::new(error.kind(), error.to_string());
                FleetError::io("read", &self.path.join(part))(source)
            }
            _ => self.damaged(part, &format!("cannot be read: {error}")),
        }
    }

    fn damaged(&self, part: &str, problem: &str) -> FleetError {
        let (part, problem) = (part.to_owned(), problem.to_owned());
        FleetError::Damaged { folder: self.path.to_path_buf(), part, problem }
    }
}
