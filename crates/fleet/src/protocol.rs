//! What a supervisor and its workers say to each other: one JSON object a line, with a version.
//!
//! Gradients and state do not travel here but through [`crate::exchange`]. Every command but
//! `Stop` is answered, `Compute` once for each node. Read next: `supervisor.rs`, `worker.rs`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The version of these messages; both sides must have the same.
pub const VERSION: u32 = 4;

/// An aligned subtree of the gradient tree: the leaves `first..first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Node {
    /// The first micro-batch.
    pub first: u32,
    /// How many; a power of two that divides `first`.
    pub count: u32,
}

/// A number that arrives with its bits, also when it is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bits(u64);

impl From<f64> for Bits {
    fn from(value: f64) -> Bits {
        Bits(value.to_bits())
    }
}

impl Bits {
    /// The number.
    pub fn value(self) -> f64 {
        f64::from_bits(self.0)
    }

    /// Its bits.
    pub fn bits(self) -> u64 {
        self.0
    }
}

/// What an update was done with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// The learning rate.
    pub lr: f64,
    /// By what share of the mean load the busiest expert was above it, where experts are balanced.
    pub imbalance: Option<f64>,
}

/// The digests of a replica's state: what is exported, and the weights it computes with.
pub type StateDigest = [u64; 2];

/// Where a worker gets its state from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The run's first weights.
    Fresh,
    /// The newest good snapshot, or the first weights if there is none.
    Snapshot,
    /// None yet: an `Import` will follow.
    Nothing,
}

/// Which part of the exchange a state is copied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Area {
    /// Read by workers that join.
    Join,
    /// Read, after a step, by replicas of classes that did not apply it.
    Step,
    /// Read by whoever writes the snapshot.
    Snapshot,
}

/// Whether a node's gradient is needed by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Publish {
    /// It is copied to the exchange.
    Shared,
    /// It stays on the device: the worker is alone.
    Local,
}

/// What a leaf that is computed again is held against by the worker itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// Nothing: its digest says enough among workers of one class.
    Nothing,
    /// The leaf's own gradient as it was published.
    Published,
}

/// How far a gradient is from the published one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apart {
    /// The digest of what was published, as it was read.
    pub published: u64,
    /// The largest relative error of a tensor: the norm of the difference over the norm.
    pub error: Bits,
    /// The tensor that has it.
    pub tensor: String,
}

/// From the supervisor to a worker; done in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Command {
    /// Load the model.
    Load {
        /// And its state.
        from: Source,
    },
    /// Take the state of a peer from the exchange.
    Import {
        /// The steps that state has seen.
        step: u64,
    },
    /// Compute the gradients of subtrees.
    Compute {
        /// The step.
        step: u64,
        /// The subtrees, in order.
        nodes: Vec<Node>,
        /// Leaves whose own digest is wanted for an audit.
        digests: Vec<u32>,
        /// Where the result goes.
        publish: Publish,
    },
    /// Compute one leaf again, to compare and not to use.
    Replay {
        /// The step.
        step: u64,
        /// The leaf.
        leaf: u32,
        /// With what the worker compares it.
        against: Against,
    },
    /// Say what state it holds, as its word is in doubt.
    Check {
        /// The step.
        step: u64,
    },
    /// Sum the published subtrees; none are named if the worker is alone and has the sum.
    Combine {
        /// The step.
        step: u64,
        /// The subtrees, in order; all workers get the same.
        nodes: Arc<[Node]>,
    },
    /// Apply the sum.
    Apply {
        /// The step.
        step: u64,
    },
    /// Copy the state to the exchange.
    Export {
        /// The steps that state has seen.
        step: u64,
        /// Where to.
        area: Area,
    },
    /// The mean loss of the validation data.
    Score {
        /// The steps the state has seen.
        step: u64,
    },
    /// End.
    Stop,
}

/// What kind of trouble a worker is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The device is gone.
    Lost,
    /// The device itself said that work did not finish.
    Hang,
    /// Memory returned an error that could not be corrected.
    MemoryFault,
    /// A check found a wrong result or a changed tensor.
    Corrupt,
    /// An allocation did not fit.
    OutOfMemory,
    /// A link failed.
    LinkDown,
    /// The run itself cannot go on: wrong settings, missing files, an operation nobody can do.
    Run,
}

/// From a worker to the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Report {
    /// The first line.
    Hello {
        /// Of these messages.
        version: u32,
        /// The worker's process.
        process: u32,
    },
    /// Loaded.
    Ready {
        /// The steps the state has seen.
        step: u64,
        /// Its digest; none if the state is to be imported.
        digest: Option<StateDigest>,
        /// What is known of the device.
        device: DeviceFacts,
    },
    /// A peer's state was taken.
    Imported {
        /// The steps it has seen.
        step: u64,
        /// Its digest as it lies on the device.
        digest: StateDigest,
    },
    /// A subtree's gradient is there.
    Computed {
        /// The step.
        step: u64,
        /// The subtree.
        node: Node,
        /// Of the gradient.
        digest: u64,
        /// Of the leaves that were asked for.
        leaves: Vec<(u32, u64)>,
        /// Each leaf's sum of losses.
        losses: Vec<Bits>,
        /// The time it took.
        seconds: f64,
    },
    /// A leaf was computed again.
    Replayed {
        /// The step.
        step: u64,
        /// The leaf.
        leaf: u32,
        /// Of its gradient.
        digest: u64,
        /// Its sum of losses.
        loss: Bits,
        /// How far it is from the published one, if that was asked.
        apart: Option<Apart>,
    },
    /// The state it holds.
    Checked {
        /// The step.
        step: u64,
        /// The state's digest.
        digest: StateDigest,
    },
    /// The sum is there.
    Combined {
        /// The step.
        step: u64,
        /// Of the state before the step is applied.
        before: StateDigest,
        /// Of every subtree as it was read.
        nodes: Arc<[u64]>,
        /// Of the sum.
        gradient: u64,
        /// The sum's norm.
        norm: Bits,
    },
    /// The step was applied.
    Applied {
        /// The step.
        step: u64,
        /// With what.
        rates: Rates,
        /// Of the state after it.
        after: StateDigest,
    },
    /// The state is in the exchange.
    Exported {
        /// The steps it has seen.
        step: u64,
        /// Where.
        area: Area,
        /// Of what was copied.
        digest: u64,
    },
    /// The validation's loss.
    Scored {
        /// The steps the state has seen.
        step: u64,
        /// The mean loss.
        loss: Bits,
    },
    /// Sent every now and then, whatever the worker does.
    Beat {
        /// Operations finished so far.
        operations: u64,
        /// The longest time between two of them, in milliseconds.
        longest_ms: u64,
    },
    /// A fault was injected on purpose, just now.
    Injected {
        /// Its kind, as in the plan.
        kind: String,
        /// Its place in the plan, so that it strikes once.
        fault: usize,
    },
    /// A command could not be done.
    Failed {
        /// Why.
        trouble: Trouble,
        /// In words.
        text: String,
    },
}

/// What a worker tells of its device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// The class within which equal inputs give equal bits.
    pub numeric_class: String,
    /// Bytes in use on the device.
    pub memory_bytes: u64,
    /// Snapshots that were damaged and passed over, with the reason.
    pub passed_over: Vec<(u64, String)>,
    /// The class that wrote the snapshot it loaded.
    pub written_by: Option<String>,
    /// The classes that took part in the run before that snapshot.
    pub classes: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_is_no_number_arrives_with_its_bits() {
        let odd = f64::from_bits(0x7ff8_dead_0000_beef);
        let report = Report::Scored { step: 3, loss: odd.into() };
        let line = serde_json::to_string(&report).unwrap();
        let Report::Scored { loss, .. } = serde_json::from_str(&line).unwrap() else {
            panic!("another message came back")
        };
        assert_eq!(loss.bits(), odd.to_bits());
    }

    #[test]
    fn a_command_is_one_line_of_json() {
        let nodes = [Node { first: 4, count: 4 }].into();
        let command = Command::Combine { step: 9, nodes };
        let line = serde_json::to_string(&command).unwrap();
        assert!(line.starts_with(r#"{"do":"combine","step":9"#) && !line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<Command>(&line).unwrap(), command);
    }
}
