//! Everything that crosses the border to CUDA: libraries, prototypes, the driver, the compiler.
//!
//! All `unsafe` of this crate stands in this folder. What a code means is in `codes.rs`; which
//! kernels an operation runs, in `ops/`. Read next: `ffi/session.rs`.

pub mod compiler;
pub mod library;
pub mod session;
