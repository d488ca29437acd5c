//! The only list of vendors: which devices exist here and how each is opened.
//!
//! It runs nothing on them. A new backend is added here and nowhere else.

use anyhow::{Context, Result, bail};
use pontoon_cpu::peak::{PeakType, measure_bandwidth, measure_peak};
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{Backend, DType, DeviceInfo};

/// Every device found on this machine.
pub fn found() -> Result<Vec<DeviceInfo>> {
    let cpu = CpuBackend::new(CpuOptions::default()).context("the CPU cannot be used")?;
    Ok(vec![cpu.info().clone()])
}

/// Opens a device by its name, such as `cpu` or `cpu:threads=1`.
pub fn open(name: &str) -> Result<Box<dyn Backend>> {
    Ok(Box::new(open_cpu(name)?))
}

/// The device of each worker. Workers on the same CPU share its cores.
pub fn dealt(names: &[String], workers: usize) -> Result<Vec<String>> {
    let dealt: Vec<&String> = names.iter().cycle().take(workers).collect();
    let of_cpu = dealt.iter().filter(|name| ["cpu", "cpu:0"].contains(&name.as_str())).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / of_cpu.max(1)).max(1);
    let named = |name: &&String| match name.as_str() {
        "cpu" | "cpu:0" => format!("cpu:threads={threads}"),
        other => other.to_owned(),
    };
    let dealt: Vec<String> = dealt.iter().map(named).collect();
    dealt.iter().try_for_each(|name| open(name).map(drop))?;
    Ok(dealt)
}

/// Floating-point operations per second of matrix products, measured now, in about 0.1 s.
pub fn peak_flops(name: &str, dtype: DType) -> Result<f64> {
    let cpu = open_cpu(name)?;
    let kind = if dtype == DType::F32 { PeakType::F32 } else { PeakType::Bf16 };
    Ok(measure_peak(cpu.pool(), cpu.isa(), kind))
}

/// Bytes per second read from memory, measured now, in about a second.
pub fn bandwidth(name: &str) -> Result<f64> {
    let cpu = open_cpu(name)?;
    Ok(measure_bandwidth(cpu.pool(), cpu.isa()))
}

fn open_cpu(name: &str) -> Result<CpuBackend> {
    let threads = match name.split_once(':') {
        None if name == "cpu" => None,
        Some(("cpu", "0")) => None,
        Some(("cpu", option)) => match option.strip_prefix("threads=").map(str::parse::<usize>) {
            Some(Ok(threads)) if (1..=1024).contains(&threads) => Some(threads),
            _ => bail!("device `{name}`: write cpu or cpu:threads=N, with N from 1 to 1024"),
        },
        _ => bail!("there is no device `{name}` here; `pontoon devices` lists those there are"),
    };
    CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() })
        .with_context(|| format!("device `{name}` cannot be used"))
}
