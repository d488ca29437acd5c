//! The conformance suites on a device: every operation against its f64 twin, gradients against
//! differences, the same bits twice, and rows that do not depend on their batch; word sums and
//! digests against the host's. Says so and passes where there is no device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::collections::BTreeMap;
use std::sync::Arc;

use pontoon_cuda::{CudaBackend, Library};
use pontoon_ops::{
    Accumulate, Backend, BufferId, DType, DeviceError, EmbedBwd, OpName, Support, View, digest,
    sums,
};
use pontoon_qualify::cases::{self, Case};
use pontoon_qualify::conformance::{Finding, check};
use pontoon_qualify::{gradient, invariance};

/// Printed with every failure; the cases follow from it.
const SEED: u64 = 20_261_126;

fn device() -> Option<CudaBackend> {
    let opened =
        Library::open().and_then(|library| CudaBackend::open(&Arc::new(library), "cuda:0", 0));
    match opened {
        Ok(device) => Some(device),
        Err(error) => {
            eprintln!("not run: {}", error.text);
            None
        }
    }
}

fn text(finding: &Finding) -> String {
    let Finding { op, dtype, check, case, worst_error, detail, .. } = finding;
    format!("{op} {dtype} {check} ({case}): {worst_error:.3} {detail}")
}

/// What one check found: failures, and by operation how many findings and the worst error.
#[derive(Default)]
struct Found {
    bad: Vec<String>,
    seen: BTreeMap<(String, String), (usize, usize, f64)>,
}

fn run(
    backend: &mut CudaBackend,
    cases: &[Case],
    check: impl Fn(&mut CudaBackend, &Case) -> Result<Vec<Finding>, DeviceError>,
) -> Found {
    let mut found = Found::default();
    for case in cases {
        if matches!(backend.supports(&case.op), Support::No(_)) {
            continue;
        }
        let key = |finding: &Finding| (finding.op.to_owned(), finding.dtype.clone());
        match check(backend, case) {
            Ok(findings) => {
                for finding in findings {
                    let entry = found.seen.entry(key(&finding)).or_default();
                    *entry = (
                        entry.0 + 1,
                        entry.1 + usize::from(!finding.ok),
                        entry.2.max(finding.worst_error),
                    );
                    if !finding.ok {
                        found.bad.push(text(&finding));
                    }
                }
            }
            Err(error) => {
                let name = case.op.name().name();
                found.bad.push(format!("{name} {} ({}): {error}", case.dtype, case.name));
                *backend = device().unwrap();
            }
        }
    }
    found
}

fn report(what: &str, found: &Found) {
    for ((op, dtype), (count, bad, worst)) in &found.seen {
        println!("TABLE {what} {op} {dtype} {count} {bad} {worst:.3}");
    }
    let bad = &found.bad;
    println!("{what}: {} findings, seed {SEED}", bad.len());
    bad.iter().for_each(|line| println!("BAD {what} {line}"));
    assert!(bad.is_empty(), "{what}, seed {SEED}: {} findings", bad.len());
}

fn conformance(dtype: DType) {
    let Some(mut backend) = device() else { return };
    let cases = cases::all(SEED);
    let own: Vec<Case> = cases.into_iter().filter(|case| case.dtype == dtype).collect();
    let found = run(&mut backend, &own, |backend, case| Ok(check(backend, case)?.0));
    report("conformance", &found);
}

#[test]
fn every_operation_is_what_its_contract_says_twice_in_f32() {
    conformance(DType::F32);
}

#[test]
fn every_operation_is_what_its_contract_says_twice_in_bf16() {
    conformance(DType::Bf16);
}

#[test]
fn every_operation_is_what_its_contract_says_twice_in_f16() {
    conformance(DType::F16);
}

#[test]
fn every_operation_but_the_exchanges_is_tried() {
    let cases = cases::all(SEED);
    let exchanges = [OpName::AllReduce, OpName::AllGather, OpName::ReduceScatter];
    for op in OpName::ALL.iter().filter(|op| !exchanges.contains(op)) {
        assert!(cases.iter().any(|case| case.op.name() == *op), "{op:?} has no case");
    }
}

#[test]
fn every_backward_operation_is_the_gradient_of_its_forward_operation() {
    let Some(mut backend) = device() else { return };
    let found = run(&mut backend, &cases::all(SEED), |backend, case| {
        Ok(gradient::check(backend, case)?.into_iter().collect())
    });
    report("gradient", &found);
}

#[test]
fn a_rows_bits_do_not_depend_on_the_rest_of_its_batch() {
    let Some(mut backend) = device() else { return };
    let found = run(&mut backend, &cases::all(SEED), |backend, case| {
        Ok(invariance::check(backend, case)?.into_iter().collect())
    });
    report("invariance", &found);
}

#[test]
fn sums_and_digests_of_device_memory_are_those_of_its_bytes() {
    let Some(mut backend) = device() else { return };
    for bytes in [1, 7, 64, 1000, 262_144, 262_145, 3_000_001] {
        let content: Vec<u8> = (0..bytes).map(|i: usize| (i * 37 + i / 251) as u8).collect();
        let buffer = backend.alloc(bytes).unwrap();
        backend.upload(buffer, 0, &content).unwrap();
        for start in [0, 1, 8].into_iter().filter(|start| *start < bytes) {
            let mut blocks = digest::Blocks::default();
            content[start..].chunks(digest::BLOCK).for_each(|block| blocks.push(block));
            let found = backend.digest(buffer, start, bytes - start).unwrap();
            assert_eq!(found, blocks.finish(), "{bytes} bytes from {start}");
        }
        let views = views_of(buffer, bytes);
        let found = backend.sums(&views).unwrap();
        for (view, found) in views.iter().zip(found) {
            assert_eq!(found, sums::of_view(&mut backend, view).unwrap(), "{view:?}");
        }
        backend.free(buffer).unwrap();
    }
}

#[test]
fn an_operation_launched_with_sums_gives_those_of_passes_around_it() {
    let Some(mut backend) = device() else { return };
    for accumulate in [Accumulate::Overwrite, Accumulate::Add] {
        let mut view = |dtype: DType, shape: [usize; 2], fill: u8| {
            let bytes = dtype.bytes(shape[0] * shape[1]);
            let buffer = backend.alloc(bytes).unwrap();
            let content: Vec<u8> = (0..bytes).map(|i| (i % 4 * 16) as u8 & fill).collect();
            backend.upload(buffer, 0, &content).unwrap();
            View::contiguous(buffer, dtype, shape)
        };
        let (ids, dy) = (view(DType::I32, [6, 1], 0), view(DType::F32, [6, 40], 0xff));
        let (ids, dtable) = (ids.reshape([6]), view(DType::F32, [9, 40], 0xff));
        let op = EmbedBwd { ids, dy, dtable, accumulate }.into();
        let (written, changed) = if accumulate == Accumulate::Add { (0, 4) } else { (4, 0) };
        let ask = sums::Ask { read: 3, written, changed, digested: 0 };
        let first = backend.launch_summed(&op, ask).unwrap();
        let mut content = vec![0; 4 * 9 * 40];
        backend.download(dtable.buffer, 0, &mut content).unwrap();
        let second = sums::launch_in_passes(&mut backend, &op, ask).unwrap();
        assert_eq!(first.read, second.read);
        if accumulate == Accumulate::Overwrite {
            assert_eq!(first.written, second.written);
            assert_eq!(first.written[2], sums::of_row(&content));
        }
    }
}

/// Views of several shapes over bytes.
fn views_of(buffer: BufferId, bytes: usize) -> Vec<View> {
    let mut views = vec![View::contiguous(buffer, DType::I8, [bytes])];
    if bytes >= 1000 {
        let wide = View::contiguous(buffer, DType::Bf16, [25, 20]);
        views.extend([wide, wide.slice(1, 3, 5), wide.slice(0, 2, 7), wide.transpose(0, 1)]);
        views.push(View::contiguous(buffer, DType::F32, [10, 25]).slice(1, 1, 9));
    }
    views
}
