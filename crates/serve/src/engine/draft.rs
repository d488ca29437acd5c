//! Guesses at the tokens that come next, to be checked by the model in one step.
//!
//! A guess decides nothing: every row of a step draws with its own place's key, and a guessed token
//! stands only if it is what was drawn there. So answers are the same bits with guesses and
//! without. This file guesses from the text itself and says how far to guess; `mtp.rs` guesses by
//! the model's own extra layer. Read next: `batch.rs`.

/// How tokens are guessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// They are not.
    #[default]
    Off,
    /// What followed the last tokens where they stood before.
    PromptLookup,
    /// By the model's layer for multi-token prediction.
    Mtp,
}

/// Tokens that must stand before as they stand at the end, at most and at least: a longer match
/// says more, and a single token's says too little.
const MATCH_MAX: usize = 4;
const MATCH_MIN: usize = 2;
/// How far back a match is looked for: bounds the time of a step, not the quality of guesses.
const LOOK_BACK: usize = 16_384;

/// What followed the last tokens where they stood before, latest first; at most `limit` tokens.
pub fn look_up(tokens: &[u32], limit: usize) -> &[u32] {
    let recent = &tokens[tokens.len().saturating_sub(LOOK_BACK)..];
    for length in (MATCH_MIN..=MATCH_MAX).rev() {
        let Some(end) = recent.len().checked_sub(length).filter(|&end| end > 0) else { continue };
        let last = &recent[end..];
        let before = &recent[..recent.len() - 1];
        if let Some(found) = before.windows(length).rposition(|window| window == last) {
            let follows = &recent[found + length..];
            return &follows[..follows.len().min(limit)];
        }
    }
    &[]
}

/// How many tokens to guess, by how the last guesses fared: wrong ones cost a row each.
#[derive(Clone, Copy, Debug)]
pub struct Reach {
    most: usize,
    now: usize,
    /// Steps to pass over before the next guess.
    pause: u32,
    misses: u32,
}

/// Steps that are passed over at most after guesses that were all wrong.
const PAUSE_MAX: u32 = 16;

impl Reach {
    /// At the beginning.
    pub fn new(most: usize) -> Reach {
        Reach { most, now: most, pause: 0, misses: 0 }
    }

    /// How many to guess now; called once a step.
    pub fn guesses(&mut self) -> usize {
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        self.now
    }

    /// How many to guess, where guessing goes on at every step.
    pub fn steady(&self) -> usize {
        self.now
    }

    /// Learns how many of the guessed tokens were right.
    pub fn learn(&mut self, guessed: usize, right: usize) {
        if guessed == 0 {
            return;
        }
        if right == guessed {
            self.now = (self.now * 2).clamp(1, self.most.max(1));
        } else {
            self.now = (right + 1).min(self.most);
        }
        self.misses = if right > 0 { 0 } else { self.misses + 1 };
        if self.misses > 1 {
            self.pause = (1 << self.misses.min(8)).min(PAUSE_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_place_of_the_longest_match_is_taken() {
        let text = [1, 2, 3, 9, 5, 2, 3, 7, 8, 1, 2, 3];
        assert_eq!(look_up(&text, 3), [9, 5, 2]);
        assert_eq!(look_up(&text[2..], 2), [7, 8]);
        assert_eq!(look_up(&[4, 4, 4, 4], 9), [4]);
        assert!(look_up(&[1, 2, 3], 4).is_empty());
        assert!(look_up(&[7], 4).is_empty() && look_up(&[], 4).is_empty());
    }

    #[test]
    fn wrong_guesses_become_short_and_rare_and_right_ones_long_again() {
        let mut reach = Reach::new(8);
        assert_eq!(reach.guesses(), 8);
        reach.learn(8, 2);
        assert_eq!(reach.guesses(), 3);
        reach.learn(3, 3);
        assert_eq!(reach.guesses(), 6);
        reach.learn(6, 0);
        assert_eq!(reach.guesses(), 1);
        reach.learn(1, 0);
        assert_eq!((0..5).map(|_| reach.guesses()).collect::<Vec<_>>(), [0, 0, 0, 0, 1]);
        reach.learn(1, 1);
        assert_eq!(reach.guesses(), 2);
    }
}
