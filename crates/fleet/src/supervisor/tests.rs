//! The supervisor against pretended workers, whose digests are those of an honest chip.

use std::collections::VecDeque;
use std::time::Duration;

use super::*;
use crate::protocol::{Bits, DeviceFacts, Rates};

const RATES: Rates = Rates { lr: 0.1, imbalance: None };

const LEAVES: u32 = 8;
const STEPS: u64 = 6;

/// What a worker does wrong once, at a step.
#[derive(Clone, Copy, PartialEq)]
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
        let settings = Settings {
            devices: vec!["chip".to_owned(); workers],
            leaves: LEAVES,
            steps: STEPS,
            seed: 1,
            snapshot_every: 2,
            validation: Validation::Every(3),
            audit,
            non_finite,
            hang_after: HangAfter::Auto,
            source: Source::Fresh,
        };
        let mut world = World {
            supervisor: Supervisor::new(settings),
            now: Duration::ZERO,
            queue: VecDeque::new(),
            incarnations: vec![0; workers],
            wrongs: wrongs.to_vec(),
            events: Vec::new(),
            losses: Vec::new(),
            ending: None,
            hung: Vec::new(),
            changed: Vec::new(),
            stubborn: Vec::new(),
            outbox: VecDeque::new(),
        };
        world.outbox.push_back(Input::Start);
        for _ in 0..100_000 {
            if world.ending.is_some() {
                return world;
            }
            world.turn();
        }
        panic!("the run does not end; events: {:?}", world.events);
    }

    fn turn(&mut self) {
        self.now += Duration::from_millis(10);
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

    fn obey(&mut self, output: Output) {
        match output {
            Output::Launch { worker, incarnation, .. } => self.incarnations[worker] = incarnation,
            Output::Kill { .. } => {}
            Output::Send { worker, command } => {
                self.queue.push_back((worker, self.incarnations[worker], command));
            }
            Output::Event(event) => self.events.push(event),
            Output::Step(done) => {
                assert_eq!(done.step, self.losses.len() as u64 % STEPS + 1);
                self.losses.push(done.losses.iter().sum());
            }
            Output::Save { step, .. } => {
                self.outbox.push_back(Input::Saved { step, folder: format!("step-{step}") });
            }
            Output::End(ending) => self.ending = Some(ending),
        }
    }

    /// Whether the worker does this wrong now; it does so once.
    fn is_wrong(&mut self, worker: usize, step: u64, wrong: Wrong) -> bool {
        let place = self.wrongs.iter().position(|of| *of == (worker, step, wrong));
        place.map(|place| self.wrongs.swap_remove(place)).is_some()
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
                let digest = (from != Source::Nothing).then(|| self.state(0));
                let device = DeviceFacts::default();
                say(self, Report::Ready { step: 0, digest, device });
            }
            Command::Import { step } => {
                say(self, Report::Imported { step, digest: self.state(step) })
            }
            Command::Compute { step, nodes, digests, .. } => {
                if self.is_wrong(worker, step, Wrong::Crash) {
                    let cause = "gone".to_owned();
                    return self.outbox.push_back(Input::Gone { worker, incarnation, cause });
                }
                if self.is_wrong(worker, step, Wrong::Hang) {
                    return self.hung.push((worker, incarnation));
                }
                if self.is_wrong(worker, step, Wrong::State) {
                    self.changed.push((worker, incarnation));
                }
                if self.is_wrong(worker, step, Wrong::Stubborn) {
                    self.stubborn.push((worker, incarnation));
                }
                let lie = u64::from(self.is_wrong(worker, step, Wrong::Gradient))
                    + self.lie(worker, incarnation);
                let bad_loss = self.is_wrong(worker, step, Wrong::Loss);
                for node in nodes {
                    let range = node.first..node.first + node.count;
                    let inside = digests.iter().filter(|leaf| range.contains(leaf));
                    let leaves = inside.map(|leaf| (*leaf, of_leaf(step, *leaf) + lie)).collect();
                    let value = if bad_loss { f64::NAN } else { 1.0 };
                    let losses = vec![Bits::from(value); node.count as usize];
                    let (digest, seconds) = (of_leaf(step, node.first), 0.01);
                    say(self, Report::Computed { step, node, digest, leaves, losses, seconds });
                }
            }
            Command::Replay { step, leaf } => {
                let lie = self.lie(worker, incarnation);
                let (digest, loss) = (of_leaf(step, leaf) + lie, 1.0.into());
                say(self, Report::Replayed { step, leaf, digest, loss });
            }
            Command::Check { step } => {
                let mut digest = self.state(step - 1);
                digest[0] += u64::from(self.changed.contains(&(worker, incarnation)));
                say(self, Report::Checked { step, digest });
            }
            Command::Combine { step, nodes } => {
                let nodes = nodes.iter().map(|node| of_leaf(step, node.first)).collect();
                let [before, weights] = self.state(step - 1);
                let flip = u64::from(self.is_wrong(worker, step, Wrong::Weights));
                let gradient = step + u64::from(self.is_wrong(worker, step, Wrong::Sum));
                let (before, norm) = ([before ^ flip, weights], 1.0.into());
                say(self, Report::Combined { step, before, nodes, gradient, norm });
            }
            Command::Apply { step } => {
                say(self, Report::Applied { step, rates: RATES, after: self.state(step) });
            }
            Command::Export { step, area } => {
                say(self, Report::Exported { step, area, digest: self.state(step)[0] });
            }
            Command::Score { step } => say(self, Report::Scored { step, loss: 1.0.into() }),
            Command::Stop => {}
        }
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
