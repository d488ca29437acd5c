//! The beginning and the end of a step: who takes part, what is handed out, what is saved.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::policy::{Verdict, apart, assign, slow, verdict};
use crate::protocol::{Area, Command, Node, Publish, Rates, StateDigest};
use crate::run_dir::{Event, EventKind};

use super::auditing::Crew;
use super::losing::Loss;
use super::round::Round;
use super::workers::{Slowness, Standing};
use super::{Ending, Output, Phase, Saving, StepDone, Supervisor, Validation};

/// Slow steps in a row after which a worker is called slow: one may be the machine's noise.
const SLOW_AFTER: u32 = 3;
/// But not before it has been slow for so long: steps of milliseconds are all noise.
const SLOW_FLOOR: Duration = Duration::from_secs(1);
/// Slow steps in a row after which one that gets no leaf any more is given up.
const EVICT_AFTER: u32 = 6;
/// But not before so long: a new process costs about as much.
const EVICT_FLOOR: Duration = Duration::from_secs(3);
/// What a slow worker's time for a leaf is multiplied with after a step without one, until it is
/// given one again and shows whether it is still slow.
const FORGETTING: f64 = 0.9;
/// The pause before a failed snapshot is tried again; it doubles with every failure.
const SAVE_PAUSE: Duration = Duration::from_millis(200);
/// But never beyond this, so that a disk or store that is back is used soon; a try costs a copy.
const SAVE_PAUSE_MAX: Duration = Duration::from_secs(10);

impl Supervisor {
    /// Begins once every worker has loaded or is out, with those that have the newest state.
    pub(super) fn try_begin(&mut self) -> bool {
        if self.awaits_snapshot || self.workers.iter().any(|of| of.standing == Standing::Loading) {
            return false;
        }
        let ready = self.those(Standing::Ready);
        let loaded = |worker: &usize| self.workers[*worker].loaded;
        let Some(step) = ready.iter().filter_map(loaded).map(|(step, _)| step).max() else {
            let text = format!("no worker could start: {}", self.last_cause());
            self.end(Ending::Failed(text));
            return false;
        };
        // One that read an older snapshot, or found the newest damaged, joins from its peers.
        let newest = |w: &usize| loaded(w).filter(|(of, _)| *of == step);
        let digests: Vec<(usize, StateDigest)> =
            ready.iter().filter_map(|w| newest(w).map(|(_, digest)| (*w, digest))).collect();
        let votes: Vec<(usize, u64)> = digests
            .iter()
            .map(|(w, [state, weights])| (*w, state ^ weights.rotate_left(1)))
            .collect();
        match verdict(&votes) {
            Verdict::Agreed => {}
            Verdict::Outvoted(liars) => {
                for worker in liars {
                    let cause = "loaded another state than the others".to_owned();
                    self.lose(worker, Loss::new(EventKind::Corrupt, cause));
                }
                return true;
            }
            Verdict::Tied => {
                let text = "the workers loaded different states and none can be outvoted; qualify \
                            the devices";
                self.end(Ending::Failed(text.to_owned()));
                return false;
            }
        }
        let first = self.ledger.goodput(self.now) == 0.0 && self.restarts == 0;
        (self.step, self.agreed) = (step, digests[0].1);
        self.ledger.rolled_back(step);
        if step > 0 {
            self.saved = Some(step);
        }
        for &(worker, _) in &digests {
            self.workers[worker].standing = Standing::Member;
        }
        self.ledger.lose(if first { "startup" } else { "restart" }, self.since_round());
        let kind = if step == 0 { EventKind::Started } else { EventKind::Resumed };
        let mut event = Event::new(step, kind);
        if let [worker] = self.workers.as_slice() {
            event.device = Some(worker.device.clone());
        }
        self.tell(event);
        self.begin_with_class();
        self.round = Round::new(self.now);
        if step >= self.settings.steps || self.stop_asked {
            self.finish()
        } else {
            self.begin_step()
        }
        true
    }

    pub(super) fn since_round(&self) -> f64 {
        self.now.saturating_sub(self.round.begun).as_secs_f64()
    }

    fn begin_step(&mut self) {
        self.round = Round::new(self.now);
        self.phase = Phase::Computing;
        let Some(donor) = self.fastest() else { return };
        self.begin_trial();
        let joining = !self.those(Standing::Ready).is_empty();
        if joining && self.join_donor.is_none() {
            self.export(donor, Area::Join);
        }
        self.try_hand_out();
    }

    /// Hands the step out, unless the run is about to go to new workers: they get it. Whether it
    /// did.
    pub(super) fn try_hand_out(&mut self) -> bool {
        if self.hand_over() == Some(false) {
            return false;
        }
        let Some(donor) = self.fastest() else { return false };
        self.round.handed_out = true;
        let may_save = self.saving.is_none() && self.now >= self.save_not_before;
        if self.snapshot_due && may_save {
            self.snapshot_due = false;
            self.export(donor, Area::Snapshot);
        }
        let members = self.those(Standing::Member).len();
        self.round.plan = self.plan_audits(members);
        let joins = |of: &Standing| matches!(of, Standing::Ready | Standing::Joining);
        let joining = self.workers.iter().any(|of| joins(&of.standing));
        let alone = members == 1 && !joining;
        self.round.publish = if alone { Publish::Local } else { Publish::Shared };
        let leaves: Vec<u32> = (0..self.settings.leaves).collect();
        self.hand_out(&leaves, 0);
        true
    }

    /// Gives leaves to members by their speeds; `turn` moves each part to another member.
    pub(super) fn hand_out(&mut self, leaves: &[u32], turn: usize) {
        let mut members = self.those(Standing::Member);
        if members.is_empty() {
            return;
        }
        let turn = turn % members.len();
        members.rotate_left(turn);
        let known: Vec<f64> = members.iter().filter_map(|w| self.workers[*w].seconds).collect();
        let usual = match known.len() {
            0 => 1.0,
            count => known.iter().sum::<f64>() / count as f64,
        };
        let seconds: Vec<f64> =
            members.iter().map(|w| self.workers[*w].seconds.unwrap_or(usual)).collect();
        let assigned = assign(leaves, &seconds);
        let mut crew = Crew { busy: vec![0.0; members.len()], members, seconds };
        for (place, nodes) in assigned.iter().enumerate() {
            crew.give(place, nodes.iter().map(|node| node.count).sum());
        }
        let mut replays = Vec::new();
        let mixed = self.is_mixed();
        for (place, nodes) in assigned.into_iter().enumerate() {
            let worker = crew.members[place];
            if nodes.is_empty() {
                continue;
            }
            let mut digests = Vec::new();
            for leaf in nodes.iter().flat_map(|node| node.first..node.first + node.count) {
                if let Some(auditor) = self.audit(leaf, worker, &mut crew) {
                    digests.push(leaf);
                    replays.push((auditor, leaf));
                    if mixed {
                        self.round.single.insert(leaf);
                    }
                }
            }
            let single = &self.round.single;
            let nodes: Vec<Node> = nodes.into_iter().flat_map(|of| apart(of, single)).collect();
            self.round.pending.extend(nodes.iter().map(|node| (worker, *node, self.now)));
            let (step, publish) = (self.step + 1, self.round.publish);
            self.send(worker, Command::Compute { step, nodes, digests, publish });
        }
        for (worker, leaf) in replays {
            self.replay(worker, leaf);
        }
    }

    /// Every writer has applied the step: compares them, and hands their state on or closes it.
    pub(super) fn try_close(&mut self) -> bool {
        if self.round.applied.len() < self.round.told.len() {
            return false;
        }
        let writers = self.writers();
        if writers.is_empty() {
            self.start_over("no worker is left");
            return false;
        }
        if !self.let_apply(&writers) {
            return false;
        }
        let applied: Vec<(usize, StateDigest)> =
            self.round.applied.iter().map(|(worker, (_, after))| (*worker, *after)).collect();
        let votes: Vec<(usize, u64)> = applied
            .iter()
            .map(|(w, [state, weights])| (*w, state ^ weights.rotate_left(1)))
            .collect();
        let cause = "holds other weights than the others after the update";
        match verdict(&votes) {
            Verdict::Agreed => {}
            Verdict::Outvoted(liars) => {
                for worker in liars {
                    self.lose(worker, Loss::new(EventKind::Corrupt, cause.to_owned()));
                }
                return true;
            }
            Verdict::Tied => {
                self.start_over("two replicas hold different weights after the update");
                return false;
            }
        }
        self.round.after = Some(applied[0].1);
        let replicas = self.replicas();
        if writers.len() < replicas.len() {
            self.hand_on(writers[0]);
        } else {
            self.close_with_state(&replicas);
        }
        true
    }

    /// All replicas have the state after the step.
    pub(super) fn close_with_state(&mut self, replicas: &[usize]) {
        self.agreed = self.round.after.expect("it was agreed on before it was handed on");
        self.skips = 0;
        self.step_done(replicas);
    }

    /// Passes over a step's data: nothing is applied.
    pub(super) fn skip(&mut self, cause: String) {
        self.skips += 1;
        let action = Some("its data is passed over; the weights stay as they are".to_owned());
        let event = Event::new(self.step + 1, EventKind::Skipped);
        self.tell(Event { cause: Some(cause), action, ..event });
        self.round.combined.clear();
        let replicas = self.replicas();
        for &worker in &replicas {
            self.workers[worker].standing = Standing::Member;
        }
        self.step_done(&replicas);
    }

    fn step_done(&mut self, replicas: &[usize]) {
        self.step += 1;
        self.restarts = 0;
        for &worker in replicas {
            self.workers[worker].did_well();
        }
        let due = match self.settings.validation {
            Validation::Never => false,
            Validation::Every(every) => {
                (every > 0 && self.step.is_multiple_of(every)) || self.step == self.settings.steps
            }
        };
        match self.fastest() {
            Some(worker) if due => {
                self.phase = Phase::Scoring;
                self.send(worker, Command::Score { step: self.step });
            }
            _ => self.close_step(),
        }
    }

    pub(super) fn try_scored(&mut self) -> bool {
        if self.round.valid_loss.is_none() {
            return false;
        }
        self.close_step();
        true
    }

    fn close_step(&mut self) {
        let disturbance = self.settle();
        let mut members = self.those(Standing::Member);
        members.retain(|worker| !self.workers[*worker].trial);
        let wanted = self.workers.iter().filter(|of| !of.left && !of.trial).count();
        let missing = (members.len() < wanted).then_some("missing_workers");
        let moving = self.round.moving.then_some("move");
        let stalled = self.round.stalled.then_some("stalled");
        let cause = disturbance.or(stalled).or(moving).or(missing);
        let wall = self.now.saturating_sub(self.round.begun);
        let checking = self.audited_seconds(&members);
        self.ledger.lose("audit", checking);
        let lost = self.ledger.step(self.step, wall.as_secs_f64() - checking, cause);
        self.round.begun = self.now;
        let rates = self.round.applied.values().next().map_or(Rates::default(), |of| of.0);
        let norm = self.round.combined.values().next().map_or(f64::NAN, |of| of.norm);
        let losses = self.round.losses();
        self.ledger.last_losses(self.step, &losses);
        self.outputs.push(Output::Step(StepDone {
            step: self.step,
            losses,
            norm,
            rates,
            wall,
            lost: Duration::from_secs_f64(lost + checking),
            goodput: self.ledger.goodput(self.now),
            workers: members.len() as u32,
            classes: self.leaves_by_class(),
            apart: self.round.apart,
            valid_loss: self.round.valid_loss,
        }));
        self.look_for_slowness(&members);
        let every = self.settings.snapshot_every;
        self.snapshot_due |= every > 0 && self.step.is_multiple_of(every);
        let over = self.step >= self.settings.steps || self.stop_asked;
        if over { self.finish() } else { self.begin_step() }
    }

    /// Which members are slow for their kind: a slower kind is no fault, it just gets less.
    fn slow_for_their_kind(&self, members: &[usize], seconds: &[f64]) -> Vec<bool> {
        let mut kinds: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (place, &worker) in members.iter().enumerate() {
            kinds.entry(&self.workers[worker].numeric_class).or_default().push(place);
        }
        let mut are = vec![false; members.len()];
        for places in kinds.values() {
            let alike: Vec<f64> = places.iter().map(|place| seconds[*place]).collect();
            for (place, is_slow) in places.iter().zip(slow(&alike)) {
                are[*place] = is_slow;
            }
        }
        are
    }

    /// Names those that fell behind; gives up those that get no leaf any more.
    fn look_for_slowness(&mut self, members: &[usize]) {
        let Some(seconds) =
            members.iter().map(|w| self.workers[*w].seconds).collect::<Option<Vec<f64>>>()
        else {
            return;
        };
        let counts = crate::policy::shares(self.settings.leaves, &seconds);
        let even = self.settings.leaves / members.len().max(1) as u32;
        let is_slow = self.slow_for_their_kind(members, &seconds);
        for (index, &worker) in members.iter().enumerate() {
            let computed = self.round.done.values().any(|subtree| subtree.worker == worker);
            let of = &mut self.workers[worker];
            if !is_slow[index] {
                of.slowness = Slowness::default();
                continue;
            }
            of.slowness.steps += 1;
            let lasted = self.now.saturating_sub(*of.slowness.since.get_or_insert(self.now));
            let is_over = of.slowness.steps >= EVICT_AFTER && lasted >= EVICT_FLOOR;
            let is_clear = of.slowness.steps >= SLOW_AFTER && lasted >= SLOW_FLOOR;
            if !computed {
                of.seconds = of.seconds.map(|seconds| seconds * FORGETTING);
            }
            if is_over && counts[index] == 0 && even > 0 {
                let cause = format!(
                    "{:.0} ms for a micro-batch: too slow to be of use",
                    1e3 * seconds[index]
                );
                self.lose(worker, Loss::new(EventKind::Evicted, cause));
            } else if is_clear && !std::mem::replace(&mut of.slowness.is_told, true) {
                self.ledger.faults += 1;
                let mut event = self.event(worker, EventKind::Slow);
                event.detected_ms = self.workers[worker].since_injection(self.now);
                event.cause = Some(format!("{:.0} ms for a micro-batch", 1e3 * seconds[index]));
                event.action = Some(format!("its share is {} instead of {even}", counts[index]));
                self.tell(event);
            }
        }
    }

    /// The last snapshot, then the end.
    pub(super) fn finish(&mut self) {
        self.refuse_move("the run is ending".to_owned());
        self.phase = Phase::Finishing;
        // Whatever failed before, the last one is tried at once, and then as long as was asked for.
        (self.save_failures, self.save_not_before) = (0, self.now);
        self.save_until = self.now + self.settings.save_patience;
        self.save_given_up = false;
        // Of a step that could not be done; one that was done is accounted for.
        self.ledger.lose("given_up", self.since_round());
        self.round.begun = self.now;
    }

    pub(super) fn try_end(&mut self) -> bool {
        if self.saved == Some(self.step)
            || (self.step == 0 && matches!(self.ending, Some(Ending::Failed(_))))
        {
            self.ledger.lose("last_snapshot", self.since_round());
            self.round.begun = self.now;
            let finished = self.step >= self.settings.steps;
            if finished && self.ending.is_none() {
                let action = Some(self.ledger.account(self.now));
                self.tell(Event { action, ..Event::new(self.step, EventKind::Finished) });
            }
            let usual = if finished { Ending::Finished } else { Ending::Stopped };
            let ending = self.ending.take().unwrap_or(usual);
            self.end(ending);
            return false;
        }
        if self.saving.is_none() {
            if self.save_given_up {
                let text = "the last snapshot could not be written, see events.jsonl; free some \
                            space, see to the store or set snapshot.to, then go on with --resume";
                self.end(Ending::Failed(text.to_owned()));
                return false;
            }
            match self.fastest() {
                Some(_) if self.now < self.save_not_before => {}
                Some(donor) => self.export(donor, Area::Snapshot),
                None => self.start_over("no worker is left to save the state"),
            }
        }
        false
    }

    pub(super) fn exported(&mut self, worker: usize, step: u64, area: Area, digest: u64) {
        if area == Area::Step {
            // One that was asked before its step was given up says nothing any more.
            let awaited = self.phase == Phase::Handing && self.round.handing == Some(worker);
            if awaited {
                self.handed(worker, digest);
            }
            return;
        }
        if step != self.step || digest != self.agreed[0] {
            let cause = "copied another state than all agreed on".to_owned();
            return self.lose(worker, Loss::new(EventKind::Corrupt, cause).discarding());
        }
        match area {
            Area::Step => {}
            Area::Join => {
                self.join_donor = None;
                for joiner in self.those(Standing::Ready) {
                    self.workers[joiner].standing = Standing::Joining;
                    self.send(joiner, Command::Import { step });
                }
            }
            Area::Snapshot => {
                self.saving = Some(Saving::Writing { step });
                let numeric_class = self.writing.clone().unwrap_or_default();
                self.outputs.push(Output::Save { step, digest, numeric_class });
            }
        }
    }

    pub(super) fn imported(&mut self, worker: usize, digest: StateDigest) {
        if self.workers[worker].trial {
            return self.transferred(worker, digest);
        }
        if digest != self.agreed {
            let cause = "took another state from its peer than the peer gave".to_owned();
            return self.lose(worker, Loss::new(EventKind::Corrupt, cause));
        }
        let event = self.event(worker, EventKind::Joined);
        self.tell(event);
    }

    pub(super) fn saved(&mut self, step: u64, folder: String) {
        self.saving = None;
        self.save_failures = 0;
        self.saved = Some(step);
        self.tell(Event { action: Some(folder), ..Event::new(step, EventKind::Snapshot) });
        if self.awaits_snapshot {
            self.start_from_the_newest();
        }
    }

    pub(super) fn save_failed(&mut self, step: u64, cause: String) {
        self.saving = None;
        self.save_failures += 1;
        self.snapshot_due = true;
        self.ledger.faults += 1;
        let doublings = 2_u32.saturating_pow(self.save_failures - 1);
        let mut pause = SAVE_PAUSE.saturating_mul(doublings).min(SAVE_PAUSE_MAX);
        if self.phase == Phase::Finishing {
            pause = pause.min(self.save_until.saturating_sub(self.now));
            self.save_given_up = pause.is_zero();
        }
        self.save_not_before = self.now + pause;
        let action = Some(match pause.is_zero() {
            true => "given up".to_owned(),
            false => format!("goes on; tried again {:.1} s later or when due", pause.as_secs_f64()),
        });
        let event = Event::new(step, EventKind::SnapshotFailed);
        self.tell(Event { cause: Some(cause), action, ..event });
        if self.awaits_snapshot {
            self.start_from_the_newest();
        }
    }
}
