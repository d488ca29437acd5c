//! Simulated workers: processes that answer the protocol with the digests of a tiny model, take
//! simulated time, and fail when a fault strikes.
//!
//! They stand behind `fleet::world`'s `Launcher` and `Link`. They know nothing of the supervisor's
//! decisions. Read next: `simulation.rs`, which holds them against it.

pub(crate) mod worker;

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use pontoon_fleet::protocol::{Command, Node};
use pontoon_fleet::supervisor::Input;
use pontoon_fleet::world::{Launcher, Launching, Link};

use crate::fault_plan::SimFault;
use crate::model::TinyModel;
use crate::random::Random;
use crate::world::SimDisk;

use worker::SimWorker;

/// How long things take in a simulated world.
#[derive(Clone, Debug)]
pub struct Speeds {
    /// A micro-batch.
    pub leaf: Duration,
    /// Workers and steps differ by this share.
    pub jitter: f64,
    /// Summing the gradients.
    pub combine: Duration,
    /// The update.
    pub apply: Duration,
    /// Copying a state to or from the exchange.
    pub copy: Duration,
    /// Scoring the validation data.
    pub score: Duration,
    /// A new process, until its model is loaded.
    pub start: Duration,
    /// Another device in place of a broken one.
    pub replace: Duration,
    /// Writing and checking a snapshot, in the background.
    pub save: Duration,
    /// Until a process's end is noticed.
    pub notice: Duration,
    /// The longest time between two operations of a device.
    pub pause: Duration,
    /// Until someone resumes a run whose supervisor is gone.
    pub resume: Duration,
    /// A slow device takes this many times longer.
    pub slow_factor: f64,
}

/// What comes to pass at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    /// A worker has done what it was at.
    Done { worker: usize, serial: u64 },
    /// The end of a process is noticed.
    Gone { worker: usize, serial: u64 },
    /// A fault of the plan strikes.
    Strike { fault: usize },
    /// A fault of the disk is over.
    DiskFree,
    /// The snapshot that is being written is there.
    Saved { life: u32 },
    /// Silence is looked for.
    Tick { life: u32, chain: u32 },
    /// The run is to be stopped.
    Stop,
    /// Someone resumes the run.
    Resume,
}

/// A fault that struck, and what became of it.
#[derive(Clone, Debug)]
pub struct Struck {
    /// Which.
    pub fault: SimFault,
    /// When.
    pub at: Duration,
    /// Whom.
    pub worker: Option<usize>,
    /// Which of all processes.
    pub serial: u64,
    /// When its process was taken out.
    pub found: Option<Duration>,
    /// The event that tells of it.
    pub noticed: Option<Noticed>,
    /// How long it may stay unnoticed.
    pub patience: Duration,
    /// Why nobody had to notice it.
    pub excused: Option<&'static str>,
}

/// How a fault was noticed.
#[derive(Clone, Copy, Debug)]
pub struct Noticed {
    /// The event's name.
    pub kind: &'static str,
    /// When it was written.
    pub at: Duration,
    /// What it says about the time until the run went on.
    pub recovery_ms: Option<u64>,
}

/// A sum: of which nodes, at which version of the slots, their digests, and the sum's own.
type SumOfNodes = (u64, Arc<[Node]>, Arc<[u64]>, u64);

/// The memory that all workers share.
#[derive(Default)]
pub(crate) struct Memory {
    /// Gradients of subtrees by first leaf.
    pub slots: Vec<u64>,
    /// Changes of `slots`, to know whether a sum still holds.
    pub version: u64,
    pub join: u64,
    pub snapshot: u64,
    /// The last sum.
    pub sum: Option<SumOfNodes>,
}

/// All workers, the memory they share, and what is still to come.
pub(crate) struct Fleet {
    pub now: Duration,
    pub speeds: Speeds,
    pub model: TinyModel,
    pub random: Random,
    pub disk: SimDisk,
    pub workers: Vec<SimWorker>,
    pub memory: Memory,
    pub struck: Vec<Struck>,
    /// Whether devices check their own products.
    pub checksums: bool,
    /// Processes started so far.
    launched: u64,
    queue: BinaryHeap<Reverse<(Duration, u64, Happening)>>,
    sequence: u64,
}

impl Fleet {
    pub fn new(
        speeds: Speeds,
        model: TinyModel,
        random: Random,
        disk: SimDisk,
        workers: usize,
    ) -> Fleet {
        let slots = vec![0; model.leaves as usize];
        Fleet {
            now: Duration::ZERO,
            speeds,
            model,
            random,
            disk,
            workers: (0..workers).map(|_| SimWorker::default()).collect(),
            memory: Memory { slots, ..Memory::default() },
            struck: Vec::new(),
            checksums: false,
            launched: 0,
            queue: BinaryHeap::new(),
            sequence: 0,
        }
    }

    /// Something will come to pass.
    pub fn at(&mut self, when: Duration, what: Happening) {
        self.sequence += 1;
        self.queue.push(Reverse((when, self.sequence, what)));
    }

    pub fn after(&mut self, wait: Duration, what: Happening) {
        self.at(self.now + wait, what);
    }

    /// The next thing; the time goes on to it.
    pub fn next(&mut self) -> Option<Happening> {
        let Reverse((at, _, what)) = self.queue.pop()?;
        self.now = at;
        Some(what)
    }

    /// Someone will notice that the supervisor is gone.
    pub fn resume_later(&mut self) {
        self.after(self.speeds.resume, Happening::Resume);
    }

    /// Every process ends: their supervisor is gone.
    pub fn end_all(&mut self) {
        for worker in &mut self.workers {
            worker.end();
        }
    }

    /// Whether some worker is not as it should be.
    pub fn is_troubled(&self) -> bool {
        self.workers.iter().any(|of| of.is_troubled(self.now))
    }

    /// Forgives flips of what was never used again.
    pub fn excuse_unused(&mut self) {
        for worker in 0..self.workers.len() {
            self.forget_flips(worker);
        }
    }

    /// Forgives all that struck and was not noticed.
    pub fn excuse(&mut self, why: &'static str) {
        for struck in &mut self.struck {
            if struck.noticed.is_none() {
                struck.excused.get_or_insert(why);
            }
        }
    }
}

/// The launcher of a simulated world; clones are the same world.
#[derive(Clone)]
pub(crate) struct Shared(pub Rc<RefCell<Fleet>>);

impl Launcher for Shared {
    fn launch(&mut self, what: &Launching, to: Sender<Input>) -> io::Result<Box<dyn Link>> {
        let worker = what.worker;
        let serial = self.0.borrow_mut().launch(worker, what.incarnation, to);
        Ok(Box::new(SimLink { fleet: self.clone(), worker, serial }))
    }
}

/// The way to a simulated process.
struct SimLink {
    fleet: Shared,
    worker: usize,
    serial: u64,
}

impl Link for SimLink {
    fn send(&mut self, command: &Command) -> io::Result<()> {
        self.fleet.0.borrow_mut().tell(self.worker, self.serial, command);
        Ok(())
    }

    fn kill(&mut self) {
        self.fleet.0.borrow_mut().kill(self.worker, self.serial);
    }
}
