//! Collectives.

use std::ffi::{CStr, c_char};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::calls;
use super::pointers::{Many, Out};
use crate::code;
use crate::collective::{Communicator, Group, Kind, What, element_bytes};
use crate::device::hazards::Access;
use crate::device::stream::Work;
use crate::driver::{DRIVER, Object};
use crate::failure::{Done, Failure};
use crate::fault::{self, Kind as FaultKind};
use crate::plan::{fail, touch_in_order};

/// `HcclRootInfo`: opaque bytes, of which the first eight name the group.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RootInfo {
    number: [u8; 8],
    rest: [u8; 4100],
}

/// CANN's `HcclGetErrorString`.
#[unsafe(no_mangle)]
pub extern "C" fn HcclGetErrorString(code: i32) -> *const c_char {
    let text: &CStr = match code {
        code::SUCCESS => c"success",
        code::HCCL_PARAMETER => c"parameter error",
        code::HCCL_NULL => c"null pointer",
        code::HCCL_UNSUPPORTED => c"not supported",
        code::HCCL_TIMEOUT => c"timeout",
        code::HCCL_CONNECT => c"connection failed",
        code::HCCL_RUNTIME => c"runtime call failed",
        code::HCCL_NETWORK => c"network call failed",
        code::HCCL_REMOTE => c"remote error",
        code::HCCL_SUSPENDED => c"communicator suspended",
        _ => c"unknown error",
    };
    text.as_ptr()
}

/// CANN's `HcclGetCommConfigCapability`.
#[unsafe(no_mangle)]
pub extern "C" fn HcclGetCommConfigCapability() -> u32 {
    0
}

/// The functions here that return no code, by name.
pub(super) fn others() -> Vec<(&'static str, *const std::ffi::c_void)> {
    vec![
        ("HcclGetErrorString", HcclGetErrorString as *const _),
        ("HcclGetCommConfigCapability", HcclGetCommConfigCapability as *const _),
    ]
}

/// A failure as collectives return it: their own codes, or that the runtime failed.
fn in_collective(failure: Failure) -> Failure {
    if failure.code <= code::HCCL_SUSPENDED {
        return failure;
    }
    let code = if failure.code == code::OP_NULL { code::HCCL_NULL } else { code::HCCL_RUNTIME };
    Failure { code, ..failure }
}

fn connect(device: i32) -> Done {
    let device = DRIVER.device(device)?;
    let struck = device.faults.strike(fault::Place::Connect, "HcclCommInit");
    struck.iter().find_map(|fault| fault.kind.failure("HcclCommInit")).map_or(Ok(()), Err)
}

fn join_by_root(size: u32, root: &RootInfo, rank: u32, out: Out<u64>) -> Done {
    let (_, device) = DRIVER.current()?;
    connect(device.id)?;
    let group = Group::find(u64::from_le_bytes(root.number), size as usize)?;
    let communicator = group.join(rank as usize)?;
    group.wait_joined()?;
    let handle = DRIVER.keep(Object::Communicator(Arc::new(communicator)));
    out.set(handle, code::HCCL_NULL, "comm")
}

/// A collective's arguments.
struct Call {
    name: &'static str,
    what: What,
    send: u64,
    receive: u64,
    count: u64,
    dtype: i32,
    op: i32,
    comm: u64,
    stream: u64,
}

impl Call {
    /// Refuses what the communicator cannot do.
    fn check(&self, comm: &Communicator) -> Done {
        if comm.suspended.load(Ordering::Relaxed) {
            return Err(Failure::new(code::HCCL_SUSPENDED, "the communicator is suspended"));
        }
        if !(0..=3).contains(&self.op) && self.op != NO_REDUCTION {
            let text = format!("there is no reduction {}", self.op);
            return Err(Failure::new(code::HCCL_PARAMETER, text));
        }
        Ok(())
    }

    /// The bytes that a rank of so many gives and gets.
    fn bytes(&self, ranks: u64) -> Result<(u64, u64), Failure> {
        let size = element_bytes(self.dtype)? as u64;
        let (sent, received) = match self.what {
            What::AllReduce | What::Broadcast(_) => (self.count, self.count),
            What::AllGather => (self.count, self.count * ranks),
            What::ReduceScatter => (self.count * ranks, self.count),
            What::Barrier => (0, 0),
        };
        Ok((sent * size, received * size))
    }
}

fn start(call: &Call) -> Done {
    let comm: Arc<Communicator> = DRIVER.get(call.comm, "comm")?;
    call.check(&comm)?;
    let stream = DRIVER.stream(call.stream)?;
    stream.device.check_alive()?;
    let (sent, received) = call.bytes(comm.size() as u64)?;
    let places = match call.what {
        What::Barrier => None,
        _ => Some((
            DRIVER.place(call.send, sent, call.name)?.1,
            DRIVER.place(call.receive, received, call.name)?.1,
        )),
    };
    let access = |start, bytes, writes| Access { start, end: start + bytes, writes };
    let read = access(call.send, sent, false);
    let written = access(call.receive, received, true);
    let faults = stream.device.faults.strike(fault::Place::Task, call.name);
    let (device, number) = (Arc::clone(&stream.device), comm.call());
    let (failing, name) = (Arc::clone(&comm), call.name);
    let kind = Kind { what: call.what, count: call.count, dtype: call.dtype, op: call.op };
    let put = Arc::new(Mutex::new(Vec::new()));
    let (taken, met) = (Arc::clone(&put), Arc::clone(&put));
    let (from, to) = places.unzip();
    touch_in_order(&stream, call.name, &[read])?;
    if faults.iter().any(|fault| fault.kind == FaultKind::Hang) {
        stream.push(Work::Hang);
        return Ok(());
    }
    stream.push(Work::Run(Box::new(move |_| {
        if let Some(failure) = fail(&device, &faults, name, &[]) {
            failing.failed.store(code::HCCL_REMOTE, Ordering::Relaxed);
            return Err(failure);
        }
        if let Some(from) = from {
            let mut bytes = vec![0_u8; sent as usize];
            from.allocation.block.load(from.offset, &mut bytes);
            *taken.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
        }
        Ok(())
    })));
    touch_in_order(&stream, call.name, &[])?;
    stream.push(Work::Meet(Box::new(move |is_called_off| {
        let brought = std::mem::take(&mut *met.lock().unwrap_or_else(PoisonError::into_inner));
        if brought.len() as u64 != sent {
            // Its first part failed: the others must not take nothing for a contribution.
            return Ok(());
        }
        let result = comm.meet(number, (kind, brought), is_called_off);
        if result.is_err() {
            comm.failed.store(code::HCCL_REMOTE, Ordering::Relaxed);
        }
        *met.lock().unwrap_or_else(PoisonError::into_inner) = result?;
        Ok(())
    })));
    touch_in_order(&stream, call.name, &[written])?;
    stream.push(Work::Run(Box::new(move |_| {
        let bytes = put.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(to) = to
            && bytes.len() as u64 == received
        {
            to.allocation.block.store(to.offset, &bytes[..]);
        }
        Ok(())
    })));
    Ok(())
}

/// Nothing is reduced.
const NO_REDUCTION: i32 = 255;
/// `HCCL_DATA_TYPE_INT8`.
const BYTES: i32 = 0;

calls! {
    fn HcclGetRootInfo(root: Out<RootInfo>) {
        let number = Group::announce().to_le_bytes();
        root.set(RootInfo { number, rest: [0; 4100] }, code::HCCL_NULL, "rootInfo")
    }
    fn HcclCommInitRootInfo(size: u32, root: Many<RootInfo>, rank: u32, comm: Out<u64>) {
        let null = || Failure::new(code::HCCL_NULL, "`rootInfo` is null");
        let root = root.read(1).ok_or_else(null)?;
        join_by_root(size, &root[0], rank, comm).map_err(in_collective)
    }
    fn HcclCommInitRootInfoConfig(
        size: u32,
        root: Many<RootInfo>,
        rank: u32,
        _config: u64,
        comm: Out<u64>,
    ) {
        let null = || Failure::new(code::HCCL_NULL, "`rootInfo` is null");
        let root = root.read(1).ok_or_else(null)?;
        join_by_root(size, &root[0], rank, comm).map_err(in_collective)
    }
    fn HcclCommInitAll(count: u32, devices: Many<i32>, comms: Out<u64>) {
        let null = || Failure::new(code::HCCL_NULL, "`devices` is null");
        let devices = devices.read(count as usize).ok_or_else(null)?;
        if comms.is_null() {
            return Err(Failure::new(code::HCCL_NULL, "`comms` is null"));
        }
        let group = Group::new(devices.len());
        let mut handles = Vec::new();
        for (rank, &device) in devices.iter().enumerate() {
            DRIVER.device(device).map_err(in_collective)?;
            connect(device)?;
            let communicator = group.join(rank)?;
            handles.push(DRIVER.keep(Object::Communicator(Arc::new(communicator))));
        }
        comms.set_many(handles);
        Ok(())
    }
    fn HcclCommDestroy(comm: u64) {
        DRIVER.drop_object::<Arc<Communicator>>(comm, "comm").map(drop).map_err(in_collective)
    }
    fn HcclGetRankSize(comm: u64, size: Out<u32>) {
        let comm: Arc<Communicator> = DRIVER.get(comm, "comm").map_err(in_collective)?;
        size.set(comm.size() as u32, code::HCCL_NULL, "rankSize")
    }
    fn HcclGetRankId(comm: u64, rank: Out<u32>) {
        let comm: Arc<Communicator> = DRIVER.get(comm, "comm").map_err(in_collective)?;
        rank.set(comm.rank as u32, code::HCCL_NULL, "rank")
    }
    fn HcclGetCommAsyncError(comm: u64, failed: Out<i32>) {
        let comm: Arc<Communicator> = DRIVER.get(comm, "comm").map_err(in_collective)?;
        failed.set(comm.failed.load(Ordering::Relaxed), code::HCCL_NULL, "asyncError")
    }
    fn HcclCommSuspend(comm: u64) {
        let comm: Arc<Communicator> = DRIVER.get(comm, "comm").map_err(in_collective)?;
        comm.suspended.store(true, Ordering::Relaxed);
        Ok(())
    }
    fn HcclCommResume(comm: u64) {
        let comm: Arc<Communicator> = DRIVER.get(comm, "comm").map_err(in_collective)?;
        comm.suspended.store(false, Ordering::Relaxed);
        comm.failed.store(code::SUCCESS, Ordering::Relaxed);
        Ok(())
    }
    fn HcclAllReduce(
        send: u64,
        receive: u64,
        count: u64,
        dtype: i32,
        op: i32,
        comm: u64,
        stream: u64,
    ) {
        let (name, what) = ("HcclAllReduce", What::AllReduce);
        start(&Call { name, what, send, receive, count, dtype, op, comm, stream })
            .map_err(in_collective)
    }
    fn HcclAllGather(send: u64, receive: u64, count: u64, dtype: i32, comm: u64, stream: u64) {
        let (name, what, op) = ("HcclAllGather", What::AllGather, NO_REDUCTION);
        start(&Call { name, what, send, receive, count, dtype, op, comm, stream })
            .map_err(in_collective)
    }
    fn HcclReduceScatter(
        send: u64,
        receive: u64,
        count: u64,
        dtype: i32,
        op: i32,
        comm: u64,
        stream: u64,
    ) {
        let (name, what) = ("HcclReduceScatter", What::ReduceScatter);
        start(&Call { name, what, send, receive, count, dtype, op, comm, stream })
            .map_err(in_collective)
    }
    fn HcclBroadcast(buffer: u64, count: u64, dtype: i32, root: u32, comm: u64, stream: u64) {
        let (name, what, op) = ("HcclBroadcast", What::Broadcast(root), NO_REDUCTION);
        let (send, receive) = (buffer, buffer);
        start(&Call { name, what, send, receive, count, dtype, op, comm, stream })
            .map_err(in_collective)
    }
    fn HcclBarrier(comm: u64, stream: u64) {
        let (name, what, op) = ("HcclBarrier", What::Barrier, NO_REDUCTION);
        let (send, receive, count, dtype) = (0, 0, 0, BYTES);
        start(&Call { name, what, send, receive, count, dtype, op, comm, stream })
            .map_err(in_collective)
    }
}
