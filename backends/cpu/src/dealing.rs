//! Tasks dealt out to threads in shares of neighbours.
//!
//! A thread takes the tasks of its own share first, in order, and then what others have left of
//! theirs. Runs over the same rows deal them out alike, so a thread finds in its own cache what it
//! left there in the run before; where two threads have no cache in common that matters most. Read
//! next: `pool.rs`, whose runs are dealt out like this.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// On cache lines of its own (two, for the adjacent-line prefetcher).
#[repr(align(128))]
pub(crate) struct Padded<T>(pub T);

/// The shares of a run: how many tasks of each are taken.
pub(crate) struct Dealing(Vec<Padded<AtomicUsize>>);

/// The part of `all` tasks in a row that is the share of an index.
pub(crate) fn share(all: usize, shares: usize, index: usize) -> Range<usize> {
    index * all / shares..(index + 1) * all / shares
}

impl Dealing {
    /// So many shares, of which nothing is taken.
    pub fn new(count: usize) -> Dealing {
        Dealing((0..count).map(|_| Padded(AtomicUsize::new(0))).collect())
    }

    /// Begins anew; the caller sees to it that nobody takes tasks meanwhile.
    pub fn restart(&self) {
        self.0.iter().for_each(|taken| taken.0.store(0, Ordering::Relaxed));
    }

    /// Lets nobody take another task.
    pub fn stop(&self) {
        self.0.iter().for_each(|taken| taken.0.store(usize::MAX / 2, Ordering::Relaxed));
    }

    /// Does tasks until none is left, beginning with those of a share: `task` is told the share and
    /// the task's place in it, of which there are `count`.
    #[inline]
    pub fn take(
        &self,
        first: usize,
        count: impl Fn(usize) -> usize,
        mut task: impl FnMut(usize, usize),
    ) {
        let shares = self.0.len();
        for share in (0..shares).map(|turn| (first + turn) % shares) {
            let (taken, count) = (&self.0[share].0, count(share));
            // Looking first spares the others' counters.
            while taken.load(Ordering::Relaxed) < count {
                let place = taken.fetch_add(1, Ordering::Relaxed);
                if place >= count {
                    break;
                }
                task(share, place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_neighbours_and_hold_every_task_once() {
        for (all, shares) in [(0, 3), (2, 3), (7, 3), (22, 2), (1000, 7)] {
            let dealt: Vec<usize> = (0..shares).flat_map(|of| share(all, shares, of)).collect();
            assert_eq!(dealt, (0..all).collect::<Vec<_>>(), "{all} in {shares}");
        }
    }

    #[test]
    fn whoever_has_done_its_own_share_goes_on_with_the_next_one_s() {
        let dealing = Dealing::new(3);
        let mut seen = Vec::new();
        dealing.take(1, |share| share + 1, |share, place| seen.push((share, place)));
        assert_eq!(seen, [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (0, 0)]);
        dealing.take(0, |_| 1, |_, _| panic!("all tasks are taken"));
        dealing.restart();
        let mut count = 0;
        dealing.take(
            2,
            |_| 5,
            |_, _| {
                count += 1;
                if count == 2 {
                    dealing.stop();
                }
            },
        );
        assert_eq!(count, 2);
    }
}
