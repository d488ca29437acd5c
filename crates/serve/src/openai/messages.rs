//! Anthropic's /v1/messages and its count of tokens, on the same engine.
//!
//! A request is turned into a conversation as `chat.rs` has it; the answer is told in blocks.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::chat::{Asked, Message, Voice, Wanted};
use super::conversation::Conversation;
use super::errors::ApiError;
use super::fields::Fields;
use super::flow::{Ended, Usage};
use super::settings::Settings;
use super::sse::{Left, Out, stream};
use super::{body, formats, reply};
use crate::app::App;
use crate::text::splitter::Part;

/// The endpoint.
pub async fn messages(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(app, request).await.unwrap_or_else(refused)
}

/// How many tokens a request's prompt has.
pub async fn count_tokens(State(app): State<Arc<App>>, request: Request) -> Response {
    let count = async {
        let value = translated(&body(&app, request).await?)?;
        let fields = Fields::of(&value)?;
        Settings::read(&fields, &app)?;
        fields.whole("max_tokens", 1..=u64::from(u32::MAX))?;
        let tokens = Conversation::read(&fields, &app)?.tokens(&app)?;
        Ok(reply(&json!({ "input_tokens": tokens.len() })))
    };
    count.await.unwrap_or_else(refused)
}

fn refused(error: ApiError) -> Response {
    let value = json!({ "type": "error", "error": {
        "type": error.kind(), "message": error.message, "param": error.param,
    }});
    (error.status, [(CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

async fn answer(app: Arc<App>, request: Request) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let given = Fields::of(&value)?;
    let most = u64::from(u32::MAX);
    let tokens_max = given.required("max_tokens", given.whole("max_tokens", 1..=most)?)?;
    let value = translated(&value)?;
    let fields = Fields::of(&value)?;
    let settings = Settings { choices: 1, ..Settings::read(&fields, &app)? };
    let guide = formats::guide(&fields, &app)?;
    let wanted = Wanted::new(
        &app,
        Asked {
            id: app.fresh_id("msg"),
            conversation: Conversation::read(&fields, &app)?,
            settings,
            guide,
            tokens_max: Some(tokens_max as usize),
            logprobs: None,
        },
    )?;
    if wanted.settings.stream {
        return Ok(stream(app, move |app, out| async move { streamed(&app, wanted, out).await }));
    }
    whole(&app, &wanted).await
}

/// The request in the terms of OpenAI's chat API.
fn translated(value: &Value) -> Result<Value, ApiError> {
    let fields = Fields::of(value)?;
    let mut made = value.clone();
    let mut list = Vec::new();
    fields.object("metadata")?;
    match fields.get("system") {
        None => {}
        Some(system) => list.push(json!({ "role": "system", "content": system })),
    }
    let given = fields.required("messages", fields.list("messages")?)?;
    for (at, message) in given.iter().enumerate() {
        let message = Fields::nested(message, &format!("messages[{at}]"))?;
        translate_message(&message, &mut list)?;
    }
    made["messages"] = list.into();
    if let Some(tools) = fields.list("tools")? {
        let tool = |tool: &Value| {
            json!({ "type": "function", "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["input_schema"],
            }})
        };
        made["tools"] = tools.iter().map(tool).collect();
    }
    if let Some(choice) = fields.object("tool_choice")? {
        made["tool_choice"] = match choice.text("type")? {
            Some("any") => "required".into(),
            Some("tool") => {
                let name = choice.required("name", choice.text("name")?)?;
                json!({ "type": "function", "function": { "name": name } })
            }
            Some("none") => "none".into(),
            Some("auto") | None => "auto".into(),
            Some(_) => return Err(choice.wrong("type", "auto, any, tool or none")),
        };
        if let Some(one) = choice.flag("disable_parallel_tool_use")? {
            made["parallel_tool_calls"] = (!one).into();
        }
    }
    Ok(made)
}

fn translate_message(message: &Fields<'_>, list: &mut Vec<Value>) -> Result<(), ApiError> {
    let role = message.required("role", message.text("role")?)?;
    let Some(Value::Array(blocks)) = message.get("content") else {
        list.push(json!({ "role": role, "content": message.get("content") }));
        return Ok(());
    };
    let (mut texts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), String::new());
    for (at, block) in blocks.iter().enumerate() {
        let block = Fields::nested(block, &format!("{}[{at}]", message.name("content")))?;
        match block.text("type")? {
            Some("text") | None => texts.push(json!({ "type": "text", "text": block.get("text") })),
            Some("thinking") => thoughts += block.text("thinking")?.unwrap_or_default(),
            Some("redacted_thinking") => {}
            Some("tool_use") => calls.push(json!({
                "id": block.get("id"), "type": "function",
                "function": { "name": block.get("name"), "arguments": block.get("input") },
            })),
            Some("tool_result") => list.push(json!({
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": block.get("content").cloned().unwrap_or_else(|| "".into()),
            })),
            Some(_) => {
                let want = "text, thinking, tool_use or tool_result; this model reads text only";
                return Err(block.wrong("type", want));
            }
        }
    }
    if texts.is_empty() && calls.is_empty() && thoughts.is_empty() {
        return Ok(());
    }
    let mut made = json!({ "role": role, "content": texts });
    if !calls.is_empty() {
        made["tool_calls"] = calls.into();
    }
    if !thoughts.is_empty() {
        made["reasoning_content"] = thoughts.into();
    }
    list.push(made);
    Ok(())
}

fn stop_reason(voice: &Voice, ended: &Ended) -> (&'static str, Value) {
    match (voice.finish_reason(ended), ended) {
        ("tool_calls", _) => ("tool_use", Value::Null),
        (_, Ended::StopText(text)) => ("stop_sequence", text.as_str().into()),
        (_, Ended::Length) => ("max_tokens", Value::Null),
        _ => ("end_turn", Value::Null),
    }
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt - usage.cached.min(usage.prompt),
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    })
}

async fn whole(app: &App, wanted: &Wanted) -> Result<Response, ApiError> {
    let (mut flow, mut voices) = wanted.start(app);
    let mut message = Message::default();
    let mut ended = ("end_turn", Value::Null);
    while let Some(step) = flow.next().await? {
        let heard = voices[0].hear(&mut flow, step);
        heard.parts.into_iter().for_each(|part| message.push(app, part));
        if let Some(end) = &heard.ended {
            ended = stop_reason(&voices[0], end);
        }
    }
    let mut content = Vec::new();
    if !message.reasoning.is_empty() {
        let thinking = message.reasoning.trim();
        content.push(json!({ "type": "thinking", "thinking": thinking, "signature": "" }));
    }
    if !message.content.is_empty() || (message.calls.is_empty() && content.is_empty()) {
        content.push(json!({ "type": "text", "text": message.content }));
    }
    for (id, name, arguments) in &message.calls {
        let input: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
        content.push(json!({ "type": "tool_use", "id": id, "name": name, "input": input }));
    }
    let value = json!({
        "id": wanted.id,
        "type": "message",
        "role": "assistant",
        "model": app.model_of(wanted.settings.adapter),
        "content": content,
        "stop_reason": ended.0,
        "stop_sequence": ended.1,
        "usage": usage_json(flow.usage()),
        "system_fingerprint": flow.classes(),
        "device": flow.devices(),
    });
    Ok(reply(&value))
}

/// The block that is being streamed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    Tool,
}

/// Tells blocks in order, opening and closing them.
struct Blocks {
    open: Option<Block>,
    index: usize,
}

impl Blocks {
    async fn push(&mut self, app: &App, out: &Out, part: Part) -> Result<(), Left> {
        let (block, delta) = match part {
            Part::Reasoning(text) => {
                (Block::Thinking, json!({ "type": "thinking_delta", "thinking": text }))
            }
            Part::Content(text) => (Block::Text, json!({ "type": "text_delta", "text": text })),
            Part::CallBegin { name, .. } => {
                self.close(out).await?;
                let id = app.fresh_id("toolu");
                let begin = json!({ "type": "tool_use", "id": id, "name": name, "input": {} });
                self.open = Some(Block::Tool);
                return self.start(out, begin).await;
            }
            Part::CallArguments { text, .. } => {
                let delta = json!({ "type": "input_json_delta", "partial_json": text });
                return self.delta(out, delta).await;
            }
        };
        if self.open != Some(block) {
            self.close(out).await?;
            let begin = match block {
                Block::Thinking => json!({ "type": "thinking", "thinking": "", "signature": "" }),
                _ => json!({ "type": "text", "text": "" }),
            };
            self.start(out, begin).await?;
            self.open = Some(block);
        }
        self.delta(out, delta).await
    }

    async fn close(&mut self, out: &Out) -> Result<(), Left> {
        let Some(block) = self.open.take() else { return Ok(()) };
        if block == Block::Thinking {
            // Thoughts are not signed here, but clients wait for the signature.
            self.delta(out, json!({ "type": "signature_delta", "signature": "" })).await?;
        }
        self.stop(out).await
    }

    async fn start(&self, out: &Out, block: Value) -> Result<(), Left> {
        let value = json!({
            "type": "content_block_start", "index": self.index, "content_block": block,
        });
        out.named("content_block_start", &value).await
    }

    async fn delta(&self, out: &Out, delta: Value) -> Result<(), Left> {
        let value = json!({ "type": "content_block_delta", "index": self.index, "delta": delta });
        out.named("content_block_delta", &value).await
    }

    async fn stop(&mut self, out: &Out) -> Result<(), Left> {
        let value = json!({ "type": "content_block_stop", "index": self.index });
        self.index += 1;
        out.named("content_block_stop", &value).await
    }
}

async fn streamed(app: &App, wanted: Wanted, out: Out) -> Result<(), Left> {
    let (mut flow, mut voices) = wanted.start(app);
    let message = json!({
        "id": wanted.id, "type": "message", "role": "assistant",
        "model": app.model_of(wanted.settings.adapter),
        "content": [], "stop_reason": null, "stop_sequence": null,
        "usage": usage_json(flow.usage()),
    });
    let begin = json!({ "type": "message_start", "message": message });
    out.named("message_start", &begin).await?;
    let mut blocks = Blocks { open: None, index: 0 };
    let mut ended = ("end_turn", Value::Null);
    loop {
        let step = match out.next(&mut flow).await? {
            Ok(Some(step)) => step,
            Ok(None) => break,
            Err(error) => {
                let inner = json!({ "type": "api_error", "message": error.message });
                let value = json!({ "type": "error", "error": inner });
                return out.named("error", &value).await;
            }
        };
        let heard = voices[0].hear(&mut flow, step);
        for part in heard.parts {
            blocks.push(app, &out, part).await?;
        }
        if let Some(end) = &heard.ended {
            ended = stop_reason(&voices[0], end);
        }
    }
    blocks.close(&out).await?;
    let value = json!({
        "type": "message_delta",
        "delta": { "stop_reason": ended.0, "stop_sequence": ended.1 },
        "usage": usage_json(flow.usage()),
        "system_fingerprint": flow.classes(),
        "device": flow.devices(),
    });
    out.named("message_delta", &value).await?;
    out.named("message_stop", &json!({ "type": "message_stop" })).await
}
