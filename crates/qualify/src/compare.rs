//! Whether devices agree on a model: logits, chosen tokens, gradients, and losses over some steps.
//!
//! What the devices computed comes in; what comes out is a certificate with numbers and the limits
//! they were held against. The limits follow from how rounding errors grow with depth; see
//! `limits.rs` and `docs/compare.md`. Runs nothing.

mod limits;

use serde::Serialize;

pub use limits::{Experts, Limits, Sizes};

/// What one device computed.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// The device's name.
    pub device: String,
    /// Logits, row by row.
    pub logits: Vec<f64>,
    /// The gradient in the parameter table's layout.
    pub gradient: Vec<f64>,
    /// The loss of each training step from one state.
    pub losses: Vec<f64>,
}

/// A part of the gradient.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its name on disk.
    pub name: String,
    /// Its place in the gradient.
    pub range: std::ops::Range<usize>,
}

/// What is compared.
pub struct Comparison<'a> {
    /// The model's sizes, from which the limits follow.
    pub sizes: Sizes,
    /// Tokens of the vocabulary: the width of a row of logits.
    pub vocabulary: usize,
    /// Rows that draw a generated token; top-1 agreement counts these.
    pub generated: &'a [usize],
    /// The gradient's parts.
    pub tensors: &'a [Tensor],
    /// The truth, where the model is small enough for f64; its device is `f64`. No losses.
    pub exact: Option<&'a Measured>,
    /// What the devices computed, at least two.
    pub devices: &'a [Measured],
}

/// How far one set of logits is from another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Apart {
    /// What is compared.
    pub device: String,
    /// With what.
    pub with: String,
    /// Whether every element has the same bits.
    pub identical: bool,
    /// The largest difference of a logit.
    pub worst_logit_error: f64,
    /// The root mean square of the differences.
    pub typical_logit_error: f64,
    /// The mean over rows of the divergence of the next token's distribution, in nats.
    pub kl: f64,
    /// Its largest value.
    pub kl_worst: f64,
    /// Share of generated tokens whose most likely token is the same.
    pub top1_agreement: f64,
    /// Most likely tokens that differ although they were not nearly equally likely.
    pub top1_unexplained: usize,
    /// The largest relative error of a tensor's gradient, and the smallest cosine.
    pub worst_gradient_error: f64,
    /// The smallest cosine of a tensor's gradient.
    pub worst_gradient_cosine: f64,
    /// The largest relative difference of losses over the training steps.
    pub loss_drift: f64,
    /// Whether all of this is within the limits.
    pub agree: bool,
}

/// The error of one tensor's gradient on one device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GradientError {
    /// The tensor.
    pub tensor: String,
    /// The device.
    pub device: String,
    /// The norm of the difference over the norm.
    pub relative: f64,
    /// The cosine between the two.
    pub cosine: f64,
}

/// The certificate.
#[derive(Clone, Debug, Serialize)]
pub struct Certificate {
    /// Whether all devices agree with the reference and with each other.
    pub agree: bool,
    /// The devices.
    pub devices: Vec<String>,
    /// What they were held against: `f64`, or the first device.
    pub reference: String,
    /// The worst over all devices, against the reference.
    pub worst_logit_error: f64,
    /// The worst over all devices, against the reference.
    pub typical_logit_error: f64,
    /// The worst mean divergence between two of them.
    pub kl: f64,
    /// The least share of generated tokens on which two of them agree.
    pub top1_agreement: f64,
    /// Each tensor on each device, against the reference.
    pub gradient_error: Vec<GradientError>,
    /// The largest relative difference of losses between two devices.
    pub loss_drift: f64,
    /// What the numbers may be.
    pub limits: Limits,
    /// Every pair, the reference included.
    pub pairs: Vec<Apart>,
    /// Why they do not agree; empty if they do.
    pub reasons: Vec<String>,
}

/// Compares.
pub fn certify(comparison: &Comparison<'_>) -> Certificate {
    let devices = comparison.devices;
    assert!(devices.len() >= 2, "a comparison takes at least two devices");
    let reference = comparison.exact.unwrap_or(&devices[0]);
    let limits = Limits::of(&comparison.sizes, spread(&reference.logits, comparison.vocabulary));
    let mut pairs = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        if let Some(exact) = comparison.exact {
            pairs.push(apart(comparison, device, exact, &limits));
        }
        for other in &devices[..index] {
            pairs.push(apart(comparison, device, other, &limits));
        }
    }
    let held = if comparison.exact.is_some() { devices } else { &devices[1..] };
    let gradient_error = held.iter().flat_map(|d| gradients(comparison, d, reference)).collect();
    let against: Vec<&Apart> = pairs.iter().filter(|pair| pair.with == reference.device).collect();
    let most = |of: fn(&Apart) -> f64, among: &[&Apart]| among.iter().map(|p| of(p)).fold(0.0, max);
    let all: Vec<&Apart> = pairs.iter().collect();
    let reasons: Vec<String> = pairs.iter().flat_map(|pair| limits.broken_by(pair)).collect();
    Certificate {
        agree: reasons.is_empty(),
        devices: devices.iter().map(|one| one.device.clone()).collect(),
        reference: reference.device.clone(),
        worst_logit_error: most(|pair| pair.worst_logit_error, &against),
        typical_logit_error: most(|pair| pair.typical_logit_error, &against),
        kl: most(|pair| pair.kl, &all),
        top1_agreement: all.iter().map(|pair| pair.top1_agreement).fold(1.0, f64::min),
        gradient_error,
        loss_drift: most(|pair| pair.loss_drift, &all),
        limits,
        reasons,
        pairs,
    }
}

/// NaN wins, so that it is seen.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The root mean square of logits around their row's mean: the size that matters to a softmax.
fn spread(logits: &[f64], vocabulary: usize) -> f64 {
    let row = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        row.iter().map(|logit| (logit - mean).powi(2)).sum::<f64>()
    };
    let sum: f64 = logits.chunks(vocabulary.max(1)).map(row).sum();
    (sum / logits.len().max(1) as f64).sqrt()
}

fn apart(
    comparison: &Comparison<'_>,
    device: &Measured,
    with: &Measured,
    limits: &Limits,
) -> Apart {
    let width = comparison.vocabulary;
    let differences = device.logits.iter().zip(&with.logits).map(|(a, b)| (a - b).abs());
    let (mut worst, mut squares) = (0.0, 0.0);
    for difference in differences {
        worst = max(worst, difference);
        squares += difference * difference;
    }
    let rows = device.logits.chunks(width).zip(with.logits.chunks(width));
    let kls: Vec<f64> = rows.map(|(a, b)| divergence(b, a)).collect();
    let mut same = 0;
    let mut unexplained = 0;
    for &row in comparison.generated {
        let (a, b) = (&device.logits[row * width..][..width], &with.logits[row * width..][..width]);
        let (own, other) = (largest(a), largest(b));
        same += usize::from(own == other);
        // A token that is nearly as likely may win on either device.
        unexplained += usize::from(b[other] - b[own] > 2.0 * limits.worst_logit_error);
    }
    let errors = gradients(comparison, device, with);
    let losses = device.losses.iter().zip(&with.losses);
    let mut pair = Apart {
        device: device.device.clone(),
        with: with.device.clone(),
        identical: identical(device, with),
        worst_logit_error: worst,
        typical_logit_error: (squares / device.logits.len().max(1) as f64).sqrt(),
        kl: kls.iter().sum::<f64>() / kls.len().max(1) as f64,
        kl_worst: kls.iter().copied().fold(0.0, max),
        top1_agreement: same as f64 / comparison.generated.len().max(1) as f64,
        top1_unexplained: unexplained,
        worst_gradient_error: errors.iter().map(|error| error.relative).fold(0.0, max),
        worst_gradient_cosine: errors.iter().map(|error| error.cosine).fold(1.0, f64::min),
        loss_drift: losses.map(|(a, b)| (a - b).abs() / b.abs().max(1e-3)).fold(0.0, max),
        agree: true,
    };
    pair.agree = limits.broken_by(&pair).is_empty();
    pair
}

fn identical(one: &Measured, other: &Measured) -> bool {
    let same = |a: &[f64], b: &[f64]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
    };
    same(&one.logits, &other.logits)
        && same(&one.gradient, &other.gradient)
        && same(&one.losses, &other.losses)
}

/// The Kullback-Leibler divergence of a row's softmax from the reference's, in nats.
fn divergence(reference: &[f64], row: &[f64]) -> f64 {
    let normaliser = |row: &[f64]| {
        let peak = row.iter().copied().fold(f64::NEG_INFINITY, max);
        peak + row.iter().map(|logit| (logit - peak).exp()).sum::<f64>().ln()
    };
    let (a, b) = (normaliser(reference), normaliser(row));
    let term = |(p, q): (&f64, &f64)| (p - a).exp() * ((p - a) - (q - b));
    let sum: f64 = reference.iter().zip(row).map(term).sum();
    // Rounding can leave a little below zero; NaN must stay.
    if sum < 0.0 { 0.0 } else { sum }
}

/// The index of the largest number, the first on ties.
fn largest(row: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best
}

fn gradients(
    comparison: &Comparison<'_>,
    device: &Measured,
    with: &Measured,
) -> Vec<GradientError> {
    let one = |tensor: &Tensor| {
        let (a, b) = (&device.gradient[tensor.range.clone()], &with.gradient[tensor.range.clone()]);
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let apart: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
        let (aa, bb, ab) = (dot(a, a), dot(b, b), dot(a, b));
        // A tensor without gradient, such as an expert that no row went to, agrees if both are.
        let (relative, cosine) = match (aa == 0.0, bb == 0.0) {
            (true, true) => (0.0, 1.0),
            (_, true) => (f64::MAX, 0.0),
            _ => ((apart / bb).sqrt(), ab / (aa * bb).sqrt()),
        };
        let (tensor, device) = (tensor.name.clone(), device.device.clone());
        GradientError { tensor, device, relative, cosine }
    };
    comparison.tensors.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_ops::DType;

    fn measured(device: &str, shift: f64) -> Measured {
        let logits = vec![1.0, 2.0 + shift, -1.0, 0.5, 0.0, 3.0];
        let gradient = vec![1.0, 2.0 - shift, 0.0, 0.0];
        Measured { device: device.to_owned(), logits, gradient, losses: vec![2.0, 1.5 + shift] }
    }

    fn certified(shift: f64) -> Certificate {
        let devices = [measured("one", 0.0), measured("two", shift)];
        let tensors = [("a", 0..2), ("b", 2..4)];
        let tensors = tensors.map(|(name, range)| Tensor { name: name.to_owned(), range });
        certify(&Comparison {
            sizes: Sizes {
                dtype: DType::F32,
                layers: 2,
                width: 64,
                steps: 2,
                experts: Experts::None,
            },
            vocabulary: 3,
            generated: &[0, 1],
            tensors: &tensors,
            exact: None,
            devices: &devices,
        })
    }

    #[test]
    fn equal_devices_agree_with_all_errors_zero() {
        let certificate = certified(0.0);
        assert!(certificate.agree && certificate.pairs[0].identical);
        assert_eq!((certificate.worst_logit_error, certificate.kl), (0.0, 0.0));
        assert_eq!(certificate.top1_agreement, 1.0);
        assert_eq!(certificate.gradient_error.len(), 2);
    }

    #[test]
    fn a_device_that_is_off_by_a_hundredth_in_f32_is_refused_with_every_broken_limit_named() {
        let certificate = certified(0.01);
        assert!(!certificate.agree);
        let text = certificate.reasons.join("; ");
        for part in ["two and one", "logit", "gradient", "loss"] {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
    }

    #[test]
    fn numbers_that_are_nan_never_agree() {
        let certificate = certified(f64::NAN);
        assert!(!certificate.agree && certificate.worst_logit_error.is_nan());
    }

    #[test]
    fn divergence_of_a_small_shift_is_half_its_variance() {
        let reference = [0.1, 0.2, 0.3];
        let kl = divergence(&reference, &[0.1 + 1e-4, 0.2, 0.3]);
        let p = 0.1_f64.exp() / reference.iter().map(|x: &f64| x.exp()).sum::<f64>();
        let want = 0.5 * p * (1.0 - p) * 1e-8;
        assert!((kl / want - 1.0).abs() < 1e-3, "{kl} {want}");
    }
}
