//! The simulated outside: a clock that is set, and a disk in memory.
//!
//! Both stand behind the traits of `fleet::world`, so that run folders, event logs and snapshots
//! are written and read by the code of real runs. The launcher and the links are in `fleet.rs`.

mod clock;
mod disk;

pub use clock::SimClock;
pub use disk::SimDisk;
