//! Fused operators on halves of rows: gated activations and rotary positions.

use pontoon_cpu::simd::{Kernel, Simd, dispatch};

use super::strided::{load_floats, store_floats};
use super::{Bound, Run};
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::{Argument, Plan, Slot};

/// Rows of a dense tensor, each of two halves.
struct Halves {
    rows: usize,
    half: usize,
}

fn dense(plan: &Plan, argument: &Argument) -> Done {
    plan.demand(argument.tensor.span() == argument.tensor.elements(), || {
        "operands should be contiguous".to_owned()
    })
}

/// Where a row begins in a view whose rows are dense.
fn row_start(bound: &Bound, row: usize) -> usize {
    let tensor = &bound.tensor;
    let rank = tensor.shape.len();
    let (mut rest, mut at) = (row, 0);
    for axis in (0..rank - 1).rev() {
        at += rest % tensor.shape[axis] * tensor.strides[axis];
        rest /= tensor.shape[axis];
    }
    at
}

fn halves(plan: &Plan, x: &Argument, dim: i64) -> Done<Halves> {
    let shape = &x.tensor.shape;
    let rank = shape.len() as i64;
    plan.demand(rank > 0 && (dim == -1 || dim == rank - 1), || {
        format!("only the last dimension is split here, not {dim}")
    })?;
    let width = shape[shape.len() - 1];
    plan.demand(width.is_multiple_of(2), || format!("a width of {width} has no halves"))?;
    plan.demand(x.tensor.strides[shape.len() - 1] == 1 || width == 1, || {
        "rows should be dense".to_owned()
    })?;
    plan.demand(x.tensor.dtype.is_float(), || format!("{:?} is no float", x.tensor.dtype))?;
    Ok(Halves { rows: x.tensor.elements() / width.max(1), half: width / 2 })
}

struct Gate<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.y.len();
        let one = simd.splat(1.0);
        for at in (0..half).step_by(S::LANES) {
            let end = (at + S::LANES).min(half);
            let gate = simd.load(&self.x[at..end]);
            let up = simd.load(&self.x[half + at..half + end]);
            let silu = simd.div(gate, simd.add(one, simd.exp(simd.neg(gate))));
            simd.store(simd.mul(silu, up), &mut self.y[at..end]);
        }
    }
}

/// `silu(first half) * second half`, in f32, rounded once.
pub fn swiglu(plan: &mut Plan, x: &Argument, dim: i64, y: &Argument) -> Done {
    let shape = halves(plan, x, dim)?;
    dense(plan, y)?;
    plan.demand(y.tensor.elements() == shape.rows * shape.half, || {
        format!("the result should be {} rows of {}", shape.rows, shape.half)
    })?;
    let (x, y) = (plan.read("x", x), plan.write("out", y));
    plan.run(move |run| {
        each_row(run, [x], (y, shape.half), &shape, |isa, [x], y| dispatch(isa, Gate { x, y }));
        Ok(())
    })
}

/// Rows that one task takes.
const TASK: usize = 1 << 13;

fn each_row<const N: usize>(
    run: &Run<'_>,
    inputs: [Slot; N],
    (output, width): (Slot, usize),
    shape: &Halves,
    f: impl Fn(pontoon_cpu::simd::Isa, [&[f32]; N], &mut [f32]) + Sync,
) {
    let (isa, rounding) = (run.engine.isa, run.rounding());
    let inputs = inputs.map(|slot| run.at(slot));
    let out = run.at(output);
    let together = (TASK / (2 * shape.half).max(1)).max(1);
    run.engine.pool.run(shape.rows.div_ceil(together), |task| {
        let mut values: [Vec<f32>; N] =
            inputs.map(|input| vec![0.0; input.shape().last().copied().unwrap_or(0)]);
        let mut result = vec![0.0; width];
        for row in task * together..(task * together + together).min(shape.rows) {
            for (values, input) in values.iter_mut().zip(&inputs) {
                load_floats(isa, input, row_start(input, row), 1, values);
            }
            f(isa, std::array::from_fn(|view| values[view].as_slice()), &mut result);
            store_floats(isa, out, row * width, 1, &result, rounding);
        }
    });
}

struct GateGrad<'a> {
    dy: &'a [f32],
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for GateGrad<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.dy.len();
        let one = simd.splat(1.0);
        let (dgate, dup) = self.out.split_at_mut(half);
        for at in (0..half).step_by(S::LANES) {
            let end = (at + S::LANES).min(half);
            let gate = simd.load(&self.x[at..end]);
            let up = simd.load(&self.x[half + at..half + end]);
            let dy = simd.load(&self.dy[at..end]);
            let sigmoid = simd.div(one, simd.add(one, simd.exp(simd.neg(gate))));
            let silu = simd.mul(gate, sigmoid);
            // d silu = s (1 + g (1 - s)).
            let slope = simd.mul(sigmoid, simd.fma(gate, simd.sub(one, sigmoid), one));
            simd.store(simd.mul(simd.mul(dy, up), slope), &mut dgate[at..end]);
            simd.store(simd.mul(dy, silu), &mut dup[at..end]);
        }
    }
}

/// The gradient of both halves.
pub fn swiglu_grad(
    plan: &mut Plan,
    (dy, x): (&Argument, &Argument),
    dim: i64,
    out: &Argument,
) -> Done {
    let shape = halves(plan, x, dim)?;
    dense(plan, out)?;
    plan.demand(dy.tensor.elements() == shape.rows * shape.half, || {
        format!("yGrad should be {} rows of {}", shape.rows, shape.half)
    })?;
    plan.demand(out.tensor.elements() == x.tensor.elements(), || {
        "the result should be as x".to_owned()
    })?;
    let (dy, x) = (plan.read("yGrad", dy), plan.read("x", x));
    let out = plan.write("out", out);
    plan.run(move |run| {
        each_row(run, [dy, x], (out, 2 * shape.half), &shape, |isa, [dy, x], out| {
            dispatch(isa, GateGrad { dy, x, out });
        });
        Ok(())
    })
}

/// Which elements are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Element i and element i + width/2 (mode 0).
    Halves,
    /// Neighbours (mode 1).
    Neighbours,
}

/// `x cos + rotate(x) sin`: x `[.., width]`, cos and sin of as many dimensions, broadcast.
pub fn rotary(
    plan: &mut Plan,
    x: &Argument,
    (cos, sin, mode): (&Argument, &Argument, i64),
    y: &Argument,
) -> Done {
    let shape = halves(plan, x, -1)?;
    let pairing = match mode {
        0 => Pairing::Halves,
        1 => Pairing::Neighbours,
        _ => return plan.forbid(format!("mode {mode} is not emulated: 0 is half, 1 interleaved")),
    };
    dense(plan, y)?;
    plan.demand(y.tensor.shape == x.tensor.shape && y.tensor.dtype == x.tensor.dtype, || {
        "the result should be as x".to_owned()
    })?;
    super::elementwise::check_broadcast(plan, &[cos, sin], x)?;
    let angles = [cos, sin].map(|angle| Angles::of(x, angle));
    let (x, cos, sin) = (plan.read("x", x), plan.read("cos", cos), plan.read("sin", sin));
    let y = plan.write("out", y);
    plan.run(move |run| {
        rotate(run, [x, cos, sin, y], &angles, (&shape, pairing));
        Ok(())
    })
}

/// How a broadcast table steps with the rows of x.
struct Angles {
    dims: Vec<(usize, usize)>,
}

impl Angles {
    fn of(x: &Argument, table: &Argument) -> Angles {
        let (shape, own) = (&x.tensor.shape, &table.tensor);
        let missing = shape.len() - own.shape.len();
        let step = |axis: usize| match axis.checked_sub(missing) {
            Some(axis) if own.shape[axis] > 1 => own.strides[axis],
            _ => 0,
        };
        Angles { dims: (0..shape.len() - 1).map(|axis| (shape[axis], step(axis))).collect() }
    }

    fn row(&self, row: usize) -> usize {
        let (mut rest, mut at) = (row, 0);
        for (extent, step) in self.dims.iter().rev() {
            at += rest % extent * step;
            rest /= extent;
        }
        at
    }
}

fn rotate(
    run: &Run<'_>,
    [x, cos, sin, y]: [Slot; 4],
    angles: &[Angles; 2],
    (shape, pairing): (&Halves, Pairing),
) {
    let (isa, rounding) = (run.engine.isa, run.rounding());
    let swapped = run.has(Kind::SwappedRope);
    let [x, cos, sin, y] = [x, cos, sin, y].map(|slot| run.at(slot));
    let width = 2 * shape.half;
    let together = (TASK / width.max(1)).max(1);
    run.engine.pool.run(shape.rows.div_ceil(together), |task| {
        let mut rows: [Vec<f32>; 4] = std::array::from_fn(|_| vec![0.0; width]);
        for row in task * together..(task * together + together).min(shape.rows) {
            let [values, cosines, sines, out] = &mut rows;
            load_floats(isa, x, row_start(x, row), 1, values);
            load_floats(isa, cos, angles[0].row(row), 1, cosines);
            load_floats(isa, sin, angles[1].row(row), 1, sines);
            for index in 0..width {
                let turned = match pairing {
                    Pairing::Halves if index < shape.half => -values[index + shape.half],
                    Pairing::Halves => values[index - shape.half],
                    Pairing::Neighbours if index % 2 == 0 => -values[index + 1],
                    Pairing::Neighbours => values[index - 1],
                };
                let turned = if swapped { -turned } else { turned };
                out[index] = values[index] * cosines[index] + turned * sines[index];
            }
            store_floats(isa, y, row * width, 1, out, rounding);
        }
    });
}
