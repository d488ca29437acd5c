//! A hint to the caches: the memory that the next large product will stream.
//!
//! Decoding is bound by memory, yet memory rests while small operations run between products and
//! while each range of columns waits for its first rows. So whoever lists operations says what
//! comes soon; idle workers ask for it, and so does a product at its own end. Nothing is ever read
//! through a hint, so a wrong one costs time only.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::simd::micro::{Ahead, LINE_BYTES};
use crate::simd::prefetch;

/// Most bytes that one thread asks for before the product begins: a part of its own cache.
const BYTES_MAX: usize = 256 << 10;

/// Memory that will be streamed in ranges, one after another.
#[derive(Default)]
pub(crate) struct Soon {
    start: AtomicUsize,
    bytes: AtomicUsize,
    range_bytes: AtomicUsize,
}

impl Soon {
    /// Says that `bytes` will be read in ranges of `range_bytes`; an empty slice takes it back.
    pub fn set(&self, bytes: &[u8], range_bytes: usize) {
        self.start.store(bytes.as_ptr() as usize, Ordering::Relaxed);
        self.range_bytes.store(range_bytes, Ordering::Relaxed);
        self.bytes.store(bytes.len(), Ordering::Relaxed);
    }

    /// The addresses of a range's beginning; empty where there is none.
    fn range(&self, index: usize) -> std::ops::Range<usize> {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let range_bytes = self.range_bytes.load(Ordering::Relaxed);
        let from = (index * range_bytes).min(bytes);
        let to = (from + range_bytes.min(BYTES_MAX)).min(bytes);
        let start = self.start.load(Ordering::Relaxed);
        start + from..start + to
    }

    /// The beginning of a range; nothing where there is none.
    pub fn at(&self, index: usize) -> Ahead {
        let range = self.range(index);
        if range.is_empty() { Ahead::default() } else { Ahead::at(range.start as *const u8) }
    }
}

/// How far an idle worker has come with what it asks for.
#[derive(Default)]
pub(crate) struct Cursor {
    begun: usize,
    next: usize,
}

impl Cursor {
    /// Asks for the next lines of the range that this worker is likely to be given.
    pub fn advance(&mut self, soon: &Soon, index: usize) {
        let range = soon.range(index);
        if range.start != self.begun {
            (self.begun, self.next) = (range.start, range.start);
        }
        if self.next < range.end {
            prefetch(self.next as *const u8);
            self.next += LINE_BYTES;
        }
    }
}
