//! Which vendor operators each operation of the waist calls, and what follows from it: what a
//! device with an older library cannot do, and the table in `docs/ascend.md`.
//!
//! Reasons stand in `waivers.toml`. Read next: `ops.rs`.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use pontoon_ops::waivers::{Waiver, published};
use pontoon_ops::{Op, OpName};

use crate::ffi::table::Operator::{
    self, FlashAttentionUnpaddingScoreGrad, FlashAttentionUnpaddingScoreGradV2,
    FlashAttentionVarLenScore, FlashAttentionVarLenScoreV2, GroupedMatmulV4, GroupedMatmulV5,
};

/// The waivers as they are published.
const PUBLISHED: &str = include_str!("../waivers.toml");

/// Heads and widths that the vendor's attention takes.
const HEADS_MAX: usize = 256;
const WIDTH_MAX: usize = 768;

/// For each operation the operators it may call. Of versions that stand for one another, one is
/// enough: they are listed under [`VERSIONS`].
const CALLS: &str = "\
Copy: InplaceCopy
Cast: Cast InplaceCopy
Fill: InplaceFillScalar
Add: Add InplaceCopy
Scale: Muls
Embed: IndexSelect LtScalar GeScalar LogicalOr SWhere InplaceMaskedFillScalar InplaceCopy
EmbedBwd: IndexPutImpl InplaceZero Cast LtScalar GeScalar LogicalOr SWhere
    InplaceMaskedFillScalar InplaceCopy
RmsNorm: RmsNorm InplaceCopy
RmsNormBwd: RmsNormGrad Add InplaceCopy
AddRmsNorm: Add RmsNorm InplaceCopy
AddRmsNormBwd: RmsNormGrad Add Cast InplaceCopy
Matmul: Matmul Add InplaceCopy InplaceZero
MatmulQuant: Cast IndexSelect Mul Matmul Add InplaceCopy
GroupedMatmul: GroupedMatmulV4 GroupedMatmulAdd Cast Add InplaceCopy InplaceZero
GroupedMatmulQuant: Cast IndexSelect Mul GroupedMatmulV4 InplaceCopy
Rope: IndexSelect Mul Sub Add LtScalar GeScalar LogicalOr SWhere InplaceMaskedFillScalar
Attention: FlashAttentionVarLenScore Log Add InplaceCopy InplaceZero
AttentionBwd: FlashAttentionUnpaddingScoreGrad InplaceFillScalar InplaceCopy InplaceZero
PagedAttention: IndexSelect FlashAttentionVarLenScore InplaceCopy InplaceZero
KvWrite: ScatterNdUpdate IndexSelect InplaceCopy
SwiGlu: Silu Mul
SwiGluBwd: SwiGluGrad InplaceCopy
RouterTopK: NeTensor Cast ReduceSum GtScalar InplaceMaskedFillScalar Softmax Sigmoid Add Sort
    InplaceScatter EqScalar Gather Adds Div Muls SWhere InplaceCopy InplaceZero
    InplaceFillScalar
RouterTopKBwd: Softmax Sigmoid Cast Gather ReduceSum Adds Mul Div Sub Muls InplaceScatter
    SoftmaxBackward SigmoidBackward InplaceZero InplaceCopy
Permute: LtScalar GeScalar LogicalOr SWhere Cast Sort IndexSelect LtTensor ReduceSum InplaceCopy
PermuteBwd: IndexSelect Cast ReduceSum InplaceCopy
Unpermute: IndexSelect Mul ReduceSum InplaceCopy
UnpermuteBwd: Mul ScatterNdUpdate IndexSelect Cast ReduceSum InplaceCopy
CrossEntropy TokenLogProb CrossEntropyBwd TokenLogProbBwd: Matmul Muls Amax Sub Exp ReduceSum
    Log Add Gather Cast Mul Div InplaceScatter InplaceCopy InplaceZero LtScalar GeScalar
    EqScalar LogicalOr SWhere InplaceMaskedFillScalar IndexSelect
AdamW: ApplyAdamWV2 Muls Cast
Muon: Muls Add LinalgVectorNorm Adds Div Matmul Sub Cast
SumSquares: LinalgVectorNorm Mul InplaceZero
ReduceTree: Cast Add InplaceCopy
Sample: InplaceCopy IndexSelect Div Mul GtScalar SWhere Sub ScatterNdUpdate Add IsFinite Cast
    ReduceSum EqScalar NeTensor InplaceMaskedFillScalar ArgMax Amax Exp Sort Cumsum LeTensor
    LtTensor InplaceScatter Gather Log
AllReduce ReduceScatter: Cast Add InplaceCopy
AllGather:
";

/// The operators an operation may call.
pub fn operators(op: OpName) -> &'static [Operator] {
    static TABLE: OnceLock<BTreeMap<OpName, Vec<Operator>>> = OnceLock::new();
    TABLE.get_or_init(table).get(&op).map_or(&[], Vec::as_slice)
}

fn table() -> BTreeMap<OpName, Vec<Operator>> {
    let operator = |name: &str| {
        let mut all = Operator::ALL.iter().copied();
        let found = all.find(|one| one.symbol().trim_start_matches("aclnn") == name);
        found.expect("a test reads every line of the table")
    };
    let mut table: BTreeMap<OpName, Vec<Operator>> = BTreeMap::new();
    for entry in CALLS.replace("\n    ", " ").lines() {
        let (names, calls) = entry.split_once(':').unwrap_or((entry, ""));
        for name in names.split_whitespace() {
            let op = OpName::ALL.iter().find(|op| op.name() == name);
            let op = op.expect("a test reads every line of the table");
            table.insert(*op, calls.split_whitespace().map(operator).collect());
        }
    }
    table
}

/// Newer versions that may stand for the operator that is listed.
pub const VERSIONS: [(Operator, Operator); 3] = [
    (GroupedMatmulV4, GroupedMatmulV5),
    (FlashAttentionVarLenScore, FlashAttentionVarLenScoreV2),
    (FlashAttentionUnpaddingScoreGrad, FlashAttentionUnpaddingScoreGradV2),
];

/// When something cannot be done, as `waivers.toml` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The library refuses deterministic mode.
    NoDeterministicMode,
    /// The library lacks an operator.
    MissingOperator,
    /// More query heads than the vendor's attention takes.
    ManyHeads,
    /// Wider heads than the vendor's attention takes.
    WideHeads,
    /// The device is no member of a group.
    Alone,
}

/// The published waiver for a condition.
pub fn waiver(when: When) -> &'static Waiver {
    let name = match when {
        When::NoDeterministicMode => "no-deterministic-mode",
        When::MissingOperator => "missing-operator",
        When::ManyHeads => "many-heads",
        When::WideHeads => "wide-heads",
        When::Alone => "alone",
    };
    waivers().get(name).expect("a test looks every condition up")
}

/// Every published waiver, by its condition.
pub fn waivers() -> &'static BTreeMap<String, Waiver> {
    static WAIVERS: OnceLock<BTreeMap<String, Waiver>> = OnceLock::new();
    WAIVERS.get_or_init(|| published(PUBLISHED).expect("the file is part of the crate"))
}

/// The operations a device cannot do: `has` tells which operators its library has.
pub fn waived(has: &dyn Fn(Operator) -> bool, determinism: i64) -> BTreeMap<OpName, &'static str> {
    let there = |operator: Operator| {
        let newer = VERSIONS.iter().find(|(listed, _)| *listed == operator);
        has(operator) || newer.is_some_and(|(_, newer)| has(*newer))
    };
    let varying = waiver(When::NoDeterministicMode);
    let mut all = BTreeMap::new();
    for &op in OpName::ALL {
        if determinism == 0 && varying.ops.iter().any(|name| name == op.name()) {
            all.insert(op, varying.reason.as_str());
        }
        if operators(op).iter().any(|&operator| !there(operator)) {
            all.insert(op, waiver(When::MissingOperator).reason.as_str());
        }
    }
    all
}

/// Whether an operation exchanges with other devices.
pub fn is_exchange(op: &Op) -> bool {
    matches!(op, Op::AllReduce(_) | Op::AllGather(_) | Op::ReduceScatter(_))
}

/// Why an operation of these extents cannot run, if it cannot.
pub fn limits(op: &Op) -> Option<&'static str> {
    let (q, v) = match op {
        Op::Attention(op) => (op.q, op.v),
        Op::AttentionBwd(op) => (op.q, op.v),
        Op::PagedAttention(op) => (op.q, op.v_cache),
        _ => return None,
    };
    let width = q.dim(2).max(v.dim(v.shape.rank() - 1));
    let when = match () {
        () if q.dim(1) > HEADS_MAX => When::ManyHeads,
        () if width > WIDTH_MAX => When::WideHeads,
        () => return None,
    };
    Some(waiver(when).reason.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_every_operation() {
        let table = table();
        OpName::ALL.iter().for_each(|op| assert!(table.contains_key(op), "{op:?}"));
    }

    #[test]
    fn a_missing_operator_waives_what_calls_it_and_nothing_else() {
        let waived = waived(&|operator| operator != Operator::Silu, 1);
        assert_eq!(waived.keys().collect::<Vec<_>>(), [&OpName::SwiGlu]);
    }

    #[test]
    fn a_newer_version_stands_for_the_listed_one() {
        assert!(waived(&|operator| operator != GroupedMatmulV4, 1).is_empty());
        let neither = waived(&|o| ![GroupedMatmulV4, GroupedMatmulV5].contains(&o), 1);
        let grouped = [&OpName::GroupedMatmul, &OpName::GroupedMatmulQuant];
        assert_eq!(neither.keys().collect::<Vec<_>>(), grouped);
    }

    #[test]
    fn without_deterministic_mode_no_gradient_with_varying_bits_is_offered() {
        let refused: Vec<&str> = waived(&|_| true, 0).keys().map(|op| op.name()).collect();
        assert_eq!(refused, ["EmbedBwd", "RmsNormBwd", "AddRmsNormBwd", "AttentionBwd"]);
    }

    #[test]
    fn every_operator_of_the_table_is_called_by_some_operation() {
        let listed = |operator: &Operator| {
            let older = VERSIONS.iter().find(|(_, newer)| newer == operator).map(|pair| pair.0);
            let wanted = older.unwrap_or(*operator);
            OpName::ALL.iter().any(|&op| operators(op).contains(&wanted))
        };
        let idle: Vec<&Operator> = Operator::ALL.iter().filter(|o| !listed(o)).collect();
        assert!(idle.is_empty(), "{idle:?}");
    }

    #[test]
    fn every_condition_has_its_published_waiver_and_names_operations_of_the_waist() {
        let known = |name: &String| OpName::ALL.iter().any(|op| op.name() == *name);
        let all = [When::NoDeterministicMode, When::ManyHeads, When::WideHeads, When::Alone];
        for when in all {
            assert!(waiver(when).ops.iter().all(known), "{when:?}");
            assert!(!waiver(when).reason.is_empty());
        }
        assert!(waiver(When::MissingOperator).reason.contains("lacks"));
    }

    #[test]
    fn heads_beyond_the_vendors_limits_are_refused() {
        use pontoon_ops::{Attention, BufferId, DType, View};
        let view = |dims: [usize; 3]| View::contiguous(BufferId(0), DType::F16, dims);
        let op = |heads: usize, width: usize| {
            let documents = View::contiguous(BufferId(1), DType::I32, [2]);
            let lse = View::contiguous(BufferId(2), DType::F32, [4, heads]);
            let (q, k) = (view([4, heads, width]), view([4, 1, width]));
            Op::from(Attention { q, k, v: k, documents, scale: 1.0, out: q, lse })
        };
        assert_eq!(limits(&op(256, 768)), None);
        assert!(limits(&op(257, 64)).is_some_and(|reason| reason.contains("256")));
        assert!(limits(&op(4, 800)).is_some_and(|reason| reason.contains("768")));
    }
}
