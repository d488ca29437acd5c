//! `pontoon serve`: a model behind the OpenAI API, on one or several devices.
//!
//! Reads the model and its options; serving itself is `pontoon_serve`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use pontoon_models::{Adapters, ExtraLayer, Family, Model, ModelConfig, SamplingSettings};
use pontoon_ops::DType;
use pontoon_qualify::compare::{Experts, Sizes};
use pontoon_serve::engine::blocks::BLOCK;
use pontoon_serve::engine::device::DeviceOptions;
use pontoon_serve::engine::draft::Speculation;
use pontoon_serve::pool::agreement::{Distance, LimitsOf};
use pontoon_serve::pool::events::{OnEvent, PoolEvent};
use pontoon_serve::pool::{Pool, PoolParts};
use pontoon_serve::{App, AppParts, Limits, ServerOptions, serve};
use serde_json::json;

use crate::devices;
use crate::engine::{dtype, weight_format};
use crate::model_source::ModelSource;

/// The longest context served unless asked for: the cache of more is mostly unused memory.
const CONTEXT_DEFAULT: usize = 32_768;
/// Share of a device's memory that the cache takes unless told.
const CACHE_SHARE: f64 = 0.25;

/// Tokens guessed at a time unless told.
const DRAFT_TOKENS_DEFAULT: usize = 4;

/// How tokens are guessed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Speculate {
    /// What followed the last tokens where they stood before.
    PromptLookup,
    /// By the model's layer for multi-token prediction (DeepSeek-V3).
    Mtp,
}

/// The arguments of `pontoon serve`.
#[derive(Args)]
pub struct Arguments {
    /// A model, snapshot or run folder.
    model: PathBuf,
    /// A device, as in `pontoon devices`; give several to serve on all of them.
    #[arg(long = "device", default_value = "cpu")]
    devices: Vec<String>,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Where to listen; 0 takes a free port and says which.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// A file with one API key a line; without it nobody is asked for one.
    #[arg(long)]
    api_key_file: Option<PathBuf>,
    /// The name clients ask for; by default the folder's.
    #[arg(long)]
    name: Option<String>,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// How weights are stored: as --dtype says, int8 or int4 (integers with a scale per group).
    #[arg(long)]
    weights: Option<String>,
    /// Guess tokens and check them together; answers stay the same, bit for bit.
    #[arg(long, value_enum)]
    speculate: Option<Speculate>,
    /// Tokens guessed at a time, at most.
    #[arg(long, requires = "speculate", value_parser = clap::value_parser!(u8).range(1..=31))]
    draft_tokens: Option<u8>,
    /// An adapter in PEFT's format, asked for by its name as `model`; give several for several.
    #[arg(long = "lora", value_name = "NAME=FOLDER", value_parser = named_folder)]
    adapters: Vec<(String, PathBuf)>,
    /// The longest sequence, prompt included; by default the model's, up to 32768.
    #[arg(long)]
    context: Option<usize>,
    /// Sequences that run together on one device.
    #[arg(long, default_value_t = 64)]
    sequences: usize,
    /// Tokens that the cache of one device holds; by default what a quarter of its memory takes.
    #[arg(long)]
    cache_tokens: Option<usize>,
    /// Seconds that one step may take before its device is taken to hang.
    #[arg(long, default_value_t = 60.0)]
    hang_after: f64,
    /// Seconds after which a failed device is opened again.
    #[arg(long, default_value_t = 5.0)]
    rejoin_after: f64,
    /// Bytes of a request at most.
    #[arg(long, default_value_t = Limits::default().body_bytes)]
    request_bytes: usize,
    /// Requests that are answered or wait at the same time; more are told to come again.
    #[arg(long, default_value_t = Limits::default().requests)]
    requests: usize,
    /// Seconds that an answer may take.
    #[arg(long, default_value_t = Limits::default().answer_time.as_secs_f64())]
    answer_seconds: f64,
    /// Seconds that running requests may go on after SIGTERM.
    #[arg(long, default_value_t = Limits::default().drain_time.as_secs_f64())]
    drain: f64,
    /// The share of requests that is scored again on another device, where there are several.
    #[arg(long, default_value_t = 0.02)]
    audit: f64,
    /// A file to which what happens to devices is added, one JSON object a line.
    #[arg(long)]
    events: Option<PathBuf>,
    /// An origin whose pages may ask from a browser, such as https://example.org; * for all.
    #[arg(long = "cors-origin")]
    cors_origins: Vec<String>,
}

/// Serves until told to stop.
pub fn run(arguments: &Arguments) -> Result<()> {
    let source = ModelSource::open(&arguments.model)?;
    let tokenizer = source.tokenizer()?;
    let api_keys = keys(arguments.api_key_file.as_deref())?;
    let options = options(arguments, &source.model, tokenizer.vocab_size())?;
    let audit = arguments.audit;
    ensure!((0.0..=1.0).contains(&audit), "--audit should be from 0 to 1 but is {audit}");
    let format = weight_format(arguments.weights.as_deref(), &arguments.dtype)?;
    let weights = Arc::new(source.tensors()?);
    let extra = match arguments.speculate {
        Some(Speculate::Mtp) => ExtraLayer::Present,
        _ => ExtraLayer::Absent,
    };
    let mut model = Model::stored(source.model.config.clone(), format, extra)?;
    let mut adapters = None;
    if !arguments.adapters.is_empty() {
        let opened = Adapters::open(&model.config, &arguments.adapters)?;
        model = model.with_adapters(opened.shapes().clone());
        adapters = Some(Arc::new(opened));
    }
    let pool = Pool::start(PoolParts {
        devices: arguments.devices.clone(),
        open: Arc::new(|name| devices::open(name).map_err(|error| format!("{error:#}"))),
        model: Arc::new(model),
        weights,
        adapters,
        options,
        rejoin_after: seconds(arguments.rejoin_after, "--rejoin-after")?,
        limits: limits(&source.model, options.dtype),
        audit_share: arguments.audit,
        on_event: arguments.events.as_deref().map(event_writer).transpose()?,
    })?;
    let app = App::new(AppParts {
        model_name: arguments.name.clone().unwrap_or_else(|| folder_name(&arguments.model)),
        template: source.chat_template()?,
        tokenizer,
        pool,
        api_keys,
        limits: Limits {
            body_bytes: arguments.request_bytes,
            answer_time: seconds(arguments.answer_seconds, "--answer-seconds")?,
            requests: arguments.requests,
            drain_time: seconds(arguments.drain, "--drain")?,
            ..Limits::default()
        },
        sampling_defaults: SamplingSettings::default(),
        cors_origins: arguments.cors_origins.clone(),
    });
    let on_listening = Box::new(|listening: pontoon_serve::Listening| {
        eprintln!("listening on http://{}", listening.address);
    });
    let (host, port) = (arguments.host.clone(), arguments.port);
    serve(app, ServerOptions { host, port, on_listening })?;
    eprintln!("stopped");
    Ok(())
}

/// How far devices of different numeric classes may be apart, as `pontoon compare` has it.
fn limits(model: &Model, dtype: DType) -> Arc<LimitsOf> {
    let config = &model.config;
    let sizes = Sizes {
        dtype,
        layers: config.layer_count,
        width: config.width.max(config.mlp_width),
        steps: 1,
        experts: if config.experts_per_token() == 0 { Experts::None } else { Experts::Some },
    };
    Arc::new(move |spread| {
        let limits = pontoon_qualify::compare::Limits::of(&sizes, spread);
        Distance {
            worst: limits.worst_logit_error,
            typical: limits.typical_logit_error,
            divergence: limits.kl,
        }
    })
}

/// Adds events to a file.
fn event_writer(path: &Path) -> Result<Arc<OnEvent>> {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let file = file.with_context(|| format!("cannot write --events `{}`", path.display()))?;
    let shown = path.display().to_string();
    Ok(Arc::new(move |event: &PoolEvent| {
        let line = json!({
            "time": event.time, "kind": event.kind.name(), "device": event.device,
            "cause": event.cause, "action": event.action, "moved_requests": event.moved,
        });
        // Serving goes on without its record.
        if let Err(error) = (&file).write_all(format!("{line}\n").as_bytes()) {
            eprintln!("cannot write --events `{shown}`: {error}");
        }
    }))
}

fn options(arguments: &Arguments, model: &Model, vocabulary: usize) -> Result<DeviceOptions> {
    let longest = model.config.max_positions;
    let context = arguments.context.unwrap_or(longest.min(CONTEXT_DEFAULT));
    ensure!(
        (2..=longest).contains(&context),
        "--context should be 2 to {longest} (the model's max_position_embeddings) but is {context}"
    );
    let sequences = arguments.sequences;
    ensure!((1..=1024).contains(&sequences), "--sequences should be 1 to 1024 but is {sequences}");
    let dtype = dtype(&arguments.dtype)?;
    let cache_tokens = match arguments.cache_tokens {
        Some(tokens) => tokens,
        None => cache_tokens(&model.config, dtype, context * sequences)?,
    };
    let blocks = cache_tokens.max(context).div_ceil(BLOCK);
    ensure!(
        arguments.cache_tokens.is_none_or(|tokens| tokens >= context),
        "--cache-tokens should be at least the context of {context} but is {cache_tokens}"
    );
    let step_deadline = seconds(arguments.hang_after, "--hang-after")?;
    let speculation = match arguments.speculate {
        None => Speculation::Off,
        Some(Speculate::PromptLookup) => Speculation::PromptLookup,
        Some(Speculate::Mtp) => Speculation::Mtp,
    };
    Ok(DeviceOptions {
        dtype,
        context,
        sequences,
        blocks,
        vocabulary,
        step_deadline,
        speculation,
        draft_tokens: arguments.draft_tokens.map_or(DRAFT_TOKENS_DEFAULT, usize::from),
    })
}

/// Tokens that the default share of this machine's memory holds, at most as many as can be used.
fn cache_tokens(config: &ModelConfig, dtype: DType, usable: usize) -> Result<usize> {
    let bytes = devices::found()?.iter().map(|device| device.memory_bytes).min().unwrap_or(0);
    let per_layer = match &config.family {
        Family::DeepseekV3(deepseek) => {
            let key = deepseek.plain_width + deepseek.rotary_width;
            config.head_count * (key + deepseek.value_width)
        }
        _ => 2 * config.key_value_head_count * config.head_width,
    };
    let per_token = dtype.bytes(per_layer * config.layer_count).max(1);
    Ok(((bytes as f64 * CACHE_SHARE) as usize / per_token).min(usable))
}

fn named_folder(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(folder)))
        }
        _ => Err("it should be NAME=FOLDER".to_owned()),
    }
}

fn keys(file: Option<&Path>) -> Result<Vec<String>> {
    let Some(path) = file else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read --api-key-file `{}`", path.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    ensure!(!keys.is_empty(), "--api-key-file `{}` has no key; write one a line", path.display());
    Ok(keys)
}

fn seconds(value: f64, option: &str) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|_| value > 0.0)
        .with_context(|| format!("{option} should be a positive number but is {value}"))
}

fn folder_name(path: &Path) -> String {
    let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
