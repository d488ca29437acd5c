//! Buffers of the CPU device, and how operations reach their elements.
//!
//! A launch reaches memory only through [`Operands`], which checks every view against its buffer
//! and keeps written ranges apart from all others at run time; so kernels are safe code.

use std::cell::RefCell;

use bytemuck::Pod;
use pontoon_ops::{BufferId, DeviceError, DeviceErrorKind, View};

use crate::ffi::Allocation;

/// Every buffer of one device.
#[derive(Default)]
pub struct Buffers {
    slots: Vec<Option<Allocation>>,
    /// By place; they do not overlap.
    prepacked: Vec<Prepacked>,
}

/// A matrix that is kept in panels: see `prepack.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepacked {
    /// The buffer it lies in.
    pub buffer: BufferId,
    /// Its first byte.
    pub start: usize,
    /// Its rows.
    pub rows: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
}

impl Prepacked {
    /// What a view would be, if it were kept so. None if its elements have gaps.
    pub fn of(view: &View) -> Option<Prepacked> {
        let rows = if view.shape.rank() == 2 { view.dim(0) } else { 0 };
        if rows == 0 || view.dim(1) == 0 || !view.is_contiguous() {
            return None;
        }
        let row_bytes = view.dtype.bytes(view.dim(1));
        Some(Prepacked { buffer: view.buffer, start: view.byte_offset, rows, row_bytes })
    }

    fn place(&self) -> (u32, usize) {
        (self.buffer.0, self.start)
    }

    /// Its bytes in the buffer.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.rows * self.row_bytes
    }
}

impl Buffers {
    /// A zeroed buffer of `bytes`.
    pub fn alloc(&mut self, bytes: usize) -> Result<BufferId, DeviceError> {
        let allocation = Allocation::zeroed(bytes).ok_or_else(|| {
            let held = self.bytes();
            let text = format!("{bytes} bytes were wanted while {held} are held");
            DeviceError::new(DeviceErrorKind::OutOfMemory, text)
        })?;
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.slots.len());
        if free.is_none() {
            self.slots.push(None);
        }
        self.slots[index] = Some(allocation);
        Ok(BufferId(index as u32))
    }

    /// Gives a buffer back to the system.
    pub fn free(&mut self, buffer: BufferId) -> Result<(), DeviceError> {
        self.prepacked.retain(|one| one.buffer != buffer);
        match self.slots.get_mut(buffer.0 as usize).and_then(Option::take) {
            Some(_) => Ok(()),
            None => Err(unknown(buffer)),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.slots.iter().flatten().map(Allocation::len).sum()
    }

    /// Copies host bytes into a buffer.
    pub fn write(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &[u8],
    ) -> Result<(), DeviceError> {
        self.part_mut(buffer, byte_offset, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    /// Copies from a buffer to host bytes.
    pub fn read(
        &self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        bytes.copy_from_slice(self.part(buffer, byte_offset, bytes.len())?);
        Ok(())
    }

    /// The bytes of a part of a buffer, to be changed.
    pub fn part_mut(
        &mut self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: usize,
    ) -> Result<&mut [u8], DeviceError> {
        let range = self.range(buffer, byte_offset, bytes)?;
        let slot = self.slots[buffer.0 as usize].as_mut().expect("range has checked the slot");
        Ok(&mut slot.bytes_mut()[range])
    }

    /// The bytes of a part of a buffer.
    pub fn part(
        &self,
        buffer: BufferId,
        byte_offset: usize,
        bytes: usize,
    ) -> Result<&[u8], DeviceError> {
        let range = self.range(buffer, byte_offset, bytes)?;
        Ok(&self.get(buffer)?.bytes()[range])
    }

    /// Whether some matrix is kept in panels.
    pub fn any_in_panels(&self) -> bool {
        !self.prepacked.is_empty()
    }

    /// A matrix kept in panels of which the range holds a part.
    pub fn prepacked_in(
        &self,
        buffer: BufferId,
        range: &std::ops::Range<usize>,
    ) -> Option<Prepacked> {
        let after = self.prepacked.partition_point(|one| one.place() < (buffer.0, range.end));
        let last = *self.prepacked[..after].last()?;
        (last.buffer == buffer && range.start < last.range().end).then_some(last)
    }

    /// Whether a view's matrix is kept in panels.
    pub fn in_panels(&self, view: &View) -> bool {
        let wanted = Prepacked::of(view).filter(|_| self.any_in_panels());
        wanted.is_some_and(|one| self.prepacked_in(one.buffer, &one.range()) == Some(one))
    }

    /// Rewrites a matrix's bytes and notes whether it is kept in panels from now on.
    pub fn rewrite(
        &mut self,
        matrix: Prepacked,
        in_panels: bool,
        by: impl FnOnce(&mut [u8]),
    ) -> Result<(), DeviceError> {
        let range = self.range(matrix.buffer, matrix.start, matrix.rows * matrix.row_bytes)?;
        let slot = self.slots[matrix.buffer.0 as usize].as_mut();
        by(&mut slot.expect("range has checked the slot").bytes_mut()[range]);
        let at = self.prepacked.partition_point(|one| one.place() < matrix.place());
        match in_panels {
            true => self.prepacked.insert(at, matrix),
            false => self.prepacked.retain(|one| *one != matrix),
        }
        Ok(())
    }

    fn get(&self, buffer: BufferId) -> Result<&Allocation, DeviceError> {
        self.slots.get(buffer.0 as usize).and_then(Option::as_ref).ok_or_else(|| unknown(buffer))
    }

    fn range(
        &self,
        buffer: BufferId,
        start: usize,
        bytes: usize,
    ) -> Result<std::ops::Range<usize>, DeviceError> {
        let len = self.get(buffer)?.len();
        let end = start.checked_add(bytes).filter(|&end| end <= len).ok_or_else(|| {
            let text = format!("{bytes} bytes at {start} do not fit buffer {buffer:?} of {len}");
            DeviceError::new(DeviceErrorKind::BadArgument, text)
        })?;
        Ok(start..end)
    }
}

fn unknown(buffer: BufferId) -> DeviceError {
    let text = format!("buffer {} does not exist or was freed", buffer.0);
    DeviceError::new(DeviceErrorKind::BadArgument, text)
}

/// One range of bytes an operation uses.
#[derive(Clone, Copy)]
struct Claim {
    buffer: BufferId,
    start: usize,
    end: usize,
    written: bool,
}

/// Most operands an operation can have; one more than the longest list on the waist.
const CLAIMS_MAX: usize = 16;

/// The memory one operation may touch.
pub struct Operands<'a> {
    buffers: &'a Buffers,
    claims: RefCell<([Option<Claim>; CLAIMS_MAX], usize)>,
}

impl<'a> Operands<'a> {
    /// For one launch. `buffers` must not be used otherwise until it is dropped.
    pub fn new(buffers: &'a mut Buffers) -> Self {
        Operands { buffers, claims: RefCell::new(([None; CLAIMS_MAX], 0)) }
    }

    /// The elements from a view's first to its last, gaps included.
    pub fn read<T: Pod>(&self, view: &View) -> Result<&'a [T], DeviceError> {
        let range = self.claim::<T>(view, false)?;
        let allocation = self.buffers.get(view.buffer)?;
        Ok(allocation.shared(range.start, range.len() / size_of::<T>()))
    }

    /// The same, to be written. Refused if the range overlaps one handed out before.
    pub fn write<T: Pod>(&self, view: &View) -> Result<&'a mut [T], DeviceError> {
        let range = self.claim::<T>(view, true)?;
        let allocation = self.buffers.get(view.buffer)?;
        // SAFETY is argued in `Allocation::exclusive`: the claim above makes the range unique.
        Ok(allocation.exclusive(range.start, range.len() / size_of::<T>()))
    }

    /// Whether a view's matrix is kept in panels.
    pub fn in_panels(&self, view: &View) -> bool {
        self.buffers.in_panels(view)
    }

    fn claim<T: Pod>(
        &self,
        view: &View,
        written: bool,
    ) -> Result<std::ops::Range<usize>, DeviceError> {
        let bad = |text: String| DeviceError::new(DeviceErrorKind::BadArgument, text);
        if !view.byte_offset.is_multiple_of(size_of::<T>()) {
            return Err(bad(format!("{view:?} is not aligned to its elements")));
        }
        let range = self.buffers.range(view.buffer, view.byte_offset, view.span_bytes())?;
        let new = Claim { buffer: view.buffer, start: range.start, end: range.end, written };
        let mut claims = self.claims.borrow_mut();
        let (list, count) = &mut *claims;
        let clash = list[..*count].iter().flatten().any(|old| {
            (old.written || written)
                && old.buffer == new.buffer
                && old.start < new.end
                && new.start < old.end
        });
        if clash {
            return Err(bad(format!("{view:?} overlaps another operand of the operation")));
        }
        if *count == CLAIMS_MAX {
            return Err(bad(format!("an operation has more than {CLAIMS_MAX} operands")));
        }
        list[*count] = Some(new);
        *count += 1;
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_ops::DType;

    #[test]
    fn a_freed_buffer_cannot_be_used_and_its_number_is_given_again() {
        let mut buffers = Buffers::default();
        let first = buffers.alloc(64).unwrap();
        buffers.free(first).unwrap();
        let error = buffers.write(first, 0, &[1]).unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::BadArgument);
        assert_eq!(buffers.free(first).unwrap_err().kind, DeviceErrorKind::BadArgument);
        assert_eq!(buffers.alloc(8).unwrap(), first);
    }

    #[test]
    fn an_allocation_larger_than_memory_is_out_of_memory() {
        let error = Buffers::default().alloc(usize::MAX / 2).unwrap_err();
        assert_eq!(error.kind, DeviceErrorKind::OutOfMemory);
    }

    #[test]
    fn a_view_beyond_its_buffer_is_refused() {
        let mut buffers = Buffers::default();
        let buffer = buffers.alloc(16).unwrap();
        let operands = Operands::new(&mut buffers);
        assert!(operands.read::<f32>(&View::contiguous(buffer, DType::F32, [5])).is_err());
        assert!(operands.read::<f32>(&View::contiguous(buffer, DType::F32, [4])).is_ok());
    }

    #[test]
    fn a_written_range_is_handed_out_once() {
        let mut buffers = Buffers::default();
        let buffer = buffers.alloc(64).unwrap();
        let operands = Operands::new(&mut buffers);
        let all = View::contiguous(buffer, DType::F32, [16]);
        operands.write::<f32>(&all.slice(0, 0, 8)).unwrap();
        assert!(operands.read::<f32>(&all).is_err());
        assert!(operands.write::<f32>(&all.slice(0, 8, 8)).is_ok());
    }
}
