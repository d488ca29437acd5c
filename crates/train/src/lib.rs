//! Training: data, schedules, the step, and the loop that ties them to snapshots and metrics.
//!
//! Knows no vendor: a device arrives as a `Backend`. Read next: `config.rs` (what a run is), then
//! `step.rs` (what one step does) and `trainer.rs` (the loop).

pub mod arithmetic;
mod balance;
pub mod config;
pub mod data;
mod digests;
mod error;
pub mod eval;
mod gradient_tree;
mod optimizer;
mod replica;
mod requests;
mod run_files;
mod schedule;
mod step;
mod supervised;
mod tensorboard;
mod trainer;

pub use config::RunConfig;
pub use error::TrainError;
pub use replica::{TrainingReplica, WorkerRun, layout};
pub use step::{Checking, StepResult, TrainingState, tensor_refs};
pub use supervised::{Devices, supervise};
pub use trainer::{Beginning, Metrics, Observer, Run, Start, Summary, model_of, train};
