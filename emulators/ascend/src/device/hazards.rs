//! Who may touch which memory when: what is ordered by streams, events and waits of the host, and
//! what only happens to come out right.
//!
//! Pure bookkeeping with vector clocks: it knows nothing of threads, so a missing wait is found
//! whether or not the race is lost this time.

use std::collections::HashMap;

/// How far each stream is known to have come.
pub type Clock = HashMap<u64, u64>;

/// A range of device addresses that a task touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// First address.
    pub start: u64,
    /// End.
    pub end: u64,
    /// Whether it changes what is there.
    pub writes: bool,
}

impl Access {
    fn meets(&self, other: &Access) -> bool {
        self.start < other.end && other.start < self.end && (self.writes || other.writes)
    }
}

/// What one stream's tasks touch that nobody has waited for yet.
#[derive(Default)]
struct Trail {
    clock: Clock,
    tasks: u64,
    /// The last task of each range.
    touched: HashMap<(u64, u64, bool), u64>,
}

/// All streams of a device.
#[derive(Default)]
pub struct Hazards {
    trails: HashMap<u64, Trail>,
}

/// Two accesses that nothing orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Race {
    /// The stream of the earlier task.
    pub stream: u64,
    /// The range it touches.
    pub access: Access,
}

impl Hazards {
    /// Notes a task; gives its number and the first access of another stream it races with.
    pub fn task(&mut self, stream: u64, accesses: &[Access]) -> (u64, Option<Race>) {
        let clock = self.trails.entry(stream).or_default().clock.clone();
        let mut race = None;
        for (&other, trail) in &self.trails {
            if other == stream || trail.touched.is_empty() {
                continue;
            }
            let known = clock.get(&other).copied().unwrap_or(0);
            let found = first_meeting(trail, accesses, known);
            race = race.or(found.map(|access| Race { stream: other, access }));
        }
        let trail = self.trails.entry(stream).or_default();
        trail.tasks += 1;
        for access in accesses {
            trail.touched.insert((access.start, access.end, access.writes), trail.tasks);
        }
        (trail.tasks, race)
    }

    /// What stands queued in a stream, as an event that is recorded there sees it.
    pub fn snapshot(&self, stream: u64) -> Clock {
        let Some(trail) = self.trails.get(&stream) else { return Clock::new() };
        let mut clock = trail.clock.clone();
        clock.insert(stream, trail.tasks);
        clock
    }

    /// Later tasks of a stream come after what a clock says.
    pub fn join(&mut self, stream: u64, clock: &Clock) {
        let own = &mut self.trails.entry(stream).or_default().clock;
        for (&other, &tasks) in clock {
            let known = own.entry(other).or_default();
            *known = tasks.max(*known);
        }
    }

    /// The host has waited for what a clock says.
    pub fn host_waited(&mut self, clock: &Clock) {
        for (stream, &tasks) in clock {
            if let Some(trail) = self.trails.get_mut(stream) {
                trail.touched.retain(|_, task| *task > tasks);
            }
        }
    }

    /// The first queued access that the host would race with.
    pub fn host_touches(&self, access: Access) -> Option<Race> {
        self.trails.iter().find_map(|(&stream, trail)| {
            first_meeting(trail, &[access], 0).map(|access| Race { stream, access })
        })
    }

    /// Forgets what a stream has queued: it was taken back, or the stream is gone.
    pub fn forget(&mut self, stream: u64) {
        if let Some(trail) = self.trails.get_mut(&stream) {
            trail.touched.clear();
        }
    }
}

/// The first access after task `known` that meets one of `accesses`.
fn first_meeting(trail: &Trail, accesses: &[Access], known: u64) -> Option<Access> {
    trail.touched.iter().find_map(|(&(start, end, writes), &task)| {
        let old = Access { start, end, writes };
        (task > known && accesses.iter().any(|new| new.meets(&old))).then_some(old)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Access = Access { start: 0, end: 8, writes: true };
    const B: Access = Access { start: 4, end: 12, writes: false };

    #[test]
    fn a_read_in_another_stream_races_with_a_write_until_an_event_orders_them() {
        let mut hazards = Hazards::default();
        hazards.task(1, &[A]);
        assert_eq!(hazards.task(2, &[B]).1, Some(Race { stream: 1, access: A }));
        let event = hazards.snapshot(1);
        hazards.join(3, &event);
        assert_eq!(hazards.task(3, &[B]).1, None);
    }

    #[test]
    fn an_event_does_not_order_what_was_queued_after_it() {
        let mut hazards = Hazards::default();
        hazards.task(1, &[]);
        let event = hazards.snapshot(1);
        hazards.task(1, &[A]);
        hazards.join(2, &event);
        assert!(hazards.task(2, &[B]).1.is_some());
    }

    #[test]
    fn the_host_races_until_it_has_waited() {
        let mut hazards = Hazards::default();
        hazards.task(1, &[A]);
        assert!(hazards.host_touches(B).is_some());
        let clock = hazards.snapshot(1);
        hazards.host_waited(&clock);
        assert!(hazards.host_touches(B).is_none());
    }

    #[test]
    fn two_reads_do_not_race() {
        let mut hazards = Hazards::default();
        hazards.task(1, &[B]);
        assert!(hazards.task(2, &[B]).1.is_none());
    }
}
