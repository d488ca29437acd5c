//! Mixtures of experts.

use pontoon_cpu::gemm::Store;

use super::arguments::{IntegersIf, ListIf, ListIn, TensorIf, TensorIn};
use super::operators;
use crate::failure::Done;
use crate::ops::experts::{self, Gate, Grouped, Listing, Manner, Split};
use crate::plan::{Argument, Plan};

/// What V4 and V5 pass alike.
struct Passed {
    x: Vec<Argument>,
    weight: Vec<Argument>,
    groups: Option<Argument>,
    out: Vec<Argument>,
    /// splitItem, groupType, groupListType, actType.
    modes: [i64; 4],
    /// Bias, quantisation and activation, which are not emulated.
    extras: Vec<Option<Vec<Argument>>>,
}

fn grouped(plan: &mut Plan, passed: &Passed) -> Done {
    plan.demand(passed.extras.iter().all(Option::is_none), || {
        "bias, quantisation and activation of groups are not emulated".to_owned()
    })?;
    let [split_item, group_type, list_type, activation] = passed.modes;
    plan.demand((2..=3).contains(&split_item) && activation == 0, || {
        format!("splitItem {split_item} and actType {activation} are not emulated")
    })?;
    let split = match group_type {
        0 => Split::Rows,
        2 => Split::Sums,
        _ => return plan.forbid(format!("groupType {group_type} is not emulated")),
    };
    let listing = match list_type {
        0 => Listing::Ends,
        1 => Listing::Sizes,
        _ => return plan.forbid(format!("groupListType {list_type} is not emulated")),
    };
    let ([x], [weight], [out], Some(groups)) =
        (&passed.x[..], &passed.weight[..], &passed.out[..], &passed.groups)
    else {
        return plan.forbid("one x, one weight, one y and a groupList are emulated");
    };
    let manner = Manner { split, listing, store: Store::Overwrite };
    experts::grouped(plan, &Grouped { x, weight, groups, out }, manner)
}

operators! {
    aclnnGroupedMatmulV4, aclnnGroupedMatmulV4GetWorkspaceSize |plan|
        (
            x: ListIn,
            weight: ListIn,
            bias: ListIf,
            scale: ListIf,
            offset: ListIf,
            antiquant_scale: ListIf,
            antiquant_offset: ListIf,
            token_scale: ListIf,
            groups: TensorIf,
            activation_in: ListIf,
            activation_scale: ListIf,
            activation_offset: ListIf,
            split_item: i64,
            group_type: i64,
            list_type: i64,
            activation: i64,
            out: ListIn,
            activation_out: ListIf,
            scale_out: ListIf,
        ) {
        let extras = vec![
            bias, scale, offset, antiquant_scale, antiquant_offset, token_scale, activation_in,
            activation_scale, activation_offset, activation_out, scale_out,
        ];
        let modes = [split_item, group_type, list_type, activation];
        grouped(plan, &Passed { x, weight, groups, out, modes, extras })
    }
    aclnnGroupedMatmulV5, aclnnGroupedMatmulV5GetWorkspaceSize |plan|
        (
            x: ListIn,
            weight: ListIn,
            bias: ListIf,
            scale: ListIf,
            offset: ListIf,
            antiquant_scale: ListIf,
            antiquant_offset: ListIf,
            token_scale: ListIf,
            groups: TensorIf,
            activation_in: ListIf,
            activation_scale: ListIf,
            activation_offset: ListIf,
            split_item: i64,
            group_type: i64,
            list_type: i64,
            activation: i64,
            _tuning: IntegersIf,
            out: ListIn,
            activation_out: ListIf,
            scale_out: ListIf,
        ) {
        let extras = vec![
            bias, scale, offset, antiquant_scale, antiquant_offset, token_scale, activation_in,
            activation_scale, activation_offset, activation_out, scale_out,
        ];
        let modes = [split_item, group_type, list_type, activation];
        grouped(plan, &Passed { x, weight, groups, out, modes, extras })
    }
    aclnnGroupedMatmulAdd, aclnnGroupedMatmulAddGetWorkspaceSize |plan|
        (
            x: TensorIn,
            weight: TensorIn,
            groups: TensorIn,
            y: TensorIn,
            turn_x: bool,
            turn_weight: bool,
            group_type: i64,
        ) {
        plan.demand(turn_x && !turn_weight && group_type == 2, || {
            "x transposed, weight not, and groupType 2 are what exists".to_owned()
        })?;
        plan.demand(x.tensor.dtype != crate::dtype::DataType::F32, || {
            "x should have 16 bits".to_owned()
        })?;
        let x = experts::turned(plan, &x)?;
        let tensors = Grouped { x: &x, weight: &weight, groups: &groups, out: &y };
        let manner =
            Manner { split: Split::Sums, listing: Listing::Ends, store: Store::Accumulate };
        experts::grouped(plan, &tensors, manner)
    }
    aclnnMoeGatingTopKSoftmax, aclnnMoeGatingTopKSoftmaxGetWorkspaceSize |plan|
        (
            x: TensorIn,
            finished: TensorIf,
            k: i64,
            y: TensorIn,
            experts: TensorIn,
            row_index: TensorIn,
        ) {
        plan.demand(finished.is_none(), || "finished rows are not emulated".to_owned())?;
        experts::gate_softmax(plan, &x, k, [&y, &experts, &row_index])
    }
    aclnnMoeGatingTopK, aclnnMoeGatingTopKGetWorkspaceSize |plan|
        (
            x: TensorIn,
            bias: TensorIf,
            k: i64,
            groups_kept: i64,
            groups: i64,
            select_mode: i64,
            renorm: i64,
            norm_type: i64,
            _out_flag: bool,
            factor: f64,
            eps: f64,
            y: TensorIn,
            experts: TensorIn,
            _out: TensorIf,
        ) {
        plan.demand(renorm == 0, || format!("renorm {renorm} is not emulated"))?;
        let rule = Gate {
            k,
            groups_kept,
            groups,
            two_best: select_mode == 1,
            sigmoid: norm_type == 1,
            factor,
            eps,
        };
        experts::gate(plan, (&x, bias.as_ref()), rule, [&y, &experts])
    }
    aclnnMoeTokenPermute, aclnnMoeTokenPermuteGetWorkspaceSize |plan|
        (
            tokens: TensorIn,
            indices: TensorIn,
            _count: i64,
            padded: bool,
            out: TensorIn,
            sorted: TensorIn,
        ) {
        plan.demand(!padded, || "padded mode does not exist".to_owned())?;
        experts::permute(plan, (&tokens, &indices), [&out, &sorted])
    }
    aclnnMoeTokenPermuteGrad, aclnnMoeTokenPermuteGradGetWorkspaceSize |plan|
        (grad: TensorIn, sorted: TensorIn, _top: i64, padded: bool, out: TensorIn) {
        plan.demand(!padded, || "padded mode does not exist".to_owned())?;
        experts::unpermute(plan, (&grad, &sorted, None), &out)
    }
    aclnnMoeTokenUnpermute, aclnnMoeTokenUnpermuteGetWorkspaceSize |plan|
        (
            rows: TensorIn,
            sorted: TensorIn,
            weights: TensorIf,
            padded: bool,
            _shape: IntegersIf,
            out: TensorIn,
        ) {
        plan.demand(!padded, || "padded mode does not exist".to_owned())?;
        experts::unpermute(plan, (&rows, &sorted, weights.as_ref()), &out)
    }
    aclnnMoeTokenUnpermuteGrad, aclnnMoeTokenUnpermuteGradGetWorkspaceSize |plan|
        (
            rows: TensorIn,
            grad: TensorIn,
            sorted: TensorIn,
            weights: TensorIf,
            padded: bool,
            _shape: IntegersIf,
            drows: TensorIn,
            dweights: TensorIf,
        ) {
        plan.demand(!padded, || "padded mode does not exist".to_owned())?;
        let outputs = (&drows, dweights.as_ref());
        experts::unpermute_grad(plan, [&rows, &grad, &sorted], weights.as_ref(), outputs)
    }
}
