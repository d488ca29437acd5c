//! Weights as small integers with one scale per row and group of columns, for inference.
//!
//! Rounds each group by itself to the nearest integers; needs no sample of text. Where integers
//! lie is decided in `pontoon_program`'s parameter table, how they are multiplied in the waist's
//! `MatmulQuant` and `GroupedMatmulQuant`. Read next: `upload.rs`.

use pontoon_ops::DType;
use pontoon_program::{Class, ParameterSpec, Storage};

/// How a model's matrices are stored on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// In the float dtype that is computed in.
    #[default]
    Float,
    /// 8 bits and a scale per 64: 8.5 bits a weight.
    Int8,
    /// 4 bits and a scale per 32: 5 bits a weight.
    Int4,
}

/// Columns that share a scale of 8-bit integers.
const GROUP_INT8: usize = 64;
/// The same of 4-bit integers, of which a smaller group is worth its scale.
const GROUP_INT4: usize = 32;

impl WeightFormat {
    /// How a parameter is stored in this format.
    pub(crate) fn storage(self, spec: &ParameterSpec) -> Storage {
        // A router decides by small differences, and is small itself.
        let multiplied = match spec.class {
            Class::Matrix => !spec.name.ends_with(".mlp.gate.weight"),
            Class::Embedding => !spec.name.ends_with("embed_tokens.weight"),
            Class::Vector | Class::Frozen => false,
        };
        let (Some(&width), true) = (spec.shape.last(), spec.shape.len() > 1) else {
            return Storage::Float;
        };
        match self {
            // Half bytes fill whole bytes only in rows of even width.
            WeightFormat::Int4 if multiplied && width % 2 == 0 => {
                Storage::Integers { dtype: DType::I4, group: GROUP_INT4 }
            }
            WeightFormat::Int4 | WeightFormat::Int8 if multiplied => {
                Storage::Integers { dtype: DType::I8, group: GROUP_INT8 }
            }
            _ => Storage::Float,
        }
    }
}

/// Quantises rows: appends their integers and scales.
pub(crate) fn quantise_rows(
    values: &[f32],
    width: usize,
    dtype: DType,
    group: usize,
    to: (&mut Vec<u8>, &mut Vec<f32>),
) {
    let (integers, scales) = to;
    for row in values.chunks_exact(width) {
        for group in row.chunks(group) {
            match dtype {
                DType::I4 => half_bytes(group, integers, scales),
                _ => bytes(group, integers, scales),
            }
        }
    }
}

/// The element with the greatest magnitude; 0 if there is none above 0.
fn peak(group: &[f32]) -> f32 {
    group.iter().fold(0.0, |peak: f32, &value| if value.abs() > peak.abs() { value } else { peak })
}

fn bytes(group: &[f32], integers: &mut Vec<u8>, scales: &mut Vec<f32>) {
    let scale = peak(group).abs() / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    scales.push(scale);
    integers.extend(group.iter().map(|value| (value * inverse).round() as i8 as u8));
}

/// The peak becomes -8, so that of the 16 values none is wasted; then the scale that fits the
/// rounded integers best in the least squares.
fn half_bytes(group: &[f32], integers: &mut Vec<u8>, scales: &mut Vec<f32>) {
    let scale = peak(group) / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let round = |value: f32| (value * inverse).round().clamp(-8.0, 7.0);
    let (product, square) = group.iter().fold((0.0, 0.0), |(product, square), &value| {
        let integer = round(value);
        (product + value * integer, square + integer * integer)
    });
    scales.push(if square > 0.0 { product / square } else { 0.0 });
    let half = |value: Option<&f32>| (round(value.copied().unwrap_or(0.0)) as i8 as u8) & 15;
    integers.extend(group.chunks(2).map(|pair| half(pair.first()) | half(pair.get(1)) << 4));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize) -> Vec<f32> {
        let stream = pontoon_ops::philox::Stream::new(5, 5);
        (0..count as u64).map(|at| stream.normal(at)).collect()
    }

    fn widened(integers: &[u8], dtype: DType) -> Vec<f32> {
        let halves = |&byte: &u8| [(byte << 4) as i8 >> 4, byte as i8 >> 4].map(f32::from);
        match dtype {
            DType::I4 => integers.iter().flat_map(halves).collect(),
            _ => integers.iter().map(|&byte| f32::from(byte as i8)).collect(),
        }
    }

    #[test]
    fn integers_times_scales_are_near_the_values_also_in_a_cut_off_group() {
        let (rows, width) = (5, 150);
        let values = values(rows * width);
        for (dtype, group, limit) in [(DType::I8, 64, 0.007), (DType::I4, 32, 0.11)] {
            let (mut integers, mut scales) = (Vec::new(), Vec::new());
            quantise_rows(&values, width, dtype, group, (&mut integers, &mut scales));
            assert_eq!(integers.len(), dtype.bytes(rows * width));
            assert_eq!(scales.len(), rows * width.div_ceil(group));
            let integers = widened(&integers, dtype);
            let of = |at: usize| scales[at / width * width.div_ceil(group) + at % width / group];
            let error: f32 = (0..rows * width)
                .map(|at| (integers[at] * of(at) - values[at]).powi(2))
                .sum::<f32>();
            let size: f32 = values.iter().map(|value| value * value).sum();
            assert!((error / size).sqrt() < limit, "{dtype}: {}", (error / size).sqrt());
        }
    }

    #[test]
    fn a_group_of_zeros_stays_zero_and_no_byte_is_the_one_without_opposite() {
        let (mut integers, mut scales) = (Vec::new(), Vec::new());
        for dtype in [DType::I8, DType::I4] {
            quantise_rows(&[0.0; 32], 32, dtype, 32, (&mut integers, &mut scales));
        }
        assert!(integers.iter().all(|&byte| byte == 0) && scales.iter().all(|&s| s == 0.0));
        let (mut integers, mut scales) = (Vec::new(), Vec::new());
        quantise_rows(&[-3.0, 3.0], 2, DType::I8, 64, (&mut integers, &mut scales));
        assert_eq!(integers, [-127_i8 as u8, 127]);
    }
}
