//! A program with everything it reads, and how it runs on a device from first to last.
//!
//! The programs and the contents are a model's; whoever knows the model makes them. Read next:
//! `exact.rs` (the same in f64), `bisect.rs` (operation by operation).

use std::collections::BTreeMap;
use std::time::Duration;

use pontoon_ops::{Backend, BufferId, Op};
use pontoon_program::{BufferKind, Executor, Memory, Program};

use crate::error::QualifyError;

/// No step takes longer on a device that works.
const DEADLINE: Duration = Duration::from_secs(600);

/// A program and the contents of its buffers.
#[derive(Clone, Debug)]
pub struct Step {
    /// What runs.
    pub program: Program,
    /// Bytes by buffer name: weights, constants, inputs. What is not named starts as zeros.
    pub contents: BTreeMap<String, Vec<u8>>,
}

impl Step {
    /// Joins a program with its contents. Contents of buffers it does not have are dropped.
    pub fn new(
        program: Program,
        contents: impl IntoIterator<Item = (String, Vec<u8>)>,
    ) -> Result<Step, QualifyError> {
        let mut kept = BTreeMap::new();
        for (name, bytes) in contents {
            let Some(buffer) = program.buffers.iter().find(|buffer| buffer.name == name) else {
                continue;
            };
            if buffer.bytes != bytes.len() {
                let (want, got) = (buffer.bytes, bytes.len());
                return Err(QualifyError::Contents { program: program.name, name, want, got });
            }
            kept.insert(name, bytes);
        }
        Ok(Step { program, contents: kept })
    }

    /// The bytes of a buffer before the step.
    pub fn before(&self, buffer: BufferId) -> Vec<u8> {
        let declared = self.program.buffer(buffer);
        let given = self.contents.get(&declared.name).cloned();
        given.unwrap_or_else(|| vec![0; declared.bytes])
    }

    /// Whether an operation uses a buffer.
    pub fn uses(&self, buffer: BufferId) -> bool {
        let touches = |op: &Op| op.operands().iter().any(|o| o.view.buffer == buffer);
        self.program.ops.iter().any(touches)
    }

    /// Runs the step and reads the named outputs and persistent buffers.
    pub fn run(
        &self,
        backend: &mut dyn Backend,
        wanted: &[&str],
    ) -> Result<BTreeMap<String, Vec<u8>>, QualifyError> {
        let mut memory = Memory::new();
        let result = self.run_in(backend, &mut memory, wanted);
        for buffer in &self.program.buffers {
            memory.release(backend, &buffer.name)?;
        }
        result
    }

    fn run_in(
        &self,
        backend: &mut dyn Backend,
        memory: &mut Memory,
        wanted: &[&str],
    ) -> Result<BTreeMap<String, Vec<u8>>, QualifyError> {
        let executor = Executor::load(backend, memory, &self.program)?;
        for buffer in &self.program.buffers {
            let Some(bytes) = self.contents.get(&buffer.name) else { continue };
            match (buffer.kind, memory.get(&buffer.name)) {
                (BufferKind::Input, _) => executor.write(backend, &buffer.name, bytes)?,
                (_, Some((place, _))) => backend.upload(place, 0, bytes)?,
                // A standard buffer that this program does not touch.
                (_, None) => {}
            }
        }
        executor.run_and_wait(backend, DEADLINE)?;
        let mut read = BTreeMap::new();
        for &name in wanted {
            let bytes = match memory.get(name) {
                Some((buffer, size)) => {
                    let mut bytes = vec![0; size];
                    backend.download(buffer, 0, &mut bytes)?;
                    bytes
                }
                None => {
                    let view = self.program.output(name)?;
                    let mut bytes = vec![0; view.dtype.bytes(view.elements())];
                    executor.read(backend, name, &mut bytes)?;
                    bytes
                }
            };
            read.insert(name.to_owned(), bytes);
        }
        backend.free(executor.arena())?;
        Ok(read)
    }
}
