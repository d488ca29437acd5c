//! Reductions, sorting, indices, norms, activations, losses, the optimiser.

use super::arguments::{IntegersIf, ListIn, ScalarIn, TensorIf, TensorIn, TypeIn};
use super::operators;
use super::pointers::Text;
use crate::ops::index::{self, Meeting};
use crate::ops::loss::{self, Reduction};
use crate::ops::norm;
use crate::ops::optim::{self, Settings, Tensors};
use crate::ops::reduce::{self, Fold, Form};
use crate::ops::rows;
use crate::ops::sort::{self, Order};

operators! {
    aclnnReduceSum, aclnnReduceSumGetWorkspaceSize |plan|
        (a: TensorIn, dims: IntegersIf, keep: bool, dtype: TypeIn, out: TensorIn) {
        let have = out.tensor.dtype;
        plan.demand(have == dtype, || format!("out is {have:?}, the wanted type {dtype:?}"))?;
        let dims = dims.unwrap_or_default();
        reduce::reduce(plan, &a, (&dims, keep), (&out, Fold::Sum))
    }
    aclnnMean, aclnnMeanGetWorkspaceSize |plan|
        (a: TensorIn, dims: IntegersIf, keep: bool, dtype: TypeIn, out: TensorIn) {
        let have = out.tensor.dtype;
        plan.demand(have == dtype, || format!("out is {have:?}, the wanted type {dtype:?}"))?;
        let dims = dims.unwrap_or_default();
        reduce::reduce(plan, &a, (&dims, keep), (&out, Fold::Mean))
    }
    aclnnAmax, aclnnAmaxGetWorkspaceSize |plan|
        (a: TensorIn, dims: IntegersIf, keep: bool, out: TensorIn) {
        let dims = dims.unwrap_or_default();
        reduce::reduce(plan, &a, (&dims, keep), (&out, Fold::Max))
    }
    aclnnLinalgVectorNorm, aclnnLinalgVectorNormGetWorkspaceSize |plan|
        (
            a: TensorIn,
            order: ScalarIn,
            dims: IntegersIf,
            keep: bool,
            _dtype: TypeIn,
            out: TensorIn,
        ) {
        reduce::check_order(plan, order)?;
        let dims = dims.unwrap_or_default();
        reduce::reduce(plan, &a, (&dims, keep), (&out, Fold::Norm))
    }
    aclnnArgMax, aclnnArgMaxGetWorkspaceSize |plan|
        (a: TensorIn, dim: i64, keep: bool, out: TensorIn) {
        reduce::argmax(plan, &a, (dim, keep), &out)
    }
    aclnnCumsum, aclnnCumsumGetWorkspaceSize |plan|
        (a: TensorIn, dim: i64, dtype: TypeIn, out: TensorIn) {
        reduce::cumsum(plan, &a, (dim, dtype), &out)
    }
    aclnnSoftmax, aclnnSoftmaxGetWorkspaceSize |plan| (a: TensorIn, dim: i64, out: TensorIn) {
        reduce::softmax(plan, &a, dim, (&out, Form::Plain))
    }
    aclnnLogSoftmax, aclnnLogSoftmaxGetWorkspaceSize |plan|
        (a: TensorIn, dim: i64, out: TensorIn) {
        reduce::softmax(plan, &a, dim, (&out, Form::Log))
    }
    aclnnSoftmaxBackward, aclnnSoftmaxBackwardGetWorkspaceSize |plan|
        (grad: TensorIn, output: TensorIn, dim: i64, out: TensorIn) {
        reduce::softmax_backward(plan, (&grad, &output), dim, (&out, Form::Plain))
    }
    aclnnLogSoftmaxBackward, aclnnLogSoftmaxBackwardGetWorkspaceSize |plan|
        (grad: TensorIn, output: TensorIn, dim: i64, out: TensorIn) {
        reduce::softmax_backward(plan, (&grad, &output), dim, (&out, Form::Log))
    }
    aclnnSort, aclnnSortGetWorkspaceSize |plan|
        (
            a: TensorIn,
            _stable: bool,
            dim: i64,
            descending: bool,
            values: TensorIn,
            indices: TensorIn,
        ) {
        sort::sort(plan, &a, (dim, Order::of(descending)), (Some(&values), &indices))
    }
    aclnnArgsort, aclnnArgsortGetWorkspaceSize |plan|
        (a: TensorIn, dim: i64, descending: bool, out: TensorIn) {
        sort::sort(plan, &a, (dim, Order::of(descending)), (None, &out))
    }
    aclnnTopk, aclnnTopkGetWorkspaceSize |plan|
        (
            a: TensorIn,
            k: i64,
            dim: i64,
            largest: bool,
            _sorted: bool,
            values: TensorIn,
            indices: TensorIn,
        ) {
        sort::top(plan, &a, (k, dim, Order::of(largest)), (&values, &indices))
    }
    aclnnIndexSelect, aclnnIndexSelectGetWorkspaceSize |plan|
        (a: TensorIn, dim: i64, index: TensorIn, out: TensorIn) {
        index::select(plan, &a, (dim, &index), &out)
    }
    aclnnGather, aclnnGatherGetWorkspaceSize |plan|
        (a: TensorIn, dim: i64, index: TensorIn, out: TensorIn) {
        index::gather(plan, &a, (dim, &index), &out)
    }
    aclnnInplaceScatter, aclnnInplaceScatterGetWorkspaceSize |plan|
        (to: TensorIn, dim: i64, index: TensorIn, source: TensorIn, reduce: i64) {
        let meeting = match reduce {
            0 => Meeting::Replace,
            1 => Meeting::Add,
            _ => return plan.forbid(format!("reduce {reduce} is not emulated")),
        };
        index::scatter(plan, &to, (dim, &index, &source), meeting)
    }
    aclnnScatterNdUpdate, aclnnScatterNdUpdateGetWorkspaceSize |plan|
        (to: TensorIn, indices: TensorIn, updates: TensorIn) {
        index::scatter_rows(plan, &to, (&indices, &updates))
    }
    aclnnIndexPutImpl, aclnnIndexPutImplGetWorkspaceSize |plan|
        (to: TensorIn, indices: ListIn, values: TensorIn, accumulate: bool, _unsafe: bool) {
        let meeting = if accumulate { Meeting::Add } else { Meeting::Replace };
        index::put(plan, &to, (&indices, &values), meeting)
    }
    aclnnEmbedding, aclnnEmbeddingGetWorkspaceSize |plan|
        (weight: TensorIn, indices: TensorIn, out: TensorIn) {
        index::embedding(plan, &weight, &indices, &out)
    }
    aclnnEmbeddingDenseBackward, aclnnEmbeddingDenseBackwardGetWorkspaceSize |plan|
        (
            grad: TensorIn,
            indices: TensorIn,
            count: u64,
            padding: u64,
            by_frequency: bool,
            out: TensorIn,
        ) {
        plan.demand(!by_frequency, || "scaling by frequency is not emulated".to_owned())?;
        index::embedding_backward(plan, (&grad, &indices), (count, padding), &out)
    }
    aclnnRmsNorm, aclnnRmsNormGetWorkspaceSize |plan|
        (x: TensorIn, gamma: TensorIn, eps: f64, y: TensorIn, rstd: TensorIn) {
        norm::rms_norm(plan, (&x, &gamma), eps, (&y, &rstd))
    }
    aclnnRmsNormGrad, aclnnRmsNormGradGetWorkspaceSize |plan|
        (
            dy: TensorIn,
            x: TensorIn,
            rstd: TensorIn,
            gamma: TensorIn,
            dx: TensorIn,
            dgamma: TensorIn,
        ) {
        norm::rms_norm_grad(plan, [&dy, &x, &rstd, &gamma], [&dx, &dgamma])
    }
    aclnnAddRmsNorm, aclnnAddRmsNormGetWorkspaceSize |plan|
        (
            a: TensorIn,
            b: TensorIn,
            gamma: TensorIn,
            eps: f64,
            y: TensorIn,
            rstd: TensorIn,
            x: TensorIn,
        ) {
        norm::add_rms_norm(plan, [&a, &b, &gamma], eps, [&y, &rstd, &x])
    }
    aclnnSwiGlu, aclnnSwiGluGetWorkspaceSize |plan| (x: TensorIn, dim: i64, out: TensorIn) {
        rows::swiglu(plan, &x, dim, &out)
    }
    aclnnSwiGluGrad, aclnnSwiGluGradGetWorkspaceSize |plan|
        (dy: TensorIn, x: TensorIn, dim: i64, out: TensorIn) {
        rows::swiglu_grad(plan, (&dy, &x), dim, &out)
    }
    aclnnRotaryPositionEmbedding, aclnnRotaryPositionEmbeddingGetWorkspaceSize |plan|
        (x: TensorIn, cos: TensorIn, sin: TensorIn, mode: i64, out: TensorIn) {
        rows::rotary(plan, &x, (&cos, &sin, mode), &out)
    }
    aclnnCrossEntropyLoss, aclnnCrossEntropyLossGetWorkspaceSize |plan|
        (
            input: TensorIn,
            target: TensorIn,
            weight: TensorIf,
            reduction: Text,
            ignored: i64,
            smoothing: f64,
            z_scale: f64,
            z_loss: bool,
            loss: TensorIn,
            log_prob: TensorIn,
            _z_out: TensorIf,
            _z_log: TensorIf,
        ) {
        let plain = weight.is_none() && smoothing == 0.0 && z_scale == 0.0 && !z_loss;
        plan.demand(plain, || "weights, smoothing and z-loss are not emulated".to_owned())?;
        let reduction = Reduction::of(plan, &reduction)?;
        loss::cross_entropy(plan, (&input, &target), (reduction, ignored), (&loss, &log_prob))
    }
    aclnnCrossEntropyLossGrad, aclnnCrossEntropyLossGradGetWorkspaceSize |plan|
        (
            grad: TensorIn,
            log_prob: TensorIn,
            target: TensorIn,
            weight: TensorIf,
            z_grad: TensorIf,
            _z_log: TensorIf,
            reduction: Text,
            ignored: i64,
            smoothing: f64,
            _z_scale: f64,
            out: TensorIn,
        ) {
        let plain = weight.is_none() && z_grad.is_none() && smoothing == 0.0;
        plan.demand(plain, || "weights, smoothing and z-loss are not emulated".to_owned())?;
        let reduction = Reduction::of(plan, &reduction)?;
        let inputs = (&grad, &log_prob, &target);
        loss::cross_entropy_grad(plan, inputs, (reduction, ignored), &out)
    }
    aclnnApplyAdamWV2, aclnnApplyAdamWV2GetWorkspaceSize |plan|
        (
            weight: TensorIn,
            m: TensorIn,
            v: TensorIn,
            most: TensorIf,
            grad: TensorIn,
            step: TensorIn,
            lr: f32,
            beta1: f32,
            beta2: f32,
            weight_decay: f32,
            eps: f32,
            amsgrad: bool,
            maximize: bool,
        ) {
        plan.demand(!amsgrad && most.is_none(), || "amsgrad is not emulated".to_owned())?;
        let tensors = Tensors { weight: &weight, m: &m, v: &v, grad: &grad, step: &step };
        optim::adamw(plan, &tensors, Settings { lr, beta1, beta2, weight_decay, eps, maximize })
    }
}
