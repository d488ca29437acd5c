//! The thread that owns a device: takes requests in, runs steps, and says so when it ends.
//!
//! It decides nothing about other devices; the pool watches its beat and hears of its end. Read
//! next: `../pool/mod.rs`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::batch::Batch;
use super::blocks::{BlockPool, root};
use super::device::Device;
use super::probe::Probe;
use super::request::{Epoch, Ticket};
use crate::error::ServeError;

/// Counts of one device, read by placement and by `/metrics`.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "the names are the metrics' own, described where they are shown")]
pub struct Stats {
    pub running: AtomicU64,
    pub waiting: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub drafted_tokens: AtomicU64,
    pub accepted_tokens: AtomicU64,
    pub prefix_tokens_asked: AtomicU64,
    pub prefix_tokens_found: AtomicU64,
    pub preemptions: AtomicU64,
    pub blocks_used: AtomicU64,
    pub blocks: AtomicU64,
    pub steps: AtomicU64,
    /// Nanoseconds spent in steps.
    pub busy_nanoseconds: AtomicU64,
}

/// A request for a worker.
pub enum Command {
    /// Run this.
    Run(Arc<Ticket>, Epoch),
    /// End when idle or not.
    Stop,
}

/// How others reach a worker.
#[derive(Clone)]
pub struct Worker {
    /// Where requests go.
    pub commands: Sender<Command>,
    /// Its counts.
    pub stats: Arc<Stats>,
    /// Its cache, to look up how much of a prompt it has.
    pub blocks: Arc<Mutex<BlockPool>>,
    /// When the step that runs now began; `None` between steps.
    pub step_began: Arc<Mutex<Option<Instant>>>,
    /// What its device calls the class of devices that give equal bits.
    pub numeric_class: Arc<str>,
    /// What it computed of the probe when it started.
    pub probe: Probe,
}

/// A worker's own half.
pub struct WorkerThread {
    commands: Receiver<Command>,
    batch: Batch,
    stats: Arc<Stats>,
    step_began: Arc<Mutex<Option<Instant>>>,
}

impl Worker {
    /// Makes both halves of the device that clients are told of by this name; runs the probe.
    pub fn new(mut device: Device, name: &str) -> Result<(Worker, WorkerThread), ServeError> {
        let options = *device.options();
        let probe = Probe::measure(&mut device)?;
        let (sender, receiver) = channel();
        let stats = Arc::new(Stats::default());
        stats.blocks.store(options.blocks as u64, Relaxed);
        let blocks = Arc::new(Mutex::new(BlockPool::new(options.blocks)));
        let step_began = Arc::new(Mutex::new(None));
        let worker = Worker {
            commands: sender,
            stats: Arc::clone(&stats),
            blocks: Arc::clone(&blocks),
            step_began: Arc::clone(&step_began),
            numeric_class: Arc::from(device.info().numeric_class.as_str()),
            probe,
        };
        let batch = Batch::new((device, name), blocks, Arc::clone(&stats));
        Ok((worker, WorkerThread { commands: receiver, batch, stats, step_began }))
    }

    /// When the step that runs now began.
    pub fn busy_since(&self) -> Option<Instant> {
        *self.step_began.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of a prompt's tokens its cache has.
    pub fn cached_tokens(&self, prompt: &[u32], adapter: Option<usize>) -> usize {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.cached_tokens(root(adapter), prompt)
    }
}

impl WorkerThread {
    /// Works until told to stop, until nobody can ask any more, or until the device fails.
    pub fn run(mut self) -> Result<(), ServeError> {
        loop {
            if self.batch.is_idle() {
                match self.commands.recv() {
                    Ok(Command::Run(ticket, epoch)) => self.batch.add(ticket, epoch),
                    Ok(Command::Stop) | Err(_) => return Ok(()),
                }
            }
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Run(ticket, epoch)) => self.batch.add(ticket, epoch),
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(()),
                    Err(TryRecvError::Empty) => break,
                }
            }
            let began = Instant::now();
            self.set_began(Some(began));
            self.batch.step()?;
            self.set_began(None);
            let spent = began.elapsed().as_nanos() as u64;
            self.stats.busy_nanoseconds.fetch_add(spent, Relaxed);
        }
    }

    fn set_began(&self, began: Option<Instant>) {
        *self.step_began.lock().unwrap_or_else(PoisonError::into_inner) = began;
    }
}
