//! `pontoon move`: asks a live run to go on, on other devices, and says what came of it.
//!
//! The run itself tries them and decides; see `docs/moving.md`. Read next: `train.rs`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pontoon_fleet::control::{Answer, ControlSocket, Request};
use pontoon_fleet::world::Control;
use serde_json::{Value, json};

use crate::devices;

/// The arguments of `pontoon move`.
#[derive(Args)]
pub struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// The devices to go to, one for each worker, with commas or several times.
    #[arg(long = "to", value_name = "DEV", required = true)]
    to: Vec<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Asks, and waits until the run is there or has refused.
pub fn run(arguments: &Arguments) -> Result<()> {
    let dir = arguments.dir.display();
    ensure!(arguments.dir.join("run.toml").is_file(), "`{dir}` is no run folder: no run.toml");
    let to = devices::listed(&arguments.to);
    let names = to.join(",");
    eprintln!("{names}: loading beside the run, then tried on a micro-batch of its present step");
    let answer = ControlSocket
        .ask(&arguments.dir, &Request::Move { to: to.clone() })
        .with_context(|| format!("cannot ask the run in `{dir}`"))?;
    let Some(answer) = answer else {
        let again: String = to.iter().map(|device| format!(" --device {device}")).collect();
        bail!("no run is live in `{dir}`; go on there with: pontoon train {dir} --resume{again}");
    };
    show(arguments, &answer);
    ensure!(answer.ok, "the run in `{dir}` stays where it is: {}", answer.text);
    Ok(())
}

fn show(arguments: &Arguments, answer: &Answer) {
    if arguments.json {
        println!("{}", json!(answer));
        return;
    }
    let certificate = answer.facts.get("certificate").cloned().unwrap_or_default();
    lines(&certificate).iter().for_each(|line| println!("{line}"));
    if answer.ok {
        println!("{}", answer.text);
    }
}

/// A certificate as people read it; nothing if there is none.
pub fn lines(certificate: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    for trial in certificate["trials"].as_array().into_iter().flatten() {
        let text = |key: &str| trial[key].as_str().unwrap_or("?").to_owned();
        let number = |key: &str| trial[key].as_f64().unwrap_or(f64::NAN);
        let limit = |key: &str| certificate["limits"][key].as_f64().unwrap_or(f64::NAN);
        let line = |what: &str, got: f64, limit: f64| {
            format!("  {what:28} {got:>11.3e}  limit {limit:>10.3e}")
        };
        let yes = |key: &str| if trial[key] == true { "yes" } else { "no" };
        let says = if trial["agree"] == true { "agrees" } else { "DOES NOT AGREE" };
        lines.extend([
            format!("{} ({}) {says}", text("device"), text("numeric_class")),
            line("worst gradient error", number("gradient_error"), limit("gradient")),
            line("loss error", number("loss_error"), limit("loss")),
            format!("  same bits as the old device  {:>11}", yes("identical")),
            format!("  same bits when repeated      {:>11}", yes("repeats")),
        ]);
    }
    if certificate["agree"] == true {
        let ms = |key: &str| match certificate[key].as_u64() {
            Some(ms) => format!("{ms} ms"),
            None => "an unknown time".to_owned(),
        };
        lines.push(format!(
            "loaded in {} and tried in {} beside the run, which stood still for {}",
            ms("load_ms"),
            ms("trial_ms"),
            ms("pause_ms"),
        ));
        let band = &certificate["band"];
        if let (Some(apart), Some(window)) = (band["apart"].as_f64(), band["window"].as_u64()) {
            lines.push(format!(
                "means of {window} losses may be {:.1}% apart from those of the run unmoved",
                100.0 * apart
            ));
        }
    }
    lines
}
