//! NEON on 64-bit Arm. Not tuned: the generic kernels over four-lane vectors.
//!
//! f16 goes through scalar conversion, because the vector conversion's types are not stable in
//! Rust.

#![allow(unused_unsafe, reason = "the intrinsics are safe where NEON is part of the target")]

use core::arch::aarch64::*;

use half::{bf16, f16};

use super::{Element, Kernel, Simd};

/// Whether the CPU has NEON (every 64-bit Arm application CPU has).
pub(super) fn is_present() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

/// Runs a kernel with NEON.
///
/// # Safety
/// [`is_present`] must have returned true.
#[target_feature(enable = "neon")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

/// Proof that the CPU has NEON.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// Four vectors as the rows of a square.
#[derive(Clone, Copy)]
pub(super) struct Square([float32x4_t; 4]);

impl AsRef<[float32x4_t]> for Square {
    #[inline(always)]
    fn as_ref(&self) -> &[float32x4_t] {
        &self.0
    }
}

impl AsMut<[float32x4_t]> for Square {
    #[inline(always)]
    fn as_mut(&mut self) -> &mut [float32x4_t] {
        &mut self.0
    }
}

/// The first four values, or all and zeros.
#[inline(always)]
fn four<T: Copy + Default>(from: &[T]) -> [T; 4] {
    let mut all = [T::default(); 4];
    if from.len() >= 4 {
        all.copy_from_slice(&from[..4]);
    } else {
        all[..from.len()].copy_from_slice(from);
    }
    all
}

/// Writes as many of the four values as fit.
#[inline(always)]
fn put<T: Copy>(all: [T; 4], to: &mut [T]) {
    if to.len() >= 4 {
        to[..4].copy_from_slice(&all);
    } else {
        let count = to.len();
        to.copy_from_slice(&all[..count]);
    }
}

// SAFETY of every block below: a value of `Neon` exists only inside `enter`, whose caller checked
// the CPU; memory is touched through arrays of the vector's size.
impl Neon {
    #[inline(always)]
    fn vector(self, all: [f32; 4]) -> float32x4_t {
        // SAFETY: see above.
        unsafe { vld1q_f32(all.as_ptr()) }
    }

    #[inline(always)]
    fn array(self, value: float32x4_t) -> [f32; 4] {
        let mut all = [0.0; 4];
        // SAFETY: see above.
        unsafe { vst1q_f32(all.as_mut_ptr(), value) };
        all
    }
}

impl Simd for Neon {
    type F32 = float32x4_t;
    type Square = Square;
    const LANES: usize = 4;
    const MICRO_ROWS: usize = 12;
    const BF16_DOT: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vdupq_n_f32(value) }
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> float32x4_t {
        self.vector(four(from))
    }
    #[inline(always)]
    fn store(self, value: float32x4_t, to: &mut [f32]) {
        put(self.array(value), to);
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16]) -> float32x4_t {
        let all = four(from).map(|value| value.to_bits());
        // SAFETY: see the first impl block.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(all.as_ptr()))) }
    }
    #[inline(always)]
    fn store_bf16(self, value: float32x4_t, to: &mut [bf16]) {
        let mut all = [0u16; 4];
        // SAFETY: see the first impl block.
        unsafe {
            let bits = vreinterpretq_u32_f32(value);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
            let chosen = vbslq_u32(vceqq_f32(value, value), rounded, quiet);
            vst1_u16(all.as_mut_ptr(), vshrn_n_u32::<16>(chosen));
        }
        put(all.map(bf16::from_bits), to);
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16]) -> float32x4_t {
        self.vector(four(from).map(Element::to_f32))
    }
    #[inline(always)]
    fn store_f16(self, value: float32x4_t, to: &mut [f16]) {
        put(self.array(value).map(f16::from_f32), to);
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block. The addend is the first operand here.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.select_gt(a, b, a, b)
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.select_gt(b, a, a, b)
    }
    #[inline(always)]
    fn sqrt(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vsqrtq_f32(a) }
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vabsq_f32(a) }
    }
    #[inline(always)]
    fn select_gt(
        self,
        a: float32x4_t,
        b: float32x4_t,
        yes: float32x4_t,
        no: float32x4_t,
    ) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe { vbslq_f32(vcgtq_f32(a, b), yes, no) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: float32x4_t, power: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block. Two factors: one cannot reach the subnormals.
        unsafe {
            let power = vcvtq_s32_f32(power);
            let half = vshrq_n_s32::<1>(power);
            let rest = vsubq_s32(power, half);
            let bias = vdupq_n_s32(127);
            let half = vshlq_n_s32::<23>(vaddq_s32(half, bias));
            let rest = vshlq_n_s32::<23>(vaddq_s32(rest, bias));
            let a = vmulq_f32(a, vreinterpretq_f32_s32(half));
            vmulq_f32(a, vreinterpretq_f32_s32(rest))
        }
    }
    #[inline(always)]
    fn reduce_sum(self, a: float32x4_t) -> f32 {
        let a = self.array(a);
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn add_words(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe {
            let sum = vaddq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b));
            vreinterpretq_f32_u32(sum)
        }
    }
    #[inline(always)]
    fn reduce_words(self, a: float32x4_t) -> u32 {
        let lanes = self.array(a);
        lanes.iter().fold(0, |sum: u32, lane| sum.wrapping_add(lane.to_bits()))
    }
    #[inline(always)]
    fn reduce_max(self, a: float32x4_t) -> f32 {
        self.array(a).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn transpose(self, square: Square) -> Square {
        let rows = square.0.map(|row| self.array(row));
        let column = |i: usize| self.vector([rows[0][i], rows[1][i], rows[2][i], rows[3][i]]);
        Square([column(0), column(1), column(2), column(3)])
    }
    #[inline(always)]
    fn square(self) -> Square {
        Square([self.zero(); 4])
    }
    #[inline(always)]
    fn load_pairs(self, from: &[bf16]) -> float32x4_t {
        let bits = |index: usize| from.get(index).map_or(0, |value| u32::from(value.to_bits()));
        let pair = |lane: usize| f32::from_bits(bits(2 * lane) | bits(2 * lane + 1) << 16);
        self.vector([pair(0), pair(1), pair(2), pair(3)])
    }
    #[inline(always)]
    fn merge_pairs(self, even: float32x4_t, odd: float32x4_t) -> float32x4_t {
        // SAFETY: see the first impl block.
        unsafe {
            let even = vshrq_n_u32::<16>(vreinterpretq_u32_f32(even));
            vreinterpretq_f32_u32(vorrq_u32(even, vreinterpretq_u32_f32(odd)))
        }
    }
    #[inline(always)]
    fn dot_pairs(self, _acc: float32x4_t, _a: float32x4_t, _b: float32x4_t) -> float32x4_t {
        unreachable!("this set does not use the dot product of pairs")
    }
    #[inline(always)]
    fn widen_bytes(self, raw: float32x4_t) -> [float32x4_t; 4] {
        // SAFETY: the set is present.
        unsafe {
            let raw = vreinterpretq_s32_f32(raw);
            let byte = |up: i32| {
                let top = vshlq_s32(raw, vdupq_n_s32(up));
                vcvtq_f32_s32(vshrq_n_s32::<24>(top))
            };
            [byte(24), byte(16), byte(8), byte(0)]
        }
    }
    #[inline(always)]
    fn widen_half_bytes(self, raw: float32x4_t) -> [float32x4_t; 8] {
        // SAFETY: the set is present.
        unsafe {
            let raw = vreinterpretq_s32_f32(raw);
            let half = |up: i32| {
                let top = vshlq_s32(raw, vdupq_n_s32(up));
                vcvtq_f32_s32(vshrq_n_s32::<28>(top))
            };
            [half(28), half(24), half(20), half(16), half(12), half(8), half(4), half(0)]
        }
    }
    fn pair_bytes(self, _raw: float32x4_t) -> [float32x4_t; 2] {
        unreachable!("this set has no dot product of pairs");
    }
    fn pair_half_bytes(self, _raw: float32x4_t) -> [float32x4_t; 4] {
        unreachable!("this set has no dot product of pairs");
    }
    #[inline(always)]
    unsafe fn load_raw(self, from: *const u8) -> float32x4_t {
        // SAFETY: the caller promises 16 readable bytes.
        unsafe { vreinterpretq_f32_u8(vld1q_u8(from)) }
    }
    #[inline(always)]
    unsafe fn load_columns(self, from: *const u8, row_bytes: usize) -> [float32x4_t; 4] {
        // SAFETY: the caller promises the rows.
        unsafe {
            let row = |row: usize| self.load_raw(from.add(row * row_bytes));
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            let (even_ab, odd_ab) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
            let (even_cd, odd_cd) = (vtrn1q_f32(c, d), vtrn2q_f32(c, d));
            let low = |a, b| vcombine_f32(vget_low_f32(a), vget_low_f32(b));
            let high = |a, b| vcombine_f32(vget_high_f32(a), vget_high_f32(b));
            [
                low(even_ab, even_cd),
                low(odd_ab, odd_cd),
                high(even_ab, even_cd),
                high(odd_ab, odd_cd),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_raw(self, value: float32x4_t, to: *mut u8) {
        // SAFETY: the caller promises 16 writable bytes.
        unsafe { vst1q_u8(to, vreinterpretq_u8_f32(value)) };
    }
    #[inline(always)]
    unsafe fn splat_raw(self, from: *const u8) -> float32x4_t {
        // SAFETY: the caller promises 4 readable bytes; the set is present.
        unsafe { vdupq_n_f32(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    fn prefetch(self, _from: *const u8) {}
}
