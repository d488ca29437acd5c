//! What happens to devices, told three ways: a line in the log, a record for whoever asks, and a
//! call of whoever runs the server.
//!
//! Read next: `supervisor.rs`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Events kept for those who ask; the oldest goes first.
const KEPT_MAX: usize = 256;

/// The kinds of events, named as in a run folder's `events.jsonl` where they are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A device agrees with the others and serves.
    Joined,
    /// A device did not agree when it wanted to serve.
    Refused,
    /// A device failed or its thread ended.
    Crash,
    /// A device did not come back from a step.
    Hang,
    /// A device computed something wrong while it served.
    Corrupt,
}

impl EventKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Joined => "joined",
            EventKind::Refused => "refused",
            EventKind::Crash => "crash",
            EventKind::Hang => "hang",
            EventKind::Corrupt => "corrupt",
        }
    }
}

/// Something that happened to a device.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolEvent {
    /// Seconds since 1970.
    pub time: f64,
    /// What happened.
    pub kind: EventKind,
    /// The device's name.
    pub device: String,
    /// Why, with the numbers that show it; empty if nothing is wrong.
    pub cause: String,
    /// What was done about it.
    pub action: &'static str,
    /// Requests that moved to other devices.
    pub moved: usize,
}

/// Is told every event.
pub type OnEvent = dyn Fn(&PoolEvent) + Send + Sync;

/// The last events.
#[derive(Default)]
pub(super) struct Events {
    kept: Mutex<VecDeque<PoolEvent>>,
    listener: Option<Arc<OnEvent>>,
}

impl Events {
    pub(super) fn new(listener: Option<Arc<OnEvent>>) -> Events {
        Events { kept: Mutex::default(), listener }
    }

    /// Tells what happened to a device.
    pub(super) fn tell(&self, happened: Happened<'_>) {
        let Happened { kind, device, cause, action, moved } = happened;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time = since.map_or(0.0, |since| since.as_secs_f64());
        match kind {
            EventKind::Joined => eprintln!("device `{device}` serves"),
            _ => {
                let name = kind.name();
                eprintln!("device `{device}`: {name}: {cause}; {action}, {moved} requests moved");
            }
        }
        let (device, cause) = (device.to_owned(), cause.to_owned());
        let event = PoolEvent { time, kind, device, cause, action, moved };
        if let Some(listener) = &self.listener {
            listener(&event);
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back(event);
        if kept.len() > KEPT_MAX {
            kept.pop_front();
        }
    }

    /// The last events, oldest first.
    pub(super) fn list(&self) -> Vec<PoolEvent> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().cloned().collect()
    }
}

/// An event without its time.
pub(super) struct Happened<'a> {
    pub kind: EventKind,
    pub device: &'a str,
    pub cause: &'a str,
    pub action: &'static str,
    pub moved: usize,
}
