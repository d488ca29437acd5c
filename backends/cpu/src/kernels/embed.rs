//! Token embedding and rotary positions.

use pontoon_ops::{self as ops, Accumulate, Direction, RopeStyle};

use super::{Context, Done, row_stride, rows_per_task, with_float};
use crate::ffi::{Grid, Parts, Tiles};
use crate::prepack::read_row;
use crate::simd::{Element, Kernel, Simd, dispatch};
use crate::words::RowWords;

pub(super) fn embed(context: &mut Context<'_>, op: &ops::Embed) -> Done {
    with_float!(op.table.dtype, T => embed_as::<T>(context, op))
}

fn embed_as<T: Element>(context: &mut Context<'_>, op: &ops::Embed) -> Done {
    let ids = context.operands.read::<i32>(&op.ids)?;
    let table = context.operands.read::<T>(&op.table)?;
    let y = context.operands.write::<T>(&op.y)?;
    let (rows, width, vocabulary) = (op.y.dim(0), op.y.dim(1), op.table.dim(0));
    let (stride, per_task) = (row_stride(&op.y), rows_per_task(rows, width));
    let parts = Parts::new(y, stride * per_task);
    let in_panels = context.operands.in_panels(&op.table);
    let panel_rows = context.isa.geometry().micro_columns;
    context.pool.run(rows.div_ceil(per_task), |task| {
        let y = parts.take(task);
        for row in 0..per_task.min(rows - task * per_task) {
            let y = &mut y[row * stride..][..width];
            match usize::try_from(ids[task * per_task + row]) {
                Ok(id) if id < vocabulary && in_panels => read_row(table, panel_rows, id, y),
                Ok(id) if id < vocabulary => y.copy_from_slice(&table[id * width..][..width]),
                _ => y.fill(T::from_f32(f32::NAN)),
            }
        }
    });
    Ok(())
}

struct AddRow<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Element> Kernel for AddRow<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            let sum = simd.add(simd.load(to), T::load(simd, from));
            simd.store(sum, to);
        }
    }
}

/// Columns per task: each task adds all rows to its own columns, in row order.
const COLUMNS_PER_TASK: usize = 128;

pub(super) fn embed_bwd(context: &mut Context<'_>, op: &ops::EmbedBwd) -> Done {
    with_float!(op.dy.dtype, T => embed_bwd_as::<T>(context, op))
}

fn embed_bwd_as<T: Element>(context: &mut Context<'_>, op: &ops::EmbedBwd) -> Done {
    let ids = context.operands.read::<i32>(&op.ids)?;
    let dy = context.operands.read::<T>(&op.dy)?;
    let dtable = context.operands.write::<f32>(&op.dtable)?;
    let (vocabulary, columns) = (op.dtable.dim(0), op.dtable.dim(1));
    let stride = row_stride(&op.dy);
    let tile_columns =
        COLUMNS_PER_TASK.max(columns.div_ceil(crate::ffi::PARTS_MAX)).min(columns.max(1));
    let grid = Grid {
        rows: vocabulary,
        columns,
        row_stride: columns,
        tile_rows: vocabulary,
        tile_columns,
    };
    let tiles = Tiles::new(dtable, grid);
    let (isa, overwrite) = (context.isa, op.accumulate == Accumulate::Overwrite);
    let tally = context.tally();
    context.pool.run(columns.div_ceil(tile_columns), |task| {
        let (mut tile, mut sums) = (tiles.take(0, task), tally.task());
        if overwrite {
            (0..vocabulary).for_each(|row| tile.row(row).fill(0.0));
        }
        for (row, &id) in ids.iter().enumerate() {
            let Some(id) = usize::try_from(id).ok().filter(|&id| id < vocabulary) else {
                continue;
            };
            let width = tile.columns();
            let from = &dy[row * stride + task * tile_columns..][..width];
            let to = tile.row(id);
            let before = sums.wants_changed(2).then(|| dispatch(isa, RowWords::one(&*to)));
            dispatch(isa, AddRow { from, to: &mut *to });
            if let Some(before) = before {
                let after = dispatch(isa, RowWords::one(&*to));
                sums.add_written(2, after.wrapping_sub(before));
            }
        }
    });
    context.note(tally);
    Ok(())
}

/// The rotation of one head.
struct Rotate<'a, T> {
    x: &'a [T],
    cos: &'a [f32],
    sin: &'a [f32],
    /// 1 forward, -1 backward.
    sign: f32,
    y: &'a mut [T],
}

impl<T: Element> Kernel for Rotate<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let half = self.cos.len();
        let (x_low, x_high) = self.x.split_at(half);
        let (y_low, y_high) = self.y.split_at_mut(half);
        let sign = simd.splat(self.sign);
        for start in (0..half).step_by(S::LANES) {
            let end = (start + S::LANES).min(half);
            let cos = simd.load(&self.cos[start..end]);
            let sin = simd.mul(sign, simd.load(&self.sin[start..end]));
            let u = T::load(simd, &x_low[start..end]);
            let w = T::load(simd, &x_high[start..end]);
            let low = simd.fma(u, cos, simd.neg(simd.mul(w, sin)));
            let high = simd.fma(w, cos, simd.mul(u, sin));
            T::store(simd, low, &mut y_low[start..end]);
            T::store(simd, high, &mut y_high[start..end]);
        }
    }
}

fn rotate_pairs<T: Element>(work: &mut Rotate<'_, T>) {
    for pair in 0..work.cos.len() {
        let (cos, sin) = (work.cos[pair], work.sign * work.sin[pair]);
        let (u, w) = (work.x[2 * pair].to_f32(), work.x[2 * pair + 1].to_f32());
        work.y[2 * pair] = T::from_f32(u.mul_add(cos, -(w * sin)));
        work.y[2 * pair + 1] = T::from_f32(w.mul_add(cos, u * sin));
    }
}

pub(super) fn rope(context: &mut Context<'_>, op: &ops::Rope) -> Done {
    with_float!(op.x.dtype, T => rope_as::<T>(context, op))
}

fn rope_as<T: Element>(context: &mut Context<'_>, op: &ops::Rope) -> Done {
    let x = context.operands.read::<T>(&op.x)?;
    let positions = context.operands.read::<i32>(&op.positions)?;
    let cos = context.operands.read::<f32>(&op.cos)?;
    let sin = context.operands.read::<f32>(&op.sin)?;
    let y = context.operands.write::<T>(&op.y)?;
    let (rows, heads, width) = (op.x.dim(0), op.x.dim(1), op.x.dim(2));
    let (half, longest) = (width / 2, op.cos.dim(0));
    let position_step = op.positions.stride(0);
    let y_row = if rows > 1 { op.y.stride(0) } else { y.len().max(1) };
    let per_task = rows_per_task(rows, heads * width);
    let parts = Parts::new(y, y_row * per_task);
    let tally = context.tally();
    let (isa, sign) = (context.isa, if op.direction == Direction::Forward { 1.0 } else { -1.0 });
    context.pool.run(rows.div_ceil(per_task), |task| {
        let (y, mut sums) = (parts.take(task), tally.task());
        for row in 0..per_task.min(rows - task * per_task) {
            let at = task * per_task + row;
            let position = usize::try_from(positions[at * position_step]).ok();
            for head in 0..heads {
                let y = &mut y[row * y_row + head * op.y.stride(1)..][..width];
                let Some(place) = position.filter(|&place| place < longest) else {
                    y.fill(T::from_f32(f32::NAN));
                    continue;
                };
                let x = &x[at * op.x.stride(0) + head * op.x.stride(1)..][..width];
                let (cos, sin) = (&cos[place * half..][..half], &sin[place * half..][..half]);
                let mut work = Rotate { x, cos, sin, sign, y };
                match op.style {
                    RopeStyle::HalfSplit => dispatch(isa, work),
                    RopeStyle::Interleaved => rotate_pairs(&mut work),
                }
            }
            let heads_of = |data, stride| RowWords { data, stride, rows: heads, width };
            sums.read_rows(0, heads_of(&x[at * op.x.stride(0)..], op.x.stride(1)));
            sums.written_rows(4, heads_of(&y[row * y_row..], op.y.stride(1)));
        }
    });
    context.note(tally);
    Ok(())
}
