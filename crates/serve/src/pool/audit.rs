//! Re-scores a sample of answered requests on another device, and finds out who is wrong when two
//! devices disagree.
//!
//! An audit is a request like any other, tied to one device: the whole text, scored. Between
//! devices of one numeric class the log-probabilities told with the tokens must come back bit for
//! bit, as drawing and scoring give the same bits; between classes they must be near. The
//! supervisor advances audits at every look; nothing here waits. Read next: `verdict.rs`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::verdict::{Nearness, Readings, Verdict, decide};
use super::{Phase, Shared};
use crate::engine::request::{Drawing, Event, Request, Task, Ticket};
use crate::engine::worker::Command;

/// Requests that wait to be audited at most: more would hold memory without telling more.
const WAITING_MAX: usize = 256;
/// Audits at the same time: each is a prefill that others wait beside.
const RUNNING_MAX: usize = 2;

/// What audits have come to.
#[derive(Debug, Default)]
pub struct AuditCounts {
    /// Requests whose scores were confirmed.
    pub agreed: AtomicU64,
    /// Requests whose scores were contradicted.
    pub disagreed: AtomicU64,
    /// Requests that could not be audited, as a device left meanwhile or too many waited.
    pub dropped: AtomicU64,
}

/// Requests that are to be audited when they have ended.
#[derive(Default)]
pub(super) struct Chosen {
    tickets: Mutex<VecDeque<Arc<Ticket>>>,
    submitted: AtomicU64,
    pub counts: AuditCounts,
}

impl Chosen {
    /// Takes a share of all requests, evenly spread.
    pub(super) fn consider(&self, ticket: &Arc<Ticket>, share: f64) {
        let count = self.submitted.fetch_add(1, Relaxed) as f64;
        let taken = ((count + 1.0) * share).floor() > (count * share).floor();
        if !taken || matches!(ticket.request.task, Task::Embed) {
            return;
        }
        let mut tickets = self.lock();
        tickets.push_back(Arc::clone(ticket));
        if tickets.len() > WAITING_MAX {
            tickets.pop_front();
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    /// The first that has ended.
    fn take_ended(&self) -> Option<Arc<Ticket>> {
        let mut tickets = self.lock();
        let at = tickets.iter().position(|ticket| !ticket.open())?;
        tickets.remove(at)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Ticket>>> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A text that one device scores.
struct Reading {
    slot: usize,
    generation: u64,
    receiver: UnboundedReceiver<(usize, Event)>,
    scores: Option<Vec<f32>>,
}

/// How far an audit is.
enum Stage {
    /// Another device scores the text.
    Judged { judge: Reading },
    /// The two disagree: both score it again, and a third one if there is one.
    Again { judged: Vec<f32>, drawer: Reading, judge: Reading, third: Option<Reading> },
    /// Both repeat themselves: both score the probe that they scored when they joined.
    Probed { drawer: Reading, judge: Reading },
}

/// One request under audit.
pub(super) struct Audit {
    request: Request,
    drawing: Drawing,
    /// The part in question: tokens drawn by `drawer`.
    part: std::ops::Range<usize>,
    drawer: usize,
    evidence: String,
    stage: Stage,
}

/// What became of an audit at a look.
enum Next {
    Waits,
    Ends,
}

impl Shared {
    /// Goes on with audits and begins new ones.
    pub(super) fn audit(&self, running: &mut Vec<Audit>) {
        while running.len() < RUNNING_MAX {
            let Some(ticket) = self.chosen.take_ended() else { break };
            match self.begin_audit(&ticket) {
                Some(audit) => running.push(audit),
                None => self.count_dropped(),
            }
        }
        running.retain_mut(|audit| matches!(self.advance(audit), Next::Waits));
    }

    fn count_dropped(&self) {
        self.chosen.counts.dropped.fetch_add(1, Relaxed);
    }

    fn begin_audit(&self, ticket: &Ticket) -> Option<Audit> {
        let drawing = ticket.drawing();
        let &(_, last) = drawing.holders.last()?;
        if drawing.tokens.is_empty() || self.parts.options.context < 2 {
            return None;
        }
        let serving = self.serving();
        let class = |slot: usize| serving.iter().find(|one| one.0 == slot).map(|one| &one.2);
        let others = serving.iter().filter(|(slot, ..)| *slot != last);
        // One of the same class tells more; among equals the one with the least to do.
        let judge = others.min_by_key(|(_, queued, own)| (class(last) != Some(own), *queued))?.0;
        let text = [&ticket.request.prompt[..], &drawing.tokens].concat();
        let request = scored(&ticket.request, text)?;
        let judge = self.read(judge, &request)?;
        Some(Audit {
            request,
            drawing,
            part: 0..0,
            drawer: last,
            evidence: String::new(),
            stage: Stage::Judged { judge },
        })
    }

    /// The places that serve, what they have to do, and their classes.
    fn serving(&self) -> Vec<(usize, u64, Arc<str>)> {
        let of = |(slot, one): (usize, &super::Slot)| {
            let state = one.lock();
            let Phase::Serving(worker) = &state.phase else { return None };
            let stats = &worker.stats;
            let queued = stats.running.load(Relaxed) + stats.waiting.load(Relaxed);
            Some((slot, queued, Arc::clone(&worker.numeric_class)))
        };
        self.slots.iter().enumerate().filter_map(of).collect()
    }

    /// Lets one device score a text.
    fn read(&self, slot: usize, request: &Request) -> Option<Reading> {
        let state = self.slots[slot].lock();
        let Phase::Serving(worker) = &state.phase else { return None };
        let (sender, receiver) = unbounded_channel();
        // It is in no list: when the device fails, the audit ends instead of moving.
        let ticket = Ticket::new(request.clone(), 0, sender);
        let epoch = ticket.hand_over();
        worker.commands.send(Command::Run(ticket, epoch)).ok()?;
        Some(Reading { slot, generation: state.generation, receiver, scores: None })
    }

    /// Takes what a device has said; `Err` if it will not say anything any more.
    fn hear(&self, reading: &mut Reading) -> Result<Next, ()> {
        while reading.scores.is_none() {
            match reading.receiver.try_recv() {
                Ok((_, Event::Prompt(scores))) => {
                    reading.scores = Some(scores.iter().map(|scored| scored.logprob).collect());
                }
                Ok((_, Event::Failed(_) | Event::Finished(_))) => return Err(()),
                Ok(_) => {}
                Err(TryRecvError::Disconnected) => return Err(()),
                Err(TryRecvError::Empty) => {
                    let same = self.slots[reading.slot].lock().generation == reading.generation;
                    return if same { Ok(Next::Waits) } else { Err(()) };
                }
            }
        }
        Ok(Next::Ends)
    }

    /// Whether all of these have been heard.
    fn all_heard(&self, readings: &mut [&mut Reading]) -> Result<bool, ()> {
        let mut all = true;
        for reading in readings {
            all &= matches!(self.hear(reading)?, Next::Ends);
        }
        Ok(all)
    }

    fn advance(&self, audit: &mut Audit) -> Next {
        let heard = match &mut audit.stage {
            Stage::Judged { judge } => self.all_heard(&mut [judge]),
            Stage::Again { drawer, judge, third, .. } => {
                // A third device that leaves is no loss.
                if third.as_mut().is_some_and(|third| self.hear(third).is_err()) {
                    *third = None;
                }
                match third {
                    Some(third) => self.all_heard(&mut [drawer, judge, third]),
                    None => self.all_heard(&mut [drawer, judge]),
                }
            }
            Stage::Probed { drawer, judge } => self.all_heard(&mut [drawer, judge]),
        };
        match heard {
            Ok(false) => return Next::Waits,
            Err(()) => {
                self.count_dropped();
                return Next::Ends;
            }
            Ok(true) => {}
        }
        match &audit.stage {
            Stage::Judged { .. } => self.after_judging(audit),
            Stage::Again { .. } => self.after_repeating(audit),
            Stage::Probed { .. } => self.after_probing(audit),
        }
    }

    /// Compares what was told with what the judge says, for each device that drew a part.
    fn after_judging(&self, audit: &mut Audit) -> Next {
        let Stage::Judged { judge } = &mut audit.stage else { return Next::Ends };
        let (slot, scores) = (judge.slot, judge.scores.take().unwrap_or_default());
        let judged = tail(&scores, audit.drawing.tokens.len());
        let ends = audit.drawing.holders.iter().skip(1).map(|(first, _)| *first);
        let ends: Vec<usize> = ends.chain([audit.drawing.tokens.len()]).collect();
        for (&(first, drawer), end) in audit.drawing.holders.iter().zip(ends) {
            if drawer == slot {
                continue;
            }
            let Some(nearness) = self.nearness(drawer, slot) else { continue };
            let drawn = &audit.drawing.logprobs[first..end];
            let Some(at) = nearness.first_apart(drawn, &judged[first..end]) else { continue };
            self.chosen.counts.disagreed.fetch_add(1, Relaxed);
            audit.evidence = format!(
                "`{}` drew token {} with log-probability {} at place {at} of its part, `{}` scores \
                 it {}",
                self.slots[drawer].name,
                audit.drawing.tokens[first + at],
                drawn[at],
                self.slots[slot].name,
                judged[first + at],
            );
            (audit.part, audit.drawer) = (first..end, drawer);
            return self.repeat(audit, slot, judged);
        }
        self.chosen.counts.agreed.fetch_add(1, Relaxed);
        Next::Ends
    }

    fn repeat(&self, audit: &mut Audit, judge: usize, judged: Vec<f32>) -> Next {
        let readings = (self.read(audit.drawer, &audit.request), self.read(judge, &audit.request));
        let (Some(drawer), Some(judge)) = readings else { return Next::Ends };
        let third = self.serving().into_iter().map(|(slot, ..)| slot);
        let third = third.filter(|slot| ![drawer.slot, judge.slot].contains(slot)).min();
        let third = third.and_then(|slot| self.read(slot, &audit.request));
        audit.stage = Stage::Again { judged, drawer, judge, third };
        Next::Waits
    }

    fn after_repeating(&self, audit: &mut Audit) -> Next {
        let Stage::Again { judged, drawer, judge, third } = &mut audit.stage else {
            return Next::Ends;
        };
        let (part, count) = (audit.part.clone(), audit.drawing.tokens.len());
        let now = |reading: &Reading| {
            let scores = reading.scores.as_deref().unwrap_or_default();
            tail(scores, count)[part.clone()].to_vec()
        };
        let (drawer_again, judge_again) = (now(drawer), now(judge));
        let third = third.as_ref().and_then(|third| {
            let to_drawer = self.nearness(drawer.slot, third.slot)?;
            Some((now(third), to_drawer, self.nearness(judge.slot, third.slot)?))
        });
        let verdict = decide(&Readings {
            drawn: &audit.drawing.logprobs[part.clone()],
            judged: &judged[part.clone()],
            drawer_again: &drawer_again,
            judge_again: &judge_again,
            third: third.as_ref().map(|(scores, a, b)| (&scores[..], *a, *b)),
        });
        let (wrong, why) = match verdict {
            Verdict::Drawer(why) => (drawer, why),
            Verdict::Judge(why) => (judge, why),
            Verdict::Open => return self.probe(audit),
        };
        let evidence = format!("{}; {why}", audit.evidence);
        self.evict(wrong.slot, wrong.generation, &evidence);
        Next::Ends
    }

    /// Lets both score what they scored when they joined.
    fn probe(&self, audit: &mut Audit) -> Next {
        let Stage::Again { drawer, judge, .. } = &audit.stage else { return Next::Ends };
        let read = |slot: usize| {
            let tokens = self.probe_of(slot)?.tokens.to_vec();
            self.read(slot, &scored(&audit.request, tokens)?)
        };
        let (Some(drawer), Some(judge)) = (read(drawer.slot), read(judge.slot)) else {
            return Next::Ends;
        };
        audit.stage = Stage::Probed { drawer, judge };
        Next::Waits
    }

    fn after_probing(&self, audit: &mut Audit) -> Next {
        let Stage::Probed { drawer, judge } = &audit.stage else { return Next::Ends };
        let changed = |reading: &Reading| {
            let now = reading.scores.as_deref().unwrap_or_default();
            self.probe_of(reading.slot).is_none_or(|probe| {
                let count = probe.scores.len().min(now.len());
                super::agreement::first_difference(&probe.scores[..count], &now[..count]).is_some()
            })
        };
        let wrong = match (changed(drawer), changed(judge)) {
            (true, false) => Some((drawer, "it does not score its probe as it did")),
            (false, true) => Some((judge, "it does not score its probe as it did")),
            _ => None,
        };
        // Somebody is wrong all the same, and the first one is what all were compared with.
        let (wrong, why) = wrong.unwrap_or_else(|| {
            let joined = |reading: &Reading| self.slots[reading.slot].lock().joined;
            let later = if joined(drawer) > joined(judge) { drawer } else { judge };
            (later, "both repeat their scores and no third device decides; it joined later")
        });
        let evidence = format!("{}; {why}", audit.evidence);
        self.evict(wrong.slot, wrong.generation, &evidence);
        Next::Ends
    }

    fn probe_of(&self, slot: usize) -> Option<crate::engine::probe::Probe> {
        match &self.slots[slot].lock().phase {
            Phase::Serving(worker) => Some(worker.probe.clone()),
            Phase::Starting | Phase::Down { .. } => None,
        }
    }

    /// How near two devices must be; `None` if one of them does not serve any more.
    fn nearness(&self, one: usize, other: usize) -> Option<Nearness> {
        let serving = self.serving();
        let class = |slot: usize| serving.iter().find(|one| one.0 == slot).map(|one| &one.2);
        match (class(one)?, class(other)?) {
            (a, b) if a == b => Some(Nearness::Same),
            _ => Some(Nearness::Within(self.score_limit())),
        }
    }
}

/// The request to score a text, with all else as in the request that it comes from.
fn scored(request: &Request, text: Vec<u32>) -> Option<Request> {
    let mut made = request.clone();
    let Task::Generate(generate) = &mut made.task else { return None };
    generate.sampling.tokens_max = 0;
    generate.prompt_logprobs = Some(0);
    generate.constraint = None;
    made.prompt = text;
    Some(made)
}

/// The scores of the last tokens; NaN for those that are missing, which agree with nothing.
fn tail(scores: &[f32], count: usize) -> Vec<f32> {
    let missing = count.saturating_sub(scores.len());
    let rest = &scores[scores.len() - (count - missing)..];
    std::iter::repeat_n(f32::NAN, missing).chain(rest.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::Generate;

    #[test]
    fn the_share_of_requests_that_is_audited_is_the_one_asked_for() {
        let chosen = Chosen::default();
        let (sender, _receiver) = unbounded_channel();
        let generate = Generate {
            sampling: pontoon_models::SamplingSettings::default(),
            choice: 0,
            end_tokens: Vec::new(),
            tokens_min: 0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
            prompt_logprobs: None,
            constraint: None,
        };
        let request = Request { prompt: vec![1], adapter: None, task: Task::Generate(generate) };
        let ticket = Ticket::new(request, 0, sender);
        for _ in 0..1000 {
            chosen.consider(&ticket, 0.02);
        }
        assert_eq!(chosen.lock().len(), 20);
    }

    #[test]
    fn missing_scores_agree_with_nothing() {
        assert_eq!(tail(&[1.0, 2.0, 3.0], 2), [2.0, 3.0]);
        assert!(tail(&[3.0], 2)[0].is_nan());
    }
}
