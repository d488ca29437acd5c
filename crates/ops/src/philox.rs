//! Philox4x32-10: the counter-based random generator behind every random choice in Pontoon.
//!
//! A block of four words is a pure function of (key, counter), so randomness can be keyed by
//! (seed, step, micro-batch, op) and no global generator exists. Source of the constants and the
//! known answers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its
//! Random123 distribution.

/// The two round multipliers.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// The key increments (golden ratio and square root of three).
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Rounds of the standard variant.
const ROUNDS: usize = 10;

/// The four random words of block `counter` under `key`.
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let mut key = key;
    let mut words = counter;
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(words[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(words[2]);
        words = [
            (second >> 32) as u32 ^ words[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ words[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    words
}

/// A stream of random numbers under one seed and one purpose.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
    domain: [u32; 2],
}

impl Stream {
    /// The stream of `seed` for the purpose numbered `domain`.
    pub fn new(seed: u64, domain: u64) -> Self {
        Stream { key: halves(seed), domain: halves(domain) }
    }

    /// The four words at `index`.
    pub fn block(&self, index: u64) -> [u32; 4] {
        let [low, high] = halves(index);
        philox4x32(self.key, [low, high, self.domain[0], self.domain[1]])
    }

    /// A number in [0, 1) at `index`, a multiple of 2^-24.
    pub fn uniform(&self, index: u64) -> f32 {
        unit(self.block(index / 4)[(index % 4) as usize])
    }

    /// A standard normal number at `index` (Box-Muller on half a block).
    pub fn normal(&self, index: u64) -> f32 {
        let words = self.block(index / 4);
        let pair = ((index % 4) / 2 * 2) as usize;
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - f64::from(unit(words[pair]))).ln()).sqrt();
        let angle = std::f64::consts::TAU * f64::from(unit(words[pair + 1]));
        let value =
            if index.is_multiple_of(2) { radius * angle.cos() } else { radius * angle.sin() };
        value as f32
    }

    /// A whole number below `bound`, with bias below 2^-32 × `bound`.
    pub fn below(&self, index: u64, bound: u64) -> u64 {
        let [low, high, ..] = self.block(index);
        let word = u64::from(high) << 32 | u64::from(low);
        ((u128::from(word) * u128::from(bound)) >> 64) as u64
    }
}

/// Maps a random word to [0, 1): 24 bits, so every value is exact in f32.
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_known_answers() {
        // From Random123's kat_vectors: philox4x32 10.
        assert_eq!(
            philox4x32([0; 2], [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let stream = Stream::new(7, 1);
        let values: Vec<f64> = (0..20_000).map(|i| f64::from(stream.normal(i))).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.03, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.04, "variance {variance}");
    }
}
