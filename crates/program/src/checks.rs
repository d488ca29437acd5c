//! What is checked while a program runs: every tensor is summed where it is written and once more
//! where it is read last, so that a bit that flips in between is found.
//!
//! Made once from the program's list, on its own buffers, where tensors do not share memory; the
//! executor rewrites the views. What a sum is stands in `pontoon_ops::sums`. A flip is found at the
//! tensor's last use at the latest: the window that stays open is from the last use on, when nobody
//! reads the tensor any more.

use pontoon_ops::sums::{Ask, adds_to_rows, runs};
use pontoon_ops::{BufferId, Op, OpName, View};

use crate::program::{BufferKind, Program};

/// A tensor between being written and being checked.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// Where it lies.
    pub view: View,
    /// The operation that wrote it, and its operand there.
    pub writer: (usize, OpName, &'static str),
    /// What is left to do with it when the program has run.
    pub end: End,
}

/// What becomes of a slot at the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It was checked on the way.
    Nothing,
    /// It is checked then: the host reads it.
    Checked,
    /// It is handed out: the tensor outlives the program.
    HandedOut,
}

/// What is done around one operation; numbers are those of slots.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    /// Checked in a pass before it.
    pub before: Vec<usize>,
    /// The sums it is asked for.
    pub ask: Ask,
    /// Operands whose sum as read must be the slot's.
    pub read: Vec<(usize, usize)>,
    /// Operands whose sum as written becomes the slot's.
    pub written: Vec<(usize, usize)>,
    /// Operands that are added to in some rows, with the slots whose sums go on with the change.
    pub carried: Vec<(usize, usize)>,
    /// Summed in a pass after it: a part of the tensor was overwritten.
    pub after: Vec<usize>,
}

/// The checks of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checks {
    pub slots: Vec<Slot>,
    /// By operation.
    pub steps: Vec<Step>,
}

/// How later operations touch a tensor.
struct Use {
    op: usize,
    reads: bool,
    writes: bool,
    /// It overwrites all of it.
    covers: bool,
}

impl Checks {
    /// Plans the checks of a program.
    pub fn new(program: &Program) -> Checks {
        let mut checks =
            Checks { slots: Vec::new(), steps: vec![Step::default(); program.ops.len()] };
        let touching = touching(program);
        for (index, op) in program.ops.iter().enumerate() {
            for (place, operand) in op.operands().into_iter().enumerate() {
                if !operand.access.writes() || runs(&operand.view).is_none() {
                    continue;
                }
                let writer = (index, op.name(), operand.name);
                let slot = checks.slot(operand.view, writer);
                let step = &mut checks.steps[index];
                match step.carried.iter().any(|(carried, _)| *carried == place) {
                    true => step.ask.changed |= 1 << place,
                    false => step.ask.written |= 1 << place,
                }
                step.written.push((place, slot));
                let uses = uses(program, &touching, &operand.view, index);
                checks.follow(program, slot, &uses);
            }
        }
        checks
    }

    fn slot(&mut self, view: View, writer: (usize, OpName, &'static str)) -> usize {
        self.slots.push(Slot { view, writer, end: End::Nothing });
        self.slots.len() - 1
    }

    /// Decides where a slot is checked.
    fn follow(&mut self, program: &Program, slot: usize, uses: &[Use]) {
        let mut slot = slot;
        let mut reader = None;
        for (index, one) in uses.iter().enumerate() {
            if one.reads {
                reader = Some(one.op);
            }
            if one.covers {
                if let Some(op) = reader {
                    self.check_at(&program.ops[op], op, slot);
                }
                return;
            }
            let goes_on = uses[index + 1..].iter().any(|of| of.reads)
                || program.buffer(self.slots[slot].view.buffer).kind != BufferKind::Temporary;
            if one.writes && goes_on {
                self.steps[one.op].before.push(slot);
                let Slot { view, .. } = self.slots[slot];
                slot = self.slot(view, (one.op, program.ops[one.op].name(), "a part"));
                self.steps[one.op].after.push(slot);
                reader = None;
            }
        }
        match program.buffer(self.slots[slot].view.buffer).kind {
            BufferKind::Persistent => self.slots[slot].end = End::HandedOut,
            BufferKind::Output => self.slots[slot].end = End::Checked,
            BufferKind::Input | BufferKind::Temporary => {
                if let Some(op) = reader {
                    self.check_at(&program.ops[op], op, slot);
                }
            }
        }
    }

    fn check_at(&mut self, op: &Op, index: usize, slot: usize) {
        let of_slot = runs(&self.slots[slot].view);
        let same =
            |view: &View| view.buffer == self.slots[slot].view.buffer && runs(view) == of_slot;
        let operands = op.operands();
        let found = operands.iter().position(|o| o.access.reads() && same(&o.view));
        match found {
            // A bit that flipped before stays flipped or shows in the change: the sum that goes on
            // is then wrong where it is checked next.
            Some(place) if adds_to_rows(op) == Some(place) => {
                self.steps[index].carried.push((place, slot));
            }
            Some(place) => {
                self.steps[index].ask.read |= 1 << place;
                self.steps[index].read.push((place, slot));
            }
            None => self.steps[index].before.push(slot),
        }
    }
}

/// The operations that touch each buffer, in order.
fn touching(program: &Program) -> Vec<Vec<usize>> {
    let mut touching = vec![Vec::new(); program.buffers.len()];
    for (index, op) in program.ops.iter().enumerate() {
        for operand in op.operands() {
            let list: &mut Vec<usize> = &mut touching[operand.view.buffer.0 as usize];
            if list.last() != Some(&index) {
                list.push(index);
            }
        }
    }
    touching
}

fn uses(program: &Program, touching: &[Vec<usize>], view: &View, after: usize) -> Vec<Use> {
    let BufferId(buffer) = view.buffer;
    let list = &touching[buffer as usize];
    let later = &list[list.partition_point(|op| *op <= after)..];
    let mut uses = Vec::new();
    for &op in later {
        let operands = program.ops[op].operands();
        let mut one = Use { op, reads: false, writes: false, covers: false };
        for operand in operands.iter().filter(|operand| operand.view.may_overlap(view)) {
            one.reads |= operand.access.reads();
            one.writes |= operand.access.writes();
            one.covers |= operand.access.writes() && covers(&operand.view, view);
        }
        if one.reads || one.writes {
            let ends = one.covers;
            uses.push(one);
            if ends {
                break;
            }
        }
    }
    uses
}

/// Whether writing `other` overwrites all of `view`.
fn covers(other: &View, view: &View) -> bool {
    let end = |view: &View| view.byte_offset + view.span_bytes();
    let around = other.byte_offset <= view.byte_offset && end(other) >= end(view);
    other == view || runs(other) == runs(view) || (other.is_contiguous() && around)
}
