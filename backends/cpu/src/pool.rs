//! A fork/join pool for loops of a few microseconds: workers spin for a while before they sleep.
//!
//! Threads have shares of a run's tasks (`dealing.rs`) but take others' too, so a task must write
//! only its own part of the result (`ffi::Parts`, `ffi::Tiles`). There are no futures and no
//! priorities.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};

use crate::dealing::{Dealing, Padded, share};
use crate::ffi::JobSlot;
use crate::soon::{Cursor, Soon};

/// Polls before an idle worker sleeps: roughly 0.2 ms, longer than the serial work between two ops
/// of a decode step, shorter than anything a user would notice on the power meter.
const POLLS_BEFORE_SLEEP: usize = 6_000;

/// Polls before a thread that waits for another's task gives its core away: a worker that was
/// descheduled in the middle of a task may need it.
const POLLS_BEFORE_YIELD: usize = 2_000;

/// What a thread that waits for another's task does after so many polls.
pub(crate) fn pause(polls: usize) {
    if polls < POLLS_BEFORE_YIELD {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

thread_local! {
    /// Set while this thread runs a task, so that a nested run is done inline.
    static INSIDE_A_TASK: Cell<bool> = const { Cell::new(false) };
    /// Whose share this thread takes first: a worker's own, the caller's for any other thread.
    static SHARE: Cell<usize> = const { Cell::new(0) };
}

struct Shared {
    slot: Padded<JobSlot>,
    soon: Padded<Soon>,
    sleeping: Vec<AtomicBool>,
    stop: AtomicBool,
    /// Of the tasks of the run that is on.
    dealing: Dealing,
}

/// Tasks of one kind, to be run beside those of others.
pub struct Tasks<'a> {
    count: usize,
    task: Box<dyn Fn(usize) + Sync + 'a>,
}

impl<'a> Tasks<'a> {
    /// `task(0)`, ..., `task(count - 1)`.
    pub fn new(count: usize, task: impl Fn(usize) + Sync + 'a) -> Tasks<'a> {
        Tasks { count, task: Box::new(task) }
    }

    /// Nothing to do.
    pub fn none() -> Tasks<'a> {
        Tasks::new(0, |_| {})
    }
}

/// A fixed set of worker threads plus the calling thread.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held while a job runs: a second caller waits.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl Pool {
    /// Starts `threads - 1` workers; the caller of [`Pool::run`] is the last one.
    ///
    /// Panics if `threads` is zero or the system refuses a thread.
    pub fn new(threads: usize) -> Self {
        assert!(threads > 0, "a pool needs at least one thread");
        let shared = Arc::new(Shared {
            slot: Padded(JobSlot::new()),
            soon: Padded(Soon::default()),
            sleeping: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            dealing: Dealing::new(threads),
        });
        let start = |index: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("cpu-worker-{index}"))
                .spawn(move || work(&shared, index))
                .expect("the system has room for the configured number of threads")
        };
        let workers: Vec<_> = (0..threads - 1).map(start).collect();
        let handles = workers.iter().map(|worker| worker.thread().clone()).collect();
        Self { shared, turn: Mutex::new(()), workers, handles }
    }

    /// Threads that take part in a run, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// What the next large product will read.
    pub(crate) fn soon(&self) -> &Soon {
        &self.shared.soon.0
    }

    /// Runs `task(0)`, ..., `task(tasks - 1)`, each once, on any thread, and returns when all are
    /// done.
    ///
    /// A run from inside a task is done inline. If a task panics, the rest may or may not run and
    /// the panic continues in the caller.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, task: F) {
        let part = |of: usize| share(tasks, self.threads(), of);
        self.run_shares(|of| part(of).len(), |of, place| task(part(of).start + place));
    }

    /// The same where whoever is free takes the next task, in order: what is streamed from memory
    /// is best read by all threads at one place.
    pub fn run_in_turn<F: Fn(usize) + Sync>(&self, tasks: usize, task: F) {
        self.run_shares(|of| if of == 0 { tasks } else { 0 }, |_, place| task(place));
    }

    /// Runs all tasks of several kinds as one [`Pool::run`]: of each share, the first kind's first.
    pub fn run_all(&self, kinds: &[Tasks<'_>]) {
        let part = |kind: &Tasks<'_>, of: usize| share(kind.count, self.threads(), of);
        let count = |of: usize| kinds.iter().map(|kind| part(kind, of).len()).sum();
        self.run_shares(count, |of, mut place| {
            for kind in kinds {
                let mine = part(kind, of);
                if place < mine.len() {
                    return (kind.task)(mine.start + place);
                }
                place -= mine.len();
            }
        });
    }

    /// Runs the tasks of all shares, of which each thread has one: `task` is told the share and the
    /// task's place in it, of which there are `count`.
    fn run_shares(
        &self,
        count: impl Fn(usize) -> usize + Sync,
        task: impl Fn(usize, usize) + Sync,
    ) {
        let shares = 0..self.threads();
        let is_alone = self.workers.is_empty() || INSIDE_A_TASK.get();
        if is_alone || shares.clone().map(&count).sum::<usize>() <= 1 {
            for of in shares {
                (0..count(of)).for_each(|place| task(of, place));
            }
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let dealing = &self.shared.dealing;
        dealing.restart();
        let panic = Mutex::new(None);
        let drain = || {
            let before = INSIDE_A_TASK.replace(true);
            let result =
                catch_unwind(AssertUnwindSafe(|| dealing.take(SHARE.get(), &count, &task)));
            INSIDE_A_TASK.set(before);
            if let Err(payload) = result {
                dealing.stop();
                *panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
            }
        };
        let own = || {
            self.wake();
            drain();
        };
        self.shared.slot.0.offer(&drain, own, pause);
        let payload = panic.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }

    /// Wakes the workers that sleep. The job was published before, in the same total order as the
    /// flags, so a worker either sees the job after setting its flag or is seen here.
    fn wake(&self) {
        for (sleeping, handle) in self.shared.sleeping.iter().zip(&self.handles) {
            if sleeping.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for handle in &self.handles {
            handle.unpark();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so an error here has been reported before.
            let _ = worker.join();
        }
    }
}

/// A worker's life: wait for a job that it has not done yet, join it, repeat.
fn work(shared: &Shared, index: usize) {
    SHARE.set(index + 1);
    let mut done = 0;
    let mut polls = 0;
    let mut cursor = Cursor::default();
    while !shared.stop.load(Ordering::SeqCst) {
        if let Some(number) = shared.slot.0.open_job()
            && number != done
        {
            shared.slot.0.join(number);
            done = number;
            polls = 0;
            continue;
        }
        if polls < POLLS_BEFORE_SLEEP {
            polls += 1;
            cursor.advance(&shared.soon.0, index + 1);
            std::hint::spin_loop();
            continue;
        }
        shared.sleeping[index].store(true, Ordering::SeqCst);
        let idle = shared.slot.0.open_job().is_none_or(|number| number == done);
        if idle && !shared.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        shared.sleeping[index].store(false, Ordering::SeqCst);
        polls = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::ffi::Parts;

    #[test]
    fn every_task_runs_once_at_any_thread_count() {
        for threads in 1..5 {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100, 1000] {
                let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_runs_write_disjoint_parts() {
        let pool = Pool::new(3);
        let mut values = vec![0u32; 1000];
        for round in 1..2000 {
            let parts = Parts::new(&mut values, 100);
            pool.run(parts.count(), |task| parts.take(task).iter_mut().for_each(|v| *v += 1));
            assert_eq!(values[round % 1000], round as u32);
        }
        assert!(values.iter().all(|&value| value == 1999));
    }

    #[test]
    fn tasks_of_several_kinds_run_once_each() {
        let pool = Pool::new(2);
        let counts: Vec<_> = (0..10).map(|_| AtomicUsize::new(0)).collect();
        let kind = |first: usize, count: usize| {
            let counts = &counts;
            Tasks::new(count, move |task| {
                assert!(task < count, "task {task} of {count}");
                counts[first + task].fetch_add(1, Ordering::Relaxed);
            })
        };
        pool.run_all(&[kind(0, 3), Tasks::none(), kind(3, 1), kind(4, 6)]);
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        pool.run_all(&[]);
    }

    #[test]
    fn nested_run_is_done_inline() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        pool.run(4, |_| {
            pool.run(5, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.load(Ordering::Relaxed), 20);
    }

    #[test]
    fn panic_in_a_task_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, |task| assert!(task != 40, "task forty"));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(10, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn two_callers_take_turns() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(3, |_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 1200);
    }

    #[test]
    #[should_panic(expected = "taken twice")]
    fn a_part_cannot_be_taken_twice() {
        let mut values = [0u8; 4];
        let parts = Parts::new(&mut values, 2);
        parts.take(1);
        parts.take(1);
    }
}
