//! `pontoon bisect`: the first operation of a model on which two devices do not agree.
//!
//! Both devices get the first one's inputs, operation by operation. Whether the whole model agrees
//! is `compare.rs`.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pontoon_models::Model;
use pontoon_ops::Backend;
use pontoon_qualify::bisect::{Divergence, Outcome, Which, bisect};
use pontoon_qualify::conformance::check;
use pontoon_qualify::reproducer::{self, Origin, Outcomes};
use pontoon_qualify::step::Step;
use serde_json::{Value, json};

use crate::devices;
use crate::engine::dtype;
use crate::steps::{Packed, Steps, layer_of, model_of, parameters_of, random_documents};

/// The arguments of `pontoon bisect`.
#[derive(Args, Clone)]
pub struct Arguments {
    /// A preset, which gets random weights, or a model, snapshot or run folder.
    model: String,
    /// The two devices, the trusted one first.
    #[arg(long, value_delimiter = ',', required = true)]
    devices: Vec<String>,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Tokens of the batch that is run.
    #[arg(long, default_value_t = 32)]
    tokens: usize,
    /// Where the reproducer goes, if there is one.
    #[arg(long, default_value = "reproducer.safetensors")]
    out: PathBuf,
    /// Decides a preset's weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Bisects. Exit code 1 if the devices disagree.
pub fn run(arguments: &Arguments) -> Result<()> {
    let devices = devices::listed(&arguments.devices);
    let arguments = &Arguments { devices, ..arguments.clone() };
    let names = &arguments.devices;
    ensure!(
        names.len() == 2,
        "--devices takes two, such as cpu,cpu:threads=1; got {}",
        names.len()
    );
    let compute = dtype(&arguments.dtype)?;
    let mut first = devices::open(&names[0])?;
    let mut second = devices::open(&names[1])?;
    let (model, weights) = model_of(&arguments.model, arguments.seed)?;
    let most = model.config.max_positions;
    let tokens = arguments.tokens;
    ensure!((4..=most).contains(&tokens), "--tokens should be 4 to {most} but is {tokens}");
    let documents = random_documents(2, tokens / 2, model.config.vocab_size);
    let steps = Steps { model: &model, weights: &weights, dtype: compute };
    let programs = [steps.training(&Packed::new(&documents))?, steps.drawing(&documents[0])?];
    let mut outcomes = Vec::new();
    for step in &programs {
        let bar = bar(step);
        let mut seen = |done: usize| bar.set_position(done as u64);
        let outcome = bisect(step, first.as_mut(), second.as_mut(), &mut seen)?;
        bar.finish_and_clear();
        let stop = outcome.divergence.is_some();
        outcomes.push((step.program.name.clone(), outcome));
        if stop {
            break;
        }
    }
    let last = outcomes.last().expect("there are two programs");
    let step = programs.iter().find(|step| step.program.name == last.0);
    let step = step.expect("outcomes carry their program's name");
    let found = match &last.1.divergence {
        Some(divergence) => {
            let backends = [&mut first, &mut second];
            Some(describe(arguments, &model, step, divergence, backends)?)
        }
        None => None,
    };
    show(arguments, &outcomes, found)
}

fn bar(step: &Step) -> ProgressBar {
    let bar = ProgressBar::new(step.program.ops.len() as u64);
    let style = "{bar:30} {pos}/{len} operations of {msg}  ETA {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
    bar.set_message(step.program.name.clone());
    bar
}

/// The finding as JSON, with its reproducer written.
fn describe(
    arguments: &Arguments,
    model: &Model,
    step: &Step,
    divergence: &Divergence,
    backends: [&mut Box<dyn Backend>; 2],
) -> Result<Value> {
    let op = &step.program.ops[divergence.op_index];
    let parameters = parameters_of(model, dtype(&arguments.dtype)?, op);
    let mut value = json!(divergence);
    value["layer"] = json!(layer_of(&parameters, divergence.segment));
    value["parameters"] = json!(parameters);
    let index = usize::from(divergence.device == Which::Second);
    value["device"] = json!(arguments.devices[index]);
    value["reproducer"] = Value::Null;
    let Some(case) = &divergence.case else { return Ok(value) };
    let origin = Origin {
        program: divergence.program.clone(),
        op_index: divergence.op_index,
        parameters,
        devices: arguments.devices.clone(),
        finding: divergence.detail.clone(),
    };
    // A device that fails on the operation leaves nothing to show.
    let [first, second] =
        backends.map(|backend| check(backend.as_mut(), case).ok().map(|(_, left)| left));
    let left = Outcomes { first: first.as_ref(), second: second.as_ref() };
    reproducer::write(&arguments.out, case, &origin, &left)?;
    value["reproducer"] = json!(arguments.out);
    Ok(value)
}

fn show(arguments: &Arguments, outcomes: &[(String, Outcome)], found: Option<Value>) -> Result<()> {
    let names = arguments.devices.join(" and ");
    let programs: Vec<Value> = outcomes
        .iter()
        .map(|(name, outcome)| {
            let (ops, identical) = (outcome.ops, outcome.identical);
            let closest = &outcome.closest;
            json!({ "program": name, "ops": ops, "identical": identical, "closest": closest })
        })
        .collect();
    if arguments.json {
        let result = json!({
            "agree": found.is_none(),
            "devices": arguments.devices,
            "programs": programs,
            "divergence": found,
        });
        println!("{result}");
    } else {
        for (name, outcome) in outcomes {
            let (ops, identical) = (outcome.ops, outcome.identical);
            let closest = match &outcome.closest {
                Some((share, op)) => format!("; nearest to its limit: {op}, {share:.2} of it"),
                None => String::new(),
            };
            println!("{name}: {ops} operations, {identical} with the same bits{closest}");
        }
    }
    let Some(found) = found else {
        if !arguments.json {
            println!("{names} agree on {}", arguments.model);
        }
        return Ok(());
    };
    let text = |key: &str| found[key].as_str().unwrap_or("").to_owned();
    let layer = found["layer"].as_u64().map_or(String::new(), |layer| format!(" of layer {layer}"));
    bail!(
        "{}: operation {} ({}){layer} is wrong in `{}`: {}; replay it with `pontoon qualify \
         --replay {} --device {}`",
        text("device"),
        found["op_index"],
        text("op"),
        text("tensor"),
        text("detail"),
        arguments.out.display(),
        text("device"),
    )
}
