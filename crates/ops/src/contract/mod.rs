//! What each operation means: one documented struct per operation, grouped by purpose.
//!
//! Every struct says, in this order: formula, Shapes, Dtypes, Writes, Numerics, Errors where they
//! differ from the common ones. Common to all: accumulation is in f32 at least; integers are
//! `i32`; inputs may have strided rows (dense last dimension) unless said otherwise; errors are
//! [`crate::OpError`], raised by [`crate::Op::check`].
//!
//! Two bit rules bind every backend: the same inputs give the same bits at any thread count, and a
//! row's bits do not depend on the other rows in its batch.

mod attention;
mod exchange;
mod linear;
mod loss;
mod memory;
mod mlp;
mod moe;
mod norm;
mod optim;
mod sample;

pub use attention::*;
pub use exchange::*;
pub use linear::*;
pub use loss::*;
pub use memory::*;
pub use mlp::*;
pub use moe::*;
pub use norm::*;
pub use optim::*;
pub use sample::*;

/// What a result does to what stood in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Accumulate {
    /// The result replaces it.
    Overwrite,
    /// The result is added to it: `old + result`, rounded once to the operand's dtype.
    Add,
}

impl Accumulate {
    /// How an operand under this mode is touched.
    pub fn access(self) -> crate::op::Access {
        match self {
            Accumulate::Overwrite => crate::op::Access::Write,
            Accumulate::Add => crate::op::Access::ReadWrite,
        }
    }
}
