//! Routing, sorting by expert and joining, in f64.

use pontoon_ops::{self as ops, Renormalise, RouterRule, Scoring};

use super::linear::sum;
use super::{Expected, Want, exact, expected, near, wide};
use crate::memory::Memory;

/// Scores closer than this may be ordered either way by f32.
const CLOSE: f64 = 1e-6;

/// What sigmoid scores' sum is added to.
const SUM_EPS: f64 = 1e-20;

fn scores(logits: &[f64], scoring: Scoring) -> Vec<f64> {
    match scoring {
        Scoring::Sigmoid => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
        Scoring::Softmax => {
            let peak = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let total: f64 = logits.iter().map(|l| (l - peak).exp()).sum();
            logits.iter().map(|l| (l - peak).exp() / total).collect()
        }
    }
}

/// Indices by falling value, the lower first on ties; and whether the first `kept` are certain.
fn ranked(values: &[f64], kept: usize) -> (Vec<usize>, bool) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    let close = |pair: &[usize]| {
        let gap = values[pair[0]] - values[pair[1]];
        gap != 0.0 && gap < CLOSE
    };
    let certain = !order.windows(2).take(kept).any(close);
    (order, certain)
}

/// The chosen experts, best first, and whether f32 must choose the same.
fn choose(biased: &[f64], rule: &RouterRule) -> (Vec<usize>, bool) {
    let size = biased.len() / rule.groups;
    let mut certain = true;
    let mut values = biased.to_vec();
    if rule.groups > 1 {
        let rank = |group: &[f64]| {
            let (order, _) = ranked(group, 0);
            group[order[0]] + group[order[1]]
        };
        let ranks: Vec<f64> = biased.chunks(size).map(rank).collect();
        let (order, sure) = ranked(&ranks, rule.groups_kept);
        certain &= sure;
        for &group in &order[rule.groups_kept..] {
            values[group * size..][..size].fill(f64::NEG_INFINITY);
        }
    }
    let (order, sure) = ranked(&values, rule.chosen);
    (order[..rule.chosen].to_vec(), certain && sure)
}

/// What becomes of a choice that f32 may make either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Close {
    /// It is not judged.
    Unjudged,
    /// It is made as f64 makes it.
    Made,
}

pub(super) fn router(op: &ops::RouterTopK, memory: &Memory, close: Close) -> Vec<Expected> {
    let (count, chosen) = (op.logits.dim(1), op.rule.chosen);
    let bias = op.bias.map_or(vec![0.0; count], |bias| memory.read(&bias));
    let (mut weights, mut experts) = (Vec::new(), Vec::new());
    for logits in memory.read(&op.logits).chunks(count) {
        if logits.iter().any(|logit| logit.is_nan()) {
            weights.extend(vec![exact(f64::NAN); chosen]);
            experts.extend((0..chosen).map(|expert| exact(expert as f64)));
            continue;
        }
        let scores = scores(logits, op.rule.scoring);
        let biased: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| s + b).collect();
        let (winners, certain) = choose(&biased, &op.rule);
        if !certain && close == Close::Unjudged {
            weights.extend(vec![Want::Unjudged; chosen]);
            experts.extend(vec![Want::Unjudged; chosen]);
            continue;
        }
        let total: f64 = winners.iter().map(|&expert| scores[expert]).sum();
        let size = logits.iter().fold(0.0, |a: f64, l| a.max(l.abs()));
        let divisor = match (op.rule.renormalise, op.rule.scoring) {
            (Renormalise::No, _) => 1.0,
            (Renormalise::Yes, Scoring::Softmax) => total,
            (Renormalise::Yes, Scoring::Sigmoid) => total + SUM_EPS,
        };
        for &expert in &winners {
            let value = scores[expert] / divisor * wide(op.rule.scale);
            let magnitude = value.abs();
            weights.push(Want::Near { value, magnitude, argument: magnitude * size });
            experts.push(exact(expert as f64));
        }
    }
    vec![expected(&op.weights, weights), expected(&op.experts, experts)]
}

pub(super) fn router_bwd(op: &ops::RouterTopKBwd, memory: &Memory) -> Vec<Expected> {
    let (count, chosen) = (op.logits.dim(1), op.rule.chosen);
    let (logits, dweights) = (memory.read(&op.logits), memory.read(&op.dweights));
    let experts = memory.read_integers(&op.experts);
    let scale = wide(op.rule.scale);
    let mut wants = Vec::new();
    for (row, logits) in logits.chunks(count).enumerate() {
        let scores = scores(logits, op.rule.scoring);
        let picked: Vec<usize> =
            experts[row * chosen..][..chosen].iter().map(|&expert| expert as usize).collect();
        let dweights = &dweights[row * chosen..][..chosen];
        let total: f64 = picked.iter().map(|&expert| scores[expert]).sum();
        // Gradient of the scores, with sizes.
        let mut dscores = vec![(0.0, 0.0); count];
        let terms = || picked.iter().zip(dweights).map(|(&e, d)| scores[e] * d / total);
        let (mean, mean_size) = sum(terms());
        for (&expert, &d) in picked.iter().zip(dweights) {
            dscores[expert] = match op.rule.renormalise {
                Renormalise::No => (scale * d, (scale * d).abs()),
                Renormalise::Yes => {
                    (scale * (d - mean) / total, scale.abs() * (d.abs() + mean_size) / total)
                }
            };
        }
        let (spread, _) = sum(dscores.iter().zip(&scores).map(|(d, s)| d.0 * s));
        let spread_size: f64 = dscores.iter().zip(&scores).map(|(d, s)| d.1 * s).sum();
        let argument = logits.iter().fold(0.0, |a: f64, l| a.max(l.abs()));
        for ((value, size), score) in dscores.into_iter().zip(scores) {
            let (value, magnitude) = match op.rule.scoring {
                Scoring::Softmax => (score * (value - spread), score * (size + spread_size)),
                Scoring::Sigmoid => (value * score * (1.0 - score), size * score),
            };
            wants.push(Want::Near { value, magnitude, argument: magnitude * argument });
        }
    }
    vec![expected(&op.dlogits, wants)]
}

pub(super) fn permute(op: &ops::Permute, memory: &Memory) -> Vec<Expected> {
    let x = memory.read(&op.x);
    let (width, chosen) = (op.x.dim(1), op.experts.dim(1));
    let count = op.offsets.dim(0) - 1;
    let experts = memory.read_integers(&op.experts);
    let mut rows: Vec<(usize, usize)> = experts
        .iter()
        .map(|&id| usize::try_from(id).ok().filter(|&id| id < count).unwrap_or(count - 1))
        .zip(0..)
        .collect();
    rows.sort();
    let mut slots = vec![0; rows.len()];
    let mut y = Vec::new();
    for (slot, &(_, copy)) in rows.iter().enumerate() {
        slots[copy] = slot;
        y.extend(x[copy / chosen * width..][..width].iter().map(|&value| exact(value)));
    }
    let offset = |expert: usize| rows.iter().filter(|row| row.0 < expert).count();
    let offsets = (0..=count).map(|expert| exact(offset(expert) as f64)).collect();
    let slots = slots.into_iter().map(|slot| exact(slot as f64)).collect();
    vec![expected(&op.y, y), expected(&op.offsets, offsets), expected(&op.slots, slots)]
}

/// `sum over j of weights[r, j] * x[slots[r, j]]` for every row.
fn join(x: &[f64], weights: &[f64], slots: &[i64], (width, chosen): (usize, usize)) -> Vec<Want> {
    let mut wants = Vec::new();
    for (weights, slots) in weights.chunks(chosen).zip(slots.chunks(chosen)) {
        for column in 0..width {
            let term = |(w, &slot): (&f64, &i64)| w * x[slot as usize * width + column];
            let (value, size) = sum(weights.iter().zip(slots).map(term));
            wants.push(near(value, size));
        }
    }
    wants
}

pub(super) fn permute_bwd(op: &ops::PermuteBwd, memory: &Memory) -> Vec<Expected> {
    let slots = memory.read_integers(&op.slots);
    let sizes = (op.dx.dim(1), op.slots.dim(1));
    let wants = join(&memory.read(&op.dy), &vec![1.0; slots.len()], &slots, sizes);
    vec![expected(&op.dx, wants)]
}

pub(super) fn unpermute(op: &ops::Unpermute, memory: &Memory) -> Vec<Expected> {
    let slots = memory.read_integers(&op.slots);
    let sizes = (op.y.dim(1), op.slots.dim(1));
    let wants = join(&memory.read(&op.x), &memory.read(&op.weights), &slots, sizes);
    vec![expected(&op.y, wants)]
}

pub(super) fn unpermute_bwd(op: &ops::UnpermuteBwd, memory: &Memory) -> Vec<Expected> {
    let [dy, x, weights] = [&op.dy, &op.x, &op.weights].map(|view| memory.read(view));
    let (width, chosen) = (op.dy.dim(1), op.slots.dim(1));
    let mut dx = vec![Want::Kept; x.len()];
    let mut dweights = Vec::new();
    for (copy, slot) in memory.read_integers(&op.slots).into_iter().enumerate() {
        let dy = &dy[copy / chosen * width..][..width];
        let x = &x[slot as usize * width..][..width];
        let (value, size) = sum(dy.iter().zip(x).map(|(dy, x)| dy * x));
        dweights.push(near(value, size));
        for (column, dy) in dy.iter().enumerate() {
            let value = weights[copy] * dy;
            dx[slot as usize * width + column] = near(value, value.abs());
        }
    }
    vec![expected(&op.dx, dx), expected(&op.dweights, dweights)]
}
