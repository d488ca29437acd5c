//! The blocks of one device's paged cache: who uses which, and what they hold.
//!
//! A full block is found again by its tokens and by the block before it, so a later request with
//! the same beginning reuses it. Blocks that nobody uses keep what they hold until they are needed;
//! the one unused for longest goes first. It moves no data. Read next: `batch.rs`.

use std::collections::{BTreeMap, HashMap};

/// Positions in one block.
pub const BLOCK: usize = 16;

/// The place of a full block in the tree of prefixes. The empty prefix is [`ROOT`].
pub type Prefix = u64;

/// The prefix without tokens.
pub const ROOT: Prefix = 0;

/// The empty prefix of texts that go through an adapter: keys and values are not those of others.
pub fn root(adapter: Option<usize>) -> Prefix {
    adapter.map_or(ROOT, |adapter| Prefix::MAX - adapter as Prefix)
}

/// What a block holds: its own tokens after a prefix. Compared in full, so nothing can collide.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Content {
    before: Prefix,
    tokens: [u32; BLOCK],
}

#[derive(Debug, Default)]
struct Block {
    users: u32,
    /// The prefix that ends with this block, and the block's content.
    held: Option<(Prefix, Content)>,
    idle_since: u64,
}

/// All blocks of one cache.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Unused and holding nothing.
    empty: Vec<u32>,
    /// Unused and holding a prefix, by the time of their last use.
    idle: BTreeMap<u64, u32>,
    by_content: HashMap<Content, u32>,
    uses: u64,
    prefixes: Prefix,
}

impl BlockPool {
    /// A pool of empty blocks.
    pub fn new(count: usize) -> BlockPool {
        BlockPool {
            blocks: (0..count).map(|_| Block::default()).collect(),
            empty: (0..count as u32).rev().collect(),
            idle: BTreeMap::new(),
            by_content: HashMap::new(),
            uses: 0,
            prefixes: ROOT,
        }
    }

    /// Blocks in all.
    pub fn count(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody uses.
    pub fn available(&self) -> usize {
        self.empty.len() + self.idle.len()
    }

    /// Takes a block to write into, forgetting what the longest unused one held.
    pub fn take(&mut self) -> Option<u32> {
        let index = match self.empty.pop() {
            Some(index) => index,
            None => {
                let (_, index) = self.idle.pop_first()?;
                if let Some((_, content)) = self.blocks[index as usize].held.take() {
                    self.by_content.remove(&content);
                }
                index
            }
        };
        let block = &mut self.blocks[index as usize];
        assert!(block.users == 0 && block.held.is_none(), "block {index} is in use");
        block.users = 1;
        Some(index)
    }

    /// Gives one use of a block back.
    pub fn release(&mut self, index: u32) {
        let block = &mut self.blocks[index as usize];
        assert!(block.users > 0, "block {index} is given back by nobody who uses it");
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        if block.held.is_none() {
            self.empty.push(index);
            return;
        }
        self.uses += 1;
        block.idle_since = self.uses;
        self.idle.insert(self.uses, index);
    }

    /// How many tokens at the beginning are in the cache already.
    pub fn cached_tokens(&self, root: Prefix, tokens: &[u32]) -> usize {
        self.found(root, tokens).count() * BLOCK
    }

    /// Takes the blocks that hold the beginning of these tokens; gives the prefix they end at.
    pub fn reuse(&mut self, root: Prefix, tokens: &[u32]) -> (Vec<u32>, Prefix) {
        let found: Vec<(u32, Prefix)> = self.found(root, tokens).collect();
        for (index, _) in &found {
            let block = &mut self.blocks[*index as usize];
            if block.users == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.users += 1;
        }
        let end = found.last().map_or(root, |(_, prefix)| *prefix);
        (found.into_iter().map(|(index, _)| index).collect(), end)
    }

    /// Says that a full block now holds these tokens after a prefix; gives the prefix it ends.
    ///
    /// If another block holds the same already, that one stays the one to be found.
    pub fn publish(&mut self, before: Prefix, tokens: &[u32], index: u32) -> Prefix {
        let content = content(before, tokens);
        if let Some(&other) = self.by_content.get(&content) {
            return self.prefix_of(other);
        }
        self.prefixes += 1;
        let block = &mut self.blocks[index as usize];
        assert!(block.held.is_none(), "block {index} holds something else already");
        block.held = Some((self.prefixes, content.clone()));
        self.by_content.insert(content, index);
        self.prefixes
    }

    fn found<'a>(
        &'a self,
        root: Prefix,
        tokens: &'a [u32],
    ) -> impl Iterator<Item = (u32, Prefix)> + 'a {
        let mut before = root;
        tokens.chunks_exact(BLOCK).map_while(move |chunk| {
            let index = *self.by_content.get(&content(before, chunk))?;
            before = self.prefix_of(index);
            Some((index, before))
        })
    }

    fn prefix_of(&self, index: u32) -> Prefix {
        let held = self.blocks[index as usize].held.as_ref();
        held.expect("a block found by its content holds it").0
    }
}

fn content(before: Prefix, tokens: &[u32]) -> Content {
    Content { before, tokens: tokens.try_into().expect("a full block's tokens") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: usize, salt: u32) -> Vec<u32> {
        (0..count as u32).map(|at| at + salt).collect()
    }

    /// Fills blocks with tokens and publishes the full ones.
    fn fill(pool: &mut BlockPool, tokens: &[u32]) -> Vec<u32> {
        let mut before = ROOT;
        let take = |chunk: &[u32]| {
            let index = pool.take().unwrap();
            if chunk.len() == BLOCK {
                before = pool.publish(before, chunk, index);
            }
            index
        };
        tokens.chunks(BLOCK).map(take).collect()
    }

    #[test]
    fn a_given_back_prefix_is_found_again_and_an_unequal_one_is_not() {
        let mut pool = BlockPool::new(8);
        let text = tokens(40, 0);
        let blocks = fill(&mut pool, &text);
        blocks.iter().for_each(|&block| pool.release(block));
        assert_eq!(pool.available(), 8);
        assert_eq!(pool.cached_tokens(ROOT, &text), 32);
        assert_eq!(pool.cached_tokens(ROOT, &text[1..]), 0);
        let (again, _) = pool.reuse(ROOT, &text);
        assert_eq!(again, blocks[..2]);
        assert_eq!(pool.available(), 6);
    }

    #[test]
    fn shared_blocks_come_back_when_their_last_user_leaves() {
        let mut pool = BlockPool::new(4);
        let text = tokens(32, 0);
        let first = fill(&mut pool, &text);
        let (second, _) = pool.reuse(ROOT, &text);
        first.iter().for_each(|&block| pool.release(block));
        assert_eq!(pool.available(), 2);
        second.iter().for_each(|&block| pool.release(block));
        assert_eq!(pool.available(), 4);
    }

    #[test]
    fn the_longest_unused_block_is_forgotten_first() {
        let mut pool = BlockPool::new(2);
        for salt in [0, 100] {
            let blocks = fill(&mut pool, &tokens(16, salt));
            pool.release(blocks[0]);
        }
        assert!(pool.take().is_some());
        assert_eq!(pool.cached_tokens(ROOT, &tokens(16, 0)), 0);
        assert_eq!(pool.cached_tokens(ROOT, &tokens(16, 100)), 16);
    }

    #[test]
    fn texts_of_one_adapter_are_not_found_for_another() {
        let mut pool = BlockPool::new(4);
        let text = tokens(16, 0);
        let block = pool.take().unwrap();
        pool.publish(root(Some(1)), &text, block);
        assert_eq!(pool.cached_tokens(root(Some(1)), &text), 16);
        assert_eq!(pool.cached_tokens(root(Some(0)), &text), 0);
        assert_eq!(pool.cached_tokens(ROOT, &text), 0);
    }

    #[test]
    fn equal_content_is_held_once() {
        let mut pool = BlockPool::new(4);
        let text = tokens(16, 0);
        let (first, second) = (fill(&mut pool, &text), fill(&mut pool, &text));
        pool.release(second[0]);
        assert_eq!(pool.available(), 3);
        assert_eq!(pool.reuse(ROOT, &text).0, first);
    }
}
