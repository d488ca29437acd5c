//! Maps one file into memory: the only unsafe call of this crate.
//!
//! Does not look at the content: `weights.rs` checks a file's length against its header first.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::ModelError;

/// Maps the whole of `file` for reading.
pub(crate) fn map(file: &File, path: &Path) -> Result<Mmap, ModelError> {
    // SAFETY: the map is read only, and its length is the file's at this moment, which the caller
    // has compared with the header. Another process that shortens the file while it is mapped
    // could still end ours with SIGBUS; weight files are written under a temporary name and
    // renamed, by us and by every tool we know of, so that a named file never shrinks.
    unsafe { Mmap::map(file) }.map_err(ModelError::io("map", path))
}
