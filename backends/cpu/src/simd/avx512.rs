//! AVX-512 (F, BW, DQ, VL), with or without the bf16 dot product of AVX512_BF16. The dot product
//! comes with the byte permutations of AVX512_VBMI, by which quantised weights become bf16.
//!
//! Conversion to bf16 is done with integer instructions, not `vcvtneps2bf16`, which flushes
//! subnormals to zero: storage must hold the same bits whatever the instruction set.

use core::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Whether the CPU has everything the plain set uses.
pub(super) fn is_present() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether the CPU has the dot product of bf16 pairs and the permutations of bytes.
pub(super) fn is_bf16_present() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vbmi")
}

/// Runs a kernel with AVX-512.
///
/// # Safety
/// [`is_present`] must have returned true.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<false>(()))
}

/// Runs a kernel with AVX-512 and its bf16 dot product.
///
/// # Safety
/// [`is_present`] and [`is_bf16_present`] must have returned true.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx2,fma,f16c")]
pub(super) unsafe fn enter_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<true>(()))
}

/// Proof that the CPU has AVX-512, and AVX512_BF16 where `DOT` is true.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const DOT: bool>(());

/// Sixteen vectors as the rows of a square.
#[derive(Clone, Copy)]
pub(super) struct Square([__m512; 16]);

impl AsRef<[__m512]> for Square {
    #[inline(always)]
    fn as_ref(&self) -> &[__m512] {
        &self.0
    }
}

impl AsMut<[__m512]> for Square {
    #[inline(always)]
    fn as_mut(&mut self) -> &mut [__m512] {
        &mut self.0
    }
}

/// The upper or lower byte of the bf16 value of every number below 128.
const fn byte_of_bf16(shift: u32) -> [u8; 128] {
    let mut table = [0; 128];
    let mut number = 0;
    while number < 128 {
        table[number] = ((number as f32).to_bits() >> (16 + shift)) as u8;
        number += 1;
    }
    table
}

/// Where the bytes of a lane's pair come from: two neighbours' low bytes in one vector, their high
/// bytes in the next.
const fn pair_places(first: usize) -> [u8; 64] {
    let mut places = [0; 64];
    let mut lane = 0;
    while lane < 16 {
        let byte = (4 * lane + first) as u8;
        places[4 * lane] = byte;
        places[4 * lane + 1] = 64 + byte;
        places[4 * lane + 2] = byte + 1;
        places[4 * lane + 3] = 64 + byte + 1;
        lane += 1;
    }
    places
}

/// The value of a signed half byte, by its bits.
const fn half_byte_bits(shift: u32) -> [u32; 16] {
    let mut table = [0; 16];
    let mut bits = 0;
    while bits < 16 {
        let value = if bits < 8 { bits as i32 } else { bits as i32 - 16 };
        table[bits] = (value as f32).to_bits() >> shift;
        bits += 1;
    }
    table
}

static LOW_BYTES: [u8; 128] = byte_of_bf16(0);
static HIGH_BYTES: [u8; 128] = byte_of_bf16(8);
static FIRST_PAIRS: [u8; 64] = pair_places(0);
static SECOND_PAIRS: [u8; 64] = pair_places(2);
static HALF_BYTES: [u32; 16] = half_byte_bits(0);
static HALF_BYTES_LOW: [u32; 16] = half_byte_bits(16);

/// Mask of the first `count` of 16 lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    debug_assert!(count < 16);
    ((1u32 << count) - 1) as __mmask16
}

// SAFETY of every block below: a value of `Avx512` exists only inside `enter` and `enter_bf16`,
// whose callers checked the CPU; loads and stores stay within the slices, by the length or by a
// mask.
impl<const DOT: bool> Avx512<DOT> {
    /// Round to nearest even by integer arithmetic; NaN keeps its top bits and becomes quiet.
    #[inline(always)]
    fn narrow(self, value: __m512) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_add_epi32(bits, bias);
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen))
        }
    }

    #[inline(always)]
    fn load_u16(self, from: *const u16, count: usize) -> __m256i {
        // SAFETY: see above; callers pass a slice's start and length.
        unsafe {
            if count >= 16 {
                _mm256_loadu_si256(from.cast())
            } else {
                _mm256_maskz_loadu_epi16(first(count), from.cast())
            }
        }
    }

    #[inline(always)]
    fn store_u16(self, value: __m256i, to: *mut u16, count: usize) {
        // SAFETY: see above; callers pass a slice's start and length.
        unsafe {
            if count >= 16 {
                _mm256_storeu_si256(to.cast(), value);
            } else {
                _mm256_mask_storeu_epi16(to.cast(), first(count), value);
            }
        }
    }
}

impl<const DOT: bool> Simd for Avx512<DOT> {
    type F32 = __m512;
    type Square = Square;
    const LANES: usize = 16;
    const MICRO_ROWS: usize = 12;
    const BF16_DOT: bool = DOT;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe {
            if from.len() >= 16 {
                _mm512_loadu_ps(from.as_ptr())
            } else {
                _mm512_maskz_loadu_ps(first(from.len()), from.as_ptr())
            }
        }
    }
    #[inline(always)]
    fn store(self, value: __m512, to: &mut [f32]) {
        // SAFETY: see the first impl block.
        unsafe {
            if to.len() >= 16 {
                _mm512_storeu_ps(to.as_mut_ptr(), value);
            } else {
                _mm512_mask_storeu_ps(to.as_mut_ptr(), first(to.len()), value);
            }
        }
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16]) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe {
            let raw = self.load_u16(from.as_ptr().cast(), from.len());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
        }
    }
    #[inline(always)]
    fn store_bf16(self, value: __m512, to: &mut [bf16]) {
        self.store_u16(self.narrow(value), to.as_mut_ptr().cast(), to.len());
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16]) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_cvtph_ps(self.load_u16(from.as_ptr().cast(), from.len())) }
    }
    #[inline(always)]
    fn store_f16(self, value: __m512, to: &mut [f16]) {
        // SAFETY: see the first impl block.
        let raw = unsafe { _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value) };
        self.store_u16(raw, to.as_mut_ptr().cast(), to.len());
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(a) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn select_gt(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), no, yes) }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m512, power: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_scalef_ps(a, power) }
    }
    #[inline(always)]
    fn reduce_sum(self, a: __m512) -> f32 {
        // SAFETY: see the first impl block.
        unsafe {
            let high = _mm512_extractf32x8_ps::<1>(a);
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), high);
            let high = _mm256_extractf128_ps::<1>(eight);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), high);
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn add_words(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe {
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
        }
    }
    #[inline(always)]
    fn reduce_words(self, a: __m512) -> u32 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_reduce_add_epi32(_mm512_castps_si512(a)).cast_unsigned() }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        // SAFETY: see the first impl block.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn transpose(self, square: Square) -> Square {
        // SAFETY: see the first impl block.
        unsafe { transpose(square) }
    }
    #[inline(always)]
    fn square(self) -> Square {
        Square([self.zero(); 16])
    }
    #[inline(always)]
    fn load_pairs(self, from: &[bf16]) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe {
            if from.len() >= 32 {
                _mm512_loadu_ps(from.as_ptr().cast())
            } else {
                let mask = (1u32 << from.len()) - 1;
                _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from.as_ptr().cast()))
            }
        }
    }
    #[inline(always)]
    fn merge_pairs(self, even: __m512, odd: __m512) -> __m512 {
        // SAFETY: see the first impl block.
        unsafe {
            let even = _mm512_srli_epi32::<16>(_mm512_castps_si512(even));
            _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_castps_si512(odd)))
        }
    }
    #[inline(always)]
    fn dot_pairs(self, acc: __m512, a: __m512, b: __m512) -> __m512 {
        assert!(DOT, "this set was entered without the dot product of pairs");
        // SAFETY: see the first impl block; `DOT` is true only inside `enter_bf16`. The three
        // vector types have one size and no invalid bits.
        unsafe {
            let a = core::mem::transmute::<__m512, __m512bh>(a);
            let b = core::mem::transmute::<__m512, __m512bh>(b);
            _mm512_dpbf16_ps(acc, a, b)
        }
    }
    #[inline(always)]
    fn widen_bytes(self, raw: __m512) -> [__m512; 4] {
        // SAFETY: see the first impl block.
        unsafe {
            let raw = _mm512_castps_si512(raw);
            [
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(raw))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(raw))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(raw))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(raw)),
            ]
        }
    }
    #[inline(always)]
    fn widen_half_bytes(self, raw: __m512) -> [__m512; 8] {
        // A permutation of lanes reads four bits of its index, so it is a table of 16 values.
        // SAFETY: see the first impl block.
        unsafe {
            let raw = _mm512_castps_si512(raw);
            let table = _mm512_loadu_ps(HALF_BYTES.as_ptr().cast());
            [
                _mm512_permutexvar_ps(raw, table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(raw), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(raw), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(raw), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(raw), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<20>(raw), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(raw), table),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<28>(raw), table),
            ]
        }
    }
    #[inline(always)]
    fn pair_bytes(self, raw: __m512) -> [__m512; 2] {
        assert!(DOT, "this set was entered without the dot product of pairs");
        // Both bytes of a bf16 are looked up by the magnitude, then the sign is set.
        // SAFETY: see the first impl block; AVX512_VBMI is there where `DOT` is true.
        unsafe {
            let raw = _mm512_castps_si512(raw);
            let size = _mm512_abs_epi8(raw);
            let near = _mm512_loadu_si512(LOW_BYTES.as_ptr().cast());
            let far = _mm512_loadu_si512(LOW_BYTES.as_ptr().add(64).cast());
            let low = _mm512_permutex2var_epi8(near, size, far);
            let near = _mm512_loadu_si512(HIGH_BYTES.as_ptr().cast());
            let far = _mm512_loadu_si512(HIGH_BYTES.as_ptr().add(64).cast());
            let high = _mm512_permutex2var_epi8(near, size, far);
            // high | (raw & sign)
            let sign = _mm512_set1_epi8(-128);
            let high = _mm512_ternarylogic_epi32::<0xf8>(high, raw, sign);
            let first = _mm512_loadu_si512(FIRST_PAIRS.as_ptr().cast());
            let second = _mm512_loadu_si512(SECOND_PAIRS.as_ptr().cast());
            [
                _mm512_castsi512_ps(_mm512_permutex2var_epi8(low, first, high)),
                _mm512_castsi512_ps(_mm512_permutex2var_epi8(low, second, high)),
            ]
        }
    }
    #[inline(always)]
    fn pair_half_bytes(self, raw: __m512) -> [__m512; 4] {
        assert!(DOT, "this set was entered without the dot product of pairs");
        // SAFETY: see the first impl block.
        unsafe {
            let raw = _mm512_castps_si512(raw);
            let high = _mm512_loadu_ps(HALF_BYTES.as_ptr().cast());
            let low = _mm512_loadu_ps(HALF_BYTES_LOW.as_ptr().cast());
            let first = _mm512_permutexvar_ps(raw, low);
            let second = _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(raw), low);
            let third = _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(raw), low);
            let fourth = _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(raw), low);
            [
                _mm512_or_ps(first, _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(raw), high)),
                _mm512_or_ps(second, _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(raw), high)),
                _mm512_or_ps(third, _mm512_permutexvar_ps(_mm512_srli_epi32::<20>(raw), high)),
                _mm512_or_ps(fourth, _mm512_permutexvar_ps(_mm512_srli_epi32::<28>(raw), high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_raw(self, from: *const u8) -> __m512 {
        // SAFETY: the caller promises 64 readable bytes.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_columns(self, from: *const u8, row_bytes: usize) -> [__m512; 4] {
        // Each quad of lanes takes 4 values of one row, then quads are transposed where they are:
        // half the shuffles of a full transpose, and few registers.
        // SAFETY: the caller promises the rows.
        unsafe {
            let a = every_fourth_row(from, row_bytes);
            let b = every_fourth_row(from.add(row_bytes), row_bytes);
            let c = every_fourth_row(from.add(2 * row_bytes), row_bytes);
            let d = every_fourth_row(from.add(3 * row_bytes), row_bytes);
            let (low_ab, high_ab) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let (low_cd, high_cd) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            [
                _mm512_shuffle_ps::<0x44>(low_ab, low_cd),
                _mm512_shuffle_ps::<0xee>(low_ab, low_cd),
                _mm512_shuffle_ps::<0x44>(high_ab, high_cd),
                _mm512_shuffle_ps::<0xee>(high_ab, high_cd),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_raw(self, value: __m512, to: *mut u8) {
        // SAFETY: the caller promises 64 writable bytes.
        unsafe { _mm512_storeu_ps(to.cast(), value) };
    }
    #[inline(always)]
    unsafe fn splat_raw(self, from: *const u8) -> __m512 {
        // SAFETY: the caller promises 4 readable bytes.
        unsafe { _mm512_set1_ps(from.cast::<f32>().read_unaligned()) }
    }
    #[inline(always)]
    fn prefetch(self, from: *const u8) {
        // SAFETY: a prefetch of any address has no effect but on the cache.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) };
    }
}

/// Four values from each of four rows that are four rows apart, a quad of lanes each. A function,
/// as a closure would not be compiled with the caller's instructions.
///
/// # Safety
/// 16 bytes must be readable in each row, and the CPU must have AVX-512DQ.
#[inline(always)]
unsafe fn every_fourth_row(from: *const u8, row_bytes: usize) -> __m512 {
    // SAFETY: the caller promises the rows and the instructions.
    unsafe {
        let all = _mm512_castps128_ps512(_mm_loadu_ps(from.cast()));
        let next = _mm_loadu_ps(from.add(4 * row_bytes).cast());
        let all = _mm512_mask_broadcast_f32x4(all, 0x00f0, next);
        let next = _mm_loadu_ps(from.add(8 * row_bytes).cast());
        let all = _mm512_mask_broadcast_f32x4(all, 0x0f00, next);
        let next = _mm_loadu_ps(from.add(12 * row_bytes).cast());
        _mm512_mask_broadcast_f32x4(all, 0xf000, next)
    }
}

/// 16x16 transpose in four rounds: within pairs of lanes, within quads, then quads across.
///
/// # Safety
/// The CPU must have AVX-512F.
#[inline(always)]
unsafe fn transpose(square: Square) -> Square {
    let rows = square.0;
    // SAFETY: the caller promises the instructions.
    unsafe {
        let mut a = rows;
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut b = a;
        for i in 0..4 {
            b[4 * i] = _mm512_shuffle_ps::<0x44>(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_shuffle_ps::<0xee>(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_shuffle_ps::<0x44>(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_shuffle_ps::<0xee>(a[4 * i + 1], a[4 * i + 3]);
        }
        // b[4 * i + c] now holds, in its quad q, column 4 * q + c of rows 4 * i .. 4 * i + 4.
        let mut out = b;
        for c in 0..4 {
            let low = _mm512_shuffle_f32x4::<0x88>(b[c], b[4 + c]);
            let high = _mm512_shuffle_f32x4::<0x88>(b[8 + c], b[12 + c]);
            out[c] = _mm512_shuffle_f32x4::<0x88>(low, high);
            out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, high);
            let low = _mm512_shuffle_f32x4::<0xdd>(b[c], b[4 + c]);
            let high = _mm512_shuffle_f32x4::<0xdd>(b[8 + c], b[12 + c]);
            out[4 + c] = _mm512_shuffle_f32x4::<0x88>(low, high);
            out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(low, high);
        }
        Square(out)
    }
}
