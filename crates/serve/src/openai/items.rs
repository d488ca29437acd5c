//! An answer as the items of the responses API, and the events that tell how they grow.
//!
//! Read next: `responses.rs`.

use serde_json::{Value, json};

use crate::app::App;
use crate::text::splitter::Part;

/// An event: its name and what it says.
pub type Event = (&'static str, Value);

/// The status of an item or answer that has its end.
pub const COMPLETED: &str = "completed";

/// The kinds of items, which all grow piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    Call,
}

impl Kind {
    fn delta(self) -> &'static str {
        match self {
            Kind::Reasoning => "response.reasoning_text.delta",
            Kind::Message => "response.output_text.delta",
            Kind::Call => "response.function_call_arguments.delta",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Kind::Reasoning => "response.reasoning_text.done",
            Kind::Message => "response.output_text.done",
            Kind::Call => "response.function_call_arguments.done",
        }
    }

    /// The part of the item that the text is; calls have none.
    fn part(self, text: &str) -> Option<Value> {
        match self {
            Kind::Reasoning => Some(json!({ "type": "reasoning_text", "text": text })),
            Kind::Message => Some(json!({
                "type": "output_text", "text": text, "annotations": [], "logprobs": [],
            })),
            Kind::Call => None,
        }
    }
}

/// The items of an answer so far; the last one may still grow.
#[derive(Default)]
pub struct Items {
    list: Vec<Value>,
    open: Option<(Kind, String)>,
}

impl Items {
    /// The items.
    pub fn list(&self) -> &[Value] {
        &self.list
    }

    /// The answer as a message of the chat API.
    pub fn message(&self) -> Value {
        let mut text = String::new();
        let mut calls = Vec::new();
        for item in &self.list {
            if item["type"] == "message" {
                text += item["content"][0]["text"].as_str().unwrap_or_default();
            }
            if item["type"] == "function_call" {
                let function = json!({ "name": item["name"], "arguments": item["arguments"] });
                let id = &item["call_id"];
                calls.push(json!({ "id": id, "type": "function", "function": function }));
            }
        }
        json!({ "role": "assistant", "content": text, "tool_calls": calls })
    }

    /// Adds a part.
    pub fn push(&mut self, app: &App, part: Part) -> Vec<Event> {
        let (kind, text) = match part {
            Part::Reasoning(text) => (Kind::Reasoning, text),
            Part::Content(text) => (Kind::Message, text),
            Part::CallArguments { text, .. } => (Kind::Call, text),
            Part::CallBegin { name, .. } => {
                let mut events = self.close(COMPLETED);
                events.extend(self.begin(app, Kind::Call, &name));
                return events;
            }
        };
        let mut events = Vec::new();
        if self.open.as_ref().is_none_or(|(open, _)| *open != kind) {
            events.extend(self.close(COMPLETED));
            events.extend(self.begin(app, kind, ""));
        }
        if let Some((_, all)) = &mut self.open {
            all.push_str(&text);
        }
        let mut value = json!({ "delta": text });
        if kind != Kind::Call {
            value["logprobs"] = json!([]);
        }
        events.push((kind.delta(), self.placed(kind, value)));
        events
    }

    /// Ends the item that grows, which is complete or, at the limit of tokens, incomplete.
    pub fn close(&mut self, status: &str) -> Vec<Event> {
        let Some((kind, text)) = self.open.take() else { return Vec::new() };
        let index = self.list.len() - 1;
        let mut events = Vec::new();
        let item = &mut self.list[index];
        item["status"] = status.into();
        match kind.part(&text) {
            Some(part) => {
                item["content"] = json!([part]);
                let done = json!({ "text": text, "logprobs": [] });
                events.push((kind.done(), self.placed(kind, done)));
                let part_done = self.placed(kind, json!({ "part": part }));
                events.push(("response.content_part.done", part_done));
            }
            None => {
                item["arguments"] = text.as_str().into();
                let done = json!({ "name": item["name"], "arguments": text });
                events.push((kind.done(), self.placed(kind, done)));
            }
        }
        let item_done = json!({ "output_index": index, "item": self.list[index] });
        events.push(("response.output_item.done", item_done));
        events
    }

    fn begin(&mut self, app: &App, kind: Kind, name: &str) -> Vec<Event> {
        let item = match kind {
            Kind::Reasoning => json!({
                "id": app.fresh_id("rs"), "type": "reasoning", "status": "in_progress",
                "summary": [], "content": [],
            }),
            Kind::Message => json!({
                "id": app.fresh_id("msg"), "type": "message", "status": "in_progress",
                "role": "assistant", "content": [],
            }),
            Kind::Call => json!({
                "id": app.fresh_id("fc"), "type": "function_call", "status": "in_progress",
                "call_id": app.fresh_id("call"), "name": name, "arguments": "",
            }),
        };
        self.list.push(item.clone());
        self.open = Some((kind, String::new()));
        let added = json!({ "output_index": self.list.len() - 1, "item": item });
        let mut events = vec![("response.output_item.added", added)];
        if let Some(part) = kind.part("") {
            let value = self.placed(kind, json!({ "part": part }));
            events.push(("response.content_part.added", value));
        }
        events
    }

    /// An event about the last item.
    fn placed(&self, kind: Kind, mut value: Value) -> Value {
        let index = self.list.len() - 1;
        value["item_id"] = self.list[index]["id"].clone();
        value["output_index"] = index.into();
        if kind != Kind::Call {
            value["content_index"] = 0.into();
        }
        value
    }
}
