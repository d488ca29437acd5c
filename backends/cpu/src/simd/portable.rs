//! Vectors as plain arrays, for CPUs without a set of their own and as the check of the others.
//!
//! Products use `f32::mul_add`, so the bits equal those of sets with hardware FMA; without such
//! hardware this is slow, which is the price of one answer everywhere.

use half::{bf16, f16};

use super::{Element, Simd};

/// Lanes of the array vectors: enough for the compiler to find the CPU's base vectors.
const LANES: usize = 8;

/// The portable set.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

#[inline(always)]
fn load<T: Element>(from: &[T]) -> V {
    std::array::from_fn(|lane| from.get(lane).map_or(0.0, |value| value.to_f32()))
}

#[inline(always)]
fn store<T: Element>(value: V, to: &mut [T]) {
    for (to, value) in to.iter_mut().zip(value) {
        *to = T::from_f32(value);
    }
}

/// `2^power` for integral `power` in the normal range.
#[inline(always)]
fn power_of_two(power: i32) -> f32 {
    f32::from_bits(((power + 127) as u32) << 23)
}

impl Simd for Portable {
    type F32 = V;
    type Square = [V; LANES];
    const LANES: usize = LANES;
    const MICRO_ROWS: usize = 4;
    const BF16_DOT: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> V {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> V {
        load(from)
    }
    #[inline(always)]
    fn store(self, value: V, to: &mut [f32]) {
        store(value, to);
    }
    #[inline(always)]
    fn load_bf16(self, from: &[bf16]) -> V {
        load(from)
    }
    #[inline(always)]
    fn store_bf16(self, value: V, to: &mut [bf16]) {
        store(value, to);
    }
    #[inline(always)]
    fn load_f16(self, from: &[f16]) -> V {
        load(from)
    }
    #[inline(always)]
    fn store_f16(self, value: V, to: &mut [f16]) {
        store(value, to);
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        map(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        map(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn select_gt(self, a: V, b: V, yes: V, no: V) -> V {
        std::array::from_fn(|lane| if a[lane] > b[lane] { yes[lane] } else { no[lane] })
    }
    #[inline(always)]
    fn scale_by_power(self, a: V, power: V) -> V {
        map(a, power, |a, power| {
            let power = power as i32;
            let half = power >> 1;
            a * power_of_two(half) * power_of_two(power - half)
        })
    }
    #[inline(always)]
    fn reduce_sum(self, a: V) -> f32 {
        let b: [f32; 4] = std::array::from_fn(|lane| a[lane] + a[lane + 4]);
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    fn add_words(self, a: V, b: V) -> V {
        map(a, b, |a, b| f32::from_bits(a.to_bits().wrapping_add(b.to_bits())))
    }
    #[inline(always)]
    fn reduce_words(self, a: V) -> u32 {
        a.iter().fold(0, |sum: u32, lane| sum.wrapping_add(lane.to_bits()))
    }
    #[inline(always)]
    fn reduce_max(self, a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn transpose(self, square: [V; LANES]) -> [V; LANES] {
        std::array::from_fn(|row| std::array::from_fn(|column| square[column][row]))
    }
    #[inline(always)]
    fn square(self) -> [V; LANES] {
        [[0.0; LANES]; LANES]
    }
    #[inline(always)]
    fn load_pairs(self, from: &[bf16]) -> V {
        let bits = |index: usize| from.get(index).map_or(0, |value| u32::from(value.to_bits()));
        std::array::from_fn(|lane| f32::from_bits(bits(2 * lane) | bits(2 * lane + 1) << 16))
    }
    #[inline(always)]
    fn merge_pairs(self, even: V, odd: V) -> V {
        map(even, odd, |even, odd| f32::from_bits(even.to_bits() >> 16 | odd.to_bits()))
    }
    #[inline(always)]
    fn dot_pairs(self, _acc: V, _a: V, _b: V) -> V {
        unreachable!("the portable set has no dot product of pairs")
    }
    #[inline(always)]
    fn widen_bytes(self, raw: V) -> [V; 4] {
        std::array::from_fn(|byte| {
            raw.map(|lane| f32::from(lane.to_bits().to_le_bytes()[byte] as i8))
        })
    }
    #[inline(always)]
    fn widen_half_bytes(self, raw: V) -> [V; 8] {
        std::array::from_fn(|half| {
            let up = 28 - 4 * half as u32;
            raw.map(|lane| (((lane.to_bits() << up) as i32) >> 28) as f32)
        })
    }
    fn pair_bytes(self, _raw: V) -> [V; 2] {
        unreachable!("the portable set has no dot product of pairs");
    }
    fn pair_half_bytes(self, _raw: V) -> [V; 4] {
        unreachable!("the portable set has no dot product of pairs");
    }
    #[inline(always)]
    unsafe fn load_raw(self, from: *const u8) -> V {
        // SAFETY: the caller promises `LANES * 4` readable bytes.
        unsafe { from.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_columns(self, from: *const u8, row_bytes: usize) -> [V; 4] {
        let mut columns = [[0.0; LANES]; 4];
        for row in 0..LANES {
            // SAFETY: the caller promises the rows.
            let quad = unsafe { from.add(row * row_bytes).cast::<[f32; 4]>().read_unaligned() };
            for (column, value) in columns.iter_mut().zip(quad) {
                column[row] = value;
            }
        }
        columns
    }
    #[inline(always)]
    unsafe fn store_raw(self, value: V, to: *mut u8) {
        // SAFETY: the caller promises 32 writable bytes.
        unsafe { to.cast::<V>().write_unaligned(value) };
    }
    #[inline(always)]
    unsafe fn splat_raw(self, from: *const u8) -> V {
        // SAFETY: the caller promises 4 readable bytes.
        [unsafe { from.cast::<f32>().read_unaligned() }; LANES]
    }
    #[inline(always)]
    fn prefetch(self, _from: *const u8) {}
}
