//! The order of sequences: a permutation for every epoch, made from the seed and never stored.
//!
//! A Feistel network with Philox as round function permutes a power of four; places beyond the
//! count are walked over. Any position is found at once, so a run resumes at any sample.
//! Read next: `pack.rs`.

use pontoon_ops::philox::philox4x32;

/// Rounds of the network: four make a pseudo-random permutation of a pseudo-random function (Luby
/// and Rackoff, 1988).
const ROUNDS: u32 = 4;
/// Sets these draws apart from others of the same seed.
const DOMAIN: u32 = 0x6f72_6465;

/// Which of `count` sequences stands at `place` of an epoch.
pub(super) fn sequence_at(seed: u64, epoch: u64, count: u64, place: u64) -> u64 {
    assert!(place < count, "place {place} of {count}");
    let half_bits = (u64::BITS - (count - 1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1_u64 << half_bits) - 1;
    let key = [seed as u32, (seed >> 32) as u32];
    let mut value = place;
    loop {
        let (mut left, mut right) = (value >> half_bits, value & mask);
        for round in 0..ROUNDS {
            // Half a place has at most 32 bits.
            let counter = [right as u32, epoch as u32, (epoch >> 32) as u32, DOMAIN ^ round];
            let drawn = u64::from(philox4x32(key, counter)[0]) & mask;
            (left, right) = (right, left ^ drawn);
        }
        value = left << half_bits | right;
        if value < count {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_holds_each_sequence_once_in_an_order_of_its_own() {
        for count in [1, 2, 3, 7, 64, 1000] {
            let order = |seed, epoch| -> Vec<u64> {
                (0..count).map(|place| sequence_at(seed, epoch, count, place)).collect()
            };
            let mut sorted = order(5, 0);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            if count > 10 {
                assert_ne!(order(5, 0), order(5, 1));
                assert_ne!(order(5, 0), order(6, 0));
                assert_ne!(order(5, 0), sorted);
            }
        }
    }
}
