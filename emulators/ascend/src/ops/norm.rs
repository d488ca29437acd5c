//! Root-mean-square norms.

use pontoon_cpu::simd::{Isa, Kernel, Simd, dispatch};

use super::strided::{load_floats, store_floats};
use super::{Bound, Run};
use crate::dtype::DataType;
use crate::failure::Done;
use crate::fault::Kind;
use crate::plan::{Argument, Plan, Slot};

/// Rows of which the weight's gradient is summed before blocks are added.
const ROW_BLOCK: usize = 32;

struct Geometry {
    rows: usize,
    width: usize,
}

fn geometry(plan: &Plan, x: &Argument, gamma: &Argument, rstd: &Argument) -> Done<Geometry> {
    let (x, gamma, rstd) = (&x.tensor, &gamma.tensor, &rstd.tensor);
    let width = gamma.elements();
    plan.demand(x.dtype.is_float() && gamma.dtype == x.dtype, || {
        format!("x and gamma should be equal floats but are {:?} and {:?}", x.dtype, gamma.dtype)
    })?;
    plan.demand(x.shape.ends_with(&gamma.shape) && width > 0, || {
        format!("gamma {:?} is no tail of x {:?}", gamma.shape, x.shape)
    })?;
    let rows = x.elements() / width;
    plan.demand(rstd.dtype == DataType::F32 && rstd.elements() == rows, || {
        format!("rstd should be {rows} f32 numbers but is {:?} {:?}", rstd.shape, rstd.dtype)
    })?;
    Ok(Geometry { rows, width })
}

fn contiguous(plan: &Plan, arguments: &[&Argument]) -> Done {
    for argument in arguments {
        let tensor = &argument.tensor;
        plan.demand(tensor.span() == tensor.elements(), || {
            format!("a result of strides {:?} is not contiguous", tensor.strides)
        })?;
    }
    Ok(())
}

struct SumSquares<'a>(&'a [f32]);

impl Kernel for SumSquares<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.zero(); 2];
        for chunk in self.0.chunks(2 * S::LANES) {
            for (sum, part) in sums.iter_mut().zip(chunk.chunks(S::LANES)) {
                let value = simd.load(part);
                *sum = simd.add(*sum, simd.mul(value, value));
            }
        }
        simd.reduce_sum(simd.add(sums[0], sums[1]))
    }
}

/// Sum of products.
pub struct Dot<'a>(pub &'a [f32], pub &'a [f32]);

impl Kernel for Dot<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sum = simd.zero();
        for (a, b) in self.0.chunks(S::LANES).zip(self.1.chunks(S::LANES)) {
            sum = simd.fma(simd.load(a), simd.load(b), sum);
        }
        simd.reduce_sum(sum)
    }
}

/// Where the rows of a view lie: the inner dimensions together are one row.
fn row_start(bound: &Bound, row: usize, width: usize) -> usize {
    let tensor = &bound.tensor;
    let (mut axes, mut inner) = (tensor.shape.len(), 1);
    while axes > 0 && inner < width {
        axes -= 1;
        inner *= tensor.shape[axes];
    }
    let (mut rest, mut at) = (row, 0);
    for axis in (0..axes).rev() {
        at += rest % tensor.shape[axis] * tensor.strides[axis];
        rest /= tensor.shape[axis];
    }
    at
}

/// `y = x / sqrt(mean(x^2) + eps) * gamma`; in 16 bits the first factor is rounded before the
/// second.
pub fn rms_norm(
    plan: &mut Plan,
    (x, gamma): (&Argument, &Argument),
    eps: f64,
    (y, rstd): (&Argument, &Argument),
) -> Done {
    let shape = geometry(plan, x, gamma, rstd)?;
    plan.demand(y.tensor.shape == x.tensor.shape && y.tensor.dtype == x.tensor.dtype, || {
        "y should be as x".to_owned()
    })?;
    contiguous(plan, &[y, rstd])?;
    plan.workspace(4096);
    let (x, gamma) = (plan.read("x", x), plan.read("gamma", gamma));
    let (y, rstd) = (plan.write("yOut", y), plan.write("rstdOut", rstd));
    plan.run(move |run| {
        normalise(run, x, (gamma, eps as f32), (y, rstd), &shape);
        Ok(())
    })
}

fn normalise(
    run: &mut Run<'_>,
    x: Slot,
    (gamma, eps): (Slot, f32),
    (y, rstd): (Slot, Slot),
    shape: &Geometry,
) {
    let Geometry { rows, width } = *shape;
    let (isa, rounding) = (run.engine.isa, run.rounding());
    let weights = run.floats(gamma);
    let narrow = run.at(x).dtype();
    let eps = if run.has(Kind::StaleWorkspace) { eps + run.stale() * 1e-3 } else { eps };
    let pool = run.engine.pool;
    let (from, to, scales) = (run.at(x), run.at(y), run.at(rstd));
    let starts: Vec<usize> = (0..rows).map(|row| row_start(from, row, width)).collect();
    let together = (4096 / width).max(1);
    pool.run(rows.div_ceil(together), |task| {
        let mut values = vec![0.0; width];
        let own = starts.iter().enumerate().skip(task * together).take(together);
        for (row, start) in own {
            load_floats(isa, from, *start, 1, &mut values);
            let mean = dispatch(isa, SumSquares(&values)) / width as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            scale_row(isa, narrow, &mut values, scale, &weights);
            store_floats(isa, to, row * width, 1, &values, rounding);
            scales.store(row, &[scale]);
        }
    });
}

struct ScaleRow<'a> {
    values: &'a mut [f32],
    scale: f32,
    weights: &'a [f32],
    narrow: DataType,
}

impl Kernel for ScaleRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = simd.splat(self.scale);
        let chunks = self.values.chunks_mut(S::LANES).zip(self.weights.chunks(S::LANES));
        for (values, weights) in chunks {
            let mut value = simd.mul(simd.load(values), scale);
            match self.narrow {
                DataType::Bf16 => {
                    let mut raw = [half::bf16::ZERO; 64];
                    simd.store_bf16(value, &mut raw[..S::LANES]);
                    value = simd.load_bf16(&raw[..S::LANES]);
                }
                DataType::F16 => {
                    let mut raw = [half::f16::ZERO; 64];
                    simd.store_f16(value, &mut raw[..S::LANES]);
                    value = simd.load_f16(&raw[..S::LANES]);
                }
                _ => {}
            }
            simd.store(simd.mul(value, simd.load(weights)), values);
        }
    }
}

fn scale_row(isa: Isa, narrow: DataType, values: &mut [f32], scale: f32, weights: &[f32]) {
    dispatch(isa, ScaleRow { values, scale, weights, narrow });
}

/// Adds, rounds, then normalises.
pub fn add_rms_norm(
    plan: &mut Plan,
    [a, b, gamma]: [&Argument; 3],
    eps: f64,
    [y, rstd, sum]: [&Argument; 3],
) -> Done {
    let shape = geometry(plan, a, gamma, rstd)?;
    plan.demand(a.tensor.shape == b.tensor.shape && sum.tensor.shape == a.tensor.shape, || {
        "x1, x2 and x should have one shape".to_owned()
    })?;
    contiguous(plan, &[y, rstd, sum])?;
    plan.workspace(4096);
    let [a, b, gamma] = [plan.read("x1", a), plan.read("x2", b), plan.read("gamma", gamma)];
    let (y, rstd) = (plan.write("yOut", y), plan.write("rstdOut", rstd));
    let sum = plan.operand("xOut", sum, crate::plan::Access::Both);
    plan.run(move |run| {
        super::strided::map_floats::<2, 3>(run, [a, b], sum, |_, [a, b], out| {
            for ((y, a), b) in out.iter_mut().zip(a).zip(b) {
                *y = a + b;
            }
        })?;
        normalise(run, sum, (gamma, eps as f32), (y, rstd), &shape);
        Ok(())
    })
}

/// The gradient: `dx = rstd (g - x̂ mean(g x̂))` with `g = dy gamma`; `dgamma = sum(dy x̂)`.
pub fn rms_norm_grad(
    plan: &mut Plan,
    [dy, x, rstd, gamma]: [&Argument; 4],
    [dx, dgamma]: [&Argument; 2],
) -> Done {
    let shape = geometry(plan, x, gamma, rstd)?;
    plan.demand(dy.tensor.shape == x.tensor.shape && dx.tensor.shape == x.tensor.shape, || {
        "dy, x and dx should have one shape".to_owned()
    })?;
    let out = &dgamma.tensor;
    plan.demand(out.dtype == DataType::F32 && out.elements() == shape.width, || {
        format!("dgamma should be {} f32 numbers, is {:?} {:?}", shape.width, out.shape, out.dtype)
    })?;
    contiguous(plan, &[dx, dgamma])?;
    plan.workspace(shape.width * 4);
    let dy = plan.read("dy", dy);
    let [x, rstd, gamma] = [plan.read("x", x), plan.read("rstd", rstd), plan.read("gamma", gamma)];
    let (dx, dgamma) = (plan.write("dxOut", dx), plan.write("dgammaOut", dgamma));
    plan.run(move |run| {
        let slots = Gradient { dy, x, rstd, gamma, dx };
        let sums = gradient(run, &slots, &shape);
        run.put_floats(dgamma, &sums);
        Ok(())
    })
}

struct Gradient {
    dy: Slot,
    x: Slot,
    rstd: Slot,
    gamma: Slot,
    dx: Slot,
}

struct GradientRow<'a> {
    dy: &'a [f32],
    x: &'a mut [f32],
    gamma: &'a [f32],
    sums: &'a mut [f32],
    scale: f32,
}

impl Kernel for GradientRow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.x.len();
        let scale = simd.splat(self.scale);
        let mut dot = simd.zero();
        for at in (0..width).step_by(S::LANES) {
            let end = (at + S::LANES).min(width);
            let unit = simd.mul(simd.load(&self.x[at..end]), scale);
            let dy = simd.load(&self.dy[at..end]);
            let g = simd.mul(dy, simd.load(&self.gamma[at..end]));
            dot = simd.fma(g, unit, dot);
            let sum = simd.fma(dy, unit, simd.load(&self.sums[at..end]));
            simd.store(sum, &mut self.sums[at..end]);
        }
        let mean = simd.splat(simd.reduce_sum(dot) / width as f32);
        for at in (0..width).step_by(S::LANES) {
            let end = (at + S::LANES).min(width);
            let unit = simd.mul(simd.load(&self.x[at..end]), scale);
            let g = simd.mul(simd.load(&self.dy[at..end]), simd.load(&self.gamma[at..end]));
            let value = simd.mul(scale, simd.sub(g, simd.mul(unit, mean)));
            simd.store(value, &mut self.x[at..end]);
        }
    }
}

/// Writes `dx`; gives `dgamma`, summed by blocks of rows.
fn gradient(run: &mut Run<'_>, slots: &Gradient, shape: &Geometry) -> Vec<f32> {
    let Geometry { rows, width } = *shape;
    let (isa, rounding, pool) = (run.engine.isa, run.rounding(), run.engine.pool);
    let wobble = run.wobbles();
    let stale = run.has(Kind::StaleWorkspace).then(|| run.stale());
    let gamma = run.floats(slots.gamma);
    let scales = run.floats(slots.rstd);
    let (dy, x, dx) = (run.at(slots.dy), run.at(slots.x), run.at(slots.dx));
    let blocks = rows.div_ceil(ROW_BLOCK);
    let partial: Vec<std::sync::Mutex<Vec<f32>>> =
        (0..blocks).map(|_| Default::default()).collect();
    pool.run(blocks, |block| {
        let (mut grads, mut values) = (vec![0.0; width], vec![0.0; width]);
        let mut sums = vec![0.0; width];
        let own = scales.iter().enumerate().take(rows).skip(block * ROW_BLOCK).take(ROW_BLOCK);
        for (row, &scale) in own {
            load_floats(isa, dy, row_start(dy, row, width), 1, &mut grads);
            load_floats(isa, x, row_start(x, row, width), 1, &mut values);
            let kernel =
                GradientRow { dy: &grads, x: &mut values, gamma: &gamma, sums: &mut sums, scale };
            dispatch(isa, kernel);
            store_floats(isa, dx, row * width, 1, &values, rounding);
        }
        *partial[block].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = sums;
    });
    let mut sums = vec![0.0; width];
    let parts: Vec<Vec<f32>> = partial
        .into_iter()
        .map(|part| part.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
        .collect();
    let mut add = |part: &Vec<f32>| sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    // Atomics on a chip add in whatever order they come.
    if wobble {
        parts.iter().rev().for_each(&mut add)
    } else {
        parts.iter().for_each(&mut add)
    }
    if wobble && parts.len() == 1 {
        sums.iter_mut().for_each(|sum| *sum *= 1.0 + f32::EPSILON);
    }
    if let Some(stale) = stale {
        sums[0] += stale;
    }
    sums
}
