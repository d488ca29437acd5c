//! Losses fused with the output head: logits exist for a chunk of rows at a time.
//!
//! The head's products run through `gemm`, so a row's logits have the same bits here, in sampling
//! and in any batch.

use std::sync::atomic::{AtomicU32, Ordering};

use pontoon_ops::{self as ops, Accumulate, DType, DeviceError, IGNORED, OpName, View};

use super::linear::{data, quant_bytes};
use super::watched::changed;
use super::{Context, Done, row_stride, with_float};
use crate::ffi::Parts;
use crate::gemm::{
    Data, DataMut, GemmArgs, Integers, Layout, Matrix, MatrixMut, ProductSums, QuantArgs, Store,
    quant_gemm,
};
use crate::memory::Operands;
use crate::simd::{Element, Isa, Kernel, Simd, dispatch};
use crate::words::RowWords;

/// Logits held at a time: 16 MB, so that a chunk's second pass finds part of it in cache.
const CHUNK_LOGITS: usize = 4 << 20;
/// Most rows of a chunk: more would not make the products faster.
const CHUNK_ROWS_MAX: usize = 512;

/// Elements from row to row of logits and their gradients. A vocabulary is often a power of two,
/// and rows a multiple of a page apart would all compete for the same few places in the caches.
/// What is added is one cache line of the narrowest type.
fn padded_row(vocabulary: usize) -> usize {
    vocabulary + 32
}

/// Rows per chunk: a function of the vocabulary alone, because it fixes the order of sums.
fn chunk_rows(vocabulary: usize) -> usize {
    (CHUNK_LOGITS / vocabulary.max(1)).clamp(16, CHUNK_ROWS_MAX)
}

/// What one row's logits come to.
#[derive(Clone, Copy, Default)]
struct RowSums {
    /// Logarithm of the sum of exponentials, of logits divided by the temperature.
    lse: f32,
    entropy: f32,
}

/// The sums of one row, in vector lanes, added by a fixed tree.
struct SumRow<'a> {
    logits: &'a [f32],
    /// One over the temperature.
    sharpness: f32,
}

impl Kernel for SumRow<'_> {
    type Output = RowSums;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> RowSums {
        let sharpness = simd.splat(self.sharpness);
        let mut best = simd.splat(f32::NEG_INFINITY);
        let whole = self.logits.len() / S::LANES * S::LANES;
        let (body, tail) = self.logits.split_at(whole);
        for logits in body.chunks_exact(S::LANES) {
            best = simd.max(simd.load(logits), best);
        }
        let peak = tail.iter().fold(simd.reduce_max(best), |peak, &l| peak.max(l));
        let shift = simd.splat(peak);
        let (mut total, mut weighted) = (simd.zero(), simd.zero());
        for logits in body.chunks_exact(S::LANES) {
            let apart = simd.mul(simd.sub(simd.load(logits), shift), sharpness);
            let e = simd.exp(apart);
            total = simd.add(total, e);
            weighted = simd.fma(e, apart, weighted);
        }
        let (mut total, mut weighted) = (simd.reduce_sum(total), simd.reduce_sum(weighted));
        for &logit in tail {
            let apart = (logit - peak) * self.sharpness;
            let e = apart.exp();
            total += e;
            // e * apart is 0 * -inf where a logit is -inf; it contributes nothing.
            weighted += if e == 0.0 { 0.0 } else { e * apart };
        }
        let log_total = total.ln();
        RowSums { lse: peak * self.sharpness + log_total, entropy: log_total - weighted / total }
    }
}

/// `dlogits = factor * (softmax(logits) - onehot(target))`, rounded to the storage type.
struct GradRow<'a, T> {
    logits: &'a [f32],
    sharpness: f32,
    lse: f32,
    factor: f32,
    target: usize,
    dlogits: &'a mut [T],
}

impl<T: Element> Kernel for GradRow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (sharpness, lse) = (simd.splat(self.sharpness), simd.splat(self.lse));
        let factor = simd.splat(self.factor);
        let rows = self.logits.chunks(S::LANES).zip(self.dlogits.chunks_mut(S::LANES));
        for (logits, dlogits) in rows {
            let log_p = simd.sub(simd.mul(simd.load(logits), sharpness), lse);
            T::store(simd, simd.mul(factor, simd.exp(log_p)), dlogits);
        }
        let log_p = self.logits[self.target] * self.sharpness - self.lse;
        self.dlogits[self.target] = T::from_f32(self.factor * (log_p.exp() - 1.0));
    }
}

/// What all four operations read.
struct Head<'a> {
    op: OpName,
    x: &'a View,
    head: &'a View,
    /// The scales of a quantised head, and how many columns share one.
    scales: Option<(&'a View, usize)>,
    targets: &'a View,
    temperature: f32,
}

/// The head's elements.
#[derive(Clone, Copy)]
enum HeadData<'a> {
    Floats(Data<'a>),
    Integers { integers: Integers, bytes: &'a [u8], scales: &'a [f32], block: usize },
}

impl<'a> HeadData<'a> {
    fn of(operands: &Operands<'a>, head: &Head<'_>) -> Result<HeadData<'a>, DeviceError> {
        let Some((scales, block)) = head.scales else {
            return Ok(HeadData::Floats(data(operands, head.head)?));
        };
        let integers = match head.head.dtype {
            DType::I4 => Integers::HalfBytes,
            _ => Integers::Bytes,
        };
        let bytes = quant_bytes(operands, head.head)?;
        Ok(HeadData::Integers { integers, bytes, scales: operands.read(scales)?, block })
    }
}

/// Where gradients go.
struct Gradients<'a> {
    /// Gradient of each row's `-log p`, up to `sign`.
    upstream: &'a View,
    sign: f32,
    dx: &'a View,
    dhead: &'a View,
    accumulate: Accumulate,
    /// The places of both among the operation's operands.
    places: [usize; 2],
}

fn logits_of(
    context: &mut Context<'_>,
    head: &Head<'_>,
    (x, weight): (Data<'_>, HeadData<'_>),
    (first, rows): (usize, usize),
    logits: &mut [f32],
) -> Result<u32, DeviceError> {
    let (vocabulary, width) = (head.head.dim(0), head.head.dim(1));
    let x = Matrix { data: x.from(first * row_stride(head.x)), row_stride: row_stride(head.x) };
    let c = MatrixMut { data: DataMut::F32(logits), row_stride: padded_row(vocabulary) };
    let (m, n, k, bias) = (rows, vocabulary, width, None);
    let panels = context.operands.in_panels(head.head);
    match weight {
        HeadData::Floats(data) => {
            let b = Matrix { data, row_stride: width };
            let layout = if panels { Layout::Panels } else { Layout::Nt };
            let store = Store::Overwrite;
            let args = GemmArgs { layout, m, n, k, a: x, b, bias, c, store };
            Ok(context.product((head.op, "the logits"), args, [false; 2])?.stored)
        }
        HeadData::Integers { integers, bytes: weight, scales, block } => {
            let args = QuantArgs { m, n, k, x, integers, weight, scales, block, panels, bias, c };
            quant_gemm(context.pool, context.isa, context.gemm_scratch, args);
            // Only gradients compare the sum, and quantised heads have none.
            Ok(0)
        }
    }
}

/// The row's target, or none if it is ignored or does not exist.
fn target_of(target: i32, vocabulary: usize) -> Option<usize> {
    usize::try_from(target).ok().filter(|&target| target < vocabulary)
}

/// `log p` of the target: 0 where ignored, NaN where there is no such token.
fn log_prob(logits: &[f32], target: i32, sharpness: f32, lse: f32) -> f32 {
    match target_of(target, logits.len()) {
        Some(target) => logits[target] * sharpness - lse,
        None if target == IGNORED => 0.0,
        None => f32::NAN,
    }
}

/// What [`forward`] gives for a row of which the logits are there.
pub(super) fn row_log_prob(isa: Isa, logits: &[f32], target: i32) -> f32 {
    let sums = dispatch(isa, SumRow { logits, sharpness: 1.0 });
    log_prob(logits, target, 1.0, sums.lse)
}

/// Computes logits chunk by chunk and hands each row's `(log p, sums)` to `each`.
fn forward(
    context: &mut Context<'_>,
    head: &Head<'_>,
    mut each: impl FnMut(usize, f32, RowSums),
) -> Done {
    let x = data(&context.operands, head.x)?;
    let weight = HeadData::of(&context.operands, head)?;
    let targets = context.operands.read::<i32>(head.targets)?;
    let (rows, vocabulary) = (head.x.dim(0), head.head.dim(0));
    let sharpness = 1.0 / head.temperature;
    let chunk = chunk_rows(vocabulary).min(rows.max(1));
    let stride = padded_row(vocabulary);
    let mut work = std::mem::take(context.work);
    let [logits, results] = work.floats([chunk * stride, 3 * chunk]);
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let logits = &mut logits[..count * stride];
        logits_of(context, head, (x, weight), (first, count), logits)?;
        let parts = Parts::new(&mut results[..3 * count], 3);
        let isa = context.isa;
        context.pool.run(count, |row| {
            let logits = &logits[row * stride..][..vocabulary];
            let sums = dispatch(isa, SumRow { logits, sharpness });
            let log_p = log_prob(logits, targets[first + row], sharpness, sums.lse);
            parts.take(row).copy_from_slice(&[log_p, sums.lse, sums.entropy]);
        });
        for (row, result) in results[..3 * count].chunks(3).enumerate() {
            each(first + row, result[0], RowSums { lse: result[1], entropy: result[2] });
        }
    }
    *context.work = work;
    Ok(())
}

pub(super) fn cross_entropy(context: &mut Context<'_>, op: &ops::CrossEntropy) -> Done {
    let loss = context.operands.write::<f32>(&op.loss)?;
    let lse = context.operands.write::<f32>(&op.lse)?;
    let head = Head {
        op: OpName::CrossEntropy,
        x: &op.x,
        head: &op.head,
        scales: None,
        targets: &op.targets,
        temperature: 1.0,
    };
    forward(context, &head, |row, log_p, sums| {
        loss[row] = -log_p;
        lse[row] = sums.lse;
    })
}

pub(super) fn token_log_prob(context: &mut Context<'_>, op: &ops::TokenLogProb) -> Done {
    let logprob = context.operands.write::<f32>(&op.logprob)?;
    let entropy = context.operands.write::<f32>(&op.entropy)?;
    let (x, temperature) = (&op.x, op.temperature);
    let (op_name, scales) = (OpName::TokenLogProb, op.scales.as_ref());
    let scales = scales.map(|scales| (scales, op.block_k));
    let head = Head { op: op_name, x, head: &op.head, scales, targets: &op.targets, temperature };
    forward(context, &head, |row, log_p, sums| {
        logprob[row] = log_p;
        entropy[row] = sums.entropy;
    })
}

pub(super) fn cross_entropy_bwd(context: &mut Context<'_>, op: &ops::CrossEntropyBwd) -> Done {
    let loss = context.operands.write::<f32>(&op.loss)?;
    let lse = context.operands.write::<f32>(&op.lse)?;
    let head = Head {
        op: OpName::CrossEntropyBwd,
        x: &op.x,
        head: &op.head,
        scales: None,
        targets: &op.targets,
        temperature: 1.0,
    };
    let gradients = Gradients {
        upstream: &op.dloss,
        sign: 1.0,
        dx: &op.dx,
        dhead: &op.dhead,
        accumulate: op.accumulate,
        places: [6, 7],
    };
    with_float!(op.x.dtype, T => backward::<T>(context, &head, &gradients, |row, log_p, sum| {
        loss[row] = -log_p;
        lse[row] = sum;
    }))
}

pub(super) fn token_log_prob_bwd(context: &mut Context<'_>, op: &ops::TokenLogProbBwd) -> Done {
    let (x, temperature) = (&op.x, op.temperature);
    let head = Head {
        op: OpName::TokenLogProbBwd,
        x,
        head: &op.head,
        scales: None,
        targets: &op.targets,
        temperature,
    };
    let gradients = Gradients {
        upstream: &op.dlogprob,
        sign: -1.0,
        dx: &op.dx,
        dhead: &op.dhead,
        accumulate: op.accumulate,
        places: [4, 5],
    };
    with_float!(op.x.dtype, T => backward::<T>(context, &head, &gradients, |_, _, _| {}))
}

/// A storage type's slices as the operands of a product.
trait Storage: Element {
    fn data(slice: &[Self]) -> Data<'_>;
    fn data_mut(slice: &mut [Self]) -> DataMut<'_>;
}

impl Storage for f32 {
    fn data(slice: &[Self]) -> Data<'_> {
        Data::F32(slice)
    }
    fn data_mut(slice: &mut [Self]) -> DataMut<'_> {
        DataMut::F32(slice)
    }
}

impl Storage for half::bf16 {
    fn data(slice: &[Self]) -> Data<'_> {
        Data::Bf16(slice)
    }
    fn data_mut(slice: &mut [Self]) -> DataMut<'_> {
        DataMut::Bf16(slice)
    }
}

impl Storage for half::f16 {
    fn data(slice: &[Self]) -> Data<'_> {
        Data::F16(slice)
    }
    fn data_mut(slice: &mut [Self]) -> DataMut<'_> {
        DataMut::F16(slice)
    }
}

fn backward<T: Storage>(
    context: &mut Context<'_>,
    head: &Head<'_>,
    gradients: &Gradients<'_>,
    mut each: impl FnMut(usize, f32, f32),
) -> Done {
    let x = data(&context.operands, head.x)?;
    let weight = data(&context.operands, head.head)?;
    let targets = context.operands.read::<i32>(head.targets)?;
    let upstream = context.operands.read::<f32>(gradients.upstream)?;
    let dx = context.operands.write::<T>(gradients.dx)?;
    let dhead = context.operands.write::<f32>(gradients.dhead)?;
    let (rows, vocabulary) = (head.x.dim(0), head.head.dim(0));
    if gradients.accumulate == Accumulate::Overwrite && rows == 0 {
        dhead.fill(0.0);
    }
    let chunk = chunk_rows(vocabulary).min(rows.max(1));
    let mut work = std::mem::take(context.work);
    let stride = padded_row(vocabulary);
    let gradient_words = (chunk * stride * size_of::<T>()).div_ceil(size_of::<u32>());
    let mut tally = Tally { op: head.op, dx: 0, dhead_before: 0, dhead: 0 };
    let [logits, results, dlogits] = work.words([chunk * stride, 2 * chunk, gradient_words]);
    let logits: &mut [f32] = bytemuck::cast_slice_mut(logits);
    let results: &mut [f32] = bytemuck::cast_slice_mut(results);
    let dlogits: &mut [T] = bytemuck::cast_slice_mut(dlogits);
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let logits = &mut logits[..count * stride];
        let floats = HeadData::Floats(weight);
        let stored = logits_of(context, head, (x, floats), (first, count), logits)?;
        let chunk_rows = Chunk {
            logits,
            vocabulary,
            targets: &targets[first..][..count],
            upstream: &upstream[first..][..count],
            sharpness: 1.0 / head.temperature,
            sign: gradients.sign,
        };
        let dlogits = &mut dlogits[..count * stride];
        let results = &mut results[..2 * count];
        let passing = chunk_rows.differentiate(context, dlogits, results);
        if context.checks.on && passing.logits != stored {
            return Err(changed(head.op, "a logit"));
        }
        for (row, result) in results.chunks(2).enumerate() {
            each(first + row, result[0], result[1]);
        }
        let overwrite = first == 0 && gradients.accumulate == Accumulate::Overwrite;
        let store = if overwrite { Store::Overwrite } else { Store::Accumulate };
        let to = &mut dx[first * row_stride(gradients.dx)..];
        let outputs = (T::data_mut(to), row_stride(gradients.dx), &mut *dhead, store);
        let rows_of_x = x.from(first * row_stride(head.x));
        let found = products(context, head, (T::data(dlogits), rows_of_x, weight), count, outputs)?;
        if context.checks.on && found[1].a != passing.dlogits {
            return Err(changed(head.op, "a logit's gradient"));
        }
        tally.add(first == 0, found)?;
    }
    *context.work = work;
    tally.note(context, gradients);
    Ok(())
}

/// The word sums of the operation's operands over its chunks.
#[derive(Clone, Copy)]
struct Tally {
    op: OpName,
    dx: u32,
    dhead_before: u32,
    dhead: u32,
}

impl Tally {
    fn add(&mut self, is_first: bool, [input, parameter]: [ProductSums; 2]) -> Done {
        self.dx = self.dx.wrapping_add(input.stored);
        if is_first {
            self.dhead_before = parameter.before;
        } else if parameter.before != self.dhead {
            return Err(changed(self.op, "`dhead`"));
        }
        self.dhead = parameter.stored;
        Ok(())
    }

    fn note(&self, context: &mut Context<'_>, gradients: &Gradients<'_>) {
        let [dx, dhead] = gradients.places;
        context.checks.read(dhead, self.dhead_before);
        context.checks.written(dx, self.dx);
        context.checks.written(dhead, self.dhead);
    }
}

/// `dx = dlogits head` and `dhead (+)= dlogits^T x` for one chunk.
fn products(
    context: &mut Context<'_>,
    head: &Head<'_>,
    (dlogits, x, weight): (Data<'_>, Data<'_>, Data<'_>),
    rows: usize,
    (dx, dx_stride, dhead, store): (DataMut<'_>, usize, &mut [f32], Store),
) -> Result<[ProductSums; 2], DeviceError> {
    let (vocabulary, width) = (head.head.dim(0), head.head.dim(1));
    let dlogits = Matrix { data: dlogits, row_stride: padded_row(vocabulary) };
    let input = GemmArgs {
        layout: Layout::Nn,
        m: rows,
        n: width,
        k: vocabulary,
        a: dlogits,
        b: Matrix { data: weight, row_stride: width },
        bias: None,
        c: MatrixMut { data: dx, row_stride: dx_stride },
        store: Store::Overwrite,
    };
    let of_input = context.product((head.op, "dx"), input, [false; 2])?;
    let parameter = GemmArgs {
        layout: Layout::Tn,
        m: vocabulary,
        n: width,
        k: rows,
        a: dlogits,
        b: Matrix { data: x, row_stride: row_stride(head.x) },
        bias: None,
        c: MatrixMut { data: DataMut::F32(dhead), row_stride: width },
        store,
    };
    Ok([of_input, context.product((head.op, "dhead"), parameter, [true, false])?])
}

/// A chunk of rows whose logits stand in memory.
struct Chunk<'a> {
    /// Rows [`padded_row`] apart.
    logits: &'a [f32],
    vocabulary: usize,
    targets: &'a [i32],
    upstream: &'a [f32],
    sharpness: f32,
    sign: f32,
}

impl Chunk<'_> {
    /// Writes each row's gradient, and its `(log p, lse)`.
    fn differentiate<T: Element>(
        &self,
        context: &Context<'_>,
        dlogits: &mut [T],
        results: &mut [f32],
    ) -> Passing {
        let sums = [AtomicU32::new(0), AtomicU32::new(0)];
        let (on, isa) = (context.checks.on, context.isa);
        let sum = |place: usize, bytes: &[u8]| {
            if on {
                let words = dispatch(isa, RowWords::one(bytes));
                sums[place].fetch_add(words, Ordering::Relaxed);
            }
        };
        let (vocabulary, stride) = (self.vocabulary, padded_row(self.vocabulary));
        let gradients = Parts::new(dlogits, stride);
        let results = Parts::new(results, 2);
        context.pool.run(self.targets.len(), |row| {
            let logits = &self.logits[row * stride..][..vocabulary];
            let sharpness = self.sharpness;
            let RowSums { lse, .. } = dispatch(isa, SumRow { logits, sharpness });
            let log_p = log_prob(logits, self.targets[row], sharpness, lse);
            results.take(row).copy_from_slice(&[log_p, lse]);
            let dlogits = &mut gradients.take(row)[..vocabulary];
            match target_of(self.targets[row], vocabulary) {
                Some(target) => {
                    let factor = self.sign * self.upstream[row] * sharpness;
                    dispatch(isa, GradRow { logits, sharpness, lse, factor, target, dlogits });
                }
                None if self.targets[row] == IGNORED => dlogits.fill(T::from_f32(0.0)),
                None => dlogits.fill(T::from_f32(f32::NAN)),
            }
            sum(0, bytemuck::cast_slice(logits));
            sum(1, bytemuck::cast_slice(dlogits));
        });
        let [logits, dlogits] = sums.map(AtomicU32::into_inner);
        Passing { logits, dlogits }
    }
}

/// The word sums of what passes through a chunk.
#[derive(Clone, Copy)]
struct Passing {
    logits: u32,
    dlogits: u32,
}
