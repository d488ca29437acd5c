//! Positions, attention over documents and over the paged cache, and the cache's writes.

use pontoon_ops::{self as ops, DType, DeviceError, Direction, RopeStyle, View};

use super::linear::Parts;
use crate::core::{Core, Done, THREADS, blocks, flat, indexable};
use crate::ffi::session::{Args, Grid};
use crate::modules::{Source, Unit};

/// Rows that a block takes, with tensor cores and without.
const ROWS: [usize; 2] = [64, 32];
const ATTENTION_THREADS: usize = 128;
/// Widths that are taken by tensor cores: multiples of the first up to the last.
const FAST_MULTIPLE: usize = 16;
const FAST_KEY_WIDTHS: [usize; 2] = [64, 192];
const FAST_VALUE_WIDTH_MAX: usize = 128;
/// Elements by which rows in shared memory are apart beyond their width.
const PITCH_MORE: usize = 8;

/// The kernels for a storage type and widths. An operation over documents and one over the cache
/// must take the same, so nothing else decides.
#[derive(Clone, Copy)]
struct Kernels {
    dtype: DType,
    qk_width: usize,
    v_width: usize,
}

/// How many tiles of keys' and values' width lie in shared memory.
#[derive(Clone, Copy)]
struct Tiles {
    keys: usize,
    values: usize,
}

impl Kernels {
    fn is_fast(self) -> bool {
        let [least, most] = FAST_KEY_WIDTHS;
        let fits = (least..=most).contains(&self.qk_width) && self.v_width <= FAST_VALUE_WIDTH_MAX;
        let whole = [self.qk_width, self.v_width].iter().all(|w| w.is_multiple_of(FAST_MULTIPLE));
        self.dtype != DType::F32 && fits && whole
    }

    fn unit(self) -> Unit {
        let source = if self.is_fast() { Source::AttentionFast } else { Source::Attention };
        let widths = [("QK", self.qk_width as i64), ("VW", self.v_width as i64)];
        Unit::new(source, self.dtype).with(&widths)
    }

    fn rows(self) -> usize {
        if self.is_fast() { ROWS[0] } else { ROWS[1] }
    }

    fn grid(self, entries: usize, heads: usize, tiles: Tiles) -> Grid {
        let row =
            tiles.keys * (self.qk_width + PITCH_MORE) + tiles.values * (self.v_width + PITCH_MORE);
        let shared_bytes = if self.is_fast() { self.dtype.bytes(ROWS[0] * row) } else { 0 };
        Grid { blocks: [entries, heads, 1], threads: [ATTENTION_THREADS, 1], shared_bytes }
    }

    /// Tiles of rows, and how many may be listed.
    fn plan(
        self,
        core: &mut Core,
        parts: Parts,
        rows: usize,
    ) -> Result<(usize, usize), DeviceError> {
        let entries = rows.div_ceil(self.rows()) + parts.count;
        Ok((parts.tiles(core, self.rows(), entries)?, entries))
    }
}

/// Whether 16-bit rows of these tensors of heads begin at multiples of 16 bytes.
fn whole(tensors: &[[usize; 3]]) -> bool {
    tensors.iter().all(|[at, row, head]| at.is_multiple_of(16) && (row | head).is_multiple_of(8))
}

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

fn documents(core: &Core, view: &View) -> Result<Parts, DeviceError> {
    Ok(Parts { starts: core.at(view)?, count: view.dim(0) - 1, lengths: 0 })
}

pub fn attention(core: &mut Core, op: &ops::Attention) -> Done {
    let (dtype, qk_width, v_width) = (op.q.dtype, op.q.dim(2), op.v.dim(2));
    let kernels = Kernels { dtype, qk_width, v_width };
    let parts = documents(core, &op.documents)?;
    let (plan, entries) = kernels.plan(core, parts, op.q.dim(0))?;
    let inputs = [heads(core, &op.q)?, heads(core, &op.k)?, heads(core, &op.v)?];
    let args = inputs.into_iter().fold(Args::new(), with);
    let args = with(args, heads(core, &op.out)?).at(core.at(&op.lse)?).int(op.lse.stride(0));
    let args = args.float(op.scale).int(op.q.dim(1) / op.k.dim(1)).at(plan);
    let args = args.at(0).int(0).int(1).flag(whole(&inputs));
    let grid = kernels.grid(entries, op.q.dim(1), Tiles { keys: 2, values: 1 });
    core.run(&kernels.unit(), c"attention", grid, args)
}

pub fn paged_attention(core: &mut Core, op: &ops::PagedAttention) -> Done {
    let (dtype, qk_width, v_width) = (op.q.dtype, op.q.dim(2), op.v_cache.dim(3));
    let kernels = Kernels { dtype, qk_width, v_width };
    let (starts, lengths) = (core.at(&op.queries)?, core.at(&op.lengths)?);
    let parts = Parts { starts, count: op.lengths.dim(0), lengths };
    let (plan, entries) = kernels.plan(core, parts, op.q.dim(0))?;
    let cache = |view: &View| -> Result<[usize; 3], DeviceError> {
        Ok([core.at(view)?, view.dim(2) * view.dim(3), view.dim(3)])
    };
    let inputs = [heads(core, &op.q)?, cache(&op.k_cache)?, cache(&op.v_cache)?];
    let args = inputs.into_iter().fold(Args::new(), with);
    let args = with(args, heads(core, &op.out)?).at(0).int(0).float(op.scale);
    let args = args.int(op.q.dim(1) / op.k_cache.dim(2)).at(plan).at(core.at(&op.blocks)?);
    let args = args.int(op.blocks.dim(1)).int(op.k_cache.dim(1)).flag(whole(&inputs));
    let grid = kernels.grid(entries, op.q.dim(1), Tiles { keys: 2, values: 1 });
    core.run(&kernels.unit(), c"attention", grid, args)
}

pub fn attention_bwd(core: &mut Core, op: &ops::AttentionBwd) -> Done {
    let (rows, count, kv_heads) = (op.q.dim(0), op.q.dim(1), op.k.dim(1));
    let (dtype, qk_width, v_width) = (op.q.dtype, op.q.dim(2), op.v.dim(2));
    let kernels = Kernels { dtype, qk_width, v_width };
    let delta = core.room(DType::F32, rows * count)?;
    let args = with(Args::new(), heads(core, &op.out)?);
    let args = with(args, heads(core, &op.dout)?).at(delta).int(rows).int(count).int(v_width);
    let unit = Unit::new(Source::Elementwise, dtype);
    core.run(&unit, c"attention_delta", flat(32 * rows * count), args)?;
    let parts = documents(core, &op.documents)?;
    let (plan, entries) = kernels.plan(core, parts, rows)?;
    let inputs =
        [heads(core, &op.q)?, heads(core, &op.k)?, heads(core, &op.v)?, heads(core, &op.dout)?];
    let results = [heads(core, &op.dq)?, heads(core, &op.dk)?, heads(core, &op.dv)?];
    // The words of `Backward` in order.
    let mut words: Vec<usize> = inputs.iter().map(|[at, ..]| *at).collect();
    words.extend(inputs.iter().flat_map(|[_, row, head]| [*row, *head]));
    words.extend([core.at(&op.lse)?, op.lse.stride(0), delta, count, count / kv_heads]);
    words.extend(results.iter().map(|[at, ..]| *at));
    words.extend(results.iter().flat_map(|[_, row, head]| [*row, *head]));
    let last = usize::from(whole(&inputs)) << 32 | op.scale.to_bits() as usize;
    words.extend([plan, last]);
    let words: Vec<u64> = words.into_iter().map(|word| word as u64).collect();
    let args = || Args::new().structure(&words);
    let grid = |heads: usize| kernels.grid(entries, heads, Tiles { keys: 2, values: 2 });
    core.run(&kernels.unit(), c"attention_dq", grid(count), args())?;
    core.run(&kernels.unit(), c"attention_dkv", grid(kv_heads), args())
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
