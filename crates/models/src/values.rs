//! The values of a model's parameters on the host: fresh, from disk, and as bytes for a device.
//!
//! Values stand in the parameter table's layout, in f32, whatever a program computes in. Builds no
//! program. Read next: `model.rs`.

use half::{bf16, f16};
use pontoon_ops::philox::Stream;
use pontoon_ops::{Backend, DType};
use pontoon_program::{Class, Memory, ProgramError, TensorSlice};

use crate::block::rope_table_names;
use crate::error::ModelError;
use crate::model::Model;
use crate::weights::Weights;

/// Values of all parameters, laid out as the table says; padding is zero.
#[derive(Clone, Debug, PartialEq)]
pub struct HostWeights {
    /// What is trained.
    pub trainable: Vec<f32>,
    /// What is not.
    pub frozen: Vec<f32>,
}

/// A buffer that programs read under a name and nobody changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Constant {
    /// The name in `Memory`.
    pub name: String,
    /// The contents.
    pub bytes: Vec<u8>,
}

/// Elements drawn by one thread at a time when weights are initialised.
const DRAWN_TOGETHER: usize = 1 << 16;

impl HostWeights {
    /// Zeros in the model's layout.
    pub fn zeros(model: &Model) -> HostWeights {
        HostWeights {
            trainable: vec![0.0; model.table.trainable_elements()],
            frozen: vec![0.0; model.table.frozen_elements()],
        }
    }

    /// The values of one tensor.
    pub fn tensor(&self, slice: &TensorSlice) -> &[f32] {
        let all = if slice.class == Class::Frozen { &self.frozen } else { &self.trainable };
        &all[slice.element_offset..slice.element_offset + slice.elements()]
    }

    /// The values of one tensor, to change them.
    pub fn tensor_mut(&mut self, slice: &TensorSlice) -> &mut [f32] {
        let all = if slice.class == Class::Frozen { &mut self.frozen } else { &mut self.trainable };
        &mut all[slice.element_offset..slice.element_offset + slice.elements()]
    }

    /// Puts the values where programs of this dtype read them.
    pub fn upload(
        &self,
        backend: &mut dyn Backend,
        memory: &mut Memory,
        dtype: DType,
    ) -> Result<(), ModelError> {
        let weights = compute_bytes(&self.trainable, dtype);
        put(backend, memory, "weights", &weights)?;
        if !self.frozen.is_empty() {
            put(backend, memory, "frozen", bytemuck::cast_slice(&self.frozen))?;
        }
        Ok(())
    }
}

impl Model {
    /// What programs read beside weights: rotary tables for `positions_max` positions, made for
    /// sequences of `tokens` (only dynamic scaling depends on it).
    pub fn constants(&self, positions_max: usize, tokens: usize) -> Vec<Constant> {
        let config = &self.config;
        let frequencies =
            config.rope.frequencies(config.rotary_width(), config.max_positions, tokens);
        let table = |of: fn(f32) -> f32| -> Vec<u8> {
            let angle = |position: usize, inverse: &f32| position as f32 * inverse;
            let rows = (0..positions_max).flat_map(|position| {
                frequencies.inverse.iter().map(move |inverse| angle(position, inverse))
            });
            let values = rows.map(|angle| of(angle) * frequencies.attention_factor);
            values.flat_map(f32::to_le_bytes).collect()
        };
        let [cos, sin] = rope_table_names(positions_max);
        vec![
            Constant { name: cos, bytes: table(f32::cos) },
            Constant { name: sin, bytes: table(f32::sin) },
        ]
    }

    /// Uploads [`Model::constants`].
    pub fn upload_constants(
        &self,
        backend: &mut dyn Backend,
        memory: &mut Memory,
        positions_max: usize,
        tokens: usize,
    ) -> Result<(), ModelError> {
        for constant in self.constants(positions_max, tokens) {
            put(backend, memory, &constant.name, &constant.bytes)?;
        }
        Ok(())
    }

    /// Fresh weights: normal with the configuration's deviation, what adds to the residual stream
    /// smaller by the root of how often it does; norms one, biases zero. An element depends only
    /// on the seed, its tensor's name on disk, its place in it and these deviations.
    pub fn initialise(&self, seed: u64) -> HostWeights {
        let mut weights = HostWeights::zeros(self);
        let deviation = self.config.initializer_range as f32;
        let residual = deviation / (2.0 * self.config.layer_count as f32).sqrt();
        for slice in self.table.tensors() {
            let name = slice.name.as_str();
            let values = weights.tensor_mut(&slice);
            match slice.class {
                Class::Frozen => {}
                Class::Vector if name.ends_with("norm.weight") => values.fill(1.0),
                Class::Vector => {}
                Class::Matrix | Class::Embedding => {
                    let adds = [".o_proj.weight", ".down_proj.weight"];
                    let adds = adds.iter().any(|end| name.ends_with(end));
                    let stream = Stream::new(seed, name_hash(name));
                    draw(values, stream, if adds { residual } else { deviation });
                }
            }
        }
        weights
    }

    /// Reads every tensor, each checked for its shape. Tensors the model does not have, such as
    /// those of multi-token-prediction layers, are left alone.
    pub fn load(&self, weights: &Weights) -> Result<HostWeights, ModelError> {
        let mut host = HostWeights::zeros(self);
        for slice in self.table.tensors() {
            let values = weights.read_f32(&slice.name, &slice.shape)?;
            host.tensor_mut(&slice).copy_from_slice(&values);
        }
        Ok(host)
    }
}

fn put(
    backend: &mut dyn Backend,
    memory: &mut Memory,
    name: &str,
    bytes: &[u8],
) -> Result<(), ModelError> {
    let buffer = memory.ensure(backend, name, bytes.len())?;
    Ok(backend.upload(buffer, 0, bytes).map_err(ProgramError::from)?)
}

/// The bytes of values as a device holds them in this float dtype.
pub fn compute_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => bytemuck::cast_slice(values).to_vec(),
        DType::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        other => panic!("programs compute in a float dtype, not {other}"),
    }
}

/// Fills with normal numbers; threads share the work, and no number depends on how.
fn draw(values: &mut [f32], stream: Stream, deviation: f32) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = values.len().div_ceil(threads).next_multiple_of(DRAWN_TOGETHER);
    std::thread::scope(|scope| {
        for (part, values) in values.chunks_mut(share).enumerate() {
            scope.spawn(move || {
                for (index, value) in values.iter_mut().enumerate() {
                    *value = stream.normal((part * share + index) as u64) * deviation;
                }
            });
        }
    });
}

/// FNV-1a, 64 bits: a fixed hash, so that fresh weights never change with a library.
fn name_hash(name: &str) -> u64 {
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    name.bytes().fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::preset;

    #[test]
    fn fresh_weights_have_the_spread_asked_for_and_depend_only_on_seed_and_name() {
        let model = Model::new(preset("qwen3-1m").unwrap()).unwrap();
        let (first, again) = (model.initialise(3), model.initialise(3));
        assert_eq!(first, again);
        assert_ne!(first, model.initialise(4));
        let deviation = |name: &str| {
            let slices = model.table.tensors();
            let slice = slices.iter().find(|slice| slice.name == name).unwrap();
            let values = first.tensor(slice);
            let sum: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
            (sum / values.len() as f64).sqrt()
        };
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.03, "{got} {want}");
        near(deviation("model.layers.1.self_attn.q_proj.weight"), 0.02);
        near(deviation("model.layers.1.mlp.down_proj.weight"), 0.02 / 8_f64.sqrt());
        assert_eq!(deviation("model.norm.weight"), 1.0);
    }

    #[test]
    fn the_name_hash_is_the_published_function() {
        // From the FNV authors' test vectors.
        assert_eq!(name_hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(name_hash("foobar"), 0x8594_4171_f739_67e8);
    }
}
