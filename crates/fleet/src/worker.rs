//! The worker's side: takes commands one by one and has a replica do them.
//!
//! Knows neither models nor devices: they are behind [`Replica`]. Read next: `supervisor.rs`, the
//! other side.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::protocol::{Against, Apart, Area, Rates, Source, StateDigest, Trouble, VERSION};
use crate::protocol::{Bits, Command, DeviceFacts, Node, Publish, Report};

/// Why a replica could not do something.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The kind.
    pub trouble: Trouble,
    /// In words.
    pub text: String,
}

/// A subtree's result.
#[derive(Clone, Debug)]
pub struct Computed {
    /// Of its gradient.
    pub digest: u64,
    /// Of the leaves asked for.
    pub leaves: Vec<(u32, u64)>,
    /// Sums of losses, by leaf.
    pub losses: Vec<f64>,
    /// The time it took.
    pub seconds: f64,
}

/// A leaf that was computed again.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Of its gradient.
    pub digest: u64,
    /// Its sum of losses.
    pub loss: f64,
    /// How far it is from the published one, if that was asked.
    pub apart: Option<Apart>,
}

/// The sum of a step's gradients.
#[derive(Clone, Debug)]
pub struct Combined {
    /// Of the state it will be applied to.
    pub before: StateDigest,
    /// Of each subtree as read.
    pub nodes: Vec<u64>,
    /// Of the sum.
    pub gradient: u64,
    /// Its norm.
    pub norm: f64,
}

/// A copy of the run's state on a device. All of its methods answer the command of their name.
pub trait Replica {
    /// Loads the model, and its state from `from`: its step and digest.
    fn load(&mut self, from: Source) -> Result<(u64, Option<StateDigest>), Fault>;
    /// What is known of the device, once loaded.
    fn facts(&self) -> DeviceFacts;
    /// Takes a peer's state.
    fn import(&mut self, step: u64) -> Result<StateDigest, Fault>;
    /// Computes a subtree, and the digests of some of its leaves.
    fn compute(
        &mut self,
        step: u64,
        node: Node,
        digests: &[u32],
        publish: Publish,
    ) -> Result<Computed, Fault>;
    /// Computes one leaf again.
    fn replay(&mut self, step: u64, leaf: u32, against: Against) -> Result<Replayed, Fault>;
    /// The digest of its state.
    fn check(&mut self) -> Result<StateDigest, Fault>;
    /// Sums subtrees.
    fn combine(&mut self, step: u64, nodes: &[Node]) -> Result<Combined, Fault>;
    /// Applies the sum: with what, and the new state's digest.
    fn apply(&mut self, step: u64) -> Result<(Rates, StateDigest), Fault>;
    /// Copies the state out: its digest.
    fn export(&mut self, area: Area) -> Result<u64, Fault>;
    /// Scores the validation data.
    fn score(&mut self) -> Result<f64, Fault>;
}

/// The way back to the supervisor; whoever has a copy may speak.
#[derive(Clone)]
pub struct Reports {
    to: Arc<Mutex<Box<dyn Write + Send>>>,
}

impl Reports {
    /// Speaks into a pipe.
    pub fn new(to: Box<dyn Write + Send>) -> Reports {
        Reports { to: Arc::new(Mutex::new(to)) }
    }

    /// Says one thing.
    pub fn say(&self, report: &Report) -> io::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(&line)?;
        to.flush()
    }
}

/// How far a device has come, told by whoever launches its operations.
#[derive(Debug, Default)]
pub struct Progress {
    operations: AtomicU64,
    longest_ms: AtomicU64,
}

impl Progress {
    /// An operation is done, so long after the one before.
    pub fn done(&self, pause: Duration) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.longest_ms.fetch_max(pause.as_millis() as u64, Ordering::Relaxed);
    }

    /// What a beat says.
    pub fn beat(&self) -> Report {
        Report::Beat {
            operations: self.operations.load(Ordering::Relaxed),
            longest_ms: self.longest_ms.load(Ordering::Relaxed),
        }
    }
}

/// Does commands until `Stop`, the end of the pipe, or a failure, which is reported. One that found
/// a wrong result goes on if it is told to: what it holds may be sound, and who is alone computes
/// it again.
pub fn serve(
    replica: &mut dyn Replica,
    commands: impl Iterator<Item = io::Result<String>>,
    reports: &Reports,
    process: u32,
) -> io::Result<()> {
    reports.say(&Report::Hello { version: VERSION, process })?;
    for line in commands {
        let command: Command = serde_json::from_str(&line?)?;
        if command == Command::Stop {
            return Ok(());
        }
        if let Err(Fault { trouble, text }) = obey(replica, command, reports)? {
            reports.say(&Report::Failed { trouble, text })?;
            if trouble != Trouble::Corrupt {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn obey(
    replica: &mut dyn Replica,
    command: Command,
    reports: &Reports,
) -> io::Result<Result<(), Fault>> {
    let answer = match command {
        Command::Stop => return Ok(Ok(())),
        Command::Compute { step, nodes, digests, publish } => {
            for node in nodes {
                match replica.compute(step, node, &digests, publish) {
                    Ok(Computed { digest, leaves, losses, seconds }) => {
                        let losses = losses.into_iter().map(Bits::from).collect();
                        reports.say(&Report::Computed {
                            step,
                            node,
                            digest,
                            leaves,
                            losses,
                            seconds,
                        })?;
                    }
                    Err(fault) => return Ok(Err(fault)),
                }
            }
            return Ok(Ok(()));
        }
        Command::Load { from } => replica.load(from).map(|(step, digest)| Report::Ready {
            step,
            digest,
            device: replica.facts(),
        }),
        Command::Import { step } => {
            replica.import(step).map(|digest| Report::Imported { step, digest })
        }
        Command::Replay { step, leaf, against } => {
            replica.replay(step, leaf, against).map(|Replayed { digest, loss, apart }| {
                let loss = loss.into();
                Report::Replayed { step, leaf, digest, loss, apart }
            })
        }
        Command::Check { step } => replica.check().map(|digest| Report::Checked { step, digest }),
        Command::Combine { step, nodes } => replica.combine(step, &nodes).map(|of| {
            let Combined { before, nodes, gradient, norm } = of;
            let nodes = nodes.into();
            Report::Combined { step, before, nodes, gradient, norm: norm.into() }
        }),
        Command::Apply { step } => {
            replica.apply(step).map(|(rates, after)| Report::Applied { step, rates, after })
        }
        Command::Export { step, area } => {
            replica.export(area).map(|digest| Report::Exported { step, area, digest })
        }
        Command::Score { step } => {
            replica.score().map(|loss| Report::Scored { step, loss: loss.into() })
        }
    };
    match answer {
        Ok(report) => reports.say(&report).map(Ok),
        Err(fault) => Ok(Err(fault)),
    }
}
