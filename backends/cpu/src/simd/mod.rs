//! One vector interface over every instruction set the CPU backend knows, chosen once at run time.
//!
//! A kernel is a struct that implements [`Kernel`]; [`dispatch`] runs it with the chosen
//! instruction set compiled in. Everything a kernel calls must be `#[inline(always)]`, and closures
//! must stay small, so that the whole body is compiled with the wrapper's target features.
//!
//! ```
//! use pontoon_cpu::simd::{Element, Isa, Kernel, Simd, dispatch};
//!
//! /// Multiplies a row by a factor in place.
//! struct Scale<'a, T> {
//!     row: &'a mut [T],
//!     factor: f32,
//! }
//!
//! impl<T: Element> Kernel for Scale<'_, T> {
//!     type Output = ();
//!     #[inline(always)]
//!     fn run<S: Simd>(self, simd: S) {
//!         let factor = simd.splat(self.factor);
//!         for chunk in self.row.chunks_mut(S::LANES) {
//!             // `load` reads missing lanes of a short last chunk as zero; `store` skips them.
//!             let value = T::load(simd, chunk);
//!             T::store(simd, simd.mul(value, factor), chunk);
//!         }
//!     }
//! }
//!
//! let mut row = vec![1.0f32; 37];
//! dispatch(Isa::detect().expect("a known set"), Scale { row: &mut row, factor: 2.0 });
//! assert!(row.iter().all(|&value| value == 2.0));
//! ```
//!
//! The files here are the only ones besides `ffi.rs` that hold `unsafe`: an instruction set plays
//! the part a vendor's library plays for other chips. No algorithm lives here except the inner
//! loops in [`micro`], [`columns`], [`panels`] and [`quantised`]; matrix products are in `gemm/`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod columns;
mod element;
mod isa;
mod math;
pub(crate) mod micro;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod panels;
mod portable;
pub(crate) mod quantised;
#[cfg(test)]
mod tests;

pub use element::Element;
pub use isa::{Geometry, ISA_VARIABLE, Isa, IsaError, dispatch};

use half::{bf16, f16};

/// Asks for the cache line at `from` to come to the second level; any address is allowed.
#[inline]
pub(crate) fn prefetch(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    avx2::prefetch(from);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// A piece of work compiled once for every instruction set.
pub trait Kernel {
    /// What [`dispatch`] returns.
    type Output;
    /// Does the work. Implementations must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set's vectors of f32, and how to work on them.
///
/// A value of this type proves that the CPU has the instructions, so the methods are safe. Loads
/// read `LANES` elements when the slice has them; a shorter slice fills the missing lanes with
/// zero. Stores write `min(LANES, slice length)` lanes.
pub trait Simd: Copy + Send + Sync + 'static {
    /// A vector of `LANES` f32 values.
    type F32: Copy + Send + Sync;
    /// `LANES` vectors, as rows of a square.
    type Square: Copy + AsRef<[Self::F32]> + AsMut<[Self::F32]>;
    /// f32 values in one vector.
    const LANES: usize;
    /// Rows of the register tile of matrix products; its width is two vectors.
    const MICRO_ROWS: usize;
    /// Whether [`Simd::dot_pairs`] exists in hardware.
    const BF16_DOT: bool;

    /// All lanes equal to `value`.
    fn splat(self, value: f32) -> Self::F32;
    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }
    /// Reads f32 values.
    fn load(self, from: &[f32]) -> Self::F32;
    /// Writes f32 values.
    fn store(self, value: Self::F32, to: &mut [f32]);
    /// Reads bf16 values, widened exactly.
    fn load_bf16(self, from: &[bf16]) -> Self::F32;
    /// Writes bf16 values, rounded to nearest even; NaN stays NaN.
    fn store_bf16(self, value: Self::F32, to: &mut [bf16]);
    /// Reads f16 values, widened exactly.
    fn load_f16(self, from: &[f16]) -> Self::F32;
    /// Writes f16 values, rounded to nearest even; NaN stays NaN.
    fn store_f16(self, value: Self::F32, to: &mut [f16]);

    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`, correctly rounded.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c` with one rounding.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `a > b ? a : b`, so `b` where either is NaN. Pass the running value second to keep its NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a < b ? a : b`, so `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Square root, correctly rounded.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::F32) -> Self::F32;
    /// Magnitude.
    fn abs(self, a: Self::F32) -> Self::F32;
    /// Per lane `a > b ? yes : no`; false where either is NaN.
    fn select_gt(self, a: Self::F32, b: Self::F32, yes: Self::F32, no: Self::F32) -> Self::F32;
    /// `a * 2^power` for integral `power` in -300..=300, right into the subnormals.
    fn scale_by_power(self, a: Self::F32, power: Self::F32) -> Self::F32;
    /// `-a`.
    #[inline(always)]
    fn neg(self, a: Self::F32) -> Self::F32 {
        self.sub(self.splat(-0.0), a)
    }
    /// `e^a` within 2 ulp over the whole range; subnormal results included; NaN stays NaN.
    #[inline(always)]
    fn exp(self, a: Self::F32) -> Self::F32 {
        math::exp(self, a)
    }

    /// Sum of all lanes, always along the same tree: halves are added until one lane is left.
    fn reduce_sum(self, a: Self::F32) -> f32;
    /// Adds raw lanes as 32-bit integers, modulo 2^32.
    fn add_words(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Sum of all raw lanes as 32-bit integers, modulo 2^32.
    fn reduce_words(self, a: Self::F32) -> u32;
    /// Largest lane; NaN lanes may or may not be passed over.
    fn reduce_max(self, a: Self::F32) -> f32;

    /// Swaps rows and columns of 32-bit elements.
    fn transpose(self, square: Self::Square) -> Self::Square;
    /// A square of zeros, to be filled.
    fn square(self) -> Self::Square;
    /// Reads consecutive bf16 pairs as the raw bits of 32-bit lanes; missing elements are zero.
    fn load_pairs(self, from: &[bf16]) -> Self::F32;
    /// Joins two vectors of widened bf16 values into raw pairs, `even` in the low halves.
    fn merge_pairs(self, even: Self::F32, odd: Self::F32) -> Self::F32;
    /// `acc + a.even * b.even + a.odd * b.odd` on raw bf16 pairs, in the hardware's own rounding.
    /// Panics where `BF16_DOT` is false.
    fn dot_pairs(self, acc: Self::F32, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Widens the 4 signed bytes of each lane into 4 vectors, the lowest byte first.
    fn widen_bytes(self, raw: Self::F32) -> [Self::F32; 4];
    /// Widens the 8 signed half bytes of each lane into 8 vectors, the lowest half byte first.
    fn widen_half_bytes(self, raw: Self::F32) -> [Self::F32; 8];
    /// As [`Simd::widen_bytes`], into raw bf16 pairs: bytes 0 and 1, then bytes 2 and 3. No byte
    /// may be -128. Panics where `BF16_DOT` is false.
    fn pair_bytes(self, raw: Self::F32) -> [Self::F32; 2];
    /// As [`Simd::widen_half_bytes`], into raw bf16 pairs of neighbours. Panics where `BF16_DOT`
    /// is false.
    fn pair_half_bytes(self, raw: Self::F32) -> [Self::F32; 4];
    /// Reads `LANES` raw 32-bit lanes.
    ///
    /// # Safety
    /// `from` must be readable for `LANES * 4` bytes; any alignment.
    unsafe fn load_raw(self, from: *const u8) -> Self::F32;
    /// Writes `LANES` raw 32-bit lanes.
    ///
    /// # Safety
    /// `to` must be writable for `LANES * 4` bytes; any alignment.
    unsafe fn store_raw(self, value: Self::F32, to: *mut u8);
    /// Reads 4 raw 32-bit values from each of `LANES` rows, transposed: lanes of the results are
    /// rows.
    ///
    /// # Safety
    /// 16 bytes must be readable at `from + row * row_bytes` for every row; any alignment.
    unsafe fn load_columns(self, from: *const u8, row_bytes: usize) -> [Self::F32; 4];
    /// Reads one raw 32-bit value into all lanes.
    ///
    /// # Safety
    /// `from` must be readable for 4 bytes; any alignment.
    unsafe fn splat_raw(self, from: *const u8) -> Self::F32;
    /// Asks for the cache line at `from` to come to the second level; any address is allowed.
    fn prefetch(self, from: *const u8);
}
