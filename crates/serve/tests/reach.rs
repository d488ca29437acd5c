//! Hours of service in seconds: clients that vanish, and devices that are killed under mixed load.
//!
//! `PONTOON_VANISHING`, `PONTOON_SOAK_SECONDS`, `PONTOON_SOAK_KILL_SECONDS` and `PONTOON_SEED` make
//! it long; `benches/serve_reach.py` does.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use common::wire::Wire;
use common::{Failure, Faults, Server, Small, number, report};
use pontoon_ops::philox::Stream;
use pontoon_serve::engine::device::DeviceOptions;
use serde_json::{Value, json};

/// Clients at the same time.
const CLIENTS: u64 = 6;

fn quiet(server: &Server) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.metric("vllm:kv_cache_usage_perc") > 0.0
        || server.metric("vllm:num_requests_running") > 0.0
    {
        assert!(Instant::now() < deadline, "blocks are still in use");
        std::thread::yield_now();
    }
}

#[test]
fn clients_that_vanish_mid_stream_give_every_block_back() {
    let (count, seed) = (number("PONTOON_VANISHING", 80), number("PONTOON_SEED", 3));
    let small = Small::new();
    let server = small.server(small.pool(&["a", "b"], small.options(), &Faults::none()));
    let stream = Stream::new(seed, 1);
    let began = Instant::now();
    let one = |at: u64| {
        let prompt = format!("A bridge {}", at % 7);
        let chat = json!({ "messages": [{ "role": "user", "content": prompt }], "stream": true,
                           "max_tokens": 300, "n": 1 + at % 3 });
        let plain = json!({ "prompt": prompt, "max_tokens": 300, "stream": !at.is_multiple_of(4),
                            "logprobs": 2 });
        let (path, body) = match at % 2 {
            0 => ("/v1/completions", plain),
            _ => ("/v1/chat/completions", chat),
        };
        let mut socket = server.send("POST", path, &[], &body.to_string());
        // Some leave before the first byte, some in the middle of a piece.
        let mut some = vec![0_u8; stream.below(at, 4000) as usize];
        if !at.is_multiple_of(4) && !some.is_empty() {
            match socket.read_exact(&mut some) {
                Ok(()) => {}
                // The whole answer was shorter.
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof),
            }
        }
    };
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || (client..count).step_by(CLIENTS as usize).for_each(one));
        }
    });
    quiet(&server);
    let aborted = server.metric("vllm:request_success_total");
    assert_eq!(server.get("/ready").0, 200);
    report(&json!({
        "test": "clients that vanish", "clients": count, "seed": seed,
        "completions_ended_or_aborted": aborted, "blocks_in_use": 0,
        "seconds": began.elapsed().as_secs_f64(),
    }));
}

/// Requests of every kind, each with a seed of its own.
fn mixed() -> Vec<(&'static str, Value)> {
    let mut list = Vec::new();
    for seed in 0..4 {
        let hi = json!([{ "role": "user", "content": format!("hello {seed}") }]);
        let schema = json!({ "type": "object", "properties": { "a": { "type": "integer",
            "maximum": 99999 } }, "required": ["a"], "additionalProperties": false });
        let format = json!({ "type": "json_schema", "json_schema": { "schema": schema } });
        let tool = json!({ "type": "function",
                           "function": { "name": "go", "parameters": schema } });
        let completions = "/v1/completions";
        let chat = "/v1/chat/completions";
        list.extend([
            (
                completions,
                json!({ "prompt": "A bridge", "max_tokens": 60, "seed": seed,
                "logprobs": 2, "frequency_penalty": 0.4, "stream": true }),
            ),
            (
                completions,
                json!({ "prompt": ["A boat", "over the river"], "max_tokens": 20,
                "n": 2, "seed": seed, "top_k": 40, "repetition_penalty": 1.1 }),
            ),
            (
                completions,
                json!({ "prompt": "The whole text is scored", "max_tokens": 1,
                "echo": true, "logprobs": 1, "seed": seed }),
            ),
            (
                completions,
                json!({ "prompt": "x", "max_tokens": 50, "seed": seed,
                "guided_regex": "[a-z ]{60}", "stream": true }),
            ),
            (
                chat,
                json!({ "messages": hi, "max_tokens": 200, "seed": seed,
                "response_format": format, "stream": true }),
            ),
            (
                chat,
                json!({ "messages": hi, "max_tokens": 200, "seed": seed, "tools": [tool],
                "tool_choice": "required", "stream": true }),
            ),
            (
                chat,
                json!({ "messages": hi, "max_tokens": 40, "seed": seed, "n": 2,
                "thinking_budget": 9, "chat_template_kwargs": { "enable_thinking": true } }),
            ),
            ("/v1/messages", json!({ "messages": hi, "max_tokens": 30, "seed": seed })),
            ("/v1/responses", json!({ "input": "hi", "max_output_tokens": 30, "seed": seed })),
            ("/v1/embeddings", json!({ "input": format!("a text {seed}") })),
        ]);
    }
    list
}

/// What must not depend on where and when a request was answered.
fn essence(path: &str, answer: &str) -> Value {
    let of = |value: &Value| match path {
        "/v1/messages" => json!([value["content"], value["stop_reason"]]),
        "/v1/responses" => json!([value["output"][0]["content"], value["status"]]),
        "/v1/embeddings" => value["data"].clone(),
        _ => value["choices"].clone(),
    };
    // A stream that has to wait begins with a comment.
    let mut told = if answer.starts_with("data: ") || answer.starts_with(": ") {
        let events = answer.lines().filter_map(|line| line.strip_prefix("data: "));
        let whole: Vec<Value> = events
            .map(|event| match serde_json::from_str(event) {
                Ok(value) => of(&value),
                Err(_) => event.into(),
            })
            .collect();
        Value::from(whole)
    } else {
        serde_json::from_str(answer).map_or_else(|_| answer.into(), |value| of(&value))
    };
    strip_ids(&mut told);
    told
}

/// Takes names away that are new in every answer.
fn strip_ids(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("id");
            map.values_mut().for_each(strip_ids);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_ids),
        _ => {}
    }
}

/// What the clients of a soak have seen.
#[derive(Default)]
struct Seen {
    right: AtomicU64,
    failed: AtomicU64,
    wrong: AtomicU64,
    first_trouble: Mutex<Option<String>>,
    milliseconds: Mutex<Vec<u64>>,
}

impl Seen {
    fn ask(&self, wire: &mut Wire, (path, body): &(&str, Value), want: &Value) {
        let began = Instant::now();
        let answer = wire.post(path, body.to_string().as_bytes());
        let took = began.elapsed().as_millis() as u64;
        self.milliseconds.lock().unwrap().push(took);
        let (counter, trouble) = match answer {
            Ok((200, text)) if essence(path, &text) == *want => (&self.right, None),
            Ok((200, text)) => (&self.wrong, Some(format!("{path} {body}: {text}"))),
            Ok((status, text)) => (&self.failed, Some(format!("{path}: {status} {text}"))),
            Err(error) => (&self.failed, Some(format!("{path}: {error}"))),
        };
        counter.fetch_add(1, Relaxed);
        if let Some(trouble) = trouble {
            self.first_trouble.lock().unwrap().get_or_insert(trouble);
        }
    }

    fn percentile(&self, part: f64) -> u64 {
        let mut all = self.milliseconds.lock().unwrap();
        all.sort_unstable();
        let last = all.len().saturating_sub(1);
        all.get((last as f64 * part) as usize).copied().unwrap_or(0)
    }
}

#[test]
fn no_request_fails_or_is_answered_wrongly_while_devices_are_killed() {
    let seconds = number("PONTOON_SOAK_SECONDS", 5);
    let kill_every = Duration::from_secs(number("PONTOON_SOAK_KILL_SECONDS", 1));
    let seed = number("PONTOON_SEED", 5);
    let small = Small { audit_share: 0.1, ..Small::new() };
    let alone = small.server(small.pool(&["a"], small.options(), &Faults::none()));
    let requests = mixed();
    let mut wire = Wire::new(alone.address);
    let mut ask = |(path, body): &(&str, Value)| {
        let (status, text) = wire.post(path, body.to_string().as_bytes()).unwrap();
        assert_eq!(status, 200, "{text}");
        essence(path, &text)
    };
    let want: Vec<Value> = requests.iter().map(&mut ask).collect();
    // A long run shares its machine with others, and a step that waits for a core is no hang.
    let step_deadline = Duration::from_secs(if seconds > 60 { 25 } else { 4 });
    let options = DeviceOptions { step_deadline, ..small.options() };
    let (devices, faults) = (["a", "b", "c"], Faults::none());
    let server = small.server(small.pool(&devices, options, &faults));
    let (seen, stream) = (Seen::default(), Stream::new(seed, 9));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut kills = 0;
    std::thread::scope(|scope| {
        let (stop, stopped) = mpsc::channel::<()>();
        let (requests, want, seen, server, stream) = (&requests, &want, &seen, &server, &stream);
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut wire = Wire::new(server.address);
                for turn in 0.. {
                    if Instant::now() >= end {
                        return;
                    }
                    let at = stream.below(client << 32 | turn, requests.len() as u64) as usize;
                    seen.ask(&mut wire, &requests[at], &want[at]);
                }
            });
        }
        // Waits without sleeping: nobody sends anything.
        while stopped.recv_timeout(kill_every).is_err() && Instant::now() < end {
            faults.clear();
            let device = devices[stream.below(1 << 50 | kills, 3) as usize];
            let kinds = [Failure::Error, Failure::Panic, Failure::Hang];
            let failure = kinds[stream.below(1 << 51 | kills, 3) as usize];
            faults.set(device, stream.below(1 << 52 | kills, 40) as i64, failure);
            kills += 1;
        }
        drop(stop);
    });
    quiet(&server);
    let trouble = seen.first_trouble.lock().unwrap().clone();
    let counts = [&seen.right, &seen.failed, &seen.wrong].map(|counter| counter.load(Relaxed));
    report(&json!({
        "test": "mixed load with devices killed", "seconds": seconds, "seed": seed,
        "clients": CLIENTS, "devices": 3, "kills": kills, "right": counts[0],
        "failed": counts[1], "wrong": counts[2], "first_trouble": trouble,
        "failures_of_devices": server.metric("pontoon:device_failures_total"),
        "requests_moved": server.metric("pontoon:request_moved_total"),
        "audits_disagreed": server.pool.audits().disagreed.load(Relaxed),
        "audits_agreed": server.pool.audits().agreed.load(Relaxed),
        "milliseconds_p50": seen.percentile(0.5), "milliseconds_p99": seen.percentile(0.99),
        "milliseconds_worst": seen.percentile(1.0),
    }));
    assert_eq!((counts[1], counts[2]), (0, 0), "seed {seed}: {trouble:?}");
    assert!(counts[0] > 0 && server.pool.audits().disagreed.load(Relaxed) == 0);
}
