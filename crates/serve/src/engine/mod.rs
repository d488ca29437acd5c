//! The engine of one device: continuous batching over a paged cache, on a thread of its own.
//!
//! It knows tokens only: text, HTTP and the other devices are above it. Read `request.rs`, then
//! `batch.rs` for how a step is put together, `blocks.rs` for the cache and `worker.rs` for the
//! thread.

pub mod batch;
pub mod blocks;
pub mod device;
pub mod draft;
pub mod mtp;
pub mod probe;
pub mod request;
pub mod rows;
pub mod sequence;
pub mod worker;
