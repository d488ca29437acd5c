//! Bad input ends with one line that says what, where and what to do, and with exit code 1 or 2.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

mod common;

use std::fs;
use std::path::Path;

use common::{json, output, prepared, succeed};

/// Runs a command that must fail with code 1 and one line holding all of `want`.
fn fails(folder: &Path, arguments: &[&str], want: &[&str]) {
    let output = output(folder, arguments);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
    let lines: Vec<&str> = errors.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines.last().unwrap();
    assert!(last.starts_with("error: "), "{arguments:?}: {errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    for part in want {
        assert!(last.contains(part), "{arguments:?}: `{part}` is not in: {last}");
    }
}

#[test]
fn commands_name_what_is_missing_or_unknown() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("t.txt"), "some text").unwrap();
    fs::write(folder.join("empty.txt"), "").unwrap();
    fs::write(folder.join("table.csv"), "a,b").unwrap();
    fs::create_dir(folder.join("nothing")).unwrap();
    let vocab = |vocab, input| ["tokenizer", "train", input, "--vocab", vocab, "--out", "t.json"];
    fails(folder, &vocab("100", "t.txt"), &["100", "--vocab 261"]);
    fails(folder, &vocab("300", "empty.txt"), &["no text"]);
    fails(folder, &vocab("300", "table.csv"), &["table.csv", ".jsonl"]);
    fails(folder, &vocab("300", "gone.txt"), &["gone.txt", "check the path"]);
    fails(folder, &["new", "qwen3-30n", "x"], &["qwen3-30n", "qwen3-30m"]);
    fails(folder, &["train", "gone.toml"], &["gone.toml", "check the path"]);
    fails(folder, &["generate", "nothing", "-p", "x"], &["nothing", "config.json"]);
    fails(folder, &["status", "nothing"], &["nothing", "metrics.jsonl"]);
    fails(folder, &["bench", "train", "--preset", "llama-3m"], &["llama-3m", "llama-30m"]);
    fails(folder, &["bench", "decode", "qwen3-1m", "--device", "gpu"], &["gpu", "pontoon devices"]);
    let usage = output(folder, &["trian"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_reader_that_went_away_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("run.toml"), common::SETTINGS).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = common::pontoon(folder.path(), &["train", "run.toml", "--print-config"]);
    let output = command.stdout(writer).stderr(std::process::Stdio::piped()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn runs_refuse_wrong_settings_and_data() {
    let folder = prepared();
    let folder = folder.path();
    let train = |change: &str, want: &[&str]| {
        fails(folder, &["train", "run.toml", "--dir", "x", "--set", change], want);
    };
    train("train.lrr=1", &["`train.lrr`", "`train.lr`"]);
    train("train.micro_batches=3", &["micro_batches", "power of two"]);
    train("data.sequence=100000", &["100000", "longer than the model allows"]);
    train("data.train=[\"gone/*.bin\"]", &["gone/*.bin", "pontoon data prepare"]);
    train("model.preset=\"qwen9\"", &["qwen9"]);
    train("fleet.devices=[\"tpu\"]", &["tpu"]);
    let shard = folder.join("shards/shard-00000.bin");
    let whole = fs::read(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() - 9]).unwrap();
    train("train.steps=2", &["shard-00000.bin", "make it again"]);
    fs::write(&shard, &whole).unwrap();
    let other = ["tokenizer", "train", "corpus.jsonl", "--vocab", "280", "--out", "other.json"];
    succeed(folder, &other);
    train("data.tokenizer=\"other.json\"", &["made for 300 tokens", "280"]);
}

#[test]
fn a_run_is_not_gone_on_with_by_settings_that_are_not_its_own_and_keeps_them() {
    let folder = prepared();
    let folder = folder.path();
    let done = json(folder, &["train", "run.toml", "--dir", "run", "--steps", "2", "--json"]);
    let settings = fs::read_to_string(folder.join("run/run.toml")).unwrap();
    for alone in [&[][..], &["--in-process"]] {
        let resume = |change: &str, want: &[&str]| {
            let more = ["train", "run", "--resume", "--steps", "4", "--set", change];
            fails(folder, &[&more[..], alone].concat(), want);
            assert_eq!(fs::read_to_string(folder.join("run/run.toml")).unwrap(), settings);
        };
        resume("train.seed=7", &["seed = 1", "say 7", "settings it began with"]);
        resume("model.preset=\"llama-30m\"", &["embed_tokens", "but the model wants"]);
        // One that is done says what it came to.
        let again = ["train", "run", "--resume", "--json"];
        let again = json(folder, &[&again[..], alone].concat());
        assert_eq!(again["weights_blake3"], done["weights_blake3"]);
        assert_eq!((&again["steps"], &again["finished"]), (&2.into(), &true.into()));
    }
    fails(
        folder,
        &["train", "run.toml", "--in-process", "--device", "cpu", "--device", "cpu"],
        &["--in-process computes on one device", "2 workers"],
    );
    let usage = output(folder, &["train", "run.toml", "--in-process", "--workers", "2"]);
    assert_eq!(usage.status.code(), Some(2));
    let gone = output(folder, &["train", "nowhere", "--resume"]);
    let text = String::from_utf8(gone.stderr).unwrap();
    assert!(text.contains("`nowhere`") && text.lines().count() == 1, "{text}");
    assert_eq!(text.matches("No such file or directory").count(), 1, "{text}");
}

#[test]
fn broken_records_are_left_out_and_named_up_to_a_limit() {
    let folder = prepared();
    let folder = folder.path();
    let good = "{\"text\": \"one and two\"}\n";
    fs::write(folder.join("some.jsonl"), format!("{good}{{\"text\": 3}}\nnot json\n{good}"))
        .unwrap();
    let prepare = |out, more: &[&'static str]| {
        let start =
            ["data", "prepare", "some.jsonl", "--tokenizer", "tokenizer.json", "--out", out];
        [&start[..], more].concat()
    };
    let done = json(folder, &prepare("a", &["--json"]));
    assert_eq!((&done["documents"], &done["broken"]), (&2.into(), &2.into()));
    assert_eq!(done["broken_examples"][0], "some.jsonl:2: has no text in field `text`");
    fails(folder, &prepare("b", &["--broken-max", "1"]), &["some.jsonl:2", "some.jsonl:3"]);
    fails(folder, &prepare("c", &["--field", "body"]), &["some.jsonl:1", "`body`"]);
    fails(folder, &prepare("a", &[]), &["is there already"]);
    fs::write(folder.join("some.jsonl"), "{\"text\": \"\"}\n{\"text\": \" \\n\"}\n").unwrap();
    fails(folder, &prepare("empty", &[]), &["hold no text"]);
    assert!(!folder.join("empty").exists());
}

#[test]
fn damaged_models_are_named() {
    let folder = prepared();
    let folder = folder.path();
    json(folder, &["train", "run.toml", "--dir", "run", "--steps", "2", "--json"]);
    succeed(folder, &["export", "run", "model", "--dtype", "f32"]);
    fails(folder, &["export", "run", "model"], &["model"]);
    let weights = folder.join("model/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let generate = ["generate", "model", "-p", "x", "-n", "2"];
    fails(folder, &generate, &["model.safetensors"]);
    fs::remove_file(&weights).unwrap();
    fails(folder, &generate, &["model.safetensors"]);
    fs::write(&weights, &whole).unwrap();
    let config = folder.join("model/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("Qwen3ForCausalLM", "MambaForCausalLM").replace("\"qwen3\"", "\"mamba\""),
    )
    .unwrap();
    fails(folder, &generate, &["mamba"]);
    fs::write(&config, text.replace("\"vocab_size\": 300", "\"vocab_size\": 200")).unwrap();
    fails(folder, &generate, &["200"]);
    fs::write(&config, &text).unwrap();
    succeed(folder, &generate);
    broken_templates_are_named(folder);
    let snapshot = folder.join("run/snapshots/step-00000002/model.safetensors");
    let mut bytes = fs::read(&snapshot).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&snapshot, bytes).unwrap();
    fails(folder, &["generate", "run/snapshots/step-00000002", "-p", "x"], &["damaged", "norm"]);
}

/// A chat template that cannot be used stops what needs it, and only that.
fn broken_templates_are_named(folder: &Path) {
    let file = folder.join("model/chat_template.jinja");
    fs::write(&file, "{% for message in %}").unwrap();
    let generate = ["generate", "model", "-p", "x", "-n", "2"];
    let want = ["chat template", "`model`", "line 1", "mend it"];
    fails(folder, &generate, &want);
    fails(folder, &["eval", "model", "--task", "arithmetic", "--count", "1"], &want);
    fails(folder, &["serve", "model", "--port", "0"], &want);
    succeed(folder, &[&generate[..], &["--raw"]].concat());
    fs::write(&file, "{{ messages.nothing.at_all }}").unwrap();
    fails(folder, &generate, &["chat template", "line 1"]);
    fs::remove_file(&file).unwrap();
    let settings = folder.join("model/tokenizer_config.json");
    let whole = fs::read_to_string(&settings).unwrap();
    let mut changed: serde_json::Value = serde_json::from_str(&whole).unwrap();
    changed["chat_template"] = 3.into();
    fs::write(&settings, changed.to_string()).unwrap();
    fails(folder, &generate, &["tokenizer_config.json", "`chat_template`"]);
    fs::write(&settings, whole).unwrap();
}
