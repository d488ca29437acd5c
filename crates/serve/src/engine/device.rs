//! One device with the model's programs on it: runs a prefill or a step that draws, no more.
//!
//! Programs exist in a few sizes of rows, and the smallest that fits is run; bits do not depend
//! on which, by the waist's batch invariance. All share one arena, as they never run at the same
//! time. Which sequences run is decided in `batch.rs`. Read next: `rows.rs` for what is uploaded.

use std::time::Duration;

use pontoon_models::{Adapters, DrawReads, ExtraLayer, Model, PagedHead, PagedShape, TensorSource};
use pontoon_ops::{Backend, DType};
use pontoon_program::{Executor, Memory, Plan, Program, ProgramError};

use super::blocks::BLOCK;
use super::draft::Speculation;
use super::mtp::{GuessRow, Guessed};
use super::request::Scored;
use super::rows::{DrawHost, DrawRow, PieceHost, adapter_offsets};
use crate::error::ServeError;

/// Rows of the prefill programs; few sizes keep the number of programs small, and a factor of
/// four to eight bounds the padding.
const PREFILL_ROWS: [usize; 3] = [16, 128, 512];
/// Rows of the prefill programs that give all logits, whose size is rows times vocabulary.
const LOGIT_ROWS: [usize; 2] = [16, 128];
/// Rows of a step up to which guesses are added.
const DRAFT_ROWS: usize = 32;
/// Sequences of which a prefill takes a piece each, at most.
const PIECES_MAX: usize = 16;

/// The sizes a device is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// What weights, activations and the cache are stored in.
    pub dtype: DType,
    /// The longest sequence, prompt included.
    pub context: usize,
    /// Sequences that run together at most.
    pub sequences: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Tokens that exist.
    pub vocabulary: usize,
    /// How long one step may take before the device is taken to hang.
    pub step_deadline: Duration,
    /// How tokens are guessed.
    pub speculation: Speculation,
    /// Tokens guessed of one sequence in a step, at most.
    pub draft_tokens: usize,
}

impl DeviceOptions {
    /// Rows of a step that draws, at most: one of every sequence, and guesses as long as a step is
    /// bound by reading the weights.
    pub fn draw_rows(&self) -> usize {
        let drafts = if self.speculation == Speculation::Off { 0 } else { self.draft_tokens };
        let wanted = self.sequences.saturating_mul(1 + drafts);
        self.sequences.max(wanted.min(DRAFT_ROWS))
    }
}

/// What a prefill computes of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefillHead {
    /// Nothing.
    CacheOnly,
    /// The log-probability of each next token.
    Score,
    /// The same, with the likeliest tokens.
    ScoreWithTop(usize),
    /// The last hidden states.
    Hidden,
}

/// A part of a sequence on its way into the cache.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The whole sequence.
    pub tokens: &'a [u32],
    /// Where the part begins.
    pub start: usize,
    /// Where it ends.
    pub end: usize,
    /// The sequence's blocks, up to the part's end at least.
    pub blocks: &'a [u32],
    /// The adapter it goes through. Pieces come in the order of these, those without one last.
    pub adapter: Option<usize>,
}

/// What a prefill gave.
#[derive(Clone, Debug, PartialEq)]
pub enum PrefillResult {
    /// Nothing was asked for.
    Nothing,
    /// The scores of the tokens after each of the pieces' rows.
    Scores(Vec<Scored>),
    /// Hidden states, row after row.
    Hidden(Vec<f32>),
}

/// A draw's result; `None` where no logit was finite.
pub type Drawn = Option<Scored>;

/// The model on one device.
pub struct Device {
    backend: Box<dyn Backend>,
    options: DeviceOptions,
    sequence_blocks: usize,
    padded_vocabulary: usize,
    width: usize,
    adapters: usize,
    cache_only: Vec<(usize, Executor)>,
    score: Vec<(usize, Executor)>,
    score_with_logits: Vec<(usize, Executor)>,
    hidden: Vec<(usize, Executor)>,
    plain: Vec<(usize, Executor)>,
    full: Vec<(usize, Executor)>,
    /// Programs of the layer for multi-token prediction; none without it.
    guess: Vec<(usize, Executor)>,
}

impl Device {
    /// Puts the weights on a device and loads the programs.
    pub fn new(
        mut backend: Box<dyn Backend>,
        model: &Model,
        (weights, adapters): (&dyn TensorSource, Option<&Adapters>),
        options: DeviceOptions,
    ) -> Result<Device, ServeError> {
        let mut memory = Memory::new();
        model.upload(weights, backend.as_mut(), &mut memory, options.dtype)?;
        if let Some(adapters) = adapters {
            adapters.upload(backend.as_mut(), &mut memory, options.dtype)?;
        }
        let context = options.context;
        let sequence_blocks = context.div_ceil(BLOCK);
        let loader = Loader { model, options, sequence_blocks };
        let full_rows = sizes(&PREFILL_ROWS, context);
        let logit_rows = sizes(&LOGIT_ROWS, context);
        let draw_rows = draw_sizes(options.draw_rows());
        let vocabulary = options.vocabulary;
        let serve = |reads| PagedHead::Serve { vocabulary, reads };
        let cache_only = loader.pieces(&full_rows, PagedHead::CacheOnly)?;
        let score = loader.pieces(&full_rows, PagedHead::Score)?;
        let with_logits = loader.pieces(&logit_rows, PagedHead::ScoreWithLogits)?;
        let hidden = loader.pieces(&full_rows, PagedHead::Hidden)?;
        let plain = loader.draws(&draw_rows, serve(DrawReads::Plain))?;
        let full = loader.draws(&draw_rows, serve(DrawReads::Full))?;
        let guess = match model.extra_layer {
            ExtraLayer::Absent => Vec::new(),
            ExtraLayer::Present => loader.guesses(&draw_rows)?,
        };
        let all = [&cache_only, &score, &with_logits, &hidden, &plain, &full, &guess];
        let bytes = all.into_iter().flatten().map(|(_, one)| Plan::new(one).arena_bytes).max();
        let arena = backend.alloc(bytes.unwrap_or(0).max(1))?;
        let mut load = |programs: Vec<(usize, Program)>| {
            let one = |(rows, program): (usize, Program)| {
                let backend = backend.as_mut();
                let loaded = Executor::load_with(backend, &mut memory, &program, &[], Some(arena))?;
                Ok((rows, loaded))
            };
            programs.into_iter().map(one).collect::<Result<Vec<_>, ProgramError>>()
        };
        let (cache_only, score, hidden) = (load(cache_only)?, load(score)?, load(hidden)?);
        let (score_with_logits, plain, full) = (load(with_logits)?, load(plain)?, load(full)?);
        let guess = load(guess)?;
        model.upload_constants(backend.as_mut(), &mut memory, context, context)?;
        for (_, program) in [&plain, &score, &guess].into_iter().flatten() {
            program.prepack(backend.as_mut())?;
        }
        let (padded_vocabulary, width) = (model.config.vocab_size, model.config.width);
        Ok(Device {
            backend,
            options,
            sequence_blocks,
            padded_vocabulary,
            width,
            adapters: model.adapters.as_ref().map_or(0, |shapes| shapes.count),
            cache_only,
            score,
            score_with_logits,
            hidden,
            plain,
            full,
            guess,
        })
    }

    /// The device's own description.
    pub fn info(&self) -> &pontoon_ops::DeviceInfo {
        self.backend.info()
    }

    /// What it was loaded for.
    pub fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// Rows that one prefill takes at most, and pieces they may belong to.
    pub fn prefill_limits(&self, head: PrefillHead) -> (usize, usize) {
        let (rows, _) = self.programs(head).last().expect("there is at least one size");
        (*rows, PIECES_MAX)
    }

    /// Puts pieces of sequences into the cache.
    pub fn prefill(
        &mut self,
        pieces: &[Piece<'_>],
        head: PrefillHead,
    ) -> Result<PrefillResult, ServeError> {
        let taken: usize = pieces.iter().map(|piece| piece.end - piece.start).sum();
        let programs = match head {
            PrefillHead::CacheOnly => &self.cache_only,
            PrefillHead::Score => &self.score,
            PrefillHead::ScoreWithTop(_) => &self.score_with_logits,
            PrefillHead::Hidden => &self.hidden,
        };
        let (rows, program) = smallest(programs, taken);
        let backend = self.backend.as_mut();
        let host = PieceHost::new(pieces, rows, PIECES_MAX, self.sequence_blocks);
        host.write(program, backend)?;
        if self.adapters > 0 {
            let rows = pieces.iter().map(|piece| (piece.adapter, piece.end - piece.start));
            let offsets = adapter_offsets(self.adapters, rows);
            program.write(backend, "adapters", bytemuck::cast_slice(&offsets))?;
        }
        if head == PrefillHead::CacheOnly && !self.guess.is_empty() {
            let next_ids = PieceHost::targets(pieces, rows).into_iter().map(|id| id.max(0));
            let next_ids: Vec<i32> = next_ids.collect();
            program.write(backend, "next_ids", bytemuck::cast_slice(&next_ids))?;
        }
        if matches!(head, PrefillHead::Score | PrefillHead::ScoreWithTop(_)) {
            let targets = PieceHost::targets(pieces, rows);
            program.write(backend, "targets", bytemuck::cast_slice(&targets))?;
        }
        program.run_and_wait(backend, self.options.step_deadline)?;
        match head {
            PrefillHead::CacheOnly => Ok(PrefillResult::Nothing),
            PrefillHead::Hidden => {
                let dtype = self.options.dtype;
                let mut bytes = vec![0_u8; dtype.bytes(rows * self.width)];
                program.read(backend, "hidden", &mut bytes)?;
                let mut values = floats(&bytes, dtype);
                values.truncate(taken * self.width);
                Ok(PrefillResult::Hidden(values))
            }
            PrefillHead::Score | PrefillHead::ScoreWithTop(_) => {
                let mut logprobs = vec![0.0_f32; rows];
                program.read(backend, "logprob", bytemuck::cast_slice_mut(&mut logprobs))?;
                let mut logits = Vec::new();
                let top = if let PrefillHead::ScoreWithTop(top) = head { top } else { 0 };
                if top > 0 {
                    logits.resize(rows * self.padded_vocabulary, 0.0_f32);
                    program.read(backend, "logits", bytemuck::cast_slice_mut(&mut logits))?;
                }
                let logits = Logits { all: &logits, padded: self.padded_vocabulary };
                let targets = PieceHost::targets(pieces, rows);
                let vocabulary = self.options.vocabulary;
                let score = |row: usize| {
                    let token = targets[row].max(0) as u32;
                    logits.scored(row, Asked { token, logprob: logprobs[row], top, vocabulary })
                };
                Ok(PrefillResult::Scores((0..taken).map(score).collect()))
            }
        }
    }

    /// Draws the next token of each row, putting the row's last token into the cache.
    pub fn draw(&mut self, rows: &[DrawRow<'_>]) -> Result<Vec<Drawn>, ServeError> {
        let full = rows.iter().any(DrawRow::needs_full);
        let programs = if full { &self.full } else { &self.plain };
        let (count, program) = smallest(programs, rows.len());
        let backend = self.backend.as_mut();
        let host = DrawHost::new(rows, count, self.sequence_blocks);
        host.write(program, backend)?;
        if self.adapters > 0 {
            let offsets = adapter_offsets(self.adapters, rows.iter().map(|row| (row.adapter, 1)));
            program.write(backend, "adapters", bytemuck::cast_slice(&offsets))?;
        }
        if full {
            let history = DrawHost::history(rows, count, self.options.context);
            program.write(backend, "history", bytemuck::cast_slice(&history))?;
            let bias = DrawHost::bias(rows, count, self.padded_vocabulary);
            program.write(backend, "bias", bytemuck::cast_slice(&bias))?;
        }
        program.run_and_wait(backend, self.options.step_deadline)?;
        let (mut tokens, mut logprobs) = (vec![0_i32; count], vec![0.0_f32; count]);
        program.read(backend, "token", bytemuck::cast_slice_mut(&mut tokens))?;
        program.read(backend, "logprob", bytemuck::cast_slice_mut(&mut logprobs))?;
        let mut logits = Vec::new();
        if rows.iter().any(|row| row.top_logprobs > 0) {
            logits.resize(count * self.padded_vocabulary, 0.0_f32);
            program.read(backend, "logits", bytemuck::cast_slice_mut(&mut logits))?;
        }
        let logits = Logits { all: &logits, padded: self.padded_vocabulary };
        let vocabulary = self.options.vocabulary;
        let drawn = |(index, row): (usize, &DrawRow<'_>)| {
            let token = u32::try_from(tokens[index]).ok()?;
            let top = row.top_logprobs;
            Some(logits.scored(index, Asked { token, logprob: logprobs[index], top, vocabulary }))
        };
        Ok(rows.iter().enumerate().map(drawn).collect())
    }

    /// Bytes of one row's hidden state.
    pub fn hidden_bytes(&self) -> usize {
        self.options.dtype.bytes(self.width)
    }

    /// The hidden states of the last draw's rows, row after row; empty without the extra layer.
    pub fn drawn_hidden(&mut self, rows: &[DrawRow<'_>]) -> Result<Vec<u8>, ServeError> {
        if self.guess.is_empty() {
            return Ok(Vec::new());
        }
        let full = rows.iter().any(DrawRow::needs_full);
        let programs = if full { &self.full } else { &self.plain };
        let (count, program) = smallest(programs, rows.len());
        let mut hidden = vec![0_u8; count * self.options.dtype.bytes(self.width)];
        program.read(self.backend.as_mut(), "hidden", &mut hidden)?;
        Ok(hidden)
    }

    /// Runs the layer for multi-token prediction on rows.
    pub fn guess(&mut self, rows: &[GuessRow<'_>]) -> Result<Guessed, ServeError> {
        let (count, program) = smallest(&self.guess, rows.len());
        let backend = self.backend.as_mut();
        let host = DrawHost::of_guesses(rows, count, self.sequence_blocks);
        host.write(program, backend)?;
        let width = self.options.dtype.bytes(self.width);
        let mut given: Vec<u8> = rows.iter().flat_map(|row| row.hidden).copied().collect();
        given.resize(count * width, 0);
        program.write(backend, "given", &given)?;
        program.run_and_wait(backend, self.options.step_deadline)?;
        let (mut tokens, mut hidden) = (vec![0_i32; count], vec![0_u8; count * width]);
        program.read(backend, "token", bytemuck::cast_slice_mut(&mut tokens))?;
        program.read(backend, "hidden", &mut hidden)?;
        Ok(Guessed { tokens, hidden })
    }

    fn programs(&self, head: PrefillHead) -> &[(usize, Executor)] {
        match head {
            PrefillHead::CacheOnly => &self.cache_only,
            PrefillHead::Score => &self.score,
            PrefillHead::ScoreWithTop(_) => &self.score_with_logits,
            PrefillHead::Hidden => &self.hidden,
        }
    }
}

/// Builds the programs of all sizes.
struct Loader<'a> {
    model: &'a Model,
    options: DeviceOptions,
    sequence_blocks: usize,
}

impl Loader<'_> {
    fn pieces(
        &self,
        sizes: &[usize],
        head: PagedHead,
    ) -> Result<Vec<(usize, Program)>, ServeError> {
        sizes.iter().map(|&rows| Ok((rows, self.program(rows, PIECES_MAX, head)?))).collect()
    }

    fn draws(&self, sizes: &[usize], head: PagedHead) -> Result<Vec<(usize, Program)>, ServeError> {
        sizes.iter().map(|&rows| Ok((rows, self.program(rows, rows, head)?))).collect()
    }

    fn guesses(&self, sizes: &[usize]) -> Result<Vec<(usize, Program)>, ServeError> {
        let DeviceOptions { dtype, vocabulary, .. } = self.options;
        let program = |&rows: &usize| {
            let shape = self.shape(rows, rows);
            Ok((rows, self.model.guess_program(shape, dtype, vocabulary)?))
        };
        sizes.iter().map(program).collect()
    }

    fn program(
        &self,
        rows: usize,
        sequences: usize,
        head: PagedHead,
    ) -> Result<Program, ServeError> {
        let shape = self.shape(rows, sequences);
        Ok(self.model.paged_program(shape, self.options.dtype, head)?)
    }

    fn shape(&self, rows: usize, sequences: usize) -> PagedShape {
        PagedShape {
            rows,
            sequences,
            block: BLOCK,
            blocks: self.options.blocks,
            sequence_blocks: self.sequence_blocks,
            positions_max: self.options.context,
        }
    }
}

/// The logits of a step, row after row; empty where nobody asked.
struct Logits<'a> {
    all: &'a [f32],
    padded: usize,
}

/// A token, and what is to be told of its row.
struct Asked {
    token: u32,
    logprob: f32,
    top: usize,
    vocabulary: usize,
}

impl Logits<'_> {
    fn scored(&self, row: usize, asked: Asked) -> Scored {
        let Asked { token, logprob, top, vocabulary } = asked;
        if top == 0 {
            return Scored { token, logprob, rank: None, top: Vec::new() };
        }
        let logits = &self.all[row * self.padded..][..vocabulary];
        // The drawn token's log-probability tells what all logits are to be lowered by.
        let total = logits[token as usize] - logprob;
        let likeliest = likeliest(logits, top);
        let told = |id: u32| {
            let exact = if id == token { logprob } else { logits[id as usize] - total };
            (id, exact)
        };
        let own = logits[token as usize];
        let before = |(id, logit): (usize, &f32)| {
            let order = logit.total_cmp(&own);
            order.is_gt() || (order.is_eq() && id < token as usize)
        };
        let rank = Some(1 + logits.iter().enumerate().filter(|&one| before(one)).count());
        Scored { token, logprob, rank, top: likeliest.into_iter().map(told).collect() }
    }
}

/// The ids of the largest logits, largest first, equal ones by id.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(ids.len());
    if count < ids.len() {
        ids.select_nth_unstable_by(count, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

fn smallest(programs: &[(usize, Executor)], rows: usize) -> (usize, &Executor) {
    let fits = programs.iter().find(|(size, _)| *size >= rows);
    let (size, program) = fits.expect("a step holds no more rows than the largest program");
    (*size, program)
}

/// The sizes up to the first that takes the longest sequence at once.
fn sizes(all: &[usize], context: usize) -> Vec<usize> {
    let needed = all.iter().position(|&rows| rows >= context);
    all[..needed.map_or(all.len(), |index| index + 1)].to_vec()
}

/// Powers of two up to the number of sequences, and that number.
fn draw_sizes(sequences: usize) -> Vec<usize> {
    let powers = (0..).map(|power| 1_usize << power).take_while(|&rows| rows < sequences);
    powers.chain([sequences]).collect()
}

fn floats(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Bf16 => pairs(bytes).map(|two| half::bf16::from_le_bytes(two).to_f32()).collect(),
        DType::F16 => pairs(bytes).map(|two| half::f16::from_le_bytes(two).to_f32()).collect(),
        _ => {
            let (fours, _) = bytes.as_chunks::<4>();
            fours.iter().map(|four| f32::from_le_bytes(*four)).collect()
        }
    }
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = [u8; 2]> + '_ {
    bytes.as_chunks::<2>().0.iter().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_come_first_and_equals_by_id() {
        assert_eq!(likeliest(&[1.0, 3.0, 2.0, 3.0], 3), [1, 3, 2]);
        assert_eq!(likeliest(&[1.0, 3.0], 9), [1, 0]);
    }

    #[test]
    fn sizes_end_with_what_is_needed() {
        assert_eq!(draw_sizes(1), [1]);
        assert_eq!(draw_sizes(6), [1, 2, 4, 6]);
        assert_eq!(sizes(&PREFILL_ROWS, 100), [16, 128]);
    }
}
