//! The HTTP APIs: OpenAI's, with the extensions that its other servers have.
//!
//! Each endpoint is one file; what they share is `fields.rs` (reading requests), `settings.rs`
//! (sampling), `flow.rs` (running) and `sse.rs` (streaming).

pub mod chat;
pub mod completions;
pub mod conversation;
pub mod embeddings;
pub mod errors;
pub mod fields;
pub mod flow;
pub mod formats;
pub mod items;
pub mod logprobs;
pub mod messages;
pub mod models;
pub mod openapi;
pub mod responses;
pub mod settings;
pub mod sse;

use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::App;
use errors::ApiError;
use flow::Usage;

/// Reads a request's body as JSON, within the limits of size and time.
pub async fn body(app: &App, request: Request) -> Result<Value, ApiError> {
    let limits = &app.limits;
    let read = to_bytes(request.into_body(), limits.body_bytes);
    let bytes = match tokio::time::timeout(limits.body_time, read).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(_)) => {
            let most = limits.body_bytes;
            let message = format!("the request's body could not be read, or is over {most} bytes");
            return Err(ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        Err(_) => {
            let message = "the request's body took too long to arrive";
            return Err(ApiError::status(StatusCode::REQUEST_TIMEOUT, message));
        }
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        let message = format!("the request's body is not JSON: {error}");
        ApiError::status(StatusCode::BAD_REQUEST, message)
    })
}

/// A JSON response; where it says which devices of which numeric classes made it, so does its head.
pub fn reply(value: &Value) -> Response {
    let body = value.to_string();
    let mut response = ([(CONTENT_TYPE, "application/json")], body).into_response();
    let told = [("x-pontoon-device", "device"), ("x-pontoon-numeric-class", "system_fingerprint")];
    for (name, key) in told {
        // A device's name may hold what a header cannot.
        let text = value.get(key).and_then(Value::as_str).map(HeaderValue::from_str);
        if let Some(Ok(text)) = text {
            response.headers_mut().insert(name, text);
        }
    }
    response
}

/// Counts as OpenAI tells them.
pub fn usage_json(usage: Usage, reasoning: Option<usize>) -> Value {
    let mut value = json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
    });
    if let Some(tokens) = reasoning {
        value["completion_tokens_details"] = json!({ "reasoning_tokens": tokens });
    }
    value
}
