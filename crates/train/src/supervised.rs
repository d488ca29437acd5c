//! A run under a supervisor: does what the state machine in `fleet` says, writes its metrics and
//! events, and saves snapshots in the background.
//!
//! Holds no device: those are in workers. Read next: `replica.rs`, the workers' side.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use pontoon_fleet::control::{Answer, Asked, Request};
use pontoon_fleet::exchange::{Exchange, Layout};
use pontoon_fleet::inbox::Inbox;
use pontoon_fleet::policy::HangAfter;
use pontoon_fleet::protocol::{Area, Report, Source};
use pontoon_fleet::run_dir::{Event, EventKind, EventLog, JsonLines, RunDir};
use pontoon_fleet::snapshot::{SnapshotReader, SnapshotWriter, place};
use pontoon_fleet::supervisor::{
    Ending, Input, MoveOutcome, NonFinite, Output, Settings, StepDone, Supervisor, Tolerance,
    Validation,
};
use pontoon_fleet::world::{Disk, Launcher, Launching, Link};
use pontoon_models::Model;
use pontoon_ops::digest::{Blocks, of_digests};
use serde_json::{Value, json};

use crate::config::{HangSetting, NonFiniteName, RunConfig};
use crate::data::Batch;
use crate::digests::{TRAINABLE_BUFFERS, ranges};
use crate::error::TrainError;
use crate::replica::layout;
use crate::requests::Requests;
use crate::run_files::{Saving, SnapshotFrame, Values, expect_own, samples};
use crate::step::{STAGE, fits, model_flops, stages};
use crate::tensorboard::TensorBoard;
use crate::trainer::{
    Beginning, Data, Metrics, Observer, Run, Start, Summary, model_of, refuse_old_run,
    write_settings,
};

/// Gives each worker its device, from the names as people type them.
pub type Deal = dyn Fn(&[String]) -> Result<Vec<String>, String>;

/// What a supervisor is told of devices, none of which it opens.
pub struct Devices<'a> {
    /// That of each worker.
    pub names: &'a [String],
    /// How far those of different numeric classes may be apart on this model.
    pub tolerance: Tolerance,
    /// The devices of workers on other ones: the names as people type them, each for one worker.
    pub deal: &'a Deal,
}

/// Trains on workers, one for each device.
pub fn supervise(
    run: &Run<'_>,
    devices: &Devices<'_>,
    launcher: &mut dyn Launcher,
    observer: &mut dyn Observer,
) -> Result<Summary, TrainError> {
    let mut config = run.config.clone();
    let model = model_of(&config, &run.base)?;
    fits(&model, config.data.sequence)?;
    config.data.tokenizer = config.data.tokenizer.as_ref().map(|path| run.base.join(path));
    let data = Data::open(&config, &model, &run.base)?;
    let folder = RunDir::open(run.disk, &run.dir, std::process::id())?;
    let snapshots = place(config.snapshot.to.as_deref(), &run.base, folder.path());
    let writer = SnapshotWriter::open(run.disk, &snapshots)?;
    match run.start {
        Start::Fresh => drop(refuse_old_run(run, &snapshots)?),
        Start::Resume => expect_own(run.disk, &snapshots, &model, &config)?,
    }
    write_settings(run, &config)?;
    let layout = layout(&model, &config);
    let exchange = Exchange::create(&layout).map_err(TrainError::Exchange)?;
    let saver = Saver {
        frame: SnapshotFrame::new(&model, &config)?,
        config: &config,
        model: &model,
        layout,
        exchange: &exchange,
        writer: &writer,
        snapshots: &snapshots,
        disk: run.disk,
        classes: Mutex::new(BTreeSet::new()),
        newest: Mutex::new(None),
    };
    let (inputs, arrived) = mpsc::channel();
    let requests = Requests::open(run, observer);
    let mut driver = Driver {
        run,
        config: &config,
        data: &data,
        saver: &saver,
        launcher,
        observer,
        requests,
        inputs,
        links: Vec::new(),
        devices,
        moving: None,
        stop_told: false,
        metrics: JsonLines::open(run.disk, &folder.metrics())?,
        events: EventLog::open(run.disk, run.clock, &folder.events())?,
        board: board(run)?,
        begun: run.clock.now(),
        done: Done::default(),
        injected: BTreeSet::new(),
        flops: model_flops(&model, &config)?,
        memory_bytes: 0,
    };
    let mut supervisor = Supervisor::new(settings(run, &config, devices));
    let ending = drive(&mut driver, &mut supervisor, &arrived);
    // Workers end before the folder's lock is given up, whatever went wrong.
    driver.links.clear();
    let result = ending.and_then(|ending| driver.summary(ending, &supervisor));
    driver.requests.ended(&result);
    result
}

/// Hands every input to the supervisor and does what it asks for, until the run ends.
fn drive(
    driver: &mut Driver<'_>,
    supervisor: &mut Supervisor,
    arrived: &mpsc::Receiver<Input>,
) -> Result<Ending, TrainError> {
    let (run, saver) = (driver.run, driver.saver);
    let mut inbox = Inbox::new(arrived, run.clock);
    std::thread::scope(|scope| {
        let mut input = Input::Start;
        loop {
            driver.overhear(&input);
            let now = run.clock.now().duration_since(driver.begun);
            let outputs = supervisor.handle(now, input);
            driver.memory_bytes = supervisor.memory_bytes();
            for output in outputs {
                match output {
                    Output::End(ending) => return Ok(ending),
                    Output::Save { step, digest, numeric_class } => {
                        let inputs = driver.inputs.clone();
                        scope.spawn(move || saver.save(step, digest, &numeric_class, &inputs));
                    }
                    output => driver.obey(output)?,
                }
            }
            input = match driver.asked(supervisor) {
                Some(input) => input,
                None => inbox.next_input(),
            };
        }
    })
}

fn board(run: &Run<'_>) -> Result<TensorBoard, TrainError> {
    TensorBoard::create(run.disk, &run.dir, run.clock.unix_time().as_secs_f64())
}

fn settings(run: &Run<'_>, config: &RunConfig, devices: &Devices<'_>) -> Settings {
    Settings {
        devices: devices.names.to_vec(),
        tolerance: devices.tolerance,
        leaves: config.train.micro_batches as u32,
        steps: config.train.steps,
        seed: config.train.seed,
        snapshot_every: config.snapshot.every,
        save_patience: Duration::from_secs_f64(config.snapshot.patience),
        validation: match config.data.valid.as_slice() {
            [] => Validation::Never,
            _ => Validation::Every(config.train.valid_every),
        },
        audit: config.fleet.audit,
        hang_after: match config.fleet.hang_after {
            HangSetting::Seconds(seconds) => HangAfter::Fixed(Duration::from_secs_f64(seconds)),
            HangSetting::Word(_) => HangAfter::Auto,
        },
        non_finite: match config.train.non_finite {
            NonFiniteName::Stop => NonFinite::Stop,
            NonFiniteName::Skip => NonFinite::Skip,
        },
        source: if run.start == Start::Resume { Source::Snapshot } else { Source::Fresh },
    }
}

/// Writes snapshots from the exchange.
struct Saver<'a> {
    frame: SnapshotFrame,
    config: &'a RunConfig,
    model: &'a Model,
    layout: Layout,
    exchange: &'a Exchange,
    writer: &'a SnapshotWriter<'a>,
    /// Where it writes.
    snapshots: &'a Path,
    disk: &'a dyn Disk,
    /// The classes of devices that took part.
    classes: Mutex<BTreeSet<String>>,
    /// The newest snapshot's step and the hash of its weights.
    newest: Mutex<Option<(u64, String)>>,
}

impl Saver<'_> {
    fn save(&self, step: u64, digest: u64, numeric_class: &str, to: &Sender<Input>) {
        let written = self.write(step, digest, numeric_class);
        // A failed one is copied again.
        self.exchange.release(self.layout.area(Area::Snapshot), self.layout.state);
        let input = match written {
            Ok(folder) => Input::Saved { step, folder },
            Err(error) => Input::SaveFailed { step, cause: error.to_string() },
        };
        // Nobody listens only if the run has ended.
        let _ = to.send(input);
    }

    fn write(&self, step: u64, digest: u64, numeric_class: &str) -> Result<String, TrainError> {
        let from = self.layout.area(Area::Snapshot);
        let digests = self.digests(from).map_err(TrainError::Exchange)?;
        if of_digests(&digests) != digest {
            let text = "the state changed on its way to the snapshot; it was not written";
            return Err(TrainError::Supervised(text.to_owned()));
        }
        let classes = self.classes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let written = Saving {
            writer: self.writer,
            frame: &self.frame,
            config: self.config,
            model: self.model,
            values: Values::Shared(self.exchange, from),
            numeric_class,
            classes: &classes,
            step,
        }
        .write_checked(self.disk)?;
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        *newest = Some((step, written.weights_blake3));
        Ok(written.folder.display().to_string())
    }

    /// The hash over the weights of the snapshot of a step.
    fn stands(&self, step: u64) -> Result<String, TrainError> {
        Ok(SnapshotReader::new(self.disk, self.snapshots).outline(step)?.weights_blake3)
    }

    /// The digests of the parts of a state in the exchange.
    fn digests(&self, mut position: u64) -> std::io::Result<Vec<u64>> {
        let table = &self.model.table;
        let trainable = ranges(table).into_iter().map(|range| range.len());
        // Frozen tensors that a model has not are no part either.
        let frozen = Some(table.frozen_elements()).filter(|elements| *elements > 0);
        let parts = (0..TRAINABLE_BUFFERS).flat_map(|_| trainable.clone()).chain(frozen);
        let mut block = vec![0; STAGE];
        let mut digests = Vec::new();
        for bytes in parts.map(|elements| 4 * elements) {
            let mut check = Blocks::default();
            for (_, size) in stages(bytes) {
                let block = &mut block[..size];
                self.exchange.read(position, block)?;
                check.push(block);
                position += block.len() as u64;
            }
            digests.push(check.finish());
        }
        Ok(digests)
    }
}

/// What was done in this life of the run.
#[derive(Default)]
struct Done {
    step: u64,
    loss: Option<f64>,
    valid_loss: Option<f64>,
    tokens: u64,
    seconds: f64,
}

struct Driver<'a> {
    run: &'a Run<'a>,
    config: &'a RunConfig,
    data: &'a Data,
    saver: &'a Saver<'a>,
    launcher: &'a mut dyn Launcher,
    observer: &'a mut dyn Observer,
    requests: Requests,
    inputs: Sender<Input>,
    links: Vec<Option<Box<dyn Link>>>,
    devices: &'a Devices<'a>,
    /// Who asked for the move that is under way.
    moving: Option<Asked>,
    /// Whether the supervisor knows that the run is to stop.
    stop_told: bool,
    metrics: JsonLines<'a>,
    events: EventLog<'a>,
    board: TensorBoard,
    begun: Instant,
    done: Done,
    /// Faults injected so far, by their places in the plan.
    injected: BTreeSet<usize>,
    /// Floating-point operations of a step.
    flops: f64,
    /// Bytes that the workers' devices hold.
    memory_bytes: u64,
}

impl Driver<'_> {
    /// Notes what outlives the worker that says it.
    fn overhear(&mut self, input: &Input) {
        let Input::Report { report, .. } = input else { return };
        let mut classes = self.saver.classes.lock().unwrap_or_else(PoisonError::into_inner);
        match report {
            Report::Injected { fault, .. } => drop(self.injected.insert(*fault)),
            Report::Ready { device, .. } => classes.extend(device.classes.iter().cloned()),
            _ => {}
        }
    }

    /// Answers what can be answered at once; returns what the supervisor must hear of.
    fn asked(&mut self, supervisor: &Supervisor) -> Option<Input> {
        while let Some(asked) = self.requests.next() {
            let Request::Move { to } = &asked.request else {
                asked.answer(self.status(supervisor));
                continue;
            };
            if self.moving.is_some() {
                asked.answer(Answer::refused("another move is under way"));
                continue;
            }
            match (self.devices.deal)(to) {
                Err(text) => asked.answer(Answer::refused(text)),
                Ok(devices) => {
                    self.moving = Some(asked);
                    return Some(Input::Move { devices });
                }
            }
        }
        let stop = self.requests.stop() || self.run.stop.load(Ordering::Relaxed);
        let news = stop && !std::mem::replace(&mut self.stop_told, stop);
        news.then_some(Input::Stop)
    }

    /// A move is over: keeps its certificate, and tells who asked.
    fn moved(&mut self, outcome: MoveOutcome) {
        let certificate = outcome.certificate.map(|of| (of.step, json!(of)));
        let asked = self.moving.take();
        let mut text = outcome.text;
        if let (true, Some((step, certificate))) = (outcome.moved, &certificate) {
            let to = match asked.as_ref().map(|asked| &asked.request) {
                Some(Request::Move { to }) => to.clone(),
                _ => outcome.devices,
            };
            // The run is there, whatever its folder can hold.
            if let Err(error) = self.keep(*step, certificate, to) {
                text += &format!("; but {error}");
                self.observer.note(&error.to_string());
            }
        }
        let Some(asked) = asked else { return };
        let answer = if outcome.moved { Answer::done(text) } else { Answer::refused(text) };
        asked.answer(match certificate {
            Some((_, certificate)) => answer.with("certificate", certificate),
            None => answer,
        });
    }

    /// Writes the certificate down, and the settings with which the run is to be resumed.
    fn keep(&self, step: u64, certificate: &Value, to: Vec<String>) -> Result<(), TrainError> {
        let folder = self.run.dir.join("certificates");
        let path = folder.join(format!("move-{step:08}.json"));
        let write = || -> std::io::Result<()> {
            self.run.disk.create_dir_all(&folder)?;
            let mut file = self.run.disk.create_file(&path)?;
            file.write_all(format!("{certificate:#}\n").as_bytes())?;
            file.sync()
        };
        write().map_err(|source| TrainError::WriteFile { path: path.clone(), source })?;
        let mut config = self.config.clone();
        config.fleet.workers = Some(to.len());
        config.fleet.devices = to;
        write_settings(self.run, &config)
    }

    fn status(&self, supervisor: &Supervisor) -> Answer {
        let (step, steps) = (supervisor.step(), self.config.train.steps);
        let workers: Vec<Value> = supervisor.workers().iter().map(|of| json!(of)).collect();
        Answer::done(format!("step {step} of {steps}"))
            .with("step", step)
            .with("steps", steps)
            .with("goodput", supervisor.goodput())
            .with("faults", supervisor.faults())
            .with("workers", workers)
    }

    fn obey(&mut self, output: Output) -> Result<(), TrainError> {
        match output {
            Output::Launch { worker, incarnation, device, step } => {
                if self.links.len() <= worker {
                    self.links.resize_with(worker + 1, || None);
                }
                let exchange = self.saver.exchange.descriptor();
                let injected = self.injected.clone();
                let what = Launching { worker, incarnation, device, step, exchange, injected };
                match self.launcher.launch(&what, self.inputs.clone()) {
                    Ok(link) => self.links[worker] = Some(link),
                    Err(error) => {
                        let cause = format!("its process cannot be started: {error}");
                        let _ = self.inputs.send(Input::Gone { worker, incarnation, cause });
                    }
                }
            }
            Output::Kill { worker } => {
                if let Some(mut link) = self.links[worker].take() {
                    link.kill();
                }
            }
            Output::Send { worker, command } => {
                if let Some(link) = &mut self.links[worker] {
                    // A broken pipe is the end of the process, which is reported by itself.
                    let _ = link.send(&command);
                }
            }
            Output::Event(event) => self.event(&event)?,
            Output::Step(step) => self.step(&step)?,
            Output::Moved(outcome) => self.moved(*outcome),
            Output::Save { .. } | Output::End(_) => unreachable!("the loop takes these"),
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        self.events.append(event)?;
        if matches!(event.kind, EventKind::Started | EventKind::Resumed) {
            self.metrics.truncate_after_step(event.step)?;
            self.done.step = event.step;
            let model = self.saver.model;
            self.observer.begin(&Beginning {
                parameters: model.table.parameter_count() as u64,
                step: event.step,
                steps: self.config.train.steps,
                step_tokens: self.step_tokens(),
                data_tokens: self.data.train.tokens() as u64,
                memory_bytes: self.memory_bytes as usize,
            });
        }
        self.observer.event(event);
        Ok(())
    }

    fn step_tokens(&self) -> u64 {
        samples(self.config) * self.config.data.sequence as u64
    }

    fn step(&mut self, step: &StepDone) -> Result<(), TrainError> {
        let size = self.config.train.micro_batch;
        let mut batch = Batch::default();
        let mut valid = 0;
        for leaf in 0..self.config.train.micro_batches {
            let position = (step.step - 1) * samples(self.config) + (leaf * size) as u64;
            self.data.train.batch(position, size, &mut batch);
            valid += batch.valid;
        }
        let (tokens, seconds) = (self.step_tokens(), step.wall.as_secs_f64());
        let metrics = Metrics {
            step: step.step,
            tokens: step.step * tokens,
            loss: step.losses.iter().sum::<f64>() / valid.max(1) as f64,
            grad_norm: step.norm,
            lr: step.rates.lr,
            tokens_per_s: tokens as f64 / seconds.max(1e-9),
            step_ms: seconds * 1e3,
            mfu: self.run.peak_flops.map(|peak| self.flops / seconds.max(1e-9) / peak),
            goodput: step.goodput,
            workers: step.workers,
            classes: step.classes.clone(),
            class_error: step.apart,
            imbalance: step.rates.imbalance,
            valid_loss: step.valid_loss,
        };
        let mut classes = self.saver.classes.lock().unwrap_or_else(PoisonError::into_inner);
        classes.extend(step.classes.keys().cloned());
        drop(classes);
        self.done.step = step.step;
        self.done.loss = Some(metrics.loss);
        self.done.valid_loss = step.valid_loss.or(self.done.valid_loss);
        self.done.tokens += tokens;
        self.done.seconds += seconds;
        self.metrics.append(&metrics)?;
        let mut scalars = vec![
            ("train/loss", metrics.loss),
            ("train/grad_norm", metrics.grad_norm),
            ("train/lr", metrics.lr),
            ("speed/tokens_per_s", metrics.tokens_per_s),
            ("speed/goodput", metrics.goodput),
        ];
        scalars.extend(metrics.imbalance.map(|share| ("train/imbalance", share)));
        scalars.extend(metrics.valid_loss.map(|loss| ("valid/loss", loss)));
        let unix = self.run.clock.unix_time().as_secs_f64();
        self.board.scalars(unix, metrics.step, &scalars)?;
        self.observer.step(&metrics);
        Ok(())
    }

    fn summary(&mut self, ending: Ending, of: &Supervisor) -> Result<Summary, TrainError> {
        self.metrics.sync()?;
        match ending {
            Ending::Failed(text) => return Err(TrainError::Supervised(text)),
            Ending::NonFinite { step, what, value } => {
                return Err(TrainError::NonFinite { step, what, value, kept: step - 1 });
            }
            Ending::Finished | Ending::Stopped => {}
        }
        let newest = self.saver.newest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let hash = match newest {
            Some((_, hash)) => hash,
            // Nothing was done that the snapshot it began from does not hold.
            None => self.saver.stands(self.done.step)?,
        };
        let lost: BTreeMap<String, f64> =
            of.lost().into_iter().map(|(cause, seconds)| (cause.to_owned(), seconds)).collect();
        let (useful_s, wall_s) = of.useful();
        Ok(Summary {
            steps: self.done.step,
            loss: self.done.loss,
            valid_loss: self.done.valid_loss,
            weights_blake3: hash,
            tokens_per_s: self.done.tokens as f64 / self.done.seconds.max(1e-9),
            goodput: of.goodput(),
            useful_s,
            wall_s,
            faults: of.faults(),
            dir: self.run.dir.clone(),
            finished: ending == Ending::Finished,
            lost_s: lost,
        })
    }
}
