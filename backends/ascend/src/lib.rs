//! The Ascend backend: every operation of the waist through CANN's public C interface, opened at
//! run time, in deterministic mode, with a limit on every wait.
//!
//! This file is the device: memory, the `match` over operations, failures. Compositions of vendor
//! calls are in `ops/`, the border to the vendor in `ffi/`. Nothing here has run on silicon yet;
//! `docs/ascend.md` says what ran where. Read next: `ABI.md`.

pub mod codes;
mod core;
mod fault;
pub mod ffi;
pub mod memory;
pub mod needs;
mod ops;
mod tensor;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pontoon_ops::{
    Backend, BufferId, DType, DeviceError, DeviceErrorKind, DeviceInfo, Op, OpName, Support,
};

use crate::core::Core;
pub use crate::ffi::library::{Library, Lookup};
use crate::ffi::operators::Operators;
use crate::ffi::session::Session;
pub use crate::ffi::table::Operator;
use crate::memory::WAIT_MAX;

/// A chip says so in its name if it is none.
const EMULATED: &str = "emulat";

/// One device of a CANN library.
pub struct AscendBackend {
    info: DeviceInfo,
    core: Core,
    /// What it cannot do, and why.
    waived: BTreeMap<OpName, &'static str>,
    /// The failure after which nothing is started any more.
    failed: Option<DeviceError>,
    /// Whether tasks may still run.
    busy: bool,
}

impl AscendBackend {
    /// How many devices a library counts.
    pub fn count(library: &Arc<Library>) -> Result<u32, DeviceError> {
        Session::count(Arc::clone(library))
    }

    /// Opens device `ordinal` of a library. `device` is what reports call it.
    pub fn open(library: &Arc<Library>, device: &str, ordinal: i32) -> Result<Self, DeviceError> {
        let session = Session::open(Arc::clone(library), ordinal)?;
        let chip = session.chip();
        let class = match session.determinism {
            3 => "batch-invariant",
            1 => "deterministic",
            _ => "not deterministic",
        };
        let info = DeviceInfo {
            device: device.to_owned(),
            numeric_class: format!("ascend/{chip}/{class}"),
            emulated: chip.to_lowercase().contains(EMULATED),
            chip,
            memory_bytes: session.memory_bytes(),
            compute_units: 1,
            matrix_dtypes: vec![DType::F16, DType::Bf16, DType::F32],
        };
        let waived =
            needs::waived(&|operator| Operators::has(&session, operator), session.determinism);
        Ok(AscendBackend { info, core: Core::new(session), waived, failed: None, busy: false })
    }

    /// Devices of a library, by what reports call them and by number, opened to exchange with one
    /// another as group 0.
    pub fn group(
        library: &Arc<Library>,
        devices: &[(String, i32)],
    ) -> Result<Vec<Self>, DeviceError> {
        let open = |(name, ordinal): &(String, i32)| Self::open(library, name, *ordinal);
        let mut members: Vec<Self> = devices.iter().map(open).collect::<Result<_, _>>()?;
        let ordinals: Vec<i32> = devices.iter().map(|(_, ordinal)| *ordinal).collect();
        let Some(first) = members.first() else { return Ok(members) };
        let communicators = first.core.session.communicators(&ordinals)?;
        for (member, communicator) in members.iter_mut().zip(communicators) {
            member.core.communicator = Some(communicator);
        }
        Ok(members)
    }

    /// Every vendor operator that was called so far.
    pub fn operators_used(&self) -> Vec<Operator> {
        self.core.operators.used().iter().copied().collect()
    }

    /// Runs something on the device, unless it has failed; keeps a failure that it does not
    /// recover from.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let done = self.core.session.enter().and_then(|()| work(self));
        done.map_err(|error| self.fail(error))
    }

    fn fail(&mut self, error: DeviceError) -> DeviceError {
        let kinds = [DeviceErrorKind::Lost, DeviceErrorKind::Hang, DeviceErrorKind::MemoryFault];
        if !kinds.contains(&error.kind) {
            return error;
        }
        let error = fault::take_stock(&mut self.core, error);
        self.failed = Some(error.clone());
        error
    }

    fn forget_results(&mut self, op: &Op) {
        for operand in op.operands().iter().filter(|operand| operand.access.writes()) {
            let view = operand.view;
            self.core.buffers.forget(view.buffer, view.byte_offset, view.span_bytes());
        }
    }
}

impl Backend for AscendBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn alloc(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        self.guarded(|this| {
            let session = &mut this.core.session;
            let address = session.malloc(bytes.max(1).next_multiple_of(512))?;
            session.fill(address, bytes.max(1), 0)?;
            this.busy = true;
            Ok(this.core.buffers.add(address, bytes))
        })
    }

    fn free(&mut self, buffer: BufferId) -> Result<(), DeviceError> {
        self.guarded(|this| {
            // Tasks that were started before may still use it.
            if std::mem::take(&mut this.busy) {
                this.core.session.synchronize(WAIT_MAX)?;
            }
            let address = this.core.buffers.remove(buffer)?;
            this.core.session.free(address)
        })
    }

    fn upload(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        self.guarded(|this| {
            let address = this.core.buffers.range(buffer, byte_offset, bytes.len())?;
            this.core.buffers.remember(buffer, byte_offset, bytes);
            this.busy = true;
            this.core.staging.up(&mut this.core.session, address, bytes)
        })
    }

    fn download(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.guarded(|this| {
            let address = this.core.buffers.range(buffer, byte_offset, bytes.len())?;
            this.core.staging.down(&mut this.core.session, address, bytes)
        })
    }

    fn supports(&self, op: &Op) -> Support {
        if let Some(reason) = self.waived.get(&op.name()) {
            return Support::No(reason);
        }
        match needs::limits(op) {
            Some(reason) => Support::No(reason),
            None if needs::is_exchange(op) && self.core.communicator.is_none() => {
                Support::No(&needs::waiver(needs::When::Alone).reason)
            }
            None => Support::Yes,
        }
    }

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.guarded(|this| {
            this.busy = true;
            let started = this.core.begin().and_then(|()| ops::run(&mut this.core, op));
            this.forget_results(op);
            started
        })
    }

    fn wait(&mut self, deadline: Duration) -> Result<(), DeviceError> {
        self.guarded(|this| {
            this.core.session.synchronize(deadline)?;
            this.busy = false;
            match &this.core.communicator {
                Some(communicator) => this.core.session.collective_state(communicator),
                None => Ok(()),
            }
        })
    }

    fn memory_used(&self) -> usize {
        self.core.buffers.bytes() + self.core.own_bytes()
    }
}

impl Drop for AscendBackend {
    fn drop(&mut self) {
        let ended = self.failed.is_none()
            && self.core.session.enter().is_ok()
            && self.core.session.synchronize(WAIT_MAX).is_ok();
        self.core.close(!ended);
    }
}
