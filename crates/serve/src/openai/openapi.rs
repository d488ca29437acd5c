//! /openapi.json: what can be asked here, for tools that read such documents.
//!
//! It names the fields that are read; others are passed over.

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::reply;

/// The document.
pub async fn openapi() -> Response {
    reply(&document())
}

fn document() -> Value {
    let mut paths = Map::new();
    let gets = [
        ("/v1/models", "The model that is served"),
        ("/health", "Whether the process works"),
        ("/ready", "Whether requests should be sent here"),
        ("/metrics", "Counters for Prometheus"),
    ];
    for (path, summary) in gets {
        paths.insert(path.to_owned(), json!({ "get": operation(summary, None) }));
    }
    for (path, summary, required, own) in posts() {
        let mut properties = own;
        if path.starts_with("/v1/") && path != "/v1/embeddings" {
            extend(&mut properties, sampling());
        }
        extend(&mut properties, json!({ "model": { "type": "string" } }));
        let schema = json!({
            "type": "object", "required": required, "properties": properties,
        });
        paths.insert(path.to_owned(), json!({ "post": operation(summary, Some(schema)) }));
    }
    let id = json!([{
        "name": "id", "in": "path", "required": true, "schema": { "type": "string" },
    }]);
    let mut get = operation("A response made before", None);
    get["parameters"] = id.clone();
    let mut delete = operation("Forgets a response", None);
    delete["parameters"] = id.clone();
    paths.insert("/v1/responses/{id}".to_owned(), json!({ "get": get, "delete": delete }));
    let mut cancel = operation("Gives up a response made in the background", None);
    cancel["parameters"] = id;
    paths.insert("/v1/responses/{id}/cancel".to_owned(), json!({ "post": cancel }));
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Pontoon", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": { "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } } },
        "security": [{}, { "key": [] }],
    })
}

fn extend(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

fn operation(summary: &str, schema: Option<Value>) -> Value {
    let error = json!({ "description": "What is wrong, and with which field" });
    let mut value = json!({
        "summary": summary,
        "responses": { "200": { "description": "The answer" }, "4XX": error, "5XX": error },
    });
    if let Some(schema) = schema {
        value["requestBody"] = json!({
            "required": true, "content": { "application/json": { "schema": schema } },
        });
    }
    value
}

fn posts() -> [(&'static str, &'static str, Value, Value); 8] {
    let text = || json!({ "type": "string" });
    let list = || json!({ "type": "array", "items": { "type": "object" } });
    let whole = || json!({ "type": "integer", "minimum": 1 });
    let texts = || {
        json!({ "anyOf": [
            { "type": "string" },
            { "type": "array", "items": { "type": "string" } },
            { "type": "array", "items": { "type": "integer" } },
            { "type": "array", "items": { "type": "array", "items": { "type": "integer" } } },
        ]})
    };
    let chat = json!({ "messages": list(), "tools": list(), "max_completion_tokens": whole(),
        "logprobs": { "type": "boolean" }, "top_logprobs": { "type": "integer" },
        "response_format": { "type": "object" } });
    let completion = json!({ "prompt": texts(), "max_tokens": { "type": "integer", "minimum": 0 },
        "echo": { "type": "boolean" }, "logprobs": { "type": "integer" } });
    let input = json!({ "anyOf": [{ "type": "string" }, list()] });
    let response = json!({ "input": input, "instructions": text(), "max_output_tokens": whole(),
        "previous_response_id": text(), "store": { "type": "boolean" },
        "background": { "type": "boolean" }, "tools": list() });
    let messages = json!({ "messages": list(), "max_tokens": whole(), "tools": list() });
    [
        ("/v1/chat/completions", "Answers a conversation", json!(["messages"]), chat),
        ("/v1/completions", "Continues prompts", json!(["prompt"]), completion),
        ("/v1/responses", "Answers, with items", json!(["input"]), response),
        ("/v1/messages", "Anthropic's API", json!(["messages", "max_tokens"]), messages.clone()),
        ("/v1/messages/count_tokens", "Counts tokens", json!(["messages"]), messages),
        ("/v1/embeddings", "Embeds texts", json!(["input"]), json!({ "input": texts() })),
        (
            "/tokenize",
            "A text's tokens",
            json!([]),
            json!({ "prompt": text(), "messages": list() }),
        ),
        (
            "/detokenize",
            "The text of tokens",
            json!(["tokens"]),
            json!({ "tokens": { "type": "array", "items": { "type": "integer" } } }),
        ),
    ]
}

fn sampling() -> Value {
    json!({
        "temperature": { "type": "number", "minimum": 0, "maximum": 100 },
        "top_p": { "type": "number", "minimum": 0, "maximum": 1 },
        "top_k": { "type": "integer", "minimum": -1 },
        "min_p": { "type": "number", "minimum": 0, "maximum": 1 },
        "repetition_penalty": { "type": "number", "minimum": 0.01, "maximum": 100 },
        "presence_penalty": { "type": "number", "minimum": -2, "maximum": 2 },
        "frequency_penalty": { "type": "number", "minimum": -2, "maximum": 2 },
        "seed": { "type": "integer" },
        "n": { "type": "integer", "minimum": 1, "maximum": 64 },
        "stop": { "anyOf": [
            { "type": "string" }, { "type": "array", "items": { "type": "string" } },
        ]},
        "logit_bias": { "type": "object", "additionalProperties": { "type": "number" } },
        "stream": { "type": "boolean" },
    })
}
