//! The first operation of a program on which two devices do not agree.
//!
//! The program runs operation by operation; both devices get the first device's inputs, so errors
//! do not add up and the operation that is named is the one that is wrong. Where results differ in
//! any bit, the f64 reference says whose error is beyond the operation's tolerance. Afterwards
//! each device runs the program at once, which must leave the bits it left one by one. What comes
//! of a finding is the caller's business. Read next: `reproducer.rs`.

use std::time::Duration;

use pontoon_ops::cost::cost;
use pontoon_ops::{Access, Backend, BufferId, DType, DeviceErrorKind, Op, Support, View};
use serde::Serialize;

use crate::cases::Case;
use crate::conformance::{assess, launch};
use crate::error::QualifyError;
use crate::invariance::rows_only;
use crate::memory::{GUARD_BYTES, Memory};
use crate::step::Step;

/// Bytes to which an operand's place in its buffer stays aligned when it is taken out.
const ALIGNMENT: usize = 64;
/// Products above this are judged on the rows that differ most, as the reference is slow.
const JUDGED_FLOPS_MAX: f64 = 4e9;
/// No program takes longer on a device that works.
const DEADLINE: Duration = Duration::from_secs(600);

/// What is wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Wrong {
    /// Its result is beyond the operation's tolerance.
    Result,
    /// A second run on the same inputs gave other bits.
    Repeat,
    /// Alone it is right; in the whole program it left other bits.
    Sequence,
    /// The device cannot run it.
    Unsupported,
    /// The device failed on it.
    Failed,
}

/// Which of the two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// The first.
    First,
    /// The second.
    Second,
}

/// The first operation on which two devices disagree.
#[derive(Clone, Debug, Serialize)]
pub struct Divergence {
    /// The program.
    pub program: String,
    /// The operation's place in it.
    pub op_index: usize,
    /// The operation's name.
    pub op: &'static str,
    /// The program's segment: 0 before the first layer, then layer by layer from 1.
    pub segment: u32,
    /// The written operand that is wrong.
    pub tensor: String,
    /// Its dtype.
    pub dtype: DType,
    /// What is wrong.
    pub wrong: Wrong,
    /// Whose result it is.
    pub device: Which,
    /// Each device's worst error, as a share of the tolerance, where it was judged.
    pub errors: [Option<f64>; 2],
    /// What is wrong, and where.
    pub detail: String,
    /// The operation with its inputs, as small as it still shows; absent if alone it is right.
    #[serde(skip)]
    pub case: Option<Case>,
}

/// What a program's run showed.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Operations that ran on both devices.
    pub ops: usize,
    /// Those whose results were the same bits.
    pub identical: usize,
    /// The largest error that was within tolerance, as a share of it, and its operation.
    pub closest: Option<(f64, String)>,
    /// The first disagreement, if there is one.
    pub divergence: Option<Divergence>,
}

/// Runs a program op by op on both devices. `seen` hears how many operations are done.
pub fn bisect(
    step: &Step,
    first: &mut dyn Backend,
    second: &mut dyn Backend,
    seen: &mut dyn FnMut(usize),
) -> Result<Outcome, QualifyError> {
    let mut state = State::new(step);
    let mut outcome = Outcome { ops: 0, identical: 0, closest: None, divergence: None };
    let mut own = Vec::with_capacity(step.program.ops.len());
    for (index, op) in step.program.ops.iter().enumerate() {
        let taken = state.take(step, index);
        let mut pair = Pair { step, index, case: &taken.case, first, second };
        let (found, after) = pair.run(&mut outcome);
        outcome.ops = index + 1;
        seen(index + 1);
        if let Some(divergence) = found {
            outcome.divergence = Some(divergence);
            return Ok(outcome);
        }
        let after = after.expect("an operation without a finding has a result");
        state.put(&taken, &after);
        own.push(fingerprint(op, &state.memory));
    }
    outcome.divergence = match together(step, first, &own)? {
        Some(index) => Some(describe(step, index, Which::First)),
        None => {
            // The second device's own chain of results, each from its own inputs.
            let mut state = State::new(step);
            let mut own = Vec::with_capacity(step.program.ops.len());
            for (index, op) in step.program.ops.iter().enumerate() {
                let taken = state.take(step, index);
                let after = launch(second, &taken.case)?;
                state.put(&taken, &after);
                own.push(fingerprint(op, &state.memory));
            }
            together(step, second, &own)?.map(|index| describe(step, index, Which::Second))
        }
    };
    Ok(outcome)
}

/// Every buffer of a program on the host.
struct State {
    memory: Memory,
}

/// An operation taken out of a program, and where its buffers come from.
struct Taken {
    case: Case,
    /// For each buffer of the case: the program's buffer, its first byte and its length.
    from: Vec<(BufferId, usize, usize)>,
}

impl State {
    fn new(step: &Step) -> State {
        let mut memory = Memory::default();
        for index in 0..step.program.buffers.len() {
            let buffer = BufferId(index as u32);
            memory.add(if step.uses(buffer) { step.before(buffer) } else { Vec::new() });
        }
        State { memory }
    }

    /// Takes an operation out with the bytes around its operands, each buffer between guards and
    /// what it only writes poisoned.
    fn take(&self, step: &Step, index: usize) -> Taken {
        let mut op = step.program.ops[index].clone();
        let operands = op.operands();
        let mut from: Vec<(BufferId, usize, usize)> = Vec::new();
        for operand in &operands {
            let view = operand.view;
            let start = view.byte_offset / ALIGNMENT * ALIGNMENT;
            let end = view.byte_offset + view.span_bytes();
            match from.iter_mut().find(|(buffer, ..)| *buffer == view.buffer) {
                Some((_, first, length)) => {
                    let last = end.max(*first + *length);
                    *first = start.min(*first);
                    *length = last - *first;
                }
                None => from.push((view.buffer, start, end - start)),
            }
        }
        let mut memory = Memory::default();
        for &(buffer, start, length) in &from {
            let room = length.next_multiple_of(8);
            let mut bytes = vec![0xa5; room + 2 * GUARD_BYTES];
            let source = &self.memory.buffers()[buffer.0 as usize][start..start + length];
            bytes[GUARD_BYTES..GUARD_BYTES + length].copy_from_slice(source);
            memory.add(bytes);
        }
        for view in op.views_mut() {
            let place = from.iter().position(|(buffer, ..)| *buffer == view.buffer);
            let place = place.expect("every operand's buffer was listed above");
            view.byte_offset = view.byte_offset - from[place].1 + GUARD_BYTES;
            view.buffer = BufferId(place as u32);
        }
        poison(&op, &mut memory);
        let float = operands.iter().find(|operand| operand.view.dtype.is_float());
        let dtype = float.map_or(DType::F32, |operand| operand.view.dtype);
        let name = format!("operation {index} of {}", step.program.name);
        Taken { case: Case { name, op, dtype, memory }, from }
    }

    /// Puts back what the operation wrote, and nothing else.
    fn put(&mut self, taken: &Taken, after: &Memory) {
        for (index, &(buffer, start, length)) in taken.from.iter().enumerate() {
            let writes = taken.case.op.operands().into_iter().any(|operand| {
                operand.access.writes() && operand.view.buffer == BufferId(index as u32)
            });
            if writes {
                let bytes = &after.buffers()[index][GUARD_BYTES..GUARD_BYTES + length];
                self.memory.buffers_mut()[buffer.0 as usize][start..start + length]
                    .copy_from_slice(bytes);
            }
        }
    }
}

/// Fills with NaN what an operation only writes, so that what it leaves out shows.
fn poison(op: &Op, memory: &mut Memory) {
    let operands = op.operands();
    for operand in operands.iter().filter(|operand| operand.access == Access::Write) {
        let mut others = operands.iter().filter(|other| other.access.reads());
        // In place: what is overwritten is also read.
        if others.any(|other| other.view.may_overlap(&operand.view)) {
            continue;
        }
        let value = if operand.view.dtype.is_float() { f64::NAN } else { -777.0 };
        memory.write(&operand.view, &vec![value; operand.view.elements()]);
    }
}

/// One operation on two devices.
struct Pair<'a> {
    step: &'a Step,
    index: usize,
    case: &'a Case,
    first: &'a mut dyn Backend,
    second: &'a mut dyn Backend,
}

impl Pair<'_> {
    /// Runs the operation on both; gives what is wrong, else the first device's memory after it.
    fn run(&mut self, outcome: &mut Outcome) -> (Option<Divergence>, Option<Memory>) {
        let mut after = Vec::new();
        for which in [Which::First, Which::Second] {
            match self.run_on(which) {
                Ok(memory) => after.push(memory),
                Err(divergence) => return (Some(*divergence), None),
            }
        }
        let (second, first) = (after.pop().expect("two ran"), after.pop().expect("two ran"));
        if first == second {
            outcome.identical += 1;
            return (None, Some(first));
        }
        let errors = self.errors(&first, &second);
        for (which, (share, detail)) in [Which::First, Which::Second].into_iter().zip(&errors) {
            if !detail.is_empty() {
                let shares = [Some(errors[0].0), Some(errors[1].0)];
                let mut found = self.divergence(which, Wrong::Result, detail.clone());
                found.errors = shares;
                found.tensor = self.differing(&first, &second);
                found.case = Some(self.smallest(which, &first, &second));
                return (Some(found), None);
            }
            if outcome.closest.as_ref().is_none_or(|(most, _)| share > most) {
                let name = format!("{} {}", self.index, self.case.op.name().name());
                outcome.closest = Some((*share, name));
            }
        }
        (None, Some(first))
    }

    fn backend(&mut self, which: Which) -> &mut dyn Backend {
        match which {
            Which::First => self.first,
            Which::Second => self.second,
        }
    }

    /// Runs the operation twice on one device.
    fn run_on(&mut self, which: Which) -> Result<Memory, Box<Divergence>> {
        let case = self.case;
        if let Support::No(reason) = self.backend(which).supports(&case.op) {
            return Err(Box::new(self.divergence(which, Wrong::Unsupported, reason.to_owned())));
        }
        let mut once = || launch(self.backend(which), case);
        let (one, two) = match once().and_then(|one| Ok((one, once()?))) {
            Ok(both) => both,
            Err(error) => {
                let wrong = match error.kind {
                    DeviceErrorKind::Unsupported => Wrong::Unsupported,
                    _ => Wrong::Failed,
                };
                return Err(Box::new(self.divergence(which, wrong, error.to_string())));
            }
        };
        if one == two {
            return Ok(one);
        }
        let tensor = self.differing(&one, &two);
        let detail = format!("a second run on the same inputs gave other bits in `{tensor}`");
        let mut found = self.divergence(which, Wrong::Repeat, detail);
        found.tensor = tensor;
        Err(Box::new(found))
    }

    /// Each device's worst error and what is wrong with it; of a large product on the rows that
    /// differ most.
    fn errors(&mut self, first: &Memory, second: &Memory) -> [(f64, String); 2] {
        if cost(&self.case.op).matrix_flops > JUDGED_FLOPS_MAX
            && let Some(part) = self.narrowed(first, second)
            && let (Ok(a), Ok(b)) = (launch(self.first, &part), launch(self.second, &part))
        {
            return [assess(&part, &a), assess(&part, &b)];
        }
        [assess(self.case, first), assess(self.case, second)]
    }

    /// The case on the one row where the results differ most.
    fn narrowed(&self, first: &Memory, second: &Memory) -> Option<Case> {
        let operands = self.case.op.operands();
        let mut worst: (f64, usize) = (-1.0, 0);
        for operand in operands.iter().filter(|o| o.access.writes()) {
            let width = operand.view.elements() / operand.view.dim(0).max(1);
            let pairs = first.read(&operand.view).into_iter().zip(second.read(&operand.view));
            for (index, (a, b)) in pairs.enumerate() {
                let apart = if a.is_nan() == b.is_nan() { (a - b).abs() } else { f64::INFINITY };
                if apart > worst.0 {
                    worst = (apart, index / width.max(1));
                }
            }
        }
        rows_only(self.case, &(worst.1..worst.1 + 1))
    }

    /// The smallest case on which the device is still wrong.
    fn smallest(&mut self, which: Which, first: &Memory, second: &Memory) -> Case {
        let Some(mut part) = self.narrowed(first, second) else { return self.case.clone() };
        part.name = format!("{}, one row", part.name);
        match launch(self.backend(which), &part) {
            Ok(got) if !assess(&part, &got).1.is_empty() => compact(&part),
            _ => self.case.clone(),
        }
    }

    /// The first written operand that differs between two memories.
    fn differing(&self, one: &Memory, other: &Memory) -> String {
        let operands = self.case.op.operands();
        let mut written = operands.iter().filter(|operand| operand.access.writes());
        let found = written.find(|o| one.bits(&o.view) != other.bits(&o.view));
        found.map_or("bytes outside the results", |operand| operand.name).to_owned()
    }

    fn divergence(&self, device: Which, wrong: Wrong, detail: String) -> Divergence {
        let mut found = describe(self.step, self.index, device);
        found.wrong = wrong;
        found.detail = detail;
        found.case = Some(self.case.clone());
        found
    }
}

/// Leaves out the bytes that a case cut down to some rows no longer needs.
fn compact(case: &Case) -> Case {
    let mut buffers = case.memory.buffers().to_vec();
    for (index, bytes) in buffers.iter_mut().enumerate() {
        let views: Vec<View> = case.op.operands().into_iter().map(|o| o.view).collect();
        let own = views.iter().filter(|view| view.buffer == BufferId(index as u32));
        let end = own.map(|view| view.byte_offset + view.span_bytes()).max().unwrap_or(0);
        bytes.truncate((end.next_multiple_of(8) + GUARD_BYTES).min(bytes.len()));
    }
    let mut memory = Memory::default();
    for bytes in buffers {
        memory.add(bytes);
    }
    Case { memory, ..case.clone() }
}

/// A finding in the whole program; the other kinds change what differs.
fn describe(step: &Step, index: usize, device: Which) -> Divergence {
    let op = &step.program.ops[index];
    let operands = op.operands();
    let written = operands.iter().find(|operand| operand.access.writes());
    Divergence {
        program: step.program.name.clone(),
        op_index: index,
        op: op.name().name(),
        segment: step.program.segments[index],
        tensor: written.map_or("", |operand| operand.name).to_owned(),
        dtype: written.map_or(DType::F32, |operand| operand.view.dtype),
        wrong: Wrong::Sequence,
        device,
        errors: [None, None],
        detail: "alone it is right, in the whole program it left other bits: a result is used \
                 before it is there, or something was left over from an earlier operation"
            .to_owned(),
        case: None,
    }
}

/// The hash of everything an operation wrote.
fn fingerprint(op: &Op, memory: &Memory) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for operand in op.operands().iter().filter(|operand| operand.access.writes()) {
        hasher.update(bytemuck::cast_slice(&memory.bits(&operand.view)));
    }
    hasher.finalize()
}

/// Runs the whole program at once; gives the first operation whose result is not what it was when
/// operations ran one by one.
fn together(
    step: &Step,
    backend: &mut dyn Backend,
    alone: &[blake3::Hash],
) -> Result<Option<usize>, QualifyError> {
    let program = &step.program;
    let mut places = Vec::new();
    for index in 0..program.buffers.len() {
        let buffer = BufferId(index as u32);
        if !step.uses(buffer) {
            places.push(None);
            continue;
        }
        let bytes = step.before(buffer);
        let place = backend.alloc(bytes.len().max(1))?;
        backend.upload(place, 0, &bytes)?;
        places.push(Some(place));
    }
    let mut ops = program.ops.clone();
    for view in ops.iter_mut().flat_map(Op::views_mut) {
        let place = places[view.buffer.0 as usize];
        *view = view.rebased(place.expect("buffers in use have a place"), 0);
    }
    backend.launch_all(&ops)?;
    backend.wait(DEADLINE)?;
    let mut memory = Memory::default();
    for (index, place) in places.iter().enumerate() {
        let mut bytes = vec![0; if place.is_some() { program.buffers[index].bytes } else { 0 }];
        if let Some(place) = *place {
            backend.download(place, 0, &mut bytes)?;
            backend.free(place)?;
        }
        memory.add(bytes);
    }
    let kept = |index: &usize| {
        let written = |op: &Op| -> Vec<View> {
            op.operands().iter().filter(|o| o.access.writes()).map(|o| o.view).collect()
        };
        let own = written(&program.ops[*index]);
        let later = program.ops[index + 1..].iter().flat_map(written);
        later.into_iter().all(|view| own.iter().all(|own| !own.may_overlap(&view)))
    };
    let differs = |index: &usize| fingerprint(&program.ops[*index], &memory) != alone[*index];
    Ok((0..program.ops.len()).filter(kept).find(differs))
}
