//! Working memory that is grown once and reused, aligned to cache lines.
//!
//! Fresh pages cost a fault each, which is dear next to the work done on them. The memory keeps
//! what the last user left there: nobody may rely on its contents.

use bytemuck::{Pod, Zeroable};

/// One cache line, so that a vector of them is aligned.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Elements of a u32 slice that fill a cache line.
const LINE_WORDS: usize = 16;

/// Working memory of one backend.
#[derive(Default)]
pub struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// Empty: the first use grows it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// Separate slices of the wanted lengths, each starting on a cache line, contents arbitrary.
    pub fn words<const COUNT: usize>(&mut self, lens: [usize; COUNT]) -> [&mut [u32]; COUNT] {
        let lines = |len: usize| len.div_ceil(LINE_WORDS);
        let total = lens.iter().map(|&len| lines(len)).sum();
        if self.lines.len() < total {
            self.lines.resize(total, Line([0; 64]));
        }
        let mut rest = self.lines.as_mut_slice();
        lens.map(|len| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(lines(len));
            rest = tail;
            &mut bytemuck::cast_slice_mut(head)[..len]
        })
    }

    /// As [`Scratch::words`], as f32 values.
    pub fn floats<const COUNT: usize>(&mut self, lens: [usize; COUNT]) -> [&mut [f32]; COUNT] {
        self.words(lens).map(bytemuck::cast_slice_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_aligned_separate_and_reused() {
        let mut scratch = Scratch::new();
        let [a, b, c] = scratch.words([3, 0, 100]);
        assert_eq!((a.len(), b.len(), c.len()), (3, 0, 100));
        assert!(a.as_ptr().addr().is_multiple_of(64) && c.as_ptr().addr().is_multiple_of(64));
        let bytes = scratch.bytes();
        let [d] = scratch.floats([50]);
        d.fill(1.0);
        assert_eq!(scratch.bytes(), bytes);
    }
}
