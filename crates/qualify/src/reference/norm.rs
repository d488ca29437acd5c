//! Root-mean-square normalisation and its gradients, in f64.

use pontoon_ops::{self as ops, Accumulate, View};

use super::{Expected, Want, accumulated, expected, near, wide};
use crate::memory::{Memory, rounded};

fn normalise(x: &[f64], weight: &[f64], eps: f64) -> (Vec<Want>, Vec<Want>) {
    let width = weight.len();
    let (mut ys, mut rstds) = (Vec::new(), Vec::new());
    for row in x.chunks(width) {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
        let rstd = 1.0 / (mean + eps).sqrt();
        rstds.push(near(rstd, rstd));
        for (x, weight) in row.iter().zip(weight) {
            let value = x * rstd * weight;
            ys.push(near(value, value.abs()));
        }
    }
    (ys, rstds)
}

pub(super) fn rms_norm(op: &ops::RmsNorm, memory: &Memory) -> Vec<Expected> {
    let (x, weight) = (memory.read(&op.x), memory.read(&op.weight));
    let (ys, rstds) = normalise(&x, &weight, wide(op.eps));
    vec![expected(&op.y, ys), expected(&op.rstd, rstds)]
}

pub(super) fn add_rms_norm(op: &ops::AddRmsNorm, memory: &Memory) -> Vec<Expected> {
    let (x, residual) = (memory.read(&op.x), memory.read(&op.residual));
    let weight = memory.read(&op.weight);
    let pairs = || x.iter().zip(&residual);
    let sums = pairs().map(|(x, r)| near(x + r, x.abs() + r.abs())).collect();
    let kept: Vec<f64> = pairs().map(|(x, r)| rounded(op.x.dtype, x + r)).collect();
    let (mut ys, rstds) = normalise(&kept, &weight, wide(op.eps));
    // Where summands cancel, the f32 rounding of the sum is large against what is left of it.
    for (index, (want, (x, r))) in ys.iter_mut().zip(pairs()).enumerate() {
        let Want::Near { rstd } = Want::rstd_of(&rstds[index / weight.len()]);
        if let Want::Near { magnitude, .. } = want {
            *magnitude = (x.abs() + r.abs()) * rstd * weight[index % weight.len()].abs();
        }
    }
    vec![expected(&op.sum, sums), expected(&op.y, ys), expected(&op.rstd, rstds)]
}
