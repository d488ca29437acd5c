//! Everything that crosses the border to CANN: symbols, prototypes, the runtime, executors.
//!
//! All `unsafe` of this crate stands in this folder. What a code means is in `codes.rs`; which
//! calls an operation makes, in `ops/`. Read next: `ffi/table.rs`.

pub mod library;
pub mod operators;
pub mod session;
pub mod table;
