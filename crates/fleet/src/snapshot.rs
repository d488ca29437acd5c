//! Snapshots: the state of a run after a step, portable, hashed, complete or absent (INV-5).
//!
//! `snapshots/step-00000200/` holds `model.safetensors` and `optimizer.safetensors`, the files the
//! caller adds (`config.json`, `tokenizer.json`, ...), and `state.json`, which holds the hash of
//! everything else. No device's format and no model's structure are known here.
//! Read next: `snapshot/manifest.rs` (what stands in `state.json`), then `write.rs` and `read.rs`.

mod manifest;
mod read;
mod write;

pub(crate) mod testing;

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::FleetError;

pub use read::{
    Newest, Outline, Parts, Rejected, Snapshot, SnapshotReader, check_folder, read_folder,
};
pub use write::{Contents, ExtraFile, SnapshotWriter, Written};

/// The file of the model's weights, under their Hugging Face names.
pub const MODEL_FILE: &str = "model.safetensors";
/// The file of the optimiser's state.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The file of the counters and hashes.
pub const STATE_FILE: &str = "state.json";

/// How a finished snapshot's folder begins.
const STEP_PREFIX: &str = "step-";
/// How the folder of a snapshot in the making, or one about to be removed, begins.
const TEMPORARY_PREFIX: &str = ".tmp-";
/// How the folder of a snapshot that is being replaced begins.
const REPLACED_PREFIX: &str = ".old-";

/// Bytes read, hashed or written at a time: small enough to stay in the second-level cache between
/// hashing and writing, large enough that calls cost nothing.
const CHUNK_BYTES: usize = 256 * 1024;

/// The element types of a snapshot's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// Upper half of a 32-bit float.
    Bf16,
    /// 16-bit float.
    F16,
}

impl ElementType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::Bf16 | ElementType::F16 => 2,
        }
    }

    /// The name in safetensors' headers and in the weights' hash: `F32`, `BF16`, `F16`.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "F32",
            ElementType::Bf16 => "BF16",
            ElementType::F16 => "F16",
        }
    }

    fn to_file(self) -> safetensors::Dtype {
        match self {
            ElementType::F32 => safetensors::Dtype::F32,
            ElementType::Bf16 => safetensors::Dtype::BF16,
            ElementType::F16 => safetensors::Dtype::F16,
        }
    }

    fn from_file(dtype: safetensors::Dtype) -> Option<Self> {
        let all = [ElementType::F32, ElementType::Bf16, ElementType::F16];
        all.into_iter().find(|own| own.to_file() == dtype)
    }
}

/// Memory that is read by position and not held: what other processes share.
pub trait Stored: std::fmt::Debug + Sync {
    /// Reads bytes from a position on.
    fn read(&self, position: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// The bytes of a tensor, and where they are.
#[derive(Clone, Copy, Debug)]
pub enum Bytes<'a> {
    /// In the caller's memory.
    Held(&'a [u8]),
    /// Where they are read from whenever they are needed.
    Stored {
        /// Where.
        store: &'a dyn Stored,
        /// From which position on.
        position: u64,
        /// How many.
        count: usize,
    },
}

impl<'a> From<&'a [u8]> for Bytes<'a> {
    fn from(bytes: &'a [u8]) -> Bytes<'a> {
        Bytes::Held(bytes)
    }
}

impl Bytes<'_> {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Bytes::Held(bytes) => bytes.len(),
            Bytes::Stored { count, .. } => *count,
        }
    }

    /// Shows them in order, a piece at a time.
    fn pieces(
        &self,
        mut show: impl FnMut(&[u8]) -> Result<(), FleetError>,
    ) -> Result<(), FleetError> {
        match *self {
            Bytes::Held(bytes) => bytes.chunks(CHUNK_BYTES).try_for_each(show),
            Bytes::Stored { store, position, count } => {
                let mut piece = vec![0; CHUNK_BYTES.min(count)];
                for at in (0..count).step_by(CHUNK_BYTES) {
                    let piece = &mut piece[..CHUNK_BYTES.min(count - at)];
                    let read = store.read(position + at as u64, piece);
                    read.map_err(|source| FleetError::Shared { source })?;
                    show(piece)?;
                }
                Ok(())
            }
        }
    }
}

/// A tensor that the caller has.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// The name, as in `model.norm.weight`.
    pub name: &'a str,
    /// The element type.
    pub dtype: ElementType,
    /// The extents, outermost first.
    pub shape: &'a [usize],
    /// The elements in row-major order, little-endian.
    pub bytes: Bytes<'a>,
}

/// A tensor read from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// The name, as in `model.norm.weight`.
    pub name: String,
    /// The element type.
    pub dtype: ElementType,
    /// The extents, outermost first.
    pub shape: Vec<usize>,
    /// The elements in row-major order, little-endian.
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// The tensor without its memory.
    pub fn as_ref(&self) -> TensorRef<'_> {
        let Tensor { name, dtype, shape, bytes } = self;
        TensorRef { name, dtype: *dtype, shape, bytes: Bytes::Held(bytes) }
    }
}

/// Where a run stands, besides its tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// The run's seed.
    pub seed: u64,
    /// Samples of the data consumed.
    pub position: u64,
    /// The kind of backend that computed the tensors.
    pub backend: String,
    /// The version of the program that wrote them.
    pub version: String,
    /// What else the trainer needs to go on.
    pub extra: Value,
}

/// The hash over all weights: blake3 over, for each tensor in the order of the names' bytes, the
/// name's bytes, the element type's name (`F32`, `BF16`, `F16`), each extent as an unsigned 64-bit
/// little-endian number, and the elements' bytes, with nothing in between. In hexadecimal.
pub fn weights_blake3<'a>(
    tensors: impl IntoIterator<Item = TensorRef<'a>>,
) -> Result<String, FleetError> {
    let mut tensors: Vec<TensorRef<'a>> = tensors.into_iter().collect();
    tensors.sort_by_key(|tensor| tensor.name);
    let mut hasher = WeightsHasher::default();
    for tensor in tensors {
        hasher.begin(tensor.name, tensor.dtype, tensor.shape);
        tensor.bytes.pieces(|piece| {
            hasher.add(piece);
            Ok(())
        })?;
    }
    Ok(hasher.finish())
}

/// The same hash over tensors that come one by one, in the order of their names.
#[derive(Default)]
struct WeightsHasher(blake3::Hasher);

impl WeightsHasher {
    fn begin(&mut self, name: &str, dtype: ElementType, shape: &[usize]) {
        self.0.update(name.as_bytes());
        self.0.update(dtype.name().as_bytes());
        for extent in shape {
            self.0.update(&(*extent as u64).to_le_bytes());
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// Whether a place for snapshots is in a store rather than on a disk.
pub fn is_url(place: &Path) -> bool {
    place.to_string_lossy().contains("://")
}

/// The place of snapshots that a name means, and the step if it names a single one.
pub fn split(place: &Path) -> (&Path, Option<u64>) {
    let step = place.file_name().and_then(|name| step_of(name.to_str()?));
    match (step, place.parent()) {
        (Some(step), Some(parent)) => (parent, Some(step)),
        _ => (place, None),
    }
}

/// Where a run's snapshots are: `to` of its settings, relative to the folder of these, or in the
/// run folder.
pub fn place(to: Option<&Path>, base: &Path, run_dir: &Path) -> PathBuf {
    match to {
        Some(url) if is_url(url) => url.to_owned(),
        Some(folder) => base.join(folder),
        None => run_dir.join("snapshots"),
    }
}

/// The folder name of a step's snapshot.
fn folder_name(step: u64) -> String {
    format!("{STEP_PREFIX}{step:08}")
}

/// The step a folder name stands for; nothing for other names.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix(STEP_PREFIX)?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_weights_hash_is_over_name_type_shape_and_bytes_in_name_order() {
        let (shape, bytes) = ([1, 2], Bytes::Held(&[9, 8]));
        let second = TensorRef { name: "b", dtype: ElementType::Bf16, shape: &[], bytes };
        let bytes = Bytes::Held(&[1; 8]);
        let first = TensorRef { name: "a", dtype: ElementType::F32, shape: &shape, bytes };
        let mut written = b"aF32".to_vec();
        written.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        written.extend([1; 8]);
        written.extend(b"bBF16\x09\x08");
        let want = blake3::hash(&written).to_hex().to_string();
        assert_eq!(weights_blake3([second, first]).unwrap(), want);
        assert_eq!(weights_blake3([first, second]).unwrap(), want);
    }

    #[test]
    fn only_names_of_finished_snapshots_have_a_step() {
        assert_eq!(step_of(&folder_name(200)), Some(200));
        assert_eq!(folder_name(200), "step-00000200");
        assert_eq!(step_of("step-123456789"), Some(123_456_789));
        for name in ["step-200", ".tmp-step-00000200", "step-0000020x", "step--0000001"] {
            assert_eq!(step_of(name), None, "{name}");
        }
    }
}
