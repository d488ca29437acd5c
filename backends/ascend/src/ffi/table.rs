//! The one table of CANN's symbols: names, parameters and their C types. From it come the typed
//! calls and what `cargo xtask ascend-abi` compares with a header tree.
//!
//! Written by hand from CANN 8.1's `acl_meta.h` and `aclnnop` headers (Apache-2.0), op-plugin
//! (BSD-3-Clause) and ggml's backend (MIT). It opens nothing. Read next: `library.rs`.

use std::ffi::{c_char, c_void};

/// A symbol with its parameters' and result's C types, `const` left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prototype {
    /// The symbol's name.
    pub name: &'static str,
    /// The C types of its parameters.
    pub parameters: &'static [&'static str],
    /// Whether older or newer versions may lack it.
    pub presence: Presence,
}

/// Whether a symbol must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Every version has it.
    Always,
    /// Some versions lack it; the backend goes on without it.
    Sometimes,
}

/// The type in Rust of a kind of parameter.
macro_rules! rust_type {
    (tensor) => { *const c_void };
    (tensors) => { *const c_void };
    (ints) => { *const c_void };
    (scalar) => { *const c_void };
    (executor) => { *mut c_void };
    (i64) => { i64 };
    (u64) => { u64 };
    (i32) => { i32 };
    (u32) => { u32 };
    (i8) => { i8 };
    (size) => { usize };
    (f64) => { f64 };
    (f32) => { f32 };
    (flag) => { bool };
    (dtype) => { i32 };
    (format) => { i32 };
    (text) => { *const c_char };
    (pointer) => { *mut c_void };
    (pointer_out) => { *mut *mut c_void };
    (handle) => { *mut c_void };
    (context) => { *mut c_void };
    (context_out) => { *mut *mut c_void };
    (stream) => { *mut c_void };
    (stream_out) => { *mut *mut c_void };
    (event) => { *mut c_void };
    (event_out) => { *mut *mut c_void };
    (i64s) => { *const i64 };
    (u32_out) => { *mut u32 };
    (i32s) => { *mut i32 };
    (size_out) => { *mut usize };
    (tensor_array) => { *const *const c_void };
    (memory_fault_array) => { *mut MemoryFaultEntry };
    (error_info) => { *mut c_void };
    (device_status_out) => { *mut i32 };
    (memory_kind) => { i32 };
    (copy_kind) => { i32 };
    (malloc_policy) => { i32 };
    (option) => { i32 };
    (error_level) => { i32 };
    (comm) => { *mut c_void };
    (comms) => { *mut *mut c_void };
    (comm_dtype) => { i32 };
    (comm_result_out) => { *mut i32 };
    (comm_result) => { i32 };
}

/// The same type as C headers spell it.
macro_rules! c_type {
    (tensor) => {
        "aclTensor*"
    };
    (tensors) => {
        "aclTensorList*"
    };
    (ints) => {
        "aclIntArray*"
    };
    (scalar) => {
        "aclScalar*"
    };
    (executor) => {
        "aclOpExecutor*"
    };
    (i64) => {
        "int64_t"
    };
    (u64) => {
        "uint64_t"
    };
    (i32) => {
        "int32_t"
    };
    (u32) => {
        "uint32_t"
    };
    (i8) => {
        "int8_t"
    };
    (size) => {
        "size_t"
    };
    (f64) => {
        "double"
    };
    (f32) => {
        "float"
    };
    (flag) => {
        "bool"
    };
    (dtype) => {
        "aclDataType"
    };
    (format) => {
        "aclFormat"
    };
    (text) => {
        "char*"
    };
    (pointer) => {
        "void*"
    };
    (pointer_out) => {
        "void**"
    };
    (handle) => {
        "void*"
    };
    (context) => {
        "aclrtContext"
    };
    (context_out) => {
        "aclrtContext*"
    };
    (stream) => {
        "aclrtStream"
    };
    (stream_out) => {
        "aclrtStream*"
    };
    (event) => {
        "aclrtEvent"
    };
    (event_out) => {
        "aclrtEvent*"
    };
    (i64s) => {
        "int64_t*"
    };
    (u32_out) => {
        "uint32_t*"
    };
    (i32s) => {
        "int32_t*"
    };
    (size_out) => {
        "size_t*"
    };
    (tensor_array) => {
        "aclTensor**"
    };
    (memory_fault_array) => {
        "aclrtMemUceInfo*"
    };
    (error_info) => {
        "aclrtErrorInfo*"
    };
    (device_status_out) => {
        "aclrtDeviceStatus*"
    };
    (memory_kind) => {
        "aclrtMemAttr"
    };
    (copy_kind) => {
        "aclrtMemcpyKind"
    };
    (malloc_policy) => {
        "aclrtMemMallocPolicy"
    };
    (option) => {
        "aclSysParamOpt"
    };
    (error_level) => {
        "aclrtLastErrLevel"
    };
    (comm) => {
        "HcclComm"
    };
    (comms) => {
        "HcclComm*"
    };
    (comm_dtype) => {
        "HcclDataType"
    };
    (comm_result_out) => {
        "HcclResult*"
    };
    (comm_result) => {
        "HcclResult"
    };
}

macro_rules! presence {
    () => {
        Presence::Always
    };
    (sometimes) => {
        Presence::Sometimes
    };
}

/// One entry of `aclrtGetMemUceInfo`: an address range with an uncorrectable error.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MemoryFaultEntry {
    /// Its first byte.
    pub address: usize,
    /// Its length.
    pub bytes: usize,
    reserved: [usize; 14],
}

impl MemoryFaultEntry {
    /// An empty entry, to be filled.
    pub const EMPTY: MemoryFaultEntry =
        MemoryFaultEntry { address: 0, bytes: 0, reserved: [0; 14] };
}

/// Declares the plain functions: a struct of pointers that were found, and their prototypes.
macro_rules! functions {
    ($(
        $(#[$presence:ident])?
        $name:ident ( $($argument:ident : $kind:ident),* ) -> $result:ty;
    )*) => {
        /// The runtime's functions; what a version lacks is `None`.
        #[expect(non_snake_case, reason = "the vendor's names, to be found by searching")]
        #[derive(Clone, Copy)]
        pub struct Functions {
            $(
                #[doc = concat!("`", stringify!($name), "`.")]
                pub $name: Option<unsafe extern "C" fn($(rust_type!($kind)),*) -> $result>,
            )*
        }

        impl Functions {
            /// Finds every function by its name.
            ///
            /// # Safety
            /// What `find` gives must be functions of these prototypes.
            pub unsafe fn find(find: &dyn Fn(&str) -> Option<*const c_void>) -> Functions {
                Functions {
                    $(
                        // SAFETY: the caller vouches for the prototype; a function pointer has
                        // the size of a data pointer on every platform this builds for.
                        $name: find(stringify!($name)).map(|found| unsafe {
                            std::mem::transmute::<
                                *const c_void,
                                unsafe extern "C" fn($(rust_type!($kind)),*) -> $result,
                            >(found)
                        }),
                    )*
                }
            }
        }

        /// The prototypes of the plain functions.
        pub const FUNCTIONS: &[Prototype] = &[
            $(Prototype {
                name: stringify!($name),
                parameters: &[$(c_type!($kind)),*],
                presence: presence!($($presence)?),
            },)*
        ];
    };
}

functions! {
    aclInit(config: text) -> i32;
    aclGetRecentErrMsg() -> *const c_char;
    aclrtGetSocName() -> *const c_char;
    aclrtGetDeviceCount(count: u32_out) -> i32;
    aclrtSetDevice(device: i32) -> i32;
    aclrtResetDevice(device: i32) -> i32;
    aclrtCreateContext(context: context_out, device: i32) -> i32;
    aclrtDestroyContext(context: context) -> i32;
    aclrtSetCurrentContext(context: context) -> i32;
    aclrtCtxSetSysParamOpt(option: option, value: i64) -> i32;
    aclrtGetMemInfo(kind: memory_kind, free: size_out, total: size_out) -> i32;
    aclrtCreateStream(stream: stream_out) -> i32;
    aclrtDestroyStreamForce(stream: stream) -> i32;
    aclrtDestroyStream(stream: stream) -> i32;
    aclrtSetStreamFailureMode(stream: stream, mode: u64) -> i32;
    aclrtSynchronizeStreamWithTimeout(stream: stream, timeout: i32) -> i32;
    aclrtCreateEvent(event: event_out) -> i32;
    aclrtDestroyEvent(event: event) -> i32;
    aclrtRecordEvent(event: event, stream: stream) -> i32;
    aclrtSynchronizeEventWithTimeout(event: event, timeout: i32) -> i32;
    aclrtMalloc(memory: pointer_out, bytes: size, policy: malloc_policy) -> i32;
    aclrtFree(memory: pointer) -> i32;
    aclrtMallocHost(memory: pointer_out, bytes: size) -> i32;
    aclrtFreeHost(memory: pointer) -> i32;
    aclrtMemcpyAsync(to: pointer, room: size, from: pointer, bytes: size, kind: copy_kind,
        stream: stream) -> i32;
    aclrtMemsetAsync(memory: pointer, room: size, value: i32, bytes: size, stream: stream) -> i32;
    aclrtPeekAtLastError(level: error_level) -> i32;
    aclrtQueryDeviceStatus(device: i32, status: device_status_out) -> i32;
    aclrtDeviceTaskAbort(device: i32, timeout: u32) -> i32;
    aclrtGetMemUceInfo(device: i32, entries: memory_fault_array, room: size,
        count: size_out) -> i32;
    aclrtMemUceRepair(device: i32, entries: memory_fault_array, count: size) -> i32;
    #[sometimes]
    aclrtGetErrorVerbose(device: i32, info: error_info) -> i32;
    #[sometimes]
    aclrtRepairError(device: i32, info: error_info) -> i32;
    aclCreateTensor(dims: i64s, rank: u64, dtype: dtype, strides: i64s, offset: i64,
        format: format, storage: i64s, storage_rank: u64, memory: pointer) -> *mut c_void;
    aclDestroyTensor(tensor: tensor) -> i32;
    aclCreateScalar(value: pointer, dtype: dtype) -> *mut c_void;
    aclDestroyScalar(scalar: scalar) -> i32;
    aclCreateIntArray(values: i64s, count: u64) -> *mut c_void;
    aclDestroyIntArray(array: ints) -> i32;
    aclCreateTensorList(tensors: tensor_array, count: u64) -> *mut c_void;
    aclDestroyTensorList(list: tensors) -> i32;
    aclSetAclOpExecutorRepeatable(executor: executor) -> i32;
    aclDestroyAclOpExecutor(executor: executor) -> i32;
    aclSetTensorAddr(executor: executor, index: size, tensor: tensor, memory: pointer) -> i32;
    HcclCommInitAll(count: u32, devices: i32s, comms: comms) -> i32;
    HcclAllGather(from: pointer, to: pointer, count: u64, dtype: comm_dtype, comm: comm,
        stream: stream) -> i32;
    HcclGetCommAsyncError(comm: comm, result: comm_result_out) -> i32;
    HcclCommDestroy(comm: comm) -> i32;
    HcclGetErrorString(result: comm_result) -> *const c_char;
}

/// An argument as it crosses the border.
#[derive(Clone, Copy, Debug)]
pub enum Raw {
    /// A descriptor, list, array, scalar or text; null where an optional one is absent.
    Pointer(*const c_void),
    /// `int64_t`.
    I64(i64),
    /// `uint64_t`.
    U64(u64),
    /// `double`.
    F64(f64),
    /// `float`.
    F32(f32),
    /// `bool`.
    Flag(bool),
    /// `int8_t`.
    I8(i8),
    /// `aclDataType`.
    Dtype(i32),
}

macro_rules! readers {
    ($($name:ident: $variant:ident -> $type:ty;)*) => {
        impl Raw {
            $(fn $name(self) -> Option<$type> {
                match self {
                    Raw::$variant(value) => Some(value as $type),
                    _ => None,
                }
            })*
        }
    };
}

readers! {
    tensor: Pointer -> *const c_void;
    tensors: Pointer -> *const c_void;
    ints: Pointer -> *const c_void;
    scalar: Pointer -> *const c_void;
    text: Pointer -> *const c_char;
    i64: I64 -> i64;
    f64: F64 -> f64;
    f32: F32 -> f32;
    flag: Flag -> bool;
    i8: I8 -> i8;
    dtype: Dtype -> i32;
}

/// Declares the operators: their names, prototypes and typed first phases.
macro_rules! operators {
    ($(
        $(#[$presence:ident])?
        $name:ident ( $($argument:ident : $kind:ident),* $(,)? );
    )*) => {
        /// An operator of the vendor's library.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Operator {
            $(#[doc = concat!("`aclnn", stringify!($name), "`.")] $name,)*
        }

        impl Operator {
            /// Every operator of the table.
            pub const ALL: &'static [Operator] = &[$(Operator::$name),*];

            /// The name of the second phase; the first has `GetWorkspaceSize` behind it.
            pub fn symbol(self) -> &'static str {
                match self { $(Operator::$name => concat!("aclnn", stringify!($name))),* }
            }

            /// The first phase: asks for the workspace and makes an executor. `None`, and no
            /// call, if the arguments are not those of the prototype.
            ///
            /// # Safety
            /// `entry` must be this operator's first phase; every pointer in `arguments` must be
            /// null or a live object of the type that the prototype names.
            pub unsafe fn prepare(
                self,
                entry: *const c_void,
                arguments: &[Raw],
                workspace: *mut u64,
                executor: *mut *mut c_void,
            ) -> Option<i32> {
                match self {
                    $(Operator::$name => {
                        let mut next = arguments.iter();
                        $(let $argument = next.next()?.$kind()?;)*
                        if next.next().is_some() {
                            return None;
                        }
                        type Entry = unsafe extern "C" fn(
                            $(rust_type!($kind),)* *mut u64, *mut *mut c_void,
                        ) -> i32;
                        // SAFETY: the caller vouches for the entry and the pointers.
                        let entry = unsafe {
                            std::mem::transmute::<*const c_void, Entry>(entry)
                        };
                        // SAFETY: as above; every argument has the prototype's type.
                        Some(unsafe { entry($($argument,)* workspace, executor) })
                    })*
                }
            }
        }

        /// The prototypes of the operators' first phases, without the two parameters that all
        /// share: `uint64_t* workspaceSize, aclOpExecutor** executor`.
        pub const OPERATORS: &[Prototype] = &[
            $(Prototype {
                name: concat!("aclnn", stringify!($name), "GetWorkspaceSize"),
                parameters: &[$(c_type!($kind)),*],
                presence: presence!($($presence)?),
            },)*
        ];
    };
}

operators! {
    Add(a: tensor, b: tensor, alpha: scalar, out: tensor);
    Sub(a: tensor, b: tensor, alpha: scalar, out: tensor);
    Mul(a: tensor, b: tensor, out: tensor);
    Div(a: tensor, b: tensor, out: tensor);
    Muls(a: tensor, factor: scalar, out: tensor);
    Adds(a: tensor, b: scalar, alpha: scalar, out: tensor);
    Exp(a: tensor, out: tensor);
    Log(a: tensor, out: tensor);
    Sigmoid(a: tensor, out: tensor);
    Silu(a: tensor, out: tensor);
    SigmoidBackward(grad: tensor, y: tensor, out: tensor);
    Cast(a: tensor, to: dtype, out: tensor);
    InplaceCopy(to: tensor, from: tensor);
    InplaceFillScalar(to: tensor, value: scalar);
    InplaceZero(to: tensor);
    EqScalar(a: tensor, b: scalar, out: tensor);
    LtScalar(a: tensor, b: scalar, out: tensor);
    GeScalar(a: tensor, b: scalar, out: tensor);
    GtScalar(a: tensor, b: scalar, out: tensor);
    NeTensor(a: tensor, b: tensor, out: tensor);
    LtTensor(a: tensor, b: tensor, out: tensor);
    LeTensor(a: tensor, b: tensor, out: tensor);
    LogicalOr(a: tensor, b: tensor, out: tensor);
    IsFinite(a: tensor, out: tensor);
    SWhere(condition: tensor, a: tensor, b: tensor, out: tensor);
    InplaceMaskedFillScalar(to: tensor, mask: tensor, value: scalar);
    ReduceSum(a: tensor, axes: ints, keep: flag, to: dtype, out: tensor);
    Amax(a: tensor, axes: ints, keep: flag, out: tensor);
    ArgMax(a: tensor, axis: i64, keep: flag, out: tensor);
    LinalgVectorNorm(a: tensor, order: scalar, axes: ints, keep: flag, to: dtype, out: tensor);
    Cumsum(a: tensor, axis: i64, to: dtype, out: tensor);
    Sort(a: tensor, stable: flag, axis: i64, descending: flag, values: tensor, indices: tensor);
    Softmax(a: tensor, axis: i64, out: tensor);
    SoftmaxBackward(grad: tensor, y: tensor, axis: i64, out: tensor);
    IndexSelect(a: tensor, axis: i64, index: tensor, out: tensor);
    Gather(a: tensor, axis: i64, index: tensor, out: tensor);
    InplaceScatter(to: tensor, axis: i64, index: tensor, from: tensor, reduce: i64);
    ScatterNdUpdate(to: tensor, index: tensor, rows: tensor);
    IndexPutImpl(to: tensor, index: tensors, rows: tensor, accumulate: flag, uncheck: flag);
    Matmul(a: tensor, b: tensor, out: tensor, precision: i8);
    #[sometimes]
    GroupedMatmulV5(x: tensors, weight: tensors, bias: tensors, scale: tensors, offset: tensors,
        antiquant_scale: tensors, antiquant_offset: tensors, token_scale: tensors,
        groups: tensor, activation_in: tensors, activation_scale: tensors,
        activation_offset: tensors, split: i64, group_type: i64, list_type: i64, activation: i64,
        tuning: ints, out: tensors, activation_out: tensors, scale_out: tensors);
    GroupedMatmulV4(x: tensors, weight: tensors, bias: tensors, scale: tensors, offset: tensors,
        antiquant_scale: tensors, antiquant_offset: tensors, token_scale: tensors,
        groups: tensor, activation_in: tensors, activation_scale: tensors,
        activation_offset: tensors, split: i64, group_type: i64, list_type: i64, activation: i64,
        out: tensors, activation_out: tensors, scale_out: tensors);
    GroupedMatmulAdd(x: tensor, weight: tensor, groups: tensor, y: tensor, turn_x: flag,
        turn_weight: flag, group_type: i64);
    RmsNorm(x: tensor, gamma: tensor, epsilon: f64, y: tensor, rstd: tensor);
    RmsNormGrad(dy: tensor, x: tensor, rstd: tensor, gamma: tensor, dx: tensor, dgamma: tensor);
    SwiGluGrad(dy: tensor, x: tensor, axis: i64, out: tensor);
    FlashAttentionVarLenScoreV2(q: tensor, k: tensor, v: tensor, shift: tensor, drop: tensor,
        padding: tensor, mask: tensor, prefix: ints, q_ends: ints, k_ends: ints, q_start: ints,
        k_start: ints, scale: f64, keep: f64, before: i64, after: i64, heads: i64, layout: text,
        precise: i64, sparse: i64, shift_kind: i64, peak: tensor, sum: tensor, softmax: tensor,
        out: tensor);
    FlashAttentionVarLenScore(q: tensor, k: tensor, v: tensor, shift: tensor, drop: tensor,
        padding: tensor, mask: tensor, prefix: ints, q_ends: ints, k_ends: ints, scale: f64,
        keep: f64, before: i64, after: i64, heads: i64, layout: text, precise: i64, sparse: i64,
        peak: tensor, sum: tensor, softmax: tensor, out: tensor);
    FlashAttentionUnpaddingScoreGradV2(q: tensor, k: tensor, v: tensor, dy: tensor,
        shift: tensor, drop: tensor, padding: tensor, mask: tensor, peak: tensor, sum: tensor,
        softmax: tensor, out: tensor, prefix: ints, q_ends: ints, k_ends: ints, q_start: ints,
        k_start: ints, scale: f64, keep: f64, before: i64, after: i64, heads: i64, layout: text,
        precise: i64, sparse: i64, shift_kind: i64, dq: tensor, dk: tensor, dv: tensor,
        dshift: tensor);
    FlashAttentionUnpaddingScoreGrad(q: tensor, k: tensor, v: tensor, dy: tensor, shift: tensor,
        drop: tensor, padding: tensor, mask: tensor, peak: tensor, sum: tensor, softmax: tensor,
        out: tensor, prefix: ints, q_ends: ints, k_ends: ints, scale: f64, keep: f64,
        before: i64, after: i64, heads: i64, layout: text, precise: i64, sparse: i64,
        dq: tensor, dk: tensor, dv: tensor, dshift: tensor);
    ApplyAdamWV2(weight: tensor, m: tensor, v: tensor, norm_max: tensor, grad: tensor,
        step: tensor, lr: f32, beta1: f32, beta2: f32, decay: f32, epsilon: f32, amsgrad: flag,
        maximize: flag);
}
