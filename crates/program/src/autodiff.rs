//! Adds the backward operations to a forward program.
//!
//! Works backwards through the list. A buffer's gradient is a buffer of the same layout, so the
//! gradient of a part is the part of the gradient. A first contribution is written in place; later
//! ones are added, by the operation itself where it can accumulate, else through a temporary.
//! Parameters' gradients go to the gradients buffer, overwritten at their first use. One rule per
//! operation stands in `autodiff/rules.rs`.

mod rules;

use std::collections::{HashMap, HashSet};

use pontoon_ops as ops;
use pontoon_ops::{Access, Accumulate, BufferId, DType, Op, OpName, View};

use crate::error::ProgramError;
use crate::program::{BufferKind, FROZEN, GRADIENTS, Program, WEIGHTS};

/// Turns a forward program into one that also computes every parameter's gradient.
///
/// `losses` pairs each per-row loss or log-probability (an output of `CrossEntropy` or
/// `TokenLogProb`) with the name of the input that holds its gradient, f32 of the same shape; the
/// input is added to the program. `CrossEntropy` is replaced by its backward, which computes the
/// loss too.
pub fn differentiate(forward: Program, losses: &[(View, &str)]) -> Result<Program, ProgramError> {
    let mut forward = forward;
    let mut grads = HashMap::new();
    for (loss, name) in losses {
        let view = forward.add_buffer(*name, BufferKind::Input, DType::F32, loss.dims());
        forward.inputs.insert((*name).to_owned(), view);
        grads.insert(loss.buffer, Gradient { view, written: vec![*loss] });
    }
    let needed = needs_gradient(&forward);
    let uses = differentiable_uses(&forward, &needed);
    let ops = std::mem::take(&mut forward.ops);
    let segments = std::mem::take(&mut forward.segments);
    let mut kept = Program { ops: Vec::new(), segments: Vec::new(), ..forward };
    for (op, segment) in ops.iter().zip(&segments) {
        if !replaced_by_backward(op, losses) {
            kept.push(op.clone(), *segment)?;
        }
    }
    kept.forward_count = kept.ops.len();
    let written = HashSet::new();
    let mut pass = Backward { program: kept, grads, needed, uses, written, segment: 0 };
    for (index, (op, segment)) in ops.iter().zip(&segments).enumerate().rev() {
        pass.segment = *segment;
        pass.differentiate(index, op)?;
    }
    Ok(pass.program)
}

fn replaced_by_backward(op: &Op, losses: &[(View, &str)]) -> bool {
    matches!(op, Op::CrossEntropy(op) if losses.iter().any(|(loss, _)| loss == &op.loss))
}

/// A buffer's gradient and which parts of the *forward* buffer have contributed so far.
struct Gradient {
    view: View,
    written: Vec<View>,
}

struct Backward {
    program: Program,
    grads: HashMap<BufferId, Gradient>,
    /// Buffers through which a parameter reaches the loss.
    needed: HashSet<BufferId>,
    /// Every part of each needed buffer that a differentiable operation reads.
    uses: HashMap<BufferId, Vec<View>>,
    /// Parameter gradients that have been written.
    written: HashSet<usize>,
    segment: u32,
}

/// Where a contribution goes, and how.
enum Place {
    /// Straight to the gradient: nothing has been written there.
    Fresh(View),
    /// Added to what is there.
    Added(View),
}

impl Backward {
    fn push(&mut self, op: impl Into<Op>) -> Result<(), ProgramError> {
        self.program.push(op, self.segment)
    }

    fn temporary(&mut self, dtype: DType, shape: &[usize]) -> View {
        let name = format!("g{}", self.program.buffers.len());
        self.program.add_buffer(name, BufferKind::Temporary, dtype, shape)
    }

    fn needs(&self, view: &View) -> bool {
        self.needed.contains(&view.buffer)
    }

    /// The gradient of a parameter, and whether this use is the first to write it.
    fn parameter_gradient(&mut self, weight: &View) -> (View, Accumulate) {
        assert_eq!(weight.buffer, WEIGHTS);
        let element = weight.byte_offset * 8 / weight.dtype.bits();
        let view = View::contiguous(GRADIENTS, DType::F32, weight.shape)
            .rebased(GRADIENTS, DType::F32.bytes(element));
        let first = self.written.insert(element);
        (view, if first { Accumulate::Overwrite } else { Accumulate::Add })
    }

    /// The counts of a frozen parameter, which lie behind all gradients, and whether this use is
    /// the first to write them.
    fn frozen_counts(&mut self, frozen: &View) -> (View, Accumulate) {
        assert_eq!(frozen.buffer, FROZEN);
        let trainable = self.program.buffer(WEIGHTS).view.elements();
        let element = trainable + frozen.byte_offset / DType::F32.bytes(1);
        let view = View::contiguous(GRADIENTS, DType::F32, frozen.shape)
            .rebased(GRADIENTS, DType::F32.bytes(element));
        let first = self.written.insert(element);
        (view, if first { Accumulate::Overwrite } else { Accumulate::Add })
    }

    /// The gradient that has reached a forward result, or none if nothing did.
    fn gradient_of(&self, result: &View) -> Option<View> {
        let gradient = self.grads.get(&result.buffer)?;
        Some(part_of(gradient, result, self.program.buffer(result.buffer).view))
    }

    /// The gradient of a result, zeros if none has reached it.
    fn gradient_or_zero(&mut self, result: &View) -> Result<View, ProgramError> {
        if let Some(view) = self.gradient_of(result) {
            return Ok(view);
        }
        let dst = self.temporary(result.dtype, result.dims());
        self.push(ops::Fill { dst, value: 0.0 })?;
        Ok(dst)
    }

    /// Decides where the gradient of a forward operand goes.
    fn place(&mut self, operand: &View) -> Result<Place, ProgramError> {
        let base = self.program.buffer(operand.buffer).view;
        if !self.grads.contains_key(&operand.buffer) {
            let view = self.temporary(operand.dtype, base.dims());
            let uses = self.uses.get(&operand.buffer).map_or(&[][..], Vec::as_slice);
            let whole = covers_in_parts(uses, &base);
            self.grads.insert(operand.buffer, Gradient { view, written: Vec::new() });
            if !whole {
                self.push(ops::Fill { dst: view, value: 0.0 })?;
                let gradient = self.grads.get_mut(&operand.buffer).expect("inserted above");
                gradient.written.push(base);
            }
        }
        let gradient = self.grads.get_mut(&operand.buffer).expect("present or inserted above");
        let part = part_of(gradient, operand, base);
        if gradient.written.iter().any(|written| written.may_overlap(operand)) {
            return Ok(Place::Added(part));
        }
        gradient.written.push(*operand);
        Ok(Place::Fresh(part))
    }

    /// Contributes to an operand's gradient by an operation that can only overwrite.
    fn contribute<T: Into<Op>>(
        &mut self,
        operand: &View,
        make: impl FnOnce(View) -> T,
    ) -> Result<(), ProgramError> {
        match self.place(operand)? {
            Place::Fresh(view) => self.push(make(view)),
            Place::Added(view) => {
                let part = self.temporary(operand.dtype, operand.dims());
                self.push(make(part))?;
                self.push(ops::Add { a: view, b: part, y: view })
            }
        }
    }

    /// Contributes by an operation that can accumulate by itself.
    fn accumulate<T: Into<Op>>(
        &mut self,
        operand: &View,
        make: impl FnOnce(View, Accumulate) -> T,
    ) -> Result<(), ProgramError> {
        match self.place(operand)? {
            Place::Fresh(view) => self.push(make(view, Accumulate::Overwrite)),
            Place::Added(view) => self.push(make(view, Accumulate::Add)),
        }
    }

    /// Room for a gradient that an operation writes beside others; `settle` adds it afterwards
    /// where something stood already.
    fn room(&mut self, operand: &View) -> Result<(View, Option<View>), ProgramError> {
        Ok(match self.place(operand)? {
            Place::Fresh(view) => (view, None),
            Place::Added(view) => (self.temporary(operand.dtype, operand.dims()), Some(view)),
        })
    }

    fn settle(&mut self, part: View, target: Option<View>) -> Result<(), ProgramError> {
        match target {
            Some(view) => self.push(ops::Add { a: view, b: part, y: view }),
            None => Ok(()),
        }
    }

    /// Gives an operand the gradient another one already has, without copying, where both are
    /// whole buffers with this single use.
    fn share_or_copy(&mut self, operand: &View, gradient: View) -> Result<(), ProgramError> {
        let base = self.program.buffer(operand.buffer).view;
        let single = self.uses.get(&operand.buffer).is_some_and(|uses| uses.len() == 1);
        if single && *operand == base && !self.grads.contains_key(&operand.buffer) {
            let written = vec![*operand];
            self.grads.insert(operand.buffer, Gradient { view: gradient, written });
            return Ok(());
        }
        match self.place(operand)? {
            Place::Fresh(dst) => self.push(ops::Copy { src: gradient, dst }),
            Place::Added(view) => self.push(ops::Add { a: view, b: gradient, y: view }),
        }
    }
}

/// The part of a gradient that belongs to a part of its forward buffer.
fn part_of(gradient: &Gradient, operand: &View, base: View) -> View {
    assert_eq!(gradient.view.dtype, operand.dtype, "a gradient has its tensor's dtype");
    operand.rebased(gradient.view.buffer, gradient.view.byte_offset - base.byte_offset)
}

/// Whether the uses are equal to or apart from one another and together are the whole buffer.
fn covers_in_parts(uses: &[View], base: &View) -> bool {
    let mut parts: Vec<&View> = Vec::new();
    for part in uses {
        if part.is_broadcast() {
            return false;
        }
        // Two shapes of the same range (a reshape) are the same part.
        let same = |other: &&View| {
            other.byte_offset == part.byte_offset
                && other.elements() == part.elements()
                && (*other == part || (other.is_contiguous() && part.is_contiguous()))
        };
        if parts.iter().any(same) {
            continue;
        }
        if parts.iter().any(|other| other.may_overlap(part)) {
            return false;
        }
        parts.push(part);
    }
    parts.iter().map(|part| part.elements()).sum::<usize>() == base.elements()
}

/// Operands whose values do not pass a gradient: integers and saved statistics.
fn is_differentiable(op: OpName, operand: &str) -> bool {
    !matches!(
        (op, operand),
        (OpName::RouterTopK, "bias") | (OpName::Rope, "cos" | "sin") | (_, "rstd" | "lse")
    )
}

fn needs_gradient(program: &Program) -> HashSet<BufferId> {
    let mut needed = HashSet::from([WEIGHTS]);
    for op in &program.ops {
        let operands = op.operands();
        let reached = operands.iter().any(|operand| {
            operand.access.reads()
                && operand.view.buffer != FROZEN
                && operand.view.dtype.is_float()
                && is_differentiable(op.name(), operand.name)
                && needed.contains(&operand.view.buffer)
        });
        if reached {
            let written = operands.iter().filter(|o| o.access.writes());
            needed.extend(written.map(|o| o.view.buffer));
        }
    }
    needed
}

fn differentiable_uses(
    program: &Program,
    needed: &HashSet<BufferId>,
) -> HashMap<BufferId, Vec<View>> {
    let mut uses: HashMap<BufferId, Vec<View>> = HashMap::new();
    for op in &program.ops {
        for operand in op.operands() {
            let counts = operand.access == Access::Read
                && operand.view.dtype.is_float()
                && operand.view.buffer != WEIGHTS
                && needed.contains(&operand.view.buffer)
                && is_differentiable(op.name(), operand.name);
            if counts {
                uses.entry(operand.view.buffer).or_default().push(operand.view);
            }
        }
    }
    uses
}
