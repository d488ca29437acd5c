//! The supervisor's decisions as a state machine: inputs with their time in, outputs to be done
//! out, and nothing else. Processes, pipes, disk and clock belong to whoever drives it.
//!
//! A step: leaves of the gradient tree are handed out by speed, computed, audited, combined by
//! every replica, compared, applied, compared again. What goes wrong is in `losing.rs`, what a
//! step holds in `round.rs`, devices of several kinds in `classes.rs`, other devices under a live
//! run in `moving.rs`, where time went in `ledger.rs`, what is computed twice in
//! `auditing.rs`, who decides how much in `policy.rs`.

mod auditing;
mod band;
mod boundary;
mod classes;
mod judging;
mod ledger;
mod losing;
mod moving;
mod round;
mod workers;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::policy::HangAfter;
use crate::protocol::{Area, Command, Rates, Report, Source, StateDigest};
use crate::run_dir::{Event, EventKind};

pub use band::Band;
pub use classes::Tolerance;
use ledger::Ledger;
use losing::{CHANGED, Loss};
use moving::Moving;
pub use moving::{Certificate, MoveOutcome, Trial};
use round::{Replayed, Round};
pub use workers::Seen;
use workers::{Slowness, Standing, Worker};

/// What a supervised run is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The device of each worker.
    pub devices: Vec<String>,
    /// Micro-batches of a step; a power of two.
    pub leaves: u32,
    /// Steps in all.
    pub steps: u64,
    /// Decides what is audited.
    pub seed: u64,
    /// Steps between snapshots; 0 for one at the end.
    pub snapshot_every: u64,
    /// How long the last snapshot is tried again when it cannot be written.
    pub save_patience: Duration,
    /// When the validation data is scored.
    pub validation: Validation,
    /// The share of micro-batches that a second worker computes too, and of the time that is
    /// spent on it.
    pub audit: f64,
    /// What becomes of a step that gives no finite number anywhere.
    pub non_finite: NonFinite,
    /// When silence is a hang.
    pub hang_after: HangAfter,
    /// How far workers of different numeric classes may be apart.
    pub tolerance: Tolerance,
    /// Where the state comes from.
    pub source: Source,
}

/// When the validation data is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validation {
    /// There is none.
    Never,
    /// Every so many steps and at the end; 0 for the end only.
    Every(u64),
}

/// What becomes of a step that gives no finite number anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NonFinite {
    /// The run ends.
    Stop,
    /// Its data is passed over, unless that comes to pass too often in a row.
    Skip,
}

/// So many steps in a row that give no number mean that the weights themselves are spoilt.
pub const SKIPS: u32 = 10;

/// What the supervisor learns.
#[derive(Clone, Debug)]
pub enum Input {
    /// The run begins.
    Start,
    /// A worker said something.
    Report {
        /// Which worker.
        worker: usize,
        /// Of its processes, counted from 1.
        incarnation: u32,
        /// What it said.
        report: Report,
    },
    /// A worker's process is gone.
    Gone {
        /// Which worker.
        worker: usize,
        /// Of its processes.
        incarnation: u32,
        /// How it ended.
        cause: String,
    },
    /// A snapshot is on disk.
    Saved {
        /// Its step.
        step: u64,
        /// Where it is.
        folder: String,
    },
    /// A snapshot could not be written.
    SaveFailed {
        /// Its step.
        step: u64,
        /// Why.
        cause: String,
    },
    /// Time has passed.
    Tick,
    /// Whoever drives was itself stopped for a while, and may have heard nothing in it.
    Stalled,
    /// Someone wants the run to stop.
    Stop,
    /// Someone wants the run to go on, on other devices; answered by [`Output::Moved`].
    Move {
        /// One for each worker.
        devices: Vec<String>,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Start a worker's process.
    Launch {
        /// Which worker.
        worker: usize,
        /// Of its processes.
        incarnation: u32,
        /// Its device.
        device: String,
        /// The step at which it may take part.
        step: u64,
    },
    /// End a worker's process, and return only when it is gone.
    Kill {
        /// Which worker.
        worker: usize,
    },
    /// Tell a worker something.
    Send {
        /// Which worker.
        worker: usize,
        /// What.
        command: Command,
    },
    /// Write an event down.
    Event(Event),
    /// A step is done.
    Step(StepDone),
    /// Write the state in the exchange as a snapshot.
    Save {
        /// The steps it has seen.
        step: u64,
        /// Of its bytes.
        digest: u64,
        /// The numeric class that applied its last step.
        numeric_class: String,
    },
    /// A move is over.
    Moved(Box<MoveOutcome>),
    /// The run is over; every worker has been told to stop.
    End(Ending),
}

/// A step that every replica has applied.
#[derive(Clone, Debug, PartialEq)]
pub struct StepDone {
    /// The step, from 1.
    pub step: u64,
    /// The sum of losses of each leaf.
    pub losses: Vec<f64>,
    /// The gradient's norm.
    pub norm: f64,
    /// What it was applied with.
    pub rates: Rates,
    /// The time it took.
    pub wall: Duration,
    /// The time lost in it.
    pub lost: Duration,
    /// Useful time over all time so far.
    pub goodput: f64,
    /// Workers that took part.
    pub workers: u32,
    /// Micro-batches computed by each numeric class.
    pub classes: BTreeMap<String, u32>,
    /// The furthest that audited gradients of two classes were apart.
    pub apart: Option<f64>,
    /// The validation's loss, if it was due.
    pub valid_loss: Option<f64>,
}

/// How a run ends.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// All steps are done.
    Finished,
    /// It was asked to stop.
    Stopped,
    /// A loss or norm is no finite number, on two workers alike; nothing was applied.
    NonFinite {
        /// The step.
        step: u64,
        /// `the loss` or `the gradient's norm`.
        what: &'static str,
        /// What it is.
        value: f64,
    },
    /// It cannot go on.
    Failed(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Starting,
    Computing,
    Combining,
    Applying,
    /// The state goes to the classes that did not apply the step.
    Handing,
    Scoring,
    Finishing,
    Over,
}

/// A snapshot on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saving {
    /// A worker copies its state.
    Copying { step: u64, donor: usize },
    /// The driver writes it.
    Writing { step: u64 },
}

/// The state machine.
pub struct Supervisor {
    settings: Settings,
    workers: Vec<Worker>,
    phase: Phase,
    /// Steps done.
    step: u64,
    /// The digest all replicas agreed on after `step`.
    agreed: StateDigest,
    /// The numeric class that applies the steps.
    writing: Option<String>,
    moving: Option<Moving>,
    round: Round,
    /// The replica that was awaited when it was last asked for.
    awaited: usize,
    losses: Vec<Loss>,
    /// Why a worker was lost last.
    lost_for: Option<String>,
    ledger: Ledger,
    /// Who copies its state for workers that join.
    join_donor: Option<usize>,
    saving: Option<Saving>,
    snapshot_due: bool,
    saved: Option<u64>,
    save_failures: u32,
    /// After a failure the next snapshot waits until then.
    save_not_before: Duration,
    /// The last snapshot is tried until then.
    save_until: Duration,
    /// Whether it failed then, too.
    save_given_up: bool,
    /// Whether workers are started once the snapshot that is being written is there.
    awaits_snapshot: bool,
    /// The longest that a worker took to load.
    longest_load: Option<Duration>,
    /// Steps skipped in a row.
    skips: u32,
    /// Restarts from a snapshot since a step was last done.
    restarts: u32,
    /// Why the run ends once its state is saved.
    ending: Option<Ending>,
    stop_asked: bool,
    now: Duration,
    outputs: Vec<Output>,
    /// What takes time and need not be done before the next step is handed out.
    later: Vec<Output>,
}

impl Supervisor {
    /// A supervisor that has not begun.
    pub fn new(settings: Settings) -> Supervisor {
        Supervisor {
            workers: settings.devices.iter().map(|device| Worker::new(device)).collect(),
            round: Round::new(Duration::ZERO),
            settings,
            phase: Phase::Idle,
            step: 0,
            agreed: [0; 2],
            writing: None,
            moving: None,
            awaited: 0,
            losses: Vec::new(),
            lost_for: None,
            ledger: Ledger::default(),
            join_donor: None,
            saving: None,
            snapshot_due: false,
            saved: None,
            save_failures: 0,
            save_not_before: Duration::ZERO,
            save_until: Duration::MAX,
            save_given_up: false,
            awaits_snapshot: false,
            longest_load: None,
            skips: 0,
            restarts: 0,
            ending: None,
            stop_asked: false,
            now: Duration::ZERO,
            outputs: Vec::new(),
            later: Vec::new(),
        }
    }

    /// Takes one input that came at `now`, measured from the run's start; returns what to do.
    pub fn handle(&mut self, now: Duration, input: Input) -> Vec<Output> {
        self.now = now;
        if self.phase == Phase::Over {
            return Vec::new();
        }
        match input {
            Input::Start => self.start(self.settings.source),
            Input::Report { worker, incarnation, report } => {
                if self.workers[worker].is(incarnation) {
                    self.hear(worker, report);
                }
            }
            Input::Gone { worker, incarnation, cause } => {
                if self.workers[worker].is(incarnation) {
                    self.lose(worker, Loss::new(EventKind::Crash, cause));
                }
            }
            Input::Saved { step, folder } => self.saved(step, folder),
            Input::SaveFailed { step, cause } => self.save_failed(step, cause),
            Input::Tick => self.look_for_silence(),
            Input::Stalled => self.start_listening_anew(),
            Input::Stop => self.stop_asked = true,
            Input::Move { devices } => self.ask_for_move(devices),
        }
        while self.phase != Phase::Over && self.advance() {}
        self.outputs.append(&mut self.later);
        std::mem::take(&mut self.outputs)
    }

    /// Steps done so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The workers as people see them, without those that the run has moved away from.
    pub fn workers(&self) -> Vec<Seen<'_>> {
        let workers = self.workers.iter().enumerate().filter(|(_, of)| !of.left);
        workers.map(|(worker, of)| of.seen(worker)).collect()
    }

    /// Seconds lost so far, by cause.
    pub fn lost(&self) -> Vec<(&'static str, f64)> {
        self.ledger.lost()
    }

    /// Useful time over all time so far.
    pub fn goodput(&self) -> f64 {
        self.ledger.goodput(self.now)
    }

    /// Useful seconds so far, and all of them.
    pub fn useful(&self) -> (f64, f64) {
        (self.ledger.useful(), self.now.as_secs_f64())
    }

    /// Faults survived so far.
    pub fn faults(&self) -> u64 {
        self.ledger.faults
    }

    /// Bytes that the devices of all workers hold.
    pub fn memory_bytes(&self) -> u64 {
        self.workers.iter().map(|of| of.memory_bytes).sum()
    }

    fn start(&mut self, source: Source) {
        self.phase = Phase::Starting;
        for worker in 0..self.workers.len() {
            if self.workers[worker].standing != Standing::Retired {
                self.launch(worker, source);
            }
        }
    }

    fn hear(&mut self, worker: usize, report: Report) {
        let now = self.now;
        let of = &mut self.workers[worker];
        match report {
            Report::Beat { operations, longest_ms } => {
                of.beats += 1;
                if operations != of.operations {
                    (of.operations, of.progressed, of.beats) = (operations, now, 0);
                }
                of.longest_pause = Duration::from_millis(longest_ms);
                return;
            }
            Report::Injected { kind, .. } => {
                of.injected = Some((kind, now));
                return;
            }
            Report::Hello { version, .. } => {
                if version != crate::protocol::VERSION && of.trial {
                    let text = format!("worker {worker} speaks version {version} of the protocol");
                    self.refuse_move(text);
                } else if version != crate::protocol::VERSION {
                    let text = format!("worker {worker} speaks version {version} of the protocol");
                    self.end(Ending::Failed(text));
                }
                return;
            }
            Report::Failed { trouble, text } => return self.failed(worker, trouble, text),
            _ => {}
        }
        of.open = of.open.saturating_sub(1);
        (of.progressed, of.answered, of.beats) = (now, now, 0);
        self.answered(worker, report);
    }

    fn answered(&mut self, worker: usize, report: Report) {
        let step = self.step + 1;
        match report {
            Report::Ready { step, digest, device } => {
                let of = &mut self.workers[worker];
                let trial = of.trial;
                of.standing = if trial { Standing::Warming } else { Standing::Ready };
                let took = Some(self.now.saturating_sub(of.launched));
                self.longest_load = self.longest_load.max(took);
                of.loaded = digest.map(|digest| (step, digest));
                of.numeric_class = device.numeric_class;
                of.written_by = device.written_by;
                of.memory_bytes = device.memory_bytes;
                if trial {
                    return self.warm_up(worker);
                }
                let first = self.workers.iter().all(|of| of.standing != Standing::Member)
                    && self.those(Standing::Ready).len() == 1;
                for (step, reason) in device.passed_over.into_iter().filter(|_| first) {
                    let action = Some("passed over for an older snapshot".to_owned());
                    let event = Event::new(step, EventKind::RolledBack);
                    self.tell(Event { cause: Some(reason), action, ..event });
                }
            }
            Report::Imported { step: of, digest } if of == step => self.took_over(worker, digest),
            Report::Imported { digest, .. } => self.imported(worker, digest),
            Report::Computed { step: of, node, digest, leaves, losses, seconds } if of == step => {
                let losses = losses.iter().map(|loss| loss.value()).collect();
                let subtree = round::Subtree { node, worker, digest, losses };
                if self.round.computed(subtree, &leaves) {
                    self.workers[worker].took(seconds / f64::from(node.count));
                    self.ask_across_classes(worker, node);
                }
            }
            Report::Replayed { .. } if self.workers[worker].standing == Standing::Warming => {
                self.workers[worker].standing = Standing::Waiting;
            }
            Report::Replayed { leaf, digest, loss, apart, .. } if self.workers[worker].trial => {
                self.tried(worker, Replayed { leaf, digest, loss: loss.value(), apart });
            }
            Report::Checked { digest, .. } if self.workers[worker].trial => {
                self.checked(worker, digest);
            }
            Report::Replayed { step: of, leaf, digest, loss, apart } if of == step => {
                self.replayed(worker, Replayed { leaf, digest, loss: loss.value(), apart });
            }
            Report::Checked { step: of, digest } if of == step && digest != self.agreed => {
                self.lose(worker, Loss::new(EventKind::Corrupt, CHANGED.to_owned()).discarding());
            }
            Report::Combined { step: of, before, nodes, gradient, norm } if of == step => {
                let norm = norm.value();
                let combined = round::Combined { before, nodes, gradient, norm };
                self.round.combined.insert(worker, combined);
            }
            Report::Applied { step: of, rates, after } if of == step => {
                self.round.applied.insert(worker, (rates, after));
            }
            Report::Exported { step, area, digest } => self.exported(worker, step, area, digest),
            Report::Scored { step, loss } if step == self.step => {
                self.round.valid_loss = Some(loss.value());
            }
            // What belongs to a step that was given up.
            _ => {}
        }
    }

    /// Moves on if all that the phase waits for is there.
    fn advance(&mut self) -> bool {
        match self.phase {
            Phase::Idle | Phase::Over => false,
            Phase::Starting => self.try_begin(),
            Phase::Computing => self.try_combine(),
            Phase::Combining => self.try_apply(),
            Phase::Applying => self.try_close(),
            Phase::Handing => self.try_handed(),
            Phase::Scoring => self.try_scored(),
            Phase::Finishing => self.try_end(),
        }
    }

    fn send(&mut self, worker: usize, command: Command) {
        let of = &mut self.workers[worker];
        if of.open == 0 {
            (of.progressed, of.answered, of.beats) = (self.now, self.now, 0);
        }
        of.open += match &command {
            Command::Compute { nodes, .. } => nodes.len() as u32,
            Command::Stop => 0,
            _ => 1,
        };
        self.outputs.push(Output::Send { worker, command });
    }

    fn tell(&mut self, event: Event) {
        self.outputs.push(Output::Event(event));
    }

    fn event(&self, worker: usize, kind: EventKind) -> Event {
        let device = Some(self.workers[worker].device.clone());
        Event { worker: Some(worker as u32), device, ..Event::new(self.step, kind) }
    }

    fn launch(&mut self, worker: usize, from: Source) {
        let of = &mut self.workers[worker];
        of.incarnation += 1;
        of.standing = Standing::Loading;
        (of.open, of.operations, of.injected, of.loaded) = (0, 0, None, None);
        (of.slowness, of.is_proven) = (Slowness::default(), false);
        of.launched = self.now;
        let (incarnation, step, device) = (of.incarnation, self.step + 1, of.device.clone());
        self.outputs.push(Output::Launch { worker, incarnation, device, step });
        self.send(worker, Command::Load { from });
    }

    /// The workers of a standing.
    fn those(&self, standing: Standing) -> Vec<usize> {
        let workers = self.workers.iter().enumerate();
        workers.filter(|(_, of)| of.standing == standing).map(|(index, _)| index).collect()
    }

    /// The members and those that become members with this step.
    fn replicas(&self) -> Vec<usize> {
        let takes_part = |of: &Worker| matches!(of.standing, Standing::Member | Standing::Joining);
        (0..self.workers.len()).filter(|&index| takes_part(&self.workers[index])).collect()
    }

    /// Whether some replica has not said yet what all wait for. Looks first at the one that was
    /// missing the last time, as this is asked after every report of every worker.
    fn awaits_a_replica(&mut self, has_said: impl Fn(&Round, usize) -> bool) -> bool {
        let count = self.workers.len();
        let missing = |of: &usize| {
            let takes_part =
                matches!(self.workers[*of].standing, Standing::Member | Standing::Joining);
            takes_part && !has_said(&self.round, *of)
        };
        let from = self.awaited;
        match (from..count).chain(0..from).find(missing) {
            Some(worker) => {
                self.awaited = worker;
                true
            }
            None => false,
        }
    }

    /// The member that does odd jobs: the fastest.
    fn fastest(&self) -> Option<usize> {
        let members = self.those(Standing::Member);
        let seconds = |of: &usize| self.workers[*of].seconds.unwrap_or(f64::MAX);
        members.into_iter().min_by(|a, b| seconds(a).total_cmp(&seconds(b)))
    }

    fn export(&mut self, donor: usize, area: Area) {
        match area {
            Area::Join => self.join_donor = Some(donor),
            Area::Step => self.round.handing = Some(donor),
            Area::Snapshot => self.saving = Some(Saving::Copying { step: self.step, donor }),
        }
        let step = self.step + u64::from(area == Area::Step);
        self.send(donor, Command::Export { step, area });
    }

    fn end(&mut self, ending: Ending) {
        self.settle();
        // Whoever ends a run in peace has accounted for it already.
        self.ledger.lose("given_up", self.since_round());
        self.round.begun = self.now;
        for worker in 0..self.workers.len() {
            let standing = self.workers[worker].standing;
            if !matches!(standing, Standing::Out | Standing::Retired) {
                self.send(worker, Command::Stop);
            }
        }
        self.phase = Phase::Over;
        self.outputs.append(&mut self.later);
        self.outputs.push(Output::End(ending));
    }
}
