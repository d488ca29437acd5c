//! The only chance in a simulation: numbers drawn from a seed, always the same.

use std::time::Duration;

use crate::chaos::draw;

/// A stream of numbers.
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    index: u64,
}

impl Random {
    /// The stream of a seed; `stream` keeps several of them apart.
    pub fn new(seed: u64, stream: u64) -> Random {
        Random { seed: draw(seed, stream), index: 0 }
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.index += 1;
        draw(self.seed, self.index)
    }

    /// A number below a limit, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "there is no number below 0");
        self.number() % limit
    }

    /// From 0 to 1, without 1.
    pub fn share(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether something of this likelihood happens.
    pub fn happens(&mut self, likelihood: f64) -> bool {
        self.share() < likelihood
    }

    /// Evenly between two.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.share()
    }

    /// The time until something comes that comes once in `mean`.
    pub fn wait(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(-(1.0 - self.share()).ln())
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}
