//! What is served, and its tokenizer: /v1/models, /tokenize, /detokenize.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use pontoon_models::SpecialTokens;
use serde_json::{Value, json};

use super::conversation::Conversation;
use super::errors::ApiError;
use super::fields::Fields;
use super::settings::{around, check_model};
use super::{body, reply};
use crate::app::App;

/// The card of the model that is served, or of an adapter beside it.
fn card(app: &App, name: &str) -> Value {
    let parent = (name != app.model_name).then_some(&app.model_name);
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "pontoon",
        "root": name,
        "parent": parent,
        "max_model_len": app.context(),
    })
}

/// All models: the one there is and its adapters.
pub async fn list(State(app): State<Arc<App>>) -> Response {
    let names = std::iter::once(&app.model_name).chain(&app.adapters);
    let cards: Vec<Value> = names.map(|name| card(&app, name)).collect();
    reply(&json!({ "object": "list", "data": cards }))
}

/// One model by name.
pub async fn one(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    if name == app.model_name || app.adapters.contains(&name) {
        return Ok(reply(&card(&app, &name)));
    }
    let message = format!("there is no model `{name}`; the one served is `{}`", app.model_name);
    Err(ApiError::status(StatusCode::NOT_FOUND, message).code("model_not_found"))
}

/// The tokenizer's special tokens, under the names that its configuration has them.
pub async fn tokenizer_info(State(app): State<Arc<App>>) -> Response {
    let name = |token: Option<u32>| token.and_then(|token| app.tokenizer.token_name(token));
    // What stands before a document is what the tokenizer puts there by itself.
    let first = app.tokenizer.encode_as_document("").ok().and_then(|ids| ids.first().copied());
    reply(&json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": app.context(),
        "bos_token": name(first),
        "eos_token": name(app.end_tokens.first().copied()),
        "pad_token": null,
    }))
}

/// A text or a conversation as tokens.
pub async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let fields = Fields::of(&value)?;
    check_model(&fields, &app)?;
    let tokens = if fields.get("messages").is_some() {
        Conversation::read(&fields, &app)?.tokens(&app)?
    } else {
        let text = fields.required("prompt", fields.text("prompt")?)?;
        app.encode(text, "prompt", around(&fields)?)?
    };
    let texts = fields.flag("return_token_strs")?.unwrap_or(false);
    let texts = texts.then(|| tokens.iter().map(|&token| app.token_text(token)).collect());
    Ok(reply(&json!({
        "count": tokens.len(),
        "max_model_len": app.context(),
        "tokens": tokens,
        "token_strs": texts.unwrap_or(Value::Null),
    })))
}

/// Tokens as a text.
pub async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let fields = Fields::of(&value)?;
    check_model(&fields, &app)?;
    let list = fields.required("tokens", fields.list("tokens")?)?;
    let token = |(at, value): (usize, &Value)| app.token(value, &format!("tokens[{at}]"));
    let tokens = list.iter().enumerate().map(token).collect::<Result<Vec<u32>, _>>()?;
    let text = app.tokenizer.decode(&tokens, SpecialTokens::Show);
    let text = text.map_err(|error| ApiError::field("tokens", error.to_string()))?;
    Ok(reply(&json!({ "prompt": text })))
}
