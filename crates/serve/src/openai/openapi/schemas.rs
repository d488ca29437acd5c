//! The requests' schemas, with the same limits as the code that reads them.
//!
//! What a schema cannot say, such as that a prompt has room, is said by the answer.

use serde_json::{Value, json};

use crate::openai::settings::{CHOICES_MAX, STOPS_MAX, TOP_LOGPROBS_MAX};

/// Largest count of tokens that is read.
const TOKENS_MAX: u64 = u32::MAX as u64;

/// Every path that takes a body: what it is for and the body's schema.
pub fn posts() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        ("/v1/chat/completions", "Answers a conversation", chat()),
        ("/v1/completions", "Continues prompts", completion()),
        ("/v1/responses", "Answers, with items", response()),
        ("/v1/messages", "Anthropic's API", messages(json!(["messages", "max_tokens"]))),
        ("/v1/messages/count_tokens", "Counts tokens", messages(json!(["messages"]))),
        ("/v1/embeddings", "Embeds texts", embedding()),
        ("/tokenize", "A text's or a conversation's tokens", tokenize()),
        ("/detokenize", "The text of tokens", detokenize()),
    ]
}

fn object(required: Value, parts: &[Value]) -> Value {
    let mut properties = serde_json::Map::new();
    for part in parts {
        if let Value::Object(part) = part {
            properties.extend(part.clone());
        }
    }
    json!({ "type": "object", "required": required, "properties": properties })
}

/// A field that may be left out by `null` too.
fn optional(kind: &str) -> Value {
    json!({ "type": [kind, "null"] })
}

fn number(low: f64, high: f64) -> Value {
    json!({ "type": ["number", "null"], "minimum": low, "maximum": high })
}

fn whole(low: i64, high: u64) -> Value {
    json!({ "type": ["integer", "null"], "minimum": low, "maximum": high })
}

fn model() -> Value {
    json!({ "model": optional("string") })
}

fn sampling() -> Value {
    let texts = json!({ "type": "array", "items": { "type": "string" }, "maxItems": STOPS_MAX });
    json!({
        "temperature": number(0.0, 100.0),
        "top_p": number(0.0, 1.0),
        "top_k": whole(-1, TOKENS_MAX),
        "min_p": number(0.0, 1.0),
        "repetition_penalty": number(0.01, 100.0),
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "seed": { "type": ["integer", "null"], "minimum": i64::MIN, "maximum": u64::MAX },
        "stop": { "anyOf": [{ "type": ["string", "null"] }, texts] },
        "stop_token_ids": { "type": ["array", "null"], "items": { "type": "integer" } },
        "min_tokens": whole(0, TOKENS_MAX),
        "ignore_eos": optional("boolean"),
        "skip_special_tokens": optional("boolean"),
        "include_stop_str_in_output": optional("boolean"),
        "logit_bias": {
            "type": ["object", "null"],
            "additionalProperties": { "type": "number", "minimum": -100, "maximum": 100 },
        },
        "thinking_budget": whole(0, TOKENS_MAX),
        "truncate_prompt_tokens": whole(-1, TOKENS_MAX),
        "user": optional("string"),
        "stream": optional("boolean"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": optional("boolean"),
                "continuous_usage_stats": optional("boolean"),
            },
        },
    })
}

fn choices() -> Value {
    json!({ "n": whole(1, CHOICES_MAX) })
}

/// Parts of a message that are text.
fn text_parts() -> Value {
    let part = json!({
        "type": "object",
        "required": ["text"],
        "properties": {
            "type": { "enum": ["text", "input_text", "output_text", null] },
            "text": { "type": "string" },
        },
    });
    json!({ "type": "array", "items": part })
}

fn chat_messages() -> Value {
    let content = json!({ "anyOf": [{ "type": "string" }, text_parts()] });
    let call = json!({
        "type": "object",
        "required": ["function"],
        "properties": {
            "id": optional("string"),
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": { "name": { "type": "string" }, "arguments": {} },
            },
        },
    });
    let message = json!({
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": { "enum": ["system", "developer", "user", "assistant", "tool", "function"] },
            "content": content,
            "name": optional("string"),
            "tool_call_id": optional("string"),
            "reasoning": optional("string"),
            "reasoning_content": optional("string"),
            "tool_calls": { "type": ["array", "null"], "items": call },
        },
    });
    json!({ "type": "array", "minItems": 1, "maxItems": 4096, "items": message })
}

fn chat() -> Value {
    let function = json!({
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": { "type": "string" },
            "description": optional("string"),
            "parameters": { "type": ["object", "null"] },
        },
    });
    let tool = json!({
        "type": "object",
        "required": ["type", "function"],
        "properties": { "type": { "const": "function" }, "function": function },
    });
    let own = json!({
        "messages": chat_messages(),
        "tools": { "type": ["array", "null"], "items": tool },
        "tool_choice": { "anyOf": [
            { "enum": ["none", "auto", "required", null] },
            { "type": "object", "required": ["function"], "properties": { "function": {
                "type": "object", "required": ["name"],
                "properties": { "name": { "type": "string" } },
            }}},
        ]},
        "max_completion_tokens": whole(1, TOKENS_MAX),
        "max_tokens": whole(1, TOKENS_MAX),
        "logprobs": optional("boolean"),
        "top_logprobs": whole(0, TOP_LOGPROBS_MAX),
        "response_format": { "type": ["object", "null"], "properties": { "type": {
            "enum": ["text", "json_object", "json_schema", "regex", "grammar"],
        }}},
        "parallel_tool_calls": optional("boolean"),
        "prompt_logprobs": whole(0, TOP_LOGPROBS_MAX),
        "reasoning_effort": optional("string"),
        "chat_template_kwargs": optional("object"),
        "add_generation_prompt": optional("boolean"),
        "continue_final_message": optional("boolean"),
    });
    object(json!(["messages"]), &[model(), sampling(), choices(), own])
}

/// A text, token ids, or a list of either.
fn prompts() -> Value {
    let tokens = json!({
        "type": "array", "minItems": 1, "items": { "type": "integer", "minimum": 0 },
    });
    let text = json!({ "type": "string", "minLength": 1 });
    let list =
        |of: &Value| json!({ "type": "array", "minItems": 1, "maxItems": 1024, "items": of });
    json!({ "anyOf": [text, tokens, list(&text), list(&tokens)] })
}

fn completion() -> Value {
    let own = json!({
        "prompt": prompts(),
        "max_tokens": whole(0, TOKENS_MAX),
        "echo": optional("boolean"),
        "logprobs": whole(0, TOP_LOGPROBS_MAX),
        "prompt_logprobs": whole(0, TOP_LOGPROBS_MAX),
        "add_special_tokens": optional("boolean"),
    });
    object(json!(["prompt"]), &[model(), sampling(), choices(), own])
}

fn response() -> Value {
    let content = json!({ "anyOf": [{ "type": "string" }, text_parts()] });
    let item = json!({
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "type": { "enum": [
                "message", "function_call", "function_call_output", "reasoning",
            ]},
            "role": { "enum": ["system", "developer", "user", "assistant"] },
            "content": content,
        },
    });
    let own = json!({
        "input": { "anyOf": [
            { "type": "string" }, { "type": "array", "minItems": 1, "items": item },
        ]},
        "instructions": optional("string"),
        "max_output_tokens": whole(1, TOKENS_MAX),
        "previous_response_id": optional("string"),
        "store": optional("boolean"),
        "background": optional("boolean"),
        "parallel_tool_calls": optional("boolean"),
        "metadata": optional("object"),
        "reasoning": {
            "type": ["object", "null"], "properties": { "effort": optional("string") },
        },
    });
    object(json!(["input"]), &[model(), sampling(), own])
}

fn messages(required: Value) -> Value {
    let part = json!({
        "type": "object",
        "required": ["text"],
        "properties": { "type": { "enum": ["text", null] }, "text": { "type": "string" } },
    });
    let parts = json!({ "type": "array", "minItems": 1, "items": part });
    let content = json!({ "anyOf": [{ "type": "string" }, parts] });
    let message = json!({
        "type": "object",
        "required": ["role", "content"],
        "properties": { "role": { "enum": ["user", "assistant"] }, "content": content },
    });
    let tool = json!({
        "type": "object",
        "required": ["name", "input_schema"],
        "properties": {
            "name": { "type": "string" },
            "description": optional("string"),
            "input_schema": { "type": "object" },
        },
    });
    let own = json!({
        "messages": { "type": "array", "minItems": 1, "items": message },
        "max_tokens": { "type": "integer", "minimum": 1, "maximum": TOKENS_MAX },
        "system": { "anyOf": [{ "type": ["string", "null"] }, parts] },
        "tools": { "type": ["array", "null"], "items": tool },
        "tool_choice": { "type": ["object", "null"], "properties": {
            "type": { "enum": ["auto", "any", "tool", "none"] },
            "disable_parallel_tool_use": optional("boolean"),
        }},
        "stop_sequences": { "type": ["array", "null"], "items": { "type": "string" },
                            "maxItems": STOPS_MAX },
        "temperature": number(0.0, 100.0),
        "top_p": number(0.0, 1.0),
        "top_k": whole(-1, TOKENS_MAX),
        "stream": optional("boolean"),
        "metadata": optional("object"),
    });
    object(required, &[model(), own])
}

fn embedding() -> Value {
    let own = json!({
        "input": prompts(),
        "encoding_format": { "enum": ["float", "base64", null] },
        "user": optional("string"),
    });
    object(json!(["input"]), &[model(), own])
}

fn tokenize() -> Value {
    let special = json!({
        "add_special_tokens": optional("boolean"),
        "return_token_strs": optional("boolean"),
    });
    let text = json!({ "prompt": { "type": "string" } });
    let conversation = json!({ "messages": chat_messages() });
    json!({ "anyOf": [
        object(json!(["prompt"]), &[model(), text, special]),
        object(json!(["messages"]), &[model(), conversation]),
    ]})
}

fn detokenize() -> Value {
    let tokens = json!({ "type": "array", "items": { "type": "integer", "minimum": 0 } });
    object(json!(["tokens"]), &[model(), json!({ "tokens": tokens })])
}
