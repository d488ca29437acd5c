//! The conformance suites on the emulated device: every operation against its f64 twin, gradients
//! against differences, the same bits twice, and rows that do not depend on their batch.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::collections::BTreeSet;
use std::sync::Arc;

use pontoon_ascend::{AscendBackend, Library, Operator, needs};
use pontoon_ops::{Backend, Op, OpName, Support};
use pontoon_qualify::cases::{self, Case};
use pontoon_qualify::conformance::{Finding, check, covers};
use pontoon_qualify::{gradient, invariance};

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_125;

fn device() -> AscendBackend {
    let library = Arc::new(Library::linked(pontoon_emu_ascend::symbol));
    AscendBackend::open(&library, "emu-ascend:0", 0).unwrap()
}

fn text(finding: &Finding) -> String {
    let Finding { op, dtype, check, case, worst_error, detail, .. } = finding;
    format!("{op} {dtype} {check} ({case}): {worst_error:.3} {detail}")
}

/// Runs a check over cases; a device failure counts as a finding.
fn run(
    cases: &[Case],
    check: impl Fn(&mut AscendBackend, &Case) -> Result<Vec<Finding>, pontoon_ops::DeviceError>,
) -> (Vec<String>, BTreeSet<&'static str>) {
    let mut backend = device();
    let (mut bad, mut seen) = (Vec::new(), BTreeSet::new());
    for case in cases {
        let name = case.op.name().name();
        match check(&mut backend, case) {
            Ok(findings) => {
                seen.extend(findings.iter().map(|finding| finding.op));
                bad.extend(findings.iter().filter(|finding| !finding.ok).map(text));
            }
            Err(error) => {
                bad.push(format!("{name} {} ({}): {error}", case.dtype, case.name));
                backend = device();
            }
        }
    }
    drop(backend);
    // Misuse that silicon would punish sooner or later is in the emulator's log.
    bad.extend(pontoon_emu_ascend::strict::take(None).iter().map(|entry| format!("{entry:?}")));
    (bad, seen)
}

#[test]
fn every_operation_is_what_its_contract_says_twice_with_the_operators_of_its_table() {
    let cases = cases::all(SEED);
    let exchanges = [OpName::AllReduce, OpName::AllGather, OpName::ReduceScatter];
    let (mut bad, mut used) = (Vec::new(), BTreeSet::new());
    for &op in OpName::ALL.iter().filter(|op| !exchanges.contains(op)) {
        assert!(covers(&cases, op), "{op:?} has no case");
        let own: Vec<Case> = cases.iter().filter(|case| case.op.name() == op).cloned().collect();
        let called = std::cell::RefCell::new(BTreeSet::new());
        let (found, _) = run(&own, |backend, case| {
            let found = check(backend, case)?.0;
            called.borrow_mut().extend(backend.operators_used());
            Ok(found)
        });
        bad.extend(found);
        let called = called.into_inner();
        bad.extend(
            called
                .iter()
                .filter(|one| !listed(op, **one))
                .map(|one| format!("{op:?} also calls {}", one.symbol())),
        );
        used.extend(called);
    }
    assert!(bad.is_empty(), "seed {SEED}: {} findings\n{}", bad.len(), bad.join("\n"));
    let idle: Vec<&Operator> = Operator::ALL
        .iter()
        .filter(|operator| !used.contains(*operator) && !is_one_of_versions(**operator))
        .collect();
    assert!(idle.is_empty(), "no case calls {idle:?}");
}

/// Whether the table of an operation lists an operator, or an older version of it.
fn listed(op: OpName, operator: Operator) -> bool {
    let older = needs::VERSIONS.iter().find(|(_, newer)| *newer == operator);
    needs::operators(op).contains(&older.map_or(operator, |pair| pair.0))
}

/// Of versions that stand for one another only the newest is called.
fn is_one_of_versions(operator: Operator) -> bool {
    needs::VERSIONS.iter().any(|(older, newer)| [*older, *newer].contains(&operator))
}

#[test]
fn every_backward_operation_is_the_gradient_of_its_forward_operation() {
    let check = |backend: &mut AscendBackend, case: &Case| {
        Ok(gradient::check(backend, case)?.into_iter().collect())
    };
    let (bad, seen) = run(&cases::all(SEED), check);
    assert_eq!(seen.len(), 11, "gradients of {seen:?}");
    assert!(bad.is_empty(), "seed {SEED}: {} findings\n{}", bad.len(), bad.join("\n"));
}

#[test]
fn a_rows_bits_do_not_depend_on_the_rest_of_its_batch() {
    let check = |backend: &mut AscendBackend, case: &Case| {
        Ok(invariance::check(backend, case)?.into_iter().collect())
    };
    let (bad, seen) = run(&cases::all(SEED), check);
    assert!(seen.len() >= 23, "rows of {} operations only: {seen:?}", seen.len());
    assert!(bad.is_empty(), "seed {SEED}: {} findings\n{}", bad.len(), bad.join("\n"));
}

#[test]
fn devices_of_one_group_exchange_along_the_contracts_tree() {
    use pontoon_ops::{AllGather, AllReduce, DType, Group, ReduceScatter, View};
    let library = Arc::new(Library::linked(pontoon_emu_ascend::symbol));
    let devices = [0, 1].map(|ordinal| (format!("emu-ascend:{ordinal}"), ordinal));
    let members = AscendBackend::group(&library, &devices).unwrap();
    let tasks: Vec<_> = members
        .into_iter()
        .enumerate()
        .map(|(rank, mut member)| {
            std::thread::spawn(move || {
                let group = Group { id: 0, rank_index: rank as u16, rank_count: 2 };
                let own: Vec<f32> = (0..6).map(|i| (10 * rank + i) as f32).collect();
                let bytes: Vec<u8> = own.iter().flat_map(|value| value.to_le_bytes()).collect();
                let mut buffer = |elements: usize| {
                    let buffer = member.alloc(4 * elements).unwrap();
                    View::contiguous(buffer, DType::F32, [elements])
                };
                let (x, sum, all, part) = (buffer(6), buffer(6), buffer(12), buffer(3));
                member.upload(x.buffer, 0, &bytes).unwrap();
                let ops: [Op; 3] = [
                    AllReduce { x, y: sum, group }.into(),
                    AllGather { x, y: all, group }.into(),
                    ReduceScatter { x, y: part, group }.into(),
                ];
                for op in &ops {
                    assert_eq!(member.supports(op), Support::Yes);
                    member.launch(op).unwrap();
                }
                let mut read = |view: View| -> Vec<f32> {
                    let mut bytes = vec![0; 4 * view.elements()];
                    member.download(view.buffer, 0, &mut bytes).unwrap();
                    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
                };
                assert_eq!(read(sum), [10.0, 12.0, 14.0, 16.0, 18.0, 20.0]);
                assert_eq!(read(all)[6..], [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
                let wanted = if rank == 0 { [10.0, 12.0, 14.0] } else { [16.0, 18.0, 20.0] };
                assert_eq!(read(part), wanted);
            })
        })
        .collect();
    tasks.into_iter().for_each(|task| task.join().unwrap());
}
