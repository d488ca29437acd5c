//! What is uploaded for one step: the programs' inputs as arrays, from the sequences' own terms.
//!
//! Reads and decides nothing else. Read next: `device.rs`.

use pontoon_models::SamplingSettings;
use pontoon_ops::{Backend, IGNORED, sampling};
use pontoon_program::Executor;

use super::blocks::BLOCK;
use super::device::Piece;
use super::mtp::GuessRow;
use crate::error::ServeError;

/// One row of a step that draws: the token after a sequence's tokens so far or, where some are
/// guessed, after one of those. The rows of one sequence follow one another.
pub struct DrawRow<'a> {
    /// The sequence's place among those of the step.
    pub sequence: usize,
    /// The adapter it goes through. Rows come in the order of these, those without one last.
    pub adapter: Option<usize>,
    /// Prompt and drawn tokens, and the guessed ones up to this row.
    pub tokens: &'a [u32],
    /// How many are the prompt's.
    pub prompt_tokens: usize,
    /// The sequence's blocks.
    pub blocks: &'a [u32],
    /// How to draw.
    pub sampling: &'a SamplingSettings,
    /// The choice's number among those of one prompt and seed.
    pub choice: u32,
    /// Added to the logits; empty for nothing.
    pub bias: &'a [f32],
    /// How many of the likeliest tokens to tell.
    pub top_logprobs: usize,
}

impl DrawRow<'_> {
    /// Whether the draw reads history or bias.
    pub fn needs_full(&self) -> bool {
        let sampling = self.sampling;
        let penalties = [sampling.presence_penalty, sampling.frequency_penalty];
        !self.bias.is_empty()
            || sampling.repetition_penalty != 1.0
            || penalties.iter().any(|&penalty| penalty != 0.0)
    }
}

/// Where the rows of each of `count` adapters begin, and where those without one do, of groups of
/// rows in that order.
pub(super) fn adapter_offsets(
    count: usize,
    groups: impl Iterator<Item = (Option<usize>, usize)>,
) -> Vec<i32> {
    let mut offsets = vec![0; count + 1];
    let mut last = 0;
    for (adapter, rows) in groups {
        let Some(adapter) = adapter else {
            last = count;
            continue;
        };
        assert!(last <= adapter && adapter < count, "rows are sorted by their adapters");
        last = adapter;
        offsets[adapter + 1..].iter_mut().for_each(|offset| *offset += rows as i32);
    }
    offsets
}

/// Inputs that every program has.
#[derive(Default)]
struct Inputs {
    ids: Vec<i32>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    blocks: Vec<i32>,
    lengths: Vec<i32>,
    queries: Vec<i32>,
}

impl Inputs {
    fn new(rows: usize, sequences: usize, sequence_blocks: usize) -> Inputs {
        Inputs {
            ids: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            slots: Vec::with_capacity(rows),
            blocks: vec![0; sequences * sequence_blocks],
            lengths: vec![0; sequences],
            queries: vec![0; sequences + 1],
        }
    }

    fn push(&mut self, token: u32, position: usize, blocks: &[u32]) {
        self.ids.push(token as i32);
        self.positions.push(position as i32);
        let block = blocks[position / BLOCK] as usize;
        self.slots.push((block * BLOCK + position % BLOCK) as i32);
    }

    /// Says that the rows so far from the last sequence's on belong to the next one.
    fn close(&mut self, sequence: usize, length: usize, blocks: &[u32]) {
        let per_sequence = self.blocks.len() / self.lengths.len();
        let own = &mut self.blocks[sequence * per_sequence..][..per_sequence];
        own.iter_mut().zip(blocks).for_each(|(slot, &block)| *slot = block as i32);
        self.lengths[sequence] = length as i32;
        let rows = self.ids.len() as i32;
        self.queries[sequence + 1..].fill(rows);
    }

    fn pad(&mut self, rows: usize) {
        self.ids.resize(rows, 0);
        self.positions.resize(rows, 0);
        self.slots.resize(rows, -1);
    }

    fn write(&self, program: &Executor, backend: &mut dyn Backend) -> Result<(), ServeError> {
        let inputs = [
            ("ids", &self.ids),
            ("positions", &self.positions),
            ("slots", &self.slots),
            ("blocks", &self.blocks),
            ("lengths", &self.lengths),
            ("queries", &self.queries),
        ];
        for (name, values) in inputs {
            program.write(backend, name, bytemuck::cast_slice(values))?;
        }
        Ok(())
    }
}

/// The inputs of a prefill.
pub(super) struct PieceHost(Inputs);

impl PieceHost {
    pub(super) fn new(
        pieces: &[Piece<'_>],
        rows: usize,
        sequences: usize,
        sequence_blocks: usize,
    ) -> PieceHost {
        let mut inputs = Inputs::new(rows, sequences, sequence_blocks);
        for (index, piece) in pieces.iter().enumerate() {
            for position in piece.start..piece.end {
                inputs.push(piece.tokens[position], position, piece.blocks);
            }
            inputs.close(index, piece.end, piece.blocks);
        }
        inputs.pad(rows);
        PieceHost(inputs)
    }

    /// The token after each row's, where there is one.
    pub(super) fn targets(pieces: &[Piece<'_>], rows: usize) -> Vec<i32> {
        let after = |piece: &Piece<'_>| {
            let (tokens, range) = (piece.tokens.to_vec(), piece.start..piece.end);
            range.map(move |at| tokens.get(at + 1).map_or(IGNORED, |&token| token as i32))
        };
        let mut targets: Vec<i32> = pieces.iter().flat_map(after).collect();
        targets.resize(rows, IGNORED);
        targets
    }

    pub(super) fn write(
        &self,
        program: &Executor,
        backend: &mut dyn Backend,
    ) -> Result<(), ServeError> {
        self.0.write(program, backend)
    }
}

/// The inputs of a step that draws.
pub(super) struct DrawHost {
    inputs: Inputs,
    settings: Vec<f32>,
    keys: Vec<u32>,
}

impl DrawHost {
    pub(super) fn new(rows: &[DrawRow<'_>], count: usize, sequence_blocks: usize) -> DrawHost {
        let mut inputs = Inputs::new(count, count, sequence_blocks);
        let mut settings = vec![0.0; count * sampling::COUNT];
        let mut keys = vec![0; count * 4];
        for (index, row) in rows.iter().enumerate() {
            let position = row.tokens.len() - 1;
            inputs.push(row.tokens[position], position, row.blocks);
            if rows.get(index + 1).is_none_or(|next| next.sequence != row.sequence) {
                inputs.close(row.sequence, row.tokens.len(), row.blocks);
            }
            let drawn = row.tokens.len() - row.prompt_tokens;
            set_sampling(&mut settings, index, row.sampling, row.prompt_tokens);
            set_key(&mut keys, index, (row.sampling.seed, drawn, row.choice));
        }
        inputs.pad(count);
        DrawHost { inputs, settings, keys }
    }

    /// The inputs of guesses: each row draws what its place's draw after the next will.
    pub(super) fn of_guesses(
        rows: &[GuessRow<'_>],
        count: usize,
        sequence_blocks: usize,
    ) -> DrawHost {
        let mut inputs = Inputs::new(count, count, sequence_blocks);
        let mut settings = vec![0.0; count * sampling::COUNT];
        let mut keys = vec![0; count * 4];
        for (index, row) in rows.iter().enumerate() {
            inputs.push(row.token, row.position, row.blocks);
            if rows.get(index + 1).is_none_or(|next| next.sequence != row.sequence) {
                inputs.close(row.sequence, row.position + 1, row.blocks);
            }
            // Penalties would need the history; without them a guess is a little worse.
            let plain = SamplingSettings {
                repetition_penalty: 1.0,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                ..*row.sampling
            };
            set_sampling(&mut settings, index, &plain, row.prompt_tokens);
            let drawn = (row.position + 2).saturating_sub(row.prompt_tokens);
            set_key(&mut keys, index, (row.sampling.seed, drawn, row.choice));
        }
        inputs.pad(count);
        DrawHost { inputs, settings, keys }
    }

    pub(super) fn history(rows: &[DrawRow<'_>], count: usize, longest: usize) -> Vec<i32> {
        let mut history = vec![-1; count * longest];
        for (own, row) in history.chunks_exact_mut(longest).zip(rows) {
            own.iter_mut().zip(row.tokens).for_each(|(slot, &token)| *slot = token as i32);
        }
        history
    }

    pub(super) fn bias(rows: &[DrawRow<'_>], count: usize, vocabulary: usize) -> Vec<f32> {
        let mut bias = vec![0.0; count * vocabulary];
        for (own, row) in bias.chunks_exact_mut(vocabulary).zip(rows) {
            own.iter_mut().zip(row.bias).for_each(|(slot, &value)| *slot = value);
        }
        bias
    }

    pub(super) fn write(
        &self,
        program: &Executor,
        backend: &mut dyn Backend,
    ) -> Result<(), ServeError> {
        self.inputs.write(program, backend)?;
        program.write(backend, "settings", bytemuck::cast_slice(&self.settings))?;
        Ok(program.write(backend, "keys", bytemuck::cast_slice(&self.keys))?)
    }
}

fn set_sampling(all: &mut [f32], index: usize, sampling: &SamplingSettings, prompt_tokens: usize) {
    let own = &mut all[index * sampling::COUNT..][..sampling::COUNT];
    own[sampling::TEMPERATURE] = sampling.temperature;
    own[sampling::TOP_K] = sampling.top_k as f32;
    own[sampling::TOP_P] = sampling.top_p;
    own[sampling::MIN_P] = sampling.min_p;
    own[sampling::REPETITION] = sampling.repetition_penalty;
    own[sampling::PRESENCE] = sampling.presence_penalty;
    own[sampling::FREQUENCY] = sampling.frequency_penalty;
    own[sampling::PROMPT_TOKENS] = prompt_tokens as f32;
}

/// The same key and counter as `pontoon generate` uses for a repeated prompt.
fn set_key(all: &mut [u32], index: usize, (seed, drawn, choice): (u64, usize, u32)) {
    let key = [seed as u32, (seed >> 32) as u32, drawn as u32, choice];
    all[index * 4..][..4].copy_from_slice(&key);
}
