//! Moving, converting and combining elements, gates and token embedding.

use pontoon_ops::{self as ops, Accumulate, DType};

use crate::core::{Core, Done, THREADS, blocks, dims, flat, indexable, row_stride};
use crate::ffi::session::{Args, Grid};
use crate::modules::{Source, Unit};

/// Columns that one thread of `embed_bwd` holds.
const EMBED_COLUMNS: usize = 4;

fn unit(dtype: DType) -> Unit {
    Unit::new(Source::Elementwise, dtype)
}

pub fn copy(core: &mut Core, op: &ops::Copy) -> Done {
    let (src, dst) = (core.at(&op.src)?, core.at(&op.dst)?);
    let count = op.src.elements();
    if op.src.is_contiguous() && op.dst.is_contiguous() {
        return core.session.within(src, dst, op.src.dtype.bytes(count));
    }
    let args = Args::new().at(src).at(dst).structure(&dims(&[&op.src, &op.dst])?).int(count);
    let kernel = match op.src.dtype.bits() {
        8 => c"copy_1",
        16 => c"copy_2",
        _ => c"copy_4",
    };
    core.run(&unit(DType::F32), kernel, flat(count), args)
}

pub fn cast(core: &mut Core, op: &ops::Cast) -> Done {
    let count = op.src.elements();
    let args = Args::new().at(core.at(&op.src)?).at(core.at(&op.dst)?).int(count);
    let kernel = match op.dst.dtype {
        DType::Bf16 => c"cast_bf16",
        DType::F16 => c"cast_f16",
        _ => c"cast_f32",
    };
    core.run(&unit(op.src.dtype), kernel, flat(count), args)
}

pub fn fill(core: &mut Core, op: &ops::Fill) -> Done {
    let count = op.dst.elements();
    let dst = core.at(&op.dst)?;
    let args = Args::new().at(dst).float(op.value).structure(&dims(&[&op.dst])?).int(count);
    let kernel = match op.dst.dtype {
        DType::Bf16 => c"fill_bf16",
        DType::F16 => c"fill_f16",
        DType::I32 => c"fill_i32",
        _ => c"fill_f32",
    };
    core.run(&unit(DType::F32), kernel, flat(count), args)
}

pub fn add(core: &mut Core, op: &ops::Add) -> Done {
    let count = op.y.elements();
    let views = [&op.a, &op.b, &op.y];
    let args = Args::new().at(core.at(&op.a)?).at(core.at(&op.b)?).at(core.at(&op.y)?);
    if views.iter().all(|view| view.is_contiguous()) {
        return core.run(&unit(op.y.dtype), c"add_flat", flat(count), args.int(count));
    }
    let args = args.structure(&dims(&views)?).int(count);
    core.run(&unit(op.y.dtype), c"add", flat(count), args)
}

pub fn scale(core: &mut Core, op: &ops::Scale) -> Done {
    let count = op.x.elements();
    let args = Args::new().at(core.at(&op.x)?).float(op.factor).at(core.at(&op.y)?).int(count);
    core.run(&unit(op.x.dtype), c"scale", flat(count), args)
}

pub fn embed(core: &mut Core, op: &ops::Embed) -> Done {
    let (vocabulary, width) = (op.table.dim(0), op.table.dim(1));
    let args = Args::new().at(core.at(&op.ids)?).at(core.at(&op.table)?).at(core.at(&op.y)?);
    let args = args.int(row_stride(&op.y)).int(vocabulary).int(width);
    core.run(&unit(op.y.dtype), c"embed", blocks(op.ids.dim(0), THREADS), args)
}

pub fn embed_bwd(core: &mut Core, op: &ops::EmbedBwd) -> Done {
    let (rows, vocabulary, width) = (op.ids.dim(0), op.dtable.dim(0), op.dtable.dim(1));
    let table = core.at(&op.dtable)?;
    if op.accumulate == Accumulate::Overwrite {
        core.session.fill(table, 4 * vocabulary * width, 0)?;
    }
    let args = Args::new().at(core.at(&op.ids)?).at(core.at(&op.dy)?).int(row_stride(&op.dy));
    let args = args.at(table).int(rows).int(vocabulary).int(width);
    let args = args.flag(op.accumulate == Accumulate::Add);
    let columns = width.div_ceil(THREADS * EMBED_COLUMNS);
    let grid = Grid { blocks: [rows, columns, 1], threads: [THREADS, 1], shared_bytes: 0 };
    core.run(&unit(op.dy.dtype), c"embed_bwd", grid, args)
}

pub fn swiglu(core: &mut Core, op: &ops::SwiGlu) -> Done {
    let (rows, width) = (op.gate.dim(0), op.gate.dim(1));
    indexable(rows * width)?;
    let mut args = Args::new();
    for view in [&op.gate, &op.up, &op.y] {
        args = args.at(core.at(view)?).int(row_stride(view));
    }
    let args = args.int(rows).int(width);
    core.run(&unit(op.y.dtype), c"swiglu", flat(rows * width), args)
}

pub fn swiglu_bwd(core: &mut Core, op: &ops::SwiGluBwd) -> Done {
    let (rows, width) = (op.gate.dim(0), op.gate.dim(1));
    indexable(rows * width)?;
    // One thread reads all of an element before it writes any of it: results may replace inputs.
    let mut args = Args::new();
    for view in [&op.dy, &op.gate, &op.up, &op.dgate, &op.dup] {
        args = args.at(core.at(view)?).int(row_stride(view));
    }
    let args = args.int(rows).int(width);
    core.run(&unit(op.dy.dtype), c"swiglu_bwd", flat(rows * width), args)
}
