//! Snapshots in an S3-compatible store: a small one of ours, which can be damaged and go away.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::{json, pontoon, prepared};
use serde_json::Value;

/// What the store holds, by bucket and key, and whether it answers.
#[derive(Default)]
struct Objects {
    held: Mutex<BTreeMap<String, Vec<u8>>>,
    is_down: AtomicBool,
}

struct Store {
    objects: Arc<Objects>,
    endpoint: String,
}

#[expect(clippy::unwrap_used, reason = "a test's server may fail loudly too")]
impl Store {
    fn start() -> Store {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let objects = Arc::new(Objects::default());
        let of = Arc::clone(&objects);
        std::thread::spawn(move || {
            for caller in listener.incoming().flatten() {
                let of = Arc::clone(&of);
                std::thread::spawn(move || while answer(&caller, &of).is_some() {});
            }
        });
        Store { objects, endpoint }
    }

    fn names(&self) -> Vec<String> {
        self.objects.held.lock().unwrap().keys().cloned().collect()
    }

    /// Steps of whole snapshots.
    fn steps(&self) -> Vec<String> {
        let names = self.names();
        let whole = names.iter().filter_map(|name| name.strip_suffix("/state.json"));
        whole.map(|name| name.rsplit_once("step-").unwrap().1.to_owned()).collect()
    }

    fn pontoon(&self, folder: &Path, arguments: &[&str]) -> Command {
        let mut command = pontoon(folder, arguments);
        command
            .env("AWS_ENDPOINT", &self.endpoint)
            .env("AWS_ACCESS_KEY_ID", "someone")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .env("AWS_REGION", "nowhere");
        command
    }

    fn run(&self, folder: &Path, arguments: &[&str]) -> Output {
        self.pontoon(folder, arguments).output().unwrap()
    }

    fn train(&self, folder: &Path, arguments: &[&str]) -> Value {
        let output = self.run(folder, &[&["train"], arguments, &["--json"]].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

/// Answers one request; nothing once the caller is gone.
fn answer(mut caller: &TcpStream, of: &Objects) -> Option<()> {
    let mut reader = BufReader::new(caller);
    let mut first = String::new();
    reader.read_line(&mut first).ok().filter(|count| *count > 0)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim().to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let mut words = first.split_whitespace();
    let (method, target) = (words.next()?, words.next()?.to_owned());
    let (status, body) = match of.is_down.load(Ordering::Relaxed) {
        true => (503, Vec::new()),
        false => act(method, &target, body, of)?,
    };
    let head = format!(
        "HTTP/1.1 {status} x\r\ncontent-length: {}\r\netag: \"0\"\r\n\
         last-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n",
        body.len()
    );
    caller.write_all(&[head.as_bytes(), &body].concat()).ok()
}

fn act(method: &str, target: &str, body: Vec<u8>, of: &Objects) -> Option<(u32, Vec<u8>)> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let name = path.trim_start_matches('/').to_owned();
    let mut held = of.held.lock().ok()?;
    Some(match (method, query) {
        ("GET", query) if query.contains("list-type") => {
            let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix="));
            let prefix = prefix.unwrap_or_default().replace("%2F", "/");
            let bucket = name.trim_end_matches('/').to_owned() + "/";
            let below = bucket.clone() + &prefix;
            let list: String = held
                .iter()
                .filter(|(name, _)| name.starts_with(&below))
                .map(|(name, bytes)| {
                    format!(
                        "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z\
                         </LastModified><ETag>0</ETag><Size>{}</Size></Contents>",
                        &name[bucket.len()..],
                        bytes.len()
                    )
                })
                .collect();
            let text = format!(
                "<ListBucketResult><IsTruncated>false</IsTruncated>{list}</ListBucketResult>"
            );
            (200, text.into_bytes())
        }
        ("POST", "delete") => {
            let text = String::from_utf8(body).ok()?;
            let bucket = name.trim_end_matches('/').to_owned();
            let keys = text.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>"));
            let mut gone = String::new();
            for (key, _) in keys {
                held.remove(&format!("{bucket}/{key}"));
                gone += &format!("<Deleted><Key>{key}</Key></Deleted>");
            }
            (200, format!("<DeleteResult>{gone}</DeleteResult>").into_bytes())
        }
        ("PUT", _) => {
            held.insert(name, body);
            (200, Vec::new())
        }
        ("GET", _) => match held.get(&name) {
            Some(bytes) => (200, bytes.clone()),
            None => (404, b"<Error><Code>NoSuchKey</Code></Error>".to_vec()),
        },
        ("DELETE", _) => {
            held.remove(&name);
            (204, Vec::new())
        }
        _ => (501, Vec::new()),
    })
}

fn events(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("events.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

const TO: [&str; 2] = ["--set", "snapshot.to=\"s3://bucket/runs/one\""];
/// The rate of a step must not depend on how many are to come.
const CONSTANT: [&str; 2] = ["--set", "train.schedule=\"constant\""];

#[test]
fn a_run_keeps_its_snapshots_in_a_store_and_goes_on_from_there_past_a_damaged_one() {
    let folder = prepared();
    let folder = folder.path();
    let plain = ["train", "run.toml", "--dir", "plain", "--in-process", "--json"];
    let plain = json(folder, &[&plain[..], &CONSTANT[..]].concat());
    let store = Store::start();
    let arguments = ["run.toml", "--dir", "run", "--steps", "10"];
    let begun = store.train(folder, &[&arguments[..], &TO[..], &CONSTANT[..]].concat());
    assert_eq!(begun["steps"], 10);
    let steps = store.steps();
    // One that comes due while another is on its way is taken at a later step.
    assert!((2..=3).contains(&steps.len()) && steps.last().unwrap() == "00000010", "{steps:?}");
    let older: u64 = steps[steps.len() - 2].parse().unwrap();
    assert!(store.names().iter().all(|name| name.starts_with("bucket/runs/one/step-")));
    assert!(!folder.join("run/snapshots").exists());
    let status = json(folder, &["status", "run", "--json"]);
    assert_eq!((&status["state"], &status["snapshots"][0]), (&"finished".into(), &10.into()));
    for name in store.names().iter().filter(|name| name.contains("10/model.safetensors")) {
        let mut held = store.objects.held.lock().unwrap();
        let bytes = held.get_mut(name).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    }
    let run = store.train(folder, &["run", "--resume", "--steps", "16", "--workers", "2"]);
    assert_eq!(run["weights_blake3"], plain["weights_blake3"]);
    models_are_read_from_the_store(&store, folder);
    let events = events(&folder.join("run"));
    let passed = events.iter().find(|event| event["kind"] == "rolled_back").unwrap();
    let cause = passed["cause"].as_str().unwrap();
    assert!(cause.contains("step-00000010") && cause.contains("model.safetensors"), "{cause}");
    assert!(events.iter().any(|event| event["kind"] == "resumed" && event["step"] == older));
}

/// By the store's name, one snapshot's, and the run's; all are the model of the plain run.
#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn models_are_read_from_the_store(store: &Store, folder: &Path) {
    let text = |model: &str| {
        let output = store.run(folder, &["generate", model, "-p", "After", "-n", "6", "--json"]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{model}: {errors}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()["logprobs"].clone()
    };
    let plain = text("plain");
    let url = "s3://bucket/runs/one";
    for model in [url, "s3://bucket/runs/one/step-00000016", "run"] {
        assert_eq!(text(model), plain, "{model}");
    }
    let output = store.run(folder, &["export", url, "exported"]);
    assert!(output.status.success() && folder.join("exported/config.json").is_file());
    let refused = store.run(folder, &["generate", "s3://bucket/runs/two", "-p", "After"]);
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(errors.contains("no usable snapshot") && errors.lines().count() == 1, "{errors}");
}

#[test]
fn a_store_that_goes_away_does_not_stop_the_run_and_is_tried_again() {
    let folder = prepared();
    let folder = folder.path();
    let plain = json(
        folder,
        &["train", "run.toml", "--dir", "plain", "--in-process", "--json", "--steps", "120"],
    );
    let store = Store::start();
    store.objects.is_down.store(true, Ordering::Relaxed);
    let refused = store.run(folder, &[&["train", "run.toml", "--dir", "never"], &TO[..]].concat());
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text.contains("s3://bucket/runs/one") && text.contains("AWS_ENDPOINT"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    store.objects.is_down.store(false, Ordering::Relaxed);
    let arguments = ["train", "run.toml", "--dir", "run", "--json", "--steps", "120"];
    let mut command = store.pontoon(folder, &[&arguments, &TO[..]].concat());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let run = folder.join("run");
    let seen = |kind: &str| events(&run).iter().any(|event| event["kind"] == kind);
    while !seen("snapshot") {
        std::thread::yield_now();
    }
    store.objects.is_down.store(true, Ordering::Relaxed);
    while !seen("snapshot_failed") {
        std::thread::yield_now();
    }
    store.objects.is_down.store(false, Ordering::Relaxed);
    let output = child.wait_with_output().unwrap();
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["weights_blake3"], plain["weights_blake3"]);
    assert_eq!(store.steps().last().unwrap(), "00000120");
}
