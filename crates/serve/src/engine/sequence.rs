//! One sequence on a device: its tokens, its part of the cache, and what it still needs.
//!
//! Made from a ticket alone, so a sequence that was preempted or whose device died begins again
//! from its tokens so far. Read next: `batch.rs`.

use std::sync::Arc;

use super::blocks::{BLOCK, BlockPool, Prefix, root};
use super::device::PrefillHead;
use super::draft::Reach;
use super::request::{Constraint, Epoch, Generate, Scored, Task, Ticket};
use super::rows::DrawRow;

/// A sequence on its way.
pub(super) struct Sequence {
    pub ticket: Arc<Ticket>,
    pub epoch: Epoch,
    /// Prompt and drawn tokens.
    pub tokens: Vec<u32>,
    /// Positions whose keys and values are in the cache.
    pub cached: usize,
    pub blocks: Vec<u32>,
    /// Its turn among all that came; a later one gives way first.
    pub arrival: u64,
    /// Scores of the prompt so far.
    pub scores: Vec<Scored>,
    /// Sums of hidden states so far.
    pub hidden: Vec<f64>,
    /// How far its next tokens are guessed.
    pub reach: Reach,
    /// What was guessed of them already.
    pub guesses: Vec<u32>,
    published: usize,
    prefix: Prefix,
    constraint: Option<Box<dyn Constraint>>,
}

/// What a sequence puts into a step that draws: guesses, and the biases of its rows, of which there
/// is one more than guesses.
pub(super) struct Stake {
    /// Its tokens so far with the guessed ones.
    pub tokens: Vec<u32>,
    /// How many are guessed.
    pub guessed: usize,
    /// What is added to each row's logits; empty for nothing.
    pub biases: Vec<Vec<f32>>,
}

impl Sequence {
    /// Takes a ticket up where it stands.
    pub fn new(
        ticket: Arc<Ticket>,
        epoch: Epoch,
        arrival: u64,
        draft_tokens: usize,
    ) -> Result<Sequence, String> {
        let drawn = ticket.drawn();
        let mut constraint = None;
        if let Task::Generate(Generate { constraint: Some(source), .. }) = &ticket.request.task {
            let mut made = source()?;
            drawn.iter().try_for_each(|&token| made.accept(token))?;
            constraint = Some(made);
        }
        let tokens = [&ticket.request.prompt[..], &drawn].concat();
        let prefix = root(ticket.request.adapter);
        Ok(Sequence {
            ticket,
            epoch,
            tokens,
            cached: 0,
            blocks: Vec::new(),
            arrival,
            scores: Vec::new(),
            hidden: Vec::new(),
            reach: Reach::new(draft_tokens),
            guesses: Vec::new(),
            published: 0,
            prefix,
            constraint,
        })
    }

    pub fn prompt_tokens(&self) -> usize {
        self.ticket.request.prompt.len()
    }

    pub fn adapter(&self) -> Option<usize> {
        self.ticket.request.adapter
    }

    pub fn generate(&self) -> Option<&Generate> {
        match &self.ticket.request.task {
            Task::Generate(generate) => Some(generate),
            Task::Embed => None,
        }
    }

    /// What its prefill computes.
    pub fn head(&self) -> PrefillHead {
        match self.generate() {
            None => PrefillHead::Hidden,
            Some(_) if self.ticket.prompt_told() => PrefillHead::CacheOnly,
            Some(generate) => match generate.prompt_logprobs {
                None => PrefillHead::CacheOnly,
                Some(0) => PrefillHead::Score,
                Some(top) => PrefillHead::ScoreWithTop(top),
            },
        }
    }

    /// Positions that a prefill must cover: the last token is taken by the first draw.
    pub fn prefill_end(&self) -> usize {
        match self.generate() {
            Some(_) => self.tokens.len() - 1,
            None => self.tokens.len(),
        }
    }

    /// Takes blocks for all its tokens, sharing what the cache has; `None` if there are too few.
    pub fn take_blocks(&mut self, pool: &mut BlockPool) -> Option<()> {
        let reusable = match self.head() {
            // Scores and hidden states are wanted of every position.
            PrefillHead::CacheOnly => self.prefill_end(),
            _ => 0,
        };
        let (blocks, prefix) = pool.reuse(root(self.adapter()), &self.tokens[..reusable]);
        let wanted = self.tokens.len().div_ceil(BLOCK) - blocks.len();
        if pool.available() < wanted {
            blocks.into_iter().for_each(|block| pool.release(block));
            return None;
        }
        self.cached = blocks.len() * BLOCK;
        self.published = blocks.len();
        self.prefix = prefix;
        self.blocks = blocks;
        let more = (0..wanted).map(|_| pool.take().expect("as many are available"));
        self.blocks.extend(more);
        Some(())
    }

    /// Takes another block if its tokens need one; `None` if there is none.
    pub fn grow(&mut self, pool: &mut BlockPool) -> Option<()> {
        if self.blocks.len() * BLOCK < self.tokens.len() {
            self.blocks.push(pool.take()?);
        }
        Some(())
    }

    /// Gives its blocks back.
    pub fn release(&mut self, pool: &mut BlockPool) {
        self.blocks.drain(..).for_each(|block| pool.release(block));
        self.cached = 0;
    }

    /// Makes blocks that are full by now findable for others.
    pub fn publish(&mut self, pool: &mut BlockPool) {
        while (self.published + 1) * BLOCK <= self.cached {
            let tokens = &self.tokens[self.published * BLOCK..][..BLOCK];
            self.prefix = pool.publish(self.prefix, tokens, self.blocks[self.published]);
            self.published += 1;
        }
    }

    /// Whether it may not grow any more.
    pub fn at_length(&self, context: usize) -> bool {
        let asked = self.prompt_tokens().saturating_add(self.ticket.request.tokens_max());
        self.tokens.len() >= asked.min(context)
    }

    /// Tokens that may still be guessed: one place is the draw's own.
    pub fn room(&self, context: usize) -> usize {
        let asked = self.prompt_tokens().saturating_add(self.ticket.request.tokens_max());
        asked.min(context).saturating_sub(self.tokens.len() + 1)
    }

    /// Takes blocks for guessed tokens as long as there are unused ones; gives how many fit.
    pub fn grow_for(&mut self, guesses: usize, pool: &mut BlockPool) -> usize {
        let wanted = (self.tokens.len() + guesses).div_ceil(BLOCK);
        while self.blocks.len() < wanted {
            match pool.take() {
                Some(block) => self.blocks.push(block),
                None => break,
            }
        }
        guesses.min(self.blocks.len() * BLOCK - self.tokens.len())
    }

    /// Its part of a step, with as many of the guesses as a grammar allows.
    pub fn stake(&mut self, vocabulary: usize, guesses: &[u32]) -> Result<Stake, String> {
        let mut tokens = self.tokens.clone();
        let Task::Generate(generate) = &self.ticket.request.task else {
            return Ok(Stake { tokens, guessed: 0, biases: vec![Vec::new()] });
        };
        let drawn = self.tokens.len() - self.ticket.request.prompt.len();
        let mut biases = vec![bias(generate, self.constraint.as_deref_mut(), drawn, vocabulary)?];
        let mut trial = match (&self.constraint, guesses) {
            (Some(constraint), [_, ..]) => Some(constraint.fork()),
            _ => None,
        };
        for (index, &guess) in guesses.iter().enumerate() {
            let forbidden = biases[index].get(guess as usize).is_some_and(|b| b.is_infinite());
            if forbidden || generate.end_tokens.contains(&guess) || guess as usize >= vocabulary {
                break;
            }
            if let Some(trial) = &mut trial
                && trial.accept(guess).is_err()
            {
                break;
            }
            match bias(generate, trial.as_deref_mut(), drawn + index + 1, vocabulary) {
                Ok(bias) => biases.push(bias),
                // What a guess runs into is no failure of the request.
                Err(_) => break,
            }
            tokens.push(guess);
        }
        let guessed = tokens.len() - self.tokens.len();
        Ok(Stake { tokens, guessed, biases })
    }

    /// Its rows of a step that draws.
    pub fn rows<'a>(&'a self, sequence: usize, stake: &'a Stake) -> Option<Vec<DrawRow<'a>>> {
        let generate = self.generate()?;
        let row = |(index, bias): (usize, &'a Vec<f32>)| DrawRow {
            sequence,
            adapter: self.adapter(),
            tokens: &stake.tokens[..self.tokens.len() + index],
            prompt_tokens: self.prompt_tokens(),
            blocks: &self.blocks,
            sampling: &generate.sampling,
            choice: generate.choice,
            bias,
            top_logprobs: generate.top_logprobs,
        };
        Some(stake.biases.iter().enumerate().map(row).collect())
    }

    /// Goes on by a drawn token; true if it ends the completion.
    pub fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.tokens.push(token);
        self.cached += 1;
        let ends = self.generate().is_some_and(|generate| generate.end_tokens.contains(&token));
        if let Some(constraint) = &mut self.constraint
            && !ends
        {
            constraint.accept(token)?;
        }
        Ok(ends)
    }
}

/// What is added to the logits of the draw after so many; empty for nothing.
fn bias(
    generate: &Generate,
    constraint: Option<&mut (dyn Constraint + 'static)>,
    drawn: usize,
    vocabulary: usize,
) -> Result<Vec<f32>, String> {
    let early = drawn < generate.tokens_min;
    if generate.logit_bias.is_empty() && !early && constraint.is_none() {
        return Ok(Vec::new());
    }
    let mut bias = vec![0.0; vocabulary];
    for &(token, value) in &generate.logit_bias {
        bias[token as usize] += value;
    }
    if let Some(constraint) = constraint {
        constraint.forbid(&mut bias)?;
    }
    if early {
        generate.end_tokens.iter().for_each(|&token| bias[token as usize] = f32::NEG_INFINITY);
    }
    Ok(bias)
}
