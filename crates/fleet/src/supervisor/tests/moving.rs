//! Several numeric classes in one run, and a live run that goes to other devices.

use super::*;

fn run(devices: &[&str], audit: f64, wrongs: &[(usize, u64, Wrong)]) -> World {
    let world = World::on(devices, audit, wrongs, NonFinite::Stop).until_it_ends();
    assert_eq!(world.ending, Some(Ending::Finished), "{:?}", world.events);
    assert_eq!(world.losses, [8.0; STEPS as usize]);
    world
}

fn moved(devices: &[&str], to: &[&str], wrongs: &[(usize, u64, Wrong)]) -> World {
    let mut world = World::on(devices, 0.5, wrongs, NonFinite::Stop);
    world.moves.push_back((1, to.iter().map(|&device| device.to_owned()).collect()));
    let world = world.until_it_ends();
    assert_eq!(world.ending, Some(Ending::Finished), "{:?}", world.events);
    assert_eq!(world.losses, [8.0; STEPS as usize]);
    assert_eq!(world.outcomes.len(), 1);
    world
}

fn liars(world: &World) -> Vec<Option<u32>> {
    let corrupt = world.events.iter().filter(|event| event.kind == EventKind::Corrupt);
    corrupt.map(|event| event.worker).collect()
}

#[test]
fn one_class_applies_the_steps_and_all_compute() {
    for devices in [&["a", "b"][..], &["b", "a", "a"], &["a", "b", "b", "a"], &["a", "b", "c"]] {
        let world = run(devices, 1.0, &[]);
        let want = if devices.len() == 3 && devices[2] == "a" { "a" } else { devices[0] };
        let writers = world.applied.iter().map(|(_, worker)| devices[*worker]);
        assert!(writers.clone().all(|of| of == want), "{devices:?}: {:?}", world.applied);
        assert!(world.classes.iter().all(|of| of.values().sum::<u32>() == LEAVES));
        assert!(world.classes.iter().all(|of| of.len() > 1), "{:?}", world.classes);
        assert_eq!(world.kinds(), ["started", "snapshot", "snapshot", "snapshot", "finished"]);
    }
}

#[test]
fn a_liar_of_either_class_is_found_by_the_other() {
    for liar in 0..2 {
        let world = run(&["a", "b"], 1.0, &[(liar, 2, Wrong::Gradient)]);
        assert_eq!(liars(&world), [Some(liar as u32)], "{:?}", world.events);
    }
    // One that goes on lying is outvoted by two, of whatever class they are.
    for devices in [["a", "a", "b"], ["a", "b", "a"], ["b", "a", "a"], ["a", "b", "c"]] {
        for liar in 0..3 {
            let world = run(&devices, 1.0, &[(liar, 3, Wrong::Stubborn)]);
            let (found, events) = (liars(&world), &world.events);
            assert_eq!(found, [Some(liar as u32)], "{devices:?}: {events:?}");
        }
    }
}

#[test]
fn what_is_said_across_classes_stands_in_the_evidence() {
    let world = run(&["a", "b", "b"], 1.0, &[(0, 2, Wrong::Gradient)]);
    let event = world.events.iter().find(|event| event.kind == EventKind::Corrupt).unwrap();
    let cause = event.cause.clone().unwrap();
    assert!(cause.contains("5.0e-1 apart in `a.weight`, limit 1.0e-2"), "{cause}");
}

#[test]
fn every_fault_in_a_mixed_run_is_survived() {
    let faults = [
        (Wrong::Crash, "crash"),
        (Wrong::Hang, "hang"),
        (Wrong::Weights, "corrupt"),
        (Wrong::Apply, "crash"),
        (Wrong::HandOn, "crash"),
    ];
    for devices in [&["a", "b"][..], &["a", "a", "b"], &["a", "b", "b"]] {
        for (wrong, kind) in faults {
            for worker in 0..devices.len() {
                let world = run(devices, 0.5, &[(worker, 3, wrong)]);
                if world.wrongs.is_empty() {
                    assert!(world.kinds().contains(&kind), "{devices:?} {worker} {wrong:?}");
                } else {
                    let reader = matches!(wrong, Wrong::Apply | Wrong::HandOn);
                    assert!(reader, "{devices:?} {worker} {wrong:?} never came to pass");
                }
            }
        }
    }
}

#[test]
fn when_the_last_of_the_writing_class_dies_another_class_takes_over_without_a_step_lost() {
    for wrong in [Wrong::Crash, Wrong::Apply, Wrong::HandOn] {
        let world = run(&["a", "a", "b"], 0.0, &[(0, 3, wrong), (1, 3, wrong)]);
        let kinds = world.kinds();
        assert!(kinds.contains(&"took_over"), "{wrong:?}: {:?}", world.events);
        assert!(!kinds.contains(&"rolled_back"), "{wrong:?}: {:?}", world.events);
        assert_eq!(world.applied.last(), Some(&(STEPS, 2)));
    }
}

#[test]
fn a_live_run_goes_to_other_devices_of_its_kind_or_another() {
    for (from, to) in [
        (&["a", "a"][..], &["a1", "a2"][..]),
        (&["a", "a"], &["b", "b"]),
        (&["a", "b"], &["b1", "c"]),
        (&["a"], &["b", "b", "b"]),
    ] {
        let world = moved(from, to, &[]);
        let outcome = &world.outcomes[0];
        assert!(outcome.moved, "{outcome:?}");
        let certificate = outcome.certificate.as_ref().unwrap();
        assert_eq!((certificate.from.len(), certificate.to.len()), (from.len(), to.len()));
        let alike = from[0] == "a" && to[0].starts_with('a');
        assert!(certificate.trials.iter().all(|of| of.agree && of.repeats), "{certificate:?}");
        assert!(certificate.trials.iter().all(|of| of.identical == alike || from.len() > to.len()));
        let event = world.events.iter().find(|event| event.kind == EventKind::Moved).unwrap();
        assert!(event.certificate.is_some() && event.step == certificate.step);
        let after = world.applied.iter().filter(|(step, _)| *step > certificate.step);
        assert!(after.clone().count() > 0 && after.clone().all(|(_, of)| *of >= from.len()));
        let missing = world.supervisor.lost().iter().any(|(cause, _)| *cause == "missing_workers");
        assert!(!missing, "{:?}", world.supervisor.lost());
    }
}

#[test]
fn nobody_waits_for_a_trial_but_for_one_that_has_to_be_done_again() {
    // With a micro-batch for each worker the compared one is replaced in every step.
    for (workers, is_replaced) in [(2, false), (LEAVES as usize, true)] {
        let mut world = World::on(&vec!["a"; workers], 0.5, &[], NonFinite::Stop);
        world.moves.push_back((1, vec!["b".to_owned(), "b".to_owned()]));
        world.slow = Some((3, workers));
        let world = world.until_it_ends();
        let outcome = &world.outcomes[0];
        assert!(outcome.moved, "{workers}: {:?}", world.events);
        assert_eq!(world.losses, [8.0; STEPS as usize]);
        let certificate = outcome.certificate.as_ref().unwrap();
        // The old ones did steps while the new ones had not answered.
        assert!(certificate.step >= 3, "{certificate:?}");
        assert!(certificate.trial_ms > certificate.pause_ms || is_replaced, "{certificate:?}");
        let after = world.applied.iter().filter(|(step, _)| *step > certificate.step);
        assert!(after.clone().count() > 0 && after.clone().all(|(_, of)| *of >= workers));
    }
}

#[test]
fn devices_that_fail_are_refused_and_the_run_goes_on_untouched() {
    for (wrong, want) in [
        (Wrong::Load, "no room"),
        (Wrong::Stubborn, "5.0e-1 apart in the gradient of `a.weight`, limit 1.0e-2"),
        (Wrong::Fickle, "does not give the same bits twice"),
        (Wrong::Weights, "weights or moments changed"),
    ] {
        for to in [["b", "b"], ["b", "c"]] {
            let mut world = World::on(&["a", "a"], 0.5, &[], NonFinite::Stop);
            world.moves.push_back((1, to.map(str::to_owned).to_vec()));
            // New workers are numbered from the old ones on; one of them is bad.
            world.wrongs = (0..=STEPS).map(|step| (3, step, wrong)).collect();
            let world = world.until_it_ends();
            assert_eq!(world.ending, Some(Ending::Finished));
            assert_eq!(world.losses, [8.0; STEPS as usize]);
            let outcome = &world.outcomes[0];
            assert!(!outcome.moved && outcome.text.contains(want), "{wrong:?}: {outcome:?}");
            let faults = ["crash", "hang", "corrupt", "rolled_back", "out_of_memory"];
            let fault = world.kinds().into_iter().find(|kind| faults.contains(kind));
            assert_eq!(fault, None, "{:?}", world.events);
            assert!(world.kinds().contains(&"move_refused"));
            assert!(world.applied.iter().all(|(_, worker)| *worker < 2));
        }
    }
}

#[test]
fn what_cannot_be_moved_to_is_refused_at_once() {
    for (to, want) in [
        (vec![], "no device"),
        (vec!["b"; 9], "more devices than micro-batches"),
        (vec!["b"], "second worker"),
    ] {
        let world = moved(&["a", "a"], &to, &[]);
        assert!(world.outcomes[0].text.contains(want), "{:?}", world.outcomes);
        assert_eq!(world.devices.len(), 2, "nothing was started");
    }
}

#[test]
fn a_move_goes_on_when_the_old_ones_fail_meanwhile() {
    for (wrong, step) in
        [(Wrong::Crash, 2), (Wrong::Gradient, 2), (Wrong::Hang, 2), (Wrong::Crash, 3)]
    {
        let world = moved(&["a", "a"], &["b", "b"], &[(0, step, wrong)]);
        assert!(world.outcomes[0].moved, "{wrong:?}: {:?}", world.outcomes);
        assert!(world.applied.iter().any(|(_, worker)| *worker >= 2));
    }
}

#[test]
fn whatever_goes_wrong_in_mixed_and_moving_runs_every_step_is_done_once_and_the_run_ends() {
    // Not `Loss`: two of them in one step rightly end a run.
    let faults = [
        Wrong::Crash,
        Wrong::Hang,
        Wrong::Gradient,
        Wrong::Weights,
        Wrong::Sum,
        Wrong::State,
        Wrong::Apply,
        Wrong::HandOn,
        Wrong::Fickle,
    ];
    let fleets: [&[&str]; 6] =
        [&["a", "b"], &["a", "a", "b"], &["a", "b", "b"], &["a", "b", "c"], &["a", "a"], &["a"]];
    let targets: [&[&str]; 4] = [&["b", "b"], &["a", "c"], &["c", "c", "c"], &["a1", "a2"]];
    for seed in 0..400_u64 {
        let mut draws = (0..).map(|turn| {
            let z = (seed * 1000 + turn + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z ^ (z >> 31)
        });
        let mut below = |limit: usize| (draws.next().unwrap() % limit as u64) as usize;
        let fleet = fleets[below(fleets.len())];
        let count = below(4);
        let wrongs: Vec<(usize, u64, Wrong)> = (0..count)
            .map(|_| (below(5), 1 + below(STEPS as usize) as u64, faults[below(faults.len())]))
            .collect();
        let audit = if fleet.len() > 1 { 1.0 } else { 0.0 };
        let mut world = World::on(fleet, audit, &wrongs, NonFinite::Stop);
        let to = targets[below(targets.len())].iter().map(|&device| device.to_owned()).collect();
        let at = 1 + below(3) as u64;
        world.moves.push_back((at, to));
        let world = world.until_it_ends();
        let story = format!("seed {seed}: {fleet:?} {wrongs:?} {:?}", world.events);
        assert_eq!(world.ending, Some(Ending::Finished), "{story}");
        // A run that goes back to a snapshot does some steps again; all end with the last one.
        assert!(world.losses.len() >= STEPS as usize, "{story}");
        assert!(world.losses.iter().all(|loss| *loss == 8.0), "{story}");
        assert!(world.outcomes.len() <= 1, "{story}");
        let moved = world.outcomes.iter().filter(|outcome| outcome.moved).count();
        let events = world.kinds().iter().filter(|kind| **kind == "moved").count();
        assert_eq!(moved, events, "{story}");
    }
}
