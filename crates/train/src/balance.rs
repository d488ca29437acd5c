//! Even loads of experts without a loss term: the bias by which a router chooses moves a little
//! against each expert's load, step by step, as in DeepSeek-V3.
//!
//! The training program counts the choices behind the gradient, so counts are summed along the
//! tree, exchanged between workers and checked as gradients are; they are whole numbers, exact in
//! f32 up to 16 million choices of one expert a step. Read next: `optimizer.rs`.

use std::ops::Range;

use pontoon_models::Model;
use pontoon_ops::{Backend, BufferId};
use pontoon_program::{Class, Memory};

use crate::error::TrainError;
use crate::optimizer::GRADIENT;

/// The end of the name of a router's bias.
const BIAS: &str = ".e_score_correction_bias";

/// The biases of a model on a device.
#[derive(Debug)]
pub(crate) struct Balance {
    frozen: BufferId,
    gradient: BufferId,
    /// Where the counts begin in the gradient's buffer.
    counts_byte: usize,
    /// The elements of each bias.
    biases: Vec<Range<usize>>,
    speed: f32,
    /// All frozen values on the host, and their counts: made once, filled in every step.
    values: Vec<f32>,
    counts: Vec<f32>,
}

impl Balance {
    /// The biases of a model whose weights are loaded; none if its routers have none.
    pub(crate) fn load(memory: &Memory, model: &Model, speed: f64) -> Option<Balance> {
        let is_bias = |parameter: &&pontoon_program::Parameter| {
            parameter.spec.class == Class::Frozen && parameter.spec.name.ends_with(BIAS)
        };
        let place = |parameter: &pontoon_program::Parameter| {
            parameter.element_offset..parameter.element_offset + parameter.elements()
        };
        let biases: Vec<_> = model.table.parameters().iter().filter(is_bias).map(place).collect();
        if biases.is_empty() {
            return None;
        }
        let buffer = |name: &str| memory.get(name).expect("weights and gradients are loaded").0;
        Some(Balance {
            frozen: buffer("frozen"),
            gradient: buffer(GRADIENT),
            counts_byte: 4 * model.table.trainable_elements(),
            biases,
            speed: speed as f32,
            values: vec![0.0; model.table.frozen_elements()],
            counts: vec![0.0; model.table.frozen_elements()],
        })
    }

    /// Moves every bias by the step's counts. Returns by what share of the mean load the busiest
    /// expert is above it, in the layer where that is most.
    pub(crate) fn apply(&mut self, backend: &mut dyn Backend) -> Result<f64, TrainError> {
        let Balance { values, counts, speed, .. } = self;
        backend.download(self.frozen, 0, bytemuck::cast_slice_mut(values))?;
        backend.download(self.gradient, self.counts_byte, bytemuck::cast_slice_mut(counts))?;
        let mut imbalance = 0.0_f64;
        for range in &self.biases {
            let above = level(&mut values[range.clone()], &counts[range.clone()], *speed);
            imbalance = imbalance.max(above);
        }
        backend.upload(self.frozen, 0, bytemuck::cast_slice(values))?;
        Ok(imbalance)
    }
}

/// Raises the bias of each expert below the mean load by `speed` and lowers that of each above it.
/// Returns by what share of the mean the largest load is above it.
fn level(bias: &mut [f32], load: &[f32], speed: f32) -> f64 {
    assert_eq!(bias.len(), load.len());
    let total: f64 = load.iter().map(|&count| f64::from(count)).sum();
    let mean = total / load.len().max(1) as f64;
    let mut most = 0.0_f64;
    for (bias, &count) in bias.iter_mut().zip(load) {
        let count = f64::from(count);
        most = most.max(count);
        if count < mean {
            *bias += speed;
        } else if count > mean {
            *bias -= speed;
        }
    }
    if mean > 0.0 { most / mean - 1.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_move_against_the_load_and_stay_where_it_is_even() {
        let mut bias = [0.0, 1.0, 0.0, -1.0];
        assert_eq!(level(&mut bias, &[8.0, 4.0, 4.0, 0.0], 0.25), 1.0);
        assert_eq!(bias, [-0.25, 1.0, 0.0, -0.75]);
        assert_eq!(level(&mut bias, &[0.0; 4], 0.25), 0.0);
        assert_eq!(bias, [-0.25, 1.0, 0.0, -0.75]);
    }
}
