//! `pontoon eval`: problems answered by a model, right or wrong.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pontoon_models::{GeneratorOptions, HostWeights, SamplingSettings, SpecialTokens};
use pontoon_train::arithmetic::{self, Purpose, additions};
use pontoon_train::eval::{Problem, answer_of, read_problems};
use serde_json::json;

use crate::engine::{Engine, dtype};
use crate::model_source::{ModelSource, chat_prompt};

/// Problems answered at a time.
const TOGETHER: usize = 16;
/// Decides which problems of a generated task are asked.
const SEED: u64 = 1000;

/// The arguments of `pontoon eval`.
#[derive(Args)]
pub struct Arguments {
    /// A model, snapshot or run folder.
    model: PathBuf,
    /// `arithmetic`, or a file with {"prompt": ..., "answer": ...} a line.
    #[arg(long, value_name = "NAME|FILE.jsonl")]
    task: String,
    /// Problems asked at most.
    #[arg(long, default_value_t = 200)]
    count: usize,
    /// Tokens of a reply at most.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// The device, as in `pontoon devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is asked of which device.
pub struct Exam<'a> {
    /// The model.
    pub source: &'a ModelSource,
    /// The problems.
    pub problems: &'a [Problem],
    /// Tokens of a reply at most.
    pub tokens: usize,
    /// The device.
    pub device: &'a str,
    /// What to compute in.
    pub dtype: pontoon_ops::DType,
}

/// One problem, answered.
pub struct Answered {
    /// The whole reply.
    pub reply: String,
    /// Whether its answer is the right one.
    pub right: bool,
}

/// Evaluates.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut problems = match arguments.task.as_str() {
        arithmetic::TASK => additions(SEED, Purpose::Ask, arguments.count)
            .into_iter()
            .map(arithmetic::Addition::problem)
            .collect(),
        path => read_problems(Path::new(path))?,
    };
    problems.truncate(arguments.count);
    let source = ModelSource::open(&arguments.model)?;
    let exam = Exam {
        source: &source,
        problems: &problems,
        tokens: arguments.tokens,
        device: &arguments.device,
        dtype: dtype(&arguments.dtype)?,
    };
    let answered = exam.sit(&source.weights()?)?;
    let right = answered.iter().filter(|one| one.right).count();
    let share = right as f64 / answered.len() as f64;
    if arguments.json {
        let replies: Vec<_> = problems
            .iter()
            .zip(&answered)
            .map(|(problem, one)| {
                let (prompt, answer, reply) = (&problem.prompt, &problem.answer, &one.reply);
                json!({ "prompt": prompt, "answer": answer, "reply": reply, "right": one.right })
            })
            .collect();
        println!("{}", json!({ "exact_match": share, "count": replies.len(), "replies": replies }));
        return Ok(());
    }
    for (problem, one) in problems.iter().zip(&answered).filter(|(_, one)| !one.right).take(5) {
        eprintln!("wrong: {}  wanted {}, replied {}", problem.prompt, problem.answer, one.reply);
    }
    println!("exact match {:.1}% ({right} of {})", 100.0 * share, answered.len());
    Ok(())
}

impl Exam<'_> {
    /// Answers every problem greedily, with the weights given.
    pub fn sit(&self, weights: &HostWeights) -> Result<Vec<Answered>> {
        let tokenizer = self.source.tokenizer()?;
        let template = self.source.chat_template()?;
        let encode = |problem: &Problem| -> Result<Vec<u32>> {
            Ok(match &template {
                Some(template) => {
                    tokenizer.encode(&chat_prompt(template, None, &problem.prompt)?)?
                }
                None => tokenizer.encode_as_document(&problem.prompt)?,
            })
        };
        let prompts = self.problems.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let most = self.source.model.config.max_positions;
        ensure!(longest < most, "a problem has {longest} tokens, but the model allows {most}");
        let options = GeneratorOptions {
            vocabulary: Some(tokenizer.vocab_size()),
            ..GeneratorOptions::new(
                self.dtype,
                (longest + self.tokens).clamp(2, most),
                TOGETHER.min(prompts.len()).max(1),
            )
        };
        let mut engine = Engine::load(self.device, &self.source.model, weights, options)?;
        let bar = ProgressBar::new(prompts.len() as u64);
        let style = "{bar:24} {pos}/{len} problems  ETA {eta}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        let mut answered = Vec::with_capacity(prompts.len());
        let settings = SamplingSettings::greedy(self.tokens);
        for (prompts, problems) in prompts.chunks(TOGETHER).zip(self.problems.chunks(TOGETHER)) {
            let backend = engine.backend.as_mut();
            let eos = tokenizer.eos();
            let done = engine.generator.generate(backend, prompts, &settings, eos, &mut |_| ())?;
            for (completion, problem) in done.iter().zip(problems) {
                let kept = completion.tokens.iter().filter(|token| !eos.contains(token));
                let kept: Vec<u32> = kept.copied().collect();
                let reply = tokenizer.decode(&kept, SpecialTokens::Show)?;
                let right = answer_of(&reply) == problem.answer.trim();
                answered.push(Answered { reply, right });
            }
            bar.inc(done.len() as u64);
        }
        bar.finish_and_clear();
        Ok(answered)
    }
}
