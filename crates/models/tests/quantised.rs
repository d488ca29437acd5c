//! Quantised weights: the same bits in any company and on any number of threads, drawn tokens'
//! log-probabilities equal to the scorer's, and close to those of the weights they stand for.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{
    Completion, ExtraLayer, Generator, GeneratorOptions, HostTensors, Model, ModelConfig,
    ModelError, PromptLogprobs, SamplingSettings, TensorRows, TensorSource, WeightFormat, Weights,
    preset,
};
use pontoon_ops::{Backend, DType};
use pontoon_program::{INTEGERS, Memory, SCALES, Storage};

/// Every kind of attention and feed-forward layer, with a tied and an own head and with biases;
/// widths from 28 to 128, so with whole groups and cut off ones.
const CASES: [&str; 5] = ["llama3", "llama_bias", "qwen3_moe", "deepseek_v3", "qwen3-1m"];

struct Device {
    backend: CpuBackend,
    generator: Generator,
    vocabulary: usize,
}

impl Device {
    fn open(case: &str, format: WeightFormat, threads: usize, together: usize) -> Device {
        let folder = golden(case);
        let (config, source): (ModelConfig, Box<dyn TensorSource>) = if folder.is_dir() {
            let weights = Weights::open(&folder).unwrap();
            (ModelConfig::from_folder(&folder).unwrap(), Box::new(weights))
        } else {
            let model = Model::new(preset(case).unwrap()).unwrap();
            let weights = model.initialise(3);
            (model.config.clone(), Box::new(HostTensors::new(model, weights)))
        };
        let model = Model::stored(config, format, ExtraLayer::Absent).unwrap();
        let options = CpuOptions { threads: Some(threads), ..CpuOptions::default() };
        let mut backend = CpuBackend::new(options).unwrap();
        let mut memory = Memory::new();
        model.upload(source.as_ref(), &mut backend, &mut memory, DType::Bf16).unwrap();
        let options = GeneratorOptions::new(DType::Bf16, 48, together);
        let generator = Generator::new(&mut backend, &mut memory, &model, options).unwrap();
        Device { backend, generator, vocabulary: model.config.vocab_size }
    }

    fn generate(&mut self) -> Vec<Completion> {
        let prompts = prompts(self.vocabulary);
        let settings = SamplingSettings {
            tokens_max: 12,
            seed: 7,
            prompt_logprobs: PromptLogprobs::Include,
            ..SamplingSettings::default()
        };
        self.generator.generate(&mut self.backend, &prompts, &settings, &[], &mut |_| ()).unwrap()
    }

    fn score(&mut self, tokens: &[u32]) -> Vec<f32> {
        self.generator.score(&mut self.backend, tokens).unwrap()
    }
}

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(case)
}

/// A model's tensors as a device holds them: what is stored as integers, times its scales.
struct Dequantised {
    tensors: HashMap<String, Vec<f32>>,
    rest: Weights,
}

impl Dequantised {
    fn read(model: &Model, backend: &mut CpuBackend, memory: &Memory, rest: Weights) -> Self {
        let mut bytes = |name: &str, at: usize, count: usize| {
            let mut bytes = vec![0; count];
            backend.download(memory.get(name).unwrap().0, at, &mut bytes).unwrap();
            bytes
        };
        let mut tensors = HashMap::new();
        for slice in model.table.tensors() {
            let Storage::Integers { dtype, group } = slice.storage else { continue };
            let width = slice.shape[1];
            let packed = bytes(INTEGERS, slice.element_offset, dtype.bytes(slice.elements()));
            let blocks = width.div_ceil(group);
            let scales = bytes(SCALES, 4 * slice.scale_offset, 4 * slice.shape[0] * blocks);
            let scales: Vec<f32> = scales
                .chunks_exact(4)
                .map(|four| f32::from_le_bytes(four.try_into().unwrap()))
                .collect();
            let value = |at: usize| {
                let integer = match dtype {
                    DType::I4 if at.is_multiple_of(2) => (packed[at / 2] << 4) as i8 >> 4,
                    DType::I4 => packed[at / 2] as i8 >> 4,
                    _ => packed[at] as i8,
                };
                f32::from(integer) * scales[at / width * blocks + at % width / group]
            };
            tensors.insert(slice.name.clone(), (0..slice.elements()).map(value).collect());
        }
        Dequantised { tensors, rest }
    }
}

impl TensorSource for Dequantised {
    fn rows(&self, rows: &TensorRows<'_>) -> Result<Cow<'_, [f32]>, ModelError> {
        let Some(values) = self.tensors.get(rows.name) else { return self.rest.rows(rows) };
        let width = rows.shape[1];
        Ok(Cow::Borrowed(&values[rows.first * width..][..rows.count * width]))
    }

    fn bf16_bytes(&self, _name: &str, _shape: &[usize]) -> Result<Option<&[u8]>, ModelError> {
        Ok(None)
    }
}

fn prompts(vocabulary: usize) -> Vec<Vec<u32>> {
    let token = |n: usize| ((n * n + 3 * n + 1) % vocabulary) as u32;
    [1, 5, 17, 23, 30].map(|length| (0..length).map(|n| token(n + length)).collect()).to_vec()
}

#[test]
fn quantised_tokens_depend_on_no_company_and_score_as_they_were_drawn() {
    for case in CASES {
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            let mut together = Device::open(case, format, 2, 5);
            let done = together.generate();
            assert_eq!(Device::open(case, format, 1, 1).generate(), done, "{case} {format:?}");
            for (prompt, completion) in prompts(together.vocabulary).iter().zip(&done) {
                let all = [prompt.as_slice(), &completion.tokens].concat();
                let mut drawn = completion.prompt_logprobs.clone().unwrap();
                drawn.extend(&completion.logprobs);
                assert_eq!(drawn, together.score(&all), "{case} {format:?}");
            }
        }
    }
}

#[test]
fn quantised_models_score_nearly_as_the_model_they_stand_for() {
    for case in CASES {
        let mut plain = Device::open(case, WeightFormat::Float, 2, 1);
        let text = prompts(plain.vocabulary).remove(4);
        let want = plain.score(&text);
        for (format, limit) in [(WeightFormat::Int8, 0.25), (WeightFormat::Int4, 2.5)] {
            let got = Device::open(case, format, 2, 1).score(&text);
            assert_ne!(got, want, "{case} {format:?} computes with other weights");
            let pairs = got.iter().zip(&want);
            let mean = pairs.map(|(a, b)| (a - b).abs()).sum::<f32>() / want.len() as f32;
            assert!(mean < limit, "{case} {format:?}: off by {mean} a token");
        }
    }
}

#[test]
fn mixtures_compute_as_the_float_engine_does_with_the_dequantised_weights() {
    for case in ["qwen3_moe", "deepseek_v3"] {
        let config = ModelConfig::from_folder(&golden(case)).unwrap();
        let float = Model::new(config.clone()).unwrap();
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            let stored = Model::stored(config.clone(), format, ExtraLayer::Absent).unwrap();
            let experts = |model: &Model, kind: fn(&Storage) -> bool| {
                let all = model.table.parameters().iter();
                let experts = all.filter(|one| one.spec.name.contains(".experts.{}."));
                experts.filter(|one| kind(&one.spec.storage)).count()
            };
            assert_eq!(experts(&stored, |storage| *storage == Storage::Float), 0, "{case}");
            assert!(experts(&float, |storage| *storage == Storage::Float) > 0, "{case}");
            let floats_left = stored.table.trainable_elements() as f64;
            assert!(floats_left < 0.5 * float.table.trainable_elements() as f64, "{case}");
            let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
            let options = GeneratorOptions::new(DType::F32, 48, 1);
            let mut memory = Memory::new();
            let weights = Weights::open(&golden(case)).unwrap();
            stored.upload(&weights, &mut backend, &mut memory, DType::F32).unwrap();
            let dequantised = Dequantised::read(&stored, &mut backend, &memory, weights);
            let mut generator =
                Generator::new(&mut backend, &mut memory, &stored, options).unwrap();
            let text = prompts(config.vocab_size).remove(4);
            let got = generator.score(&mut backend, &text).unwrap();
            let (mut backend, mut memory) =
                (CpuBackend::new(CpuOptions::default()).unwrap(), Memory::new());
            float.upload(&dequantised, &mut backend, &mut memory, DType::F32).unwrap();
            let mut generator = Generator::new(&mut backend, &mut memory, &float, options).unwrap();
            let want = generator.score(&mut backend, &text).unwrap();
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() < 2e-4, "{case} {format:?}: {got} for {want}");
            }
        }
    }
}
