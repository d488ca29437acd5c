//! Choosing experts: scores, group limit, top k, and the gradient of the weights.
//!
//! Rows are small (tens to hundreds of experts), so this is scalar code, parallel over rows.

use pontoon_ops::{self as ops, Renormalise, RouterRule, Scoring};

use super::{Context, Done, row_stride, rows_per_task};
use crate::ffi::Parts;

/// Added to the sum of sigmoid scores before it divides.
const SIGMOID_SUM_EPS: f32 = 1e-20;

fn scores(logits: &[f32], scoring: Scoring, to: &mut [f32]) {
    match scoring {
        Scoring::Sigmoid => {
            for (to, logit) in to.iter_mut().zip(logits) {
                *to = 1.0 / (1.0 + (-logit).exp());
            }
        }
        Scoring::Softmax => {
            let peak = logits.iter().fold(f32::NEG_INFINITY, |peak, &l| peak.max(l));
            let mut total = 0.0;
            for (to, logit) in to.iter_mut().zip(logits) {
                *to = (logit - peak).exp();
                total += *to;
            }
            to.iter_mut().for_each(|score| *score /= total);
        }
    }
}

/// The index of the largest value that is not taken; the lowest on ties.
fn best(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

/// Masks the experts of all but the best groups; a group ranks by the sum of its two best.
fn limit_groups(biased: &mut [f32], rule: &RouterRule) {
    let size = biased.len() / rule.groups;
    let mut ranks: Vec<f32> = biased.chunks(size).map(sum_of_two_best).collect();
    let mut kept = vec![false; rule.groups];
    for _ in 0..rule.groups_kept {
        let group = best(&ranks);
        kept[group] = true;
        ranks[group] = f32::NEG_INFINITY;
    }
    for (group, experts) in biased.chunks_mut(size).enumerate() {
        if !kept[group] {
            experts.fill(f32::NEG_INFINITY);
        }
    }
}

fn sum_of_two_best(values: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in values {
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    first + second
}

/// Working values of one row.
struct Row {
    scores: Vec<f32>,
    biased: Vec<f32>,
}

fn choose(
    row: &mut Row,
    logits: &[f32],
    bias: Option<&[f32]>,
    rule: &RouterRule,
    (weights, experts): (&mut [f32], &mut [i32]),
) {
    if logits.iter().any(|logit| logit.is_nan()) {
        weights.fill(f32::NAN);
        experts.iter_mut().enumerate().for_each(|(index, expert)| *expert = index as i32);
        return;
    }
    scores(logits, rule.scoring, &mut row.scores);
    row.biased.copy_from_slice(&row.scores);
    if let Some(bias) = bias {
        row.biased.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
    }
    if rule.groups > 1 {
        limit_groups(&mut row.biased, rule);
    }
    let mut total = 0.0;
    for (weight, expert) in weights.iter_mut().zip(experts.iter_mut()) {
        let chosen = best_untaken(&row.biased);
        *expert = chosen as i32;
        *weight = row.scores[chosen];
        total += *weight;
        row.biased[chosen] = f32::NAN;
    }
    if rule.renormalise == Renormalise::Yes {
        let eps = if rule.scoring == Scoring::Sigmoid { SIGMOID_SUM_EPS } else { 0.0 };
        weights.iter_mut().for_each(|weight| *weight /= total + eps);
    }
    weights.iter_mut().for_each(|weight| *weight *= rule.scale);
}

/// The largest value, the lowest index on ties; taken ones are NaN. Minus infinity counts.
fn best_untaken(values: &[f32]) -> usize {
    let mut best: Option<usize> = None;
    for (index, value) in values.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|best| *value > values[best]) {
            best = Some(index);
        }
    }
    best.expect("the rule chooses no more experts than there are")
}

pub(super) fn router_top_k(context: &mut Context<'_>, op: &ops::RouterTopK) -> Done {
    let logits = context.operands.read::<f32>(&op.logits)?;
    let bias = op.bias.map(|bias| context.operands.read::<f32>(&bias)).transpose()?;
    let weights = context.operands.write::<f32>(&op.weights)?;
    let experts = context.operands.write::<i32>(&op.experts)?;
    let (rows, count) = (op.logits.dim(0), op.logits.dim(1));
    let (logit_s, weight_s, expert_s) =
        (row_stride(&op.logits), row_stride(&op.weights), row_stride(&op.experts));
    let (rule, chosen) = (op.rule, op.rule.chosen);
    let per_task = rows_per_task(rows, count * 16);
    let weights = Parts::new(weights, weight_s * per_task);
    let experts = Parts::new(experts, expert_s * per_task);
    context.pool.run(rows.div_ceil(per_task), |task| {
        let (weights, experts) = (weights.take(task), experts.take(task));
        let mut row = Row { scores: vec![0.0; count], biased: vec![0.0; count] };
        for index in 0..per_task.min(rows - task * per_task) {
            let logits = &logits[(task * per_task + index) * logit_s..][..count];
            let weights = &mut weights[index * weight_s..][..chosen];
            let experts = &mut experts[index * expert_s..][..chosen];
            choose(&mut row, logits, bias, &rule, (weights, experts));
        }
    });
    Ok(())
}

/// The gradient of one row's weights with the choice held fixed.
fn choose_bwd(
    scores_of_row: &mut [f32],
    (logits, experts, dweights): (&[f32], &[i32], &[f32]),
    rule: &RouterRule,
    dlogits: &mut [f32],
) {
    let count = logits.len();
    let chosen = |expert: &i32| usize::try_from(*expert).ok().filter(|&expert| expert < count);
    scores(logits, rule.scoring, scores_of_row);
    // Gradient of the chosen scores, before the scores' own function.
    let picked: Vec<f32> = experts
        .iter()
        .map(|expert| chosen(expert).map_or(f32::NAN, |expert| scores_of_row[expert]))
        .collect();
    let eps = if rule.scoring == Scoring::Sigmoid { SIGMOID_SUM_EPS } else { 0.0 };
    let total = picked.iter().sum::<f32>() + eps;
    let dot: f32 = picked.iter().zip(dweights).map(|(score, dweight)| score * dweight).sum();
    dlogits.fill(0.0);
    let mut spread = 0.0;
    for ((expert, &score), &dweight) in experts.iter().zip(&picked).zip(dweights) {
        let dscore = rule.scale
            * match rule.renormalise {
                Renormalise::No => dweight,
                Renormalise::Yes => (dweight - dot / total) / total,
            };
        if let Some(expert) = chosen(expert) {
            dlogits[expert] += dscore;
            spread += dscore * score;
        }
    }
    for (dlogit, &score) in dlogits.iter_mut().zip(&*scores_of_row) {
        *dlogit = match rule.scoring {
            Scoring::Softmax => score * (*dlogit - spread),
            Scoring::Sigmoid => *dlogit * score * (1.0 - score),
        };
    }
}

pub(super) fn router_top_k_bwd(context: &mut Context<'_>, op: &ops::RouterTopKBwd) -> Done {
    let logits = context.operands.read::<f32>(&op.logits)?;
    let experts = context.operands.read::<i32>(&op.experts)?;
    let dweights = context.operands.read::<f32>(&op.dweights)?;
    let dlogits = context.operands.write::<f32>(&op.dlogits)?;
    let (rows, count, chosen) = (op.logits.dim(0), op.logits.dim(1), op.rule.chosen);
    let [logit_s, expert_s, weight_s, dlogit_s] =
        [&op.logits, &op.experts, &op.dweights, &op.dlogits].map(row_stride);
    let per_task = rows_per_task(rows, count * 8);
    let parts = Parts::new(dlogits, dlogit_s * per_task);
    context.pool.run(rows.div_ceil(per_task), |task| {
        let dlogits = parts.take(task);
        let mut scores = vec![0.0; count];
        for index in 0..per_task.min(rows - task * per_task) {
            let at = task * per_task + index;
            let inputs = (
                &logits[at * logit_s..][..count],
                &experts[at * expert_s..][..chosen],
                &dweights[at * weight_s..][..chosen],
            );
            choose_bwd(&mut scores, inputs, &op.rule, &mut dlogits[index * dlogit_s..][..count]);
        }
    });
    Ok(())
}
