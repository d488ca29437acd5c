//! Several devices as one: requests are placed, watched, and moved when a device fails.
//!
//! A device that dies or hangs loses its requests to the others; they go on from their tokens so
//! far, and its client notices a pause. The device is opened again and, before it serves, must
//! compute a probe as the others do. While it serves, a sample of its requests is scored again on
//! another device, and one that drifts leaves. Read `placement.rs` for who gets a request,
//! `supervisor.rs` for what happens after a failure, `audit.rs` for the second opinions.

pub mod agreement;
mod audit;
pub mod events;
pub mod placement;
mod supervisor;
mod verdict;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pontoon_models::{Adapters, Model, TensorSource};
use pontoon_ops::Backend;

use crate::engine::device::{Device, DeviceOptions};
use crate::engine::request::{Event, Moves, Request, Ticket};
use crate::engine::worker::{Command, Stats, Worker};
use crate::error::ServeError;
use agreement::{LimitsOf, Reference};
pub use audit::AuditCounts;
use audit::Chosen;
use events::{Events, OnEvent, PoolEvent};
use placement::{Candidate, place};

/// Opens a device by its name.
pub type Open = dyn Fn(&str) -> Result<Box<dyn Backend>, String> + Send + Sync;

/// Failures in a row without a token in between after which a request is given up: one that itself
/// brings devices down must not bring down all of them for ever.
const IDLE_MOVES_MAX: u32 = 8;
/// Failures in all after which it is given up even if it goes on in between.
const MOVES_MAX: u32 = 64;

/// What a pool is made of.
pub struct PoolParts {
    /// The devices by name, one engine each.
    pub devices: Vec<String>,
    /// Opens one.
    pub open: Arc<Open>,
    /// The model.
    pub model: Arc<Model>,
    /// Where its weights come from, also for devices that join later.
    pub weights: Arc<dyn TensorSource>,
    /// The adapters beside it, which the model knows of.
    pub adapters: Option<Arc<Adapters>>,
    /// What each device is loaded for.
    pub options: DeviceOptions,
    /// How long a device that failed is left alone before it is opened again.
    pub rejoin_after: Duration,
    /// How far devices of different numeric classes may be apart.
    pub limits: Arc<LimitsOf>,
    /// The share of requests that is scored again on another device.
    pub audit_share: f64,
    /// Is told what happens to devices.
    pub on_event: Option<Arc<OnEvent>>,
}

/// All devices of a server.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    parts: PoolParts,
    slots: Vec<Slot>,
    notices: Mutex<Sender<Notice>>,
    /// Requests that wait for any device.
    parked: Mutex<Vec<Arc<Ticket>>>,
    /// What the first device that served computed of the probe.
    reference: Mutex<Option<Reference>>,
    chosen: Chosen,
    events: Events,
    moved: AtomicU64,
    joins: AtomicU64,
    stopping: AtomicBool,
}

/// A device's place in the pool.
struct Slot {
    /// What it is opened by.
    opened_as: String,
    /// What it is called; of several opened alike, the later ones have a number.
    name: String,
    inner: Mutex<SlotState>,
}

struct SlotState {
    phase: Phase,
    /// Which start of the device this is; notices of earlier ones are not heard.
    generation: u64,
    failures: u32,
    /// How often it was caught computing something wrong.
    drifts: u32,
    /// Its turn among all that joined; the latest start counts.
    joined: u64,
    /// What it runs. Held here too, as those that its thread holds go when it panics.
    tickets: Vec<Arc<Ticket>>,
}

enum Phase {
    Starting,
    Serving(Worker),
    Down { reason: String, retry_at: Option<Instant> },
}

/// What a device's thread says to the supervisor.
enum Notice {
    Ready { slot: usize, generation: u64, worker: Worker },
    Ended { slot: usize, generation: u64, error: Option<ServeError> },
    Stop,
}

/// How a device stands, for `/metrics`, `/health` and the log.
pub struct DeviceState {
    /// The device's name.
    pub name: String,
    /// `starting`, `serving` or `down`.
    pub phase: &'static str,
    /// Why it is down; empty if it is not.
    pub reason: String,
    /// How often it has failed.
    pub failures: u32,
    /// How often it was caught computing something wrong.
    pub drifts: u32,
    /// The class within which devices give equal bits; empty while it does not serve.
    pub numeric_class: String,
    /// Its counts, while it serves.
    pub stats: Option<Arc<Stats>>,
}

impl Pool {
    /// Starts every device; returns when one serves, or an error when none can.
    pub fn start(parts: PoolParts) -> Result<Pool, ServeError> {
        if parts.devices.is_empty() {
            return Err(ServeError::NoDevice { reasons: "none was named".to_owned() });
        }
        let (sender, receiver) = channel();
        let slot = |(at, name): (usize, &String)| {
            let (phase, tickets) = (Phase::Starting, Vec::new());
            let state =
                SlotState { phase, generation: 0, failures: 0, drifts: 0, joined: 0, tickets };
            let alike = parts.devices[..at].iter().filter(|other| *other == name).count();
            let opened_as = name.clone();
            let name = if alike == 0 { name.clone() } else { format!("{name} #{}", alike + 1) };
            Slot { opened_as, name, inner: Mutex::new(state) }
        };
        let slots = parts.devices.iter().enumerate().map(slot).collect();
        let events = Events::new(parts.on_event.clone());
        let shared = Arc::new(Shared {
            parts,
            slots,
            notices: Mutex::new(sender),
            parked: Mutex::new(Vec::new()),
            reference: Mutex::new(None),
            chosen: Chosen::default(),
            events,
            moved: AtomicU64::new(0),
            joins: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        for slot in 0..shared.slots.len() {
            shared.launch(slot);
        }
        shared.wait_for_first(&receiver)?;
        let supervised = Arc::clone(&shared);
        std::thread::spawn(move || supervised.supervise(&receiver));
        Ok(Pool { shared })
    }

    /// Gives a request to a device, now or as soon as there is one.
    pub fn submit(&self, ticket: Arc<Ticket>) {
        // A device alone has nobody to ask.
        if self.shared.slots.len() > 1 {
            self.shared.chosen.consider(&ticket, self.shared.parts.audit_share);
        }
        self.shared.dispatch(ticket);
    }

    /// How the devices stand.
    pub fn devices(&self) -> Vec<DeviceState> {
        let state = |slot: &Slot| {
            let state = slot.lock();
            let mut told = DeviceState {
                name: slot.name.clone(),
                phase: "starting",
                reason: String::new(),
                failures: state.failures,
                drifts: state.drifts,
                numeric_class: String::new(),
                stats: None,
            };
            match &state.phase {
                Phase::Starting => {}
                Phase::Serving(worker) => {
                    told.phase = "serving";
                    told.numeric_class = worker.numeric_class.to_string();
                    told.stats = Some(Arc::clone(&worker.stats));
                }
                Phase::Down { reason, .. } => {
                    told.phase = "down";
                    told.reason.clone_from(reason);
                }
            }
            told
        };
        self.shared.slots.iter().map(state).collect()
    }

    /// Requests that were moved from a failed device to another.
    pub fn moved(&self) -> u64 {
        self.shared.moved.load(Relaxed)
    }

    /// What second opinions have come to.
    pub fn audits(&self) -> &AuditCounts {
        &self.shared.chosen.counts
    }

    /// What has happened to devices lately, oldest first.
    pub fn events(&self) -> Vec<PoolEvent> {
        self.shared.events.list()
    }

    /// The adapters' names, by their numbers.
    pub fn adapter_names(&self) -> Vec<String> {
        let adapters = self.shared.parts.adapters.as_ref();
        adapters.map_or_else(Vec::new, |all| all.names().map(str::to_owned).collect())
    }

    /// What each device is loaded for.
    pub fn options(&self) -> &DeviceOptions {
        &self.shared.parts.options
    }

    /// Stops every device; what runs is given up.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Relaxed);
        for slot in &self.shared.slots {
            if let Phase::Serving(worker) = &slot.lock().phase {
                // A worker that has ended by itself needs no telling.
                let _ = worker.commands.send(Command::Stop);
            }
        }
        let notices = self.shared.notices.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = notices.send(Notice::Stop);
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Opens a slot's device on a thread of its own, which then works until it ends.
    fn launch(self: &Arc<Self>, slot: usize) {
        let generation = {
            let mut state = self.slots[slot].lock();
            state.generation += 1;
            state.phase = Phase::Starting;
            state.generation
        };
        let shared = Arc::clone(self);
        let notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner).clone();
        std::thread::spawn(move || {
            let end = EndNotice { notices, slot, generation, error: None };
            shared.work(end);
        });
    }

    fn work(&self, mut end: EndNotice) {
        let name = &self.slots[end.slot].name;
        let ready = self.open(end.slot).and_then(|device| Worker::new(device, name));
        end.error = match ready {
            Err(error) => Some(error),
            Ok((worker, thread)) => {
                let (slot, generation) = (end.slot, end.generation);
                // The supervisor outlives every worker.
                let _ = end.notices.send(Notice::Ready { slot, generation, worker });
                thread.run().err()
            }
        };
    }

    fn open(&self, slot: usize) -> Result<Device, ServeError> {
        let Slot { opened_as, name, .. } = &self.slots[slot];
        let backend = (self.parts.open)(opened_as)
            .map_err(|reason| ServeError::Open { device: name.clone(), reason })?;
        let parts = &self.parts;
        let weights = (parts.weights.as_ref(), parts.adapters.as_deref());
        Device::new(backend, &parts.model, weights, parts.options)
    }

    /// Gives a request to the best device, or parks it.
    fn dispatch(&self, ticket: Arc<Ticket>) {
        loop {
            let Some(slot) = place(&self.candidates(&ticket.request)) else {
                self.parked.lock().unwrap_or_else(PoisonError::into_inner).push(ticket);
                return;
            };
            let mut state = self.slots[slot].lock();
            let Phase::Serving(worker) = &state.phase else { continue };
            let epoch = ticket.hand_over();
            ticket.held_by(slot);
            let sent = worker.commands.send(Command::Run(Arc::clone(&ticket), epoch));
            worker.stats.waiting.fetch_add(1, Relaxed);
            state.tickets.retain(|ticket| ticket.open());
            state.tickets.push(ticket);
            // A worker that is no more leaves the sending without effect, but its end is on the way
            // to the supervisor, which moves what stands in the list.
            drop(sent);
            return;
        }
    }

    fn candidates(&self, request: &Request) -> Vec<Candidate> {
        let (prompt, adapter) = (&request.prompt, request.adapter);
        let serving = |(slot, one): (usize, &Slot)| {
            let state = one.lock();
            let Phase::Serving(worker) = &state.phase else { return None };
            let stats = &worker.stats;
            let tokens = stats.generated_tokens.load(Relaxed) + stats.prompt_tokens.load(Relaxed);
            let seconds = stats.busy_nanoseconds.load(Relaxed) as f64 * 1e-9;
            Some(Candidate {
                slot,
                queued: stats.running.load(Relaxed) + stats.waiting.load(Relaxed),
                prompt_tokens_left: prompt.len() - worker.cached_tokens(prompt, adapter),
                tokens_per_s: (seconds > 0.0).then(|| tokens as f64 / seconds),
            })
        };
        self.slots.iter().enumerate().filter_map(serving).collect()
    }

    /// Takes a failed device's requests and gives them to others.
    fn move_requests(&self, tickets: Vec<Arc<Ticket>>) {
        for ticket in tickets {
            // The failed device may still speak until another epoch begins.
            let epoch = ticket.hand_over();
            if !ticket.open() {
                continue;
            }
            let moves = ticket.count_move();
            if moves.idle > IDLE_MOVES_MAX || moves.all > MOVES_MAX {
                let Moves { idle, all } = moves;
                let reason = format!("{all} devices failed with this, {idle} without a new token");
                ticket.tell(epoch, Event::Failed(reason));
                continue;
            }
            self.moved.fetch_add(1, Relaxed);
            self.dispatch(ticket);
        }
    }
}

/// Tells the supervisor that a worker's thread has ended, also when it panicked.
struct EndNotice {
    notices: Sender<Notice>,
    slot: usize,
    generation: u64,
    error: Option<ServeError>,
}

impl Drop for EndNotice {
    fn drop(&mut self) {
        let (slot, generation) = (self.slot, self.generation);
        let error = self.error.take();
        // Nobody listens any more when the whole server ends.
        let _ = self.notices.send(Notice::Ended { slot, generation, error });
    }
}

type Notices = Receiver<Notice>;
