//! Weights on their way to a device, tensor by tensor: what is needed of a file passes through
//! memory once, and no copy of the model stands on the host.
//!
//! A tensor whose bytes on disk are what the device wants is handed on as it is mapped. Read next:
//! `quantise.rs` for integers, `values.rs` for weights that live on the host.

use std::borrow::Cow;

use half::bf16;
use pontoon_ops::{Backend, BufferId, DType};
use pontoon_program::{Class, INTEGERS, Memory, ProgramError, SCALES, Storage, TensorSlice};
use safetensors::Dtype;

use crate::error::ModelError;
use crate::model::Model;
use crate::quantise::quantise_rows;
use crate::values::{HostWeights, compute_bytes};
use crate::weights::Weights;

/// Values that are converted at a time: enough for all cores, and little beside a model.
const VALUES_TOGETHER: usize = 4 << 20;

/// Rows of a tensor as they come from a source.
pub struct Rows<'a> {
    /// The name on disk.
    pub name: &'a str,
    /// The extents of the whole tensor.
    pub shape: &'a [usize],
    /// The first row.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// Where a model's weights come from.
pub trait TensorSource: Send + Sync {
    /// The values of some rows of a tensor.
    fn rows(&self, rows: &Rows<'_>) -> Result<Cow<'_, [f32]>, ModelError>;

    /// The whole tensor's bytes if they are bf16 already.
    fn bf16_bytes(&self, name: &str, shape: &[usize]) -> Result<Option<&[u8]>, ModelError>;
}

impl TensorSource for Weights {
    fn rows(&self, rows: &Rows<'_>) -> Result<Cow<'_, [f32]>, ModelError> {
        Ok(Cow::Owned(self.read_rows_f32(rows)?))
    }

    fn bf16_bytes(&self, name: &str, shape: &[usize]) -> Result<Option<&[u8]>, ModelError> {
        let view = self.shaped(name, shape)?;
        Ok((view.dtype == Dtype::BF16).then_some(view.bytes))
    }
}

/// Weights on the host, in the layout of a model that is stored in floats.
pub struct HostTensors {
    model: Model,
    weights: HostWeights,
}

impl HostTensors {
    /// The weights of a model.
    pub fn new(model: Model, weights: HostWeights) -> HostTensors {
        HostTensors { model, weights }
    }
}

impl TensorSource for HostTensors {
    fn rows(&self, rows: &Rows<'_>) -> Result<Cow<'_, [f32]>, ModelError> {
        let slices = self.model.table.tensors();
        let slice = slices.iter().find(|slice| slice.name == rows.name);
        let slice = slice.ok_or_else(|| ModelError::Request {
            what: format!("the model on the host has no tensor `{}`", rows.name),
        })?;
        let width = slice.elements() / slice.shape.first().copied().unwrap_or(1).max(1);
        let values = self.weights.tensor(slice);
        Ok(Cow::Borrowed(&values[rows.first * width..][..rows.count * width]))
    }

    fn bf16_bytes(&self, _name: &str, _shape: &[usize]) -> Result<Option<&[u8]>, ModelError> {
        Ok(None)
    }
}

impl Model {
    /// Puts every parameter where programs of this dtype read it, each tensor checked for its
    /// shape. Tensors the model does not have are left alone.
    pub fn upload(
        &self,
        source: &dyn TensorSource,
        backend: &mut dyn Backend,
        memory: &mut Memory,
        dtype: DType,
    ) -> Result<(), ModelError> {
        let table = &self.table;
        let places = Places {
            weights: memory.ensure(backend, "weights", dtype.bytes(table.trainable_elements()))?,
            frozen: match table.frozen_elements() {
                0 => None,
                count => Some(memory.ensure(backend, "frozen", 4 * count)?),
            },
            quantised: match table.integer_bytes() {
                0 => None,
                bytes => {
                    let integers = memory.ensure(backend, INTEGERS, bytes)?;
                    Some((integers, memory.ensure(backend, SCALES, 4 * table.scale_count())?))
                }
            },
        };
        for slice in table.tensors() {
            places.upload(&slice, source, backend, dtype)?;
        }
        Ok(())
    }
}

/// The buffers that parameters lie in.
struct Places {
    weights: BufferId,
    frozen: Option<BufferId>,
    quantised: Option<(BufferId, BufferId)>,
}

impl Places {
    fn upload(
        &self,
        slice: &TensorSlice,
        source: &dyn TensorSource,
        backend: &mut dyn Backend,
        dtype: DType,
    ) -> Result<(), ModelError> {
        let (buffer, dtype) = match (slice.class, self.frozen) {
            (Class::Frozen, Some(frozen)) => (frozen, DType::F32),
            _ => (self.weights, dtype),
        };
        if slice.storage == Storage::Float
            && dtype == DType::Bf16
            && let Some(bytes) = source.bf16_bytes(&slice.name, &slice.shape)?
        {
            let at = dtype.bytes(slice.element_offset);
            return Ok(backend.upload(buffer, at, bytes).map_err(ProgramError::from)?);
        }
        let rows = slice.shape.first().copied().unwrap_or(1);
        let width = slice.elements() / rows.max(1);
        let together = (VALUES_TOGETHER / width.max(1)).max(1);
        for first in (0..rows).step_by(together) {
            let count = together.min(rows - first);
            let rows = Rows { name: &slice.name, shape: &slice.shape, first, count };
            let values = source.rows(&rows)?;
            match (slice.storage, self.quantised) {
                (Storage::Integers { dtype, group }, Some(quantised)) => {
                    let work = Quantising { slice, dtype, group, width, first };
                    work.upload(&values, quantised, backend)?;
                }
                _ => {
                    let at = dtype.bytes(slice.element_offset + first * width);
                    let bytes = float_bytes(&values, dtype);
                    backend.upload(buffer, at, &bytes).map_err(ProgramError::from)?;
                }
            }
        }
        Ok(())
    }
}

/// Rows on their way to becoming integers.
struct Quantising<'a> {
    slice: &'a TensorSlice,
    dtype: DType,
    group: usize,
    width: usize,
    first: usize,
}

impl Quantising<'_> {
    fn upload(
        &self,
        values: &[f32],
        (integers_buffer, scales_buffer): (BufferId, BufferId),
        backend: &mut dyn Backend,
    ) -> Result<(), ModelError> {
        let rows = values.len() / self.width.max(1);
        let share = rows.div_ceil(threads()).max(1) * self.width;
        let quantise = |values: &[f32]| {
            let (mut integers, mut scales) = (Vec::new(), Vec::new());
            let to = (&mut integers, &mut scales);
            quantise_rows(values, self.width, self.dtype, self.group, to);
            (integers, scales)
        };
        let parts: Vec<(Vec<u8>, Vec<f32>)> = std::thread::scope(|scope| {
            let spawn = |part| scope.spawn(move || quantise(part));
            let running: Vec<_> = values.chunks(share).map(spawn).collect();
            let end = |one: std::thread::ScopedJoinHandle<'_, _>| {
                one.join().expect("rounding numbers does not panic")
            };
            running.into_iter().map(end).collect()
        });
        let row_scales = self.width.div_ceil(self.group);
        let mut integers_at = self.slice.element_offset + self.dtype.bytes(self.first * self.width);
        let mut scales_at = 4 * (self.slice.scale_offset + self.first * row_scales);
        for (integers, scales) in parts {
            let scales: &[u8] = bytemuck::cast_slice(&scales);
            backend.upload(integers_buffer, integers_at, &integers).map_err(ProgramError::from)?;
            backend.upload(scales_buffer, scales_at, scales).map_err(ProgramError::from)?;
            integers_at += integers.len();
            scales_at += scales.len();
        }
        Ok(())
    }
}

/// Values in a float dtype; threads share the work where it is worth it.
fn float_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    if dtype != DType::Bf16 {
        return compute_bytes(values, dtype);
    }
    let mut rounded = vec![bf16::ZERO; values.len()];
    let share = values.len().div_ceil(threads()).max(1);
    std::thread::scope(|scope| {
        for (values, rounded) in values.chunks(share).zip(rounded.chunks_mut(share)) {
            scope.spawn(move || {
                let pairs = rounded.iter_mut().zip(values);
                pairs.for_each(|(to, &value)| *to = bf16::from_f32(value));
            });
        }
    });
    bytemuck::cast_slice(&rounded).to_vec()
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
