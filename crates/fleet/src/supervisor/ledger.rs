//! Where the time went: every second is useful or lost to a cause.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::band::{Band, Latest};

/// Steps whose time is remembered: more than lie between the newest snapshot and the oldest kept
/// one in any run that wants to be resumed, and 16 MiB.
const LATEST: usize = 1 << 20;
/// Clean steps that say how long a step takes.
const TYPICAL: usize = 9;

/// The account of a run's time.
#[derive(Default)]
pub(super) struct Ledger {
    lost: BTreeMap<&'static str, f64>,
    useful: f64,
    /// Useful seconds of the latest steps, to take back if they are done again: after damage that
    /// may go further back than the newest snapshot.
    latest: VecDeque<(u64, f64)>,
    clean: VecDeque<f64>,
    /// The largest loss of a leaf in the step before.
    largest_loss: Option<f64>,
    losses: Latest,
    pub faults: u64,
}

impl Ledger {
    /// Adds lost seconds.
    pub fn lose(&mut self, cause: &'static str, seconds: f64) {
        if seconds > 0.0 {
            *self.lost.entry(cause).or_default() += seconds;
        }
    }

    /// Takes in a step's time; `cause` is what disturbed it. Returns the seconds lost.
    pub fn step(&mut self, step: u64, seconds: f64, cause: Option<&'static str>) -> f64 {
        let lost = match (cause, self.typical()) {
            (None, _) => {
                self.clean.push_back(seconds);
                if self.clean.len() > TYPICAL {
                    self.clean.pop_front();
                }
                0.0
            }
            (Some(_), Some(typical)) => (seconds - typical).max(0.0),
            // Nothing to compare with yet: half is a guess that hides neither.
            (Some(_), None) => 0.5 * seconds,
        };
        self.lose(cause.unwrap_or("none"), lost);
        self.useful += seconds - lost;
        if self.latest.len() == LATEST {
            self.latest.pop_front();
        }
        self.latest.push_back((step, seconds - lost));
        lost
    }

    /// Steps after `step` are done again: what they took was lost.
    pub fn rolled_back(&mut self, step: u64) {
        let again: f64 = self.latest.iter().filter(|(of, _)| *of > step).map(|(_, s)| s).sum();
        self.latest.retain(|(of, _)| *of <= step);
        self.losses.rolled_back(step);
        self.useful -= again;
        self.lose("rolled_back", again);
    }

    pub fn last_losses(&mut self, step: u64, losses: &[f64]) {
        self.losses.push(step, losses.iter().sum());
        self.largest_loss = losses.iter().copied().reduce(f64::max);
    }

    pub fn largest_loss(&self) -> Option<f64> {
        self.largest_loss
    }

    /// What a move's losses are to be held to.
    pub fn band(&self, rounding: f64) -> Option<Band> {
        self.losses.band(rounding)
    }

    pub fn goodput(&self, now: Duration) -> f64 {
        self.useful / now.as_secs_f64().max(1e-9)
    }

    /// Useful seconds so far.
    pub fn useful(&self) -> f64 {
        self.useful
    }

    /// Every second by what became of it, in one line.
    pub fn account(&self, now: Duration) -> String {
        let parts = self.lost.iter().map(|(cause, seconds)| format!("{seconds:.3} s to {cause}"));
        let lost = match self.lost.is_empty() {
            true => String::new(),
            false => format!("; lost {}", parts.collect::<Vec<_>>().join(", ")),
        };
        format!("useful {:.3} s of {:.3} s{lost}", self.useful, now.as_secs_f64())
    }

    pub fn lost(&self) -> Vec<(&'static str, f64)> {
        self.lost.iter().map(|(cause, seconds)| (*cause, *seconds)).collect()
    }

    /// What a step takes that nothing disturbs.
    pub fn typical(&self) -> Option<f64> {
        let mut clean: Vec<f64> = self.clean.iter().copied().collect();
        clean.sort_by(f64::total_cmp);
        clean.get(clean.len() / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_step_loses_what_it_took_beyond_a_typical_one() {
        let mut ledger = Ledger::default();
        for step in 1..=3 {
            assert_eq!(ledger.step(step, 2.0, None), 0.0);
        }
        assert_eq!(ledger.step(4, 5.0, Some("crash")), 3.0);
        ledger.lose("startup", 1.0);
        assert_eq!(ledger.lost(), [("crash", 3.0), ("startup", 1.0)]);
        assert_eq!(ledger.goodput(Duration::from_secs(16)), 0.5);
        ledger.rolled_back(2);
        assert_eq!(ledger.lost()[1], ("rolled_back", 4.0));
        assert_eq!(ledger.goodput(Duration::from_secs(16)), 0.25);
    }
}
