//! Buffers in device memory, what the host knows of their contents, pinned staging, scratch and
//! constants.
//!
//! Some of CANN's calls want on the host what the waist keeps on the device: where documents begin,
//! which slots are written. Those numbers were nearly always uploaded by the host itself, so small
//! uploads are remembered until an operation writes over them. Read next: `core.rs`.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use pontoon_ops::{BufferId, DeviceError, DeviceErrorKind, View};

use crate::ffi::session::{Event, Pinned, Session, Way};
use crate::tensor::{Kind, Tensor};

/// Longest a copy or a growing pool waits for the device before it counts as hung; a training
/// step of a large model may be queued before it.
pub const WAIT_MAX: Duration = Duration::from_secs(300);
/// Uploads up to this size are remembered: a million token ids, far above any batch's.
const REMEMBERED_BYTES_MAX: usize = 4 << 20;
/// Allocations are multiples of this, as the vendor's are.
const ALIGNMENT: usize = 512;
/// Bytes of one of the two staging areas: large copies reach full speed at a few megabytes.
const STAGING_BYTES: usize = 8 << 20;
/// Bytes of the pieces that constants are placed in: most are far smaller than a page.
const CONSTANT_BLOCK_BYTES: usize = 4 << 20;
/// Bytes of constants after which all are given back.
const CONSTANT_BYTES_MAX: usize = 64 << 20;

/// One buffer.
struct Buffer {
    address: usize,
    bytes: usize,
    /// What the host knows: disjoint pieces by their first byte.
    known: BTreeMap<usize, Vec<u8>>,
}

/// Every buffer of a device.
#[derive(Default)]
pub struct Buffers {
    slots: Vec<Option<Buffer>>,
    bytes: usize,
}

impl Buffers {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A new buffer at an address.
    pub fn add(&mut self, address: usize, bytes: usize) -> BufferId {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.slots.len());
        if free.is_none() {
            self.slots.push(None);
        }
        self.slots[index] = Some(Buffer { address, bytes, known: BTreeMap::new() });
        self.bytes += bytes;
        BufferId(index as u32)
    }

    /// Forgets a buffer; gives its address.
    pub fn remove(&mut self, buffer: BufferId) -> Result<usize, DeviceError> {
        let slot = self.slots.get_mut(buffer.0 as usize);
        let gone = slot.and_then(Option::take).ok_or_else(|| unknown(buffer))?;
        self.bytes -= gone.bytes;
        Ok(gone.address)
    }

    /// Every address, to be given back.
    pub fn drain(&mut self) -> Vec<usize> {
        self.bytes = 0;
        self.slots.drain(..).flatten().map(|buffer| buffer.address).collect()
    }

    fn get(&self, buffer: BufferId) -> Result<&Buffer, DeviceError> {
        self.slots.get(buffer.0 as usize).and_then(Option::as_ref).ok_or_else(|| unknown(buffer))
    }

    /// The address of a range that lies in a buffer.
    pub fn range(
        &self,
        buffer: BufferId,
        start: usize,
        bytes: usize,
    ) -> Result<usize, DeviceError> {
        let known = self.get(buffer)?;
        if start.checked_add(bytes).is_some_and(|end| end <= known.bytes) {
            return Ok(known.address + start);
        }
        let len = known.bytes;
        let text = format!("{bytes} bytes at {start} do not fit buffer {} of {len}", buffer.0);
        Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
    }

    /// A view as a tensor, checked against its buffer.
    pub fn tensor(&self, view: &View) -> Result<Tensor, DeviceError> {
        let address = self.range(view.buffer, view.byte_offset, view.span_bytes())?;
        let tensor = Tensor::of(view, address - view.byte_offset);
        if address.is_multiple_of(tensor.kind.bytes()) {
            return Ok(tensor);
        }
        let text = format!("{view:?} is not aligned to its elements");
        Err(DeviceError::new(DeviceErrorKind::BadArgument, text))
    }

    /// Which buffer an address lies in, for reports.
    pub fn owner(&self, address: usize) -> Option<BufferId> {
        let holds = |slot: &Option<Buffer>| {
            slot.as_ref().is_some_and(|b| (b.address..b.address + b.bytes).contains(&address))
        };
        self.slots.iter().position(holds).map(|index| BufferId(index as u32))
    }

    /// Remembers what was uploaded.
    pub fn remember(&mut self, buffer: BufferId, start: usize, bytes: &[u8]) {
        self.forget(buffer, start, bytes.len());
        if bytes.len() > REMEMBERED_BYTES_MAX || bytes.is_empty() {
            return;
        }
        if let Some(Some(slot)) = self.slots.get_mut(buffer.0 as usize) {
            slot.known.insert(start, bytes.to_vec());
        }
    }

    /// Forgets every piece that a written range touches.
    pub fn forget(&mut self, buffer: BufferId, start: usize, bytes: usize) {
        let Some(Some(slot)) = self.slots.get_mut(buffer.0 as usize) else { return };
        if slot.known.is_empty() || bytes == 0 {
            return;
        }
        let end = start + bytes;
        let touched: Vec<usize> = slot
            .known
            .range(..end)
            .rev()
            .take_while(|(at, piece)| *at + piece.len() > start)
            .map(|(at, _)| *at)
            .collect();
        for at in touched {
            let Some(piece) = slot.known.remove(&at) else { continue };
            if at < start {
                slot.known.insert(at, piece[..start - at].to_vec());
            }
            if at + piece.len() > end {
                slot.known.insert(end, piece[end - at..].to_vec());
            }
        }
    }

    /// The bytes of a range, if the host knows all of them.
    pub fn known(&self, buffer: BufferId, start: usize, bytes: usize) -> Option<&[u8]> {
        let slot = self.get(buffer).ok()?;
        let (at, piece) = slot.known.range(..=start).next_back()?;
        piece.get(start - at..)?.get(..bytes)
    }
}

fn unknown(buffer: BufferId) -> DeviceError {
    let text = format!("buffer {} does not exist or was freed", buffer.0);
    DeviceError::new(DeviceErrorKind::BadArgument, text)
}

/// Two pinned areas that copies go through in turn.
#[derive(Default)]
pub struct Staging {
    areas: Vec<(Pinned, Event, bool)>,
    next: usize,
}

impl Staging {
    fn area(&mut self, session: &mut Session) -> Result<&mut (Pinned, Event, bool), DeviceError> {
        if self.areas.len() < 2 {
            let area = (session.pinned(STAGING_BYTES)?, session.event()?, false);
            self.areas.push(area);
            self.next = self.areas.len() - 1;
        } else {
            self.next = (self.next + 1) % self.areas.len();
        }
        let area = &mut self.areas[self.next];
        if area.2 {
            session.wait_for(&area.1, WAIT_MAX)?;
            area.2 = false;
        }
        Ok(area)
    }

    /// Copies host bytes to the device, in the stream's order; does not wait for the end.
    pub fn up(
        &mut self,
        session: &mut Session,
        address: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        for (index, piece) in bytes.chunks(STAGING_BYTES).enumerate() {
            let area = self.area(session)?;
            area.0.write(0, piece);
            let to = address + index * STAGING_BYTES;
            session.copy(Way::Up, &mut area.0, (0, piece.len()), to)?;
            session.record(&area.1)?;
            area.2 = true;
        }
        Ok(())
    }

    /// Copies from the device after all work so far, and waits.
    pub fn down(
        &mut self,
        session: &mut Session,
        address: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        for (index, piece) in bytes.chunks_mut(STAGING_BYTES).enumerate() {
            let area = self.area(session)?;
            let from = address + index * STAGING_BYTES;
            session.copy(Way::Down, &mut area.0, (0, piece.len()), from)?;
            session.synchronize(WAIT_MAX)?;
            area.0.read(0, piece);
        }
        Ok(())
    }

    /// Gives the areas back. Tasks must have ended.
    pub fn close(&mut self, session: &mut Session) {
        for (pinned, event, _) in self.areas.drain(..) {
            // Nothing can be done about a failure while closing.
            let _ = session.drop_event(event);
            let _ = session.unpin(pinned);
        }
    }
}

/// Memory for what lies between the calls of one operation. Operations run one after the other, so
/// each begins at the start again.
#[derive(Default)]
pub struct Scratch {
    blocks: Vec<(usize, usize)>,
    used: usize,
}

impl Scratch {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Begins an operation. If the last one needed several blocks, they become one.
    pub fn begin(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        self.used = 0;
        if self.blocks.len() < 2 {
            return Ok(());
        }
        let bytes = self.bytes();
        session.synchronize(WAIT_MAX)?;
        for (address, _) in self.blocks.drain(..) {
            session.free(address)?;
        }
        self.blocks.push((session.malloc(bytes)?, bytes));
        Ok(())
    }

    /// Where the room that is taken ends now.
    pub fn mark(&self) -> (usize, usize) {
        (self.blocks.len(), self.used)
    }

    /// Gives back what was taken since a mark: the calls that used it come before those that will.
    pub fn release(&mut self, (blocks, used): (usize, usize)) {
        if self.blocks.len() == blocks {
            self.used = used;
        }
    }

    /// Room for a tensor until the next operation begins.
    pub fn take(
        &mut self,
        session: &mut Session,
        kind: Kind,
        dims: &[usize],
    ) -> Result<Tensor, DeviceError> {
        let elements: usize = dims.iter().product();
        let bytes = (elements * kind.bytes()).max(1).next_multiple_of(ALIGNMENT);
        let room = self.blocks.last().map_or(0, |(_, size)| size - self.used);
        if room < bytes {
            let size = bytes.max(self.bytes() / 2).max(1 << 20);
            self.blocks.push((session.malloc(size)?, size));
            self.used = 0;
        }
        let block = self.blocks.last().map_or(0, |(address, _)| *address);
        let address = block + self.used;
        self.used += bytes;
        Ok(Tensor::contiguous(address, kind, dims))
    }

    /// Gives everything back. Tasks must have ended.
    pub fn close(&mut self, session: &mut Session) {
        for (address, _) in self.blocks.drain(..) {
            // Nothing can be done about a failure while closing.
            let _ = session.free(address);
        }
    }
}

/// Host tables that operations read on the device, uploaded once for each content.
#[derive(Default)]
pub struct Constants {
    held: HashMap<Vec<u8>, usize>,
    blocks: Vec<(usize, usize)>,
    used: usize,
}

impl Constants {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Begins an operation: forgets all tables if they have become too many.
    pub fn begin(&mut self, session: &mut Session) -> Result<(), DeviceError> {
        if self.bytes() <= CONSTANT_BYTES_MAX {
            return Ok(());
        }
        session.synchronize(WAIT_MAX)?;
        self.held.clear();
        self.used = 0;
        self.blocks.drain(..).try_for_each(|(address, _)| session.free(address))
    }

    /// The address of a content.
    pub fn place(
        &mut self,
        session: &mut Session,
        staging: &mut Staging,
        content: &[u8],
    ) -> Result<usize, DeviceError> {
        if let Some(address) = self.held.get(content) {
            return Ok(*address);
        }
        let bytes = content.len().max(1).next_multiple_of(ALIGNMENT);
        if self.blocks.last().is_none_or(|(_, size)| size - self.used < bytes) {
            let size = bytes.max(CONSTANT_BLOCK_BYTES);
            self.blocks.push((session.malloc(size)?, size));
            self.used = 0;
        }
        let address = self.blocks.last().map_or(0, |(address, _)| *address) + self.used;
        self.used += bytes;
        self.held.insert(content.to_vec(), address);
        staging.up(session, address, content)?;
        Ok(address)
    }

    /// Gives everything back. Tasks must have ended.
    pub fn close(&mut self, session: &mut Session) {
        for (address, _) in self.blocks.drain(..) {
            // Nothing can be done about a failure while closing.
            let _ = session.free(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_uploaded_is_known_until_a_byte_of_it_is_written() {
        let mut buffers = Buffers::default();
        let buffer = buffers.add(4096, 100);
        buffers.remember(buffer, 10, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(buffers.known(buffer, 12, 3), Some(&[3, 4, 5][..]));
        assert_eq!(buffers.known(buffer, 12, 7), None);
        buffers.forget(buffer, 13, 2);
        assert_eq!(buffers.known(buffer, 10, 3), Some(&[1, 2, 3][..]));
        assert_eq!(buffers.known(buffer, 15, 3), Some(&[6, 7, 8][..]));
        assert_eq!(buffers.known(buffer, 12, 3), None);
        buffers.remember(buffer, 8, &[9; 10]);
        assert_eq!(buffers.known(buffer, 8, 10), Some(&[9; 10][..]));
    }

    #[test]
    fn a_freed_buffer_and_a_range_beyond_its_end_are_named() {
        let mut buffers = Buffers::default();
        let buffer = buffers.add(4096, 100);
        assert!(buffers.range(buffer, 90, 11).unwrap_err().text.contains("do not fit"));
        assert_eq!(buffers.remove(buffer).unwrap(), 4096);
        assert!(buffers.remove(buffer).unwrap_err().text.contains("was freed"));
        assert_eq!(buffers.bytes(), 0);
    }
}
