//! Root-mean-square normalisation, alone and with the addition before it.

use pontoon_ops::{self as ops, Accumulate, DType, ROW_BLOCK, View};

use crate::core::{Core, Done, flat, row_stride};
use crate::ffi::session::{Args, Grid};
use crate::modules::{Source, Unit};

/// Widest row that one warp takes; by the width alone, so that a row's bits are its own.
const WARP_WIDTH_MAX: usize = 512;
/// Columns of a block that sums over rows.
const BLOCK_COLUMNS: usize = 32;

/// Blocks over rows.
fn by_row(rows: usize, width: usize) -> Grid {
    let threads = if width <= WARP_WIDTH_MAX { [32, 8] } else { [256, 1] };
    Grid { blocks: [rows.div_ceil(threads[1]), 1, 1], threads, shared_bytes: 0 }
}

struct Forward<'a> {
    x: &'a View,
    residual: Option<(&'a View, &'a View)>,
    weight: &'a View,
    eps: f32,
    y: &'a View,
    rstd: &'a View,
}

fn forward(core: &mut Core, op: &Forward<'_>) -> Done {
    let (rows, width) = (op.x.dim(0), op.x.dim(1));
    let mut args = Args::new().at(core.at(op.x)?).int(row_stride(op.x));
    args = match op.residual {
        None => args.at(0).int(0).at(0).int(0),
        Some((residual, sum)) => args
            .at(core.at(residual)?)
            .int(row_stride(residual))
            .at(core.at(sum)?)
            .int(row_stride(sum)),
    };
    let args = args.at(core.at(op.weight)?).float(op.eps).at(core.at(op.y)?);
    let args = args.int(row_stride(op.y)).at(core.at(op.rstd)?).int(rows).int(width);
    let unit = Unit::new(Source::Norm, op.x.dtype);
    core.run(&unit, c"rms_norm", by_row(rows, width), args)
}

pub fn rms_norm(core: &mut Core, op: &ops::RmsNorm) -> Done {
    let ops::RmsNorm { x, weight, eps, y, rstd } = op;
    forward(core, &Forward { x, residual: None, weight, eps: *eps, y, rstd })
}

pub fn add_rms_norm(core: &mut Core, op: &ops::AddRmsNorm) -> Done {
    let ops::AddRmsNorm { x, residual, weight, eps, sum, y, rstd } = op;
    let residual = Some((residual, sum));
    forward(core, &Forward { x, residual, weight, eps: *eps, y, rstd })
}

struct Backward<'a> {
    dy: &'a View,
    dsum: &'a Option<View>,
    x: &'a View,
    weight: &'a View,
    rstd: &'a View,
    dx: &'a View,
    dweight: &'a View,
    accumulate: Accumulate,
}

fn backward(core: &mut Core, op: &Backward<'_>) -> Done {
    let (rows, width) = (op.x.dim(0), op.x.dim(1));
    let unit = Unit::new(Source::Norm, op.x.dtype);
    let (dy, x, rstd) = (core.at(op.dy)?, core.at(op.x)?, core.at(op.rstd)?);
    let args = Args::new().at(dy).int(row_stride(op.dy));
    let args = args.at(core.at_if(op.dsum)?).int(op.dsum.as_ref().map_or(0, row_stride));
    let args = args.at(x).int(row_stride(op.x)).at(core.at(op.weight)?).at(rstd);
    let args = args.at(core.at(op.dx)?).int(row_stride(op.dx)).int(rows).int(width);
    core.run(&unit, c"rms_norm_bwd", by_row(rows, width), args)?;
    let count = rows.div_ceil(ROW_BLOCK);
    let partial = core.room(DType::F32, count * width)?;
    let args = Args::new().at(dy).int(row_stride(op.dy)).at(x).int(row_stride(op.x));
    let args = args.at(rstd).at(partial).int(rows).int(width);
    let columns = width.div_ceil(BLOCK_COLUMNS);
    let threads = [BLOCK_COLUMNS, 8];
    let grid = Grid { blocks: [count, columns, 1], threads, shared_bytes: 0 };
    core.run(&unit, c"dweight_blocks", grid, args)?;
    let args = Args::new().at(partial).at(core.at(op.dweight)?).int(count).int(width);
    let args = args.flag(op.accumulate == Accumulate::Add);
    core.run(&unit, c"sum_blocks", flat(width), args)
}

pub fn rms_norm_bwd(core: &mut Core, op: &ops::RmsNormBwd) -> Done {
    let ops::RmsNormBwd { dy, x, weight, rstd, dx, dweight, accumulate } = op;
    let accumulate = *accumulate;
    backward(core, &Backward { dy, dsum: &None, x, weight, rstd, dx, dweight, accumulate })
}

pub fn add_rms_norm_bwd(core: &mut Core, op: &ops::AddRmsNormBwd) -> Done {
    let ops::AddRmsNormBwd { dy, dsum, sum, weight, rstd, dx, dweight, accumulate } = op;
    let accumulate = *accumulate;
    backward(core, &Backward { dy, dsum, x: sum, weight, rstd, dx, dweight, accumulate })
}
