//! A model of training small enough to be checked at every step: the state is one number, a
//! micro-batch's gradient is a function of (seed, step, micro-batch, weights), a sum of gradients
//! is a sum, and an update stirs the sum into the state. A wrong bit anywhere stays visible.

use crate::chaos::draw;

/// What is trained.
#[derive(Clone, Copy, Debug)]
pub struct TinyModel {
    /// Decides the data and the first weights.
    pub seed: u64,
    /// Micro-batches of a step.
    pub leaves: u32,
}

impl TinyModel {
    /// The state before the first step.
    pub fn first(&self) -> u64 {
        draw(self.seed, 1)
    }

    /// The gradient of one micro-batch.
    pub fn gradient(&self, step: u64, leaf: u32, weights: u64) -> u64 {
        draw(weights ^ self.seed, (step << 20) ^ u64::from(leaf))
    }

    /// The loss of one micro-batch.
    pub fn loss(gradient: u64) -> f64 {
        1.0 + (gradient >> 40) as f64 / (1_u64 << 26) as f64
    }
}

/// The weights that a state computes with.
pub fn weights_of(state: u64) -> u64 {
    draw(state, 2)
}

/// The state after a sum of gradients was applied.
pub fn applied(state: u64, sum: u64) -> u64 {
    draw(state ^ sum.rotate_left(17), 3)
}

/// What is told of a value.
pub fn digest(value: u64) -> u64 {
    draw(value, 4)
}

/// The states that an undisturbed run goes through.
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
            let gradients = (0..self.model.leaves).map(|l| self.model.gradient(next, l, weights));
            self.states.push(applied(state, gradients.fold(0, u64::wrapping_add)));
        }
        self.states[step as usize]
    }

    /// The sum of a step's losses.
    pub fn loss(&mut self, step: u64) -> f64 {
        let weights = weights_of(self.state(step - 1));
        let leaves = 0..self.model.leaves;
        leaves.map(|leaf| TinyModel::loss(self.model.gradient(step, leaf, weights))).sum()
    }
}
