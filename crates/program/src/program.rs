//! The program itself: buffers, operations, and the names by which the host reaches them.

use std::collections::BTreeMap;

use pontoon_ops::{BufferId, DType, Op, View};

use crate::error::ProgramError;

/// The buffer that holds every trainable parameter in the compute dtype.
pub const WEIGHTS: BufferId = BufferId(0);
/// The buffer that holds every trainable parameter's gradient in f32, laid out alike.
pub const GRADIENTS: BufferId = BufferId(1);
/// The buffer that holds parameters that are never trained by gradient, in f32.
pub const FROZEN: BufferId = BufferId(2);

/// The name of the buffer that holds the integers of quantised parameters.
pub const INTEGERS: &str = "integers";
/// The name of the buffer that holds their scales, in f32.
pub const SCALES: &str = "scales";
/// The place of [`INTEGERS`] in the programs of models that have quantised parameters.
pub(crate) const INTEGERS_ID: BufferId = BufferId(3);
/// The place of [`SCALES`] in such programs.
pub(crate) const SCALES_ID: BufferId = BufferId(4);

/// How long a buffer lives and who fills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BufferKind {
    /// Outlives the program and is shared with others under its name: weights, gradients,
    /// constants such as rotary tables, and state such as key-value caches.
    Persistent,
    /// Written by the host before each run.
    Input,
    /// Read by the host after each run.
    Output,
    /// Lives from its first write to its last use.
    Temporary,
}

/// A buffer's declaration.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// Unique for persistent buffers, descriptive for others.
    pub name: String,
    /// How long it lives.
    pub kind: BufferKind,
    /// Its size.
    pub bytes: usize,
    /// Its element type, and its shape as first declared.
    pub view: View,
}

/// A flat list of operations on numbered buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// What the program is, such as `train 8x256 bf16`.
    pub name: String,
    /// Indexed by [`BufferId`].
    pub buffers: Vec<Buffer>,
    /// In the order they run.
    pub ops: Vec<Op>,
    /// The segment (layer) of each operation; recomputation works segment by segment.
    pub segments: Vec<u32>,
    /// How many operations are the forward part; the rest are backward.
    pub forward_count: usize,
    /// What the host writes before a run.
    pub inputs: BTreeMap<String, View>,
    /// What the host may read after a run.
    pub outputs: BTreeMap<String, View>,
}

impl Program {
    /// Declares a buffer and gives a contiguous view of all of it.
    pub fn add_buffer(
        &mut self,
        name: impl Into<String>,
        kind: BufferKind,
        dtype: DType,
        shape: &[usize],
    ) -> View {
        let id = BufferId(u32::try_from(self.buffers.len()).expect("fewer than 2^32 buffers"));
        let view = View::contiguous(id, dtype, shape);
        let bytes = dtype.bytes(view.elements());
        self.buffers.push(Buffer { name: name.into(), kind, bytes, view });
        view
    }

    /// Checks and appends an operation.
    pub fn push(&mut self, op: impl Into<Op>, segment: u32) -> Result<(), ProgramError> {
        let op = op.into();
        op.check().map_err(|source| ProgramError::Op {
            program: self.name.clone(),
            index: self.ops.len(),
            source,
        })?;
        self.ops.push(op);
        self.segments.push(segment);
        Ok(())
    }

    /// The declaration of a buffer.
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }

    /// The view of a named input.
    pub fn input(&self, name: &str) -> Result<View, ProgramError> {
        self.port("input", &self.inputs, name)
    }

    /// The view of a named output.
    pub fn output(&self, name: &str) -> Result<View, ProgramError> {
        self.port("output", &self.outputs, name)
    }

    /// Floating-point operations of all matrix products, recomputation included.
    pub fn matrix_flops(&self) -> f64 {
        self.ops.iter().map(|op| pontoon_ops::cost::cost(op).matrix_flops).sum()
    }

    fn port(
        &self,
        kind: &'static str,
        ports: &BTreeMap<String, View>,
        name: &str,
    ) -> Result<View, ProgramError> {
        ports.get(name).copied().ok_or_else(|| ProgramError::UnknownPort {
            program: self.name.clone(),
            kind,
            name: name.to_owned(),
            known: ports.keys().cloned().collect(),
        })
    }
}
