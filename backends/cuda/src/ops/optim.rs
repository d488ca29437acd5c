//! Optimisers and the reductions around them.

use pontoon_ops::{
    self as ops, Accumulate, DType, Extents, Layout, MUON_COEFFICIENTS, MUON_EPS, MUON_RMS,
    MUON_STEPS, SUM_BLOCK, View,
};

use super::linear::{Matrix, Product};
use crate::core::{Core, Done, THREADS, blocks, dims, flat};
use crate::ffi::session::Args;
use crate::modules::{Source, Unit};

fn unit(dtype: DType) -> Unit {
    Unit::new(Source::Optim, dtype)
}

/// The storage type of a rounded copy that may be absent.
fn copied(compute: &Option<View>) -> DType {
    compute.as_ref().map_or(DType::F32, |view| view.dtype)
}

pub fn adamw(core: &mut Core, op: &ops::AdamW) -> Done {
    let count = op.weight.elements();
    let mut args = Args::new();
    for view in [&op.weight, &op.grad, &op.m, &op.v] {
        args = args.at(core.at(view)?);
    }
    let args = args.at(core.at_if(&op.compute)?).at(core.at(&op.hyper)?).int(count);
    core.run(&unit(copied(&op.compute)), c"adamw", flat(count), args)
}

fn squares(core: &mut Core, dtype: DType, (x, count): (usize, usize), y: usize) -> Done {
    let parts = count.div_ceil(SUM_BLOCK);
    let partial = core.room(DType::F32, parts)?;
    let args = Args::new().at(x).at(partial).int(count);
    core.run(&unit(dtype), c"square_blocks", blocks(parts, THREADS), args)?;
    let args = Args::new().at(partial).at(y).int(parts);
    core.run(&unit(dtype), c"tree_sum", blocks(1, 1024), args)
}

pub fn sum_squares(core: &mut Core, op: &ops::SumSquares) -> Done {
    let (x, y) = (core.at(&op.x)?, core.at(&op.y)?);
    squares(core, op.x.dtype, (x, op.x.elements()), y)
}

pub fn reduce_tree(core: &mut Core, op: &ops::ReduceTree) -> Done {
    let parts = op.x.dim(0);
    let count = op.y.elements();
    if parts == 0 || count == 0 {
        return Ok(());
    }
    let inner = op.x.slice(0, 0, 1).drop_axis(0);
    let args = Args::new().at(core.at(&op.x)?).int(parts).int(op.x.stride(0));
    let args = args.at(core.at(&op.y)?).structure(&dims(&[&inner, &op.y])?).int(count);
    let args = args.flag(op.accumulate == Accumulate::Add);
    let same = op.y.dtype == op.x.dtype;
    let kernel = if same { c"reduce_tree_same" } else { c"reduce_tree_f32" };
    core.run(&unit(op.x.dtype), kernel, flat(count), args)
}

/// Matrices that the steps of Muon work on.
struct Work {
    x: usize,
    gram: usize,
    square: usize,
    next: usize,
}

/// An f32 product of matrices without gaps.
fn product(core: &mut Core, layout: Layout, [a, b, c]: [usize; 3], extents: Extents) -> Done {
    let Extents { m, n, k } = extents;
    let matrix = |at: usize, stride: usize| Matrix { at, stride };
    let (a_stride, b_stride) = match layout {
        Layout::Nt => (k, k),
        Layout::Nn => (k, n),
        Layout::Tn => (m, n),
    };
    let product = Product {
        layout,
        dtype: DType::F32,
        a: matrix(a, a_stride),
        b: matrix(b, b_stride),
        c: matrix(c, n),
        out: DType::F32,
        bias: 0,
        extents,
        accumulate: Accumulate::Overwrite,
        groups: None,
        quant: None,
    };
    product.run(core)
}

fn combine(core: &mut Core, (y, a): (usize, f32), (x, b): (usize, f32), count: usize) -> Done {
    let args = Args::new().at(y).float(a).at(x).float(b).int(count);
    core.run(&unit(DType::F32), c"muon_combine", flat(count), args)
}

/// Newton-Schulz steps on a [rows, columns] matrix of norm one.
fn orthogonalise(core: &mut Core, work: &Work, (rows, columns): (usize, usize)) -> Done {
    let [a, b, c] = MUON_COEFFICIENTS;
    let Work { x, gram, square, next } = *work;
    for _ in 0..MUON_STEPS {
        product(core, Layout::Nt, [x, x, gram], Extents { m: rows, n: rows, k: columns })?;
        product(core, Layout::Nn, [gram, gram, square], Extents { m: rows, n: rows, k: rows })?;
        combine(core, (gram, b), (square, c), rows * rows)?;
        product(core, Layout::Nn, [gram, x, next], Extents { m: rows, n: columns, k: rows })?;
        combine(core, (x, a), (next, 1.0), rows * columns)?;
    }
    Ok(())
}

pub fn muon(core: &mut Core, op: &ops::Muon) -> Done {
    let dims = op.weight.dims();
    let (rows, columns) = (dims[dims.len() - 2], dims[dims.len() - 1]);
    let size = rows * columns;
    let stack = op.weight.elements().checked_div(size).unwrap_or(0);
    let hyper = core.at(&op.hyper)?;
    let [weight, grad, momentum] = [&op.weight, &op.grad, &op.momentum].map(|view| core.at(view));
    let (weight, grad, momentum) = (weight?, grad?, momentum?);
    let (compute, dtype) = (core.at_if(&op.compute)?, copied(&op.compute));
    let norm = core.room(DType::F32, 1)?;
    let work = Work {
        x: core.room(DType::F32, size)?,
        gram: core.room(DType::F32, rows * rows)?,
        square: core.room(DType::F32, rows * rows)?,
        next: core.room(DType::F32, size)?,
    };
    let factor = MUON_RMS * (rows.max(columns) as f32).sqrt();
    for matrix in 0..stack {
        let at = 4 * matrix * size;
        let args = Args::new().at(grad + at).at(momentum + at).at(work.x).at(hyper).int(size);
        core.run(&unit(DType::F32), c"muon_momentum", flat(size), args)?;
        squares(core, DType::F32, (work.x, size), norm)?;
        let args = Args::new().at(work.x).at(norm).float(MUON_EPS).int(size);
        core.run(&unit(DType::F32), c"muon_unit", flat(size), args)?;
        orthogonalise(core, &work, (rows, columns))?;
        let copy = if compute == 0 { 0 } else { compute + dtype.bytes(matrix * size) };
        let args = Args::new().at(weight + at).at(work.x).at(copy).at(hyper);
        let args = args.float(factor).int(size);
        core.run(&unit(dtype), c"muon_apply", flat(size), args)?;
    }
    Ok(())
}
