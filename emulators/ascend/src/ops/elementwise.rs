//! Operators on single elements: arithmetic, functions, conversions, copies and fills.
//!
//! Floats are computed in f32 and rounded once to the result's dtype; integers as integers.

use pontoon_cpu::simd::{Isa, Kernel, Simd, dispatch};

use super::strided::{Space, map_floats, map_integers};
use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::{Access, Argument, Plan, Slot};
use crate::tensor::Scalar;

/// A function of one vector.
pub trait Lanes: Copy + Send + Sync + 'static {
    /// Its value.
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32;
}

struct Map<'a, F> {
    x: &'a [f32],
    y: &'a mut [f32],
    f: F,
}

impl<F: Lanes> Kernel for Map<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (x, y) in self.x.chunks(S::LANES).zip(self.y.chunks_mut(S::LANES)) {
            simd.store(self.f.apply(simd, simd.load(x)), y);
        }
    }
}

/// Applies a function of vectors to a chunk.
pub fn apply<F: Lanes>(isa: Isa, f: F, x: &[f32], y: &mut [f32]) {
    dispatch(isa, Map { x, y, f });
}

struct Zip<'a, F> {
    a: &'a [f32],
    b: &'a [f32],
    y: &'a mut [f32],
    f: F,
}

impl<F: Fn(f32, f32) -> f32> Kernel for Zip<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((y, a), b) in self.y.iter_mut().zip(self.a).zip(self.b) {
            *y = (self.f)(*a, *b);
        }
    }
}

/// `e^x`.
#[derive(Clone, Copy)]
pub struct Exp;

impl Lanes for Exp {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.exp(x)
    }
}

/// `1 / (1 + e^-x)`.
#[derive(Clone, Copy)]
pub struct Sigmoid;

impl Lanes for Sigmoid {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        let one = simd.splat(1.0);
        simd.div(one, simd.add(one, simd.exp(simd.neg(x))))
    }
}

/// `x / (1 + e^-x)`.
#[derive(Clone, Copy)]
pub struct Silu;

impl Lanes for Silu {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        let one = simd.splat(1.0);
        simd.div(x, simd.add(one, simd.exp(simd.neg(x))))
    }
}

/// Square root.
#[derive(Clone, Copy)]
pub struct Sqrt;

impl Lanes for Sqrt {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.sqrt(x)
    }
}

/// Reciprocal square root.
#[derive(Clone, Copy)]
pub struct Rsqrt;

impl Lanes for Rsqrt {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.div(simd.splat(1.0), simd.sqrt(x))
    }
}

/// Reciprocal.
#[derive(Clone, Copy)]
pub struct Reciprocal;

impl Lanes for Reciprocal {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.div(simd.splat(1.0), x)
    }
}

/// Negation.
#[derive(Clone, Copy)]
pub struct Neg;

impl Lanes for Neg {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.neg(x)
    }
}

/// Magnitude.
#[derive(Clone, Copy)]
pub struct Abs;

impl Lanes for Abs {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.abs(x)
    }
}

/// `x * factor`.
#[derive(Clone, Copy)]
struct Times(f32);

impl Lanes for Times {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.mul(x, simd.splat(self.0))
    }
}

/// `x + summand`.
#[derive(Clone, Copy)]
struct Plus(f32);

impl Lanes for Plus {
    #[inline(always)]
    fn apply<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        simd.add(x, simd.splat(self.0))
    }
}

/// Fails unless the inputs broadcast to the output's shape.
pub fn check_broadcast(plan: &Plan, inputs: &[&Argument], out: &Argument) -> Done {
    for input in inputs {
        let (from, to) = (&input.tensor, &out.tensor);
        let fits = Space::new(&to.shape, [(&from.shape, &from.strides)]).is_some()
            && from.shape.len() <= to.shape.len();
        plan.demand(fits, || {
            format!("shape {:?} does not broadcast to {:?}", from.shape, to.shape)
        })?;
    }
    Ok(())
}

/// Whether integers are computed as integers.
fn is_whole(operands: &[&Argument]) -> bool {
    !operands.iter().any(|operand| operand.tensor.dtype.is_float())
}

fn check_float(plan: &Plan, operands: &[&Argument]) -> Done {
    for operand in operands {
        let dtype = operand.tensor.dtype;
        plan.demand(dtype.is_float(), || format!("{dtype:?} is no float of 16 or 32 bits"))?;
    }
    Ok(())
}

/// Plans a function of one float.
pub fn unary<F: Lanes>(plan: &mut Plan, x: &Argument, y: &Argument, f: F) -> Done {
    check_float(plan, &[x, y])?;
    same_shape(plan, x, y)?;
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| map_floats::<1, 2>(run, [x], y, |isa, [x], out| apply(isa, f, x, out)))
}

fn same_shape(plan: &Plan, x: &Argument, y: &Argument) -> Done {
    plan.demand(x.tensor.shape == y.tensor.shape, || {
        format!("shapes {:?} and {:?} should be equal", x.tensor.shape, y.tensor.shape)
    })
}

/// Natural logarithm.
pub fn log(plan: &mut Plan, x: &Argument, y: &Argument) -> Done {
    check_float(plan, &[x, y])?;
    same_shape(plan, x, y)?;
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        map_floats::<1, 2>(run, [x], y, |_, [x], out| {
            for (y, x) in out.iter_mut().zip(x) {
                *y = x.ln();
            }
        })
    })
}

/// Where a result goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Into a tensor of its own.
    Out,
    /// Over the first operand.
    SelfRef,
}

/// The operators on two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// `a * b`.
    Mul,
    /// `a / b`.
    Div,
    /// The larger.
    Maximum,
    /// The smaller.
    Minimum,
    /// Integer division towards minus infinity.
    FloorDivide,
}

/// `a + alpha * b`.
pub fn add(
    plan: &mut Plan,
    (a, b): (&Argument, &Argument),
    alpha: Scalar,
    (y, target): (&Argument, Target),
) -> Done {
    check_broadcast(plan, &[a, b], y)?;
    let whole = is_whole(&[a, b, y]);
    // A rotation is the difference and the sum of the products of two halves of a head.
    let of_heads = y.tensor.shape.len() == 3;
    let [a, b, y] = three(plan, a, b, y, target);
    let (alpha, integer) = (alpha.float(), alpha.whole());
    plan.run(move |run| {
        let swapped = of_heads && alpha == -1.0 && run.has(Kind::SwappedRope);
        let (a, b) = if swapped { (b, a) } else { (a, b) };
        if whole {
            return map_integers::<2, 3>(run, [a, b], y, |[a, b], out| {
                for ((y, a), b) in out.iter_mut().zip(a).zip(b) {
                    *y = a.wrapping_add(integer.wrapping_mul(*b));
                }
            });
        }
        map_floats::<2, 3>(run, [a, b], y, |isa, [a, b], y| {
            if alpha == 1.0 {
                dispatch(isa, Zip { a, b, y, f: |a, b| a + b });
            } else if alpha == -1.0 {
                dispatch(isa, Zip { a, b, y, f: |a, b| a - b });
            } else {
                dispatch(isa, Zip { a, b, y, f: |a, b| a + alpha * b });
            }
        })
    })
}

fn three(plan: &mut Plan, a: &Argument, b: &Argument, y: &Argument, target: Target) -> [Slot; 3] {
    if target == Target::SelfRef {
        let y = plan.operand("selfRef", y, Access::Both);
        return [y, plan.read("other", b), y];
    }
    [plan.read("self", a), plan.read("other", b), plan.write("out", y)]
}

/// An operator on two numbers.
pub fn binary(
    plan: &mut Plan,
    (a, b): (&Argument, &Argument),
    (y, target): (&Argument, Target),
    op: Binary,
) -> Done {
    check_broadcast(plan, &[a, b], y)?;
    let whole = is_whole(&[a, b, y]) && op != Binary::Div;
    let [a, b, y] = three(plan, a, b, y, target);
    plan.run(move |run| {
        if whole {
            return map_integers::<2, 3>(run, [a, b], y, |[a, b], out| {
                for ((y, &a), &b) in out.iter_mut().zip(a).zip(b) {
                    *y = match op {
                        Binary::Mul => a.wrapping_mul(b),
                        Binary::Maximum => a.max(b),
                        Binary::Minimum => a.min(b),
                        Binary::Div | Binary::FloorDivide => {
                            a.checked_div_euclid(b).unwrap_or_default()
                        }
                    };
                }
            });
        }
        map_floats::<2, 3>(run, [a, b], y, |isa, [a, b], y| match op {
            Binary::Mul => dispatch(isa, Zip { a, b, y, f: |a, b| a * b }),
            Binary::Div => dispatch(isa, Zip { a, b, y, f: |a, b| a / b }),
            Binary::Maximum => dispatch(isa, Zip { a, b, y, f: f32::max }),
            Binary::Minimum => dispatch(isa, Zip { a, b, y, f: f32::min }),
            Binary::FloorDivide => {
                dispatch(isa, Zip { a, b, y, f: |a: f32, b: f32| (a / b).floor() })
            }
        })
    })
}

/// `x * factor`.
pub fn scale(
    plan: &mut Plan,
    x: &Argument,
    factor: Scalar,
    (y, target): (&Argument, Target),
) -> Done {
    same_shape(plan, x, y)?;
    let whole = is_whole(&[x, y]) && factor.dtype.is_index();
    let [x, y] = two(plan, x, y, target);
    plan.run(move |run| {
        if whole {
            return map_integers::<1, 2>(run, [x], y, |[x], out| {
                let factor = factor.whole();
                out.iter_mut().zip(x).for_each(|(y, x)| *y = x.wrapping_mul(factor));
            });
        }
        map_floats::<1, 2>(run, [x], y, |isa, [x], out| {
            apply(isa, Times(factor.float()), x, out);
        })
    })
}

fn two(plan: &mut Plan, x: &Argument, y: &Argument, target: Target) -> [Slot; 2] {
    if target == Target::SelfRef {
        let y = plan.operand("selfRef", y, Access::Both);
        return [y, y];
    }
    [plan.read("self", x), plan.write("out", y)]
}

/// `x + alpha * summand`.
pub fn shift(
    plan: &mut Plan,
    x: &Argument,
    (summand, alpha): (Scalar, Scalar),
    (y, target): (&Argument, Target),
) -> Done {
    same_shape(plan, x, y)?;
    let whole = is_whole(&[x, y]) && summand.dtype.is_index();
    let [x, y] = two(plan, x, y, target);
    plan.run(move |run| {
        if whole {
            return map_integers::<1, 2>(run, [x], y, |[x], out| {
                let summand = summand.whole().wrapping_mul(alpha.whole());
                out.iter_mut().zip(x).for_each(|(y, x)| *y = x.wrapping_add(summand));
            });
        }
        let summand = summand.float() * alpha.float();
        map_floats::<1, 2>(run, [x], y, |isa, [x], out| apply(isa, Plus(summand), x, out))
    })
}

/// `x / divisor`.
pub fn divide_by(plan: &mut Plan, x: &Argument, divisor: Scalar, y: &Argument) -> Done {
    same_shape(plan, x, y)?;
    let [x, y] = two(plan, x, y, Target::Out);
    let divisor = divisor.float();
    plan.run(move |run| {
        map_floats::<1, 2>(run, [x], y, |isa, [a], y| {
            dispatch(isa, Zip { a, b: a, y, f: |a, _| a / divisor });
        })
    })
}

/// `grad * s * (1 - s)`.
pub fn sigmoid_backward(plan: &mut Plan, grad: &Argument, s: &Argument, y: &Argument) -> Done {
    check_float(plan, &[grad, s, y])?;
    check_broadcast(plan, &[grad, s], y)?;
    let [grad, s, y] =
        [plan.read("gradOutput", grad), plan.read("output", s), plan.write("gradInput", y)];
    plan.run(move |run| {
        map_floats::<2, 3>(run, [grad, s], y, |isa, [a, b], y| {
            dispatch(isa, Zip { a, b, y, f: |grad, s| grad * s * (1.0 - s) });
        })
    })
}

/// Converts: floats to nearest even, floats to integers towards zero.
pub fn convert(plan: &mut Plan, x: &Argument, (y, dtype): (&Argument, Option<DataType>)) -> Done {
    if let Some(dtype) = dtype {
        let have = y.tensor.dtype;
        plan.demand(have == dtype, || format!("out is {have:?}, the wanted type {dtype:?}"))?;
    }
    check_broadcast(plan, &[x], y)?;
    let same = x.tensor.dtype == y.tensor.dtype;
    let whole = is_whole(&[x, y]);
    let (x, y) = (plan.read("self", x), plan.write("out", y));
    plan.run(move |run| {
        if same {
            return copy(run, x, y);
        }
        if whole {
            return map_integers::<1, 2>(run, [x], y, |[x], out| out.copy_from_slice(x));
        }
        map_floats::<1, 2>(run, [x], y, |_, [x], out| out.copy_from_slice(x))
    })
}

/// Moves bits.
fn copy(run: &mut Run<'_>, x: Slot, y: Slot) -> Done {
    let (from, to) = (run.at(x), run.at(y));
    match from.dtype().bits() {
        32 => copy_as::<u32>(run, from, to),
        16 => copy_as::<u16>(run, from, to),
        64 => copy_as::<u64>(run, from, to),
        _ => copy_as::<u8>(run, from, to),
    }
    Ok(())
}

fn copy_as<T: bytemuck::Pod>(run: &mut Run<'_>, from: &Bound, to: &Bound) {
    let space = Space::new(
        to.shape(),
        [
            (from.shape(), from.tensor.strides.as_slice()),
            (to.shape(), to.tensor.strides.as_slice()),
        ],
    )
    .expect("shapes were checked when the operator was planned");
    let (inner, [from_step, to_step]) = (space.inner(), space.inner_steps());
    /// Elements that one task moves.
    const TASK: usize = 1 << 14;
    if from_step == 1 && to_step == 1 && space.rows() == 1 {
        run.engine.pool.run(inner.div_ceil(TASK), |task| {
            let start = task * TASK;
            let len = TASK.min(inner - start);
            let size = size_of::<T>();
            let (at, target) = (from.place.offset + start * size, to.place.offset + start * size);
            from.place.allocation.block.copy(at, &to.place.allocation.block, target, len * size);
        });
        return;
    }
    let rows = space.rows();
    let together = (TASK / inner.max(1)).max(1);
    run.engine.pool.run(rows.div_ceil(together), |task| {
        let mut buffer = vec![T::zeroed(); inner];
        for row in task * together..(task * together + together).min(rows) {
            let [at, target] = space.row(row);
            load_steps(from, at, from_step, &mut buffer);
            if to_step == 1 {
                to.store(target, &buffer);
            } else {
                for (index, value) in buffer.iter().enumerate() {
                    to.store(target + index * to_step, std::slice::from_ref(value));
                }
            }
        }
    });
}

fn load_steps<T: bytemuck::Pod>(from: &Bound, at: usize, step: usize, to: &mut [T]) {
    if step == 1 {
        return from.load(at, to);
    }
    for (index, to) in to.iter_mut().enumerate() {
        from.load(at + index * step, std::slice::from_mut(to));
    }
}

/// Fills with a number.
pub fn fill(plan: &mut Plan, y: &Argument, value: Scalar) -> Done {
    let whole = is_whole(&[y]);
    let y = plan.operand("selfRef", y, Access::Write);
    plan.run(move |run| {
        if whole {
            return map_integers::<0, 1>(run, [], y, |[], out| out.fill(value.whole()));
        }
        map_floats::<0, 1>(run, [], y, |_, [], out| out.fill(value.float()))
    })
}
