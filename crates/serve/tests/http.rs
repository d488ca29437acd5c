//! The HTTP API as clients see it, on a server in this process.

mod common;

use std::time::{Duration, Instant};

use common::{Failure, Faults, Server, Small};
use pontoon_serve::Limits;
use serde_json::{Value, json};

fn server() -> Server {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    small.server(pool)
}

#[test]
fn the_model_is_listed_and_its_tokenizer_can_be_asked() {
    let server = server();
    let (status, text) = server.get("/v1/models");
    assert_eq!(status, 200);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["data"][0]["id"], "small");
    assert_eq!(list["data"][0]["max_model_len"], 512);
    assert_eq!(server.get("/v1/models/small").0, 200);
    assert_eq!(server.get("/v1/models/large").0, 404);
    let tokens = server.post("/tokenize", &json!({ "prompt": "over the river" }));
    let text = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] }));
    assert_eq!(text["prompt"], "over the river");
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    assert!(server.post("/tokenize", &chat)["count"].as_u64().unwrap() > 3);
    assert_eq!(server.get("/health").0, 200);
    assert_eq!(server.get("/ready").0, 200);
}

#[test]
fn a_completion_is_the_same_streamed_or_whole_and_as_text_or_tokens() {
    let server = server();
    let tokens = server.post("/tokenize", &json!({ "prompt": "A bridge" }))["tokens"].clone();
    let settings = json!({ "max_tokens": 12, "seed": 5, "n": 2, "logprobs": 3 });
    let ask = |prompt: Value| {
        let mut body = settings.clone();
        body["prompt"] = prompt;
        body
    };
    let whole = server.post("/v1/completions", &ask("A bridge".into()));
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    assert_eq!(whole["usage"]["prompt_tokens"], tokens.as_array().unwrap().len());
    assert_ne!(whole["choices"][0]["text"], whole["choices"][1]["text"]);
    let again = server.post("/v1/completions", &ask(tokens));
    assert_eq!(whole["choices"], again["choices"]);
    let mut streamed = ask("A bridge".into());
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({ "include_usage": true });
    let events = server.events("/v1/completions", &streamed);
    assert_eq!(events.last().unwrap(), "[DONE]");
    let mut texts = [String::new(), String::new()];
    let mut usage = Value::Null;
    for event in &events[..events.len() - 1] {
        let value: Value = serde_json::from_str(event).unwrap();
        for choice in value["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            texts[index] += choice["text"].as_str().unwrap();
        }
        usage = value["usage"].clone();
    }
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(whole["choices"][index]["text"], *text);
    }
    assert_eq!(usage["total_tokens"], whole["usage"]["total_tokens"]);
}

#[test]
fn a_text_is_scored_by_echo_without_a_new_token() {
    let server = server();
    let body = json!({ "prompt": "over the river", "max_tokens": 0, "echo": true, "logprobs": 1 });
    let value = server.post("/v1/completions", &body);
    let logprobs = &value["choices"][0]["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!(value["choices"][0]["text"], "over the river");
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), tokens.len());
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert!(logprobs["token_logprobs"][1].as_f64().unwrap() < 0.0);
    assert_eq!(logprobs["top_logprobs"][1].as_object().unwrap().len(), 1);
}

#[test]
fn a_chat_is_answered_with_its_reasoning_apart() {
    let server = server();
    let body = json!({
        "model": "small",
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "hi" }] }],
        "max_completion_tokens": 10, "seed": 1, "logprobs": true, "top_logprobs": 2,
        "chat_template_kwargs": { "enable_thinking": true },
    });
    let value = server.post("/v1/chat/completions", &body);
    let message = &value["choices"][0]["message"];
    assert_eq!(message["content"], "");
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    assert!(!message["reasoning"].as_str().unwrap().is_empty());
    assert_eq!(value["choices"][0]["finish_reason"], "length");
    let scores = value["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(scores.len(), 10);
    assert_eq!(scores[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = server.events("/v1/chat/completions", &streamed);
    let mut text = String::new();
    for event in &events[..events.len() - 1] {
        let value: Value = serde_json::from_str(event).unwrap();
        text += value["choices"][0]["delta"]["reasoning_content"].as_str().unwrap_or_default();
    }
    assert_eq!(text.trim(), message["reasoning"].as_str().unwrap());
}

#[test]
fn stop_texts_and_biases_are_obeyed() {
    let server = server();
    let body = json!({ "prompt": "x", "max_tokens": 30, "temperature": 0, "seed": 1 });
    let free = server.post("/v1/completions", &body)["choices"][0]["text"].clone();
    let letters: Vec<char> = free.as_str().unwrap().chars().collect();
    let stop: String = letters[letters.len() / 2..].iter().take(2).collect();
    let mut stopped = body.clone();
    stopped["stop"] = json!([stop]);
    let value = server.post("/v1/completions", &stopped);
    let text = value["choices"][0]["text"].as_str().unwrap();
    assert!(free.as_str().unwrap().starts_with(text) && !text.contains(&stop));
    assert_eq!(value["choices"][0]["finish_reason"], "stop");
    assert_eq!(value["choices"][0]["stop_reason"], stop);
    let mut biased = body;
    biased["logit_bias"] = json!({ "65": 100 });
    biased["logprobs"] = 0.into();
    let value = server.post("/v1/completions", &biased);
    let tokens = value["choices"][0]["logprobs"]["tokens"].as_array().unwrap().clone();
    assert!(tokens.iter().all(|token| *token == tokens[0]), "{tokens:?}");
}

#[test]
fn what_is_wrong_is_named() {
    let server = server();
    let chat = "/v1/chat/completions";
    let hi = json!([{ "role": "user", "content": "hi" }]);
    let cases = [
        (chat, json!([]), 400, Value::Null),
        (chat, json!({}), 400, "messages".into()),
        (chat, json!({ "messages": [] }), 400, "messages".into()),
        (chat, json!({ "messages": [{ "role": "x" }] }), 400, "messages[0].role".into()),
        (chat, json!({ "messages": hi, "temperature": "hot" }), 400, "temperature".into()),
        (chat, json!({ "messages": hi, "top_p": 2 }), 400, "top_p".into()),
        (chat, json!({ "messages": hi, "n": 0 }), 400, "n".into()),
        (chat, json!({ "messages": hi, "model": "x" }), 404, "model".into()),
        (chat, json!({ "messages": hi, "logit_bias": { "x": 1 } }), 400, "logit_bias.x".into()),
        (chat, json!({ "messages": hi, "tools": [{}] }), 400, "tools[0].function".into()),
        (
            chat,
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            400,
            "messages[0].content[0].type".into(),
        ),
        ("/v1/completions", json!({ "prompt": [1, 9000] }), 400, "prompt[1]".into()),
        ("/v1/completions", json!({ "prompt": [] }), 400, "prompt".into()),
        ("/v1/completions", json!({ "prompt": "x".repeat(2000) }), 400, "prompt".into()),
        ("/tokenize", json!({ "prompt": 1 }), 400, "prompt".into()),
    ];
    for (path, body, status, param) in cases {
        let (got, error) = server.fails(path, &body);
        assert_eq!((got, &error["param"]), (status, &param), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    assert_eq!(server.ask("POST", chat, &[], "{").0, 400);
    assert_eq!(server.get(chat).0, 405);
    assert_eq!(server.get("/v2").0, 404);
}

#[test]
fn keys_and_sizes_are_checked() {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let server = small.server_with(pool, vec!["secret".to_owned()], limits);
    assert_eq!(server.get("/v1/models").0, 401);
    assert_eq!(server.ask("GET", "/v1/models", &["authorization: Bearer secre"], "").0, 401);
    assert_eq!(server.ask("GET", "/v1/models", &["authorization: Bearer secret"], "").0, 200);
    assert_eq!(server.ask("GET", "/v1/models", &["x-api-key: secret"], "").0, 200);
    assert_eq!(server.get("/health").0, 200);
    let long = json!({ "prompt": "x".repeat(2000) }).to_string();
    let key = ["authorization: Bearer secret"];
    assert_eq!(server.ask("POST", "/v1/completions", &key, &long).0, 413);
}

#[test]
fn clients_that_leave_mid_stream_give_every_block_back() {
    let server = server();
    let body = json!({ "prompt": "A bridge", "max_tokens": 240, "stream": true }).to_string();
    for _ in 0..30 {
        let mut stream = server.send("POST", "/v1/completions", &[], &body);
        let mut some = [0_u8; 300];
        std::io::Read::read(&mut stream, &mut some).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.metric("vllm:kv_cache_usage_perc") > 0.0 {
        assert!(Instant::now() < deadline, "blocks are still in use");
    }
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);
}

#[test]
fn a_server_told_to_stop_answers_what_runs() {
    let mut server = server();
    let body = json!({ "prompt": "A bridge", "max_tokens": 200, "stream": true }).to_string();
    let mut stream = server.send("POST", "/v1/completions", &[], &body);
    let mut first = [0_u8; 1];
    std::io::Read::read_exact(&mut stream, &mut first).unwrap();
    server.stop.send(()).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stream, &mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    server.thread.take().unwrap().join().unwrap();
}

#[test]
fn answers_match_the_schema_expression_or_choice_asked_for() {
    let server = server();
    let schema = json!({
        "type": "object",
        "properties": { "answer": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["answer"], "additionalProperties": false,
    });
    let ask = |extra: Value| {
        let mut body = json!({
            "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 200, "seed": 3,
        });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let value = server.post("/v1/chat/completions", &body);
        assert_eq!(value["choices"][0]["finish_reason"], "stop", "{value}");
        value["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
    let text = ask(json!({ "response_format": format }));
    let value: Value = serde_json::from_str(&text).unwrap();
    assert!((0..=99).contains(&value["answer"].as_i64().unwrap()), "{text}");
    let text = ask(json!({ "guided_regex": "[a-c]{3}-[0-9]{2}" }));
    assert!(text.len() == 6 && text.as_bytes()[3] == b'-', "{text}");
    let text = ask(json!({ "structured_outputs": { "choice": ["north", "south"] } }));
    assert!(["north", "south"].contains(&text.as_str()), "{text}");
    let bad = json!({ "messages": [{ "role": "user", "content": "x" }], "guided_regex": "[" });
    let (status, error) = server.fails("/v1/chat/completions", &bad);
    assert_eq!((status, &error["param"]), (400, &"response_format".into()), "{error}");
}

#[test]
fn a_required_tool_is_called_with_fitting_arguments() {
    let server = server();
    let schema = json!({
        "type": "object", "properties": { "north": { "type": "boolean" } },
        "required": ["north"], "additionalProperties": false,
    });
    let tool = json!({ "type": "function", "function": { "name": "go", "parameters": schema } });
    let body = json!({
        "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 200, "seed": 3,
        "tools": [tool], "tool_choice": "required",
    });
    let value = server.post("/v1/chat/completions", &body);
    assert_eq!(value["choices"][0]["finish_reason"], "tool_calls", "{value}");
    let call = &value["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "go");
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["north"].is_boolean());
    let asked = json!({
        "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 200, "seed": 3,
        "tools": [{ "name": "go", "input_schema": schema }], "tool_choice": { "type": "any" },
    });
    let value = server.post("/v1/messages", &asked);
    assert_eq!(value["stop_reason"], "tool_use", "{value}");
    assert_eq!(value["content"][0]["name"], "go");
}

#[test]
fn messages_are_answered_whole_and_streamed_and_counted() {
    let server = server();
    let body = json!({
        "system": "Be brief.", "max_tokens": 9, "seed": 2,
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "hi" }] }],
    });
    let value = server.post("/v1/messages", &body);
    assert_eq!(value["stop_reason"], "max_tokens");
    assert_eq!(value["usage"]["output_tokens"], 9);
    let count = server.post("/v1/messages/count_tokens", &body);
    let used = |key: &str| value["usage"][key].as_u64().unwrap();
    let prompt = used("input_tokens") + used("cache_read_input_tokens");
    assert_eq!(count["input_tokens"], prompt);
    let mut streamed = body;
    streamed["stream"] = true.into();
    let mut text = String::new();
    for event in server.events("/v1/messages", &streamed) {
        let event: Value = serde_json::from_str(&event).unwrap();
        text += event["delta"]["text"].as_str().unwrap_or_default();
    }
    assert_eq!(value["content"][0]["text"], text);
    let (status, error) = server.fails("/v1/messages", &json!({ "messages": [] }));
    assert_eq!((status, &error["param"]), (400, &"max_tokens".into()));
}

#[test]
fn embeddings_have_unit_length_and_do_not_depend_on_their_neighbours() {
    let server = server();
    let long = "a bridge over the river ".repeat(6);
    let both = server.post("/v1/embeddings", &json!({ "input": ["a boat", long] }));
    let one = server.post("/v1/embeddings", &json!({ "input": "a boat" }));
    assert_eq!(both["data"][0]["embedding"], one["data"][0]["embedding"]);
    let values = one["data"][0]["embedding"].as_array().unwrap();
    let length: f64 = values.iter().map(|value| value.as_f64().unwrap().powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-3, "{length}");
}

#[test]
fn the_chat_page_is_there() {
    let (status, text) = server().get("/");
    assert_eq!(status, 200);
    assert!(text.contains("/v1/chat/completions"));
}

#[test]
fn responses_are_streamed_kept_continued_and_cancelled() {
    let server = server();
    let body = json!({ "input": "hi", "max_output_tokens": 8, "seed": 4, "instructions": "Go." });
    let value = server.post("/v1/responses", &body);
    assert_eq!(value["status"], "incomplete");
    assert_eq!(value["incomplete_details"]["reason"], "max_output_tokens");
    let id = value["id"].as_str().unwrap();
    let (_, text) = server.get(&format!("/v1/responses/{id}"));
    let kept: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(kept, value);
    let next = json!({ "input": "more", "previous_response_id": id, "max_output_tokens": 4 });
    let longer = server.post("/v1/responses", &next);
    let used = |value: &Value| value["usage"]["input_tokens"].as_u64().unwrap();
    assert!(used(&longer) > used(&value));
    let mut streamed = body;
    streamed["stream"] = true.into();
    let mut text = String::new();
    let mut last = Value::Null;
    for (at, event) in server.events("/v1/responses", &streamed).iter().enumerate() {
        let event: Value = serde_json::from_str(event).unwrap();
        assert_eq!(event["sequence_number"], at);
        if event["type"] == "response.output_text.delta" {
            text += event["delta"].as_str().unwrap();
        }
        last = event;
    }
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(value["output"][0]["content"][0]["text"], text);
    let long = json!({ "input": "hi", "background": true });
    let begun = server.post("/v1/responses", &long);
    assert_eq!(begun["status"], "in_progress");
    let id = begun["id"].as_str().unwrap();
    let cancelled = server.post(&format!("/v1/responses/{id}/cancel"), &json!({}));
    assert!(["cancelled", "incomplete"].contains(&cancelled["status"].as_str().unwrap()));
    let (status, error) = server.fails("/v1/responses", &json!({ "input": [{ "role": "x" }] }));
    assert_eq!((status, &error["param"]), (400, &"input[0].role".into()), "{error}");
    assert_eq!(server.get("/v1/responses/resp-0").0, 404);
}

#[test]
fn the_openapi_document_names_every_endpoint() {
    let (_, text) = server().get("/openapi.json");
    let document: Value = serde_json::from_str(&text).unwrap();
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"] {
        assert!(document["paths"][path]["post"].is_object(), "{path}");
    }
}

#[test]
fn a_stream_goes_on_byte_for_byte_when_its_device_dies() {
    let small = Small::new();
    let faults = Faults::none();
    let pool = small.pool(&["a", "b"], small.options(), &faults);
    let server = small.server(pool);
    let body = json!({
        "prompt": "A bridge", "max_tokens": 60, "seed": 9, "frequency_penalty": 0.3,
        "logprobs": 2, "guided_regex": "[a-z ]{200}", "stream": true,
    });
    let told = |events: Vec<String>| -> Vec<Value> {
        let value = |event: &String| serde_json::from_str::<Value>(event).ok();
        let choices = |value: Value| value["choices"].clone();
        events.iter().filter_map(value).map(choices).collect()
    };
    let undisturbed = told(server.events("/v1/completions", &body));
    assert!(undisturbed.len() >= 60);
    for device in ["a", "b"] {
        faults.set(device, 20, Failure::Error);
        faults.set(device, 50, Failure::Panic);
    }
    for _ in 0..4 {
        assert_eq!(told(server.events("/v1/completions", &body)), undisturbed);
    }
    assert!(server.metric("pontoon:request_moved_total") > 0.0);
}

/// The parts of a streamed chat's call: its name and the pieces of its arguments.
fn streamed_call(events: &[String]) -> (String, Vec<String>) {
    let (mut name, mut pieces) = (String::new(), Vec::new());
    for event in events {
        let Ok(value) = serde_json::from_str::<Value>(event) else { continue };
        let function = &value["choices"][0]["delta"]["tool_calls"][0]["function"];
        name += function["name"].as_str().unwrap_or_default();
        pieces.extend(function["arguments"].as_str().map(str::to_owned));
    }
    (name, pieces)
}

#[test]
fn a_calls_arguments_are_streamed_as_they_are_written() {
    let server = server();
    let schema = json!({ "type": "object", "properties": {
        "north": { "type": "boolean" }, "steps": { "type": "integer", "maximum": 9999 },
    }, "required": ["north", "steps"], "additionalProperties": false });
    let mut body = json!({
        "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 200, "seed": 3,
        "tools": [{ "type": "function", "function": { "name": "go", "parameters": schema } }],
        "tool_choice": { "type": "function", "function": { "name": "go" } },
    });
    let whole = server.post("/v1/chat/completions", &body);
    let call = whole["choices"][0]["message"]["tool_calls"][0]["function"].clone();
    body["stream"] = true.into();
    let (name, pieces) = streamed_call(&server.events("/v1/chat/completions", &body));
    assert_eq!(name, "go");
    assert_eq!(pieces.concat(), call["arguments"].as_str().unwrap());
    assert!(pieces.len() > 3, "{pieces:?}");
}

#[test]
fn a_server_that_stops_says_so_until_what_runs_has_ended() {
    let (small, faults) = (Small::new(), Faults::none());
    let mut server = small.server(small.pool(&["a"], small.options(), &faults));
    // What runs cannot end before the test has asked: its device is held after a few tokens.
    faults.set("a", 20, Failure::Hold);
    let body = json!({ "prompt": "A bridge", "max_tokens": 400, "stream": true }).to_string();
    let mut stream = server.send("POST", "/v1/completions", &[], &body);
    let mut first = [0_u8; 1];
    std::io::Read::read_exact(&mut stream, &mut first).unwrap();
    assert_eq!(server.get("/ready").0, 200);
    server.stop.send(()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.get("/ready").0 != 503 {
        assert!(Instant::now() < deadline, "it does not say that it stops");
    }
    assert_eq!(server.get("/health").0, 200);
    let (status, error) = server.fails("/v1/completions", &json!({ "prompt": "x" }));
    assert_eq!((status, &error["code"]), (503, &"stopping".into()));
    faults.release();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut stream, &mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    server.thread.take().unwrap().join().unwrap();
}

#[test]
fn requests_beyond_the_limits_of_number_and_time_are_refused() {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let limits = Limits { requests: 1, ..Limits::default() };
    let server = small.server_with(pool, Vec::new(), limits);
    // The longest answer there is: its client leaves before it ends.
    let mut body = json!({ "prompt": "A bridge", "max_tokens": 500, "n": 64, "stream": true });
    let mut stream = server.send("POST", "/v1/completions", &[], &body.to_string());
    let mut first = [0_u8; 1];
    std::io::Read::read_exact(&mut stream, &mut first).unwrap();
    let (status, error) = server.fails("/v1/completions", &json!({ "prompt": "x" }));
    assert_eq!((status, &error["type"]), (429, &"rate_limit_error".into()));
    drop(stream);
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    let limits = Limits { answer_time: Duration::from_millis(50), ..Limits::default() };
    let server = small.server_with(pool, Vec::new(), limits);
    let events = server.events("/v1/completions", &body);
    let error: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(error["error"]["code"], "timeout", "{error}");
    assert_eq!(events.last().unwrap(), "[DONE]");
    body["stream"] = false.into();
    let (status, error) = server.fails("/v1/completions", &body);
    assert_eq!((status, &error["code"]), (504, &"timeout".into()));
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.metric("vllm:kv_cache_usage_perc") > 0.0 {
        assert!(Instant::now() < deadline, "blocks are still in use");
    }
}

#[test]
fn browsers_of_other_origins_are_let_in_only_if_named() {
    let hello = ["origin: https://example.org"];
    let (head, _) = server().head("GET", "/v1/models", &hello);
    assert!(!head.contains("access-control"), "{head}");
    let small = Small { cors_origins: vec!["https://example.org".to_owned()], ..Small::new() };
    let server = small.server(small.pool(&["a"], small.options(), &Faults::none()));
    let (head, _) = server.head("GET", "/v1/models", &hello);
    assert!(head.contains("access-control-allow-origin: https://example.org"), "{head}");
    let (head, status) = server.head("OPTIONS", "/v1/chat/completions", &hello);
    assert!(status == 204 && head.contains("access-control-allow-headers"), "{head}");
    let (head, _) = server.head("GET", "/v1/models", &["origin: https://other.org"]);
    assert!(!head.contains("access-control"), "{head}");
}

#[test]
fn metrics_have_the_names_that_dashboards_know() {
    let server = server();
    // Drawn tokens end a text early now and then.
    let body = json!({ "prompt": "A bridge", "max_tokens": 9, "n": 2, "ignore_eos": true });
    let value = server.post("/v1/completions", &body);
    assert_eq!(server.metric("vllm:generation_tokens_total"), 18.0);
    assert_eq!(server.metric("vllm:request_success_total"), 2.0);
    let prompt = value["usage"]["prompt_tokens"].as_f64().unwrap();
    assert_eq!(server.metric("vllm:request_prompt_tokens_sum"), prompt);
    assert_eq!(server.metric("vllm:request_generation_tokens_sum"), 18.0);
    assert_eq!(server.metric("vllm:inter_token_latency_seconds_count"), 16.0);
    for name in ["time_to_first_token", "e2e_request_latency", "request_queue_time"] {
        assert_eq!(server.metric(&format!("vllm:{name}_seconds_count")), 1.0, "{name}");
    }
    let (_, page) = server.get("/metrics");
    assert!(page.contains("vllm:num_requests_running{model_name=\"small\",engine=\"0\""), "{page}");
}

#[test]
fn what_contradicts_itself_is_refused() {
    let server = server();
    let hi = json!([{ "role": "user", "content": "hi" }]);
    let chat = "/v1/chat/completions";
    let cases = [
        (chat, json!({ "messages": hi, "top_logprobs": 2 }), "logprobs"),
        (chat, json!({ "messages": hi, "stream_options": {} }), "stream_options"),
        (chat, json!({ "messages": hi, "user": 1 }), "user"),
        ("/v1/completions", json!({ "prompt": vec!["x"; 1000], "n": 2 }), "n"),
        ("/v1/responses", json!({ "input": "x", "background": true, "stream": true }), "stream"),
        ("/v1/responses", json!({ "input": "x", "background": true, "store": false }), "store"),
    ];
    for (path, body, param) in cases {
        let (status, error) = server.fails(path, &body);
        assert_eq!((status, &error["param"]), (400, &param.into()), "{body}: {error}");
    }
}

#[test]
fn a_response_tells_what_it_was_asked() {
    let server = server();
    let message = json!({ "role": "user", "content": "hi" });
    let body = json!({ "input": [message], "max_output_tokens": 2 });
    let value = server.post("/v1/responses", &body);
    let id = value["id"].as_str().unwrap();
    let (_, text) = server.get(&format!("/v1/responses/{id}/input_items"));
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["data"][0]["content"][0]["text"], "hi");
    assert_eq!(list["first_id"], list["data"][0]["id"]);
}
