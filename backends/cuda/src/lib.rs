//! The CUDA backend: every operation of the waist but the exchanges on kernels of its own, compiled
//! for the device when they are first needed.
//!
//! The driver and the run-time compiler are opened at run time; building needs neither. This file
//! is the device: memory, failures, checks. Kernels are in `../kernels/`, what each operation runs
//! in `ops/`, the border to the vendor in `ffi/`. `docs/cuda.md` says what ran where.

mod checks;
pub mod codes;
mod core;
pub mod ffi;
mod graphs;
pub mod memory;
pub mod modules;
pub mod needs;
mod ops;

use std::sync::Arc;
use std::time::Duration;

use pontoon_ops::sums::{Ask, OPERANDS_MAX, Sums, asked, fill_digests};
use pontoon_ops::{
    Access, Backend, BufferId, DType, DeviceError, DeviceErrorKind, DeviceInfo, Op, Support, View,
};

use crate::core::Core;
use crate::ffi::compiler::Compiler;
pub use crate::ffi::library::Library;
use crate::ffi::session::Session;
use crate::graphs::Graphs;
use crate::memory::{Buffers, Scratch, WAIT_MAX};
use crate::modules::Modules;

/// The oldest architecture whose tensor cores and copies the kernels use.
const CAPABILITY_MIN: (i32, i32) = (8, 0);

/// One device of the driver.
pub struct CudaBackend {
    info: DeviceInfo,
    core: Core,
    /// Lists of operations that come again.
    graphs: Graphs,
    /// The failure after which nothing is started any more.
    failed: Option<DeviceError>,
}

impl CudaBackend {
    /// How many devices the driver counts.
    pub fn count(library: &Library) -> Result<u32, DeviceError> {
        Session::count(library)
    }

    /// Opens device `ordinal`. `device` is what reports call it.
    pub fn open(library: &Arc<Library>, device: &str, ordinal: i32) -> Result<Self, DeviceError> {
        let session = Session::open(library, ordinal)?;
        let (major, minor) = session.capability;
        let chip = session.chip();
        if session.capability < CAPABILITY_MIN {
            let text = format!("{chip} has compute capability {major}.{minor}; 8.0 is the least");
            return Err(DeviceError::new(DeviceErrorKind::Unsupported, text));
        }
        let compiler = Compiler::new(library)?;
        let version = compiler.version;
        let info = DeviceInfo {
            device: device.to_owned(),
            // What fixes a result's bits: the tensor cores, and the compiler's own functions.
            numeric_class: format!("cuda/sm_{major}{minor}/nvrtc-{}.{}", version.0, version.1),
            emulated: false,
            chip,
            memory_bytes: session.memory_bytes(),
            compute_units: session.multiprocessors,
            matrix_dtypes: vec![DType::Bf16, DType::F16],
        };
        let modules = Modules::new(compiler);
        let (buffers, scratch) = (Buffers::default(), Scratch::default());
        let core = Core { session, modules, buffers, scratch };
        Ok(CudaBackend { info, core, graphs: Graphs::default(), failed: None })
    }

    /// Runs something on the device, unless it has failed; keeps a failure that it does not
    /// recover from.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Core) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        self.guarded_with(|core, _| work(core))
    }

    /// The same with the remembered lists.
    fn guarded_with<T>(
        &mut self,
        work: impl FnOnce(&mut Core, &mut Graphs) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let (core, graphs) = (&mut self.core, &mut self.graphs);
        let done = core.session.enter().and_then(|()| work(core, graphs));
        done.inspect_err(|error| {
            let kinds =
                [DeviceErrorKind::Lost, DeviceErrorKind::Hang, DeviceErrorKind::MemoryFault];
            if kinds.contains(&error.kind) {
                self.failed = Some(error.clone());
            }
        })
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        self.guarded(|core| {
            let address = core.session.malloc(bytes)?;
            core.session.fill(address, bytes, 0)?;
            Ok(core.buffers.add(address, bytes))
        })
    }

    fn free(&mut self, buffer: BufferId) -> Result<(), DeviceError> {
        self.guarded_with(|core, graphs| {
            let address = core.buffers.remove(buffer)?;
            graphs.forget(core, buffer);
            core.session.free(address)
        })
    }

    fn upload(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        self.guarded(|core| {
            let address = core.buffers.range(buffer, byte_offset, bytes.len())?;
            core.session.up(address, bytes)
        })
    }

    fn download(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.guarded(|core| {
            let address = core.buffers.range(buffer, byte_offset, bytes.len())?;
            core.session.down(address, bytes, WAIT_MAX)
        })
    }

    fn digest(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: usize,
    ) -> Result<u64, DeviceError> {
        self.guarded(|core| {
            let address = core.buffers.range(buffer, byte_offset, bytes)?;
            core.begin()?;
            checks::digest_of(core, address, bytes)
        })
    }

    fn supports(&self, op: &Op) -> Support {
        needs::refused(op).map_or(Support::Yes, Support::No)
    }

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.guarded(|core| {
            core.begin()?;
            ops::run(core, op)
        })
    }

    fn launch_all(&mut self, ops: &[Op]) -> Result<(), DeviceError> {
        self.guarded_with(|core, graphs| graphs.launch(core, ops))
    }

    fn sums_in_place(&self) -> bool {
        true
    }

    fn sums(&mut self, views: &[View]) -> Result<Vec<u32>, DeviceError> {
        self.guarded(|core| {
            core.begin()?;
            let at = checks::room_for_sums(core, views.len())?;
            checks::start_sums(core, views, at)?;
            checks::read_sums(core, at, views.len())
        })
    }

    fn launch_summed(&mut self, op: &Op, ask: Ask) -> Result<Sums, DeviceError> {
        let operands = op.operands();
        let mut digests = [0; OPERANDS_MAX];
        fill_digests(self, &operands, ask.digested, Access::reads, &mut digests)?;
        let mut sums = self.guarded(|core| {
            core.begin()?;
            let lists = [ask.read, ask.changed, ask.written | ask.changed].map(|mask| {
                let list: (Vec<usize>, Vec<View>) = asked(&operands, mask).unzip();
                list
            });
            let [(read, _), (changed, _), (written, _)] = &lists;
            let count = read.len() + changed.len() + written.len();
            let at = checks::room_for_sums(core, count)?;
            checks::start_sums(core, &lists[0].1, at)?;
            checks::start_sums(core, &lists[1].1, at + 4 * read.len())?;
            ops::run(core, op)?;
            checks::start_sums(core, &lists[2].1, at + 4 * (read.len() + changed.len()))?;
            let mut sums = Sums::default();
            if count > 0 {
                let found = checks::read_sums(core, at, count)?;
                let (reads, rest) = found.split_at(read.len());
                let (befores, writes) = rest.split_at(changed.len());
                let mut before = [0; OPERANDS_MAX];
                read.iter().zip(reads).for_each(|(place, sum)| sums.read[*place] = *sum);
                changed.iter().zip(befores).for_each(|(place, sum)| before[*place] = *sum);
                written.iter().zip(writes).for_each(|(place, sum)| sums.written[*place] = *sum);
                sums.subtract(&before);
            }
            Ok(sums)
        })?;
        sums.digest_read = digests;
        fill_digests(self, &operands, ask.digested, Access::writes, &mut sums.digest_written)?;
        Ok(sums)
    }

    fn wait(&mut self, deadline: Duration) -> Result<(), DeviceError> {
        self.guarded(|core| core.session.synchronize(deadline))
    }

    fn memory_used(&self) -> usize {
        self.core.buffers.bytes() + self.core.scratch.bytes()
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        let core = &mut self.core;
        let ended = self.failed.is_none()
            && core.session.enter().is_ok()
            && core.session.synchronize(WAIT_MAX).is_ok();
        if ended {
            self.graphs.close(core);
            core.scratch.close(&core.session);
            for address in core.buffers.drain() {
                // Nothing can be done about a failure while closing.
                let _ = core.session.free(address);
            }
            core.session.close();
        }
    }
}
