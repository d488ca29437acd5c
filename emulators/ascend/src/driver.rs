//! The whole library's state: devices, and every object a caller holds a handle to.
//!
//! Handles are numbers that are never followed and never given out twice, so a stale one is always
//! known for what it is.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use crate::code;
use crate::collective::Communicator;
use crate::device::Device;
use crate::device::memory::{self, Place};
use crate::device::stream::{Event, Stream, fresh_number};
use crate::failure::{Done, Failure};
use crate::fault::{self, Fault};
use crate::ffi::Block;
use crate::plan::Executor;
use crate::strict::{self, Breach};
use crate::tensor::{Scalar, Tensor};

/// How many devices there are.
const DEVICES_VARIABLE: &str = "PONTOON_EMU_DEVICES";
/// Devices unless told otherwise: those of one server.
const DEVICES: u64 = 8;

/// The bits that tell a handle from any address.
const HANDLE: u64 = 0x7e << 56;

/// What a handle names.
#[derive(Clone)]
pub enum Object {
    /// `aclrtContext`: its device.
    Context(Arc<Device>),
    /// `aclrtStream`.
    Stream(Arc<Stream>),
    /// `aclrtEvent`.
    Event(Arc<Event>),
    /// `aclTensor`.
    Tensor(Arc<Tensor>),
    /// `aclTensorList`: the handles of its tensors.
    Tensors(Arc<Vec<u64>>),
    /// `aclScalar`.
    Scalar(Scalar),
    /// `aclIntArray`.
    Integers(Arc<Vec<i64>>),
    /// `aclFloatArray`.
    Floats(Arc<Vec<f32>>),
    /// `aclBoolArray`.
    Truths(Arc<Vec<bool>>),
    /// `aclOpExecutor`.
    Executor(Arc<Executor>),
    /// `HcclComm`.
    Communicator(Arc<Communicator>),
}

impl Object {
    fn name(&self) -> &'static str {
        match self {
            Object::Context(_) => "context",
            Object::Stream(_) => "stream",
            Object::Event(_) => "event",
            Object::Tensor(_) => "tensor",
            Object::Tensors(_) => "tensor list",
            Object::Scalar(_) => "scalar",
            Object::Integers(_) => "integer array",
            Object::Floats(_) => "float array",
            Object::Truths(_) => "truth array",
            Object::Executor(_) => "executor",
            Object::Communicator(_) => "communicator",
        }
    }
}

/// A kind of object that handles name.
pub trait Named: Sized {
    /// What it is called in texts.
    const NAME: &'static str;
    /// It, if the object is one.
    fn of(object: &Object) -> Option<Self>;
}

macro_rules! named {
    ($($type:ty, $variant:ident, $name:literal;)*) => {$(
        impl Named for $type {
            const NAME: &'static str = $name;
            fn of(object: &Object) -> Option<Self> {
                match object {
                    Object::$variant(value) => Some(value.clone()),
                    _ => None,
                }
            }
        }
    )*};
}

named! {
    Arc<Device>, Context, "context";
    Arc<Stream>, Stream, "stream";
    Arc<Event>, Event, "event";
    Arc<Tensor>, Tensor, "tensor";
    Arc<Vec<u64>>, Tensors, "tensor list";
    Scalar, Scalar, "scalar";
    Arc<Vec<i64>>, Integers, "integer array";
    Arc<Vec<f32>>, Floats, "float array";
    Arc<Vec<bool>>, Truths, "truth array";
    Arc<Executor>, Executor, "executor";
    Arc<Communicator>, Communicator, "communicator";
}

/// Everything.
pub struct Driver {
    devices: Vec<Arc<Device>>,
    objects: Mutex<HashMap<u64, Object>>,
    host: Mutex<BTreeMap<usize, Block>>,
    initialised: AtomicBool,
    /// Primary contexts by device.
    primary: Mutex<HashMap<i32, u64>>,
    /// Default streams by context.
    default_streams: Mutex<HashMap<u64, Arc<Stream>>>,
}

/// The driver of this process.
pub static DRIVER: LazyLock<Driver> = LazyLock::new(Driver::new);

thread_local! {
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    fn new() -> Driver {
        let count = std::env::var(DEVICES_VARIABLE).ok().and_then(|count| count.parse().ok());
        let count: u64 = count.unwrap_or(DEVICES).clamp(1, 64);
        let driver = Driver {
            devices: (0..count as i32).map(|id| Arc::new(Device::new(id))).collect(),
            objects: Mutex::default(),
            host: Mutex::default(),
            initialised: AtomicBool::new(false),
            primary: Mutex::default(),
            default_streams: Mutex::default(),
        };
        if let Ok(text) = std::env::var(fault::VARIABLE) {
            match fault::parse(&text) {
                Ok(faults) => faults.iter().for_each(|fault| driver.arm(fault)),
                // A run that was to fail and does not would prove nothing, so it must not start.
                Err(failure) => {
                    let dead = Failure::new(code::INTERNAL, failure.text);
                    let kind = fault::Kind::LostHeartbeat;
                    driver.devices.iter().for_each(|device| device.suffer(kind, &dead, None));
                }
            }
        }
        driver
    }

    /// All devices.
    pub fn devices(&self) -> &[Arc<Device>] {
        &self.devices
    }

    /// A device by its number.
    pub fn device(&self, id: i32) -> Done<&Arc<Device>> {
        let found = usize::try_from(id).ok().and_then(|index| self.devices.get(index));
        found.ok_or_else(|| {
            let text = format!("there is no device {id}; there are {}", self.devices.len());
            Failure::new(code::DEVICE_ID, text)
        })
    }

    /// Arms a fault on the devices it names.
    pub fn arm(&self, fault: &Fault) {
        let meant = |device: &&Arc<Device>| fault.device.is_none_or(|id| id == device.id);
        self.devices.iter().filter(meant).for_each(|device| device.faults.arm(fault));
    }

    /// `aclInit`.
    pub fn initialise(&self) -> Done {
        if self.initialised.swap(true, Ordering::SeqCst) {
            return Err(Failure::new(code::REPEATED_INIT, "aclInit was called before"));
        }
        Ok(())
    }

    /// `aclFinalize`: everything left is a leak.
    pub fn finalise(&self) -> Done {
        if !self.initialised.swap(false, Ordering::SeqCst) {
            return Err(Failure::new(code::REPEATED_FINALIZE, "there was no aclInit"));
        }
        let kept = self.objects_left(|_| true);
        if !kept.is_empty() {
            strict::report(-1, Breach::Leaked, format!("left at aclFinalize: {kept}"));
        }
        self.devices.iter().for_each(|device| self.reset(device));
        lock(&self.objects).clear();
        lock(&self.primary).clear();
        let pinned = std::mem::take(&mut *lock(&self.host)).len();
        if pinned > 0 {
            let text = format!("{pinned} host allocations were left at aclFinalize");
            strict::report(-1, Breach::Leaked, text);
        }
        Ok(())
    }

    /// How many objects of each kind are left, as a text.
    fn objects_left(&self, counts: impl Fn(&Object) -> bool) -> String {
        let mut kinds: BTreeMap<&'static str, usize> = BTreeMap::new();
        for object in lock(&self.objects).values().filter(|object| counts(object)) {
            // Contexts belong to devices and end with them.
            if !matches!(object, Object::Context(_)) {
                *kinds.entry(object.name()).or_default() += 1;
            }
        }
        let texts = kinds.into_iter().map(|(name, count)| format!("{count} x {name}"));
        texts.collect::<Vec<_>>().join(", ")
    }

    /// Switches a device off and on.
    pub fn reset(&self, device: &Arc<Device>) {
        let of_it = |object: &Object| match object {
            Object::Stream(stream) => stream.device.id == device.id,
            Object::Event(event) => event.device.id == device.id,
            _ => false,
        };
        let kept = self.objects_left(of_it);
        let primary = lock(&self.primary).remove(&device.id);
        lock(&self.default_streams).retain(|_, stream| stream.device.id != device.id);
        let (allocations, bytes) = device.reset();
        let mut texts = Vec::new();
        if !kept.is_empty() {
            texts.push(kept);
        }
        if allocations > 0 {
            texts.push(format!("{allocations} allocations of {bytes} bytes"));
        }
        if !texts.is_empty() {
            let text = format!("left when the device was reset: {}", texts.join(", "));
            strict::report(device.id, Breach::Leaked, text);
        }
        lock(&self.objects).retain(|handle, object| !of_it(object) && Some(*handle) != primary);
    }

    /// Fails before `aclInit`.
    pub fn check_initialised(&self) -> Done {
        if self.initialised.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Failure::new(code::UNINITIALISED, "aclInit was not called"))
    }

    /// Gives an object a handle.
    pub fn keep(&self, object: Object) -> u64 {
        self.keep_as(fresh_number(), object)
    }

    /// Gives an object the handle of a number.
    pub fn keep_as(&self, number: u64, object: Object) -> u64 {
        let handle = HANDLE | number << 4;
        lock(&self.objects).insert(handle, object);
        handle
    }

    /// The object behind a handle.
    pub fn get<T: Named>(&self, handle: u64, what: &str) -> Done<T> {
        if handle == 0 {
            return Err(Failure::new(code::OP_NULL, format!("`{what}` is null")));
        }
        match lock(&self.objects).get(&handle) {
            Some(object) => T::of(object).ok_or_else(|| {
                let (is, wanted) = (object.name(), T::NAME);
                let text = format!("`{what}` should be a {wanted} but is a {is}");
                Failure::new(code::HANDLE, text)
            }),
            None => {
                let text = format!("`{what}` is no {} that exists, or no longer", T::NAME);
                Err(strict::breach(-1, Breach::UseAfterFree, Failure::new(code::HANDLE, text)))
            }
        }
    }

    /// Ends an object.
    pub fn drop_object<T: Named>(&self, handle: u64, what: &str) -> Done<T> {
        if handle == 0 {
            return Err(Failure::new(code::OP_NULL, format!("`{what}` is null")));
        }
        let mut objects = lock(&self.objects);
        match objects.get(&handle).map(T::of) {
            Some(Some(value)) => {
                objects.remove(&handle);
                Ok(value)
            }
            Some(None) => Err(Failure::new(code::HANDLE, format!("`{what}` is not a {}", T::NAME))),
            None => {
                let failure =
                    Failure::new(code::HANDLE, format!("`{what}`: no such {} is left", T::NAME));
                Err(strict::breach(-1, Breach::DoubleFree, failure))
            }
        }
    }

    /// Whether a handle still names something.
    pub fn exists(&self, handle: u64) -> bool {
        lock(&self.objects).contains_key(&handle)
    }

    /// `aclrtSetDevice`: the device's primary context becomes the thread's.
    pub fn set_device(&self, id: i32) -> Done {
        let device = self.device(id)?;
        device.check_alive()?;
        let context = *lock(&self.primary)
            .entry(id)
            .or_insert_with(|| self.keep(Object::Context(Arc::clone(device))));
        device.users.fetch_add(1, Ordering::SeqCst);
        CURRENT.set(context);
        Ok(())
    }

    /// `aclrtResetDevice`: the last user's reset frees everything.
    pub fn release_device(&self, id: i32) -> Done {
        let device = self.device(id)?;
        if device.users.load(Ordering::SeqCst) <= 0 {
            let text = format!("device {id} was not set, or reset before");
            return Err(Failure::parameter(text));
        }
        if device.users.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.reset(device);
        }
        Ok(())
    }

    /// Makes a context the thread's.
    pub fn set_context(&self, handle: u64) -> Done {
        self.get::<Arc<Device>>(handle, "context")?;
        CURRENT.set(handle);
        Ok(())
    }

    /// The thread's context and its device.
    pub fn current(&self) -> Done<(u64, Arc<Device>)> {
        self.check_initialised()?;
        let handle = CURRENT.get();
        let none = || Failure::new(code::NO_CONTEXT, "this thread has no context");
        if handle == 0 || !self.exists(handle) {
            return Err(strict::breach(-1, Breach::WrongContext, none()));
        }
        Ok((handle, self.get::<Arc<Device>>(handle, "context")?))
    }

    /// A stream of the thread's context; null is the context's default stream.
    pub fn stream(&self, handle: u64) -> Done<Arc<Stream>> {
        let (context, device) = self.current()?;
        if handle == 0 {
            let mut streams = lock(&self.default_streams);
            if let Some(stream) = streams.get(&context) {
                return Ok(Arc::clone(stream));
            }
            let stream = Stream::start(fresh_number(), context, Arc::clone(&device))?;
            device.streams().push(Arc::clone(&stream));
            streams.insert(context, Arc::clone(&stream));
            return Ok(stream);
        }
        let stream: Arc<Stream> = self.get(handle, "stream")?;
        if stream.context != context {
            let text = "the stream belongs to another context than the thread's";
            let failure = Failure::new(code::STREAM_CONTEXT, text);
            return Err(strict::breach(device.id, Breach::WrongContext, failure));
        }
        Ok(stream)
    }

    /// The place of device addresses, on whatever device they lie.
    pub fn place(&self, address: u64, bytes: u64, what: &str) -> Done<(Arc<Device>, Place)> {
        let device = match memory::device_of(address) {
            Some(id) => self.device(id)?,
            None => {
                let text = format!("{what}: {address:#x} is no device address");
                let failure = Failure::parameter(text);
                return Err(strict::breach(-1, Breach::WrongMemory, failure));
            }
        };
        Ok((Arc::clone(device), device.memory.find(address, bytes, what)?))
    }

    /// Allocates host memory for asynchronous copies.
    pub fn pin(&self, bytes: usize) -> Done<usize> {
        let none = || {
            let text = format!("the host has no {bytes} bytes left");
            Failure::new(code::MEMORY_ALLOCATION, text)
        };
        let block = Block::new(bytes).ok_or_else(none)?;
        let address = block.address();
        lock(&self.host).insert(address, block);
        Ok(address)
    }

    /// Gives host memory back.
    pub fn unpin(&self, address: usize) -> Done {
        match lock(&self.host).remove(&address) {
            Some(_) => Ok(()),
            None => {
                let text = format!("host memory {address:#x} was not allocated, or freed before");
                Err(strict::breach(-1, Breach::DoubleFree, Failure::parameter(text)))
            }
        }
    }

    /// Whether a range lies in memory from `aclrtMallocHost`.
    pub fn is_pinned(&self, address: usize, bytes: usize) -> bool {
        let host = lock(&self.host);
        let found = host.range(..=address).next_back();
        found.is_some_and(|(start, block)| address + bytes <= start + block.len())
    }
}
