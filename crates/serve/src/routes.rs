//! Which path is answered by whom, who may ask, and what the operator asks: health, metrics,
//! events.
//!
//! What the endpoints of the model do is `openai/`.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, AUTHORIZATION, CONTENT_TYPE, HeaderMap, ORIGIN, VARY,
};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;

use crate::app::App;
use crate::openai::errors::ApiError;
use crate::openai::{chat, completions, embeddings, messages, models, openapi, reply, responses};

/// All endpoints.
pub fn router(app: &Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/tokenize", post(models::tokenize))
        .route("/detokenize", post(models::detokenize))
        .route("/tokenizer_info", get(models::tokenizer_info))
        .route("/events", get(events))
        .layer(from_fn_with_state(Arc::clone(app), check_key));
    Router::new()
        .merge(guarded)
        .route("/", get(page))
        .route("/openapi.json", get(openapi::openapi))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/ping", get(health))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(app), cors))
        .with_state(Arc::clone(app))
}

async fn check_key(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let bearer = bearer.and_then(|text| text.strip_prefix("Bearer "));
    let given = bearer.or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok()));
    let known = |given: &str| app.api_keys.iter().any(|key| equal(key, given));
    if app.api_keys.is_empty() || given.is_some_and(known) {
        return next.run(request).await;
    }
    let message = "no valid API key came; send `Authorization: Bearer KEY`";
    ApiError::status(StatusCode::UNAUTHORIZED, message).code("invalid_api_key").into_response()
}

/// Lets pages of the origins that were named ask from a browser; without any, no header is sent.
async fn cors(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(ORIGIN).cloned();
    let known = |origin: &&HeaderValue| {
        app.cors_origins.iter().any(|own| own == "*" || own.as_bytes() == origin.as_bytes())
    };
    let Some(origin) = given.as_ref().filter(known) else { return next.run(request).await };
    let mut response = if request.method() == Method::OPTIONS {
        StatusCode::NO_CONTENT.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    headers.insert(VARY, HeaderValue::from_static("origin"));
    let methods = HeaderValue::from_static("GET, POST, DELETE, OPTIONS");
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    let allowed = HeaderValue::from_static("authorization, content-type, x-api-key");
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    let shown = HeaderValue::from_static("x-pontoon-device, x-pontoon-numeric-class");
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, shown);
    response
}

/// Compares in a time that does not tell how much of a key was right.
fn equal(key: &str, given: &str) -> bool {
    let (key, given) = (key.as_bytes(), given.as_bytes());
    let differing = key.iter().zip(given).fold(0, |sum, (a, b)| sum | (a ^ b));
    key.len() == given.len() && differing == 0
}

/// Whether the process works at all.
async fn health(State(app): State<Arc<App>>) -> Response {
    let device = |state: crate::pool::DeviceState| {
        json!({
            "device": state.name, "state": state.phase, "reason": state.reason,
            "failures": state.failures, "drifts": state.drifts,
            "numeric_class": state.numeric_class,
        })
    };
    let devices: Vec<_> = app.pool.devices().into_iter().map(device).collect();
    reply(&json!({ "status": "ok", "devices": devices }))
}

/// What has happened to devices lately.
async fn events(State(app): State<Arc<App>>) -> Response {
    let event = |event: crate::pool::events::PoolEvent| {
        json!({
            "time": event.time, "kind": event.kind.name(), "device": event.device,
            "cause": event.cause, "action": event.action, "moved_requests": event.moved,
        })
    };
    let list: Vec<_> = app.pool.events().into_iter().map(event).collect();
    reply(&json!({ "object": "list", "data": list }))
}

/// Whether requests should be sent here.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let serving = app.pool.devices().iter().any(|state| state.phase == "serving");
    if serving && !app.seats.stopping() {
        return reply(&json!({ "status": "ready" }));
    }
    let message = "not ready: no device serves, or the server is stopping";
    ApiError::status(StatusCode::SERVICE_UNAVAILABLE, message).into_response()
}

/// Which release this is.
async fn version() -> Response {
    reply(&json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// The chat page.
async fn page() -> Response {
    let html = include_str!("page.html");
    ([(CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let page = app.metrics.page(&app.pool, &app.model_name);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response()
}

async fn unknown(uri: Uri) -> ApiError {
    ApiError::status(StatusCode::NOT_FOUND, format!("there is no `{}` here", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("`{}` cannot be asked with {method}", uri.path());
    ApiError::status(StatusCode::METHOD_NOT_ALLOWED, message)
}
