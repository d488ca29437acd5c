//! What the vendor's failures become: each is played by the emulator inside its library and must
//! come out as the kind that decides what the supervisor does.
//!
//! Each test has an emulated device of its own, because failures strike a whole device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::sync::Arc;
use std::time::Duration;

use pontoon_ascend::{AscendBackend, Library};
use pontoon_emu_ascend::fault::{Fault, Kind};
use pontoon_emu_ascend::{clear, inject};
use pontoon_ops::DeviceErrorKind::{
    BadArgument, Hang, LinkDown, Lost, MemoryFault, OutOfMemory, Unsupported,
};
use pontoon_ops::{Backend, DType, DeviceError, DeviceErrorKind, Op, Scale, Support, SwiGlu, View};

/// Longer than a task takes, short enough to wait for a hang.
const SHORT: Duration = Duration::from_millis(100);

fn device(ordinal: i32) -> AscendBackend {
    let library = Arc::new(Library::linked(pontoon_emu_ascend::symbol));
    AscendBackend::open(&library, "emu", ordinal).unwrap()
}

/// An operation on a buffer of its own.
fn operation(backend: &mut AscendBackend) -> Op {
    let x = View::contiguous(backend.alloc(64).unwrap(), DType::F32, [16]);
    backend.upload(x.buffer, 0, &1_f32.to_le_bytes().repeat(16)).unwrap();
    backend.wait(Duration::from_secs(10)).unwrap();
    Scale { x, factor: 2.0, y: x }.into()
}

/// Runs an operation to its end.
fn run(backend: &mut AscendBackend, op: &Op) -> Result<(), DeviceError> {
    backend.launch(op)?;
    backend.wait(SHORT)
}

#[test]
fn every_failing_task_has_its_kind_and_code() {
    let table: [(Kind, i64, DeviceErrorKind); 14] = [
        (Kind::Hang, 507_046, Hang),
        (Kind::AicoreTimeout, 507_014, Hang),
        (Kind::VectorTimeout, 507_034, Hang),
        (Kind::FftsTimeout, 507_048, Hang),
        (Kind::AicoreException, 507_015, MemoryFault),
        (Kind::VectorException, 507_035, MemoryFault),
        (Kind::DeviceMemory, 507_053, MemoryFault),
        (Kind::HbmFault, 507_054, MemoryFault),
        (Kind::SuspectMemory, 507_055, MemoryFault),
        (Kind::LinkDown, 507_056, LinkDown),
        (Kind::SuspectRemote, 507_057, LinkDown),
        (Kind::CollectiveRetry, 507_904, LinkDown),
        (Kind::TaskOutOfMemory, 207_018, OutOfMemory),
        (Kind::NoKernel, 561_003, Unsupported),
    ];
    for (kind, code, wanted) in table {
        let mut backend = device(1);
        let op = operation(&mut backend);
        inject(&Fault::new(kind).on(1).about("Muls"));
        let error = run(&mut backend, &op).unwrap_err();
        assert_eq!((error.kind, error.vendor_code), (wanted, code), "{kind:?}: {error}");
        assert!(!error.text.contains('\n'), "{kind:?}: {error}");
        // What the device does not recover from stays; the rest is over.
        let again = run(&mut backend, &op);
        match wanted {
            Hang | MemoryFault => assert_eq!(again, Err(error), "{kind:?}"),
            LinkDown | OutOfMemory => assert_eq!(again, Ok(()), "{kind:?}"),
            _ => assert_eq!(again.unwrap_err().kind, wanted),
        }
        drop(backend);
        clear(1).unwrap();
        let mut fresh = device(1);
        let op = operation(&mut fresh);
        assert_eq!(run(&mut fresh, &op), Ok(()), "a new worker's device after {kind:?}");
    }
}

#[test]
fn a_device_that_is_gone_stays_gone() {
    for (ordinal, kind, code) in
        [(2, Kind::LostHeartbeat, 507_010), (3, Kind::SocketClosed, 507_901)]
    {
        let mut backend = device(ordinal);
        let op = operation(&mut backend);
        inject(&Fault::new(kind).on(ordinal));
        let error = run(&mut backend, &op).unwrap_err();
        assert_eq!((error.kind, error.vendor_code), (Lost, code), "{error}");
        assert_eq!(backend.alloc(16).unwrap_err(), error);
        let mut bytes = [0; 4];
        let Op::Scale(scale) = &op else { unreachable!("made above") };
        assert_eq!(backend.download(scale.x.buffer, 0, &mut bytes).unwrap_err(), error);
    }
}

#[test]
fn damaged_memory_is_named_by_its_buffer() {
    let mut backend = device(4);
    let op = operation(&mut backend);
    let Op::Scale(scale) = &op else { unreachable!("made above") };
    inject(&Fault::new(Kind::HbmFault).on(4).about("Muls"));
    let error = run(&mut backend, &op).unwrap_err();
    let buffer = format!("in buffer {}", scale.x.buffer.0);
    assert!(error.text.contains(&buffer) && error.text.contains("repaired"), "{error}");
}

#[test]
fn an_allocation_that_does_not_fit_leaves_the_device_usable() {
    let mut backend = device(5);
    inject(&Fault::new(Kind::OutOfMemory).on(5));
    assert_eq!(backend.alloc(1 << 20).unwrap_err().kind, OutOfMemory);
    let op = operation(&mut backend);
    assert_eq!(run(&mut backend, &op), Ok(()));
    assert_eq!(backend.free(pontoon_ops::BufferId(77)).unwrap_err().kind, BadArgument);
}

#[test]
fn used_up_streams_and_missing_symbols_are_said_by_name() {
    let library = Arc::new(Library::linked(pontoon_emu_ascend::symbol));
    inject(&Fault::new(Kind::NoStream).on(6));
    let error = AscendBackend::open(&library, "emu", 6).map(drop).unwrap_err();
    assert_eq!((error.kind, error.vendor_code), (Lost, 207_008), "{error}");
    let older = |name: &str| match name.contains("aclnnSilu") || name == "aclrtMallocHost" {
        true => None,
        false => pontoon_emu_ascend::symbol(name),
    };
    let library = Arc::new(Library::linked(older));
    let mut backend = AscendBackend::open(&library, "emu", 6).unwrap();
    let view = |backend: &mut AscendBackend| {
        View::contiguous(backend.alloc(64).unwrap(), DType::F32, [4, 4])
    };
    let (gate, up, y) = (view(&mut backend), view(&mut backend), view(&mut backend));
    let op: Op = SwiGlu { gate, up, y }.into();
    assert!(matches!(backend.supports(&op), Support::No(reason) if reason.contains("lacks")));
    let error = backend.launch(&op).unwrap_err();
    assert_eq!(error.kind, Unsupported);
    assert!(error.text.contains("aclnnSilu"), "{error}");
    let error = backend.upload(y.buffer, 0, &[0; 4]).unwrap_err();
    assert_eq!(error.kind, Unsupported);
    assert!(error.text.contains("aclrtMallocHost"), "{error}");
}

#[test]
fn a_library_that_refuses_deterministic_mode_loses_the_gradients_that_vary() {
    extern "C" fn refuse(_option: i32, _value: i64) -> i32 {
        207_000
    }
    let stubborn = |name: &str| match name {
        "aclrtCtxSetSysParamOpt" => Some(refuse as *const std::ffi::c_void),
        other => pontoon_emu_ascend::symbol(other),
    };
    let library = Arc::new(Library::linked(stubborn));
    let backend = AscendBackend::open(&library, "emu", 7).unwrap();
    assert!(backend.info().numeric_class.ends_with("not deterministic"));
    let cases = pontoon_qualify::cases::all(3);
    let refused: std::collections::BTreeSet<&str> = cases
        .iter()
        .filter(|case| matches!(backend.supports(&case.op), Support::No(_)))
        .map(|case| case.op.name().name())
        .collect();
    assert_eq!(
        refused.into_iter().collect::<Vec<_>>(),
        ["AddRmsNormBwd", "AttentionBwd", "EmbedBwd", "RmsNormBwd"]
    );
}
