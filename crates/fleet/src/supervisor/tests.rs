//! The supervisor against pretended workers, whose digests are those of an honest chip.

mod moving;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::*;
use crate::protocol::{Against, Apart, Bits, DeviceFacts, Node, Rates, Trouble};

const RATES: Rates = Rates { lr: 0.1, imbalance: None };

const LEAVES: u32 = 8;
const STEPS: u64 = 6;

/// What a worker does wrong once, at a step.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Crash,
    Hang,
    Gradient,
    Weights,
    Sum,
    Loss,
    /// Its state changed: it computes with it until it is replaced.
    State,
    /// It computes wrongly from now on, with the right state.
    Stubborn,
    /// Its memory is too small; steps do not count.
    Load,
    /// It is gone when it is told to apply a step, or to hand on the state after it.
    Apply,
    HandOn,
    /// Its sum changes before it is applied, which it finds itself.
    Spoilt,
    /// It finds a product of its own wrong.
    Product,
    /// Its norm is no number.
    Norm,
    /// It computes something else each time it is asked once more.
    Fickle,
    /// It takes ten times as long.
    Slow,
}

struct World {
    supervisor: Supervisor,
    now: Duration,
    queue: VecDeque<(usize, u32, Command)>,
    incarnations: Vec<u32>,
    /// Still to come: worker, step, what.
    wrongs: Vec<(usize, u64, Wrong)>,
    events: Vec<Event>,
    losses: Vec<f64>,
    ending: Option<Ending>,
    hung: Vec<(usize, u32)>,
    /// Those with another state, and those that compute wrongly.
    changed: Vec<(usize, u32)>,
    stubborn: Vec<(usize, u32)>,
    /// By worker; a device's name up to a digit is its numeric class.
    devices: Vec<String>,
    /// What lies in the exchange by first leaf.
    published: BTreeMap<u32, u64>,
    /// Who was told to apply a step, and the leaves of each class.
    applied: Vec<(u64, usize)>,
    classes: Vec<BTreeMap<String, u32>>,
    /// Still to be asked for: the step from which on, and the devices.
    moves: VecDeque<(u64, Vec<String>)>,
    outcomes: Vec<MoveOutcome>,
    /// Until the first of these steps is done, workers from the second on do not come to their
    /// trials.
    slow: Option<(u64, usize)>,
    held: VecDeque<(usize, u32, Command)>,
    /// Steps done.
    step: u64,
    outbox: VecDeque<Input>,
}

fn state(step: u64) -> StateDigest {
    [1000 + step, 2000 + step]
}

fn of_leaf(step: u64, leaf: u32) -> u64 {
    step * 100 + u64::from(leaf)
}

impl World {
    fn run(workers: usize, audit: f64, wrongs: &[(usize, u64, Wrong)]) -> World {
        World::run_with(workers, audit, wrongs, NonFinite::Stop)
    }

    fn run_with(
        workers: usize,
        audit: f64,
        wrongs: &[(usize, u64, Wrong)],
        non_finite: NonFinite,
    ) -> World {
        World::on(&vec!["chip"; workers], audit, wrongs, non_finite).until_it_ends()
    }

    fn on(
        devices: &[&str],
        audit: f64,
        wrongs: &[(usize, u64, Wrong)],
        non_finite: NonFinite,
    ) -> World {
        let settings = Settings {
            devices: devices.iter().map(|&device| device.to_owned()).collect(),
            leaves: LEAVES,
            steps: STEPS,
            seed: 1,
            snapshot_every: 2,
            save_patience: Duration::from_secs(60),
            validation: Validation::Every(3),
            audit,
            non_finite,
            hang_after: HangAfter::Auto,
            tolerance: Tolerance { gradient: 0.01, loss: 0.01, curve: 0.01 },
            source: Source::Fresh,
        };
        World {
            supervisor: Supervisor::new(settings),
            now: Duration::ZERO,
            queue: VecDeque::new(),
            incarnations: Vec::new(),
            wrongs: wrongs.to_vec(),
            events: Vec::new(),
            losses: Vec::new(),
            ending: None,
            hung: Vec::new(),
            changed: Vec::new(),
            stubborn: Vec::new(),
            devices: Vec::new(),
            published: BTreeMap::new(),
            applied: Vec::new(),
            classes: Vec::new(),
            moves: VecDeque::new(),
            outcomes: Vec::new(),
            slow: None,
            held: VecDeque::new(),
            step: 0,
            outbox: VecDeque::from([Input::Start]),
        }
    }

    fn until_it_ends(mut self) -> World {
        for _ in 0..100_000 {
            if self.ending.is_some() {
                return self;
            }
            self.turn();
        }
        panic!("the run does not end; events: {:?}", self.events);
    }

    fn turn(&mut self) {
        self.now += Duration::from_millis(10);
        self.hold_trials();
        if let Some((worker, incarnation, command)) = self.queue.pop_front()
            && self.incarnations[worker] == incarnation
            && !self.hung.contains(&(worker, incarnation))
        {
            self.work(worker, incarnation, command);
        }
        let input = self.outbox.pop_front().unwrap_or(Input::Tick);
        for output in self.supervisor.handle(self.now, input) {
            self.obey(output);
        }
    }

    /// Keeps the commands of slow workers, in their order.
    fn hold_trials(&mut self) {
        let Some((step, first)) = self.slow else { return };
        if self.step >= step {
            while let Some(command) = self.held.pop_back() {
                self.queue.push_front(command);
            }
            return;
        }
        let is_trial = |command: &Command| {
            matches!(command, Command::Replay { against: Against::Published, .. })
        };
        while let Some(next) = self.queue.pop_front_if(|(worker, _, command)| {
            *worker >= first && (is_trial(command) || !self.held.is_empty())
        }) {
            self.held.push_back(next);
        }
    }

    fn obey(&mut self, output: Output) {
        match output {
            Output::Launch { worker, incarnation, device, .. } => {
                self.incarnations.resize(self.incarnations.len().max(worker + 1), 0);
                self.devices.resize(self.devices.len().max(worker + 1), String::new());
                self.incarnations[worker] = incarnation;
                self.devices[worker] = device;
            }
            Output::Kill { .. } => {}
            Output::Send { worker, command } => {
                self.queue.push_back((worker, self.incarnations[worker], command));
            }
            Output::Event(event) => {
                if matches!(event.kind, EventKind::Started | EventKind::Resumed) {
                    self.step = event.step;
                }
                self.events.push(event);
            }
            Output::Step(done) => {
                assert_eq!(done.step, self.step + 1);
                self.step = done.step;
                self.losses.push(done.losses.iter().sum());
                self.classes.push(done.classes);
                if let Some((_, devices)) = self.moves.pop_front_if(|(step, _)| *step <= done.step)
                {
                    self.outbox.push_back(Input::Move { devices });
                }
            }
            Output::Save { step, .. } => {
                self.outbox.push_back(Input::Saved { step, folder: format!("step-{step}") });
            }
            Output::Moved(outcome) => self.outcomes.push(*outcome),
            Output::End(ending) => self.ending = Some(ending),
        }
    }

    /// Whether the worker does this wrong now; it does so once.
    fn is_wrong(&mut self, worker: usize, step: u64, wrong: Wrong) -> bool {
        let place = self.wrongs.iter().position(|of| *of == (worker, step, wrong));
        place.map(|place| self.wrongs.swap_remove(place)).is_some()
    }

    fn class(&self, worker: usize) -> String {
        let is_class = |letter: &char| !letter.is_ascii_digit();
        self.devices[worker].chars().take_while(is_class).collect()
    }

    /// A leaf's gradient as this worker's class computes it.
    fn of_leaf(&self, worker: usize, step: u64, leaf: u32) -> u64 {
        let class = self.class(worker).bytes().map(u64::from).sum::<u64>();
        (class << 32) + of_leaf(step, leaf)
    }

    fn lie(&self, worker: usize, incarnation: u32) -> u64 {
        let lists = [&self.changed, &self.stubborn];
        u64::from(lists.iter().any(|list| list.contains(&(worker, incarnation))))
    }

    /// The state after a step: one that was passed over changes nothing.
    fn state(&self, step: u64) -> StateDigest {
        let skipped = self.events.iter().filter(|event| event.kind == EventKind::Skipped).count();
        state(step - skipped as u64)
    }

    fn work(&mut self, worker: usize, incarnation: u32, command: Command) {
        let say = |world: &mut World, report: Report| {
            world.outbox.push_back(Input::Report { worker, incarnation, report });
        };
        match command {
            Command::Load { from } => {
                if self.is_wrong(worker, 0, Wrong::Load) {
                    let (trouble, text) = (Trouble::OutOfMemory, "no room".to_owned());
                    return say(self, Report::Failed { trouble, text });
                }
                let digest = (from != Source::Nothing).then(|| self.state(0));
                let numeric_class = self.class(worker);
                let device = DeviceFacts { numeric_class, ..DeviceFacts::default() };
                say(self, Report::Ready { step: 0, digest, device });
            }
            Command::Import { step } => {
                say(self, Report::Imported { step, digest: self.state(step) })
            }
            Command::Compute { step, nodes, digests, .. } => {
                self.compute((worker, incarnation), step, &nodes, &digests);
            }
            Command::Replay { step, leaf, against } => {
                let report = self.replay((worker, incarnation), step, leaf, against);
                say(self, report);
            }
            Command::Check { step } => {
                let mut digest = self.state(step - 1);
                digest[0] += u64::from(self.changed.contains(&(worker, incarnation)));
                digest[0] += u64::from(self.is_wrong(worker, step, Wrong::Weights));
                say(self, Report::Checked { step, digest });
            }
            Command::Combine { step, nodes } => {
                let nodes = nodes.iter().map(|node| self.published[&node.first]).collect();
                let [before, weights] = self.state(step - 1);
                let flip = u64::from(self.is_wrong(worker, step, Wrong::Weights));
                let gradient = step + u64::from(self.is_wrong(worker, step, Wrong::Sum));
                let bad = self.is_wrong(worker, step, Wrong::Norm);
                let norm = if bad { f64::NAN } else { 1.0 };
                let (before, norm) = ([before ^ flip, weights], norm.into());
                say(self, Report::Combined { step, before, nodes, gradient, norm });
            }
            Command::Apply { step } => {
                if self.is_wrong(worker, step, Wrong::Apply) {
                    return self.gone((worker, incarnation));
                }
                if self.is_wrong(worker, step, Wrong::Spoilt) {
                    let (trouble, text) = (Trouble::Corrupt, "it changed".to_owned());
                    return say(self, Report::Failed { trouble, text });
                }
                self.applied.push((step, worker));
                say(self, Report::Applied { step, rates: RATES, after: self.state(step) });
            }
            Command::Export { step, area } => {
                if area == Area::Step && self.is_wrong(worker, step, Wrong::HandOn) {
                    return self.gone((worker, incarnation));
                }
                say(self, Report::Exported { step, area, digest: self.state(step)[0] });
            }
            Command::Score { step } => say(self, Report::Scored { step, loss: 1.0.into() }),
            Command::Stop => {}
        }
    }

    fn gone(&mut self, (worker, incarnation): (usize, u32)) {
        let cause = "gone".to_owned();
        self.outbox.push_back(Input::Gone { worker, incarnation, cause });
    }

    fn compute(&mut self, of: (usize, u32), step: u64, nodes: &[Node], digests: &[u32]) {
        let (worker, incarnation) = of;
        if self.is_wrong(worker, step, Wrong::Crash) {
            return self.gone(of);
        }
        if self.is_wrong(worker, step, Wrong::Hang) {
            return self.hung.push(of);
        }
        if self.is_wrong(worker, step, Wrong::Product) {
            let report =
                Report::Failed { trouble: Trouble::Corrupt, text: "a wrong product".to_owned() };
            return self.outbox.push_back(Input::Report { worker, incarnation, report });
        }
        if self.is_wrong(worker, step, Wrong::State) {
            self.changed.push(of);
        }
        if self.is_wrong(worker, step, Wrong::Stubborn) {
            self.stubborn.push(of);
        }
        let lie =
            u64::from(self.is_wrong(worker, step, Wrong::Gradient)) + self.lie(worker, incarnation);
        let bad_loss = self.is_wrong(worker, step, Wrong::Loss);
        let seconds = if self.is_wrong(worker, step, Wrong::Slow) { 0.1 } else { 0.01 };
        for &node in nodes {
            let range = node.first..node.first + node.count;
            let inside = digests.iter().filter(|leaf| range.contains(leaf));
            let value = |leaf: &u32| (*leaf, self.of_leaf(worker, step, *leaf) + lie);
            let leaves = inside.map(value).collect();
            let value = if bad_loss { f64::NAN } else { 1.0 };
            let losses = vec![Bits::from(value); node.count as usize];
            let digest = self.of_leaf(worker, step, node.first) + lie;
            self.published.insert(node.first, digest);
            let report = Report::Computed { step, node, digest, leaves, losses, seconds };
            self.outbox.push_back(Input::Report { worker, incarnation, report });
        }
    }

    fn replay(&mut self, of: (usize, u32), step: u64, leaf: u32, against: Against) -> Report {
        let (worker, incarnation) = of;
        if self.is_wrong(worker, step, Wrong::Stubborn) {
            self.stubborn.push(of);
        }
        let fickle = u64::from(self.is_wrong(worker, step, Wrong::Fickle));
        let lie = self.lie(worker, incarnation) + 7 * fickle;
        let (digest, loss) = (self.of_leaf(worker, step, leaf) + lie, 1.0.into());
        let apart = (against == Against::Published).then(|| {
            let published = self.published[&leaf];
            // Classes differ in the upper half, lies in the lower.
            let error = if published as u32 == digest as u32 { 0.001 } else { 0.5 };
            Apart { published, error: error.into(), tensor: "a.weight".to_owned() }
        });
        Report::Replayed { step, leaf, digest, loss, apart }
    }

    fn kinds(&self) -> Vec<&'static str> {
        self.events.iter().map(|event| event.kind.name()).collect()
    }
}

#[test]
fn a_run_in_peace_does_every_step_once_and_saves() {
    for workers in 1..=4 {
        let world = World::run(workers, if workers > 1 { 0.5 } else { 0.0 }, &[]);
        assert_eq!(world.ending, Some(Ending::Finished));
        assert_eq!(world.losses, [8.0; STEPS as usize]);
        assert_eq!(world.kinds(), ["started", "snapshot", "snapshot", "snapshot", "finished"]);
    }
}

#[test]
fn every_fault_is_named_and_the_run_ends_all_the_same() {
    for (wrong, kind) in [
        (Wrong::Crash, "crash"),
        (Wrong::Hang, "hang"),
        (Wrong::Gradient, "corrupt"),
        (Wrong::Weights, "corrupt"),
        (Wrong::Sum, "corrupt"),
        (Wrong::Loss, "corrupt"),
        (Wrong::Spoilt, "corrupt"),
    ] {
        let world = World::run(3, 1.0, &[(1, 3, wrong)]);
        assert_eq!(world.ending, Some(Ending::Finished), "{kind}");
        assert_eq!(world.losses, [8.0; STEPS as usize], "{kind}");
        assert!(world.wrongs.is_empty(), "{kind} was never injected");
        let event = world.events.iter().find(|event| event.kind.name() == kind);
        assert_eq!(event.and_then(|event| event.worker), Some(1), "{:?}", world.events);
        assert!(world.kinds().contains(&"joined"), "{kind}: the replacement joins");
    }
}

#[test]
fn one_that_hangs_while_all_others_wait_is_found_by_its_beats_before_silence_alone_would_tell() {
    let mut world = World::on(&["chip"; 3], 0.0, &[(1, 3, Wrong::Hang)], NonFinite::Stop);
    let mut stood_still = None;
    while world.ending.is_none() {
        world.turn();
        // Once in 50 ms, as real ones do.
        if world.now.as_millis().is_multiple_of(50) {
            for (worker, incarnation) in world.hung.clone() {
                let report = Report::Beat { operations: 7, longest_ms: 10 };
                world.outbox.push_back(Input::Report { worker, incarnation, report });
                stood_still.get_or_insert(world.now);
            }
        }
        if let Some(hang) = world.events.iter().find(|event| event.kind == EventKind::Hang) {
            assert!(hang.cause.as_deref().unwrap_or_default().contains("it beats"), "{hang:?}");
            let took = world.now - stood_still.expect("it hung before it was found");
            assert!(took < Duration::from_millis(1_200), "{took:?}");
            world.hung.clear();
        }
    }
    assert_eq!(world.ending, Some(Ending::Finished));
    assert_eq!(world.losses, [8.0; STEPS as usize]);
    assert_eq!(world.kinds().iter().filter(|kind| **kind == "hang").count(), 1);
}

#[test]
fn a_lone_worker_repeats_a_step_that_it_found_wrong_once() {
    let world = World::run(1, 0.0, &[(0, 3, Wrong::Product)]);
    assert_eq!(world.ending, Some(Ending::Finished), "{:?}", world.events);
    assert_eq!(world.losses, [8.0; STEPS as usize]);
    let kinds = world.kinds();
    assert!(kinds.contains(&"corrupt") && !kinds.contains(&"rolled_back"), "{kinds:?}");
    let twice = World::run(1, 0.0, &[(0, 3, Wrong::Product), (0, 3, Wrong::Product)]);
    assert!(twice.kinds().contains(&"rolled_back"), "{:?}", twice.events);
    // Where there are others, they do it.
    let with_others = World::run(2, 0.0, &[(0, 3, Wrong::Product)]);
    assert_eq!(with_others.losses, [8.0; STEPS as usize]);
    assert!(with_others.kinds().contains(&"joined"), "{:?}", with_others.events);
}

#[test]
fn a_worker_that_is_slow_for_a_moment_gets_less_and_is_not_accused() {
    let slow: Vec<(usize, u64, Wrong)> = (1..=4).map(|step| (1, step, Wrong::Slow)).collect();
    let world = World::run(2, 0.0, &slow);
    assert_eq!(world.ending, Some(Ending::Finished));
    assert!(world.wrongs.len() < slow.len(), "it was never slow");
    assert_eq!(world.kinds(), ["started", "snapshot", "snapshot", "snapshot", "finished"]);
}

#[test]
fn a_supervisor_that_was_stopped_with_its_workers_accuses_nobody() {
    let mut world = World::on(&["chip"; 3], 0.0, &[], NonFinite::Stop);
    while world.step < 3 {
        world.turn();
    }
    // Everyone was stopped for a minute in the middle of a step.
    world.now += Duration::from_secs(60);
    world.outbox.push_front(Input::Stalled);
    let world = world.until_it_ends();
    assert_eq!(world.ending, Some(Ending::Finished));
    assert!(!world.kinds().contains(&"hang"), "{:?}", world.events);
    let lost = world.supervisor.lost();
    let stalled = lost.iter().find(|(cause, _)| *cause == "stalled").map(|(_, seconds)| *seconds);
    assert!(stalled.is_some_and(|seconds| seconds > 59.0), "{lost:?}");
}

#[test]
fn a_flip_in_one_of_two_workers_is_arbitrated_by_computing_again() {
    let world = World::run(2, 1.0, &[(0, 2, Wrong::Gradient)]);
    assert_eq!(world.ending, Some(Ending::Finished));
    let corrupt = world.events.iter().find(|event| event.kind.name() == "corrupt");
    assert_eq!(corrupt.and_then(|event| event.worker), Some(0), "{:?}", world.events);
}

#[test]
fn of_two_that_differ_the_one_whose_state_changed_is_the_liar() {
    for liar in 0..2 {
        let world = World::run(2, 1.0, &[(liar, 3, Wrong::State)]);
        assert_eq!(world.ending, Some(Ending::Finished), "{:?}", world.events);
        assert_eq!(world.losses, [8.0; STEPS as usize]);
        let corrupt: Vec<&Event> =
            world.events.iter().filter(|event| event.kind == EventKind::Corrupt).collect();
        assert_eq!(corrupt.len(), 1, "{corrupt:?}");
        assert_eq!(corrupt[0].worker, Some(liar as u32));
    }
}

#[test]
fn two_that_stand_by_different_gradients_wait_for_the_third_that_is_coming_back() {
    let wrongs = [(2, 3, Wrong::Crash), (0, 3, Wrong::Stubborn)];
    let world = World::run(3, 1.0, &wrongs);
    assert_eq!(world.ending, Some(Ending::Finished), "{:?}", world.events);
    let corrupt: Vec<Option<u32>> = (world.events.iter())
        .filter(|event| event.kind == EventKind::Corrupt)
        .map(|event| event.worker)
        .collect();
    assert_eq!(corrupt, [Some(0)], "{:?}", world.events);
}

#[test]
fn two_that_stand_by_different_gradients_and_are_alone_stop_with_advice() {
    let world = World::run(2, 1.0, &[(0, 3, Wrong::Stubborn)]);
    let Some(Ending::Failed(text)) = &world.ending else { panic!("{:?}", world.ending) };
    assert!(text.contains("step 3") && text.contains("qualify the devices"), "{text}");
}

#[test]
fn a_norm_that_is_no_number_twice_ends_the_run_or_is_passed_over_on_any_number_of_workers() {
    for workers in 1..=3 {
        let norm = |times: usize| -> Vec<(usize, u64, Wrong)> {
            (0..workers * times).map(|of| (of % workers, 4, Wrong::Norm)).collect()
        };
        let once = World::run_with(workers, 0.0, &norm(1), NonFinite::Stop);
        assert_eq!(once.ending, Some(Ending::Finished), "{workers}: {:?}", once.events);
        assert!(once.kinds().contains(&"corrupt"), "{workers}: {:?}", once.events);
        let stopped = World::run_with(workers, 0.0, &norm(2), NonFinite::Stop);
        assert!(matches!(stopped.ending, Some(Ending::NonFinite { step: 4, .. })), "{workers}");
        let skipped = World::run_with(workers, 0.0, &norm(2), NonFinite::Skip);
        assert_eq!(skipped.ending, Some(Ending::Finished), "{workers}: {:?}", skipped.events);
        assert!(skipped.kinds().contains(&"skipped"), "{workers}");
    }
}

#[test]
fn a_step_without_a_number_on_two_workers_ends_the_run_or_is_passed_over() {
    let everywhere: Vec<(usize, u64, Wrong)> =
        [0, 1, 0, 1].map(|worker| (worker, 4, Wrong::Loss)).to_vec();
    let stopped = World::run_with(2, 0.0, &everywhere, NonFinite::Stop);
    assert!(matches!(stopped.ending, Some(Ending::NonFinite { step: 4, .. })));
    let skipped = World::run_with(2, 0.0, &everywhere, NonFinite::Skip);
    assert_eq!(skipped.ending, Some(Ending::Finished), "{:?}", skipped.events);
    assert_eq!(skipped.kinds().iter().filter(|kind| **kind == "skipped").count(), 1);
    assert_eq!(skipped.losses.iter().filter(|loss| loss.is_nan()).count(), 1);
}
