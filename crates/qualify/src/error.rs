//! What can go wrong while devices are qualified, apart from what is found on them.

use std::path::PathBuf;

use pontoon_ops::DeviceError;
use pontoon_program::ProgramError;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum QualifyError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The program does not fit the device or its inputs.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// A buffer of a step was given bytes of another size.
    #[error("`{name}` of program `{program}` takes {want} bytes but {got} came")]
    Contents {
        /// The program.
        program: String,
        /// The buffer.
        name: String,
        /// Bytes it takes.
        want: usize,
        /// Bytes that came.
        got: usize,
    },
    /// A reproducer cannot be read or written.
    #[error("`{}` cannot be used as a reproducer: {what}", path.display())]
    Reproducer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}
