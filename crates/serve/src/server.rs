//! Listens, routes, checks keys, and drains when told to stop.
//!
//! What the endpoints do is `openai/`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::json;
use tokio::net::TcpListener;

use crate::app::App;
use crate::error::ServeError;
use crate::openai::errors::ApiError;
use crate::openai::{chat, completions, embeddings, messages, models, openapi, reply, responses};

/// Threads that speak HTTP; computing has threads of its own.
const HTTP_THREADS: usize = 2;

/// Where to listen, and what to do once it does.
pub struct ServerOptions {
    /// The host's name or address.
    pub host: String,
    /// The port; 0 for any that is free.
    pub port: u16,
    /// Called when the server listens.
    pub on_listening: Box<dyn FnOnce(Listening) + Send>,
}

/// A server that listens.
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
    /// Stops it: requests that run are answered, new ones are not taken.
    pub stop: tokio::sync::mpsc::UnboundedSender<()>,
}

/// Serves until told to stop by a signal or by [`Listening::stop`], and the last request is
/// answered.
pub fn serve(app: App, options: ServerOptions) -> Result<(), ServeError> {
    let address = format!("{}:{}", options.host, options.port);
    let listen = |source| ServeError::Listen { address: address.clone(), source };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .enable_all()
        .build()
        .map_err(listen)?;
    let app = Arc::new(app);
    let pool = app.pool.clone();
    runtime.block_on(async {
        let listener = TcpListener::bind(&address).await.map_err(listen)?;
        let bound = listener.local_addr().map_err(listen)?;
        let (stop, mut stopped) = tokio::sync::mpsc::unbounded_channel();
        (options.on_listening)(Listening { address: bound, stop: stop.clone() });
        let (drained, mut drain) = tokio::sync::watch::channel(false);
        let state = Arc::clone(&app);
        let told = async move {
            tokio::select! {
                () = signalled() => {}
                _ = stopped.recv() => {}
            }
            state.draining.store(true, Relaxed);
            // The receiver lives as long as the server.
            let _ = drained.send(true);
        };
        let limit = app.limits.drain_time;
        let serving = axum::serve(listener, router(&app)).with_graceful_shutdown(told);
        let overdue = async {
            if drain.wait_for(|drains| *drains).await.is_ok() {
                tokio::time::sleep(limit).await;
            }
        };
        tokio::select! {
            ended = serving => ended.map_err(listen)?,
            () = overdue => eprintln!("gave up requests that still ran after {limit:?}"),
        }
        drop(stop);
        Ok::<(), ServeError>(())
    })?;
    pool.stop();
    runtime.shutdown_background();
    Ok(())
}

/// Waits for Ctrl-C or SIGTERM.
async fn signalled() {
    let interrupt = tokio::signal::ctrl_c();
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without the signal there is still Ctrl-C.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = interrupt => {}
        () = terminate => {}
    }
}

fn router(app: &Arc<App>) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::retrieve).delete(responses::delete))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/tokenize", post(models::tokenize))
        .route("/detokenize", post(models::detokenize))
        .layer(from_fn_with_state(Arc::clone(app), check_key));
    Router::new()
        .merge(guarded)
        .route("/", get(page))
        .route("/openapi.json", get(openapi::openapi))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::clone(app))
}

async fn check_key(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    request: Request,
    next: Next,
) -> Response {
    if app.draining.load(Relaxed) {
        let message = "the server is stopping; ask another one";
        return ApiError::status(StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    }
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

/// Compares in a time that does not tell how much of a key was right.
fn equal(key: &str, given: &str) -> bool {
    let (key, given) = (key.as_bytes(), given.as_bytes());
    let differing = key.iter().zip(given).fold(0, |sum, (a, b)| sum | (a ^ b));
    key.len() == given.len() && differing == 0
}

/// Whether the process works at all.
async fn health(State(app): State<Arc<App>>) -> Response {
    let device = |state: crate::pool::DeviceState| {
        json!({ "device": state.name, "state": state.phase, "reason": state.reason,
                "failures": state.failures })
    };
    let devices: Vec<_> = app.pool.devices().into_iter().map(device).collect();
    reply(&json!({ "status": "ok", "devices": devices }))
}

/// Whether requests should be sent here.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let serving = app.pool.devices().iter().any(|state| state.phase == "serving");
    if serving && !app.draining.load(Relaxed) {
        return reply(&json!({ "status": "ready" }));
    }
    let message = "not ready: no device serves, or the server is stopping";
    ApiError::status(StatusCode::SERVICE_UNAVAILABLE, message).into_response()
}

/// The chat page.
async fn page() -> Response {
    let html = include_str!("page.html");
    ([(CONTENT_TYPE, "text/html; charset=utf-8")], html).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let page = app.metrics.page(&app.pool);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response()
}

async fn unknown(uri: Uri) -> ApiError {
    ApiError::status(StatusCode::NOT_FOUND, format!("there is no `{}` here", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("`{}` cannot be asked with {method}", uri.path());
    ApiError::status(StatusCode::METHOD_NOT_ALLOWED, message)
}
