//! The loaded programs of a generator and the host buffers of one step.
//!
//! All programs share one arena, as they never run at the same time. Host buffers are made once,
//! so a step allocates nothing. Decides nothing: `generate.rs` does.

use pontoon_ops::{Backend, sampling};
use pontoon_program::{Executor, Memory, Plan, Program, ProgramError};

use super::{GeneratorOptions, SamplingSettings};
use crate::error::ModelError;
use crate::model::{Model, PagedHead, PagedShape};

/// Positions in one block of the cache.
const BLOCK: usize = 16;

/// Rows of the prefill programs. A longer prompt goes through the last one several times; few
/// sizes keep the number of programs small, and a factor of eight bounds the padding.
const PREFILL_ROWS: [usize; 3] = [16, 128, 512];

/// A prompt on its way into the cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk<'a> {
    pub tokens: &'a [u32],
    /// The sequence's part of the cache.
    pub place: usize,
}

/// One sequence's row of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    pub row: usize,
    pub place: usize,
    pub draw: u32,
    pub prompt_tokens: usize,
    pub tokens: &'a [u32],
}

/// The programs on the device.
#[derive(Debug)]
pub(super) struct Loaded {
    prefill: Vec<Prefill>,
    draw: Executor,
    draw_with_history: Executor,
    sequence_blocks: usize,
    history_longest: usize,
    host: Host,
}

/// The prefill programs of one size.
#[derive(Debug)]
struct Prefill {
    rows: usize,
    cache_only: Executor,
    score: Executor,
}

/// What is uploaded before a step and downloaded after it.
#[derive(Debug, Default)]
struct Host {
    ids: Vec<i32>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    targets: Vec<i32>,
    blocks: Vec<i32>,
    lengths: Vec<i32>,
    queries: Vec<i32>,
    history: Vec<i32>,
    settings: Vec<f32>,
    keys: Vec<u32>,
    token: Vec<i32>,
    logprob: Vec<f32>,
}

impl Loaded {
    /// Lets the device order the weights as it likes: they stay as they are from now on.
    pub(super) fn prepack(&self, backend: &mut dyn Backend) -> Result<(), ProgramError> {
        self.draw.prepack(backend)?;
        self.prefill.iter().try_for_each(|prefill| prefill.score.prepack(backend))
    }

    pub(super) fn new(
        backend: &mut dyn Backend,
        memory: &mut Memory,
        model: &Model,
        options: GeneratorOptions,
    ) -> Result<Loaded, ModelError> {
        let GeneratorOptions { dtype, tokens_max, sequences, vocabulary } = options;
        let vocabulary = vocabulary.unwrap_or(model.config.vocab_size);
        let sequence_blocks = tokens_max.div_ceil(BLOCK);
        let shape = |rows: usize, together: usize| PagedShape {
            rows,
            sequences: together,
            block: BLOCK,
            blocks: sequences * sequence_blocks,
            sequence_blocks,
            positions_max: tokens_max,
        };
        let mut programs = Vec::new();
        for rows in prefill_sizes(tokens_max) {
            for head in [PagedHead::CacheOnly, PagedHead::Score] {
                programs.push(model.paged_program(shape(rows, 1), dtype, head)?);
            }
        }
        let heads = [PagedHead::Sample { vocabulary }, PagedHead::SampleWithHistory { vocabulary }];
        for head in heads {
            programs.push(model.paged_program(shape(sequences, sequences), dtype, head)?);
        }
        let mut executors = load_all(backend, memory, &programs)?;
        let last = "the programs pushed above";
        let (draw_with_history, draw) =
            (executors.pop().expect(last), executors.pop().expect(last));
        let mut prefill = Vec::new();
        let mut rest = executors.into_iter();
        for rows in prefill_sizes(tokens_max) {
            let (cache_only, score) = (rest.next().expect(last), rest.next().expect(last));
            prefill.push(Prefill { rows, cache_only, score });
        }
        // A model's own limit is where dynamic scaling begins, so the table suits every length.
        model.upload_constants(backend, memory, tokens_max, tokens_max)?;
        let host = Host {
            token: vec![0; sequences],
            logprob: vec![0.0; sequences],
            ..Host::for_rows(sequences, sequence_blocks, tokens_max)
        };
        let history_longest = tokens_max;
        Ok(Loaded { prefill, draw, draw_with_history, sequence_blocks, history_longest, host })
    }

    /// Puts keys and values of all tokens but the last into the cache; with `logprobs`, appends
    /// the log-probability of each token from the second on.
    pub(super) fn prefill(
        &mut self,
        backend: &mut dyn Backend,
        chunk: Chunk<'_>,
        mut logprobs: Option<&mut Vec<f32>>,
    ) -> Result<(), ModelError> {
        let count = chunk.tokens.len() - 1;
        let mut start = 0;
        while start < count {
            let rest = count - start;
            let last = self.prefill.last().expect("there is at least one size");
            let size = self.prefill.iter().find(|size| size.rows >= rest).unwrap_or(last);
            let taken = rest.min(size.rows);
            let host =
                Host::for_prefill(chunk, start..start + taken, size.rows, self.sequence_blocks);
            match logprobs.as_deref_mut() {
                None => {
                    host.write(&size.cache_only, backend)?;
                    size.cache_only.run(backend)?;
                }
                Some(into) => {
                    host.write(&size.score, backend)?;
                    write(&size.score, backend, "targets", &host.targets)?;
                    size.score.run(backend)?;
                    let mut scores = vec![0.0_f32; size.rows];
                    let bytes = bytemuck::cast_slice_mut(&mut scores);
                    size.score.read(backend, "logprob", bytes)?;
                    into.extend_from_slice(&scores[..taken]);
                }
            }
            start += taken;
        }
        Ok(())
    }

    /// Clears the rows of the last step.
    pub(super) fn begin_step(&mut self) {
        let host = &mut self.host;
        host.ids.fill(0);
        host.positions.fill(0);
        host.slots.fill(-1);
        host.blocks.fill(0);
        host.lengths.fill(0);
        host.settings.fill(0.0);
        host.keys.fill(0);
    }

    /// Sets the row that extends one sequence by the token after its last.
    pub(super) fn set_row(&mut self, row: Row<'_>, settings: &SamplingSettings) {
        let Row { row, place, draw, prompt_tokens, tokens } = row;
        let host = &mut self.host;
        let position = tokens.len() - 1;
        host.ids[row] = tokens[position] as i32;
        host.positions[row] = position as i32;
        host.slots[row] = (place * self.sequence_blocks * BLOCK + position) as i32;
        host.lengths[row] = tokens.len() as i32;
        let own = &mut host.blocks[row * self.sequence_blocks..][..self.sequence_blocks];
        set_blocks(own, place);
        let own = &mut host.settings[row * sampling::COUNT..][..sampling::COUNT];
        own[sampling::TEMPERATURE] = settings.temperature;
        own[sampling::TOP_K] = settings.top_k as f32;
        own[sampling::TOP_P] = settings.top_p;
        own[sampling::MIN_P] = settings.min_p;
        own[sampling::REPETITION] = settings.repetition_penalty;
        own[sampling::PRESENCE] = settings.presence_penalty;
        own[sampling::FREQUENCY] = settings.frequency_penalty;
        own[sampling::PROMPT_TOKENS] = prompt_tokens as f32;
        let drawn = (tokens.len() - prompt_tokens) as u32;
        let seed = settings.seed;
        let key = [seed as u32, (seed >> 32) as u32, drawn, draw];
        host.keys[row * 4..][..4].copy_from_slice(&key);
        if settings.history() == History::Used {
            let own = &mut host.history[row * self.history_longest..][..self.history_longest];
            own.fill(-1);
            for (slot, &token) in own.iter_mut().zip(tokens) {
                *slot = token as i32;
            }
        }
    }

    /// Runs the step for the first `active` rows.
    pub(super) fn run_step(
        &mut self,
        backend: &mut dyn Backend,
        active: usize,
        history: History,
    ) -> Result<(), ModelError> {
        for (sequence, query) in self.host.queries.iter_mut().enumerate() {
            *query = sequence.min(active) as i32;
        }
        let program = match history {
            History::Unused => &self.draw,
            History::Used => &self.draw_with_history,
        };
        let host = &mut self.host;
        host.write(program, backend)?;
        write(program, backend, "settings", &host.settings)?;
        write(program, backend, "keys", &host.keys)?;
        if history == History::Used {
            write(program, backend, "history", &host.history)?;
        }
        program.run(backend)?;
        program.read(backend, "token", bytemuck::cast_slice_mut(&mut host.token))?;
        program.read(backend, "logprob", bytemuck::cast_slice_mut(&mut host.logprob))?;
        Ok(())
    }

    /// The token a row drew, -1 if it could draw none, and its log-probability.
    pub(super) fn drawn(&self, row: usize) -> (i32, f32) {
        (self.host.token[row], self.host.logprob[row])
    }
}

/// Whether sampling reads the tokens so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum History {
    Unused,
    Used,
}

impl Host {
    fn for_rows(rows: usize, sequence_blocks: usize, history_longest: usize) -> Host {
        Host {
            ids: vec![0; rows],
            positions: vec![0; rows],
            slots: vec![-1; rows],
            blocks: vec![0; rows * sequence_blocks],
            lengths: vec![0; rows],
            queries: vec![0; rows + 1],
            history: vec![-1; rows * history_longest],
            settings: vec![0.0; rows * sampling::COUNT],
            keys: vec![0; rows * 4],
            ..Host::default()
        }
    }

    /// Inputs of the prefill program that takes one prompt's tokens of this range.
    fn for_prefill(
        chunk: Chunk<'_>,
        range: std::ops::Range<usize>,
        rows: usize,
        sequence_blocks: usize,
    ) -> Host {
        let first = chunk.place * sequence_blocks * BLOCK;
        let padded = |fill: i32, of: &dyn Fn(usize) -> i32| -> Vec<i32> {
            let values = range.clone().map(of);
            values.chain(std::iter::repeat(fill)).take(rows).collect()
        };
        let mut blocks = vec![0; sequence_blocks];
        set_blocks(&mut blocks, chunk.place);
        Host {
            ids: padded(0, &|at| chunk.tokens[at] as i32),
            positions: padded(0, &|at| at as i32),
            slots: padded(-1, &|at| (first + at) as i32),
            targets: padded(pontoon_ops::IGNORED, &|at| chunk.tokens[at + 1] as i32),
            blocks,
            lengths: vec![range.end as i32],
            queries: vec![0, range.len() as i32],
            ..Host::default()
        }
    }

    fn write(&self, program: &Executor, backend: &mut dyn Backend) -> Result<(), ModelError> {
        write(program, backend, "ids", &self.ids)?;
        write(program, backend, "positions", &self.positions)?;
        write(program, backend, "slots", &self.slots)?;
        write(program, backend, "blocks", &self.blocks)?;
        write(program, backend, "lengths", &self.lengths)?;
        write(program, backend, "queries", &self.queries)
    }
}

fn write<T: bytemuck::NoUninit>(
    program: &Executor,
    backend: &mut dyn Backend,
    name: &str,
    values: &[T],
) -> Result<(), ModelError> {
    Ok(program.write(backend, name, bytemuck::cast_slice(values))?)
}

/// A sequence's blocks are those of its place, in order.
fn set_blocks(blocks: &mut [i32], place: usize) {
    let first = place * blocks.len();
    for (index, block) in blocks.iter_mut().enumerate() {
        *block = (first + index) as i32;
    }
}

fn prefill_sizes(tokens_max: usize) -> impl Iterator<Item = usize> {
    // The smallest size that takes the longest prompt at once is the last one needed.
    let needed = PREFILL_ROWS.iter().position(|&rows| rows >= tokens_max);
    let count = needed.map_or(PREFILL_ROWS.len(), |index| index + 1);
    PREFILL_ROWS.into_iter().take(count)
}

fn load_all(
    backend: &mut dyn Backend,
    memory: &mut Memory,
    programs: &[Program],
) -> Result<Vec<Executor>, ModelError> {
    let bytes = programs.iter().map(|program| Plan::new(program).arena_bytes).max().unwrap_or(0);
    let arena = backend.alloc(bytes.max(1)).map_err(ProgramError::from)?;
    let load = |program| Executor::load_with(backend, memory, program, &[], Some(arena));
    Ok(programs.iter().map(load).collect::<Result<Vec<_>, ProgramError>>()?)
}
