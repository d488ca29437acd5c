//! A fast digest of much memory, to compare replicas and to notice a changed word.
//!
//! Any change within one 8-byte word changes it for certain; it is no defence against someone who
//! wants a collision (snapshots have BLAKE3 for that).

/// Odd, so that multiplying by it loses nothing.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
const LANES: usize = 8;

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

    /// Adds a piece. All pieces but the last should be multiples of 64 bytes, or the digest
    /// depends on how the bytes were cut.
    pub fn update(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        let mut blocks = bytes.chunks_exact(8 * LANES);
        for block in &mut blocks {
            for (lane, word) in self.lanes.iter_mut().zip(block.chunks_exact(8)) {
                let word = u64::from_le_bytes(word.try_into().expect("chunks of eight"));
                *lane = (*lane ^ word).wrapping_mul(FACTOR).rotate_left(29);
            }
        }
        for (index, rest) in blocks.remainder().chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            let lane = &mut self.lanes[index];
            *lane = (*lane ^ u64::from_le_bytes(word)).wrapping_mul(FACTOR).rotate_left(29);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_single_flipped_bit_changes_it() {
        let bytes: Vec<u8> = (0..203_u32).map(|i| (i * 37) as u8).collect();
        let whole = Digest::of(&bytes);
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Digest::of(&flipped), whole, "bit {bit}");
        }
        assert_ne!(Digest::of(&bytes[..202]), whole);
    }

    #[test]
    fn pieces_give_the_digest_of_the_whole() {
        let bytes: Vec<u8> = (0..300_u32).map(|i| (i * 41) as u8).collect();
        let mut digest = Digest::default();
        for piece in [&bytes[..64], &bytes[64..256], &bytes[256..]] {
            digest.update(piece);
        }
        assert_eq!(digest.finish(), Digest::of(&bytes));
    }
}
