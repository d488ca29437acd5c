//! What the tests of the program share: running it, and a small corpus of our own.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The program with arguments, in a folder.
pub fn pontoon(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pontoon"));
    command.current_dir(folder).args(arguments).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn output(folder: &Path, arguments: &[&str]) -> Output {
    pontoon(folder, arguments).output().unwrap()
}

/// Runs it, expects success, and returns stdout.
pub fn succeed(folder: &Path, arguments: &[&str]) -> String {
    let output = output(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs it, expects success, and returns the JSON object it prints.
pub fn json(folder: &Path, arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(&succeed(folder, arguments)).unwrap()
}

/// Sentences of numbers in words: text that has something to learn.
pub fn corpus() -> String {
    let words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
    let sentence = |n: usize| {
        let (a, b) = (n % 10, n / 10 % 10);
        format!(
            "After {} and {} comes the number {}{b}.\n",
            words[a],
            words[b],
            words[(a + b) % 10]
        )
    };
    (0..400).map(sentence).collect()
}

/// A folder with a tokenizer, shards and a run.toml for a small run.
pub fn prepared() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let lines: Vec<String> =
        corpus().lines().map(|line| serde_json::json!({ "text": line }).to_string()).collect();
    std::fs::write(path.join("corpus.jsonl"), lines.join("\n")).unwrap();
    succeed(
        path,
        &["tokenizer", "train", "corpus.jsonl", "--vocab", "300", "--out", "tokenizer.json"],
    );
    let prepare = ["data", "prepare", "corpus.jsonl", "--tokenizer", "tokenizer.json", "--out"];
    succeed(path, &[&prepare[..], &["shards", "--valid-fraction", "0.1"]].concat());
    std::fs::write(path.join("run.toml"), SETTINGS).unwrap();
    folder
}

/// The settings of the small run.
pub const SETTINGS: &str = r#"
[model]
preset = "qwen3-1m"
[data]
train = ["shards/*.bin"]
valid = ["shards/valid/*.bin"]
tokenizer = "tokenizer.json"
sequence = 64
[train]
steps = 16
micro_batch = 2
micro_batches = 2
lr = 3e-3
warmup = 2
[snapshot]
every = 3
"#;
