//! Choosing experts, sorting rows by expert and joining the results.

use pontoon_ops::{self as ops, DType, DeviceError, Renormalise, Scoring, View};

use crate::core::{Core, Done, THREADS, blocks, row_stride};
use crate::ffi::session::{Args, Grid};
use crate::modules::{Source, Unit};

/// Threads that sort by expert.
const SORT_THREADS: usize = 1024;

fn unit(dtype: DType) -> Unit {
    Unit::new(Source::Moe, dtype)
}

fn rows_of(args: Args, core: &Core, view: &View) -> Result<Args, DeviceError> {
    Ok(args.at(core.at(view)?).int(row_stride(view)))
}

/// One warp for each row, with so many numbers at hand.
fn warps(rows: usize, numbers: usize) -> Grid {
    Grid { shared_bytes: 4 * numbers, ..blocks(rows, 32) }
}

pub fn router(core: &mut Core, op: &ops::RouterTopK) -> Done {
    let (rows, experts) = (op.logits.dim(0), op.logits.dim(1));
    let rule = &op.rule;
    let args = rows_of(Args::new(), core, &op.logits)?.at(core.at_if(&op.bias)?).int(experts);
    let args = args.int(rule.chosen).flag(rule.scoring == Scoring::Sigmoid).int(rule.groups);
    let args = args.int(rule.groups_kept).flag(rule.renormalise == Renormalise::Yes);
    let args = rows_of(args.float(rule.scale), core, &op.weights)?;
    let args = rows_of(args, core, &op.experts)?;
    let grid = warps(rows, 2 * experts + rule.groups);
    core.run(&unit(DType::F32), c"router", grid, args)
}

pub fn router_bwd(core: &mut Core, op: &ops::RouterTopKBwd) -> Done {
    let (rows, experts) = (op.logits.dim(0), op.logits.dim(1));
    let rule = &op.rule;
    let args = rows_of(Args::new(), core, &op.dweights)?;
    let args = rows_of(rows_of(args, core, &op.logits)?, core, &op.experts)?;
    let args = args.int(experts).int(rule.chosen).flag(rule.scoring == Scoring::Sigmoid);
    let args = args.flag(rule.renormalise == Renormalise::Yes).float(rule.scale);
    let args = rows_of(args, core, &op.dlogits)?;
    core.run(&unit(DType::F32), c"router_bwd", warps(rows, 2 * experts), args)
}

pub fn permute(core: &mut Core, op: &ops::Permute) -> Done {
    let (rows, width, chosen) = (op.x.dim(0), op.x.dim(1), op.experts.dim(1));
    let experts = op.offsets.dim(0) - 1;
    let args = rows_of(Args::new(), core, &op.experts)?.int(rows).int(chosen);
    let args = rows_of(args.at(core.at(&op.offsets)?), core, &op.slots)?;
    let unit = unit(op.x.dtype);
    core.run(&unit, c"permute_slots", blocks(experts, SORT_THREADS), args)?;
    let args = rows_of(rows_of(Args::new(), core, &op.x)?, core, &op.slots)?.int(chosen);
    let args = rows_of(args, core, &op.y)?.int(width);
    core.run(&unit, c"permute_rows", blocks(rows * chosen, THREADS), args)
}

pub fn permute_bwd(core: &mut Core, op: &ops::PermuteBwd) -> Done {
    join(core, &op.dy, None, &op.slots, &op.dx)
}

pub fn unpermute(core: &mut Core, op: &ops::Unpermute) -> Done {
    join(core, &op.x, Some(&op.weights), &op.slots, &op.y)
}

fn join(core: &mut Core, x: &View, weights: Option<&View>, slots: &View, y: &View) -> Done {
    let args = rows_of(Args::new(), core, x)?;
    let args = match weights {
        None => args.at(0).int(0),
        Some(weights) => rows_of(args, core, weights)?,
    };
    let args = rows_of(args, core, slots)?.int(slots.dim(1));
    let args = rows_of(args, core, y)?.int(y.dim(1));
    core.run(&unit(y.dtype), c"join", blocks(y.dim(0), THREADS), args)
}

pub fn unpermute_bwd(core: &mut Core, op: &ops::UnpermuteBwd) -> Done {
    let (rows, width, chosen) = (op.dy.dim(0), op.dy.dim(1), op.slots.dim(1));
    let mut args = Args::new();
    for view in [&op.dy, &op.x, &op.weights, &op.slots] {
        args = rows_of(args, core, view)?;
    }
    let args = rows_of(args.int(chosen), core, &op.dx)?;
    let args = rows_of(args, core, &op.dweights)?.int(width);
    core.run(&unit(op.dy.dtype), c"unpermute_bwd", blocks(rows * chosen, THREADS), args)
}
