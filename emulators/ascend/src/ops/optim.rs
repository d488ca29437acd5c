//! The optimiser's step.

use super::Run;
use super::strided::{CHUNK, Rounding, load_floats, store_floats};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::plan::{Access, Argument, Plan, Slot};

/// The numbers of a step.
#[derive(Clone, Copy)]
pub struct Settings {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Added to the root.
    pub eps: f32,
    /// Whether the gradient's sign is turned.
    pub maximize: bool,
}

/// The tensors of a step.
pub struct Tensors<'a> {
    /// Weights.
    pub weight: &'a Argument,
    /// First moments.
    pub m: &'a Argument,
    /// Second moments.
    pub v: &'a Argument,
    /// Gradients.
    pub grad: &'a Argument,
    /// The step's number, `[1]`.
    pub step: &'a Argument,
}

/// AdamW: moments and weights in place.
pub fn adamw(plan: &mut Plan, tensors: &Tensors<'_>, settings: Settings) -> Done {
    let shape = &tensors.weight.tensor.shape;
    for argument in [tensors.m, tensors.v, tensors.grad] {
        plan.demand(argument.tensor.shape == *shape, || {
            format!("moments and gradient should be {shape:?}, not {:?}", argument.tensor.shape)
        })?;
    }
    for argument in [tensors.weight, tensors.m, tensors.v, tensors.grad] {
        let tensor = &argument.tensor;
        plan.demand(tensor.dtype.is_float() && tensor.span() == tensor.elements(), || {
            "operands should be contiguous floats".to_owned()
        })?;
    }
    let step = &tensors.step.tensor;
    let number = matches!(step.dtype, DataType::F32 | DataType::I64);
    plan.demand(number && step.elements() == 1, || "step should be one number".to_owned())?;
    let weight = plan.operand("varRef", tensors.weight, Access::Both);
    let m = plan.operand("mRef", tensors.m, Access::Both);
    let v = plan.operand("vRef", tensors.v, Access::Both);
    let (grad, step) = (plan.read("grad", tensors.grad), plan.read("step", tensors.step));
    plan.run(move |run| {
        update(run, [weight, m, v, grad], step, settings);
        Ok(())
    })
}

fn update(run: &Run<'_>, [weight, m, v, grad]: [Slot; 4], step: Slot, settings: Settings) {
    let (isa, step) = (run.engine.isa, run.floats(step)[0]);
    let Settings { lr, beta1, beta2, weight_decay, eps, maximize } = settings;
    let (bias1, bias2) = (1.0 - beta1.powf(step), 1.0 - beta2.powf(step));
    let bounds = [weight, m, v, grad].map(|slot| run.at(slot));
    let elements = bounds[0].elements();
    run.engine.pool.run(elements.div_ceil(CHUNK), |task| {
        let start = task * CHUNK;
        let len = CHUNK.min(elements - start);
        let mut chunks = [[0.0_f32; CHUNK]; 4];
        for (chunk, bound) in chunks.iter_mut().zip(&bounds) {
            load_floats(isa, bound, start, 1, &mut chunk[..len]);
        }
        let [weights, firsts, seconds, grads] = &mut chunks;
        let step_size = lr / bias1;
        let root = bias2.sqrt();
        for index in 0..len {
            let g = if maximize { -grads[index] } else { grads[index] };
            let first = beta1 * firsts[index] + (1.0 - beta1) * g;
            let second = beta2 * seconds[index] + (1.0 - beta2) * g * g;
            let kept = weights[index] * (1.0 - lr * weight_decay);
            weights[index] = kept - step_size * first / (second.sqrt() / root + eps);
            firsts[index] = first;
            seconds[index] = second;
        }
        for (chunk, bound) in chunks.iter().zip(&bounds).take(3) {
            store_floats(isa, bound, start, 1, &chunk[..len], Rounding::Nearest);
        }
    });
}
