//! Products against naive ones: within rounding of an f64 product, and bit for bit where the bits
//! rule promises it.

use half::{bf16, f16};
use pontoon_ops::sums::of_row;

use super::*;

/// A small counter-based generator, so that a failing case can be repeated from its printed seed.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    fn values<T: Element>(&mut self, count: usize) -> Vec<T> {
        let mut value = || (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..count).map(|_| T::from_f32(value())).collect()
    }
}

trait Wrap: Unit {
    /// Half the distance between neighbours at 1.
    const ROUNDING: f64;
    fn data(from: &[Self]) -> Data<'_>;
    fn data_mut(from: &mut [Self]) -> DataMut<'_>;
}

macro_rules! wrap {
    ($type:ty, $variant:ident, $rounding:expr) => {
        impl Wrap for $type {
            const ROUNDING: f64 = $rounding;
            fn data(from: &[Self]) -> Data<'_> {
                Data::$variant(from)
            }
            fn data_mut(from: &mut [Self]) -> DataMut<'_> {
                DataMut::$variant(from)
            }
        }
    };
}
wrap!(f32, F32, 6.0e-8);
wrap!(bf16, Bf16, 1.0 / 256.0);
wrap!(f16, F16, 1.0 / 2048.0);

const LAYOUTS: [Layout; 3] = [Layout::Nt, Layout::Nn, Layout::Tn];

/// A product's inputs, with row strides wider than the rows.
#[derive(Clone, Debug)]
struct Case<T, C> {
    layout: Layout,
    shape: (usize, usize, usize),
    a: Vec<T>,
    a_stride: usize,
    b: Vec<T>,
    b_stride: usize,
    bias: Option<Vec<T>>,
    c: Vec<C>,
    c_stride: usize,
    store: Store,
}

impl<T: Wrap, C: Wrap> Case<T, C> {
    fn random(random: &mut Random, layout: Layout, shape: (usize, usize, usize)) -> Self {
        let (m, n, k) = shape;
        let (a, b) = match layout {
            Layout::Nt | Layout::Panels => ((m, k), (n, k)),
            Layout::Nn => ((m, k), (k, n)),
            Layout::Tn => ((k, m), (k, n)),
        };
        let (a_stride, b_stride) = (a.1 + random.below(4), b.1 + random.below(4));
        let c_stride = n + random.below(4);
        Self {
            layout,
            shape,
            a: random.values(a.0 * a_stride),
            a_stride,
            b: random.values(b.0 * b_stride),
            b_stride,
            bias: random.bits().is_multiple_of(2).then(|| random.values(n)),
            c: random.values(m * c_stride),
            c_stride,
            store: if random.bits().is_multiple_of(2) {
                Store::Overwrite
            } else {
                Store::Accumulate
            },
        }
    }

    /// C after the product.
    fn run(&self, pool: &Pool, isa: Isa) -> Vec<C> {
        let mut c = self.c.clone();
        gemm(pool, isa, &mut Scratch::new(), self.args(&mut c));
        c
    }

    /// C after the checked product, and what the check says.
    fn run_checked(
        &self,
        pool: &Pool,
        isa: Isa,
        asked: Asked,
    ) -> (Vec<C>, Result<ProductSums, WrongColumn>) {
        let mut c = self.c.clone();
        let sums = gemm_checked(pool, isa, &mut Scratch::new(), self.args(&mut c), asked);
        (c, sums)
    }

    fn args<'c>(&'c self, c: &'c mut [C]) -> GemmArgs<'c> {
        GemmArgs {
            layout: self.layout,
            m: self.shape.0,
            n: self.shape.1,
            k: self.shape.2,
            a: Matrix { data: T::data(&self.a), row_stride: self.a_stride },
            b: Matrix { data: T::data(&self.b), row_stride: self.b_stride },
            bias: self.bias.as_deref().map(T::data),
            c: MatrixMut { data: C::data_mut(c), row_stride: self.c_stride },
            store: self.store,
        }
    }

    fn operands(&self, row: usize, column: usize, k: usize) -> (f32, f32) {
        let (a, b) = match self.layout {
            Layout::Nt | Layout::Panels => (row * self.a_stride + k, column * self.b_stride + k),
            Layout::Nn => (row * self.a_stride + k, k * self.b_stride + column),
            Layout::Tn => (k * self.a_stride + row, k * self.b_stride + column),
        };
        (self.a[a].to_f32(), self.b[b].to_f32())
    }

    fn is_padding(&self, index: usize) -> bool {
        index % self.c_stride >= self.shape.1
    }

    /// The value in f64 and the sum of magnitudes that bounds its rounding errors.
    fn naive(&self, row: usize, column: usize) -> (f64, f64) {
        let (mut sum, mut size) = (0.0, 0.0);
        for k in 0..self.shape.2 {
            let (a, b) = self.operands(row, column, k);
            sum += f64::from(a) * f64::from(b);
            size += (f64::from(a) * f64::from(b)).abs();
        }
        let old = match self.store {
            Store::Overwrite => 0.0,
            Store::Accumulate => f64::from(self.c[row * self.c_stride + column].to_f32()),
        };
        let bias = self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column].to_f32()));
        (sum + old + bias, size + old.abs() + bias.abs())
    }

    /// The chain of the bits rule, one fused multiply-add per k.
    fn chain(&self, row: usize, column: usize) -> C {
        let mut sum = 0.0f32;
        for k in 0..self.shape.2 {
            let (a, b) = self.operands(row, column, k);
            sum = a.mul_add(b, sum);
        }
        if let Some(bias) = &self.bias {
            sum += bias[column].to_f32();
        }
        match self.store {
            Store::Overwrite => C::from_f32(sum),
            Store::Accumulate => C::from_f32(self.c[row * self.c_stride + column].to_f32() + sum),
        }
    }

    fn check(&self, isa: Isa, pool: &Pool) {
        let c = self.run(pool, isa);
        let what = || format!("{} {:?} {:?} {:?}", isa.name(), T::KIND, self.layout, self.shape);
        for (index, (new, old)) in c.iter().zip(&self.c).enumerate() {
            let (row, column) = (index / self.c_stride, index % self.c_stride);
            if self.is_padding(index) {
                assert_eq!(new, old, "{} padding of row {row}", what());
                continue;
            }
            let (want, size) = self.naive(row, column);
            let error = (f64::from(new.to_f32()) - want).abs();
            let bound = size * 1e-6 + want.abs() * C::ROUNDING;
            assert!(error <= bound, "{} ({row}, {column}): {new:?}, not {want}", what());
            if !is_dot(T::KIND, isa) {
                assert_eq!(*new, self.chain(row, column), "{} ({row}, {column})", what());
            }
        }
    }
}

fn shapes(random: &mut Random) -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![
        (1, 1, 1),
        (0, 5, 3),
        (5, 0, 3),
        (3, 5, 0),
        (1, 40, 7),
        (5, 33, 31),
        (12, 32, 16),
        (13, 35, 33),
        (49, 70, 600),
        (9, 260, 40),
    ];
    for _ in 0..4 {
        shapes.push((1 + random.below(60), 1 + random.below(90), 1 + random.below(90)));
    }
    shapes
}

fn check_types<T: Wrap, C: Wrap>(seed: u64) {
    let (mut random, pool) = (Random(seed), Pool::new(2));
    for isa in Isa::available() {
        for layout in LAYOUTS {
            for shape in shapes(&mut random) {
                Case::<T, C>::random(&mut random, layout, shape).check(isa, &pool);
            }
        }
    }
}

#[test]
fn f32_products_equal_the_naive_chain() {
    check_types::<f32, f32>(1);
}

#[test]
fn bf16_products_are_near_the_exact_ones() {
    check_types::<bf16, bf16>(2);
    check_types::<bf16, f32>(3);
}

#[test]
fn f16_products_are_near_the_exact_ones() {
    check_types::<f16, f16>(4);
    check_types::<f16, f32>(5);
}

#[test]
fn mixed_result_types_are_rounded_once() {
    check_types::<f32, bf16>(6);
    check_types::<bf16, f16>(7);
}

/// A row alone (matrix times vector), in ranges of rows and of columns, and with more threads:
/// always the bits of the whole product.
fn check_invariance<T: Wrap, C: Wrap>(seed: u64) {
    let (mut random, one, two) = (Random(seed), Pool::new(1), Pool::new(2));
    for isa in Isa::available() {
        for layout in LAYOUTS {
            for shape in [(37, 45, 70), (50, 300, 531), (3, 33, 17), (129, 64, 64)] {
                let whole = Case::<T, C>::random(&mut random, layout, shape);
                let c = whole.run(&one, isa);
                assert_eq!(c, whole.run(&two, isa), "threads: {} {shape:?}", isa.name());
                let rows = 1 + random.below(shape.0.min(9));
                let first = random.below(shape.0 - rows + 1);
                let mut part = whole.clone();
                part.shape.0 = rows;
                let a = if layout == Layout::Tn { first } else { first * whole.a_stride };
                part.a.drain(..a);
                part.c.drain(..first * whole.c_stride);
                let end = (rows - 1) * whole.c_stride + shape.1;
                assert_eq!(
                    part.run(&two, isa)[..end],
                    c[first * whole.c_stride..][..end],
                    "{} {layout:?} {shape:?}: rows {first}..+{rows}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn row_bits_do_not_depend_on_other_rows_or_threads() {
    check_invariance::<f32, f32>(11);
    check_invariance::<bf16, bf16>(12);
    check_invariance::<bf16, f32>(13);
    check_invariance::<f16, f16>(14);
}

#[test]
fn layouts_agree_bit_for_bit() {
    let (mut random, pool) = (Random(21), Pool::new(2));
    let (m, n, k) = (25, 39, 301);
    for isa in Isa::available() {
        let mut nt = Case::<bf16, f32>::random(&mut random, Layout::Nt, (m, n, k));
        nt.bias = None;
        let transposed = |data: &[bf16], stride: usize, rows: usize| -> Vec<bf16> {
            (0..k * rows).map(|index| data[index % rows * stride + index / rows]).collect()
        };
        let mut nn = nt.clone();
        nn.layout = Layout::Nn;
        (nn.b, nn.b_stride) = (transposed(&nt.b, nt.b_stride, n), n);
        let mut tn = nn.clone();
        tn.layout = Layout::Tn;
        (tn.a, tn.a_stride) = (transposed(&nt.a, nt.a_stride, m), m);
        let want = nt.run(&pool, isa);
        assert_eq!(want, nn.run(&pool, isa), "{}", isa.name());
        assert_eq!(want, tn.run(&pool, isa), "{}", isa.name());
    }
}

#[test]
fn large_blocks_agree_with_small_ones() {
    // More rows, columns and units than one block holds.
    let (mut random, pool) = (Random(31), Pool::new(2));
    let isa = *Isa::available().last().expect("portable");
    for layout in LAYOUTS {
        let case = Case::<bf16, f32>::random(&mut random, layout, (3100, 70, 1030));
        let c = case.run(&pool, isa);
        let mut last = case.clone();
        last.shape.0 = 1;
        last.a.drain(..if layout == Layout::Tn { 3099 } else { 3099 * case.a_stride });
        last.c.drain(..3099 * case.c_stride);
        assert_eq!(last.run(&pool, isa)[..70], c[3099 * case.c_stride..][..70]);
    }
    let case = Case::<f32, f32>::random(&mut random, Layout::Nn, (10, 2100, 2200));
    let c = case.run(&pool, isa);
    for column in [0, 255, 256, 1023, 1024, 2099] {
        assert_eq!(c[9 * case.c_stride + column], case.chain(9, column));
    }
}

#[test]
fn nan_and_infinity_reach_exactly_their_row_and_column() {
    let (mut random, pool) = (Random(41), Pool::new(2));
    for isa in Isa::available() {
        for (layout, m) in LAYOUTS.map(|layout| (layout, 20)).into_iter().chain([(Layout::Nt, 5)]) {
            let mut case = Case::<bf16, bf16>::random(&mut random, layout, (m, 40, 19));
            // Last unit of row 2 of A and of column 7 of B, so that padding would show.
            let (a, b) = match layout {
                Layout::Nt | Layout::Panels => (2 * case.a_stride + 18, 7 * case.b_stride + 18),
                Layout::Nn => (2 * case.a_stride + 18, 18 * case.b_stride + 7),
                Layout::Tn => (18 * case.a_stride + 2, 18 * case.b_stride + 7),
            };
            case.a[a] = bf16::NAN;
            case.b[b] = bf16::INFINITY;
            let c = case.run(&pool, isa);
            for (index, value) in c.iter().enumerate().filter(|(i, _)| !case.is_padding(*i)) {
                let (row, column) = (index / case.c_stride, index % case.c_stride);
                assert_eq!(value.is_nan(), row == 2, "{} ({row}, {column})", isa.name());
                assert_eq!(value.is_infinite(), row != 2 && column == 7, "({row}, {column})");
            }
        }
    }
}

#[test]
fn grouped_products_equal_separate_ones() {
    let (mut random, pool) = (Random(51), Pool::new(2));
    let offsets = [0, 0, 13, 14, 14, 40];
    let (n, k, groups) = (35, 50, 5);
    for isa in Isa::available() {
        for layout in [Layout::Nt, Layout::Nn] {
            let a: Vec<bf16> = random.values(40 * k);
            let b: Vec<bf16> = random.values(groups * n * k);
            let mut c = vec![bf16::ZERO; 40 * n];
            let b_stride = if layout == Layout::Nt { k } else { n };
            let args = GroupedGemmArgs {
                layout,
                offsets: &offsets,
                m: 0,
                n,
                k,
                a: Matrix { data: Data::Bf16(&a), row_stride: k },
                b: Matrix { data: Data::Bf16(&b), row_stride: b_stride },
                group_stride: n * k,
                c: MatrixMut { data: DataMut::Bf16(&mut c), row_stride: n },
                store: Store::Overwrite,
            };
            grouped_gemm(&pool, isa, &mut Scratch::new(), args);
            for group in 0..groups {
                let (start, end) = (offsets[group], offsets[group + 1]);
                let case = Case::<bf16, bf16> {
                    layout,
                    shape: (end - start, n, k),
                    a: a[start * k..end * k].to_vec(),
                    a_stride: k,
                    b: b[group * n * k..][..n * k].to_vec(),
                    b_stride,
                    bias: None,
                    c: vec![bf16::ZERO; (end - start) * n],
                    c_stride: n,
                    store: Store::Overwrite,
                };
                assert_eq!(case.run(&pool, isa), c[start * n..end * n]);
            }
        }
    }
}

#[test]
fn grouped_weight_gradients_of_empty_groups_are_zero_or_kept() {
    let (mut random, pool) = (Random(61), Pool::new(2));
    let offsets = [0, 7, 7, 20];
    let (m, n) = (13, 18);
    let (a, b): (Vec<f32>, Vec<f32>) = (random.values(20 * m), random.values(20 * n));
    for (store, empty) in [(Store::Overwrite, 0.0), (Store::Accumulate, 1.0)] {
        let mut c = vec![1.0f32; 3 * m * n];
        let args = GroupedGemmArgs {
            layout: Layout::Tn,
            offsets: &offsets,
            m,
            n,
            k: 0,
            a: Matrix { data: Data::F32(&a), row_stride: m },
            b: Matrix { data: Data::F32(&b), row_stride: n },
            group_stride: m * n,
            c: MatrixMut { data: DataMut::F32(&mut c), row_stride: n },
            store,
        };
        grouped_gemm(&pool, Isa::PORTABLE, &mut Scratch::new(), args);
        assert!(c[m * n..2 * m * n].iter().all(|&value| value == empty));
        let case = Case::<f32, f32> {
            layout: Layout::Tn,
            shape: (m, n, 13),
            a: a[7 * m..].to_vec(),
            a_stride: m,
            b: b[7 * n..].to_vec(),
            b_stride: n,
            bias: None,
            c: vec![1.0; m * n],
            c_stride: n,
            store,
        };
        assert_eq!(case.run(&pool, Isa::PORTABLE), c[2 * m * n..]);
    }
}

#[test]
#[should_panic(expected = "does not fit")]
fn an_operand_smaller_than_its_shape_panics() {
    let mut case = Case::<f32, f32>::random(&mut Random(71), Layout::Nt, (4, 4, 4));
    case.b.truncate(7);
    case.run(&Pool::new(1), Isa::PORTABLE);
}

/// The word sum of a matrix's rows.
fn words<T: Unit>(data: &[T], stride: usize, (rows, columns): (usize, usize)) -> u32 {
    let row = |row: usize| match columns {
        0 => 0,
        _ => of_row(bytemuck::cast_slice(&data[row * stride..][..columns])),
    };
    (0..rows).map(row).fold(0, u32::wrapping_add)
}

fn check_checked<T: Wrap, C: Wrap>(seed: u64) {
    let (mut random, pool) = (Random(seed), Pool::new(2));
    for isa in Isa::available() {
        for layout in LAYOUTS {
            let mut shapes = shapes(&mut random);
            shapes.extend([(50, 300, 531), (200, 70, 300)]);
            for shape in shapes {
                let case = Case::<T, C>::random(&mut random, layout, shape);
                let [a, b] = [random.below(2) == 1, random.below(2) == 1];
                let asked = Asked { a, b, flip: None };
                let (c, sums) = case.run_checked(&pool, isa, asked);
                let what = format!("{} {layout:?} {shape:?} {:?}", isa.name(), case.store);
                assert_eq!(c, case.run(&pool, isa), "{what}");
                let (m, n, k) = shape;
                let (of_a, of_b) = match layout {
                    Layout::Nt | Layout::Panels => ((m, k), (n, k)),
                    Layout::Nn => ((m, k), (k, n)),
                    Layout::Tn => ((k, m), (k, n)),
                };
                let is_empty = m == 0 || n == 0;
                let told = |asked: bool, sum: u32| if asked && !is_empty { sum } else { 0 };
                let before = match case.store {
                    Store::Overwrite => 0,
                    Store::Accumulate => words(&case.c, case.c_stride, (m, n)),
                };
                let want = ProductSums {
                    a: told(a, words(&case.a, case.a_stride, of_a)),
                    b: told(b, words(&case.b, case.b_stride, of_b)),
                    before,
                    stored: words(&c, case.c_stride, (m, n)),
                };
                assert_eq!(sums, Ok(want), "{what}");
            }
        }
    }
}

#[test]
fn a_checked_product_has_the_same_bits_and_tells_the_sums_of_its_result_and_operands() {
    check_checked::<f32, f32>(81);
    check_checked::<bf16, bf16>(82);
    check_checked::<bf16, f32>(83);
    check_checked::<f16, f16>(84);
}

#[test]
fn flips_of_sign_and_exponent_bits_in_the_sums_of_a_product_are_found() {
    let (mut random, pool) = (Random(91), Pool::new(2));
    let isa = *Isa::available().last().expect("portable");
    let (mut flips, mut found) = (0, 0);
    let asked = |flip| Asked { flip: Some(flip), ..Asked::default() };
    for layout in LAYOUTS {
        for shape in [(130, 300, 200), (64, 512, 512), (300, 64, 600)] {
            let case = Case::<bf16, bf16>::random(&mut random, layout, shape);
            for _ in 0..100 {
                let bit = 23 + random.below(9) as u32;
                let (row, column) = (random.below(shape.0), random.below(shape.1));
                let (_, sums) = case.run_checked(&pool, isa, asked(Flip { row, column, bit }));
                assert!(sums.is_ok() || sums == Err(WrongColumn(column)));
                flips += 1;
                found += usize::from(sums.is_err());
            }
        }
    }
    assert!(found * 1000 >= flips * 995, "seed 91: {found} of {flips} found");
}

#[test]
fn odd_but_honest_products_are_not_accused() {
    let pool = Pool::new(2);
    let mut random = Random(95);
    for isa in Isa::available() {
        for layout in LAYOUTS {
            let mut case = Case::<bf16, f32>::random(&mut random, layout, (50, 70, 130));
            let honest = |case: &Case<bf16, f32>, what: &str| {
                let (_, sums) = case.run_checked(&pool, isa, Asked::default());
                assert!(sums.is_ok(), "{} {layout:?}: {what}", isa.name());
            };
            // All errors of rounding go the same way.
            case.a.fill(bf16::from_f32(1.0 / 3.0));
            case.b.fill(bf16::from_f32(0.7));
            honest(&case, "all elements equal");
            case.a.iter_mut().step_by(37).for_each(|x| *x = bf16::from_f32(1e4));
            case.b.iter_mut().step_by(41).for_each(|x| *x = bf16::from_f32(-1e-4));
            honest(&case, "outliers");
            case.a.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * 1e-20));
            case.b.iter_mut().for_each(|x| *x = bf16::from_f32(x.to_f32() * 1e-18));
            honest(&case, "below the smallest normal number");
            case.a.fill(bf16::ZERO);
            honest(&case, "zero");
            case.a[5] = bf16::INFINITY;
            case.b[9] = bf16::NAN;
            honest(&case, "not finite");
        }
    }
}

/// Rows of like tokens have like errors of rounding, which add up instead of cancelling.
fn suspects_among_like_rows<T: Wrap>(seed: u64, isa: Isa) -> usize {
    // No power of two, or A's sums would have the very errors of its rows.
    let (mut random, shape) = (Random(seed), (1000, 256, 512));
    let mut case = Case::<T, f32>::random(&mut random, Layout::Nt, shape);
    let positive = |value: T| T::from_f32(value.to_f32().abs() + 0.1);
    case.b.iter_mut().for_each(|value| *value = positive(*value));
    let row: Vec<T> = case.a[..shape.2].iter().map(|value| positive(*value)).collect();
    let stride = case.a_stride;
    for index in 0..shape.0 {
        case.a[index * stride..][..shape.2].copy_from_slice(&row);
    }
    let (mut watch, mut c) = (Watch::default(), case.c.clone());
    let args = case.args(&mut c);
    run(&Pool::new(2), isa, &mut Scratch::new(), args, Some(&mut watch));
    watch.suspects.len()
}

#[test]
fn honest_columns_of_like_rows_are_not_computed_once_more() {
    for isa in Isa::available() {
        for seed in 0..4 {
            let found = [
                suspects_among_like_rows::<f32>(seed, isa),
                suspects_among_like_rows::<bf16>(seed, isa),
            ];
            assert_eq!(found, [0, 0], "{} seed {seed}", isa.name());
        }
    }
}
