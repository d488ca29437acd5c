//! Matrix products `C = A B` in three layouts, with the bits rule of this backend.
//!
//! Each element of C is one chain over ascending k in f32: one fused multiply-add per k, or for
//! bf16 on CPUs with a dot product of pairs one such instruction per two k (an odd last k is paired
//! with zero). Blocking only cuts the chain and stores the f32 sum between the parts. So an
//! element's bits depend on its row of A, its column of B and the instruction set, and on nothing
//! else: not on m, n, the thread count, or whether the product ran as matrix times vector.
//!
//! Read `pack.rs` for the operand formats, `tile.rs` for blocking, `gemv.rs` for few rows and
//! `quant.rs` for quantised weights (both streamed: `stretch.rs`), `panels.rs` and
//! `quant_panels.rs` for both with matrices kept in panels, `grouped.rs` for experts, `verify.rs`
//! for checks, and `simd/micro.rs` for the inner loop. Shapes are checked by the caller: a wrong
//! one here is a bug and panics.

mod expect;
mod gemv;
mod grouped;
pub(crate) mod pack;
pub(crate) mod panels;
mod quant;
mod quant_panels;
pub(crate) mod stretch;
#[cfg(test)]
mod tests;
mod tile;
mod verify;

pub(crate) use gemv::VECTORS_MAX;
pub use grouped::{GroupedGemmArgs, grouped_gemm, grouped_gemm_checked};
pub use quant::{Integers, QuantArgs, quant_gemm};
pub use verify::{Asked, Flip, ProductSums, WrongColumn};

use verify::{Operands, Watch};

use half::{bf16, f16};

use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::simd::{Element, Isa, Simd};

/// Which operand is transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A is `[m, k]`, B is `[n, k]`: the forward pass with `[out, in]` weights.
    Nt,
    /// The same with B kept in panels, as `prepack.rs` leaves it.
    Panels,
    /// A is `[m, k]`, B is `[k, n]`: the gradient of the input.
    Nn,
    /// A is `[k, m]`, B is `[k, n]`: the gradient of the weight.
    Tn,
}

/// What happens to the old contents of C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `c = round(sum + bias)`
    Overwrite,
    /// `c = round(c + (sum + bias))`
    Accumulate,
}

/// The elements of a matrix that is read.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// f32 elements.
    F32(&'a [f32]),
    /// bf16 elements.
    Bf16(&'a [bf16]),
    /// f16 elements.
    F16(&'a [f16]),
}

impl Data<'_> {
    /// Elements in the slice.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(data) => data.len(),
            Data::Bf16(data) => data.len(),
            Data::F16(data) => data.len(),
        }
    }

    /// Whether the slice has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements from `start` on.
    #[must_use]
    pub fn from(self, start: usize) -> Self {
        match self {
            Data::F32(data) => Data::F32(&data[start..]),
            Data::Bf16(data) => Data::Bf16(&data[start..]),
            Data::F16(data) => Data::F16(&data[start..]),
        }
    }
}

/// The elements of a matrix that is written.
#[derive(Debug)]
pub enum DataMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bf16 elements.
    Bf16(&'a mut [bf16]),
    /// f16 elements.
    F16(&'a mut [f16]),
}

impl DataMut<'_> {
    /// Elements in the slice.
    pub fn len(&self) -> usize {
        match self {
            DataMut::F32(data) => data.len(),
            DataMut::Bf16(data) => data.len(),
            DataMut::F16(data) => data.len(),
        }
    }

    /// Whether the slice has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements from `start` on, for a shorter time.
    #[must_use]
    pub fn from(&mut self, start: usize) -> DataMut<'_> {
        match self {
            DataMut::F32(data) => DataMut::F32(&mut data[start..]),
            DataMut::Bf16(data) => DataMut::Bf16(&mut data[start..]),
            DataMut::F16(data) => DataMut::F16(&mut data[start..]),
        }
    }
}

/// A row-major matrix that is read; elements of a row are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Its elements; the last row need not be followed by padding.
    pub data: Data<'a>,
    /// Elements from one row to the next.
    pub row_stride: usize,
}

/// A row-major matrix that is written.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    /// Its elements; the last row need not be followed by padding.
    pub data: DataMut<'a>,
    /// Elements from one row to the next.
    pub row_stride: usize,
}

/// One product.
#[derive(Debug)]
pub struct GemmArgs<'a> {
    /// Which operand is transposed; decides the shapes of `a` and `b`.
    pub layout: Layout,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of the sums. With k = 0 the sums are zero.
    pub k: usize,
    /// Left operand; f32, bf16 or f16.
    pub a: Matrix<'a>,
    /// Right operand, of A's type.
    pub b: Matrix<'a>,
    /// Added to every row before rounding, `[n]`.
    pub bias: Option<Data<'a>>,
    /// The result `[m, n]`, of any type.
    pub c: MatrixMut<'a>,
    /// What happens to the old contents of C.
    pub store: Store,
}

/// Most rows for which the right operand is streamed in place instead of being packed.
pub const GEMV_ROWS_MAX: usize = 64;

/// Computes one product on all threads of the pool.
///
/// Panics if an operand is smaller than its shape or A and B differ in type.
pub fn gemm(pool: &Pool, isa: Isa, scratch: &mut Scratch, args: GemmArgs<'_>) {
    run(pool, isa, scratch, args, None);
}

/// Computes one product, forms the word sums of its result and of the operands that are asked for,
/// and checks its arithmetic. The bits are those of [`gemm`].
pub fn gemm_checked(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    args: GemmArgs<'_>,
    asked: Asked,
) -> Result<ProductSums, WrongColumn> {
    let GemmArgs { layout, m, k, a, b, .. } = args;
    let mut watch = Watch { asked, ..Watch::default() };
    run(pool, isa, scratch, args, Some(&mut watch));
    verify::confirm((pool, isa), scratch, &Operands { layout, m, k, a, b }, &watch)
}

fn run(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    args: GemmArgs<'_>,
    watch: Option<&mut Watch>,
) {
    check(&args);
    if args.m == 0 || args.n == 0 {
        return;
    }
    match (args.a.data, args.b.data) {
        (Data::F32(a), Data::F32(b)) => typed(pool, isa, scratch, args, (a, b), watch),
        (Data::Bf16(a), Data::Bf16(b)) => typed(pool, isa, scratch, args, (a, b), watch),
        (Data::F16(a), Data::F16(b)) => typed(pool, isa, scratch, args, (a, b), watch),
        _ => panic!("the operands of a product have different types"),
    }
}

/// Chooses the path once the operands' type is known.
fn typed<T: Unit>(
    pool: &Pool,
    isa: Isa,
    scratch: &mut Scratch,
    args: GemmArgs<'_>,
    (a, b): (&[T], &[T]),
    watch: Option<&mut Watch>,
) {
    let product = Product {
        layout: args.layout,
        m: args.m,
        n: args.n,
        k: args.k,
        units: units(T::KIND, isa, args.k),
        dot: is_dot(T::KIND, isa),
        a,
        a_stride: args.a.row_stride,
        b,
        b_stride: args.b.row_stride,
        bias: args.bias,
        store: args.store,
    };
    let few_rows = args.m <= GEMV_ROWS_MAX && args.k > 0 && watch.is_none();
    match args.layout {
        Layout::Nt if few_rows => gemv::run(pool, isa, scratch, &product, args.c),
        Layout::Panels if few_rows => panels::run(pool, isa, scratch, &product, args.c),
        _ => tile::run(pool, isa, scratch, &product, args.c, watch),
    }
}

/// The types of operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnitKind {
    F32,
    Bf16,
    F16,
}

/// A type of operands.
pub(crate) trait Unit: Element {
    const KIND: UnitKind;
}

impl Unit for f32 {
    const KIND: UnitKind = UnitKind::F32;
}

impl Unit for bf16 {
    const KIND: UnitKind = UnitKind::Bf16;
}

impl Unit for f16 {
    const KIND: UnitKind = UnitKind::F16;
}

/// Whether operands of this type stay bf16 pairs.
pub(crate) fn is_dot(kind: UnitKind, isa: Isa) -> bool {
    kind == UnitKind::Bf16 && isa.has_bf16_dot()
}

/// 32-bit units in a chain of length k.
pub(crate) fn units(kind: UnitKind, isa: Isa, k: usize) -> usize {
    if is_dot(kind, isa) { k.div_ceil(2) } else { k }
}

/// A product whose operand type is known.
struct Product<'a, T> {
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    /// Length of the chain in units.
    units: usize,
    /// Units are bf16 pairs.
    dot: bool,
    a: &'a [T],
    a_stride: usize,
    b: &'a [T],
    b_stride: usize,
    bias: Option<Data<'a>>,
    store: Store,
}

/// Panics unless every operand holds its shape.
fn check(args: &GemmArgs<'_>) {
    let GemmArgs { m, n, k, .. } = *args;
    let (a, b) = match args.layout {
        Layout::Nt | Layout::Panels => ((m, k), (n, k)),
        Layout::Nn => ((m, k), (k, n)),
        Layout::Tn => ((k, m), (k, n)),
    };
    check_matrix("a", a, args.a.row_stride, args.a.data.len());
    check_matrix("b", b, args.b.row_stride, args.b.data.len());
    check_matrix("c", (m, n), args.c.row_stride, args.c.data.len());
    if let Some(bias) = args.bias {
        assert!(bias.len() >= n, "bias has {} elements, n is {n}", bias.len());
    }
}

fn check_matrix(name: &str, (rows, columns): (usize, usize), stride: usize, len: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(stride >= columns || rows == 1, "{name}: row stride {stride} below {columns} columns");
    let end = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(columns));
    assert!(
        end.is_some_and(|end| end <= len),
        "{name}: [{rows}, {columns}] with row stride {stride} does not fit {len} elements"
    );
}

/// Widens the bias, so that it is converted once.
fn fill_bias(bias: Option<Data<'_>>, to: &mut [f32]) {
    fn widen<T: Element>(from: &[T], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
    }
    match bias {
        Some(Data::F32(from)) => widen(from, to),
        Some(Data::Bf16(from)) => widen(from, to),
        Some(Data::F16(from)) => widen(from, to),
        None => {}
    }
}

/// Rounds a row of sums into C. Gives the word sums, lane by lane, of what C held before, zero
/// where that does not matter, and holds now; they mean something where C's elements are words.
#[inline(always)]
fn write_row<S: Simd, C: Element>(
    simd: S,
    sums: &[f32],
    bias: Option<&[f32]>,
    store: Store,
    to: &mut [C],
) -> [S::F32; 2] {
    let mut words = [simd.zero(); 2];
    for (index, to) in to.chunks_mut(S::LANES).enumerate() {
        let start = index * S::LANES;
        let bias = bias.map(|bias| &bias[start..]);
        let told = write_vector(simd, simd.load(&sums[start..]), bias, store, to);
        words = [simd.add_words(words[0], told[0]), simd.add_words(words[1], told[1])];
    }
    words
}

/// Rounds one vector of sums into C. Gives what C held before, zero where that does not matter, and
/// what it would hold without rounding.
#[inline(always)]
fn write_vector<S: Simd, C: Element>(
    simd: S,
    sums: S::F32,
    bias: Option<&[f32]>,
    store: Store,
    to: &mut [C],
) -> [S::F32; 2] {
    let sums = match bias {
        Some(bias) => simd.add(sums, simd.load(bias)),
        None => sums,
    };
    let (before, value) = match store {
        Store::Overwrite => (simd.zero(), sums),
        Store::Accumulate => {
            let before = C::load(simd, to);
            (before, simd.add(before, sums))
        }
    };
    C::store(simd, value, to);
    [before, value]
}
