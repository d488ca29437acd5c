//! Training: data, schedules, the step, and the loop that ties them to snapshots and metrics.
//!
//! Knows no vendor: a device arrives as a `Backend`. Read next: `config.rs` (what a run is), then
//! `step.rs` (what one step does) and `trainer.rs` (the loop).

pub mod data;
