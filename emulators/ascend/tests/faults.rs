//! Failing on demand: every row of the table in the README, played and seen as a caller sees it.

mod common;

use common::{BF16, F32, I64, Rig, at, bf16, call, good, integers, recent, tensor};
use pontoon_emu_ascend::fault::{Fault, Kind};
use pontoon_emu_ascend::inject;

/// Arms a fault as a C caller does.
fn arm(json: &str) {
    let mut text = json.as_bytes().to_vec();
    text.push(0);
    good("pontoonEmuInject", &[at(&mut text[0])]);
}

/// `e^x` of ones; gives the code.
fn exp(rig: &Rig) -> i32 {
    let x = tensor(rig.put(&[1.0_f32; 4]), F32, &[4]);
    let y = tensor(rig.memory(16), F32, &[4]);
    rig.run("aclnnExp", &[x, y])
}

#[test]
fn failing_tasks_show_their_codes_and_reasons_when_the_host_waits() {
    let rig = Rig::open(1);
    let table = [
        ("aicore_timeout", 507_014, "aicore timeout"),
        ("vector_timeout", 507_034, "vector core timeout"),
        ("ffts_timeout", 507_048, "ffts+ timeout"),
        ("aicore_exception", 507_015, "aicore exception"),
        ("vector_exception", 507_035, "vector core exception"),
        ("suspect_memory", 507_055, "suspect device mem"),
        ("link_down", 507_056, "link error"),
        ("suspect_remote", 507_057, "suspect remote"),
        ("collective_retry", 507_904, "retry failed"),
        ("task_out_of_memory", 207_018, "oom"),
    ];
    for (kind, code, reason) in table {
        arm(&format!(r#"{{"kind": "{kind}", "device": 1}}"#));
        assert_eq!(exp(&rig), code, "{kind}");
        assert!(recent().contains(reason), "{kind}: {}", recent());
        assert_eq!(exp(&rig), 0, "{kind} strikes once");
    }
}

#[test]
fn a_hang_runs_out_of_time_and_an_abort_takes_the_tasks_back() {
    let rig = Rig::open(1);
    let x = tensor(rig.put(&[1.0_f32; 4]), F32, &[4]);
    let y = tensor(rig.memory(16), F32, &[4]);
    arm(r#"{"kind": "hang", "op": "aclnnExp", "after": 1, "device": 1}"#);
    assert_eq!(rig.run("aclnnExp", &[x, y]), 0);
    let (mut bytes, mut executor) = (0_u64, 0_u64);
    good("aclnnExpGetWorkspaceSize", &[x, y, at(&mut bytes), at(&mut executor)]);
    good("aclnnExp", &[0, 0, executor, rig.stream]);
    assert_eq!(call("aclrtSynchronizeStreamWithTimeout", &[rig.stream, 10]), 507_046);
    assert_eq!(call("aclrtSynchronizeDeviceWithTimeout", &[10]), 507_046);
    let mut event = 0_u64;
    good("aclrtCreateEvent", &[at(&mut event)]);
    good("aclrtRecordEvent", &[event, rig.stream]);
    assert_eq!(call("aclrtSynchronizeEventWithTimeout", &[event, 10]), 507_047);
    good("aclrtDeviceTaskAbort", &[1, 1000]);
    good("aclrtSynchronizeStreamWithTimeout", &[rig.stream, 1000]);
    assert_eq!(rig.run("aclnnExp", &[x, y]), 0);
}

#[test]
fn who_waits_while_tasks_are_taken_back_is_told() {
    let rig = Rig::open(1);
    let x = tensor(rig.put(&[1.0_f32; 4]), F32, &[4]);
    let y = tensor(rig.memory(16), F32, &[4]);
    arm(r#"{"kind": "hang", "device": 1}"#);
    let (mut bytes, mut executor) = (0_u64, 0_u64);
    good("aclnnExpGetWorkspaceSize", &[x, y, at(&mut bytes), at(&mut executor)]);
    good("aclnnExp", &[0, 0, executor, rig.stream]);
    let mut context = 0_u64;
    good("aclrtGetCurrentContext", &[at(&mut context)]);
    let stream = rig.stream;
    let waiter = std::thread::spawn(move || {
        good("aclrtSetCurrentContext", &[context]);
        call("aclrtSynchronizeStream", &[stream])
    });
    // The waiter may come after the abort; then there is nothing left to wait for.
    good("aclrtStreamAbort", &[stream]);
    assert!([0, 107_023].contains(&waiter.join().unwrap()));
}

#[test]
fn damaged_memory_is_listed_until_it_is_repaired() {
    let rig = Rig::open(1);
    let memory = rig.put(&[1.0_f32; 4]);
    let (x, y) = (tensor(memory, F32, &[4]), tensor(rig.memory(16), F32, &[4]));
    arm(r#"{"kind": "hbm_fault", "device": 1}"#);
    assert_eq!(rig.run("aclnnExp", &[x, y]), 507_054);
    let (mut list, mut count) = ([[0_u64; 16]; 4], 0_u64);
    good("aclrtGetMemUceInfo", &[1, at(&mut list), 4, at(&mut count)]);
    assert_eq!((count, list[0][0], list[0][1]), (1, memory, 16));
    let mut status = 0_u32;
    good("aclrtQueryDeviceStatus", &[1, at(&mut status)]);
    assert_eq!(status, 1);
    assert_eq!(exp(&rig), 507_054);
    good("aclrtDeviceTaskAbort", &[1, 1000]);
    good("aclrtMemUceRepair", &[1, at(&mut list), 1]);
    assert_eq!(exp(&rig), 0);
    good("aclrtGetMemUceInfo", &[1, at(&mut list), 4, at(&mut count)]);
    assert_eq!(count, 0);
    // What the memory held is gone.
    assert!(rig.get::<f32>(memory, 1)[0].is_nan());
}

#[test]
fn a_lost_device_fails_every_call_until_it_is_reset() {
    for (kind, code) in [("lost_heartbeat", 507_010), ("socket_closed", 507_901)] {
        let rig = Rig::open(1);
        arm(&format!(r#"{{"kind": "{kind}", "device": 1}}"#));
        assert_eq!(exp(&rig), code);
        let mut memory = 0_u64;
        assert_eq!(call("aclrtMalloc", &[at(&mut memory), 16, 0]), code);
        assert_eq!(call("aclrtSynchronizeStream", &[rig.stream]), code);
        assert_eq!(call("aclrtDeviceTaskAbort", &[1, 1000]), code);
        good("aclrtResetDeviceForce", &[1]);
        good("aclrtSetDevice", &[1]);
    }
}

#[test]
fn resources_run_out() {
    let rig = Rig::open(1);
    let mut handle = 0_u64;
    arm(r#"[{"kind": "out_of_memory", "device": 1}, {"kind": "no_stream", "device": 1},
            {"kind": "no_event", "device": 1}]"#);
    assert_eq!(call("aclrtMalloc", &[at(&mut handle), 16, 0]), 207_001);
    assert_eq!(call("aclrtCreateStream", &[at(&mut handle)]), 207_008);
    assert_eq!(call("aclrtCreateEvent", &[at(&mut handle)]), 207_007);
    let (mut free, mut total) = (0_u64, 0_u64);
    good("aclrtGetMemInfo", &[1, at(&mut free), at(&mut total)]);
    assert_eq!(call("aclrtMalloc", &[at(&mut handle), free + 1, 0]), 207_001);
    drop(rig);
}

#[test]
fn a_leaking_device_has_less_memory_after_every_free() {
    let rig = Rig::open(1);
    arm(r#"{"kind": "leak", "device": 1}"#);
    let room = || {
        let (mut free, mut total) = (0_u64, 0_u64);
        good("aclrtGetMemInfo", &[1, at(&mut free), at(&mut total)]);
        free
    };
    let before = room();
    for round in 1..4 {
        good("aclrtFree", &[rig.memory(1 << 20)]);
        assert_eq!(before - room(), round << 20);
    }
}

#[test]
fn operators_without_a_binary_and_symbols_of_another_version_are_named() {
    let rig = Rig::open(1);
    arm(r#"{"kind": "no_kernel", "op": "aclnnExp", "device": 1}"#);
    assert_eq!(exp(&rig), 561_003);
    assert!(recent().contains("no binary"), "{}", recent());
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "no_package", "device": 1}"#);
    assert_eq!(exp(&rig), 561_112);
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "symbol_missing", "name": "aclnnRmsNorm", "device": 1}"#);
    let has = |name: &str| pontoon_emu_ascend::symbol(name).is_some();
    assert!(!has("aclnnRmsNorm") && !has("aclnnRmsNormGetWorkspaceSize"));
    assert!(has("aclnnRmsNormGrad") && !has("aclnnNeverHeardOf"));
}

#[test]
fn a_link_that_fails_shows_in_the_communicator_and_a_taken_port_at_its_making() {
    let rig = Rig::open(1);
    let (mut device, mut comm) = (1_u32, 0_u64);
    arm(r#"{"kind": "port_taken", "device": 1}"#);
    assert_eq!(call("HcclCommInitAll", &[1, at(&mut device), at(&mut comm)]), 11);
    assert!(recent().contains("already in use"), "{}", recent());
    good("HcclCommInitAll", &[1, at(&mut device), at(&mut comm)]);
    arm(r#"{"kind": "link_down", "op": "HcclAllReduce", "device": 1}"#);
    let x = rig.put(&[1.0_f32; 4]);
    let y = rig.memory(16);
    good("HcclAllReduce", &[x, y, 4, 4, 0, comm, rig.stream]);
    assert_eq!(call("aclrtSynchronizeStreamWithTimeout", &[rig.stream, 10_000]), 507_056);
    let mut failed = 0_u32;
    good("HcclGetCommAsyncError", &[comm, at(&mut failed)]);
    assert_eq!(failed, 21);
    good("HcclCommSuspend", &[comm]);
    assert_eq!(call("HcclAllReduce", &[x, y, 4, 4, 0, comm, rig.stream]), 22);
    good("HcclCommResume", &[comm]);
    good("HcclAllReduce", &[x, y, 4, 4, 0, comm, rig.stream]);
    assert_eq!(rig.get::<f32>(y, 4), [1.0; 4]);
    good("HcclCommDestroy", &[comm]);
}

#[test]
fn a_slow_device_takes_longer_and_computes_the_same() {
    let rig = Rig::open(1);
    inject(&Fault { factor: 2.0, ..Fault::new(Kind::Slow).on(1) });
    let y = rig.memory(16);
    let x = tensor(rig.put(&[0.0_f32; 4]), F32, &[4]);
    rig.done("aclnnExp", &[x, tensor(y, F32, &[4])]);
    assert_eq!(rig.get::<f32>(y, 4), [1.0; 4]);
}

#[test]
fn a_flipped_bit_and_a_nan_change_one_output_once() {
    let rig = Rig::open(1);
    let memory = rig.memory(16);
    let x = tensor(rig.put(&[0.0_f32; 4]), F32, &[4]);
    let y = tensor(memory, F32, &[4]);
    arm(r#"{"kind": "bitflip", "bit": 30, "op": "aclnnExp", "device": 1}"#);
    rig.done("aclnnExp", &[x, y]);
    let bits = f32::from_bits(1_f32.to_bits() ^ 1 << 30);
    assert_eq!(rig.get::<f32>(memory, 4), [bits, 1.0, 1.0, 1.0]);
    arm(r#"{"kind": "nan_gradient", "op": "aclnnExp", "device": 1}"#);
    rig.done("aclnnExp", &[x, y]);
    assert!(rig.get::<f32>(memory, 4)[0].is_nan());
    rig.done("aclnnExp", &[x, y]);
    assert_eq!(rig.get::<f32>(memory, 4), [1.0; 4]);
}

/// A product of `[m, k]` ones by `[k, 4]` of `value`.
fn product(rig: &Rig, (m, k): (i64, i64), value: f32) -> Vec<f32> {
    let a = tensor(rig.put(&vec![1.0_f32; (m * k) as usize]), F32, &[m, k]);
    let b = tensor(rig.put(&vec![value; (4 * k) as usize]), F32, &[k, 4]);
    let memory = rig.memory((16 * m) as usize);
    rig.done("aclnnMatmul", &[a, b, tensor(memory, F32, &[m, 4]), 0]);
    rig.get(memory, (4 * m) as usize)
}

#[test]
fn planted_defects_change_products_as_their_names_say() {
    let rig = Rig::open(1);
    assert_eq!(product(&rig, (2, 300), 1.0), [300.0; 8]);
    arm(r#"{"kind": "dropped_tail", "device": 1}"#);
    assert_eq!(product(&rig, (2, 300), 1.0), [292.0; 8]);
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "bf16_accumulation", "device": 1}"#);
    assert_ne!(product(&rig, (2, 515), 1.0), [515.0; 8]);
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "one_path", "rows": 4, "device": 1}"#);
    assert_eq!(product(&rig, (4, 64), 1.0), [64.0; 16]);
    assert_ne!(product(&rig, (5, 64), 1.0), [64.0; 20]);
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "nondeterministic", "device": 1}"#);
    assert_ne!(product(&rig, (2, 300), 0.1), product(&rig, (2, 300), 0.1));
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "batch_variant", "device": 1}"#);
    assert_ne!(product(&rig, (1, 300), 0.1)[..4], product(&rig, (2, 300), 0.1)[..4]);
    good("pontoonEmuClear", &[1]);
    arm(r#"{"kind": "stale_workspace", "device": 1}"#);
    assert_ne!(product(&rig, (1, 64), 1.0), [64.0; 4]);
}

#[test]
fn planted_defects_of_rounding_ties_and_rotation_show() {
    let rig = Rig::open(1);
    let x = tensor(rig.put(&[1.0_f32 + 0.75 / 128.0; 2]), F32, &[2]);
    let memory = rig.memory(4);
    let y = tensor(memory, BF16, &[2]);
    let cast = |rig: &Rig| {
        rig.done("aclnnCast", &[x, BF16, y]);
        rig.get::<u16>(memory, 2)
    };
    assert_eq!(cast(&rig), bf16(&[1.0078125; 2]));
    arm(r#"{"kind": "wrong_rounding", "device": 1}"#);
    assert_eq!(cast(&rig), bf16(&[1.0; 2]));
    good("pontoonEmuClear", &[1]);

    let ties = tensor(rig.put(&[1.0_f32, 2.0, 2.0]), F32, &[1, 3]);
    let (values, places) = (rig.memory(4), rig.memory(8));
    let top = |rig: &Rig| {
        let results = [tensor(values, F32, &[1, 1]), tensor(places, I64, &[1, 1])];
        rig.done("aclnnTopk", &[ties, 1, 1, 1, 1, results[0], results[1]]);
        rig.get::<i64>(places, 1)[0]
    };
    assert_eq!(top(&rig), 1);
    arm(r#"{"kind": "wrong_tie", "device": 1}"#);
    assert_eq!(top(&rig), 2);
    good("pontoonEmuClear", &[1]);

    let head = tensor(rig.put(&[1.0_f32, 2.0]), F32, &[1, 2]);
    let cos = tensor(rig.put(&[0.0_f32; 2]), F32, &[1, 2]);
    let sin = tensor(rig.put(&[1.0_f32; 2]), F32, &[1, 2]);
    let memory = rig.memory(8);
    let turn = |rig: &Rig| {
        let y = tensor(memory, F32, &[1, 2]);
        rig.done("aclnnRotaryPositionEmbedding", &[head, cos, sin, 0, y]);
        rig.get::<f32>(memory, 2)
    };
    assert_eq!(turn(&rig), [-2.0, 1.0]);
    arm(r#"{"kind": "swapped_rope", "device": 1}"#);
    assert_eq!(turn(&rig), [2.0, -1.0]);
}

#[test]
fn operators_that_add_as_results_come_differ_unless_deterministic_mode_is_on() {
    let rig = Rig::open(1);
    let rows = 64_usize;
    let values: Vec<f32> =
        (0..rows).map(|i| (i as f32).sin() * 10_f32.powi(i as i32 % 5)).collect();
    let grad = tensor(rig.put(&values), F32, &[rows as i64, 1]);
    let index = tensor(rig.put(&vec![0_i64; rows]), I64, &[rows as i64]);
    let memory = rig.memory(4);
    let sum = |rig: &Rig| {
        let y = tensor(memory, F32, &[1, 1]);
        rig.done("aclnnEmbeddingDenseBackward", &[grad, index, 1, 99, 0, y]);
        rig.get::<f32>(memory, 1)[0].to_bits()
    };
    assert_eq!(sum(&rig), sum(&rig));
    good("aclrtCtxSetSysParamOpt", &[0, 0]);
    assert_ne!(sum(&rig), sum(&rig));
    assert_eq!(call("aclrtCtxSetSysParamOpt", &[0, 3]), 207_000);
    // The sum itself is unharmed.
    let dims = integers(&[0]);
    let y = tensor(memory, F32, &[1, 1]);
    rig.done("aclnnReduceSum", &[grad, dims, 1, F32, y]);
    let total: f32 = values.iter().sum();
    assert!((rig.get::<f32>(memory, 1)[0] - total).abs() < 0.1);
}
