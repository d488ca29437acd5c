//! Qualification of devices: does a backend compute what the waist's contracts say?
//!
//! [`reference`] is the naive f64 twin of every operation, [`cases`] are seeded inputs, and [`run`]
//! holds a backend's results against the reference. Knows no vendor. Read next: `run.rs`.

pub mod memory;
pub mod reference;
