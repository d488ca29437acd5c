//! A caller of the C interface, as a backend would be: functions by name, integers and pointers as
//! 64-bit numbers.

#![allow(dead_code, reason = "no test file needs all of it")]

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pontoon_emu_ascend::strict::{self, Breach, Entry};

/// Finds a function.
fn find(name: &str) -> *const c_void {
    pontoon_emu_ascend::symbol(name).unwrap_or_else(|| panic!("{name} is not exported"))
}

macro_rules! with_arity {
    ($code:expr, $arguments:expr, $($number:literal: $($index:literal)*;)*) => {
        match $arguments.len() {
            $($number => {
                type Call = extern "C" fn($(with_arity!(@type $index)),*) -> i32;
                // SAFETY: integers and pointers travel alike, and the tests pass as many as the
                // function takes.
                let call: Call = unsafe { std::mem::transmute($code) };
                call($($arguments[$index]),*)
            })*
            other => panic!("{other} arguments"),
        }
    };
    (@type $index:literal) => { u64 };
}

/// Calls a function that takes integers and pointers and returns a code.
pub fn call(name: &str, arguments: &[u64]) -> i32 {
    with_arity!(find(name), arguments,
        0: ; 1: 0; 2: 0 1; 3: 0 1 2; 4: 0 1 2 3; 5: 0 1 2 3 4; 6: 0 1 2 3 4 5; 7: 0 1 2 3 4 5 6;
        8: 0 1 2 3 4 5 6 7; 9: 0 1 2 3 4 5 6 7 8; 10: 0 1 2 3 4 5 6 7 8 9;
    )
}

/// Calls a function that must succeed.
pub fn good(name: &str, arguments: &[u64]) {
    let code = call(name, arguments);
    assert_eq!(code, 0, "{name}: {}", recent());
}

/// Calls a function that returns a handle.
pub fn make(name: &str, arguments: &[u64]) -> u64 {
    type Create = extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, u64) -> u64;
    // SAFETY: as in `call`; surplus integers are ignored by the function.
    let call: Create = unsafe { std::mem::transmute(find(name)) };
    let mut all = [0; 9];
    all[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f, g, h, i] = all;
    call(a, b, c, d, e, f, g, h, i)
}

/// The address of a value, to be written or read by the callee.
pub fn at<T>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).expose_provenance() as u64
}

/// The thread's last text.
pub fn recent() -> String {
    // SAFETY: the function takes nothing and returns a text that stays until the next failure.
    let text: extern "C" fn() -> *const std::ffi::c_char =
        unsafe { std::mem::transmute(find("aclGetRecentErrMsg")) };
    let text = text();
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as above.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

static TURN: Mutex<()> = Mutex::new(());

/// A device with one stream, alone in the process while it lives.
pub struct Rig {
    pub device: u64,
    pub stream: u64,
    _turn: MutexGuard<'static, ()>,
}

/// Numbers of `aclDataType`.
pub const F32: u64 = 0;
pub const I32: u64 = 3;
pub const I64: u64 = 9;
pub const BOOL: u64 = 12;
pub const BF16: u64 = 27;

impl Rig {
    /// Opens a device.
    pub fn open(device: u64) -> Rig {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // A failed test may have left the library as it was.
        call("aclFinalize", &[]);
        good("aclInit", &[0]);
        call("pontoonEmuClear", &[device]);
        strict::take(None);
        good("aclrtSetDevice", &[device]);
        let mut stream = 0_u64;
        good("aclrtCreateStream", &[at(&mut stream)]);
        good("aclrtCtxSetSysParamOpt", &[0, 1]);
        Rig { device, stream, _turn: turn }
    }

    /// Device memory.
    pub fn memory(&self, bytes: usize) -> u64 {
        let mut address = 0_u64;
        good("aclrtMalloc", &[at(&mut address), bytes as u64, 0]);
        address
    }

    /// Device memory with numbers in it.
    pub fn put<T: Copy>(&self, values: &[T]) -> u64 {
        let bytes = size_of_val(values);
        let address = self.memory(bytes);
        let from = values.as_ptr().expose_provenance() as u64;
        good("aclrtMemcpy", &[address, bytes as u64, from, bytes as u64, 1]);
        address
    }

    /// Numbers from device memory, after everything queued.
    pub fn get<T: Copy + Default>(&self, address: u64, count: usize) -> Vec<T> {
        good("aclrtSynchronizeStreamWithTimeout", &[self.stream, 10_000]);
        let mut values = vec![T::default(); count];
        let bytes = size_of_val(&values[..]) as u64;
        let to = values.as_mut_ptr().expose_provenance() as u64;
        good("aclrtMemcpy", &[to, bytes, address, bytes, 2]);
        values
    }

    /// Launches an operator on tensors and plain numbers, planned and run once; gives the code of
    /// the first call that fails.
    pub fn run(&self, name: &str, arguments: &[u64]) -> i32 {
        let (mut bytes, mut executor) = (0_u64, 0_u64);
        let mut all = arguments.to_vec();
        all.extend([at(&mut bytes), at(&mut executor)]);
        let code = call(&format!("{name}GetWorkspaceSize"), &all);
        if code != 0 {
            return code;
        }
        let workspace = if bytes > 0 { self.memory(bytes as usize) } else { 0 };
        let code = call(name, &[workspace, bytes, executor, self.stream]);
        if code != 0 {
            return code;
        }
        let code = call("aclrtSynchronizeStreamWithTimeout", &[self.stream, 10_000]);
        if workspace != 0 && code == 0 {
            good("aclrtFree", &[workspace]);
        }
        code
    }

    /// Launches an operator that must succeed.
    pub fn done(&self, name: &str, arguments: &[u64]) {
        let code = self.run(name, arguments);
        assert_eq!(code, 0, "{name}: {}", recent());
    }

    /// What the strict log has gathered.
    pub fn breaches(&self) -> Vec<Breach> {
        strict::take(None).into_iter().map(|entry| entry.breach).collect()
    }

    /// The same with texts.
    pub fn entries(&self) -> Vec<Entry> {
        strict::take(None)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        call("pontoonEmuClear", &[self.device]);
        call("aclrtResetDeviceForce", &[self.device]);
    }
}

/// A contiguous tensor.
pub fn tensor(address: u64, dtype: u64, shape: &[i64]) -> u64 {
    let shape_at = shape.as_ptr().expose_provenance() as u64;
    let rank = shape.len() as u64;
    make("aclCreateTensor", &[shape_at, rank, dtype, 0, 0, 2, shape_at, rank, address])
}

/// A tensor with strides and an offset in memory of so many elements.
pub fn view(address: u64, shape: &[i64], strides: &[i64], (offset, len): (u64, i64)) -> u64 {
    let of = |list: &[i64]| list.as_ptr().expose_provenance() as u64;
    let storage = [len];
    let rank = shape.len() as u64;
    let arguments = [of(shape), rank, F32, of(strides), offset, 2, of(&storage), 1, address];
    make("aclCreateTensor", &arguments)
}

/// A scalar of f32.
pub fn scalar(mut value: f32) -> u64 {
    make("aclCreateScalar", &[at(&mut value), F32])
}

/// An array of integers.
pub fn integers(values: &[i64]) -> u64 {
    let from = values.as_ptr().expose_provenance() as u64;
    make("aclCreateIntArray", &[from, values.len() as u64])
}

/// bf16 numbers.
pub fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|value| half::bf16::from_f32(*value).to_bits()).collect()
}
