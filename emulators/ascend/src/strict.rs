//! The strict log: what a caller did that silicon would punish, sooner or later.
//!
//! A breach is written down when it is found, whatever the call returns, so that a test can ask
//! for the whole list at its end. Most breaches also fail their call.

use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::failure::Failure;

/// What kind of rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Breach {
    /// Device memory, a tensor or another object was used after it was given back.
    UseAfterFree,
    /// An object was given back twice.
    DoubleFree,
    /// Device memory was freed while queued tasks use it.
    FreedInUse,
    /// A view or copy reaches beyond its memory.
    OutOfBounds,
    /// Host memory was passed where device memory belongs, or the reverse.
    WrongMemory,
    /// Host or another stream touched memory before a synchronisation ordered it.
    Unsynchronised,
    /// Host memory changed between an asynchronous copy and its completion.
    HostChanged,
    /// The workspace is missing, too small or overlaps an operand.
    Workspace,
    /// An executor was launched twice without being repeatable, or with another operator.
    Executor,
    /// Executors, tensors, memory or streams were left at the end.
    Leaked,
    /// A stream or event of another context, or no context at all.
    WrongContext,
    /// An address that is not aligned.
    Misaligned,
    /// A dtype, shape or attribute that the vendor's documents forbid.
    Forbidden,
    /// Operands overlap in memory.
    Overlap,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The device it happened on; -1 if it concerns none.
    pub device: i32,
    /// What kind of rule was broken.
    pub breach: Breach,
    /// What happened.
    pub text: String,
}

static LOG: Mutex<Vec<Entry>> = Mutex::new(Vec::new());

/// Most entries kept: a caller that breaks a rule in a loop must not fill memory.
const ENTRIES_MAX: usize = 10_000;

/// Writes an entry down.
pub fn report(device: i32, breach: Breach, text: impl Into<String>) {
    let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    if log.len() < ENTRIES_MAX {
        log.push(Entry { device, breach, text: text.into() });
    }
}

/// Writes an entry down and makes it the failure to return.
pub fn breach(device: i32, breach: Breach, failure: Failure) -> Failure {
    report(device, breach, failure.text.clone());
    failure
}

/// Takes the entries of a device out of the log; of all devices if none is named.
pub fn take(device: Option<i32>) -> Vec<Entry> {
    let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    let wanted = |entry: &Entry| device.is_none_or(|device| entry.device == device);
    let taken = log.iter().filter(|entry| wanted(entry)).cloned().collect();
    log.retain(|entry| !wanted(entry));
    taken
}
