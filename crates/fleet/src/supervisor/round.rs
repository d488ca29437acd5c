//! What one step holds while it is computed: subtrees, audits, what replicas say of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::policy::{AuditPlan, Verdict, verdict};
use crate::protocol::{Apart, Node, Publish, Rates, StateDigest};

/// A computed subtree.
#[derive(Clone, Debug)]
pub(super) struct Subtree {
    pub node: Node,
    pub worker: usize,
    pub digest: u64,
    pub losses: Vec<f64>,
}

/// What a replica says of the step's sum.
#[derive(Clone, Debug)]
pub(super) struct Combined {
    pub before: StateDigest,
    pub nodes: Arc<[u64]>,
    pub gradient: u64,
    pub norm: f64,
}

/// A leaf that was computed again.
#[derive(Clone, Debug)]
pub(super) struct Replayed {
    pub leaf: u32,
    pub digest: u64,
    pub loss: f64,
    pub apart: Option<Apart>,
}

/// What is compared in an audit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Evidence {
    /// The digest of the leaf's gradient.
    Gradient,
    /// Its loss, where that is all the first one told.
    Loss,
}

/// A leaf that more than one computes.
#[derive(Clone, Debug)]
pub(super) struct Audit {
    pub leaf: u32,
    pub evidence: Evidence,
    pub owner: usize,
    pub votes: Vec<(usize, u64)>,
    /// Those whose answer is awaited, the owner aside.
    pub asked: Vec<usize>,
    /// What workers of other classes said of the owner's result: how far theirs is, in words.
    pub across: Vec<(usize, String)>,
    /// Answers to a question about something else than what is published now.
    pub rereads: u32,
}

impl Audit {
    /// An audit of a leaf's gradient, which another worker is asked for.
    pub fn new(leaf: u32, owner: usize, auditor: usize) -> Audit {
        let (votes, across) = (Vec::new(), Vec::new());
        let evidence = Evidence::Gradient;
        Audit { leaf, evidence, owner, votes, asked: vec![auditor], across, rereads: 0 }
    }

    /// What the votes come to, once all are there.
    pub fn verdict(&self) -> Option<Verdict> {
        let owned = self.owned()?;
        if !self.asked.is_empty() || self.votes.len() < 2 {
            return None;
        }
        if self.across.is_empty() {
            return Some(verdict(&self.votes));
        }
        // Honest workers of two classes say two values: what counts is for or against the owner's.
        let sides = self.votes.iter().map(|(worker, value)| (*worker, u64::from(*value != owned)));
        Some(verdict(&sides.collect::<Vec<_>>()))
    }

    /// What the owner said first.
    pub fn owned(&self) -> Option<u64> {
        let vote = self.votes.iter().find(|(worker, _)| *worker == self.owner);
        vote.map(|(_, value)| *value)
    }
}

pub(super) struct Round {
    pub begun: Duration,
    /// How long the leaves took.
    pub computing: Duration,
    pub publish: Publish,
    pub done: BTreeMap<u32, Subtree>,
    /// Who computes what, and since when.
    pub pending: Vec<(usize, Node, Duration)>,
    pub audits: Vec<Audit>,
    /// Leaves that are subtrees of their own, so that other classes can be held against them.
    pub single: BTreeSet<u32>,
    /// What was drawn to be audited.
    pub plan: AuditPlan,
    /// Leaves that each worker computes only to check others.
    pub replays: BTreeMap<usize, u32>,
    /// Leaves that did not lie in the exchange as they were published.
    pub spoilt: BTreeSet<u32>,
    /// Leaves whose losses were checked for a spike.
    pub spikes: Vec<u32>,
    pub combined: BTreeMap<usize, Combined>,
    pub recombined: bool,
    pub applied: BTreeMap<usize, (Rates, StateDigest)>,
    /// Those that were told to apply the sum.
    pub told: BTreeSet<usize>,
    /// The state after the step, as all that applied it agree.
    pub after: Option<StateDigest>,
    /// Who copies the state after the step for the other classes, until it is there.
    pub handing: Option<usize>,
    /// Whether it is there.
    pub handed: bool,
    /// Those that have taken it.
    pub took: BTreeSet<usize>,
    /// Those whose losses were not finite the first time.
    pub suspects: Option<Vec<usize>>,
    /// Whether the gradient's norm was not finite the first time.
    pub norm_doubted: bool,
    /// Whether the only worker has found a wrong result of its own in it.
    pub repeated: bool,
    pub valid_loss: Option<f64>,
    /// The furthest that gradients of two classes were apart.
    pub apart: Option<f64>,
    /// Whether new workers of a move are tried in it, or the run goes to them at its beginning.
    pub moving: bool,
    /// Whether the supervisor itself was stopped meanwhile.
    pub stalled: bool,
    /// Whether its leaves were given to anyone yet.
    pub handed_out: bool,
}

impl Round {
    pub fn new(begun: Duration) -> Round {
        Round {
            begun,
            computing: Duration::ZERO,
            publish: Publish::Shared,
            done: BTreeMap::new(),
            pending: Vec::new(),
            audits: Vec::new(),
            single: BTreeSet::new(),
            plan: AuditPlan::default(),
            replays: BTreeMap::new(),
            spoilt: BTreeSet::new(),
            spikes: Vec::new(),
            combined: BTreeMap::new(),
            recombined: false,
            applied: BTreeMap::new(),
            told: BTreeSet::new(),
            after: None,
            handing: None,
            handed: false,
            took: BTreeSet::new(),
            suspects: None,
            norm_doubted: false,
            repeated: false,
            valid_loss: None,
            apart: None,
            moving: false,
            stalled: false,
            handed_out: false,
        }
    }

    /// Takes a subtree if it was awaited from this worker.
    pub fn computed(&mut self, subtree: Subtree, leaves: &[(u32, u64)]) -> bool {
        let awaited = |(worker, node, _): &(usize, Node, Duration)| {
            (*worker, *node) == (subtree.worker, subtree.node)
        };
        let Some(place) = self.pending.iter().position(awaited) else { return false };
        self.pending.swap_remove(place);
        for &(leaf, digest) in leaves {
            let wants = |audit: &&mut Audit| {
                audit.leaf == leaf
                    && audit.owner == subtree.worker
                    && audit.evidence == Evidence::Gradient
            };
            if let Some(audit) = self.audits.iter_mut().find(wants) {
                audit.votes.push((subtree.worker, digest));
            }
        }
        self.done.insert(subtree.node.first, subtree);
        true
    }

    /// The audit in which an answer about a leaf is awaited from a worker.
    pub fn awaiting(&mut self, worker: usize, leaf: u32) -> Option<&mut Audit> {
        let awaits = |audit: &&mut Audit| audit.leaf == leaf && audit.asked.contains(&worker);
        self.audits.iter_mut().find(awaits)
    }

    /// The digest of a leaf that was published by itself.
    pub fn published(&self, leaf: u32) -> Option<&Subtree> {
        self.done.get(&leaf).filter(|subtree| subtree.node.count == 1)
    }

    /// Whether every leaf is there.
    pub fn is_complete(&self, leaves: u32) -> bool {
        self.pending.is_empty()
            && self.done.values().map(|subtree| subtree.node.count).sum::<u32>() == leaves
    }

    /// The subtrees in order.
    pub fn nodes(&self) -> Vec<Node> {
        self.done.values().map(|subtree| subtree.node).collect()
    }

    /// The losses by leaf.
    pub fn losses(&self) -> Vec<f64> {
        let lists: Vec<&[f64]> = self.done.values().map(|subtree| &subtree.losses[..]).collect();
        lists.concat()
    }

    /// Takes away what a worker has not done yet; returns the leaves.
    pub fn take_pending(&mut self, worker: usize) -> Vec<u32> {
        let mut leaves = Vec::new();
        self.pending.retain(|(of, node, _)| {
            if *of == worker {
                leaves.extend(node.first..node.first + node.count);
            }
            *of != worker
        });
        leaves
    }

    /// Takes away subtrees that must not be used; returns the leaves.
    pub fn discard(&mut self, bad: impl Fn(&Subtree) -> bool) -> Vec<u32> {
        let mut leaves = Vec::new();
        self.done.retain(|_, subtree| {
            let goes = bad(subtree);
            if goes {
                leaves.extend(subtree.node.first..subtree.node.first + subtree.node.count);
            }
            !goes
        });
        leaves
    }
}
