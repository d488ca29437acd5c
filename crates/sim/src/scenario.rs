//! What is simulated: a trial drawn whole from a seed, to look for broken promises, or a long run
//! at a rate of faults, to see what it costs.
//!
//! Read next: `fault_plan.rs` for the faults, `simulation.rs` for the run.

use std::time::Duration;

use crate::chaos::Plan;
use crate::fault_plan::{
    PUBLISHED_DAYS, PUBLISHED_DEVICES, PUBLISHED_INTERRUPTIONS, PUBLISHED_MIX, Planned, Process,
    SimFault, Target,
};
use crate::fleet::Speeds;
use crate::random::Random;

/// How often silence is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    /// While all is well.
    pub calm: Duration,
    /// While some worker is not as it should be.
    pub troubled: Duration,
}

/// A run and all that goes wrong in it.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Decides everything.
    pub seed: u64,
    /// Workers.
    pub workers: usize,
    /// The numeric class of each worker's device; of those that are not named, the first.
    pub classes: Vec<u8>,
    /// Micro-batches of a step.
    pub leaves: u32,
    /// Steps in all.
    pub steps: u64,
    /// When the run is asked to stop.
    pub stop_at: Option<Duration>,
    /// Steps between snapshots.
    pub snapshot_every: u64,
    /// Steps between validations.
    pub valid_every: Option<u64>,
    /// The share of micro-batches that a second worker computes too, and of the time spent on it.
    pub audit: f64,
    /// Whether devices check their own products.
    pub checksums: bool,
    /// How long things take.
    pub speeds: Speeds,
    /// What goes wrong.
    pub faults: Vec<Planned>,
    /// What strikes the disk as in real runs, by steps.
    pub storage: Option<Plan>,
    /// How often silence is looked for.
    pub ticks: Ticks,
    /// A run that has not ended by then never will.
    pub limit: Duration,
}

/// What a long run is drawn from.
#[derive(Clone, Copy, Debug)]
pub struct Long {
    /// Decides when what fails.
    pub seed: u64,
    /// Workers.
    pub workers: usize,
    /// Simulated days.
    pub days: f64,
    /// Faults a day, all workers together.
    pub faults_a_day: f64,
    /// Seconds that a step takes.
    pub step_seconds: f64,
    /// Minutes between snapshots.
    pub snapshot_minutes: f64,
    /// The share of micro-batches that a second worker computes too, and of the time spent on it.
    pub audit: f64,
}

/// Micro-batches for each worker in a long run, so that a lost one's work can be spread.
const LEAVES_A_WORKER: u32 = 4;
/// A trial has this many incidents at most.
const INCIDENTS: u64 = 9;
/// A worker is struck at most this often in a trial: a device that fails again and again is out
/// for good, and a run whose devices are all out cannot end.
const STRIKES_A_WORKER: u32 = 2;

/// Faults a day in the Llama 3 report: all of them, or at its rate on so many devices.
pub fn published_rate(devices: Option<usize>) -> f64 {
    let share = devices.map_or(1.0, |devices| devices as f64 / PUBLISHED_DEVICES);
    PUBLISHED_INTERRUPTIONS / PUBLISHED_DAYS * share
}

impl Scenario {
    /// A long run.
    pub fn long(of: &Long) -> Scenario {
        let wall = Duration::from_secs_f64(of.days * 86_400.0);
        let leaves = (of.workers as u32 * LEAVES_A_WORKER).next_power_of_two();
        let a_worker = f64::from(leaves).max(1.0) / of.workers as f64;
        let second = |share: f64| Duration::from_secs_f64(of.step_seconds * share);
        let lasts = Duration::from_secs(1800);
        let process = Process {
            a_day: of.faults_a_day,
            mix: PUBLISHED_MIX.to_vec(),
            workers: of.workers,
            lasts,
        };
        Scenario {
            seed: of.seed,
            workers: of.workers,
            classes: Vec::new(),
            leaves,
            steps: u64::MAX,
            stop_at: Some(wall),
            snapshot_every: (of.snapshot_minutes * 60.0 / of.step_seconds).round().max(1.0) as u64,
            valid_every: None,
            audit: of.audit,
            checksums: true,
            speeds: Speeds {
                leaf: second(0.9 / a_worker),
                jitter: 0.01,
                combine: second(0.07),
                apply: second(0.03),
                copy: Duration::from_secs(5),
                score: second(1.0),
                start: Duration::from_secs(90),
                replace: Duration::from_secs(150),
                save: Duration::from_secs(60),
                notice: Duration::from_millis(20),
                pause: Duration::from_millis(500),
                resume: Duration::from_secs(120),
                slow_factor: 4.0,
            },
            faults: process.draw(&mut Random::new(of.seed, 11), wall),
            storage: None,
            ticks: Ticks { calm: Duration::from_secs(600), troubled: Duration::from_secs(1) },
            limit: wall + Duration::from_secs(86_400),
        }
    }

    /// A trial: a small run in which much goes wrong for a while and then nothing any more.
    pub fn trial(seed: u64) -> Scenario {
        let mut random = Random::new(seed, 1);
        let workers = *random.pick(&[1_usize, 2, 3, 3, 4, 5, 8, 13]);
        let leaves = (workers as u32).next_power_of_two() << random.below(3);
        let speeds = Speeds {
            leaf: Duration::from_secs_f64(random.between(0.05, 0.6)),
            jitter: random.between(0.0, 0.2),
            combine: Duration::from_secs_f64(random.between(0.01, 0.2)),
            apply: Duration::from_secs_f64(random.between(0.01, 0.1)),
            copy: Duration::from_secs_f64(random.between(0.01, 2.0)),
            score: Duration::from_secs_f64(random.between(0.1, 1.0)),
            start: Duration::from_secs_f64(random.between(0.2, 20.0)),
            replace: Duration::from_secs_f64(random.between(0.0, 20.0)),
            save: Duration::from_secs_f64(random.between(0.01, 10.0)),
            notice: Duration::from_secs_f64(random.between(0.001, 0.05)),
            pause: Duration::from_secs_f64(random.between(0.001, 0.3)),
            resume: Duration::from_secs_f64(random.between(0.1, 30.0)),
            slow_factor: random.between(1.5, 12.0),
        };
        let steps = 12 + random.below(40);
        let snapshot_every = 1 + random.below(12);
        let valid_every = random.happens(0.5).then(|| 1 + random.below(9));
        let audit = if workers > 1 { *random.pick(&[0.0, 0.1, 1.0, 1.0]) } else { 0.0 };
        let checksums = random.happens(0.3);
        let kinds = if random.happens(0.3) { 1 + random.below(3) } else { 1 };
        let classes = (0..workers).map(|_| random.below(kinds) as u8).collect();
        let mut trial = Scenario {
            seed,
            workers,
            classes,
            leaves,
            steps,
            stop_at: None,
            snapshot_every,
            valid_every,
            audit,
            checksums,
            speeds,
            faults: Vec::new(),
            storage: None,
            ticks: Ticks { calm: Duration::from_millis(100), troubled: Duration::from_millis(100) },
            limit: Duration::MAX,
        };
        trial.faults = trial.incidents(&mut random);
        let last = trial.faults.last().map_or(Duration::ZERO, |planned| planned.at);
        // Alone and step by step it takes this long; what was lost is done again at most once.
        let alone = trial.speeds.leaf * leaves + trial.speeds.combine + trial.speeds.apply;
        trial.limit = last + (trial.speeds.start * 8 + alone * (4 * steps as u32 + 40)) * 2;
        trial.limit += Duration::from_secs(600);
        trial
    }

    /// The same without faults, audits, checks and validation.
    pub fn quiet(mut self) -> Scenario {
        self.faults.clear();
        (self.audit, self.checksums, self.valid_every) = (0.0, false, None);
        self
    }

    /// Incidents one after another: silent corruption alone, as nobody promises more, and
    /// everything else in bursts that may take down all workers at once.
    fn incidents(&self, random: &mut Random) -> Vec<Planned> {
        let speeds = &self.speeds;
        let each = self.leaves.div_ceil(self.workers as u32);
        let step = (speeds.leaf * each + speeds.combine + speeds.apply).mul_f64(1.2);
        let mut left = vec![STRIKES_A_WORKER; self.workers];
        let mut faults = Vec::new();
        let mut at = speeds.start.mul_f64(1.5);
        for _ in 0..random.below(INCIDENTS) {
            at += step.mul_f64(random.between(0.0, 4.0));
            let corrupts = !self.targets().is_empty() && random.happens(0.4);
            let quiet = (speeds.start + speeds.replace + speeds.copy + step * 4).mul_f64(1.5)
                + Duration::from_secs(5);
            if corrupts {
                at += quiet;
                let targets = self.targets();
                let fault = SimFault::Flip(*random.pick(&targets));
                self.strike(random, &mut left, &mut faults, (at, fault, 1));
                at += quiet;
                continue;
            }
            let fault = *random.pick(&[
                SimFault::Crash,
                SimFault::Crash,
                SimFault::Hang,
                SimFault::Slow,
                SimFault::MemoryFault,
                SimFault::OutOfMemory,
                SimFault::LinkDown,
                SimFault::DiskFull,
                SimFault::DamagedSnapshot,
                SimFault::SupervisorKilled,
            ]);
            let burst = match random.below(4) {
                0 => self.workers,
                1 => 2,
                _ => 1,
            };
            self.strike(random, &mut left, &mut faults, (at, fault, burst));
        }
        faults
    }

    /// Where a flip is sure to be found with these settings.
    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        if self.workers >= 3 {
            targets = vec![Target::Weights, Target::State, Target::Published, Target::Sum];
            targets.extend([Target::Update, Target::Copy]);
        }
        // Who checks its own products needs nobody to tell.
        if self.checksums || (self.workers >= 3 && self.audit == 1.0) {
            targets.extend([Target::Gradient; 3]);
        }
        targets
    }

    fn strike(
        &self,
        random: &mut Random,
        left: &mut [u32],
        faults: &mut Vec<Planned>,
        (at, fault, burst): (Duration, SimFault, usize),
    ) {
        let lasts = Duration::from_secs_f64(random.between(1.0, 30.0));
        let mut workers = Vec::new();
        if fault.is_of_a_worker() {
            let first = random.below(self.workers as u64) as usize;
            for worker in (0..burst.min(self.workers)).map(|i| (first + i) % self.workers) {
                if left[worker] > 0 {
                    left[worker] -= 1;
                    workers.push(worker);
                }
            }
            if workers.is_empty() {
                return;
            }
        }
        let breaks_device = random.happens(0.3);
        faults.push(Planned { at, fault, workers, lasts, breaks_device });
    }
}
