//! Programs: a training or inference step as a flat list of operations on numbered buffers.
//!
//! A model family is written once as a forward function over [`Builder`]; [`differentiate`] adds
//! the backward operations, [`recompute`] trades memory for time, [`Plan`] places temporaries in
//! one arena, and [`Executor`] runs the list on any backend. Printing and hashing make two
//! programs comparable. This crate knows no model and no vendor. Read next: `program.rs`.

mod autodiff;
mod builder;
mod checks;
mod error;
mod executor;
mod parameters;
mod plan;
mod print;
mod program;
mod recompute;

pub use autodiff::differentiate;
pub use builder::{AttentionInputs, Builder, PagedInputs, Permuted, RopeTables, SampleInputs};
pub use error::ProgramError;
pub use executor::{Executor, Memory};
pub use parameters::{Class, Parameter, ParameterSpec, ParameterTable, Storage, TensorSlice};
pub use plan::Plan;
pub use program::{Buffer, BufferKind, FROZEN, GRADIENTS, INTEGERS, Program, SCALES, WEIGHTS};
pub use recompute::{Recompute, recompute};
