//! What can be wrong with data, and what to do about it.
//!
//! Read next: `mod.rs`.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of reading, preparing or serving data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The disk refused something.
    #[error("cannot {action} `{path}`: {source}; check the path and the disk")]
    Io {
        /// What was tried, as in `create`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A shard is not what was written.
    #[error("shard `{path}` {what}; make it again with `pontoon data prepare`")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A shard was made with another tokenizer.
    #[error(
        "shard `{path}` was made for {got} tokens, but the tokenizer has {want}; prepare the data \
         again with this tokenizer"
    )]
    Vocabulary {
        /// The shard.
        path: PathBuf,
        /// The tokenizer's vocabulary.
        want: usize,
        /// The shard's.
        got: usize,
    },
    /// There is nothing to read.
    #[error("{what}")]
    Empty {
        /// Where, and what to do.
        what: String,
    },
    /// Too many records could not be used.
    #[error("{broken} of {records} records are broken, more than allowed: {examples}")]
    Broken {
        /// Records that could not be used.
        broken: u64,
        /// Records read.
        records: u64,
        /// The first ones, as `file:line: why`.
        examples: String,
    },
    /// A file's kind or content cannot be used.
    #[error("`{path}`: {what}")]
    Input {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
}

impl DataError {
    /// Names the action and the path of a failed call; for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataError {
        let path = path.to_path_buf();
        move |source| DataError::Io { action, path, source }
    }
}
