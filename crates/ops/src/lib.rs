//! The narrow waist: about forty fused transformer operations that are the whole contract with a
//! vendor, and the trait through which they are run.
//!
//! An operation is a plain value of [`Op`] whose operands are [`View`]s into device buffers; a
//! backend implements [`Backend`] and one `match` over [`Op`]. Shapes and dtypes are checked here,
//! once, by [`Op::check`], never by a vendor. This crate runs nothing and knows no vendor.
//! Read next: `op.rs` for the list, `contract/` for what each operation means.

pub mod backend;
pub mod check;
pub mod contract;
pub mod cost;
mod delegate;
pub mod digest;
pub mod dtype;
pub mod error;
pub mod op;
pub mod philox;
pub mod sums;
pub mod tolerance;
pub mod view;
pub mod waivers;

pub use backend::{Backend, DeviceInfo, Support};
pub use contract::*;
pub use dtype::DType;
pub use error::{DeviceError, DeviceErrorKind, OpError, Remedy};
pub use op::{Access, Op, OpName, Operand};
pub use view::{BufferId, Shape, View};
