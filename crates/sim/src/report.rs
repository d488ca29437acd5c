//! What a simulated run came to, in numbers: goodput, lost time by cause, faults by kind.
//!
//! Prints nothing. Read next: `simulation.rs`, where the numbers come from.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::fleet::Struck;
use crate::simulation::Outcome;

/// A simulated run in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Simulated days.
    pub days: f64,
    /// Steps done.
    pub steps: u64,
    /// Useful time over all time.
    pub goodput: f64,
    /// Seconds lost, by cause.
    pub lost_s: BTreeMap<String, f64>,
    /// Faults that struck a running process or the disk.
    pub faults: u64,
    /// By kind.
    pub by_kind: BTreeMap<&'static str, OfKind>,
    /// Supervisors that the run had.
    pub supervisors: u32,
    /// What the supervisors were told.
    pub inputs: u64,
}

/// Faults of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct OfKind {
    /// How many struck.
    pub count: u64,
    /// How many of them were told in an event.
    pub told: u64,
    /// How many cost nothing anyone could see: they struck where nothing ran or was used.
    pub harmless: u64,
    /// Seconds from the fault until it was found.
    pub found_s: Option<Spread>,
    /// Seconds from then until the step was done without it.
    pub recovered_s: Option<Spread>,
}

/// A few numbers for many.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Half are smaller.
    pub median: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (median, max) = (*values.get(values.len() / 2)?, *values.last()?);
        Some(Spread { median, max })
    }
}

impl Summary {
    /// Adds it all up.
    pub fn of(outcome: &Outcome) -> Summary {
        let mut kinds: BTreeMap<&'static str, Vec<&Struck>> = BTreeMap::new();
        for struck in &outcome.struck {
            kinds.entry(struck.fault.name()).or_default().push(struck);
        }
        let by_kind = kinds.into_iter().map(|(kind, of)| (kind, OfKind::of(&of))).collect();
        let struck = outcome.struck.iter().filter(|of| of.excused.is_none());
        Summary {
            days: outcome.wall.as_secs_f64() / 86_400.0,
            steps: outcome.steps,
            goodput: outcome.goodput,
            lost_s: outcome.lost_s.clone(),
            faults: struck.count() as u64,
            by_kind,
            supervisors: outcome.lives,
            inputs: outcome.inputs,
        }
    }
}

impl OfKind {
    fn of(struck: &[&Struck]) -> OfKind {
        let told = struck.iter().filter(|of| of.noticed.is_some());
        let found = told.clone().filter_map(|of| of.found.map(|found| (found, of.at)));
        let found = found.map(|(found, at)| found.saturating_sub(at).as_secs_f64()).collect();
        let recovered = told.clone().filter_map(|of| of.noticed?.recovery_ms);
        let recovered =
            recovered.map(|ms| Duration::from_millis(ms).as_secs_f64()).collect::<Vec<f64>>();
        OfKind {
            count: struck.len() as u64,
            told: told.count() as u64,
            harmless: struck.iter().filter(|of| of.excused.is_some()).count() as u64,
            found_s: Spread::of(found),
            recovered_s: Spread::of(recovered),
        }
    }
}
