//! /v1/embeddings: the mean of a text's last hidden states, at unit length.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::completions::prompts;
use super::errors::ApiError;
use super::fields::Fields;
use super::flow::{Flow, Step};
use super::settings::Settings;
use super::{body, reply};
use crate::app::App;
use crate::engine::request::{Request as EngineRequest, Task};

/// The endpoint.
pub async fn embeddings(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let value = body(&app, request).await?;
    let fields = Fields::of(&value)?;
    let settings = Settings { choices: 1, ..Settings::read(&fields, &app)? };
    let base64 = match fields.text("encoding_format")? {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(fields.wrong("encoding_format", "\"float\" or \"base64\"")),
    };
    if fields.get("dimensions").is_some() {
        return Err(fields.wrong("dimensions", "absent; this model has one width"));
    }
    let inputs = prompts(&fields, &app, "input")?;
    for input in &inputs {
        app.check_length(input.len(), "input", 0)?;
    }
    let _seat = app.seat()?;
    let adapter = settings.adapter;
    let request = |prompt| EngineRequest { prompt, adapter, task: Task::Embed };
    let mut flow = Flow::start(&app, inputs.into_iter().map(request).collect(), &settings);
    let mut data: Vec<(usize, Value)> = Vec::new();
    while let Some((index, step)) = flow.next().await? {
        if let Step::Embedding(values) = step {
            let values = unit_length(values);
            let told = if base64 { encode(&values).into() } else { json!(values) };
            let entry = json!({ "object": "embedding", "index": index, "embedding": told });
            data.push((index, entry));
        }
    }
    data.sort_by_key(|(index, _)| *index);
    let data: Vec<Value> = data.into_iter().map(|(_, entry)| entry).collect();
    let tokens = flow.usage().prompt;
    let value = json!({
        "object": "list",
        "data": data,
        "model": app.model_of(settings.adapter),
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
        "system_fingerprint": flow.classes(),
        "device": flow.devices(),
    });
    Ok(reply(&value))
}

fn unit_length(values: Vec<f32>) -> Vec<f32> {
    let length = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let scale = if length > 0.0 { 1.0 / length } else { 1.0 };
    values.into_iter().map(|value| (f64::from(value) * scale) as f32).collect()
}

/// Little-endian floats in base64, as clients ask for by default.
fn encode(values: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for letter in 0..4 {
            let index = (bits >> (18 - 6 * letter)) as usize & 63;
            let shown = letter <= chunk.len();
            text.push(if shown { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_encoded_with_the_right_padding() {
        assert_eq!(encode(&[1.0]), "AACAPw==");
        assert_eq!(encode(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(encode(&[0.0; 3]), "AAAAAAAAAAAAAAAA");
    }
}
