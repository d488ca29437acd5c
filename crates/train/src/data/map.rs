//! The one place where a shard is mapped into memory.
//!
//! Read next: `shard.rs`.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps a file to read.
pub(super) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: shards are written under another name and renamed, and nothing of ours ever writes
    // to one that has its name. Who truncates one under a running job gets a bus error, as with
    // any mapped file; `Shard::open` documents that.
    unsafe { Mmap::map(file) }
}
