//! The trait a vendor implements: memory, operations, waiting.
//!
//! A backend owns its buffers and streams, runs operations in the order they are launched, and
//! never panics on bad input. It checks no shapes: [`Op::check`] has run before `launch`.

use std::time::Duration;

use crate::digest;
use crate::dtype::DType;
use crate::error::DeviceError;
use crate::op::Op;
use crate::sums::{self, Ask, Sums};
use crate::view::{BufferId, View};

/// What a device is, for reports, snapshots and placement.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceInfo {
    /// The device as the user names it, such as `cpu`.
    pub device: String,
    /// The class within which equal inputs give equal bits: vendor, chip and kernel set.
    pub numeric_class: String,
    /// The chip's own name.
    pub chip: String,
    /// Whether the device is emulated; reports and docs repeat it.
    pub emulated: bool,
    /// Bytes of device memory.
    pub memory_bytes: u64,
    /// Threads, streaming multiprocessors or cores that work on one operation.
    pub compute_units: usize,
    /// Element types with a fast matrix path.
    pub matrix_dtypes: Vec<DType>,
}

/// Whether a backend can run an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// It can, in the given dtypes and shapes.
    Yes,
    /// It cannot, for the stated reason (also in its `waivers.toml`).
    No(&'static str),
}

/// One device of one vendor.
///
/// Work is ordered: an operation sees the effects of everything launched before it, and of every
/// upload. `download` waits for what it reads.
pub trait Backend: Send {
    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    /// Allocates `bytes` zeroed bytes, aligned for every dtype and vector width of the device.
    fn alloc(&mut self, bytes: usize) -> Result<BufferId, DeviceError>;

    /// Gives a buffer back. Using it afterwards is a `BadArgument`.
    fn free(&mut self, buffer: BufferId) -> Result<(), DeviceError>;

    /// Copies host bytes into a buffer from `byte_offset` on.
    fn upload(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError>;

    /// Copies from a buffer into host bytes, after all launched work that writes them.
    fn download(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError>;

    /// A part of a buffer where the host can read and write it in place, after all launched work
    /// that uses it; none where the host reaches the device's memory by copies only.
    fn mapped(
        &mut self,
        _buffer: BufferId,
        _byte_offset: usize,
        _bytes: usize,
    ) -> Result<Option<&mut [u8]>, DeviceError> {
        Ok(None)
    }

    /// The digest of a part of a buffer, as [`digest::Blocks`] defines it, after all launched work
    /// that writes it. A device with the means computes it in place.
    fn digest(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: usize,
    ) -> Result<u64, DeviceError> {
        let mut block = vec![0; digest::BLOCK.min(bytes)];
        let mut blocks = digest::Blocks::default();
        for at in (0..bytes).step_by(digest::BLOCK) {
            let block = &mut block[..digest::BLOCK.min(bytes - at)];
            self.download(buffer, byte_offset + at, block)?;
            blocks.push(block);
        }
        Ok(blocks.finish())
    }

    /// Whether `op` can run here.
    fn supports(&self, op: &Op) -> Support;

    /// Starts one operation.
    fn launch(&mut self, op: &Op) -> Result<(), DeviceError>;

    /// Starts a list of operations in order; a backend may capture it as a graph.
    fn launch_all(&mut self, ops: &[Op]) -> Result<(), DeviceError> {
        ops.iter().try_for_each(|op| self.launch(op))
    }

    /// Whether word sums are formed in place, so that checking every step costs little; where they
    /// are not, a run leaves these checks out.
    fn sums_in_place(&self) -> bool {
        false
    }

    /// The word sums of views, as [`sums`](crate::sums) defines them, after all launched work that
    /// writes them. A device with the means forms them in place.
    fn sums(&mut self, views: &[View]) -> Result<Vec<u32>, DeviceError> {
        views.iter().map(|view| sums::of_view(self, view)).collect()
    }

    /// Launches one operation and gives the word sums of operands that `ask` names, as they were
    /// read and as they were written. A device with the means forms them while it computes and
    /// checks its products' arithmetic too; what does not add up is a `Corrupt`.
    fn launch_summed(&mut self, op: &Op, ask: Ask) -> Result<Sums, DeviceError> {
        sums::launch_in_passes(self, op, ask)
    }

    /// Says that `op` will be launched many times while its matrix ([`Op::matrix`]) stays as it is.
    /// A device may then keep that matrix in the order that its kernels like best. Nothing else
    /// changes: every operation, upload and download sees the matrix as it was.
    fn prepack(&mut self, _op: &Op) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Waits until all launched work is done, at most `deadline`; past it the error is a `Hang`.
    fn wait(&mut self, deadline: Duration) -> Result<(), DeviceError>;

    /// Bytes the device holds for buffers and for its own scratch.
    fn memory_used(&self) -> usize;
}
