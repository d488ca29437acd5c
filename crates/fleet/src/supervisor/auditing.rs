//! Which micro-batches of a step are computed again, by whom, and what that costs.
//!
//! A step waits for its slowest worker, so one more micro-batch for one worker costs as much as
//! one more for each. Audits are therefore drawn by steps: in most there are none, in the others
//! every worker computes the same number of micro-batches of another one again. Why, is in
//! `docs/decisions/2026-11-25-audits-are-drawn-by-steps.md`. What the results are worth is decided
//! in `judging.rs`.

use crate::policy::AuditPlan;

use super::Supervisor;
use super::round::Audit;

/// Work of another is worth so much of a micro-batch to avoid a worker that is done later. Times
/// for a micro-batch scatter by less, and where they are equal everyone should get the same.
const LATER: f64 = 0.5;

/// The members of a step with their times.
pub(super) struct Crew {
    pub members: Vec<usize>,
    /// Seconds for a micro-batch.
    pub seconds: Vec<f64>,
    /// Seconds of work handed out so far.
    pub busy: Vec<f64>,
}

impl Crew {
    /// Notes micro-batches for the member at a place.
    pub fn give(&mut self, place: usize, leaves: u32) {
        self.busy[place] += f64::from(leaves) * self.seconds[place];
    }

    /// The first of `places` that is hardly done later than the one that is done soonest.
    fn soonest(&self, places: &[usize]) -> Option<usize> {
        let done = |place: usize| self.busy[place] + self.seconds[place];
        let least = places.iter().map(|&place| done(place)).reduce(f64::min)?;
        let early = |place: &usize| done(*place) <= least + LATER * self.seconds[*place];
        places.iter().copied().find(early)
    }
}

impl Supervisor {
    /// What is audited in the step that begins.
    pub(super) fn plan_audits(&self, members: usize) -> AuditPlan {
        let settings = &self.settings;
        let each = settings.leaves.div_ceil(members.max(1) as u32);
        AuditPlan::draw(settings.audit, each, settings.seed, self.step + 1)
    }

    /// Notes an audit of a leaf if it is drawn and there is someone to do it, who is returned.
    pub(super) fn audit(&mut self, leaf: u32, owner: usize, crew: &mut Crew) -> Option<usize> {
        let drawn = self.workers[owner].on_probation || self.round.plan.takes(leaf);
        if !drawn {
            return None;
        }
        let auditor = self.auditor(leaf, owner, crew)?;
        self.round.audits.retain(|audit| audit.leaf != leaf);
        self.round.audits.push(Audit::new(leaf, owner, auditor));
        Some(auditor)
    }

    /// Who else computes a leaf: whoever is done in good time. Where there are several classes,
    /// one's own and the others in turn, as one finds every changed bit and the other what a
    /// whole class does wrong.
    fn auditor(&self, leaf: u32, owner: usize, crew: &mut Crew) -> Option<usize> {
        let count = crew.members.len();
        let at = crew.members.iter().position(|worker| *worker == owner)?;
        // Another pair with every step, so that each is checked by all others in time.
        let shift = (self.step as usize) % count.saturating_sub(1).max(1);
        let others = (0..count - 1).map(|i| (at + 1 + (shift + i) % (count - 1)) % count);
        let (own, other): (Vec<usize>, Vec<usize>) =
            others.partition(|place| self.are_alike(crew.members[*place], owner));
        let turn = (self.step + u64::from(leaf)).is_multiple_of(2);
        let among = if other.is_empty() || (turn && !own.is_empty()) { own } else { other };
        let place = crew.soonest(&among)?;
        crew.give(place, 1);
        Some(crew.members[place])
    }

    /// Seconds of the present step that went into computing again what others had computed: what
    /// the last worker took, against what it would have been without.
    pub(super) fn audited_seconds(&self, members: &[usize]) -> f64 {
        let took = |again: bool| {
            let of_worker = |worker: &usize| {
                let done = self.round.done.values().filter(|subtree| subtree.worker == *worker);
                let own: u32 = done.map(|subtree| subtree.node.count).sum();
                let replays = self.round.replays.get(worker).copied().unwrap_or(0);
                let leaves = own + if again { replays } else { 0 };
                f64::from(leaves) * self.workers[*worker].seconds.unwrap_or(0.0)
            };
            members.iter().map(of_worker).fold(0.0, f64::max)
        };
        let (with, without) = (took(true), took(false));
        if with == without {
            return 0.0;
        }
        // Times for a micro-batch are those of lately: no more is charged than the step had.
        let share = (with - without) / with;
        (with - without).min(share * self.round.computing.as_secs_f64())
    }
}
