//! Runs a program on a device: buffers are allocated and views rewritten once, then every run
//! launches the same list and allocates nothing.
//!
//! Persistent buffers live in [`Memory`] under their names and are shared by all programs of a
//! model. It measures and retries nothing: failures go up to whoever supervises the run.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use pontoon_ops::sums::Sums;
use pontoon_ops::{Backend, BufferId, DeviceError, DeviceErrorKind, DeviceInfo, Op, Support, View};

use crate::checks::{Checks, End, Slot, Step};
use crate::error::ProgramError;
use crate::plan::Plan;
use crate::program::{BufferKind, Program};

/// The named buffers of one device that outlive programs.
#[derive(Debug, Default)]
pub struct Memory {
    buffers: HashMap<String, (BufferId, usize)>,
}

impl Memory {
    /// No buffers yet.
    pub fn new() -> Self {
        Memory::default()
    }

    /// The buffer of a name, allocated (zeroed) if there is none yet.
    pub fn ensure(
        &mut self,
        backend: &mut dyn Backend,
        name: &str,
        bytes: usize,
    ) -> Result<BufferId, ProgramError> {
        if let Some(&(buffer, had)) = self.buffers.get(name) {
            if had != bytes {
                let name = name.to_owned();
                return Err(ProgramError::BufferSize { name, had, want: bytes });
            }
            return Ok(buffer);
        }
        let buffer = backend.alloc(bytes.max(1))?;
        self.buffers.insert(name.to_owned(), (buffer, bytes));
        Ok(buffer)
    }

    /// The buffer of a name and its size, if there is one.
    pub fn get(&self, name: &str) -> Option<(BufferId, usize)> {
        self.buffers.get(name).copied()
    }

    /// Gives a named buffer back to the device, if there is one.
    pub fn release(&mut self, backend: &mut dyn Backend, name: &str) -> Result<(), ProgramError> {
        match self.buffers.remove(name) {
            Some((buffer, _)) => Ok(backend.free(buffer)?),
            None => Ok(()),
        }
    }
}

/// A program loaded on a device.
#[derive(Debug)]
pub struct Executor {
    name: String,
    ops: Vec<Op>,
    inputs: HashMap<String, View>,
    outputs: HashMap<String, View>,
    plan: Plan,
    arena: BufferId,
    checks: Checks,
}

/// Which physical buffers a program runs on, where they are not found by name.
#[derive(Debug, Default)]
struct Places {
    offsets: Vec<(BufferId, usize)>,
}

impl Executor {
    /// Loads a program with an arena of its own.
    pub fn load(
        backend: &mut dyn Backend,
        memory: &mut Memory,
        program: &Program,
    ) -> Result<Self, ProgramError> {
        Executor::load_with(backend, memory, program, &[], None)
    }

    /// Loads a program, with some persistent buffers replaced by name (such as one of several
    /// gradient buffers), and with an arena shared with others that never run at the same time.
    pub fn load_with(
        backend: &mut dyn Backend,
        memory: &mut Memory,
        program: &Program,
        renamed: &[(&str, &str)],
        shared_arena: Option<BufferId>,
    ) -> Result<Self, ProgramError> {
        supported(backend, program)?;
        let plan = Plan::new(program);
        let arena = match shared_arena {
            Some(arena) => arena,
            None => backend.alloc(plan.arena_bytes.max(1))?,
        };
        let mut places = Places::default();
        for (index, buffer) in program.buffers.iter().enumerate() {
            let id = BufferId(index as u32);
            let place = match buffer.kind {
                // A program need not touch every standard buffer; those are not allocated for it.
                BufferKind::Persistent if !program.touches(id) => (arena, 0),
                BufferKind::Persistent => {
                    let pair = renamed.iter().find(|(from, _)| *from == buffer.name);
                    let name = pair.map_or(buffer.name.as_str(), |(_, to)| to);
                    (memory.ensure(backend, name, buffer.bytes)?, 0)
                }
                _ => (arena, plan.offset(id).unwrap_or(0)),
            };
            places.offsets.push(place);
        }
        let mut ops = program.ops.clone();
        for view in ops.iter_mut().flat_map(Op::views_mut) {
            *view = places.physical(view);
        }
        let mut checks = Checks::new(program);
        for slot in &mut checks.slots {
            slot.view = places.physical(&slot.view);
        }
        let ports = |ports: &std::collections::BTreeMap<String, View>| {
            ports.iter().map(|(name, view)| (name.clone(), places.physical(view))).collect()
        };
        Ok(Executor {
            name: program.name.clone(),
            ops,
            inputs: ports(&program.inputs),
            outputs: ports(&program.outputs),
            plan,
            arena,
            checks,
        })
    }

    /// Writes an input.
    pub fn write(
        &self,
        backend: &mut dyn Backend,
        name: &str,
        bytes: &[u8],
    ) -> Result<(), ProgramError> {
        let view = self.port("input", &self.inputs, name)?;
        expect_bytes(name, &view, bytes.len())?;
        Ok(backend.upload(view.buffer, view.byte_offset, bytes)?)
    }

    /// Launches every operation in order; does not wait.
    pub fn run(&self, backend: &mut dyn Backend) -> Result<(), ProgramError> {
        Ok(backend.launch_all(&self.ops)?)
    }

    /// Launches every operation with checks: products must add up, and every tensor must still be
    /// at its last use what it was when it was written; what is not is a `Corrupt` that names it.
    /// Gives the word sums of the persistent buffers it wrote, as they were written.
    pub fn run_checked(
        &self,
        backend: &mut dyn Backend,
    ) -> Result<Vec<(BufferId, u32)>, ProgramError> {
        let mut sums = vec![0; self.checks.slots.len()];
        for (index, (op, step)) in self.ops.iter().zip(&self.checks.steps).enumerate() {
            self.check(backend, &step.before, &sums, index)?;
            let found = match step.ask.is_empty() {
                true => backend.launch(op).map(|()| Sums::default()),
                false => backend.launch_summed(op, step.ask),
            };
            self.settle(step, &found?, &mut sums, index)?;
            let again = self.sums(backend, &step.after)?;
            step.after.iter().zip(again).for_each(|(slot, sum)| sums[*slot] = sum);
        }
        let slots = self.checks.slots.iter().enumerate();
        let read_by_host: Vec<usize> =
            slots.clone().filter(|(_, slot)| slot.end == End::Checked).map(|of| of.0).collect();
        self.check(backend, &read_by_host, &sums, self.ops.len())?;
        let mut alive: Vec<(BufferId, u32)> = Vec::new();
        for (index, slot) in slots.filter(|(_, slot)| slot.end == End::HandedOut) {
            let sum = sums[index];
            match alive.iter_mut().find(|(buffer, _)| *buffer == slot.view.buffer) {
                Some((_, whole)) => *whole = whole.wrapping_add(sum),
                None => alive.push((slot.view.buffer, sum)),
            }
        }
        Ok(alive)
    }

    /// Compares what an operation read with what was written, and notes what it wrote.
    fn settle(
        &self,
        step: &Step,
        found: &Sums,
        sums: &mut [u32],
        index: usize,
    ) -> Result<(), ProgramError> {
        for &(operand, slot) in &step.read {
            if found.read[operand] != sums[slot] {
                return Err(self.changed(slot, index));
            }
        }
        for &(operand, slot) in &step.written {
            let carried = step.carried.iter().find(|(of, _)| *of == operand);
            let before = carried.map_or(0, |(_, slot)| sums[*slot]);
            sums[slot] = found.written[operand].wrapping_add(before);
        }
        Ok(())
    }

    fn sums(&self, backend: &mut dyn Backend, slots: &[usize]) -> Result<Vec<u32>, DeviceError> {
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        let views: Vec<View> = slots.iter().map(|slot| self.checks.slots[*slot].view).collect();
        backend.sums(&views)
    }

    fn check(
        &self,
        backend: &mut dyn Backend,
        slots: &[usize],
        sums: &[u32],
        index: usize,
    ) -> Result<(), ProgramError> {
        let found = self.sums(backend, slots)?;
        match slots.iter().zip(found).find(|(slot, sum)| sums[**slot] != *sum) {
            Some((slot, _)) => Err(self.changed(*slot, index)),
            None => Ok(()),
        }
    }

    fn changed(&self, slot: usize, reader: usize) -> ProgramError {
        let Slot { writer: (place, op, operand), .. } = &self.checks.slots[slot];
        let reader = match self.ops.get(reader) {
            Some(op) => format!("operation {reader} ({:?})", op.name()),
            None => "the end".to_owned(),
        };
        let text =
            format!("`{operand}` of operation {place} ({op:?}) changed in memory before {reader}");
        DeviceError::new(DeviceErrorKind::Corrupt, text).into()
    }

    /// Launches every operation and waits for the end.
    pub fn run_and_wait(
        &self,
        backend: &mut dyn Backend,
        deadline: Duration,
    ) -> Result<(), ProgramError> {
        self.run(backend)?;
        Ok(backend.wait(deadline)?)
    }

    /// Reads an output.
    pub fn read(
        &self,
        backend: &mut dyn Backend,
        name: &str,
        bytes: &mut [u8],
    ) -> Result<(), ProgramError> {
        let view = self.port("output", &self.outputs, name)?;
        expect_bytes(name, &view, bytes.len())?;
        Ok(backend.download(view.buffer, view.byte_offset, bytes)?)
    }

    /// Lets the device keep the matrices of products in the order it likes best, where the program
    /// does not write them. Call it once weights are in place and will stay as they are.
    pub fn prepack(&self, backend: &mut dyn Backend) -> Result<(), ProgramError> {
        let operands = self.ops.iter().flat_map(Op::operands);
        let written = operands.filter(|operand| operand.access.writes());
        let written: HashSet<BufferId> = written.map(|operand| operand.view.buffer).collect();
        let stays = |view: &View| view.buffer != self.arena && !written.contains(&view.buffer);
        let mut ops = self.ops.iter().filter(|op| op.matrix().is_some_and(stays));
        Ok(ops.try_for_each(|op| backend.prepack(op))?)
    }

    /// The loaded operations, on physical buffers.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Where its temporaries lie.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The buffer its temporaries lie in, to share with programs that never run at the same time.
    pub fn arena(&self) -> BufferId {
        self.arena
    }

    fn port(
        &self,
        kind: &'static str,
        ports: &HashMap<String, View>,
        name: &str,
    ) -> Result<View, ProgramError> {
        ports.get(name).copied().ok_or_else(|| {
            let mut known: Vec<String> = ports.keys().cloned().collect();
            known.sort();
            let (program, name) = (self.name.clone(), name.to_owned());
            ProgramError::UnknownPort { program, kind, name, known }
        })
    }
}

impl Places {
    fn physical(&self, view: &View) -> View {
        let (buffer, offset) = self.offsets[view.buffer.0 as usize];
        view.rebased(buffer, offset)
    }
}

impl Program {
    /// Whether some operation uses the buffer.
    fn touches(&self, buffer: BufferId) -> bool {
        let uses = |op: &Op| op.operands().iter().any(|operand| operand.view.buffer == buffer);
        self.ops.iter().any(uses) || self.outputs.values().any(|view| view.buffer == buffer)
    }
}

fn supported(backend: &dyn Backend, program: &Program) -> Result<(), ProgramError> {
    for (index, op) in program.ops.iter().enumerate() {
        if let Support::No(reason) = backend.supports(op) {
            let DeviceInfo { device, .. } = backend.info();
            return Err(ProgramError::Unsupported {
                device: device.clone(),
                program: program.name.clone(),
                index,
                op: op.name(),
                reason: reason.to_owned(),
            });
        }
    }
    Ok(())
}

fn expect_bytes(name: &str, view: &View, got: usize) -> Result<(), ProgramError> {
    let want = view.dtype.bytes(view.elements());
    if want == got {
        return Ok(());
    }
    Err(ProgramError::ByteCount { name: name.to_owned(), want, got })
}
