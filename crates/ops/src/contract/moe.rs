//! Mixtures of experts: choosing experts, sorting rows by expert and joining the results.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scoring {
    /// Softmax over all experts (Qwen3-MoE).
    Softmax,
    /// Sigmoid of each (DeepSeek-V3).
    Sigmoid,
}

/// Whether the chosen experts' scores are divided by their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Renormalise {
    /// They are left as they are.
    No,
    /// They are divided by their sum (plus 1e-20 with [`Scoring::Sigmoid`]).
    Yes,
}

/// The rule by which a router chooses; shared by forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterRule {
    /// Experts chosen per row.
    pub chosen: usize,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Groups the experts are divided into, 1 for none.
    pub groups: usize,
    /// Groups that may be chosen from.
    pub groups_kept: usize,
    /// Whether chosen scores are divided by their sum.
    pub renormalise: Renormalise,
    /// Factor on the resulting weights.
    pub scale: f32,
}

/// Chooses experts for each row.
///
/// Scores are the softmax or sigmoid of the logits. For *selection only* the bias is added; with
/// groups, a group's rank is the sum of its two best biased scores and only the `groups_kept` best
/// groups stay. The `chosen` best biased scores win; ties go to the lower expert. The weights are
/// the winners' *unbiased* scores, divided by their sum if so ruled, times `scale`.
///
/// Shapes    logits [rows, experts]; bias [experts]; weights, experts [rows, chosen]
/// Dtypes    logits, bias, weights f32; experts i32
/// Writes    weights, experts, best first
/// Numerics  in f32. A row with a NaN logit gets experts 0, 1, ... and NaN weights
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterTopK {
    /// One logit per expert.
    pub logits: View,
    /// Added for selection only.
    pub bias: Option<View>,
    /// The rule.
    pub rule: RouterRule,
    /// The chosen experts' weights.
    pub weights: View,
    /// The chosen experts.
    pub experts: View,
}
contract!(RouterTopK |op, check| { logits: Read, bias: Read, weights: Write, experts: Write } {
    check.rank("logits", &op.logits, 2)?;
    let (rows, experts) = (op.logits.dim(0), op.logits.dim(1));
    check.tensor("logits", &op.logits, DType::F32, [rows, experts])?;
    if let Some(bias) = &op.bias {
        check.tensor("bias", bias, DType::F32, [experts])?;
    }
    rule_fits(&check, &op.rule, experts)?;
    check.tensor("weights", &op.weights, DType::F32, [rows, op.rule.chosen])?;
    check.tensor("experts", &op.experts, DType::I32, [rows, op.rule.chosen])?;
});

fn rule_fits(
    check: &crate::check::Check,
    rule: &RouterRule,
    experts: usize,
) -> Result<(), crate::error::OpError> {
    check.that(rule.groups > 0 && experts.is_multiple_of(rule.groups), || {
        format!("{experts} experts should be a multiple of {} groups", rule.groups)
    })?;
    check.that((1..=rule.groups).contains(&rule.groups_kept), || {
        format!("groups_kept should be 1 to {} but is {}", rule.groups, rule.groups_kept)
    })?;
    let reachable = experts / rule.groups * rule.groups_kept;
    check.that((1..=reachable).contains(&rule.chosen), || {
        format!("chosen should be 1 to {reachable} but is {}", rule.chosen)
    })?;
    check.that(rule.groups == 1 || experts / rule.groups >= 2, || {
        "a group should have at least two experts".into()
    })
}

/// Gradient of [`RouterTopK`] with the choice held fixed.
///
/// Shapes    dweights, experts [rows, chosen]; logits, dlogits [rows, experts]
/// Dtypes    f32; experts i32
/// Writes    dlogits
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterTopKBwd {
    /// Gradient of the weights.
    pub dweights: View,
    /// The forward's logits.
    pub logits: View,
    /// The forward's choice.
    pub experts: View,
    /// The forward's rule.
    pub rule: RouterRule,
    /// Gradient of the logits.
    pub dlogits: View,
}
contract!(RouterTopKBwd |op, check| {
    dweights: Read, logits: Read, experts: Read, dlogits: Write,
} {
    check.rank("logits", &op.logits, 2)?;
    let (rows, experts) = (op.logits.dim(0), op.logits.dim(1));
    check.tensor("logits", &op.logits, DType::F32, [rows, experts])?;
    rule_fits(&check, &op.rule, experts)?;
    check.tensor("dweights", &op.dweights, DType::F32, [rows, op.rule.chosen])?;
    check.tensor("experts", &op.experts, DType::I32, [rows, op.rule.chosen])?;
    check.tensor("dlogits", &op.dlogits, DType::F32, [rows, experts])?;
});

/// Sorts rows by expert: each row is repeated once per chosen expert; an expert's rows keep their
/// order.
///
/// Shapes    x [rows, width]; experts [rows, chosen]; y [rows * chosen, width];
///           offsets [experts_count + 1]; slots [rows, chosen]
/// Dtypes    x, y: equal floats; experts, offsets, slots i32
/// Writes    y; offsets (each expert's first row in y, and their end); slots (where each copy of
///           each row went). An expert id out of range counts as the last expert
/// Numerics  exact
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Permute {
    /// Input rows.
    pub x: View,
    /// The chosen experts.
    pub experts: View,
    /// Rows sorted by expert.
    pub y: View,
    /// Where each expert's rows begin, and where the last one's end.
    pub offsets: View,
    /// Where each copy of each row went.
    pub slots: View,
}
contract!(Permute |op, check| {
    x: Read, experts: Read, y: Write, offsets: Write, slots: Write,
} {
    check.rank("x", &op.x, 2)?;
    check.rank("experts", &op.experts, 2)?;
    check.rank("offsets", &op.offsets, 1)?;
    check.dtype("x", &op.x, &DType::FLOATS)?;
    check.dense_rows("x", &op.x)?;
    let (rows, width, chosen) = (op.x.dim(0), op.x.dim(1), op.experts.dim(1));
    check.tensor("experts", &op.experts, DType::I32, [rows, chosen])?;
    check.tensor("y", &op.y, op.x.dtype, [rows * chosen, width])?;
    check.dtype("offsets", &op.offsets, &[DType::I32])?;
    check.that(op.offsets.dim(0) >= 2, || "offsets should hold at least one expert".into())?;
    check.tensor("slots", &op.slots, DType::I32, [rows, chosen])?;
});

/// Gradient of [`Permute`]: `dx[r] = sum over j of dy[slots[r, j]]`, j ascending.
///
/// Shapes    dy [rows * chosen, width]; slots [rows, chosen]; dx [rows, width]
/// Dtypes    dy, dx: equal floats; slots i32
/// Writes    dx
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PermuteBwd {
    /// Gradient of the sorted rows.
    pub dy: View,
    /// The forward's slots.
    pub slots: View,
    /// Gradient of the rows.
    pub dx: View,
}
contract!(PermuteBwd |op, check| { dy: Read, slots: Read, dx: Write } {
    check.rank("dx", &op.dx, 2)?;
    check.rank("slots", &op.slots, 2)?;
    check.dtype("dx", &op.dx, &DType::FLOATS)?;
    check.dense_rows("dx", &op.dx)?;
    let (rows, width, chosen) = (op.dx.dim(0), op.dx.dim(1), op.slots.dim(1));
    check.tensor("slots", &op.slots, DType::I32, [rows, chosen])?;
    check.tensor("dy", &op.dy, op.dx.dtype, [rows * chosen, width])?;
});

/// Joins the experts' results: `y[r] = sum over j of weights[r, j] * x[slots[r, j]]`, j ascending.
///
/// Shapes    x [rows * chosen, width]; weights, slots [rows, chosen]; y [rows, width]
/// Dtypes    x, y: equal floats; weights f32; slots i32
/// Writes    y
/// Numerics  in f32, rounded once
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unpermute {
    /// The experts' results, sorted by expert.
    pub x: View,
    /// The experts' weights.
    pub weights: View,
    /// Where each copy of each row lies.
    pub slots: View,
    /// Joined rows.
    pub y: View,
}
contract!(Unpermute |op, check| { x: Read, weights: Read, slots: Read, y: Write } {
    check.rank("y", &op.y, 2)?;
    check.rank("slots", &op.slots, 2)?;
    check.dtype("y", &op.y, &DType::FLOATS)?;
    check.dense_rows("y", &op.y)?;
    let (rows, width, chosen) = (op.y.dim(0), op.y.dim(1), op.slots.dim(1));
    check.tensor("slots", &op.slots, DType::I32, [rows, chosen])?;
    check.tensor("weights", &op.weights, DType::F32, [rows, chosen])?;
    check.tensor("x", &op.x, op.y.dtype, [rows * chosen, width])?;
});

/// Gradient of [`Unpermute`]: `dx[slots[r, j]] = weights[r, j] * dy[r]`,
/// `dweights[r, j] = dot(dy[r], x[slots[r, j]])`.
///
/// Shapes    dy [rows, width]; x, dx [rows * chosen, width]; weights, slots, dweights
///           [rows, chosen]
/// Dtypes    dy, x, dx: equal floats; weights, dweights f32; slots i32
/// Writes    dx, dweights
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnpermuteBwd {
    /// Gradient of the joined rows.
    pub dy: View,
    /// The forward's expert results.
    pub x: View,
    /// The forward's weights.
    pub weights: View,
    /// The forward's slots.
    pub slots: View,
    /// Gradient of the experts' results.
    pub dx: View,
    /// Gradient of the weights.
    pub dweights: View,
}
contract!(UnpermuteBwd |op, check| {
    dy: Read, x: Read, weights: Read, slots: Read, dx: Write, dweights: Write,
} {
    check.rank("dy", &op.dy, 2)?;
    check.rank("slots", &op.slots, 2)?;
    check.dtype("dy", &op.dy, &DType::FLOATS)?;
    check.dense_rows("dy", &op.dy)?;
    let (rows, width, chosen) = (op.dy.dim(0), op.dy.dim(1), op.slots.dim(1));
    check.tensor("slots", &op.slots, DType::I32, [rows, chosen])?;
    check.tensor("weights", &op.weights, DType::F32, [rows, chosen])?;
    check.tensor("x", &op.x, op.dy.dtype, [rows * chosen, width])?;
    check.tensor("dx", &op.dx, op.dy.dtype, [rows * chosen, width])?;
    check.tensor("dweights", &op.dweights, DType::F32, [rows, chosen])?;
});
