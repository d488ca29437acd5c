//! Optimisers and reductions in fixed order.

use std::sync::atomic::{AtomicU64, Ordering};

use pontoon_ops::digest::{BLOCK, Digest, of_digests};
use pontoon_ops::sums::Sums;
use pontoon_ops::{
    self as ops, Accumulate, MUON_COEFFICIENTS, MUON_EPS, MUON_RMS, MUON_STEPS, SUM_BLOCK, View,
    hyper,
};

use super::{Context, Done, TASK_ELEMENTS, with_float};
use crate::ffi::{PARTS_MAX, Parts};
use crate::gemm::{Data, DataMut, GemmArgs, Layout, Matrix, MatrixMut, Store, gemm};
use crate::simd::micro::fetch;
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};
use crate::words::{Digesting, RowWords};

/// One task's share of an AdamW step.
struct Adam<'a, C> {
    weight: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    compute: Option<&'a mut [C]>,
    hyper: &'a [f32],
}

impl<C: Element> Kernel for Adam<'_, C> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Adam { weight, grad, m, v, mut compute, hyper } = self;
        let at = |index: usize| simd.splat(hyper[index]);
        let rest = |index: usize| simd.splat(1.0 - hyper[index]);
        let (beta1, beta2) = (at(hyper::BETA1), at(hyper::BETA2));
        let (rest1, rest2) = (rest(hyper::BETA1), rest(hyper::BETA2));
        let (bias1, bias2) = (at(hyper::BIAS1), at(hyper::BIAS2));
        let (lr, eps, clip) = (at(hyper::LR), at(hyper::EPS), at(hyper::GRAD_SCALE));
        let keep = simd.splat(1.0 - hyper[hyper::LR] * hyper[hyper::WEIGHT_DECAY]);
        for start in (0..weight.len()).step_by(S::LANES) {
            let end = (start + S::LANES).min(weight.len());
            let g = simd.mul(clip, simd.load(&grad[start..end]));
            let m = &mut m[start..end];
            let new_m = simd.fma(beta1, simd.load(m), simd.mul(rest1, g));
            simd.store(new_m, m);
            let v = &mut v[start..end];
            let new_v = simd.fma(beta2, simd.load(v), simd.mul(rest2, simd.mul(g, g)));
            simd.store(new_v, v);
            let root = simd.add(simd.sqrt(simd.div(new_v, bias2)), eps);
            let update = simd.div(simd.div(new_m, bias1), root);
            let weight = &mut weight[start..end];
            let kept = simd.mul(simd.load(weight), keep);
            let new = simd.sub(kept, simd.mul(lr, update));
            simd.store(new, weight);
            if let Some(compute) = &mut compute {
                C::store(simd, new, &mut compute[start..end]);
            }
        }
    }
}

pub(super) fn adamw(context: &mut Context<'_>, op: &ops::AdamW) -> Done {
    match op.compute {
        None => adamw_as::<f32>(context, op),
        Some(compute) => with_float!(compute.dtype, C => adamw_as::<C>(context, op)),
    }
}

fn adamw_as<C: Element>(context: &mut Context<'_>, op: &ops::AdamW) -> Done {
    let grad = context.operands.read::<f32>(&op.grad)?;
    let hyper = context.operands.read::<f32>(&op.hyper)?;
    let weight = context.operands.write::<f32>(&op.weight)?;
    let m = context.operands.write::<f32>(&op.m)?;
    let v = context.operands.write::<f32>(&op.v)?;
    let compute = op.compute.map(|view| context.operands.write::<C>(&view)).transpose()?;
    let elements = weight.len();
    let digests = (context.checks.ask.digested != 0).then(|| StateDigests::new::<C>(elements));
    // Whoever digests has whole blocks.
    let (least, step) = match digests {
        Some(_) => (0, BLOCK / size_of::<C>()),
        None => (TASK_ELEMENTS, 64),
    };
    let len = least.max(elements.div_ceil(PARTS_MAX)).next_multiple_of(step).max(step);
    let weights = Parts::new(weight, len);
    let (ms, vs) = (Parts::new(m, len), Parts::new(v, len));
    let computes = compute.map(|compute| Parts::new(compute, len));
    let (isa, tally) = (context.isa, context.tally());
    context.pool.run(weights.count(), |task| {
        let weight = weights.take(task);
        let grad = &grad[task * len..][..weight.len()];
        let (m, v) = (ms.take(task), vs.take(task));
        let compute = computes.as_ref().map(|computes| computes.take(task));
        let update = Adam { weight, grad, m, v, compute, hyper };
        match &digests {
            Some(digests) => update.digested(isa, task * len, digests),
            None => dispatch(isa, update),
        }
        tally.task().read_rows(1, RowWords::one(grad));
    });
    context.note(tally);
    if let Some(digests) = digests {
        digests.tell(&mut context.checks.sums, op.compute.is_some());
    }
    Ok(())
}

/// Elements that are digested, updated and digested again while they are in the nearest cache.
const PIECE: usize = 1024;

/// Digests of the state's blocks, formed on the way so that memory is read no second time: of
/// weights and moments as read, then of the same and of what is computed with as written.
struct StateDigests([Vec<AtomicU64>; 7]);

impl StateDigests {
    fn new<C>(elements: usize) -> StateDigests {
        StateDigests(std::array::from_fn(|of| {
            let blocks = (elements * bytes_of::<C>(of)).div_ceil(BLOCK);
            (0..blocks).map(|_| AtomicU64::new(0)).collect()
        }))
    }

    /// Puts the whole digests in their places: operands 0, 2 and 3 as read; the same and operand 4,
    /// if it is there, as written.
    fn tell(self, sums: &mut Sums, computes: bool) {
        let of_blocks = |blocks: Vec<AtomicU64>| {
            of_digests(&blocks.into_iter().map(AtomicU64::into_inner).collect::<Vec<u64>>())
        };
        let [weight, m, v, new_weight, new_m, new_v, compute] = self.0.map(of_blocks);
        for (place, read, written) in [(0, weight, new_weight), (2, m, new_m), (3, v, new_v)] {
            (sums.digest_read[place], sums.digest_written[place]) = (read, written);
        }
        if computes {
            sums.digest_written[4] = compute;
        }
    }
}

/// The place of what is computed with among the digests.
const COMPUTE: usize = 6;

/// Bytes of an element that is digested.
fn bytes_of<C>(of: usize) -> usize {
    if of == COMPUTE { size_of::<C>() } else { size_of::<f32>() }
}

impl<C: Element> Adam<'_, C> {
    /// The update and the digests of the blocks that begin at element `first`.
    fn digested(self, isa: Isa, first: usize, to: &StateDigests) {
        let Adam { weight, grad, m, v, mut compute, hyper } = self;
        let mut digests: [Digest; 7] = Default::default();
        let len = weight.len();
        for start in (0..len).step_by(PIECE) {
            let range = start..len.min(start + PIECE);
            // Pieces are too short for the hardware to foresee the next.
            let next = range.end..len.min(range.end + PIECE);
            for of in [&*weight, &*m, &*v, grad] {
                fetch(bytemuck::cast_slice(&of[next.clone()]));
            }
            let (before, after) = digests.split_at_mut(3);
            let state = [&weight[range.clone()], &m[range.clone()], &v[range.clone()]];
            digest_all(isa, before, state.map(bytemuck::cast_slice));
            let piece = Adam {
                weight: &mut weight[range.clone()],
                grad: &grad[range.clone()],
                m: &mut m[range.clone()],
                v: &mut v[range.clone()],
                compute: compute.as_mut().map(|compute| &mut compute[range.clone()]),
                hyper,
            };
            dispatch(isa, piece);
            let state = [&weight[range.clone()], &m[range.clone()], &v[range.clone()]];
            digest_all(isa, after, state.map(bytemuck::cast_slice));
            if let Some(compute) = &compute {
                digest_all(isa, &mut after[3..], [bytemuck::cast_slice(&compute[range.clone()])]);
            }
            for (of, digest) in digests.iter_mut().enumerate() {
                let end = (first + range.end) * bytes_of::<C>(of);
                if end.is_multiple_of(BLOCK) || range.end == len {
                    let whole = std::mem::take(digest).finish();
                    to.0[of][(end - 1) / BLOCK].store(whole, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Takes a piece of each operand into its digest.
fn digest_all<const COUNT: usize>(isa: Isa, digests: &mut [Digest], pieces: [&[u8]; COUNT]) {
    for (digest, bytes) in digests.iter_mut().zip(pieces) {
        dispatch(isa, Digesting { digest, bytes });
    }
}

pub(super) fn muon(context: &mut Context<'_>, op: &ops::Muon) -> Done {
    match op.compute {
        None => muon_as::<f32>(context, op),
        Some(compute) => with_float!(compute.dtype, C => muon_as::<C>(context, op)),
    }
}

fn muon_as<C: Element>(context: &mut Context<'_>, op: &ops::Muon) -> Done {
    let grad = context.operands.read::<f32>(&op.grad)?;
    let hyper = context.operands.read::<f32>(&op.hyper)?;
    let weight = context.operands.write::<f32>(&op.weight)?;
    let momentum = context.operands.write::<f32>(&op.momentum)?;
    let mut compute = op.compute.map(|view| context.operands.write::<C>(&view)).transpose()?;
    let rank = op.weight.shape.rank();
    let (rows, columns) = (op.weight.dim(rank - 2), op.weight.dim(rank - 1));
    let size = rows * columns;
    let side = rows.min(columns);
    let (beta, clip) = (hyper[hyper::BETA1], hyper[hyper::GRAD_SCALE]);
    let keep = 1.0 - hyper[hyper::LR] * hyper[hyper::WEIGHT_DECAY];
    let rate = hyper[hyper::LR] * MUON_RMS * (rows.max(columns) as f32).sqrt();
    let mut work = std::mem::take(context.work);
    let [x, next, gram, poly] = work.floats([size, size, side * side, side * side]);
    for start in (0..weight.len()).step_by(size.max(1)) {
        let momentum = &mut momentum[start..start + size];
        for ((x, momentum), grad) in x.iter_mut().zip(momentum).zip(&grad[start..]) {
            let g = clip * grad;
            *momentum = beta * *momentum + (1.0 - beta) * g;
            *x = (1.0 - beta) * g + beta * *momentum;
        }
        let norm = sum_in_blocks::<f32>(context.isa, x).sqrt();
        x.iter_mut().for_each(|value| *value /= norm + MUON_EPS);
        for _ in 0..MUON_STEPS {
            newton_schulz(
                context,
                (&mut *x, &mut *next),
                (&mut *gram, &mut *poly),
                (rows, columns),
            );
        }
        let weight = &mut weight[start..start + size];
        for (weight, update) in weight.iter_mut().zip(&*x) {
            *weight = *weight * keep - rate * update;
        }
        if let Some(compute) = &mut compute {
            let rounded = compute[start..start + size].iter_mut().zip(&*weight);
            rounded.for_each(|(to, from)| *to = C::from_f32(*from));
        }
    }
    *context.work = work;
    Ok(())
}

/// One step `x = a x + (b G + c G^2) x` with the smaller Gram matrix `G` (`x x^T` or `x^T x`).
fn newton_schulz(
    context: &mut Context<'_>,
    (x, next): (&mut [f32], &mut [f32]),
    (gram, poly): (&mut [f32], &mut [f32]),
    (rows, columns): (usize, usize),
) {
    let [a, b, c] = MUON_COEFFICIENTS;
    let side = rows.min(columns);
    let wide = rows <= columns;
    let gram_layout = if wide { (Layout::Nt, columns) } else { (Layout::Tn, rows) };
    product(context, gram_layout.0, (side, side, gram_layout.1), (x, columns, x, columns), gram);
    product(context, Layout::Nn, (side, side, side), (gram, side, gram, side), poly);
    for (poly, gram) in poly.iter_mut().zip(&*gram) {
        *poly = b * gram + c * *poly;
    }
    let operands = if wide { (&*poly, side, &*x, columns) } else { (&*x, columns, &*poly, side) };
    let k = side;
    product(context, Layout::Nn, (rows, columns, k), operands, next);
    for (x, next) in x.iter_mut().zip(&*next) {
        *x = a * *x + next;
    }
}

fn product(
    context: &mut Context<'_>,
    layout: Layout,
    (m, n, k): (usize, usize, usize),
    (a, a_stride, b, b_stride): (&[f32], usize, &[f32], usize),
    c: &mut [f32],
) {
    let args = GemmArgs {
        layout,
        m,
        n,
        k,
        a: Matrix { data: Data::F32(a), row_stride: a_stride },
        b: Matrix { data: Data::F32(b), row_stride: b_stride },
        bias: None,
        c: MatrixMut { data: DataMut::F32(c), row_stride: n },
        store: Store::Overwrite,
    };
    gemm(context.pool, context.isa, context.gemm_scratch, args);
}

/// The sum of squares of one block, in vector lanes.
struct Squares<'a, T> {
    x: &'a [T],
}

impl<T: Element> Kernel for Squares<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sum = simd.zero();
        for x in self.x.chunks(S::LANES) {
            let x = T::load(simd, x);
            sum = simd.fma(x, x, sum);
        }
        simd.reduce_sum(sum)
    }
}

fn sum_in_blocks<T: Element>(isa: crate::simd::Isa, x: &[T]) -> f32 {
    let blocks = x.len().div_ceil(SUM_BLOCK);
    let block = |index: usize| {
        let start = index * SUM_BLOCK;
        dispatch(isa, Squares { x: &x[start..(start + SUM_BLOCK).min(x.len())] })
    };
    if blocks == 0 { 0.0 } else { tree(&block, 0, blocks) }
}

/// Sums `part(first..first + count)` along the tree of `ReduceTree`.
fn tree(part: &impl Fn(usize) -> f32, first: usize, count: usize) -> f32 {
    if count == 1 {
        return part(first);
    }
    let left = count.next_power_of_two() / 2;
    tree(part, first, left) + tree(part, first + left, count - left)
}

pub(super) fn sum_squares(context: &mut Context<'_>, op: &ops::SumSquares) -> Done {
    with_float!(op.x.dtype, T => sum_squares_as::<T>(context, op))
}

fn sum_squares_as<T: Element>(context: &mut Context<'_>, op: &ops::SumSquares) -> Done {
    let x = context.operands.read::<T>(&op.x)?;
    let y = context.operands.write::<f32>(&op.y)?;
    let blocks = x.len().div_ceil(SUM_BLOCK);
    if blocks == 0 {
        y[0] = 0.0;
        return Ok(());
    }
    let [sums] = context.work.floats([blocks]);
    let per_task = 4.max(blocks.div_ceil(PARTS_MAX));
    let parts = Parts::new(&mut *sums, per_task);
    let isa = context.isa;
    context.pool.run(parts.count(), |task| {
        for (index, sum) in parts.take(task).iter_mut().enumerate() {
            let start = (task * per_task + index) * SUM_BLOCK;
            *sum = dispatch(isa, Squares { x: &x[start..(start + SUM_BLOCK).min(x.len())] });
        }
    });
    y[0] = tree(&|index| sums[index], 0, blocks);
    Ok(())
}

pub(super) fn reduce_tree(context: &mut Context<'_>, op: &ops::ReduceTree) -> Done {
    with_float!(op.x.dtype, A => {
        if op.y.dtype == op.x.dtype {
            reduce_as::<A, A>(context, op)
        } else {
            reduce_as::<A, f32>(context, op)
        }
    })
}

fn reduce_as<A: Element, B: Element>(context: &mut Context<'_>, op: &ops::ReduceTree) -> Done {
    let x = context.operands.read::<A>(&op.x)?;
    let y = context.operands.write::<B>(&op.y)?;
    let parts = op.x.dim(0);
    let add = op.accumulate == Accumulate::Add;
    each_element(&op.x, &op.y, |from, to| {
        let part = |index: usize| x[from + index * op.x.stride(0)].to_f32();
        let sum = if parts == 0 { 0.0 } else { tree(&part, 0, parts) };
        let old = if add { y[to].to_f32() } else { 0.0 };
        y[to] = B::from_f32(old + sum);
    });
    Ok(())
}

/// Calls `each(offset in x's first part, offset in y)` for every element of y.
fn each_element(x: &View, y: &View, mut each: impl FnMut(usize, usize)) {
    let dims = y.dims();
    let mut index = vec![0; dims.len()];
    for _ in 0..y.elements() {
        let to = index.iter().zip(y.strides()).map(|(i, s)| i * s).sum();
        let from = index.iter().zip(&x.strides()[1..]).map(|(i, s)| i * s).sum();
        each(from, to);
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            if index[axis] < dims[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::tree;

    #[test]
    fn the_tree_splits_at_the_largest_power_of_two_below_the_count() {
        // With these values the order of addition shows in the result.
        let values = [1.0e8_f32, 1.0, -1.0e8, 1.0, 3.0];
        let left = (values[0] + values[1]) + (values[2] + values[3]);
        assert_eq!(tree(&|i| values[i], 0, 5), left + values[4]);
        assert_eq!(tree(&|i| values[i], 0, 4), left);
        assert_eq!(tree(&|i| values[i], 0, 3), (values[0] + values[1]) + values[2]);
    }
}
