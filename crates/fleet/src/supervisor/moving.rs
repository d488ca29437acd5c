//! A live run goes to other devices: new workers start beside the old and are tried on a
//! micro-batch of one of the run's steps, for which nobody waits; once they have passed they take
//! the state at a step's beginning and that step is theirs. Whatever goes wrong with them, the old
//! ones go on as if nothing had been asked.
//!
//! The new ones take the state like any worker that joins; what is special is here. Read next:
//! `classes.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use crate::protocol::{Against, Area, Command, Publish, Source, StateDigest};
use crate::run_dir::{Event, EventKind};

use super::band::Band;
use super::classes::{Tolerance, loss_apart};
use super::losing::CHANGED;
use super::round::{Replayed, Subtree};
use super::workers::{Standing, Worker};
use super::{Output, Phase, Saving, Supervisor};

/// Each new worker computes the micro-batch so often: equal bits are asked of equal work.
const REPEATS: usize = 2;
/// The micro-batch that others are held against may be lost with its worker; then it is computed
/// again, but not forever.
const TRIALS: u32 = 3;

/// A device of a move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The worker.
    pub worker: usize,
    /// Its device.
    pub device: String,
    /// The class within which equal inputs give equal bits.
    pub numeric_class: String,
}

/// What one new worker was held to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// The worker and its device.
    #[serde(flatten)]
    pub place: Place,
    /// Its loss.
    pub loss: f64,
    /// The relative difference from the old worker's.
    pub loss_error: f64,
    /// The largest relative error of a tensor's gradient.
    pub gradient_error: f64,
    /// That tensor.
    pub tensor: String,
    /// Whether the gradient has the same bits; asked of devices of one class.
    pub identical: bool,
    /// Whether it gave the same bits each time.
    pub repeats: bool,
    /// Whether it took the run's state unchanged and agrees.
    pub agree: bool,
}

/// What new workers were held to before the run went to them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Certificate {
    /// The last step of the old workers.
    pub step: u64,
    /// The old workers.
    pub from: Vec<Place>,
    /// The new ones.
    pub to: Vec<Place>,
    /// The micro-batch that was compared.
    pub micro_batch: u32,
    /// Its loss on the old worker.
    pub loss: f64,
    /// What the new ones made of it.
    pub trials: Vec<Trial>,
    /// What they may be apart where they are of another class.
    pub limits: Tolerance,
    /// What the run's losses may be apart from those of the same run left alone; absent where it
    /// did too few steps to tell.
    pub band: Option<Band>,
    /// Whether all agree.
    pub agree: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// Milliseconds in which the new workers loaded while the old ones went on.
    pub load_ms: u64,
    /// Milliseconds from the copy of the state that they are tried on to the last answer, in which
    /// the old ones went on, unless the trial had to be done again.
    pub trial_ms: u64,
    /// Milliseconds in which nobody computed: from the copy of the state to the last new worker
    /// that had it.
    pub pause_ms: u64,
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq)]
pub struct MoveOutcome {
    /// The devices that were asked for.
    pub devices: Vec<String>,
    /// Whether the run is there.
    pub moved: bool,
    /// In one line.
    pub text: String,
    /// What was measured, if it came to that.
    pub certificate: Option<Certificate>,
}

/// A move under way.
pub(super) struct Moving {
    devices: Vec<String>,
    workers: Vec<usize>,
    begun: Duration,
    loaded: Option<Duration>,
    /// When the trial under way began.
    tried: Option<Duration>,
    /// The step whose state the trial is about, and its digest.
    step: u64,
    state: StateDigest,
    micro_batch: u32,
    /// What the new ones are held against, once they were asked.
    owner: Option<Subtree>,
    trials: u32,
    answers: BTreeMap<usize, Vec<Replayed>>,
    /// Those whose state was the same after they had computed.
    checked: BTreeSet<usize>,
    certificate: Option<Certificate>,
    /// Those that have taken the state that they go on from.
    took: BTreeSet<usize>,
}

impl Supervisor {
    /// Starts new workers beside the old, or says why not.
    pub(super) fn ask_for_move(&mut self, devices: Vec<String>) {
        let leaves = self.settings.leaves as usize;
        let refusal = match self.phase {
            _ if self.moving.is_some() => Some("another move is under way"),
            Phase::Idle | Phase::Starting => Some("the run is loading; ask again when it computes"),
            Phase::Finishing | Phase::Over => Some("the run is ending"),
            _ if devices.is_empty() => Some("no device was named"),
            _ if devices.len() > leaves => Some("there are more devices than micro-batches"),
            _ if devices.len() < 2 && self.settings.audit > 0.0 => {
                Some("the run's audits need a second worker; name two devices")
            }
            _ => None,
        };
        if let Some(text) = refusal {
            let (text, moved, certificate) = (text.to_owned(), false, None);
            let outcome = MoveOutcome { devices, moved, text, certificate };
            return self.outputs.push(Output::Moved(Box::new(outcome)));
        }
        let first = self.workers.len();
        for device in &devices {
            let worker = Worker::new(device);
            self.workers.push(Worker { trial: true, ..worker });
        }
        self.moving = Some(Moving {
            workers: (first..self.workers.len()).collect(),
            devices,
            begun: self.now,
            loaded: None,
            tried: None,
            step: 0,
            state: self.agreed,
            micro_batch: 0,
            owner: None,
            trials: 0,
            answers: BTreeMap::new(),
            checked: BTreeSet::new(),
            certificate: None,
            took: BTreeSet::new(),
        });
        for worker in first..self.workers.len() {
            self.launch(worker, Source::Nothing);
        }
    }

    /// Has a new worker compute a micro-batch on empty weights, to be done with what a device does
    /// when it computes for the first time.
    pub(super) fn warm_up(&mut self, worker: usize) {
        let (step, against) = (self.step + 1, Against::Nothing);
        self.send(worker, Command::Replay { step, leaf: 0, against });
    }

    /// At a step's beginning: once all new workers have loaded they are tried in this step, and
    /// once they have passed this step is theirs.
    pub(super) fn begin_trial(&mut self) {
        let (now, step, leaves) = (self.now, self.step, self.settings.leaves);
        let Some(moving) = &mut self.moving else { return };
        let waiting = |worker: &usize| self.workers[*worker].standing == Standing::Waiting;
        let is_under_way = moving.tried.is_some() && moving.certificate.is_none();
        if is_under_way || !moving.workers.iter().all(waiting) {
            return;
        }
        moving.loaded.get_or_insert(now);
        (moving.step, moving.state) = (step, self.agreed);
        self.round.moving = true;
        if moving.certificate.is_none() {
            moving.tried = Some(now);
            // An odd one's place in the exchange is rarely used by the steps that follow.
            moving.micro_batch = (step % u64::from(leaves)) as u32 | u32::from(leaves > 1);
            self.round.single.insert(moving.micro_batch);
        }
        for worker in moving.workers.clone() {
            self.workers[worker].standing = Standing::Ready;
        }
    }

    /// Whether the new workers of a move were tried and agree.
    pub(super) fn has_passed(&self) -> bool {
        self.moving.as_ref().is_some_and(|moving| moving.certificate.is_some())
    }

    /// A new worker has taken a state, as it lies on its device: that of its trial, or that from
    /// which it goes on.
    pub(super) fn transferred(&mut self, worker: usize, digest: StateDigest) {
        let who = self.called(worker);
        let Some(moving) = &mut self.moving else { return };
        if digest != moving.state {
            return self.refuse_move(format!("{who}: took another state than it was given"));
        }
        if moving.certificate.is_some() {
            moving.took.insert(worker);
        }
    }

    /// Asks the new workers for the micro-batch, as soon as it is published and they are told to
    /// take the state, and then for the digest of that state.
    pub(super) fn ask_trial(&mut self) {
        let Some(moving) = self.moving.as_mut().filter(|of| of.certificate.is_none()) else {
            return;
        };
        let joining = |worker: &usize| self.workers[*worker].standing == Standing::Joining;
        let leaf = moving.micro_batch;
        let shared = self.round.publish == Publish::Shared;
        let Some(owner) = self.round.published(leaf).filter(|_| shared) else { return };
        if moving.owner.is_some() || !moving.workers.iter().all(joining) {
            return;
        }
        (moving.owner, moving.trials) = (Some(owner.clone()), moving.trials + 1);
        moving.answers.clear();
        moving.checked.clear();
        let (step, against) = (self.step + 1, Against::Published);
        for worker in moving.workers.clone() {
            for _ in 0..REPEATS {
                self.send(worker, Command::Replay { step, leaf, against });
            }
            self.send(worker, Command::Check { step });
        }
    }

    /// A new worker's answer.
    pub(super) fn tried(&mut self, worker: usize, of: Replayed) {
        if let Some(moving) = &mut self.moving {
            moving.answers.entry(worker).or_default().push(of);
        }
    }

    /// A new worker's state after it has computed.
    pub(super) fn checked(&mut self, worker: usize, digest: StateDigest) {
        let who = self.called(worker);
        let Some(moving) = &mut self.moving else { return };
        if digest != moving.state {
            return self.refuse_move(format!("{who}: {CHANGED}"));
        }
        moving.checked.insert(worker);
        let aside = |worker: &usize| self.workers[*worker].standing == Standing::Waiting;
        let is_last = moving.checked.len() == moving.workers.len();
        if is_last && moving.workers.iter().all(aside) {
            // The step under way does not depend on it.
            let _ = self.settle_trial();
        }
    }

    /// `None` if the step need not wait for new workers; else whether it moves on. The first time
    /// they are tried the step goes on without them, and they answer when they can.
    pub(super) fn judge_trial(&mut self) -> Option<bool> {
        let tried = |of: &&mut Moving| of.tried.is_some() && of.certificate.is_none();
        let moving = self.moving.as_mut().filter(tried)?;
        let joining = |worker: &usize| self.workers[*worker].standing == Standing::Joining;
        if !moving.workers.iter().all(joining) {
            // Of a step before.
            return None;
        }
        let Some(owner) = &moving.owner else { return Some(false) };
        let now = self.round.published(moving.micro_batch).map(|subtree| subtree.digest);
        let is_spoilt = now != Some(owner.digest);
        if moving.checked.len() == moving.workers.len() {
            // What was computed again since is not what they were held against.
            return if is_spoilt { self.try_again() } else { self.settle_trial() };
        }
        if is_spoilt || moving.trials > 1 {
            return Some(false);
        }
        self.set_aside();
        None
    }

    /// The new workers take no part in the present step.
    fn set_aside(&mut self) {
        let workers = self.moving.as_ref().map(|moving| moving.workers.clone());
        for worker in workers.unwrap_or_default() {
            self.workers[worker].standing = Standing::Waiting;
        }
    }

    /// They are tried once more, from the next step's beginning on.
    fn try_again(&mut self) -> Option<bool> {
        if let Some(moving) = &mut self.moving {
            (moving.tried, moving.owner) = (None, None);
        }
        self.set_aside();
        None
    }

    /// All have answered: they have passed, are refused, or are tried again. Says what it means for
    /// the step under way, as `judge_trial` does.
    fn settle_trial(&mut self) -> Option<bool> {
        let moving = self.moving.as_mut()?;
        let published = moving.owner.as_ref().map(|owner| owner.digest);
        let read = |of: &Replayed| of.apart.as_ref().map(|apart| apart.published);
        let stale = moving.answers.values().flatten().any(|of| read(of) != published);
        if stale && moving.trials < TRIALS {
            // It was replaced before all had compared theirs with it.
            return self.try_again();
        }
        let certificate = self.certify();
        self.set_aside();
        if certificate.agree {
            if let Some(moving) = &mut self.moving {
                moving.certificate = Some(certificate);
            }
            return None;
        }
        let text = certificate.reasons.join("; ");
        self.refuse_with(text, Some(certificate));
        Some(true)
    }

    /// A new worker in a refusal.
    pub(super) fn called(&self, worker: usize) -> String {
        format!("{} (worker {worker})", self.workers[worker].device)
    }

    fn place(&self, worker: usize) -> Place {
        let of = &self.workers[worker];
        let (device, numeric_class) = (of.device.clone(), of.numeric_class.clone());
        Place { worker, device, numeric_class }
    }

    fn certify(&self) -> Certificate {
        let moving = self.moving.as_ref().expect("it is called while new workers are tried");
        let leaf = moving.micro_batch;
        let owner = moving.owner.as_ref().expect("they were asked to compare theirs with it");
        let mut reasons = Vec::new();
        let mut trials = Vec::new();
        for (&worker, answers) in &moving.answers {
            let (trial, why) = self.judge(worker, answers, owner);
            let who = format!("{} ({})", trial.place.device, trial.place.numeric_class);
            reasons.extend(why.into_iter().map(|why| format!("{who} {why}")));
            trials.push(trial);
        }
        let ms = |from: Duration, to: Duration| to.saturating_sub(from).as_millis() as u64;
        let loaded = moving.loaded.unwrap_or(self.now);
        let stays = |worker: &usize| {
            let of = &self.workers[*worker];
            !of.left && !of.trial && of.standing != Standing::Retired
        };
        let old = (0..self.workers.len()).filter(stays);
        Certificate {
            step: moving.step + 1,
            from: old.map(|worker| self.place(worker)).collect(),
            to: moving.workers.iter().map(|worker| self.place(*worker)).collect(),
            micro_batch: leaf,
            loss: owner.losses[0],
            trials,
            limits: self.settings.tolerance,
            band: None,
            agree: reasons.is_empty(),
            reasons,
            load_ms: ms(moving.begun, loaded),
            trial_ms: ms(moving.tried.unwrap_or(self.now), self.now),
            pause_ms: 0,
        }
    }

    /// What one new worker's answers come to, and what speaks against it.
    fn judge(&self, worker: usize, answers: &[Replayed], owner: &Subtree) -> (Trial, Vec<String>) {
        let (first, limits) = (&answers[0], self.settings.tolerance);
        let (error, tensor) = match &first.apart {
            Some(apart) if apart.published == owner.digest => {
                (apart.error.value(), apart.tensor.clone())
            }
            _ => (f64::NAN, String::new()),
        };
        let identical = first.digest == owner.digest;
        let again =
            |of: &Replayed| of.digest == first.digest && of.loss.to_bits() == first.loss.to_bits();
        let repeats = answers.iter().all(again);
        let loss_error = loss_apart(first.loss, owner.losses[0]);
        let alike = self.are_alike(worker, owner.worker);
        // NaN is beyond every limit.
        let beyond = |error: f64, limit: f64| !alike && (error > limit || error.is_nan());
        let mut why = Vec::new();
        if !repeats {
            why.push("does not give the same bits twice".to_owned());
        }
        if alike && !identical {
            why.push(format!(
                "gives other bits than its own kind: {error:.1e} apart in `{tensor}`"
            ));
        }
        if beyond(error, limits.gradient) {
            let limit = limits.gradient;
            let what = format!("is {error:.1e} apart in the gradient of `{tensor}`");
            why.push(format!("{what}, limit {limit:.1e}"));
        }
        if beyond(loss_error, limits.loss) {
            let (mine, theirs, limit) = (first.loss, owner.losses[0], limits.loss);
            why.push(format!("has a loss of {mine:.6} instead of {theirs:.6}, limit {limit:.1e}"));
        }
        let trial = Trial {
            place: self.place(worker),
            loss: first.loss,
            loss_error,
            gradient_error: error,
            tensor,
            identical,
            repeats,
            agree: why.is_empty(),
        };
        (trial, why)
    }

    /// Gives a move up, if there is one.
    pub(super) fn refuse_move(&mut self, text: String) {
        self.refuse_with(text, None);
    }

    fn refuse_with(&mut self, text: String, certificate: Option<Certificate>) {
        let Some(moving) = self.moving.take() else { return };
        for worker in moving.workers {
            self.leave(worker);
            self.workers[worker].trial = false;
            self.round.combined.remove(&worker);
            self.round.applied.remove(&worker);
        }
        let event = Event::new(self.step, EventKind::MoveRefused);
        self.tell(Event {
            device: Some(moving.devices.join(",")),
            cause: Some(text.clone()),
            action: Some("the run goes on where it was".to_owned()),
            certificate: certificate.as_ref().map(|of| json!(of)),
            ..event
        });
        let (devices, moved) = (moving.devices, false);
        let outcome = MoveOutcome { devices, moved, text, certificate };
        self.outputs.push(Output::Moved(Box::new(outcome)));
    }

    fn leave(&mut self, worker: usize) {
        let of = &mut self.workers[worker];
        if !matches!(of.standing, Standing::Out | Standing::Retired) {
            // The end of a process takes as long as giving its memory back. One that is at work
            // must be gone before others write where it writes; the others can wait.
            let outputs = if of.open > 0 { &mut self.outputs } else { &mut self.later };
            outputs.push(Output::Kill { worker });
        }
        (of.standing, of.left) = (Standing::Retired, true);
    }

    /// Before a step is handed out: `None` if it is, else whether the run has gone to the new
    /// workers, to whom it is handed out from here on. It has once all of them have its state.
    pub(super) fn hand_over(&mut self) -> Option<bool> {
        let moving = self.moving.as_ref().filter(|of| of.certificate.is_some())?;
        let waiting = |worker: &usize| self.workers[*worker].standing == Standing::Waiting;
        if moving.workers.iter().any(waiting) {
            // They have passed since the step began.
            return None;
        }
        if moving.took.len() < moving.workers.len() {
            return Some(false);
        }
        let moving = self.moving.take()?;
        let mut certificate = moving.certificate.clone()?;
        certificate.step = self.step;
        certificate.band = self.ledger.band(certificate.limits.curve);
        let pause = self.now.saturating_sub(self.round.begun);
        certificate.pause_ms = pause.as_millis() as u64;
        for worker in 0..self.workers.len() {
            if self.workers[worker].trial {
                self.workers[worker].trial = false;
                self.workers[worker].standing = Standing::Member;
            } else if !self.workers[worker].left {
                self.leave(worker);
            }
        }
        self.join_donor = None;
        // The new class follows by the move itself, not because the old one was lost.
        self.writing = None;
        self.writers();
        let copying = matches!(self.saving, Some(Saving::Copying { donor, .. })
            if self.workers[donor].left);
        if let Some(donor) = self.fastest().filter(|_| copying) {
            self.export(donor, Area::Snapshot);
        }
        self.tell_of_move(moving.devices, certificate);
        Some(true)
    }

    fn tell_of_move(&mut self, devices: Vec<String>, certificate: Certificate) {
        let names = |places: &[Place]| -> String {
            let of = places.iter().map(|of| format!("{} ({})", of.device, of.numeric_class));
            of.collect::<Vec<_>>().join(", ")
        };
        let (from, to) = (names(&certificate.from), names(&certificate.to));
        let worst = certificate.trials.iter().map(|of| of.gradient_error).fold(0.0, f64::max);
        let text = format!(
            "moved after step {} from {from} to {to}: gradients at most {worst:.1e} apart",
            certificate.step
        );
        self.tell(Event {
            device: Some(devices.join(",")),
            cause: Some("asked for".to_owned()),
            action: Some(format!("from {from} to {to}")),
            recovery_ms: Some(certificate.pause_ms),
            certificate: Some(json!(certificate)),
            ..Event::new(self.step, EventKind::Moved)
        });
        let (moved, certificate) = (true, Some(certificate));
        let outcome = MoveOutcome { devices, moved, text, certificate };
        // Files are written for it.
        self.later.push(Output::Moved(Box::new(outcome)));
    }
}
