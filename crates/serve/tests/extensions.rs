//! What clients written for other servers ask beyond OpenAI's API: scores of prompts, one call at
//! most, budgets of thinking, messages to be continued.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use common::{Faults, Server, Small};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn server() -> Server {
    let small = Small::new();
    let pool = small.pool(&["a"], small.options(), &Faults::none());
    small.server(pool)
}

fn hi() -> Value {
    json!([{ "role": "user", "content": "hi" }])
}

/// A request with more fields.
fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Lets the model write two calls of a tool, which it would not do by itself.
fn two_calls() -> Value {
    let call = r#"<tool_call>\{"name": "go", "arguments": \{"north": (true|false)\}\}</tool_call>"#;
    json!({ "guided_regex": format!("({call}){{2}}"), "seed": 3 })
}

#[test]
fn one_call_at_most_is_made_where_calls_in_parallel_are_declined() {
    let server = server();
    let schema = json!({ "type": "object", "properties": { "north": { "type": "boolean" } } });
    let tools = json!([{ "type": "function", "function": { "name": "go", "parameters": schema } }]);
    let body = json!({ "messages": hi(), "max_tokens": 300, "tools": tools });
    let body = with(body, two_calls());
    let (both, alone) = (server.post(CHAT, &body), json!({ "parallel_tool_calls": false }));
    let calls = |value: &Value| value["choices"][0]["message"]["tool_calls"].clone();
    assert_eq!(calls(&both).as_array().unwrap().len(), 2, "{both}");
    let one = server.post(CHAT, &with(body.clone(), alone.clone()));
    assert_eq!(calls(&one).as_array().unwrap().len(), 1, "{one}");
    assert_eq!(calls(&one)[0]["function"], calls(&both)[0]["function"]);
    assert_eq!(one["choices"][0]["finish_reason"], "tool_calls");
    let used = |value: &Value| value["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(used(&one) < used(&both));
    let streamed = with(with(body, alone.clone()), json!({ "stream": true }));
    let events = server.events(CHAT, &streamed);
    assert!(events.iter().any(|event| event.contains("\"index\":0,\"id\":\"call")), "{events:?}");
    assert!(!events.iter().any(|event| event.contains("\"index\":1")), "{events:?}");
    assert!(events[events.len() - 2].contains("tool_calls"), "{events:?}");

    let own = json!([{ "type": "function", "name": "go", "parameters": schema }]);
    let body = json!({ "input": "hi", "max_output_tokens": 300, "tools": own });
    let value = server.post("/v1/responses", &with(with(body, two_calls()), alone));
    let called = |item: &&Value| item["type"] == "function_call";
    assert_eq!(value["output"].as_array().unwrap().iter().filter(called).count(), 1, "{value}");
    assert_eq!(
        (&value["status"], &value["parallel_tool_calls"]),
        (&"completed".into(), &false.into())
    );

    let choice = json!({ "type": "auto", "disable_parallel_tool_use": true });
    let own = json!([{ "name": "go", "input_schema": schema }]);
    let body = json!({ "messages": hi(), "max_tokens": 300, "tools": own, "tool_choice": choice });
    let value = server.post("/v1/messages", &with(body, two_calls()));
    let called = |item: &&Value| item["type"] == "tool_use";
    assert_eq!(value["content"].as_array().unwrap().iter().filter(called).count(), 1, "{value}");
    assert_eq!(value["stop_reason"], "tool_use");
}

#[test]
fn a_prompts_scores_are_those_of_its_echo_and_by_token_id() {
    let server = server();
    let ids = server.post("/tokenize", &json!({ "prompt": "A bridge of boats" }))["tokens"].clone();
    let echo = json!({ "prompt": ids, "max_tokens": 2, "echo": true, "logprobs": 1, "seed": 1 });
    let echoed = server.post("/v1/completions", &echo)["choices"][0]["logprobs"].clone();
    for (prompt, top) in [(json!("A bridge of boats"), 0), (ids.clone(), 2)] {
        let body = json!({ "prompt": prompt, "max_tokens": 2, "prompt_logprobs": top, "n": 2 });
        let value = server.post("/v1/completions", &body);
        let told = &value["choices"][0]["prompt_logprobs"];
        assert_eq!(told, &value["choices"][1]["prompt_logprobs"]);
        assert!(value["choices"][0]["logprobs"].is_null());
        let told = told.as_array().unwrap();
        assert_eq!(told.len(), ids.as_array().unwrap().len());
        assert_eq!(told[0], Value::Null);
        for (at, entries) in told.iter().enumerate().skip(1) {
            let entries = entries.as_object().unwrap();
            let own = &entries[&ids[at].to_string()];
            assert_eq!(own["logprob"], echoed["token_logprobs"][at], "{own}");
            assert_eq!(own["decoded_token"], echoed["tokens"][at]);
            let rank = own["rank"].as_u64().unwrap();
            assert!(rank >= 1);
            let beside = entries.values().filter(|entry| entry["rank"].as_u64().unwrap() <= top);
            assert_eq!(beside.count() as u64, top, "{entries:?}");
            assert_eq!(entries.len() as u64, top + u64::from(rank > top), "{entries:?}");
        }
    }
    // Beside an echo each keeps its own number of likeliest tokens.
    let both = server.post("/v1/completions", &with(echo, json!({ "prompt_logprobs": 3 })));
    assert_eq!(both["choices"][0]["logprobs"], echoed);
    let value = server.post(
        CHAT,
        &json!({
            "messages": hi(), "max_tokens": 2, "n": 2, "prompt_logprobs": 1,
        }),
    );
    let told = value["prompt_logprobs"].as_array().unwrap();
    assert_eq!(told.len() as u64, value["usage"]["prompt_tokens"].as_u64().unwrap());
    assert!(told[0].is_null() && told[1].is_object());
    for (path, key) in [(CHAT, "messages"), ("/v1/completions", "prompt")] {
        let given = if key == "prompt" { json!("x") } else { hi() };
        let body = json!({ key: given, "stream": true, "prompt_logprobs": 1 });
        let (status, error) = server.fails(path, &body);
        assert_eq!((status, &error["param"]), (400, &"prompt_logprobs".into()), "{error}");
    }
}

#[test]
fn a_budget_of_thinking_holds_although_its_end_is_no_single_token() {
    let server = server();
    let thinking = json!({ "messages": hi(), "seed": 5, "enable_thinking": true });
    for budget in [0, 4] {
        let more = json!({ "thinking_budget": budget, "max_tokens": 60 });
        let value = server.post(CHAT, &with(thinking.clone(), more));
        let message = &value["choices"][0]["message"];
        assert_eq!(message["reasoning"].is_null(), budget == 0, "{value}");
        assert!(!message["content"].as_str().unwrap().is_empty(), "{value}");
    }
    let more = json!({ "thinking_budget": 4, "max_tokens": 60, "guided_regex": "[a-c]{5}" });
    let value = server.post(CHAT, &with(thinking, more));
    let message = &value["choices"][0]["message"];
    let content = message["content"].as_str().unwrap();
    assert!(content.len() == 5 && content.chars().all(|c| "abc".contains(c)), "{value}");
    assert!(!message["reasoning"].as_str().unwrap().is_empty());
}

#[test]
fn the_last_message_can_be_continued() {
    let server = server();
    let messages = json!([hi()[0], { "role": "assistant", "content": "Sure, " }]);
    let text = |more: Value| {
        let body = with(json!({ "messages": messages }), more);
        let tokens = server.post("/tokenize", &body)["tokens"].clone();
        let text = server.post("/detokenize", &json!({ "tokens": tokens }))["prompt"].clone();
        text.as_str().unwrap().to_owned()
    };
    assert!(text(json!({})).ends_with("<assistant>Sure, \n<assistant>"));
    assert!(text(json!({ "add_generation_prompt": false })).ends_with("<assistant>Sure, \n"));
    assert!(text(json!({ "continue_final_message": true })).ends_with("<assistant>Sure,"));
    let both = json!({ "continue_final_message": true, "add_generation_prompt": true });
    let (status, error) = server.fails(CHAT, &with(json!({ "messages": messages }), both));
    assert_eq!((status, &error["param"]), (400, &"add_generation_prompt".into()));
    let body = json!({ "prompt": "A boat", "return_token_strs": true });
    let value = server.post("/tokenize", &body);
    let pieces = value["token_strs"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
    assert_eq!(pieces.collect::<String>(), "A boat");
}

#[test]
fn prompts_are_cut_at_their_front_if_asked_to_and_what_is_not_offered_is_refused() {
    let server = server();
    let body = json!({ "prompt": "x".repeat(2000), "max_tokens": 1, "truncate_prompt_tokens": 5 });
    assert_eq!(server.post("/v1/completions", &body)["usage"]["prompt_tokens"], 5);
    let body = json!({ "messages": hi(), "max_tokens": 1, "truncate_prompt_tokens": 3 });
    assert_eq!(server.post(CHAT, &body)["usage"]["prompt_tokens"], 3);
    let body = json!({ "prompt": "x".repeat(2000), "max_tokens": 9, "truncate_prompt_tokens": -1 });
    assert_eq!(server.post("/v1/completions", &body)["usage"]["completion_tokens"], 1);
    let refused = json!({ "use_beam_search": true, "bad_words": ["x"], "allowed_token_ids": [1] });
    for (key, value) in refused.as_object().unwrap() {
        let (status, error) = server.fails(CHAT, &json!({ "messages": hi(), key: value }));
        assert_eq!((status, &error["param"]), (400, &key.as_str().into()), "{error}");
    }
}

#[test]
fn streams_count_tokens_in_every_chunk_if_asked_to_and_say_which_stop_text_came() {
    let server = server();
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    for (path, key) in [(CHAT, "messages"), ("/v1/completions", "prompt")] {
        let given = if key == "prompt" { json!("x") } else { hi() };
        let body = json!({
            key: given, "stream": true, "stream_options": options, "max_tokens": 40,
            "guided_regex": "abcdefgh", "stop": ["de"],
        });
        let events = server.events(path, &body);
        let chunks: Vec<Value> =
            events.iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
        let counts: Vec<u64> = chunks
            .iter()
            .filter_map(|chunk| chunk["usage"]["completion_tokens"].as_u64())
            .collect();
        assert!(counts.len() > 2 && counts.is_sorted(), "{counts:?}");
        let choices = chunks.iter().map(|chunk| &chunk["choices"][0]);
        let text: String = choices
            .clone()
            .filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str()))
            .collect();
        assert_eq!(text, "abc");
        assert!(choices.clone().any(|choice| choice["stop_reason"] == "de"), "{events:?}");
    }
}

#[test]
fn devices_opened_alike_are_told_apart() {
    let small = Small::new();
    let server = small.server(small.pool(&["a", "a"], small.options(), &Faults::none()));
    let (_, text) = server.get("/health");
    let health: Value = serde_json::from_str(&text).unwrap();
    let names: Vec<&Value> =
        health["devices"].as_array().unwrap().iter().map(|device| &device["device"]).collect();
    assert_eq!(names, ["a", "a #2"]);
    let value = server.post("/v1/completions", &json!({ "prompt": "x", "max_tokens": 1 }));
    assert!(names.contains(&&value["device"]), "{value}");
    assert_eq!(server.get("/ping").0, 200);
    assert!(server.get("/version").1.contains(env!("CARGO_PKG_VERSION")));
}
