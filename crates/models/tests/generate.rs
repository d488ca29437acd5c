//! Generation against scoring: the tokens drawn and their log-probabilities are those of one pass
//! over the whole sequence, bit for bit, whatever else is generated beside them.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::Path;
use std::time::Duration;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{
    BatchShape, Completion, Generator, GeneratorOptions, HostWeights, Model, ModelConfig,
    PromptLogprobs, SamplingSettings, Weights, preset,
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
        let weights = model.load(&Weights::open(&folder).unwrap()).unwrap();
        Device::load(model, &weights, dtype, threads)
    }

    /// Fresh weights of a preset.
    fn preset(name: &str, dtype: DType) -> Device {
        let model = Model::new(preset(name).unwrap()).unwrap();
        let weights = model.initialise(5);
        Device::load(model, &weights, dtype, 2)
    }

    fn load(model: Model, weights: &HostWeights, dtype: DType, threads: usize) -> Device {
        let options = CpuOptions { threads: Some(threads), ..CpuOptions::default() };
        let mut backend = CpuBackend::new(options).unwrap();
        let mut memory = Memory::new();
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
fn a_drawn_completion_is_the_same_at_any_place_in_the_list_and_repeats_differ() {
    let mut device = Device::open("qwen3", DType::F32, 2);
    let prompts = prompts(device.model.config.vocab_size);
    let settings = SamplingSettings { tokens_max: 12, seed: 5, ..SamplingSettings::default() };
    let options = GeneratorOptions::new(DType::F32, 40, 3);
    let alone: Vec<_> = prompts
        .iter()
        .map(|prompt| device.generate(options, std::slice::from_ref(prompt), &settings).remove(0))
        .collect();
    let mut backwards = prompts.clone();
    backwards.reverse();
    let mut listed = device.generate(options, &backwards, &settings);
    listed.reverse();
    assert_eq!(listed, alone);
    let twice = [prompts[1].clone(), prompts[0].clone(), prompts[1].clone()];
    let drawn = device.generate(options, &twice, &settings);
    assert_eq!(drawn[0], alone[1]);
    assert_eq!(drawn[1], alone[0]);
    assert_ne!(drawn[2].tokens, drawn[0].tokens, "a repeated prompt is drawn anew");
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
fn a_prompt_of_several_prefill_chunks_is_scored_and_continued_with_the_scorers_bits() {
    // Longer than the largest prefill program, whose rows are 512: chunks of 512, 512 and 16.
    let (length, tokens_max) = (1035, 1056);
    for dtype in [DType::F32, DType::Bf16] {
        let mut device = Device::preset("qwen3-1m", dtype);
        let prompt: Vec<u32> = (0..length).map(|n| (n * n + 3 * n + 1) % 1024).collect();
        let settings = SamplingSettings {
            tokens_max: 4,
            prompt_logprobs: PromptLogprobs::Include,
            ..SamplingSettings::default()
        };
        let options = GeneratorOptions::new(dtype, tokens_max, 1);
        let done = device.generate(options, std::slice::from_ref(&prompt), &settings);
        let all = [prompt.as_slice(), &done[0].tokens].concat();
        let mut drawn = done[0].prompt_logprobs.clone().unwrap();
        drawn.extend(&done[0].logprobs);
        assert_eq!(drawn, device.score(&all, dtype, tokens_max), "{dtype}");
        // Without scores the prompt goes through other programs, into the same cache.
        let unscored = SamplingSettings { prompt_logprobs: PromptLogprobs::Skip, ..settings };
        let again = device.generate(options, &[prompt], &unscored);
        assert_eq!(again[0].tokens, done[0].tokens, "{dtype}");
        assert_eq!(again[0].logprobs, done[0].logprobs, "{dtype}");
    }
}

#[test]
fn keeping_one_token_by_rank_is_greedy_at_any_temperature() {
    for case in CASES {
        let mut device = Device::open(case, DType::F32, 2);
        let prompts = prompts(device.model.config.vocab_size);
        let options = GeneratorOptions::new(DType::F32, 40, 2);
        let greedy = device.generate(options, &prompts, &SamplingSettings::greedy(12));
        let one = SamplingSettings { temperature: 3.0, top_k: 1, ..SamplingSettings::greedy(12) };
        assert_eq!(device.generate(options, &prompts, &one), greedy, "{case}");
    }
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
