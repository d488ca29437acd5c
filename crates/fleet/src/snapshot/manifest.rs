//! `state.json`: the counters of the run and the hash of everything in the snapshot.
//!
//! The file guards itself: its last field is blake3 over its own bytes with that field's digits as
//! zeros. Reads and writes no file. Read next: `write.rs`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::State;

/// The version of the format; a reader refuses a newer one.
const FORMAT: u32 = 1;
/// Hexadecimal digits of a blake3 hash.
const DIGITS: usize = 64;
/// What stands before the digits of the file's own hash, and after them.
const GUARD_OPENING: &str = "\"state_blake3\": \"";
const GUARD_CLOSING: &str = "\"\n}\n";

/// The content of `state.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: u32,
    step: u64,
    seed: u64,
    position: u64,
    backend: String,
    version: String,
    /// Over all weights of the model, see [`super::weights_blake3`].
    pub weights_blake3: String,
    extra: Value,
    /// The safetensors files by name.
    pub tensor_files: BTreeMap<String, TensorFile>,
    /// The other files by name.
    pub files: BTreeMap<String, PlainFile>,
    /// Over this file; must stay the last field, see [`Manifest::to_bytes`].
    state_blake3: String,
}

/// The hashes that together cover each byte of a safetensors file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct TensorFile {
    /// Bytes before the first tensor: the length field and the header.
    pub header_bytes: u64,
    /// Over those bytes: a changed name or shape is damage too.
    pub header_blake3: String,
    /// Over each tensor's bytes.
    pub blake3: BTreeMap<String, String>,
}

/// A file that is hashed as a whole.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PlainFile {
    pub bytes: u64,
    pub blake3: String,
}

/// The parts of a manifest that come from writing the files.
pub(super) struct Hashes {
    pub weights_blake3: String,
    pub tensor_files: BTreeMap<String, TensorFile>,
    pub files: BTreeMap<String, PlainFile>,
}

impl Manifest {
    pub fn new(state: &State, hashes: Hashes) -> Self {
        Manifest {
            format: FORMAT,
            step: state.step,
            seed: state.seed,
            position: state.position,
            backend: state.backend.clone(),
            version: state.version.clone(),
            weights_blake3: hashes.weights_blake3,
            extra: state.extra.clone(),
            tensor_files: hashes.tensor_files,
            files: hashes.files,
            state_blake3: "0".repeat(DIGITS),
        }
    }

    /// The run's counters.
    pub fn state(&self) -> State {
        State {
            step: self.step,
            seed: self.seed,
            position: self.position,
            backend: self.backend.clone(),
            version: self.version.clone(),
            extra: self.extra.clone(),
        }
    }

    /// The file's bytes, guarded.
    pub fn to_bytes(&self) -> Vec<u8> {
        let text = serde_json::to_string_pretty(self);
        let mut bytes = text.expect("string keys and plain values are always JSON").into_bytes();
        bytes.push(b'\n');
        let guard = guard_range(&bytes).expect("the guard is the last field");
        let hash = blake3::hash(&bytes);
        bytes[guard].copy_from_slice(hash.to_hex().as_bytes());
        bytes
    }

    /// Checks the guard and reads the file; the error says what is wrong with it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let guard = guard_range(bytes).ok_or("is truncated or was edited")?;
        let mut zeroed = bytes.to_vec();
        zeroed[guard.clone()].fill(b'0');
        if blake3::hash(&zeroed).to_hex().as_bytes() != &bytes[guard] {
            return Err("does not match its own hash".to_owned());
        }
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|error| format!("is not readable: {error}"))?;
        if manifest.format > FORMAT {
            let (format, version) = (manifest.format, &manifest.version);
            return Err(format!("has format {format}, written by version {version}: too new"));
        }
        Ok(manifest)
    }
}

/// Where the digits of the file's own hash stand.
fn guard_range(bytes: &[u8]) -> Option<std::ops::Range<usize>> {
    let end = bytes.len().checked_sub(GUARD_CLOSING.len())?;
    let start = end.checked_sub(DIGITS)?;
    let opens = bytes[..start].ends_with(GUARD_OPENING.as_bytes());
    (opens && bytes[end..] == *GUARD_CLOSING.as_bytes()).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let state = State {
            step: 7,
            seed: u64::MAX,
            position: 3,
            backend: "cpu".to_owned(),
            version: "0.1.0".to_owned(),
            extra: serde_json::json!({ "loss": 0.1 + 0.2, "small": 5e-324 }),
        };
        let hashes = Hashes {
            weights_blake3: "ab".to_owned(),
            tensor_files: BTreeMap::new(),
            files: BTreeMap::new(),
        };
        Manifest::new(&state, hashes)
    }

    #[test]
    fn the_state_survives_exactly_large_seeds_and_floats_included() {
        let read = Manifest::from_bytes(&manifest().to_bytes()).unwrap();
        assert_eq!(read.state(), manifest().state());
    }

    #[test]
    fn every_changed_or_missing_byte_is_noticed() {
        let bytes = manifest().to_bytes();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Manifest::from_bytes(&damaged).is_err(), "byte {at}");
            assert!(Manifest::from_bytes(&bytes[..at]).is_err(), "cut at {at}");
        }
    }
}
