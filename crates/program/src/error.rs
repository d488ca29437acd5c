//! What can go wrong when a program is built, planned or loaded.

use pontoon_ops::{DeviceError, OpError, OpName};

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProgramError {
    /// An operation's operands do not fit its contract.
    #[error("operation {index} of program `{program}`: {source}")]
    Op {
        /// The program's name.
        program: String,
        /// The operation's place in the list.
        index: usize,
        /// What does not fit.
        source: OpError,
    },
    /// A parameter that the table does not hold.
    #[error("no parameter is named `{name}`; the nearest is `{nearest}`")]
    UnknownParameter {
        /// The name asked for.
        name: String,
        /// The most similar name there is.
        nearest: String,
    },
    /// An input or output that the program does not have.
    #[error("program `{program}` has no {kind} named `{name}`; it has {known:?}")]
    UnknownPort {
        /// The program's name.
        program: String,
        /// Input or output.
        kind: &'static str,
        /// The name asked for.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// Bytes of the wrong length were given for a tensor.
    #[error("`{name}` takes {want} bytes but {got} came")]
    ByteCount {
        /// The tensor.
        name: String,
        /// Bytes it takes.
        want: usize,
        /// Bytes that came.
        got: usize,
    },
    /// An operation that has no gradient stands between a parameter and the loss.
    #[error("operation {index} ({op:?}) has no gradient but stands before the loss")]
    NoGradient {
        /// The operation's place in the list.
        index: usize,
        /// Its name.
        op: OpName,
    },
    /// The same persistent buffer was declared with two sizes.
    #[error("buffer `{name}` was made with {had} bytes but is declared with {want}")]
    BufferSize {
        /// The buffer's name.
        name: String,
        /// Bytes it has.
        had: usize,
        /// Bytes declared now.
        want: usize,
    },
    /// A device cannot run an operation of the program.
    #[error("{device} cannot run operation {index} ({op:?}) of `{program}`: {reason}")]
    Unsupported {
        /// The device.
        device: String,
        /// The program's name.
        program: String,
        /// The operation's place in the list.
        index: usize,
        /// The operation.
        op: OpName,
        /// The backend's reason.
        reason: String,
    },
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
