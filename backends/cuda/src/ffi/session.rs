//! One device's context and stream, and the driver's calls on them: memory, copies, modules,
//! launches, waiting.
//!
//! Every wait has a limit. It decides nothing about failures. Read next: `../modules.rs`.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pontoon_ops::{DeviceError, DeviceErrorKind};

use super::library::Library;
use crate::codes;

/// A stream that does not wait for the context's default one.
const STREAM_NON_BLOCKING: c_uint = 1;
/// Numbers of the attributes that are asked for.
const ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
const ATTRIBUTE_MAJOR: c_int = 75;
const ATTRIBUTE_MINOR: c_int = 76;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const FUNCTION_SHARED_BYTES: c_int = 8;
/// Shared memory that needs no asking.
const SHARED_BYTES_FREE: u32 = 48 << 10;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`: other threads may allocate meanwhile.
const RECORD_RELAXED: c_uint = 2;
/// How long a wait looks without rest: most waits of a training step are shorter.
const SPIN: Duration = Duration::from_millis(2);
/// How long it rests between looks after that.
const REST: Duration = Duration::from_micros(50);

macro_rules! functions {
    ($($name:ident = $symbol:literal ($($argument:ty),*);)*) => {
        #[derive(Clone, Copy)]
        struct Functions { $($name: unsafe extern "C" fn($($argument),*) -> c_int),* }

        impl Functions {
            fn load(library: &Library) -> Result<Functions, DeviceError> {
                Ok(Functions { $($name: library.driver($symbol)?),* })
            }
        }
    };
}

type Handle = *mut c_void;

functions! {
    init = "cuInit" (c_uint);
    error_name = "cuGetErrorName" (c_int, *mut *const c_char);
    device_count = "cuDeviceGetCount" (*mut c_int);
    device = "cuDeviceGet" (*mut c_int, c_int);
    device_name = "cuDeviceGetName" (*mut c_char, c_int, c_int);
    device_memory = "cuDeviceTotalMem_v2" (*mut usize, c_int);
    attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2" (c_int);
    context_enter = "cuCtxSetCurrent" (Handle);
    stream_create = "cuStreamCreate" (*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2" (Handle);
    stream_query = "cuStreamQuery" (Handle);
    allocate = "cuMemAlloc_v2" (*mut u64, usize);
    release = "cuMemFree_v2" (u64);
    copy_up = "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, Handle);
    copy_down = "cuMemcpyDtoHAsync_v2" (*mut c_void, u64, usize, Handle);
    copy_within = "cuMemcpyDtoDAsync_v2" (u64, u64, usize, Handle);
    fill = "cuMemsetD8Async" (u64, u8, usize, Handle);
    module_load = "cuModuleLoadData" (*mut Handle, *const c_void);
    module_function = "cuModuleGetFunction" (*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncSetAttribute" (Handle, c_int, c_int);
    record = "cuStreamBeginCapture_v2" (Handle, c_uint);
    record_end = "cuStreamEndCapture" (Handle, *mut Handle);
    graph_make = "cuGraphInstantiateWithFlags" (*mut Handle, Handle, u64);
    graph_launch = "cuGraphLaunch" (Handle, Handle);
    graph_drop = "cuGraphDestroy" (Handle);
    graph_made_drop = "cuGraphExecDestroy" (Handle);
    launch = "cuLaunchKernel" (
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle,
        *mut *mut c_void, *mut *mut c_void
    );
}

/// A kernel that can be launched; valid as long as its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(usize);

/// A compiled module on a device; valid as long as its session.
#[derive(Clone, Copy, Debug)]
pub struct Module(usize);

/// A recorded list of kernels; valid as long as its session.
#[derive(Debug)]
pub struct Graph(usize);

/// A kernel's arguments in order. Every integer is 64 bits wide, a pointer is an address, and a
/// struct is its words.
#[derive(Clone, Debug, Default)]
pub struct Args {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Args {
    /// No arguments yet.
    pub fn new() -> Args {
        Args::default()
    }

    /// An address; 0 for none.
    pub fn at(self, address: usize) -> Args {
        self.structure(&[address as u64])
    }

    /// A whole number.
    pub fn int(self, value: usize) -> Args {
        self.structure(&[value as u64])
    }

    /// A choice, as 0 or 1.
    pub fn flag(self, value: bool) -> Args {
        self.int(usize::from(value))
    }

    /// An f32 number.
    pub fn float(self, value: f32) -> Args {
        self.structure(&[u64::from(value.to_bits())])
    }

    /// A struct of 64-bit words.
    pub fn structure(mut self, words: &[u64]) -> Args {
        self.starts.push(self.words.len());
        self.words.extend_from_slice(words);
        self
    }
}

/// How many threads a kernel runs with.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: [usize; 2],
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

/// A context and a stream of one device.
pub struct Session {
    functions: Functions,
    library: Arc<Library>,
    device: c_int,
    context: usize,
    stream: usize,
    /// Major and minor compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
}

impl Session {
    /// How many devices the driver counts.
    pub fn count(library: &Library) -> Result<u32, DeviceError> {
        let functions = Functions::load(library)?;
        initialise(&functions)?;
        let mut count = 0;
        // SAFETY: the place is valid for one integer.
        check(&functions, "cuDeviceGetCount", unsafe { (functions.device_count)(&mut count) })?;
        Ok(count.max(0) as u32)
    }

    /// Opens a device: its primary context and a stream in it.
    pub fn open(library: &Arc<Library>, ordinal: i32) -> Result<Session, DeviceError> {
        let functions = Functions::load(library)?;
        initialise(&functions)?;
        let mut device = 0;
        // SAFETY: the place is valid for one integer; the driver checks the number.
        check(&functions, "cuDeviceGet", unsafe { (functions.device)(&mut device, ordinal) })?;
        let attribute = |number: c_int| {
            let mut value = 0;
            // SAFETY: the place is valid for one integer.
            let code = unsafe { (functions.attribute)(&mut value, number, device) };
            check(&functions, "cuDeviceGetAttribute", code).map(|()| value)
        };
        let capability = (attribute(ATTRIBUTE_MAJOR)?, attribute(ATTRIBUTE_MINOR)?);
        let multiprocessors = attribute(ATTRIBUTE_MULTIPROCESSORS)?.max(1) as usize;
        let mut context: Handle = std::ptr::null_mut();
        // SAFETY: the place is valid for one handle.
        let code = unsafe { (functions.context_retain)(&mut context, device) };
        check(&functions, "cuDevicePrimaryCtxRetain", code)?;
        let mut session = Session {
            functions,
            library: Arc::clone(library),
            device,
            context: context as usize,
            stream: 0,
            capability,
            multiprocessors,
        };
        session.enter()?;
        let mut stream: Handle = std::ptr::null_mut();
        // SAFETY: the context is current, and the place is valid for one handle.
        let code = unsafe { (functions.stream_create)(&mut stream, STREAM_NON_BLOCKING) };
        session.check("cuStreamCreate", code)?;
        session.stream = stream as usize;
        Ok(session)
    }

    /// The libraries it came from.
    pub fn library(&self) -> &Arc<Library> {
        &self.library
    }

    /// Makes this thread work in the session's context: sessions share threads, and move.
    pub fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context was retained and is released only when the session ends.
        let code = unsafe { (self.functions.context_enter)(self.context as Handle) };
        self.check("cuCtxSetCurrent", code)
    }

    /// The chip's name.
    pub fn chip(&self) -> String {
        let mut name = [0 as c_char; 256];
        // SAFETY: there is room for as many bytes as is said, and the driver ends it with zero.
        let code = unsafe { (self.functions.device_name)(name.as_mut_ptr(), 256, self.device) };
        if code != 0 {
            return "unknown".to_owned();
        }
        // SAFETY: the text ends with zero within its room.
        unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned()
    }

    /// Bytes of device memory.
    pub fn memory_bytes(&self) -> u64 {
        let mut bytes = 0;
        // SAFETY: the place is valid for one size.
        let code = unsafe { (self.functions.device_memory)(&mut bytes, self.device) };
        if code == 0 { bytes as u64 } else { 0 }
    }

    /// Device memory, at a multiple of 256 bytes.
    pub fn malloc(&self, bytes: usize) -> Result<usize, DeviceError> {
        let mut address = 0;
        // SAFETY: the place is valid for one address.
        let code = unsafe { (self.functions.allocate)(&mut address, bytes.max(1)) };
        self.check("cuMemAlloc", code)?;
        Ok(address as usize)
    }

    /// Gives device memory back; the driver waits for work that uses it.
    pub fn free(&self, address: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller got the address from `malloc` and forgets it.
        self.check("cuMemFree", unsafe { (self.functions.release)(address as u64) })
    }

    /// Fills device memory with a byte, in the stream's order.
    pub fn fill(&self, address: usize, bytes: usize, value: u8) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let fill = self.functions.fill;
        // SAFETY: the range lies in memory that `malloc` gave.
        let code = unsafe { fill(address as u64, value, bytes, self.stream as Handle) };
        self.check("cuMemsetD8Async", code)
    }

    /// Copies host bytes to the device, in the stream's order. The bytes may be changed afterwards:
    /// pageable memory is staged before the call returns.
    pub fn up(&self, address: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (copy, from) = (self.functions.copy_up, bytes.as_ptr().cast());
        // SAFETY: both ranges are valid for as many bytes.
        let code = unsafe { copy(address as u64, from, bytes.len(), self.stream as Handle) };
        self.check("cuMemcpyHtoDAsync", code)
    }

    /// Copies from the device after all work so far, and waits, at most `deadline` for that work.
    pub fn down(
        &self,
        address: usize,
        bytes: &mut [u8],
        deadline: Duration,
    ) -> Result<(), DeviceError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.synchronize(deadline)?;
        let (copy, to) = (self.functions.copy_down, bytes.as_mut_ptr().cast());
        // SAFETY: both ranges are valid for as many bytes, and are so until the copy has ended:
        // a copy to pageable memory ends before the call returns, and the wait makes sure.
        let code = unsafe { copy(to, address as u64, bytes.len(), self.stream as Handle) };
        self.check("cuMemcpyDtoHAsync", code)?;
        self.synchronize(deadline)
    }

    /// Copies within the device, in the stream's order.
    pub fn within(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let copy = self.functions.copy_within;
        // SAFETY: both ranges lie in memory that `malloc` gave.
        let code = unsafe { copy(to as u64, from as u64, bytes, self.stream as Handle) };
        self.check("cuMemcpyDtoDAsync", code)
    }

    /// Brings machine code to the device.
    pub fn load(&self, code: &[u8]) -> Result<Module, DeviceError> {
        let mut module: Handle = std::ptr::null_mut();
        let load = self.functions.module_load;
        // SAFETY: the bytes are a whole image of the compiler's.
        let result = unsafe { load(&mut module, code.as_ptr().cast()) };
        self.check("cuModuleLoadData", result)?;
        Ok(Module(module as usize))
    }

    /// A module's kernel, allowed as much dynamic shared memory as it is launched with.
    pub fn function(
        &self,
        module: Module,
        name: &CStr,
        shared_bytes: usize,
    ) -> Result<Function, DeviceError> {
        let mut function: Handle = std::ptr::null_mut();
        let get = self.functions.module_function;
        // SAFETY: the module was loaded in this session, and the name ends with zero.
        let code = unsafe { get(&mut function, module.0 as Handle, name.as_ptr()) };
        self.check("cuModuleGetFunction", code)?;
        if shared_bytes > SHARED_BYTES_FREE as usize {
            let set = self.functions.function_attribute;
            // SAFETY: the function was just found.
            let code = unsafe { set(function, FUNCTION_SHARED_BYTES, shared_bytes as c_int) };
            self.check("cuFuncSetAttribute", code)?;
        }
        Ok(Function(function as usize))
    }

    /// Starts a kernel. Nothing happens where a grid has no blocks.
    pub fn launch(
        &self,
        function: Function,
        grid: Grid,
        mut args: Args,
    ) -> Result<(), DeviceError> {
        let Grid { blocks: [x, y, z], threads: [tx, ty], shared_bytes } = grid;
        if x * y * z == 0 {
            return Ok(());
        }
        if x > i32::MAX as usize || y > 65_535 || z > 65_535 {
            let text = format!("{x} x {y} x {z} blocks are more than the device takes");
            return Err(DeviceError::new(DeviceErrorKind::Unsupported, text));
        }
        let words = args.words.as_mut_slice();
        let pointers = args.starts.iter().map(|&start| (&raw mut words[start]).cast::<c_void>());
        let mut pointers: Vec<*mut c_void> = pointers.collect();
        let (launch, stream) = (self.functions.launch, self.stream as Handle);
        let [x, y, z, tx, ty, shared] = [x, y, z, tx, ty, shared_bytes].map(|n| n as c_uint);
        // SAFETY: there are as many arguments as the kernel has, each of its size (`ops/` writes
        // both sides); the driver copies them before it returns.
        let code = unsafe {
            let (handle, arguments) = (function.0 as Handle, pointers.as_mut_ptr());
            launch(handle, x, y, z, tx, ty, 1, shared, stream, arguments, std::ptr::null_mut())
        };
        self.check("cuLaunchKernel", code)
    }

    /// From now on the stream records what it is given instead of running it.
    pub fn begin_recording(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives as long as the session.
        let code = unsafe { (self.functions.record)(self.stream as Handle, RECORD_RELAXED) };
        self.check("cuStreamBeginCapture", code)
    }

    /// Ends a recording; the stream runs again what it is given.
    pub fn end_recording(&self) -> Result<Graph, DeviceError> {
        let (mut graph, mut made): (Handle, Handle) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream is recording, and the place is valid for one handle.
        let code = unsafe { (self.functions.record_end)(self.stream as Handle, &mut graph) };
        self.check("cuStreamEndCapture", code)?;
        // SAFETY: the graph was just recorded, and the place is valid for one handle.
        let code = unsafe { (self.functions.graph_make)(&mut made, graph, 0) };
        // SAFETY: what was made of the graph does not need it any more.
        unsafe { (self.functions.graph_drop)(graph) };
        self.check("cuGraphInstantiate", code)?;
        Ok(Graph(made as usize))
    }

    /// Starts a recorded list.
    pub fn start(&self, graph: &Graph) -> Result<(), DeviceError> {
        let launch = self.functions.graph_launch;
        // SAFETY: the graph was made in this session and not dropped.
        let code = unsafe { launch(graph.0 as Handle, self.stream as Handle) };
        self.check("cuGraphLaunch", code)
    }

    /// Gives a recorded list back; the driver keeps what still runs.
    pub fn drop_graph(&self, graph: Graph) {
        // Nothing can be done about a failure while giving back.
        // SAFETY: the graph was made in this session, and its handle ends here.
        unsafe { (self.functions.graph_made_drop)(graph.0 as Handle) };
    }

    /// Waits until the stream is empty.
    pub fn synchronize(&self, deadline: Duration) -> Result<(), DeviceError> {
        let start = Instant::now();
        loop {
            // SAFETY: the stream lives as long as the session.
            match unsafe { (self.functions.stream_query)(self.stream as Handle) } {
                codes::NOT_READY => {}
                code => return self.check("cuStreamQuery", code),
            }
            let waited = start.elapsed();
            if waited > deadline {
                let text = format!("work did not end within {deadline:?}");
                return Err(DeviceError::new(DeviceErrorKind::Hang, text));
            }
            match waited < SPIN {
                true => std::hint::spin_loop(),
                false => std::thread::sleep(REST),
            }
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        check(&self.functions, call, code)
    }

    /// Gives stream and context back. Work must have ended, or the device have failed.
    pub fn close(&mut self) {
        // Nothing can be done about a failure while closing.
        if self.stream != 0 {
            // SAFETY: nothing uses the stream after this.
            unsafe { (self.functions.stream_destroy)(self.stream as Handle) };
            self.stream = 0;
        }
        if self.context != 0 {
            // SAFETY: retained once by this session, released once.
            unsafe { (self.functions.context_release)(self.device) };
            self.context = 0;
        }
    }
}

fn initialise(functions: &Functions) -> Result<(), DeviceError> {
    // SAFETY: the only flag there is, is 0.
    check(functions, "cuInit", unsafe { (functions.init)(0) })
}

fn check(functions: &Functions, call: &'static str, code: c_int) -> Result<(), DeviceError> {
    if code == 0 {
        return Ok(());
    }
    let (kind, meaning) = codes::judge(code);
    let mut name = std::ptr::null();
    // SAFETY: the place is valid for one pointer.
    let named = unsafe { (functions.error_name)(code, &mut name) } == 0 && !name.is_null();
    let name = match named {
        // SAFETY: the driver's texts are constants that end with zero.
        true => unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(),
        false => "an unknown code".to_owned(),
    };
    let text = format!("{call}: {meaning} ({name})");
    Err(DeviceError { kind, vendor_code: i64::from(code), text })
}
