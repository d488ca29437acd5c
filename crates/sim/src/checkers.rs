//! What must hold in every simulated run, whatever goes wrong in it.
//!
//! Safety: no wrong state is agreed on or saved, steps follow one another, events tell the truth,
//! every second is accounted for. Liveness, that the run ends once faults have stopped, is
//! checked by whoever drives the simulation. Read next: `simulation.rs`.

use std::time::Duration;

use pontoon_fleet::run_dir::{Event, EventKind};
use pontoon_fleet::supervisor::StepDone;

use crate::fault_plan::SimFault;
use crate::fleet::{Fleet, Noticed, Struck};
use crate::model::{Truth, exact};

/// Seconds of a run that may stay without account, as a share: rounding only.
const ACCOUNT: f64 = 1e-6;

/// Something that must never happen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("after {:.3} s: {what}", .at.as_secs_f64())]
pub struct Violation {
    /// When, in simulated time.
    pub at: Duration,
    /// What.
    pub what: String,
}

/// What the run has been through.
pub(crate) struct Checkers {
    pub truth: Truth,
    /// Steps done; none before the run began.
    step: Option<u64>,
    /// Useful seconds by step, those done again not counted.
    useful: Vec<f64>,
    pub events: u64,
    pub rolled_back_s: f64,
}

impl Checkers {
    pub fn new(truth: Truth) -> Checkers {
        Checkers { truth, step: None, useful: Vec::new(), events: 0, rolled_back_s: 0.0 }
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step.unwrap_or(0)
    }

    /// Useful seconds of the whole run.
    pub fn useful_s(&self) -> f64 {
        self.useful.iter().sum()
    }

    /// A step is done: it follows the one before, and every sound replica holds the true state.
    pub fn on_step(&mut self, done: &StepDone, fleet: &Fleet) -> Result<(), String> {
        let want = self.step.map(|step| step + 1);
        if Some(done.step) != want {
            return Err(format!("step {} is done, but {want:?} was to come", done.step));
        }
        self.step = Some(done.step);
        self.useful.push((done.wall.saturating_sub(done.lost)).as_secs_f64());
        let loss: f64 = done.losses.iter().sum();
        let (told, truth) = (loss, self.truth.loss(done.step));
        if (told - truth).abs() > 1e-9 * truth.abs() {
            return Err(format!("step {} tells a loss of {told}, but it is {truth}", done.step));
        }
        let truth = self.truth.state(done.step);
        let before = self.truth.state(done.step - 1);
        let (mut right, mut others) = (0, 0);
        let mut held = None;
        for (worker, of) in fleet.workers.iter().enumerate() {
            match of.sound_state() {
                Some(state) if exact(state) == truth => {
                    // Whatever was rounded on the way: to the last bit as all others hold it.
                    if *held.get_or_insert(state) != state {
                        let step = done.step;
                        return Err(format!("worker {worker} holds other bits after {step}"));
                    }
                    right += 1;
                }
                // It has taken a state, but not this step yet; or it has none.
                Some(state) if exact(state) == before => others += 1,
                None => {}
                Some(_) => {
                    return Err(format!("worker {worker} holds a wrong state after {}", done.step));
                }
            }
        }
        // All may be gone since, and nobody knows yet.
        if right == 0 && others > 0 {
            return Err(format!("nobody holds the true state after step {}", done.step));
        }
        Ok(())
    }

    /// A snapshot stands on disk and was read back.
    pub fn on_saved(&mut self, step: u64, state: u64) -> Result<(), String> {
        match self.truth.state(step) == exact(state) {
            true => Ok(()),
            false => Err(format!("the snapshot of step {step} holds a wrong state")),
        }
    }

    /// An event was written: it names what truly happened.
    pub fn on_event(&mut self, event: &Event, fleet: &mut Fleet) -> Result<(), String> {
        self.events += 1;
        match event.kind {
            EventKind::Started | EventKind::Resumed => {
                let again = self.useful.split_off(self.useful.len().min(event.step as usize));
                self.rolled_back_s += again.iter().sum::<f64>();
                if self.useful.len() as u64 != event.step {
                    let step = event.step;
                    return Err(format!("goes on from step {step}, which was never done"));
                }
                self.step = Some(event.step);
            }
            EventKind::RolledBack if event.worker.is_none() => {
                self.rolled_back(event, fleet)?;
            }
            EventKind::SnapshotFailed => {
                let full = |of: &&Struck| of.fault == SimFault::DiskFull;
                if !fleet.struck.iter().any(|of| full(&of)) {
                    return Err(format!("a snapshot failed without a cause: {event:?}"));
                }
                notice(fleet, event, |of| of.fault == SimFault::DiskFull);
            }
            _ => {}
        }
        let Some(worker) = event.worker.map(|worker| worker as usize) else { return Ok(()) };
        if event.kind == EventKind::Joined {
            return Ok(());
        }
        let mine = |of: &Struck| of.worker == Some(worker) && explains(of.fault, event.kind);
        if !fleet.struck.iter().any(mine) {
            return Err(format!("a false accusation: {event:?}"));
        }
        notice(fleet, event, mine);
        Ok(())
    }

    /// Going back is the last resort: nobody may hold the state that all agreed on.
    fn rolled_back(&mut self, event: &Event, fleet: &mut Fleet) -> Result<(), String> {
        if event.action.as_deref().is_some_and(|action| action.starts_with("passed over")) {
            let damaged = |of: &Struck| of.fault == SimFault::DamagedSnapshot;
            if !fleet.struck.iter().any(damaged) {
                return Err(format!("a good snapshot was passed over: {event:?}"));
            }
            notice(fleet, event, damaged);
            return Ok(());
        }
        let truth = self.truth.state(self.step());
        let holder = fleet.workers.iter().position(|of| of.can_go_on().map(exact) == Some(truth));
        fleet.excuse("all workers were started over");
        match holder {
            None => Ok(()),
            Some(worker) => {
                let step = self.step();
                Err(format!("rolled back though worker {worker} holds step {step}: {event:?}"))
            }
        }
    }

    /// A supervisor's life is over: each of its seconds was useful or is lost to a cause.
    pub fn on_account(&self, wall: f64, useful: f64, lost: f64) -> Result<(), String> {
        let missing = wall - useful - lost;
        match missing.abs() <= ACCOUNT * wall {
            true => Ok(()),
            false => Err(format!(
                "{missing:.3} of {wall:.3} s are without account: {useful:.3} useful, {lost:.3} \
                 lost"
            )),
        }
    }

    /// The only supervisor of a run says how much of its time was useful.
    pub fn on_useful(&self, told: f64) -> Result<(), String> {
        let useful = self.useful_s();
        match (told - useful).abs() <= ACCOUNT * useful.max(1.0) {
            true => Ok(()),
            false => Err(format!("{useful:.3} s were useful, but {told:.3} s are told")),
        }
    }

    /// The run is over: every fault that struck was found.
    pub fn on_end(&self, fleet: &Fleet) -> Result<(), String> {
        let end = fleet.now;
        let unnoticed = fleet.struck.iter().find(|of| {
            let shows = of.fault.is_of_a_worker() && of.fault != SimFault::Slow;
            shows && of.noticed.is_none() && of.excused.is_none() && of.at + of.patience < end
        });
        match unnoticed {
            None => Ok(()),
            Some(struck) => Err(format!("nobody noticed {struck:?}")),
        }
    }
}

/// Marks the oldest fault that fits and was not told of yet.
fn notice(fleet: &mut Fleet, event: &Event, fits: impl Fn(&Struck) -> bool) {
    let (at, kind) = (fleet.now, event.kind.name());
    let open = |of: &Struck| fits(of) && of.noticed.is_none() && of.excused.is_none();
    // One of the very kind first: a slow device may stand still too.
    let exact = fleet.struck.iter().position(|of| open(of) && of.fault.name() == kind);
    let place = exact.or_else(|| fleet.struck.iter().position(open));
    if let Some(place) = place {
        let recovery_ms = event.recovery_ms;
        // Whoever is only called slow goes on.
        fleet.struck[place].found.get_or_insert(at);
        fleet.struck[place].noticed = Some(Noticed { kind, at, recovery_ms });
    }
}

/// Whether a fault can be behind an event of this kind.
fn explains(fault: SimFault, kind: EventKind) -> bool {
    match kind {
        EventKind::Crash => fault == SimFault::Crash,
        EventKind::Hang | EventKind::Evicted => matches!(fault, SimFault::Hang | SimFault::Slow),
        EventKind::Slow => fault == SimFault::Slow,
        EventKind::Corrupt => matches!(fault, SimFault::Flip(_)),
        EventKind::MemoryFault => fault == SimFault::MemoryFault,
        EventKind::LinkDown => fault == SimFault::LinkDown,
        EventKind::OutOfMemory => fault == SimFault::OutOfMemory,
        _ => false,
    }
}
