//! Working memory that is grown once and reused, aligned to cache lines.
//!
//! Fresh pages cost a fault each, which is dear next to the work done on them. The memory keeps
//! what the last user left there: nobody may rely on its contents.

use crate::ffi::Allocation;

/// Elements of a u32 slice that fill a cache line.
const LINE_WORDS: usize = 16;

/// Working memory of one backend.
#[derive(Default)]
pub struct Scratch {
    memory: Option<Allocation>,
}

impl Scratch {
    /// Empty: the first use grows it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, Allocation::len)
    }

    /// Separate slices of the wanted lengths, each starting on a cache line, contents arbitrary.
    pub fn words<const COUNT: usize>(&mut self, lens: [usize; COUNT]) -> [&mut [u32]; COUNT] {
        let whole_lines = |len: usize| len.next_multiple_of(LINE_WORDS);
        let total: usize = lens.iter().map(|&len| whole_lines(len)).sum();
        let mut rest: &mut [u32] = bytemuck::cast_slice_mut(self.grown(total * size_of::<u32>()));
        lens.map(|len| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(whole_lines(len));
            rest = tail;
            &mut head[..len]
        })
    }

    /// At least so many bytes, from the start of a page.
    fn grown(&mut self, bytes: usize) -> &mut [u8] {
        if self.bytes() < bytes {
            // What is too small goes first, so that both are never held together.
            self.memory = None;
        }
        let memory = self.memory.get_or_insert_with(|| match Allocation::zeroed(bytes) {
            Some(memory) => memory,
            None => panic!("the system has no {bytes} bytes for working memory"),
        });
        let whole = memory.len() / size_of::<u32>() * size_of::<u32>();
        &mut memory.bytes_mut()[..whole]
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
