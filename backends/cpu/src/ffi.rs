//! The unsafe corners that are not instructions: disjoint writes from several threads, and lending
//! a closure to worker threads. Each is wrapped so that its users are safe code.
//!
//! Disjointness is checked at run time, with one bit per part. Scheduling is in `pool.rs`.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Most parts one slice or matrix can be cut into: one bit each, small enough to live on the stack.
pub const PARTS_MAX: usize = 4096;

/// One bit per part: set once the part was handed out.
struct Claims([AtomicU64; PARTS_MAX / 64]);

impl Claims {
    fn new(count: usize) -> Self {
        assert!(count <= PARTS_MAX, "{count} parts; at most {PARTS_MAX} can be handed out");
        Self([const { AtomicU64::new(0) }; PARTS_MAX / 64])
    }

    fn claim(&self, index: usize) {
        let bit = 1 << (index % 64);
        let before = self.0[index / 64].fetch_or(bit, Ordering::Relaxed);
        assert!(before & bit == 0, "part {index} was taken twice");
    }
}

/// Consecutive parts of one slice, to be taken by the tasks of a parallel run, each once.
pub struct Parts<'a, T> {
    base: *mut T,
    len: usize,
    part_len: usize,
    claims: Claims,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access through a shared `Parts` is `take`, which hands out non-overlapping
// parts, so sharing it is like sending the parts.
unsafe impl<T: Send> Sync for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    /// Cuts `slice` into parts of `part_len` elements; the last may be shorter.
    ///
    /// Panics if that gives more than [`PARTS_MAX`] parts or `part_len` is zero.
    pub fn new(slice: &'a mut [T], part_len: usize) -> Self {
        assert!(part_len > 0, "a part needs at least one element");
        let claims = Claims::new(slice.len().div_ceil(part_len));
        let (base, len) = (slice.as_mut_ptr(), slice.len());
        Self { base, len, part_len, claims, slice: PhantomData }
    }

    /// How many parts there are.
    pub fn count(&self) -> usize {
        self.len.div_ceil(self.part_len)
    }

    /// Takes a part. Panics if it was taken before.
    // The parts do not overlap: see the claim below.
    pub fn take(&self, index: usize) -> &'a mut [T] {
        assert!(index < self.count(), "part {index} of {}", self.count());
        self.claims.claim(index);
        let start = index * self.part_len;
        let len = self.part_len.min(self.len - start);
        // SAFETY: the range lies in the slice, which is borrowed for 'a, and the claim makes this
        // the only reference to it.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }
}

/// How a matrix is cut into tiles.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Rows of a tile; the last tile may have fewer.
    pub tile_rows: usize,
    /// Columns of a tile; the last tile may have fewer.
    pub tile_columns: usize,
}

/// Rectangular tiles of a row-major matrix, to be taken by the tasks of a parallel run, each once.
pub struct Tiles<'a, T> {
    base: *mut T,
    grid: Grid,
    claims: Claims,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: as for `Parts`: `take` hands out non-overlapping tiles.
unsafe impl<T: Send> Sync for Tiles<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Tiles<'_, T> {}

impl<'a, T> Tiles<'a, T> {
    /// Cuts a matrix into tiles. Panics if it does not fit the slice or has too many tiles.
    pub fn new(slice: &'a mut [T], grid: Grid) -> Self {
        assert!(grid.tile_rows > 0 && grid.tile_columns > 0, "empty tiles");
        let rows = grid.rows.div_ceil(grid.tile_rows);
        let columns = grid.columns.div_ceil(grid.tile_columns);
        if grid.rows > 0 {
            assert!(grid.row_stride >= grid.columns, "rows overlap: {grid:?}");
            let last = (grid.rows - 1).checked_mul(grid.row_stride);
            let end = last.and_then(|last| last.checked_add(grid.columns));
            assert!(end.is_some_and(|end| end <= slice.len()), "{grid:?} in {}", slice.len());
        }
        let claims = Claims::new(rows * columns);
        Self { base: slice.as_mut_ptr(), grid, claims, slice: PhantomData }
    }

    /// Takes the tile at a place in the grid. Panics if it was taken before.
    pub fn take(&self, tile_row: usize, tile_column: usize) -> Tile<'a, T> {
        let grid = self.grid;
        let tiles_across = grid.columns.div_ceil(grid.tile_columns);
        let (row, column) = (tile_row * grid.tile_rows, tile_column * grid.tile_columns);
        assert!(row < grid.rows && column < grid.columns, "tile ({tile_row}, {tile_column})");
        self.claims.claim(tile_row * tiles_across + tile_column);
        // SAFETY: (row, column) is inside the matrix, which `new` checked to lie in the slice.
        let base = unsafe { self.base.add(row * grid.row_stride + column) };
        Tile {
            base,
            row_stride: grid.row_stride,
            rows: grid.tile_rows.min(grid.rows - row),
            columns: grid.tile_columns.min(grid.columns - column),
            slice: PhantomData,
        }
    }
}

/// One tile of a matrix, owned by one task.
pub struct Tile<'a, T> {
    base: *mut T,
    row_stride: usize,
    rows: usize,
    columns: usize,
    slice: PhantomData<&'a mut [T]>,
}

impl<T> Tile<'_, T> {
    /// Rows of this tile.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of this tile.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// A row's part inside the tile.
    #[inline(always)]
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the tile lies in the slice and no other tile overlaps it (`Tiles::take`); the
        // returned borrow keeps this tile borrowed.
        unsafe {
            std::slice::from_raw_parts_mut(self.base.add(row * self.row_stride), self.columns)
        }
    }
}

/// A closure lent to worker threads, with its captured borrows hidden.
struct Task {
    data: *const (),
    call: unsafe fn(*const ()),
}

/// Counts a worker inside the slot's job until it is dropped.
struct Entry<'a> {
    slot: &'a JobSlot,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.slot.state.fetch_sub(1, Ordering::Release);
    }
}

/// The one place where a caller offers a job and workers join it.
///
/// `state` is (job number << 16) | OPEN? | workers inside. A worker may use the job only between a
/// successful join and its leave, and the caller returns only after closing and counting zero
/// inside.
pub(crate) struct JobSlot {
    state: AtomicU64,
    task: AtomicPtr<Task>,
}

const INSIDE_MASK: u64 = 0x7fff;
const OPEN: u64 = 0x8000;
const NUMBER: u64 = 0x1_0000;

impl JobSlot {
    pub(crate) fn new() -> Self {
        Self { state: AtomicU64::new(0), task: AtomicPtr::new(std::ptr::null_mut()) }
    }

    /// Whether a job can be joined, given the state last seen: its number if it is a new one.
    #[inline]
    pub(crate) fn open_job(&self) -> Option<u64> {
        let state = self.state.load(Ordering::SeqCst);
        (state & OPEN != 0).then_some(state / NUMBER)
    }

    /// Joins job `number` if it is still open, runs it on this thread and leaves.
    pub(crate) fn join(&self, number: u64) {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            if state & OPEN == 0 || state / NUMBER != number {
                return;
            }
            let next = state + 1;
            let swapped =
                self.state.compare_exchange_weak(state, next, Ordering::AcqRel, Ordering::Acquire);
            match swapped {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        let _entry = Entry { slot: self };
        let task = self.task.load(Ordering::Acquire);
        // SAFETY: the job is open with this worker counted inside, so `offer` has not returned and
        // `task` and the closure behind it live until the entry is dropped.
        unsafe { ((*task).call)((*task).data) };
    }

    /// Offers `work` to the workers, runs `own` here, then waits until every worker that joined has
    /// left. Only one thread may offer at a time: the pool holds a lock. `work` must not unwind.
    pub(crate) fn offer<W: Fn() + Sync>(&self, work: &W, own: impl FnOnce(), wait: impl Fn(usize)) {
        unsafe fn call<W: Fn()>(data: *const ()) {
            // SAFETY: `data` is the `&W` below, alive while a worker is inside.
            let work = unsafe { &*data.cast::<W>() };
            work();
        }
        struct Close<'a, F: Fn(usize)>(&'a JobSlot, F);
        impl<F: Fn(usize)> Drop for Close<'_, F> {
            // Runs on unwinding too: the closure must not be freed while a worker uses it.
            fn drop(&mut self) {
                self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
                let mut tries = 0;
                while self.0.state.load(Ordering::Acquire) & INSIDE_MASK != 0 {
                    (self.1)(tries);
                    tries += 1;
                }
            }
        }
        let mut task = Task { data: std::ptr::from_ref(work).cast(), call: call::<W> };
        self.task.store(&raw mut task, Ordering::Release);
        let state = self.state.load(Ordering::Relaxed);
        debug_assert!(state & (OPEN | INSIDE_MASK) == 0, "two jobs at once");
        let close = Close(self, wait);
        self.state.store((state & !(OPEN | INSIDE_MASK)) + NUMBER + OPEN, Ordering::SeqCst);
        own();
        drop(close);
    }
}

/// Bytes to which small allocations are aligned: a page.
const ALLOCATION_ALIGNMENT: usize = 4096;
/// Bytes of a large page. One entry of the processor's address cache then covers 512 times as much,
/// and neighbours in the buffer are neighbours in the second-level cache, where pages strewn over
/// memory compete for places by chance.
const LARGE_PAGE_BYTES: usize = 2 << 20;
/// Bytes from which on a buffer is asked to lie in large pages: the last one is half empty on
/// average, which is little next to this.
const LARGE_BYTES_MIN: usize = 4 * LARGE_PAGE_BYTES;

/// Zeroed memory of one device buffer.
pub(crate) struct Allocation {
    base: std::ptr::NonNull<u8>,
    len: usize,
    /// What owns the memory of a large buffer; a small one is the allocator's.
    mapping: Option<memmap2::MmapMut>,
}

// SAFETY: the memory belongs to this value alone, like a boxed slice.
unsafe impl Send for Allocation {}
// SAFETY: shared access reads only; writing through `exclusive` is argued there.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// `len` zeroed bytes, or none if the system has no room.
    pub(crate) fn zeroed(len: usize) -> Option<Self> {
        if len >= LARGE_BYTES_MIN {
            return Self::mapped(len);
        }
        let size = len.max(1);
        let layout = std::alloc::Layout::from_size_align(size, ALLOCATION_ALIGNMENT).ok()?;
        // SAFETY: the layout has a size above zero.
        let base = std::ptr::NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Allocation { base, len, mapping: None })
    }

    /// The same in large pages, where the system has them.
    fn mapped(len: usize) -> Option<Self> {
        let size = len.checked_next_multiple_of(LARGE_PAGE_BYTES)?;
        let mut mapping = memmap2::MmapOptions::new().len(size).map_anon().ok()?;
        #[cfg(target_os = "linux")]
        // A system without large pages refuses, and gives small ones.
        let _ = mapping.advise(memmap2::Advice::HugePage);
        let base = std::ptr::NonNull::new(mapping.as_mut_ptr())?;
        Some(Allocation { base, len, mapping: Some(mapping) })
    }

    /// Its size.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation holds `len` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// All bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    fn place<T>(&self, byte_start: usize, len: usize) -> *mut T {
        let end = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(byte_start));
        assert!(end.is_some_and(|end| end <= self.len), "{len} at {byte_start} of {}", self.len);
        assert!(byte_start.is_multiple_of(align_of::<T>()), "unaligned elements");
        // SAFETY: the start lies in the allocation, as checked.
        unsafe { self.base.as_ptr().add(byte_start).cast() }
    }

    /// Elements to be read while nothing writes them.
    pub(crate) fn shared<T: bytemuck::Pod>(&self, byte_start: usize, len: usize) -> &[T] {
        // SAFETY: `place` has checked the range; any bytes are a valid T; `memory::Operands`, the
        // only caller, refuses ranges that it handed out for writing.
        unsafe { std::slice::from_raw_parts(self.place(byte_start, len), len) }
    }

    /// Elements to be written by one operation.
    #[expect(clippy::mut_from_ref, reason = "ranges are kept apart by memory::Operands")]
    pub(crate) fn exclusive<T: bytemuck::Pod>(&self, byte_start: usize, len: usize) -> &mut [T] {
        // SAFETY: as in `shared`; `memory::Operands` holds the device's buffers exclusively and
        // hands out a range for writing only if it overlaps no other range it handed out.
        unsafe { std::slice::from_raw_parts_mut(self.place(byte_start, len), len) }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.mapping.is_some() {
            return;
        }
        let layout = std::alloc::Layout::from_size_align(self.len.max(1), ALLOCATION_ALIGNMENT)
            .expect("the layout was valid when it was allocated");
        // SAFETY: allocated in `zeroed` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), layout) };
    }
}

/// An output whose rows are scattered over tasks in a pattern too fine for [`Parts`]: elements are
/// stored one by one as relaxed atomics, so that even a wrong pattern would be no data race.
pub(crate) struct Scattered<'a, T> {
    wide: &'a [AtomicU32],
    narrow: &'a [AtomicU16],
    element: PhantomData<&'a mut [T]>,
}

impl<'a, T: crate::simd::Element> Scattered<'a, T> {
    /// Takes over a slice for the time of a parallel run.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        let (base, len) = (slice.as_mut_ptr(), slice.len());
        let is_wide = size_of::<T>() == size_of::<u32>();
        assert!(is_wide || size_of::<T>() == size_of::<u16>(), "an element has 2 or 4 bytes");
        let mut scattered = Scattered { wide: &[], narrow: &[], element: PhantomData };
        // The one that is not the element's size stays apart from the slice: 2-byte elements may
        // lie where no 4-byte one could.
        // SAFETY: the slice is borrowed exclusively for 'a and given up here; an atomic has the
        // size and alignment of the element it is chosen for.
        unsafe {
            if is_wide {
                scattered.wide = std::slice::from_raw_parts(base.cast(), len);
            } else {
                scattered.narrow = std::slice::from_raw_parts(base.cast(), len);
            }
        }
        scattered
    }

    /// Stores consecutive elements from `start` on.
    #[inline(always)]
    pub(crate) fn store(&self, start: usize, values: &[T]) {
        if !self.wide.is_empty() {
            let words = bytemuck::cast_slice::<T, u32>(values);
            for (to, word) in self.wide[start..][..words.len()].iter().zip(words) {
                to.store(*word, Ordering::Relaxed);
            }
            return;
        }
        let halves = bytemuck::cast_slice::<T, u16>(values);
        for (to, half) in self.narrow[start..][..halves.len()].iter().zip(halves) {
            to.store(*half, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::Scattered;

    #[test]
    fn narrow_elements_may_be_scattered_from_an_address_no_wide_one_could_have() {
        let mut elements = [bf16::ZERO; 5];
        for start in 0..2 {
            let values = [1.5, -2.0].map(bf16::from_f32);
            Scattered::new(&mut elements[start..]).store(1, &values);
        }
        assert_eq!(elements.map(f32::from), [0.0, 1.5, 1.5, -2.0, 0.0]);
    }
}
