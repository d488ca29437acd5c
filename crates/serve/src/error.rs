//! The one error type of this crate, for what goes wrong on a device or at the start.
//!
//! What a client did wrong is `openai/errors.rs`.

use pontoon_models::ModelError;
use pontoon_ops::{DeviceError, DeviceErrorKind};
use pontoon_program::ProgramError;

/// Why a device, or the whole server, cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A program failed.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The model does not fit the request or the device.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A device could not be opened.
    #[error("device `{device}` cannot be used: {reason}")]
    Open {
        /// The device as the user names it.
        device: String,
        /// Why.
        reason: String,
    },
    /// A device computes something other than the others do.
    #[error("device `{device}` does not agree with the others: {evidence}")]
    Disagrees {
        /// The device as the user names it.
        device: String,
        /// What was compared and how far apart it is.
        evidence: String,
    },
    /// No device is left.
    #[error("no device could be started: {reasons}")]
    NoDevice {
        /// Why each of them could not.
        reasons: String,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; give another --host or --port")]
    Listen {
        /// Host and port.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The options contradict each other or the model.
    #[error("{what}")]
    Options {
        /// The option, what it should be and what it is.
        what: String,
    },
}

impl ServeError {
    /// The device's kind of trouble, if it is the device's.
    pub fn kind(&self) -> Option<DeviceErrorKind> {
        match self {
            ServeError::Device(error) | ServeError::Program(ProgramError::Device(error)) => {
                Some(error.kind)
            }
            _ => None,
        }
    }
}
