//! `qualify`, `compare` and `bisect` as a user calls them, on the devices every machine has.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]
#![allow(dead_code, reason = "the common part serves other files of tests too")]

mod common;

use common::{json, output};
use pontoon_ops::DType;
use pontoon_qualify::cases::{self, Case};
use pontoon_qualify::reproducer::{Origin, Outcomes, write};

const PAIR: [&str; 2] = ["--devices", "cpu,cpu:threads=1"];

#[test]
fn one_and_many_threads_agree_bit_for_bit_on_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for dtype in ["f32", "bf16"] {
        let more = ["--dtype", dtype, "--json", "--report", "certificate.json"];
        let found = json(folder, &[&["compare", "qwen3-1m"], &PAIR[..], &more].concat());
        assert_eq!(found["agree"], true, "{dtype}: {}", found["reasons"]);
        assert_eq!(found["reference"], "f64");
        assert_eq!(found["devices"], serde_json::json!(["cpu", "cpu:threads=1"]));
        assert_eq!(found["top1_agreement"], 1.0);
        let pairs = found["pairs"].as_array().unwrap();
        let between = pairs.iter().find(|pair| pair["with"] == "cpu").unwrap();
        assert_eq!((&between["identical"], &between["loss_drift"]), (&true.into(), &0.0.into()));
        assert!(found["worst_logit_error"].as_f64().unwrap() > 0.0, "f64 is no f32");
        let tensors = found["gradient_error"].as_array().unwrap();
        assert!(tensors.iter().any(|one| one["tensor"] == "model.embed_tokens.weight"));
        let written = std::fs::read_to_string(folder.join("certificate.json")).unwrap();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&written).unwrap(), found);
    }
}

#[test]
fn bisecting_one_and_many_threads_finds_nothing_and_all_bits_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for preset in ["qwen3-1m", "qwen3-moe-8m", "deepseek-8m"] {
        let found = json(folder.path(), &[&["bisect", preset], &PAIR[..], &["--json"]].concat());
        assert_eq!((&found["agree"], &found["divergence"]), (&true.into(), &().into()), "{preset}");
        let programs = found["programs"].as_array().unwrap();
        assert_eq!(programs.len(), 2, "training and decoding");
        for program in programs {
            assert_eq!(program["ops"], program["identical"], "{preset} {}", program["program"]);
        }
    }
    assert!(!folder.path().join("reproducer.safetensors").exists());
}

#[test]
fn the_cpu_is_fit_and_the_report_is_one_page_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let model = ["--model", "qwen3-1m", "--faults-per-day", "2", "--count", "4"];
    let ask = ["qualify", "--device", "cpu", "--quick", "--json", "--report", "cpu.json"];
    let found = json(folder, &[&ask[..], &model].concat());
    assert_eq!(found["verdict"], "fit", "{}", found["reasons"]);
    assert_eq!(found["reasons"], serde_json::json!([]));
    let ops = found["ops"].as_array().unwrap();
    for check in ["correct", "gradient", "repeat", "invariance"] {
        let of = |row: &&serde_json::Value| row["check"] == check && row["op"] == "AttentionBwd";
        assert!(ops.iter().filter(of).all(|row| row["ok"] == true && row["limit"] == 1.0));
        assert!(ops.iter().any(|row| row["check"] == check), "{check}");
    }
    assert_eq!(found["stability"]["lies"], 0);
    assert!(found["speed"].as_array().unwrap().len() > 60);
    let forecast = &found["forecast"];
    assert!(forecast["tokens_per_s"].as_f64().unwrap() > 0.0);
    let (days, faults) = (forecast["days"].as_f64().unwrap(), &forecast["faults_expected"]);
    assert!((faults.as_f64().unwrap() - 8.0 * days).abs() < 1e-9 * (1.0 + days));
    let page = std::fs::read_to_string(folder.join("cpu.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("FIT"));
    for other in ["<script", "http:", "https:", "<link", "src="] {
        assert!(!page.contains(other), "the page needs something else: {other}");
    }
}

fn case(op: &str) -> Case {
    let mut all = cases::all(3).into_iter();
    all.find(|case| case.op.name().name() == op && case.dtype == DType::Bf16).unwrap()
}

#[test]
fn a_reproducer_is_replayed_and_a_wrong_one_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let origin = Origin { finding: "it was wrong elsewhere".to_owned(), ..Origin::default() };
    let none = Outcomes { first: None, second: None };
    write(&folder.join("one.safetensors"), &case("Attention"), &origin, &none).unwrap();
    let replay = |file| ["qualify", "--device", "cpu", "--replay", file, "--json"];
    let found = json(folder, &replay("one.safetensors"));
    assert_eq!((&found["ok"], &found["op"]), (&true.into(), &"Attention".into()));
    assert_eq!(found["origin"]["finding"], "it was wrong elsewhere");
    std::fs::write(folder.join("two.safetensors"), b"\x08\0\0\0\0\0\0\0{\"a\":1}").unwrap();
    for (arguments, want) in [
        (&replay("two.safetensors")[..], "two.safetensors"),
        (&replay("gone.safetensors")[..], "gone.safetensors"),
        (&["compare", "qwen3-1m", "--devices", "cpu"][..], "--devices takes two"),
        (&["bisect", "qwen3-1m", "--devices", "cpu,cpu,cpu"][..], "--devices takes two"),
        (&["compare", "qwen3-2m", "--devices", "cpu,cpu"][..], "qwen3-1m"),
        (&["qualify", "--device", "abacus"][..], "pontoon devices"),
        (&["qualify", "--minutes", "nan"][..], "--minutes"),
    ] {
        let output = output(folder, arguments);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {errors}");
        let last = errors.lines().last().unwrap();
        assert!(last.starts_with("error: ") && last.contains(want), "{arguments:?}: {errors}");
    }
}
