//! Keeping a run alive and its state safe: snapshots, the run folder, and the world they live in.
//!
//! Knows tensors only as named bytes: no model, no operation, no device. Read next: `world.rs`, the
//! traits through which everything here reaches the outside; then `snapshot.rs`, `supervisor.rs`.

pub mod control;
pub mod error;
pub mod exchange;
pub mod inbox;
mod map;
pub mod policy;
pub mod processes;
pub mod protocol;
pub mod run_dir;
pub mod snapshot;
#[cfg(feature = "s3")]
pub mod store;
pub mod supervisor;
pub mod worker;
pub mod world;

pub use error::FleetError;
