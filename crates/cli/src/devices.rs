//! The only list of vendors: which devices exist here and how each is opened.
//!
//! It runs nothing on them. A new backend is added here and nowhere else.

use anyhow::{Context, Result};
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{Backend, DeviceInfo};

/// Every device found on this machine.
pub fn found() -> Result<Vec<DeviceInfo>> {
    let cpu = CpuBackend::new(CpuOptions::default()).context("the CPU cannot be used")?;
    Ok(vec![cpu.info().clone()])
}
