//! The storage types of tensors, each with the way it becomes a vector of f32 and back.
//!
//! Kernels that are generic over storage take `T: Element`. Integer and 8-bit types are not here.

use half::{bf16, f16};

use super::Simd;

/// A storage type that kernels read and write as f32.
pub trait Element: bytemuck::Pod + Send + Sync + PartialEq + core::fmt::Debug {
    /// Widens exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even; NaN stays NaN.
    fn from_f32(value: f32) -> Self;
    /// Reads up to `LANES` values; missing lanes are zero.
    fn load<S: Simd>(simd: S, from: &[Self]) -> S::F32;
    /// Writes up to `LANES` values.
    fn store<S: Simd>(simd: S, value: S::F32, to: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self]) -> S::F32 {
        simd.load(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, value: S::F32, to: &mut [Self]) {
        simd.store(value, to);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self]) -> S::F32 {
        simd.load_bf16(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, value: S::F32, to: &mut [Self]) {
        simd.store_bf16(value, to);
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &[Self]) -> S::F32 {
        simd.load_f16(from)
    }
    #[inline(always)]
    fn store<S: Simd>(simd: S, value: S::F32, to: &mut [Self]) {
        simd.store_f16(value, to);
    }
}
