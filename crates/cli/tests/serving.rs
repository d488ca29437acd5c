//! `pontoon serve` as a process: real clients, keys, and a clean end on SIGTERM.

#![expect(clippy::unwrap_used, reason = "a test may fail loudly")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{json, pontoon, prepared, succeed};

/// What the client script exits with if its package is missing.
const MISSING: i32 = 77;
/// A template that shows roles only.
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\
                        {% endfor %}assistant: ";

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

/// The Python that has the clients: `.venv`, which `.ci/run` makes, or what PATH has.
fn python() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    if own.is_file() { own } else { PathBuf::from("python3") }
}

#[test]
fn the_openai_package_works_and_the_server_ends_on_sigterm() {
    let folder = model();
    let mut serving = Serving::start(folder.path(), &["--api-key-file", "keys", "--device", "cpu"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/clients/openai_client.py");
    let mut client = Command::new(python());
    client.arg(script).env("OPENAI_BASE_URL", format!("{}/v1", serving.address));
    match client.output() {
        Ok(output) if output.status.code() == Some(MISSING) => {
            eprintln!("skipped: Python has no `openai` package; .ci/run installs it into .venv");
        }
        Ok(output) => {
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{errors}");
        }
        Err(error) => eprintln!("skipped: there is no python3 here ({error})"),
    }
    let pid = serving.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = serving.child.wait().unwrap();
    assert!(status.success(), "{status}");
}
