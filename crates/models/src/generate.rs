//! Generation: prompts in, drawn tokens and their log-probabilities out, on a paged cache.
//!
//! A prompt's tokens but the last go through a prefill program in a few fixed sizes; then every
//! step of the decode program extends all running sequences by one token. A sequence that ends
//! makes room for the next prompt. Bits do not depend on which sequences run together: that is
//! the waist's batch invariance. Streaming to clients and sharing prefixes are the server's work.
//! Read next: `generate/step.rs`.

mod step;

use std::collections::HashMap;

use pontoon_ops::{Backend, DType};
use pontoon_program::Memory;

use crate::error::ModelError;
use crate::model::Model;
use step::{Chunk, History, Loaded, Row};

/// The sizes a generator is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratorOptions {
    /// What activations and the cache are stored in; the weights in memory have it too.
    pub dtype: DType,
    /// The longest sequence, prompt included.
    pub tokens_max: usize,
    /// Sequences that run together.
    pub sequences: usize,
    /// Tokens that exist: a head may be padded beyond the tokenizer's ids. `None` for all rows.
    pub vocabulary: Option<usize>,
}

impl GeneratorOptions {
    /// Options with every row of the head a token.
    pub fn new(dtype: DType, tokens_max: usize, sequences: usize) -> GeneratorOptions {
        GeneratorOptions { dtype, tokens_max, sequences, vocabulary: None }
    }
}

/// How tokens are drawn; see the waist's `Sample` for the order in which the rules apply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingSettings {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Tokens kept by rank; 0 for all.
    pub top_k: usize,
    /// Smallest set whose probability reaches this is kept; 1 for all.
    pub top_p: f32,
    /// Tokens at least this share of the best one's probability are kept; 0 for all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen; 1 for none.
    pub repetition_penalty: f32,
    /// Taken from logits of tokens generated before; 0 for none.
    pub presence_penalty: f32,
    /// Taken once per earlier generation of the token; 0 for none.
    pub frequency_penalty: f32,
    /// Decides every draw, with a token's place in its completion and, where a prompt stands in the
    /// list several times, with how often it stood there before. Other prompts have no part in it.
    pub seed: u64,
    /// Tokens generated per prompt at most.
    pub tokens_max: usize,
    /// Whether the prompt's own log-probabilities are wanted.
    pub prompt_logprobs: PromptLogprobs,
}

/// Whether a prompt is scored on its way into the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptLogprobs {
    /// It is not.
    Skip,
    /// It is, which costs the output head on every one of its rows.
    Include,
}

impl Default for SamplingSettings {
    /// Plain sampling from the model's own distribution.
    fn default() -> Self {
        SamplingSettings {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            tokens_max: 256,
            prompt_logprobs: PromptLogprobs::Skip,
        }
    }
}

impl SamplingSettings {
    /// Always the most likely token.
    pub fn greedy(tokens_max: usize) -> SamplingSettings {
        SamplingSettings { temperature: 0.0, tokens_max, ..SamplingSettings::default() }
    }

    fn history(&self) -> History {
        let penalties = [self.presence_penalty, self.frequency_penalty];
        let used = self.repetition_penalty != 1.0 || penalties.iter().any(|&p| p != 0.0);
        if used { History::Used } else { History::Unused }
    }

    fn check(&self) -> Result<(), ModelError> {
        let rules = [
            (self.temperature >= 0.0, "temperature should be 0 or more", self.temperature),
            (self.top_p > 0.0 && self.top_p <= 1.0, "top_p should be in (0, 1]", self.top_p),
            ((0.0..=1.0).contains(&self.min_p), "min_p should be in [0, 1]", self.min_p),
            (
                self.repetition_penalty > 0.0,
                "repetition_penalty should be positive",
                self.repetition_penalty,
            ),
        ];
        match rules.iter().find(|(holds, ..)| !holds) {
            Some((_, rule, got)) => {
                Err(ModelError::Request { what: format!("{rule} but is {got}") })
            }
            None => Ok(()),
        }
    }
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model drew an end token, which is the completion's last.
    EndToken,
    /// The number of tokens asked for, or the generator's room, was reached.
    Length,
}

/// What was generated for one prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The drawn tokens, an end token included.
    pub tokens: Vec<u32>,
    /// Each one's log-probability before any penalty or temperature.
    pub logprobs: Vec<f32>,
    /// Log-probabilities of the prompt's tokens from the second on, where asked for.
    pub prompt_logprobs: Option<Vec<f32>>,
    /// Why it ended.
    pub finish: Finish,
}

/// One drawn token, as it is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The prompt's place in the list.
    pub prompt: usize,
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// The programs and cache that generate for one model on one device.
#[derive(Debug)]
pub struct Generator {
    loaded: Loaded,
    tokens_max: usize,
    sequences: usize,
    vocabulary: usize,
}

/// One sequence on its way.
#[derive(Debug)]
struct Running {
    prompt: usize,
    /// Which draw of this prompt it is.
    draw: u32,
    prompt_tokens: usize,
    /// Its part of the cache.
    place: usize,
    /// Prompt and drawn tokens.
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    prompt_logprobs: Option<Vec<f32>>,
    /// Prompt and drawn tokens at most.
    tokens_max: usize,
}

impl Generator {
    /// Loads the programs. The weights lie in `memory` already, in the options' dtype.
    pub fn new(
        backend: &mut dyn Backend,
        memory: &mut Memory,
        model: &Model,
        options: GeneratorOptions,
    ) -> Result<Generator, ModelError> {
        let GeneratorOptions { tokens_max, sequences, .. } = options;
        let wrong = |what: String| Err(ModelError::Request { what });
        let most = model.config.max_positions;
        if tokens_max < 2 || tokens_max > most {
            return wrong(format!(
                "tokens_max should be 2 to {most} (the model's max_position_embeddings) but is \
                 {tokens_max}"
            ));
        }
        if sequences == 0 {
            return wrong("sequences should be at least 1".to_owned());
        }
        let padded = model.config.vocab_size;
        let vocabulary = options.vocabulary.unwrap_or(padded);
        if vocabulary == 0 || vocabulary > padded {
            return wrong(format!("vocabulary should be 1 to {padded} but is {vocabulary}"));
        }
        let loaded = Loaded::new(backend, memory, model, options)?;
        Ok(Generator { loaded, tokens_max, sequences, vocabulary })
    }

    /// Lets the device keep the weights in the order it likes best, for weights that stay as they
    /// are. Results are the same; those who change weights may, at the cost of the old order.
    pub fn prepack(&self, backend: &mut dyn Backend) -> Result<(), ModelError> {
        Ok(self.loaded.prepack(backend)?)
    }

    /// Completes every prompt, as many together as there is room for.
    ///
    /// `end_tokens` end a completion; `on_token` sees each token as it is drawn. Completions come
    /// in the prompts' order.
    pub fn generate(
        &mut self,
        backend: &mut dyn Backend,
        prompts: &[Vec<u32>],
        settings: &SamplingSettings,
        end_tokens: &[u32],
        on_token: &mut dyn FnMut(Drawn),
    ) -> Result<Vec<Completion>, ModelError> {
        settings.check()?;
        for (index, prompt) in prompts.iter().enumerate() {
            self.check_prompt(index, prompt)?;
        }
        let draws = draws(prompts);
        let mut done: Vec<Option<Completion>> = vec![None; prompts.len()];
        let mut running: Vec<Running> = Vec::new();
        let mut places: Vec<usize> = (0..self.sequences).rev().collect();
        let mut waiting = prompts.iter().enumerate();
        loop {
            while let Some(&place) = places.last() {
                let Some((prompt, tokens)) = waiting.next() else { break };
                let asked = (prompt, draws[prompt]);
                let started = self.start(backend, asked, Chunk { tokens, place }, settings)?;
                if started.tokens.len() >= started.tokens_max {
                    done[prompt] = Some(started.finished(Finish::Length));
                    continue;
                }
                places.pop();
                running.push(started);
            }
            if running.is_empty() {
                break;
            }
            self.step(backend, &mut running, settings, on_token)?;
            let mut index = 0;
            while index < running.len() {
                match running[index].finish(end_tokens) {
                    None => index += 1,
                    Some(finish) => {
                        let ended = running.remove(index);
                        places.push(ended.place);
                        let prompt = ended.prompt;
                        done[prompt] = Some(ended.finished(finish));
                    }
                }
            }
        }
        Ok(done.into_iter().map(|one| one.expect("every prompt was started and ended")).collect())
    }

    /// Log-probabilities of a text's tokens from the second on.
    pub fn score(
        &mut self,
        backend: &mut dyn Backend,
        tokens: &[u32],
    ) -> Result<Vec<f32>, ModelError> {
        self.check_ids(0, tokens)?;
        if tokens.len() > self.tokens_max {
            let (got, most) = (tokens.len(), self.tokens_max);
            return Err(ModelError::PromptTooLong { prompt: 0, got, most });
        }
        let mut logprobs = Vec::with_capacity(tokens.len());
        self.loaded.prefill(backend, Chunk { tokens, place: 0 }, Some(&mut logprobs))?;
        Ok(logprobs)
    }

    fn check_prompt(&self, prompt: usize, tokens: &[u32]) -> Result<(), ModelError> {
        self.check_ids(prompt, tokens)?;
        if tokens.len() >= self.tokens_max {
            let (got, most) = (tokens.len(), self.tokens_max - 1);
            return Err(ModelError::PromptTooLong { prompt, got, most });
        }
        Ok(())
    }

    fn check_ids(&self, prompt: usize, tokens: &[u32]) -> Result<(), ModelError> {
        let wrong = |what: String| Err(ModelError::Request { what });
        if tokens.is_empty() {
            return wrong(format!("prompt {prompt} is empty; give at least one token"));
        }
        match tokens.iter().find(|&&id| id as usize >= self.vocabulary) {
            Some(id) => wrong(format!(
                "prompt {prompt} has token {id}, but there are {} tokens",
                self.vocabulary
            )),
            None => Ok(()),
        }
    }

    /// Fills the cache with a prompt but for its last token, which the first step takes.
    fn start(
        &mut self,
        backend: &mut dyn Backend,
        (prompt, draw): (usize, u32),
        chunk: Chunk<'_>,
        settings: &SamplingSettings,
    ) -> Result<Running, ModelError> {
        let Chunk { tokens, place } = chunk;
        let tokens_max = self.tokens_max.min(tokens.len().saturating_add(settings.tokens_max));
        let mut logprobs = match settings.prompt_logprobs {
            PromptLogprobs::Skip => None,
            PromptLogprobs::Include => Some(Vec::with_capacity(tokens.len())),
        };
        self.loaded.prefill(backend, chunk, logprobs.as_mut())?;
        let mut all = Vec::with_capacity(tokens_max);
        all.extend_from_slice(tokens);
        Ok(Running {
            prompt,
            draw,
            prompt_tokens: tokens.len(),
            place,
            tokens: all,
            logprobs: Vec::with_capacity(tokens_max - tokens.len()),
            prompt_logprobs: logprobs,
            tokens_max,
        })
    }

    /// Extends every running sequence by one token.
    fn step(
        &mut self,
        backend: &mut dyn Backend,
        running: &mut [Running],
        settings: &SamplingSettings,
        on_token: &mut dyn FnMut(Drawn),
    ) -> Result<(), ModelError> {
        self.loaded.begin_step();
        for (row, sequence) in running.iter().enumerate() {
            let row = Row {
                row,
                place: sequence.place,
                draw: sequence.draw,
                prompt_tokens: sequence.prompt_tokens,
                tokens: &sequence.tokens,
            };
            self.loaded.set_row(row, settings);
        }
        self.loaded.run_step(backend, running.len(), settings.history())?;
        for (row, sequence) in running.iter_mut().enumerate() {
            let (token, logprob) = self.loaded.drawn(row);
            let Ok(token) = u32::try_from(token) else {
                let what = format!(
                    "prompt {} has no finite logit after {} tokens; the weights hold NaN or \
                     infinity",
                    sequence.prompt,
                    sequence.tokens.len()
                );
                return Err(ModelError::Request { what });
            };
            sequence.tokens.push(token);
            sequence.logprobs.push(logprob);
            on_token(Drawn { prompt: sequence.prompt, token, logprob });
        }
        Ok(())
    }
}

/// For each prompt, how many equal ones stand before it: the same prompt asked for several times is
/// to be answered in several ways, but as it would be in any other company.
fn draws(prompts: &[Vec<u32>]) -> Vec<u32> {
    let mut seen: HashMap<&[u32], u32> = HashMap::new();
    let mut draws = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let count = seen.entry(prompt).or_default();
        draws.push(*count);
        *count += 1;
    }
    draws
}

impl Running {
    fn finish(&self, end_tokens: &[u32]) -> Option<Finish> {
        let last = self.tokens.last().expect("a step has added a token");
        if end_tokens.contains(last) {
            return Some(Finish::EndToken);
        }
        (self.tokens.len() >= self.tokens_max).then_some(Finish::Length)
    }

    fn finished(mut self, finish: Finish) -> Completion {
        Completion {
            tokens: self.tokens.split_off(self.prompt_tokens),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            finish,
        }
    }
}
