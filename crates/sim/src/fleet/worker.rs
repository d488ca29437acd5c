//! One simulated process: commands in order, each with its time, and what faults make of it.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use pontoon_fleet::protocol::{
    Against, Apart, Area, Command, DeviceFacts, Node, Publish, Rates, Report, Source, StateDigest,
    Trouble, VERSION,
};
use pontoon_fleet::snapshot::{Parts, SnapshotReader};
use pontoon_fleet::supervisor::Input;

use super::{Fleet, Happening, Noticed, Struck};
use crate::fault_plan::{Planned, SimFault, Target};
use crate::model::{Class, TinyModel, applied, digest, exact, plus, weights_of};

/// Where snapshots lie in a simulated run.
pub(crate) const SNAPSHOTS: &str = "run/snapshots";
/// So many sound replicas tell a wrong one among them; a flip with fewer is not simulated, as
/// nobody promises to find it.
const ENOUGH_TO_TELL: usize = 3;

/// What two classes are apart in a gradient.
const ROUNDING_ERROR: f64 = 1e-3;

/// A fault this shortly before the end may not have shown yet.
const LATE: Duration = Duration::from_secs(120);
/// Nor one of a process that loads, which may be silent for minutes.
const LATE_LOADING: Duration = Duration::from_secs(320);

/// A bit that changes whenever it is next used.
#[derive(Clone, Copy, Debug)]
struct Flip {
    target: Target,
    /// Its place among those that struck.
    struck: usize,
}

enum Task {
    Subtree { step: u64, node: Node, digests: Vec<u32>, publish: Publish },
    Do(Command),
}

/// A process, or the place for one.
#[derive(Default)]
pub(crate) struct SimWorker {
    /// The number its supervisor knows the process by.
    incarnation: u32,
    /// A number that no other process of the simulation ever had.
    serial: u64,
    /// Of its device.
    pub class: Class,
    alive: bool,
    hung: bool,
    busy: bool,
    to: Option<Sender<Input>>,
    tasks: VecDeque<Task>,
    /// Masters and moments.
    state: Option<u64>,
    weights: u64,
    sum: u64,
    operations: u64,
    slow_until: Duration,
    flips: Vec<Flip>,
    device_is_broken: bool,
    /// Whether its state is no longer what the protocol made it.
    tainted: bool,
}

impl SimWorker {
    /// The process is gone.
    pub fn end(&mut self) {
        (self.alive, self.hung, self.busy, self.tainted) = (false, false, false, false);
        (self.state, self.to) = (None, None);
        self.tasks.clear();
    }

    pub fn is_troubled(&self, now: Duration) -> bool {
        !self.alive || self.hung || self.slow_until > now
    }

    /// The state of one that holds the right one as far as anyone can know.
    pub fn sound_state(&self) -> Option<u64> {
        self.state.filter(|_| self.alive && !self.tainted)
    }

    /// The state of one that could carry the run on: one that nobody told to stop counts.
    pub fn can_go_on(&self) -> Option<u64> {
        self.sound_state()
            .filter(|_| !self.hung && self.weights == self.state.map_or(0, weights_of))
    }

    fn say(&self, worker: usize, report: Report) {
        if let Some(to) = &self.to {
            // Nobody listens only if the run has ended.
            let _ = to.send(Input::Report { worker, incarnation: self.incarnation, report });
        }
    }

    fn digest(&self) -> StateDigest {
        [digest(self.state.unwrap_or(0)), digest(self.weights)]
    }

    fn take_state(&mut self, state: u64) {
        (self.state, self.weights) = (Some(state), weights_of(state));
    }
}

impl Fleet {
    /// Starts a process; returns its serial number.
    pub fn launch(&mut self, worker: usize, incarnation: u32, to: Sender<Input>) -> u64 {
        self.launched += 1;
        let serial = self.launched;
        let of = &mut self.workers[worker];
        of.end();
        (of.incarnation, of.serial) = (incarnation, serial);
        (of.alive, of.to) = (true, Some(to));
        (of.operations, of.slow_until) = (0, Duration::ZERO);
        of.say(worker, Report::Hello { version: VERSION, process: serial as u32 });
        serial
    }

    pub fn tell(&mut self, worker: usize, serial: u64, command: &Command) {
        let of = &mut self.workers[worker];
        if of.serial != serial || !of.alive {
            return;
        }
        match command {
            Command::Stop => return of.end(),
            Command::Compute { step, nodes, digests, publish } => {
                for &node in nodes {
                    let inside = |leaf: &&u32| (node.first..node.first + node.count).contains(leaf);
                    let digests = digests.iter().filter(inside).copied().collect();
                    let (step, publish) = (*step, *publish);
                    of.tasks.push_back(Task::Subtree { step, node, digests, publish });
                }
            }
            other => of.tasks.push_back(Task::Do(other.clone())),
        }
        self.go_on(worker);
    }

    /// Ends a process on the supervisor's word.
    pub fn kill(&mut self, worker: usize, serial: u64) {
        if self.workers[worker].serial != serial {
            return;
        }
        let now = self.now;
        for struck in &mut self.struck {
            let here = struck.worker == Some(worker) && struck.serial == serial;
            if here && struck.found.is_none() {
                struck.found = Some(now);
            }
        }
        self.forget_flips(worker);
        self.workers[worker].end();
    }

    pub fn forget_flips(&mut self, worker: usize) {
        for flip in std::mem::take(&mut self.workers[worker].flips) {
            self.struck[flip.struck].excused.get_or_insert("its process ended before it was used");
        }
    }

    /// Begins the next task.
    fn go_on(&mut self, worker: usize) {
        let of = &mut self.workers[worker];
        if of.busy || !of.alive {
            return;
        }
        let Some(task) = of.tasks.front() else { return };
        let speeds = &self.speeds;
        let usual = match task {
            Task::Subtree { node, .. } => speeds.leaf * node.count,
            Task::Do(Command::Load { .. }) => {
                let replaced = std::mem::take(&mut of.device_is_broken);
                speeds.start + if replaced { speeds.replace } else { Duration::ZERO }
            }
            Task::Do(Command::Replay { .. }) => speeds.leaf,
            Task::Do(Command::Combine { .. }) => speeds.combine,
            Task::Do(Command::Import { .. } | Command::Export { .. }) => speeds.copy,
            Task::Do(Command::Score { .. }) => speeds.score,
            Task::Do(_) => speeds.apply,
        };
        let mut factor = 1.0 + speeds.jitter * self.random.share();
        if of.slow_until > self.now {
            factor *= speeds.slow_factor;
        }
        of.busy = true;
        let serial = of.serial;
        self.after(usual.mul_f64(factor), Happening::Done { worker, serial });
    }

    /// What tells the supervisor that a process has ended, unless another has taken its place.
    pub fn gone(&self, worker: usize, serial: u64) -> Option<Input> {
        let of = &self.workers[worker];
        let cause = "its process ended: injected".to_owned();
        let gone = Input::Gone { worker, incarnation: of.incarnation, cause };
        (of.serial == serial && !of.alive).then_some(gone)
    }

    /// A worker has done what it was at.
    pub fn done(&mut self, worker: usize, serial: u64) {
        let of = &mut self.workers[worker];
        if of.serial != serial || !of.alive || of.hung {
            return;
        }
        of.busy = false;
        of.operations += 1;
        let Some(task) = of.tasks.pop_front() else { return };
        let report = match task {
            Task::Subtree { step, node, digests, publish } => {
                self.subtree(worker, step, node, &digests, publish)
            }
            Task::Do(command) => self.answer(worker, command),
        };
        if let Some(report) = report {
            self.workers[worker].say(worker, report);
        }
        self.go_on(worker);
    }

    fn answer(&mut self, worker: usize, command: Command) -> Option<Report> {
        Some(match command {
            Command::Load { from } => self.load(worker, from),
            Command::Import { step } => {
                let state = self.memory.join;
                self.workers[worker].take_state(state);
                self.forgive_overwritten(worker);
                Report::Imported { step, digest: self.workers[worker].digest() }
            }
            Command::Replay { step, leaf, against } => {
                let value = self.gradient(worker, step, leaf)?;
                let loss = TinyModel::loss(value).into();
                let apart = (against == Against::Published).then(|| self.apart(value, leaf));
                Report::Replayed { step, leaf, digest: digest(value), loss, apart }
            }
            Command::Check { step } => {
                Report::Checked { step, digest: self.workers[worker].digest() }
            }
            Command::Combine { step, nodes } => self.combine(worker, step, nodes),
            Command::Apply { step } => {
                let of = &self.workers[worker];
                let mut state = applied(of.state.unwrap_or(0), of.sum, of.class);
                if self.flips(worker, Target::Update) {
                    state ^= 1 << 30;
                    self.workers[worker].tainted = true;
                }
                self.workers[worker].take_state(state);
                Report::Applied {
                    step,
                    rates: Rates::default(),
                    after: self.workers[worker].digest(),
                }
            }
            Command::Export { step, area } => {
                let mut state = self.workers[worker].state.unwrap_or(0);
                if self.flips(worker, Target::Copy) {
                    state ^= 1 << 30;
                }
                match area {
                    Area::Join | Area::Step => self.memory.join = state,
                    Area::Snapshot => self.memory.snapshot = state,
                }
                Report::Exported { step, area, digest: digest(state) }
            }
            Command::Score { step } => Report::Scored { step, loss: 1.0.into() },
            Command::Compute { .. } | Command::Stop => return None,
        })
    }

    /// What flipped in a state that nobody has used since does no harm once another is there.
    fn forgive_overwritten(&mut self, worker: usize) {
        let of = &mut self.workers[worker];
        of.tainted = false;
        let serial = of.serial;
        for struck in &mut self.struck {
            let flip = matches!(struck.fault, SimFault::Flip(Target::Weights | Target::State));
            if flip && struck.serial == serial && struck.noticed.is_none() {
                struck.excused.get_or_insert("another state took its place before it was used");
            }
        }
    }

    fn load(&mut self, worker: usize, from: Source) -> Report {
        let numeric_class = self.workers[worker].class.name();
        let mut device = DeviceFacts { numeric_class, ..Default::default() };
        let (mut step, mut state) = (0, Some(self.model.first()));
        match from {
            Source::Fresh => {}
            Source::Nothing => state = None,
            Source::Snapshot => {
                let newest =
                    SnapshotReader::new(&self.disk, Path::new(SNAPSHOTS)).read_newest(Parts::All);
                if let Ok(newest) = newest {
                    let rejected = newest.rejected.into_iter();
                    device.passed_over =
                        rejected.map(|of| (of.step, of.reason.to_string())).collect();
                    if let Some(snapshot) = newest.snapshot {
                        step = snapshot.state.step;
                        state = state_in(&snapshot.model[0].bytes);
                    }
                }
            }
        }
        let of = &mut self.workers[worker];
        let digest = state.map(|state| {
            of.take_state(state);
            of.digest()
        });
        Report::Ready { step, digest, device }
    }

    /// `None` if the device has found it wrong itself, and said so.
    fn gradient(&mut self, worker: usize, step: u64, leaf: u32) -> Option<u64> {
        let of = &self.workers[worker];
        let value = self.model.gradient(step, leaf, of.weights, of.class);
        if !self.flips(worker, Target::Gradient) {
            return Some(value);
        }
        if !self.checksums {
            return Some(value ^ 1 << 30);
        }
        let text = "injected: a product's checksum does not hold".to_owned();
        let of = &mut self.workers[worker];
        of.say(worker, Report::Failed { trouble: Trouble::Corrupt, text });
        // The rest of the command goes with it; whether another comes is not for it to say.
        while matches!(of.tasks.front(), Some(Task::Subtree { .. })) {
            of.tasks.pop_front();
        }
        None
    }

    fn subtree(
        &mut self,
        worker: usize,
        step: u64,
        node: Node,
        digests: &[u32],
        publish: Publish,
    ) -> Option<Report> {
        let mut sum = 0_u64;
        let mut losses = Vec::with_capacity(node.count as usize);
        let mut leaves = Vec::new();
        for leaf in node.first..node.first + node.count {
            let value = self.gradient(worker, step, leaf)?;
            sum = plus(sum, value);
            losses.push(TinyModel::loss(value).into());
            if digests.contains(&leaf) {
                leaves.push((leaf, digest(value)));
            }
        }
        let told = digest(sum);
        if publish == Publish::Shared {
            let flip = u64::from(self.flips(worker, Target::Published)) << 30;
            self.memory.slots[node.first as usize] = sum ^ flip;
            self.memory.version += 1;
        }
        let speeds = &self.speeds;
        let slow = self.workers[worker].slow_until > self.now;
        let factor = if slow { speeds.slow_factor } else { 1.0 };
        let seconds = speeds.leaf.as_secs_f64() * f64::from(node.count) * factor;
        self.workers[worker].sum = sum;
        Some(Report::Computed { step, node, digest: told, leaves, losses, seconds })
    }

    /// How far a worker's gradient is from the one in the leaf's place: a little where only the
    /// rounding differs, and far where a bit is wrong.
    fn apart(&self, mine: u64, leaf: u32) -> Apart {
        let theirs = self.memory.slots[leaf as usize];
        let error: f64 = match (mine == theirs, exact(mine) == exact(theirs)) {
            (true, _) => 0.0,
            (_, true) => ROUNDING_ERROR,
            (_, false) => 0.5,
        };
        Apart { published: digest(theirs), error: error.into(), tensor: "state".to_owned() }
    }

    fn combine(&mut self, worker: usize, step: u64, nodes: Arc<[Node]>) -> Report {
        let before = self.workers[worker].digest();
        let (read, mut sum) = match nodes.is_empty() {
            true => (Arc::from([]), self.workers[worker].sum),
            false => self.summed(&nodes),
        };
        if self.flips(worker, Target::Sum) {
            sum ^= 1 << 30;
            self.workers[worker].tainted = true;
        }
        self.workers[worker].sum = sum;
        Report::Combined { step, before, nodes: read, gradient: digest(sum), norm: 1.0.into() }
    }

    /// What all see who sum these subtrees now.
    fn summed(&mut self, nodes: &Arc<[Node]>) -> (Arc<[u64]>, u64) {
        let memory = &mut self.memory;
        if let Some((version, of, read, sum)) = &memory.sum
            && *version == memory.version
            && Arc::ptr_eq(of, nodes)
        {
            return (Arc::clone(read), *sum);
        }
        let values = nodes.iter().map(|node| memory.slots[node.first as usize]);
        let sum = values.clone().fold(0, plus);
        let read: Arc<[u64]> = values.map(digest).collect();
        memory.sum = Some((memory.version, Arc::clone(nodes), Arc::clone(&read), sum));
        (read, sum)
    }

    /// Whether a bit changes here and now.
    fn flips(&mut self, worker: usize, target: Target) -> bool {
        if self.workers[worker].flips.is_empty() {
            return false;
        }
        let waiting = self.workers[worker].flips.iter().position(|flip| flip.target == target);
        let Some(place) = waiting else { return false };
        let flip = self.workers[worker].flips.swap_remove(place);
        if self.too_few_to_tell(worker, target) {
            self.struck[flip.struck].excused = Some("too few replicas to tell");
            return false;
        }
        true
    }

    /// Whether there are not enough to find a flip by comparison with others, where nothing else
    /// finds it.
    fn too_few_to_tell(&self, worker: usize, target: Target) -> bool {
        match target {
            Target::Gradient if self.checksums => false,
            // Equal bits are expected within a class only.
            Target::Sum | Target::Update => {
                self.sound_of(Some(self.workers[worker].class)) < ENOUGH_TO_TELL
            }
            _ => self.sound_of(None) < ENOUGH_TO_TELL,
        }
    }

    /// Sound replicas, of a class or of all.
    fn sound_of(&self, class: Option<Class>) -> usize {
        let counts = |of: &&SimWorker| {
            class.is_none_or(|class| class == of.class) && of.sound_state().is_some() && !of.hung
        };
        self.workers.iter().filter(counts).count()
    }

    /// A fault strikes.
    pub fn strike(&mut self, planned: &Planned) {
        for &worker in &planned.workers {
            self.strike_worker(worker, planned);
        }
        if planned.fault == SimFault::DiskFull {
            self.disk.set_full(true);
            self.note(planned.fault, None, None);
            self.after(planned.lasts, Happening::DiskFree);
        }
    }

    /// Writes down that a fault struck; returns its place.
    pub fn note(
        &mut self,
        fault: SimFault,
        worker: Option<usize>,
        excused: Option<&'static str>,
    ) -> usize {
        let serial = worker.map_or(0, |worker| self.workers[worker].serial);
        let at = self.now;
        let (noticed, found): (Option<Noticed>, _) = (None, None);
        let loads = worker.is_some_and(|worker| self.workers[worker].state.is_none());
        let patience = if loads { LATE_LOADING } else { LATE };
        self.struck.push(Struck { fault, at, worker, serial, found, noticed, patience, excused });
        self.struck.len() - 1
    }

    fn strike_worker(&mut self, worker: usize, planned: &Planned) {
        let of = &self.workers[worker];
        let fault = planned.fault;
        let excused = match fault {
            _ if !of.alive => Some("no process"),
            _ if of.hung => Some("it stood still already"),
            SimFault::Flip(_) if of.state.is_none() => Some("no state yet"),
            SimFault::Flip(target) if self.too_few_to_tell(worker, target) => {
                Some("too few replicas to tell")
            }
            _ => None,
        };
        let place = self.note(fault, Some(worker), excused);
        if excused.is_some() {
            return;
        }
        let of = &mut self.workers[worker];
        of.device_is_broken |= planned.breaks_device;
        let injected = Report::Injected { kind: fault.name().to_owned(), fault: place };
        of.say(worker, injected);
        let serial = of.serial;
        match fault {
            SimFault::Crash => {
                self.forget_flips(worker);
                self.workers[worker].end();
                self.after(self.speeds.notice, Happening::Gone { worker, serial });
            }
            SimFault::Hang => of.hung = true,
            SimFault::Slow => of.slow_until = self.now + planned.lasts,
            SimFault::Flip(Target::Weights) => {
                of.weights ^= 1 << 30;
                of.tainted = true;
            }
            SimFault::Flip(Target::State) => {
                of.state = of.state.map(|state| state ^ 1 << 30);
                of.tainted = true;
            }
            SimFault::Flip(target) => of.flips.push(Flip { target, struck: place }),
            SimFault::MemoryFault => {
                self.fail(worker, Trouble::MemoryFault, "injected: a memory error".to_owned());
            }
            SimFault::OutOfMemory => {
                self.fail(worker, Trouble::OutOfMemory, "injected: out of memory".to_owned());
            }
            SimFault::LinkDown => {
                self.fail(worker, Trouble::LinkDown, "injected: the link is gone".to_owned());
            }
            SimFault::DiskFull | SimFault::DamagedSnapshot | SimFault::SupervisorKilled => {}
        }
    }

    /// A worker reports trouble and ends.
    fn fail(&mut self, worker: usize, trouble: Trouble, text: String) {
        self.workers[worker].say(worker, Report::Failed { trouble, text });
        self.forget_flips(worker);
        self.workers[worker].end();
    }

    /// Every process that works says how far it has come.
    pub fn beat(&mut self) {
        let longest_ms = self.speeds.pause.as_millis() as u64;
        for (worker, of) in self.workers.iter_mut().enumerate().filter(|(_, of)| of.busy) {
            of.operations += u64::from(!of.hung);
            of.say(worker, Report::Beat { operations: of.operations, longest_ms });
        }
    }
}

/// The state that a snapshot's tensor holds.
pub(crate) fn state_in(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}
