//! /openapi.json: what can be asked here, for tools that read such documents.
//!
//! It names the fields that are read, with what they may be; others are passed over. Schemas of
//! requests are in `openapi/schemas.rs`.

mod schemas;

use axum::response::Response;
use serde_json::{Map, Value, json};

use super::reply;

/// The document.
pub async fn openapi() -> Response {
    reply(&document())
}

fn document() -> Value {
    let mut paths = Map::new();
    for (path, summary, guarded) in GETS {
        let mut get = operation(summary, guarded);
        if path == "/metrics" || path == "/" {
            let kind = if path == "/" { "text/html" } else { "text/plain" };
            get["responses"]["200"]["content"] =
                json!({ kind: { "schema": { "type": "string" } } });
        }
        if path == "/ready" {
            get["responses"]["503"] = refused("It is stopping, or no device serves");
        }
        paths.insert(path.to_owned(), json!({ "get": get }));
    }
    for (path, summary, schema) in schemas::posts() {
        let mut post = operation(summary, Guarded::Yes);
        post["requestBody"] = json!({
            "required": true, "content": { "application/json": { "schema": schema } },
        });
        for (status, why) in POST_ERRORS {
            post["responses"][status] = refused(why);
        }
        if schema["properties"].get("stream").is_some() {
            post["responses"]["200"]["content"]["text/event-stream"] =
                json!({ "schema": event_schema() });
        }
        paths.insert(path.to_owned(), json!({ "post": post }));
    }
    let model = with_parameter(operation("The model, if it has this name", Guarded::Yes), "model");
    paths.insert("/v1/models/{model}".to_owned(), json!({ "get": model }));
    let get = with_parameter(operation("A response made before", Guarded::Yes), "id");
    let delete = with_parameter(operation("Forgets a response", Guarded::Yes), "id");
    paths.insert("/v1/responses/{id}".to_owned(), json!({ "get": get, "delete": delete }));
    let cancel = operation("Gives up a response made in the background", Guarded::Yes);
    let cancel = json!({ "post": with_parameter(cancel, "id") });
    paths.insert("/v1/responses/{id}/cancel".to_owned(), cancel);
    let items = operation("What a response was asked", Guarded::Yes);
    let items = json!({ "get": with_parameter(items, "id") });
    paths.insert("/v1/responses/{id}/input_items".to_owned(), items);
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Pontoon", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": {
            "securitySchemes": { "key": { "type": "http", "scheme": "bearer" } },
            "schemas": { "Error": error_schema() },
        },
    })
}

/// Whether a key is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guarded {
    Yes,
    No,
}

/// Paths without parameters.
const GETS: [(&str, &str, Guarded); 10] = [
    ("/v1/models", "The model that is served", Guarded::Yes),
    ("/tokenizer_info", "The special tokens", Guarded::Yes),
    ("/events", "What has happened to devices lately", Guarded::Yes),
    ("/health", "Whether the process works", Guarded::No),
    ("/ping", "The same as /health", Guarded::No),
    ("/version", "Which release this is", Guarded::No),
    ("/ready", "Whether requests should be sent here", Guarded::No),
    ("/metrics", "Counters for Prometheus", Guarded::No),
    ("/openapi.json", "This document", Guarded::No),
    ("/", "A page to chat with the model", Guarded::No),
];

/// What may be wrong with any request that has a body.
const POST_ERRORS: [(&str, &str); 7] = [
    ("400", "A field is wrong"),
    ("404", "There is no such model or response"),
    ("408", "The body took too long to arrive"),
    ("413", "The body is too large"),
    ("429", "Too many requests are being answered"),
    ("503", "The server is stopping"),
    ("504", "The answer takes too long"),
];

fn operation(summary: &str, guarded: Guarded) -> Value {
    let mut value = json!({
        "summary": summary,
        "responses": { "200": {
            "description": "The answer",
            "content": { "application/json": { "schema": { "type": "object" } } },
        }},
    });
    if guarded == Guarded::Yes {
        value["security"] = json!([{}, { "key": [] }]);
        value["responses"]["401"] = refused("No valid key came");
    }
    value
}

fn with_parameter(mut operation: Value, name: &str) -> Value {
    operation["parameters"] = json!([{
        "name": name, "in": "path", "required": true,
        "schema": { "type": "string", "minLength": 1 },
    }]);
    operation["responses"]["404"] = refused("There is none of this name");
    operation
}

fn refused(why: &str) -> Value {
    let schema = json!({ "$ref": "#/components/schemas/Error" });
    json!({ "description": why, "content": { "application/json": { "schema": schema } } })
}

/// One event of a stream, as tools that know server-sent events see it.
fn event_schema() -> Value {
    json!({
        "type": "object",
        "required": ["data"],
        "properties": { "event": { "type": "string" }, "data": { "type": "string" } },
    })
}

fn error_schema() -> Value {
    json!({
        "type": "object",
        "required": ["error"],
        "properties": { "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": { "type": "string" },
                "type": { "type": "string" },
                "param": { "type": ["string", "null"] },
                "code": { "type": ["string", "null"] },
            },
        }},
    })
}
