//! One emulated device: memory, engine, health, and what is armed to go wrong with it.

pub mod hazards;
pub mod memory;
pub mod stream;

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use pontoon_cpu::pool::Pool;
use pontoon_cpu::scratch::Scratch;
use pontoon_cpu::simd::Isa;

use self::hazards::Hazards;
use self::memory::Memory;
use self::stream::Stream;
use crate::code;
use crate::failure::{Done, Failure};
use crate::fault::{Faults, Kind};

/// Threads that compute, for all emulated devices of the process.
const THREADS_VARIABLE: &str = "PONTOON_EMU_THREADS";
/// Bytes of each device's memory.
const MEMORY_VARIABLE: &str = "PONTOON_EMU_MEMORY_BYTES";
/// Memory of a device unless told otherwise: that of a small accelerator.
const MEMORY_BYTES: u64 = 16 << 30;

/// What repaired memory holds: NaN in every float.
const LOST: u8 = 0xff;

/// Streams a device has, as on the chip.
pub const STREAMS_MAX: usize = 1984;

static POOL: LazyLock<Pool> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Pool::new(number(THREADS_VARIABLE).map_or(cores, |threads| threads.clamp(1, 1024) as usize))
});

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// What computes: the host's threads and working memory.
pub struct Engine {
    /// Threads, shared by all devices.
    pub pool: &'static Pool,
    /// Instruction set.
    pub isa: Isa,
    /// Working memory of products.
    pub scratch: Scratch,
    /// Working memory for sums.
    pub sums: Scratch,
    /// How many times as long the present task shall take.
    pub slowness: f64,
    /// Whether operators that add as results come in must add in a fixed order.
    pub deterministic: bool,
    /// Counts tasks, for results that differ from run to run.
    pub tasks: u64,
}

/// Damaged addresses and what killed the device.
#[derive(Default)]
struct Health {
    /// Fails every call until the device is reset.
    dead: Option<Failure>,
    /// Fails every wait until the memory is repaired.
    damaged: Vec<(u64, u64)>,
}

/// One device.
pub struct Device {
    /// Its number.
    pub id: i32,
    /// Its memory.
    pub memory: Memory,
    /// What is armed to go wrong.
    pub faults: Faults,
    engine: Mutex<Engine>,
    health: Mutex<Health>,
    hazards: Mutex<Hazards>,
    streams: Mutex<Vec<Arc<Stream>>>,
    /// How often it was set and not reset.
    pub users: AtomicI64,
    /// The level of `ACL_OPT_DETERMINISTIC`.
    pub deterministic: AtomicI64,
    /// Whether the primary context exists.
    pub opened: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// A device that is switched on and empty.
    pub fn new(id: i32) -> Device {
        let isa = Isa::detect().unwrap_or(Isa::PORTABLE);
        let engine = Engine {
            pool: &POOL,
            isa,
            scratch: Scratch::new(),
            sums: Scratch::new(),
            slowness: 1.0,
            deterministic: false,
            tasks: 0,
        };
        Device {
            id,
            memory: Memory::new(id, number(MEMORY_VARIABLE).unwrap_or(MEMORY_BYTES)),
            faults: Faults::default(),
            engine: Mutex::new(engine),
            health: Mutex::default(),
            hazards: Mutex::default(),
            streams: Mutex::default(),
            users: AtomicI64::new(0),
            deterministic: AtomicI64::new(0),
            opened: AtomicBool::new(false),
        }
    }

    /// The engine; whoever holds it is the one task that runs.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        lock(&self.engine)
    }

    /// The books on who touches what.
    pub fn hazards(&self) -> MutexGuard<'_, Hazards> {
        lock(&self.hazards)
    }

    /// Its streams.
    pub fn streams(&self) -> MutexGuard<'_, Vec<Arc<Stream>>> {
        lock(&self.streams)
    }

    /// Fails if the device is dead.
    pub fn check_alive(&self) -> Done {
        match &lock(&self.health).dead {
            Some(failure) => Err(failure.clone()),
            None => Ok(()),
        }
    }

    /// Fails if the device is dead or its memory damaged and not repaired.
    pub fn check_healthy(&self) -> Done {
        self.check_alive()?;
        match lock(&self.health).damaged.first() {
            Some((address, _)) => {
                let text = format!("memory at {address:#x} is damaged: reason=[hbm ecc error]");
                Err(Failure::new(code::HBM_ECC, text))
            }
            None => Ok(()),
        }
    }

    /// Notes what a task's fault does to the device, beyond failing the task.
    pub fn suffer(&self, kind: Kind, failure: &Failure, damaged: Option<(u64, u64)>) {
        let mut health = lock(&self.health);
        match kind {
            Kind::LostHeartbeat | Kind::SocketClosed => {
                health.dead.get_or_insert_with(|| failure.clone());
            }
            Kind::HbmFault | Kind::DeviceMemory => health.damaged.extend(damaged),
            _ => {}
        }
    }

    /// The damaged ranges.
    pub fn damaged(&self) -> Vec<(u64, u64)> {
        lock(&self.health).damaged.clone()
    }

    /// Takes damaged ranges out of use and puts good memory in their place; what they held is lost.
    pub fn repair(&self, addresses: &[u64]) {
        let mut health = lock(&self.health);
        let (repaired, left) =
            health.damaged.drain(..).partition(|(start, _)| addresses.contains(start));
        health.damaged = left;
        drop(health);
        let repaired: Vec<(u64, u64)> = repaired;
        for (start, bytes) in repaired {
            // The caller may have freed it by now.
            if let Ok(place) = self.memory.find(start, bytes, "repair") {
                place.allocation.block.fill(place.offset, bytes as usize, LOST);
            }
        }
    }

    /// Takes back everything queued, on all streams.
    pub fn abort(&self, code: i32) {
        for stream in self.streams().iter() {
            stream.abort(code);
            self.hazards().forget(stream.id);
        }
    }

    /// Back to the state after switching on; faults that wait stay armed.
    pub fn reset(&self) -> (usize, u64) {
        self.abort(code::TASK_ABORT);
        self.streams().drain(..).for_each(|stream| stream.stop());
        *lock(&self.health) = Health::default();
        *self.hazards() = Hazards::default();
        self.opened.store(false, Ordering::SeqCst);
        self.users.store(0, Ordering::SeqCst);
        self.memory.reset()
    }
}
