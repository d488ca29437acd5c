//! From a request's engine events to text: decoding, stop texts, counts, for all its choices.
//!
//! Dropping a flow gives its requests up. What the text means in a chat is `../text/splitter.rs`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use axum::http::StatusCode;
use pontoon_models::{SpecialTokens, StreamDecoder};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::errors::ApiError;
use super::settings::Settings;
use crate::app::App;
use crate::engine::request::{Event, Finish, Request, Scored, Ticket};
use crate::metrics::Times;
use crate::text::stops::{Passed, Stops};

/// How a completion ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By an end token.
    EndToken,
    /// By this stop text.
    StopText(String),
    /// By the number of tokens.
    Length,
}

impl Ended {
    /// As OpenAI names it.
    pub fn name(&self) -> &'static str {
        match self {
            Ended::EndToken | Ended::StopText(_) => "stop",
            Ended::Length => "length",
        }
    }

    /// The stop text that ended it, if one did.
    pub fn stop_text(&self) -> Option<&str> {
        match self {
            Ended::StopText(text) => Some(text),
            Ended::EndToken | Ended::Length => None,
        }
    }
}

/// What happens to one of the choices.
#[derive(Debug)]
pub enum Step {
    /// Its prompt has been scored.
    Prompt(Vec<Scored>),
    /// A token has come, and text that is certain, which may be empty.
    Token(Scored, String),
    /// It has ended, with the last text.
    Ended(Ended, String),
    /// Its prompt has been embedded.
    Embedding(Vec<f32>),
}

/// Token counts of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of its prompts, each counted once.
    pub prompt: usize,
    /// Of those, found in the cache.
    pub cached: usize,
    /// Of all completions.
    pub completion: usize,
}

struct Choice<'a> {
    decoder: Option<StreamDecoder<'a>>,
    stops: Stops,
    end_tokens: Vec<u32>,
    last_token: Option<Instant>,
    ended: bool,
}

/// A request that runs.
pub struct Flow<'a> {
    app: &'a App,
    tickets: Vec<Arc<Ticket>>,
    receiver: UnboundedReceiver<(usize, Event)>,
    choices: Vec<Choice<'a>>,
    open: usize,
    queue: VecDeque<(usize, Step)>,
    usage: Usage,
    devices: Vec<Arc<str>>,
    classes: Vec<Arc<str>>,
    began: Instant,
    taken_up: Option<Instant>,
    first_token: Option<Instant>,
    failed: bool,
}

impl<'a> Flow<'a> {
    /// Gives requests to the pool; `settings` say how their text is made.
    pub fn start(app: &'a App, requests: Vec<Request>, settings: &Settings) -> Flow<'a> {
        let (sender, receiver) = unbounded_channel();
        let special = if settings.skip_special { SpecialTokens::Hide } else { SpecialTokens::Show };
        let choice = || Choice {
            decoder: Some(app.tokenizer.stream(special)),
            stops: Stops::new(settings.stops.clone(), settings.stop_text),
            end_tokens: settings.end_tokens.clone(),
            last_token: None,
            ended: false,
        };
        let choices: Vec<Choice<'a>> = requests.iter().map(|_| choice()).collect();
        // Choices of one prompt follow each other and count it once.
        let prompts = requests.iter().step_by(settings.choices.max(1));
        let usage = Usage { prompt: prompts.map(|one| one.prompt.len()).sum(), ..Usage::default() };
        let ticket = |(index, request)| Ticket::new(request, index, sender.clone());
        let tickets: Vec<Arc<Ticket>> = requests.into_iter().enumerate().map(ticket).collect();
        tickets.iter().for_each(|ticket| app.pool.submit(Arc::clone(ticket)));
        Flow {
            app,
            open: tickets.len(),
            tickets,
            receiver,
            choices,
            queue: VecDeque::new(),
            usage,
            devices: Vec::new(),
            classes: Vec::new(),
            began: Instant::now(),
            taken_up: None,
            first_token: None,
            failed: false,
        }
    }

    /// The next thing that happens; `None` when all choices have ended.
    ///
    /// May be given up while it waits and called again.
    pub async fn next(&mut self) -> Result<Option<(usize, Step)>, ApiError> {
        loop {
            if let Some(step) = self.queue.pop_front() {
                return Ok(Some(step));
            }
            if self.open == 0 {
                return Ok(None);
            }
            let limit = self.app.limits.answer_time;
            let left = limit.saturating_sub(self.began.elapsed());
            let received = tokio::time::timeout(left, self.receiver.recv()).await;
            let taken = match received {
                Ok(Some((index, _))) if self.choices[index].ended => Ok(()),
                Ok(Some((index, event))) => self.take(index, event),
                Ok(None) => {
                    let stopped = "the server stops before the answer is complete";
                    Err(ApiError::status(StatusCode::SERVICE_UNAVAILABLE, stopped))
                }
                Err(_) => {
                    let late =
                        format!("the answer takes longer than {limit:?}; ask for fewer tokens");
                    Err(ApiError::status(StatusCode::GATEWAY_TIMEOUT, late).code("timeout"))
                }
            };
            if let Err(error) = taken {
                self.failed = true;
                self.app.metrics.failed();
                return Err(error);
            }
        }
    }

    /// Ends a choice whose answer is complete, though the model would go on.
    pub fn complete(&mut self, index: usize) {
        if !self.choices[index].ended {
            self.tickets[index].cancel();
            self.end(index, Ended::EndToken, String::new());
        }
    }

    /// Token counts so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The devices that have worked on it.
    pub fn devices(&self) -> String {
        self.devices.join(", ")
    }

    /// The classes of devices, within each of which bits are equal.
    pub fn classes(&self) -> String {
        self.classes.join(" + ")
    }

    fn take(&mut self, index: usize, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Started { device, numeric_class, cached_tokens } => {
                self.taken_up.get_or_insert_with(Instant::now);
                self.usage.cached = self.usage.cached.max(cached_tokens);
                add_new(&mut self.devices, device);
                add_new(&mut self.classes, numeric_class);
            }
            Event::Prompt(scores) => self.queue.push_back((index, Step::Prompt(scores))),
            Event::Embedding(values) => self.queue.push_back((index, Step::Embedding(values))),
            Event::Token(scored) => self.token(index, scored)?,
            Event::Finished(finish) => {
                let ended = match finish {
                    Finish::EndToken => Ended::EndToken,
                    Finish::Length => Ended::Length,
                };
                let text = self.rest(index)?;
                self.end(index, ended, text);
            }
            Event::Failed(reason) => {
                return Err(ApiError::status(StatusCode::INTERNAL_SERVER_ERROR, reason));
            }
        }
        Ok(())
    }

    fn token(&mut self, index: usize, scored: Scored) -> Result<(), ApiError> {
        self.usage.completion += 1;
        let now = Instant::now();
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.app.metrics.first_token(now - self.began);
        }
        let choice = &mut self.choices[index];
        if let Some(last) = choice.last_token.replace(now) {
            self.app.metrics.next_token(now - last);
        }
        let mut passed = Passed { text: String::new(), stop: None };
        if !choice.end_tokens.contains(&scored.token)
            && let Some(decoder) = &mut choice.decoder
        {
            let text = decoder.push(scored.token).map_err(internal)?;
            passed = choice.stops.push(&text);
        }
        self.queue.push_back((index, Step::Token(scored, passed.text)));
        if let Some(stop) = passed.stop {
            self.tickets[index].cancel();
            self.end(index, Ended::StopText(stop), String::new());
        }
        Ok(())
    }

    /// The text that was held back.
    fn rest(&mut self, index: usize) -> Result<String, ApiError> {
        let choice = &mut self.choices[index];
        let Some(decoder) = choice.decoder.take() else { return Ok(String::new()) };
        let last = decoder.finish().map_err(internal)?;
        let passed = choice.stops.push(&last);
        let held = if passed.stop.is_none() { choice.stops.finish() } else { String::new() };
        Ok(passed.text + &held)
    }

    fn end(&mut self, index: usize, ended: Ended, text: String) {
        self.choices[index].ended = true;
        self.open -= 1;
        self.app.metrics.ended(ended.name());
        if self.open == 0 {
            let now = Instant::now();
            let taken_up = self.taken_up.unwrap_or(now);
            let first = self.first_token.unwrap_or(now);
            let times = Times {
                queued: taken_up.saturating_duration_since(self.began),
                prefill: first.saturating_duration_since(taken_up),
                decode: now.saturating_duration_since(first),
                whole: now.saturating_duration_since(self.began),
            };
            self.app.metrics.answered(&times, self.usage.prompt, self.usage.completion);
        }
        self.queue.push_back((index, Step::Ended(ended, text)));
    }
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        // Choices of one request that are given up for another one's end were not left by anybody.
        if self.open > 0 && !self.failed {
            self.app.metrics.aborted(self.open);
        }
        self.tickets.iter().for_each(|ticket| ticket.cancel());
    }
}

fn add_new(list: &mut Vec<Arc<str>>, one: Arc<str>) {
    if !list.contains(&one) {
        list.push(one);
    }
}

fn internal(error: pontoon_models::ModelError) -> ApiError {
    ApiError::status(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}
