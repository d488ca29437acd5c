//! Guesses by the model's layer for multi-token prediction: what it makes of the hidden states of a
//! step and of the tokens drawn there.
//!
//! The layer sees every token on its way, so that its own cache is whole; the guess at a draw uses
//! that draw's settings and random key, so a guess hits as often as the two distributions agree,
//! at any temperature. Whether guesses stand is decided as for all guesses. Read next: `draft.rs`.

use pontoon_models::SamplingSettings;

use super::device::Device;
use super::sequence::Sequence;
use crate::error::ServeError;

/// A position whose hidden state is known, and the token that follows it.
pub struct GuessRow<'a> {
    /// The sequence's place among those of the step.
    pub sequence: usize,
    /// The position.
    pub position: usize,
    /// The token after it.
    pub token: u32,
    /// What the output head read there, as the device stores it.
    pub hidden: &'a [u8],
    /// The sequence's blocks.
    pub blocks: &'a [u32],
    /// How the guessed token will be drawn.
    pub sampling: &'a SamplingSettings,
    /// Tokens of the sequence's prompt.
    pub prompt_tokens: usize,
    /// The choice's number among those of one prompt and seed.
    pub choice: u32,
}

/// What the layer makes of rows.
pub struct Guessed {
    /// The token after the one given, of each row; negative where there is none.
    pub tokens: Vec<i32>,
    /// Hidden states to guess on from, row after row.
    pub hidden: Vec<u8>,
}

/// Where a sequence stands after a step: the hidden states of the positions it has gone through.
pub(super) struct Passed {
    /// Its place among those that run.
    pub at: usize,
    /// The first of the positions.
    pub position: usize,
    /// Their hidden states.
    pub hidden: Vec<u8>,
    /// How many tokens to guess.
    pub wanted: usize,
}

/// Guesses for each sequence that has passed: the tokens after its last.
pub(super) fn guess(
    device: &mut Device,
    running: &[Sequence],
    passed: &[Passed],
) -> Result<Vec<Vec<u32>>, ServeError> {
    let width = device.hidden_bytes();
    let mut guesses: Vec<Vec<u32>> = vec![Vec::new(); passed.len()];
    let mut heads: Vec<Vec<u8>> = vec![Vec::new(); passed.len()];
    // The first turn takes every position passed, so that the layer's cache has no gaps.
    for turn in 0..passed.iter().map(|one| one.wanted).max().unwrap_or(0).max(1) {
        let mut rows = Vec::new();
        let mut places = Vec::new();
        for (index, one) in passed.iter().enumerate() {
            let sequence = &running[one.at];
            let Some(generate) = sequence.generate() else { continue };
            let going_on = turn == 0 || (guesses[index].len() == turn && turn < one.wanted);
            if !going_on {
                continue;
            }
            let own = places.len();
            let row = |position: usize, token: u32, hidden| GuessRow {
                sequence: own,
                position,
                token,
                hidden,
                blocks: &sequence.blocks,
                sampling: &generate.sampling,
                prompt_tokens: sequence.prompt_tokens(),
                choice: generate.choice,
            };
            if turn == 0 {
                for (offset, hidden) in one.hidden.chunks_exact(width).enumerate() {
                    let position = one.position + offset;
                    rows.push(row(position, sequence.tokens[position + 1], hidden));
                }
            } else {
                let position = sequence.tokens.len() - 2 + turn;
                rows.push(row(position, guesses[index][turn - 1], &heads[index]));
            }
            places.push((index, rows.len() - 1));
        }
        if rows.is_empty() {
            break;
        }
        let guessed = device.guess(&rows)?;
        drop(rows);
        for (index, last) in places {
            if turn < passed[index].wanted
                && let Ok(token) = u32::try_from(guessed.tokens[last])
            {
                guesses[index].push(token);
                heads[index] = guessed.hidden[last * width..][..width].to_vec();
            }
        }
    }
    Ok(guesses)
}
