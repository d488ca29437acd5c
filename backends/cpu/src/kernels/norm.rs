//! Root-mean-square normalisation, forward and backward, alone and with the residual addition.

use pontoon_ops::{self as ops, Accumulate, ROW_BLOCK, View};

use super::{Context, Done, row_stride, rows_per_task, with_float};
use crate::ffi::Parts;
use crate::simd::{Element, Kernel, Simd, dispatch};

/// One row: sum of squares in vector lanes, added by a fixed tree.
struct NormRow<'a, T> {
    x: &'a [T],
    weight: &'a [T],
    eps: f32,
    y: &'a mut [T],
}

impl<T: Element> Kernel for NormRow<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut squares = simd.zero();
        for x in self.x.chunks(S::LANES) {
            let x = T::load(simd, x);
            squares = simd.fma(x, x, squares);
        }
        let mean = simd.reduce_sum(squares) / self.x.len() as f32;
        let rstd = 1.0 / (mean + self.eps).sqrt();
        let factor = simd.splat(rstd);
        let inputs = self.x.chunks(S::LANES).zip(self.weight.chunks(S::LANES));
        for ((x, weight), y) in inputs.zip(self.y.chunks_mut(S::LANES)) {
            // Rounded before the weight in 16-bit dtypes, as the contract says.
            T::store(simd, simd.mul(T::load(simd, x), factor), y);
            let value = simd.mul(T::load(simd, y), T::load(simd, weight));
            T::store(simd, value, y);
        }
        rstd
    }
}

struct SumRow<'a, T> {
    a: &'a [T],
    b: &'a [T],
    y: &'a mut [T],
}

impl<T: Element> Kernel for SumRow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let inputs = self.a.chunks(S::LANES).zip(self.b.chunks(S::LANES));
        for ((a, b), y) in inputs.zip(self.y.chunks_mut(S::LANES)) {
            T::store(simd, simd.add(T::load(simd, a), T::load(simd, b)), y);
        }
    }
}

pub(super) fn rms_norm(context: &mut Context<'_>, op: &ops::RmsNorm) -> Done {
    with_float!(op.x.dtype, T => rms_norm_as::<T>(context, op))
}

fn rms_norm_as<T: Element>(context: &mut Context<'_>, op: &ops::RmsNorm) -> Done {
    let x = context.operands.read::<T>(&op.x)?;
    let weight = context.operands.read::<T>(&op.weight)?;
    let y = context.operands.write::<T>(&op.y)?;
    let rstd = context.operands.write::<f32>(&op.rstd)?;
    let (rows, width, eps) = (op.x.dim(0), op.x.dim(1), op.eps);
    let (x_stride, y_stride) = (row_stride(&op.x), row_stride(&op.y));
    let per_task = rows_per_task(rows, width);
    let ys = Parts::new(y, y_stride * per_task);
    let rstds = Parts::new(rstd, per_task);
    let (isa, tally) = (context.isa, context.tally());
    context.pool.run(rows.div_ceil(per_task), |task| {
        let mut sums = tally.task();
        let (y, rstd) = (ys.take(task), rstds.take(task));
        for (row, rstd) in rstd.iter_mut().enumerate() {
            let x = &x[(task * per_task + row) * x_stride..][..width];
            let y = &mut y[row * y_stride..][..width];
            *rstd = dispatch(isa, NormRow { x, weight, eps, y: &mut *y });
            sums.row([(0, x)], [(2, &*y)]);
        }
    });
    context.note(tally);
    Ok(())
}

pub(super) fn add_rms_norm(context: &mut Context<'_>, op: &ops::AddRmsNorm) -> Done {
    with_float!(op.x.dtype, T => add_rms_norm_as::<T>(context, op))
}

fn add_rms_norm_as<T: Element>(context: &mut Context<'_>, op: &ops::AddRmsNorm) -> Done {
    let x = context.operands.read::<T>(&op.x)?;
    let residual = context.operands.read::<T>(&op.residual)?;
    let weight = context.operands.read::<T>(&op.weight)?;
    let sum = context.operands.write::<T>(&op.sum)?;
    let y = context.operands.write::<T>(&op.y)?;
    let rstd = context.operands.write::<f32>(&op.rstd)?;
    let (rows, width, eps) = (op.x.dim(0), op.x.dim(1), op.eps);
    let [x_s, residual_s, sum_s, y_s] = [&op.x, &op.residual, &op.sum, &op.y].map(row_stride);
    let per_task = rows_per_task(rows, width);
    let sums = Parts::new(sum, sum_s * per_task);
    let ys = Parts::new(y, y_s * per_task);
    let rstds = Parts::new(rstd, per_task);
    let (isa, tally) = (context.isa, context.tally());
    context.pool.run(rows.div_ceil(per_task), |task| {
        let mut of_task = tally.task();
        let (sum, y, rstd) = (sums.take(task), ys.take(task), rstds.take(task));
        for (row, rstd) in rstd.iter_mut().enumerate() {
            let at = task * per_task + row;
            let a = &x[at * x_s..][..width];
            let b = &residual[at * residual_s..][..width];
            let sum = &mut sum[row * sum_s..][..width];
            dispatch(isa, SumRow { a, b, y: &mut *sum });
            let y = &mut y[row * y_s..][..width];
            *rstd = dispatch(isa, NormRow { x: sum, weight, eps, y: &mut *y });
            of_task.row([(0, a), (1, b)], [(3, &*sum), (4, &*y)]);
        }
    });
    context.note(tally);
    Ok(())
}

/// Backward of one row; adds the row's share to the block's weight gradient.
struct NormRowBwd<'a, T> {
    dy: &'a [T],
    dsum: Option<&'a [T]>,
    x: &'a [T],
    weight: &'a [T],
    rstd: f32,
    dx: &'a mut [T],
    dweight: &'a mut [f32],
}

impl<T: Element> Kernel for NormRowBwd<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.x.len();
        let rstd = simd.splat(self.rstd);
        let mut dot = simd.zero();
        for start in (0..width).step_by(S::LANES) {
            let end = (start + S::LANES).min(width);
            let dy = T::load(simd, &self.dy[start..end]);
            let n = simd.mul(T::load(simd, &self.x[start..end]), rstd);
            let g = simd.mul(dy, T::load(simd, &self.weight[start..end]));
            dot = simd.fma(g, n, dot);
            let dweight = &mut self.dweight[start..end];
            let sum = simd.fma(dy, n, simd.load(dweight));
            simd.store(sum, dweight);
        }
        let mean = simd.splat(simd.reduce_sum(dot) / width as f32);
        for start in (0..width).step_by(S::LANES) {
            let end = (start + S::LANES).min(width);
            let dy = T::load(simd, &self.dy[start..end]);
            let n = simd.mul(T::load(simd, &self.x[start..end]), rstd);
            let g = simd.mul(dy, T::load(simd, &self.weight[start..end]));
            let mut dx = simd.mul(rstd, simd.sub(g, simd.mul(n, mean)));
            if let Some(dsum) = self.dsum {
                dx = simd.add(dx, T::load(simd, &dsum[start..end]));
            }
            T::store(simd, dx, &mut self.dx[start..end]);
        }
    }
}

/// What both backward operations share.
struct Bwd<'a> {
    dy: &'a View,
    dsum: Option<&'a View>,
    x: &'a View,
    weight: &'a View,
    rstd: &'a View,
    dx: &'a View,
    dweight: &'a View,
    accumulate: Accumulate,
}

pub(super) fn rms_norm_bwd(context: &mut Context<'_>, op: &ops::RmsNormBwd) -> Done {
    let ops::RmsNormBwd { dy, x, weight, rstd, dx, dweight, accumulate } = op;
    let accumulate = *accumulate;
    let bwd = Bwd { dy, dsum: None, x, weight, rstd, dx, dweight, accumulate };
    with_float!(x.dtype, T => backward::<T>(context, &bwd))
}

pub(super) fn add_rms_norm_bwd(context: &mut Context<'_>, op: &ops::AddRmsNormBwd) -> Done {
    let ops::AddRmsNormBwd { dy, dsum, sum, weight, rstd, dx, dweight, accumulate } = op;
    let (dsum, accumulate) = (dsum.as_ref(), *accumulate);
    let bwd = Bwd { dy, dsum, x: sum, weight, rstd, dx, dweight, accumulate };
    with_float!(sum.dtype, T => backward::<T>(context, &bwd))
}

fn backward<T: Element>(context: &mut Context<'_>, op: &Bwd<'_>) -> Done {
    let dy = context.operands.read::<T>(op.dy)?;
    let dsum = op.dsum.map(|view| context.operands.read::<T>(view)).transpose()?;
    let x = context.operands.read::<T>(op.x)?;
    let weight = context.operands.read::<T>(op.weight)?;
    let rstd = context.operands.read::<f32>(op.rstd)?;
    let dx = context.operands.write::<T>(op.dx)?;
    let dweight = context.operands.write::<f32>(op.dweight)?;
    let (rows, width) = (op.x.dim(0), op.x.dim(1));
    let [dy_s, x_s, dx_s] = [op.dy, op.x, op.dx].map(row_stride);
    let dsum_s = op.dsum.map_or(0, row_stride);
    // One task takes whole blocks of rows; each block has a partial weight gradient of its own.
    let blocks = rows.div_ceil(ROW_BLOCK).max(1);
    let blocks_per_task = blocks.div_ceil(crate::ffi::PARTS_MAX);
    let tally = context.tally();
    let [partial] = context.work.floats([blocks * width]);
    partial.fill(0.0);
    let partials = Parts::new(&mut *partial, blocks_per_task * width);
    let dxs = Parts::new(dx, blocks_per_task * ROW_BLOCK * dx_s);
    let isa = context.isa;
    // An absent gradient of the sum takes no place among the operands.
    let (of_x, of_dx) = if op.dsum.is_some() { (2, 5) } else { (1, 4) };
    context.pool.run(blocks.div_ceil(blocks_per_task), |task| {
        let mut sums = tally.task();
        let (partial, dx) = (partials.take(task), dxs.take(task));
        let first = task * blocks_per_task * ROW_BLOCK;
        for row in 0..(blocks_per_task * ROW_BLOCK).min(rows - first) {
            let at = first + row;
            let dy = &dy[at * dy_s..][..width];
            let dsum = dsum.map(|dsum| &dsum[at * dsum_s..][..width]);
            let x = &x[at * x_s..][..width];
            let dx = &mut dx[row * dx_s..][..width];
            let dweight = &mut partial[row / ROW_BLOCK * width..][..width];
            let rstd = rstd[at];
            dispatch(isa, NormRowBwd { dy, dsum, x, weight, rstd, dx: &mut *dx, dweight });
            match dsum {
                Some(dsum) => sums.row([(0, dy), (1, dsum), (of_x, x)], [(of_dx, &*dx)]),
                None => sums.row([(0, dy), (of_x, x)], [(of_dx, &*dx)]),
            }
        }
    });
    if op.accumulate == Accumulate::Overwrite {
        dweight[..width].fill(0.0);
    }
    // Blocks are summed first and added to the old contents once.
    let (total, rest) = partial.split_at_mut(width);
    for block in rest.chunks(width) {
        total.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
    }
    dweight.iter_mut().zip(total.iter()).for_each(|(sum, part)| *sum += part);
    context.note(tally);
    Ok(())
}
