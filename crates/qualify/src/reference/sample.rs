//! Drawing tokens, in f64.

use pontoon_ops::philox::{philox4x32, unit};
use pontoon_ops::{self as ops, sampling};

use super::{Expected, Want, exact, expected, wide};
use crate::memory::Memory;

/// Shares of the total probability closer than this may be decided either way by f32.
const CLOSE: f64 = 1e-5;

/// What one row reads, as f64.
struct Row<'a> {
    logits: &'a [f64],
    bias: Option<&'a [f64]>,
    history: &'a [i64],
    settings: &'a [f64],
    keys: &'a [i64],
}

impl Row<'_> {
    fn penalised(&self) -> Vec<f64> {
        let prompt = self.settings[sampling::PROMPT_TOKENS] as usize;
        let one = |(token, &logit): (usize, &f64)| {
            let seen = |&&id: &&i64| id == token as i64;
            let mut logit = logit;
            if self.history.contains(&(token as i64)) {
                let by = self.settings[sampling::REPETITION];
                logit = if logit > 0.0 { logit / by } else { logit * by };
            }
            let count = self.history.iter().skip(prompt).filter(seen).count() as f64;
            if count > 0.0 {
                logit -= self.settings[sampling::PRESENCE];
                logit -= self.settings[sampling::FREQUENCY] * count;
            }
            logit + self.bias.map_or(0.0, |bias| bias[token])
        };
        self.logits.iter().enumerate().map(one).collect()
    }

    /// The token, or `Err` if f32 may draw another; none if there is no finite logit.
    fn draw(&self) -> Result<Option<usize>, ()> {
        let logits = self.penalised();
        if !logits.iter().any(|logit| logit.is_finite()) {
            return Ok(None);
        }
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let temperature = self.settings[sampling::TEMPERATURE];
        if temperature == 0.0 {
            let close = order.get(1).is_some_and(|&second| {
                let gap = logits[order[0]] - logits[second];
                gap != 0.0 && gap < 1e-6
            });
            return if close { Err(()) } else { Ok(Some(order[0])) };
        }
        let best = logits[order[0]];
        let weight = |&i: &usize| ((logits[i] - best) / temperature).exp();
        let top_k = self.settings[sampling::TOP_K] as usize;
        if top_k > 0 && top_k < order.len() {
            order.truncate(top_k);
        }
        let total: f64 = order.iter().map(weight).sum();
        let mut kept = Vec::new();
        let mut running = 0.0;
        for token in order.iter().copied() {
            let share = running / total - self.settings[sampling::TOP_P];
            if !kept.is_empty() && self.settings[sampling::TOP_P] < 1.0 {
                if share.abs() < CLOSE {
                    return Err(());
                }
                if share > 0.0 {
                    break;
                }
            }
            running += weight(&token);
            kept.push(token);
        }
        kept.retain(|token| weight(token) >= self.settings[sampling::MIN_P]);
        kept.sort();
        self.pick(&kept, weight).map(Some)
    }

    fn pick(&self, kept: &[usize], weight: impl Fn(&usize) -> f64) -> Result<usize, ()> {
        let total: f64 = kept.iter().map(&weight).sum();
        let key = |index: usize| self.keys[index] as u32;
        let u = wide(unit(philox4x32([key(0), key(1)], [key(2), key(3), 0, 0])[0]));
        let mut running = 0.0;
        for token in kept {
            running += weight(token) / total;
            if (running - u).abs() < CLOSE {
                return Err(());
            }
            if running > u {
                return Ok(*token);
            }
        }
        Err(())
    }
}

pub(super) fn sample(op: &ops::Sample, memory: &Memory) -> Vec<Expected> {
    let (rows, padded) = (op.logits.dim(0), op.logits.dim(1));
    let (logits, settings) = (memory.read(&op.logits), memory.read(&op.settings));
    let bias = op.bias.map(|view| memory.read(&view));
    let history = op.history.map(|view| memory.read_integers(&view)).unwrap_or_default();
    let longest = op.history.map_or(0, |view| view.dim(1));
    let keys = memory.read_integers(&op.keys);
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let one = Row {
            logits: &logits[row * padded..][..op.vocabulary],
            bias: bias.as_ref().map(|bias| &bias[row * padded..][..op.vocabulary]),
            history: &history[row * longest..][..longest],
            settings: &settings[row * sampling::COUNT..][..sampling::COUNT],
            keys: &keys[row * 4..][..4],
        };
        let (token, logprob) = match one.draw() {
            Err(()) => (Want::Unjudged, Want::Unjudged),
            Ok(None) => (exact(-1.0), exact(f64::NAN)),
            Ok(Some(token)) => {
                let all = &logits[row * padded..][..padded];
                let peak = all.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                let total: f64 = all.iter().map(|l| (l - peak).exp()).sum();
                let value = one.logits[token] - peak - total.ln();
                let magnitude = one.logits[token].abs() + peak.abs() + total.ln().abs();
                (exact(token as f64), super::near(value, magnitude))
            }
        };
        tokens.push(token);
        logprobs.push(logprob);
    }
    vec![expected(&op.token, tokens), expected(&op.logprob, logprobs)]
}
