//! Which vendor operators each operation of the waist calls, and what follows from it: what a
//! device with an older library cannot do, and the table in `docs/ascend.md`.
//!
//! Reasons stand in `waivers.toml`. Read next: `ops.rs`.

use std::collections::BTreeMap;

use pontoon_ops::{Op, OpName};

use crate::ffi::table::Operator::{self, *};

/// The waivers as they are published.
const WAIVERS: &str = include_str!("../waivers.toml");

/// Heads and widths that the vendor's attention takes.
const HEADS_MAX: usize = 256;
const WIDTH_MAX: usize = 768;

/// The operators an operation may call. Of versions that stand for one another, one is enough:
/// they are listed under [`VERSIONS`].
pub fn operators(op: OpName) -> &'static [Operator] {
    match op {
        OpName::Copy => &[InplaceCopy],
        OpName::Cast => &[Cast, InplaceCopy],
        OpName::Fill => &[InplaceFillScalar],
        OpName::Add => &[Add, InplaceCopy],
        OpName::Scale => &[Muls],
        OpName::Embed => &[
            IndexSelect,
            LtScalar,
            GeScalar,
            LogicalOr,
            SWhere,
            InplaceMaskedFillScalar,
            InplaceCopy,
        ],
        OpName::EmbedBwd => &[
            IndexPutImpl,
            InplaceZero,
            Cast,
            LtScalar,
            GeScalar,
            LogicalOr,
            SWhere,
            InplaceMaskedFillScalar,
            InplaceCopy,
        ],
        OpName::RmsNorm => &[RmsNorm, InplaceCopy],
        OpName::RmsNormBwd => &[RmsNormGrad, Add, InplaceCopy],
        OpName::AddRmsNorm => &[Add, RmsNorm, InplaceCopy],
        OpName::AddRmsNormBwd => &[RmsNormGrad, Add, Cast, InplaceCopy],
        OpName::Matmul => &[Matmul, Add, InplaceCopy, InplaceZero],
        OpName::MatmulQuant => &[Cast, IndexSelect, Mul, Matmul, InplaceCopy],
        OpName::GroupedMatmul => {
            &[GroupedMatmulV4, GroupedMatmulAdd, Cast, Add, InplaceCopy, InplaceZero]
        }
        OpName::Rope => &[
            IndexSelect,
            Mul,
            Sub,
            Add,
            LtScalar,
            GeScalar,
            LogicalOr,
            SWhere,
            InplaceMaskedFillScalar,
        ],
        OpName::Attention => &[FlashAttentionVarLenScore, Log, Add, InplaceCopy, InplaceZero],
        OpName::AttentionBwd => {
            &[FlashAttentionUnpaddingScoreGrad, InplaceFillScalar, InplaceCopy, InplaceZero]
        }
        OpName::PagedAttention => {
            &[IndexSelect, FlashAttentionVarLenScore, InplaceCopy, InplaceZero]
        }
        OpName::KvWrite => &[ScatterNdUpdate, IndexSelect, InplaceCopy],
        OpName::SwiGlu => &[Silu, Mul],
        OpName::SwiGluBwd => &[SwiGluGrad, InplaceCopy],
        OpName::RouterTopK => &[
            NeTensor,
            Cast,
            ReduceSum,
            GtScalar,
            InplaceMaskedFillScalar,
            Softmax,
            Sigmoid,
            Add,
            Sort,
            InplaceScatter,
            EqScalar,
            Gather,
            Adds,
            Div,
            Muls,
            SWhere,
            InplaceCopy,
            InplaceZero,
            InplaceFillScalar,
        ],
        OpName::RouterTopKBwd => &[
            Softmax,
            Sigmoid,
            Cast,
            Gather,
            ReduceSum,
            Adds,
            Mul,
            Div,
            Sub,
            Muls,
            InplaceScatter,
            SoftmaxBackward,
            SigmoidBackward,
            InplaceZero,
            InplaceCopy,
        ],
        OpName::Permute => &[
            LtScalar,
            GeScalar,
            LogicalOr,
            SWhere,
            Cast,
            Sort,
            IndexSelect,
            LtTensor,
            ReduceSum,
            InplaceCopy,
        ],
        OpName::PermuteBwd => &[IndexSelect, Cast, ReduceSum, InplaceCopy],
        OpName::Unpermute => &[IndexSelect, Mul, ReduceSum, InplaceCopy],
        OpName::UnpermuteBwd => &[Mul, ScatterNdUpdate, IndexSelect, Cast, ReduceSum, InplaceCopy],
        OpName::CrossEntropy => LOSS,
        OpName::TokenLogProb => LOSS,
        OpName::CrossEntropyBwd => LOSS,
        OpName::TokenLogProbBwd => LOSS,
        OpName::AdamW => &[ApplyAdamWV2, Muls, Cast],
        OpName::Muon => &[Muls, Add, LinalgVectorNorm, Adds, Div, Matmul, Sub, Cast],
        OpName::SumSquares => &[LinalgVectorNorm, Mul, InplaceZero],
        OpName::ReduceTree => &[Cast, Add, InplaceCopy],
        OpName::Sample => &[
            InplaceCopy,
            IndexSelect,
            Div,
            Mul,
            GtScalar,
            SWhere,
            Sub,
            ScatterNdUpdate,
            Add,
            IsFinite,
            Cast,
            ReduceSum,
            EqScalar,
            NeTensor,
            InplaceMaskedFillScalar,
            ArgMax,
            Amax,
            Exp,
            Sort,
            Cumsum,
            LeTensor,
            LtTensor,
            InplaceScatter,
            Gather,
            Log,
        ],
        OpName::AllReduce | OpName::ReduceScatter => &[Cast, Add, InplaceCopy],
        OpName::AllGather => &[],
    }
}

const LOSS: &[Operator] = &[
    Matmul,
    Muls,
    Amax,
    Sub,
    Exp,
    ReduceSum,
    Log,
    Add,
    Gather,
    Cast,
    Mul,
    Div,
    InplaceScatter,
    InplaceCopy,
    InplaceZero,
    LtScalar,
    GeScalar,
    EqScalar,
    LogicalOr,
    SWhere,
    InplaceMaskedFillScalar,
];

/// Newer versions that may stand for the operator that is listed.
pub const VERSIONS: [(Operator, Operator); 3] = [
    (GroupedMatmulV4, GroupedMatmulV5),
    (FlashAttentionVarLenScore, FlashAttentionVarLenScoreV2),
    (FlashAttentionUnpaddingScoreGrad, FlashAttentionUnpaddingScoreGradV2),
];

/// Operations whose calls have fixed bits only in deterministic mode, by the vendor's docs.
const NEED_DETERMINISM: [OpName; 4] =
    [OpName::EmbedBwd, OpName::RmsNormBwd, OpName::AddRmsNormBwd, OpName::AttentionBwd];

/// The operations a device cannot do: `has` tells which operators its library has.
pub fn waived(has: &dyn Fn(Operator) -> bool, determinism: i64) -> BTreeMap<OpName, &'static str> {
    let there = |operator: Operator| {
        let newer = VERSIONS.iter().find(|(listed, _)| *listed == operator);
        has(operator) || newer.is_some_and(|(_, newer)| has(*newer))
    };
    let mut all = BTreeMap::new();
    for &op in OpName::ALL {
        if determinism == 0 && NEED_DETERMINISM.contains(&op) {
            all.insert(op, "the library refuses deterministic mode, without which bits vary");
        }
        if operators(op).iter().any(|&operator| !there(operator)) {
            all.insert(op, "the installed library lacks an operator this needs; see `devices`");
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
    match () {
        () if q.dim(1) > HEADS_MAX => Some("attention takes at most 256 query heads"),
        () if width > WIDTH_MAX => Some("attention takes heads of at most 768 elements"),
        () => None,
    }
}

/// The published waivers: operation and reason.
pub fn published() -> Result<Vec<(String, String)>, String> {
    let table: toml::Table = WAIVERS.parse().map_err(|error| format!("waivers.toml: {error}"))?;
    let entries = table.get("waiver").and_then(toml::Value::as_array).cloned().unwrap_or_default();
    let text = |entry: &toml::Value, key: &str| {
        let value = entry.get(key).and_then(toml::Value::as_str);
        value.map(str::to_owned).ok_or_else(|| format!("waivers.toml: an entry has no `{key}`"))
    };
    entries.iter().map(|entry| Ok((text(entry, "op")?, text(entry, "reason")?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_operator_waives_what_calls_it_and_nothing_else() {
        let waived = waived(&|operator| operator != Silu, 1);
        assert_eq!(waived.keys().collect::<Vec<_>>(), [&OpName::SwiGlu]);
    }

    #[test]
    fn a_newer_version_stands_for_the_listed_one() {
        assert!(waived(&|operator| operator != GroupedMatmulV4, 1).is_empty());
        let neither = waived(&|o| ![GroupedMatmulV4, GroupedMatmulV5].contains(&o), 1);
        assert_eq!(neither.keys().collect::<Vec<_>>(), [&OpName::GroupedMatmul]);
    }

    #[test]
    fn without_deterministic_mode_no_gradient_with_varying_bits_is_offered() {
        assert_eq!(waived(&|_| true, 0).len(), NEED_DETERMINISM.len());
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
    fn published_waivers_name_operations_of_the_waist() {
        for (op, reason) in published().unwrap() {
            assert!(OpName::ALL.iter().any(|known| known.name() == op), "{op}");
            assert!(!reason.is_empty(), "{op}");
        }
    }
}
