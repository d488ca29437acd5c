//! Batch invariance: a row's bits do not depend on the other rows of its batch.
//!
//! A case is run again on some of its rows only (views sliced in place, so the rows lie where they
//! lay), and those rows' results must have the bits they had in the whole batch. Says nothing of
//! whether the bits are right: `conformance.rs` does.

use std::ops::Range;

use pontoon_ops::{Backend, DType, DeviceError, Layout, Op, View};

use crate::cases::Case;
use crate::conformance::{Finding, launch};
use crate::memory::{GUARD_BYTES, Memory};

/// A case cut down to some rows, and where their results lie.
struct Part {
    case: Case,
    results: Vec<View>,
}

/// Runs a case on a single row, on the last rows, and on all but the first; compares bits.
/// Nothing for operations whose results are no rows.
pub fn check(backend: &mut dyn Backend, case: &Case) -> Result<Option<Finding>, DeviceError> {
    let parts = parts(case);
    if parts.is_empty() {
        return Ok(None);
    }
    let whole = launch(backend, case)?;
    let mut detail = String::new();
    for part in &parts {
        let alone = launch(backend, &part.case)?;
        let differs = part.results.iter().find(|view| alone.bits(view) != whole.bits(view));
        if let Some(view) = differs {
            detail = format!("{}: {view:?} has other bits than in the batch", part.case.name);
            break;
        }
    }
    Ok(Some(Finding {
        op: case.op.name().name(),
        dtype: case.dtype.to_string(),
        check: "invariance",
        case: case.name.clone(),
        worst_error: if detail.is_empty() { 0.0 } else { f64::INFINITY },
        limit: 1.0,
        ok: detail.is_empty(),
        detail,
    }))
}

fn parts(case: &Case) -> Vec<Part> {
    match &case.op {
        Op::Attention(op) => documents(case, &op.documents),
        Op::AttentionBwd(op) => documents(case, &op.documents),
        Op::PagedAttention(op) => sequences(case, op),
        Op::GroupedMatmul(op) if op.layout != Layout::Tn => {
            groups(case, &op.offsets, &["a", "c"], &["b"])
        }
        Op::GroupedMatmulQuant(op) => groups(case, &op.offsets, &["x", "c"], &["weight", "scales"]),
        _ => slices(case),
    }
}

/// Operands whose dimension `axis` counts rows, by name, and the results among them.
fn row_operands(op: &Op) -> Vec<(&'static str, usize)> {
    let names: &[&'static str] = match op {
        Op::Cast(_) => &["src", "dst"],
        Op::Add(_) => &["a", "b", "y"],
        Op::Scale(_) => &["x", "y"],
        Op::Embed(_) => &["ids", "y"],
        Op::RmsNorm(_) => &["x", "y", "rstd"],
        Op::RmsNormBwd(_) => &["dy", "x", "rstd", "dx"],
        Op::AddRmsNorm(_) => &["x", "residual", "sum", "y", "rstd"],
        Op::AddRmsNormBwd(_) => &["dy", "dsum", "sum", "rstd", "dx"],
        Op::Matmul(op) if op.layout == Layout::Tn => return vec![("a", 1), ("c", 0)],
        Op::Matmul(_) => &["a", "c"],
        Op::MatmulQuant(_) => &["x", "c"],
        Op::Rope(_) => &["x", "positions", "y"],
        Op::SwiGlu(_) => &["gate", "up", "y"],
        Op::SwiGluBwd(_) => &["dy", "gate", "up", "dgate", "dup"],
        Op::RouterTopK(_) => &["logits", "weights", "experts"],
        Op::RouterTopKBwd(_) => &["dweights", "logits", "experts", "dlogits"],
        Op::CrossEntropy(_) => &["x", "targets", "loss", "lse"],
        Op::CrossEntropyBwd(_) => &["x", "targets", "dloss", "loss", "lse", "dx"],
        Op::TokenLogProb(_) => &["x", "targets", "logprob", "entropy"],
        Op::TokenLogProbBwd(_) => &["x", "targets", "dlogprob", "dx"],
        Op::Sample(_) => &["logits", "bias", "history", "settings", "keys", "token", "logprob"],
        _ => &[],
    };
    names.iter().map(|&name| (name, 0)).collect()
}

/// The case on the given rows of its batch only, if its operation works row by row and these are
/// fewer than all.
pub(crate) fn rows_only(case: &Case, rows: &Range<usize>) -> Option<Case> {
    let named = row_operands(&case.op);
    let (first, axis) = named.first()?;
    let operands = case.op.operands();
    let count = operands.iter().find(|operand| operand.name == *first)?.view.dim(*axis);
    if rows.len() >= count || rows.end > count {
        return None;
    }
    let mut case = case.clone();
    cut(&mut case.op, &named, rows);
    case.op.check().is_ok().then_some(case)
}

/// Slices the named operands, and gives those that are results.
fn cut(op: &mut Op, named: &[(&'static str, usize)], rows: &Range<usize>) -> Vec<View> {
    let operands = op.operands();
    let mut results = Vec::new();
    for (operand, view) in operands.iter().zip(op.views_mut()) {
        let Some((_, axis)) = named.iter().find(|(name, _)| *name == operand.name) else {
            continue;
        };
        *view = view.slice(*axis, rows.start, rows.len());
        if operand.access.writes() {
            results.push(*view);
        }
    }
    results
}

fn slices(case: &Case) -> Vec<Part> {
    let named = row_operands(&case.op);
    let Some((first, axis)) = named.first() else { return Vec::new() };
    let operands = case.op.operands();
    let found = operands.iter().find(|operand| operand.name == *first);
    let count = found.map_or(0, |operand| operand.view.dim(*axis));
    if count < 2 {
        return Vec::new();
    }
    let part = |rows: Range<usize>| {
        let mut case = case.clone();
        let results = cut(&mut case.op, &named, &rows);
        case.name = format!("rows {rows:?}");
        Part { case, results }
    };
    [count / 2..count / 2 + 1, count - 1..count, 1..count, 0..count.div_ceil(2)]
        .into_iter()
        .filter(|rows| !rows.is_empty())
        .map(part)
        .collect()
}

/// A vector of integers in a buffer of its own.
fn integers(memory: &mut Memory, values: &[usize]) -> View {
    let bytes = DType::I32.bytes(values.len()) + 2 * GUARD_BYTES;
    let buffer = memory.add(vec![0xa5; bytes]);
    let view = View::contiguous(buffer, DType::I32, [values.len()]).rebased(buffer, GUARD_BYTES);
    memory.write(&view, &values.iter().map(|&value| value as f64).collect::<Vec<_>>());
    view
}

/// Each document of a packed batch alone.
fn documents(case: &Case, starts: &View) -> Vec<Part> {
    let named = ["q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv"].map(|name| (name, 0));
    let bounds = case.memory.read_integers(starts);
    let spans = bounds.windows(2).map(|pair| pair[0] as usize..pair[1] as usize);
    let part = |rows: Range<usize>| {
        let mut case = case.clone();
        let results = cut(&mut case.op, &named, &rows);
        let alone = integers(&mut case.memory, &[0, rows.len()]);
        match &mut case.op {
            Op::Attention(op) => op.documents = alone,
            Op::AttentionBwd(op) => op.documents = alone,
            _ => unreachable!("called for attention only"),
        }
        case.name = format!("document {rows:?}");
        Part { case, results }
    };
    spans.filter(|rows| !rows.is_empty()).map(part).collect()
}

/// Each sequence of a decoding batch alone, and without its earlier queries.
fn sequences(case: &Case, op: &pontoon_ops::PagedAttention) -> Vec<Part> {
    let bounds = case.memory.read_integers(&op.queries);
    let mut parts = Vec::new();
    for (sequence, pair) in bounds.windows(2).enumerate() {
        let all = pair[0] as usize..pair[1] as usize;
        let last = all.end.saturating_sub(1)..all.end;
        for rows in [all.clone(), last].into_iter().filter(|_| !all.is_empty()) {
            let mut case = case.clone();
            let mut results = cut(&mut case.op, &[("q", 0), ("out", 0)], &rows);
            let alone = sequence..sequence + 1;
            results.extend(cut(&mut case.op, &[("blocks", 0), ("lengths", 0)], &alone));
            let queries = integers(&mut case.memory, &[0, rows.len()]);
            if let Op::PagedAttention(op) = &mut case.op {
                op.queries = queries;
            }
            case.name = format!("sequence {sequence}, rows {rows:?}");
            parts.push(Part { case, results });
        }
    }
    parts
}

/// Each expert's rows alone, with its own weight only, and one of its rows. `by_row` names the
/// operands that have a row for each, `by_group` those that have a matrix for each expert.
fn groups(
    case: &Case,
    offsets: &View,
    by_row: &[&'static str],
    by_group: &[&'static str],
) -> Vec<Part> {
    let along_first = |names: &[&'static str]| -> Vec<(&'static str, usize)> {
        names.iter().map(|&name| (name, 0)).collect()
    };
    let (by_row, by_group) = (along_first(by_row), along_first(by_group));
    let bounds = case.memory.read_integers(offsets);
    let mut parts = Vec::new();
    for (group, pair) in bounds.windows(2).enumerate() {
        let all = pair[0] as usize..pair[1] as usize;
        let last = all.end.saturating_sub(1)..all.end;
        for rows in [all.clone(), last].into_iter().filter(|_| !all.is_empty()) {
            let mut case = case.clone();
            let results = cut(&mut case.op, &by_row, &rows);
            cut(&mut case.op, &by_group, &(group..group + 1));
            let alone = integers(&mut case.memory, &[0, rows.len()]);
            match &mut case.op {
                Op::GroupedMatmul(op) => op.offsets = alone,
                Op::GroupedMatmulQuant(op) => op.offsets = alone,
                _ => unreachable!("called for grouped products only"),
            }
            case.name = format!("expert {group}, rows {rows:?}");
            parts.push(Part { case, results });
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::all;

    #[test]
    fn every_part_of_a_batch_keeps_its_operations_contract_and_has_results() {
        let cases = all(3);
        let parts: Vec<Part> = cases.iter().flat_map(parts).collect();
        assert!(parts.len() > 300, "only {} parts", parts.len());
        for part in parts {
            part.case.op.check().unwrap_or_else(|e| panic!("{}: {e}", part.case.name));
            assert!(!part.results.is_empty(), "{} {}", part.case.op.name().name(), part.case.name);
        }
    }
}
