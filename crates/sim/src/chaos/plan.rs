//! `chaos.toml`: which fault strikes which worker at which step, listed or drawn from a seed.
//!
//! Reads and checks a plan; does nothing with it. Read next: `device.rs`.

use pontoon_ops::OpName;
use serde::{Deserialize, Serialize};

use super::draw;

/// What may be asked to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// The worker's process is killed in the middle of its work.
    Crash,
    /// The device never finishes an operation.
    Hang,
    /// The device takes `factor` times as long, for `for_steps` steps.
    Slow,
    /// One bit of a tensor changes.
    Bitflip,
    /// The device says that an allocation did not fit.
    OutOfMemory,
    /// The device reports an error in its memory.
    MemoryFault,
    /// The device reports a broken link.
    LinkDown,
    /// The disk is full for the next `for_steps` snapshots.
    DiskFull,
    /// A snapshot is damaged right after it is written.
    DamagedSnapshot,
}

impl FaultKind {
    const ALL: [FaultKind; 9] = [
        FaultKind::Crash,
        FaultKind::Hang,
        FaultKind::Slow,
        FaultKind::Bitflip,
        FaultKind::OutOfMemory,
        FaultKind::MemoryFault,
        FaultKind::LinkDown,
        FaultKind::DiskFull,
        FaultKind::DamagedSnapshot,
    ];

    /// Its name in a plan.
    pub fn name(self) -> &'static str {
        match self {
            FaultKind::Crash => "crash",
            FaultKind::Hang => "hang",
            FaultKind::Slow => "slow",
            FaultKind::Bitflip => "bitflip",
            FaultKind::OutOfMemory => "out_of_memory",
            FaultKind::MemoryFault => "memory_fault",
            FaultKind::LinkDown => "link_down",
            FaultKind::DiskFull => "disk_full",
            FaultKind::DamagedSnapshot => "damaged_snapshot",
        }
    }

    /// Whether it strikes the run's disk rather than a worker.
    pub fn is_of_the_disk(self) -> bool {
        matches!(self, FaultKind::DiskFull | FaultKind::DamagedSnapshot)
    }
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The worker it strikes, counted from 0; of no meaning for the disk.
    #[serde(default)]
    pub worker: usize,
    /// The step in which it strikes, or the first one after it in which the worker computes.
    pub step: u64,
    /// What goes wrong.
    pub kind: FaultKind,
    /// Steps for which a slow device is slow; snapshots for which a disk is full.
    #[serde(default = "once")]
    pub for_steps: u64,
    /// How many times slower.
    #[serde(default = "five")]
    pub factor: f64,
    /// What a flip strikes: `weights`, `gradients`, `moments`, or an operation's result by the
    /// operation's name.
    #[serde(default = "matmul")]
    pub tensor: String,
    /// The bit that changes, counted in an f32; in 16-bit types the upper half counts.
    #[serde(default = "exponent")]
    pub bit: u32,
}

fn once() -> u64 {
    1
}

fn five() -> f64 {
    5.0
}

fn matmul() -> String {
    OpName::Matmul.name().to_owned()
}

fn exponent() -> u32 {
    30
}

/// A fault and its place in the plan, by which it is told from others.
pub type Numbered = (usize, Fault);

/// What is known of the run that a plan is for.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Its workers.
    pub workers: usize,
    /// Its steps.
    pub steps: u64,
    /// Steps between its snapshots; 0 for one at the end.
    pub snapshot_every: u64,
}

impl Run {
    /// The snapshot that the state after a step goes into, counted from 0.
    fn snapshot_of(&self, step: u64) -> u64 {
        (step - 1).checked_div(self.snapshot_every).unwrap_or(0)
    }
}

/// Why a plan cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct PlanError {
    origin: String,
    what: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    fault: Vec<Fault>,
    random: Option<Random>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Random {
    seed: u64,
    /// Faults to expect in a step.
    rate: f64,
    #[serde(default)]
    kinds: Vec<FaultKind>,
}

/// Every fault of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    faults: Vec<Numbered>,
}

impl Plan {
    /// Reads a plan's text; `origin` names it in errors.
    pub fn parse(text: &str, origin: &str, run: Run) -> Result<Plan, PlanError> {
        let wrong = |what: String| PlanError { origin: origin.to_owned(), what };
        let file: File = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| text[..span.start].matches('\n').count() + 1);
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            wrong(place + error.message().split('\n').next().unwrap_or_default())
        })?;
        let mut faults = file.fault;
        for (index, fault) in faults.iter().enumerate() {
            check(fault, run).map_err(|what| wrong(format!("fault {}: {what}", index + 1)))?;
        }
        if let Some(random) = &file.random {
            if !(0.0..=1.0).contains(&random.rate) {
                return Err(wrong("random.rate should be from 0 to 1, in faults a step".into()));
            }
            faults.extend(random.faults(run));
        }
        if faults.is_empty() {
            return Err(wrong("there is no fault in it; add [[fault]] or [random]".into()));
        }
        Ok(Plan { faults: faults.into_iter().enumerate().collect() })
    }

    /// Every fault.
    pub fn faults(&self) -> &[Numbered] {
        &self.faults
    }

    /// What strikes a worker.
    pub fn of_worker(&self, worker: usize) -> impl Iterator<Item = &Numbered> {
        let mine = move |fault: &Fault| fault.worker == worker && !fault.kind.is_of_the_disk();
        self.faults.iter().filter(move |(_, fault)| mine(fault))
    }

    /// What strikes the disk.
    pub fn of_disk(&self) -> impl Iterator<Item = &Numbered> {
        self.faults.iter().filter(|(_, fault)| fault.kind.is_of_the_disk())
    }
}

fn check(fault: &Fault, run: Run) -> Result<(), String> {
    if !fault.kind.is_of_the_disk() && fault.worker >= run.workers {
        let last = run.workers - 1;
        return Err(format!("there is no worker {}; the run has 0 to {last}", fault.worker));
    }
    if !(1..=run.steps).contains(&fault.step) {
        return Err(format!("step {} never comes; the run has 1 to {}", fault.step, run.steps));
    }
    let known = ["weights", "gradients", "moments"].contains(&fault.tensor.as_str())
        || OpName::ALL.iter().any(|name| name.name() == fault.tensor);
    let rules = [
        (known, "tensor should be weights, gradients, moments or an operation such as Matmul"),
        (fault.bit < 32, "bit should be from 0 to 31; 31 is the sign, 30 to 23 the exponent"),
        (fault.factor >= 1.0 && fault.factor.is_finite(), "factor should be at least 1"),
        (fault.for_steps >= 1, "for_steps should be at least 1"),
    ];
    match rules.iter().find(|(holds, _)| !holds) {
        Some((_, what)) => Err((*what).to_owned()),
        None => Ok(()),
    }
}

impl Random {
    /// A fault in every so many steps. The disk is struck once at most for each snapshot, and not
    /// for two that follow each other: a failed snapshot is tried again in growing pauses, and
    /// faults that wait for a try would pile up until the last one's patience is over. Another kind
    /// strikes instead, if there is one.
    fn faults(&self, run: Run) -> impl Iterator<Item = Fault> {
        let kinds = if self.kinds.is_empty() { &FaultKind::ALL[..] } else { &self.kinds };
        let mut of_workers = kinds.to_vec();
        of_workers.retain(|kind| !kind.is_of_the_disk());
        let mut struck = None;
        (1..=run.steps).filter_map(move |step| {
            let number = |of: u64| draw(self.seed, step * 8 + of);
            let strikes = (number(0) >> 11) as f64 / (1_u64 << 53) as f64;
            if strikes >= self.rate {
                return None;
            }
            let tensor = ["Matmul", "weights", "gradients"][number(3) as usize % 3];
            let mut kind = kinds[number(2) as usize % kinds.len()];
            if kind.is_of_the_disk() {
                let snapshot = run.snapshot_of(step);
                if struck.is_none_or(|last| snapshot > last + 1) {
                    struck = Some(snapshot);
                } else {
                    kind = *of_workers.get(number(6) as usize % of_workers.len().max(1))?;
                }
            }
            let for_steps = if kind.is_of_the_disk() { 1 } else { 1 + number(4) % 3 };
            Some(Fault {
                worker: number(1) as usize % run.workers,
                step,
                kind,
                for_steps,
                factor: five(),
                tensor: tensor.to_owned(),
                // The sign and the exponent.
                bit: 23 + number(5) as u32 % 9,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: Run = Run { workers: 3, steps: 1000, snapshot_every: 50 };

    fn wrong(text: &str) -> String {
        Plan::parse(text, "chaos.toml", RUN).unwrap_err().to_string()
    }

    #[test]
    fn a_plan_has_the_defaults_of_the_contract() {
        let text = "[[fault]]\nworker = 1\nstep = 17\nkind = \"bitflip\"\n[[fault]]\nstep = 3\n\
                    kind = \"disk_full\"\n";
        let plan = Plan::parse(text, "chaos.toml", RUN).unwrap();
        let flip = &plan.of_worker(1).next().unwrap().1;
        assert_eq!((flip.for_steps, flip.bit, flip.tensor.as_str()), (1, 30, "Matmul"));
        assert_eq!(plan.of_worker(0).count(), 0);
        assert_eq!(plan.of_disk().count(), 1);
    }

    #[test]
    fn what_cannot_be_is_one_line_that_names_the_fault() {
        let fault = "[[fault]]\nworker = 7\nstep = 17\nkind = \"crash\"\n";
        assert_eq!(wrong(fault), "chaos.toml: fault 1: there is no worker 7; the run has 0 to 2");
        for (text, want) in [
            (fault.replace("crash", "flood"), "line 4: unknown variant `flood`"),
            (fault.replace("worker", "wroker"), "line 2: unknown field `wroker`"),
            (fault.replace('7', "1").replace("11", "2000"), "step 2000 never comes"),
            (fault.replace('7', "1") + "bit = 32\n", "bit should be"),
            (fault.replace('7', "1") + "tensor = \"Matmlu\"\n", "tensor should be"),
            ("[random]\nseed = 1\nrate = 7\n".to_owned(), "random.rate"),
            (String::new(), "no fault in it"),
        ] {
            let error = wrong(&text);
            assert!(error.contains(want) && error.lines().count() == 1, "{error}");
        }
    }

    #[test]
    fn random_faults_come_at_their_rate_on_every_worker_and_always_the_same() {
        let text = "[random]\nseed = 7\nrate = 0.1\n";
        let plan = Plan::parse(text, "chaos.toml", RUN).unwrap();
        assert!((70..130).contains(&plan.faults().len()), "{}", plan.faults().len());
        assert!((0..3).all(|worker| plan.of_worker(worker).count() > 10));
        assert!(plan.faults().iter().all(|(_, fault)| check(fault, RUN).is_ok()));
        let snapshots = plan.of_disk().map(|(_, fault)| RUN.snapshot_of(fault.step));
        let snapshots: Vec<u64> = snapshots.collect();
        assert!(snapshots.len() >= 5, "{snapshots:?}");
        assert!(snapshots.windows(2).all(|pair| pair[0] + 1 < pair[1]), "{snapshots:?}");
        assert_eq!(plan, Plan::parse(text, "chaos.toml", RUN).unwrap());
    }
}
