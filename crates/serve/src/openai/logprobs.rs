//! Log-probabilities as the two OpenAI APIs tell them.

use serde_json::{Map, Value, json};

use crate::app::App;
use crate::engine::request::Scored;

/// What JSON has instead of minus infinity, as other servers say it.
const LOWEST: f32 = -9999.0;

fn number(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOWEST }
}

/// One entry of chat's `logprobs.content`.
pub fn chat_entry(app: &App, scored: &Scored) -> Value {
    let entry = |token: u32, logprob: f32| {
        json!({
            "token": app.token_text(token),
            "logprob": number(logprob),
            "bytes": app.token_bytes(token),
        })
    };
    let mut value = entry(scored.token, scored.logprob);
    value["top_logprobs"] = scored.top.iter().map(|&(token, lp)| entry(token, lp)).collect();
    value
}

/// vLLM's `prompt_logprobs`: for each token of a prompt its own entry and those of `count` of the
/// likeliest, by token id; null for the first, which nothing comes before.
pub fn prompt_entries(app: &App, scores: &[Scored], count: usize) -> Value {
    let entry = |token: u32, logprob: f32, rank: Option<usize>| {
        let value = json!({
            "logprob": number(logprob), "rank": rank, "decoded_token": app.token_text(token),
        });
        (token.to_string(), value)
    };
    let of = |scored: &Scored| {
        let mut entries = Map::new();
        entries.extend([entry(scored.token, scored.logprob, scored.rank)]);
        let likeliest = scored.top.iter().take(count).enumerate();
        for (at, &(token, logprob)) in likeliest.filter(|(_, top)| top.0 != scored.token) {
            entries.extend([entry(token, logprob, Some(at + 1))]);
        }
        Value::Object(entries)
    };
    std::iter::once(Value::Null).chain(scores.iter().map(of)).collect()
}

/// The `logprobs` object of a completion, filled token by token.
#[derive(Default)]
pub struct CompletionLogprobs {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    offset: usize,
}

impl CompletionLogprobs {
    /// Begins at an offset into the text.
    pub fn at(offset: usize) -> CompletionLogprobs {
        CompletionLogprobs { offset, ..CompletionLogprobs::default() }
    }

    /// Adds a token without a log-probability: a prompt's first.
    pub fn push_first(&mut self, app: &App, token: u32) {
        self.push_token(app, token);
        self.logprobs.push(Value::Null);
        self.top.push(Value::Null);
    }

    /// Adds a token.
    pub fn push(&mut self, app: &App, scored: &Scored) {
        self.push_token(app, scored.token);
        self.logprobs.push(json!(number(scored.logprob)));
        let entry =
            |&(token, logprob): &(u32, f32)| (app.token_text(token), json!(number(logprob)));
        self.top.push(Value::Object(scored.top.iter().map(entry).collect::<Map<_, _>>()));
    }

    /// Where the next token would begin.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The object.
    pub fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }

    fn push_token(&mut self, app: &App, token: u32) {
        let text = app.token_text(token);
        self.offsets.push(self.offset);
        self.offset += text.chars().count();
        self.tokens.push(text.into());
    }
}
