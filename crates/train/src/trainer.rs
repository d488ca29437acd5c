//! The loop: steps, metrics, validation, snapshots, and going on from where a run stopped.
//!
//! Time and disk arrive as `fleet::world` traits, the device as a `Backend`, the display as an
//! [`Observer`]. One device in one process, to measure and to debug; runs as people start them are
//! in `supervised.rs`. Read next: `step.rs`, `run_files.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pontoon_fleet::control::{Answer, Asked, Request};
use pontoon_fleet::run_dir::{Event, EventKind, EventLog, JsonLines, RunDir};
use pontoon_fleet::snapshot::{Snapshot, SnapshotWriter, is_url, place, weights_blake3};
use pontoon_fleet::supervisor::SKIPS;
use pontoon_fleet::world::{Clock, Control, Disk};
use pontoon_models::{HostWeights, Model, ModelConfig, Tokenizer, Weights, preset};
use pontoon_ops::Backend;
use serde::Serialize;

use crate::config::{NonFiniteName, RunConfig};
use crate::data::{Batch, Cut, Dataset, Order};
use crate::error::TrainError;
use crate::requests::Requests;
use crate::run_files::{
    Saving, SnapshotFrame, Values, classes_of, newest, restore_moments, restore_weights, samples,
};
use crate::step::{StepResult, TrainingState, fits, tensor_refs};
use crate::tensorboard::TensorBoard;

/// What a run is given.
pub struct Run<'a> {
    /// The settings; relative paths in them are relative to `base`.
    pub config: RunConfig,
    /// The folder of the settings' file.
    pub base: PathBuf,
    /// The run folder.
    pub dir: PathBuf,
    /// Whether to go on from the newest snapshot.
    pub start: Start,
    /// Floating-point operations per second the device can do at most, where measured.
    pub peak_flops: Option<f64>,
    /// Set from outside to stop after the present step.
    pub stop: &'a AtomicBool,
    /// The disk.
    pub disk: &'a dyn Disk,
    /// The clock.
    pub clock: &'a dyn Clock,
    /// Where people reach it while it lives.
    pub control: &'a dyn Control,
}

/// How a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// From nothing, in a folder without snapshots.
    Fresh,
    /// From the newest good snapshot; from nothing if there is none.
    Resume,
}

/// Sees a run go on.
pub trait Observer {
    /// Before the first step: what will be trained.
    fn begin(&mut self, start: &Beginning);
    /// After every step.
    fn step(&mut self, metrics: &Metrics);
    /// Something worth a line.
    fn event(&mut self, event: &Event);
    /// A line that is no event of the run.
    fn note(&mut self, line: &str);
}

/// What will be trained.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// Trainable and frozen parameters.
    pub parameters: u64,
    /// Steps done before.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Tokens of one step.
    pub step_tokens: u64,
    /// Tokens of one epoch.
    pub data_tokens: u64,
    /// Bytes the device holds.
    pub memory_bytes: usize,
}

/// One line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// The step, from 1.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Mean loss of the step.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens over the step's time.
    pub tokens_per_s: f64,
    /// The step's time.
    pub step_ms: f64,
    /// Model flops over the measured peak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Useful step time over wall time so far.
    pub goodput: f64,
    /// Workers that computed it.
    pub workers: u32,
    /// Micro-batches by the numeric class of the device that computed them, under a supervisor.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub classes: BTreeMap<String, u32>,
    /// The largest relative error between two classes of a tensor's gradient, where one was
    /// audited by the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_error: Option<f64>,
    /// By what share of the mean load the busiest expert is above it, where the model balances.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imbalance: Option<f64>,
    /// Mean loss of the validation data, on steps that validate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Steps done in all.
    pub steps: u64,
    /// The last step's loss.
    pub loss: Option<f64>,
    /// The last validation's loss.
    pub valid_loss: Option<f64>,
    /// The hash over all weights.
    pub weights_blake3: String,
    /// Tokens over time, of the steps done now.
    pub tokens_per_s: f64,
    /// Useful step time over wall time.
    pub goodput: f64,
    /// Both, in seconds; the difference is what `lost_s` adds up to under a supervisor.
    pub useful_s: f64,
    /// All of the time.
    pub wall_s: f64,
    /// Faults survived.
    pub faults: u64,
    /// The run folder.
    pub dir: PathBuf,
    /// Whether all steps are done.
    pub finished: bool,
    /// Seconds lost, by cause.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub lost_s: BTreeMap<String, f64>,
}

/// The model a configuration names, with the tokenizer's vocabulary.
pub fn model_of(config: &RunConfig, base: &Path) -> Result<Model, TrainError> {
    let wrong = |what: &str| TrainError::Config { origin: "[model]".into(), what: what.into() };
    let mut found = match (&config.model.preset, &config.model.config, &config.model.init) {
        (Some(name), ..) => preset(name)?,
        (None, Some(path), _) => ModelConfig::from_file(&base.join(path))?,
        (None, None, Some(folder)) => ModelConfig::from_folder(&base.join(folder))?,
        (None, None, None) => {
            return Err(wrong("give preset, config or init; `pontoon new` writes a run.toml"));
        }
    };
    if let Some(path) = &config.data.tokenizer {
        let tokenizer = Tokenizer::from_file(&base.join(path))?;
        if config.model.preset.is_some() {
            found = found.with_vocab_size(tokenizer.vocab_size());
            found.eos = tokenizer.end_tokens_by_name();
        }
        tokenizer.padding_of(&found)?;
    }
    Ok(Model::new(found)?)
}

/// Trains until the last step, a stop, or an error; the state on disk is whole in every case.
pub fn train(
    run: &Run<'_>,
    backend: &mut dyn Backend,
    observer: &mut dyn Observer,
) -> Result<Summary, TrainError> {
    let mut config = run.config.clone();
    let model = model_of(&config, &run.base)?;
    fits(&model, config.data.sequence)?;
    let absolute = |path: &PathBuf| run.base.join(path);
    config.data.tokenizer = config.data.tokenizer.as_ref().map(absolute);
    let data = Data::open(&config, &model, &run.base)?;
    let folder = RunDir::open(run.disk, &run.dir, std::process::id())?;
    let snapshots = place(config.snapshot.to.as_deref(), &run.base, folder.path());
    let writer = SnapshotWriter::open(run.disk, &snapshots)?;
    let mut events = EventLog::open(run.disk, run.clock, &folder.events())?;
    let snapshot = match run.start {
        Start::Fresh => refuse_old_run(run, &snapshots)?,
        Start::Resume => newest(run.disk, &snapshots, &mut events)?,
    };
    let weights = first_weights(run, &config, &model, snapshot.as_ref())?;
    let mut state = TrainingState::load(backend, &model, &config, &weights)?;
    drop(weights);
    if let Some(snapshot) = &snapshot {
        restore_moments(snapshot, &model, &mut state, backend)?;
    }
    let step = snapshot.as_ref().map_or(0, |snapshot| snapshot.state.step);
    let written = snapshot.as_ref().map(|of| (of.state.backend.clone(), classes_of(&of.state)));
    drop(snapshot);
    write_settings(run, &config)?;
    let mut metrics = JsonLines::open(run.disk, &folder.metrics())?;
    metrics.truncate_after_step(step)?;
    let unix = run.clock.unix_time().as_secs_f64();
    let mut session = Session {
        run,
        frame: SnapshotFrame::new(&model, &config)?,
        board: TensorBoard::create(run.disk, &run.dir, unix)?,
        config: &config,
        model: &model,
        state,
        data,
        writer: &writer,
        metrics,
        events,
        requests: Requests::open(run, observer),
        observer,
        step,
        saved: None,
        skips: 0,
        faults: 0,
        classes: BTreeSet::from([backend.info().numeric_class.clone()]),
        last: Last::default(),
    };
    session.begin(backend)?;
    if let Some((class, classes)) = written {
        session.goes_on(&class, classes)?;
    }
    let result = session.go(backend);
    session.requests.ended(&result);
    result
}

pub(crate) fn refuse_old_run(
    run: &Run<'_>,
    snapshots: &Path,
) -> Result<Option<Snapshot>, TrainError> {
    let steps = pontoon_fleet::snapshot::SnapshotReader::new(run.disk, snapshots).list()?;
    match steps.first() {
        None => Ok(None),
        Some(step) => Err(TrainError::Folder {
            dir: run.dir.clone(),
            what: format!("holds a run at step {step}; add --resume to go on, or another --dir"),
        }),
    }
}

fn first_weights(
    run: &Run<'_>,
    config: &RunConfig,
    model: &Model,
    snapshot: Option<&Snapshot>,
) -> Result<HostWeights, TrainError> {
    match (snapshot, &config.model.init) {
        (Some(snapshot), _) => restore_weights(snapshot, model, config),
        (None, Some(folder)) => Ok(model.load(&Weights::open(&run.base.join(folder))?)?),
        (None, None) => Ok(model.initialise(config.train.seed)),
    }
}

/// Writes `run.toml` as resolved, whole or not at all.
pub(crate) fn write_settings(run: &Run<'_>, config: &RunConfig) -> Result<(), TrainError> {
    let (path, temporary) = (run.dir.join("run.toml"), run.dir.join(".run.toml.tmp"));
    let mut config = config.clone();
    let absolute = |pattern: &String| run.base.join(pattern).display().to_string();
    config.data.train = config.data.train.iter().map(absolute).collect();
    config.data.valid = config.data.valid.iter().map(absolute).collect();
    config.model.config = config.model.config.map(|path| run.base.join(path));
    config.model.init = config.model.init.map(|path| run.base.join(path));
    let to = config.snapshot.to.take();
    config.snapshot.to = to.map(|to| if is_url(&to) { to } else { run.base.join(to) });
    let write = || -> std::io::Result<()> {
        let mut file = run.disk.create_file(&temporary)?;
        file.write_all(config.to_toml().as_bytes())?;
        file.sync()?;
        run.disk.rename(&temporary, &path)
    };
    write().map_err(|source| TrainError::WriteFile { path: path.clone(), source })
}

pub(crate) struct Data {
    pub(crate) train: Dataset,
    valid: Option<Dataset>,
}

impl Data {
    pub(crate) fn open(config: &RunConfig, model: &Model, base: &Path) -> Result<Data, TrainError> {
        let vocabulary = match &config.data.tokenizer {
            Some(path) => Tokenizer::from_file(path)?.vocab_size(),
            None => model.config.vocab_size,
        };
        let cut = Cut { vocabulary, sequence: config.data.sequence };
        let order = Order::Shuffled { seed: config.train.seed };
        let train = Dataset::open(&config.data.train, base, cut, order)?;
        let valid = match config.data.valid.as_slice() {
            [] => None,
            patterns => Some(Dataset::open(patterns, base, cut, Order::Sequential)?),
        };
        Ok(Data { train, valid })
    }

    /// The batches of one validation; none without validation data.
    pub(crate) fn validation(&self, config: &RunConfig) -> Vec<Batch> {
        let Some(valid) = &self.valid else { return Vec::new() };
        let size = config.train.micro_batch;
        let whole = valid.sequences().div_ceil(size as u64);
        let count = whole.min(config.train.valid_batches.max(1));
        let mut batches = vec![Batch::default(); count as usize];
        for (index, batch) in batches.iter_mut().enumerate() {
            valid.batch((index * size) as u64, size, batch);
        }
        batches
    }
}

/// What is known of the steps done now.
#[derive(Default)]
struct Last {
    loss: Option<f64>,
    valid_loss: Option<f64>,
    useful: Duration,
    tokens: u64,
}

struct Session<'a> {
    run: &'a Run<'a>,
    config: &'a RunConfig,
    model: &'a Model,
    frame: SnapshotFrame,
    state: TrainingState,
    data: Data,
    writer: &'a SnapshotWriter<'a>,
    metrics: JsonLines<'a>,
    events: EventLog<'a>,
    board: TensorBoard,
    observer: &'a mut dyn Observer,
    requests: Requests,
    step: u64,
    saved: Option<u64>,
    /// Steps skipped in a row.
    skips: u32,
    /// Wrong results found by checks.
    faults: u64,
    /// Of the devices that took part.
    classes: BTreeSet<String>,
    last: Last,
}

impl Session<'_> {
    fn begin(&mut self, backend: &mut dyn Backend) -> Result<(), TrainError> {
        let kind = match self.step {
            0 => EventKind::Started,
            _ => EventKind::Resumed,
        };
        let device = Some(backend.info().device.clone());
        self.tell(Event { device, ..Event::new(self.step, kind) })?;
        self.observer.begin(&Beginning {
            parameters: self.model.table.parameter_count() as u64,
            step: self.step,
            steps: self.config.train.steps,
            step_tokens: samples(self.config) * self.config.data.sequence as u64,
            data_tokens: self.data.train.tokens() as u64,
            memory_bytes: backend.memory_used(),
        });
        Ok(())
    }

    /// Notes the devices of the run's earlier lives, and a change of their class.
    fn goes_on(&mut self, written_by: &str, classes: Vec<String>) -> Result<(), TrainError> {
        if let Some(now) = self.classes.first().filter(|class| *class != written_by).cloned() {
            let cause = Some(format!("the snapshot was written by {written_by}"));
            let action = Some(format!("{now} applies the steps from here on"));
            let event = Event::new(self.step, EventKind::TookOver);
            self.tell(Event { cause, action, ..event })?;
        }
        self.classes.extend(classes);
        Ok(())
    }

    fn go(&mut self, backend: &mut dyn Backend) -> Result<Summary, TrainError> {
        let begun = self.run.clock.now();
        let mut batches = vec![Batch::default(); self.config.train.micro_batches];
        let steps = self.config.train.steps;
        while self.step < steps && !self.stop() {
            let done = self.one_step(backend, &mut batches, begun);
            if let Err(TrainError::NonFinite { .. }) = done {
                // Nothing was applied: the state before the step is worth keeping.
                self.save(backend)?;
            }
            done?;
            let every = self.config.snapshot.every;
            if every > 0 && self.step.is_multiple_of(every) {
                self.save(backend)?;
            }
        }
        let hash = match self.saved {
            Some(step) if step == self.step => self.hash(backend)?,
            _ => self.save(backend)?,
        };
        self.metrics.sync()?;
        let wall = self.run.clock.now().duration_since(begun);
        let finished = self.step == steps;
        if finished {
            self.tell(Event::new(self.step, EventKind::Finished))?;
        }
        let useful = self.last.useful.as_secs_f64();
        Ok(Summary {
            steps: self.step,
            loss: self.last.loss,
            valid_loss: self.last.valid_loss,
            weights_blake3: hash,
            tokens_per_s: self.last.tokens as f64 / useful.max(1e-9),
            goodput: useful / wall.as_secs_f64().max(1e-9),
            useful_s: useful,
            wall_s: wall.as_secs_f64(),
            faults: self.faults,
            dir: self.run.dir.clone(),
            finished,
            lost_s: BTreeMap::new(),
        })
    }

    /// Answers what was asked since the last step; whether the run is to stop.
    fn stop(&mut self) -> bool {
        while let Some(asked) = self.requests.next() {
            let answer = self.answer(&asked);
            asked.answer(answer);
        }
        self.requests.stop() || self.run.stop.load(Ordering::Relaxed)
    }

    fn answer(&self, asked: &Asked) -> Answer {
        match asked.request {
            Request::Move { .. } => Answer::refused(
                "it was started with --in-process and cannot be moved while it lives: stop it, and \
                 go on with --resume --device DEV",
            ),
            Request::Stop | Request::Status => {
                let (step, steps) = (self.step, self.config.train.steps);
                let answer = Answer::done(format!("step {step} of {steps}"));
                answer.with("step", step).with("steps", steps)
            }
        }
    }

    fn may_skip(&self) -> bool {
        self.config.train.non_finite == NonFiniteName::Skip && self.skips < SKIPS
    }

    fn one_step(
        &mut self,
        backend: &mut dyn Backend,
        batches: &mut [Batch],
        begun: std::time::Instant,
    ) -> Result<(), TrainError> {
        let started = self.run.clock.now();
        let (train, step) = (&self.config.train, self.step + 1);
        for (index, batch) in batches.iter_mut().enumerate() {
            let position = self.step * samples(self.config) + (index * train.micro_batch) as u64;
            self.data.train.batch(position, train.micro_batch, batch);
        }
        let result = match self.state.step(backend, step, batches) {
            Err(TrainError::NonFinite { what, value, .. }) if self.may_skip() => {
                self.skips += 1;
                let cause = Some(format!("{what} is {value}"));
                let action =
                    Some("its data is passed over; the weights stay as they are".to_owned());
                let event = Event::new(step, EventKind::Skipped);
                self.tell(Event { cause, action, ..event })?;
                StepResult { loss: f64::NAN, gradient_norm: f64::NAN, lr: 0.0, imbalance: None }
            }
            result => {
                self.skips = 0;
                result?
            }
        };
        for cause in self.state.take_findings() {
            let action = Some("computed again".to_owned());
            let event = Event::new(step, EventKind::Corrupt);
            self.tell(Event { cause: Some(cause), action, ..event })?;
            self.faults += 1;
        }
        let now = self.run.clock.now();
        let taken = now.duration_since(started);
        self.step = step;
        self.last.useful += taken;
        self.last.loss = Some(result.loss);
        let tokens = samples(self.config) * self.config.data.sequence as u64;
        self.last.tokens += tokens;
        let due = train.valid_every > 0 && step.is_multiple_of(train.valid_every);
        let valid_loss = match due || step == train.steps {
            true => self.validate(backend)?,
            false => None,
        };
        let flops = self.state.model_flops();
        let wall = now.duration_since(begun).as_secs_f64();
        let metrics = Metrics {
            step,
            tokens: step * tokens,
            loss: result.loss,
            grad_norm: result.gradient_norm,
            lr: result.lr,
            tokens_per_s: tokens as f64 / taken.as_secs_f64().max(1e-9),
            step_ms: taken.as_secs_f64() * 1e3,
            mfu: self.run.peak_flops.map(|peak| flops / taken.as_secs_f64().max(1e-9) / peak),
            goodput: self.last.useful.as_secs_f64() / wall.max(1e-9),
            workers: 1,
            classes: BTreeMap::new(),
            class_error: None,
            imbalance: result.imbalance,
            valid_loss,
        };
        self.metrics.append(&metrics)?;
        self.plot(&metrics)?;
        self.observer.step(&metrics);
        Ok(())
    }

    fn plot(&mut self, metrics: &Metrics) -> Result<(), TrainError> {
        let mut scalars = vec![
            ("train/loss", metrics.loss),
            ("train/grad_norm", metrics.grad_norm),
            ("train/lr", metrics.lr),
            ("speed/tokens_per_s", metrics.tokens_per_s),
        ];
        scalars.extend(metrics.valid_loss.map(|loss| ("valid/loss", loss)));
        scalars.extend(metrics.imbalance.map(|share| ("train/imbalance", share)));
        scalars.extend(metrics.mfu.map(|mfu| ("speed/mfu", mfu)));
        let unix = self.run.clock.unix_time().as_secs_f64();
        self.board.scalars(unix, metrics.step, &scalars)
    }

    fn validate(&mut self, backend: &mut dyn Backend) -> Result<Option<f64>, TrainError> {
        let batches = self.data.validation(self.config);
        if batches.is_empty() {
            return Ok(None);
        }
        self.last.valid_loss = Some(self.state.score(backend, &batches)?);
        Ok(self.last.valid_loss)
    }

    /// Writes a snapshot. Where that fails the run ends: its state is that of the one before.
    fn save(&mut self, backend: &mut dyn Backend) -> Result<String, TrainError> {
        let saved = self.write_snapshot(backend);
        if let Err(error) = &saved {
            let event = Event::new(self.step, EventKind::SnapshotFailed);
            let cause = Some(error.to_string());
            // The same disk may refuse this line as well; the run's error says what happened.
            let _ = self.events.append(&Event { cause, ..event });
        }
        saved
    }

    fn write_snapshot(&mut self, backend: &mut dyn Backend) -> Result<String, TrainError> {
        self.metrics.sync()?;
        let weights = self.state.weights(backend, self.model)?;
        let moments = self.state.moments(backend)?;
        let written = Saving {
            writer: self.writer,
            frame: &self.frame,
            config: self.config,
            model: self.model,
            values: Values::Held(&weights, [&moments[0].1, &moments[1].1]),
            numeric_class: &backend.info().numeric_class,
            classes: &self.classes,
            step: self.step,
        }
        .write()?;
        self.saved = Some(self.step);
        let action = Some(written.folder.display().to_string());
        self.tell(Event { action, ..Event::new(self.step, EventKind::Snapshot) })?;
        Ok(written.weights_blake3)
    }

    fn hash(&self, backend: &mut dyn Backend) -> Result<String, TrainError> {
        let weights = self.state.weights(backend, self.model)?;
        Ok(weights_blake3(tensor_refs(self.model, &self.frame.slices, &weights))?)
    }

    fn tell(&mut self, event: Event) -> Result<(), TrainError> {
        self.events.append(&event)?;
        self.observer.event(&event);
        Ok(())
    }
}
