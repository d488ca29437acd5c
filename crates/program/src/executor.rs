//! Runs a program on a device: buffers are allocated and views rewritten once, then every run
//! launches the same list and allocates nothing.
//!
//! Persistent buffers live in [`Memory`] under their names and are shared by all programs of a
//! model. It measures and retries nothing: failures go up to whoever supervises the run.

use std::collections::HashMap;
use std::time::Duration;

use pontoon_ops::{Backend, BufferId, DeviceInfo, Op, Support, View};

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
