//! Matrix products: dense, with quantised weights, and grouped by expert.
//!
//! Results that are added to, or get a bias, pass through f32, so that they are rounded once.

use pontoon_ops::{self as ops, Accumulate, DType, DeviceError, Extents, Layout, View};

use crate::core::{Core, Done};
use crate::ffi::operators::Argument;
use crate::ffi::table::Operator;
use crate::tensor::{Kind, Tensor};

/// Elements of a weight that are expanded to f32 at a time: 256 MiB.
const EXPANDED_MAX: usize = 64 << 20;

pub(super) fn matmul(core: &mut Core, op: &ops::Matmul) -> Done {
    let (a, b, c) = (core.tensor(&op.a)?, core.tensor(&op.b)?, core.tensor(&op.c)?);
    let Extents { m, n, k } = op.extents();
    let (a, b) = match op.layout {
        Layout::Nt => (a, b.transpose(0, 1)),
        Layout::Nn => (a, b),
        Layout::Tn => (a.transpose(0, 1), b),
    };
    let adds = op.accumulate == Accumulate::Add;
    if !adds && op.bias.is_none() && k > 0 {
        return core.product(a, b, c);
    }
    let sum = core.scratch(Kind::F32, &[m, n])?;
    match k {
        0 => core.zero(sum)?,
        _ => core.product(a, b, sum)?,
    }
    if let Some(bias) = &op.bias {
        let bias = core.tensor(bias)?.widen(0);
        let to = if adds { sum } else { c };
        core.add(sum, bias, to)?;
    }
    match (adds, op.bias.is_some()) {
        (true, _) => core.add(c, sum, c),
        (false, true) => Ok(()),
        (false, false) => core.copy(c, sum),
    }
}

/// What each byte of a quantised weight stands for: one number, or two of four bits.
fn byte_table(dtype: DType) -> Vec<f32> {
    let nibble = |bits: u8| f32::from((bits << 4) as i8 >> 4);
    (0..=255_u8)
        .flat_map(|byte| match dtype {
            DType::I4 => vec![nibble(byte & 15), nibble(byte >> 4)],
            DType::I8 => vec![f32::from(byte as i8)],
            _ => vec![e4m3(byte)],
        })
        .collect()
}

/// The value of an e4m3 byte (OCP 8-bit floats: bias 7, no infinity, 0x7f is NaN).
fn e4m3(byte: u8) -> f32 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction * 2_f32.powi(-9),
        _ => (8.0 + fraction) * 2_f32.powi(exponent - 10),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// Weights stored in few bits, with what their values are read by: one, or one per group.
pub(super) struct Quantised {
    /// Where its first byte lies.
    start: usize,
    row_bytes: usize,
    groups: usize,
    /// Rows of a group's weight.
    group_rows: usize,
    columns: usize,
    /// What a byte stands for, `[256, numbers]`.
    table: Tensor,
    /// `[groups * blocks of rows, blocks of columns]`.
    scales: Tensor,
    block_rows: usize,
    /// Each column's block.
    blocks: Tensor,
}

impl Quantised {
    /// Weights `[rows, columns]` or `[groups, rows, columns]` and their scales, one for
    /// `block_rows` by `block_columns` of their numbers.
    pub fn new(
        core: &mut Core,
        weight: &View,
        scales: &View,
        [block_rows, block_columns]: [usize; 2],
    ) -> Result<Quantised, DeviceError> {
        let (stacked, own) = weight.dims().split_at(weight.shape.rank() - 2);
        let (groups, group_rows, columns) = (stacked.iter().product(), own[0], own[1]);
        let per_byte = if weight.dtype == DType::I4 { 2 } else { 1 };
        let row_bytes = columns / per_byte;
        let bytes = groups * group_rows * row_bytes;
        let start = core.buffers.range(weight.buffer, weight.byte_offset, bytes)?;
        let table = core.floats(&[256, per_byte], &byte_table(weight.dtype))?;
        let blocks: Vec<i32> = (0..columns).map(|at| (at / block_columns) as i32).collect();
        let blocks = core.integers(&[columns], &blocks)?;
        let scale_rows = groups * group_rows.div_ceil(block_rows);
        let scales = core.tensor(scales)?.reshape(&[scale_rows, columns.div_ceil(block_columns)]);
        Ok(Quantised {
            start,
            row_bytes,
            groups,
            group_rows,
            columns,
            table,
            scales,
            block_rows,
            blocks,
        })
    }

    /// Rows of each group that are expanded at a time.
    pub fn rows_at_once(&self) -> usize {
        (EXPANDED_MAX / (self.groups * self.columns)).clamp(1, self.group_rows)
    }

    /// Some rows of each group in f32, group after group.
    pub fn rows(&self, core: &mut Core, first: usize, count: usize) -> Result<Tensor, DeviceError> {
        let dims = [self.groups, self.group_rows, self.row_bytes];
        let bytes = Tensor::contiguous(self.start, Kind::U8, &dims).slice(1, first, count);
        let index = core.converted(bytes, Kind::I32)?;
        let rows = self.groups * count;
        let values = core.scratch(Kind::F32, &[rows * self.row_bytes, self.table.dim(1)])?;
        core.select(self.table, 0, index.reshape(&[rows * self.row_bytes]), values)?;
        let values = values.reshape(&[rows, self.columns]);
        let group_blocks = self.group_rows.div_ceil(self.block_rows);
        let own = (0..self.groups).flat_map(|group| {
            let block = move |row: usize| (group * group_blocks + row / self.block_rows) as i32;
            (first..first + count).map(block)
        });
        let own = core.integers(&[rows], &own.collect::<Vec<_>>())?;
        let by_row = core.scratch(Kind::F32, &[rows, self.scales.dim(1)])?;
        core.select(self.scales, 0, own, by_row)?;
        let factors = core.scratch(Kind::F32, &[rows, self.columns])?;
        core.select(by_row, 1, self.blocks, factors)?;
        core.mul(values, factors, values)?;
        Ok(values)
    }
}

pub(super) fn matmul_quant(core: &mut Core, op: &ops::MatmulQuant) -> Done {
    let (x, c) = (core.tensor(&op.x)?, core.tensor(&op.c)?);
    let weight = Quantised::new(core, &op.weight, &op.scales, [op.block_n, op.block_k])?;
    let x = core.wide(x)?;
    let n = op.weight.dim(0);
    let at_once = weight.rows_at_once();
    for first in (0..n).step_by(at_once) {
        let count = at_once.min(n - first);
        let mark = core.scratch.mark();
        let values = weight.rows(core, first, count)?;
        let sum = core.scratch(Kind::F32, &[x.dim(0), count])?;
        core.product(x, values.transpose(0, 1), sum)?;
        let to = c.slice(1, first, count);
        match &op.bias {
            Some(bias) => core.add(sum, core.tensor(bias)?.slice(0, first, count).widen(0), to)?,
            None => core.copy(to, sum)?,
        }
        core.scratch.release(mark);
    }
    Ok(())
}

/// Along which extent groups lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grouped {
    /// Rows of the result: each group has its own weight.
    Rows,
    /// What is summed over: each group gives a matrix.
    Depth,
}

/// The vendor's grouped product on one tensor each.
fn grouped(core: &mut Core, by: Grouped, parts: [Tensor; 3], ends: Tensor) -> Done {
    let versions = [Operator::GroupedMatmulV5, Operator::GroupedMatmulV4];
    let operator = core.newest(&versions)?;
    let absent = || Argument::Absent;
    let [a, b, c] = parts;
    let mut arguments = vec![Argument::Tensors(vec![a]), Argument::Tensors(vec![b])];
    arguments.extend((0..6).map(|_| absent()));
    arguments.push(ends.into());
    arguments.extend((0..3).map(|_| absent()));
    // One result for all groups; the groups' ends as running sums; no activation.
    let group_type = if by == Grouped::Rows { 0 } else { 2 };
    arguments.extend([3, group_type, 0, 0].map(Argument::I64));
    if operator == Operator::GroupedMatmulV5 {
        arguments.push(absent());
    }
    arguments.extend([Argument::Tensors(vec![c]), absent(), absent()]);
    core.call(operator, &arguments)
}

pub(super) fn grouped_matmul(core: &mut Core, op: &ops::GroupedMatmul) -> Done {
    let (a, b, c) = (core.tensor(&op.a)?, core.tensor(&op.b)?, core.tensor(&op.c)?);
    let offsets = core.tensor(&op.offsets)?;
    let groups = offsets.dim(0) - 1;
    let ends = core.converted(offsets.slice(0, 1, groups), Kind::I64)?;
    match op.layout {
        Layout::Tn => weight_gradient(core, [a, b, c], ends, op.accumulate),
        Layout::Nt => by_rows(core, [a, b.transpose(1, 2), c], ends, op.accumulate),
        Layout::Nn => by_rows(core, [a, b, c], ends, op.accumulate),
    }
}

pub(super) fn grouped_matmul_quant(core: &mut Core, op: &ops::GroupedMatmulQuant) -> Done {
    let (x, c) = (core.tensor(&op.x)?, core.tensor(&op.c)?);
    let (groups, n, k) = (op.weight.dim(0), op.weight.dim(1), op.weight.dim(2));
    if x.elements() == 0 {
        return Ok(());
    }
    let ends = core.converted(core.tensor(&op.offsets)?.slice(0, 1, groups), Kind::I64)?;
    let weight = Quantised::new(core, &op.weight, &op.scales, [op.block_n, op.block_k])?;
    let x = core.wide(x)?;
    let at_once = weight.rows_at_once();
    for first in (0..n).step_by(at_once) {
        let count = at_once.min(n - first);
        let mark = core.scratch.mark();
        let values = weight.rows(core, first, count)?.reshape(&[groups, count, k]);
        let (sum, to) = (core.scratch(Kind::F32, &[x.dim(0), count])?, c.slice(1, first, count));
        // Rows beyond the last group keep what they hold.
        core.copy(sum, to)?;
        grouped(core, Grouped::Rows, [x, values.transpose(1, 2), sum], ends)?;
        core.copy(to, sum)?;
        core.scratch.release(mark);
    }
    Ok(())
}

fn by_rows(core: &mut Core, parts: [Tensor; 3], ends: Tensor, accumulate: Accumulate) -> Done {
    let [a, b, c] = parts;
    if a.elements() == 0 {
        return Ok(());
    }
    if accumulate == Accumulate::Overwrite && a.kind == c.kind && c.is_contiguous() {
        return grouped(core, Grouped::Rows, [a, b, c], ends);
    }
    let (a, b) = (core.wide(a)?, wide_transposed(core, b)?);
    let sum = core.scratch(Kind::F32, c.dims())?;
    // Rows beyond the last group keep what they hold: they get it, or zero, beforehand.
    match accumulate {
        Accumulate::Overwrite => core.copy(sum, c)?,
        Accumulate::Add => core.zero(sum)?,
    }
    grouped(core, Grouped::Rows, [a, b, sum], ends)?;
    match accumulate {
        Accumulate::Overwrite => core.copy(c, sum),
        Accumulate::Add => core.add(c, sum, c),
    }
}

/// A weight in f32 that is still transposed by its strides.
fn wide_transposed(core: &mut Core, b: Tensor) -> Result<Tensor, DeviceError> {
    if b.is_contiguous() {
        return core.wide(b);
    }
    Ok(core.wide(b.transpose(1, 2))?.transpose(1, 2))
}

fn weight_gradient(
    core: &mut Core,
    [a, b, c]: [Tensor; 3],
    ends: Tensor,
    accumulate: Accumulate,
) -> Done {
    let direct = c.kind == Kind::F32 && a.kind != Kind::F32;
    let sum = if direct { c } else { core.scratch(Kind::F32, c.dims())? };
    if !(direct && accumulate == Accumulate::Add) {
        // A group without rows is not written by the vendor: it is zero by contract.
        core.zero(sum)?;
    }
    if a.elements() > 0 {
        if a.kind == Kind::F32 {
            grouped(core, Grouped::Depth, [a.transpose(0, 1), b, sum], ends)?;
        } else {
            let (groups, width, n) = (sum.dim(0), sum.dim(1), sum.dim(2));
            let flat = sum.reshape(&[groups * width, n]);
            let (x, weight) = (core.dense(a)?, core.dense(b)?);
            let flags = [true, false].map(Argument::Flag);
            let [turn_x, turn_weight] = flags;
            let (ends, by_depth) = (ends.into(), Argument::I64(2));
            let arguments =
                [x.into(), weight.into(), ends, flat.into(), turn_x, turn_weight, by_depth];
            core.call(Operator::GroupedMatmulAdd, &arguments)?;
        }
    }
    match (direct, accumulate) {
        (true, _) => Ok(()),
        (false, Accumulate::Overwrite) => core.copy(c, sum),
        (false, Accumulate::Add) => core.add(c, sum, c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_the_published_numbers() {
        let values = byte_table(DType::F8e4m3);
        assert_eq!((values[0x7e], values[0x01], values[0x88]), (448.0, 2_f32.powi(-9), -0.015625));
        assert!(values[0xff].is_nan());
        let pairs = byte_table(DType::I4);
        assert_eq!(pairs[2 * 0x8f..2 * 0x8f + 2], [-1.0, -8.0]);
        assert_eq!(byte_table(DType::I8)[0x80], -128.0);
    }
}
