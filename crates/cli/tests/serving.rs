//! `pontoon serve` as a process: real clients, keys, and a clean end on SIGTERM.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{json, pontoon, prepared, succeed};

/// What the client script exits with if its package is missing.
const MISSING: i32 = 77;
/// A template that shows roles, tools and whether to think.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}\
                        {% for message in messages %}{{ message.role }}: {{ message.content }}\n\
                        {% endfor %}assistant: {% if enable_thinking %}<think>\n{% endif %}";

/// A server that is killed if a test fails.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(folder: &Path, more: &[&str]) -> Serving {
        let arguments = [&["serve", "model", "--port", "0"], more].concat();
        let mut child = pontoon(folder, &arguments).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the server says where it listens").unwrap();
            if let Some(address) = line.strip_prefix("listening on ") {
                break address.to_owned();
            }
        };
        // What else it says is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Serving { child, address }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with a model of a million parameters after one step of training.
fn model() -> tempfile::TempDir {
    let folder = prepared();
    let path = folder.path();
    let trained = json(path, &["train", "run.toml", "--dir", "run", "--steps", "1", "--json"]);
    assert_eq!(trained["steps"], 1);
    succeed(path, &["export", "run", "model"]);
    std::fs::write(path.join("model/chat_template.jinja"), TEMPLATE).unwrap();
    std::fs::write(path.join("keys"), "secret\n").unwrap();
    folder
}

/// What `.ci/run` installs the clients into.
fn installed(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv").join(path)
}

/// The script of a client.
fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/clients").join(name)
}

/// A Python client: by the installed Python, or by what PATH has.
fn python(name: &str) -> Command {
    let own = installed("bin/python");
    let mut command = Command::new(if own.is_file() { own } else { PathBuf::from("python3") });
    command.arg(script(name));
    command
}

/// Runs a client against a server; it must be content, or its package missing.
fn content(mut client: Command, serving: &Serving, name: &str) {
    client.env("BASE_URL", &serving.address).env("MODEL", "model");
    match client.output() {
        Ok(output) if output.status.code() == Some(MISSING) => {
            eprintln!("skipped: {name}: its package is missing; .ci/run installs it into .venv");
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {said}{errors}");
        }
        Err(error) => eprintln!("skipped: {name}: cannot be started ({error})"),
    }
}

const KEYS: [&str; 2] = ["--api-key-file", "keys"];

#[test]
fn clients_of_openai_and_anthropic_work_and_the_server_ends_on_sigterm() {
    let folder = model();
    let events = ["--events", "events.jsonl", "--audit", "0.5", "--dtype", "f32"];
    let devices = ["--device", "cpu:threads=1", "--device", "cpu:threads=1"];
    let mut serving =
        Serving::start(folder.path(), &[&KEYS[..], &events[..], &devices[..]].concat());
    content(python("openai_client.py"), &serving, "openai for Python");
    content(python("anthropic_client.py"), &serving, "anthropic");
    let mut node = Command::new("node");
    node.arg(script("openai_client.mjs")).env("NODE_PACKAGES", installed("node"));
    content(node, &serving, "openai for Node");
    let pid = serving.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = serving.child.wait().unwrap();
    assert!(status.success(), "{status}");
    // Both devices have joined, and none of them was found to lie.
    let events = std::fs::read_to_string(folder.path().join("events.jsonl")).unwrap();
    let kinds: Vec<String> = events
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["kind"].to_string())
        .collect();
    assert_eq!(kinds, ["\"joined\"", "\"joined\""], "{events}");
}

#[test]
fn lm_eval_reads_the_log_likelihoods_that_score_gives() {
    let folder = model();
    let path = folder.path();
    let scored = |text: &str| {
        std::fs::write(path.join("text"), text).unwrap();
        json(path, &["score", "model", "--text", "text", "--dtype", "f32", "--json"])
    };
    let case = |context: &str, continuation: &str| {
        let count = scored(context)["tokens"].as_array().unwrap().len();
        let all = scored(&format!("{context}{continuation}"));
        let logprobs = &all["logprobs"].as_array().unwrap()[count..];
        serde_json::json!({
            "context": context, "continuation": continuation, "logprobs": logprobs,
        })
    };
    let cases = [
        case("The bridge over", " the river stands"),
        case("One and one is", " two, and three"),
        case("A boat", " sinks: 橋!"),
    ];
    let expected = path.join("expected.json");
    std::fs::write(&expected, serde_json::Value::from(cases.to_vec()).to_string()).unwrap();
    let serving = Serving::start(path, &[&KEYS[..], &["--dtype", "f32"]].concat());
    let mut client = python("lm_eval_client.py");
    client.env("EXPECTED", &expected);
    content(client, &serving, "lm-eval");
}

#[test]
fn schemathesis_finds_nothing_wrong_with_the_openapi_document() {
    let folder = model();
    // Answers end soon where the context is short.
    let serving = Serving::start(folder.path(), &[&KEYS[..], &["--context", "96"]].concat());
    let mut client = Command::new(script("schemathesis.sh"));
    let own = installed("bin/schemathesis");
    if own.is_file() {
        client.env("SCHEMATHESIS", own);
    }
    client.current_dir(folder.path());
    content(client, &serving, "schemathesis");
}
