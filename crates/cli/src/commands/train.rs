//! `pontoon train`: a run on workers under a supervisor, one if nothing else is said, with a
//! progress line; with `--in-process` the plain loop on one device.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pontoon_fleet::control::ControlSocket;
use pontoon_fleet::processes::Processes;
use pontoon_fleet::run_dir::{Event, EventKind};
use pontoon_fleet::snapshot::{is_url, place};
use pontoon_fleet::supervisor::Tolerance;
use pontoon_fleet::world::{Disk, Launching, SystemClock};
use pontoon_qualify::compare::{Experts, Limits, Sizes};
use pontoon_sim::chaos::{self, ChaosDisk, Plan};
use pontoon_train::{Beginning, Devices, Metrics, Observer, Run, RunConfig, Start, Summary};

use super::{faults, show, worker};
use crate::steps::sizes;
use crate::{devices, snapshot_place};

/// The arguments of `pontoon train`.
#[derive(Args)]
pub struct Arguments {
    /// The settings, or the folder of a run to go on with.
    run: PathBuf,
    /// The run folder; by default beside the settings, named as the file without .toml.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The device, as in `pontoon devices`; more than one makes a fleet.
    #[arg(long = "device", value_name = "DEV")]
    devices: Vec<String>,
    /// Worker processes under the supervisor; the devices are dealt out in turn. By default one
    /// for each device.
    #[arg(long)]
    workers: Option<usize>,
    /// Compute in this process, without supervisor and workers, to measure or to debug: such a run
    /// cannot be moved while it lives, and ends with its device.
    #[arg(long, conflicts_with = "workers")]
    in_process: bool,
    /// Steps in all, instead of train.steps.
    #[arg(long)]
    steps: Option<u64>,
    /// Change one setting, as in train.lr=1e-3.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    changes: Vec<String>,
    /// Go on from the newest snapshot in the run folder.
    #[arg(long)]
    resume: bool,
    /// Inject the faults of this plan, to see the run survive them.
    #[arg(long, value_name = "PLAN.toml")]
    chaos: Option<PathBuf>,
    /// Print every setting as TOML and stop.
    #[arg(long)]
    print_config: bool,
    /// Print one JSON object at the end.
    #[arg(long)]
    json: bool,
}

/// Set by the first Ctrl-C or SIGTERM; the run stops at the next step.
static STOP: AtomicBool = AtomicBool::new(false);

/// Trains.
pub fn run(arguments: &Arguments) -> Result<()> {
    let (settings, dir) = places(arguments);
    let mut changes = arguments.changes.clone();
    changes.extend(arguments.steps.map(|steps| format!("train.steps={steps}")));
    if !arguments.devices.is_empty() {
        changes.push(format!("fleet.devices={:?}", arguments.devices));
    }
    changes.extend(arguments.workers.map(|count| format!("fleet.workers={count}")));
    let config = RunConfig::read(&settings, &changes)?;
    if arguments.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; once more stops at once");
    })
    .context("cannot catch Ctrl-C")?;
    let base = settings.parent().unwrap_or(Path::new("")).to_owned();
    let base =
        std::path::absolute(if base.as_os_str().is_empty() { Path::new(".") } else { &base })?;
    let to = place(config.snapshot.to.as_deref(), &base, &dir);
    if arguments.in_process {
        expect_alone(&config, &to)?;
    }
    let supervised = !arguments.in_process;
    let real = snapshot_place::disk_of(&to, &dir.join("upload"))?;
    let plan = arguments.chaos.as_ref().map(|path| read_plan(path, &config, supervised));
    let plan = plan.transpose()?;
    let struck = plan.as_ref().map(|plan| ChaosDisk::new(&*real, plan.of_disk()));
    let disk: &dyn Disk = struck.as_ref().map_or(&*real, |disk| disk);
    let device = config.fleet.devices[0].clone();
    let dtype = config.train.dtype.dtype();
    let mut run = Run {
        config,
        base,
        dir,
        start: if arguments.resume { Start::Resume } else { Start::Fresh },
        peak_flops: None,
        stop: &STOP,
        disk,
        clock: &SystemClock,
        control: &ControlSocket,
    };
    let mut display = Display::new();
    let summary = if supervised {
        run.peak_flops = Some(fleet_peak(&run.config)?);
        supervise(&run, plan.as_ref(), &mut display)
    } else {
        // First, as closing a device can close another of its kind that this process has open.
        run.peak_flops = Some(devices::peak_flops(&device, dtype)?);
        let mut backend = devices::open(&device)?;
        pontoon_train::train(&run, backend.as_mut(), &mut display).map_err(Into::into)
    };
    display.bar.finish_and_clear();
    let summary = summary?;
    report(arguments, &run, &summary, supervised)
}

/// Refuses what a run without workers cannot do.
fn expect_alone(config: &RunConfig, snapshots: &Path) -> Result<()> {
    let workers = config.workers();
    ensure!(
        workers == 1,
        "--in-process computes on one device, but the settings name {workers} workers; leave it \
         out, or add --set fleet.workers=1"
    );
    // An upload is done in the background, beside a worker.
    ensure!(
        !is_url(snapshots),
        "--in-process keeps snapshots in a folder, not in `{}`; leave it out, or set snapshot.to",
        snapshots.display()
    );
    Ok(())
}

/// Prints how a run ended: one JSON object, or lines for people.
fn report(arguments: &Arguments, run: &Run<'_>, summary: &Summary, supervised: bool) -> Result<()> {
    if arguments.json {
        println!("{}", serde_json::to_string(summary)?);
    } else {
        let loss = summary.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
        let valid = summary.valid_loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
        let (steps, speed) = (summary.steps, show::count(summary.tokens_per_s));
        eprintln!("step {steps}  loss {loss}  valid {valid}  {speed} tokens/s");
        if supervised {
            let faults = faults::of_run(&run.dir)?;
            if !faults.is_empty() {
                faults::table(&faults).iter().for_each(|line| eprintln!("{line}"));
            }
            eprintln!("{}", faults::account(summary.goodput, summary.lost_s.clone()));
        }
        eprintln!("weights_blake3 {}", summary.weights_blake3);
        if !summary.finished {
            eprintln!("stopped; go on with: pontoon train {} --resume", run.dir.display());
        }
    }
    Ok(())
}

/// Reads a plan of faults for a run.
fn read_plan(path: &Path, config: &RunConfig, supervised: bool) -> Result<Plan> {
    let origin = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the plan of faults `{origin}`"))?;
    // Without workers none has a number that is too high; that there is none is said below.
    let workers = if supervised { config.workers() } else { usize::MAX };
    let (steps, snapshot_every) = (config.train.steps, config.snapshot.every);
    let plan = Plan::parse(&text, &origin, chaos::Run { workers, steps, snapshot_every })?;
    ensure!(
        supervised || plan.of_disk().count() == plan.faults().len(),
        "--chaos needs workers to strike; leave --in-process out"
    );
    Ok(plan)
}

/// What all devices of a fleet can do at most; workers on one device share it.
fn fleet_peak(config: &RunConfig) -> Result<f64> {
    let mut names: Vec<&String> = config.fleet.devices.iter().take(config.workers()).collect();
    names.sort();
    names.dedup();
    let dtype = config.train.dtype.dtype();
    names.into_iter().map(|name| devices::peak_flops(name, dtype)).sum()
}

/// Runs with a worker process for each device.
fn supervise(run: &Run<'_>, plan: Option<&Plan>, display: &mut Display) -> Result<Summary> {
    let names = devices::dealt(&run.config.fleet.devices, run.config.workers())?;
    let dir = std::path::absolute(&run.dir)?;
    let mut snapshots = place(run.config.snapshot.to.as_deref(), &run.base, &run.dir);
    if !is_url(&snapshots) {
        snapshots = std::path::absolute(snapshots)?;
    }
    let start = worker::Command { dir: &dir, snapshots: &snapshots, chaos: plan };
    let mut processes = Processes { command: |what: &Launching| start.of(what) };
    let deal =
        |names: &[String]| devices::dealt(names, names.len()).map_err(|error| show::error(&error));
    let devices = Devices { names: &names, tolerance: tolerance(run)?, deal: &deal };
    Ok(pontoon_train::supervise(run, &devices, &mut processes, display)?)
}

/// How far devices of two numeric classes may be apart on a run's model, by the limits of
/// `pontoon compare`.
fn tolerance(run: &Run<'_>) -> Result<Tolerance> {
    let model = pontoon_train::model_of(&run.config, &run.base)?;
    let sizes = sizes(&model, run.config.train.dtype.dtype(), 1);
    let gradient = Limits::of(&sizes, 1.0).gradient_error;
    // A loss is rounded on the way through the layers once, a gradient twice; but where nearly
    // all is learnt, a few rows decide both.
    let loss = gradient;
    // Rows that go to another expert go to a better one as often as to a worse.
    let curve = Limits::of(&Sizes { experts: Experts::None, ..sizes }, 1.0).gradient_error;
    Ok(Tolerance { gradient, loss, curve })
}

/// The settings' file and the run folder.
fn places(arguments: &Arguments) -> (PathBuf, PathBuf) {
    let given = &arguments.run;
    let (settings, dir) = if given.is_dir() {
        (given.join("run.toml"), given.clone())
    } else {
        (given.clone(), given.with_extension(""))
    };
    (settings, arguments.dir.clone().unwrap_or(dir))
}

/// The progress line; where stderr is no terminal, a line about every twentieth of the run.
pub struct Display {
    bar: ProgressBar,
    terminal: bool,
    step: u64,
    steps: u64,
    seconds: f64,
    done: u64,
}

impl Display {
    /// An empty line.
    pub fn new() -> Display {
        let bar = ProgressBar::new(0);
        let style = "{bar:24} {pos}/{len}  {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        let terminal = std::io::stderr().is_terminal();
        Display { bar, terminal, step: 0, steps: 0, seconds: 0.0, done: 0 }
    }
}

impl Observer for Display {
    fn begin(&mut self, start: &Beginning) {
        self.bar.set_length(start.steps);
        self.bar.set_position(start.step);
        (self.step, self.steps) = (start.step, start.steps);
        eprintln!(
            "{} parameters, {} tokens a step, {} tokens of data, {} in use",
            show::count(start.parameters as f64),
            show::count(start.step_tokens as f64),
            show::count(start.data_tokens as f64),
            show::bytes(start.memory_bytes as f64),
        );
    }

    fn step(&mut self, metrics: &Metrics) {
        self.step = metrics.step;
        self.seconds += metrics.step_ms / 1e3;
        self.done += 1;
        let rest = (self.steps - self.step) as f64 * self.seconds / self.done as f64;
        let mut message =
            format!("loss {:.4}  {} tokens/s", metrics.loss, show::count(metrics.tokens_per_s));
        if let Some(mfu) = metrics.mfu {
            message += &format!("  MFU {:.0}%", 100.0 * mfu);
        }
        if let Some(valid) = metrics.valid_loss {
            message += &format!("  valid {valid:.4}");
        }
        message += &format!("  ETA {}", show::duration(rest));
        let every = (self.steps / 20).max(1);
        if self.terminal {
            self.bar.set_position(metrics.step);
            self.bar.set_message(message);
        } else if self.done == 1 || self.step.is_multiple_of(every) || self.step == self.steps {
            eprintln!("step {}/{}  {message}", self.step, self.steps);
        }
    }

    fn event(&mut self, event: &Event) {
        let said = match event.kind {
            EventKind::Snapshot | EventKind::Started | EventKind::Finished => return,
            EventKind::Resumed => format!("resumed at step {}", event.step),
            EventKind::Moved => {
                format!("step {}: moved {}", event.step, event.action.as_deref().unwrap_or("?"))
            }
            kind => {
                let cause = event.cause.as_deref().unwrap_or_default();
                format!("step {}: {kind:?}: {cause}", event.step)
            }
        };
        self.bar.suspend(|| eprintln!("{said}"));
    }

    fn note(&mut self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}
