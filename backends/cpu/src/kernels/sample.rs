//! Drawing the next token: penalties, bias, temperature, filters, and one counter-based random
//! number per row.
//!
//! What is drawn from are f64 sums of f32 exponentials in ascending order of id, so a row's draw
//! does not depend on threads or on the other rows. The log-probability is the loss's own.

use std::borrow::Cow;

use pontoon_ops::philox::{philox4x32, unit};
use pontoon_ops::{self as ops, sampling};

use super::loss::row_log_prob;
use super::{Context, Done, row_stride};
use crate::ffi::Parts;
use crate::simd::Isa;

/// What one row reads.
struct Row<'a> {
    /// Of every row of the head, padding included.
    all_logits: &'a [f32],
    /// Of the tokens that exist.
    logits: &'a [f32],
    bias: Option<&'a [f32]>,
    history: &'a [i32],
    settings: &'a [f32],
    keys: &'a [u32],
}

pub(super) fn sample(context: &mut Context<'_>, op: &ops::Sample) -> Done {
    let logits = context.operands.read::<f32>(&op.logits)?;
    let bias = op.bias.map(|view| context.operands.read::<f32>(&view)).transpose()?;
    let history = op.history.map(|view| context.operands.read::<i32>(&view)).transpose()?;
    let settings = context.operands.read::<f32>(&op.settings)?;
    let keys = context.operands.read::<u32>(&op.keys)?;
    let token = context.operands.write::<i32>(&op.token)?;
    let logprob = context.operands.write::<f32>(&op.logprob)?;
    let rows = op.logits.dim(0);
    let part = rows.div_ceil(crate::ffi::PARTS_MAX);
    let (tokens, logprobs) = (Parts::new(token, part), Parts::new(logprob, part));
    let isa = context.isa;
    let longest = op.history.map_or(0, |view| view.dim(1));
    let row_of = |view: &Option<ops::View>, row: usize| view.map_or(0, |v| row * row_stride(&v));
    context.pool.run(rows.div_ceil(part), |task| {
        let (tokens, logprobs) = (tokens.take(task), logprobs.take(task));
        for (index, (token, logprob)) in tokens.iter_mut().zip(logprobs).enumerate() {
            let row = task * part + index;
            let history =
                history.map_or(&[][..], |all| &all[row_of(&op.history, row)..][..longest]);
            let all_logits = &logits[row * row_stride(&op.logits)..][..op.logits.dim(1)];
            let work = Row {
                all_logits,
                logits: &all_logits[..op.vocabulary],
                bias: bias.map(|all| &all[row_of(&op.bias, row)..][..op.vocabulary]),
                history,
                settings: &settings[row * row_stride(&op.settings)..][..sampling::COUNT],
                keys: &keys[row * row_stride(&op.keys)..][..4],
            };
            (*token, *logprob) = work.draw(isa);
        }
    });
    Ok(())
}

impl Row<'_> {
    fn draw(&self, isa: Isa) -> (i32, f32) {
        // A large vocabulary's copy costs as much as the draw, so it is made only to be changed.
        let mut logits = Cow::Borrowed(self.logits);
        if self.has_penalties() {
            self.penalise(logits.to_mut());
        }
        if let Some(bias) = self.bias {
            logits.to_mut().iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
        }
        if !logits.iter().any(|logit| logit.is_finite()) {
            return (-1, f32::NAN);
        }
        let temperature = self.settings[sampling::TEMPERATURE];
        let token =
            if temperature == 0.0 { largest(&logits) } else { self.random(&logits, temperature) };
        // All rows of the head count, as they do for the loss, so the two agree bit for bit.
        (token as i32, row_log_prob(isa, self.all_logits, token as i32))
    }

    fn has_penalties(&self) -> bool {
        let factor = self.settings[sampling::REPETITION];
        let terms = [sampling::PRESENCE, sampling::FREQUENCY];
        factor != 1.0 || terms.iter().any(|&term| self.settings[term] != 0.0)
    }

    /// Repetition, presence and frequency, by how often each token stands in the history.
    fn penalise(&self, logits: &mut [f32]) {
        let repetition = self.settings[sampling::REPETITION];
        let presence = self.settings[sampling::PRESENCE];
        let frequency = self.settings[sampling::FREQUENCY];
        let prompt = self.settings[sampling::PROMPT_TOKENS] as usize;
        let known = |id: i32| usize::try_from(id).ok().filter(|&id| id < logits.len());
        let mut counts: Vec<(usize, u32)> = Vec::new();
        let mut seen: Vec<(usize, bool)> = self
            .history
            .iter()
            .enumerate()
            .filter_map(|(i, &id)| Some((known(id)?, i >= prompt)))
            .collect();
        seen.sort_unstable();
        for (token, generated) in seen {
            match counts.last_mut() {
                Some((last, count)) if *last == token => *count += u32::from(generated),
                _ => counts.push((token, u32::from(generated))),
            }
        }
        for (token, generated) in counts {
            let logit = &mut logits[token];
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if generated > 0 {
                *logit -= presence + frequency * generated as f32;
            }
        }
    }

    fn random(&self, logits: &[f32], temperature: f32) -> usize {
        let peak = logits.iter().fold(f32::NEG_INFINITY, |peak, &l| peak.max(l));
        let weight = |&logit: &f32| {
            let weight = f64::from(((logit - peak) / temperature).exp());
            if weight.is_nan() { 0.0 } else { weight }
        };
        let mut weights: Vec<f64> = logits.iter().map(weight).collect();
        self.filter(&mut weights);
        let total: f64 = weights.iter().sum();
        let [first, second, third, fourth] = [0, 1, 2, 3].map(|index| self.keys[index]);
        let word = philox4x32([first, second], [third, fourth, 0, 0])[0];
        let wanted = f64::from(unit(word)) * total;
        let mut running = 0.0;
        for (token, weight) in weights.iter().enumerate() {
            running += weight;
            if running > wanted {
                return token;
            }
        }
        // Rounding may leave the running sum just below the total: the last kept token it is.
        weights.iter().rposition(|&weight| weight > 0.0).unwrap_or_else(|| largest(logits))
    }

    /// Top-k, then top-p, then min-p: what is dropped gets weight zero.
    fn filter(&self, weights: &mut [f64]) {
        let top_k = self.settings[sampling::TOP_K] as usize;
        let top_p = f64::from(self.settings[sampling::TOP_P]);
        let min_p = f64::from(self.settings[sampling::MIN_P]);
        if top_k > 0 || top_p < 1.0 {
            let mut order: Vec<usize> = (0..weights.len()).collect();
            order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
            let kept = if top_k > 0 { top_k.min(order.len()) } else { order.len() };
            let total: f64 = order[..kept].iter().map(|&token| weights[token]).sum();
            let mut running = 0.0;
            let mut keep = 0;
            while keep < kept && (keep == 0 || running < top_p * total) {
                running += weights[order[keep]];
                keep += 1;
            }
            order[keep..].iter().for_each(|&token| weights[token] = 0.0);
        }
        if min_p > 0.0 {
            let best = weights.iter().fold(0.0, |best: f64, &weight| best.max(weight));
            for weight in weights.iter_mut().filter(|weight| **weight < min_p * best) {
                *weight = 0.0;
            }
        }
    }
}

/// Running maxima of [`largest`], as many as fill the widest vector: one alone would be a chain.
const MAXIMA: usize = 16;

/// The index of the largest logit, the lowest on ties; NaN never wins.
fn largest(logits: &[f32]) -> usize {
    let larger = |best: f32, logit: f32| if logit > best { logit } else { best };
    let (chunks, rest) = logits.as_chunks::<MAXIMA>();
    let mut maxima = [f32::NEG_INFINITY; MAXIMA];
    for chunk in chunks {
        for (best, &logit) in maxima.iter_mut().zip(chunk) {
            *best = larger(*best, logit);
        }
    }
    let best = maxima.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &l| larger(best, l));
    logits.iter().position(|&logit| logit == best).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logit_is_the_first_of_equals_and_never_nan() {
        for len in [1, 15, 16, 17, 100] {
            for at in 0..len {
                let mut logits = vec![-1.0; len];
                logits[at..].fill(2.0);
                if at > 0 {
                    logits[at / 2] = f32::NAN;
                }
                logits[len - 1] = 2.0;
                assert_eq!(largest(&logits), at, "of {len}");
            }
        }
        assert_eq!(largest(&[f32::NAN, f32::NEG_INFINITY]), 1);
        assert_eq!(largest(&[-0.0, 0.0]), 0);
        assert_eq!(largest(&[1.0, f32::INFINITY, f32::NAN]), 1);
    }
}
