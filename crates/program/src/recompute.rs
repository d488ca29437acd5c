//! Activation recomputation: backward operations read results that are computed again, so that the
//! first ones need not be kept.
//!
//! A forward operation is computed again right before the first backward operation that needs it,
//! from inputs that were kept or are computed again likewise. Bits do not change: the same
//! operation on the same inputs gives the same bits on every backend.

use std::collections::HashMap;

use pontoon_ops as ops;
use pontoon_ops::{BufferId, Op, OpName, View};

use crate::error::ProgramError;
use crate::program::{BufferKind, Program};

/// How much to compute again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: every activation is kept.
    Nothing,
    /// Results that cost only memory traffic: norms and gated activations.
    Cheap,
    /// All of a layer but what passes from layer to layer.
    Layer,
}

/// Rewrites a differentiated program by a policy.
pub fn recompute(program: &Program, policy: Recompute) -> Result<Program, ProgramError> {
    if policy == Recompute::Nothing {
        return Ok(program.clone());
    }
    let chosen = choose(program, policy);
    let mut pass = Pass { source: program, chosen, again: HashMap::new(), out: empty(program) };
    for index in 0..program.ops.len() {
        let segment = program.segments[index];
        let mut op = program.ops[index].clone();
        if index >= program.forward_count {
            pass.redirect(&mut op, segment)?;
        }
        pass.out.push(op, segment)?;
    }
    Ok(pass.out)
}

fn empty(program: &Program) -> Program {
    Program { ops: Vec::new(), segments: Vec::new(), ..program.clone() }
}

/// For each buffer that may be computed again, the operation that does it.
fn choose(program: &Program, policy: Recompute) -> HashMap<BufferId, Op> {
    let mut consumers: HashMap<BufferId, u32> = HashMap::new();
    let forward = program.ops.iter().zip(&program.segments).take(program.forward_count);
    for (op, segment) in forward.clone() {
        for operand in op.operands().iter().filter(|operand| operand.access.reads()) {
            let last = consumers.entry(operand.view.buffer).or_insert(*segment);
            *last = (*last).max(*segment);
        }
    }
    let mut chosen = HashMap::new();
    let mut writers: HashMap<BufferId, usize> = HashMap::new();
    for (op, _) in forward.clone() {
        for operand in op.operands().iter().filter(|operand| operand.access.writes()) {
            *writers.entry(operand.view.buffer).or_insert(0) += 1;
        }
    }
    for (op, segment) in forward {
        for result in op.operands().iter().filter(|operand| operand.access.writes()) {
            let id = result.view.buffer;
            let temporary = program.buffer(id).kind == BufferKind::Temporary;
            // A buffer filled part by part would need all its writers; those are kept.
            let whole = writers[&id] == 1;
            let crosses = consumers.get(&id).is_some_and(|last| last > segment);
            let again = match policy {
                Recompute::Nothing => None,
                Recompute::Cheap => cheap_twin(op, &result.view),
                Recompute::Layer if crosses => cheap_twin(op, &result.view),
                Recompute::Layer => Some(op.clone()),
            };
            if let (true, true, Some(op)) = (temporary, whole, again) {
                chosen.insert(id, op);
            }
        }
    }
    chosen
}

/// The cheapest operation that gives this result again, if it costs only memory traffic.
fn cheap_twin(op: &Op, result: &View) -> Option<Op> {
    match op {
        Op::RmsNorm(norm) if *result == norm.y => Some(op.clone()),
        Op::SwiGlu(_) => Some(op.clone()),
        // The sum is kept, so its norm comes from the sum alone, with the same bits.
        Op::AddRmsNorm(norm) if *result == norm.y => Some(
            ops::RmsNorm {
                x: norm.sum,
                weight: norm.weight,
                eps: norm.eps,
                y: norm.y,
                rstd: norm.rstd,
            }
            .into(),
        ),
        _ => None,
    }
}

struct Pass<'a> {
    source: &'a Program,
    chosen: HashMap<BufferId, Op>,
    /// Forward buffer to the buffer of its second computation.
    again: HashMap<BufferId, BufferId>,
    out: Program,
}

impl Pass<'_> {
    /// Points an operation's inputs at second computations, emitting those that are missing.
    fn redirect(&mut self, op: &mut Op, segment: u32) -> Result<(), ProgramError> {
        let reads: Vec<BufferId> = op
            .operands()
            .iter()
            .filter(|operand| operand.access.reads())
            .map(|operand| operand.view.buffer)
            .collect();
        for id in reads {
            if self.chosen.contains_key(&id) && !self.again.contains_key(&id) {
                self.compute_again(id, segment)?;
            }
        }
        for view in op.views_mut() {
            if let Some(&copy) = self.again.get(&view.buffer) {
                *view = view.rebased(copy, 0);
            }
        }
        Ok(())
    }

    fn compute_again(&mut self, id: BufferId, segment: u32) -> Result<(), ProgramError> {
        let mut op = self.chosen[&id].clone();
        let norm_of_sum = op.name() == OpName::RmsNorm;
        let written: Vec<View> =
            op.operands().iter().filter(|o| o.access.writes()).map(|o| o.view).collect();
        // Inputs first: they may have to be computed again as well.
        let mut inputs_only = op.clone();
        self.redirect_inputs(&mut inputs_only, segment)?;
        op = inputs_only;
        for result in written {
            let declared = self.source.buffer(result.buffer).clone();
            let name = format!("{}'", declared.name);
            let copy = self.out.add_buffer(
                name,
                BufferKind::Temporary,
                declared.view.dtype,
                declared.view.dims(),
            );
            // The statistics of a norm stay as first computed: they are small and still there.
            let statistic = norm_of_sum && result.buffer != id;
            if !statistic {
                self.again.insert(result.buffer, copy.buffer);
            }
            for view in op.views_mut() {
                if view.buffer == result.buffer {
                    *view = view.rebased(copy.buffer, 0);
                }
            }
        }
        self.out.push(op, segment)
    }

    fn redirect_inputs(&mut self, op: &mut Op, segment: u32) -> Result<(), ProgramError> {
        let written: Vec<BufferId> =
            op.operands().iter().filter(|o| o.access.writes()).map(|o| o.view.buffer).collect();
        let before = op.clone();
        self.redirect(op, segment)?;
        // Results keep their own names here; the caller renames them.
        for (view, old) in op.views_mut().into_iter().zip(before.operands()) {
            if written.contains(&old.view.buffer) {
                *view = old.view;
            }
        }
        Ok(())
    }
}
