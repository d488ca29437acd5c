//! What happens when a worker is lost: who takes over its work, whether it comes back, and when
//! the whole run goes back to a snapshot.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::policy::{is_overdue, load_deadline};
use crate::protocol::{Area, Source, Trouble};
use crate::run_dir::{Event, EventKind};

use super::round::Round;
use super::workers::{Standing, Worker};
use super::{Ending, Output, Phase, Saving, Supervisor};

/// A device that was taken out this often stays out.
const STRIKES: u32 = 3;
/// A process that ends this often before it computes is not started again.
const FALSE_STARTS: u32 = 3;
/// Restarts from a snapshot without a step done between them.
const RESTARTS: u32 = 5;

/// A worker for which all others wait hangs if it has not moved for this long.
const STANDSTILL: Duration = Duration::from_secs(1);

/// Said of a worker whose state is no longer the one that all agreed on.
pub(super) const CHANGED: &str = "its weights or moments changed between two steps";

/// Why a worker is taken out, and what becomes of what it did.
#[derive(Clone, Debug)]
pub(super) struct Loss {
    kind: EventKind,
    cause: String,
    discards: bool,
    /// Filled in when it happens.
    event: Option<Event>,
    since: Duration,
}

impl Loss {
    pub fn new(kind: EventKind, cause: String) -> Loss {
        Loss { kind, cause, discards: false, event: None, since: Duration::ZERO }
    }

    /// What the worker computed in this step is not to be used either.
    pub fn discarding(mut self) -> Loss {
        self.discards = true;
        self
    }
}

impl Worker {
    /// Milliseconds since a fault was injected into it.
    pub(super) fn since_injection(&self, now: Duration) -> Option<u64> {
        let (_, at) = self.injected.as_ref()?;
        Some(now.saturating_sub(*at).as_millis() as u64)
    }
}

impl Supervisor {
    /// Takes a worker out. What it had to do goes to the others; a new process takes its place
    /// unless the device has been taken out too often.
    pub(super) fn lose(&mut self, worker: usize, mut loss: Loss) {
        let was = self.workers[worker].standing;
        if matches!(was, Standing::Out | Standing::Retired) {
            return;
        }
        if self.workers[worker].trial {
            return self.refuse_move(format!("{}: {}", self.called(worker), loss.cause));
        }
        self.outputs.push(Output::Kill { worker });
        let mut lost = self.round.take_pending(worker);
        // Once all agree on the sum, what it was made of is sound, and the step's losses with it.
        if loss.discards && matches!(self.phase, Phase::Computing | Phase::Combining) {
            lost.extend(self.round.discard(|subtree| subtree.worker == worker));
        }
        self.round.combined.remove(&worker);
        self.round.applied.remove(&worker);
        self.round.told.remove(&worker);
        self.round.handing = self.round.handing.filter(|donor| *donor != worker);
        let mut event = self.event(worker, loss.kind);
        event.step = self.step + u64::from(was == Standing::Member);
        event.cause = Some(loss.cause.clone());
        event.detected_ms = self.workers[worker].since_injection(self.now);
        event.lost_micro_batches = Some(lost.len() as u64);
        let of = &mut self.workers[worker];
        of.standing = Standing::Out;
        if was != Standing::Member {
            of.false_starts += 1;
        }
        if matches!(loss.kind, EventKind::Corrupt | EventKind::Evicted) {
            (of.strikes, of.on_probation) = (of.strikes + 1, true);
            of.clean_steps = 0;
            of.seconds = None;
        }
        let stays_out = of.strikes >= STRIKES || of.false_starts >= FALSE_STARTS;
        event.action = Some(match stays_out {
            true => format!("out for good; {} micro-batches to others", lost.len()),
            false => format!("a new process; {} micro-batches to others", lost.len()),
        });
        (loss.event, loss.since) = (Some(event), self.now);
        self.lost_for = Some(format!("{}: {}", self.workers[worker].device, loss.cause));
        self.ledger.faults += 1;
        self.losses.push(loss);
        if stays_out {
            self.workers[worker].standing = Standing::Retired;
        } else {
            let starting = self.phase == Phase::Starting;
            let again = match self.settings.source {
                Source::Fresh if self.saved.is_none() => Source::Fresh,
                _ => Source::Snapshot,
            };
            self.launch(worker, if starting { again } else { Source::Nothing });
        }
        self.carry_on_without(worker, &lost);
    }

    fn carry_on_without(&mut self, worker: usize, lost: &[u32]) {
        let in_step = matches!(self.phase, Phase::Computing | Phase::Combining);
        let after = matches!(self.phase, Phase::Applying | Phase::Handing | Phase::Scoring);
        if !in_step && !after && self.phase != Phase::Finishing {
            return;
        }
        let mut members = self.those(Standing::Member);
        if members.is_empty() {
            // Those that were told to take a peer's state hold it, or will be found out.
            members = self.those(Standing::Joining);
            members.retain(|&of| !self.workers[of].trial || self.has_passed());
            members.iter().for_each(|&of| self.workers[of].standing = Standing::Member);
        }
        if members.is_empty() {
            return self.start_over("no worker is left");
        }
        self.drop_from_audits(worker, &members);
        if let Some(donor) = self.fastest() {
            if self.join_donor == Some(worker) {
                self.export(donor, Area::Join);
            }
            if matches!(self.saving, Some(Saving::Copying { donor, .. }) if donor == worker) {
                self.export(donor, Area::Snapshot);
            }
            if self.phase == Phase::Scoring {
                let step = self.step;
                self.send(donor, crate::protocol::Command::Score { step });
            }
        }
        if in_step && !lost.is_empty() {
            self.round.combined.clear();
            self.phase = Phase::Computing;
            let leaves: Vec<u32> =
                lost.iter().copied().collect::<BTreeSet<u32>>().into_iter().collect();
            self.hand_out(&leaves, 0);
        }
    }

    /// Audits of a lost worker's leaves go with it; those it should have done go to another.
    fn drop_from_audits(&mut self, worker: usize, members: &[usize]) {
        let mut again = Vec::new();
        self.round.audits.retain_mut(|audit| {
            if audit.owner == worker {
                return false;
            }
            let Some(place) = audit.asked.iter().position(|asked| *asked == worker) else {
                return true;
            };
            audit.asked.swap_remove(place);
            let busy = |w: &usize| *w == audit.owner || audit.asked.contains(w);
            match members.iter().copied().find(|w| !busy(w)) {
                Some(other) => {
                    audit.asked.push(other);
                    again.push((other, audit.leaf));
                    true
                }
                None => audit.votes.len() > 1 || !audit.asked.is_empty(),
            }
        });
        for (other, leaf) in again {
            self.replay(other, leaf);
        }
    }

    /// All go back to the newest snapshot.
    pub(super) fn start_over(&mut self, cause: &str) {
        self.refuse_move(format!("all workers go back to a snapshot: {cause}"));
        self.restarts += 1;
        if self.restarts > RESTARTS {
            let text = format!("{cause}, {RESTARTS} times without a step between");
            return self.end(Ending::Failed(text));
        }
        let event = Event::new(self.step, EventKind::RolledBack);
        let action = Some(match (self.saving, self.saved) {
            (Some(Saving::Writing { step }), _) => {
                format!("all go on from step {step}, if it is saved")
            }
            (_, back) => format!("all go on from step {}", back.unwrap_or(0)),
        });
        self.ledger.faults += 1;
        self.tell(Event { cause: Some(cause.to_owned()), action, ..event });
        if matches!(self.saving, Some(Saving::Copying { .. })) {
            self.saving = None;
        }
        self.join_donor = None;
        self.ledger.lose("given_up", self.since_round());
        self.round = Round::new(self.now);
        for worker in 0..self.workers.len() {
            if !matches!(self.workers[worker].standing, Standing::Out | Standing::Retired) {
                self.outputs.push(Output::Kill { worker });
                self.workers[worker].standing = Standing::Out;
            }
        }
        if self.workers.iter().all(|of| of.standing == Standing::Retired) {
            let text = format!("every worker is out for good: {}", self.last_cause());
            return self.end(Ending::Failed(text));
        }
        self.start_from_the_newest();
    }

    /// Starts all workers, once no snapshot is on its way: it would be newer than what they load.
    pub(super) fn start_from_the_newest(&mut self) {
        self.phase = Phase::Starting;
        self.awaits_snapshot = self.saving.is_some();
        if !self.awaits_snapshot {
            let fresh = self.saved.is_none() && self.settings.source == Source::Fresh;
            self.start(if fresh { Source::Fresh } else { Source::Snapshot });
        }
    }

    pub(super) fn failed(&mut self, worker: usize, trouble: Trouble, text: String) {
        let kind = match trouble {
            Trouble::Lost => EventKind::Crash,
            Trouble::Hang => EventKind::Hang,
            Trouble::MemoryFault => EventKind::MemoryFault,
            Trouble::OutOfMemory => EventKind::OutOfMemory,
            Trouble::LinkDown => EventKind::LinkDown,
            Trouble::Corrupt if self.may_repeat(worker) => return self.repeat(worker, text),
            Trouble::Corrupt => {
                return self.lose(worker, Loss::new(EventKind::Corrupt, text).discarding());
            }
            Trouble::Run if self.workers[worker].trial => return self.refuse_move(text),
            Trouble::Run => return self.end(Ending::Failed(text)),
        };
        self.lose(worker, Loss::new(kind, text));
    }

    /// Whether a worker that found a wrong result computes the step once more: nobody else could,
    /// and without it the run would go back to a snapshot. What was wrong may have been a moment's
    /// error; the state it goes on from is compared with what was agreed on before it is applied.
    fn may_repeat(&self, worker: usize) -> bool {
        let others = self.replicas().into_iter().any(|of| of != worker && !self.workers[of].trial);
        let is_member = self.workers[worker].standing == Standing::Member;
        let computes = matches!(self.phase, Phase::Computing | Phase::Combining);
        is_member && !others && computes && !self.round.repeated
    }

    fn repeat(&mut self, worker: usize, cause: String) {
        let unanswered = self.round.pending.iter().filter(|(of, ..)| *of == worker).count();
        let mut leaves = self.round.take_pending(worker);
        leaves.extend(self.round.discard(|_| true));
        leaves.sort_unstable();
        self.round.combined.clear();
        self.round.audits.clear();
        self.round.spikes.clear();
        self.round.repeated = true;
        let mut event = self.event(worker, EventKind::Corrupt);
        event.step = self.step + 1;
        event.action = Some("computed again by the same worker, as there is no other".to_owned());
        event.detected_ms = self.workers[worker].since_injection(self.now);
        event.lost_micro_batches = Some(leaves.len() as u64);
        event.cause = Some(cause.clone());
        let loss = Loss::new(EventKind::Corrupt, cause);
        self.losses.push(Loss { event: Some(event), since: self.now, ..loss });
        self.ledger.faults += 1;
        let of = &mut self.workers[worker];
        of.open = of.open.saturating_sub(unanswered.max(1) as u32);
        (of.injected, of.clean_steps, of.progressed) = (None, 0, self.now);
        self.phase = Phase::Computing;
        self.hand_out(&leaves, 0);
    }

    /// Finds those that do not answer, and those for which all others wait.
    pub(super) fn look_for_silence(&mut self) {
        for worker in 0..self.workers.len() {
            let of = &self.workers[worker];
            if matches!(of.standing, Standing::Out | Standing::Retired) || of.open == 0 {
                continue;
            }
            let silent = self.now.saturating_sub(of.progressed);
            let deadline = match of.standing {
                Standing::Loading | Standing::Warming => load_deadline(self.longest_load),
                _ => self.settings.hang_after.deadline(of.longest_pause),
            };
            if silent > deadline || self.is_stuck(worker, silent) {
                let (silent, most) = (silent.as_secs_f64(), deadline.as_secs_f64());
                let cause = match silent > most {
                    true => format!("no progress for {silent:.1} s, and {most:.1} s is the most"),
                    false => {
                        format!("all others wait; it beats, without progress for {silent:.1} s")
                    }
                };
                self.lose(worker, Loss::new(EventKind::Hang, cause));
            } else if self.is_holding_up(worker) {
                // Whoever still gets on is slow; whoever has stood still for most of it is not.
                let stands = silent > STANDSTILL;
                let kind = if stands { EventKind::Hang } else { EventKind::Evicted };
                let silent = silent.as_secs_f64();
                let cause = format!("all others wait; its last progress was {silent:.1} s ago");
                self.lose(worker, Loss::new(kind, cause));
            }
        }
    }

    /// Whether a worker stands still for which all others wait, though its process is alive and
    /// gets its share of the machine: then a shorter silence is enough.
    fn is_stuck(&self, worker: usize, silent: Duration) -> bool {
        let of = &self.workers[worker];
        let in_step = matches!(self.phase, Phase::Computing | Phase::Combining | Phase::Applying);
        let steps = of.standing == Standing::Member && of.is_proven && in_step;
        if !steps || !self.settings.hang_after.is_stuck(silent, of.longest_pause, of.beats) {
            return false;
        }
        let members = self.those(Standing::Member);
        let idle = |other: &usize| *other == worker || self.workers[*other].open == 0;
        members.len() > 1 && members.iter().all(idle)
    }

    /// The supervisor was away: silence counts from now on. Workers that were stopped with it have
    /// done nothing wrong, and the others are heard at once.
    pub(super) fn start_listening_anew(&mut self) {
        for of in &mut self.workers {
            (of.progressed, of.answered, of.beats) = (self.now, self.now, 0);
        }
        for (.., since) in &mut self.round.pending {
            *since = self.now;
        }
        self.round.stalled = true;
    }

    fn is_holding_up(&self, worker: usize) -> bool {
        if self.phase != Phase::Computing || self.those(Standing::Member).len() < 2 {
            return false;
        }
        let pending = &self.round.pending;
        if pending.is_empty() || pending.iter().any(|(of, ..)| *of != worker) {
            return false;
        }
        let of = &self.workers[worker];
        // Whoever also copies its state or checks others has a reason to take longer.
        if of.open as usize > pending.len() {
            return false;
        }
        let (leaves, since) =
            pending.iter().fold((0, self.now), |(leaves, since), (_, node, at)| {
                (leaves + node.count, since.min(*at))
            });
        let since = since.max(of.answered);
        match of.seconds {
            Some(seconds) => {
                let expected = Duration::from_secs_f64(seconds * f64::from(leaves));
                is_overdue(self.now.saturating_sub(since), expected)
            }
            _ => false,
        }
    }

    /// Why a worker was lost last.
    pub(super) fn last_cause(&self) -> &str {
        self.lost_for.as_deref().unwrap_or("see events.jsonl")
    }

    /// Writes down the losses that the run has got over; returns what disturbed it, if anything.
    pub(super) fn settle(&mut self) -> Option<&'static str> {
        let losses = std::mem::take(&mut self.losses);
        let first = losses.first().map(|loss| loss.kind.name());
        for loss in losses {
            if let Some(mut event) = loss.event {
                let took = self.now.saturating_sub(loss.since);
                event.recovery_ms = Some(took.as_millis() as u64);
                self.tell(event);
            }
        }
        first
    }
}
