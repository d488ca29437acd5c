//! Element types of tensors on the waist, their sizes and their rounding units.
//!
//! Does not convert values: that is the `half` crate's work on the host, a backend's on a device.

use serde::{Deserialize, Serialize};

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision; also the type of every accumulator.
    F32,
    /// The upper half of an `F32`: 8 exponent bits, 7 fraction bits.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// Signed 32-bit integer: token ids, positions, offsets.
    I32,
    /// Unsigned 32-bit integer: random keys.
    U32,
    /// 8-bit float with 4 exponent and 3 fraction bits (OCP e4m3, no infinity); weights only.
    F8e4m3,
    /// Signed 8-bit integer; quantised weights only.
    I8,
    /// Signed 4-bit integer, two to a byte, low half first; quantised weights only.
    I4,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [DType; 8] = [
        DType::F32,
        DType::Bf16,
        DType::F16,
        DType::I32,
        DType::U32,
        DType::F8e4m3,
        DType::I8,
        DType::I4,
    ];

    /// The types in which activations and compute weights may be stored.
    pub const FLOATS: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// Bits one element takes in memory.
    pub const fn bits(self) -> usize {
        match self {
            DType::F32 | DType::I32 | DType::U32 => 32,
            DType::Bf16 | DType::F16 => 16,
            DType::F8e4m3 | DType::I8 => 8,
            DType::I4 => 4,
        }
    }

    /// Bytes that `elements` elements take, rounded up to whole bytes.
    pub const fn bytes(self, elements: usize) -> usize {
        (elements * self.bits()).div_ceil(8)
    }

    /// The distance from 1.0 to the next larger number, for float types; 0 for integers.
    pub const fn epsilon(self) -> f64 {
        match self {
            DType::F32 => f32::EPSILON as f64,
            DType::Bf16 => 1.0 / 128.0,
            DType::F16 => 1.0 / 1024.0,
            DType::F8e4m3 => 1.0 / 8.0,
            DType::I32 | DType::U32 | DType::I8 | DType::I4 => 0.0,
        }
    }

    /// Whether this is a float type for activations and compute weights.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::Bf16 | DType::F16)
    }

    /// The name used in reports, run files and safetensors headers' lower-case form.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::F8e4m3 => "f8e4m3",
            DType::I8 => "i8",
            DType::I4 => "i4",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_counts_of_four_bit_elements_round_up_to_a_byte() {
        assert_eq!(DType::I4.bytes(3), 2);
        assert_eq!(DType::Bf16.bytes(3), 6);
    }
}
