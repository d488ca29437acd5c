//! How far two devices may be apart on a model: from rounding errors and how they grow with depth.
//!
//! A result stored in a dtype errs by up to half its epsilon; a product over k terms summed in f32
//! errs by about the root of k roundings of f32. Errors of different operations are independent,
//! so along the residual stream they add as roots of squares. How well this fits good devices is
//! measured in `docs/compare.md`, with the command that measured it.

use pontoon_ops::DType;
use serde::Serialize;

use super::Apart;

/// Results that are rounded on the way through one layer and back into the residual stream: two
/// norms, four projections, rope, attention, gate, three of the feed-forward part.
const ROUNDINGS_PER_LAYER: f64 = 12.0;
/// The largest of many normal errors: five deviations are met once in two million.
const WORST_DEVIATIONS: f64 = 8.0;
/// A gradient passes every layer twice, and the weight of a norm or of keys gets the small
/// difference of large terms.
const GRADIENT_FACTOR: f64 = 2.0;
/// Each training step starts from weights that already differ by a little.
const DRIFT_FACTOR: f64 = 0.1;
/// A router's choice between nearly equal experts can fall either way, and then a row changes by
/// an expert's share. It happens in proportion to the rounding error, so its square adds the
/// error itself, times this.
const ROUTED: f64 = 0.25;
/// A row that went to another expert changes by up to the logits' whole spread.
const ROUTED_WORST: f64 = 2.0;
/// An expert with few rows gets another gradient if one of them goes elsewhere.
const ROUTED_GRADIENT: f64 = 50.0;
/// Divergences below this are rounding of the divergence itself.
const KL_FLOOR: f64 = 1e-13;

/// Whether a model has experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// It has.
    Some,
    /// It has not.
    None,
}

/// The sizes of a model that decide how errors grow.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// What activations are stored in.
    pub dtype: DType,
    /// Layers.
    pub layers: usize,
    /// The longest sum in a product.
    pub width: usize,
    /// Training steps of the loss comparison.
    pub steps: usize,
    /// Whether rows are sent to experts.
    pub experts: Experts,
}

/// What the numbers of a comparison may be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// The estimated relative error of one rounded result.
    pub rounding: f64,
    /// The largest difference of a logit.
    pub worst_logit_error: f64,
    /// The root mean square of the differences.
    pub typical_logit_error: f64,
    /// The mean divergence over rows, in nats.
    pub kl: f64,
    /// The largest divergence of a row.
    pub kl_worst: f64,
    /// Most likely tokens that may differ without being nearly equally likely.
    pub top1_unexplained: usize,
    /// The relative error of a tensor's gradient.
    pub gradient_error: f64,
    /// The cosine of a tensor's gradient, at least.
    pub gradient_cosine: f64,
    /// The relative difference of losses after the last step.
    pub loss_drift: f64,
}

impl Limits {
    /// The limits for a model whose logits spread this far around their mean.
    pub fn of(sizes: &Sizes, spread: f64) -> Limits {
        // The root of k roundings that grow with the partial sum: a quarter of it is what is met.
        let sum = DType::F32.epsilon() * (sizes.width as f64).sqrt() / 4.0;
        let rounding = (sizes.dtype.epsilon().powi(2) + sum.powi(2)).sqrt() / 2.0;
        let count = ROUNDINGS_PER_LAYER * sizes.layers as f64 + 2.0;
        let relative = rounding * count.sqrt();
        let routed = if sizes.experts == Experts::Some { 1.0 } else { 0.0 };
        let typical = (relative * relative + routed * ROUTED * relative).sqrt() * spread;
        let worst = (WORST_DEVIATIONS * typical).max(routed * ROUTED_WORST * spread);
        let gradient = (GRADIENT_FACTOR * relative).powi(2) + routed * ROUTED_GRADIENT * relative;
        let gradient = gradient.sqrt().min(1.0);
        Limits {
            rounding,
            worst_logit_error: worst,
            typical_logit_error: typical,
            // Half the variance of the difference, to second order.
            kl: KL_FLOOR + 0.5 * typical * typical,
            kl_worst: KL_FLOOR + 0.5 * worst * worst,
            top1_unexplained: 0,
            gradient_error: gradient,
            gradient_cosine: 1.0 - 0.5 * gradient * gradient,
            loss_drift: DRIFT_FACTOR * relative * (sizes.steps.max(1) as f64),
        }
    }

    /// What of a pair is beyond the limits, in words. NaN is beyond all.
    pub fn broken_by(&self, pair: &Apart) -> Vec<String> {
        let mut broken = Vec::new();
        let mut most = |what: &str, got: f64, limit: f64| {
            if got > limit || got.is_nan() {
                let Apart { device, with, .. } = pair;
                broken.push(format!("{device} and {with}: {what} is {got:.3e}, limit {limit:.3e}"));
            }
        };
        most("the worst logit error", pair.worst_logit_error, self.worst_logit_error);
        most("the typical logit error", pair.typical_logit_error, self.typical_logit_error);
        most("the mean divergence", pair.kl, self.kl);
        most("the worst divergence", pair.kl_worst, self.kl_worst);
        let unexplained = pair.top1_unexplained as f64;
        most("the count of other tokens", unexplained, self.top1_unexplained as f64);
        most("a tensor's gradient error", pair.worst_gradient_error, self.gradient_error);
        let sine = 1.0 - pair.worst_gradient_cosine;
        // A cosine is rounded itself.
        most("one minus a gradient's cosine", sine, 1.0 - self.gradient_cosine + 1e-12);
        most("the drift of the loss", pair.loss_drift, self.loss_drift);
        broken
    }
}
