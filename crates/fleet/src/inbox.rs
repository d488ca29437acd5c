//! What a driver hands to the supervisor next: what was said, or that time has passed.
//!
//! Hundreds of workers always have something to say; silence must be looked for all the same, and
//! only after what was already said has been heard. Read next: `supervisor.rs`.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::supervisor::Input;
use crate::world::Clock;

/// How often silence is looked for.
const TICK: Duration = Duration::from_millis(10);
/// So many inputs in a row are heard before it is looked for in between: beats of a thousand
/// workers in a quarter of a second.
const INPUTS: u32 = 4096;

/// Inputs in the order in which they are to be handed on.
pub struct Inbox<'a> {
    clock: &'a dyn Clock,
    arrived: &'a Receiver<Input>,
    ticked: Instant,
    /// Inputs since then.
    heard: u32,
}

impl<'a> Inbox<'a> {
    /// An inbox of what arrives.
    pub fn new(arrived: &'a Receiver<Input>, clock: &'a dyn Clock) -> Inbox<'a> {
        Inbox { clock, arrived, ticked: clock.now(), heard: 0 }
    }

    /// Waits for the next input, or for the time to look for silence.
    pub fn next_input(&mut self) -> Input {
        if self.heard < INPUTS {
            let wait = TICK.saturating_sub(self.clock.now().duration_since(self.ticked));
            let next = match self.arrived.try_recv() {
                // The channel stays open: whoever drives holds an end of it.
                Err(_) if !wait.is_zero() => self.arrived.recv_timeout(wait).ok(),
                other => other.ok(),
            };
            if let Some(input) = next {
                self.heard += 1;
                return input;
            }
        }
        (self.ticked, self.heard) = (self.clock.now(), 0);
        Input::Tick
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A clock that has always just passed the next tick.
    struct Hurried(Instant, std::sync::atomic::AtomicU32);

    impl Clock for Hurried {
        fn now(&self) -> Instant {
            self.0 + TICK * self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
        }

        fn unix_time(&self) -> Duration {
            Duration::ZERO
        }
    }

    fn saved(step: u64) -> Input {
        Input::Saved { step, folder: String::new() }
    }

    #[test]
    fn silence_is_looked_for_after_what_was_said_and_however_much_is_said() {
        let clock = Hurried(Instant::now(), 0.into());
        let (to, arrived) = mpsc::channel();
        let mut inbox = Inbox::new(&arrived, &clock);
        for step in 0..3 {
            to.send(saved(step)).unwrap();
        }
        for want in 0..3 {
            assert!(matches!(inbox.next_input(), Input::Saved { step, .. } if step == want));
        }
        assert!(matches!(inbox.next_input(), Input::Tick));
        for step in 0..3 * u64::from(INPUTS) {
            to.send(saved(step)).unwrap();
        }
        let ticks = (0..2 * INPUTS).filter(|_| matches!(inbox.next_input(), Input::Tick)).count();
        assert_eq!(ticks, 1);
    }
}
