//! Trouble on purpose: faults injected into a real run by wrappers around its parts.
//!
//! Nothing here is used by a run without a plan of faults. Read next: `chaos.rs`.

pub mod chaos;
