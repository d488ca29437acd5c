//! A live run answers through the socket in its folder, and stops when it is asked to.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use common::{json, pontoon, prepared};
use serde_json::Value;

#[expect(clippy::unwrap_used, reason = "a test's helper may fail loudly too")]
fn ask(socket: &Path, request: &str) -> Value {
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) => std::thread::yield_now(),
        }
    };
    writeln!(stream, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn a_run_that_is_asked_to_stop_saves_its_state_first_and_goes_on_to_the_same_weights() {
    let folder = prepared();
    let folder = folder.path();
    let train = |dir| vec!["train", "run.toml", "--dir", dir, "--json", "--steps", "60"];
    let alone = &["--in-process"][..];
    let plain = json(folder, &[&train("plain")[..], alone].concat());
    for (dir, more) in [("alone", alone), ("fleet", &["--workers", "2"])] {
        let arguments = [&train(dir)[..], more].concat();
        let child = pontoon(folder, &arguments).stdout(Stdio::piped()).spawn().unwrap();
        let socket = folder.join(dir).join("control.sock");
        while ask(&socket, r#"{"do":"status"}"#)["step"].as_u64() < Some(2) {
            std::thread::yield_now();
        }
        let answer = ask(&socket, r#"{"do":"stop"}"#);
        let output = child.wait_with_output().unwrap();
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(answer["ok"], true, "{answer}");
        assert_eq!(answer["weights_blake3"], summary["weights_blake3"]);
        assert_eq!(summary["finished"], false, "{summary}");
        assert!(!socket.exists());
        let resumed = json(folder, &[&arguments[..], &["--resume"]].concat());
        assert_eq!(resumed["weights_blake3"], plain["weights_blake3"]);
    }
}
