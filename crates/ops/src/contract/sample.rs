//! Choosing the next token.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::op::Access::{Read, Write};
use crate::op::contract;
use crate::view::View;

/// Where each number stands in a row of [`Sample`]'s `settings`.
pub mod sampling {
    /// Divides the logits; 0 takes the most likely token.
    pub const TEMPERATURE: usize = 0;
    /// Tokens kept by rank; 0 for all.
    pub const TOP_K: usize = 1;
    /// Smallest set whose probability reaches this is kept; 1 for all.
    pub const TOP_P: usize = 2;
    /// Tokens at least this share of the best one's probability are kept; 0 for all.
    pub const MIN_P: usize = 3;
    /// Divides positive and multiplies negative logits of tokens seen; 1 for none.
    pub const REPETITION: usize = 4;
    /// Taken from logits of tokens generated before; 0 for none.
    pub const PRESENCE: usize = 5;
    /// Taken once per earlier generation of the token; 0 for none.
    pub const FREQUENCY: usize = 6;
    /// How many tokens of `history` are the prompt's.
    pub const PROMPT_TOKENS: usize = 7;
    /// Numbers in all.
    pub const COUNT: usize = 8;
}

/// Draws one token per row.
///
/// In this order: repetition penalty (tokens anywhere in history), presence and frequency
/// penalties (tokens of history past the prompt), bias, temperature, top-k, top-p, min-p, draw.
/// The draw takes the first token, in ascending order of id, at which the running sum of kept
/// probabilities exceeds `u` times their total; `u` is `unit(philox(key = [keys 0, 1], counter =
/// [keys 2, keys 3, 0, 0])[0])`. Temperature 0 takes the largest, the lowest id on ties.
///
/// Shapes    logits, bias [rows, vocabulary]; history [rows, longest], padded by -1; settings
///           [rows, sampling::COUNT]; keys [rows, 4]; token, logprob [rows]
/// Dtypes    logits, bias, settings, logprob f32; history, token i32; keys u32
/// Writes    token; logprob: the token's log-probability before any penalty, bias or temperature,
///           over all of the logits as in [`super::TokenLogProb`], bit for bit
/// Numerics  tokens from `vocabulary` on (padding of the head) are never drawn. A row without any
///           finite logit gives token -1 and logprob NaN
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// One logit per token.
    pub logits: View,
    /// Added to the logits: user's bias, or minus infinity to forbid.
    pub bias: Option<View>,
    /// Tokens so far, the prompt first.
    pub history: Option<View>,
    /// Numbers per row, placed as [`sampling`] says.
    pub settings: View,
    /// Random key and counter of each row.
    pub keys: View,
    /// Tokens that exist; the rest of the head is padding.
    pub vocabulary: usize,
    /// The drawn tokens.
    pub token: View,
    /// Their log-probabilities.
    pub logprob: View,
}
contract!(Sample |op, check| {
    logits: Read, bias: Read, history: Read, settings: Read, keys: Read, token: Write,
    logprob: Write,
} {
    check.rank("logits", &op.logits, 2)?;
    let (rows, padded) = (op.logits.dim(0), op.logits.dim(1));
    check.tensor("logits", &op.logits, DType::F32, [rows, padded])?;
    if let Some(bias) = &op.bias {
        check.tensor("bias", bias, DType::F32, [rows, padded])?;
    }
    if let Some(history) = &op.history {
        check.rank("history", history, 2)?;
        check.tensor("history", history, DType::I32, [rows, history.dim(1)])?;
    }
    check.that((1..=padded).contains(&op.vocabulary), || {
        format!("vocabulary should be 1 to {padded} but is {}", op.vocabulary)
    })?;
    check.tensor("settings", &op.settings, DType::F32, [rows, sampling::COUNT])?;
    check.tensor("keys", &op.keys, DType::U32, [rows, 4])?;
    check.tensor("token", &op.token, DType::I32, [rows])?;
    check.tensor("logprob", &op.logprob, DType::F32, [rows])?;
});
