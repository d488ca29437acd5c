//! A fast digest of much memory, to compare replicas and to notice a changed word.
//!
//! Any change within one 8-byte word changes it for certain; it is no defence against someone who
//! wants a collision (snapshots have BLAKE3 for that).

/// Odd, so that multiplying by it loses nothing.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
/// Chains side by side: as many as hide one another's multiplications in wide registers.
const LANES: usize = 32;
/// Bytes that the lanes take at a time.
const STRIPE: usize = 8 * LANES;
/// Lanes of one register, for the compiler.
const GROUP: usize = 8;

/// Bytes that are digested as one; a buffer's digest is that of its blocks' digests, so that a
/// device may compute them side by side.
pub const BLOCK: usize = 256 << 10;

/// The digest of a buffer that comes block by block.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    digests: Vec<u64>,
}

impl Blocks {
    /// Adds a block: [`BLOCK`] bytes, or less if it is the last.
    pub fn push(&mut self, block: &[u8]) {
        self.digests.push(Digest::of(block));
    }

    /// The digest of all blocks.
    pub fn finish(&self) -> u64 {
        of_digests(&self.digests)
    }
}

/// The digest of digests.
pub fn of_digests(digests: &[u64]) -> u64 {
    let mut digest = Digest::default();
    for group in digests.chunks(LANES) {
        let mut bytes = [0; STRIPE];
        for (place, one) in bytes.chunks_exact_mut(8).zip(group) {
            place.copy_from_slice(&one.to_le_bytes());
        }
        digest.update(&bytes[..8 * group.len()]);
    }
    digest.finish()
}

/// A digest over bytes that come in pieces.
#[derive(Clone, Debug)]
pub struct Digest {
    lanes: [u64; LANES],
    bytes: u64,
}

impl Default for Digest {
    fn default() -> Digest {
        let lane = |index: usize| FACTOR.wrapping_mul(2 * index as u64 + 1);
        Digest { lanes: std::array::from_fn(lane), bytes: 0 }
    }
}

impl Digest {
    /// The digest of one piece.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut digest = Digest::default();
        digest.update(bytes);
        digest.finish()
    }

    /// Adds a piece. All pieces but the last should be multiples of 256 bytes, or the digest
    /// depends on how the bytes were cut. Inlined, so that a device's code can have it compiled for
    /// its own instructions.
    #[inline(always)]
    pub fn update(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        let mut stripes = bytes.chunks_exact(STRIPE);
        // A copy, which can stay in registers.
        let mut lanes = self.lanes;
        for stripe in &mut stripes {
            let groups = lanes.chunks_exact_mut(GROUP).zip(stripe.chunks_exact(8 * GROUP));
            for (lanes, words) in groups {
                for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
                    let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
                    *lane = next(*lane, word);
                }
            }
        }
        for (lane, rest) in lanes.iter_mut().zip(stripes.remainder().chunks(8)) {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            *lane = next(*lane, u64::from_le_bytes(word));
        }
        self.lanes = lanes;
    }

    /// The digest of all pieces so far.
    pub fn finish(&self) -> u64 {
        let mix = |hash: u64, lane: &u64| {
            let mixed = (hash ^ lane).wrapping_mul(FACTOR);
            mixed ^ (mixed >> 32)
        };
        self.lanes.iter().fold(self.bytes, mix)
    }
}

/// A lane after one more word.
#[inline(always)]
fn next(lane: u64, word: u64) -> u64 {
    (lane ^ word).wrapping_mul(FACTOR).rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_single_flipped_bit_changes_it() {
        let bytes: Vec<u8> = (0..603_u32).map(|i| (i * 37) as u8).collect();
        let whole = Digest::of(&bytes);
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Digest::of(&flipped), whole, "bit {bit}");
        }
        assert_ne!(Digest::of(&bytes[..602]), whole);
    }

    #[test]
    fn a_flip_in_any_block_and_any_change_of_their_order_changes_the_whole() {
        let blocks = [[1_u8; 64], [2; 64], [3; 64]];
        let of = |order: [usize; 3]| {
            let mut whole = Blocks::default();
            order.iter().for_each(|&index| whole.push(&blocks[index]));
            whole.finish()
        };
        assert_ne!(of([0, 1, 2]), of([1, 0, 2]));
        assert_ne!(of([0, 1, 2]), of([0, 1, 1]));
        assert_ne!(of_digests(&[1, 2]), of_digests(&[1, 2, 0]));
    }

    #[test]
    fn pieces_give_the_digest_of_the_whole() {
        let bytes: Vec<u8> = (0..1100_u32).map(|i| (i * 41) as u8).collect();
        let mut digest = Digest::default();
        for piece in [&bytes[..256], &bytes[256..1024], &bytes[1024..]] {
            digest.update(piece);
        }
        assert_eq!(digest.finish(), Digest::of(&bytes));
    }
}
