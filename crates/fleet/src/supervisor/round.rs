//! What one step holds while it is computed: subtrees, audits, what replicas say of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::policy::{Verdict, verdict};
use crate::protocol::{Bits, Node, Publish, Rates, StateDigest};

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
}

impl Audit {
    /// What the votes come to, once all are there.
    pub fn verdict(&self) -> Option<Verdict> {
        let owner_voted = self.votes.iter().any(|(worker, _)| *worker == self.owner);
        (self.asked.is_empty() && owner_voted && self.votes.len() > 1).then(|| verdict(&self.votes))
    }
}

pub(super) struct Round {
    pub begun: Duration,
    pub publish: Publish,
    pub done: BTreeMap<u32, Subtree>,
    /// Who computes what, and since when.
    pub pending: Vec<(usize, Node, Duration)>,
    pub audits: Vec<Audit>,
    /// Leaves computed only to check others.
    pub replays: u32,
    /// Leaves whose losses were checked for a spike.
    pub spikes: Vec<u32>,
    pub combined: BTreeMap<usize, Combined>,
    pub recombined: bool,
    pub applied: BTreeMap<usize, (Rates, StateDigest)>,
    /// Those whose losses were not finite the first time.
    pub suspects: Option<Vec<usize>>,
    pub valid_loss: Option<f64>,
}

impl Round {
    pub fn new(begun: Duration) -> Round {
        Round {
            begun,
            publish: Publish::Shared,
            done: BTreeMap::new(),
            pending: Vec::new(),
            audits: Vec::new(),
            replays: 0,
            spikes: Vec::new(),
            combined: BTreeMap::new(),
            recombined: false,
            applied: BTreeMap::new(),
            suspects: None,
            valid_loss: None,
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

    pub fn replayed(&mut self, worker: usize, leaf: u32, digest: u64, loss: Bits) {
        for audit in self.audits.iter_mut().filter(|audit| audit.leaf == leaf) {
            if let Some(place) = audit.asked.iter().position(|asked| *asked == worker) {
                audit.asked.swap_remove(place);
                let value = match audit.evidence {
                    Evidence::Gradient => digest,
                    Evidence::Loss => loss.bits(),
                };
                audit.votes.push((worker, value));
                return;
            }
        }
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
