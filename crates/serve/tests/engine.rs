//! The engine and the pool: the same seed gives the same tokens whatever happens around them.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use std::time::{Duration, Instant};

use common::{Failure, Faults, Small, collect, generate, submit};
use pontoon_models::{
    Adapters, ExtraLayer, Generator, GeneratorOptions, Model, ModelConfig, SamplingSettings,
    WeightFormat, Weights,
};
use pontoon_ops::philox::Stream;
use pontoon_program::Memory;
use pontoon_serve::engine::device::DeviceOptions;
use pontoon_serve::engine::draft::Speculation;
use pontoon_serve::engine::request::{Constraint, Scored, Task};
use pontoon_serve::pool::agreement::Distance;
use pontoon_serve::pool::{Pool, PoolParts};

/// Prompts of all lengths, some with a common beginning, with settings of all kinds.
fn mixed(count: u64, vocabulary: usize) -> Vec<(Vec<u32>, SamplingSettings)> {
    let stream = Stream::new(3, 1);
    let one = |index: u64| {
        let length = 1 + stream.below(index, 90) as usize;
        let salt = if index.is_multiple_of(3) { 0 } else { index };
        let token = |at: u64| stream.below(1000 * (salt + 1) + at, vocabulary as u64) as u32;
        let prompt: Vec<u32> = (0..length as u64).map(token).collect();
        let penalised = index.is_multiple_of(4);
        let sampling = SamplingSettings {
            temperature: if index.is_multiple_of(5) { 0.0 } else { 1.0 },
            top_k: (index % 3) as usize * 20,
            frequency_penalty: if penalised { 0.5 } else { 0.0 },
            seed: index,
            tokens_max: 5 + stream.below(500 + index, 60) as usize,
            ..SamplingSettings::default()
        };
        (prompt, sampling)
    };
    (0..count).map(one).collect()
}

/// Each request alone, on the generator that `pontoon generate` uses.
fn alone(small: &Small, requests: &[(Vec<u32>, SamplingSettings)]) -> Vec<Vec<(u32, u32)>> {
    let mut backend = pontoon_cpu::CpuBackend::new(pontoon_cpu::CpuOptions::default()).unwrap();
    let mut memory = Memory::new();
    let DeviceOptions { dtype, context, vocabulary, .. } = small.options();
    small.weights.upload(&mut backend, &mut memory, dtype).unwrap();
    let options = GeneratorOptions {
        vocabulary: Some(vocabulary),
        ..GeneratorOptions::new(dtype, context, 1)
    };
    let made = Generator::new(&mut backend, &mut memory, &small.model, options);
    let mut generator = made.unwrap();
    let mut one = |(prompt, sampling): &(Vec<u32>, SamplingSettings)| {
        let prompts = std::slice::from_ref(prompt);
        let made = generator.generate(&mut backend, prompts, sampling, &[], &mut |_| {});
        let completion = made.unwrap().remove(0);
        let bits = completion.logprobs.iter().map(|logprob| logprob.to_bits());
        completion.tokens.into_iter().zip(bits).collect()
    };
    requests.iter().map(&mut one).collect()
}

fn bits(tokens: &[Scored]) -> Vec<(u32, u32)> {
    tokens.iter().map(|scored| (scored.token, scored.logprob.to_bits())).collect()
}

/// Runs all requests together and compares with each alone.
fn together(
    small: &Small,
    devices: &[&str],
    options: DeviceOptions,
    faults: &[(&str, i64, Failure)],
) {
    let requests = mixed(24, options.vocabulary);
    let want = alone(small, &requests);
    let set = Faults::none();
    let pool = small.pool(devices, options, &set);
    let wait_until = Instant::now() + Duration::from_secs(60);
    while pool.devices().iter().any(|state| state.phase != "serving") {
        assert!(Instant::now() < wait_until, "a device does not start");
        std::thread::yield_now();
    }
    faults.iter().for_each(|&(device, at, failure)| set.set(device, at, failure));
    let submitted: Vec<_> = requests
        .iter()
        .map(|(prompt, sampling)| submit(&pool, generate(prompt.clone(), *sampling)))
        .collect();
    for (index, (receiver, want)) in submitted.into_iter().zip(want).enumerate() {
        let (tokens, devices) = collect(receiver);
        assert_eq!(bits(&tokens), want, "request {index} on {devices:?}");
    }
    if !faults.is_empty() {
        assert!(pool.moved() > 0, "no request was moved");
    }
    // Every block is free again once the last step has been counted.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let states = pool.devices();
        let used = states
            .iter()
            .filter_map(|state| state.stats.as_ref())
            .map(|stats| stats.blocks_used.load(std::sync::atomic::Ordering::Relaxed));
        if used.sum::<u64>() == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "blocks are still in use");
        std::thread::yield_now();
    }
    pool.stop();
}

#[test]
fn a_request_gives_the_same_tokens_and_logprobs_in_a_batch_as_alone() {
    let small = Small::new();
    together(&small, &["a"], small.options(), &[]);
}

#[test]
fn guessed_tokens_change_no_bit_in_a_batch_or_where_blocks_are_few() {
    let small = Small::new();
    let options = DeviceOptions {
        speculation: Speculation::PromptLookup,
        draft_tokens: 5,
        ..small.options()
    };
    together(&small, &["a"], options, &[]);
    together(&small, &["a"], DeviceOptions { blocks: 16, ..options }, &[]);
}

#[test]
fn a_text_that_repeats_itself_is_guessed_right() {
    let small = Small::new();
    let options = DeviceOptions {
        speculation: Speculation::PromptLookup,
        draft_tokens: 4,
        ..small.options()
    };
    let pool = small.pool(&["a"], options, &Faults::none());
    let prompt: Vec<u32> = [5, 9, 13, 40, 7].repeat(8);
    // The text goes on as it began, whatever the model makes of it.
    let forced = |drawn: usize| [5_u32, 9, 13, 40, 7][drawn % 5];
    let made = move || Ok(Box::new(Forced { drawn: 0, forced }) as Box<dyn Constraint>);
    let mut request = generate(prompt, SamplingSettings { tokens_max: 40, ..Default::default() });
    let Task::Generate(task) = &mut request.task else { panic!("it generates") };
    task.constraint = Some(std::sync::Arc::new(made));
    let (tokens, _) = collect(submit(&pool, request));
    let drawn: Vec<u32> = tokens.iter().map(|scored| scored.token).collect();
    assert_eq!(drawn, (0..40).map(forced).collect::<Vec<_>>());
    let states = pool.devices();
    let stats = states[0].stats.as_ref().unwrap();
    let read =
        |count: &std::sync::atomic::AtomicU64| count.load(std::sync::atomic::Ordering::Relaxed);
    // The last step is counted after its tokens are sent.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while read(&stats.accepted_tokens) < 30 && std::time::Instant::now() < until {
        std::thread::yield_now();
    }
    assert!(read(&stats.accepted_tokens) >= 30, "{} kept", read(&stats.accepted_tokens));
    assert!(read(&stats.drafted_tokens) >= read(&stats.accepted_tokens));
    assert!(read(&stats.steps) < 20, "{} steps", read(&stats.steps));
    pool.stop();
}

/// Allows one token at each place.
struct Forced<F> {
    drawn: usize,
    forced: F,
}

impl<F: Fn(usize) -> u32 + Copy + Send + 'static> Constraint for Forced<F> {
    fn forbid(&mut self, bias: &mut [f32]) -> Result<(), String> {
        bias.fill(f32::NEG_INFINITY);
        bias[(self.forced)(self.drawn) as usize] = 0.0;
        Ok(())
    }
    fn accept(&mut self, _token: u32) -> Result<(), String> {
        self.drawn += 1;
        Ok(())
    }
    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Forced { ..*self })
    }
}

#[test]
fn sequences_that_give_way_for_lack_of_blocks_lose_nothing() {
    let small = Small::new();
    // Room for one sequence of full length, or a few short ones.
    let options = DeviceOptions { blocks: 16, ..small.options() };
    together(&small, &["a"], options, &[]);
}

#[test]
fn requests_of_a_device_that_fails_go_on_elsewhere_bit_for_bit() {
    let small = Small::new();
    together(&small, &["a", "b"], small.options(), &[("a", 12, Failure::Error)]);
    together(&small, &["a", "b"], small.options(), &[("b", 9, Failure::Panic)]);
}

#[test]
fn requests_survive_when_every_device_fails_again_and_again() {
    let small = Small::new();
    let faults = [
        ("a", 7, Failure::Error),
        ("b", 11, Failure::Error),
        ("a", 30, Failure::Panic),
        ("b", 25, Failure::Error),
    ];
    together(&small, &["a", "b"], small.options(), &faults);
}

#[test]
fn requests_of_a_device_that_hangs_go_on_elsewhere() {
    let small = Small::new();
    let options = DeviceOptions { step_deadline: Duration::from_millis(500), ..small.options() };
    together(&small, &["a", "b"], options, &[("a", 10, Failure::Hang)]);
}

#[test]
fn a_client_that_leaves_frees_its_place_and_blocks() {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let settings = SamplingSettings { tokens_max: 200, ..SamplingSettings::default() };
    for round in 0..40 {
        let prompt = vec![5, 6, 7 + round % 5];
        let mut receiver = submit(&pool, generate(prompt, settings));
        // Leaves at some point between the start and the tenth token.
        for _ in 0..round % 10 {
            receiver.blocking_recv().unwrap();
        }
    }
    let last = submit(&pool, generate(vec![1, 2], SamplingSettings::greedy(3)));
    assert_eq!(collect(last).0.len(), 3);
    let stats = pool.devices()[0].stats.clone().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while stats.blocks_used.load(std::sync::atomic::Ordering::Relaxed) > 0 {
        assert!(Instant::now() < deadline, "blocks are still in use");
        std::thread::yield_now();
    }
    pool.stop();
}

#[test]
fn a_second_request_with_the_same_beginning_finds_it_in_the_cache() {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let prompt: Vec<u32> = (0..100).map(|at| at % 50).collect();
    let (first, _) = collect(submit(&pool, generate(prompt.clone(), SamplingSettings::greedy(8))));
    let stats = pool.devices()[0].stats.clone().unwrap();
    let found = || stats.prefix_tokens_found.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(found(), 0);
    let (second, _) = collect(submit(&pool, generate(prompt, SamplingSettings::greedy(8))));
    assert_eq!(found(), 96);
    assert_eq!(bits(&first), bits(&second));
    pool.stop();
}

#[test]
fn a_prompt_is_scored_with_its_likeliest_tokens() {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let mut request = generate((0..70).collect(), SamplingSettings::greedy(1));
    if let Task::Generate(generate) = &mut request.task {
        generate.prompt_logprobs = Some(2);
    }
    let mut receiver = submit(&pool, request);
    let scores = loop {
        let (_, event) = receiver.blocking_recv().unwrap();
        if let pontoon_serve::engine::request::Event::Prompt(scores) = event {
            break scores;
        }
    };
    assert_eq!(scores.len(), 69);
    for (at, scored) in scores.iter().enumerate() {
        assert_eq!(scored.token as usize, at + 1);
        assert_eq!(scored.top.len(), 2);
        assert!(scored.top[0].1 >= scored.top[1].1 && scored.top[0].1 >= scored.logprob);
    }
    pool.stop();
}

#[test]
fn guesses_of_the_extra_layer_change_no_bit_at_any_temperature() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden/data/deepseek_v3_plain_mtp");
    let run = |speculation: Speculation, extra: ExtraLayer| {
        let config = ModelConfig::from_folder(&folder).unwrap();
        let model = Model::stored(config, WeightFormat::Float, extra).unwrap();
        let pool = Pool::start(PoolParts {
            devices: vec!["a".to_owned()],
            open: std::sync::Arc::new(|_: &str| {
                let options = pontoon_cpu::CpuOptions::default();
                let opened = pontoon_cpu::CpuBackend::new(options);
                opened.map(|one| Box::new(one) as _).map_err(|error| error.to_string())
            }),
            options: DeviceOptions {
                dtype: pontoon_ops::DType::Bf16,
                context: 64,
                sequences: 4,
                blocks: 24,
                vocabulary: model.config.vocab_size,
                step_deadline: Duration::from_secs(60),
                speculation,
                draft_tokens: 3,
            },
            model: std::sync::Arc::new(model),
            weights: std::sync::Arc::new(Weights::open(&folder).unwrap()),
            adapters: None,
            rejoin_after: Duration::from_millis(20),
            limits: std::sync::Arc::new(|_| Distance { worst: 1.0, typical: 1.0, divergence: 1.0 }),
            audit_share: 0.0,
            on_event: None,
        })
        .unwrap();
        let submitted: Vec<_> = (0..9_u32)
            .map(|index| {
                let prompt = (0..1 + index * 3).map(|at| (at * 7 + index) % 97).collect();
                let sampling = SamplingSettings {
                    temperature: [0.0, 0.3, 1.0][index as usize % 3],
                    top_k: 5,
                    frequency_penalty: if index == 4 { 0.5 } else { 0.0 },
                    seed: u64::from(index),
                    tokens_max: 30,
                    ..SamplingSettings::default()
                };
                submit(&pool, generate(prompt, sampling))
            })
            .collect();
        let told: Vec<_> = submitted.into_iter().map(|one| bits(&collect(one).0)).collect();
        let states = pool.devices();
        let stats = states[0].stats.as_ref().unwrap();
        let drafted = stats.drafted_tokens.load(std::sync::atomic::Ordering::Relaxed);
        pool.stop();
        (told, drafted)
    };
    let (want, none) = run(Speculation::Off, ExtraLayer::Absent);
    let (got, drafted) = run(Speculation::Mtp, ExtraLayer::Present);
    assert_eq!(got, want);
    assert!(none == 0 && drafted > 100, "{drafted} guessed");
}

#[test]
fn requests_of_several_adapters_share_a_batch_and_no_prefix() {
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data");
    let config = ModelConfig::from_folder(&data.join("qwen3")).unwrap();
    let folders = ["plain", "rooted"].map(|name| (name.to_owned(), data.join("lora").join(name)));
    let adapters = std::sync::Arc::new(Adapters::open(&config, &folders).unwrap());
    let model = Model::new(config).unwrap().with_adapters(adapters.shapes().clone());
    let start = || {
        Pool::start(PoolParts {
            devices: vec!["a".to_owned()],
            open: std::sync::Arc::new(|_: &str| {
                let options = pontoon_cpu::CpuOptions::default();
                let opened = pontoon_cpu::CpuBackend::new(options);
                opened.map(|one| Box::new(one) as _).map_err(|error| error.to_string())
            }),
            options: DeviceOptions {
                dtype: pontoon_ops::DType::Bf16,
                context: 64,
                sequences: 6,
                blocks: 30,
                vocabulary: model.config.vocab_size,
                step_deadline: Duration::from_secs(60),
                speculation: Speculation::PromptLookup,
                draft_tokens: 2,
            },
            model: std::sync::Arc::new(model.clone()),
            weights: std::sync::Arc::new(Weights::open(&data.join("qwen3")).unwrap()),
            adapters: Some(std::sync::Arc::clone(&adapters)),
            rejoin_after: Duration::from_millis(20),
            limits: std::sync::Arc::new(|_| Distance { worst: 1.0, typical: 1.0, divergence: 1.0 }),
            audit_share: 0.0,
            on_event: None,
        })
        .unwrap()
    };
    let request = |index: usize| {
        // One beginning of more than a block, so that a prefix would be found.
        let prompt = (0..20_u32).map(|at| (at * 5 + 1) % 97).collect();
        let sampling = SamplingSettings { seed: 4, tokens_max: 20, ..Default::default() };
        let mut request = generate(prompt, sampling);
        request.adapter = [None, Some(1), Some(0)][index % 3];
        request
    };
    let pool = start();
    assert_eq!(pool.adapter_names(), ["plain", "rooted"]);
    let submitted: Vec<_> = (0..6).map(|index| submit(&pool, request(index))).collect();
    let together: Vec<_> = submitted.into_iter().map(|one| bits(&collect(one).0)).collect();
    pool.stop();
    for index in 0..3 {
        let pool = start();
        let alone = bits(&collect(submit(&pool, request(index))).0);
        pool.stop();
        assert_eq!(alone, together[index], "request {index}");
        assert_eq!(alone, together[index + 3], "request {}", index + 3);
        assert_ne!(alone, together[(index + 1) % 3], "adapters differ");
    }
}
