//! Faults injected into a run as a plan says: wrappers around a device, a replica and a disk.
//!
//! Wrappers only cause trouble; finding it is left to the supervisor, which knows of an injection
//! only its time, to tell how long detection took. Read next: `chaos/plan.rs`.

mod device;
mod disk;
mod plan;
mod replica;

pub use device::{ChaosDevice, Injector};
pub use disk::ChaosDisk;
pub use plan::{Fault, FaultKind, Numbered, Plan, PlanError, Run};
pub use replica::{ChaosReplica, Place};

/// A number from a place in a plan, always the same (splitmix64).
pub(crate) fn draw(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    for (shift, factor) in [(30, 0xBF58_476D_1CE4_E5B9), (27, 0x94D0_49BB_1331_11EB)] {
        z = (z ^ (z >> shift)).wrapping_mul(factor);
    }
    z ^ (z >> 31)
}
