//! What the supervisor knows of one worker.

use std::time::Duration;

use serde::Serialize;

use crate::protocol::StateDigest;

/// Steps without fault that make up for one: a device that lies more often is out for good.
const FORGIVEN_AFTER: u32 = 100;

/// Where a worker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Standing {
    /// No process.
    Out,
    /// A process that loads.
    Loading,
    /// Loaded, computing something for the first time, so that what a device does only once is done
    /// before the run waits for it.
    Warming,
    /// Loaded and warm, waiting for the other targets of its move.
    Waiting,
    /// Loaded, waiting for a step to begin.
    Ready,
    /// It was told to take a peer's state and ends the present step with the others.
    Joining,
    /// It computes.
    Member,
    /// No process, and no more of them.
    Retired,
}

/// A worker as people see it.
#[derive(Clone, Debug, Serialize)]
pub struct Seen<'a> {
    /// Which.
    worker: usize,
    /// Its device.
    device: &'a str,
    /// The class within which equal inputs give equal bits; empty before it has loaded.
    numeric_class: &'a str,
    /// `out`, `loading`, `warming`, `waiting`, `ready`, `joining`, `member` or `retired`.
    state: Standing,
    /// Processes started so far.
    processes: u32,
    /// Seconds for a micro-batch, lately.
    seconds: Option<f64>,
    /// Bytes its device holds.
    memory_bytes: u64,
}

/// A time in which a worker is much slower than the others of its kind.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slowness {
    /// Steps in a row.
    pub steps: u32,
    /// The end of the first of them.
    pub since: Option<Duration>,
    /// Whether it was said.
    pub is_told: bool,
}

pub(super) struct Worker {
    pub device: String,
    pub numeric_class: String,
    pub memory_bytes: u64,
    pub standing: Standing,
    /// Processes so far.
    pub incarnation: u32,
    /// Seconds for a leaf, lately.
    pub seconds: Option<f64>,
    /// Answers it owes.
    pub open: u32,
    /// When it last showed that it gets on.
    pub progressed: Duration,
    /// When its process was started.
    pub launched: Duration,
    /// When it last answered, or was given something to do after a rest.
    pub answered: Duration,
    pub operations: u64,
    /// Beats since then: a process that beats is not kept from computing by the machine.
    pub beats: u32,
    /// Whether its present process has done a step.
    pub is_proven: bool,
    pub longest_pause: Duration,
    /// Times it was taken out for what it did.
    pub strikes: u32,
    /// Steps done since the last one, or since one was forgiven.
    pub clean_steps: u32,
    /// Processes lost without having computed.
    pub false_starts: u32,
    /// Whether all its leaves are audited in its next step.
    pub on_probation: bool,
    /// Whether it has been slow lately.
    pub slowness: Slowness,
    /// A fault that was injected, and when.
    pub injected: Option<(String, Duration)>,
    /// The state it loaded by itself.
    pub loaded: Option<(u64, StateDigest)>,
    /// The class that wrote the snapshot it loaded.
    pub written_by: Option<String>,
    /// Whether it is the target of a move that is not decided yet.
    pub trial: bool,
    /// Whether the run has moved away from it, or never to it.
    pub left: bool,
}

impl Worker {
    pub fn new(device: &str) -> Worker {
        Worker {
            device: device.to_owned(),
            numeric_class: String::new(),
            memory_bytes: 0,
            standing: Standing::Out,
            incarnation: 0,
            seconds: None,
            open: 0,
            progressed: Duration::ZERO,
            launched: Duration::ZERO,
            answered: Duration::ZERO,
            operations: 0,
            beats: 0,
            is_proven: false,
            longest_pause: Duration::ZERO,
            strikes: 0,
            clean_steps: 0,
            false_starts: 0,
            on_probation: false,
            slowness: Slowness::default(),
            injected: None,
            loaded: None,
            written_by: None,
            trial: false,
            left: false,
        }
    }

    /// How it looks from outside.
    pub fn seen(&self, worker: usize) -> Seen<'_> {
        Seen {
            worker,
            device: &self.device,
            numeric_class: &self.numeric_class,
            state: self.standing,
            processes: self.incarnation,
            seconds: self.seconds,
            memory_bytes: self.memory_bytes,
        }
    }

    /// Whether something comes from its present process.
    pub fn is(&self, incarnation: u32) -> bool {
        let running = !matches!(self.standing, Standing::Out | Standing::Retired);
        running && self.incarnation == incarnation
    }

    /// A step went well; so many of them make up for a strike.
    pub fn did_well(&mut self) {
        (self.false_starts, self.on_probation, self.is_proven) = (0, false, true);
        self.clean_steps += 1;
        if self.clean_steps >= FORGIVEN_AFTER {
            self.clean_steps = 0;
            self.strikes = self.strikes.saturating_sub(1);
        }
    }

    /// Takes in the time of a leaf; the last two count most.
    pub fn took(&mut self, seconds: f64) {
        self.seconds = Some(self.seconds.map_or(seconds, |before| 0.5 * (before + seconds)));
    }
}
