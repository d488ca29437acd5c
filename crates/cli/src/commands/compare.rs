//! `pontoon compare`: do these devices agree on this model? A certificate with numbers.
//!
//! Where they do not, `bisect.rs` says at which operation. The limits are explained in
//! `docs/compare.md`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pontoon_models::{GeneratorOptions, HostWeights, Model, SamplingSettings};
use pontoon_ops::{Backend, DType};
use pontoon_program::{Class, GRADIENTS};
use pontoon_qualify::compare::{Certificate, Comparison, Measured, Tensor, certify};
use pontoon_qualify::exact::{evaluate, feasible};
use pontoon_train::data::Batch;
use pontoon_train::{RunConfig, TrainingState};
use serde_json::json;

use super::show;
use crate::devices;
use crate::engine::{Engine, dtype};
use crate::model_source::ModelSource;
use crate::steps::{Packed, Steps, model_of, random_documents, sizes};

/// Prompts made up where none are given, and their tokens.
const RANDOM_PROMPTS: [usize; 2] = [3, 12];
/// Logits held at once for each device: 128 million are a gibibyte in f64.
const LOGITS_MAX: usize = 1 << 27;
/// Trained elements up to which gradients and training steps are compared.
const TRAINED_MAX: usize = 1 << 28;
/// Sequences and tokens of a training step.
const DRIFT_BATCH: [usize; 2] = [4, 32];

/// The arguments of `pontoon compare`.
#[derive(Args, Clone)]
pub struct Arguments {
    /// A preset, which gets random weights, or a model, snapshot or run folder.
    model: String,
    /// Two devices or more.
    #[arg(long, value_delimiter = ',', required = true)]
    devices: Vec<String>,
    /// A text file with a prompt on each line; random tokens if absent.
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Tokens generated from each prompt.
    #[arg(short = 'n', long, default_value_t = 16)]
    tokens: usize,
    /// Training steps over which losses are compared.
    #[arg(long, default_value_t = 8)]
    steps: u64,
    /// Decides a preset's weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also write the JSON object to this file.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Compares. Exit code 1 if the devices disagree.
pub fn run(arguments: &Arguments) -> Result<()> {
    let devices = devices::listed(&arguments.devices);
    let arguments = &Arguments { devices, ..arguments.clone() };
    let names = &arguments.devices;
    ensure!(names.len() >= 2, "--devices takes two or more, such as cpu,cpu:threads=1");
    ensure!(arguments.tokens > 0, "--tokens should be at least 1");
    let compute = dtype(&arguments.dtype)?;
    let mut opened = Vec::new();
    for name in names {
        opened.push(devices::open(name)?);
    }
    let (model, weights) = model_of(&arguments.model, arguments.seed)?;
    let steps = Steps { model: &model, weights: &weights, dtype: compute };
    let prompts = prompts(arguments, &model)?;
    eprintln!("{}: generating from {} prompts", names[0], prompts.len());
    let texts = continued(arguments, &steps, &prompts)?;
    let work = Work::new(arguments, &steps, &texts)?;
    let mut measured = Vec::new();
    for (name, backend) in names.iter().zip(&mut opened) {
        eprintln!("{name}: logits, gradients and {} training steps", work.drift_steps);
        measured.push(work.measure(name, backend.as_mut())?);
    }
    let exact = work.exact()?;
    let generated = generated(&prompts, &texts);
    let certificate = certify(&Comparison {
        sizes: sizes(&model, compute, work.drift_steps as usize),
        vocabulary: model.config.vocab_size,
        generated: &generated,
        tensors: &work.tensors,
        exact: exact.as_ref(),
        devices: &measured,
    });
    report(arguments, &certificate)
}

/// The prompts' tokens.
fn prompts(arguments: &Arguments, model: &Model) -> Result<Vec<Vec<u32>>> {
    let Some(path) = &arguments.prompts else {
        let [count, length] = RANDOM_PROMPTS;
        return Ok(random_documents(count, length, model.config.vocab_size));
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    let folder = PathBuf::from(&arguments.model);
    ensure!(
        folder.is_dir(),
        "--prompts needs a tokenizer, and the preset `{}` has none; give a model's folder",
        arguments.model
    );
    let tokenizer = ModelSource::open(&folder)?.tokenizer()?;
    let mut prompts = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        prompts.push(tokenizer.encode_as_document(line)?);
    }
    prompts.retain(|prompt| !prompt.is_empty());
    ensure!(!prompts.is_empty(), "`{}` holds no prompt", path.display());
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + arguments.tokens;
    let most = model.config.max_positions;
    ensure!(longest <= most, "a prompt and its tokens make {longest}, the model allows {most}");
    Ok(prompts)
}

/// Each prompt with what the first device makes of it, greedily; those that there is room for.
fn continued(
    arguments: &Arguments,
    steps: &Steps<'_>,
    prompts: &[Vec<u32>],
) -> Result<Vec<Vec<u32>>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1) + arguments.tokens;
    let options = GeneratorOptions::new(steps.dtype, longest, prompts.len().min(8));
    let mut engine = Engine::load(&arguments.devices[0], steps.model, steps.weights, options)?;
    let settings = SamplingSettings::greedy(arguments.tokens);
    let completions =
        engine.generator.generate(engine.backend.as_mut(), prompts, &settings, &[], &mut |_| {})?;
    let most = LOGITS_MAX / steps.model.config.vocab_size;
    let (mut texts, mut rows) = (Vec::new(), 0);
    for (prompt, completion) in prompts.iter().zip(&completions) {
        let text = [prompt.as_slice(), &completion.tokens].concat();
        rows += text.len();
        if rows > most && !texts.is_empty() {
            let (kept, all) = (texts.len(), prompts.len());
            eprintln!("only the first {kept} of {all} prompts are compared: logits take memory");
            break;
        }
        texts.push(text);
    }
    Ok(texts)
}

/// The rows whose logits drew the generated tokens.
fn generated(prompts: &[Vec<u32>], texts: &[Vec<u32>]) -> Vec<usize> {
    let mut rows = Vec::new();
    let mut first = 0;
    for (prompt, text) in prompts.iter().zip(texts) {
        rows.extend(first + prompt.len() - 1..first + text.len() - 1);
        first += text.len();
    }
    rows
}

/// What every device does.
struct Work<'a> {
    steps: &'a Steps<'a>,
    batch: Packed,
    tensors: Vec<Tensor>,
    /// Training steps; 0 where the model is too large or the dtype is not trained in.
    drift_steps: u64,
    texts: &'a [Vec<u32>],
}

impl<'a> Work<'a> {
    fn new(arguments: &Arguments, steps: &'a Steps<'a>, texts: &'a [Vec<u32>]) -> Result<Work<'a>> {
        let trained = steps.model.table.trainable_elements();
        let small = trained <= TRAINED_MAX;
        if !small {
            eprintln!("gradients and training are not compared: the model is too large for it");
        }
        let slices = steps.model.table.tensors().into_iter();
        let tensors = slices.filter(|slice| small && slice.class != Class::Frozen).map(|slice| {
            let range = slice.element_offset..slice.element_offset + slice.elements();
            Tensor { name: slice.name, range }
        });
        let trains = small && steps.dtype != DType::F16;
        Ok(Work {
            steps,
            batch: Packed::new(texts),
            tensors: tensors.collect(),
            drift_steps: if trains { arguments.steps } else { 0 },
            texts,
        })
    }

    fn measure(&self, name: &str, backend: &mut dyn Backend) -> Result<Measured> {
        let step = self.steps.logits(&self.batch)?;
        let read = step.run(backend, &["logits"])?;
        let logits = wide(&read["logits"]);
        let mut gradient = Vec::new();
        if !self.tensors.is_empty() {
            let step = self.steps.training(&self.batch)?;
            gradient = wide(&step.run(backend, &["gradients"])?["gradients"]);
        }
        let losses = self.losses(backend)?;
        Ok(Measured { device: name.to_owned(), logits, gradient, losses })
    }

    /// The losses of some training steps from the model's weights.
    fn losses(&self, backend: &mut dyn Backend) -> Result<Vec<f64>> {
        let mut losses = Vec::new();
        if self.drift_steps == 0 {
            return Ok(losses);
        }
        let [count, tokens] = DRIFT_BATCH;
        let model = self.steps.model;
        let sequence = tokens.min(model.config.max_positions);
        let settings = format!(
            "[data]\nsequence = {sequence}\n[train]\nmicro_batch = {count}\nmicro_batches = 1\n\
             dtype = \"{}\"\nlr = 1e-3\nwarmup = 0\nschedule = \"constant\"\nbalance = 0\n",
            self.steps.dtype
        );
        let config = RunConfig::parse(&settings, &[], "the comparison's settings")?;
        let mut state = TrainingState::load(backend, model, &config, self.steps.weights)?;
        for step in 1..=self.drift_steps {
            let batch = self.drift_batch(sequence, step as usize);
            losses.push(state.step(backend, step, &[batch])?.loss);
        }
        Ok(losses)
    }

    /// A batch of the texts' tokens, each step from another place.
    fn drift_batch(&self, sequence: usize, step: usize) -> Batch {
        let all: Vec<i32> = self.texts.iter().flatten().map(|&id| id as i32).collect();
        let rows = DRIFT_BATCH[0] * sequence;
        let token = |row: usize| all[(7 * step + row) % all.len()];
        let start = |at: usize| (at.min(DRIFT_BATCH[0]) * sequence) as i32;
        Batch {
            ids: (0..rows).map(token).collect(),
            targets: (0..rows).map(|row| token(row + 1)).collect(),
            positions: (0..rows).map(|row| (row % sequence) as i32).collect(),
            documents: (0..=rows).map(start).collect(),
            valid: rows,
        }
    }

    /// The truth, where the model is small enough.
    fn exact(&self) -> Result<Option<Measured>> {
        let weights: HostWeights = self.steps.widened();
        let steps = Steps { model: self.steps.model, weights: &weights, dtype: DType::F32 };
        let (logits, training) = (steps.logits(&self.batch)?, steps.training(&self.batch)?);
        if self.tensors.is_empty() || !feasible(&logits) || !feasible(&training) {
            eprintln!("no f64 reference: the model is too large; the first device stands for it");
            return Ok(None);
        }
        eprintln!("f64: logits and gradients, in naive loops");
        let view = logits.program.output("logits")?;
        let gradients = training.program.buffer(GRADIENTS).view;
        let (Some(logits), Some(training)) = (evaluate(&logits), evaluate(&training)) else {
            eprintln!("no f64 reference: a choice is too close to call");
            return Ok(None);
        };
        Ok(Some(Measured {
            device: "f64".to_owned(),
            logits: logits.read(&view),
            gradient: training.read(&gradients),
            losses: Vec::new(),
        }))
    }
}

fn wide(bytes: &[u8]) -> Vec<f64> {
    let numbers = bytes.chunks_exact(4).map(|four| [four[0], four[1], four[2], four[3]]);
    numbers.map(|four| f64::from(f32::from_le_bytes(four))).collect()
}

fn report(arguments: &Arguments, certificate: &Certificate) -> Result<()> {
    let value = json!(certificate);
    if let Some(path) = &arguments.report {
        show::write_json(path, &value)?;
    }
    if arguments.json {
        println!("{value}");
    } else {
        println!("{} in {}, against {}", arguments.model, arguments.dtype, certificate.reference);
        for pair in &certificate.pairs {
            let same = if pair.identical { ", the same bits" } else { "" };
            println!("{} and {}{same}", pair.device, pair.with);
            let line = |what: &str, got: f64, limit: f64| {
                println!("  {what:28} {got:>11.3e}  limit {limit:>10.3e}");
            };
            let limits = &certificate.limits;
            line("worst logit error", pair.worst_logit_error, limits.worst_logit_error);
            line("typical logit error", pair.typical_logit_error, limits.typical_logit_error);
            line("divergence, nats", pair.kl, limits.kl);
            line("worst gradient error", pair.worst_gradient_error, limits.gradient_error);
            line("loss drift", pair.loss_drift, limits.loss_drift);
            println!("  top-1 agreement              {:>10.1}%", 100.0 * pair.top1_agreement);
        }
    }
    match certificate.reasons.first() {
        None if arguments.json => Ok(()),
        None => {
            println!("AGREE");
            Ok(())
        }
        Some(reason) => bail!(
            "they do not agree on {}: {reason} ({} limits broken); `pontoon bisect` finds the \
             operation",
            arguments.model,
            certificate.reasons.len()
        ),
    }
}
