//! What the curve of a moved run's losses may be apart from that of the same run left alone: what
//! rounding may do to one micro-batch, and what chance does to the run's own losses.
//!
//! Two correct devices round differently, and a step's loss of a young run depends on that as it
//! depends on chance: after some steps the two runs are as far apart as two draws of the scatter
//! that the losses show anyway. Nothing is judged here: the unmoved run is nowhere. What was
//! measured is in `docs/moving.md`. Read next: `moving.rs`.

use std::collections::VecDeque;

use serde::Serialize;

/// Losses that say how much they scatter: enough for a tenth, and few enough to be of one phase.
const LOSSES: usize = 32;
/// With fewer, the scatter is not known to a third.
const LOSSES_LEAST: usize = 8;
/// Steps of a running mean: a leap lasts one or two.
const WINDOW: usize = 16;
/// Standard deviations of the difference of two means: losses leap more often than normal errors,
/// and a curve has some hundred windows.
const DEVIATIONS: f64 = 4.0;

/// How far apart the curves may be. Over the `n` latest steps since the move, at most `window`,
/// means of the two may differ by `rounding + deviations * scatter * sqrt(2 / n)` of the unmoved
/// one's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Band {
    /// What rounding alone may do to a loss.
    pub rounding: f64,
    /// The standard deviation of a step's loss around the line through its neighbours, over the
    /// last steps before the move, as a share of their mean.
    pub scatter: f64,
    /// Steps of a running mean.
    pub window: usize,
    /// Standard deviations of the difference of two means that are allowed.
    pub deviations: f64,
    /// What that comes to for a whole window.
    pub apart: f64,
}

/// The losses of the latest steps.
#[derive(Default)]
pub(super) struct Latest(VecDeque<(u64, f64)>);

impl Latest {
    pub fn push(&mut self, step: u64, loss: f64) {
        if self.0.len() == LOSSES {
            self.0.pop_front();
        }
        self.0.push_back((step, loss));
    }

    /// Steps after `step` are done again.
    pub fn rolled_back(&mut self, step: u64) {
        self.0.retain(|(of, _)| *of <= step);
    }

    /// The band; `None` after too few steps.
    pub fn band(&self, rounding: f64) -> Option<Band> {
        let losses: Vec<f64> = self.0.iter().map(|(_, loss)| *loss).collect();
        if losses.len() < LOSSES_LEAST {
            return None;
        }
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        // A second difference is zero on a line, and of independent draws has six times the
        // variance of one.
        let squares = losses.windows(3).map(|of| (of[0] - 2.0 * of[1] + of[2]).powi(2) / 6.0);
        let variance = squares.sum::<f64>() / (losses.len() - 2) as f64;
        let scatter = variance.sqrt() / mean.abs().max(1e-3);
        let apart = rounding + DEVIATIONS * scatter * (2.0 / WINDOW as f64).sqrt();
        Some(Band { rounding, scatter, window: WINDOW, deviations: DEVIATIONS, apart })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(losses: impl IntoIterator<Item = f64>) -> Latest {
        let mut latest = Latest::default();
        losses.into_iter().zip(1..).for_each(|(loss, step)| latest.push(step, loss));
        latest
    }

    #[test]
    fn a_falling_line_does_not_scatter_and_what_jumps_around_it_does() {
        let line = after((0..40).map(|at| 8.0 - 0.1 * f64::from(at)));
        assert!(line.band(0.01).unwrap().scatter < 1e-12);
        // Independent draws of -1 and 1 around 10, as a register of 15 bits deals them.
        let mut bits = 1_u32;
        let mut draw = || {
            bits = bits << 1 & 0x7fff | (bits >> 14 ^ bits >> 13) & 1;
            if bits & 1 == 1 { 11.0 } else { 9.0 }
        };
        let all: Vec<f64> = (0..32_000).map(|_| draw()).collect();
        let bands =
            all.chunks(LOSSES).map(|losses| after(losses.iter().copied()).band(0.01).unwrap());
        let squares: f64 = bands.map(|band| band.scatter.powi(2)).sum();
        let scatter = (squares / 1000.0).sqrt();
        assert!((scatter - 0.1).abs() < 0.01, "{scatter}");
    }

    #[test]
    fn too_few_losses_say_nothing_and_those_that_are_done_again_do_not_count() {
        assert_eq!(after([2.0; LOSSES_LEAST - 1]).band(0.01), None);
        let mut latest = after([2.0; LOSSES_LEAST]);
        assert!(latest.band(0.01).is_some());
        latest.rolled_back(LOSSES_LEAST as u64 - 1);
        assert_eq!(latest.band(0.01), None);
    }
}
