//! Buffers in device memory, and scratch for what lies between the kernels of one operation.
//!
//! Read next: `core.rs`.

use std::time::Duration;

use pontoon_ops::{BufferId, DeviceError, DeviceErrorKind, View};

use crate::ffi::session::Session;

/// Longest a copy or a growing pool waits for the device before it counts as hung; a training
/// step of a large model may be queued before it.
pub const WAIT_MAX: Duration = Duration::from_secs(300);
/// Scratch is handed out in multiples of this, as the driver's allocations are.
const ALIGNMENT: usize = 256;
/// The least that scratch grows by.
const GROWTH_MIN: usize = 4 << 20;

/// One buffer.
struct Buffer {
    address: usize,
    bytes: usize,
}

/// Every buffer of a device.
#[derive(Default)]
pub struct Buffers {
    slots: Vec<Option<Buffer>>,
    free: Vec<u32>,
    bytes: usize,
}

impl Buffers {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A new buffer at an address.
    pub fn add(&mut self, address: usize, bytes: usize) -> BufferId {
        self.bytes += bytes;
        let buffer = Some(Buffer { address, bytes });
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = buffer;
            return BufferId(index);
        }
        self.slots.push(buffer);
        BufferId(self.slots.len() as u32 - 1)
    }

    /// Forgets a buffer; gives its address.
    pub fn remove(&mut self, buffer: BufferId) -> Result<usize, DeviceError> {
        let slot = self.slots.get_mut(buffer.0 as usize);
        let gone = slot.and_then(Option::take).ok_or_else(|| unknown(buffer))?;
        self.free.push(buffer.0);
        self.bytes -= gone.bytes;
        Ok(gone.address)
    }

    /// Every address, to be given back.
    pub fn drain(&mut self) -> Vec<usize> {
        self.bytes = 0;
        self.slots.drain(..).flatten().map(|buffer| buffer.address).collect()
    }

    /// The address of a range that lies in a buffer.
    pub fn range(
        &self,
        buffer: BufferId,
        start: usize,
        bytes: usize,
    ) -> Result<usize, DeviceError> {
        let known = self.slots.get(buffer.0 as usize).and_then(Option::as_ref);
        let known = known.ok_or_else(|| unknown(buffer))?;
        if start.checked_add(bytes).is_some_and(|end| end <= known.bytes) {
            return Ok(known.address + start);
        }
        let text =
            format!("{bytes} bytes at {start} do not fit buffer {} of {}", buffer.0, known.bytes);
        Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
    }

    /// The address of a view's first element, the view checked against its buffer.
    pub fn at(&self, view: &View) -> Result<usize, DeviceError> {
        let address = self.range(view.buffer, view.byte_offset, view.span_bytes())?;
        if address.is_multiple_of((view.dtype.bits() / 8).max(1)) {
            return Ok(address);
        }
        let text = format!("{view:?} is not aligned to its elements");
        Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
    }
}

fn unknown(buffer: BufferId) -> DeviceError {
    let text = format!("buffer {} does not exist or was freed", buffer.0);
    DeviceError::new(DeviceErrorKind::BadArgument, text)
}

/// Memory for what lies between the kernels of one operation. Operations run one after the other,
/// so each begins at the start again.
#[derive(Default)]
pub struct Scratch {
    blocks: Vec<(usize, usize)>,
    used: usize,
    moved: u64,
}

impl Scratch {
    /// Changes whenever room is taken from the device or given back.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Begins an operation. If the last one needed several blocks, they become one.
    pub fn begin(&mut self, session: &Session) -> Result<(), DeviceError> {
        self.used = 0;
        if self.blocks.len() < 2 {
            return Ok(());
        }
        let bytes = self.bytes();
        session.synchronize(WAIT_MAX)?;
        self.close(session);
        self.blocks.push((session.malloc(bytes)?, bytes));
        self.moved += 1;
        Ok(())
    }

    /// Room until the next operation begins.
    pub fn take(&mut self, session: &Session, bytes: usize) -> Result<usize, DeviceError> {
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT);
        let room = self.blocks.last().map_or(0, |(_, size)| size - self.used);
        if room < bytes {
            let size = bytes.max(self.bytes() / 2).max(GROWTH_MIN);
            self.blocks.push((session.malloc(size)?, size));
            self.used = 0;
            self.moved += 1;
        }
        let block = self.blocks.last().map_or(0, |(address, _)| *address);
        let address = block + self.used;
        self.used += bytes;
        Ok(address)
    }

    /// Gives everything back. Work must have ended.
    pub fn close(&mut self, session: &Session) {
        for (address, _) in self.blocks.drain(..) {
            // Nothing can be done about a failure while giving back.
            let _ = session.free(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_buffer_and_a_range_beyond_its_end_are_named() {
        let mut buffers = Buffers::default();
        let buffer = buffers.add(4096, 100);
        assert_eq!(buffers.range(buffer, 90, 10).unwrap(), 4186);
        assert!(buffers.range(buffer, 90, 11).unwrap_err().text.contains("do not fit"));
        assert_eq!(buffers.remove(buffer).unwrap(), 4096);
        assert!(buffers.remove(buffer).unwrap_err().text.contains("was freed"));
        assert_eq!(buffers.bytes(), 0);
        assert_eq!(buffers.add(8192, 1), buffer);
    }
}
