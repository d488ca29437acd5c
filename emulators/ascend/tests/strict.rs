//! What silicon would punish is found: each wrong use of the interface fails with its code, its
//! text can be read, and it stands in the strict log.

mod common;

use common::{F32, Rig, at, call, good, make, recent, scalar, tensor, view};
use pontoon_emu_ascend::strict::Breach;

const WAIT: u64 = 10_000;

/// `y = a + b` of four numbers, planned but not launched.
fn planned(rig: &Rig) -> (u64, u64, u64) {
    let (a, b) = (rig.put(&[1.0_f32, 2.0, 3.0, 4.0]), rig.put(&[10.0_f32; 4]));
    let y = rig.memory(16);
    let tensors = [a, b, y].map(|address| tensor(address, F32, &[4]));
    let (mut bytes, mut executor) = (0_u64, 0_u64);
    let arguments =
        [tensors[0], tensors[1], scalar(1.0), tensors[2], at(&mut bytes), at(&mut executor)];
    good("aclnnAddGetWorkspaceSize", &arguments);
    (executor, y, tensors[0])
}

#[test]
fn a_right_use_leaves_nothing_in_the_log() {
    let rig = Rig::open(0);
    let (executor, y, _) = planned(&rig);
    good("aclnnAdd", &[0, 0, executor, rig.stream]);
    assert_eq!(rig.get::<f32>(y, 4), [11.0, 12.0, 13.0, 14.0]);
    assert_eq!(rig.breaches(), []);
}

#[test]
fn freed_memory_is_known_for_what_it_is() {
    let rig = Rig::open(0);
    let (executor, y, _) = planned(&rig);
    good("aclrtFree", &[y]);
    assert_eq!(call("aclnnAdd", &[0, 0, executor, rig.stream]), 161_002);
    assert!(recent().contains("freed"), "{}", recent());
    assert_eq!(call("aclrtFree", &[y]), 107_000);
    assert_eq!(rig.breaches(), [Breach::UseAfterFree, Breach::DoubleFree]);
}

#[test]
fn memory_in_use_by_queued_tasks_is_not_freed() {
    let rig = Rig::open(0);
    let (executor, y, _) = planned(&rig);
    good("aclnnAdd", &[0, 0, executor, rig.stream]);
    assert_eq!(call("aclrtFree", &[y]), 107_000);
    assert_eq!(rig.breaches(), [Breach::FreedInUse]);
    good("aclrtSynchronizeStream", &[rig.stream]);
    good("aclrtFree", &[y]);
}

#[test]
fn a_view_beyond_its_storage_and_a_copy_beyond_its_memory_are_out_of_bounds() {
    let rig = Rig::open(0);
    let a = rig.put(&[1.0_f32; 8]);
    let wide = view(a, &[2, 4], &[6, 1], (0, 8));
    let y = tensor(rig.memory(32), F32, &[2, 4]);
    assert_eq!(rig.run("aclnnExp", &[wide, y]), 161_002);
    // The storage is larger than the allocation.
    let long = tensor(a, F32, &[2, 400]);
    let z = tensor(rig.memory(3200), F32, &[2, 400]);
    assert_eq!(rig.run("aclnnExp", &[long, z]), 161_002);
    let mut host = [0.0_f32; 16];
    assert_eq!(call("aclrtMemcpy", &[at(&mut host), 64, a, 64, 2]), 107_000);
    assert_eq!(rig.breaches(), [Breach::OutOfBounds; 3]);
}

#[test]
fn host_memory_is_no_device_memory() {
    let rig = Rig::open(0);
    let mut host = [0.0_f32; 4];
    let x = tensor(at(&mut host), F32, &[4]);
    let y = tensor(rig.memory(16), F32, &[4]);
    assert_eq!(rig.run("aclnnExp", &[x, y]), 161_002);
    let device = rig.memory(16);
    assert_eq!(call("aclrtMemcpy", &[device, 16, at(&mut host), 16, 2]), 107_000);
    assert_eq!(rig.breaches(), [Breach::WrongMemory; 2]);
}

#[test]
fn a_host_read_before_the_wait_fails_and_an_asynchronous_copy_lands_only_with_it() {
    let rig = Rig::open(0);
    let (executor, y, _) = planned(&rig);
    good("aclnnAdd", &[0, 0, executor, rig.stream]);
    let mut early = [0.0_f32; 4];
    assert_eq!(call("aclrtMemcpy", &[at(&mut early), 16, y, 16, 2]), 107_000);
    assert!(recent().contains("nobody has waited"), "{}", recent());
    assert_eq!(rig.breaches(), [Breach::Unsynchronised]);
    let mut pinned = 0_u64;
    good("aclrtMallocHost", &[at(&mut pinned), 16]);
    good("aclrtMemcpyAsync", &[pinned, 16, y, 16, 2, rig.stream]);
    let read = || {
        let address = std::ptr::with_exposed_provenance::<[f32; 4]>(pinned as usize);
        // SAFETY: the memory was allocated above and holds four numbers.
        unsafe { address.read() }
    };
    assert_ne!(read(), [11.0, 12.0, 13.0, 14.0]);
    good("aclrtSynchronizeStreamWithTimeout", &[rig.stream, WAIT]);
    assert_eq!(read(), [11.0, 12.0, 13.0, 14.0]);
    good("aclrtFreeHost", &[pinned]);
    assert_eq!(rig.breaches(), []);
}

#[test]
fn host_memory_that_changes_under_a_copy_is_noticed() {
    let rig = Rig::open(0);
    let mut pinned = 0_u64;
    good("aclrtMallocHost", &[at(&mut pinned), 16]);
    let device = rig.memory(16);
    good("aclrtMemcpyAsync", &[device, 16, pinned, 16, 1, rig.stream]);
    let address = std::ptr::with_exposed_provenance_mut::<u8>(pinned as usize);
    // SAFETY: the memory was allocated above.
    unsafe { address.write(1) };
    good("aclrtSynchronizeStream", &[rig.stream]);
    assert_eq!(rig.breaches(), [Breach::HostChanged]);
    good("aclrtFreeHost", &[pinned]);
}

#[test]
fn two_streams_race_unless_an_event_orders_them() {
    let rig = Rig::open(0);
    let mut other = 0_u64;
    good("aclrtCreateStream", &[at(&mut other)]);
    let (first, y, _) = planned(&rig);
    good("aclnnAdd", &[0, 0, first, rig.stream]);
    let z = rig.memory(16);
    let exp = || {
        let (mut bytes, mut executor) = (0_u64, 0_u64);
        let (y, z) = (tensor(y, F32, &[4]), tensor(z, F32, &[4]));
        good("aclnnExpGetWorkspaceSize", &[y, z, at(&mut bytes), at(&mut executor)]);
        executor
    };
    assert_eq!(call("aclnnExp", &[0, 0, exp(), other]), 361_001);
    assert_eq!(rig.breaches(), [Breach::Unsynchronised]);
    let mut event = 0_u64;
    good("aclrtCreateEvent", &[at(&mut event)]);
    good("aclrtRecordEvent", &[event, rig.stream]);
    good("aclrtStreamWaitEvent", &[other, event]);
    good("aclnnExp", &[0, 0, exp(), other]);
    good("aclrtSynchronizeStreamWithTimeout", &[other, WAIT]);
    assert!((rig.get::<f32>(z, 4)[0] - 11_f32.exp()).abs() < 0.1);
    assert_eq!(rig.breaches(), []);
}

#[test]
fn a_workspace_must_be_there_large_enough_apart_and_on_the_device() {
    let rig = Rig::open(0);
    let x = rig.put(&[1.0_f32; 64]);
    let y = rig.memory(256);
    let plan = || {
        let (mut bytes, mut executor) = (0_u64, 0_u64);
        let (x, y) = (tensor(x, F32, &[8, 8]), tensor(y, F32, &[8, 8]));
        let arguments = [x, x, y, 0, at(&mut bytes), at(&mut executor)];
        good("aclnnMatmulGetWorkspaceSize", &arguments);
        (bytes, executor)
    };
    let (bytes, executor) = plan();
    assert!(bytes > 0);
    let mut host = vec![0_u64; bytes as usize / 8];
    let room = rig.memory(bytes as usize);
    assert_eq!(call("aclnnMatmul", &[0, 0, executor, rig.stream]), 161_002);
    assert_eq!(call("aclnnMatmul", &[room, bytes - 1, plan().1, rig.stream]), 161_002);
    assert_eq!(call("aclnnMatmul", &[at(&mut host[0]), bytes, plan().1, rig.stream]), 161_002);
    assert_eq!(call("aclnnMatmul", &[room + 8, bytes, plan().1, rig.stream]), 161_002);
    good("aclnnMatmul", &[room, bytes, plan().1, rig.stream]);
    let breaches = rig.breaches();
    let workspaces = breaches.iter().filter(|breach| **breach == Breach::Workspace).count();
    assert_eq!(workspaces, 4, "{breaches:?}");
}

#[test]
fn an_executor_serves_once_unless_it_is_repeatable() {
    let rig = Rig::open(0);
    let (executor, y, a) = planned(&rig);
    good("aclnnAdd", &[0, 0, executor, rig.stream]);
    assert_eq!(call("aclnnAdd", &[0, 0, executor, rig.stream]), 561_103);
    let (executor, _, _) = planned(&rig);
    assert_eq!(call("aclnnMul", &[0, 0, executor, rig.stream]), 561_103);
    let breaches = rig.breaches();
    assert_eq!(breaches.iter().filter(|breach| **breach == Breach::Executor).count(), 2);
    good("aclrtSynchronizeStream", &[rig.stream]);
    let (executor, again, first) = planned(&rig);
    good("aclSetAclOpExecutorRepeatable", &[executor]);
    good("aclnnAdd", &[0, 0, executor, rig.stream]);
    let other = rig.put(&[5.0_f32; 4]);
    good("aclSetTensorAddr", &[executor, 0, first, other]);
    good("aclnnAdd", &[0, 0, executor, rig.stream]);
    assert_eq!(rig.get::<f32>(again, 4), [15.0; 4]);
    assert_eq!(call("aclSetTensorAddr", &[executor, 0, a, other]), 161_002);
    good("aclDestroyAclOpExecutor", &[executor]);
    assert_eq!(rig.get::<f32>(y, 4), [11.0, 12.0, 13.0, 14.0]);
}

#[test]
fn a_tensor_destroyed_between_the_phases_is_missed() {
    let rig = Rig::open(0);
    let (executor, _, a) = planned(&rig);
    good("aclDestroyTensor", &[a]);
    assert_eq!(call("aclnnAdd", &[0, 0, executor, rig.stream]), 561_103);
    assert_eq!(call("aclDestroyTensor", &[a]), 107_017);
    assert_eq!(rig.breaches(), [Breach::UseAfterFree, Breach::DoubleFree]);
}

#[test]
fn streams_of_another_context_are_refused() {
    let rig = Rig::open(0);
    let (executor, _, _) = planned(&rig);
    let mut context = 0_u64;
    good("aclrtCreateContext", &[at(&mut context), 0]);
    assert_eq!(call("aclnnAdd", &[0, 0, executor, rig.stream]), 107_003);
    assert_eq!(rig.breaches(), [Breach::WrongContext]);
    let stream = rig.stream;
    let other = std::thread::spawn(move || call("aclrtSynchronizeStream", &[stream]));
    assert_eq!(other.join().unwrap(), 107_002);
    assert_eq!(rig.breaches(), [Breach::WrongContext]);
}

#[test]
fn elements_must_be_aligned() {
    let rig = Rig::open(0);
    let memory = rig.memory(64);
    let (x, y) = (tensor(memory + 2, F32, &[4]), tensor(rig.memory(16), F32, &[4]));
    assert_eq!(rig.run("aclnnExp", &[x, y]), 161_002);
    assert_eq!(rig.breaches(), [Breach::Misaligned]);
}

#[test]
fn what_the_documents_forbid_is_refused_with_a_reason() {
    let rig = Rig::open(0);
    let memory = rig.memory(256);
    let float = tensor(memory, F32, &[4, 4]);
    let narrow = tensor(memory, common::BF16, &[4, 4]);
    let short = tensor(memory, F32, &[4, 3]);
    let code = rig.run("aclnnMatmul", &[float, narrow, float, 0]);
    assert_eq!(code, 161_002);
    assert!(recent().contains("equal floats"), "{}", recent());
    assert_eq!(rig.run("aclnnMatmul", &[float, short, float, 0]), 161_002);
    assert_eq!(rig.run("aclnnMatmul", &[float, float, float, 1]), 161_002);
    assert!(recent().contains("HF32"), "{}", recent());
    assert_eq!(rig.run("aclnnMatmul", &[float, 0, float, 0]), 161_001);
    assert_eq!(rig.breaches(), [Breach::Forbidden; 3]);
}

#[test]
fn a_product_into_its_own_operand_overlaps() {
    let rig = Rig::open(0);
    let x = tensor(rig.put(&[1.0_f32; 16]), F32, &[4, 4]);
    assert_eq!(rig.run("aclnnMatmul", &[x, x, x, 0]), 161_002);
    assert_eq!(rig.breaches(), [Breach::Overlap]);
}

#[test]
fn what_is_left_at_the_end_is_a_leak() {
    let rig = Rig::open(0);
    planned(&rig);
    let mut event = 0_u64;
    good("aclrtCreateEvent", &[at(&mut event)]);
    good("aclrtResetDevice", &[0]);
    let texts: Vec<String> = rig.entries().into_iter().map(|entry| entry.text).collect();
    assert!(texts[0].contains("1 x stream") && texts[0].contains("1 x event"), "{texts:?}");
    assert!(texts[0].contains("3 allocations of 48 bytes"), "{texts:?}");
    good("aclFinalize", &[]);
    let entries = rig.entries();
    assert!(entries[0].text.contains("1 x executor"), "{entries:?}");
    assert!(entries[0].text.contains("3 x tensor"), "{entries:?}");
    assert_eq!(call("aclrtSetDevice", &[0]), 100_001);
    assert_eq!(call("aclFinalize", &[]), 100_037);
}

#[test]
fn an_index_out_of_range_traps() {
    let rig = Rig::open(0);
    let x = tensor(rig.put(&[1.0_f32, 2.0, 3.0, 4.0]), F32, &[2, 2]);
    let index = tensor(rig.put(&[0_i32, 2]), common::I32, &[2]);
    let y = tensor(rig.memory(16), F32, &[2, 2]);
    assert_eq!(rig.run("aclnnIndexSelect", &[x, 0, index, y]), 507_035);
    assert!(recent().contains("out of range"), "{}", recent());
}

#[test]
fn the_device_says_that_it_is_emulated() {
    let rig = Rig::open(0);
    let name = make("aclrtGetSocName", &[]);
    let name = std::ptr::with_exposed_provenance::<std::ffi::c_char>(name as usize);
    // SAFETY: the function returns a text that stays.
    let name = unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned();
    assert!(name.to_lowercase().contains("emulated"), "{name}");
    drop(rig);
}
