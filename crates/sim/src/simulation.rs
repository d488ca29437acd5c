//! A simulated run: the supervisor of real runs is told what happens in a world made from a seed,
//! and what it decides is done there, while checkers look on.
//!
//! The run folder, its lock, its logs and its snapshots are those of real runs too, on a disk in
//! memory. Read next: `scenario.rs`, what is simulated; `checkers.rs`, what must hold.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use pontoon_fleet::FleetError;
use pontoon_fleet::policy::HangAfter;
use pontoon_fleet::protocol::Source;
use pontoon_fleet::run_dir::{Event, EventKind, EventLog, JsonLines, RunDir};
use pontoon_fleet::snapshot::{
    Contents, ElementType, Parts, SnapshotReader, SnapshotWriter, State, TensorRef, check_folder,
};
use pontoon_fleet::supervisor::{
    Ending, Input, NonFinite, Output, Settings, StepDone, Supervisor, Tolerance, Validation,
};
use pontoon_fleet::world::{Disk, Launcher, Launching, Link};
use serde_json::json;

use crate::chaos::ChaosDisk;
use crate::checkers::{Checkers, Violation};
use crate::fault_plan::SimFault;
use crate::fleet::worker::{SNAPSHOTS, state_in};
use crate::fleet::{Fleet, Happening, Shared, Struck};
use crate::model::{Class, TinyModel, Truth, digest};
use crate::random::Random;
use crate::scenario::Scenario;
use crate::world::{SimClock, SimDisk};

/// The run folder.
const RUN: &str = "run";
/// Snapshots kept.
const KEEP: NonZeroUsize = NonZeroUsize::new(3).expect("three is not zero");
/// What two classes may be apart.
const TOLERANCE: Tolerance = Tolerance { gradient: 0.01, loss: 0.01, curve: 0.01 };
/// As in real runs by default.
const SAVE_PATIENCE: Duration = Duration::from_secs(200);
/// A killed supervisor that was writing a snapshot had this many changes to the disk before it at
/// most; a snapshot takes fewer.
const CHANGES: u64 = 30;

/// What a simulated run came to.
#[derive(Debug)]
pub struct Outcome {
    /// Simulated time.
    pub wall: Duration,
    /// Steps done.
    pub steps: u64,
    /// Useful time over all time.
    pub goodput: f64,
    /// Seconds lost, by cause.
    pub lost_s: BTreeMap<String, f64>,
    /// Every fault that struck.
    pub struck: Vec<Struck>,
    /// Supervisors that the run had.
    pub lives: u32,
    /// What supervisors were told.
    pub inputs: u64,
    /// Lines in `events.jsonl`.
    pub events: u64,
    /// Whether all steps are done.
    pub finished: bool,
}

/// Sees what comes to pass in a simulation: the time, and a line.
pub type Watch<'w> = &'w mut dyn FnMut(Duration, &str);

/// Runs a scenario to its end; an error is a promise broken, and the seed brings it back.
pub fn simulate(scenario: &Scenario) -> Result<Outcome, Violation> {
    simulate_seen(scenario, &mut |_, _| ())
}

/// The same, seen by someone: faults, events and steps.
pub fn simulate_seen(scenario: &Scenario, watch: Watch<'_>) -> Result<Outcome, Violation> {
    let (clock, disk) = (SimClock::default(), SimDisk::default());
    let struck = scenario.storage.as_ref().map(|plan| ChaosDisk::new(&disk, plan.of_disk()));
    let storage = struck.as_ref().map_or(&disk as &dyn Disk, |struck| struck);
    let places = Places { clock: &clock, disk: &disk, storage };
    let mut simulation = Simulation::new(scenario, places, watch);
    let ended = simulation.go();
    let at = clock.elapsed();
    ended.map_err(|what| Violation { at, what })
}

/// One supervisor's life.
struct Life<'w> {
    supervisor: Supervisor,
    begun: Duration,
    inputs: Sender<Input>,
    arrived: Receiver<Input>,
    links: Vec<Option<Box<dyn Link>>>,
    writer: SnapshotWriter<'w>,
    events: EventLog<'w>,
    metrics: JsonLines<'w>,
    /// The state that is being written: its step and what was said of it.
    saving: Option<(u64, u64, u64)>,
    _folder: RunDir,
}

/// What a simulation takes place in.
#[derive(Clone, Copy)]
struct Places<'w> {
    clock: &'w SimClock,
    disk: &'w SimDisk,
    /// The disk as snapshots are written to it.
    storage: &'w dyn Disk,
}

struct Simulation<'w> {
    scenario: &'w Scenario,
    clock: &'w SimClock,
    disk: &'w SimDisk,
    storage: &'w dyn Disk,
    fleet: Shared,
    checkers: Checkers,
    life: Option<Life<'w>>,
    lives: u32,
    /// Ticks so far.
    ticks: u32,
    inputs: u64,
    lost: BTreeMap<String, f64>,
    ending: Option<Ending>,
    watch: Watch<'w>,
}

fn text(error: FleetError) -> String {
    error.to_string()
}

impl<'w> Simulation<'w> {
    fn new(scenario: &'w Scenario, places: Places<'w>, watch: Watch<'w>) -> Simulation<'w> {
        let Places { clock, disk, storage } = places;
        let model = TinyModel { seed: scenario.seed, leaves: scenario.leaves };
        let random = Random::new(scenario.seed, 7);
        let speeds = scenario.speeds.clone();
        let mut fleet = Fleet::new(speeds, model, random, disk.clone(), scenario.workers);
        fleet.checksums = scenario.checksums;
        for (of, class) in fleet.workers.iter_mut().zip(&scenario.classes) {
            of.class = Class(*class);
        }
        for (fault, planned) in scenario.faults.iter().enumerate() {
            fleet.at(planned.at, Happening::Strike { fault });
        }
        if scenario.storage.is_some() {
            fleet.note(SimFault::DiskFull, None, None);
        }
        if let Some(at) = scenario.stop_at {
            fleet.at(at, Happening::Stop);
        }
        Simulation {
            scenario,
            clock,
            disk,
            storage,
            fleet: Shared(Rc::new(RefCell::new(fleet))),
            checkers: Checkers::new(Truth::new(model)),
            life: None,
            lives: 0,
            ticks: 0,
            inputs: 0,
            lost: BTreeMap::new(),
            ending: None,
            watch,
        }
    }

    fn see(&mut self, line: &str) {
        (self.watch)(self.clock.elapsed(), line);
    }

    fn go(&mut self) -> Result<Outcome, String> {
        self.begin_life()?;
        loop {
            self.listen()?;
            if let Some(ending) = self.ending.take() {
                return self.outcome(&ending);
            }
            let next = self.fleet.0.borrow_mut().next();
            let now = self.fleet.0.borrow().now;
            self.clock.set(now);
            if now > self.scenario.limit {
                return Err("the run does not end, though faults have stopped".to_owned());
            }
            match next {
                Some(what) => self.happen(what)?,
                None => return Err("nothing is left to come, and the run has not ended".into()),
            }
        }
    }

    fn begin_life(&mut self) -> Result<(), String> {
        self.lives += 1;
        let (disk, run) = (self.disk, Path::new(RUN));
        let folder = RunDir::open(disk, run, self.lives).map_err(text)?;
        if RunDir::open(disk, run, 0).is_ok() {
            return Err("a second supervisor was let into the run folder".to_owned());
        }
        let (inputs, arrived) = mpsc::channel();
        let life = Life {
            supervisor: Supervisor::new(self.settings()),
            begun: self.clock.elapsed(),
            inputs,
            arrived,
            links: (0..self.scenario.workers).map(|_| None).collect(),
            writer: SnapshotWriter::open(self.storage, Path::new(SNAPSHOTS)).map_err(text)?,
            events: EventLog::open(disk, self.clock, &folder.events()).map_err(text)?,
            metrics: JsonLines::open(disk, &folder.metrics()).map_err(text)?,
            saving: None,
            _folder: folder,
        };
        self.life = Some(life);
        self.tick_later();
        self.tell(Input::Start)
    }

    fn settings(&self) -> Settings {
        let of = self.scenario;
        Settings {
            devices: vec!["simulated".to_owned(); of.workers],
            leaves: of.leaves,
            steps: of.steps,
            seed: of.seed,
            snapshot_every: of.snapshot_every,
            save_patience: SAVE_PATIENCE,
            validation: of.valid_every.map_or(Validation::Never, Validation::Every),
            audit: of.audit,
            non_finite: NonFinite::Stop,
            tolerance: TOLERANCE,
            hang_after: HangAfter::Auto,
            source: if self.lives == 1 { Source::Fresh } else { Source::Snapshot },
        }
    }

    /// Silence is looked for every now and then; more often while something is wrong.
    fn tick_later(&mut self) {
        let mut fleet = self.fleet.0.borrow_mut();
        let ticks = &self.scenario.ticks;
        let wait = if fleet.is_troubled() { ticks.troubled } else { ticks.calm };
        let wait = wait.mul_f64(fleet.random.between(0.5, 1.0));
        // Only the newest chain of ticks goes on.
        self.ticks += 1;
        fleet.after(wait, Happening::Tick { life: self.lives, chain: self.ticks });
    }

    fn happen(&mut self, what: Happening) -> Result<(), String> {
        let now_living = |life: u32| life == self.lives;
        match what {
            Happening::Done { worker, serial } => self.fleet.0.borrow_mut().done(worker, serial),
            Happening::Gone { worker, serial } => {
                let gone = self.fleet.0.borrow().gone(worker, serial);
                if let Some(gone) = gone {
                    self.tell(gone)?;
                }
            }
            Happening::Strike { fault } => self.strike(fault)?,
            Happening::DiskFree => self.disk.set_full(false),
            Happening::Saved { life } if now_living(life) => self.save()?,
            Happening::Tick { life, chain } if now_living(life) && chain == self.ticks => {
                self.fleet.0.borrow_mut().beat();
                self.listen()?;
                self.tell(Input::Tick)?;
                self.tick_later();
            }
            Happening::Stop => self.tell(Input::Stop)?,
            Happening::Resume => {
                let down = self.scenario.speeds.resume.as_secs_f64();
                *self.lost.entry("supervisor_down".to_owned()).or_default() += down;
                self.begin_life()?;
            }
            Happening::Saved { .. } | Happening::Tick { .. } => {}
        }
        Ok(())
    }

    fn strike(&mut self, fault: usize) -> Result<(), String> {
        let planned = &self.scenario.faults[fault];
        self.see(&format!("strikes: {:?} {:?}", planned.fault, planned.workers));
        match planned.fault {
            SimFault::SupervisorKilled => self.kill_supervisor()?,
            SimFault::DamagedSnapshot => {
                let reader = SnapshotReader::new(self.disk, Path::new(SNAPSHOTS));
                // One that is being read back right now would be written anew.
                if let Some(step) = reader.list().map_err(text)?.first() {
                    let folder = Path::new(SNAPSHOTS).join(format!("step-{step:08}"));
                    self.disk.damage(&folder.join("model.safetensors"));
                    self.fleet.0.borrow_mut().note(planned.fault, None, None);
                }
            }
            _ => {
                let mut fleet = self.fleet.0.borrow_mut();
                fleet.strike(planned);
            }
        }
        if self.life.is_some() {
            self.listen()?;
            // From now on silence is looked for more often.
            self.tick_later();
        }
        Ok(())
    }

    /// The process is gone, in the middle of whatever it was writing.
    fn kill_supervisor(&mut self) -> Result<(), String> {
        let Some(mut life) = self.life.take() else { return Ok(()) };
        {
            let mut fleet = self.fleet.0.borrow_mut();
            fleet.note(SimFault::SupervisorKilled, None, None);
            fleet.excuse("the supervisor was killed");
            fleet.end_all();
            let changes = fleet.random.below(CHANGES);
            self.disk.die_after(Some(changes));
        }
        if let Some((step, state, _)) = life.saving.take() {
            // Dead half way or not, nobody hears of it.
            let _ = write(&life.writer, self.scenario.seed, step, state);
        }
        self.disk.die_after(None);
        self.account(&life)?;
        drop(life);
        self.fleet.0.borrow_mut().resume_later();
        Ok(())
    }

    fn account(&mut self, life: &Life<'_>) -> Result<(), String> {
        let wall = life.supervisor_wall(self.clock).as_secs_f64();
        let lost = life.supervisor.lost();
        for (cause, seconds) in &lost {
            if *cause != "rolled_back" {
                *self.lost.entry((*cause).to_owned()).or_default() += seconds;
            }
        }
        // Steps done again are known over all lives.
        self.lost.insert("rolled_back".to_owned(), self.checkers.rolled_back_s);
        let lost: f64 = lost.iter().map(|(_, seconds)| seconds).sum();
        if self.ending.is_none() {
            // It was killed in the middle of a step, which nobody accounts for but we.
            let open = wall - life.supervisor.goodput() * wall - lost;
            *self.lost.entry("supervisor_killed".to_owned()).or_default() += open.max(0.0);
            return Ok(());
        }
        let useful = life.supervisor.goodput() * wall;
        self.checkers.on_account(wall, useful, lost)?;
        match self.lives {
            1 => self.checkers.on_useful(useful),
            _ => Ok(()),
        }
    }

    /// Tells the supervisor all that was said.
    fn listen(&mut self) -> Result<(), String> {
        loop {
            let Some(life) = &self.life else { return Ok(()) };
            match life.arrived.try_recv() {
                Ok(input) => self.tell(input)?,
                Err(_) => return Ok(()),
            }
        }
    }

    fn tell(&mut self, input: Input) -> Result<(), String> {
        self.inputs += 1;
        let Some(life) = &mut self.life else { return Ok(()) };
        let now = self.clock.elapsed() - life.begun;
        for output in life.supervisor.handle(now, input) {
            self.obey(output)?;
        }
        Ok(())
    }

    fn obey(&mut self, output: Output) -> Result<(), String> {
        let Some(life) = &mut self.life else { return Ok(()) };
        match output {
            Output::Launch { worker, incarnation, device, step } => {
                let exchange = 0;
                let injected = BTreeSet::new();
                let what = Launching { worker, incarnation, device, step, exchange, injected };
                let link = self.fleet.launch(&what, life.inputs.clone());
                life.links[worker] = link.ok();
            }
            Output::Kill { worker } => {
                if let Some(mut link) = life.links[worker].take() {
                    link.kill();
                }
            }
            Output::Send { worker, command } => {
                if let Some(link) = &mut life.links[worker] {
                    link.send(&command).map_err(|error| error.to_string())?;
                }
            }
            Output::Event(event) => {
                (self.watch)(self.clock.elapsed(), &line_of(&event));
                life.events.append(&event).map_err(text)?;
                if matches!(event.kind, EventKind::Started | EventKind::Resumed) {
                    life.metrics.truncate_after_step(event.step).map_err(text)?;
                }
                self.checkers.on_event(&event, &mut self.fleet.0.borrow_mut())?;
            }
            Output::Step(done) => self.step(&done)?,
            Output::Save { step, digest, .. } => {
                let mut fleet = self.fleet.0.borrow_mut();
                life.saving = Some((step, fleet.memory.snapshot, digest));
                let wait = fleet.speeds.save;
                fleet.after(wait, Happening::Saved { life: self.lives });
            }
            Output::Moved(outcome) => unreachable!("nobody asked for a move: {outcome:?}"),
            Output::End(ending) => self.ending = Some(ending),
        }
        Ok(())
    }

    fn step(&mut self, done: &StepDone) -> Result<(), String> {
        if let Some(life) = &mut self.life {
            let loss: f64 = done.losses.iter().sum();
            let line = json!({ "step": done.step, "loss": loss, "workers": done.workers });
            life.metrics.append(&line).map_err(text)?;
        }
        self.checkers.on_step(done, &self.fleet.0.borrow())?;
        self.see(&format!("step {} on {} workers", done.step, done.workers));
        Ok(())
    }

    fn save(&mut self) -> Result<(), String> {
        let Some(life) = &mut self.life else { return Ok(()) };
        let Some((step, state, told)) = life.saving.take() else { return Ok(()) };
        let written = match digest(state) == told {
            true => write(&life.writer, self.scenario.seed, step, state).map_err(text),
            false => Err("the state changed on its way to the snapshot".to_owned()),
        };
        let checked = written.and_then(|folder| {
            check_folder(self.storage, Path::new(&folder)).map_err(text)?;
            life.writer.retain(KEEP).map_err(text)?;
            Ok(folder)
        });
        let input = match checked {
            Ok(folder) => {
                self.checkers.on_saved(step, state)?;
                Input::Saved { step, folder }
            }
            Err(cause) => Input::SaveFailed { step, cause },
        };
        self.tell(input)
    }

    fn outcome(&mut self, ending: &Ending) -> Result<Outcome, String> {
        self.ending = Some(ending.clone());
        if let Some(mut life) = self.life.take() {
            life.metrics.sync().map_err(text)?;
            self.account(&life)?;
        }
        if !matches!(ending, Ending::Finished | Ending::Stopped) {
            return Err(format!("the run gave up: {ending:?}"));
        }
        self.check_what_is_left()?;
        let mut fleet = self.fleet.0.borrow_mut();
        fleet.excuse_unused();
        self.checkers.on_end(&fleet)?;
        let wall = fleet.now;
        Ok(Outcome {
            wall,
            steps: self.checkers.step(),
            goodput: self.checkers.useful_s() / wall.as_secs_f64(),
            lost_s: std::mem::take(&mut self.lost),
            struck: fleet.struck.clone(),
            lives: self.lives,
            inputs: self.inputs,
            events: self.checkers.events,
            finished: *ending == Ending::Finished,
        })
    }

    /// The files are those of an undisturbed run.
    fn check_what_is_left(&mut self) -> Result<(), String> {
        let steps = self.checkers.step();
        let reader = SnapshotReader::new(self.disk, Path::new(SNAPSHOTS));
        let newest = reader.read_newest(Parts::All).map_err(text)?;
        let Some(snapshot) = newest.snapshot else { return Err("no snapshot is left".to_owned()) };
        let state = state_in(&snapshot.model[0].bytes).ok_or("a snapshot holds no state")?;
        if snapshot.state.step == steps || newest.rejected.is_empty() {
            self.checkers.on_saved(steps, state)?;
        }
        let path = Path::new(RUN).join("metrics.jsonl");
        let lines = pontoon_fleet::run_dir::read_lines(self.disk, &path).map_err(text)?;
        let odd = (1..).zip(&lines).find(|(step, line)| line["step"] != json!(step));
        match odd {
            None if lines.len() as u64 == steps => Ok(()),
            _ => Err(format!("metrics.jsonl has {} lines for {steps} steps: {odd:?}", lines.len())),
        }
    }
}

/// An event as people read it.
fn line_of(event: &Event) -> String {
    let worker = event.worker.map_or(String::new(), |worker| format!(" worker {worker}"));
    let cause = event.cause.as_deref().unwrap_or_default();
    let action = event.action.as_deref().unwrap_or_default();
    format!("event: step {} {}{worker}: {cause}; {action}", event.step, event.kind.name())
}

impl Life<'_> {
    fn supervisor_wall(&self, clock: &SimClock) -> Duration {
        clock.elapsed() - self.begun
    }
}

/// Writes a state as a snapshot.
fn write(
    writer: &SnapshotWriter<'_>,
    seed: u64,
    step: u64,
    state: u64,
) -> Result<String, FleetError> {
    let bytes = state.to_le_bytes();
    let model = [TensorRef {
        name: "state",
        dtype: ElementType::F32,
        shape: &[2],
        bytes: bytes[..].into(),
    }];
    let of = State {
        step,
        seed,
        position: step,
        backend: "simulated".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        extra: serde_json::Value::Null,
    };
    let written =
        writer.write(&Contents { state: &of, model: &model, optimizer: &[], files: &[] })?;
    Ok(written.folder.display().to_string())
}
