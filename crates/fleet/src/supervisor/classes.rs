//! Devices of several numeric classes in one run. Within a class equal inputs give equal bits;
//! between two, results are held against each other within certified limits.
//!
//! One class applies the steps, and replicas of the others take the state that comes out, so that
//! all of them hold the same bits at every boundary. Why, is in
//! `docs/decisions/2026-11-25-one-class-applies-the-steps.md`. Read next: `moving.rs`.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::policy::{Verdict, verdict};
use crate::protocol::{Against, Area, Command, Node, StateDigest};
use crate::run_dir::{Event, EventKind};

use super::losing::Loss;
use super::round::{Audit, Evidence, Replayed};
use super::workers::Standing;
use super::{Phase, Supervisor};

/// The norm of one sum, summed in another order: f32 and a billion elements stay below this.
const NORM_APART: f64 = 1e-3;

/// What a worker compared with may have been replaced meanwhile; what always reads as something
/// else than was published is published once more.
const REREADS: u32 = 3;

/// How far results of two numeric classes may be apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Tolerance {
    /// The relative error of a tensor's gradient in one micro-batch.
    pub gradient: f64,
    /// The relative difference of a micro-batch's loss.
    pub loss: f64,
    /// What rounding alone may do to a mean of losses: as much as to one, without what evens out.
    pub curve: f64,
}

impl Supervisor {
    pub(super) fn are_alike(&self, one: usize, other: usize) -> bool {
        self.workers[one].numeric_class == self.workers[other].numeric_class
    }

    /// Whether a step's gradients come, or may come, from more than one class.
    pub(super) fn is_mixed(&self) -> bool {
        let takes_part =
            |of: &Standing| matches!(of, Standing::Ready | Standing::Joining | Standing::Member);
        let mut classes = self
            .workers
            .iter()
            .filter(|of| takes_part(&of.standing))
            .map(|of| of.numeric_class.as_str());
        let first = classes.next();
        classes.any(|class| Some(class) != first)
    }

    /// Asks for a leaf once more. A worker of another class is asked when the owner's gradient
    /// has been published; see [`Supervisor::ask_across_classes`].
    pub(super) fn replay(&mut self, worker: usize, leaf: u32) {
        let Some(audit) = self.round.audits.iter().find(|audit| audit.leaf == leaf) else { return };
        let crosses = audit.evidence == Evidence::Gradient && !self.are_alike(worker, audit.owner);
        if crosses && self.round.published(leaf).is_none() {
            return;
        }
        let against = if crosses { Against::Published } else { Against::Nothing };
        *self.round.replays.entry(worker).or_default() += 1;
        self.send(worker, Command::Replay { step: self.step + 1, leaf, against });
    }

    /// Sends the questions that waited for this subtree.
    pub(super) fn ask_across_classes(&mut self, owner: usize, node: Node) {
        let audit = |audit: &&Audit| {
            (audit.leaf, audit.owner, node.count) == (node.first, owner, 1)
                && audit.evidence == Evidence::Gradient
        };
        let Some(audit) = self.round.audits.iter().find(audit) else { return };
        for worker in audit.asked.clone() {
            if !self.are_alike(worker, owner) {
                self.replay(worker, node.first);
            }
        }
    }

    /// Whether a worker can judge the owner of an audit.
    pub(super) fn can_judge(&self, worker: usize, audit: &Audit) -> bool {
        self.are_alike(worker, audit.owner)
            || audit.evidence == Evidence::Loss
            || self.round.single.contains(&audit.leaf)
    }

    /// Takes an answer for the audit that it was asked for.
    pub(super) fn replayed(&mut self, worker: usize, of: Replayed) {
        let (workers, limits) = (&self.workers, self.settings.tolerance);
        let alike =
            |one: usize, other: usize| workers[one].numeric_class == workers[other].numeric_class;
        if let Some(apart) = &of.apart {
            let error = apart.error.value();
            self.round.apart = Some(self.round.apart.map_or(error, |worst| worst.max(error)));
        }
        let is_first = !self.round.spoilt.contains(&of.leaf);
        let Some(audit) = self.round.awaiting(worker, of.leaf) else { return };
        let alike = alike(worker, audit.owner);
        let crosses = audit.evidence == Evidence::Gradient && !alike;
        if crosses {
            match &of.apart {
                // Asked before the leaf went to another owner: the question that counts is open.
                None => return,
                Some(apart)
                    if audit.owned() != Some(apart.published) && audit.rereads < REREADS =>
                {
                    audit.rereads += 1;
                    return self.replay(worker, of.leaf);
                }
                // What lies there may be spoilt; one that reads something else after it was
                // published anew is at fault itself.
                Some(apart) if is_first && audit.owned() != Some(apart.published) => {
                    let owner = audit.owner;
                    self.round.spoilt.insert(of.leaf);
                    return self.compute_again(of.leaf, owner);
                }
                Some(_) => {}
            }
        }
        audit.asked.retain(|asked| *asked != worker);
        let own = match audit.evidence {
            Evidence::Gradient => of.digest,
            Evidence::Loss => of.loss.to_bits(),
        };
        let vote = match audit.owned().filter(|_| !alike) {
            None => own,
            Some(owned) => {
                let (error, limit, what) = match (&of.apart, audit.evidence) {
                    (Some(apart), Evidence::Gradient) if apart.published == owned => {
                        (apart.error.value(), limits.gradient, format!(" in `{}`", apart.tensor))
                    }
                    (_, Evidence::Gradient) => (f64::NAN, limits.gradient, String::new()),
                    (_, Evidence::Loss) => {
                        (loss_apart(of.loss, f64::from_bits(owned)), limits.loss, String::new())
                    }
                };
                audit.across.push((worker, format!("{error:.1e} apart{what}, limit {limit:.1e}")));
                // NaN is beyond every limit.
                if error <= limit { owned } else { own }
            }
        };
        audit.votes.push((worker, vote));
    }

    /// What votes come to where only those of one class can be equal.
    pub(super) fn verdict_by_class(&self, votes: &[(usize, u64)]) -> Verdict {
        let mut classes: BTreeMap<&str, Vec<(usize, u64)>> = BTreeMap::new();
        for vote in votes {
            classes.entry(&self.workers[vote.0].numeric_class).or_default().push(*vote);
        }
        let mut verdicts = classes.values().map(|votes| verdict(votes));
        verdicts.find(|of| *of != Verdict::Agreed).unwrap_or(Verdict::Agreed)
    }

    /// Two replicas whose norms of one sum are further apart than the order of adding explains.
    pub(super) fn norms_apart(&self, replicas: &[usize]) -> Option<String> {
        let norm = |worker: usize| self.round.combined[&worker].norm;
        let first = *replicas.first()?;
        let far = |other: &usize| {
            let (a, b) = (norm(first), norm(*other));
            let apart = (a - b).abs();
            (a.is_finite() || b.is_finite()) && (apart > NORM_APART * b.abs() || apart.is_nan())
        };
        let other = replicas.iter().copied().find(far)?;
        Some(format!(
            "workers {first} and {other} sum the same gradients to norms of {:.6e} and {:.6e}",
            norm(first),
            norm(other)
        ))
    }

    /// The replicas that apply the step: those of the class that applied the steps before, or,
    /// when none of it is left, of the class that most of the others are of.
    pub(super) fn writers(&mut self) -> Vec<usize> {
        let replicas = self.replicas();
        let of_class = |class: &str| -> Vec<usize> {
            let is = |worker: &usize| self.workers[*worker].numeric_class == class;
            replicas.iter().copied().filter(is).collect()
        };
        let writers = self.writing.as_deref().map(of_class).unwrap_or_default();
        if !writers.is_empty() || replicas.is_empty() {
            return writers;
        }
        let classes = replicas.iter().rev().map(|worker| &self.workers[*worker].numeric_class);
        // Of equally many the last is taken: that of the first worker, as the order is reversed.
        let class = classes.max_by_key(|class| of_class(class).len()).cloned().unwrap_or_default();
        let writers = of_class(&class);
        if let Some(before) = self.writing.replace(class.clone()) {
            let event = Event::new(self.step, EventKind::TookOver);
            let cause = Some(format!("no worker of {before} is left"));
            let action = Some(format!("{class} applies the steps from here on"));
            self.tell(Event { cause, action, ..event });
        }
        writers
    }

    /// At the beginning: settles which class applies the steps, and says so if it is not the one
    /// that wrote the snapshot.
    pub(super) fn begin_with_class(&mut self) {
        let writers = self.writers();
        let written_by = self.workers.iter().find_map(|of| of.written_by.clone());
        let Some(&writer) = writers.first() else { return };
        let class = self.workers[writer].numeric_class.clone();
        if let Some(before) = written_by.filter(|before| *before != class) {
            let event = Event::new(self.step, EventKind::TookOver);
            let cause = Some(format!("the snapshot was written by {before}"));
            let action = Some(format!("{class} applies the steps from here on"));
            self.tell(Event { cause, action, ..event });
        }
    }

    /// Tells writers that have not been told yet to apply the sum; whether all have answered.
    pub(super) fn let_apply(&mut self, writers: &[usize]) -> bool {
        for &worker in writers {
            if self.round.told.insert(worker) {
                self.send(worker, Command::Apply { step: self.step + 1 });
            }
        }
        writers.iter().all(|worker| self.round.applied.contains_key(worker))
    }

    /// The step is applied: hands the state on to those that did not.
    pub(super) fn hand_on(&mut self, donor: usize) {
        self.phase = Phase::Handing;
        (self.round.handed, self.round.handing) = (false, None);
        self.export(donor, Area::Step);
    }

    fn readers(&self) -> Vec<usize> {
        let has_it = |worker: &usize| self.round.applied.contains_key(worker);
        self.replicas().into_iter().filter(|worker| !has_it(worker)).collect()
    }

    /// The state after the step is in the exchange.
    pub(super) fn handed(&mut self, worker: usize, digest: u64) {
        let after = self.round.applied.get(&worker).map(|(_, after)| after[0]);
        if after != Some(digest) {
            let cause = "copied another state than it said it has".to_owned();
            return self.lose(worker, Loss::new(EventKind::Corrupt, cause));
        }
        (self.round.handed, self.round.handing) = (true, None);
        for reader in self.readers() {
            self.send(reader, Command::Import { step: self.step + 1 });
        }
    }

    /// A reader has taken the state after the step.
    pub(super) fn took_over(&mut self, worker: usize, digest: StateDigest) {
        if Some(digest) != self.round.after {
            let cause = "took another state than the one that was handed on".to_owned();
            return self.lose(worker, Loss::new(EventKind::Corrupt, cause));
        }
        self.round.took.insert(worker);
    }

    /// Closes the step once all have its state.
    pub(super) fn try_handed(&mut self) -> bool {
        let replicas = self.replicas();
        if replicas.is_empty() {
            self.start_over("no worker is left");
            return false;
        }
        if !self.round.handed && self.round.handing.is_none() {
            match self.round.applied.keys().next().copied() {
                Some(donor) => self.export(donor, Area::Step),
                // All that had applied it are gone, and nobody has taken anything: another class
                // applies it once more.
                None => {
                    (self.round.after, self.phase) = (None, Phase::Applying);
                    return true;
                }
            }
        }
        let waits = |worker: &usize| !self.round.took.contains(worker);
        if !self.round.handed || self.readers().iter().any(waits) {
            return false;
        }
        self.close_with_state(&replicas);
        true
    }

    /// Micro-batches by the class that computed them.
    pub(super) fn leaves_by_class(&self) -> BTreeMap<String, u32> {
        let mut classes = BTreeMap::new();
        for subtree in self.round.done.values() {
            let class = self.workers[subtree.worker].numeric_class.clone();
            *classes.entry(class).or_default() += subtree.node.count;
        }
        classes
    }
}

/// The relative difference of two losses.
pub(super) fn loss_apart(one: f64, other: f64) -> f64 {
    (one - other).abs() / other.abs().max(1e-3)
}
