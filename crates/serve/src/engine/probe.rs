//! A fixed text run through every kind of program, by which devices are compared before they serve.
//!
//! It measures only; what may differ is `../pool/agreement.rs`.

use std::sync::Arc;

use pontoon_models::SamplingSettings;

use super::blocks::BLOCK;
use super::device::{Device, Piece, PrefillHead, PrefillResult};
use super::request::Scored;
use super::rows::DrawRow;
use crate::error::ServeError;

/// Tokens of the probe: enough to run through every layer at several positions and blocks.
const PROBE_TOKENS: usize = 40;
/// Rows of the probe's draws: the last ones, in one batch.
const DRAWN_ROWS: usize = 2;
/// A penalty that changes no log-probability that is told, but needs the larger of the programs.
const PENALTY: f32 = 1.01;

/// What one device computed of the probe.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The text.
    pub tokens: Arc<[u32]>,
    /// The log-probability of each token from the second on, as far as they were scored.
    pub scores: Arc<[f32]>,
    /// Log-probabilities of the whole vocabulary after each position, row by row.
    pub rows: Arc<[f32]>,
    /// Tokens that exist: the width of a row.
    pub vocabulary: usize,
}

impl Probe {
    /// Runs the probe on a device whose cache is empty and unused.
    pub fn measure(device: &mut Device) -> Result<Probe, ServeError> {
        let options = *device.options();
        let vocabulary = options.vocabulary;
        let count = PROBE_TOKENS.min(options.context);
        let stream = pontoon_ops::philox::Stream::new(1, 1);
        let token = |at: u64| stream.below(at, vocabulary as u64) as u32;
        let tokens: Vec<u32> = (0..count as u64).map(token).collect();
        let blocks: Vec<u32> = (0..count.div_ceil(BLOCK) as u32).collect();
        let mut prefill = |head: PrefillHead| {
            let (most, _) = device.prefill_limits(head);
            let (end, adapter) = (most.min(count - 1), None);
            let piece = Piece { tokens: &tokens, start: 0, end, blocks: &blocks, adapter };
            match device.prefill(&[piece], head)? {
                PrefillResult::Scores(scores) => Ok::<_, ServeError>(scores),
                PrefillResult::Nothing | PrefillResult::Hidden(_) => Ok(Vec::new()),
            }
        };
        let scores: Vec<f32> =
            prefill(PrefillHead::Score)?.iter().map(|scored| scored.logprob).collect();
        let whole = prefill(PrefillHead::ScoreWithTop(vocabulary))?;
        let cached = whole.len();
        let mut rows = Rows { values: Vec::new(), vocabulary };
        whole.iter().for_each(|scored| rows.push(Some(scored)));
        let drawn_rows = DRAWN_ROWS.min(options.sequences).min(cached);
        for repetition_penalty in [1.0, PENALTY] {
            let sampling = SamplingSettings { repetition_penalty, ..SamplingSettings::greedy(1) };
            let row = |back: usize| DrawRow {
                sequence: back,
                adapter: None,
                tokens: &tokens[..=cached - back],
                prompt_tokens: 1,
                blocks: &blocks,
                sampling: &sampling,
                choice: 0,
                bias: &[],
                top_logprobs: vocabulary,
            };
            let batch: Vec<DrawRow<'_>> = (0..drawn_rows).map(row).collect();
            device.draw(&batch)?.iter().for_each(|drawn| rows.push(drawn.as_ref()));
        }
        Ok(Probe {
            tokens: Arc::from(tokens),
            scores: Arc::from(scores),
            rows: Arc::from(rows.values),
            vocabulary,
        })
    }
}

struct Rows {
    values: Vec<f32>,
    vocabulary: usize,
}

impl Rows {
    /// Adds a row in the order of token ids; NaN where the device gave none.
    fn push(&mut self, scored: Option<&Scored>) {
        let begin = self.values.len();
        self.values.resize(begin + self.vocabulary, f32::NAN);
        let Some(scored) = scored else { return };
        for &(token, logprob) in &scored.top {
            self.values[begin + token as usize] = logprob;
        }
    }
}
