//! Moving, converting and combining elements, and token embedding.
//!
//! Ids that do not exist are looked for on the host where it knows them, else on the device.

use pontoon_ops::{self as ops, Accumulate, DType, DeviceError, View};

use crate::core::{Core, Done};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;
use crate::tensor::{Kind, Tensor};

pub(super) fn copy(core: &mut Core, op: &ops::Copy) -> Done {
    let (from, to) = (core.tensor(&op.src)?, core.tensor(&op.dst)?);
    core.copy(to, from)
}

pub(super) fn cast(core: &mut Core, op: &ops::Cast) -> Done {
    let (from, to) = (core.tensor(&op.src)?, core.tensor(&op.dst)?);
    // The waist's Cast between equal types moves; the vendor's may be refused.
    if from.kind == to.kind { core.copy(to, from) } else { core.cast(from, to) }
}

pub(super) fn fill(core: &mut Core, op: &ops::Fill) -> Done {
    let to = core.tensor(&op.dst)?;
    match op.dst.dtype {
        DType::I32 => core.fill_integer(to, op.value.round_ties_even() as i64),
        _ => core.fill(to, op.value),
    }
}

pub(super) fn add(core: &mut Core, op: &ops::Add) -> Done {
    let (mut a, b, y) = (core.tensor(&op.a)?, core.tensor(&op.b)?, core.tensor(&op.y)?);
    // The vendor's result has the operands' common extents, so one of them must have them all.
    let both = |axis: usize| a.dim(axis) == 1 && b.dim(axis) == 1 && y.dim(axis) > 1;
    if (0..y.rank()).any(both) {
        let whole = core.scratch(a.kind, y.dims())?;
        core.copy(whole, a)?;
        a = whole;
    }
    core.add(a, b, y)
}

pub(super) fn scale(core: &mut Core, op: &ops::Scale) -> Done {
    let (x, y) = (core.tensor(&op.x)?, core.tensor(&op.y)?);
    core.scale(x, op.factor, y)
}

/// Indices that all exist, and which of them did not before.
pub(super) struct Index {
    /// i32, in range.
    pub index: Tensor,
    /// Where they were replaced by zero, `[rows, 1]`; absent if none was.
    pub bad: Option<Tensor>,
}

/// Makes indices safe to look up with.
pub(super) fn in_range(core: &mut Core, view: &View, count: usize) -> Result<Index, DeviceError> {
    let index = core.tensor(view)?;
    let fits = |id: i32| usize::try_from(id).is_ok_and(|id| id < count);
    if core.known_integers(view).is_some_and(|ids| ids.into_iter().all(fits)) {
        return Ok(Index { index, bad: None });
    }
    let bad = core.outside(index, count)?;
    let zero = core.integers(&[1], &[0])?;
    let safe = core.scratch(Kind::I32, index.dims())?;
    core.choose(bad, zero, index, safe)?;
    Ok(Index { index: safe, bad: Some(bad.reshape(&[index.dim(0), 1])) })
}

pub(super) fn embed(core: &mut Core, op: &ops::Embed) -> Done {
    let (table, y) = (core.tensor(&op.table)?, core.tensor(&op.y)?);
    let ids = in_range(core, &op.ids, table.dim(0))?;
    let target = core.target(y)?;
    core.select(table, 0, ids.index, target)?;
    if let Some(bad) = ids.bad {
        core.fill_where(target, bad, f32::NAN)?;
    }
    core.settle(target, y)
}

pub(super) fn embed_bwd(core: &mut Core, op: &ops::EmbedBwd) -> Done {
    let (dy, dtable) = (core.tensor(&op.dy)?, core.tensor(&op.dtable)?);
    if op.accumulate == Accumulate::Overwrite {
        core.zero(dtable)?;
    }
    if dy.elements() == 0 {
        return Ok(());
    }
    let ids = in_range(core, &op.ids, dtable.dim(0))?;
    let mut rows = core.wide(dy)?;
    if let Some(bad) = ids.bad {
        if rows == dy {
            rows = core.scratch(Kind::F32, dy.dims())?;
            core.copy(rows, dy)?;
        }
        core.fill_where(rows, bad, 0.0)?;
    }
    let index = core.dense(ids.index)?;
    let arguments = [
        dtable.into(),
        Argument::Tensors(vec![index]),
        rows.into(),
        Argument::Flag(true),
        Argument::Flag(false),
    ];
    core.call(Operator::IndexPutImpl, &arguments)
}
