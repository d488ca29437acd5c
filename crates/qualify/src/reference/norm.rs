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
    let (ys, rstds) = normalise(&kept, &weight, wide(op.eps));
    vec![expected(&op.sum, sums), expected(&op.y, ys), expected(&op.rstd, rstds)]
}

/// What both gradients share.
struct Backward<'a> {
    dy: &'a View,
    dsum: Option<&'a View>,
    x: &'a View,
    weight: &'a View,
    rstd: &'a View,
    dx: &'a View,
    dweight: &'a View,
    accumulate: Accumulate,
}

impl Backward<'_> {
    fn run(&self, memory: &Memory) -> Vec<Expected> {
        let [dy, x, weight, rstd] =
            [self.dy, self.x, self.weight, self.rstd].map(|view| memory.read(view));
        let dsum = self.dsum.map(|view| memory.read(view));
        let width = weight.len();
        let mut dxs = Vec::new();
        let mut dweights = vec![(0.0, 0.0); width];
        for (row, rstd) in rstd.into_iter().enumerate() {
            let at = |column: usize| row * width + column;
            let n = |column: usize| x[at(column)] * rstd;
            let g = |column: usize| dy[at(column)] * weight[column];
            let mean = (0..width).map(|c| g(c) * n(c)).sum::<f64>() / width as f64;
            let size = (0..width).map(|c| (g(c) * n(c)).abs()).sum::<f64>() / width as f64;
            for (column, dweight) in dweights.iter_mut().enumerate() {
                let extra = dsum.as_ref().map_or(0.0, |dsum| dsum[at(column)]);
                let value = extra + rstd * (g(column) - n(column) * mean);
                let terms = rstd.abs() * (g(column).abs() + n(column).abs() * size);
                dxs.push(near(value, terms + extra.abs()));
                let term = dy[at(column)] * n(column);
                *dweight = (dweight.0 + term, dweight.1 + term.abs());
            }
        }
        let dweights = dweights.into_iter().map(|(value, size)| near(value, size)).collect();
        let dweight = accumulated(memory, self.dweight, dweights, self.accumulate);
        vec![expected(self.dx, dxs), dweight]
    }
}

pub(super) fn rms_norm_bwd(op: &ops::RmsNormBwd, memory: &Memory) -> Vec<Expected> {
    let ops::RmsNormBwd { dy, x, weight, rstd, dx, dweight, accumulate } = op;
    let accumulate = *accumulate;
    Backward { dy, dsum: None, x, weight, rstd, dx, dweight, accumulate }.run(memory)
}

pub(super) fn add_rms_norm_bwd(op: &ops::AddRmsNormBwd, memory: &Memory) -> Vec<Expected> {
    let ops::AddRmsNormBwd { dy, dsum, sum, weight, rstd, dx, dweight, accumulate } = op;
    let (dsum, accumulate) = (dsum.as_ref(), *accumulate);
    Backward { dy, dsum, x: sum, weight, rstd, dx, dweight, accumulate }.run(memory)
}
