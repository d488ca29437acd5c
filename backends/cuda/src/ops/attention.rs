//! Positions, attention over documents and over the paged cache, and the cache's writes.

use pontoon_ops::{self as ops, DType, DeviceError, Direction, RopeStyle, View};

use super::linear::Parts;
use crate::core::{Core, Done, THREADS, blocks, flat, indexable};
use crate::ffi::session::{Args, Grid};
use crate::modules::{Source, Unit};

/// Rows that a block of the attention kernels takes.
const ROWS: usize = 32;
const ATTENTION_THREADS: usize = 128;

/// A tensor of heads: where it begins, and elements from row to row and from head to head.
fn heads(core: &Core, view: &View) -> Result<[usize; 3], DeviceError> {
    Ok([core.at(view)?, view.stride(0), view.stride(1)])
}

fn with(args: Args, [at, row, head]: [usize; 3]) -> Args {
    args.at(at).int(row).int(head)
}

pub fn rope(core: &mut Core, op: &ops::Rope) -> Done {
    let (rows, count, half) = (op.x.dim(0), op.x.dim(1), op.x.dim(2) / 2);
    indexable(rows * count * half)?;
    let args = with(Args::new(), heads(core, &op.x)?);
    let args = with(args, heads(core, &op.y)?).at(core.at(&op.positions)?);
    let args = args.at(core.at(&op.cos)?).at(core.at(&op.sin)?).int(op.cos.dim(0));
    let args = args.float(if op.direction == Direction::Forward { 1.0 } else { -1.0 });
    let args = args.flag(op.style == RopeStyle::Interleaved).int(rows).int(count).int(half);
    let unit = Unit::new(Source::Elementwise, op.x.dtype);
    core.run(&unit, c"rope", flat(rows * count * half), args)
}

fn unit(dtype: DType, qk_width: usize, v_width: usize) -> Unit {
    let widths = [("QK", qk_width as i64), ("VW", v_width as i64)];
    Unit::new(Source::Attention, dtype).with(&widths)
}

fn grid(entries: usize, heads: usize) -> Grid {
    Grid { blocks: [entries, heads, 1], threads: [ATTENTION_THREADS, 1], shared_bytes: 0 }
}

/// Tiles of rows, and how many may be listed.
fn plan(core: &mut Core, parts: Parts, rows: usize) -> Result<(usize, usize), DeviceError> {
    let entries = rows.div_ceil(ROWS) + parts.count;
    Ok((parts.tiles(core, ROWS, entries)?, entries))
}

fn documents(core: &Core, view: &View) -> Result<Parts, DeviceError> {
    Ok(Parts { starts: core.at(view)?, count: view.dim(0) - 1, lengths: 0 })
}

pub fn attention(core: &mut Core, op: &ops::Attention) -> Done {
    let parts = documents(core, &op.documents)?;
    let (plan, entries) = plan(core, parts, op.q.dim(0))?;
    let mut args = Args::new();
    for view in [&op.q, &op.k, &op.v, &op.out] {
        args = with(args, heads(core, view)?);
    }
    let args = args.at(core.at(&op.lse)?).int(op.lse.stride(0)).float(op.scale);
    let args = args.int(op.q.dim(1) / op.k.dim(1)).at(plan).at(0).int(0).int(1);
    let unit = unit(op.q.dtype, op.q.dim(2), op.v.dim(2));
    core.run(&unit, c"attention", grid(entries, op.q.dim(1)), args)
}

pub fn paged_attention(core: &mut Core, op: &ops::PagedAttention) -> Done {
    let (starts, lengths) = (core.at(&op.queries)?, core.at(&op.lengths)?);
    let parts = Parts { starts, count: op.lengths.dim(0), lengths };
    let (plan, entries) = plan(core, parts, op.q.dim(0))?;
    let args = with(Args::new(), heads(core, &op.q)?);
    let cache = |view: &View| -> Result<[usize; 3], DeviceError> {
        Ok([core.at(view)?, view.dim(2) * view.dim(3), view.dim(3)])
    };
    let args = with(with(args, cache(&op.k_cache)?), cache(&op.v_cache)?);
    let args = with(args, heads(core, &op.out)?).at(0).int(0).float(op.scale);
    let args = args.int(op.q.dim(1) / op.k_cache.dim(2)).at(plan);
    let args = args.at(core.at(&op.blocks)?).int(op.blocks.dim(1)).int(op.k_cache.dim(1));
    let unit = unit(op.q.dtype, op.q.dim(2), op.v_cache.dim(3));
    core.run(&unit, c"attention", grid(entries, op.q.dim(1)), args)
}

pub fn attention_bwd(core: &mut Core, op: &ops::AttentionBwd) -> Done {
    let (rows, count, kv_heads) = (op.q.dim(0), op.q.dim(1), op.k.dim(1));
    let unit = unit(op.q.dtype, op.q.dim(2), op.v.dim(2));
    let delta = core.room(DType::F32, rows * count)?;
    let args = with(Args::new(), heads(core, &op.out)?);
    let args = with(args, heads(core, &op.dout)?).at(delta).int(rows).int(count);
    core.run(&unit, c"attention_delta", flat(32 * rows * count), args)?;
    let parts = documents(core, &op.documents)?;
    let (plan, entries) = plan(core, parts, rows)?;
    let mut words = Vec::new();
    let [q, k, v, dout] = [&op.q, &op.k, &op.v, &op.dout];
    let [dq, dk, dv] = [&op.dq, &op.dk, &op.dv];
    let strides = |view: &View| [view.stride(0), view.stride(1)];
    for view in [q, k, v, dout] {
        words.push(core.at(view)?);
    }
    words.extend([q, k, v, dout].into_iter().flat_map(strides));
    words.extend([core.at(&op.lse)?, op.lse.stride(0), delta, count, count / kv_heads]);
    for view in [dq, dk, dv] {
        words.push(core.at(view)?);
    }
    words.extend([dq, dk, dv].into_iter().flat_map(strides));
    words.extend([plan, op.scale.to_bits() as usize]);
    let words: Vec<u64> = words.into_iter().map(|word| word as u64).collect();
    let args = || Args::new().structure(&words);
    core.run(&unit, c"attention_dq", grid(entries, count), args())?;
    core.run(&unit, c"attention_dkv", grid(entries, kv_heads), args())
}

pub fn kv_write(core: &mut Core, op: &ops::KvWrite) -> Done {
    let unit = Unit::new(Source::Elementwise, op.k.dtype);
    let slots = core.at(&op.slots)?;
    for (view, cache) in [(&op.k, &op.k_cache), (&op.v, &op.v_cache)] {
        let args = with(Args::new(), heads(core, view)?).at(slots).at(core.at(cache)?);
        let args = args.int(cache.dim(0) * cache.dim(1)).int(view.dim(1)).int(view.dim(2));
        core.run(&unit, c"kv_write", blocks(view.dim(0), THREADS), args)?;
    }
    Ok(())
}
