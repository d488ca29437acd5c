//! What a step's results are worth: audits, sums and state are compared before anything is
//! applied, and who is alone with a value is taken out.

use std::sync::Arc;

use crate::policy::Verdict;
use crate::protocol::{Area, Command, Node, Publish};
use crate::run_dir::{Event, EventKind};

use super::losing::{CHANGED, Loss};
use super::round::{Audit, Evidence};
use super::workers::Standing;
use super::{Ending, NonFinite, Phase, SKIPS, Supervisor};

/// A leaf's loss beyond this many times the largest of the step before is computed once more.
const SPIKE: f64 = 2.0;

impl Supervisor {
    /// All leaves are there and audited: lets every replica sum them.
    pub(super) fn try_combine(&mut self) -> bool {
        if self.workers.iter().all(|of| of.standing != Standing::Member) {
            self.start_over("no worker is left");
            return false;
        }
        if !self.round.handed_out {
            return self.try_hand_out();
        }
        self.ask_trial();
        if !self.round.is_complete(self.settings.leaves) {
            return false;
        }
        if let Some(moved) = self.judge_audits() {
            return moved;
        }
        if let Some(moved) = self.judge_losses() {
            return moved;
        }
        if self.join_donor.is_some() {
            return false;
        }
        if let Some(moved) = self.judge_trial() {
            return moved;
        }
        self.ask_for_sums();
        true
    }

    fn ask_for_sums(&mut self) {
        self.phase = Phase::Combining;
        self.round.computing = self.now.saturating_sub(self.round.begun);
        self.round.combined.clear();
        let nodes: Arc<[Node]> = match self.round.publish {
            Publish::Shared => self.round.nodes().into(),
            Publish::Local => Arc::from([]),
        };
        for worker in self.replicas() {
            let nodes = Arc::clone(&nodes);
            self.send(worker, Command::Combine { step: self.step + 1, nodes });
        }
    }

    /// `None` once every audit has agreed.
    fn judge_audits(&mut self) -> Option<bool> {
        let open = self.round.audits.iter().any(|audit| audit.verdict().is_none());
        let members = self.those(Standing::Member);
        for index in 0..self.round.audits.len() {
            let audit = self.round.audits[index].clone();
            match audit.verdict() {
                None | Some(Verdict::Agreed) => {}
                Some(Verdict::Outvoted(liars)) => {
                    self.round.audits.swap_remove(index);
                    let present: Vec<usize> =
                        liars.iter().copied().filter(|liar| members.contains(liar)).collect();
                    for liar in present {
                        let cause = evidence(&audit, liar);
                        self.lose(liar, Loss::new(EventKind::Corrupt, cause).discarding());
                    }
                    return Some(true);
                }
                Some(Verdict::Tied) => return Some(self.ask_a_third(index, &members)),
            }
        }
        open.then_some(false)
    }

    /// Asks those who have not voted, or all who have once more, and all for their state, as one
    /// who computes with another would say the same again; `false` as answers are awaited.
    fn ask_a_third(&mut self, index: usize, members: &[usize]) -> bool {
        let audit = &self.round.audits[index];
        let leaf = audit.leaf;
        let votes = |worker: &usize| audit.votes.iter().filter(|(of, _)| of == worker).count();
        let judges: Vec<usize> =
            members.iter().copied().filter(|worker| self.can_judge(*worker, audit)).collect();
        let fewest = judges.iter().map(votes).min().unwrap_or(usize::MAX);
        let mut asked: Vec<usize> = self.those(Standing::Joining);
        asked.retain(|worker| votes(worker) == 0 && self.can_judge(*worker, audit));
        asked.retain(|worker| !self.workers[*worker].trial);
        if fewest < 2 {
            asked = judges.into_iter().filter(|worker| votes(worker) == fewest).collect();
            for &worker in members {
                self.send(worker, Command::Check { step: self.step + 1 });
            }
        } else if asked.is_empty() {
            return self.await_a_third(index);
        }
        self.round.audits[index].asked.clone_from(&asked);
        for worker in asked {
            self.replay(worker, leaf);
        }
        false
    }

    /// All members stand by what they said: one that is about to join can judge.
    fn await_a_third(&mut self, index: usize) -> bool {
        if !self.those(Standing::Ready).is_empty() {
            if let (None, Some(donor)) = (self.join_donor, self.fastest()) {
                self.export(donor, Area::Join);
            }
            return false;
        }
        if !self.those(Standing::Loading).is_empty() {
            return false;
        }
        let audit = &self.round.audits[index];
        let text = format!(
            "step {}: {}, and no third worker can judge; qualify the devices and add one",
            self.step + 1,
            evidence(audit, audit.owner)
        );
        self.ending = Some(Ending::Failed(text));
        self.finish();
        true
    }

    /// `None` if every loss is a number and none has leapt.
    fn judge_losses(&mut self) -> Option<bool> {
        let losses = self.round.losses();
        if let Some(bad) = losses.iter().copied().find(|loss| !loss.is_finite()) {
            let owners: Vec<usize> = (self.round.done.values())
                .filter(|subtree| subtree.losses.iter().any(|loss| !loss.is_finite()))
                .map(|subtree| subtree.worker)
                .collect();
            return Some(self.once_more("the loss", bad, Some(owners)));
        }
        if let Some(suspects) = self.round.suspects.take() {
            let members = self.those(Standing::Member);
            let cause = "gave a loss or norm that is no number; another did not".to_owned();
            if members.len() > 1 {
                for worker in suspects.into_iter().filter(|w| members.contains(w)) {
                    self.lose(worker, Loss::new(EventKind::Corrupt, cause.clone()).discarding());
                }
                return Some(true);
            }
            let event = self.event(members[0], EventKind::Corrupt);
            self.ledger.faults += 1;
            self.tell(Event { cause: Some(cause), action: Some("computed again".into()), ..event });
        }
        let limit = SPIKE * self.ledger.largest_loss()?;
        if losses.iter().all(|loss| *loss <= limit) {
            return None;
        }
        let mut new = false;
        let owners: Vec<(u32, usize, f64)> = (self.round.done.values())
            .flat_map(|s| {
                (s.node.first..).zip(&s.losses).map(|(leaf, loss)| (leaf, s.worker, *loss))
            })
            .filter(|(leaf, _, loss)| *loss > limit && !self.round.spikes.contains(leaf))
            .collect();
        for (leaf, owner, loss) in owners {
            let members = self.those(Standing::Member);
            let other = members.iter().copied().find(|worker| *worker != owner).unwrap_or(owner);
            self.round.spikes.push(leaf);
            self.round.audits.retain(|audit| audit.leaf != leaf);
            let votes = vec![(owner, loss.to_bits())];
            let audit = Audit::new(leaf, owner, other);
            self.round.audits.push(Audit { evidence: Evidence::Loss, votes, ..audit });
            self.replay(other, leaf);
            new = true;
        }
        new.then_some(false)
    }

    /// A value is no number: all is computed once more, elsewhere; the second time it is believed.
    fn once_more(&mut self, what: &'static str, value: f64, suspects: Option<Vec<usize>>) -> bool {
        // A norm has no owner; only a second one that is no number says more.
        let was_doubted = match suspects {
            None => std::mem::replace(&mut self.round.norm_doubted, true),
            Some(_) => self.round.suspects.is_some(),
        };
        if was_doubted {
            if self.settings.non_finite == NonFinite::Skip && self.skips < SKIPS {
                self.skip(format!("{what} is {value}, on two workers alike"));
                return true;
            }
            self.ending = Some(Ending::NonFinite { step: self.step + 1, what, value });
            self.finish();
            return true;
        }
        self.round.suspects = suspects;
        let leaves = self.round.discard(|_| true);
        self.round.combined.clear();
        self.phase = Phase::Computing;
        self.hand_out(&leaves, 1);
        true
    }

    /// Every replica has its sum: compares them, and the state they are applied to.
    pub(super) fn try_apply(&mut self) -> bool {
        if self.awaits_a_replica(|round, worker| round.combined.contains_key(&worker)) {
            return false;
        }
        let replicas = self.replicas();
        if replicas.is_empty() {
            self.start_over("no worker is left");
            return false;
        }
        for &worker in &replicas {
            if self.round.combined[&worker].before != self.agreed {
                let loss = Loss::new(EventKind::Corrupt, CHANGED.to_owned());
                self.lose(worker, loss.discarding());
                return true;
            }
        }
        if let Some(moved) = self.judge_slots(&replicas) {
            return moved;
        }
        let votes: Vec<(usize, u64)> = replicas
            .iter()
            .map(|worker| (*worker, &self.round.combined[worker]))
            .map(|(worker, of)| (worker, of.gradient ^ of.norm.to_bits()))
            .collect();
        match self.verdict_by_class(&votes) {
            Verdict::Agreed => {}
            Verdict::Outvoted(liars) => {
                for worker in liars {
                    let cause = "summed the same gradients to another sum".to_owned();
                    self.lose(worker, Loss::new(EventKind::Corrupt, cause).discarding());
                }
                return true;
            }
            Verdict::Tied if self.round.recombined => {
                self.start_over("two replicas sum the same gradients to different sums");
                return false;
            }
            Verdict::Tied => {
                self.round.recombined = true;
                self.ask_for_sums();
                return true;
            }
        }
        if let Some(text) = self.norms_apart(&replicas) {
            if self.round.recombined {
                self.start_over(&text);
                return false;
            }
            self.round.recombined = true;
            self.ask_for_sums();
            return true;
        }
        let writers = self.writers();
        let norm = self.round.combined[&writers[0]].norm;
        if !norm.is_finite() {
            return self.once_more("the gradient's norm", norm, None);
        }
        self.tell_of_norm();
        self.phase = Phase::Applying;
        for worker in replicas {
            if self.workers[worker].standing == Standing::Joining {
                self.workers[worker].standing = Standing::Member;
            }
        }
        self.round.told.clear();
        self.let_apply(&writers);
        true
    }

    /// A norm was no number at first, and is one now.
    fn tell_of_norm(&mut self) {
        if !std::mem::take(&mut self.round.norm_doubted) {
            return;
        }
        self.ledger.faults += 1;
        let cause = Some("the gradient's norm was no number at first".to_owned());
        let event = Event::new(self.step + 1, EventKind::Corrupt);
        self.tell(Event { cause, action: Some("computed again".to_owned()), ..event });
    }

    /// A subtree that nobody reads as it was published is computed again.
    fn judge_slots(&mut self, replicas: &[usize]) -> Option<bool> {
        if self.round.publish == Publish::Local {
            return None;
        }
        let published: Vec<(u32, usize, u64)> =
            self.round.done.values().map(|s| (s.node.first, s.worker, s.digest)).collect();
        let spoilt = |index: usize, digest: u64| {
            let reads = |worker: &usize| self.round.combined[worker].nodes.get(index).copied();
            replicas.iter().all(|worker| reads(worker) != Some(digest))
        };
        let place = (0..published.len()).find(|&index| spoilt(index, published[index].2))?;
        self.compute_again(published[place].0, published[place].1);
        Some(true)
    }

    /// A subtree is not what its worker published: it is computed and audited anew.
    pub(super) fn compute_again(&mut self, first: u32, owner: usize) {
        let leaves = self.round.discard(|subtree| subtree.node.first == first);
        self.round.audits.retain(|audit| !leaves.contains(&audit.leaf));
        let event = self.event(owner, EventKind::Corrupt);
        self.ledger.faults += 1;
        let cause = format!("the gradient from micro-batch {first} on changed on its way");
        let lost_micro_batches = Some(leaves.len() as u64);
        let action = Some("computed again".to_owned());
        self.tell(Event { cause: Some(cause), action, lost_micro_batches, ..event });
        self.round.combined.clear();
        self.phase = Phase::Computing;
        self.hand_out(&leaves, 0);
    }
}

fn evidence(audit: &Audit, liar: usize) -> String {
    let what = match audit.evidence {
        Evidence::Gradient => "gradient",
        Evidence::Loss => "loss",
    };
    let of = |mine: bool| {
        let votes = audit.votes.iter().filter(|(worker, _)| (*worker == liar) == mine);
        votes.map(|(worker, value)| format!("worker {worker}: {value:016x}")).collect::<Vec<_>>()
    };
    let (mine, others) = (of(true).join(", "), of(false).join(", "));
    let across = audit.across.iter().map(|(worker, said)| format!("; worker {worker}: {said}"));
    let across: String = across.collect();
    format!("micro-batch {}: another {what} ({mine}) than others ({others}){across}", audit.leaf)
}
