//! Watches the devices: lets them in after the probe, moves requests away from those that end or
//! hang, and opens them again.
//!
//! Read next: `mod.rs`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use pontoon_ops::DeviceErrorKind;

use super::{Notice, Notices, Phase, Shared};
use crate::engine::worker::{Command, Worker};
use crate::error::ServeError;

/// How often hanging devices and those to be opened again are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Starts in a row that may fail before a device is left alone: its trouble is not passing.
const FAILURES_MAX: u32 = 1000;
/// How far two classes of devices may differ in the probe's log-probabilities: the rounding of
/// bf16 through some dozens of layers stays below it, a wrong kernel does not.
const PROBE_LIMIT: f32 = 0.25;
/// A hang is declared this much after the backend's own deadline should have ended the step.
const HANG_GRACE: Duration = Duration::from_secs(1);

impl Shared {
    /// Waits until one device serves, or all have failed.
    pub(super) fn wait_for_first(self: &Arc<Self>, notices: &Notices) -> Result<(), ServeError> {
        let mut reasons = Vec::new();
        while reasons.len() < self.slots.len() {
            match notices.recv() {
                Ok(Notice::Ready { slot, generation, worker }) => {
                    self.let_in(slot, generation, worker);
                    return Ok(());
                }
                Ok(Notice::Ended { slot, error, .. }) => {
                    let reason = error.map_or_else(|| "it ended".to_owned(), |e| e.to_string());
                    self.take_out(slot, &reason, None);
                    reasons.push(reason);
                }
                Ok(Notice::Stop) | Err(_) => break,
            }
        }
        Err(ServeError::NoDevice { reasons: reasons.join("; ") })
    }

    pub(super) fn supervise(self: Arc<Self>, notices: &Notices) {
        loop {
            match notices.recv_timeout(LOOK_EVERY) {
                Ok(Notice::Ready { slot, generation, worker }) => {
                    self.let_in(slot, generation, worker);
                }
                Ok(Notice::Ended { slot, generation, error }) => {
                    self.ended(slot, generation, error.as_ref());
                }
                Ok(Notice::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.stopping.load(Relaxed) {
                return;
            }
            self.look(Instant::now());
        }
    }

    /// Lets a device serve if it agrees with the others.
    fn let_in(self: &Arc<Self>, slot: usize, generation: u64, worker: Worker) {
        if let Err(evidence) = self.agrees(&worker) {
            let _ = worker.commands.send(Command::Stop);
            let device = self.slots[slot].name.clone();
            let error = ServeError::Disagrees { device, evidence };
            eprintln!("{error}");
            self.slots[slot].lock().generation += 1;
            self.take_out(slot, &error.to_string(), None);
            return;
        }
        {
            let mut state = self.slots[slot].lock();
            if state.generation != generation {
                return;
            }
            state.phase = Phase::Serving(worker);
        }
        eprintln!("device `{}` serves", self.slots[slot].name);
        let parked = {
            let mut parked = self.parked.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::take(&mut *parked)
        };
        parked.into_iter().for_each(|ticket| self.dispatch(ticket));
    }

    /// Compares the probe's scores with the first device's; the first one sets them.
    fn agrees(&self, worker: &Worker) -> Result<(), String> {
        let mut reference =
            self.reference.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some((class, scores)) = &*reference else {
            let finite = worker.probe.iter().all(|score| score.is_finite());
            if finite {
                *reference = Some((Arc::clone(&worker.numeric_class), Arc::clone(&worker.probe)));
                return Ok(());
            }
            return Err("it scores a probe as NaN; the weights or the device are bad".to_owned());
        };
        let same_bits = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
        if *class == worker.numeric_class {
            return match scores.iter().zip(&*worker.probe).position(|pair| !same_bits(pair)) {
                None => Ok(()),
                Some(at) => Err(format!(
                    "token {at} of the probe scores {} instead of {} on the same kind of device",
                    worker.probe[at], scores[at]
                )),
            };
        }
        let far = |(a, b): (&f32, &f32)| (a - b).abs();
        let worst = scores.iter().zip(&*worker.probe).map(far).fold(0.0_f32, f32::max);
        // A comparison with NaN is false, so it is written to let only the good through.
        if worst <= PROBE_LIMIT && worker.probe.iter().all(|score| score.is_finite()) {
            return Ok(());
        }
        Err(format!("the probe's log-probabilities differ by {worst}, more than {PROBE_LIMIT}"))
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
        self.take_out(slot, &reason, retry);
    }

    /// Marks a device as down and moves what it ran.
    fn take_out(&self, slot: usize, reason: &str, retry_at: Option<Instant>) {
        eprintln!("device `{}` is down: {reason}", self.slots[slot].name);
        let tickets = {
            let mut state = self.slots[slot].lock();
            state.failures += 1;
            let retry_at = retry_at.filter(|_| state.failures < FAILURES_MAX);
            state.phase = Phase::Down { reason: reason.to_owned(), retry_at };
            std::mem::take(&mut state.tickets)
        };
        self.move_requests(tickets);
    }

    /// Declares hangs and opens devices again whose time has come.
    fn look(self: &Arc<Self>, now: Instant) {
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
                        self.take_out(slot, &reason, Some(now + self.parts.rejoin_after));
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
