//! A model loaded on a device to generate and score, for the commands that do.
//!
//! Serves nobody over a network. Read next: `commands/generate.rs`, `commands/eval.rs`.

use anyhow::{Result, bail};
use pontoon_models::{Generator, GeneratorOptions, HostWeights, Model, TensorSource, WeightFormat};
use pontoon_ops::{Backend, DType};
use pontoon_program::Memory;

use crate::devices;

/// The model, its programs and its device.
pub struct Engine {
    /// The device.
    pub backend: Box<dyn Backend>,
    /// The programs.
    pub generator: Generator,
}

impl Engine {
    /// Puts weights on a device and loads the programs.
    pub fn load(
        device: &str,
        model: &Model,
        weights: &HostWeights,
        options: GeneratorOptions,
    ) -> Result<Engine> {
        let mut backend = devices::open(device)?;
        let mut memory = Memory::new();
        weights.upload(backend.as_mut(), &mut memory, options.dtype)?;
        Engine::on(backend, memory, model, options)
    }

    /// The same with weights that go to the device tensor by tensor, in the model's format.
    pub fn load_from(
        device: &str,
        model: &Model,
        source: &dyn TensorSource,
        options: GeneratorOptions,
    ) -> Result<Engine> {
        let mut backend = devices::open(device)?;
        let mut memory = Memory::new();
        model.upload(source, backend.as_mut(), &mut memory, options.dtype)?;
        Engine::on(backend, memory, model, options)
    }

    /// Loads the programs on a device that holds the weights.
    fn on(
        mut backend: Box<dyn Backend>,
        mut memory: Memory,
        model: &Model,
        options: GeneratorOptions,
    ) -> Result<Engine> {
        let generator = Generator::new(backend.as_mut(), &mut memory, model, options)?;
        generator.prepack(backend.as_mut())?;
        Ok(Engine { backend, generator })
    }
}

/// How weights are stored, by the name on the command line: integers, or what is computed in.
pub fn weight_format(name: Option<&str>, dtype: &str) -> Result<WeightFormat> {
    match name {
        None => Ok(WeightFormat::Float),
        Some(name) if name == dtype => Ok(WeightFormat::Float),
        Some("int8") => Ok(WeightFormat::Int8),
        Some("int4") => Ok(WeightFormat::Int4),
        Some(name) => bail!("--weights should be {dtype}, int8 or int4 but is `{name}`"),
    }
}

/// A dtype by its name on the command line.
pub fn dtype(name: &str) -> Result<DType> {
    match name {
        "bf16" => Ok(DType::Bf16),
        "f16" => Ok(DType::F16),
        "f32" => Ok(DType::F32),
        _ => bail!("--dtype should be bf16, f16 or f32 but is `{name}`"),
    }
}
