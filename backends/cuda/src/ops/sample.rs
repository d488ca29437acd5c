//! Choosing the next token.

use pontoon_ops::{self as ops, DType};

use super::loss::ROW_THREADS;
use crate::core::{Core, Done, blocks, row_stride};
use crate::ffi::session::Args;
use crate::modules::{Source, Unit};

pub fn sample(core: &mut Core, op: &ops::Sample) -> Done {
    let (rows, padded) = (op.logits.dim(0), op.logits.dim(1));
    let work = core.room(DType::F32, rows * op.vocabulary)?;
    let args = Args::new().at(core.at(&op.logits)?).int(row_stride(&op.logits)).int(padded);
    let args = args.at(core.at_if(&op.bias)?).int(op.bias.as_ref().map_or(0, row_stride));
    let (stride, longest) = op.history.map_or((0, 0), |view| (row_stride(&view), view.dim(1)));
    let args = args.at(core.at_if(&op.history)?).int(stride).int(longest);
    let args = args.at(core.at(&op.settings)?).int(row_stride(&op.settings));
    let args = args.at(core.at(&op.keys)?).int(row_stride(&op.keys)).int(op.vocabulary);
    let args = args.at(work).at(core.at(&op.token)?).at(core.at(&op.logprob)?);
    let unit = Unit::new(Source::Sample, DType::F32);
    core.run(&unit, c"sample", blocks(rows, ROW_THREADS), args)
}
