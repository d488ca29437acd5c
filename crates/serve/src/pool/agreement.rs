//! Whether two devices compute the same: bit for bit within a numeric class, within limits across
//! classes.
//!
//! Pure. The limits come from the caller, who knows how rounding grows in the model (see
//! `docs/compare.md`). Read next: `audit.rs`.

use crate::engine::probe::Probe;

/// How far two devices are, or may be, apart in log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distance {
    /// The largest difference.
    pub worst: f64,
    /// The root mean square of the differences.
    pub typical: f64,
    /// The mean divergence of the next token's distribution, in nats.
    pub divergence: f64,
}

/// The limits for a model whose logits spread this far around their mean.
pub type LimitsOf = dyn Fn(f64) -> Distance + Send + Sync;

/// What devices are compared with: the first that served.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Its name.
    pub device: String,
    /// Its numeric class.
    pub class: String,
    /// What it computed.
    pub probe: Probe,
}

/// The root mean square of log-probabilities around their row's mean.
pub fn spread(probe: &Probe) -> f64 {
    let rows = probe.rows.chunks_exact(probe.vocabulary.max(1));
    let around = |row: &[f32]| {
        let mean = row.iter().map(|&value| f64::from(value)).sum::<f64>() / row.len() as f64;
        row.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>()
    };
    (rows.map(around).sum::<f64>() / probe.rows.len().max(1) as f64).sqrt()
}

/// How far two devices' probes are apart. NaN anywhere makes a NaN or an infinite distance.
pub fn distance(one: &Probe, other: &Probe) -> Distance {
    let pairs = || one.rows.iter().zip(&*other.rows).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    let far = |(a, b): (f64, f64)| if a.is_nan() || b.is_nan() { f64::NAN } else { (a - b).abs() };
    // `max` would drop a NaN, which must not pass.
    let more = |worst: f64, next: f64| if next > worst || next.is_nan() { next } else { worst };
    let worst = pairs().map(far).fold(0.0, more);
    let count = one.rows.len().max(1) as f64;
    let typical = (pairs().map(|pair| far(pair).powi(2)).sum::<f64>() / count).sqrt();
    let row_count = (one.rows.len() / one.vocabulary.max(1)).max(1) as f64;
    let divergence = pairs().map(|(a, b)| a.exp() * (a - b)).sum::<f64>() / row_count;
    Distance { worst, typical, divergence }
}

/// Holds a device's probe against the reference; an error says how far apart they are.
pub fn compare(
    reference: &Reference,
    class: &str,
    probe: &Probe,
    limits: &LimitsOf,
) -> Result<(), String> {
    let base = &reference.probe;
    if base.rows.len() != probe.rows.len() || base.scores.len() != probe.scores.len() {
        return Err("it computed another number of rows of the probe".to_owned());
    }
    let against = &reference.device;
    if reference.class == class {
        let scores = first_difference(&base.scores, &probe.scores);
        let rows = first_difference(&base.rows, &probe.rows);
        return match (scores, rows) {
            (None, None) => Ok(()),
            (Some(at), _) => Err(format!(
                "token {at} of the probe scores {} instead of {} on `{against}` of the same \
                 numeric class `{class}`",
                probe.scores[at], base.scores[at]
            )),
            (None, Some(at)) => Err(format!(
                "token {} after row {} of the probe has log-probability {} instead of {} on \
                 `{against}` of the same numeric class `{class}`",
                at % base.vocabulary,
                at / base.vocabulary,
                probe.rows[at],
                base.rows[at]
            )),
        };
    }
    let (got, most) = (distance(base, probe), limits(spread(base)));
    // Log-probabilities have the error of a logit and that of the sum of all, which is smaller.
    let parts = [
        ("the worst log-probability error", got.worst, 2.0 * most.worst),
        ("the typical log-probability error", got.typical, 2.0 * most.typical),
        ("the mean divergence", got.divergence, 2.0 * most.divergence),
    ];
    // A comparison with NaN is false, so it is written to let only the good through.
    let within = |&&(_, got, most): &&(&str, f64, f64)| got <= most;
    let broken: Vec<String> = parts
        .iter()
        .filter(|part| !within(part))
        .map(|(what, got, most)| {
            format!("{what} against `{against}` is {got:.3e}, limit {most:.3e}")
        })
        .collect();
    if broken.is_empty() { Ok(()) } else { Err(broken.join("; ")) }
}

/// Whether a probe has only numbers.
pub fn finite(probe: &Probe) -> bool {
    probe.scores.iter().chain(&*probe.rows).all(|value| value.is_finite())
}

/// Where two lists of numbers first differ in a bit; a missing one differs.
pub fn first_difference(one: &[f32], other: &[f32]) -> Option<usize> {
    let differ = one.iter().zip(other).position(|(a, b)| a.to_bits() != b.to_bits());
    differ.or((one.len() != other.len()).then(|| one.len().min(other.len())))
}

/// Where two lists of log-probabilities first are further apart than a limit.
pub fn first_beyond(one: &[f32], other: &[f32], limit: f64) -> Option<usize> {
    let near = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).abs() <= limit;
    let far = one.iter().zip(other).position(|pair| !near(pair));
    far.or((one.len() != other.len()).then(|| one.len().min(other.len())))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn probe(shift: f32) -> Probe {
        let rows: Vec<f32> = vec![0.25_f32.ln(), 0.75_f32.ln() + shift];
        Probe {
            tokens: Arc::from([0, 1]),
            scores: Arc::from([rows[1]]),
            rows: Arc::from(rows),
            vocabulary: 2,
        }
    }

    fn refused(class: &str, shift: f32) -> Option<String> {
        let reference =
            Reference { device: "a".to_owned(), class: "kind/one".to_owned(), probe: probe(0.0) };
        let limits = |_: f64| Distance { worst: 0.01, typical: 0.005, divergence: 1e-3 };
        compare(&reference, class, &probe(shift), &limits).err()
    }

    #[test]
    fn equals_need_equal_bits_and_strangers_only_be_near() {
        assert_eq!(refused("kind/one", 0.0), None);
        assert!(refused("kind/one", 1e-6).unwrap().contains("same numeric class"));
        assert_eq!(refused("kind/two", 1e-6), None);
        assert!(refused("kind/two", 0.1).unwrap().contains("worst log-probability error"));
        assert!(refused("kind/two", f32::NAN).is_some());
    }

    #[test]
    fn a_missing_or_nan_score_is_a_difference() {
        assert_eq!(first_difference(&[1.0, 2.0], &[1.0, 2.0]), None);
        assert_eq!(first_difference(&[1.0, 2.0], &[1.0]), Some(1));
        assert_eq!(first_beyond(&[1.0, 2.0], &[1.1, 2.0], 0.2), None);
        assert_eq!(first_beyond(&[1.0, f32::NAN], &[1.0, 2.0], 0.2), Some(1));
    }
}
