//! `pontoon bench`: how fast this machine trains and decodes, against its own measured limits.
//!
//! Weights and tokens are random: speed does not depend on them. Read next: `benches/`, which
//! runs others on the same shapes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use pontoon_fleet::world::SystemClock;
use pontoon_models::{
    ExtraLayer, GeneratorOptions, HostTensors, Model, SamplingSettings, TensorSource, WeightFormat,
    preset,
};
use pontoon_ops::philox::Stream;
use pontoon_ops::{Backend, DType, OpName};
use pontoon_train::data::{Batch, WholeDocuments};
use pontoon_train::{Checking, RunConfig, TrainingState};
use serde_json::json;

use super::show;
use crate::devices;
use crate::engine::{Engine, dtype, weight_format};
use crate::model_source::ModelSource;

/// What is measured.
#[derive(Subcommand)]
pub enum Command {
    /// Whole training steps with AdamW.
    #[command(after_help = "Example:\n  pontoon bench train --preset llama-30m --dtype bf16 \
                            --batch 8 --sequence 256 --steps 10 --json")]
    Train(TrainArguments),
    /// One stream, token by token.
    #[command(after_help = "Example:\n  pontoon bench decode qwen3-0.6b --dtype bf16 --json")]
    Decode(DecodeArguments),
}

/// The arguments of `pontoon bench train`.
#[derive(Args)]
pub struct TrainArguments {
    /// The model, by its preset.
    #[arg(long, default_value = "llama-30m")]
    preset: String,
    /// bf16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Sequences of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256)]
    sequence: usize,
    /// Steps; the first is not counted.
    #[arg(long, default_value_t = 10)]
    steps: u64,
    /// What is computed again in backward: nothing, cheap or layer.
    #[arg(long, default_value = "cheap")]
    recompute: String,
    /// The device, as in `pontoon devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Check products and memory as a run does: on, off, or both in turns to compare.
    #[arg(long, value_enum, default_value_t = ChecksArgument::Off)]
    checks: ChecksArgument,
    /// Also print where a step's time goes, by operation.
    #[arg(long)]
    profile: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Which steps are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ChecksArgument {
    /// None.
    Off,
    /// All.
    On,
    /// Every other one; speeds are those of the others.
    Both,
}

/// The arguments of `pontoon bench decode`.
#[derive(Args)]
pub struct DecodeArguments {
    /// A preset, which gets random weights, or a model's folder.
    model: String,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// How weights are stored: as --dtype says, int8 or int4 (integers with a scale per group).
    #[arg(long)]
    weights: Option<String>,
    /// Tokens to decode.
    #[arg(short = 'n', long, default_value_t = 64)]
    tokens: usize,
    /// The device, as in `pontoon devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Rounds of decoding, with memory bandwidth measured before and after each: on a shared machine
/// it drifts by half within seconds, so only neighbours in time compare. The greater neighbour
/// counts, so that a slow moment does not flatter, and the median round is reported.
const DECODE_ROUNDS: usize = 5;

/// Runs a benchmark.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Train(arguments) => train(arguments),
        Command::Decode(arguments) => decode(arguments),
    }
}

/// Times and losses of steps, and times with checks over times without.
struct Timed {
    times: Vec<f64>,
    loss: Vec<f64>,
    ratios: Vec<f64>,
}

fn timed_steps(
    arguments: &TrainArguments,
    state: &mut TrainingState,
    backend: &mut dyn Backend,
    batch: &Batch,
) -> Result<Timed> {
    let (mut loss, mut times, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let checked = [Checking::Off, Checking::On];
    for step in 1..=arguments.steps {
        let mut timed = |checking: Checking| -> Result<(f64, f64)> {
            state.check(backend, checking);
            let started = Instant::now();
            let result = state.step(backend, step, std::slice::from_ref(batch))?;
            Ok((started.elapsed().as_secs_f64(), result.loss))
        };
        let (seconds, of_step) = match arguments.checks {
            ChecksArgument::Off => timed(Checking::Off)?,
            ChecksArgument::On => timed(Checking::On)?,
            ChecksArgument::Both => {
                // Neither kind always goes first.
                let first = (step % 2) as usize;
                let times = [timed(checked[first])?, timed(checked[1 - first])?];
                let (plain, with_checks) = (times[first], times[1 - first]);
                ratios.push(with_checks.0 / plain.0);
                plain
            }
        };
        times.push(seconds);
        loss.push(of_step);
    }
    Ok(Timed { times, loss, ratios })
}

fn train(arguments: &TrainArguments) -> Result<()> {
    ensure!(arguments.steps >= 2, "--steps should be at least 2, as the first is not counted");
    let settings = format!(
        "[data]\nsequence = {}\n[train]\nmicro_batch = {}\ndtype = \"{}\"\nrecompute = \"{}\"\n\
         warmup = 0\nschedule = \"constant\"\n",
        arguments.sequence, arguments.batch, arguments.dtype, arguments.recompute
    );
    let config = RunConfig::parse(&settings, &[], "the benchmark's settings")?;
    let compute = config.train.dtype.dtype();
    let peak = devices::peak_flops(&arguments.device, compute)?;
    let model = Model::new(preset(&arguments.preset)?)?;
    let mut backend = devices::open(&arguments.device)?;
    let weights = model.initialise(config.train.seed);
    let mut state = TrainingState::load(backend.as_mut(), &model, &config, &weights)?;
    drop(weights);
    let batch = random_batch(arguments, model.config.vocab_size);
    let Timed { times, loss, ratios } =
        timed_steps(arguments, &mut state, backend.as_mut(), &batch)?;
    let checks_overhead = (ratios.len() > 1).then(|| median(&ratios[1..]) - 1.0);
    let median = median(&times[1..]);
    let tokens_per_s = batch.ids.len() as f64 / median;
    let fraction = state.model_flops() / median / peak;
    let rss = peak_rss_bytes()?;
    if arguments.profile {
        print_profile(&state.profile(backend.as_mut(), &SystemClock, &batch)?);
    }
    if arguments.json {
        let step_ms: Vec<f64> = times.iter().map(|seconds| seconds * 1e3).collect();
        let result = json!({
            "tokens_per_s": tokens_per_s,
            "step_ms": step_ms,
            "peak_rss_bytes": rss,
            "loss": loss,
            "gemm_peak_fraction": fraction,
            "gemm_peak_flops": peak,
            "arena_bytes": state.arena_bytes(),
            "checks_overhead": checks_overhead,
        });
        println!("{result}");
        return Ok(());
    }
    println!(
        "{} {}: {} tokens/s, step {:.0} ms, {:.0}% of {}FLOP/s, peak memory {}",
        arguments.preset,
        arguments.dtype,
        show::count(tokens_per_s),
        1e3 * median,
        100.0 * fraction,
        show::count(peak),
        show::bytes(rss as f64),
    );
    Ok(())
}

/// Prints time and number of operations by their names, the costliest first, on stderr.
fn print_profile(times: &[(OpName, Duration)]) {
    let mut sums: BTreeMap<String, (f64, usize)> = BTreeMap::new();
    for (name, time) in times {
        let sum = sums.entry(format!("{name:?}")).or_default();
        *sum = (sum.0 + time.as_secs_f64(), sum.1 + 1);
    }
    let total: f64 = sums.values().map(|(seconds, _)| seconds).sum();
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by(|a, b| b.1.0.total_cmp(&a.1.0));
    for (name, (seconds, count)) in sums {
        let (ms, share) = (1e3 * seconds, 100.0 * seconds / total);
        eprintln!("{name:18} {ms:9.2} ms {share:5.1}%  {count} times");
    }
}

/// One document a sequence, of random tokens.
fn random_batch(arguments: &TrainArguments, vocabulary: usize) -> Batch {
    let stream = Stream::new(1, 1);
    let documents = WholeDocuments { count: arguments.batch, tokens: arguments.sequence };
    Batch::of(documents, |row| stream.below(row as u64, vocabulary as u64) as i32)
}

fn decode(arguments: &DecodeArguments) -> Result<()> {
    let compute = dtype(&arguments.dtype)?;
    let format = weight_format(arguments.weights.as_deref(), &arguments.dtype)?;
    let (model, source) = model_of(&arguments.model, format)?;
    let bytes = bytes_per_token(&model, compute);
    let prompt = vec![1_u32; 16];
    let options = GeneratorOptions::new(compute, prompt.len() + arguments.tokens + 1, 1);
    let mut engine = Engine::load_from(&arguments.device, &model, source.as_ref(), options)?;
    drop(source);
    let settings = SamplingSettings::greedy(arguments.tokens);
    let mut before = devices::bandwidth(&arguments.device)?;
    let (mut token_s, mut bandwidths, mut fractions) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..DECODE_ROUNDS {
        let mut times = Vec::new();
        let mut last = Instant::now();
        let prompts = std::slice::from_ref(&prompt);
        engine.generator.generate(engine.backend.as_mut(), prompts, &settings, &[], &mut |_| {
            times.push(last.elapsed().as_secs_f64());
            last = Instant::now();
        })?;
        ensure!(times.len() >= 2, "-n should be at least 2, as the first token is not counted");
        let after = devices::bandwidth(&arguments.device)?;
        let bandwidth = before.max(after);
        let round = median(&times[1..]);
        token_s.push(round);
        bandwidths.push(bandwidth);
        fractions.push(bytes as f64 / round / bandwidth);
        before = after;
    }
    let (median, bandwidth, fraction) = (median(&token_s), median(&bandwidths), median(&fractions));
    if arguments.json {
        let result = json!({
            "tokens_per_s": 1.0 / median,
            "bytes_per_token": bytes,
            "memory_bandwidth_fraction": fraction,
            "memory_bandwidth": bandwidth,
            "round_fractions": fractions,
        });
        println!("{result}");
        return Ok(());
    }
    println!(
        "{} {}: {:.1} tokens/s, {} a token, {:.0}% of {}B/s",
        arguments.model,
        arguments.weights.as_ref().unwrap_or(&arguments.dtype),
        1.0 / median,
        show::bytes(bytes as f64),
        100.0 * fraction,
        show::count(bandwidth),
    );
    Ok(())
}

fn model_of(name: &str, format: WeightFormat) -> Result<(Model, Box<dyn TensorSource>)> {
    if Path::new(name).is_dir() {
        let source = ModelSource::open(&PathBuf::from(name))?;
        return Ok((source.stored(format)?, Box::new(source.tensors()?)));
    }
    let config = preset(name)?;
    let float = Model::new(config.clone())?;
    let weights = float.initialise(1);
    Ok((
        Model::stored(config, format, ExtraLayer::Absent)?,
        Box::new(HostTensors::new(float, weights)),
    ))
}

/// Weights a token must read: all but an embedding that is no head, and of the experts only those
/// a token goes to; of integers also their scales.
fn bytes_per_token(model: &Model, compute: DType) -> usize {
    let tied = model.table.get("lm_head.weight").is_err();
    let parameters = model.table.parameters().iter();
    let bytes = parameters.map(|parameter| match parameter.spec.name.as_str() {
        "model.embed_tokens.weight" if !tied => 0,
        name => {
            let all = parameter.quantised_bytes();
            let all = all.unwrap_or_else(|| compute.bytes(parameter.elements()));
            match name.contains(".experts.{}.") {
                true => all / parameter.spec.shape[0] * model.config.experts_per_token(),
                false => all,
            }
        }
    });
    bytes.sum()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The most memory this process has held, as the system counts it.
fn peak_rss_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read memory use")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.map(|count| count * 1024).context("the system does not say how much memory was used")
}
