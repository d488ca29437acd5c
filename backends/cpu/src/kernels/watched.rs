//! Operations launched with checks: products are verified as they are computed, and operands are
//! summed by whoever has them in hand.
//!
//! What no kernel sums by itself is summed in a pass before or after. Read next: `gemm/verify.rs`.

use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::Pod;
use pontoon_ops::sums::{Ask, Sums, adds_to_rows};
use pontoon_ops::{DeviceError, DeviceErrorKind, Op, OpName};

use super::Context;
use crate::gemm::{
    Asked, Flip, GemmArgs, GroupedGemmArgs, ProductSums, WrongColumn, gemm, gemm_checked,
    grouped_gemm, grouped_gemm_checked,
};
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::words::{LaneSums, RowWords};

/// What is checked while an operation runs, and what came of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Checks {
    /// Whether products are checked.
    pub on: bool,
    /// The sums that are asked for; a kernel need not form others.
    pub ask: Ask,
    /// Spoils the next product on purpose.
    pub flip: Option<Flip>,
    /// The sums that the kernel formed itself.
    pub sums: Sums,
}

impl Checks {
    /// Notes the sum of an operand as it was read.
    pub fn read(&mut self, operand: usize, sum: u32) {
        self.sums.read[operand] = sum;
    }

    /// Notes the sum of an operand as it was written.
    pub fn written(&mut self, operand: usize, sum: u32) {
        self.sums.written[operand] = sum;
    }

    /// The operands whose sums are asked for and not formed by the operation's kernel.
    pub fn left(op: &Op, ask: Ask) -> Ask {
        let formed = formed_by(op);
        Ask {
            read: ask.read & !formed.read,
            written: ask.written & !formed.written,
            changed: ask.changed & !formed.changed,
            digested: ask.digested & !formed.digested,
        }
    }
}

/// Sums that the tasks of one operation form row by row.
pub(crate) struct Tally {
    isa: Isa,
    ask: Ask,
    read: [AtomicU32; ROW_OPERANDS],
    written: [AtomicU32; ROW_OPERANDS],
}

/// Most operands of an operation whose rows are summed by its own kernel.
const ROW_OPERANDS: usize = 10;

impl Tally {
    /// The sums of one task.
    pub fn task(&self) -> TaskSums<'_> {
        let none = [LaneSums::NONE; ROW_OPERANDS];
        TaskSums { tally: self, read: none, written: none }
    }
}

/// What one task sums; added to the others' when it is dropped.
pub(crate) struct TaskSums<'a> {
    tally: &'a Tally,
    read: [LaneSums; ROW_OPERANDS],
    written: [LaneSums; ROW_OPERANDS],
}

impl TaskSums<'_> {
    /// Whether an operand is to be summed as it is read.
    #[inline]
    fn wants_read(&self, operand: usize) -> bool {
        self.tally.ask.read >> operand & 1 == 1
    }

    /// Whether an operand is to be summed as it is written.
    #[inline]
    pub fn wants_written(&self, operand: usize) -> bool {
        self.tally.ask.written >> operand & 1 == 1
    }

    /// Whether it is to be told how an operand changes.
    #[inline]
    pub fn wants_changed(&self, operand: usize) -> bool {
        self.tally.ask.changed >> operand & 1 == 1
    }

    /// Adds what was summed elsewhere of an operand as it was read.
    #[inline]
    pub fn add_read(&mut self, operand: usize, sum: u32) {
        self.read[operand].add(sum);
    }

    /// Adds what was summed elsewhere of an operand as it was written.
    #[inline]
    pub fn add_written(&mut self, operand: usize, sum: u32) {
        self.written[operand].add(sum);
    }

    /// Takes in a row of each operand, while they are near: those that were read and those that
    /// were written.
    #[inline]
    pub fn row<T: Pod, const READ: usize, const WRITTEN: usize>(
        &mut self,
        read: [(usize, &[T]); READ],
        written: [(usize, &[T]); WRITTEN],
    ) {
        if !self.tally.ask.is_empty() {
            dispatch(self.tally.isa, OperandRows { sums: self, read, written });
        }
    }

    /// Takes in several rows of an operand as they are read.
    #[inline]
    pub fn read_rows<T: Pod>(&mut self, operand: usize, rows: RowWords<'_, T>) {
        if self.wants_read(operand) {
            self.add_read(operand, dispatch(self.tally.isa, rows));
        }
    }

    /// Takes in several rows of an operand as they are written.
    #[inline]
    pub fn written_rows<T: Pod>(&mut self, operand: usize, rows: RowWords<'_, T>) {
        if self.wants_written(operand) {
            self.add_written(operand, dispatch(self.tally.isa, rows));
        }
    }
}

impl Drop for TaskSums<'_> {
    fn drop(&mut self) {
        for operand in 0..ROW_OPERANDS {
            if self.wants_read(operand) {
                self.tally.read[operand].fetch_add(self.read[operand].total(), Ordering::Relaxed);
            }
            if self.wants_written(operand) || self.wants_changed(operand) {
                let total = self.written[operand].total();
                self.tally.written[operand].fetch_add(total, Ordering::Relaxed);
            }
        }
    }
}

/// A row of each operand of a task, added to its sums.
struct OperandRows<'s, 'a, 'r, T, const READ: usize, const WRITTEN: usize> {
    sums: &'s mut TaskSums<'a>,
    read: [(usize, &'r [T]); READ],
    written: [(usize, &'r [T]); WRITTEN],
}

impl<T: Pod, const READ: usize, const WRITTEN: usize> Kernel
    for OperandRows<'_, '_, '_, T, READ, WRITTEN>
{
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let OperandRows { sums, read, written } = self;
        for (operand, row) in read {
            if sums.wants_read(operand) {
                sums.read[operand].add_row(simd, bytemuck::cast_slice(row));
            }
        }
        for (operand, row) in written {
            if sums.wants_written(operand) {
                sums.written[operand].add_row(simd, bytemuck::cast_slice(row));
            }
        }
    }
}

impl Context<'_> {
    /// A tally for one operation.
    pub(crate) fn tally(&self) -> Tally {
        Tally {
            isa: self.isa,
            ask: self.checks.ask,
            read: Default::default(),
            written: Default::default(),
        }
    }

    /// Notes what an operation's tasks summed.
    pub(crate) fn note(&mut self, tally: Tally) {
        let Tally { read, written, .. } = tally;
        for (operand, (read, written)) in read.into_iter().zip(written).enumerate() {
            self.checks.read(operand, read.into_inner());
            self.checks.written(operand, written.into_inner());
        }
    }
}

/// The operands that the kernel of an operation sums itself.
fn formed_by(op: &Op) -> Ask {
    let formed = |read, written| Ask { read, written, ..Ask::default() };
    match op {
        Op::Matmul(product) => {
            let c = 2 + usize::from(product.bias.is_some());
            let reads = op.operands()[c].access.reads();
            // Nothing is read for a result of no elements.
            let factors = if product.c.elements() == 0 { 0 } else { 0b11 };
            formed(factors | if reads { 1 << c } else { 0 }, 1 << c)
        }
        Op::CrossEntropyBwd(_) | Op::TokenLogProbBwd(_) => {
            let dhead = op.operands().len() - 1;
            let reads = op.operands()[dhead].access.reads();
            formed(if reads { 1 << dhead } else { 0 }, 0b11 << (dhead - 1))
        }
        Op::SwiGlu(_) => formed(0b011, 0b100),
        Op::SwiGluBwd(_) => formed(0b00_111, 0b11_000),
        Op::RmsNorm(_) => formed(0b0001, 0b0100),
        Op::AddRmsNorm(_) => formed(0b00_0011, 0b01_1000),
        Op::RmsNormBwd(_) => formed(0b00_0011, 0b01_0000),
        // What may be absent has its place after it filled up by the next.
        Op::AddRmsNormBwd(op) => match op.dsum {
            Some(_) => formed(0b000_0111, 0b010_0000),
            None => formed(0b00_0011, 0b01_0000),
        },
        Op::AdamW(op) => {
            let state = if op.compute.is_some() { 0b1_1101 } else { 0b1101 };
            Ask { digested: state, ..formed(0b10, 0) }
        }
        Op::Rope(_) => formed(0b1, 0b1_0000),
        Op::Attention(_) => formed(0, 0b11_0000),
        Op::AttentionBwd(_) => formed(0b111_0111, 0b11_1000_0000),
        Op::EmbedBwd(_) => {
            let changed = adds_to_rows(op).map_or(0, |place| 1 << place);
            Ask { changed, ..Ask::default() }
        }
        Op::Add(_) if super::handles_in_place(op) => formed(0b11, 0b100),
        _ => Ask::default(),
    }
}

impl Context<'_> {
    /// Computes a product, checked where that is asked for; the sums mean nothing otherwise, and
    /// those of A and B only where they are asked for.
    pub(crate) fn product(
        &mut self,
        (op, result): (OpName, &str),
        args: GemmArgs<'_>,
        [a, b]: [bool; 2],
    ) -> Result<ProductSums, DeviceError> {
        if !self.checks.on {
            gemm(self.pool, self.isa, self.gemm_scratch, args);
            return Ok(ProductSums::default());
        }
        let asked = Asked { a, b, flip: self.checks.flip.take() };
        let sums = gemm_checked(self.pool, self.isa, self.gemm_scratch, args, asked);
        sums.map_err(|column| wrong(op, result, column))
    }

    /// The same for the products of all groups.
    pub(crate) fn grouped_product(
        &mut self,
        (op, result): (OpName, &str),
        args: GroupedGemmArgs<'_>,
    ) -> Result<(), DeviceError> {
        if !self.checks.on {
            grouped_gemm(self.pool, self.isa, self.gemm_scratch, args);
            return Ok(());
        }
        let done = grouped_gemm_checked(self.pool, self.isa, self.gemm_scratch, args);
        done.map_err(|column| wrong(op, result, column))
    }
}

fn wrong(op: OpName, result: &str, WrongColumn(column): WrongColumn) -> DeviceError {
    let text = format!("{op:?}: column {column} of `{result}` does not add up to its operands");
    DeviceError::new(DeviceErrorKind::Corrupt, text)
}

/// A tensor inside an operation that is not what was stored.
pub(crate) fn changed(op: OpName, what: &str) -> DeviceError {
    let text = format!("{op:?}: {what} changed in memory while it ran");
    DeviceError::new(DeviceErrorKind::Corrupt, text)
}
