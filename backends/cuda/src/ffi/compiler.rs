//! NVRTC: from a kernel's source to a device's machine code, without a toolkit's headers.
//!
//! Keeps nothing: `modules.rs` remembers what was compiled. Read next: `session.rs`.

use std::ffi::{CString, c_char, c_int, c_void};

use pontoon_ops::{DeviceError, DeviceErrorKind};

use super::library::{Library, open_compiler, symbol};

type Program = *mut c_void;
type Text = *const c_char;

#[derive(Clone, Copy)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create:
        unsafe extern "C" fn(*mut Program, Text, Text, c_int, *const Text, *const Text) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const Text) -> c_int,
    code_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    code: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
}

/// The compiler.
pub struct Compiler {
    functions: Functions,
    /// Its version, which is a part of what fixes a result's bits.
    pub version: (i32, i32),
}

impl Compiler {
    /// The compiler of a machine's libraries.
    pub fn new(library: &Library) -> Result<Compiler, DeviceError> {
        Compiler::with(functions(library.compiler())?)
    }

    /// The compiler where there is no device.
    pub fn alone() -> Result<Compiler, DeviceError> {
        Compiler::with(functions(open_compiler()?)?)
    }

    fn with(functions: Functions) -> Result<Compiler, DeviceError> {
        let mut version = (0, 0);
        // SAFETY: both places are valid for one integer.
        let code = unsafe { (functions.version)(&mut version.0, &mut version.1) };
        check(code, "nvrtcVersion")?;
        Ok(Compiler { functions, version })
    }

    /// Machine code of a source for an architecture such as `sm_90`.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        options: &[String],
    ) -> Result<Vec<u8>, DeviceError> {
        let text = |text: &str| CString::new(text).expect("sources and options hold no zero byte");
        let (source, file) = (text(source), text(name));
        let options: Vec<CString> = options.iter().map(|option| text(option)).collect();
        let pointers: Vec<Text> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        let none = std::ptr::null();
        let (create, compile) = (self.functions.create, self.functions.compile);
        // SAFETY: texts end with zero and outlive the call; no headers are given.
        let code = unsafe { create(&mut program, source.as_ptr(), file.as_ptr(), 0, none, none) };
        check(code, "nvrtcCreateProgram")?;
        // SAFETY: the program was just created; as many options as pointers.
        let code = unsafe { compile(program, pointers.len() as c_int, pointers.as_ptr()) };
        let result = match code {
            0 => {
                self.bytes(program, self.functions.code_size, self.functions.code, "nvrtcGetCUBIN")
            }
            _ => Err(self.failure(program, name, code)),
        };
        // SAFETY: the program is not used after this.
        unsafe { (self.functions.destroy)(&mut program) };
        result
    }

    fn failure(&self, program: Program, name: &str, code: c_int) -> DeviceError {
        let log = self.bytes(program, self.functions.log_size, self.functions.log, "log");
        let log = String::from_utf8_lossy(&log.unwrap_or_default()).into_owned();
        let first = log.lines().find(|line| line.contains("error")).unwrap_or("no log").to_owned();
        let text = format!("{name} does not compile here: {}", first.trim());
        DeviceError { kind: DeviceErrorKind::Unsupported, vendor_code: i64::from(code), text }
    }

    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        fill: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
        call: &'static str,
    ) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = 0;
        // SAFETY: the program lives, and the place is valid for one size.
        check(unsafe { size(program, &mut bytes) }, call)?;
        let mut result = vec![0_u8; bytes];
        // SAFETY: there is room for as many bytes as the library asked for.
        check(unsafe { fill(program, result.as_mut_ptr().cast()) }, call)?;
        Ok(result)
    }
}

fn functions(library: &libloading::Library) -> Result<Functions, DeviceError> {
    Ok(Functions {
        version: symbol(library, "nvrtcVersion")?,
        create: symbol(library, "nvrtcCreateProgram")?,
        destroy: symbol(library, "nvrtcDestroyProgram")?,
        compile: symbol(library, "nvrtcCompileProgram")?,
        code_size: symbol(library, "nvrtcGetCUBINSize")?,
        code: symbol(library, "nvrtcGetCUBIN")?,
        log_size: symbol(library, "nvrtcGetProgramLogSize")?,
        log: symbol(library, "nvrtcGetProgramLog")?,
    })
}

fn check(code: c_int, call: &'static str) -> Result<(), DeviceError> {
    match code {
        0 => Ok(()),
        _ => Err(DeviceError {
            kind: DeviceErrorKind::Unsupported,
            vendor_code: i64::from(code),
            text: format!("{call}: the run-time compiler failed"),
        }),
    }
}
