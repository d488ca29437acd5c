//! Optimisers and reductions, in f64.

use pontoon_ops::{self as ops, MUON_COEFFICIENTS, MUON_EPS, MUON_RMS, MUON_STEPS, View, hyper};

use super::linear::sum;
use super::{Expected, Want, accumulated, expected, near, wide};
use crate::memory::Memory;

fn with_copy(weight: &View, compute: &Option<View>, wants: Vec<Want>) -> Vec<Expected> {
    let copy = compute.map(|view| expected(&view, wants.clone()));
    [expected(weight, wants)].into_iter().chain(copy).collect()
}

pub(super) fn adamw(op: &ops::AdamW, memory: &Memory) -> Vec<Expected> {
    let [weight, grad, m, v] = [&op.weight, &op.grad, &op.m, &op.v].map(|view| memory.read(view));
    let h = memory.read(&op.hyper);
    let (b1, b2, lr) = (h[hyper::BETA1], h[hyper::BETA2], h[hyper::LR]);
    let (mut weights, mut ms, mut vs) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..weight.len() {
        let g = h[hyper::GRAD_SCALE] * grad[index];
        let (old, new) = (b1 * m[index], (1.0 - b1) * g);
        let m = old + new;
        let m_size = old.abs() + new.abs();
        let v = b2 * v[index] + (1.0 - b2) * g * g;
        let root = (v / h[hyper::BIAS2]).sqrt() + h[hyper::EPS];
        let kept = weight[index] * (1.0 - lr * h[hyper::WEIGHT_DECAY]);
        let update = |m: f64| lr * (m / h[hyper::BIAS1]) / root;
        weights.push(near(kept - update(m), kept.abs() + update(m_size).abs()));
        ms.push(near(m, m_size));
        vs.push(near(v, v));
    }
    let mut all = with_copy(&op.weight, &op.compute, weights);
    all.extend([expected(&op.m, ms), expected(&op.v, vs)]);
    all
}

/// `a b` of [m, k] and [k, n].
fn product(a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let at = |i: usize| (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum();
    (0..m * n).map(at).collect()
}

/// Newton-Schulz steps that bring the singular values of a [rows, columns] matrix near one.
fn orthogonalised(u: &[f64], (rows, columns): (usize, usize)) -> Vec<f64> {
    let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt() + wide(MUON_EPS);
    let mut x: Vec<f64> = u.iter().map(|x| x / norm).collect();
    let [a, b, c] = MUON_COEFFICIENTS.map(wide);
    for _ in 0..MUON_STEPS {
        let turned: Vec<f64> = (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect();
        let gram = product(&x, &turned, (rows, rows, columns));
        let square = product(&gram, &gram, (rows, rows, rows));
        let poly: Vec<f64> = gram.iter().zip(&square).map(|(g, s)| b * g + c * s).collect();
        let next = product(&poly, &x, (rows, columns, rows));
        x = x.iter().zip(&next).map(|(x, next)| a * x + next).collect();
    }
    x
}

pub(super) fn muon(op: &ops::Muon, memory: &Memory) -> Vec<Expected> {
    let [weight, grad, momentum] =
        [&op.weight, &op.grad, &op.momentum].map(|view| memory.read(view));
    let h = memory.read(&op.hyper);
    let rank = op.weight.shape.rank();
    let (rows, columns) = (op.weight.dim(rank - 2), op.weight.dim(rank - 1));
    let (beta, lr) = (h[hyper::BETA1], h[hyper::LR]);
    let rate = lr * wide(MUON_RMS) * (rows.max(columns) as f64).sqrt();
    let (mut weights, mut momenta) = (Vec::new(), Vec::new());
    for start in (0..weight.len()).step_by(rows * columns) {
        let mut u = Vec::new();
        for index in start..start + rows * columns {
            let g = h[hyper::GRAD_SCALE] * grad[index];
            let (old, new) = (beta * momentum[index], (1.0 - beta) * g);
            momenta.push(near(old + new, old.abs() + new.abs()));
            u.push((1.0 - beta) * g + beta * (old + new));
        }
        let o = orthogonalised(&u, (rows, columns));
        let size = o.iter().fold(0.0, |a: f64, o| a.max(o.abs()));
        for (index, o) in o.iter().enumerate() {
            let kept = weight[start + index] * (1.0 - lr * h[hyper::WEIGHT_DECAY]);
            // The tolerance's factor is for the update; the kept weight is rounded once.
            weights.push(near(kept - rate * o, rate * size + kept.abs() / 1024.0));
        }
    }
    let mut all = with_copy(&op.weight, &op.compute, weights);
    all.push(expected(&op.momentum, momenta));
    all
}

pub(super) fn sum_squares(op: &ops::SumSquares, memory: &Memory) -> Vec<Expected> {
    let (value, size) = sum(memory.read(&op.x).into_iter().map(|x| x * x));
    vec![expected(&op.y, vec![near(value, size)])]
}

pub(super) fn reduce_tree(op: &ops::ReduceTree, memory: &Memory) -> Vec<Expected> {
    let x = memory.read(&op.x);
    let (parts, inner) = (op.x.dim(0), op.y.elements());
    let want = |index: usize| {
        let (value, size) = sum((0..parts).map(|part| x[part * inner + index]));
        near(value, size)
    };
    let wants = (0..inner).map(want).collect();
    vec![accumulated(memory, &op.y, wants, op.accumulate)]
}
