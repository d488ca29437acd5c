//! /v1/chat/completions: a conversation answered, with reasoning and tool calls told apart.
//!
//! Read next: `conversation.rs` for what goes in, `../text/splitter.rs` for what comes out.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::conversation::Conversation;
use super::errors::ApiError;
use super::fields::Fields;
use super::flow::{Ended, Flow, Step};
use super::logprobs::{chat_entry, prompt_entries};
use super::settings::{Settings, StreamUsage, TOP_LOGPROBS_MAX, Told, prompt_logprobs, truncate};
use super::sse::{Left, Out, stream};
use super::{body, formats, reply, usage_json};
use crate::app::App;
use crate::engine::request::Scored;
use crate::seats::Seat;
use crate::text::grammar::Guide;
use crate::text::splitter::{Calls, Part, Splitter};

/// A request as read: for all APIs that answer conversations.
pub struct Wanted {
    /// The answer's name.
    pub id: String,
    /// The prompt's text, whose end tells whether the model thinks at first.
    pub prompt_text: String,
    /// Its tokens.
    pub prompt: Vec<u32>,
    /// How to draw.
    pub settings: Settings,
    /// Whether tools are offered.
    pub tools: bool,
    /// How many of them may be called.
    pub calls: Calls,
    /// Likeliest tokens to tell; `None` for no log-probabilities.
    pub logprobs: Option<usize>,
    /// The same of the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
    /// Its place among the requests that are answered.
    _seat: Seat,
}

/// The endpoint.
pub async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let wanted = read(&Fields::of(&value)?, &app)?;
    if wanted.settings.stream {
        return Ok(stream(app, move |app, out| async move { streamed(&app, wanted, out).await }));
    }
    whole(&app, &wanted).await
}

fn read(fields: &Fields<'_>, app: &App) -> Result<Wanted, ApiError> {
    let settings = Settings::read(fields, app)?;
    let conversation = Conversation::read(fields, app)?;
    let most = u64::from(u32::MAX);
    let tokens_max = match fields.whole("max_completion_tokens", 1..=most)? {
        Some(tokens) => Some(tokens),
        None => fields.whole("max_tokens", 1..=most)?,
    };
    let top = fields.whole("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    let logprobs = match (fields.flag("logprobs")?, top) {
        (Some(true), top) => Some(top.unwrap_or(0)),
        (_, None | Some(0)) => None,
        (_, Some(_)) => return Err(fields.wrong("logprobs", "true where `top_logprobs` is given")),
    };
    let logprobs = logprobs.map(|count| count as usize);
    let id = app.fresh_id("chatcmpl");
    let tokens_max = tokens_max.map(|tokens| tokens as usize);
    let guide = formats::guide(fields, app)?;
    let prompt_logprobs = prompt_logprobs(fields)?;
    let asked = Asked { id, conversation, settings, guide, tokens_max, logprobs };
    Ok(Wanted { prompt_logprobs, ..Wanted::new(app, asked)? })
}

/// What any API says of a conversation to be answered.
pub struct Asked {
    /// The answer's name.
    pub id: String,
    /// The conversation.
    pub conversation: Conversation,
    /// How to draw.
    pub settings: Settings,
    /// What the answer must match.
    pub guide: Guide,
    /// Tokens at most; `None` for as many as there is room for.
    pub tokens_max: Option<usize>,
    /// Likeliest tokens to tell; `None` for no log-probabilities.
    pub logprobs: Option<usize>,
}

impl Wanted {
    /// Renders the conversation and checks its length.
    pub fn new(app: &App, asked: Asked) -> Result<Wanted, ApiError> {
        let Asked { id, conversation, mut settings, guide, tokens_max, logprobs } = asked;
        let prompt_text = conversation.text(app)?;
        let mut prompt = app.encode_chat(&prompt_text)?;
        truncate(&mut prompt, settings.prompt_tokens_kept);
        app.check_length(prompt.len(), "messages", tokens_max.unwrap_or(1))?;
        let room = app.context() - prompt.len();
        settings.sampling.tokens_max = tokens_max.unwrap_or(room);
        let thinks = Splitter::new(&prompt_text, None).thinks();
        settings.constraint = app.constraint(guide, thinks)?;
        let (tools, calls) = (!conversation.tools.is_empty(), conversation.calls);
        // The markers of calls are special tokens of some tokenizers.
        settings.skip_special &= !tools;
        let seat = app.seat()?;
        Ok(Wanted {
            id,
            prompt_text,
            prompt,
            settings,
            tools,
            calls,
            logprobs,
            prompt_logprobs: None,
            _seat: seat,
        })
    }

    /// Gives it to the pool.
    pub fn start<'a>(&self, app: &'a App) -> (Flow<'a>, Vec<Voice>) {
        let choices = 0..self.settings.choices;
        let request = |choice| {
            // The prompt is one for all choices, and scored once.
            let asked = self.prompt_logprobs.filter(|_| choice == 0);
            let told = Told {
                top_logprobs: self.logprobs.unwrap_or(0),
                prompt_logprobs: asked.map(|count| count.max(1)),
            };
            self.settings.request(self.prompt.clone(), choice, told)
        };
        let requests = choices.clone().map(request).collect();
        let format = self.tools.then_some(app.tool_format);
        let voice = |_| {
            let splitter = Splitter::new(&self.prompt_text, format).allowing(self.calls);
            Voice { splitter, thought: 0 }
        };
        (Flow::start(app, requests, &self.settings), choices.map(voice).collect())
    }
}

/// What one choice has said so far, as far as the rest depends on it.
pub struct Voice {
    splitter: Splitter,
    thought: usize,
}

impl Voice {
    /// The parts of a choice's step, and the end if it is one. Ends the choice if its answer is
    /// complete.
    pub fn hear(&mut self, flow: &mut Flow<'_>, (index, step): (usize, Step)) -> Heard {
        let heard = self.parts_of(step);
        if self.splitter.complete() {
            flow.complete(index);
        }
        heard
    }

    fn parts_of(&mut self, step: Step) -> Heard {
        let mut heard = Heard { parts: Vec::new(), scored: None, prompt: Vec::new(), ended: None };
        match step {
            Step::Token(scored, text) => {
                self.thought += usize::from(self.splitter.thinks());
                heard.parts = self.splitter.push(&text);
                heard.scored = Some(scored);
            }
            Step::Ended(ended, text) => {
                heard.parts = self.splitter.push(&text);
                heard.parts.extend(self.splitter.finish());
                heard.ended = Some(ended);
            }
            Step::Prompt(scores) => heard.prompt = scores,
            Step::Embedding(_) => {}
        }
        heard
    }

    /// Tokens of reasoning so far.
    pub fn thought(&self) -> usize {
        self.thought
    }

    /// The end as OpenAI names it.
    pub fn finish_reason(&self, ended: &Ended) -> &'static str {
        if self.splitter.calls() > 0 && *ended != Ended::Length {
            return "tool_calls";
        }
        ended.name()
    }
}

/// What a step means.
pub struct Heard {
    /// New parts.
    pub parts: Vec<Part>,
    /// The token, if there was one.
    pub scored: Option<Scored>,
    /// The prompt's tokens from the second on, if they have been scored.
    pub prompt: Vec<Scored>,
    /// How the answer ended, if it did.
    pub ended: Option<Ended>,
}

/// A whole answer.
#[derive(Default)]
pub struct Message {
    /// What the model thought.
    pub reasoning: String,
    /// What it said.
    pub content: String,
    /// Name and arguments of each call, with an id.
    pub calls: Vec<(String, String, String)>,
}

impl Message {
    /// Adds a part.
    pub fn push(&mut self, app: &App, part: Part) {
        match part {
            Part::Reasoning(text) => self.reasoning += &text,
            Part::Content(text) => self.content += &text,
            Part::CallBegin { name, .. } => {
                self.calls.push((app.fresh_id("call"), name, String::new()));
            }
            Part::CallArguments { text, .. } => {
                if let Some((_, _, arguments)) = self.calls.last_mut() {
                    *arguments += &text;
                }
            }
        }
    }

    fn json(&self) -> Value {
        let reasoning = (!self.reasoning.is_empty()).then(|| self.reasoning.trim());
        let empty = self.content.is_empty() && !self.calls.is_empty();
        let mut value = json!({
            "role": "assistant",
            "content": (!empty).then_some(&self.content),
            "refusal": null,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        });
        if !self.calls.is_empty() {
            let call = |(id, name, arguments): &(String, String, String)| {
                json!({
                    "id": id,
                    "type": "function",
                    "function": { "name": name, "arguments": arguments },
                })
            };
            value["tool_calls"] = self.calls.iter().map(call).collect();
        }
        value
    }
}

/// Counts so far.
fn used(flow: &Flow<'_>, voices: &[Voice]) -> Value {
    usage_json(flow.usage(), Some(voices.iter().map(Voice::thought).sum()))
}

async fn whole(app: &App, wanted: &Wanted) -> Result<Response, ApiError> {
    let (mut flow, mut voices) = wanted.start(app);
    let count = voices.len();
    let mut messages: Vec<Message> = (0..count).map(|_| Message::default()).collect();
    let mut scores: Vec<Vec<Value>> = vec![Vec::new(); count];
    let mut finishes = vec![(Value::Null, Value::Null); count];
    let mut prompt_scores = Vec::new();
    while let Some((index, step)) = flow.next().await? {
        let mut heard = voices[index].hear(&mut flow, (index, step));
        prompt_scores.append(&mut heard.prompt);
        heard.parts.into_iter().for_each(|part| messages[index].push(app, part));
        if let (Some(scored), Some(_)) = (&heard.scored, wanted.logprobs) {
            scores[index].push(chat_entry(app, scored));
        }
        if let Some(ended) = &heard.ended {
            finishes[index].0 = voices[index].finish_reason(ended).into();
            finishes[index].1 = ended.stop_text().into();
        }
    }
    let choice = |index: usize| {
        let scores = wanted.logprobs.map(|_| json!({ "content": scores[index], "refusal": null }));
        json!({
            "index": index,
            "message": messages[index].json(),
            "logprobs": scores,
            "finish_reason": finishes[index].0,
            "stop_reason": finishes[index].1,
        })
    };
    let mut value = json!({
        "id": wanted.id,
        "object": "chat.completion",
        "created": app.now(),
        "model": app.model_of(wanted.settings.adapter),
        "choices": (0..count).map(choice).collect::<Vec<_>>(),
        "usage": used(&flow, &voices),
        "system_fingerprint": flow.classes(),
        "device": flow.devices(),
    });
    if let Some(count) = wanted.prompt_logprobs {
        value["prompt_logprobs"] = prompt_entries(app, &prompt_scores, count);
    }
    Ok(reply(&value))
}

async fn streamed(app: &App, wanted: Wanted, out: Out) -> Result<(), Left> {
    let (mut flow, mut voices) = wanted.start(app);
    let created = app.now();
    let chunk = |choices: Value| {
        json!({
            "id": wanted.id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": app.model_of(wanted.settings.adapter),
            "choices": choices,
        })
    };
    for index in 0..voices.len() {
        let delta = json!({ "role": "assistant", "content": "" });
        let choice = json!({ "index": index, "delta": delta, "finish_reason": null });
        out.data(&chunk(json!([choice]))).await?;
    }
    loop {
        let (index, step) = match out.next(&mut flow).await? {
            Ok(Some(step)) => step,
            Ok(None) => break,
            Err(error) => {
                out.data(&error.json()).await?;
                return out.done().await;
            }
        };
        let heard = voices[index].hear(&mut flow, (index, step));
        let scored = heard.scored.filter(|_| wanted.logprobs.is_some());
        let mut scores = scored.map(|scored| json!({ "content": [chat_entry(app, &scored)] }));
        let mut deltas: Vec<Value> = heard.parts.into_iter().map(|part| delta(app, part)).collect();
        if deltas.is_empty() && scores.is_some() {
            deltas.push(json!({ "content": "" }));
        }
        for delta in deltas {
            let logprobs = scores.take();
            let choice = json!({
                "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null,
            });
            let mut value = chunk(json!([choice]));
            value["system_fingerprint"] = flow.classes().into();
            value["device"] = flow.devices().into();
            if wanted.settings.stream_usage == StreamUsage::Always {
                value["usage"] = used(&flow, &voices);
            }
            out.data(&value).await?;
        }
        if let Some(ended) = heard.ended {
            let finish = voices[index].finish_reason(&ended);
            let stop = ended.stop_text();
            let choice = json!({
                "index": index, "delta": {}, "finish_reason": finish, "stop_reason": stop,
            });
            out.data(&chunk(json!([choice]))).await?;
        }
    }
    if wanted.settings.stream_usage != StreamUsage::Never {
        let mut value = chunk(json!([]));
        value["usage"] = used(&flow, &voices);
        value["device"] = flow.devices().into();
        out.data(&value).await?;
    }
    out.done().await
}

fn delta(app: &App, part: Part) -> Value {
    match part {
        Part::Reasoning(text) => json!({ "reasoning": text, "reasoning_content": text }),
        Part::Content(text) => json!({ "content": text }),
        Part::CallBegin { index, name } => json!({ "tool_calls": [{
            "index": index,
            "id": app.fresh_id("call"),
            "type": "function",
            "function": { "name": name, "arguments": "" },
        }]}),
        Part::CallArguments { index, text } => json!({ "tool_calls": [{
            "index": index,
            "function": { "arguments": text },
        }]}),
    }
}
