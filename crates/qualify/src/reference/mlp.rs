//! The gated activation and its gradient, in f64.

use pontoon_ops as ops;

use super::{Expected, Want, expected, near};
use crate::memory::Memory;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(super) fn swiglu(op: &ops::SwiGlu, memory: &Memory) -> Vec<Expected> {
    let (gate, up) = (memory.read(&op.gate), memory.read(&op.up));
    let value = |(g, u): (&f64, f64)| {
        let value = g * sigmoid(*g) * u;
        let argument = value.abs() * g.abs();
        Want::Near { value, magnitude: value.abs(), argument }
    };
    vec![expected(&op.y, gate.iter().zip(up).map(value).collect())]
}

pub(super) fn swiglu_bwd(op: &ops::SwiGluBwd, memory: &Memory) -> Vec<Expected> {
    let [dy, gate, up] = [&op.dy, &op.gate, &op.up].map(|view| memory.read(view));
    let (mut dgates, mut dups) = (Vec::new(), Vec::new());
    for ((dy, g), up) in dy.into_iter().zip(gate).zip(up) {
        let s = sigmoid(g);
        let size = (dy * up * s).abs() * (1.0 + g.abs());
        let value = dy * up * s * (1.0 + g * (1.0 - s));
        dgates.push(Want::Near { value, magnitude: size, argument: size * g.abs() });
        let value = dy * g * s;
        let argument = value.abs() * g.abs();
        dups.push(if value.is_nan() {
            near(value, 0.0)
        } else {
            Want::Near { value, magnitude: value.abs(), argument }
        });
    }
    vec![expected(&op.dgate, dgates), expected(&op.dup, dups)]
}
