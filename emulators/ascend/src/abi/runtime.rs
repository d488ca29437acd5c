//! The runtime: devices, contexts, streams, events, waiting, health.

use std::ffi::c_char;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::calls;
use super::pointers::{Many, Out, Text};
use crate::code;
use crate::device::Device;
use crate::device::STREAMS_MAX;
use crate::device::hazards::Clock;
use crate::device::stream::{Event, Stream, Waited, Work, fresh_number};
use crate::driver::{DRIVER, Object};
use crate::failure::{Done, Failure, Forget, last_code, recent_text};
use crate::fault::Place;
use crate::plan::touch_in_order;
use crate::strict::{self, Breach};

/// What the chip calls itself.
const SOC_NAME: &std::ffi::CStr = c"Ascend-Emulated-On-Host";
/// Uncorrectable memory errors that one call lists, as in the interface.
const UCE_MAX: usize = 128;

/// `aclrtMemUceInfo`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UceInfo {
    address: u64,
    bytes: u64,
    reserved: [u64; 14],
}

/// CANN's `aclGetRecentErrMsg`.
#[unsafe(no_mangle)]
pub extern "C" fn aclGetRecentErrMsg() -> *const c_char {
    recent_text(|text| if text.is_empty() { std::ptr::null() } else { text.as_ptr() })
}

/// CANN's `aclrtGetSocName`.
#[unsafe(no_mangle)]
pub extern "C" fn aclrtGetSocName() -> *const c_char {
    SOC_NAME.as_ptr()
}

/// CANN's `aclDataTypeSize`.
#[unsafe(no_mangle)]
pub extern "C" fn aclDataTypeSize(dtype: i32) -> u64 {
    crate::dtype::DataType::from_number(dtype).map_or(0, |dtype| dtype.bytes(1) as u64)
}

/// The functions here that return no code, by name.
pub(super) fn others() -> Vec<(&'static str, *const std::ffi::c_void)> {
    vec![
        ("aclGetRecentErrMsg", aclGetRecentErrMsg as *const _),
        ("aclrtGetSocName", aclrtGetSocName as *const _),
        ("aclDataTypeSize", aclDataTypeSize as *const _),
    ]
}

/// A limit in milliseconds; none if negative.
fn limit(milliseconds: i32) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

/// Waits for a stream; then the host may touch what its tasks touched.
fn wait(stream: &Stream, limit: Option<Duration>) -> Done {
    stream.device.check_alive()?;
    let clock = stream.device.hazards().snapshot(stream.id);
    match stream.wait(limit)? {
        Waited::Done => {
            waited(&stream.device, &clock);
            stream.device.check_healthy()
        }
        Waited::TimedOut => {
            let text =
                format!("stream {} did not finish in time: reason=[sync timeout]", stream.id);
            Err(Failure::new(code::STREAM_SYNC_TIMEOUT, text))
        }
    }
}

/// What the host may do once it has waited for everything a clock says.
fn waited(device: &Device, clock: &Clock) {
    device.hazards().host_waited(clock);
    let streams: Vec<Arc<Stream>> = device.streams().clone();
    for stream in streams {
        if let Some(&tasks) = clock.get(&stream.id) {
            stream.land(tasks);
        }
    }
}

fn wait_device(limit: Option<Duration>) -> Done {
    let (_, device) = DRIVER.current()?;
    let streams: Vec<Arc<Stream>> = device.streams().clone();
    streams.iter().try_for_each(|stream| wait(stream, limit))
}

fn make_stream(out: Out<u64>) -> Done {
    let (context, device) = DRIVER.current()?;
    device.check_alive()?;
    let struck = device.faults.strike(Place::Stream, "aclrtCreateStream");
    if let Some(failure) = struck.iter().find_map(|f| f.kind.failure("aclrtCreateStream")) {
        return Err(failure);
    }
    if device.streams().len() >= STREAMS_MAX {
        let text = format!("all {STREAMS_MAX} streams of the device are in use");
        return Err(Failure::new(code::NO_STREAM, text));
    }
    let number = fresh_number();
    let stream = Stream::start(number, context, Arc::clone(&device))?;
    device.streams().push(Arc::clone(&stream));
    let handle = DRIVER.keep_as(number, Object::Stream(stream));
    out.set(handle, code::PARAMETER, "stream")
}

fn end_stream(handle: u64, force: bool) -> Done {
    let stream = DRIVER.stream(handle)?;
    if handle == 0 {
        return Err(Failure::parameter("the default stream ends with its context"));
    }
    if !force && !stream.is_idle() {
        // The interface waits for the tasks; a stream that hangs is ended by force only.
        wait(&stream, None)?;
    }
    DRIVER.drop_object::<Arc<Stream>>(handle, "stream")?;
    if force {
        stream.abort(code::STREAM_ABORT);
    }
    stream.stop();
    stream.device.hazards().forget(stream.id);
    stream.device.streams().retain(|other| other.id != stream.id);
    Ok(())
}

fn make_event(out: Out<u64>) -> Done {
    let (_, device) = DRIVER.current()?;
    let struck = device.faults.strike(Place::Event, "aclrtCreateEvent");
    if let Some(failure) = struck.iter().find_map(|f| f.kind.failure("aclrtCreateEvent")) {
        return Err(failure);
    }
    let handle = DRIVER.keep(Object::Event(Arc::new(Event::new(device))));
    out.set(handle, code::PARAMETER, "event")
}

fn event_on(handle: u64, stream: &Stream) -> Done<Arc<Event>> {
    let event: Arc<Event> = DRIVER.get(handle, "event")?;
    if event.device.id != stream.device.id {
        let failure = Failure::parameter("event and stream belong to different devices");
        return Err(strict::breach(stream.device.id, Breach::WrongContext, failure));
    }
    Ok(event)
}

fn wait_event(handle: u64, limit: Option<Duration>) -> Done {
    let event: Arc<Event> = DRIVER.get(handle, "event")?;
    event.device.check_alive()?;
    let (_, clock) = event.recorded();
    match event.wait(limit) {
        Waited::Done => {
            waited(&event.device, &clock);
            event.device.check_healthy()
        }
        Waited::TimedOut => {
            let text = "the event was not reached in time: reason=[event sync timeout]";
            Err(Failure::new(code::EVENT_SYNC_TIMEOUT, text))
        }
    }
}

/// The option that makes operators deterministic.
const OPT_DETERMINISTIC: i32 = 0;

fn set_option(option: i32, value: i64) -> Done {
    let (_, device) = DRIVER.current()?;
    if option != OPT_DETERMINISTIC {
        return Err(Failure::parameter(format!("system parameter {option} is not emulated")));
    }
    if !(0..=1).contains(&value) {
        let text = format!("determinism level {value} is for newer runtimes");
        return Err(Failure::new(code::FEATURE, text));
    }
    device.deterministic.store(value, Ordering::Relaxed);
    Ok(())
}

fn get_option(option: i32, value: Out<i64>) -> Done {
    let (_, device) = DRIVER.current()?;
    if option != OPT_DETERMINISTIC {
        return Err(Failure::parameter(format!("system parameter {option} is not emulated")));
    }
    value.set(device.deterministic.load(Ordering::Relaxed), code::PARAMETER, "value")
}

calls! {
    fn aclInit(_config: Text) {
        DRIVER.initialise()
    }
    fn aclFinalize() {
        DRIVER.finalise()
    }
    fn aclrtGetVersion(major: Out<i32>, minor: Out<i32>, patch: Out<i32>) {
        major.set(1, code::PARAMETER, "majorVersion")?;
        minor.set(14, code::PARAMETER, "minorVersion")?;
        patch.set(0, code::PARAMETER, "patchVersion")
    }
    fn aclrtPeekAtLastError(_level: i32) {
        let code = last_code(Forget::No);
        if code == code::SUCCESS { Ok(()) } else { Err(Failure::new(code, "the last error")) }
    }
    fn aclrtGetLastError(_level: i32) {
        let code = last_code(Forget::Yes);
        if code == code::SUCCESS { Ok(()) } else { Err(Failure::new(code, "the last error")) }
    }
    fn aclrtGetDeviceCount(count: Out<u32>) {
        count.set(DRIVER.devices().len() as u32, code::PARAMETER, "count")
    }
    fn aclrtSetDevice(device: i32) {
        DRIVER.check_initialised()?;
        DRIVER.set_device(device)
    }
    fn aclrtResetDevice(device: i32) {
        DRIVER.release_device(device)
    }
    fn aclrtResetDeviceForce(device: i32) {
        let device = DRIVER.device(device)?;
        DRIVER.reset(device);
        Ok(())
    }
    fn aclrtGetDevice(device: Out<i32>) {
        let (_, current) = DRIVER.current()?;
        device.set(current.id, code::PARAMETER, "deviceId")
    }
    fn aclrtGetRunMode(mode: Out<i32>) {
        mode.set(1, code::PARAMETER, "runMode")
    }
    fn aclrtCreateContext(context: Out<u64>, device: i32) {
        DRIVER.check_initialised()?;
        let device = DRIVER.device(device)?;
        device.check_alive()?;
        let handle = DRIVER.keep(Object::Context(Arc::clone(device)));
        DRIVER.set_context(handle)?;
        context.set(handle, code::PARAMETER, "context")
    }
    fn aclrtDestroyContext(context: u64) {
        DRIVER.drop_object::<Arc<Device>>(context, "context").map(drop)
    }
    fn aclrtSetCurrentContext(context: u64) {
        DRIVER.set_context(context)
    }
    fn aclrtGetCurrentContext(context: Out<u64>) {
        let (current, _) = DRIVER.current()?;
        context.set(current, code::PARAMETER, "context")
    }
    fn aclrtSetSysParamOpt(option: i32, value: i64) {
        set_option(option, value)
    }
    fn aclrtCtxSetSysParamOpt(option: i32, value: i64) {
        set_option(option, value)
    }
    fn aclrtGetSysParamOpt(option: i32, value: Out<i64>) {
        get_option(option, value)
    }
    fn aclrtCtxGetSysParamOpt(option: i32, value: Out<i64>) {
        get_option(option, value)
    }
    fn aclrtCreateStream(stream: Out<u64>) {
        make_stream(stream)
    }
    fn aclrtCreateStreamWithConfig(stream: Out<u64>, _priority: u32, _flag: u32) {
        make_stream(stream)
    }
    fn aclrtDestroyStream(stream: u64) {
        end_stream(stream, false)
    }
    fn aclrtDestroyStreamForce(stream: u64) {
        end_stream(stream, true)
    }
    fn aclrtSetStreamFailureMode(stream: u64, mode: u64) {
        let stream = DRIVER.stream(stream)?;
        if mode > 1 {
            return Err(Failure::parameter(format!("failure mode {mode} is 0 or 1")));
        }
        stream.stop_on_failure.store(mode == 1, Ordering::Relaxed);
        Ok(())
    }
    fn aclrtStreamGetId(stream: u64, id: Out<i32>) {
        let stream = DRIVER.stream(stream)?;
        id.set(stream.id as i32, code::PARAMETER, "streamId")
    }
    fn aclrtSynchronizeStream(stream: u64) {
        let stream = DRIVER.stream(stream)?;
        wait(&stream, None)
    }
    fn aclrtSynchronizeStreamWithTimeout(stream: u64, milliseconds: i32) {
        let stream = DRIVER.stream(stream)?;
        wait(&stream, limit(milliseconds))
    }
    fn aclrtSynchronizeDevice() {
        wait_device(None)
    }
    fn aclrtSynchronizeDeviceWithTimeout(milliseconds: i32) {
        wait_device(limit(milliseconds))
    }
    fn aclrtStreamQuery(stream: u64, status: Out<i32>) {
        let stream = DRIVER.stream(stream)?;
        let idle = stream.is_idle();
        status.set(i32::from(!idle), code::PARAMETER, "status")
    }
    fn aclrtStreamAbort(stream: u64) {
        let stream = DRIVER.stream(stream)?;
        stream.abort(code::STREAM_ABORT);
        stream.device.hazards().forget(stream.id);
        Ok(())
    }
    fn aclrtCreateEvent(event: Out<u64>) {
        make_event(event)
    }
    fn aclrtCreateEventWithFlag(event: Out<u64>, _flag: u32) {
        make_event(event)
    }
    fn aclrtCreateEventExWithFlag(event: Out<u64>, _flag: u32) {
        make_event(event)
    }
    fn aclrtDestroyEvent(event: u64) {
        DRIVER.drop_object::<Arc<Event>>(event, "event").map(drop)
    }
    fn aclrtRecordEvent(event: u64, stream: u64) {
        let stream = DRIVER.stream(stream)?;
        let event = event_on(event, &stream)?;
        touch_in_order(&stream, "aclrtRecordEvent", &[])?;
        let clock = stream.device.hazards().snapshot(stream.id);
        let number = event.record(clock);
        stream.push(Work::Record(event, number));
        Ok(())
    }
    fn aclrtStreamWaitEvent(stream: u64, event: u64) {
        let stream = DRIVER.stream(stream)?;
        let event = event_on(event, &stream)?;
        let (number, clock) = event.recorded();
        stream.device.hazards().join(stream.id, &clock);
        touch_in_order(&stream, "aclrtStreamWaitEvent", &[])?;
        stream.push(Work::Wait(event, number));
        Ok(())
    }
    fn aclrtQueryEventStatus(event: u64, status: Out<i32>) {
        let event: Arc<Event> = DRIVER.get(event, "event")?;
        status.set(i32::from(event.is_reached()), code::PARAMETER, "status")
    }
    fn aclrtSynchronizeEvent(event: u64) {
        wait_event(event, None)
    }
    fn aclrtSynchronizeEventWithTimeout(event: u64, milliseconds: i32) {
        wait_event(event, limit(milliseconds))
    }
    fn aclrtEventElapsedTime(milliseconds: Out<f32>, start: u64, end: u64) {
        let start: Arc<Event> = DRIVER.get(start, "startEvent")?;
        let end: Arc<Event> = DRIVER.get(end, "endEvent")?;
        let (Some(start), Some(end)) = (start.time(), end.time()) else {
            return Err(Failure::parameter("an event was not reached"));
        };
        let time = end.saturating_duration_since(start).as_secs_f32();
        milliseconds.set(time * 1e3, code::PARAMETER, "ms")
    }
    fn aclrtQueryDeviceStatus(device: i32, status: Out<i32>) {
        let device = DRIVER.device(device)?;
        let abnormal = device.check_healthy().is_err();
        status.set(i32::from(abnormal), code::PARAMETER, "deviceStatus")
    }
    fn aclrtDeviceTaskAbort(device: i32, _milliseconds: u32) {
        let device = DRIVER.device(device)?;
        device.check_alive()?;
        device.abort(code::TASK_ABORT);
        Ok(())
    }
    fn aclrtGetMemUceInfo(device: i32, list: Out<UceInfo>, capacity: u64, count: Out<u64>) {
        let damaged = DRIVER.device(device)?.damaged();
        let capacity = (capacity as usize).min(UCE_MAX);
        if list.is_null() {
            return Err(Failure::parameter("`memUceInfoArray` is null"));
        }
        let listed = damaged.iter().take(capacity);
        count.set(listed.len() as u64, code::PARAMETER, "retSize")?;
        let info = |&(address, bytes): &(u64, u64)| UceInfo { address, bytes, reserved: [0; 14] };
        list.set_many(listed.map(info));
        Ok(())
    }
    fn aclrtMemUceRepair(device: i32, list: Many<UceInfo>, count: u64) {
        let device = DRIVER.device(device)?;
        let null = || Failure::parameter("`memUceInfoArray` is null");
        let list = list.read((count as usize).min(UCE_MAX)).ok_or_else(null)?;
        device.repair(&list.iter().map(|info| info.address).collect::<Vec<_>>());
        Ok(())
    }
    fn aclrtSetOpExecuteTimeOut(_seconds: u32) {
        Ok(())
    }
    fn aclrtSetOpWaitTimeout(_seconds: u32) {
        Ok(())
    }
}
