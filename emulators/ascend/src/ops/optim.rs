//! The optimiser's step.

use pontoon_cpu::simd::{Kernel, Simd, dispatch};

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

/// A chunk's step.
struct Step<'a> {
    weights: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grads: &'a [f32],
    settings: Settings,
    step_size: f32,
    root: f32,
}

impl Kernel for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Settings { lr, beta1, beta2, weight_decay, eps, maximize } = self.settings;
        let sign = simd.splat(if maximize { -1.0 } else { 1.0 });
        let [beta1, beta2] = [(beta1, 1.0 - beta1), (beta2, 1.0 - beta2)]
            .map(|(kept, new)| (simd.splat(kept), simd.splat(new)));
        let kept = simd.splat(1.0 - lr * weight_decay);
        let (size, root) = (simd.splat(self.step_size), simd.splat(self.root));
        let eps = simd.splat(eps);
        let len = self.weights.len();
        for at in (0..len).step_by(S::LANES) {
            let end = (at + S::LANES).min(len);
            let g = simd.mul(simd.load(&self.grads[at..end]), sign);
            let m = simd.mul(simd.load(&self.m[at..end]), beta1.0);
            let m = simd.add(m, simd.mul(beta1.1, g));
            let v = simd.mul(simd.load(&self.v[at..end]), beta2.0);
            let v = simd.add(v, simd.mul(beta2.1, simd.mul(g, g)));
            let divisor = simd.add(simd.div(simd.sqrt(v), root), eps);
            let weight = simd.mul(simd.load(&self.weights[at..end]), kept);
            let weight = simd.sub(weight, simd.div(simd.mul(size, m), divisor));
            simd.store(weight, &mut self.weights[at..end]);
            simd.store(m, &mut self.m[at..end]);
            simd.store(v, &mut self.v[at..end]);
        }
    }
}

fn update(run: &Run<'_>, [weight, m, v, grad]: [Slot; 4], step: Slot, settings: Settings) {
    let (isa, step) = (run.engine.isa, run.floats(step)[0]);
    let Settings { lr, beta1, beta2, .. } = settings;
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
        let [weights, m, v, grads] = &mut chunks;
        let step = Step {
            weights: &mut weights[..len],
            m: &mut m[..len],
            v: &mut v[..len],
            grads: &grads[..len],
            settings,
            step_size: lr / bias1,
            root: bias2.sqrt(),
        };
        dispatch(isa, step);
        for (chunk, bound) in chunks.iter().zip(&bounds).take(3) {
            store_floats(isa, bound, start, 1, &chunk[..len], Rounding::Nearest);
        }
    });
}
