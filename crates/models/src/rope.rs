//! Rotary position parameters: their configuration and the inverse frequencies they stand for.
//!
//! Does not rotate anything: the waist's `Rope` takes tables made from these frequencies. The
//! formulas are those of the papers (linear: arXiv 2306.15595, YaRN: arXiv 2309.00071) with the
//! details of transformers, against which the goldens check them. Read next: `config.rs`.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::keys::Keys;

/// The rotary base and how long contexts are reached from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is stretched.
    pub scaling: RopeScaling,
}

/// The stretching of rotary wavelengths for contexts longer than those first trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every position divided by `factor`.
    Linear {
        /// The stretch.
        factor: f64,
    },
    /// The base grows once a sequence is longer than the model's maximum.
    Dynamic {
        /// The stretch allowed.
        factor: f64,
    },
    /// Long wavelengths stretched, short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// The stretch of long wavelengths.
        factor: f64,
        /// Wavelengths above `original_positions / low_frequency_factor` are stretched whole.
        low_frequency_factor: f64,
        /// Wavelengths below `original_positions / high_frequency_factor` are kept.
        high_frequency_factor: f64,
        /// The context first trained on.
        original_positions: f64,
    },
    /// A ramp over dimensions and a scale on the attention logits.
    Yarn(Yarn),
}

/// YaRN's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// The stretch of long wavelengths.
    pub factor: f64,
    /// The context first trained on.
    pub original_positions: f64,
    /// Rotations over the original context above which a dimension is kept.
    pub beta_fast: f64,
    /// Rotations below which a dimension is stretched whole.
    pub beta_slow: f64,
    /// Numerator of DeepSeek's attention factor.
    pub mscale: Option<f64>,
    /// Denominator of DeepSeek's attention factor; also scales its softmax.
    pub mscale_all_dim: Option<f64>,
    /// The factor on cosines and sines, where given instead of derived.
    pub attention_factor: Option<f64>,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub ramp_ends: RampEnds,
}

/// Whether YaRN's ramp starts and ends on whole dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RampEnds {
    /// Rounded outwards, as the paper's code does.
    Whole,
    /// As computed (`truncate: false`).
    Exact,
}

/// What a rotary table is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// One angle per position for each rotated pair.
    pub inverse: Vec<f32>,
    /// The factor on every cosine and sine.
    pub attention_factor: f32,
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4).
    pub(crate) fn from_keys(keys: &Keys<'_>, theta_default: f64) -> Result<Rope, ModelError> {
        let nested = match keys.object("rope_parameters")? {
            Some(found) => Some(found),
            None => keys.object("rope_scaling")?,
        };
        let empty = Map::new();
        let rope = Keys::nested("rope_parameters", nested.unwrap_or(&empty));
        let outer_theta = keys.float_or("rope_theta", theta_default)?;
        let theta = rope.float_or("rope_theta", outer_theta)?;
        if theta <= 1.0 {
            return Err(keys.wrong("rope_theta", "a number above 1"));
        }
        let partial = rope.float_or("partial_rotary_factor", 1.0)?;
        if partial != 1.0 || keys.float_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(
                rope.wrong("partial_rotary_factor", "1 (rotating a part is not implemented)")
            );
        }
        let positions = keys.size_or("max_position_embeddings", 2048)? as f64;
        Ok(Rope { theta, scaling: RopeScaling::from_keys(&rope, positions)? })
    }

    /// As `rope_parameters` of transformers 5.
    pub(crate) fn to_json(&self) -> Value {
        let mut map = Map::new();
        let (kind, numbers) = self.scaling.entries();
        map.insert("rope_type".into(), kind.into());
        map.insert("rope_theta".into(), self.theta.into());
        for (key, number) in numbers {
            // Context lengths are whole numbers in every published file.
            let whole = key.ends_with("embeddings") && number.fract() == 0.0;
            let value = if whole { (number as u64).into() } else { number.into() };
            map.insert(key.into(), value);
        }
        if let RopeScaling::Yarn(Yarn { ramp_ends: RampEnds::Exact, .. }) = self.scaling {
            map.insert("truncate".into(), false.into());
        }
        Value::Object(map)
    }

    /// The inverse frequencies of `width` rotated dimensions.
    ///
    /// `positions_max` is the model's and `tokens` the sequence's length; only `Dynamic` uses them.
    pub fn frequencies(&self, width: usize, positions_max: usize, tokens: usize) -> Frequencies {
        let plain = |theta: f64| -> Vec<f64> {
            (0..width).step_by(2).map(|i| theta.powf(-(i as f64) / width as f64)).collect()
        };
        let base = plain(self.theta);
        let (inverse, attention_factor) = match &self.scaling {
            RopeScaling::Default => (base, 1.0),
            RopeScaling::Linear { factor } => (base.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor } => {
                let ratio = tokens.max(positions_max) as f64 / positions_max as f64;
                let growth = factor * ratio - (factor - 1.0);
                (plain(self.theta * growth.powf(width as f64 / (width as f64 - 2.0))), 1.0)
            }
            llama3 @ RopeScaling::Llama3 { .. } => {
                (base.iter().map(|&f| llama3.llama3_frequency(f)).collect(), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                (yarn.stretch(&base, width, self.theta), yarn.attention_factor())
            }
        };
        Frequencies {
            inverse: inverse.iter().map(|&f| f as f32).collect(),
            attention_factor: attention_factor as f32,
        }
    }

    /// DeepSeek's factor on the softmax scale: the square of YaRN's scale for `mscale_all_dim`.
    pub fn softmax_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => match yarn.mscale_all_dim {
                Some(mscale) if mscale != 0.0 => yarn_scale(yarn.factor, mscale).powi(2),
                _ => 1.0,
            },
            _ => 1.0,
        }
    }
}

impl RopeScaling {
    fn from_keys(rope: &Keys<'_>, positions: f64) -> Result<RopeScaling, ModelError> {
        let kind_key = if rope.has("rope_type") { "rope_type" } else { "type" };
        let factor = || rope.float_at_least("factor", 1.0);
        let original = || rope.float_or("original_max_position_embeddings", positions);
        Ok(match rope.text(kind_key)?.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "dynamic" => RopeScaling::Dynamic { factor: factor()? },
            "llama3" => RopeScaling::Llama3 {
                factor: factor()?,
                low_frequency_factor: rope.float_at_least("low_freq_factor", 0.0)?,
                high_frequency_factor: rope.float_at_least("high_freq_factor", 0.0)?,
                original_positions: original()?,
            },
            "yarn" => {
                let original_positions = original()?;
                let factor =
                    if rope.has("factor") { factor()? } else { positions / original_positions };
                let truncate = rope.flag_or("truncate", true)?;
                RopeScaling::Yarn(Yarn {
                    factor,
                    original_positions,
                    beta_fast: rope.float_or("beta_fast", 32.0)?,
                    beta_slow: rope.float_or("beta_slow", 1.0)?,
                    mscale: rope.float("mscale")?,
                    mscale_all_dim: rope.float("mscale_all_dim")?,
                    attention_factor: rope.float("attention_factor")?,
                    ramp_ends: if truncate { RampEnds::Whole } else { RampEnds::Exact },
                })
            }
            _ => {
                return Err(rope.wrong(kind_key, "one of default, linear, dynamic, llama3, yarn"));
            }
        })
    }

    /// The name and the numbers of this scaling under their keys on disk.
    fn entries(&self) -> (&'static str, Vec<(&'static str, f64)>) {
        const ORIGINAL: &str = "original_max_position_embeddings";
        match self {
            RopeScaling::Default => ("default", vec![]),
            RopeScaling::Linear { factor } => ("linear", vec![("factor", *factor)]),
            RopeScaling::Dynamic { factor } => ("dynamic", vec![("factor", *factor)]),
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_positions,
            } => (
                "llama3",
                vec![
                    ("factor", *factor),
                    ("low_freq_factor", *low_frequency_factor),
                    ("high_freq_factor", *high_frequency_factor),
                    (ORIGINAL, *original_positions),
                ],
            ),
            RopeScaling::Yarn(yarn) => {
                let mut numbers = vec![
                    ("factor", yarn.factor),
                    (ORIGINAL, yarn.original_positions),
                    ("beta_fast", yarn.beta_fast),
                    ("beta_slow", yarn.beta_slow),
                ];
                let optional = [
                    ("mscale", yarn.mscale),
                    ("mscale_all_dim", yarn.mscale_all_dim),
                    ("attention_factor", yarn.attention_factor),
                ];
                numbers.extend(optional.iter().filter_map(|(key, value)| Some((*key, (*value)?))));
                ("yarn", numbers)
            }
        }
    }

    fn llama3_frequency(&self, frequency: f64) -> f64 {
        let RopeScaling::Llama3 {
            factor,
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_positions,
        } = self
        else {
            unreachable!("called on Llama3 only");
        };
        let wavelength = 2.0 * PI / frequency;
        if wavelength < original_positions / high {
            return frequency;
        }
        if wavelength > original_positions / low {
            return frequency / factor;
        }
        let smooth = (original_positions / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(given), _, _) => given,
            (None, Some(mscale), Some(all_dim)) if mscale != 0.0 && all_dim != 0.0 => {
                yarn_scale(self.factor, mscale) / yarn_scale(self.factor, all_dim)
            }
            _ => yarn_scale(self.factor, 1.0),
        }
    }

    fn stretch(&self, base: &[f64], width: usize, theta: f64) -> Vec<f64> {
        let dimension_of = |rotations: f64| {
            let wavelengths = self.original_positions / (rotations * 2.0 * PI);
            width as f64 * wavelengths.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (dimension_of(self.beta_fast), dimension_of(self.beta_slow));
        if self.ramp_ends == RampEnds::Whole {
            (low, high) = (low.floor(), high.ceil());
        }
        low = low.max(0.0);
        high = high.min(width as f64 - 1.0);
        if low == high {
            high += 0.001; // A ramp of no length would divide by zero; transformers adds the same.
        }
        let stretched = |(pair, frequency): (usize, &f64)| {
            let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / self.factor * ramp + frequency * (1.0 - ramp)
        };
        base.iter().enumerate().map(stretched).collect()
    }
}

/// YaRN's scale of attention for a stretch.
fn yarn_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use crate::config::ModelConfig;
    use crate::golden;
    use crate::weights::Weights;

    #[test]
    fn frequencies_of_every_rope_type_equal_those_of_transformers() {
        for case in golden::CASES {
            let config = ModelConfig::from_folder(&golden::folder(case)).unwrap();
            let golden = Weights::open_file(&golden::folder(case).join("golden.safetensors"));
            let golden = golden.unwrap();
            let want = golden.tensor("rope.inverse_frequencies").unwrap().to_f32().unwrap();
            let factor = golden.tensor("rope.attention_factor").unwrap().to_f32().unwrap()[0];
            let width = config.rotary_width();
            let got = config.rope.frequencies(width, config.max_positions, golden::TOKENS);
            assert_eq!(got.inverse.len(), want.len(), "{case}");
            for (got, want) in got.inverse.iter().zip(&want) {
                assert!((got - want).abs() <= 2e-6 * want.abs(), "{case}: {got} {want}");
            }
            assert!((got.attention_factor - factor).abs() < 1e-6, "{case}");
        }
    }
}
