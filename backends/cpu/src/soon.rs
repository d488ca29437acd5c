//! A hint to the caches: the memory that the next large product will stream.
//!
//! Decoding is bound by memory, yet memory rests while small operations run between products and
//! while each range of columns waits for its first rows. So whoever lists operations says what
//! comes soon; idle workers ask for it, and so does a product at its own end. Nothing is ever read
//! through a hint, so a wrong one costs time only.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::dealing::share;
use crate::simd::micro::LINE_BYTES;
use crate::simd::prefetch;

/// Most bytes that one thread asks for before the product begins: a part of its own cache.
const BYTES_MAX: usize = 256 << 10;

/// How memory is cut into ranges: as evenly as its pieces allow, in order.
#[derive(Clone, Copy, Default)]
pub(crate) struct Ranges {
    /// Pieces that are not cut.
    pub pieces: usize,
    /// Bytes of a piece; the last may have fewer.
    pub piece_bytes: usize,
    /// Ranges.
    pub count: usize,
}

/// Memory that will be streamed in ranges, one after another.
#[derive(Default)]
pub(crate) struct Soon {
    start: AtomicUsize,
    bytes: AtomicUsize,
    pieces: AtomicUsize,
    piece_bytes: AtomicUsize,
    count: AtomicUsize,
}

impl Soon {
    /// Says that `bytes` will be read in ranges; an empty slice takes it back.
    pub fn set(&self, bytes: &[u8], ranges: Ranges) {
        self.start.store(bytes.as_ptr() as usize, Ordering::Relaxed);
        self.pieces.store(ranges.pieces, Ordering::Relaxed);
        self.piece_bytes.store(ranges.piece_bytes, Ordering::Relaxed);
        self.count.store(ranges.count, Ordering::Relaxed);
        self.bytes.store(bytes.len(), Ordering::Relaxed);
    }

    /// The addresses of a range's beginning; empty where there is none.
    fn range(&self, index: usize) -> std::ops::Range<usize> {
        let bytes = self.bytes.load(Ordering::Relaxed);
        let count = self.count.load(Ordering::Relaxed);
        if bytes == 0 || index >= count {
            return 0..0;
        }
        let pieces = self.pieces.load(Ordering::Relaxed);
        let piece_bytes = self.piece_bytes.load(Ordering::Relaxed);
        let part = share(pieces, count, index);
        let from = (part.start * piece_bytes).min(bytes);
        let to = (part.end * piece_bytes).min(from + BYTES_MAX).min(bytes);
        let start = self.start.load(Ordering::Relaxed);
        start + from..start + to
    }

    /// The beginning of a range; none where there is no such range.
    pub fn at(&self, index: usize) -> Option<*const u8> {
        let range = self.range(index);
        (!range.is_empty()).then_some(range.start as *const u8)
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
