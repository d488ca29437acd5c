//! What every endpoint needs: the pool, the tokenizer, the template, names, limits and counters.
//!
//! Read next: `openai/mod.rs`.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use axum::http::StatusCode;
use pontoon_models::{ChatTemplate, SamplingSettings, Tokenizer};
use serde_json::Value;

use crate::engine::request::ConstraintSource;
use crate::metrics::Metrics;
use crate::openai::errors::ApiError;
use crate::openai::fields::{whole, wrong};
use crate::openai::responses::Kept;
use crate::openai::settings::Around;
use crate::pool::Pool;
use crate::seats::{Refused, Seat, Seats};
use crate::text::grammar::{Grammars, Guide, Vocabulary};
use crate::text::token_bytes::TokenBytes;
use crate::text::tool_call::ToolFormat;

/// What requests may cost before anything is computed for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a body.
    pub body_bytes: usize,
    /// How long a body may take to arrive.
    pub body_time: Duration,
    /// How long a request may take from its arrival to its last token.
    pub answer_time: Duration,
    /// Requests that are answered or wait at the same time.
    pub requests: usize,
    /// How long requests may go on after the server was told to stop.
    pub drain_time: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            // A context of a million tokens is a few megabytes of text.
            body_bytes: 16 << 20,
            body_time: Duration::from_secs(30),
            // Clients of OpenAI give up after ten minutes by themselves.
            answer_time: Duration::from_secs(600),
            // Each waiting one holds its prompt and a connection; this is many batches ahead.
            requests: 4096,
            drain_time: Duration::from_secs(30),
        }
    }
}

/// What a server is made of.
pub struct AppParts {
    /// The name clients ask for.
    pub model_name: String,
    /// The tokenizer, which knows the tokens that end a text.
    pub tokenizer: Tokenizer,
    /// The chat template, if the model has one.
    pub template: Option<ChatTemplate>,
    /// The devices.
    pub pool: Pool,
    /// Keys of which a client must have one; empty for no keys.
    pub api_keys: Vec<String>,
    /// Limits.
    pub limits: Limits,
    /// How to draw where a request does not say.
    pub sampling_defaults: SamplingSettings,
    /// Origins whose pages may ask from a browser, or `*` for all; empty for none.
    pub cors_origins: Vec<String>,
}

/// A server's state.
pub struct App {
    pub(crate) model_name: String,
    /// The adapters' names, by their numbers.
    pub(crate) adapters: Vec<String>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) pool: Pool,
    pub(crate) api_keys: Vec<String>,
    pub(crate) limits: Limits,
    pub(crate) sampling_defaults: SamplingSettings,
    pub(crate) cors_origins: Vec<String>,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) tool_format: ToolFormat,
    pub(crate) metrics: Metrics,
    pub(crate) created: u64,
    pub(crate) seats: Arc<Seats>,
    pub(crate) responses: Kept,
    token_bytes: Arc<TokenBytes>,
    grammars: Grammars,
    random: RandomState,
    numbers: AtomicU64,
}

impl App {
    /// Puts the parts together.
    pub fn new(parts: AppParts) -> App {
        let AppParts { model_name, tokenizer, template, pool, api_keys, limits, .. } = parts;
        let token_bytes = Arc::new(TokenBytes::new(&tokenizer));
        let end_tokens = match tokenizer.eos() {
            [] => tokenizer.end_tokens_by_name(),
            ids => ids.to_vec(),
        };
        let deepseek = tokenizer.token_id(ToolFormat::DEEPSEEK_TOKEN).is_some();
        App {
            model_name,
            adapters: pool.adapter_names(),
            tokenizer,
            template,
            pool,
            api_keys,
            limits,
            sampling_defaults: parts.sampling_defaults,
            cors_origins: parts.cors_origins,
            end_tokens,
            tool_format: if deepseek { ToolFormat::DeepSeek } else { ToolFormat::Qwen },
            metrics: Metrics::default(),
            created: unix_seconds(),
            seats: Arc::default(),
            responses: Kept::default(),
            token_bytes,
            grammars: Grammars::default(),
            random: RandomState::new(),
            numbers: AtomicU64::new(0),
        }
    }

    /// A place among the requests that are answered.
    pub(crate) fn seat(&self) -> Result<Seat, ApiError> {
        self.seats.take(self.limits.requests).map_err(|refused| match refused {
            Refused::Stopping => {
                let message = "the server is stopping; ask another one";
                ApiError::status(StatusCode::SERVICE_UNAVAILABLE, message).code("stopping")
            }
            Refused::Full => {
                let most = self.limits.requests;
                let message = format!("{most} requests are being answered; ask again later");
                ApiError::status(StatusCode::TOO_MANY_REQUESTS, message).code("too_many_requests")
            }
        })
    }

    /// The name by which a request asked for the model, or for an adapter beside it.
    pub(crate) fn model_of(&self, adapter: Option<usize>) -> &str {
        adapter.and_then(|adapter| self.adapters.get(adapter)).unwrap_or(&self.model_name)
    }

    /// Tokens that exist.
    pub(crate) fn vocabulary(&self) -> usize {
        self.pool.options().vocabulary
    }

    /// The longest sequence.
    pub(crate) fn context(&self) -> usize {
        self.pool.options().context
    }

    /// Seconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        unix_seconds()
    }

    /// A number that no other call gives and nobody can guess.
    pub(crate) fn fresh_number(&self) -> u64 {
        self.random.hash_one(self.numbers.fetch_add(1, Relaxed))
    }

    /// A name that no other answer has.
    pub(crate) fn fresh_id(&self, kind: &str) -> String {
        format!("{kind}-{:016x}{:08x}", self.fresh_number(), self.fresh_number() as u32)
    }

    /// A token id of a request.
    pub(crate) fn token(&self, value: &Value, name: &str) -> Result<u32, ApiError> {
        let most = self.vocabulary();
        match whole(value).filter(|&id| id < most as u64) {
            Some(id) => Ok(id as u32),
            None => Err(wrong(name, &format!("a token id from 0 to {}", most - 1), value)),
        }
    }

    /// A text's tokens.
    pub(crate) fn encode(
        &self,
        text: &str,
        name: &str,
        around: Around,
    ) -> Result<Vec<u32>, ApiError> {
        let tokens = match around {
            Around::Document => self.tokenizer.encode_as_document(text),
            Around::Nothing => self.tokenizer.encode(text),
        };
        tokens.map_err(|error| ApiError::field(name, error.to_string()))
    }

    /// The tokens of a rendered conversation, which has all special tokens already.
    pub(crate) fn encode_chat(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        let tokens = self.tokenizer.encode(text);
        tokens.map_err(|error| ApiError::field("messages", error.to_string()))
    }

    /// Whether a prompt and what is to follow have room.
    pub(crate) fn check_length(
        &self,
        prompt: usize,
        name: &str,
        tokens_max: usize,
    ) -> Result<(), ApiError> {
        let context = self.context();
        let most = if tokens_max == 0 { context } else { context - 1 };
        if prompt == 0 {
            return Err(ApiError::field(name, format!("`{name}` should have at least one token")));
        }
        if prompt > most {
            let message = format!(
                "`{name}` has {prompt} tokens, but the model's context of {context} takes {most}"
            );
            return Err(ApiError::field(name, message).code("context_length_exceeded"));
        }
        Ok(())
    }

    /// What restricts a completion's tokens; `thinks` if it begins with reasoning.
    pub(crate) fn constraint(
        &self,
        guide: Guide,
        thinks: bool,
    ) -> Result<Option<Arc<ConstraintSource>>, ApiError> {
        let vocabulary = Vocabulary {
            tokenizer: &self.tokenizer,
            bytes: &self.token_bytes,
            end_token: self.end_tokens.first().copied(),
        };
        self.grammars.constraint(guide, thinks, &vocabulary).map_err(|reason| {
            let message = format!("the format asked for cannot be used: {reason}");
            ApiError::field("response_format", message)
        })
    }

    /// A token as clients see it.
    pub(crate) fn token_text(&self, token: u32) -> String {
        self.token_bytes.text(&self.tokenizer, token)
    }

    /// A token's bytes.
    pub(crate) fn token_bytes(&self, token: u32) -> &[u8] {
        self.token_bytes.of(token)
    }
}

fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
