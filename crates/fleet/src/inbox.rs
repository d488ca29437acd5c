//! What a driver hands to the supervisor next: what was said, or that time has passed.
//!
//! Hundreds of workers always have something to say; silence must be looked for all the same, and
//! only after what was already said has been heard. Read next: `supervisor.rs`.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::supervisor::Input;
use crate::world::Clock;

/// How often silence is looked for.
const TICK: Duration = Duration::from_millis(25);
/// A driver that was away for so long was itself stopped, with or without its workers: nothing it
/// does between two inputs takes this long unless all of the machine waits too.
const STALL: Duration = Duration::from_millis(700);
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
    /// When it was last asked or answered.
    awake: Instant,
}

impl<'a> Inbox<'a> {
    /// An inbox of what arrives.
    pub fn new(arrived: &'a Receiver<Input>, clock: &'a dyn Clock) -> Inbox<'a> {
        Inbox { clock, arrived, ticked: clock.now(), heard: 0, awake: clock.now() }
    }

    /// Waits for the next input, or for the time to look for silence.
    pub fn next_input(&mut self) -> Input {
        if self.has_stalled() {
            return Input::Stalled;
        }
        if self.heard < INPUTS {
            let wait = TICK.saturating_sub(self.awake.duration_since(self.ticked));
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
        // Silence is not looked for before it is known whether this process was there to hear.
        if self.has_stalled() {
            return Input::Stalled;
        }
        (self.ticked, self.heard) = (self.awake, 0);
        Input::Tick
    }

    /// Whether it was away for long since this was last asked.
    fn has_stalled(&mut self) -> bool {
        let before = std::mem::replace(&mut self.awake, self.clock.now());
        self.awake.saturating_duration_since(before) >= STALL
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

    #[test]
    fn a_driver_that_stood_still_says_so_before_it_looks_for_silence() {
        let clock = Hurried(Instant::now(), 0.into());
        let (to, arrived) = mpsc::channel();
        let mut inbox = Inbox::new(&arrived, &clock);
        assert!(matches!(inbox.next_input(), Input::Tick));
        clock.1.fetch_add(1000, std::sync::atomic::Ordering::Relaxed);
        to.send(saved(1)).unwrap();
        assert!(matches!(inbox.next_input(), Input::Stalled));
        assert!(matches!(inbox.next_input(), Input::Saved { step: 1, .. }));
        assert!(matches!(inbox.next_input(), Input::Tick));
    }
}
