//! Attention over sequences of varying length.

use std::sync::Arc;

use super::arguments::{IntegersIf, TensorIf, TensorIn};
use super::operators;
use super::pointers::Text;
use crate::failure::Done;
use crate::ops::attention::{Attributes, Inputs, Results, attention};
use crate::ops::attention_grad::{Gradients, Kept, attention_grad};
use crate::plan::{Argument, Plan};

/// What every variant passes besides tensors.
struct Passed {
    q_ends: Option<Arc<Vec<i64>>>,
    k_ends: Option<Arc<Vec<i64>>>,
    scale: f64,
    keep: f64,
    heads: i64,
    layout: String,
    sparse: i64,
    precise: i64,
}

fn attributes(plan: &Plan, passed: Passed, extras: &[&Option<Argument>]) -> Done<Attributes> {
    plan.demand(extras.iter().all(|extra| extra.is_none()), || {
        "position shifts, dropout and padding masks are not emulated".to_owned()
    })?;
    plan.demand((0..=1).contains(&passed.precise), || {
        format!("innerPrecise {} is not emulated", passed.precise)
    })?;
    let (Some(q_ends), Some(k_ends)) = (passed.q_ends, passed.k_ends) else {
        return plan.forbid("layout TND wants the ends of the sequences");
    };
    Ok(Attributes {
        q_ends: q_ends.to_vec(),
        k_ends: k_ends.to_vec(),
        scale: passed.scale,
        keep: passed.keep,
        heads: passed.heads,
        layout: passed.layout,
        sparse: passed.sparse,
    })
}

operators! {
    aclnnFlashAttentionVarLenScore, aclnnFlashAttentionVarLenScoreGetWorkspaceSize |plan|
        (
            q: TensorIn,
            k: TensorIn,
            v: TensorIn,
            shift: TensorIf,
            drop: TensorIf,
            padding: TensorIf,
            mask: TensorIf,
            _prefix: IntegersIf,
            q_ends: IntegersIf,
            k_ends: IntegersIf,
            scale: f64,
            keep: f64,
            _before: i64,
            _after: i64,
            heads: i64,
            layout: Text,
            precise: i64,
            sparse: i64,
            peak: TensorIn,
            sum: TensorIn,
            _softmax: TensorIf,
            out: TensorIn,
        ) {
        let passed = Passed { q_ends, k_ends, scale, keep, heads, layout, sparse, precise };
        let attributes = attributes(plan, passed, &[&shift, &drop, &padding])?;
        let inputs = Inputs { q: &q, k: &k, v: &v, mask: mask.as_ref() };
        attention(plan, inputs, &attributes, &Results { peak: &peak, sum: &sum, out: &out })
    }
    aclnnFlashAttentionVarLenScoreV2, aclnnFlashAttentionVarLenScoreV2GetWorkspaceSize |plan|
        (
            q: TensorIn,
            k: TensorIn,
            v: TensorIn,
            shift: TensorIf,
            drop: TensorIf,
            padding: TensorIf,
            mask: TensorIf,
            _prefix: IntegersIf,
            q_ends: IntegersIf,
            k_ends: IntegersIf,
            _q_start: IntegersIf,
            _k_start: IntegersIf,
            scale: f64,
            keep: f64,
            _before: i64,
            _after: i64,
            heads: i64,
            layout: Text,
            precise: i64,
            sparse: i64,
            _shift_kind: i64,
            peak: TensorIn,
            sum: TensorIn,
            _softmax: TensorIf,
            out: TensorIn,
        ) {
        let passed = Passed { q_ends, k_ends, scale, keep, heads, layout, sparse, precise };
        let attributes = attributes(plan, passed, &[&shift, &drop, &padding])?;
        let inputs = Inputs { q: &q, k: &k, v: &v, mask: mask.as_ref() };
        attention(plan, inputs, &attributes, &Results { peak: &peak, sum: &sum, out: &out })
    }
    aclnnFlashAttentionUnpaddingScoreGrad,
    aclnnFlashAttentionUnpaddingScoreGradGetWorkspaceSize |plan|
        (
            q: TensorIn,
            k: TensorIn,
            v: TensorIn,
            dy: TensorIn,
            shift: TensorIf,
            drop: TensorIf,
            padding: TensorIf,
            mask: TensorIf,
            peak: TensorIn,
            sum: TensorIn,
            _softmax: TensorIf,
            out: TensorIn,
            _prefix: IntegersIf,
            q_ends: IntegersIf,
            k_ends: IntegersIf,
            scale: f64,
            keep: f64,
            _before: i64,
            _after: i64,
            heads: i64,
            layout: Text,
            precise: i64,
            sparse: i64,
            dq: TensorIn,
            dk: TensorIn,
            dv: TensorIn,
            _dshift: TensorIf,
        ) {
        let passed = Passed { q_ends, k_ends, scale, keep, heads, layout, sparse, precise };
        let attributes = attributes(plan, passed, &[&shift, &drop, &padding])?;
        let inputs = Inputs { q: &q, k: &k, v: &v, mask: mask.as_ref() };
        let kept = Kept { dy: &dy, peak: &peak, sum: &sum, out: &out };
        let gradients = Gradients { dq: &dq, dk: &dk, dv: &dv };
        attention_grad(plan, inputs, (&kept, &attributes), &gradients)
    }
    aclnnFlashAttentionUnpaddingScoreGradV2,
    aclnnFlashAttentionUnpaddingScoreGradV2GetWorkspaceSize |plan|
        (
            q: TensorIn,
            k: TensorIn,
            v: TensorIn,
            dy: TensorIn,
            shift: TensorIf,
            drop: TensorIf,
            padding: TensorIf,
            mask: TensorIf,
            peak: TensorIn,
            sum: TensorIn,
            _softmax: TensorIf,
            out: TensorIn,
            _prefix: IntegersIf,
            q_ends: IntegersIf,
            k_ends: IntegersIf,
            _q_start: IntegersIf,
            _k_start: IntegersIf,
            scale: f64,
            keep: f64,
            _before: i64,
            _after: i64,
            heads: i64,
            layout: Text,
            precise: i64,
            sparse: i64,
            _shift_kind: i64,
            dq: TensorIn,
            dk: TensorIn,
            dv: TensorIn,
            _dshift: TensorIf,
        ) {
        let passed = Passed { q_ends, k_ends, scale, keep, heads, layout, sparse, precise };
        let attributes = attributes(plan, passed, &[&shift, &drop, &padding])?;
        let inputs = Inputs { q: &q, k: &k, v: &v, mask: mask.as_ref() };
        let kept = Kept { dy: &dy, peak: &peak, sum: &sum, out: &out };
        let gradients = Gradients { dq: &dq, dk: &dk, dv: &dv };
        attention_grad(plan, inputs, (&kept, &attributes), &gradients)
    }
}
