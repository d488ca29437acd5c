//! Losses and log-probabilities over the output head, in f64.

use pontoon_ops::{self as ops, Accumulate, IGNORED, View};

use super::linear::{dot, sum};
use super::{Expected, Want, accumulated, expected, near, wide};
use crate::memory::Memory;

/// What all four operations read.
struct Head<'a> {
    x: &'a View,
    head: &'a View,
    /// The scales of a quantised head, and how many columns share one.
    scales: Option<(&'a View, usize)>,
    targets: &'a View,
    temperature: f64,
}

/// One row's distribution.
struct Row {
    /// Logits over the temperature.
    logits: Vec<f64>,
    /// The largest sum of absolute terms of a logit.
    size: f64,
    lse: f64,
    target: i64,
}

impl Row {
    fn target(&self) -> Option<usize> {
        usize::try_from(self.target).ok().filter(|&target| target < self.logits.len())
    }

    fn log_prob(&self) -> Want {
        match self.target() {
            Some(target) => self.near(self.logits[target] - self.lse),
            None if self.target == i64::from(IGNORED) => near(0.0, 0.0),
            None => near(f64::NAN, 0.0),
        }
    }

    fn near(&self, value: f64) -> Want {
        near(value, self.size + self.lse.abs())
    }

    fn entropy(&self) -> Want {
        let term =
            |l: &f64| if *l == f64::NEG_INFINITY { 0.0 } else { self.p(*l) * (self.lse - l) };
        let (value, magnitude) = sum(self.logits.iter().map(term));
        Want::Near { value, magnitude, argument: (1.0 + magnitude) * self.size }
    }

    fn p(&self, logit: f64) -> f64 {
        (logit - self.lse).exp()
    }
}

fn rows(head: &Head<'_>, memory: &Memory) -> Vec<Row> {
    let (x, mut weight) = (memory.read(head.x), memory.read(head.head));
    let width = head.x.dim(1);
    if let Some((view, block)) = head.scales {
        let (scales, blocks) = (memory.read(view), view.dim(1));
        for (index, value) in weight.iter_mut().enumerate() {
            *value *= scales[index / width * blocks + index % width / block];
        }
    }
    let one = |(x, target): (&[f64], i64)| {
        let mut size: f64 = 0.0;
        let logit = |weight: &[f64]| {
            let (value, terms) = dot(x, weight);
            size = size.max(terms / head.temperature);
            value / head.temperature
        };
        let logits: Vec<f64> = weight.chunks(width).map(logit).collect();
        let peak =
            logits.iter().fold(f64::NEG_INFINITY, |a, &b| if b.is_nan() { b } else { a.max(b) });
        let lse = peak + logits.iter().map(|l| (l - peak).exp()).sum::<f64>().ln();
        Row { logits, size, lse, target }
    };
    x.chunks(width).zip(memory.read_integers(head.targets)).map(one).collect()
}

fn negated(want: Want) -> Want {
    match want {
        Want::Near { value, magnitude, argument } => {
            Want::Near { value: -value, magnitude, argument }
        }
        other => other,
    }
}

/// Where gradients go.
struct Gradients<'a> {
    upstream: &'a View,
    /// 1 for a loss, -1 for a log-probability.
    sign: f64,
    dx: &'a View,
    dhead: &'a View,
    accumulate: Accumulate,
}

fn gradients(head: &Head<'_>, to: &Gradients<'_>, rows: &[Row], memory: &Memory) -> Vec<Expected> {
    let (x, weight) = (memory.read(head.x), memory.read(head.head));
    let upstream = memory.read(to.upstream);
    let width = head.x.dim(1);
    let mut dx = vec![[0.0; 3]; x.len()];
    let mut dhead = vec![[0.0; 3]; weight.len()];
    for (index, row) in rows.iter().enumerate() {
        // An ignored row still meets the products, with zeros: what is not finite shows.
        let ignored = row.target == i64::from(IGNORED);
        let factor = to.sign * upstream[index] / head.temperature;
        for (token, &logit) in row.logits.iter().enumerate() {
            let hit = if row.target() == Some(token) { 1.0 } else { 0.0 };
            let p = if row.target().is_some() { row.p(logit) } else { f64::NAN };
            let (value, size) = match ignored {
                true => (0.0, 0.0),
                false => (factor * (p - hit), factor.abs() * (p + hit)),
            };
            let argument = size * (row.size + row.lse.abs());
            let add = |sum: &mut [f64; 3], other: f64| {
                let by = other.abs();
                *sum = [sum[0] + value * other, sum[1] + size * by, sum[2] + argument * by];
            };
            for column in 0..width {
                add(&mut dx[index * width + column], weight[token * width + column]);
                add(&mut dhead[token * width + column], x[index * width + column]);
            }
        }
    }
    let wants = |sums: Vec<[f64; 3]>| {
        let want =
            |[value, magnitude, argument]: [f64; 3]| Want::Near { value, magnitude, argument };
        sums.into_iter().map(want).collect::<Vec<Want>>()
    };
    let dhead = accumulated(memory, to.dhead, wants(dhead), to.accumulate);
    vec![expected(to.dx, wants(dx)), dhead]
}

fn losses(rows: &[Row], loss: &View, lse: &View) -> Vec<Expected> {
    let losses = rows.iter().map(|row| negated(row.log_prob())).collect();
    let lses = rows.iter().map(|row| row.near(row.lse)).collect();
    vec![expected(loss, losses), expected(lse, lses)]
}

pub(super) fn cross_entropy(op: &ops::CrossEntropy, memory: &Memory) -> Vec<Expected> {
    let ops::CrossEntropy { x, head, targets, loss, lse } = op;
    losses(&rows(&Head { x, head, scales: None, targets, temperature: 1.0 }, memory), loss, lse)
}

pub(super) fn cross_entropy_bwd(op: &ops::CrossEntropyBwd, memory: &Memory) -> Vec<Expected> {
    let ops::CrossEntropyBwd { x, head, targets, dloss, loss, lse, dx, dhead, accumulate } = op;
    let head = Head { x, head, scales: None, targets, temperature: 1.0 };
    let to = Gradients { upstream: dloss, sign: 1.0, dx, dhead, accumulate: *accumulate };
    let rows = rows(&head, memory);
    let mut all = losses(&rows, loss, lse);
    all.extend(gradients(&head, &to, &rows, memory));
    all
}

pub(super) fn token_log_prob(op: &ops::TokenLogProb, memory: &Memory) -> Vec<Expected> {
    let ops::TokenLogProb { x, head, targets, temperature, logprob, entropy, .. } = op;
    let scales = op.scales.as_ref().map(|scales| (scales, op.block_k));
    let rows = rows(&Head { x, head, scales, targets, temperature: wide(*temperature) }, memory);
    let logprobs = rows.iter().map(Row::log_prob).collect();
    let entropies = rows.iter().map(Row::entropy).collect();
    vec![expected(logprob, logprobs), expected(entropy, entropies)]
}

pub(super) fn token_log_prob_bwd(op: &ops::TokenLogProbBwd, memory: &Memory) -> Vec<Expected> {
    let ops::TokenLogProbBwd { x, head, targets, temperature, dlogprob, dx, dhead, accumulate } =
        op;
    let head = Head { x, head, scales: None, targets, temperature: wide(*temperature) };
    let to = Gradients { upstream: dlogprob, sign: -1.0, dx, dhead, accumulate: *accumulate };
    gradients(&head, &to, &rows(&head, memory), memory)
}
