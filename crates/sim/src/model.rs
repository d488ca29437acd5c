//! A model of training small enough to be checked at every step: the state is one number, a
//! micro-batch's gradient is a function of (seed, step, micro-batch, weights), a sum of gradients
//! is a sum, and an update stirs the sum into the state. A wrong bit anywhere stays visible.
//!
//! A number's lowest byte is its rounding: each numeric class rounds in its own way, and whoever
//! computes on takes the rounding of what went in along. What two classes compute from the same
//! numbers differs in that byte alone.

use crate::chaos::draw;

/// What is trained.
#[derive(Clone, Copy, Debug)]
pub struct TinyModel {
    /// Decides the data and the first weights.
    pub seed: u64,
    /// Micro-batches of a step.
    pub leaves: u32,
}

/// The lowest byte.
const ROUNDING: u64 = 0xFF;

/// A number as if nobody had rounded it.
pub fn exact(value: u64) -> u64 {
    value & !ROUNDING
}

/// A numeric class: equal inputs give equal bits within one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Class(pub u8);

impl Class {
    /// Its name, as devices tell it.
    pub fn name(self) -> String {
        format!("simulated-{}", self.0)
    }

    /// A result as this class rounds it, from inputs that were rounded before.
    fn round(self, result: u64, inputs: u64) -> u64 {
        exact(result) | (inputs.wrapping_add(37 * u64::from(self.0)) & ROUNDING)
    }
}

/// The sum of two gradients; what was rounded in either is in it.
pub fn plus(one: u64, other: u64) -> u64 {
    exact(one).wrapping_add(exact(other)) | (one.wrapping_add(other) & ROUNDING)
}

impl TinyModel {
    /// The state before the first step.
    pub fn first(&self) -> u64 {
        exact(draw(self.seed, 1))
    }

    /// The gradient of one micro-batch.
    pub fn gradient(&self, step: u64, leaf: u32, weights: u64, class: Class) -> u64 {
        let value = draw(exact(weights) ^ self.seed, (step << 20) ^ u64::from(leaf));
        class.round(value, weights)
    }

    /// The loss of one micro-batch.
    pub fn loss(gradient: u64) -> f64 {
        1.0 + (gradient >> 40) as f64 / (1_u64 << 26) as f64
    }
}

/// The weights that a state computes with.
pub fn weights_of(state: u64) -> u64 {
    exact(draw(exact(state), 2)) | (state & ROUNDING)
}

/// The state after a sum of gradients was applied.
pub fn applied(state: u64, sum: u64, class: Class) -> u64 {
    class.round(draw(exact(state) ^ exact(sum).rotate_left(17), 3), state.wrapping_add(sum))
}

/// What is told of a value.
pub fn digest(value: u64) -> u64 {
    draw(value, 4)
}

/// The states that an undisturbed run goes through, not rounded.
#[derive(Clone, Debug)]
pub struct Truth {
    /// What is trained.
    pub model: TinyModel,
    /// By step, from 0.
    states: Vec<u64>,
}

impl Truth {
    /// Knows the first state.
    pub fn new(model: TinyModel) -> Truth {
        Truth { model, states: vec![model.first()] }
    }

    /// The state after a step.
    pub fn state(&mut self, step: u64) -> u64 {
        while self.states.len() as u64 <= step {
            let next = self.states.len() as u64;
            let state = self.states[next as usize - 1];
            let weights = weights_of(state);
            let class = Class::default();
            let leaves = 0..self.model.leaves;
            let gradients = leaves.map(|leaf| self.model.gradient(next, leaf, weights, class));
            self.states.push(exact(applied(state, gradients.fold(0, plus), class)));
        }
        self.states[step as usize]
    }

    /// The sum of a step's losses.
    pub fn loss(&mut self, step: u64) -> f64 {
        let weights = weights_of(self.state(step - 1));
        let leaves = 0..self.model.leaves;
        let gradient = |leaf| self.model.gradient(step, leaf, weights, Class::default());
        leaves.map(|leaf| TinyModel::loss(gradient(leaf))).sum()
    }
}
