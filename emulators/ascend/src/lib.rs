//! An emulated Ascend: libraries with CANN's C interface that compute on the host, check what
//! silicon would punish, and fail on demand.
//!
//! Two ways in: [`symbol`] finds functions in this process with nothing installed, and the dynamic
//! library of this crate stands in for `libascendcl.so`, `libnnopbase.so`, `libopapi.so` and
//! `libhccl.so` alike. It is no model of a chip's speed, and nothing that ran here ran on silicon:
//! `aclrtGetSocName` says so. Read next: `abi/mod.rs` for the border, `plan.rs` for what happens to
//! an operator, `device/` for streams and memory, `ops/` for arithmetic, `fault.rs` for failures.

mod abi;
mod code;
mod collective;
mod device;
mod driver;
mod dtype;
mod failure;
pub mod fault;
mod ffi;
mod ops;
mod plan;
pub mod strict;
mod tensor;

pub use abi::{names, symbol};
pub use failure::Failure;

/// Arms a fault.
pub fn inject(fault: &fault::Fault) {
    driver::DRIVER.arm(fault);
}

/// Disarms everything on a device.
pub fn clear(device: i32) -> Result<(), Failure> {
    driver::DRIVER.device(device)?.faults.clear();
    Ok(())
}

/// How many devices there are.
pub fn device_count() -> usize {
    driver::DRIVER.devices().len()
}
