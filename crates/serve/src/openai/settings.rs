//! Sampling settings of a request, by the names that OpenAI and vLLM use.
//!
//! Read next: `flow.rs`, which runs what is read here.

use std::sync::Arc;

use pontoon_models::SamplingSettings;
use serde_json::Value;

use super::errors::ApiError;
use super::fields::{Fields, wrong};
use crate::app::App;
use crate::engine::request::{ConstraintSource, Generate, Request, Task};
use crate::text::stops::StopText;

/// Choices of one prompt at most: each takes a place in the batch.
pub const CHOICES_MAX: u64 = 64;
/// Likeliest tokens told per token at most, as OpenAI allows.
pub const TOP_LOGPROBS_MAX: u64 = 20;
/// Stop texts of one request at most; every piece of text is searched for each.
pub const STOPS_MAX: usize = 16;
/// Entries of `logit_bias` at most, as OpenAI allows about.
const BIASES_MAX: usize = 1024;

/// How a request wants its completions drawn.
#[derive(Clone)]
pub struct Settings {
    /// Temperature and so on; `tokens_max` is set where the prompt is known.
    pub sampling: SamplingSettings,
    /// Completions of each prompt.
    pub choices: usize,
    /// Texts that end a completion.
    pub stops: Vec<String>,
    /// Whether the one that was met is shown.
    pub stop_text: StopText,
    /// Tokens that end a completion.
    pub end_tokens: Vec<u32>,
    /// Tokens that must come before an end token.
    pub tokens_min: usize,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether special tokens are left out of the text.
    pub skip_special: bool,
    /// Whether the answer is streamed.
    pub stream: bool,
    /// When a stream counts tokens.
    pub stream_usage: StreamUsage,
    /// Restricts the tokens.
    pub constraint: Option<Arc<ConstraintSource>>,
    /// The adapter that was asked for as a model.
    pub adapter: Option<usize>,
    /// Tokens at a prompt's end beside which others are left out.
    pub prompt_tokens_kept: Option<usize>,
}

impl Settings {
    /// Reads them, checking each.
    pub fn read(fields: &Fields<'_>, app: &App) -> Result<Settings, ApiError> {
        let adapter = check_model(fields, app)?;
        let number = |key, range, default: f64| {
            Ok::<f32, ApiError>(fields.number(key, range)?.unwrap_or(default) as f32)
        };
        let defaults = &app.sampling_defaults;
        let top_k = match fields.get("top_k").and_then(Value::as_i64) {
            // Some clients say -1 for all.
            Some(-1) => 0,
            _ => fields
                .whole("top_k", 0..=u64::from(u32::MAX))?
                .map_or(defaults.top_k, |top_k| top_k as usize),
        };
        let top_p = number("top_p", 0.0..=1.0, f64::from(defaults.top_p))?;
        let sampling = SamplingSettings {
            temperature: number("temperature", 0.0..=100.0, f64::from(defaults.temperature))?,
            top_k,
            // No token can be drawn of none; the likeliest is what is meant.
            top_p: if top_p == 0.0 { f32::MIN_POSITIVE } else { top_p },
            min_p: number("min_p", 0.0..=1.0, f64::from(defaults.min_p))?,
            repetition_penalty: number("repetition_penalty", 0.01..=100.0, 1.0)?,
            presence_penalty: number("presence_penalty", -2.0..=2.0, 0.0)?,
            frequency_penalty: number("frequency_penalty", -2.0..=2.0, 0.0)?,
            seed: match fields.get("seed").and_then(Value::as_i64) {
                Some(seed) => seed as u64,
                None => fields.whole("seed", 0..=u64::MAX)?.unwrap_or_else(|| app.fresh_number()),
            },
            ..SamplingSettings::default()
        };
        let mut end_tokens = app.end_tokens.clone();
        if fields.flag("ignore_eos")? == Some(true) {
            end_tokens.clear();
        }
        let own = fields.list("stop_token_ids")?.unwrap_or_default();
        for (at, token) in own.iter().enumerate() {
            end_tokens.push(app.token(token, &format!("stop_token_ids[{at}]"))?);
        }
        refuse(fields)?;
        let shown = fields.flag("include_stop_str_in_output")?.unwrap_or(false);
        // Who asks is none of the server's business, but a wrong type is a mistake.
        fields.text("user")?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let options = fields.object("stream_options")?;
        if options.is_some() && !stream {
            return Err(fields.wrong("stream_options", "absent where `stream` is not true"));
        }
        let stream_usage = options.map(|options| StreamUsage::read(&options)).transpose()?;
        Ok(Settings {
            sampling,
            choices: fields.whole("n", 1..=CHOICES_MAX)?.unwrap_or(1) as usize,
            stops: stops(fields)?,
            stop_text: if shown { StopText::Shown } else { StopText::Hidden },
            end_tokens,
            tokens_min: fields.whole("min_tokens", 0..=u64::from(u32::MAX))?.unwrap_or(0) as usize,
            logit_bias: logit_bias(fields, app)?,
            skip_special: fields.flag("skip_special_tokens")?.unwrap_or(true),
            stream,
            stream_usage: stream_usage.unwrap_or_default(),
            constraint: None,
            adapter,
            prompt_tokens_kept: prompt_tokens_kept(fields, app)?,
        })
    }

    /// A request for the engine, one of the choices of a prompt.
    pub fn request(&self, prompt: Vec<u32>, choice: usize, told: Told) -> Request {
        Request {
            prompt,
            adapter: self.adapter,
            task: Task::Generate(Generate {
                sampling: self.sampling,
                choice: choice as u32,
                end_tokens: self.end_tokens.clone(),
                tokens_min: self.tokens_min,
                logit_bias: self.logit_bias.clone(),
                top_logprobs: told.top_logprobs,
                prompt_logprobs: told.prompt_logprobs,
                constraint: self.constraint.clone(),
            }),
        }
    }
}

/// When a stream counts tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamUsage {
    /// Never.
    #[default]
    Never,
    /// At its end.
    AtEnd,
    /// In every chunk, and at its end.
    Always,
}

impl StreamUsage {
    /// Reads `stream_options`.
    fn read(options: &Fields<'_>) -> Result<StreamUsage, ApiError> {
        let always = options.flag("continuous_usage_stats")? == Some(true);
        Ok(match options.flag("include_usage")? {
            Some(true) if always => StreamUsage::Always,
            Some(true) => StreamUsage::AtEnd,
            Some(false) | None => StreamUsage::Never,
        })
    }
}

/// Which log-probabilities are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// Of the likeliest tokens beside each drawn one.
    pub top_logprobs: usize,
    /// Of the prompt's tokens, with so many of the likeliest.
    pub prompt_logprobs: Option<usize>,
}

/// Says no to what would change the answer and is not offered here.
fn refuse(fields: &Fields<'_>) -> Result<(), ApiError> {
    if fields.flag("use_beam_search")? == Some(true) {
        return Err(fields.wrong("use_beam_search", "false; beams are not searched here"));
    }
    for key in ["bad_words", "allowed_token_ids"] {
        if fields.list(key)?.is_some_and(|list| !list.is_empty()) {
            return Err(fields.wrong(key, "absent; `logit_bias` forbids tokens here"));
        }
    }
    Ok(())
}

/// Reads vLLM's `truncate_prompt_tokens`, in which -1 stands for as many as the model takes.
pub fn prompt_tokens_kept(fields: &Fields<'_>, app: &App) -> Result<Option<usize>, ApiError> {
    if fields.get("truncate_prompt_tokens").and_then(Value::as_i64) == Some(-1) {
        return Ok(Some(app.context() - 1));
    }
    let count = fields.whole("truncate_prompt_tokens", 1..=u64::from(u32::MAX))?;
    Ok(count.map(|count| count as usize))
}

/// Leaves out what stands before the last tokens that are kept.
pub fn truncate(tokens: &mut Vec<u32>, kept: Option<usize>) {
    let surplus = kept.map_or(0, |kept| tokens.len().saturating_sub(kept));
    tokens.drain(..surplus);
}

/// Reads vLLM's `prompt_logprobs`: of so many of the likeliest tokens beside the prompt's own.
pub fn prompt_logprobs(fields: &Fields<'_>) -> Result<Option<usize>, ApiError> {
    let count = fields.whole("prompt_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    if count.is_some() && fields.flag("stream")? == Some(true) {
        return Err(fields.wrong("prompt_logprobs", "absent where `stream` is true"));
    }
    Ok(count.map(|count| count as usize))
}

/// What the tokenizer puts around a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Around {
    /// What stands around a document.
    Document,
    /// Nothing.
    Nothing,
}

/// Reads `add_special_tokens`.
pub fn around(fields: &Fields<'_>) -> Result<Around, ApiError> {
    Ok(match fields.flag("add_special_tokens")? {
        Some(false) => Around::Nothing,
        Some(true) | None => Around::Document,
    })
}

/// The model asked for: the one that is served, or an adapter beside it, whose number is given.
pub fn check_model(fields: &Fields<'_>, app: &App) -> Result<Option<usize>, ApiError> {
    let Some(name) = fields.text("model")? else { return Ok(None) };
    if name == app.model_name {
        return Ok(None);
    }
    if let Some(adapter) = app.adapters.iter().position(|adapter| adapter == name) {
        return Ok(Some(adapter));
    }
    let mut message = format!("`model` should be `{}` but is `{name}`", app.model_name);
    if !app.adapters.is_empty() {
        message = format!("{message}; the adapters are `{}`", app.adapters.join("`, `"));
    }
    let error = ApiError::field("model", message).code("model_not_found");
    Err(ApiError { status: axum::http::StatusCode::NOT_FOUND, ..error })
}

fn stops(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let key = if fields.get("stop_sequences").is_some() { "stop_sequences" } else { "stop" };
    let list = match fields.get(key) {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(list)) if list.len() <= STOPS_MAX => {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            list.iter()
                .map(text)
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| fields.wrong(key, "a text or a list of texts"))?
        }
        Some(_) => {
            return Err(fields.wrong(key, &format!("a text or a list of up to {STOPS_MAX} texts")));
        }
    };
    // An empty text would stop everything at once, which nobody means.
    Ok(list.into_iter().filter(|text| !text.is_empty()).collect())
}

fn logit_bias(fields: &Fields<'_>, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let mut biases = Vec::new();
    for (token, value) in map.entries() {
        let name = map.name(token);
        let id = token.parse::<u32>().ok().filter(|&id| (id as usize) < app.vocabulary());
        let Some(id) = id else {
            let most = app.vocabulary() - 1;
            let message = format!("keys of `logit_bias` should be token ids from 0 to {most}");
            return Err(ApiError::field(name, message));
        };
        match value.as_f64().filter(|bias| (-100.0..=100.0).contains(bias)) {
            Some(bias) => biases.push((id, bias as f32)),
            None => return Err(wrong(&name, "a number from -100 to 100", value)),
        }
        if biases.len() > BIASES_MAX {
            return Err(fields.wrong("logit_bias", &format!("at most {BIASES_MAX} tokens")));
        }
    }
    Ok(biases)
}
