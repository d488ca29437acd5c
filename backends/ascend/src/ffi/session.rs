//! One device's context and stream, and the runtime's calls on them: memory, copies, events,
//! waiting, and what a failed device can be asked.
//!
//! Every wait has a limit. It decides nothing about failures. Read next: `operators.rs`.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;
use std::time::Duration;

use pontoon_ops::{DeviceError, DeviceErrorKind};

use super::library::{Library, lacks};
use super::table::{Functions, MemoryFaultEntry};
use crate::codes;

/// `aclInit` was called before in this process, which is what we want.
const ALREADY_INITIALISED: [i32; 2] = [100_002, 207_015];
/// `ACL_OPT_DETERMINISTIC`.
const OPTION_DETERMINISTIC: i32 = 0;
/// Levels of it, best first: batch-invariant (newer runtimes only), deterministic.
const DETERMINISM_LEVELS: [i64; 2] = [3, 1];
/// `ACL_HBM_MEM`.
const MEMORY_HBM: i32 = 1;
/// Stop at the first failure of the stream, so that no later task works on damaged data.
const STOP_ON_FAILURE: u64 = 1;
/// Entries that one query for damaged memory can return; the vendor's own limit.
const MEMORY_FAULTS_MAX: usize = 128;
/// Room for the vendor's error record, whose layout is not ours to know.
const ERROR_INFO_WORDS: usize = 512;
/// How long a device may take to give its tasks back.
const ABORT_WAIT_MS: u32 = 10_000;

thread_local! {
    /// The context this thread works in, 0 for none: sessions share threads.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From pinned host memory to the device.
    Up,
    /// From the device to pinned host memory.
    Down,
}

/// A failed call: its code, with the text the library keeps for it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The vendor's number.
    pub code: i32,
    /// The call.
    pub call: &'static str,
    /// The vendor's text.
    pub text: String,
}

impl Failure {
    /// The failure in the waist's words.
    pub fn error(&self) -> DeviceError {
        let (kind, meaning) = codes::judge(self.code, &self.text);
        let text = match self.text.trim() {
            "" => format!("{}: {meaning}", self.call),
            told => format!("{}: {meaning}: {}", self.call, one_line(told)),
        };
        DeviceError { kind, vendor_code: i64::from(self.code), text }
    }
}

/// The vendor's texts run over many lines; reports take one.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A context and a stream of one device.
pub struct Session {
    library: Arc<Library>,
    functions: Functions,
    device: i32,
    context: *mut c_void,
    stream: *mut c_void,
    /// The level of determinism that could be switched on; 0 for none.
    pub determinism: i64,
}

// SAFETY: the handles may be used from any thread that makes the context its own first, which
// `Session::enter` does; `&mut self` keeps threads from doing so at the same time.
unsafe impl Send for Session {}

/// Calls a function of the runtime, if the library has it.
macro_rules! call {
    ($session:expr, $name:ident($($argument:expr),* $(,)?)) => {
        match $session.functions.$name {
            None => Err(lacks(stringify!($name))),
            // SAFETY: the function has the table's prototype; handles are live, out-pointers
            // point to locals, and memory ranges were checked by whoever made the call.
            Some(function) => match unsafe { function($($argument),*) } {
                0 => Ok(()),
                code => Err($session.failure(stringify!($name), code).error()),
            },
        }
    };
}

impl Session {
    /// Opens a device of a library: context, deterministic mode, stream.
    pub fn open(library: Arc<Library>, device: i32) -> Result<Session, DeviceError> {
        // SAFETY: the library's symbols have the table's prototypes: see `Library::search`.
        let functions = unsafe { Functions::find(&|name| library.find(name)) };
        let null = std::ptr::null_mut();
        let mut session =
            Session { library, functions, device, context: null, stream: null, determinism: 0 };
        session.initialise()?;
        let count = session.device_count()?;
        if device < 0 || device as u32 >= count {
            let text = format!("there is no device {device}; the library counts {count}");
            return Err(DeviceError::new(DeviceErrorKind::BadArgument, text));
        }
        call!(session, aclrtSetDevice(device))?;
        call!(session, aclrtCreateContext(&mut session.context, device))?;
        session.enter()?;
        session.determinism = DETERMINISM_LEVELS
            .into_iter()
            .find(|&level| {
                call!(session, aclrtCtxSetSysParamOpt(OPTION_DETERMINISTIC, level)).is_ok()
            })
            .unwrap_or(0);
        call!(session, aclrtCreateStream(&mut session.stream))?;
        // Older runtimes refuse the mode; failures are then seen at the next wait all the same.
        let _ = call!(session, aclrtSetStreamFailureMode(session.stream, STOP_ON_FAILURE));
        Ok(session)
    }

    fn initialise(&self) -> Result<(), DeviceError> {
        match call!(self, aclInit(std::ptr::null())) {
            Err(error) if ALREADY_INITIALISED.map(i64::from).contains(&error.vendor_code) => Ok(()),
            other => other,
        }
    }

    /// How many devices a library counts, without opening one.
    pub fn count(library: Arc<Library>) -> Result<u32, DeviceError> {
        // SAFETY: as in `open`.
        let functions = unsafe { Functions::find(&|name| library.find(name)) };
        let null = std::ptr::null_mut();
        let (context, stream) = (null, null);
        let session = Session { library, functions, device: 0, context, stream, determinism: 0 };
        session.initialise()?;
        session.device_count()
    }

    fn device_count(&self) -> Result<u32, DeviceError> {
        let mut count = 0;
        call!(self, aclrtGetDeviceCount(&mut count))?;
        Ok(count)
    }

    /// Makes the context the calling thread's own, where it is another's.
    pub fn enter(&mut self) -> Result<(), DeviceError> {
        let own = self.context as usize;
        if CURRENT.get() == own {
            return Ok(());
        }
        call!(self, aclrtSetCurrentContext(self.context))?;
        CURRENT.set(own);
        Ok(())
    }

    /// The library that the session's symbols come from.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// The session's functions.
    pub(super) fn functions(&self) -> &Functions {
        &self.functions
    }

    /// The session's stream.
    pub(super) fn stream(&self) -> *mut c_void {
        self.stream
    }

    /// A failure of a call, with the library's text.
    pub(super) fn failure(&self, call: &'static str, code: i32) -> Failure {
        let text = self.functions.aclGetRecentErrMsg.map(|function| {
            // SAFETY: the function takes nothing and gives null or a text.
            string(unsafe { function() })
        });
        Failure { code, call, text: text.unwrap_or_default() }
    }

    /// The chip's name.
    pub fn chip(&self) -> String {
        // SAFETY: the function takes nothing and gives null or a text.
        let name = self.functions.aclrtGetSocName.map(|function| string(unsafe { function() }));
        name.filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown".to_owned())
    }

    /// Bytes of device memory in all.
    pub fn memory_bytes(&self) -> u64 {
        let (mut free, mut total) = (0, 0);
        let asked = call!(self, aclrtGetMemInfo(MEMORY_HBM, &mut free, &mut total));
        if asked.is_ok() { total as u64 } else { 0 }
    }

    /// Device memory, aligned to 512 bytes.
    pub fn malloc(&mut self, bytes: usize) -> Result<usize, DeviceError> {
        let mut memory = std::ptr::null_mut();
        call!(self, aclrtMalloc(&mut memory, bytes, 0))?;
        Ok(memory as usize)
    }

    /// Gives device memory back. No task may still use it.
    pub fn free(&mut self, address: usize) -> Result<(), DeviceError> {
        call!(self, aclrtFree(address as *mut c_void))
    }

    /// Fills device memory with a byte, in the stream's order.
    pub fn fill(&mut self, address: usize, bytes: usize, value: u8) -> Result<(), DeviceError> {
        let memory = address as *mut c_void;
        call!(self, aclrtMemsetAsync(memory, bytes, i32::from(value), bytes, self.stream))
    }

    /// Pinned host memory.
    pub fn pinned(&mut self, bytes: usize) -> Result<Pinned, DeviceError> {
        let mut memory = std::ptr::null_mut();
        call!(self, aclrtMallocHost(&mut memory, bytes))?;
        Ok(Pinned { memory: memory.cast(), bytes })
    }

    /// Gives pinned memory back. No task may still use it.
    pub fn unpin(&mut self, pinned: Pinned) -> Result<(), DeviceError> {
        call!(self, aclrtFreeHost(pinned.memory.cast()))
    }

    /// Copies between pinned and device memory, in the stream's order.
    pub fn copy(
        &mut self,
        way: Way,
        pinned: &mut Pinned,
        (start, bytes): (usize, usize),
        address: usize,
    ) -> Result<(), DeviceError> {
        let fits = start.checked_add(bytes).is_some_and(|end| end <= pinned.bytes);
        assert!(fits, "{bytes} bytes at {start} of {} pinned ones", pinned.bytes);
        let host: *mut c_void = pinned.memory.wrapping_add(start).cast();
        let device = address as *mut c_void;
        let (to, from, kind) = match way {
            Way::Up => (device, host, 1),
            Way::Down => (host, device, 2),
        };
        call!(self, aclrtMemcpyAsync(to, bytes, from, bytes, kind, self.stream))
    }

    /// Waits for the stream's tasks.
    pub fn synchronize(&mut self, limit: Duration) -> Result<(), DeviceError> {
        call!(self, aclrtSynchronizeStreamWithTimeout(self.stream, milliseconds(limit)))
    }

    /// An event that is not recorded yet.
    pub fn event(&mut self) -> Result<Event, DeviceError> {
        let mut event = std::ptr::null_mut();
        call!(self, aclrtCreateEvent(&mut event))?;
        Ok(Event(event))
    }

    /// Gives an event back.
    pub fn drop_event(&mut self, event: Event) -> Result<(), DeviceError> {
        call!(self, aclrtDestroyEvent(event.0))
    }

    /// Records an event after all tasks so far.
    pub fn record(&mut self, event: &Event) -> Result<(), DeviceError> {
        call!(self, aclrtRecordEvent(event.0, self.stream))
    }

    /// Waits for a recorded event.
    pub fn wait_for(&mut self, event: &Event, limit: Duration) -> Result<(), DeviceError> {
        call!(self, aclrtSynchronizeEventWithTimeout(event.0, milliseconds(limit)))
    }

    /// The code of the last failure of this context, 0 for none.
    pub fn last_error(&self) -> i32 {
        // SAFETY: the function takes a number; 0 is the thread's level.
        self.functions.aclrtPeekAtLastError.map_or(0, |function| unsafe { function(0) })
    }

    /// Whether the driver still calls the device healthy.
    pub fn is_healthy(&self) -> bool {
        let mut status = 0;
        call!(self, aclrtQueryDeviceStatus(self.device, &mut status)).is_ok() && status == 0
    }

    /// Asks for the details of a failure, which newer runtimes want to be asked for before
    /// anything is aborted. Gives the record, to be handed to [`Session::repair`].
    pub fn error_record(&mut self) -> Option<ErrorRecord> {
        let mut record = ErrorRecord(vec![0_u64; ERROR_INFO_WORDS]);
        let memory: *mut c_void = record.0.as_mut_ptr().cast();
        call!(self, aclrtGetErrorVerbose(self.device, memory)).ok().map(|()| record)
    }

    /// Takes all tasks back from the device.
    pub fn abort(&mut self) -> Result<(), DeviceError> {
        call!(self, aclrtDeviceTaskAbort(self.device, ABORT_WAIT_MS))
    }

    /// Address ranges with uncorrectable errors.
    pub fn damaged_memory(&mut self) -> Vec<MemoryFaultEntry> {
        let mut entries = [MemoryFaultEntry::EMPTY; MEMORY_FAULTS_MAX];
        let mut count = 0;
        let asked = call!(
            self,
            aclrtGetMemUceInfo(self.device, entries.as_mut_ptr(), MEMORY_FAULTS_MAX, &mut count)
        );
        let count = if asked.is_ok() { count.min(MEMORY_FAULTS_MAX) } else { 0 };
        entries[..count].to_vec()
    }

    /// Has the device repair what it reported; after an abort only.
    pub fn repair(
        &mut self,
        record: Option<ErrorRecord>,
        damaged: &mut [MemoryFaultEntry],
    ) -> Result<(), DeviceError> {
        if let Some(mut record) = record {
            let memory: *mut c_void = record.0.as_mut_ptr().cast();
            return call!(self, aclrtRepairError(self.device, memory));
        }
        if damaged.is_empty() {
            return Ok(());
        }
        call!(self, aclrtMemUceRepair(self.device, damaged.as_mut_ptr(), damaged.len()))
    }

    /// Closes stream and context. `force` drops tasks that do not end.
    pub fn close(&mut self, force: bool) {
        // Nothing can be done about a failure here, and the process may be about to end.
        let _ = self.enter();
        if !self.stream.is_null() {
            let _ = match force {
                true => call!(self, aclrtDestroyStreamForce(self.stream)),
                false => call!(self, aclrtDestroyStream(self.stream)),
            };
        }
        if !self.context.is_null() {
            let _ = call!(self, aclrtDestroyContext(self.context));
            CURRENT.set(0);
        }
        (self.stream, self.context) = (std::ptr::null_mut(), std::ptr::null_mut());
    }
}

/// Collectives: every member of a group is a device of this process.
impl Session {
    /// Makes one communicator for each of the devices, in their order.
    pub fn communicators(&self, devices: &[i32]) -> Result<Vec<Communicator>, DeviceError> {
        let mut devices = devices.to_vec();
        let mut handles = vec![std::ptr::null_mut(); devices.len()];
        let count = devices.len() as u32;
        let code = match self.functions.HcclCommInitAll {
            None => return Err(lacks("HcclCommInitAll")),
            // SAFETY: both arrays have `count` entries.
            Some(function) => unsafe {
                function(count, devices.as_mut_ptr(), handles.as_mut_ptr())
            },
        };
        self.collective("HcclCommInitAll", code)?;
        Ok(handles.into_iter().map(Communicator).collect())
    }

    /// Gathers every member's `bytes` bytes, by rank, in the stream's order.
    pub fn all_gather(
        &mut self,
        communicator: &Communicator,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let Some(function) = self.functions.HcclAllGather else {
            return Err(lacks("HcclAllGather"));
        };
        let (from, to) = (from as *mut c_void, to as *mut c_void);
        // SAFETY: the caller has checked both ranges; the type is HCCL_DATA_TYPE_INT8.
        let code = unsafe { function(from, to, bytes as u64, 0, communicator.0, self.stream) };
        self.collective("HcclAllGather", code)
    }

    /// What went wrong in a communicator behind the calls' backs.
    pub fn collective_state(&self, communicator: &Communicator) -> Result<(), DeviceError> {
        let Some(function) = self.functions.HcclGetCommAsyncError else { return Ok(()) };
        let mut result = 0;
        // SAFETY: the communicator is live and the result a local.
        let code = unsafe { function(communicator.0, &mut result) };
        self.collective("HcclGetCommAsyncError", code)?;
        self.collective("HcclGetCommAsyncError", result)
    }

    /// Gives a communicator back.
    pub fn drop_communicator(&mut self, communicator: Communicator) {
        if let Some(function) = self.functions.HcclCommDestroy {
            // SAFETY: the handle came from `communicators` and is not used again.
            let _ = unsafe { function(communicator.0) };
        }
    }

    fn collective(&self, call: &str, code: i32) -> Result<(), DeviceError> {
        if code == 0 {
            return Ok(());
        }
        let (kind, meaning) = codes::judge_collective(code);
        let told = self.functions.HcclGetErrorString.map(|function| {
            // SAFETY: the function takes a number and gives null or a text.
            string(unsafe { function(code) })
        });
        let text = format!("{call}: {meaning}: {}", told.unwrap_or_default());
        Err(DeviceError { kind, vendor_code: i64::from(code), text })
    }
}

/// A member's handle of a group.
pub struct Communicator(*mut c_void);

// SAFETY: a handle is a number to us; its calls are made by the session that owns it alone.
unsafe impl Send for Communicator {}

/// An event of a session.
pub struct Event(*mut c_void);

// SAFETY: as for `Communicator`.
unsafe impl Send for Event {}

/// The vendor's record of a failure, handed back for repair and not read.
pub struct ErrorRecord(Vec<u64>);

/// Host memory that the device copies from and to by itself.
pub struct Pinned {
    memory: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Puts bytes in. The caller knows that no copy still reads there.
    pub fn write(&mut self, start: usize, bytes: &[u8]) {
        let fits = start.checked_add(bytes.len()).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{} bytes at {start} of {} pinned ones", bytes.len(), self.bytes);
        // SAFETY: the range lies in the allocation, which nothing else refers to.
        let room = unsafe { std::slice::from_raw_parts_mut(self.memory.add(start), bytes.len()) };
        room.copy_from_slice(bytes);
    }

    /// Takes bytes out. The caller has waited for the copy that wrote them.
    pub fn read(&self, start: usize, bytes: &mut [u8]) {
        let fits = start.checked_add(bytes.len()).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{} bytes at {start} of {} pinned ones", bytes.len(), self.bytes);
        // SAFETY: the range lies in the allocation and no task writes it any more.
        let room = unsafe { std::slice::from_raw_parts(self.memory.add(start), bytes.len()) };
        bytes.copy_from_slice(room);
    }
}

fn milliseconds(limit: Duration) -> i32 {
    i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1)
}

fn string(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the vendor gives a text that ends in zero and lives until the next call.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
