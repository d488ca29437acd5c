//! An answer as the items of the responses API, and the events that tell how they grow.
//!
//! Read next: `responses.rs`.

use serde_json::{Value, json};

use crate::app::App;
use crate::text::splitter::Part;

/// An event: its name and what it says.
pub type Event = (&'static str, Value);

/// The kinds of items that grow piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
}

impl Kind {
    fn part_type(self) -> &'static str {
        match self {
            Kind::Reasoning => "reasoning_text",
            Kind::Message => "output_text",
        }
    }

    fn delta(self) -> &'static str {
        match self {
            Kind::Reasoning => "response.reasoning_text.delta",
            Kind::Message => "response.output_text.delta",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Kind::Reasoning => "response.reasoning_text.done",
            Kind::Message => "response.output_text.done",
        }
    }

    fn part(self, text: &str) -> Value {
        match self {
            Kind::Reasoning => json!({ "type": self.part_type(), "text": text }),
            Kind::Message => {
                json!({ "type": self.part_type(), "text": text, "annotations": [], "logprobs": [] })
            }
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
            Part::ToolCall { name, arguments, .. } => return self.call(app, &name, &arguments),
        };
        let mut events = Vec::new();
        if self.open.as_ref().is_none_or(|(open, _)| *open != kind) {
            events.extend(self.close());
            events.extend(self.begin(app, kind));
        }
        let (index, id) = self.last();
        if let Some((_, all)) = &mut self.open {
            all.push_str(&text);
        }
        let delta = json!({
            "item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": [],
        });
        events.push((kind.delta(), delta));
        events
    }

    /// Ends the item that grows.
    pub fn close(&mut self) -> Vec<Event> {
        let Some((kind, text)) = self.open.take() else { return Vec::new() };
        let (index, id) = self.last();
        let part = kind.part(&text);
        let item = &mut self.list[index];
        item["status"] = "completed".into();
        item["content"] = json!([part]);
        let place = |mut value: Value| {
            value["item_id"] = id.clone();
            value["output_index"] = index.into();
            value["content_index"] = 0.into();
            value
        };
        let done = place(json!({ "text": text, "logprobs": [] }));
        let part_done = place(json!({ "part": part }));
        let item_done = json!({ "output_index": index, "item": *item });
        vec![
            (kind.done(), done),
            ("response.content_part.done", part_done),
            ("response.output_item.done", item_done),
        ]
    }

    fn begin(&mut self, app: &App, kind: Kind) -> Vec<Event> {
        let item = match kind {
            Kind::Reasoning => json!({
                "id": app.fresh_id("rs"), "type": "reasoning", "status": "in_progress",
                "summary": [], "content": [],
            }),
            Kind::Message => json!({
                "id": app.fresh_id("msg"), "type": "message", "status": "in_progress",
                "role": "assistant", "content": [],
            }),
        };
        self.list.push(item.clone());
        self.open = Some((kind, String::new()));
        let (index, id) = self.last();
        let part = json!({
            "item_id": id, "output_index": index, "content_index": 0, "part": kind.part(""),
        });
        let added = json!({ "output_index": index, "item": item });
        vec![("response.output_item.added", added), ("response.content_part.added", part)]
    }

    fn call(&mut self, app: &App, name: &str, arguments: &str) -> Vec<Event> {
        let mut events = self.close();
        let item = |status: &str, id: &str, call: &str, arguments: &str| {
            json!({
                "id": id, "type": "function_call", "status": status, "call_id": call,
                "name": name, "arguments": arguments,
            })
        };
        let (id, call) = (app.fresh_id("fc"), app.fresh_id("call"));
        let whole = item("completed", &id, &call, arguments);
        self.list.push(whole.clone());
        let index = self.list.len() - 1;
        let begun = item("in_progress", &id, &call, "");
        events
            .push(("response.output_item.added", json!({ "output_index": index, "item": begun })));
        let delta = json!({ "item_id": id, "output_index": index, "delta": arguments });
        events.push(("response.function_call_arguments.delta", delta));
        let done = json!({
            "item_id": id, "output_index": index, "name": name, "arguments": arguments,
        });
        events.push(("response.function_call_arguments.done", done));
        events.push(("response.output_item.done", json!({ "output_index": index, "item": whole })));
        events
    }

    /// The last item's place and name.
    fn last(&self) -> (usize, Value) {
        let index = self.list.len() - 1;
        (index, self.list[index]["id"].clone())
    }
}
