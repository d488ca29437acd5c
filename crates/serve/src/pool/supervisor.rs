//! Watches the devices: lets them in after the probe, moves requests away from those that end or
//! hang, and opens them again.
//!
//! Read next: `mod.rs`.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use pontoon_ops::DeviceErrorKind;

use super::agreement::{Reference, compare, finite, spread};
use super::audit::Audit;
use super::events::{EventKind, Happened};
use super::{Notice, Notices, Phase, Shared};
use crate::engine::worker::{Command, Worker};
use crate::error::ServeError;

/// How often hanging devices and those to be opened again are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Starts in a row that may fail before a device is left alone: its trouble is not passing.
const FAILURES_MAX: u32 = 1000;
/// A hang is declared this much after the backend's own deadline should have ended the step.
const HANG_GRACE: Duration = Duration::from_secs(1);

impl Shared {
    /// Waits until one device serves, or all have failed.
    pub(super) fn wait_for_first(self: &Arc<Self>, notices: &Notices) -> Result<(), ServeError> {
        let mut reasons = Vec::new();
        while reasons.len() < self.slots.len() {
            match notices.recv() {
                Ok(Notice::Ready { slot, generation, worker }) => {
                    match self.let_in(slot, generation, worker) {
                        Ok(()) => return Ok(()),
                        Err(reason) => reasons.push(reason),
                    }
                }
                Ok(Notice::Ended { slot, generation, error }) => {
                    if self.slots[slot].lock().generation == generation {
                        let reason = error.map_or_else(|| "it ended".to_owned(), |e| e.to_string());
                        self.take_out(slot, EventKind::Crash, &reason, None);
                        reasons.push(reason);
                    }
                }
                Ok(Notice::Stop) | Err(_) => break,
            }
        }
        Err(ServeError::NoDevice { reasons: reasons.join("; ") })
    }

    pub(super) fn supervise(self: Arc<Self>, notices: &Notices) {
        let mut audits: Vec<Audit> = Vec::new();
        loop {
            let notice = notices.recv_timeout(LOOK_EVERY);
            // Workers end because they were told to, which is no failure of theirs.
            if self.stopping.load(Relaxed) {
                return;
            }
            match notice {
                Ok(Notice::Ready { slot, generation, worker }) => {
                    // One that is refused has been told of.
                    let _ = self.let_in(slot, generation, worker);
                }
                Ok(Notice::Ended { slot, generation, error }) => {
                    self.ended(slot, generation, error.as_ref());
                }
                Ok(Notice::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.look(Instant::now());
            self.audit(&mut audits);
        }
    }

    /// Lets a device serve if it agrees with the first; an error says how it does not.
    fn let_in(&self, slot: usize, generation: u64, worker: Worker) -> Result<(), String> {
        let device = self.slots[slot].name.clone();
        if let Err(evidence) = self.agrees(&device, &worker) {
            let _ = worker.commands.send(Command::Stop);
            let error = ServeError::Disagrees { device, evidence };
            self.slots[slot].lock().generation += 1;
            self.take_out(slot, EventKind::Refused, &error.to_string(), None);
            return Err(error.to_string());
        }
        {
            let mut state = self.slots[slot].lock();
            if state.generation != generation {
                return Ok(());
            }
            state.joined = self.joins.fetch_add(1, Relaxed);
            state.phase = Phase::Serving(worker);
        }
        let kind = EventKind::Joined;
        self.events.tell(Happened { kind, device: &device, cause: "", action: "serves", moved: 0 });
        self.unpark();
        Ok(())
    }

    /// Gives requests that waited for any device to those that serve.
    fn unpark(&self) {
        let parked = {
            let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *parked)
        };
        parked.into_iter().filter(|ticket| ticket.open()).for_each(|ticket| self.dispatch(ticket));
    }

    /// Compares what it computed of the probe with the first device's; the first one sets it.
    fn agrees(&self, device: &str, worker: &Worker) -> Result<(), String> {
        let mut reference = self.reference.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reference) = &*reference {
            let limits = &*self.parts.limits;
            return compare(reference, &worker.numeric_class, &worker.probe, limits);
        }
        if !finite(&worker.probe) {
            return Err("it scores a probe as NaN; the weights or the device are bad".to_owned());
        }
        *reference = Some(Reference {
            device: device.to_owned(),
            class: worker.numeric_class.to_string(),
            probe: worker.probe.clone(),
        });
        Ok(())
    }

    /// How far two classes' scores of a token may be apart.
    pub(super) fn score_limit(&self) -> f64 {
        let reference = self.reference.lock().unwrap_or_else(PoisonError::into_inner);
        let spread = reference.as_ref().map_or(0.0, |reference| spread(&reference.probe));
        2.0 * (self.parts.limits)(spread).worst
    }

    /// Takes a device out for good that computed something wrong.
    pub(super) fn evict(&self, slot: usize, generation: u64, evidence: &str) {
        {
            let mut state = self.slots[slot].lock();
            if state.generation != generation {
                return;
            }
            state.generation += 1;
            state.drifts += 1;
            if let Phase::Serving(worker) = &state.phase {
                // One that has ended needs no telling.
                let _ = worker.commands.send(Command::Stop);
            }
        }
        self.take_out(slot, EventKind::Corrupt, evidence, None);
    }

    fn ended(self: &Arc<Self>, slot: usize, generation: u64, error: Option<&ServeError>) {
        if self.slots[slot].lock().generation != generation {
            return;
        }
        let reason = error.map_or_else(|| "its thread panicked".to_owned(), ToString::to_string);
        // What cannot work will not work later either.
        let hopeless =
            matches!(error.and_then(ServeError::kind), Some(DeviceErrorKind::Unsupported));
        let retry = (!hopeless).then(|| Instant::now() + self.parts.rejoin_after);
        self.take_out(slot, EventKind::Crash, &reason, retry);
    }

    /// Marks a device as down and moves what it ran.
    fn take_out(&self, slot: usize, kind: EventKind, reason: &str, retry_at: Option<Instant>) {
        let (tickets, action) = {
            let mut state = self.slots[slot].lock();
            state.failures += 1;
            let retry_at = retry_at.filter(|_| state.failures < FAILURES_MAX);
            let action = if retry_at.is_some() { "to be opened again" } else { "left out" };
            state.phase = Phase::Down { reason: reason.to_owned(), retry_at };
            (std::mem::take(&mut state.tickets), action)
        };
        let moved = tickets.iter().filter(|ticket| ticket.open()).count();
        let device = &self.slots[slot].name;
        self.events.tell(Happened { kind, device, cause: reason, action, moved });
        self.move_requests(tickets);
    }

    /// Declares hangs and opens devices again whose time has come.
    fn look(self: &Arc<Self>, now: Instant) {
        // One may have been parked at the very moment when a device came in.
        self.unpark();
        let hang_after = self.parts.options.step_deadline + HANG_GRACE;
        for slot in 0..self.slots.len() {
            let state = self.slots[slot].lock();
            match &state.phase {
                Phase::Serving(worker) => {
                    let since = worker.busy_since();
                    if since.is_some_and(|at| now.saturating_duration_since(at) > hang_after) {
                        drop(state);
                        // Its thread may come back one day; nothing it says counts then.
                        self.slots[slot].lock().generation += 1;
                        let reason = format!("a step has taken more than {hang_after:?}");
                        let retry = Some(now + self.parts.rejoin_after);
                        self.take_out(slot, EventKind::Hang, &reason, retry);
                    }
                }
                Phase::Down { retry_at: Some(at), .. } if now >= *at => {
                    drop(state);
                    self.launch(slot);
                }
                Phase::Starting | Phase::Down { .. } => {}
            }
        }
    }
}
