//! Functions built from the vector primitives, the same for every instruction set.
//!
//! Only what kernels need is here; the accuracy bounds are tested in `tests.rs` against f64.

use super::Simd;

/// log2(e).
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln(2) in two parts: the high part has 15 trailing zero bits, so `n * LN2_HIGH` is exact.
const LN2_HIGH: f32 = 355.0 / 512.0;
/// The rest of ln(2).
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Above this the result is infinite; the power stays within what two factors can express.
const INPUT_MAX: f32 = 100.0;
/// Below this the result is zero (ln of half the smallest subnormal is -103.97).
const INPUT_MIN: f32 = -110.0;

/// `e^x`: x = n ln2 + r with |r| <= ln2 / 2, a polynomial for e^r, then the exponent is added.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    // The input is the second operand, so that a NaN passes through both bounds.
    let x = simd.min(simd.splat(INPUT_MAX), x);
    let x = simd.max(simd.splat(INPUT_MIN), x);
    let power = simd.round(simd.mul(x, simd.splat(LOG2_E)));
    let rest = simd.fma(power, simd.splat(-LN2_HIGH), x);
    let rest = simd.fma(power, simd.splat(-LN2_LOW), rest);
    // Taylor coefficients up to r^7 leave an error below 6e-9 for |r| <= 0.347.
    let mut poly = simd.splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        poly = simd.fma(poly, rest, simd.splat(coefficient));
    }
    simd.scale_by_power(poly, power)
}
