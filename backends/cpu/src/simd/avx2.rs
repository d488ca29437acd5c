//! AVX2 with FMA and F16C: every x86 CPU since about 2013.
//!
//! Short slices go through a small array on the stack; kernels keep them to the ends of rows.

use core::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Whether the CPU has everything this set uses.
pub(super) fn is_present() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Runs a kernel with AVX2.
///
/// # Safety
/// [`is_present`] must have returned true.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Eight vectors as the rows of a square.
#[derive(Clone, Copy)]
pub(super) struct Square([__m256; 8]);

impl AsRef<[__m256]> for Square {
    #[inline(always)]
    fn as_ref(&self) -> &[__m256] {
        &self.0
    }
}

impl AsMut<[__m256]> for Square {
    #[inline(always)]
    fn as_mut(&mut self) -> &mut [__m256] {
        &mut self.0
    }
}

/// The first eight values, or all and zeros.
#[inline(always)]
fn eight<T: Copy + Default>(from: &[T]) -> [T; 8] {
    let mut all = [T::default(); 8];
    if from.len() >= 8 {
        all.copy_from_slice(&from[..8]);
    } else {
        all[..from.len()].copy_from_slice(from);
    }
    all
}

/// Writes as many of the eight values as fit.
#[inline(always)]
fn put<T: Copy>(all: [T; 8], to: &mut [T]) {
    if to.len() >= 8 {
        to[..8].copy_from_slice(&all);
    } else {
        let count = to.len();
        to.copy_from_slice(&all[..count]);
    }
}

// SAFETY of every block below: a value of `Avx2` exists only inside `enter`, whose caller checked
// the CPU; memory is touched through arrays of the vector's size.
impl Simd for Avx2 {
    type F32 = __m256;
    type Square = Square;
    const LANES: usize = 8;
    const MICRO_ROWS: usize = 6;
    const BF16_DOT: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(eight(from).as_ptr()) }
    }
    #[inline(always)]
    fn store(self, value: __m256, to: &mut [f32]) {
        // SAFETY: see above; the vector and the array have one size.
        put(unsafe { core::mem::transmute::<__m256, [f32; 8]>(value) }, to);
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16]) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let raw = _mm_loadu_si128(eight(from).as_ptr().cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(raw)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, value: __m256, to: &mut [bf16]) {
        // SAFETY: see above.
        let all = unsafe {
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_add_epi32(bits, bias);
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let chosen = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            // Both halves hold values below 2^16, so unsigned saturation keeps them.
            let low = _mm256_castsi256_si128(chosen);
            let packed = _mm_packus_epi32(low, _mm256_extracti128_si256::<1>(chosen));
            core::mem::transmute::<__m128i, [bf16; 8]>(packed)
        };
        put(all, to);
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16]) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(eight(from).as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, value: __m256, to: &mut [f16]) {
        // SAFETY: see above.
        let all = unsafe {
            let raw = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
            core::mem::transmute::<__m128i, [f16; 8]>(raw)
        };
        put(all, to);
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sqrt_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    fn select_gt(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m256, power: __m256) -> __m256 {
        // SAFETY: see above. Two factors, because one power of two cannot reach the subnormals.
        unsafe {
            let power = _mm256_cvtps_epi32(power);
            let half = _mm256_srai_epi32::<1>(power);
            let rest = _mm256_sub_epi32(power, half);
            let bias = _mm256_set1_epi32(127);
            let half = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let rest = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
            let a = _mm256_mul_ps(a, _mm256_castsi256_ps(half));
            _mm256_mul_ps(a, _mm256_castsi256_ps(rest))
        }
    }
    #[inline(always)]
    fn reduce_sum(self, a: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn add_words(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)))
        }
    }
    #[inline(always)]
    fn reduce_words(self, a: __m256) -> u32 {
        let mut lanes = [0.0_f32; 8];
        self.store(a, &mut lanes);
        lanes.iter().fold(0, |sum: u32, lane| sum.wrapping_add(lane.to_bits()))
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn transpose(self, square: Square) -> Square {
        // SAFETY: see above.
        unsafe { transpose(square) }
    }
    #[inline(always)]
    fn square(self) -> Square {
        Square([self.zero(); 8])
    }
    #[inline(always)]
    fn load_pairs(self, from: &[bf16]) -> __m256 {
        let mut all = [bf16::ZERO; 16];
        let count = from.len().min(16);
        all[..count].copy_from_slice(&from[..count]);
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(all.as_ptr().cast()) }
    }
    #[inline(always)]
    fn merge_pairs(self, even: __m256, odd: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let even = _mm256_srli_epi32::<16>(_mm256_castps_si256(even));
            _mm256_castsi256_ps(_mm256_or_si256(even, _mm256_castps_si256(odd)))
        }
    }
    #[inline(always)]
    fn dot_pairs(self, _acc: __m256, _a: __m256, _b: __m256) -> __m256 {
        unreachable!("AVX2 has no dot product of pairs")
    }
    #[inline(always)]
    fn widen_bytes(self, raw: __m256) -> [__m256; 4] {
        // SAFETY: see the first impl block.
        unsafe {
            let raw = _mm256_castps_si256(raw);
            [
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(raw)),
            ]
        }
    }
    #[inline(always)]
    fn widen_half_bytes(self, raw: __m256) -> [__m256; 8] {
        // SAFETY: see the first impl block.
        unsafe {
            let raw = _mm256_castps_si256(raw);
            [
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<28>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<24>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<20>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<16>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<12>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<8>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(_mm256_slli_epi32::<4>(raw))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<28>(raw)),
            ]
        }
    }
    fn pair_bytes(self, _raw: __m256) -> [__m256; 2] {
        unreachable!("AVX2 has no dot product of pairs");
    }
    fn pair_half_bytes(self, _raw: __m256) -> [__m256; 4] {
        unreachable!("AVX2 has no dot product of pairs");
    }
    #[inline(always)]
    unsafe fn load_raw(self, from: *const u8) -> __m256 {
        // SAFETY: the caller promises 32 readable bytes.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_columns(self, from: *const u8, row_bytes: usize) -> [__m256; 4] {
        // SAFETY: the caller promises the rows.
        unsafe {
            let a = every_fourth_row(from, row_bytes);
            let b = every_fourth_row(from.add(row_bytes), row_bytes);
            let c = every_fourth_row(from.add(2 * row_bytes), row_bytes);
            let d = every_fourth_row(from.add(3 * row_bytes), row_bytes);
            let (low_ab, high_ab) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (low_cd, high_cd) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            [
                _mm256_shuffle_ps::<0x44>(low_ab, low_cd),
                _mm256_shuffle_ps::<0xee>(low_ab, low_cd),
                _mm256_shuffle_ps::<0x44>(high_ab, high_cd),
                _mm256_shuffle_ps::<0xee>(high_ab, high_cd),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_raw(self, value: __m256, to: *mut u8) {
        // SAFETY: the caller promises 32 writable bytes.
        unsafe { _mm256_storeu_ps(to.cast(), value) };
    }
    #[inline(always)]
    unsafe fn splat_raw(self, from: *const u8) -> __m256 {
        // SAFETY: the caller promises 4 readable bytes.
        unsafe { _mm256_set1_ps(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        prefetch(from);
    }
}

/// Asks for a cache line; every 64-bit processor has the instruction.
#[inline(always)]
pub(super) fn prefetch(from: *const u8) {
    // SAFETY: a prefetch of any address has no effect but on the cache.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
}

/// 8x8 transpose in three rounds.
///
/// # Safety
/// The CPU must have AVX2.
#[inline(always)]
unsafe fn transpose(square: Square) -> Square {
    let rows = square.0;
    // SAFETY: the caller promises the instructions.
    unsafe {
        let mut a = rows;
        for i in 0..4 {
            a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut b = a;
        for i in 0..2 {
            b[4 * i] = _mm256_shuffle_ps::<0x44>(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm256_shuffle_ps::<0x44>(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm256_shuffle_ps::<0xee>(a[4 * i + 1], a[4 * i + 3]);
        }
        let mut out = b;
        for c in 0..4 {
            out[c] = _mm256_permute2f128_ps::<0x20>(b[c], b[4 + c]);
            out[4 + c] = _mm256_permute2f128_ps::<0x31>(b[c], b[4 + c]);
        }
        Square(out)
    }
}

/// Four values from each of two rows that are four rows apart. A function, as a closure would not
/// be compiled with the caller's instructions.
///
/// # Safety
/// 16 bytes must be readable in each row, and the CPU must have AVX.
#[inline(always)]
unsafe fn every_fourth_row(from: *const u8, row_bytes: usize) -> __m256 {
    // SAFETY: the caller promises the rows and the instructions.
    unsafe {
        let low = _mm_loadu_ps(from.cast());
        let high = _mm_loadu_ps(from.add(4 * row_bytes).cast());
        _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
    }
}
