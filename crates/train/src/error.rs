//! What can go wrong with a run, besides its state on disk, and what to do about it.
//!
//! Read next: `trainer.rs`.

use std::path::PathBuf;

use pontoon_fleet::FleetError;
use pontoon_models::ModelError;
use pontoon_ops::{DeviceError, DeviceErrorKind};
use pontoon_program::ProgramError;

/// A failure of a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The settings are wrong.
    #[error("{origin}: {what}")]
    Config {
        /// The file or flag.
        origin: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file cannot be read.
    #[error("cannot read `{path}`: {source}; check the path")]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write `{path}`: {source}; check the folder and the disk")]
    WriteFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The loss or the gradient is not a number.
    #[error(
        "step {step}: {what} is {value}; the weights of step {kept} are kept in a snapshot: lower \
         train.lr or lengthen train.warmup, then go on with --resume"
    )]
    NonFinite {
        /// The step, which was not applied.
        step: u64,
        /// `the loss` or `the gradient's norm`.
        what: &'static str,
        /// What it is.
        value: f64,
        /// The step before.
        kept: u64,
    },
    /// What stands in the run folder is not this run.
    #[error("run folder `{dir}`: {what}")]
    Folder {
        /// The run folder.
        dir: PathBuf,
        /// What is wrong and what to do.
        what: String,
    },
    /// The memory that workers share.
    #[error("cannot use the memory shared between workers: {0}; free some memory")]
    Exchange(std::io::Error),
    /// The supervisor gave up.
    #[error("{0}")]
    Supervised(String),
    /// The data.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The program or its device.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The run's state on disk.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

impl TrainError {
    /// The device's failure, if it is one.
    pub fn device(&self) -> Option<&DeviceError> {
        match self {
            TrainError::Device(error) | TrainError::Program(ProgramError::Device(error)) => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Whether a check found a wrong result or a changed tensor.
    pub fn is_corrupt(&self) -> bool {
        self.device().is_some_and(|error| error.kind == DeviceErrorKind::Corrupt)
    }
}
