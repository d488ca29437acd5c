//! Quantised weights: the same bits in any company and on any number of threads, drawn tokens'
//! log-probabilities equal to the scorer's, and close to those of the weights they stand for.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::Path;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{
    Completion, ExtraLayer, Generator, GeneratorOptions, HostTensors, Model, ModelConfig,
    PromptLogprobs, SamplingSettings, TensorSource, WeightFormat, Weights, preset,
};
use pontoon_ops::DType;
use pontoon_program::Memory;

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
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(case);
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
