//! /v1/responses: OpenAI's newer API, with retrieval, cancelling and answers in the background.
//!
//! Requests become conversations as `chat.rs` has them; answers become items (`items.rs`). What is
//! kept for retrieval is in memory only, bounded, and gone when the server ends.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};
use tokio::task::AbortHandle;

use super::chat::{Asked, Voice, Wanted};
use super::conversation::Conversation;
use super::errors::ApiError;
use super::fields::Fields;
use super::flow::{Ended, Flow};
use super::items::{COMPLETED, Items};
use super::settings::Settings;
use super::sse::{Left, Out, stream};
use super::{body, formats, reply};
use crate::app::App;

/// Responses kept for retrieval; the oldest goes first.
const KEPT_MAX: usize = 1024;
/// Bytes that they hold at most, about: a long conversation is repeated in each of its responses.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// The responses that can be retrieved.
#[derive(Default)]
pub struct Kept {
    list: Mutex<VecDeque<Record>>,
}

/// What a request said, to be told again, and its conversation in the terms of the chat API.
#[derive(Clone)]
struct Said {
    items: Vec<Value>,
    messages: Vec<Value>,
}

struct Record {
    response: Value,
    /// The conversation, with its answer once there is one.
    said: Said,
    work: Option<AbortHandle>,
    bytes: usize,
}

impl Record {
    fn new(response: Value, said: Said) -> Record {
        let texts = said.items.iter().chain(&said.messages).chain([&response]);
        let bytes = texts.map(|value| value.to_string().len()).sum();
        Record { response, said, work: None, bytes }
    }
}

impl Kept {
    fn put(&self, record: Record) {
        let mut list = self.lock();
        list.retain(|one| one.response["id"] != record.response["id"]);
        list.push_back(record);
        let mut bytes: usize = list.iter().map(|record| record.bytes).sum();
        while list.len() > KEPT_MAX || (bytes > KEPT_BYTES_MAX && list.len() > 1) {
            bytes -= list.pop_front().map_or(0, |record| record.bytes);
        }
    }

    fn with<T>(&self, id: &str, found: impl FnOnce(&mut Record) -> T) -> Result<T, ApiError> {
        let mut list = self.lock();
        match list.iter_mut().find(|record| record.response["id"] == id) {
            Some(record) => Ok(found(record)),
            None => {
                let message = format!("there is no response `{id}` here, or not any more");
                Err(ApiError::status(StatusCode::NOT_FOUND, message))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Record>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request as read.
struct Job {
    wanted: Wanted,
    /// The request's own words that the response repeats.
    frame: Value,
    said: Said,
    store: bool,
}

/// The endpoint.
pub async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let fields = Fields::of(&value)?;
    let background = fields.flag("background")?.unwrap_or(false);
    if background && fields.flag("stream")? == Some(true) {
        return Err(fields.wrong("stream", "false where `background` is true"));
    }
    if background && fields.flag("store")? == Some(false) {
        return Err(fields.wrong("store", "true where `background` is true"));
    }
    let job = Job::read(&value, &app)?;
    if background {
        let response = job.response("in_progress", &[], Value::Null);
        let (worker, id) = (Arc::clone(&app), job.wanted.id.clone());
        app.responses.put(Record::new(response.clone(), job.said.clone()));
        let task = tokio::spawn(async move {
            if let Err(error) = whole(&worker, &job).await {
                let mut failed = job.response("failed", &[], Value::Null);
                failed["error"] = json!({ "code": "server_error", "message": error.message });
                worker.responses.put(Record::new(failed, job.said.clone()));
            }
        });
        // It may have ended already; then its record has no need of the handle.
        let _ = app.responses.with(&id, |record| {
            if record.response["status"] == "in_progress" {
                record.work = Some(task.abort_handle());
            }
        });
        return Ok(reply(&response));
    }
    if job.wanted.settings.stream {
        return Ok(stream(app, move |app, out| async move { streamed(&app, &job, out).await }));
    }
    Ok(reply(&whole(&app, &job).await?))
}

/// A response made before.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    app.responses.with(&id, |record| reply(&record.response))
}

/// What a response was asked.
pub async fn input_items(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let items = app.responses.with(&id, |record| record.said.items.clone())?;
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    let (first, last) = (id(items.first()), id(items.last()));
    Ok(reply(&json!({
        "object": "list", "data": items, "first_id": first, "last_id": last, "has_more": false,
    })))
}

/// Forgets a response.
pub async fn delete(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    app.responses.with(&id, |_| ())?;
    app.responses.lock().retain(|record| record.response["id"] != id.as_str());
    Ok(reply(&json!({ "id": id, "object": "response", "deleted": true })))
}

/// Gives up a response that is made in the background.
pub async fn cancel(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    app.responses.with(&id, |record| {
        if let Some(work) = record.work.take()
            && record.response["status"] == "in_progress"
        {
            work.abort();
            record.response["status"] = "cancelled".into();
        }
        reply(&record.response)
    })
}

impl Job {
    fn read(value: &Value, app: &App) -> Result<Job, ApiError> {
        let given = Fields::of(value)?;
        let mut before = Vec::new();
        if let Some(id) = given.text("previous_response_id")? {
            before =
                app.responses.with(id, |record| record.said.messages.clone()).map_err(|error| {
                    ApiError { param: Some("previous_response_id".to_owned()), ..error }
                })?;
        }
        let translated = translated(&given, value, before)?;
        // What is wrong with a message is said of the field that the client sent.
        let renamed = |error: ApiError| match &error.param {
            Some(param) if param.starts_with("messages") => {
                let param = param.replacen("messages", "input", 1);
                let message = error.message.replacen("messages", "input", 1);
                ApiError { param: Some(param), message, ..error }
            }
            _ => error,
        };
        let fields = Fields::of(&translated)?;
        let settings = Settings { choices: 1, ..Settings::read(&fields, app)? };
        let tokens_max = given.whole("max_output_tokens", 1..=u64::from(u32::MAX))?;
        let id = app.fresh_id("resp");
        let frame = frame(app, &given, &settings, &id)?;
        let conversation = Conversation::read(&fields, app).map_err(renamed)?;
        let messages = translated["messages"].as_array().cloned().unwrap_or_default();
        // Instructions hold for one answer only.
        let instructed = given.get("instructions").is_some();
        let messages = messages.into_iter().skip(usize::from(instructed)).collect();
        let said = Said { items: items_of(&given, app), messages };
        let guide = formats::guide(&fields, app)?;
        let tokens_max = tokens_max.map(|tokens| tokens as usize);
        let asked = Asked { id, conversation, settings, guide, tokens_max, logprobs: None };
        let wanted = Wanted::new(app, asked).map_err(renamed)?;
        let store = given.flag("store")?.unwrap_or(true);
        Ok(Job { wanted, frame, said, store })
    }

    fn response(&self, status: &str, output: &[Value], usage: Value) -> Value {
        let mut value = self.frame.clone();
        value["status"] = status.into();
        value["output"] = output.into();
        value["usage"] = usage;
        value
    }

    /// The response at its end, kept if the client wants it kept.
    fn finished(&self, app: &App, flow: &Flow<'_>, heard: &mut End) -> Value {
        let usage = flow.usage();
        let status = heard.status();
        let usage = json!({
            "input_tokens": usage.prompt,
            "input_tokens_details": { "cached_tokens": usage.cached },
            "output_tokens": usage.completion,
            "output_tokens_details": { "reasoning_tokens": heard.voice.thought() },
            "total_tokens": usage.prompt + usage.completion,
        });
        let mut value = self.response(status, heard.items.list(), usage);
        if status != COMPLETED {
            value["incomplete_details"] = json!({ "reason": "max_output_tokens" });
        }
        value["system_fingerprint"] = flow.classes().into();
        value["device"] = flow.devices().into();
        if self.store {
            let mut said = self.said.clone();
            said.messages.push(heard.items.message());
            app.responses.put(Record::new(value.clone(), said));
        }
        value
    }
}

/// What a response repeats of its request.
fn frame(app: &App, given: &Fields<'_>, settings: &Settings, id: &str) -> Result<Value, ApiError> {
    given.object("metadata")?;
    let metadata = given.get("metadata").cloned().unwrap_or_else(|| json!({}));
    Ok(json!({
        "id": id, "object": "response", "created_at": app.now(),
        "model": app.model_of(settings.adapter),
        "error": null, "incomplete_details": null,
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "background": given.flag("background")?.unwrap_or(false),
        "metadata": metadata,
        "parallel_tool_calls": given.flag("parallel_tool_calls")?.unwrap_or(true),
        "previous_response_id": given.get("previous_response_id"),
        "temperature": settings.sampling.temperature,
        "top_p": settings.sampling.top_p,
        "tool_choice": given.get("tool_choice").cloned().unwrap_or_else(|| "auto".into()),
        "tools": given.list("tools")?.unwrap_or_default(),
        "text": given.get("text").cloned().unwrap_or_else(
            || json!({ "format": { "type": "text" } }),
        ),
        "reasoning": given.get("reasoning"),
        "truncation": "disabled",
        "user": given.text("user")?,
    }))
}

/// What an answer has come to.
struct End {
    voice: Voice,
    items: Items,
    ended: Option<Ended>,
}

impl End {
    /// As the API names it; what was not cut off at the limit of tokens is complete.
    fn status(&self) -> &'static str {
        if self.ended == Some(Ended::Length) { "incomplete" } else { COMPLETED }
    }
}

/// The request in the terms of the chat API.
fn translated(fields: &Fields<'_>, value: &Value, before: Vec<Value>) -> Result<Value, ApiError> {
    let mut made = value.clone();
    let mut messages = Vec::new();
    if let Some(text) = fields.text("instructions")? {
        messages.push(json!({ "role": "system", "content": text }));
    }
    messages.extend(before);
    match fields.required("input", fields.get("input"))? {
        Value::String(text) => messages.push(json!({ "role": "user", "content": text })),
        Value::Array(list) => {
            for (at, item) in list.iter().enumerate() {
                let item = Fields::nested(item, &format!("input[{at}]"))?;
                messages.extend(translated_item(&item)?);
            }
        }
        _ => return Err(fields.wrong("input", "a text or a list of items")),
    }
    made["messages"] = messages.into();
    if let Some(tools) = fields.list("tools")? {
        let tool = |tool: &Value| match tool.get("function") {
            Some(_) => tool.clone(),
            None => json!({ "type": tool["type"], "function": {
                "name": tool["name"],
                "description": tool["description"],
                "parameters": tool["parameters"],
            }}),
        };
        made["tools"] = tools.iter().map(tool).collect();
    }
    if let Some(Value::Object(choice)) = fields.get("tool_choice")
        && choice.contains_key("name")
    {
        let function = json!({ "name": choice["name"] });
        made["tool_choice"] = json!({ "type": "function", "function": function });
    }
    if let Some(text) = fields.object("text")?
        && let Some(format) = text.get("format")
    {
        made["response_format"] = format.clone();
    }
    if let Some(reasoning) = fields.object("reasoning")?
        && let Some(effort) = reasoning.text("effort")?
    {
        made["reasoning_effort"] = effort.into();
    }
    Ok(made)
}

/// The request's items as clients list them, each with a name.
fn items_of(fields: &Fields<'_>, app: &App) -> Vec<Value> {
    let named = |item: &Value| {
        let mut item = item.clone();
        if item.get("type").is_none_or(Value::is_null) {
            item["type"] = "message".into();
        }
        if let Some(text) = item.get("content").and_then(Value::as_str) {
            item["content"] = json!([{ "type": "input_text", "text": text }]);
        }
        if item.get("id").is_none_or(Value::is_null) {
            item["id"] = app.fresh_id("item").into();
        }
        item
    };
    match fields.get("input") {
        Some(Value::Array(list)) => list.iter().map(named).collect(),
        Some(text) => vec![named(&json!({ "role": "user", "content": text }))],
        None => Vec::new(),
    }
}

fn translated_item(item: &Fields<'_>) -> Result<Option<Value>, ApiError> {
    Ok(match item.text("type")? {
        None | Some("message") => {
            Some(json!({ "role": item.get("role"), "content": item.get("content") }))
        }
        Some("function_call") => {
            let function = json!({ "name": item.get("name"), "arguments": item.get("arguments") });
            let call =
                json!({ "id": item.get("call_id"), "type": "function", "function": function });
            Some(json!({ "role": "assistant", "content": "", "tool_calls": [call] }))
        }
        Some("function_call_output") => Some(json!({
            "role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output"),
        })),
        // What the model thought before is not shown to it again.
        Some("reasoning") => None,
        Some(_) => {
            let want = "message, function_call, function_call_output or reasoning";
            return Err(item.wrong("type", want));
        }
    })
}

async fn whole(app: &App, job: &Job) -> Result<Value, ApiError> {
    let (mut flow, mut voices) = job.wanted.start(app);
    let voice = voices.remove(0);
    let mut end = End { voice, items: Items::default(), ended: None };
    while let Some(step) = flow.next().await? {
        let heard = end.voice.hear(&mut flow, step);
        for part in heard.parts {
            end.items.push(app, part);
        }
        end.ended = heard.ended.or(end.ended);
    }
    end.items.close(end.status());
    Ok(job.finished(app, &flow, &mut end))
}

async fn streamed(app: &App, job: &Job, out: Out) -> Result<(), Left> {
    let (mut flow, mut voices) = job.wanted.start(app);
    let voice = voices.remove(0);
    let mut end = End { voice, items: Items::default(), ended: None };
    let mut sequence = 0_u64;
    let mut tell = |name: &str, mut value: Value| {
        value["type"] = name.into();
        value["sequence_number"] = sequence.into();
        sequence += 1;
        value
    };
    for name in ["response.created", "response.in_progress"] {
        let response = job.response("in_progress", &[], Value::Null);
        out.named(name, &tell(name, json!({ "response": response }))).await?;
    }
    loop {
        let step = match out.next(&mut flow).await? {
            Ok(Some(step)) => step,
            Ok(None) => break,
            Err(error) => {
                let mut failed = job.response("failed", end.items.list(), Value::Null);
                failed["error"] = json!({ "code": "server_error", "message": error.message });
                let name = "response.failed";
                return out.named(name, &tell(name, json!({ "response": failed }))).await;
            }
        };
        let heard = end.voice.hear(&mut flow, step);
        for part in heard.parts {
            for (name, value) in end.items.push(app, part) {
                out.named(name, &tell(name, value)).await?;
            }
        }
        end.ended = heard.ended.or(end.ended);
    }
    for (name, value) in end.items.close(end.status()) {
        out.named(name, &tell(name, value)).await?;
    }
    let response = job.finished(app, &flow, &mut end);
    let name = match end.status() {
        COMPLETED => "response.completed",
        _ => "response.incomplete",
    };
    out.named(name, &tell(name, json!({ "response": response }))).await
}
