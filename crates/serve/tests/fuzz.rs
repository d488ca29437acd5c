//! Malformed requests by the thousand: each is refused in OpenAI's shape, nothing breaks, and
//! memory stays flat.
//!
//! `PONTOON_FUZZ_REQUESTS` says how many, `PONTOON_SEED` from which seed; `benches/serve_reach.py`
//! runs a hundred thousand.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use std::time::Instant;

use common::wire::Wire;
use common::{Faults, Small, number, report};
use pontoon_ops::philox::Stream;
use serde_json::{Value, json};

/// A value that has nothing to do where it is put.
fn strange(stream: &Stream, at: u64) -> Value {
    let values = [
        Value::Null,
        json!(true),
        json!(-1),
        json!(0.5),
        json!(1.5e300),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("橋\u{0}\u{202e}"),
        json!("<|endoftext|></think><tool_call>"),
        json!("x".repeat(5000)),
        json!([]),
        json!([[[]]]),
        json!([null]),
        json!({}),
        json!({ "type": 1 }),
        json!({ "type": "function" }),
        json!([{ "role": "user" }]),
        json!({ "type": "json_schema", "json_schema": { "schema": { "type": "橋" } } }),
        json!({ "type": "regex", "pattern": "(" }),
        json!({ "type": "grammar", "grammar": "start: start" }),
    ];
    values[stream.below(at, values.len() as u64) as usize].clone()
}

/// Puts a strange value at a random place, takes one away, or adds one.
fn spoil(value: &mut Value, stream: &Stream, at: u64) {
    let deeper = stream.below(at, 3) > 0;
    match value {
        Value::Object(map) if deeper && !map.is_empty() => {
            let index = stream.below(at + 1, map.len() as u64) as usize;
            let key = map.keys().nth(index).unwrap().clone();
            match stream.below(at + 4, 8) {
                0 => {
                    map.shift_remove(&key);
                }
                _ => spoil(map.get_mut(&key).unwrap(), stream, at + 2),
            }
        }
        Value::Array(list) if deeper && !list.is_empty() => {
            let index = stream.below(at + 1, list.len() as u64) as usize;
            spoil(&mut list[index], stream, at + 2);
        }
        other => *other = strange(stream, at + 3),
    }
}

/// Bytes that are no request at all, made of one that was.
fn broken(text: &str, stream: &Stream, at: u64) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    let place = stream.below(at, bytes.len() as u64) as usize;
    match stream.below(at + 1, 6) {
        0 => bytes.truncate(place),
        1 => bytes[place] = 0xff,
        2 => bytes.insert(place, b'}'),
        3 => bytes = [b"[".repeat(100_000), bytes].concat(),
        4 => bytes = b"{\"messages\":".repeat(2000),
        _ => bytes.clear(),
    }
    bytes
}

/// One good request of each kind.
fn bases() -> Vec<(&'static str, Value)> {
    let message = json!({ "role": "user", "content": [{ "type": "text", "text": "hi" }] });
    let function = json!({ "name": "go", "parameters": { "type": "object" } });
    let tool = json!({ "type": "function", "function": function });
    let chat = json!({
        "model": "small",
        "messages": [message, { "role": "assistant", "content": null, "tool_calls": [
            { "id": "a", "type": "function", "function": { "name": "go", "arguments": "{}" } },
        ]}, { "role": "tool", "tool_call_id": "a", "content": "x" }],
        "tools": [tool], "tool_choice": "auto", "temperature": 1, "top_p": 0.5, "top_k": 3,
        "seed": 1, "n": 2, "max_tokens": 2, "stop": ["x"], "logit_bias": { "5": 1 },
        "logprobs": true, "top_logprobs": 2, "response_format": { "type": "text" },
        "stream": false, "reasoning_effort": "low", "chat_template_kwargs": { "x": 1 },
    });
    let completion = json!({
        "prompt": ["a", [1, 2]], "max_tokens": 2, "echo": true, "logprobs": 1, "min_p": 0.1,
        "stop_token_ids": [3], "guided_regex": "[ab]", "stream": true,
        "stream_options": { "include_usage": true },
    });
    let response = json!({
        "input": [message], "max_output_tokens": 2, "text": { "format": { "type": "text" } },
        "reasoning": { "effort": "low" }, "tools": [{ "type": "function", "name": "go" }],
        "store": true, "metadata": { "a": "b" }, "instructions": "x",
    });
    let tool = json!({ "name": "go", "input_schema": { "type": "object" } });
    let messages = json!({
        "messages": [message], "max_tokens": 2, "system": "x", "tools": [tool],
        "thinking": { "type": "enabled", "budget_tokens": 5 }, "stop_sequences": ["x"],
    });
    vec![
        ("/v1/chat/completions", chat),
        ("/v1/completions", completion),
        ("/v1/responses", response),
        ("/v1/messages", messages.clone()),
        ("/v1/messages/count_tokens", messages),
        ("/v1/embeddings", json!({ "input": ["a"], "encoding_format": "float" })),
        ("/tokenize", json!({ "prompt": "a" })),
        ("/detokenize", json!({ "tokens": [1, 2] })),
    ]
}

/// The request of a round.
fn request(
    bases: &[(&'static str, Value)],
    stream: &Stream,
    round: u64,
) -> (&'static str, Vec<u8>) {
    let (path, base) = &bases[(round % bases.len() as u64) as usize];
    let mut body = base.clone();
    for change in 0..1 + round % 3 {
        spoil(&mut body, stream, round * 1000 + change * 100);
    }
    // Nobody waits for long answers here.
    if let Some(map) = body.as_object_mut() {
        map.insert("max_output_tokens".to_owned(), 2.into());
        map.insert("max_completion_tokens".to_owned(), 2.into());
        if map.get("max_tokens").is_some_and(|most| most.as_u64().is_some_and(|most| most > 9)) {
            map.insert("max_tokens".to_owned(), 2.into());
        }
    }
    let text = body.to_string();
    let bytes = match round % 10 {
        9 => broken(&text, stream, round * 1000 + 900),
        _ => text.into_bytes(),
    };
    (path, bytes)
}

/// Kibibytes of memory that this process uses.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[test]
fn malformed_requests_are_refused_in_openais_shape_and_leak_nothing() {
    let (count, seed) = (number("PONTOON_FUZZ_REQUESTS", 2000), number("PONTOON_SEED", 11));
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let server = small.server(pool);
    let mut wire = Wire::new(server.address);
    let (bases, stream) = (bases(), Stream::new(seed, 5));
    let (mut refused, mut answered, mut warm) = (0_u64, 0_u64, 0);
    let began = Instant::now();
    for round in 0..count {
        let (path, body) = request(&bases, &stream, round);
        let told = || format!("seed {seed}, round {round}: {}", String::from_utf8_lossy(&body));
        let (status, answer) = wire.post(path, &body).unwrap_or_else(|e| panic!("{e}: {}", told()));
        if status == 200 {
            answered += 1;
        } else {
            assert!((400..500).contains(&status), "{status} {answer}: {}", told());
            let value: Value = serde_json::from_str(&answer).unwrap();
            let error = &value["error"];
            assert!(error["message"].is_string() && error["type"].is_string(), "{}", told());
            refused += 1;
        }
        // Buffers and what is kept of responses grow to their bounds at first.
        if round == count / 4 {
            warm = memory();
        }
    }
    let grown = memory().saturating_sub(warm);
    assert!(grown < 32 * 1024, "memory grew by {grown} KiB after {} requests", count / 4);
    assert_eq!(server.get("/ready").0, 200);
    assert_eq!(server.metric("pontoon:device_failures_total"), 0.0);
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);
    report(&json!({
        "test": "malformed requests", "requests": count, "seed": seed, "refused_4xx": refused,
        "answered_200": answered, "other": 0, "seconds": began.elapsed().as_secs_f64(),
        "memory_grown_kib": grown, "memory_kib": memory(),
    }));
}
