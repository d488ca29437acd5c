//! `pontoon qualify`: can this device carry our model? A verdict with reasons, and a forecast.
//!
//! Also replays the file that `pontoon bisect` writes. What is measured is in the qualify crate;
//! the model's part is made here. Read next: `compare.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pontoon_models::{BatchShape, Model, ModelConfig, PagedHead, PagedShape, preset};
use pontoon_ops::{Backend, DType, DeviceInfo};
use pontoon_program::{Program, Recompute};
use pontoon_qualify::cases::Size;
use pontoon_qualify::conformance::check;
use pontoon_qualify::forecast::{Forecast, Question, Soaked, forecast};
use pontoon_qualify::report::{Device, Qualification};
use pontoon_qualify::reproducer;
use pontoon_qualify::speed::{Roofs, Speed, SpeedOptions};
use pontoon_qualify::stress::{Stability, StressOptions};
use pontoon_qualify::verdict::{Evidence, Fitness, judge};
use pontoon_qualify::{speed, stress, suite};
use pontoon_train::data::Batch;
use pontoon_train::{RunConfig, TrainingState};
use serde_json::json;

use super::show;
use crate::devices;
use crate::engine::dtype;
use crate::model_source::ModelSource;

/// Seconds of the soak with `--quick`.
const QUICK_SOAK: Duration = Duration::from_secs(3);
/// Device memory that patterns are written into, at most, and with `--quick`.
const MEMORY_TEST: [usize; 2] = [512 << 20, 32 << 20];
/// The device hangs if one operation of the soak takes longer.
const SOAK_DEADLINE: Duration = Duration::from_secs(30);
/// Seconds that conformance and speed are expected to take, for the ETA.
const EXPECTED_S: [f64; 2] = [8.0, 30.0];
/// Tokens to train on for each parameter, where none are given: what is spent on a model that is
/// as good as its training compute allows.
const TOKENS_PER_PARAMETER: f64 = 20.0;
/// Models up to this size run a real training step; larger ones are reckoned.
const MEASURED_PARAMETERS_MAX: u64 = 50_000_000;
/// The same with `--quick`.
const QUICK_PARAMETERS_MAX: u64 = 2_000_000;
/// Tokens of the measured step, in sequences as long as the model's.
const MEASURED_TOKENS: usize = 1024;

/// The arguments of `pontoon qualify`.
#[derive(Args)]
pub struct Arguments {
    /// The device, as in `pontoon devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
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
    /// Tokens to train the model on; 20 for each parameter if absent.
    #[arg(long)]
    tokens: Option<f64>,
    /// Devices to train on, each with the whole model.
    #[arg(long, default_value_t = 1)]
    count: usize,
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

/// Qualifies. Exit code 1 if the device is unfit, or the replayed operation is wrong.
pub fn run(arguments: &Arguments) -> Result<()> {
    let minutes = arguments.minutes;
    ensure!(minutes.is_finite() && minutes >= 0.0, "--minutes should be 0 or more");
    ensure!(arguments.count > 0, "--count should be at least 1");
    let mut backend = devices::open(&arguments.device)?;
    if let Some(path) = &arguments.replay {
        return replay(arguments, path, backend.as_mut());
    }
    let asked = match &arguments.model {
        Some(name) => Some(Asked::new(arguments, name)?),
        None => None,
    };
    let qualification = qualify(arguments, backend.as_mut(), asked.as_ref())?;
    let value = qualification.json();
    if let Some(path) = &arguments.report {
        show::write_json(path, &value)?;
        let page = path.with_extension("html");
        std::fs::write(&page, qualification.html())
            .with_context(|| format!("cannot write `{}`", page.display()))?;
        eprintln!("wrote {} and {}", path.display(), page.display());
    }
    if arguments.json {
        println!("{value}");
    } else {
        print(&qualification);
    }
    let verdict = &qualification.verdict;
    if verdict.verdict == Fitness::Unfit {
        let first = verdict.reasons.first().map_or("", String::as_str);
        let purpose = arguments.model.as_ref().map_or(String::new(), |name| format!(" for {name}"));
        bail!("{} is unfit{purpose}: {first}; do not use it", arguments.device);
    }
    Ok(())
}

/// The model that is asked about.
struct Asked {
    name: String,
    model: Model,
    dtype: DType,
    sequence: usize,
    training: Program,
    decoding: Program,
}

impl Asked {
    fn new(arguments: &Arguments, name: &str) -> Result<Asked> {
        let path = Path::new(name);
        let config = match () {
            () if path.is_dir() => ModelSource::open(path)?.model.config,
            () if path.is_file() => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read `{name}`"))?;
                let map = serde_json::from_str(&text)
                    .with_context(|| format!("`{name}` is no JSON object"))?;
                ModelConfig::from_json(map)?
            }
            () => preset(name)?,
        };
        let model = Model::new(config)?;
        let compute = dtype(&arguments.dtype)?;
        let sequence = arguments.sequence.clamp(2, model.config.max_positions);
        let rows = sequence * arguments.micro_batch.max(1);
        let shape = BatchShape { rows, documents: rows + 1, positions_max: sequence };
        let training = model.training_program(shape, compute, Recompute::Cheap)?;
        let block = 16;
        let blocks = sequence.div_ceil(block);
        let shape = PagedShape {
            rows: 1,
            sequences: 1,
            block,
            blocks,
            sequence_blocks: blocks,
            positions_max: sequence,
        };
        let head = PagedHead::Sample { vocabulary: model.config.vocab_size };
        let decoding = model.paged_program(shape, compute, head)?;
        Ok(Asked { name: name.to_owned(), model, dtype: compute, sequence, training, decoding })
    }

    /// Tokens a second of real training steps, for models small enough; the second step counts.
    fn measure(&self, backend: &mut dyn Backend, parameters_max: u64) -> Result<Option<f64>> {
        let large = self.model.config.parameter_count() > parameters_max;
        if large || self.dtype == DType::F16 {
            return Ok(None);
        }
        let sequence = MEASURED_TOKENS.min(self.sequence);
        let count = (MEASURED_TOKENS / sequence).max(1);
        let settings = format!(
            "[data]\nsequence = {sequence}\n[train]\nmicro_batch = {count}\nmicro_batches = 1\n\
             dtype = \"{}\"\nwarmup = 0\nschedule = \"constant\"\n",
            self.dtype
        );
        let config = RunConfig::parse(&settings, &[], "the measurement's settings")?;
        let weights = self.model.initialise(1);
        let mut state = TrainingState::load(backend, &self.model, &config, &weights)?;
        let rows = count * sequence;
        let token = |row: usize| (row * 31 % self.model.config.vocab_size) as i32;
        let start = |at: usize| (at.min(count) * sequence) as i32;
        let batch = Batch {
            ids: (0..rows).map(token).collect(),
            targets: (0..rows).map(|row| token(row + 1)).collect(),
            positions: (0..rows).map(|row| (row % sequence) as i32).collect(),
            documents: (0..=rows).map(start).collect(),
            valid: rows,
        };
        let mut best = f64::INFINITY;
        for step in 1..=3 {
            let started = Instant::now();
            state.step(backend, step, std::slice::from_ref(&batch))?;
            let seconds = started.elapsed().as_secs_f64();
            best = if step == 1 { best } else { best.min(seconds) };
        }
        Ok(Some(rows as f64 / best))
    }

    fn forecast(
        &self,
        arguments: &Arguments,
        backend: &mut dyn Backend,
        speed: &Speed,
        stability: &Stability,
    ) -> Result<Forecast> {
        let limits = [MEASURED_PARAMETERS_MAX, QUICK_PARAMETERS_MAX];
        let parameters = self.model.config.parameter_count();
        let measured = self.measure(backend, limits[usize::from(arguments.quick)])?;
        let question = Question {
            model: self.name.clone(),
            parameters,
            dtype: self.dtype,
            trained: self.model.table.trainable_elements(),
            sequence: self.sequence,
            micro_batch: arguments.micro_batch.max(1),
            training: &self.training,
            decoding: &self.decoding,
            tokens: arguments.tokens.unwrap_or(TOKENS_PER_PARAMETER * parameters as f64),
            devices: arguments.count,
            measured,
            faults_per_day: arguments.faults_per_day,
        };
        let soaked = Soaked { faults: stability.faults(), seconds: stability.seconds };
        Ok(forecast(&question, speed, soaked, backend.info().memory_bytes))
    }
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
    let conformance = stages.stage("conformance", EXPECTED_S[0], |progress| {
        suite::run(backend, arguments.seed, progress)
    });
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
                known: known_roofs(&arguments.device, &info.matrix_dtypes),
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
    let programs = asked.iter().flat_map(|asked| [&asked.training, &asked.decoding]);
    let compute = dtype(&arguments.dtype)?;
    let needed: BTreeSet<_> =
        programs.flat_map(|program| &program.ops).map(|op| (op.name().name(), compute)).collect();
    let verdict = judge(&Evidence {
        conformance: &conformance,
        stability: &stability,
        speed: works.then_some(&speed),
        speed_failure: speed_failure.as_deref(),
        forecast: forecast.as_ref(),
        needed: &needed,
    });
    let device = device_of(arguments, &info);
    let (seconds, version) = (begun.elapsed().as_secs_f64(), env!("CARGO_PKG_VERSION").to_owned());
    Ok(Qualification { device, verdict, conformance, stability, speed, forecast, seconds, version })
}

fn device_of(arguments: &Arguments, info: &DeviceInfo) -> Device {
    Device {
        name: arguments.device.clone(),
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

fn replay(arguments: &Arguments, path: &Path, backend: &mut dyn Backend) -> Result<()> {
    let (case, origin) = reproducer::read(path)?;
    let (findings, _) = check(backend, &case)?;
    let wrong = findings.iter().find(|finding| !finding.ok);
    if arguments.json {
        let result = json!({
            "ok": wrong.is_none(),
            "device": arguments.device,
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
            "{} computes {} wrongly: {}; send `{}` to its maker",
            arguments.device,
            finding.op,
            finding.detail,
            path.display()
        ),
    }
}

fn print(qualification: &Qualification) {
    let verdict = &qualification.verdict;
    println!("{}: {}", qualification.device.name, verdict.verdict);
    for reason in &verdict.reasons {
        println!("  {reason}");
    }
    for note in &verdict.notes {
        println!("  note: {note}");
    }
    let rows = &qualification.conformance.rows;
    let failed = rows.iter().filter(|row| !row.ok);
    let cases: usize = rows.iter().map(|row| row.cases).sum();
    println!(
        "conformance: {cases} checks in {} rows, {} failed",
        rows.len(),
        failed.clone().count()
    );
    for row in failed {
        let (op, dtype, check, detail) = (row.op, &row.dtype, row.check, &row.detail);
        println!("  {op:16} {dtype:5} {check:10} {detail}");
    }
    let seen = &qualification.stability;
    println!(
        "stability: {} rounds of {} operations in {:.0} s, {} lies; {} of memory, {} errors",
        seen.rounds,
        seen.ops_per_round,
        seen.seconds,
        seen.lies,
        show::bytes(seen.memory_bytes as f64),
        seen.memory_errors
    );
    let roofs = &qualification.speed.roofs;
    let peaks = roofs.matrix.iter();
    let peaks: Vec<String> =
        peaks.map(|(dtype, peak)| format!("{dtype} {}FLOP/s", show::count(*peak))).collect();
    println!("speed: {}, {}B/s", peaks.join(", "), show::count(roofs.memory));
    for row in &qualification.speed.rows {
        let (op, dtype, ms, share) = (row.op, &row.dtype, row.ms, 100.0 * row.roof_fraction);
        println!("  {op:16} {dtype:5} {ms:>10.3} ms {share:>5.0}% of its roof  {}", row.shape);
    }
    let Some(forecast) = &qualification.forecast else { return };
    let source = if forecast.tokens_per_s_measured.is_some() { "measured" } else { "predicted" };
    println!(
        "{} in {}: {} to train, {} to serve, of {}",
        forecast.model,
        forecast.dtype,
        show::bytes(forecast.memory_bytes as f64),
        show::bytes(forecast.serving_bytes as f64),
        show::bytes(forecast.device_bytes as f64)
    );
    println!(
        "  {} tokens/s {source} ({} predicted); {} tokens take {:.2} days, {:.1} device-hours",
        show::count(forecast.tokens_per_s),
        show::count(forecast.tokens_per_s_predicted),
        show::count(forecast.tokens),
        forecast.days,
        forecast.device_hours
    );
    println!(
        "  {:.2} faults a day: {:.1} until the end, goodput {:.1}%",
        forecast.faults_per_day,
        forecast.faults_expected,
        100.0 * forecast.goodput
    );
}
