//! Memory of an emulated device: raw bytes that several threads reach at once, as on a chip.
//!
//! References to it are given out only within an operation, by `ops::Run`, which keeps written
//! ranges apart; everything else copies bytes in and out. A device runs one task at a time, so no
//! two operations touch its memory at once (`device/stream.rs`).

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;

use bytemuck::Pod;

/// Bytes to which blocks are aligned: a page.
const ALIGNMENT: usize = 4096;

/// What fresh memory holds: NaN in every float, -1 in every integer, so that nothing computed from
/// it looks right.
const FRESH: u8 = 0xff;

/// One allocation's bytes.
pub struct Block {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the block alone; who touches it when is argued at each method.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// A block of `len` bytes with arbitrary contents, or none if the system has no room.
    pub fn new(len: usize) -> Option<Block> {
        let layout = Layout::from_size_align(len.max(1), ALIGNMENT).ok()?;
        // SAFETY: the layout has a size above zero.
        let base = NonNull::new(unsafe { alloc(layout) })?;
        // SAFETY: the allocation holds that many bytes; writing makes them initialised.
        unsafe { base.as_ptr().write_bytes(FRESH, len) };
        Some(Block { base, len })
    }

    /// Its address, for host memory that a caller reads and writes.
    pub fn address(&self) -> usize {
        self.base.as_ptr().expose_provenance()
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.len
    }

    fn place(&self, start: usize, bytes: usize) -> *mut u8 {
        assert!(start.checked_add(bytes).is_some_and(|end| end <= self.len), "beyond the block");
        // SAFETY: the start lies in the block, as just checked.
        unsafe { self.base.as_ptr().add(start) }
    }

    /// Copies elements out.
    pub fn load<T: Pod>(&self, start: usize, to: &mut [T]) {
        let from = self.place(start, size_of_val(to));
        // SAFETY: the range is checked, `to` is no device memory, any bytes are a valid T.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr().cast::<u8>(), size_of_val(to));
        }
    }

    /// Copies elements in.
    pub fn store<T: Pod>(&self, start: usize, from: &[T]) {
        let to = self.place(start, size_of_val(from));
        // SAFETY: the range is checked, `from` is no device memory.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr().cast::<u8>(), to, size_of_val(from));
        }
    }

    /// Copies within device memory; the ranges may overlap.
    pub fn copy(&self, start: usize, to: &Block, to_start: usize, bytes: usize) {
        let from = self.place(start, bytes);
        let to = to.place(to_start, bytes);
        // SAFETY: both ranges are checked; `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, bytes) }
    }

    /// Fills a range.
    pub fn fill(&self, start: usize, bytes: usize, value: u8) {
        // SAFETY: `place` has checked the range.
        unsafe { self.place(start, bytes).write_bytes(value, bytes) }
    }

    fn elements<T: Pod>(&self, start: usize, count: usize) -> *mut T {
        let base = self.place(start, count * size_of::<T>());
        assert!(base.addr().is_multiple_of(align_of::<T>()), "unaligned elements");
        base.cast()
    }

    /// Elements to be read by one operation.
    pub fn shared<T: Pod>(&self, start: usize, count: usize) -> &[T] {
        // SAFETY: range and alignment are checked; any bytes are a valid T; `ops::Run`, the only
        // caller, has made sure that the running operation writes no part of the range.
        unsafe { std::slice::from_raw_parts(self.elements(start, count), count) }
    }

    /// Elements to be written by one operation.
    #[expect(clippy::mut_from_ref, reason = "ranges are kept apart by ops::Run")]
    pub fn exclusive<T: Pod>(&self, start: usize, count: usize) -> &mut [T] {
        // SAFETY: as in `shared`; `ops::Run` hands out a range for writing once and refuses
        // everything that overlaps it.
        unsafe { std::slice::from_raw_parts_mut(self.elements(start, count), count) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let layout = Layout::from_size_align(self.len.max(1), ALIGNMENT)
            .expect("the layout was valid when it was allocated");
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.base.as_ptr(), layout) }
    }
}
