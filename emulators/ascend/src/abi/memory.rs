//! Memory: allocation, copies and fills.
//!
//! An asynchronous copy from the host takes its bytes when it is called and looks again when the
//! host has waited: had they changed, the chip might have read either. A copy to the host lands
//! when the host waits; until then the target holds [`PENDING`].

use std::sync::{Arc, Mutex, PoisonError};

use super::calls;
use super::pointers::{Host, Out};
use crate::code;
use crate::device::hazards::Access;
use crate::device::memory::Place;
use crate::device::stream::{Landing, Stream, Work};
use crate::device::{Device, memory};
use crate::driver::DRIVER;
use crate::failure::{Done, Failure};
use crate::fault::{self, Kind};
use crate::plan::{fail, touch_in_order};
use crate::strict::{self, Breach};

/// What host memory holds while a copy to it is under way.
const PENDING: u8 = 0xa5;

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    HostToHost,
    HostToDevice,
    DeviceToHost,
    DeviceToDevice,
}

fn way(kind: i32, to: u64, from: u64) -> Done<Way> {
    let on_device = |address| memory::device_of(address).is_some();
    let actual = match (on_device(from), on_device(to)) {
        (false, false) => Way::HostToHost,
        (false, true) => Way::HostToDevice,
        (true, false) => Way::DeviceToHost,
        (true, true) => Way::DeviceToDevice,
    };
    let said = match kind {
        0 => Way::HostToHost,
        1 => Way::HostToDevice,
        2 => Way::DeviceToHost,
        3 | 6 | 7 => Way::DeviceToDevice,
        4 => actual,
        _ => return Err(Failure::parameter(format!("there is no kind of copy {kind}"))),
    };
    if said != actual {
        let text = format!("the copy should go {said:?} but its addresses say {actual:?}");
        return Err(strict::breach(-1, Breach::WrongMemory, Failure::parameter(text)));
    }
    Ok(said)
}

/// A copy's arguments.
struct Copy {
    to: u64,
    from: u64,
    bytes: usize,
    way: Way,
}

fn check(to: u64, most: u64, from: u64, bytes: u64, kind: i32) -> Done<Copy> {
    if to == 0 || from == 0 {
        return Err(Failure::parameter("an address is null"));
    }
    if bytes > most {
        let text = format!("{bytes} bytes do not fit the {most} of the target");
        return Err(strict::breach(-1, Breach::OutOfBounds, Failure::parameter(text)));
    }
    Ok(Copy { to, from, bytes: bytes as usize, way: way(kind, to, from)? })
}

fn touch(start: u64, bytes: usize, writes: bool) -> Access {
    Access { start, end: start + bytes as u64, writes }
}

fn device_place(address: u64, bytes: usize, what: &str) -> Done<(Arc<Device>, Place)> {
    DRIVER.place(address, bytes as u64, what)
}

/// Fails if queued tasks still touch what the host is about to.
fn check_host(device: &Device, access: Access, what: &str) -> Done {
    match device.hazards().host_touches(access) {
        None => Ok(()),
        Some(race) => {
            let text = format!(
                "{what}: memory at {:#x} is used by tasks of stream {} that nobody has waited for",
                race.access.start, race.stream
            );
            Err(strict::breach(device.id, Breach::Unsynchronised, Failure::parameter(text)))
        }
    }
}

fn copy_now(copy: &Copy) -> Done {
    let (from, to) = (Host(copy.from as usize), Host(copy.to as usize));
    match copy.way {
        Way::HostToHost => to.write(&from.read(copy.bytes)),
        Way::HostToDevice => {
            let (device, place) = device_place(copy.to, copy.bytes, "aclrtMemcpy")?;
            device.check_alive()?;
            check_host(&device, touch(copy.to, copy.bytes, true), "aclrtMemcpy")?;
            let _engine = device.engine();
            place.allocation.block.store(place.offset, &from.read(copy.bytes));
        }
        Way::DeviceToHost => {
            let (device, place) = device_place(copy.from, copy.bytes, "aclrtMemcpy")?;
            device.check_healthy()?;
            check_host(&device, touch(copy.from, copy.bytes, false), "aclrtMemcpy")?;
            let mut bytes = vec![0_u8; copy.bytes];
            let engine = device.engine();
            place.allocation.block.load(place.offset, &mut bytes);
            drop(engine);
            to.write(&bytes);
        }
        Way::DeviceToDevice => {
            let (device, from) = device_place(copy.from, copy.bytes, "aclrtMemcpy")?;
            let (_, to) = device_place(copy.to, copy.bytes, "aclrtMemcpy")?;
            device.check_alive()?;
            check_host(&device, touch(copy.from, copy.bytes, false), "aclrtMemcpy")?;
            check_host(&device, touch(copy.to, copy.bytes, true), "aclrtMemcpy")?;
            let _engine = device.engine();
            move_bytes(&from, &to, copy.bytes);
        }
    }
    Ok(())
}

fn move_bytes(from: &Place, to: &Place, bytes: usize) {
    from.allocation.block.copy(from.offset, &to.allocation.block, to.offset, bytes);
}

/// Queues a copy, with the faults that strike it.
fn copy_later(copy: &Copy, stream: &Stream) -> Done {
    const NAME: &str = "aclrtMemcpyAsync";
    stream.device.check_alive()?;
    let host = match copy.way {
        Way::HostToDevice => Some(copy.from as usize),
        Way::DeviceToHost => Some(copy.to as usize),
        Way::DeviceToDevice | Way::HostToHost => None,
    };
    if copy.way == Way::HostToHost || host.is_some_and(|at| !DRIVER.is_pinned(at, copy.bytes)) {
        // Memory that is not pinned makes the call wait for the stream and copy at once.
        stream.wait(None)?;
        let clock = stream.device.hazards().snapshot(stream.id);
        stream.device.hazards().host_waited(&clock);
        return copy_now(copy);
    }
    let places = (
        matches!(copy.way, Way::DeviceToHost | Way::DeviceToDevice)
            .then(|| device_place(copy.from, copy.bytes, NAME))
            .transpose()?,
        matches!(copy.way, Way::HostToDevice | Way::DeviceToDevice)
            .then(|| device_place(copy.to, copy.bytes, NAME))
            .transpose()?,
    );
    let mut touches = Vec::new();
    touches.extend(places.0.as_ref().map(|_| touch(copy.from, copy.bytes, false)));
    touches.extend(places.1.as_ref().map(|_| touch(copy.to, copy.bytes, true)));
    touch_in_order(stream, NAME, &touches)?;
    let faults = stream.device.faults.strike(fault::Place::Task, NAME);
    if faults.iter().any(|fault| fault.kind == Kind::Hang) {
        stream.push(Work::Hang);
        return Ok(());
    }
    let device = Arc::clone(&stream.device);
    let failing = move || fail(&device, &faults, NAME, &[]).map_or(Ok(()), Err);
    match places {
        (Some((_, from)), Some((_, to))) => {
            let bytes = copy.bytes;
            stream.push(Work::Run(Box::new(move |_| {
                failing()?;
                move_bytes(&from, &to, bytes);
                Ok(())
            })));
        }
        (None, Some((_, to))) => send(stream, Host(copy.from as usize), copy.bytes, to, failing),
        (Some((_, from)), None) => fetch(stream, (from, copy.bytes), copy.to, failing),
        (None, None) => {}
    }
    Ok(())
}

fn send(
    stream: &Stream,
    from: Host,
    bytes: usize,
    to: Place,
    failing: impl FnOnce() -> Done + Send + 'static,
) {
    let sent = Arc::new(from.read(bytes));
    let (held, device) = (Arc::clone(&sent), stream.device.id);
    let work = Work::Run(Box::new(move |_| {
        failing()?;
        to.allocation.block.store(to.offset, &sent);
        Ok(())
    }));
    let check = Box::new(move || {
        if !DRIVER.is_pinned(from.0, bytes) {
            let text = format!("host memory {:#x} was freed before its copy was done", from.0);
            strict::report(device, Breach::FreedInUse, text);
        } else if from.read(bytes) != *held {
            let text = format!("host memory {:#x} changed before its copy was done", from.0);
            strict::report(device, Breach::HostChanged, text);
        }
    });
    stream.push_checked(work, check);
}

fn fetch(
    stream: &Stream,
    (from, bytes): (Place, usize),
    to: u64,
    failing: impl FnOnce() -> Done + Send + 'static,
) {
    let host = Host(to as usize);
    host.write(&vec![PENDING; bytes]);
    let landing = Arc::new(Mutex::new(vec![PENDING; bytes]));
    let target = Arc::clone(&landing);
    let work = Work::Run(Box::new(move |_| {
        failing()?;
        let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
        from.allocation.block.load(from.offset, &mut target[..]);
        Ok(())
    }));
    stream.push_landing(work, Landing { to: host, bytes: landing });
}

fn fill(address: u64, most: u64, (value, bytes): (i32, u64), stream: Option<&Stream>) -> Done {
    const NAME: &str = "aclrtMemset";
    if bytes > most {
        let text = format!("{bytes} bytes do not fit the {most} of the target");
        return Err(strict::breach(-1, Breach::OutOfBounds, Failure::parameter(text)));
    }
    let (device, place) = device_place(address, bytes as usize, NAME)?;
    device.check_alive()?;
    let access = touch(address, bytes as usize, true);
    let Some(stream) = stream else {
        check_host(&device, access, NAME)?;
        let _engine = device.engine();
        place.allocation.block.fill(place.offset, bytes as usize, value as u8);
        return Ok(());
    };
    touch_in_order(stream, NAME, &[access])?;
    stream.push(Work::Run(Box::new(move |_| {
        place.allocation.block.fill(place.offset, bytes as usize, value as u8);
        Ok(())
    })));
    Ok(())
}

fn allocate(out: Out<u64>, bytes: u64) -> Done {
    let (_, device) = DRIVER.current()?;
    device.check_alive()?;
    let struck = device.faults.strike(fault::Place::Allocate, "aclrtMalloc");
    if let Some(failure) = struck.iter().find_map(|fault| fault.kind.failure("aclrtMalloc")) {
        return Err(failure);
    }
    if out.is_null() {
        return Err(Failure::parameter("`devPtr` is null"));
    }
    out.set(device.memory.allocate(bytes)?, code::PARAMETER, "devPtr")
}

fn free(address: u64) -> Done {
    let id = memory::device_of(address);
    let Some(id) = id else {
        let failure = Failure::parameter(format!("{address:#x} is no device address"));
        return Err(strict::breach(-1, Breach::WrongMemory, failure));
    };
    let device = DRIVER.device(id)?;
    if let Some(bytes) = device.memory.length(address) {
        let access = touch(address, bytes as usize, true);
        let race = device.hazards().host_touches(access);
        if let Some(race) = race {
            let text = format!(
                "memory at {address:#x} is freed while tasks of stream {} use it",
                race.stream
            );
            return Err(strict::breach(id, Breach::FreedInUse, Failure::parameter(text)));
        }
        if !device.faults.strike(fault::Place::Free, "aclrtFree").is_empty() {
            device.memory.lose(bytes);
        }
    }
    device.memory.free(address)
}

calls! {
    fn aclrtMalloc(address: Out<u64>, bytes: u64, _policy: i32) {
        allocate(address, bytes)
    }
    fn aclrtMallocAlign32(address: Out<u64>, bytes: u64, _policy: i32) {
        allocate(address, bytes)
    }
    fn aclrtFree(address: u64) {
        free(address)
    }
    fn aclrtMallocHost(address: Out<u64>, bytes: u64) {
        DRIVER.current()?;
        if bytes == 0 {
            return Err(Failure::parameter("a size of 0 bytes cannot be allocated"));
        }
        address.set(DRIVER.pin(bytes as usize)? as u64, code::PARAMETER, "hostPtr")
    }
    fn aclrtFreeHost(address: u64) {
        DRIVER.unpin(address as usize)
    }
    fn aclrtGetMemInfo(_kind: i32, free: Out<u64>, total: Out<u64>) {
        let (_, device) = DRIVER.current()?;
        let (left, all) = device.memory.room();
        free.set(left, code::PARAMETER, "free")?;
        total.set(all, code::PARAMETER, "total")
    }
    fn aclrtMemcpy(to: u64, most: u64, from: u64, bytes: u64, kind: i32) {
        if bytes == 0 {
            return Ok(());
        }
        copy_now(&check(to, most, from, bytes, kind)?)
    }
    fn aclrtMemcpyAsync(to: u64, most: u64, from: u64, bytes: u64, kind: i32, stream: u64) {
        let stream = DRIVER.stream(stream)?;
        if bytes == 0 {
            return Ok(());
        }
        copy_later(&check(to, most, from, bytes, kind)?, &stream)
    }
    fn aclrtMemset(address: u64, most: u64, value: i32, bytes: u64) {
        fill(address, most, (value, bytes), None)
    }
    fn aclrtMemsetAsync(address: u64, most: u64, value: i32, bytes: u64, stream: u64) {
        let stream = DRIVER.stream(stream)?;
        fill(address, most, (value, bytes), Some(&stream))
    }
}
