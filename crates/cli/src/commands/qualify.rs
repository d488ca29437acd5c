//! `pontoon qualify`: can this device carry our model? A verdict with reasons, and a forecast.
//!
//! Also replays the file that `pontoon bisect` writes, and writes the page of what is supported.
//! What is measured is in the qualify crate. Read next: `qualify/asked.rs`, `compare.rs`.

mod asked;
mod print;
mod support;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pontoon_ops::{Backend, DType, DeviceInfo};
use pontoon_qualify::cases::Size;
use pontoon_qualify::conformance::check;
use pontoon_qualify::exchange::Exchange;
use pontoon_qualify::report::{Device, Qualification, Several};
use pontoon_qualify::reproducer;
use pontoon_qualify::speed::{Roofs, Speed, SpeedOptions};
use pontoon_qualify::stress::{Stability, StressOptions};
use pontoon_qualify::verdict::{Evidence, Fitness, Verdict, judge, judge_together};
use pontoon_qualify::{exchange, speed, stress, suite};
use serde_json::json;

use self::asked::Asked;
use super::show;
use crate::devices;
use crate::engine::dtype;

/// Seconds of the soak with `--quick`.
const QUICK_SOAK: Duration = Duration::from_secs(3);
/// Device memory that patterns are written into, at most, and with `--quick`.
const MEMORY_TEST: [usize; 2] = [512 << 20, 32 << 20];
/// The device hangs if one operation of the soak takes longer.
const SOAK_DEADLINE: Duration = Duration::from_secs(30);
/// Seconds that conformance and speed are expected to take, for the ETA.
const EXPECTED_S: [f64; 2] = [8.0, 30.0];
/// Elements of the tensor that devices exchange to be timed, and with `--quick`.
const EXCHANGED: [usize; 2] = [8 << 20, 64 << 10];

/// The arguments of `pontoon qualify`.
#[derive(Args)]
pub struct Arguments {
    /// The device, as in `pontoon devices`; `cpu` if absent. Several, with commas between them or
    /// the flag repeated, are qualified one after the other and then as a group.
    #[arg(long)]
    device: Vec<String>,
    /// The model to forecast for: a preset, a config.json, or a model's folder.
    #[arg(long)]
    model: Option<String>,
    /// How long to soak.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Write the JSON object to this file, and a page with plots beside it, ending in .html.
    #[arg(long)]
    report: Option<PathBuf>,
    /// A few seconds of everything: a smoke test, no proof.
    #[arg(long)]
    quick: bool,
    /// Run one operation from a file that `pontoon bisect` wrote, and nothing else.
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Only check conformance, of the CPU's instruction sets and an emulated chip, and write what
    /// they support to this Markdown file; `cargo xtask support` does it for docs/support.md.
    #[arg(long, conflicts_with_all = ["device", "replay", "report", "model", "json"])]
    support: Option<PathBuf>,
    /// Tokens to train the model on; 20 for each parameter if absent.
    #[arg(long)]
    tokens: Option<f64>,
    /// Devices to train on, each with the whole model; as many as are named if absent.
    #[arg(long)]
    count: Option<usize>,
    /// Faults a day and device, where they are known better than from this soak.
    #[arg(long)]
    faults_per_day: Option<f64>,
    /// What the model computes in.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Tokens of a sequence in training.
    #[arg(long, default_value_t = 1024)]
    sequence: usize,
    /// Sequences of a micro-batch.
    #[arg(long, default_value_t = 8)]
    micro_batch: usize,
    /// Decides the inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    fn devices(&self) -> Vec<String> {
        match self.device.as_slice() {
            [] => vec!["cpu".to_owned()],
            given => devices::listed(given),
        }
    }

    fn count(&self) -> usize {
        self.count.unwrap_or_else(|| self.devices().len())
    }
}

/// Qualifies. Exit code 1 if a device is unfit, or the replayed operation is wrong.
pub fn run(arguments: &Arguments) -> Result<()> {
    let minutes = arguments.minutes;
    ensure!(minutes.is_finite() && minutes >= 0.0, "--minutes should be 0 or more");
    ensure!(arguments.count() > 0, "--count should be at least 1");
    if let Some(path) = &arguments.support {
        return support::run(path, arguments.seed);
    }
    let names = arguments.devices();
    if let Some(path) = &arguments.replay {
        let [name] = names.as_slice() else { bail!("--replay takes one --device") };
        return replay(arguments.json, path, name);
    }
    let asked = match &arguments.model {
        Some(name) => Some(Asked::new(arguments, name)?),
        None => None,
    };
    let each = names.iter().map(|name| {
        let mut backend = devices::open(name)?;
        qualify(arguments, name, backend.as_mut(), asked.as_ref())
    });
    let mut each = each.collect::<Result<Vec<Qualification>>>()?;
    let verdict = match each.as_slice() {
        [one] => {
            show(arguments, &one.json(), || one.html(), || print::one(one))?;
            one.verdict.clone()
        }
        _ => {
            let several = together(arguments, &names, std::mem::take(&mut each))?;
            show(arguments, &several.json(), || several.html(), || print::several(&several))?;
            several.verdict
        }
    };
    refuse_unfit(arguments, &names, &verdict)
}

/// Writes the report where one is asked for, and prints.
fn show(
    arguments: &Arguments,
    value: &serde_json::Value,
    html: impl Fn() -> String,
    print: impl Fn(),
) -> Result<()> {
    if let Some(path) = &arguments.report {
        show::write_json(path, value)?;
        let page = path.with_extension("html");
        std::fs::write(&page, html())
            .with_context(|| format!("cannot write `{}`", page.display()))?;
        eprintln!("wrote {} and {}", path.display(), page.display());
    }
    if arguments.json {
        println!("{value}");
    } else {
        print();
    }
    Ok(())
}

fn refuse_unfit(arguments: &Arguments, names: &[String], verdict: &Verdict) -> Result<()> {
    if verdict.verdict != Fitness::Unfit {
        return Ok(());
    }
    let first = verdict.reasons.first().map_or("", String::as_str);
    let purpose = arguments.model.as_ref().map_or(String::new(), |name| format!(" for {name}"));
    match names {
        [name] => bail!("{name} is unfit{purpose}: {first}; do not use it"),
        _ => bail!("not all of {} are fit{purpose}: {first}", names.join(", ")),
    }
}

/// The exchanges of devices that were qualified one by one, and the verdict on all of them.
fn together(
    arguments: &Arguments,
    names: &[String],
    devices: Vec<Qualification>,
) -> Result<Several> {
    let begun = Instant::now();
    let clock = || begun.elapsed();
    let exchange = match devices::group(names) {
        Err(error) => {
            let failure = Some(format!("{error:#}"));
            Exchange { devices: names.len(), failure, ..Exchange::default() }
        }
        Ok(mut members) => {
            let mut found = exchange::check(&mut members, arguments.seed);
            let dtypes = members[0].info().matrix_dtypes.clone();
            let elements = EXCHANGED[usize::from(arguments.quick)];
            if found.failure.is_none() {
                match exchange::measure(&mut members, &dtypes, elements, &clock) {
                    Ok(speed) => found.speed = speed,
                    Err(failure) => found.failure = Some(failure),
                }
            }
            found
        }
    };
    let each: Vec<_> = devices.iter().map(|one| (one.device.name.as_str(), &one.verdict)).collect();
    let verdict = judge_together(&each, &exchange);
    Ok(Several { devices, exchange, verdict })
}

/// Progress over stages of expected lengths.
struct Stages {
    bar: ProgressBar,
    done_s: f64,
}

impl Stages {
    fn new(total_s: f64) -> Stages {
        let bar = ProgressBar::new((1e3 * total_s) as u64);
        let style = "{bar:30} {percent}%  {msg}  ETA {eta}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        Stages { bar, done_s: 0.0 }
    }

    /// Runs a stage that is expected to take so long.
    fn stage<T>(
        &mut self,
        name: &str,
        length_s: f64,
        work: impl FnOnce(&mut dyn FnMut(f64)) -> T,
    ) -> T {
        self.bar.set_message(name.to_owned());
        let (bar, done_s) = (self.bar.clone(), self.done_s);
        let result = work(&mut |share: f64| {
            bar.set_position((1e3 * (done_s + length_s * share.clamp(0.0, 1.0))) as u64);
        });
        self.done_s += length_s;
        result
    }
}

fn qualify(
    arguments: &Arguments,
    name: &str,
    backend: &mut dyn Backend,
    asked: Option<&Asked>,
) -> Result<Qualification> {
    let begun = Instant::now();
    let clock = || begun.elapsed();
    let (quick, info) = (usize::from(arguments.quick), backend.info().clone());
    let soak = if arguments.quick {
        QUICK_SOAK
    } else {
        Duration::from_secs_f64(60.0 * arguments.minutes)
    };
    let speed_s = if arguments.quick { 3.0 } else { EXPECTED_S[1] };
    let mut stages = Stages::new(EXPECTED_S[0] + soak.as_secs_f64() + speed_s);
    let mut conformance = stages.stage("conformance", EXPECTED_S[0], |progress| {
        suite::run(backend, arguments.seed, progress)
    });
    if arguments.devices().len() > 1 {
        // Exchanges are judged in the group.
        conformance.not_judged.clear();
    }
    let memory_bytes = MEMORY_TEST[quick].min((info.memory_bytes / 4) as usize);
    let options = StressOptions { soak, memory_bytes, deadline: SOAK_DEADLINE };
    let stability = match conformance.stopped {
        // A device that has gone away cannot be asked anything more.
        Some(_) => Stability::default(),
        None => stages.stage("stability", soak.as_secs_f64(), |progress| {
            stress::run(backend, &options, &clock, progress)
        }),
    };
    let gone = conformance.stopped.is_some() || stability.hang.is_some();
    let measured = match gone {
        true => Ok(Speed::default()),
        false => stages.stage("speed", speed_s, |progress| {
            let options = SpeedOptions {
                dtypes: info.matrix_dtypes.clone(),
                size: if arguments.quick { Size::Small } else { Size::Full },
                budget: Duration::from_millis(if arguments.quick { 5 } else { 100 }),
                known: known_roofs(name, &info.matrix_dtypes),
            };
            speed::run(backend, &options, &clock, progress)
        }),
    };
    stages.bar.finish_and_clear();
    let speed_failure = measured.as_ref().err().map(ToString::to_string);
    let speed = measured.unwrap_or_default();
    let works = !gone && speed_failure.is_none();
    let forecast = match asked.filter(|_| works) {
        Some(asked) => Some(asked.forecast(arguments, backend, &speed, &stability)?),
        None => None,
    };
    let compute = dtype(&arguments.dtype)?;
    let ops = asked.iter().flat_map(|asked| asked.ops());
    let needed: BTreeSet<_> = ops.map(|op| (op.name().name(), compute)).collect();
    let verdict = judge(&Evidence {
        conformance: &conformance,
        stability: &stability,
        speed: works.then_some(&speed),
        speed_failure: speed_failure.as_deref(),
        forecast: forecast.as_ref(),
        needed: &needed,
    });
    let device = device_of(name, &info);
    let (seconds, version) = (begun.elapsed().as_secs_f64(), env!("CARGO_PKG_VERSION").to_owned());
    Ok(Qualification { device, verdict, conformance, stability, speed, forecast, seconds, version })
}

fn device_of(name: &str, info: &DeviceInfo) -> Device {
    Device {
        name: name.to_owned(),
        chip: info.chip.clone(),
        numeric_class: info.numeric_class.clone(),
        emulated: info.emulated,
        memory_bytes: info.memory_bytes,
        compute_units: info.compute_units,
    }
}

/// Roofs that the device's own code can measure better than operations do.
fn known_roofs(device: &str, dtypes: &[DType]) -> Roofs {
    let mut roofs = Roofs::default();
    for &dtype in dtypes {
        if let Ok(peak) = devices::peak_flops(device, dtype) {
            roofs.matrix.insert(dtype.name().to_owned(), peak);
        }
    }
    roofs.memory = devices::bandwidth(device).unwrap_or(0.0);
    roofs
}

fn replay(as_json: bool, path: &Path, name: &str) -> Result<()> {
    let mut backend = devices::open(name)?;
    let (case, origin) = reproducer::read(path)?;
    let (findings, _) = check(backend.as_mut(), &case)?;
    let wrong = findings.iter().find(|finding| !finding.ok);
    if as_json {
        let result = json!({
            "ok": wrong.is_none(),
            "device": name,
            "op": case.op.name().name(),
            "findings": findings.iter().map(|finding| {
                let mut value = json!(finding);
                value["worst_error"] = json!(finding.worst_error.min(f64::MAX));
                value
            }).collect::<Vec<_>>(),
            "origin": origin,
        });
        println!("{result}");
    } else {
        println!("{} of {}: {}", case.op.name().name(), origin.program, origin.finding);
        for finding in &findings {
            let word = if finding.ok { "ok" } else { "WRONG" };
            let (check, error, detail) = (finding.check, finding.worst_error, &finding.detail);
            println!("{check:12} {word:6} {error:.3} of what is allowed  {detail}");
        }
    }
    match wrong {
        None => Ok(()),
        Some(finding) => bail!(
            "{name} computes {} wrongly: {}; send `{}` to its maker",
            finding.op,
            finding.detail,
            path.display()
        ),
    }
}
