//! Rotary positions, attention over packed documents and over the paged cache, and the cache.
//!
//! Both attentions are one vendor call on the same rows, so that training, prefill and decoding
//! agree. It wants on the host where documents and sequences end. Read next: `memory.rs`.

use std::collections::HashMap;

use pontoon_ops::{self as ops, DeviceError, DeviceErrorKind, Direction, RopeStyle, View};

use super::memory::{Index, in_range};
use crate::core::{Core, Done};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;
use crate::tensor::{Kind, Tensor};

/// Sequences that the vendor takes in one call.
const SEQUENCES_MAX: usize = 2048;
/// Extent of the triangular mask that the vendor's causal modes want, whatever the lengths.
const MASK_EXTENT: usize = 2048;
/// The vendor returns each row's softmax statistics this many times.
const COPIES: usize = 8;
/// The mode in which a sequence's last query meets its last key, and earlier ones earlier.
const CAUSAL_FROM_THE_END: i64 = 3;
/// Bytes of keys and values that are gathered from the cache at a time, unless one sequence alone
/// has more.
const GATHERED_MAX: usize = 256 << 20;

/// The rows' entries of a table, NaN where there is none, `[rows, 1, width / 2]`.
fn angles(
    core: &mut Core,
    table: &View,
    positions: &Index,
    rows: usize,
) -> Result<Tensor, DeviceError> {
    let table = core.tensor(table)?;
    let own = core.scratch(Kind::F32, &[rows, table.dim(1)])?;
    core.select(table, 0, positions.index, own)?;
    if let Some(bad) = positions.bad {
        core.fill_where(own, bad, f32::NAN)?;
    }
    Ok(own.widen(1))
}

pub(super) fn rope(core: &mut Core, op: &ops::Rope) -> Done {
    let (x, y) = (core.tensor(&op.x)?, core.tensor(&op.y)?);
    let half = x.dim(2) / 2;
    let positions = in_range(core, &op.positions, op.cos.dim(0))?;
    let cos = angles(core, &op.cos, &positions, x.dim(0))?;
    let sin = angles(core, &op.sin, &positions, x.dim(0))?;
    let pair = |tensor: &Tensor| match op.style {
        RopeStyle::HalfSplit => (tensor.slice(2, 0, half), tensor.slice(2, half, half)),
        RopeStyle::Interleaved => (tensor.stepped(2, 0, 2), tensor.stepped(2, 1, 2)),
    };
    let ((u, w), (low, high)) = (pair(&x), pair(&y));
    let dims = [x.dim(0), x.dim(1), half];
    let mut products = [cos; 4];
    for (product, (part, angle)) in
        products.iter_mut().zip([(u, cos), (w, sin), (w, cos), (u, sin)])
    {
        *product = core.scratch(Kind::F32, &dims)?;
        core.mul(part, angle, *product)?;
    }
    let [u_cos, w_sin, w_cos, u_sin] = products;
    match op.direction {
        Direction::Forward => {
            core.sub(u_cos, w_sin, low)?;
            core.add(w_cos, u_sin, high)
        }
        Direction::Backward => {
            core.add(u_cos, w_sin, low)?;
            core.sub(w_cos, u_sin, high)
        }
    }
}

/// What one call of the vendor's attention is about.
struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Where each sequence's queries end.
    q_ends: Vec<i64>,
    /// Where each sequence's keys end.
    k_ends: Vec<i64>,
    scale: f32,
}

/// Heads made wider by zeros, which change no score.
fn padded(core: &mut Core, heads: Tensor, width: usize) -> Result<Tensor, DeviceError> {
    if heads.dim(2) >= width {
        return Ok(heads);
    }
    let wide = core.scratch(heads.kind, &[heads.dim(0), heads.dim(1), width])?;
    core.zero(wide)?;
    core.copy(wide.slice(2, 0, heads.dim(2)), heads)?;
    Ok(wide)
}

/// The attributes that every call gives, from the scale to the mode; newer versions have one more.
fn attributes(call: &Call, newer: bool) -> Vec<Argument> {
    let everything = Argument::I64(i64::from(i32::MAX));
    let mut all = vec![
        Argument::F64(f64::from(call.scale)),
        Argument::F64(1.0),
        everything.clone(),
        everything,
        Argument::I64(call.q.dim(1) as i64),
        Argument::Text(c"TND"),
        Argument::I64(0),
        Argument::I64(CAUSAL_FROM_THE_END),
    ];
    if newer {
        all.push(Argument::I64(1));
    }
    all
}

fn ends(call: &Call, newer: bool) -> Vec<Argument> {
    let mut all = vec![
        Argument::Absent,
        Argument::Integers(call.q_ends.clone()),
        Argument::Integers(call.k_ends.clone()),
    ];
    if newer {
        all.extend([Argument::Absent, Argument::Absent]);
    }
    all
}

impl Call {
    /// Writes the result and, if wanted, the logarithm of each row's sum of exponentials.
    fn run(&self, core: &mut Core, out: Tensor, lse: Option<Tensor>) -> Done {
        let versions = [Operator::FlashAttentionVarLenScoreV2, Operator::FlashAttentionVarLenScore];
        let operator = core.newest(&versions)?;
        let newer = operator == versions[0];
        let width = self.v.dim(2);
        let (q, k) = (padded(core, self.q, width)?, padded(core, self.k, width)?);
        let mask = core.causal_mask(MASK_EXTENT)?;
        let dims = [q.dim(0), q.dim(1), COPIES];
        let (peak, sum) = (core.scratch(Kind::F32, &dims)?, core.scratch(Kind::F32, &dims)?);
        let target = core.target(out)?;
        let mut arguments: Vec<Argument> = vec![q.into(), k.into(), self.v.into()];
        arguments.extend([Argument::Absent, Argument::Absent, Argument::Absent, mask.into()]);
        arguments.extend(ends(self, newer));
        arguments.extend(attributes(self, newer));
        arguments.extend([peak.into(), sum.into(), Argument::Absent, target.into()]);
        core.call(operator, &arguments)?;
        core.settle(target, out)?;
        let Some(lse) = lse else { return Ok(()) };
        let first = |all: Tensor| all.slice(2, 0, 1).join(1).expect("one element joins any row");
        let log = core.scratch(Kind::F32, lse.dims())?;
        core.log(first(sum), log)?;
        core.add(first(peak), log, lse)
    }

    /// Writes the gradients, from the forward's results.
    fn run_backward(&self, core: &mut Core, forward: &Forward, to: [Tensor; 3]) -> Done {
        let versions = [
            Operator::FlashAttentionUnpaddingScoreGradV2,
            Operator::FlashAttentionUnpaddingScoreGrad,
        ];
        let operator = core.newest(&versions)?;
        let newer = operator == versions[0];
        let width = self.v.dim(2);
        let (q, k) = (padded(core, self.q, width)?, padded(core, self.k, width)?);
        let mask = core.causal_mask(MASK_EXTENT)?;
        let dims = [q.dim(0), q.dim(1), COPIES];
        // exp(score - lse) / 1 is the probability, so the log-sum stands for the maximum.
        let (peak, sum) = (core.scratch(Kind::F32, &dims)?, core.scratch(Kind::F32, &dims)?);
        core.copy(peak, forward.lse.widen(2))?;
        core.fill(sum, 1.0)?;
        let mut targets = to;
        for (target, (wanted, wide)) in targets.iter_mut().zip(to.into_iter().zip([q, k, self.v])) {
            *target = match wanted.dim(2) == wide.dim(2) {
                true => core.target(wanted)?,
                false => core.scratch(wanted.kind, wide.dims())?,
            };
        }
        let inputs = [q, k, self.v, forward.dout].map(Argument::from);
        let mut arguments = inputs.to_vec();
        arguments.extend([Argument::Absent, Argument::Absent, Argument::Absent, mask.into()]);
        arguments.extend([peak.into(), sum.into(), Argument::Absent, forward.out.into()]);
        arguments.extend(ends(self, newer));
        arguments.extend(attributes(self, newer));
        arguments.extend(targets.map(Argument::from));
        arguments.push(Argument::Absent);
        core.call(operator, &arguments)?;
        for (target, wanted) in targets.into_iter().zip(to) {
            core.settle(target.slice(2, 0, wanted.dim(2)), wanted)?;
        }
        Ok(())
    }
}

/// What the backward call reads of the forward one.
struct Forward {
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
}

/// The documents' ends, from their starts padded by repeating the last.
fn document_ends(
    core: &mut Core,
    documents: &View,
    rows: usize,
) -> Result<Vec<usize>, DeviceError> {
    let starts = core.fetch_integers(documents)?;
    let mut ends = Vec::new();
    for &start in &starts {
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        let last = ends.last().copied().unwrap_or(0);
        if start > rows || start < last {
            let text = format!("documents should ascend to {rows} but are {starts:?}");
            return Err(DeviceError::new(DeviceErrorKind::BadArgument, text));
        }
        if start > last {
            ends.push(start);
        }
    }
    if ends.last() != Some(&rows) && rows > 0 {
        let text = format!("documents should end at {rows} but are {starts:?}");
        return Err(DeviceError::new(DeviceErrorKind::BadArgument, text));
    }
    Ok(ends)
}

/// Rows and ends of each call: the vendor takes only so many sequences at a time.
fn calls(ends: &[usize]) -> Vec<(usize, usize, Vec<i64>)> {
    let mut first = 0;
    let part = |ends: &[usize]| {
        let start = first;
        first = ends.last().copied().unwrap_or(first);
        (start, first - start, ends.iter().map(|end| (end - start) as i64).collect())
    };
    ends.chunks(SEQUENCES_MAX).map(part).collect()
}

pub(super) fn attention(core: &mut Core, op: &ops::Attention) -> Done {
    let (q, k, v) = (core.tensor(&op.q)?, core.tensor(&op.k)?, core.tensor(&op.v)?);
    let (out, lse) = (core.tensor(&op.out)?, core.tensor(&op.lse)?);
    let ends = document_ends(core, &op.documents, q.dim(0))?;
    for (start, count, ends) in calls(&ends) {
        let rows = |all: Tensor| all.slice(0, start, count);
        let (q_ends, k_ends) = (ends.clone(), ends);
        let (q, k, v) = (rows(q), rows(k), rows(v));
        let call = Call { q, k, v, q_ends, k_ends, scale: op.scale };
        call.run(core, rows(out), Some(rows(lse)))?;
    }
    Ok(())
}

pub(super) fn attention_bwd(core: &mut Core, op: &ops::AttentionBwd) -> Done {
    let (q, k, v) = (core.tensor(&op.q)?, core.tensor(&op.k)?, core.tensor(&op.v)?);
    let (out, lse, dout) = (core.tensor(&op.out)?, core.tensor(&op.lse)?, core.tensor(&op.dout)?);
    let (dq, dk, dv) = (core.tensor(&op.dq)?, core.tensor(&op.dk)?, core.tensor(&op.dv)?);
    let ends = document_ends(core, &op.documents, q.dim(0))?;
    for (start, count, ends) in calls(&ends) {
        let rows = |all: Tensor| all.slice(0, start, count);
        let (q_ends, k_ends) = (ends.clone(), ends);
        let (q, k, v) = (rows(q), rows(k), rows(v));
        let call = Call { q, k, v, q_ends, k_ends, scale: op.scale };
        let forward = Forward { out: rows(out), lse: rows(lse), dout: rows(dout) };
        call.run_backward(core, &forward, [dq, dk, dv].map(rows))?;
    }
    Ok(())
}

/// One sequence of the cache with new queries.
struct Sequence {
    first_query: usize,
    queries: usize,
    /// Where each of its cached positions lies, over all blocks.
    slots: Vec<i32>,
}

fn sequences(core: &mut Core, op: &ops::PagedAttention) -> Result<Vec<Sequence>, DeviceError> {
    let (rows, count, block) = (op.q.dim(0), op.k_cache.dim(0), op.k_cache.dim(1));
    let blocks = core.fetch_integers(&op.blocks)?;
    let lengths = core.fetch_integers(&op.lengths)?;
    let queries = core.fetch_integers(&op.queries)?;
    let bad = |what: String| DeviceError::new(DeviceErrorKind::BadArgument, what);
    let per_sequence = op.blocks.dim(1);
    let mut found = Vec::new();
    for (index, (pair, &length)) in queries.windows(2).zip(&lengths).enumerate() {
        let [first, end] = [pair[0], pair[1]].map(|at| usize::try_from(at).unwrap_or(usize::MAX));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if first > end || end > rows {
            return Err(bad(format!("queries of sequence {index} are {first}..{end} of {rows}")));
        }
        if first == end {
            continue;
        }
        if end - first > length || length > per_sequence * block {
            return Err(bad(format!("sequence {index} has {length} cached positions")));
        }
        let slot = |position: usize| {
            let number = blocks[index * per_sequence + position / block];
            let known = usize::try_from(number).is_ok_and(|number| number < count);
            known.then(|| number * block as i32 + (position % block) as i32)
        };
        let slots: Option<Vec<i32>> = (0..length).map(slot).collect();
        let slots = slots.ok_or_else(|| bad(format!("sequence {index} names no block")))?;
        found.push(Sequence { first_query: first, queries: end - first, slots });
    }
    Ok(found)
}

pub(super) fn paged_attention(core: &mut Core, op: &ops::PagedAttention) -> Done {
    let all = sequences(core, op)?;
    let cached = |view: &View| view.dim(2) * view.dim(3) * view.dtype.bytes(1);
    let position_bytes = cached(&op.k_cache) + cached(&op.v_cache);
    let mut rest = &all[..];
    while !rest.is_empty() {
        let mut count = 1;
        let mut bytes = rest[0].slots.len() * position_bytes;
        while count < rest.len().min(SEQUENCES_MAX) && follows(&rest[count - 1], &rest[count]) {
            bytes += rest[count].slots.len() * position_bytes;
            if bytes > GATHERED_MAX {
                break;
            }
            count += 1;
        }
        let (now, later) = rest.split_at(count);
        let mark = core.scratch.mark();
        paged_part(core, op, now)?;
        core.scratch.release(mark);
        rest = later;
    }
    Ok(())
}

/// Whether one sequence's queries lie right behind another's.
fn follows(first: &Sequence, second: &Sequence) -> bool {
    first.first_query + first.queries == second.first_query
}

fn paged_part(core: &mut Core, op: &ops::PagedAttention, part: &[Sequence]) -> Done {
    let slots: Vec<i32> = part.iter().flat_map(|sequence| sequence.slots.iter().copied()).collect();
    let index = core.integers(&[slots.len()], &slots)?;
    let gathered = |core: &mut Core, cache: &View| -> Result<Tensor, DeviceError> {
        let cache = core.tensor(cache)?;
        let (heads, width) = (cache.dim(2), cache.dim(3));
        let flat = cache.reshape(&[cache.dim(0) * cache.dim(1), heads * width]);
        let rows = core.scratch(cache.kind, &[slots.len(), heads * width])?;
        core.select(flat, 0, index, rows)?;
        Ok(rows.reshape(&[slots.len(), heads, width]))
    };
    let (k, v) = (gathered(core, &op.k_cache)?, gathered(core, &op.v_cache)?);
    let running = |lengths: &mut dyn Iterator<Item = usize>| -> Vec<i64> {
        let mut end = 0;
        lengths
            .map(|length| {
                end += length as i64;
                end
            })
            .collect()
    };
    let q_ends = running(&mut part.iter().map(|sequence| sequence.queries));
    let k_ends = running(&mut part.iter().map(|sequence| sequence.slots.len()));
    let first = part.first().map_or(0, |sequence| sequence.first_query);
    let count = part.iter().map(|sequence| sequence.queries).sum();
    let (q, out) = (core.tensor(&op.q)?.slice(0, first, count), core.tensor(&op.out)?);
    let call = Call { q, k, v, q_ends, k_ends, scale: op.scale };
    call.run(core, out.slice(0, first, count), None)
}

pub(super) fn kv_write(core: &mut Core, op: &ops::KvWrite) -> Done {
    let slots = core.fetch_integers(&op.slots)?;
    let count = op.k_cache.dim(0) * op.k_cache.dim(1);
    let valid = |slot: i32| usize::try_from(slot).is_ok_and(|slot| slot < count);
    // Of rows for the same slot the last one stays.
    let last: HashMap<i32, usize> =
        slots.iter().enumerate().map(|(row, &slot)| (slot, row)).collect();
    let kept: Vec<(i32, i32)> = slots
        .iter()
        .enumerate()
        .filter(|&(row, &slot)| valid(slot) && last.get(&slot) == Some(&row))
        .map(|(row, &slot)| (row as i32, slot))
        .collect();
    if kept.is_empty() {
        return Ok(());
    }
    let (rows, places): (Vec<i32>, Vec<i32>) = kept.into_iter().unzip();
    let index = core.integers(&[places.len(), 1], &places)?;
    for (from, cache) in [(&op.k, &op.k_cache), (&op.v, &op.v_cache)] {
        let (from, cache) = (core.tensor(from)?, core.tensor(cache)?);
        let width = from.dim(1) * from.dim(2);
        let mut new = core.dense(from)?.reshape(&[slots.len(), width]);
        if rows.len() < slots.len() {
            let chosen = core.integers(&[rows.len()], &rows)?;
            let picked = core.scratch(new.kind, &[rows.len(), width])?;
            core.select(new, 0, chosen, picked)?;
            new = picked;
        }
        core.place_rows(cache.reshape(&[count, width]), index, new)?;
    }
    Ok(())
}
