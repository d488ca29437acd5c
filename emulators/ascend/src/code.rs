//! The codes that calls return: CANN's public numbers under names of our own.
//!
//! Only numbers that the emulator gives are listed. Read next: `failure.rs`.

/// Done.
pub const SUCCESS: i32 = 0;

/// A call before `aclInit`.
pub const UNINITIALISED: i32 = 100_001;
/// A second `aclInit`.
pub const REPEATED_INIT: i32 = 100_002;
/// A second `aclFinalize`.
pub const REPEATED_FINALIZE: i32 = 100_037;

/// A wrong argument of a runtime call.
pub const PARAMETER: i32 = 107_000;
/// No such device.
pub const DEVICE_ID: i32 = 107_001;
/// The calling thread has no context.
pub const NO_CONTEXT: i32 = 107_002;
/// A stream of another context.
pub const STREAM_CONTEXT: i32 = 107_003;
/// A handle that names nothing, or no longer.
pub const HANDLE: i32 = 107_017;
/// Tasks were taken back by a device-wide abort.
pub const TASK_ABORT: i32 = 107_022;
/// Tasks were taken back by an abort of their stream.
pub const STREAM_ABORT: i32 = 107_023;

/// The function exists but not for this device.
pub const FEATURE: i32 = 207_000;
/// Out of device memory.
pub const MEMORY_ALLOCATION: i32 = 207_001;
/// No event left.
pub const NO_EVENT: i32 = 207_007;
/// No stream left.
pub const NO_STREAM: i32 = 207_008;
/// A task ran out of device memory.
pub const DEVICE_OUT_OF_MEMORY: i32 = 207_018;

/// The emulator itself failed.
pub const INTERNAL: i32 = 507_000;
/// The scheduler's heartbeat is lost.
pub const LOST_HEARTBEAT: i32 = 507_010;
/// A matrix core did not finish.
pub const AICORE_TIMEOUT: i32 = 507_014;
/// A matrix core trapped.
pub const AICORE_EXCEPTION: i32 = 507_015;
/// A vector core did not finish.
pub const VECTOR_TIMEOUT: i32 = 507_034;
/// A vector core trapped.
pub const VECTOR_EXCEPTION: i32 = 507_035;
/// A wait for a stream ran out of time.
pub const STREAM_SYNC_TIMEOUT: i32 = 507_046;
/// A wait for an event ran out of time.
pub const EVENT_SYNC_TIMEOUT: i32 = 507_047;
/// The task scheduler did not finish a fused task.
pub const FFTS_TIMEOUT: i32 = 507_048;
/// Device memory failed.
pub const DEVICE_MEMORY: i32 = 507_053;
/// Device memory has an error that its code cannot correct.
pub const HBM_ECC: i32 = 507_054;
/// Device memory may have failed.
pub const SUSPECT_MEMORY: i32 = 507_055;
/// A link between devices failed.
pub const LINK: i32 = 507_056;
/// A peer may have failed.
pub const SUSPECT_REMOTE: i32 = 507_057;
/// The host's link to the device closed.
pub const SOCKET_CLOSED: i32 = 507_901;
/// A collective failed again after a retry.
pub const COLLECTIVE_RETRY: i32 = 507_904;

/// A null argument of an operator.
pub const OP_NULL: i32 = 161_001;
/// A wrong argument of an operator: dtype, shape, attribute.
pub const OP_PARAMETER: i32 = 161_002;
/// The runtime failed under an operator.
pub const OP_RUNTIME: i32 = 361_001;
/// The operator has no binary for this chip.
pub const OP_NO_KERNEL: i32 = 561_003;
/// The executor is not usable.
pub const OP_EXECUTOR: i32 = 561_103;
/// The package of binaries is not installed.
pub const OP_NO_PACKAGE: i32 = 561_112;

/// A collective's argument is wrong.
pub const HCCL_PARAMETER: i32 = 1;
/// A collective's argument is null.
pub const HCCL_NULL: i32 = 2;
/// A collective's argument is not supported.
pub const HCCL_UNSUPPORTED: i32 = 5;
/// A member did not come in time.
pub const HCCL_TIMEOUT: i32 = 9;
/// A connection could not be made.
pub const HCCL_CONNECT: i32 = 11;
/// The runtime failed under a collective.
pub const HCCL_RUNTIME: i32 = 15;
/// The network failed.
pub const HCCL_NETWORK: i32 = 19;
/// A peer failed.
pub const HCCL_REMOTE: i32 = 21;
/// The communicator is suspended.
pub const HCCL_SUSPENDED: i32 = 22;
