//! A request as the engine sees it, what it answers, and the record that outlives a device.
//!
//! A [`Ticket`] holds a request and its tokens so far. Whoever runs it holds an epoch; when the
//! request moves to another device the epoch rises, and what the former device still says is not
//! heard. So a token is neither lost nor given twice. Read next: `batch.rs`, `../pool/mod.rs`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pontoon_models::SamplingSettings;
use tokio::sync::mpsc::UnboundedSender;

/// Restricts which tokens may come next, as a grammar does.
pub trait Constraint: Send {
    /// Sets the bias of every token that may not come next to minus infinity.
    fn forbid(&mut self, bias: &mut [f32]) -> Result<(), String>;

    /// Goes on by one token.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Another one that stands where this does, to try tokens with.
    fn fork(&self) -> Box<dyn Constraint>;
}

/// Makes a constraint at its start; after a move it is brought up to date by the tokens so far.
pub type ConstraintSource = dyn Fn() -> Result<Box<dyn Constraint>, String> + Send + Sync;

/// What is wanted.
#[derive(Clone)]
pub struct Request {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The adapter it goes through, by its number.
    pub adapter: Option<usize>,
    /// What to do with it.
    pub task: Task,
}

/// What to do with a prompt.
#[derive(Clone)]
pub enum Task {
    /// Continue it.
    Generate(Generate),
    /// Give the mean of its tokens' last hidden state.
    Embed,
}

/// How to continue a prompt.
#[derive(Clone)]
pub struct Generate {
    /// How tokens are drawn; `tokens_max` is the number of tokens at most.
    pub sampling: SamplingSettings,
    /// The choice's number among those of one prompt and seed, which draw differently.
    pub choice: u32,
    /// Tokens that end the completion.
    pub end_tokens: Vec<u32>,
    /// Tokens that must come before an end token.
    pub tokens_min: usize,
    /// Added to the logits of some tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// How many of the likeliest tokens to tell for each drawn one.
    pub top_logprobs: usize,
    /// For each token of the prompt, how many of the likeliest to tell; `None`: not scored.
    pub prompt_logprobs: Option<usize>,
    /// What restricts the tokens.
    pub constraint: Option<Arc<ConstraintSource>>,
}

/// A token with its log-probability and those of the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Its log-probability before any penalty, bias or temperature.
    pub logprob: f32,
    /// Its place among all tokens, the likeliest being first; known where `top` was asked for.
    pub rank: Option<usize>,
    /// The likeliest tokens in descending order; equal ones by id.
    pub top: Vec<(u32, f32)>,
}

/// What the engine answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A device has taken the request up, for the first time or after a move.
    Started {
        /// The device's name.
        device: Arc<str>,
        /// The class within which devices give equal bits.
        numeric_class: Arc<str>,
        /// Tokens of the prompt that were in its cache already.
        cached_tokens: usize,
    },
    /// The prompt's tokens from the second on.
    Prompt(Vec<Scored>),
    /// One more token.
    Token(Scored),
    /// The mean hidden state.
    Embedding(Vec<f32>),
    /// The end.
    Finished(Finish),
    /// The request cannot be answered, for this reason.
    Failed(String),
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token was drawn; it is the last one told.
    EndToken,
    /// The number of tokens asked for, or the model's context, was reached.
    Length,
}

/// Who may speak for a ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// Whether a request is still wanted, from the one who runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Go on.
    Yes,
    /// The client has left, or the request has moved elsewhere.
    No,
}

/// A request on its way through the pool.
pub struct Ticket {
    /// The request.
    pub request: Request,
    /// Its place among the requests that share the receiver.
    pub index: usize,
    progress: Mutex<Progress>,
}

struct Progress {
    epoch: Epoch,
    tokens: Vec<u32>,
    /// Of each of the tokens.
    logprobs: Vec<f32>,
    /// The places in the pool that drew them: from which token on, and where.
    holders: Vec<(usize, usize)>,
    prompt_told: bool,
    moves: Moves,
    tokens_at_move: usize,
    sender: Option<UnboundedSender<(usize, Event)>>,
}

/// How often a request has moved because its device failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    /// Since it last drew a token.
    pub idle: u32,
    /// In all.
    pub all: u32,
}

/// What has come of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawing {
    /// The tokens drawn.
    pub tokens: Vec<u32>,
    /// The log-probability of each.
    pub logprobs: Vec<f32>,
    /// The places in the pool that drew them: from which token on, and where.
    pub holders: Vec<(usize, usize)>,
}

impl Ticket {
    /// A ticket whose answers go to a channel.
    pub fn new(
        request: Request,
        index: usize,
        sender: UnboundedSender<(usize, Event)>,
    ) -> Arc<Ticket> {
        let progress = Progress {
            epoch: Epoch(0),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            holders: Vec::new(),
            prompt_told: false,
            moves: Moves::default(),
            tokens_at_move: 0,
            sender: Some(sender),
        };
        Arc::new(Ticket { request, index, progress: Mutex::new(progress) })
    }

    /// Takes the request away from whoever has it; gives the new holder's epoch.
    pub fn hand_over(&self) -> Epoch {
        let mut progress = self.lock();
        progress.epoch.0 += 1;
        progress.epoch
    }

    /// Says which place in the pool draws the tokens from now on.
    pub fn held_by(&self, place: usize) {
        let mut progress = self.lock();
        let from = progress.tokens.len();
        progress.holders.retain(|(first, _)| *first < from);
        progress.holders.push((from, place));
    }

    /// What has been drawn so far, and by whom.
    pub fn drawing(&self) -> Drawing {
        let progress = self.lock();
        Drawing {
            tokens: progress.tokens.clone(),
            logprobs: progress.logprobs.clone(),
            holders: progress.holders.clone(),
        }
    }

    /// Counts a move caused by a failure.
    pub fn count_move(&self) -> Moves {
        let mut progress = self.lock();
        let drawn = progress.tokens.len();
        if drawn > progress.tokens_at_move {
            progress.moves.idle = 0;
        }
        progress.tokens_at_move = drawn;
        progress.moves.idle += 1;
        progress.moves.all += 1;
        progress.moves
    }

    /// The tokens drawn so far.
    pub fn drawn(&self) -> Vec<u32> {
        self.lock().tokens.clone()
    }

    /// Whether the prompt's log-probabilities have been told.
    pub fn prompt_told(&self) -> bool {
        self.lock().prompt_told
    }

    /// Whether the holder of an epoch should go on.
    pub fn wanted(&self, epoch: Epoch) -> Wanted {
        let progress = self.lock();
        match &progress.sender {
            Some(sender) if progress.epoch == epoch && !sender.is_closed() => Wanted::Yes,
            _ => Wanted::No,
        }
    }

    /// Gives the request up: whoever runs it is told at its next step.
    pub fn cancel(&self) {
        self.lock().sender = None;
    }

    /// Whether the request has neither ended nor been given up.
    pub fn open(&self) -> bool {
        self.lock().sender.as_ref().is_some_and(|sender| !sender.is_closed())
    }

    /// Tells the client something, if `epoch` may still speak.
    pub fn tell(&self, epoch: Epoch, event: Event) -> Wanted {
        let mut progress = self.lock();
        if progress.epoch != epoch {
            return Wanted::No;
        }
        let Some(sender) = progress.sender.clone() else { return Wanted::No };
        match &event {
            Event::Token(scored) => {
                progress.tokens.push(scored.token);
                progress.logprobs.push(scored.logprob);
            }
            Event::Prompt(_) => progress.prompt_told = true,
            Event::Finished(_) | Event::Failed(_) => progress.sender = None,
            Event::Started { .. } | Event::Embedding(_) => {}
        }
        match sender.send((self.index, event)) {
            Ok(()) => Wanted::Yes,
            Err(_) => {
                progress.sender = None;
                Wanted::No
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // Nothing panics while it is held, and a record is whole between any two statements.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Request {
    /// How many tokens may be drawn at most.
    pub fn tokens_max(&self) -> usize {
        match &self.task {
            Task::Generate(generate) => generate.sampling.tokens_max,
            Task::Embed => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_lost_the_request_is_not_heard_any_more() {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let request = Request { prompt: vec![1], adapter: None, task: Task::Embed };
        let ticket = Ticket::new(request, 3, sender);
        let token =
            |token| Event::Token(Scored { token, logprob: -1.0, rank: None, top: Vec::new() });
        let first = ticket.hand_over();
        assert_eq!(ticket.tell(first, token(7)), Wanted::Yes);
        let second = ticket.hand_over();
        assert_eq!(ticket.tell(first, token(8)), Wanted::No);
        assert_eq!(ticket.tell(second, token(9)), Wanted::Yes);
        assert_eq!(ticket.drawn(), [7, 9]);
        assert_eq!(receiver.try_recv().unwrap(), (3, token(7)));
        assert_eq!(receiver.try_recv().unwrap(), (3, token(9)));
        drop(receiver);
        assert_eq!(ticket.wanted(second), Wanted::No);
    }

    #[test]
    fn a_request_that_goes_on_between_failures_is_not_the_one_that_causes_them() {
        let (sender, _receiver) = tokio::sync::mpsc::unbounded_channel();
        let ticket =
            Ticket::new(Request { prompt: vec![1], adapter: None, task: Task::Embed }, 0, sender);
        assert_eq!(ticket.count_move(), Moves { idle: 1, all: 1 });
        assert_eq!(ticket.count_move(), Moves { idle: 2, all: 2 });
        let epoch = ticket.hand_over();
        ticket.tell(
            epoch,
            Event::Token(Scored { token: 7, logprob: -1.0, rank: None, top: Vec::new() }),
        );
        assert_eq!(ticket.count_move(), Moves { idle: 1, all: 3 });
    }
}
