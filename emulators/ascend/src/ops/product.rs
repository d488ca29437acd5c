//! Matrix products, in an order of summation of their own: a k above [`K_BLOCK`] is cut into two
//! halves, each is one chain from zero, and the two are added.
//!
//! The chains run on the CPU backend's kernels, so an element's bits depend on its row, its column
//! and k alone. Operands may be transposed by their strides; others are copied first.

use half::{bf16, f16};
use pontoon_cpu::gemm::{Data, DataMut, GemmArgs, Layout, Matrix, MatrixMut, Store, gemm};
use pontoon_cpu::pool::Pool;
use pontoon_cpu::scratch::Scratch;
use pontoon_cpu::simd::{Element, Isa, Kernel, Simd, dispatch};

use super::elementwise::Target;
use super::{Bound, Run};
use crate::device::Engine;
use crate::dtype::DataType;
use crate::failure::{Done, Failure};
use crate::fault::Kind;
use crate::plan::{Access, Argument, Plan, Slot};
use crate::tensor::Scalar;

/// Most terms of a sum that is one chain.
const K_BLOCK: usize = 256;
/// What halves of longer sums are rounded up to: whole cache lines of any type.
const HALF_STEP: usize = 64;
/// Terms that a planted defect leaves out where k is no whole number of blocks.
const TAIL: usize = 8;
/// f32 sums kept between blocks: what stays in the third-level cache.
const SUMS_MAX: usize = 1 << 20;
/// Fewest rows that share a packed right operand.
const ROWS_MIN: usize = 96;

/// Which way round a matrix lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// Elements of a row are neighbours.
    Rows,
    /// Elements of a column are neighbours.
    Columns,
}

/// A matrix in an operand: extents, how it lies, and elements from one row (column) to the next.
#[derive(Clone, Copy, Debug)]
struct View {
    lie: Lie,
    stride: usize,
}

fn view_of((rows, columns): (usize, usize), strides: &[usize]) -> Option<View> {
    let [down, across] = *strides else { return None };
    if (across == 1 || columns == 1) && (down >= columns || rows == 1) {
        return Some(View { lie: Lie::Rows, stride: down.max(columns) });
    }
    if (down == 1 || rows == 1) && (across >= rows || columns == 1) {
        return Some(View { lie: Lie::Columns, stride: across.max(rows) });
    }
    None
}

/// A matrix that is read, elements of its rows or of its columns being neighbours.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    data: Data<'a>,
    view: View,
}

/// A copy of a matrix, rows after rows.
enum Copied {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Copied {
    fn data(&self) -> Data<'_> {
        match self {
            Copied::F32(data) => Data::F32(data),
            Copied::Bf16(data) => Data::Bf16(data),
            Copied::F16(data) => Data::F16(data),
        }
    }
}

/// Numbers rounded to the type of a product's operands.
pub struct Rounded(Copied);

impl Rounded {
    /// Room for a number of elements.
    pub fn new(dtype: DataType, elements: usize) -> Rounded {
        Rounded(match dtype {
            DataType::Bf16 => Copied::Bf16(vec![bf16::ZERO; elements]),
            DataType::F16 => Copied::F16(vec![f16::ZERO; elements]),
            _ => Copied::F32(vec![0.0; elements]),
        })
    }

    /// Rounds numbers into it.
    pub fn round(&mut self, isa: Isa, from: &[f32]) {
        let store = Store::Overwrite;
        match &mut self.0 {
            Copied::F32(to) => to[..from.len()].copy_from_slice(from),
            Copied::Bf16(to) => dispatch(isa, Round { from, to: &mut to[..from.len()], store }),
            Copied::F16(to) => dispatch(isa, Round { from, to: &mut to[..from.len()], store }),
        }
    }

    /// The rounded numbers.
    pub fn data(&self) -> Data<'_> {
        self.0.data()
    }
}

/// Copies the rows of a matrix of any strides.
fn copy_matrix(
    bound: &Bound,
    first: usize,
    (rows, columns): (usize, usize),
    strides: &[usize],
) -> Done<Copied> {
    fn elements<T: bytemuck::Pod>(
        bound: &Bound,
        first: usize,
        (rows, columns): (usize, usize),
        strides: &[usize],
    ) -> Vec<T> {
        let mut copy = vec![T::zeroed(); rows * columns];
        for (index, to) in copy.iter_mut().enumerate() {
            let at = first + index / columns * strides[0] + index % columns * strides[1];
            bound.load(at, std::slice::from_mut(to));
        }
        copy
    }
    Ok(match bound.dtype() {
        DataType::F32 => Copied::F32(elements(bound, first, (rows, columns), strides)),
        DataType::Bf16 => Copied::Bf16(elements(bound, first, (rows, columns), strides)),
        DataType::F16 => Copied::F16(elements(bound, first, (rows, columns), strides)),
        other => return Err(Failure::operator(format!("{other:?} matrices are not multiplied"))),
    })
}

/// One product.
pub struct Product<'a> {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of a sum.
    pub k: usize,
    /// Left operand `[m, k]`.
    pub a: Operand<'a>,
    /// Right operand `[k, n]`.
    pub b: Operand<'a>,
    /// Result `[m, n]`, its rows `c_stride` elements apart.
    pub c: DataMut<'a>,
    /// Elements from one row of the result to the next.
    pub c_stride: usize,
    /// What happens to the old contents.
    pub store: Store,
}

/// What planted defects do to products.
#[derive(Clone, Copy, Default)]
pub struct Flaws {
    /// Sums are rounded to bf16 after each block.
    pub bf16_sums: bool,
    /// Terms left out at the end of k.
    pub tail: usize,
    /// What the first sum starts from.
    pub stale: f32,
    /// The factor on the first row, 1 for none: differs from run to run.
    pub wobble: f32,
    /// Rows from which operands lose accuracy; 0 for none.
    pub rough_from: usize,
    /// The block of k depends on the number of rows.
    pub by_rows: bool,
    /// Results are cut.
    pub cut: bool,
}

impl Flaws {
    /// The defects that are active in a run.
    pub fn of(run: &Run<'_>, k: usize) -> Flaws {
        let odd = run.engine.tasks % 2 == 1;
        Flaws {
            bf16_sums: run.has(Kind::Bf16Accumulation),
            tail: if run.has(Kind::DroppedTail) { (k % K_BLOCK).min(TAIL) } else { 0 },
            stale: if run.has(Kind::StaleWorkspace) { run.stale() } else { 0.0 },
            wobble: if run.has(Kind::Nondeterministic) && odd { 1.0 + 1e-6 } else { 1.0 },
            rough_from: run.defect(Kind::OnePath).map_or(0, |fault| fault.rows as usize + 1),
            by_rows: run.has(Kind::BatchVariant),
            cut: run.has(Kind::WrongRounding),
        }
    }
}

/// Computes a product.
pub fn multiply(engine: &mut Engine, product: Product<'_>, flaws: Flaws) {
    let Engine { pool, isa, scratch, sums, .. } = engine;
    let mut work = Work { pool, isa: *isa, scratch, sums };
    work.multiply(product, flaws);
}

/// What a product needs to run; attention's workers have their own.
pub struct Work<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Instruction set.
    pub isa: Isa,
    /// Working memory of chains.
    pub scratch: &'a mut Scratch,
    /// Sums between blocks.
    pub sums: &'a mut Scratch,
}

struct Round<'a, T> {
    from: &'a [f32],
    to: &'a mut [T],
    store: Store,
}

impl<T: Element> Kernel for Round<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            let mut value = simd.load(from);
            if self.store == Store::Accumulate {
                value = simd.add(T::load(simd, to), value);
            }
            T::store(simd, value, to);
        }
    }
}

impl Work<'_> {
    fn multiply(&mut self, mut product: Product<'_>, flaws: Flaws) {
        let Product { m, n, .. } = product;
        if m == 0 || n == 0 {
            return;
        }
        let k = product.k - flaws.tail.min(product.k);
        let block = match flaws {
            Flaws { bf16_sums: true, .. } => 32,
            Flaws { by_rows: true, .. } if m % 2 == 1 => 64,
            _ if k <= K_BLOCK => K_BLOCK,
            _ => k.div_ceil(2).next_multiple_of(HALF_STEP),
        };
        let narrow = !matches!(product.c, DataMut::F32(_));
        let flawed = flaws.stale != 0.0
            || flaws.wobble != 1.0
            || flaws.cut
            || flaws.bf16_sums
            || flaws.rough_from > 0;
        if (k <= block || !narrow) && !flawed && product.store == Store::Overwrite {
            self.blocks(&mut product, (0, m), k, block, None);
            return;
        }
        let rows = (SUMS_MAX / n).max(ROWS_MIN).min(m);
        for row in (0..m).step_by(rows) {
            let count = rows.min(m - row);
            self.panel(&mut product, (row, count), k, block, flaws);
        }
    }

    /// A panel of rows, summed aside and rounded once.
    fn panel(
        &mut self,
        product: &mut Product<'_>,
        (row, count): (usize, usize),
        k: usize,
        block: usize,
        flaws: Flaws,
    ) {
        let n = product.n;
        let mut held = std::mem::take(self.sums);
        let [sums] = held.floats([count * n]);
        self.blocks(product, (row, count), k, block, Some((&mut *sums, flaws.bf16_sums)));
        spoil(sums, (row, n, product.m), flaws);
        let (store, stride, isa) = (product.store, product.c_stride, self.isa);
        for (index, from) in sums.chunks(n).enumerate() {
            let at = (row + index) * stride;
            match &mut product.c {
                DataMut::F32(c) => dispatch(isa, Round { from, to: &mut c[at..at + n], store }),
                DataMut::Bf16(c) if flaws.cut => {
                    for (to, from) in c[at..at + n].iter_mut().zip(from) {
                        *to = bf16::from_bits((from.to_bits() >> 16) as u16);
                    }
                }
                DataMut::Bf16(c) => dispatch(isa, Round { from, to: &mut c[at..at + n], store }),
                DataMut::F16(c) => dispatch(isa, Round { from, to: &mut c[at..at + n], store }),
            }
        }
        *self.sums = held;
    }

    /// All blocks of k for some rows, into `aside` or straight into the result.
    fn blocks(
        &mut self,
        product: &mut Product<'_>,
        (row, count): (usize, usize),
        k: usize,
        block: usize,
        mut aside: Option<(&mut [f32], bool)>,
    ) {
        let n = product.n;
        let mut first = 0;
        loop {
            let terms = block.min(k - first);
            let store = if first == 0 { Store::Overwrite } else { Store::Accumulate };
            let (layout, a, b) = cut(product, row, first, terms);
            let c = match &mut aside {
                Some((sums, _)) => MatrixMut { data: DataMut::F32(sums), row_stride: n },
                None => {
                    let data = product.c.from(row * product.c_stride);
                    MatrixMut { data, row_stride: product.c_stride }
                }
            };
            let args = GemmArgs { layout, m: count, n, k: terms, a, b, bias: None, c, store };
            gemm(self.pool, self.isa, self.scratch, args);
            if let Some((sums, true)) = &mut aside {
                for sum in sums.iter_mut() {
                    *sum = bf16::from_f32(*sum).to_f32();
                }
            }
            first += terms;
            if first >= k {
                break;
            }
        }
    }
}

/// What defects do to sums.
fn spoil(sums: &mut [f32], (row, n, rows): (usize, usize, usize), flaws: Flaws) {
    if row == 0 && flaws.stale != 0.0 {
        sums[0] += flaws.stale;
    }
    if flaws.wobble != 1.0 {
        sums[..n].iter_mut().for_each(|sum| *sum *= flaws.wobble);
    }
    if flaws.rough_from > 0 && rows >= flaws.rough_from {
        sums.iter_mut().for_each(|sum| *sum *= 1.0 + 1.0 / 64.0);
    }
}

/// The operands of one block: rows from `row` on, terms `first..first + terms`.
fn cut<'a>(
    product: &Product<'a>,
    row: usize,
    first: usize,
    terms: usize,
) -> (Layout, Matrix<'a>, Matrix<'a>) {
    let (a, b) = (product.a, product.b);
    let skip = |data: Data<'a>, at: usize| {
        // A product of no terms reads nothing, wherever its operands would begin.
        if terms == 0 { data } else { data.from(at) }
    };
    let a_at = match a.view.lie {
        Lie::Rows => row * a.view.stride + first,
        Lie::Columns => first * a.view.stride + row,
    };
    let b_at = match b.view.lie {
        Lie::Rows => first * b.view.stride,
        Lie::Columns => first,
    };
    let layout = match (a.view.lie, b.view.lie) {
        (Lie::Rows, Lie::Rows) => Layout::Nn,
        (Lie::Rows, Lie::Columns) => Layout::Nt,
        (Lie::Columns, _) => Layout::Tn,
    };
    let matrix = |operand: Operand<'a>, at| Matrix {
        data: skip(operand.data, at),
        row_stride: operand.view.stride,
    };
    (layout, matrix(a, a_at), matrix(b, b_at))
}

/// The shapes of a product of matrices.
#[derive(Clone, Copy)]
struct Extents {
    m: usize,
    n: usize,
    k: usize,
}

/// Where one matrix of a stack begins and how it steps.
struct Placed<'a> {
    bound: &'a Bound,
    data: Data<'a>,
    first: usize,
    strides: &'a [usize],
}

impl<'a> Placed<'a> {
    fn operand(
        &self,
        extents: (usize, usize),
        copy: &'a mut Option<Copied>,
        wanted: Option<Lie>,
    ) -> Done<Operand<'a>> {
        let view = view_of(extents, self.strides);
        if let Some(view) = view
            && wanted.is_none_or(|wanted| wanted == view.lie)
        {
            let data = self.data.from(self.first.min(self.data.len()));
            return Ok(Operand { data, view });
        }
        let copied = copy.insert(copy_matrix(self.bound, self.first, extents, self.strides)?);
        let view = View { lie: Lie::Rows, stride: extents.1.max(1) };
        Ok(Operand { data: copied.data(), view })
    }
}

fn check_dtypes(plan: &Plan, a: &Argument, b: &Argument, out: &Argument) -> Done {
    let (a, b, out) = (a.tensor.dtype, b.tensor.dtype, out.tensor.dtype);
    plan.demand(a.is_float() && a == b, || {
        format!("operands should be equal floats but are {a:?} and {b:?}")
    })?;
    plan.demand(out == a || out == DataType::F32, || {
        format!("the result of {a:?} operands cannot be {out:?}")
    })
}

fn check_cube(plan: &Plan, a: &Argument, cube: i8) -> Done {
    plan.demand((0..=3).contains(&cube), || format!("cubeMathType is {cube}"))?;
    // Down-precision would make f32 products something else than what the waist asks for.
    let lossy = a.tensor.dtype == DataType::F32 && cube != 0 && cube != 2;
    plan.demand(!lossy, || format!("cubeMathType {cube} turns f32 into HF32"))
}

/// What a product of tensors is made of.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    /// Left.
    pub a: &'a Argument,
    /// Right.
    pub b: &'a Argument,
    /// Result.
    pub out: &'a Argument,
}

/// `out = a b`, for matrices or stacks of them.
pub fn matmul(plan: &mut Plan, factors: Factors<'_>, cube: i8) -> Done {
    let Factors { a, b, out } = factors;
    check_dtypes(plan, a, b, out)?;
    check_cube(plan, a, cube)?;
    let (left, right) = (&a.tensor.shape, &b.tensor.shape);
    plan.demand(left.len() >= 2 && right.len() >= 2, || {
        format!("operands should be matrices but are {left:?} and {right:?}")
    })?;
    let (m, k) = (left[left.len() - 2], left[left.len() - 1]);
    let (k_right, n) = (right[right.len() - 2], right[right.len() - 1]);
    plan.demand(k == k_right, || format!("{left:?} and {right:?} do not multiply"))?;
    let result = &out.tensor.shape;
    let rank = result.len();
    plan.demand(rank >= 2 && result[rank - 2..] == [m, n], || {
        format!("the result of {left:?} and {right:?} is not {result:?}")
    })?;
    let stacks = |shape: &[usize]| shape[..shape.len() - 2].iter().product::<usize>();
    let (a_stack, b_stack, out_stack) = (stacks(left), stacks(right), stacks(result));
    let fits = |stack: usize| stack == out_stack || stack == 1;
    plan.demand(fits(a_stack) && fits(b_stack), || {
        format!("stacks of {left:?} and {right:?} do not give {result:?}")
    })?;
    plan.workspace(k.min(1 << 16) * 4);
    let slots = [plan.read("self", a), plan.read("mat2", b), plan.write("out", out)];
    plan.run(move |run| stack(run, slots, Extents { m, n, k }))
}

/// The matrices of a stack, one after the other.
fn stack(run: &mut Run<'_>, [a, b, out]: [Slot; 3], extents: Extents) -> Done {
    let Extents { m, n, k } = extents;
    let result = run.at(out);
    let shape = result.shape();
    let count: usize = shape[..shape.len() - 2].iter().product();
    let flaws = Flaws::of(run, k);
    let (a_data, b_data) = (run.data(a)?, run.data(b)?);
    let mut c_data = run.data_mut(out)?;
    for index in 0..count {
        let first = |slot: Slot| first_of(run.at(slot), index);
        let tail = |slot: Slot| {
            let strides = &run.at(slot).tensor.strides;
            &strides[strides.len() - 2..]
        };
        let left = Placed { bound: run.at(a), data: a_data, first: first(a), strides: tail(a) };
        let right = Placed { bound: run.at(b), data: b_data, first: first(b), strides: tail(b) };
        let (mut a_copy, mut b_copy) = (None, None);
        let a = left.operand((m, k), &mut a_copy, None)?;
        // There is no kernel for two transposed operands: the right one is copied then.
        let wanted = (a.view.lie == Lie::Columns).then_some(Lie::Rows);
        let b = right.operand((k, n), &mut b_copy, wanted)?;
        let steps = tail(out);
        let at = first(out);
        if steps[1] == 1 || n == 1 {
            let c = c_data.from(at);
            let c_stride = steps[0].max(n);
            let store = Store::Overwrite;
            multiply(run.engine, Product { m, n, k, a, b, c, c_stride, store }, flaws);
        } else {
            let mut aside = vec![0.0; m * n];
            let c = DataMut::F32(&mut aside);
            let store = Store::Overwrite;
            multiply(run.engine, Product { m, n, k, a, b, c, c_stride: n, store }, flaws);
            for (index, value) in aside.iter().enumerate() {
                put(&mut c_data, at + index / n * steps[0] + index % n * steps[1], *value);
            }
        }
    }
    Ok(())
}

fn put(data: &mut DataMut<'_>, at: usize, value: f32) {
    match data {
        DataMut::F32(data) => data[at] = value,
        DataMut::Bf16(data) => data[at] = bf16::from_f32(value),
        DataMut::F16(data) => data[at] = f16::from_f32(value),
    }
}

/// The first element of the `index`-th matrix of a stack; a stack of one serves all.
fn first_of(bound: &Bound, index: usize) -> usize {
    let shape = bound.shape();
    let (mut rest, mut at) = (index, 0);
    for axis in (0..shape.len() - 2).rev() {
        if shape[axis] > 1 {
            at += rest % shape[axis] * bound.tensor.strides[axis];
            rest /= shape[axis];
        }
    }
    at
}

/// `out = beta self + alpha mat1 mat2`.
pub fn add_product(
    plan: &mut Plan,
    (x, factors): (&Argument, Factors<'_>),
    (beta, alpha): (Scalar, Scalar),
    (cube, target): (i8, Target),
) -> Done {
    let Factors { a, b, out } = factors;
    check_dtypes(plan, a, b, out)?;
    check_cube(plan, a, cube)?;
    let (left, right) = (&a.tensor.shape, &b.tensor.shape);
    plan.demand(left.len() == 2 && right.len() == 2 && left[1] == right[0], || {
        format!("{left:?} and {right:?} do not multiply")
    })?;
    let Extents { m, n, k } = Extents { m: left[0], n: right[1], k: left[1] };
    plan.demand(out.tensor.shape == [m, n], || {
        format!("the result of {left:?} and {right:?} is not {:?}", out.tensor.shape)
    })?;
    super::elementwise::check_broadcast(plan, &[x], out)?;
    plan.workspace(4096);
    let (beta, alpha) = (beta.float(), alpha.float());
    let (x, out) = if target == Target::SelfRef {
        let slot = plan.operand("selfRef", out, Access::Both);
        (slot, slot)
    } else {
        (plan.read("self", x), plan.write("out", out))
    };
    let (a, b) = (plan.read("mat1", a), plan.read("mat2", b));
    plan.run(move |run| {
        let mut sums = vec![0.0; m * n];
        product_aside(run, (a, b), Extents { m, n, k }, &mut sums)?;
        let old = broadcast(run, x, out);
        for (sum, old) in sums.iter_mut().zip(old) {
            *sum = beta * old + alpha * *sum;
        }
        run.put_floats(out, &sums);
        Ok(())
    })
}

/// An operand broadcast to another's shape, as f32 in row-major order.
fn broadcast(run: &Run<'_>, x: Slot, out: Slot) -> Vec<f32> {
    let (from, to) = (run.at(x), run.at(out));
    let own = run.floats(x);
    if from.shape() == to.shape() {
        return own;
    }
    let mut own_strides = vec![1; from.shape().len()];
    for axis in (0..own_strides.len().saturating_sub(1)).rev() {
        own_strides[axis] = own_strides[axis + 1] * from.shape()[axis + 1];
    }
    let space = super::strided::Space::new(to.shape(), [(from.shape(), own_strides.as_slice())])
        .expect("shapes were checked when the operator was planned");
    let (inner, [step]) = (space.inner(), space.inner_steps());
    let row = |row: usize| {
        let [at] = space.row(row);
        (0..inner).map(move |index| at + index * step)
    };
    (0..space.rows()).flat_map(row).map(|at| own[at]).collect()
}

/// A product of two matrices in f32.
fn product_aside(
    run: &mut Run<'_>,
    (a, b): (Slot, Slot),
    extents: Extents,
    to: &mut [f32],
) -> Done {
    let Extents { m, n, k } = extents;
    let flaws = Flaws::of(run, k);
    let place = |slot: Slot| -> Done<Placed<'_>> {
        let bound = run.at(slot);
        Ok(Placed { bound, data: run.data(slot)?, first: 0, strides: &bound.tensor.strides })
    };
    let (left, right) = (place(a)?, place(b)?);
    let (mut a_copy, mut b_copy) = (None, None);
    let a = left.operand((m, k), &mut a_copy, None)?;
    let wanted = (a.view.lie == Lie::Columns).then_some(Lie::Rows);
    let b = right.operand((k, n), &mut b_copy, wanted)?;
    let (c, store) = (DataMut::F32(to), Store::Overwrite);
    multiply(run.engine, Product { m, n, k, a, b, c, c_stride: n.max(1), store }, flaws);
    Ok(())
}

/// Rows of a matrix in memory as an operand: for grouped products.
pub fn rows<'a>(data: Data<'a>, first: usize, stride: usize) -> Operand<'a> {
    let data = data.from(first.min(data.len()));
    Operand { data, view: View { lie: Lie::Rows, stride } }
}

/// Columns of a matrix in memory as an operand.
pub fn columns<'a>(data: Data<'a>, first: usize, stride: usize) -> Operand<'a> {
    let data = data.from(first.min(data.len()));
    Operand { data, view: View { lie: Lie::Columns, stride } }
}
