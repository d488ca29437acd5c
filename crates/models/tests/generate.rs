//! Generation against scoring: the tokens drawn and their log-probabilities are those of one pass
//! over the whole sequence, bit for bit, whatever else is generated beside them.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::Path;
use std::time::Duration;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{
    BatchShape, Completion, Generator, GeneratorOptions, Model, ModelConfig, PromptLogprobs,
    SamplingSettings, Weights,
};
use pontoon_ops::DType;
use pontoon_program::{Executor, Memory};

const CASES: [&str; 4] = ["llama3", "qwen3", "qwen3_moe", "deepseek_v3"];

struct Device {
    backend: CpuBackend,
    memory: Memory,
    model: Model,
}

impl Device {
    fn open(case: &str, dtype: DType, threads: usize) -> Device {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(case);
        let model = Model::new(ModelConfig::from_folder(&folder).unwrap()).unwrap();
        let options = CpuOptions { threads: Some(threads), ..CpuOptions::default() };
        let mut backend = CpuBackend::new(options).unwrap();
        let mut memory = Memory::new();
        let weights = model.load(&Weights::open(&folder).unwrap()).unwrap();
        weights.upload(&mut backend, &mut memory, dtype).unwrap();
        Device { backend, memory, model }
    }

    fn generate(
        &mut self,
        options: GeneratorOptions,
        prompts: &[Vec<u32>],
        settings: &SamplingSettings,
    ) -> Vec<Completion> {
        let backend = &mut self.backend;
        let mut generator =
            Generator::new(backend, &mut self.memory, &self.model, options).unwrap();
        generator.generate(backend, prompts, settings, &[], &mut |_| ()).unwrap()
    }

    /// Log-probabilities of a sequence's tokens from the second on, in one pass without a cache.
    fn score(&mut self, tokens: &[u32], dtype: DType, positions_max: usize) -> Vec<f32> {
        let rows = tokens.len();
        let shape = BatchShape { rows, documents: rows + 1, positions_max };
        let program = self.model.scoring_program(shape, dtype).unwrap();
        let backend = &mut self.backend;
        self.model
            .upload_constants(backend, &mut self.memory, positions_max, positions_max)
            .unwrap();
        let executor = Executor::load(backend, &mut self.memory, &program).unwrap();
        let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
        let targets: Vec<i32> = ids[1..].iter().copied().chain([-100]).collect();
        let positions: Vec<i32> = (0..rows as i32).collect();
        let documents: Vec<i32> =
            (0..=rows).map(|at| if at == 0 { 0 } else { rows as i32 }).collect();
        for (name, values) in
            [("ids", ids), ("targets", targets), ("positions", positions), ("documents", documents)]
        {
            executor.write(backend, name, bytemuck::cast_slice(&values)).unwrap();
        }
        executor.run_and_wait(backend, Duration::from_secs(60)).unwrap();
        let mut loss = vec![0.0_f32; rows];
        executor.read(backend, "loss", bytemuck::cast_slice_mut(&mut loss)).unwrap();
        loss[..rows - 1].iter().map(|loss| -loss).collect()
    }
}

fn prompts(vocabulary: usize) -> Vec<Vec<u32>> {
    let token = |n: usize| ((n * n + 3 * n + 1) % vocabulary) as u32;
    [1, 5, 16, 17, 23].map(|length| (0..length).map(|n| token(n + length)).collect()).to_vec()
}

#[test]
fn log_probabilities_of_drawn_tokens_are_the_scorers_bit_for_bit() {
    for case in CASES {
        for dtype in [DType::F32, DType::Bf16] {
            let mut device = Device::open(case, dtype, 2);
            let prompts = prompts(device.model.config.vocab_size);
            let settings = SamplingSettings {
                tokens_max: 12,
                seed: 7,
                prompt_logprobs: PromptLogprobs::Include,
                ..SamplingSettings::default()
            };
            let options = GeneratorOptions::new(dtype, 40, 3);
            let done = device.generate(options, &prompts, &settings);
            for (prompt, completion) in prompts.iter().zip(&done) {
                let all = [prompt.as_slice(), &completion.tokens].concat();
                let scored = device.score(&all, dtype, 40);
                let mut drawn = completion.prompt_logprobs.clone().unwrap();
                drawn.extend(&completion.logprobs);
                let worst = drawn.iter().zip(&scored).map(|(a, b)| (a - b).abs());
                assert_eq!(drawn, scored, "{case} {dtype}: off by {:?}", worst.fold(0.0, f32::max));
            }
        }
    }
}

#[test]
fn tokens_do_not_depend_on_company_or_threads_but_on_the_seed() {
    for case in CASES {
        let options = |together| GeneratorOptions::new(DType::Bf16, 40, together);
        let settings =
            |seed| SamplingSettings { tokens_max: 12, seed, ..SamplingSettings::default() };
        let mut device = Device::open(case, DType::Bf16, 2);
        let prompts = prompts(device.model.config.vocab_size);
        let together = device.generate(options(5), &prompts, &settings(1));
        let mut alone = Device::open(case, DType::Bf16, 1);
        assert_eq!(alone.generate(options(1), &prompts, &settings(1)), together, "{case}");
        let mut other = Device::open(case, DType::Bf16, 2);
        assert_ne!(other.generate(options(5), &prompts, &settings(2)), together, "{case}");
    }
}

#[test]
fn greedy_tokens_are_the_likeliest_and_penalties_forbid_repetition() {
    let mut device = Device::open("qwen3", DType::F32, 2);
    let vocabulary = device.model.config.vocab_size;
    let prompts = vec![vec![1, 2, 3]];
    let options = GeneratorOptions::new(DType::F32, 64, 1);
    let greedy = device.generate(options, &prompts, &SamplingSettings::greedy(10));
    let mut tokens = prompts[0].clone();
    for &token in &greedy[0].tokens {
        let best = (0..vocabulary as u32)
            .map(|candidate| {
                let all = [tokens.as_slice(), &[candidate]].concat();
                (*device.score(&all, DType::F32, 64).last().unwrap(), candidate)
            })
            .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)))
            .unwrap();
        assert_eq!(best.1, token);
        tokens.push(token);
    }
    let mut device = Device::open("qwen3", DType::F32, 2);
    let never_twice = SamplingSettings { frequency_penalty: 1e6, ..SamplingSettings::greedy(20) };
    let mut drawn = device.generate(options, &prompts, &never_twice)[0].tokens.clone();
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!(drawn.len(), 20, "a token came twice");
}

#[test]
fn requests_that_cannot_be_met_are_one_clear_line() {
    let mut device = Device::open("qwen3", DType::F32, 1);
    let options = GeneratorOptions::new(DType::F32, 16, 1);
    let backend = &mut device.backend;
    let mut generator =
        Generator::new(backend, &mut device.memory, &device.model, options).unwrap();
    let mut refused = |prompt: Vec<u32>, settings: SamplingSettings| -> String {
        let result = generator.generate(backend, &[prompt], &settings, &[], &mut |_| ());
        result.unwrap_err().to_string()
    };
    let greedy = SamplingSettings::greedy(4);
    for (prompt, settings, want) in [
        (vec![], greedy, "prompt 0 is empty"),
        (vec![1; 16], greedy, "16"),
        (vec![1, 1_000_000], greedy, "1000000"),
        (vec![1], SamplingSettings { temperature: -1.0, ..greedy }, "temperature"),
        (vec![1], SamplingSettings { top_p: 0.0, ..greedy }, "top_p"),
    ] {
        let error = refused(prompt, settings);
        assert!(error.contains(want) && !error.contains('\n'), "{error}");
    }
}
