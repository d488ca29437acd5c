//! What runs together on a device: who is let in, whose prompt is taken in pieces, who draws, and
//! who gives way when blocks run out.
//!
//! Every step takes one bite of prompts, so that long ones do not hold up those that draw, and
//! then one token of every sequence that is ready. A sequence's tokens do not depend on any of
//! this: bits are the same in every batch and after every restart from its tokens. Read next:
//! `sequence.rs`, `device.rs`.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::blocks::BlockPool;
use super::device::{Device, DeviceOptions, Drawn, Piece, PrefillHead, PrefillResult};
use super::draft::{Speculation, look_up};
use super::mtp::{self, Passed};
use super::request::{Epoch, Event, Finish, Ticket, Wanted};
use super::rows::DrawRow;
use super::sequence::{Sequence, Stake};
use super::worker::Stats;
use crate::error::ServeError;

/// Prompt rows of one step while others draw: about what delays their next token unnoticeably.
const PREFILL_ROWS_BESIDE_DRAWS: usize = 128;

/// The sequences of one device.
pub struct Batch {
    device: Device,
    blocks: Arc<Mutex<BlockPool>>,
    stats: Arc<Stats>,
    device_name: Arc<str>,
    numeric_class: Arc<str>,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    arrivals: u64,
}

/// What becomes of a running sequence after its draw.
enum After {
    Stays,
    Leaves,
}

/// Something of a running sequence, and the sequence's place among those that run.
type Placed<T> = (usize, T);

impl Batch {
    /// An empty batch on a device and the name by which clients are told of it.
    pub fn new(
        (device, name): (Device, &str),
        blocks: Arc<Mutex<BlockPool>>,
        stats: Arc<Stats>,
    ) -> Batch {
        let device_name = Arc::from(name);
        let numeric_class = Arc::from(device.info().numeric_class.as_str());
        Batch {
            device,
            blocks,
            stats,
            device_name,
            numeric_class,
            waiting: VecDeque::new(),
            running: Vec::new(),
            arrivals: 0,
        }
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut Device {
        &mut self.device
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Takes a request up, from its tokens so far.
    pub fn add(&mut self, ticket: Arc<Ticket>, epoch: Epoch) {
        self.arrivals += 1;
        match Sequence::new(Arc::clone(&ticket), epoch, self.arrivals, self.draft_tokens()) {
            Ok(sequence) => self.waiting.push_back(sequence),
            Err(reason) => {
                ticket.tell(epoch, Event::Failed(reason));
            }
        }
    }

    /// Runs one step. After an error the device is not to be used any more.
    pub fn step(&mut self) -> Result<(), ServeError> {
        self.drop_unwanted();
        self.admit();
        self.prefill()?;
        self.draw()?;
        self.count();
        Ok(())
    }

    fn drop_unwanted(&mut self) {
        let wanted = |one: &Sequence| one.ticket.wanted(one.epoch) == Wanted::Yes;
        self.waiting.retain(wanted);
        let gone: Vec<usize> =
            (0..self.running.len()).rev().filter(|&at| !wanted(&self.running[at])).collect();
        gone.into_iter().for_each(|at| self.leave(at));
    }

    fn leave(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        sequence.release(&mut lock(&self.blocks));
    }

    fn admit(&mut self) {
        let most = self.device.options().sequences;
        while self.running.len() < most {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            let taken = sequence.take_blocks(&mut lock(&self.blocks));
            if taken.is_none() {
                self.waiting.push_front(sequence);
                break;
            }
            let cached_tokens = sequence.cached.min(sequence.prompt_tokens());
            self.stats.prefix_tokens_asked.fetch_add(sequence.tokens.len() as u64, Relaxed);
            self.stats.prefix_tokens_found.fetch_add(sequence.cached as u64, Relaxed);
            let started = Event::Started {
                device: Arc::clone(&self.device_name),
                numeric_class: Arc::clone(&self.numeric_class),
                cached_tokens,
            };
            sequence.ticket.tell(sequence.epoch, started);
            self.running.push(sequence);
        }
    }

    /// Takes one bite of prompts: the first that needs it, and others with the same head.
    fn prefill(&mut self) -> Result<(), ServeError> {
        let needs = |one: &Sequence| one.cached < one.prefill_end();
        let Some(first) = self.running.iter().position(needs) else {
            return self.end_prefills();
        };
        let head = self.running[first].head();
        let (rows_max, mut pieces_max) = self.device.prefill_limits(head);
        if head != PrefillHead::CacheOnly {
            pieces_max = 1;
        }
        let draws = self.running.iter().any(|one| !needs(one));
        let mut rest = if draws { rows_max.min(PREFILL_ROWS_BESIDE_DRAWS) } else { rows_max };
        let mut bites: Vec<(usize, usize)> = Vec::new();
        for (at, one) in self.running.iter().enumerate().skip(first) {
            if bites.len() == pieces_max || rest == 0 {
                break;
            }
            if needs(one) && one.head() == head {
                let taken = rest.min(one.prefill_end() - one.cached);
                bites.push((at, one.cached + taken));
                rest -= taken;
            }
        }
        bites.sort_by_key(|(at, _)| adapter_order(self.running[*at].adapter()));
        let piece = |&(at, end): &(usize, usize)| {
            let one: &Sequence = &self.running[at];
            let (tokens, start, blocks) = (&one.tokens[..], one.cached, &one.blocks[..]);
            Piece { tokens, start, end, blocks, adapter: one.adapter() }
        };
        let pieces: Vec<Piece<'_>> = bites.iter().map(piece).collect();
        let result = self.device.prefill(&pieces, head)?;
        let taken: usize = pieces.iter().map(|piece| piece.end - piece.start).sum();
        self.stats.prompt_tokens.fetch_add(taken as u64, Relaxed);
        let width = taken;
        match result {
            PrefillResult::Nothing => {}
            PrefillResult::Scores(scores) => self.running[first].scores.extend(scores),
            PrefillResult::Hidden(values) => {
                let sums = &mut self.running[first].hidden;
                sums.resize(values.len() / width, 0.0);
                for row in values.chunks_exact(sums.len().max(1)) {
                    sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
                }
            }
        }
        let mut pool = lock(&self.blocks);
        for (at, end) in bites {
            self.running[at].cached = end;
            self.running[at].publish(&mut pool);
        }
        drop(pool);
        self.end_prefills()
    }

    /// Tells what finished prefills gave, and ends requests that wanted nothing more.
    fn end_prefills(&mut self) -> Result<(), ServeError> {
        let context = self.device.options().context;
        for at in (0..self.running.len()).rev() {
            let one = &mut self.running[at];
            if one.cached < one.prefill_end() {
                continue;
            }
            if one.generate().is_none() {
                let count = one.tokens.len() as f64;
                let mean = one.hidden.iter().map(|sum| (sum / count) as f32).collect();
                one.ticket.tell(one.epoch, Event::Embedding(mean));
                one.ticket.tell(one.epoch, Event::Finished(Finish::Length));
                self.leave(at);
                continue;
            }
            if one.head() != PrefillHead::CacheOnly {
                let scores = std::mem::take(&mut one.scores);
                one.ticket.tell(one.epoch, Event::Prompt(scores));
            }
            if one.at_length(context) {
                one.ticket.tell(one.epoch, Event::Finished(Finish::Length));
                self.leave(at);
            }
        }
        Ok(())
    }

    fn draft_tokens(&self) -> usize {
        self.device.options().draft_tokens
    }

    /// Draws of every sequence that is ready: one token, and one more for each guess that was
    /// right.
    fn draw(&mut self) -> Result<(), ServeError> {
        self.make_room();
        let (stakes, mut ended) = self.stakes();
        if !stakes.is_empty() {
            let mut rows: Vec<DrawRow<'_>> = Vec::new();
            for (index, (at, stake)) in stakes.iter().enumerate() {
                let own = self.running[*at].rows(index, stake);
                rows.extend(own.expect("only sequences that generate are ready"));
            }
            let drawn = self.device.draw(&rows)?;
            let hidden = self.device.drawn_hidden(&rows)?;
            drop(rows);
            let passed = self.deliver(stakes, drawn, &hidden, &mut ended);
            self.guess(&passed)?;
        }
        ended.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        for (at, reason) in ended {
            let one = &self.running[at];
            if !reason.is_empty() {
                one.ticket.tell(one.epoch, Event::Failed(reason));
            }
            self.leave(at);
        }
        Ok(())
    }

    /// What every ready sequence puts into the step, and who fails on the way.
    fn stakes(&mut self) -> (Vec<Placed<Stake>>, Vec<Placed<String>>) {
        let DeviceOptions { vocabulary, context, speculation, .. } = *self.device.options();
        let is_ready =
            |one: &Sequence| one.cached + 1 == one.tokens.len() && one.generate().is_some();
        let ready = self.running.iter().filter(|one| is_ready(one)).count();
        let mut spare = self.device.options().draw_rows().saturating_sub(ready);
        let (mut stakes, mut failed) = (Vec::new(), Vec::new());
        let mut pool = lock(&self.blocks);
        for (at, one) in self.running.iter_mut().enumerate() {
            if !is_ready(one) {
                continue;
            }
            let guesses = match speculation {
                Speculation::Off => Vec::new(),
                Speculation::PromptLookup => {
                    let limit = one.reach.guesses().min(spare).min(one.room(context));
                    let found = look_up(&one.tokens, limit).to_vec();
                    let fitting = one.grow_for(found.len(), &mut pool);
                    found[..fitting].to_vec()
                }
                Speculation::Mtp => {
                    let mut guesses = std::mem::take(&mut one.guesses);
                    guesses.truncate(spare.min(one.room(context)));
                    let fitting = one.grow_for(guesses.len(), &mut pool);
                    guesses.truncate(fitting);
                    guesses
                }
            };
            match one.stake(vocabulary, &guesses) {
                Ok(stake) => {
                    spare -= stake.guessed;
                    self.stats.drafted_tokens.fetch_add(stake.guessed as u64, Relaxed);
                    stakes.push((at, stake));
                }
                Err(reason) => failed.push((at, reason)),
            }
        }
        drop(pool);
        stakes.sort_by_key(|(at, _)| adapter_order(self.running[*at].adapter()));
        (stakes, failed)
    }

    /// Guesses at what comes after the tokens just drawn, by the model's extra layer.
    fn guess(&mut self, passed: &[Passed]) -> Result<(), ServeError> {
        if passed.is_empty() {
            return Ok(());
        }
        let guesses = mtp::guess(&mut self.device, &self.running, passed)?;
        for (one, guesses) in passed.iter().zip(guesses) {
            self.running[one.at].guesses = guesses;
        }
        Ok(())
    }

    /// Tells the drawn tokens; adds to `ended` who leaves, with a reason if it is a failure. Gives
    /// who stays and is to be guessed at, with the hidden states it has passed.
    fn deliver(
        &mut self,
        stakes: Vec<(usize, Stake)>,
        drawn: Vec<Drawn>,
        hidden: &[u8],
        ended: &mut Vec<(usize, String)>,
    ) -> Vec<Passed> {
        let context = self.device.options().context;
        let width = self.device.hidden_bytes();
        let (mut row, mut passed) = (0, Vec::new());
        let mut pool = lock(&self.blocks);
        let mut drawn = drawn.into_iter();
        for (at, stake) in stakes {
            let one = &mut self.running[at];
            let before = one.tokens.len();
            let rows: Vec<Drawn> = drawn.by_ref().take(stake.biases.len()).collect();
            let left = one.tell_rows(rows, &stake, context);
            let told = one.tokens.len() - before;
            let right = told.saturating_sub(1);
            one.reach.learn(stake.guessed, right);
            self.stats.generated_tokens.fetch_add(told as u64, Relaxed);
            self.stats.accepted_tokens.fetch_add(right as u64, Relaxed);
            one.publish(&mut pool);
            let own = row * width..(row + told) * width;
            row += stake.biases.len();
            match left {
                Ok(After::Stays) if !hidden.is_empty() => {
                    let wanted = one.reach.steady().min(one.room(context));
                    let wanted = one.grow_for(wanted, &mut pool);
                    let hidden = hidden[own].to_vec();
                    passed.push(Passed { at, position: before - 1, hidden, wanted });
                }
                Ok(After::Stays) => {}
                Ok(After::Leaves) => ended.push((at, String::new())),
                Err(reason) => ended.push((at, reason)),
            }
        }
        passed
    }

    /// Gives every sequence that draws the block its next token needs; who came last gives way.
    fn make_room(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let grown = self.running[at].grow(&mut lock(&self.blocks));
            if grown.is_some() {
                at += 1;
                continue;
            }
            let last = (0..self.running.len()).max_by_key(|&at| self.running[at].arrival);
            let last = last.expect("the sequence that needs a block is running");
            let mut sequence = self.running.remove(last);
            sequence.release(&mut lock(&self.blocks));
            self.stats.preemptions.fetch_add(1, Relaxed);
            let (ticket, epoch) = (Arc::clone(&sequence.ticket), sequence.epoch);
            match Sequence::new(ticket, epoch, sequence.arrival, self.draft_tokens()) {
                Ok(again) => self.waiting.push_front(again),
                Err(reason) => {
                    sequence.ticket.tell(epoch, Event::Failed(reason));
                }
            }
            if last < at {
                at -= 1;
            }
        }
    }

    fn count(&self) {
        self.stats.running.store(self.running.len() as u64, Relaxed);
        self.stats.waiting.store(self.waiting.len() as u64, Relaxed);
        self.stats.steps.fetch_add(1, Relaxed);
        let pool = lock(&self.blocks);
        self.stats.blocks_used.store((pool.count() - pool.available()) as u64, Relaxed);
    }
}

impl Sequence {
    /// Tells the tokens of its rows, up to the first that is not the one guessed.
    fn tell_rows(
        &mut self,
        rows: Vec<Drawn>,
        stake: &Stake,
        context: usize,
    ) -> Result<After, String> {
        for drawn in rows {
            let Some(scored) = drawn else {
                let drawn = self.tokens.len() - self.prompt_tokens();
                return Err(format!(
                    "no token has a finite logit after {drawn} drawn ones: logit_bias or the \
                     grammar forbids all, or the weights hold NaN"
                ));
            };
            let token = scored.token;
            if let After::Leaves = self.tell_drawn(scored, context)? {
                return Ok(After::Leaves);
            }
            // What follows was drawn after the guess, and means nothing after another token.
            if stake.tokens.get(self.tokens.len() - 1) != Some(&token) {
                break;
            }
        }
        Ok(After::Stays)
    }

    fn tell_drawn(
        &mut self,
        scored: super::request::Scored,
        context: usize,
    ) -> Result<After, String> {
        let ends = self.accept(scored.token)?;
        let wanted = self.ticket.tell(self.epoch, Event::Token(scored));
        let finish = match ends {
            true => Some(Finish::EndToken),
            false => self.at_length(context).then_some(Finish::Length),
        };
        if let Some(finish) = finish {
            self.ticket.tell(self.epoch, Event::Finished(finish));
            return Ok(After::Leaves);
        }
        Ok(if wanted == Wanted::Yes { After::Stays } else { After::Leaves })
    }
}

/// Rows of a step are sorted so: by adapter, those without one last.
fn adapter_order(adapter: Option<usize>) -> usize {
    adapter.unwrap_or(usize::MAX)
}

fn lock(blocks: &Mutex<BlockPool>) -> MutexGuard<'_, BlockPool> {
    // A panic while it is held ends the engine's thread; others only look up prefixes.
    blocks.lock().unwrap_or_else(PoisonError::into_inner)
}
