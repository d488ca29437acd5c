//! Streams and events: queues that run behind the host's back, in order.
//!
//! Each stream has a thread. Tasks that touch device memory hold the device's engine, so a device
//! runs one at a time; waiting for events and peers does not hold it. What an asynchronous copy
//! brings to the host lands there only when the host waits: who reads earlier sees what was there
//! before, every time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::hazards::Clock;
use super::{Device, Engine};
use crate::abi::pointers::Host;
use crate::code;
use crate::failure::{Done, Failure};

/// Waits for others; asks now and then whether the task has been called off.
type Meeting = Box<dyn FnOnce(&dyn Fn() -> bool) -> Done + Send>;

/// What a task does.
pub enum Work {
    /// Computes or copies, with the device's engine.
    Run(Box<dyn FnOnce(&mut Engine) -> Done + Send>),
    /// Waits for others, without the engine, until it is called off.
    Meet(Meeting),
    /// Marks an event as reached.
    Record(Arc<Event>, u64),
    /// Waits until an event is reached.
    Wait(Arc<Event>, u64),
    /// Never ends.
    Hang,
}

/// Bytes on their way to the host.
pub struct Landing {
    /// Where they go.
    pub to: Host,
    /// The bytes, once the copy has run.
    pub bytes: Arc<Mutex<Vec<u8>>>,
}

/// A check to make when the host has waited for a task.
pub type Afterwards = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Work>,
    queued: u64,
    finished: u64,
    /// Grows when tasks are taken back, so that the thread does not count one of them.
    epoch: u64,
    failure: Option<Failure>,
    /// Told to those who wait while tasks are taken back.
    aborted: Option<i32>,
    stuck: bool,
    stop: bool,
    landings: Vec<(u64, Landing)>,
    afterwards: Vec<(u64, Afterwards)>,
}

/// One stream.
pub struct Stream {
    /// Its handle.
    pub id: u64,
    /// The context it belongs to.
    pub context: u64,
    /// Its device.
    pub device: Arc<Device>,
    queue: Mutex<Queue>,
    /// Told when there is work.
    work: Condvar,
    /// Told when work is done or taken back.
    done: Condvar,
    /// Whether tasks after a failed one are dropped.
    pub stop_on_failure: std::sync::atomic::AtomicBool,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Everything is done.
    Done,
    /// Time ran out.
    TimedOut,
}

impl Stream {
    /// Starts a stream.
    pub fn start(id: u64, context: u64, device: Arc<Device>) -> Done<Arc<Stream>> {
        let stream = Arc::new(Stream {
            id,
            context,
            device,
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
            stop_on_failure: Default::default(),
        });
        let worker = Arc::clone(&stream);
        let named = std::thread::Builder::new().name(format!("emu-stream-{id}"));
        let started = named.spawn(move || worker.run());
        started.map_err(|error| {
            Failure::new(code::NO_STREAM, format!("the host has no thread left: {error}"))
        })?;
        Ok(stream)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a task; gives its number.
    pub fn push(&self, work: Work) -> u64 {
        let mut queue = self.queue();
        queue.tasks.push_back(work);
        queue.queued += 1;
        self.work.notify_one();
        queue.queued
    }

    /// Queues a task whose bytes land on the host when it waits.
    pub fn push_landing(&self, work: Work, landing: Landing) {
        let mut queue = self.queue();
        queue.tasks.push_back(work);
        queue.queued += 1;
        let number = queue.queued;
        queue.landings.push((number, landing));
        self.work.notify_one();
    }

    /// Queues a task and a check to make when the host has waited for it.
    pub fn push_checked(&self, work: Work, check: Afterwards) {
        let mut queue = self.queue();
        queue.tasks.push_back(work);
        queue.queued += 1;
        let number = queue.queued;
        queue.afterwards.push((number, check));
        self.work.notify_one();
    }

    /// Whether everything queued has run.
    pub fn is_idle(&self) -> bool {
        let queue = self.queue();
        queue.finished == queue.queued
    }

    /// Waits until everything queued so far has run. A failed task's code is given once.
    pub fn wait(&self, limit: Option<Duration>) -> Done<Waited> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut queue = self.queue();
        let (target, epoch) = (queue.queued, queue.epoch);
        while queue.finished < target && queue.epoch == epoch && queue.failure.is_none() {
            queue = match deadline {
                None => self.done.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Waited::TimedOut);
                    }
                    let waited = self.done.wait_timeout(queue, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        if queue.epoch != epoch {
            let code = queue.aborted.unwrap_or(code::TASK_ABORT);
            let text = format!("tasks of stream {} were taken back", self.id);
            return Err(Failure::new(code, text));
        }
        match queue.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(Waited::Done),
        }
    }

    /// Brings to the host what tasks up to `number` have copied, and makes their checks.
    pub fn land(&self, number: u64) {
        let (landed, checks) = {
            let mut queue = self.queue();
            let up_to = number.min(queue.finished);
            let (landed, rest) = queue.landings.drain(..).partition(|(n, _)| *n <= up_to);
            queue.landings = rest;
            let (checks, rest) = queue.afterwards.drain(..).partition(|(n, _)| *n <= up_to);
            queue.afterwards = rest;
            let landed: Vec<(u64, Landing)> = landed;
            let checks: Vec<(u64, Afterwards)> = checks;
            (landed, checks)
        };
        for (_, landing) in landed {
            landing.to.write(&landing.bytes.lock().unwrap_or_else(PoisonError::into_inner));
        }
        checks.into_iter().for_each(|(_, check)| check());
    }

    /// Takes everything back that has not run; the stream can be used again.
    pub fn abort(&self, code: i32) {
        let mut queue = self.queue();
        queue.tasks.clear();
        queue.finished = queue.queued;
        queue.epoch += 1;
        queue.stuck = false;
        queue.failure = None;
        queue.aborted = Some(code);
        queue.landings.clear();
        queue.afterwards.clear();
        drop(queue);
        self.done.notify_all();
        self.work.notify_all();
    }

    /// Ends the thread once the queue is empty or the present task is done.
    pub fn stop(&self) {
        self.queue().stop = true;
        self.work.notify_all();
    }

    fn run(self: Arc<Self>) {
        loop {
            let mut queue = self.queue();
            while queue.tasks.is_empty() || queue.stuck {
                if queue.stop {
                    return;
                }
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            let Some(work) = queue.tasks.pop_front() else { continue };
            let epoch = queue.epoch;
            if matches!(work, Work::Hang) {
                queue.stuck = true;
                continue;
            }
            let skipped = queue.failure.is_some() && self.stop_on_failure.load(Ordering::Relaxed);
            drop(queue);
            let done = if skipped { Ok(()) } else { self.perform(work, epoch) };
            let mut queue = self.queue();
            if queue.epoch != epoch {
                continue;
            }
            queue.finished += 1;
            if let Err(failure) = done {
                queue.failure.get_or_insert(failure);
            }
            drop(queue);
            self.done.notify_all();
        }
    }

    fn perform(&self, work: Work, epoch: u64) -> Done {
        match work {
            Work::Run(run) => {
                let mut engine = self.device.engine();
                let started = Instant::now();
                let done = run(&mut engine);
                let slowness = std::mem::replace(&mut engine.slowness, 1.0);
                drop(engine);
                if slowness > 1.0 {
                    std::thread::sleep(started.elapsed().mul_f64(slowness - 1.0));
                }
                done
            }
            Work::Meet(meet) => meet(&|| self.queue().epoch != epoch || self.queue().stop),
            Work::Record(event, number) => {
                event.reach(number);
                Ok(())
            }
            Work::Wait(event, number) => {
                event.wait_reached(number, || self.queue().epoch != epoch || self.queue().stop);
                Ok(())
            }
            Work::Hang => Ok(()),
        }
    }
}

#[derive(Default)]
struct Marks {
    recorded: u64,
    reached: u64,
    clock: Clock,
    time: Option<Instant>,
}

/// One event.
pub struct Event {
    /// Its device.
    pub device: Arc<Device>,
    marks: Mutex<Marks>,
    reached: Condvar,
}

/// How often those who wait for an event look whether they were called off.
const LOOK: Duration = Duration::from_millis(20);

impl Event {
    /// An event that nothing has recorded.
    pub fn new(device: Arc<Device>) -> Event {
        Event { device, marks: Mutex::default(), reached: Condvar::new() }
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that it was recorded after what `clock` says; gives the record's number.
    pub fn record(&self, clock: Clock) -> u64 {
        let mut marks = self.marks();
        marks.recorded += 1;
        marks.clock = clock;
        marks.recorded
    }

    /// The last record's number and what was queued before it.
    pub fn recorded(&self) -> (u64, Clock) {
        let marks = self.marks();
        (marks.recorded, marks.clock.clone())
    }

    /// Whether the last record was reached.
    pub fn is_reached(&self) -> bool {
        let marks = self.marks();
        marks.reached >= marks.recorded
    }

    /// When it was reached last.
    pub fn time(&self) -> Option<Instant> {
        self.marks().time
    }

    fn reach(&self, number: u64) {
        let mut marks = self.marks();
        marks.reached = marks.reached.max(number);
        marks.time = Some(Instant::now());
        drop(marks);
        self.reached.notify_all();
    }

    fn wait_reached(&self, number: u64, is_called_off: impl Fn() -> bool) {
        let mut marks = self.marks();
        while marks.reached < number && !is_called_off() {
            let waited = self.reached.wait_timeout(marks, LOOK);
            marks = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits on the host until the last record is reached.
    pub fn wait(&self, limit: Option<Duration>) -> Waited {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let (number, _) = self.recorded();
        self.wait_reached(number, || deadline.is_some_and(|deadline| Instant::now() >= deadline));
        if self.marks().reached < number { Waited::TimedOut } else { Waited::Done }
    }
}

/// Numbers for handles: never used twice in a process.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A number nobody had before.
pub fn fresh_number() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}
