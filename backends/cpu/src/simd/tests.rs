//! Every instruction set against scalar code: bits where they are defined, bounds where not.

use half::{bf16, f16};

use super::*;

/// Applies a vector function to every element of `values`, through full and short slices.
struct Apply<'a, T, F> {
    from: &'a [T],
    to: &'a mut [T],
    function: F,
}

/// A function of one vector.
trait Function {
    fn call<S: Simd>(self, simd: S, a: S::F32) -> S::F32;
}

impl<T: Element, F: Function + Copy> Kernel for Apply<'_, T, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            T::store(simd, self.function.call(simd, T::load(simd, from)), to);
        }
    }
}

macro_rules! function {
    ($name:ident, |$simd:ident, $a:ident| $body:expr) => {
        #[derive(Clone, Copy)]
        struct $name;
        impl Function for $name {
            #[inline(always)]
            fn call<S: Simd>(self, $simd: S, $a: S::F32) -> S::F32 {
                $body
            }
        }
    };
}

function!(Exp, |simd, a| simd.exp(a));
function!(Same, |simd, a| {
    let _ = simd;
    a
});
function!(Poly, |simd, a| {
    let b = simd.fma(a, simd.splat(1.7), simd.div(simd.splat(3.0), a));
    let b = simd.add(simd.max(simd.splat(0.3), b), simd.min(a, simd.splat(-0.1)));
    let b = simd.sub(simd.mul(b, simd.abs(a)), simd.neg(simd.sqrt(simd.abs(a))));
    simd.select_gt(a, simd.splat(0.5), b, simd.round(b))
});

fn apply<T: Element, F: Function + Copy>(isa: Isa, from: &[T], function: F) -> Vec<T> {
    let mut to = vec![T::from_f32(0.0); from.len()];
    dispatch(isa, Apply { from, to: &mut to, function });
    to
}

fn floats(count: usize) -> Vec<f32> {
    // A fixed odd multiplier walks all exponents and signs.
    (0..count as u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect()
}

#[test]
fn exp_is_within_two_ulp_and_keeps_nan() {
    let mut inputs: Vec<f32> = (-110_000..100_000).map(|i| i as f32 * 1e-3 + 1e-5).collect();
    inputs.extend([0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 88.72, 88.73]);
    inputs.extend([-87.4, -103.0, -103.97, -104.1, 1e-30, 3e38, -3e38]);
    for isa in Isa::available() {
        for (&x, &got) in inputs.iter().zip(&apply(isa, &inputs, Exp)) {
            let want = f64::from(x).exp();
            if x.is_nan() || (want as f32).is_infinite() || want == 0.0 {
                let want = want as f32;
                assert!(got == want || (got.is_nan() && want.is_nan()), "exp({x}) = {got}");
                continue;
            }
            let nearest = want as f32;
            let ulp = f64::from((nearest.next_up() - nearest).max(f32::from_bits(1)));
            let error = (f64::from(got) - want).abs() / ulp;
            assert!(error <= 2.0, "{}: exp({x}) = {got}, not {want}: {error} ulp", isa.name());
        }
    }
}

#[test]
fn sets_agree_bit_for_bit_on_correctly_rounded_operations() {
    let inputs = floats(100_003);
    let want = apply(Isa::PORTABLE, &inputs, Poly);
    for isa in Isa::available() {
        for ((&x, &got), &want) in inputs.iter().zip(&apply(isa, &inputs, Poly)).zip(&want) {
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
            assert!(same, "{}: {x} gives {got}, not {want}", isa.name());
        }
    }
}

/// Stores f32 values as `T`.
struct Narrow<'a, T>(&'a [f32], &'a mut [T]);

impl<T: Element> Kernel for Narrow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
            T::store(simd, simd.load(from), to);
        }
    }
}

#[test]
fn narrowing_rounds_to_nearest_even_and_keeps_nan() {
    let mut inputs = floats(200_001);
    inputs.extend([1.003_906_3, 1.011_718_8, f32::NAN, f32::INFINITY, f32::MAX, -0.0, 1e-40]);
    inputs.extend([f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff), 65_519.0, 65_520.0]);
    for isa in Isa::available() {
        let mut narrow = vec![bf16::ZERO; inputs.len()];
        dispatch(isa, Narrow(&inputs, &mut narrow));
        for (&x, &got) in inputs.iter().zip(&narrow) {
            let want = bf16::from_f32(x);
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && x.is_nan());
            assert!(same, "{}: bf16({x}) = {got:?}, not {want:?}", isa.name());
        }
        let mut narrow = vec![f16::ZERO; inputs.len()];
        dispatch(isa, Narrow(&inputs, &mut narrow));
        for (&x, &got) in inputs.iter().zip(&narrow) {
            let want = f16::from_f32(x);
            let same = got.to_bits() == want.to_bits() || (got.is_nan() && x.is_nan());
            assert!(same, "{}: f16({x}) = {got:?}, not {want:?}", isa.name());
        }
    }
}

#[test]
fn every_16_bit_value_survives_widening_and_narrowing() {
    let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    for isa in Isa::available() {
        for (a, b) in brains.iter().zip(apply(isa, &brains, Same)) {
            assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{a:?} {b:?}");
        }
        for (a, b) in halves.iter().zip(apply(isa, &halves, Same)) {
            assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{a:?} {b:?}");
        }
    }
}

/// Checks the operations that mix lanes.
struct Lanes;

impl Kernel for Lanes {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let values: Vec<f32> = (0..S::LANES * S::LANES).map(|i| i as f32).collect();
        let mut square = simd.square();
        for (row, values) in square.as_mut().iter_mut().zip(values.chunks(S::LANES)) {
            *row = simd.load(values);
        }
        let turned = simd.transpose(square);
        for (row, vector) in turned.as_ref().iter().enumerate() {
            let mut got = vec![0.0; S::LANES];
            simd.store(*vector, &mut got);
            let want: Vec<f32> =
                (0..S::LANES).map(|column| (column * S::LANES + row) as f32).collect();
            assert_eq!(got, want);
        }
        let mut sums: Vec<f32> = (0..S::LANES).map(|lane| 0.1 + lane as f32 * 0.7).collect();
        let vector = simd.load(&sums);
        assert_eq!(simd.reduce_max(vector), sums[S::LANES - 1]);
        while sums.len() > 1 {
            let half = sums.len() / 2;
            sums = (0..half).map(|lane| sums[lane] + sums[lane + half]).collect();
        }
        assert_eq!(simd.reduce_sum(vector), sums[0]);
        let pairs: Vec<bf16> = (0..2 * S::LANES).map(|i| bf16::from_f32(i as f32)).collect();
        let even: Vec<bf16> = pairs.iter().copied().step_by(2).collect();
        let odd: Vec<bf16> = pairs.iter().copied().skip(1).step_by(2).collect();
        let merged = simd.merge_pairs(simd.load_bf16(&even), simd.load_bf16(&odd));
        let (mut a, mut b) = (vec![0.0; S::LANES], vec![0.0; S::LANES]);
        simd.store(merged, &mut a);
        simd.store(simd.load_pairs(&pairs), &mut b);
        assert_eq!(bytemuck::cast_slice::<f32, u32>(&a), bytemuck::cast_slice::<f32, u32>(&b));
    }
}

#[test]
fn lanes_are_transposed_reduced_and_paired_in_order() {
    for isa in Isa::available() {
        dispatch(isa, Lanes);
    }
}

#[test]
fn an_unknown_or_missing_set_is_named() {
    let error = Isa::from_name("mmx").expect_err("not a set").to_string();
    assert!(error.contains("`mmx`") && error.contains("portable"), "{error}");
    let missing = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
    let error = Isa::from_name(missing).expect_err("of another architecture").to_string();
    assert!(error.contains("this CPU has no"), "{error}");
    assert_eq!(Isa::from_name("portable"), Ok(Isa::PORTABLE));
}

#[test]
#[cfg(target_arch = "aarch64")]
fn neon_is_listed_last_so_that_it_is_taken() {
    let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
    assert_eq!(names, ["portable", "neon"]);
    assert_eq!(Isa::from_name("neon").unwrap().geometry().lanes, 4);
}
