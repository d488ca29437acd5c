//! How many requests are being answered: no more than there is room for, and none once the server
//! is to stop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The places.
#[derive(Default)]
pub struct Seats {
    state: Mutex<State>,
    emptied: Notify,
}

#[derive(Default)]
struct State {
    taken: usize,
    stopping: bool,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The server is to stop.
    Stopping,
    /// All are taken.
    Full,
}

/// A place, given back when it is dropped.
pub struct Seat {
    seats: Arc<Seats>,
}

impl Seats {
    /// Takes one of so many places.
    pub fn take(self: &Arc<Self>, most: usize) -> Result<Seat, Refused> {
        let mut state = self.lock();
        if state.stopping {
            return Err(Refused::Stopping);
        }
        if state.taken >= most {
            return Err(Refused::Full);
        }
        state.taken += 1;
        Ok(Seat { seats: Arc::clone(self) })
    }

    /// Gives no more places.
    pub fn stop(&self) {
        self.lock().stopping = true;
    }

    /// Whether no more places are given.
    pub fn stopping(&self) -> bool {
        self.lock().stopping
    }

    /// Waits until all places are free.
    pub async fn empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.lock().taken == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.seats.lock();
        state.taken -= 1;
        if state.taken == 0 {
            self.seats.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back_and_none_is_given_when_stopping() {
        let seats = Arc::new(Seats::default());
        let first = seats.take(2).ok();
        let second = seats.take(2).ok();
        assert_eq!(seats.take(2).err(), Some(Refused::Full));
        drop(first);
        assert!(seats.take(2).is_ok());
        seats.stop();
        assert_eq!(seats.take(2).err(), Some(Refused::Stopping));
        drop(second);
        assert_eq!(seats.lock().taken, 0);
    }
}
