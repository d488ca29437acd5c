//! Qualification of devices: does a backend compute what the waist's contracts say?
//!
//! [`reference`] is the naive f64 twin of every operation, [`cases`] are seeded inputs, and
//! [`conformance`] holds a backend's results against the reference. Knows no vendor. Read next:
//! `conformance.rs`.

pub mod cases;
pub mod conformance;
pub mod gradient;
pub mod invariance;
pub mod memory;
pub mod reference;
