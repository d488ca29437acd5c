//! Trouble on purpose: faults injected into a real run by wrappers around its parts, and whole runs
//! simulated from one seed, in which the supervisor of real runs decides.
//!
//! Nothing here is used by a run without a plan of faults. Read next: `chaos.rs` for real runs,
//! `simulation.rs` for simulated ones.

pub mod chaos;
mod checkers;
pub mod fault_plan;
mod fleet;
mod model;
mod random;
mod report;
mod scenario;
mod simulation;
mod world;

pub use checkers::Violation;
pub use fleet::{Noticed, Speeds, Struck};
pub use random::Random;
pub use report::{OfKind, Spread, Summary};
pub use scenario::{Long, Scenario, Ticks, published_rate};
pub use simulation::{Outcome, Watch, simulate, simulate_seen};
pub use world::{SimClock, SimDisk};

/// The command that runs a trial again.
pub fn replay_command(seed: u64) -> String {
    format!("pontoon simulate --seed {seed}")
}
