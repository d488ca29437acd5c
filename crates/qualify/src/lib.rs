//! Qualification of devices: does a backend compute what the waist's contracts say, how fast, how
//! steadily, and do two devices agree on a model?
//!
//! [`reference`] is the naive f64 twin of every operation, [`cases`] are seeded inputs, and
//! [`conformance`] holds a backend's results against the reference; [`stress`], [`speed`] and
//! [`forecast`] measure, [`exchange`] checks collectives, and [`verdict`] judges. [`compare`]
//! certifies that devices agree on a model, [`bisect`] finds the first operation on which they do
//! not. Knows no vendor and no model: a model's programs are passed in. Read next:
//! `conformance.rs`, `verdict.rs`, `bisect.rs`.

pub mod bisect;
pub mod cases;
pub mod compare;
pub mod conformance;
mod error;
pub mod exact;
pub mod exchange;
pub mod forecast;
pub mod gradient;
pub mod invariance;
pub mod memory;
pub mod reference;
pub mod report;
pub mod reproducer;
pub mod speed;
pub mod step;
pub mod stress;
pub mod suite;
pub mod support;
pub mod verdict;

pub use error::QualifyError;
