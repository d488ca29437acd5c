//! A clock that stands still until it is set.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pontoon_fleet::world::Clock;

/// When simulated runs begin, in seconds since 1970: 2026-01-01.
const EPOCH: Duration = Duration::from_secs(1_767_225_600);

/// A simulated clock.
#[derive(Debug)]
pub struct SimClock {
    /// Any origin: only differences matter.
    origin: Instant,
    nanoseconds: AtomicU64,
}

impl Default for SimClock {
    fn default() -> SimClock {
        SimClock { origin: Instant::now(), nanoseconds: AtomicU64::new(0) }
    }
}

impl SimClock {
    /// Sets the time since the beginning of the simulation.
    pub fn set(&self, at: Duration) {
        self.nanoseconds.store(at.as_nanos() as u64, Ordering::Relaxed);
    }

    /// The time since the beginning of the simulation.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }
}

impl Clock for SimClock {
    fn now(&self) -> Instant {
        self.origin + self.elapsed()
    }

    fn unix_time(&self) -> Duration {
        EPOCH + self.elapsed()
    }
}
