//! What goes wrong in a simulated run, and when: drawn from a seed at a rate and in a mix, or
//! listed.
//!
//! Knows nothing of how faults are found. Read next: `fleet.rs`, where they strike.

use std::time::Duration;

use crate::random::Random;

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SimFault {
    /// The process ends.
    Crash,
    /// The device stands still.
    Hang,
    /// The device is slow for a time.
    Slow,
    /// A bit changes somewhere.
    Flip(Target),
    /// The device reports an error of its memory.
    MemoryFault,
    /// An allocation does not fit.
    OutOfMemory,
    /// The worker's link is gone.
    LinkDown,
    /// Snapshots do not fit for a time.
    DiskFull,
    /// The newest snapshot rots on disk.
    DamagedSnapshot,
    /// The supervisor's process is killed, and its workers with it; someone resumes the run.
    SupervisorKilled,
}

/// Where a bit changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// In the weights a worker computes with, until it is replaced.
    Weights,
    /// In its masters and moments, until it is replaced.
    State,
    /// In the gradient of one micro-batch.
    Gradient,
    /// In a subtree's gradient on its way to the others.
    Published,
    /// In the sum that one replica makes.
    Sum,
    /// In the update that one replica makes.
    Update,
    /// In the state that a worker copies for others.
    Copy,
}

impl SimFault {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            SimFault::Crash => "crash",
            SimFault::Hang => "hang",
            SimFault::Slow => "slow",
            SimFault::Flip(_) => "bitflip",
            SimFault::MemoryFault => "memory_fault",
            SimFault::OutOfMemory => "out_of_memory",
            SimFault::LinkDown => "link_down",
            SimFault::DiskFull => "disk_full",
            SimFault::DamagedSnapshot => "damaged_snapshot",
            SimFault::SupervisorKilled => "supervisor_killed",
        }
    }

    /// Whether it strikes a worker.
    pub fn is_of_a_worker(self) -> bool {
        !matches!(self, SimFault::DiskFull | SimFault::DamagedSnapshot | SimFault::SupervisorKilled)
    }
}

/// One fault.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// When.
    pub at: Duration,
    /// What.
    pub fault: SimFault,
    /// Whom: one worker or all of a group at once; none for the disk and the supervisor.
    pub workers: Vec<usize>,
    /// How long slowness or fullness lasts.
    pub lasts: Duration,
    /// Whether the device must be replaced, which takes longer than a new process.
    pub breaks_device: bool,
}

/// A kind of fault in a mix.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// How often it comes, against the others.
    pub weight: f64,
    /// What.
    pub fault: SimFault,
    /// Whether the device must be replaced after it.
    pub breaks_device: bool,
}

const fn share(weight: f64, fault: SimFault, breaks_device: bool) -> Share {
    Share { weight, fault, breaks_device }
}

/// The unexpected interruptions that the Llama 3 report lists for 54 days on 16,384 devices (its
/// table 5: 419), by our kinds.
pub const PUBLISHED_MIX: [Share; 10] = [
    // Faulty devices 148: half of them gone, half of them silent; system processors 17 and
    // watchdogs of collective operations 7 show as silence too.
    share(74.0, SimFault::Crash, true),
    share(74.0 + 17.0 + 7.0, SimFault::Hang, true),
    // Memory of devices 72 and 19, of hosts 2.
    share(93.0, SimFault::MemoryFault, true),
    // Software 54, dependencies 2: a new process is enough.
    share(56.0, SimFault::Crash, false),
    // Unplanned maintenance 32, power 3, chassis 2, boards 2, processors 2: the host goes.
    share(41.0, SimFault::Crash, true),
    // Switches and cables 35, network cards 7.
    share(42.0, SimFault::LinkDown, true),
    // Thermal 6.
    share(6.0, SimFault::Slow, true),
    // Silent data corruption 6.
    share(3.0, SimFault::Flip(Target::Gradient), true),
    share(3.0, SimFault::Flip(Target::Weights), true),
    // Disks 3.
    share(3.0, SimFault::DiskFull, false),
];

/// Interruptions in [`PUBLISHED_DAYS`] on [`PUBLISHED_DEVICES`].
pub const PUBLISHED_INTERRUPTIONS: f64 = 419.0;
/// The days they were counted over.
pub const PUBLISHED_DAYS: f64 = 54.0;
/// The devices they were counted on.
pub const PUBLISHED_DEVICES: f64 = 16_384.0;

/// Faults at a rate.
#[derive(Clone, Debug)]
pub struct Process {
    /// Faults a day, all workers together.
    pub a_day: f64,
    /// Of which kinds.
    pub mix: Vec<Share>,
    /// How many workers there are.
    pub workers: usize,
    /// How long slowness and full disks last.
    pub lasts: Duration,
}

impl Process {
    /// All faults before `end`, in order.
    pub fn draw(&self, random: &mut Random, end: Duration) -> Vec<Planned> {
        let total: f64 = self.mix.iter().map(|share| share.weight).sum();
        let mut faults = Vec::new();
        if self.a_day <= 0.0 || total <= 0.0 {
            return faults;
        }
        let mean = Duration::from_secs_f64(86_400.0 / self.a_day);
        let mut at = random.wait(mean);
        while at < end {
            let mut rest = random.share() * total;
            let drawn = self.mix.iter().find(|share| {
                rest -= share.weight;
                rest < 0.0
            });
            if let Some(&Share { fault, breaks_device, .. }) = drawn.or(self.mix.last()) {
                let workers = match fault.is_of_a_worker() {
                    true => vec![random.below(self.workers as u64) as usize],
                    false => Vec::new(),
                };
                faults.push(Planned { at, fault, workers, lasts: self.lasts, breaks_device });
            }
            at += random.wait(mean);
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_mix_adds_up_and_comes_at_its_rate() {
        let sum: f64 = PUBLISHED_MIX.iter().map(|share| share.weight).sum();
        assert_eq!(sum, PUBLISHED_INTERRUPTIONS);
        let a_day = PUBLISHED_INTERRUPTIONS / PUBLISHED_DAYS;
        let lasts = Duration::from_secs(60);
        let process = Process { a_day, mix: PUBLISHED_MIX.to_vec(), workers: 512, lasts };
        let end = Duration::from_secs_f64(PUBLISHED_DAYS * 86_400.0);
        let faults = process.draw(&mut Random::new(1, 0), end);
        assert!((340..500).contains(&faults.len()), "{}", faults.len());
        let of = |fault| faults.iter().filter(|planned| planned.fault == fault).count();
        assert!((130..220).contains(&of(SimFault::Crash)), "{}", of(SimFault::Crash));
        assert!(faults.windows(2).all(|pair| pair[0].at <= pair[1].at));
        assert!(faults.iter().any(|planned| planned.workers != faults[0].workers));
    }
}
