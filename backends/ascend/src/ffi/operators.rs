//! The two-phase operators: descriptors, scalars, executors kept for calls of the same shape, and
//! the one workspace.
//!
//! A call is an [`Operator`] and its arguments in the prototype's order. It decides nothing about
//! which calls an operation needs: `ops/` does.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, c_void};

use pontoon_ops::{DeviceError, DeviceErrorKind};

use super::library::lacks;
use super::session::Session;
use super::table::{Operator, Raw};
use crate::tensor::{Kind, Tensor};

/// Addresses in descriptors are multiples of this, as the vendor's allocations are; what remains
/// goes into the descriptor's offset, so that equal calls on other buffers share an executor.
const ALIGNMENT: usize = 512;
/// Executors kept; a training step of a large model has some ten thousand different calls. When
/// full, all are dropped: a step that needs more than this gains nothing from any.
const EXECUTORS_MAX: usize = 16_384;
/// `ACL_FORMAT_ND`.
const FORMAT_ND: i32 = 2;

/// A number that is a tensor of one element to the vendor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// In f32.
    Float(f32),
    /// In 64 bits.
    Integer(i64),
}

/// An argument of a call.
#[derive(Clone, Debug)]
pub enum Argument {
    /// A tensor.
    Tensor(Tensor),
    /// A list of tensors.
    Tensors(Vec<Tensor>),
    /// An optional tensor, list or array that is absent.
    Absent,
    /// An array of numbers.
    Integers(Vec<i64>),
    /// A number that is a tensor of one element.
    Scalar(Scalar),
    /// `int64_t`.
    I64(i64),
    /// `double`.
    F64(f64),
    /// `float`.
    F32(f32),
    /// `bool`.
    Flag(bool),
    /// `int8_t`.
    I8(i8),
    /// `aclDataType`.
    Dtype(Kind),
    /// A text that lives as long as the program.
    Text(&'static CStr),
}

impl From<Tensor> for Argument {
    fn from(tensor: Tensor) -> Argument {
        Argument::Tensor(tensor)
    }
}

/// Whether an executor is worth keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// The same call will come again.
    Keep,
    /// Its numbers change with every step.
    Once,
}

/// What the vendor made for one call.
struct Prepared {
    executor: *mut c_void,
    workspace: u64,
    /// Descriptors of plain tensors, in order, with the base address each has now.
    tensors: Vec<(*const c_void, usize)>,
    /// Everything else to be destroyed.
    others: Vec<Owned>,
    repeatable: bool,
}

/// An object of the vendor's that is not a plain tensor.
enum Owned {
    List(*const c_void),
    Array(*const c_void),
    Scalar(*const c_void),
}

/// The calls of one device.
#[derive(Default)]
pub struct Operators {
    kept: HashMap<(Operator, Vec<u64>), Prepared>,
    workspace: Option<(usize, usize)>,
    used: BTreeSet<Operator>,
    /// Both phases of each operator, once looked up.
    entries: HashMap<Operator, (*const c_void, *const c_void)>,
}

// SAFETY: the pointers are handles that only calls through the owning session use.
unsafe impl Send for Operators {}

impl Operators {
    /// Bytes of the workspace.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.map_or(0, |(_, bytes)| bytes)
    }

    /// Every operator that was called so far.
    pub fn used(&self) -> &BTreeSet<Operator> {
        &self.used
    }

    /// Whether the library has both phases of an operator.
    pub fn has(session: &Session, operator: Operator) -> bool {
        let first = format!("{}GetWorkspaceSize", operator.symbol());
        session.library().find(operator.symbol()).is_some()
            && session.library().find(&first).is_some()
    }

    /// Starts a call, in the stream's order.
    pub fn call(
        &mut self,
        session: &mut Session,
        operator: Operator,
        arguments: &[Argument],
        reuse: Reuse,
    ) -> Result<(), DeviceError> {
        self.used.insert(operator);
        let entries = self.entries(session, operator)?;
        let lists = arguments.iter().any(|argument| matches!(argument, Argument::Tensors(_)));
        if reuse == Reuse::Once || lists {
            let prepared = prepare(session, operator, entries.0, arguments)?;
            let launched = self.launch(session, operator, entries.1, &prepared);
            prepared.destroy(session);
            return launched;
        }
        let key = (operator, key(arguments));
        let (aimed, prepared) = match self.kept.remove(&key) {
            Some(mut prepared) => (prepared.aim(session, arguments), prepared),
            None => {
                let mut prepared = prepare(session, operator, entries.0, arguments)?;
                prepared.make_repeatable(session);
                (Ok(()), prepared)
            }
        };
        let launched = aimed.and_then(|()| self.launch(session, operator, entries.1, &prepared));
        match launched.is_ok() && prepared.repeatable {
            true => self.keep(session, key, prepared),
            false => prepared.destroy(session),
        }
        launched
    }

    fn keep(&mut self, session: &Session, key: (Operator, Vec<u64>), prepared: Prepared) {
        if self.kept.len() >= EXECUTORS_MAX {
            self.kept.drain().for_each(|(_, prepared)| prepared.destroy(session));
        }
        self.kept.insert(key, prepared);
    }

    fn entries(
        &mut self,
        session: &Session,
        operator: Operator,
    ) -> Result<(*const c_void, *const c_void), DeviceError> {
        if let Some(entries) = self.entries.get(&operator) {
            return Ok(*entries);
        }
        let find = |name: &str| session.library().find(name).ok_or_else(|| lacks(name));
        let first = find(&format!("{}GetWorkspaceSize", operator.symbol()))?;
        let entries = (first, find(operator.symbol())?);
        self.entries.insert(operator, entries);
        Ok(entries)
    }

    fn launch(
        &mut self,
        session: &mut Session,
        operator: Operator,
        entry: *const c_void,
        prepared: &Prepared,
    ) -> Result<(), DeviceError> {
        let workspace = self.room(session, prepared.workspace)?;
        type Entry = unsafe extern "C" fn(*mut c_void, u64, *mut c_void, *mut c_void) -> i32;
        // SAFETY: every second phase has this prototype.
        let entry = unsafe { std::mem::transmute::<*const c_void, Entry>(entry) };
        // SAFETY: the executor is live and was made by this operator's first phase; the workspace
        // is device memory of at least the size it asked for; the stream is the session's.
        let code = unsafe {
            entry(workspace as *mut c_void, prepared.workspace, prepared.executor, session.stream())
        };
        match code {
            0 => Ok(()),
            code => Err(session.failure(operator.symbol(), code).error()),
        }
    }

    /// The workspace, made larger if need be. All calls share it: they run one after the other.
    fn room(&mut self, session: &mut Session, bytes: u64) -> Result<usize, DeviceError> {
        let wanted = usize::try_from(bytes).map_err(|_| {
            DeviceError::new(DeviceErrorKind::OutOfMemory, format!("a workspace of {bytes} bytes"))
        })?;
        match self.workspace {
            _ if wanted == 0 => Ok(0),
            Some((address, had)) if had >= wanted => Ok(address),
            old => {
                if let Some((address, _)) = old {
                    session.synchronize(crate::memory::WAIT_MAX)?;
                    self.workspace = None;
                    session.free(address)?;
                }
                // More than is wanted, so that growing shapes do not wait at every step.
                let bytes = wanted.saturating_add(wanted / 4).next_multiple_of(ALIGNMENT);
                let address = session.malloc(bytes)?;
                self.workspace = Some((address, bytes));
                Ok(address)
            }
        }
    }

    /// Gives everything back. Tasks must have ended.
    pub fn close(&mut self, session: &mut Session) {
        self.kept.drain().for_each(|(_, prepared)| prepared.destroy(session));
        if let Some((address, _)) = self.workspace.take() {
            // Nothing can be done about a failure while closing.
            let _ = session.free(address);
        }
    }
}

/// The part of a tensor's address that a descriptor is aimed at.
fn base(tensor: &Tensor) -> usize {
    tensor.address & !(ALIGNMENT - 1)
}

/// Everything about the arguments but the base addresses, as numbers.
fn key(arguments: &[Argument]) -> Vec<u64> {
    let mut key = Vec::with_capacity(16 * arguments.len());
    for argument in arguments {
        match argument {
            Argument::Tensor(tensor) => {
                let offset = tensor.address - base(tensor);
                key.extend([1, tensor.kind.code() as u64, offset as u64, tensor.rank() as u64]);
                key.extend(tensor.dims().iter().map(|&extent| extent as u64));
                key.extend(tensor.strides().iter().map(|&stride| stride as u64));
            }
            Argument::Tensors(_) | Argument::Absent => key.push(2),
            Argument::Integers(values) => {
                key.extend([3, values.len() as u64]);
                key.extend(values.iter().map(|&value| value as u64));
            }
            Argument::Scalar(Scalar::Float(value)) => key.extend([4, u64::from(value.to_bits())]),
            Argument::Scalar(Scalar::Integer(value)) => key.extend([5, *value as u64]),
            Argument::I64(value) => key.push(*value as u64),
            Argument::F64(value) => key.push(value.to_bits()),
            Argument::F32(value) => key.push(u64::from(value.to_bits())),
            Argument::Flag(value) => key.push(u64::from(*value)),
            Argument::I8(value) => key.push(*value as u64),
            Argument::Dtype(kind) => key.push(kind.code() as u64),
            Argument::Text(text) => key.push(text.to_bytes().len() as u64),
        }
    }
    key
}

/// Makes the vendor's objects and asks for an executor.
fn prepare(
    session: &Session,
    operator: Operator,
    entry: *const c_void,
    arguments: &[Argument],
) -> Result<Prepared, DeviceError> {
    let mut prepared = Prepared {
        executor: std::ptr::null_mut(),
        workspace: 0,
        tensors: Vec::new(),
        others: Vec::new(),
        repeatable: false,
    };
    let mut raw = Vec::with_capacity(arguments.len());
    for argument in arguments {
        match prepared.lower(session, argument) {
            Ok(value) => raw.push(value),
            Err(error) => {
                prepared.destroy(session);
                return Err(error);
            }
        }
    }
    let (workspace, executor) = (&mut prepared.workspace, &mut prepared.executor);
    // SAFETY: the entry is this operator's first phase, and every pointer in `raw` is null or an
    // object just made; `Operator::prepare` compares their number and types with the prototype.
    let code = unsafe { operator.prepare(entry, &raw, workspace, executor) };
    let error = match code {
        Some(0) => return Ok(prepared),
        Some(code) => session.failure(operator.symbol(), code).error(),
        None => {
            let text = format!("{}: arguments do not fit its prototype", operator.symbol());
            DeviceError::new(DeviceErrorKind::BadArgument, text)
        }
    };
    prepared.executor = std::ptr::null_mut();
    prepared.destroy(session);
    Err(error)
}

impl Prepared {
    fn lower(&mut self, session: &Session, argument: &Argument) -> Result<Raw, DeviceError> {
        let pointer = |made: Result<*const c_void, DeviceError>| made.map(Raw::Pointer);
        match argument {
            Argument::Absent => Ok(Raw::Pointer(std::ptr::null())),
            Argument::Tensor(tensor) => {
                let made = descriptor(session, tensor)?;
                self.tensors.push((made, base(tensor)));
                Ok(Raw::Pointer(made))
            }
            Argument::Tensors(tensors) => {
                let made = list(session, tensors)?;
                self.others.push(Owned::List(made));
                Ok(Raw::Pointer(made))
            }
            Argument::Integers(values) => pointer(array(session, values).inspect(|made| {
                self.others.push(Owned::Array(*made));
            })),
            Argument::Scalar(value) => pointer(scalar(session, *value).inspect(|made| {
                self.others.push(Owned::Scalar(*made));
            })),
            Argument::I64(value) => Ok(Raw::I64(*value)),
            Argument::F64(value) => Ok(Raw::F64(*value)),
            Argument::F32(value) => Ok(Raw::F32(*value)),
            Argument::Flag(value) => Ok(Raw::Flag(*value)),
            Argument::I8(value) => Ok(Raw::I8(*value)),
            Argument::Dtype(kind) => Ok(Raw::Dtype(kind.code())),
            Argument::Text(text) => Ok(Raw::Pointer(text.as_ptr().cast())),
        }
    }

    /// Keeps the executor for further launches, if the vendor can do that with this operator.
    fn make_repeatable(&mut self, session: &Session) {
        let functions = session.functions();
        let needed =
            functions.aclSetTensorAddr.is_some() && functions.aclDestroyAclOpExecutor.is_some();
        if let (true, Some(function)) = (needed, functions.aclSetAclOpExecutorRepeatable) {
            // SAFETY: the executor is live and was not launched yet.
            self.repeatable = unsafe { function(self.executor) } == 0;
        }
    }

    /// Aims the descriptors of a kept executor at the arguments' addresses.
    fn aim(&mut self, session: &Session, arguments: &[Argument]) -> Result<(), DeviceError> {
        let Some(function) = session.functions().aclSetTensorAddr else {
            return Err(lacks("aclSetTensorAddr"));
        };
        let wanted = arguments.iter().filter_map(|argument| match argument {
            Argument::Tensor(tensor) => Some(base(tensor)),
            _ => None,
        });
        for (index, ((descriptor, now), wanted)) in self.tensors.iter_mut().zip(wanted).enumerate()
        {
            if *now == wanted {
                continue;
            }
            // SAFETY: the executor and its descriptor are live; the address is device memory that
            // the caller has checked against the tensor's span.
            let code =
                unsafe { function(self.executor, index, *descriptor, wanted as *mut c_void) };
            if code != 0 {
                return Err(session.failure("aclSetTensorAddr", code).error());
            }
            *now = wanted;
        }
        Ok(())
    }

    /// Gives the vendor's objects back; the executor first, which refers to the others.
    fn destroy(self, session: &Session) {
        let functions = session.functions();
        // Failures to destroy are not reported: the objects are not used again either way.
        if let (true, false, Some(function)) =
            (self.repeatable, self.executor.is_null(), functions.aclDestroyAclOpExecutor)
        {
            // SAFETY: the executor is live, repeatable ones are ours to destroy.
            let _ = unsafe { function(self.executor) };
        }
        if let Some(function) = functions.aclDestroyTensor {
            for (descriptor, _) in self.tensors {
                // SAFETY: the descriptor is live and nothing refers to it any more.
                let _ = unsafe { function(descriptor) };
            }
        }
        for owned in self.others {
            let (function, object) = match owned {
                Owned::List(object) => (functions.aclDestroyTensorList, object),
                Owned::Array(object) => (functions.aclDestroyIntArray, object),
                Owned::Scalar(object) => (functions.aclDestroyScalar, object),
            };
            if let Some(function) = function {
                // SAFETY: as above.
                let _ = unsafe { function(object) };
            }
        }
    }
}

fn made(
    object: *mut c_void,
    session: &Session,
    call: &'static str,
) -> Result<*const c_void, DeviceError> {
    if object.is_null() {
        return Err(session.failure(call, 200_000).error());
    }
    Ok(object.cast_const())
}

fn descriptor(session: &Session, tensor: &Tensor) -> Result<*const c_void, DeviceError> {
    let Some(function) = session.functions().aclCreateTensor else {
        return Err(lacks("aclCreateTensor"));
    };
    let base = base(tensor);
    let offset = (tensor.address - base) / tensor.kind.bytes();
    let dims: Vec<i64> = tensor.dims().iter().map(|&extent| extent as i64).collect();
    let strides: Vec<i64> = tensor.strides().iter().map(|&stride| stride as i64).collect();
    let storage = [(offset + tensor.span()) as i64];
    // SAFETY: the arrays are live for the call, which copies them; the address is only kept.
    let object = unsafe {
        function(
            dims.as_ptr(),
            dims.len() as u64,
            tensor.kind.code(),
            strides.as_ptr(),
            offset as i64,
            FORMAT_ND,
            storage.as_ptr(),
            1,
            base as *mut c_void,
        )
    };
    made(object, session, "aclCreateTensor")
}

fn list(session: &Session, tensors: &[Tensor]) -> Result<*const c_void, DeviceError> {
    let Some(function) = session.functions().aclCreateTensorList else {
        return Err(lacks("aclCreateTensorList"));
    };
    let members: Vec<*const c_void> =
        tensors.iter().map(|tensor| descriptor(session, tensor)).collect::<Result<_, _>>()?;
    // SAFETY: the members are live; the list owns them from now on.
    let object = unsafe { function(members.as_ptr(), members.len() as u64) };
    made(object, session, "aclCreateTensorList")
}

fn array(session: &Session, values: &[i64]) -> Result<*const c_void, DeviceError> {
    let Some(function) = session.functions().aclCreateIntArray else {
        return Err(lacks("aclCreateIntArray"));
    };
    // SAFETY: the values are live for the call, which copies them.
    made(unsafe { function(values.as_ptr(), values.len() as u64) }, session, "aclCreateIntArray")
}

fn scalar(session: &Session, value: Scalar) -> Result<*const c_void, DeviceError> {
    let Some(function) = session.functions().aclCreateScalar else {
        return Err(lacks("aclCreateScalar"));
    };
    let object = match value {
        Scalar::Float(mut value) => {
            let memory: *mut f32 = &mut value;
            // SAFETY: the value is live for the call, which copies it.
            unsafe { function(memory.cast(), Kind::F32.code()) }
        }
        Scalar::Integer(mut value) => {
            let memory: *mut i64 = &mut value;
            // SAFETY: as above.
            unsafe { function(memory.cast(), Kind::I64.code()) }
        }
    };
    made(object, session, "aclCreateScalar")
}
