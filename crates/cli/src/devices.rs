//! The only list of vendors: which devices exist here and how each is opened.
//!
//! It runs nothing on them but what measures their speed. Vendors' libraries are opened when a
//! device of theirs is asked for, and by `pontoon devices`. A new backend is added here and
//! nowhere else.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use pontoon_ascend::{AscendBackend, Library};
use pontoon_cpu::peak::{PeakType, measure_bandwidth, measure_peak};
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{Accumulate, Backend, Copy, DType, DeviceInfo, Layout, Matmul, Op, View};

/// Longest one measurement may take on a device that works.
const MEASURE_MAX: Duration = Duration::from_secs(60);
/// Times an operation is repeated to be measured, after one that warms up.
const MEASURE_TIMES: u32 = 4;

/// A device as its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Cpu { threads: Option<usize> },
    Ascend { ordinal: i32 },
    EmulatedAscend { ordinal: i32 },
}

/// A device that was looked for, and why it cannot be used if it cannot.
pub struct Found {
    /// As the user would name it.
    pub name: String,
    /// What it is, or why it is not usable.
    pub info: Result<DeviceInfo>,
}

/// The devices of the host itself.
pub fn found() -> Result<Vec<DeviceInfo>> {
    let cpu = CpuBackend::new(CpuOptions::default()).context("the CPU cannot be used")?;
    Ok(vec![cpu.info().clone()])
}

/// Every device that could be here, each opened once.
pub fn survey() -> Vec<Found> {
    let mut names = vec!["cpu".to_owned()];
    let counted = ascend_library().and_then(|library| Ok(AscendBackend::count(&library)?));
    names.extend((0..counted.unwrap_or(0).max(1)).map(|ordinal| format!("ascend:{ordinal}")));
    names.push("emu-ascend:0".to_owned());
    let look = |name: String| {
        let info = open(&name).map(|backend| backend.info().clone());
        Found { name, info }
    };
    names.into_iter().map(look).collect()
}

/// Opens a device by its name, such as `cpu`, `cpu:threads=1` or `ascend:0`.
pub fn open(name: &str) -> Result<Box<dyn Backend>> {
    let with_name = || format!("device `{name}` cannot be used");
    match parse(name)? {
        Name::Cpu { threads } => Ok(Box::new(open_cpu(threads).with_context(with_name)?)),
        Name::Ascend { ordinal } => {
            let library = ascend_library().with_context(with_name)?;
            let opened = AscendBackend::open(&library, name, ordinal);
            Ok(Box::new(opened.with_context(with_name)?))
        }
        Name::EmulatedAscend { ordinal } => {
            let opened = AscendBackend::open(emulated_library(), name, ordinal);
            Ok(Box::new(opened.with_context(with_name)?))
        }
    }
}

/// The device of each worker. Workers on the same CPU share its cores. Devices whose library is a
/// vendor's are not opened here: that happens in the workers, which may be lost.
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
    dealt.iter().try_for_each(|name| match parse(name)? {
        Name::Ascend { .. } => Ok(()),
        Name::Cpu { .. } | Name::EmulatedAscend { .. } => open(name).map(drop),
    })?;
    Ok(dealt)
}

/// Floating-point operations per second of matrix products, measured now: in about 0.1 s on a CPU,
/// by a few products elsewhere.
pub fn peak_flops(name: &str, dtype: DType) -> Result<f64> {
    if let Name::Cpu { threads } = parse(name)? {
        let cpu = open_cpu(threads)?;
        let kind = if dtype == DType::F32 { PeakType::F32 } else { PeakType::Bf16 };
        return Ok(measure_peak(cpu.pool(), cpu.isa(), kind));
    }
    let mut backend = open(name)?;
    // Large enough to fill a chip's matrix units; an emulated one is the host's CPU.
    let extent = if backend.info().emulated { 512 } else { 8192 };
    let square = [extent, extent];
    let mut matrix = |dtype| matrix(backend.as_mut(), dtype, square);
    let (a, b, c) = (matrix(dtype)?, matrix(dtype)?, matrix(dtype)?);
    let (layout, accumulate) = (Layout::Nt, Accumulate::Overwrite);
    let op = Matmul { layout, a, b, bias: None, c, accumulate }.into();
    let flops = 2.0 * (extent as f64).powi(3);
    Ok(flops / seconds(backend.as_mut(), &op)?)
}

/// Bytes per second read from memory, measured now, in about a second.
pub fn bandwidth(name: &str) -> Result<f64> {
    if let Name::Cpu { threads } = parse(name)? {
        let cpu = open_cpu(threads)?;
        return Ok(measure_bandwidth(cpu.pool(), cpu.isa()));
    }
    let mut backend = open(name)?;
    // Beyond any cache: 64 MiB on the host, 1 GiB on a chip.
    let rows = if backend.info().emulated { 4096 } else { 65_536 };
    let (src, dst) = (
        matrix(backend.as_mut(), DType::F32, [rows, 4096])?,
        matrix(backend.as_mut(), DType::F32, [rows, 4096])?,
    );
    let bytes = 2.0 * DType::F32.bytes(rows * 4096) as f64;
    Ok(bytes / seconds(backend.as_mut(), &Copy { src, dst }.into())?)
}

fn matrix(backend: &mut dyn Backend, dtype: DType, shape: [usize; 2]) -> Result<View> {
    let buffer = backend.alloc(dtype.bytes(shape[0] * shape[1]))?;
    Ok(View::contiguous(buffer, dtype, shape))
}

/// How long one run of an operation takes, at best.
fn seconds(backend: &mut dyn Backend, op: &Op) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..=MEASURE_TIMES {
        let start = Instant::now();
        backend.launch(op)?;
        backend.wait(MEASURE_MAX)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best.max(f64::MIN_POSITIVE))
}

/// CANN's libraries, opened once, or why they cannot be.
fn ascend_library() -> Result<Arc<Library>> {
    static LIBRARY: OnceLock<Result<Arc<Library>, String>> = OnceLock::new();
    let open = || Library::open().map(Arc::new).map_err(|error| error.text);
    LIBRARY.get_or_init(open).clone().map_err(|reason| anyhow!(reason))
}

/// The emulator's library, which is a part of this program.
fn emulated_library() -> &'static Arc<Library> {
    static LIBRARY: OnceLock<Arc<Library>> = OnceLock::new();
    LIBRARY.get_or_init(|| Arc::new(Library::linked(pontoon_emu_ascend::symbol)))
}

fn parse(name: &str) -> Result<Name> {
    let unknown =
        || anyhow!("there is no device `{name}` here; `pontoon devices` lists those there are");
    let (kind, option) = match name.split_once(':') {
        Some((kind, option)) => (kind, Some(option)),
        None => (name, None),
    };
    let ordinal = || {
        let number = option.and_then(|option| option.parse::<i32>().ok()).filter(|n| *n >= 0);
        number.ok_or_else(|| anyhow!("device `{name}`: write {kind}:N, N the device's number"))
    };
    match (kind, option) {
        ("cpu", None | Some("0")) => Ok(Name::Cpu { threads: None }),
        ("cpu", Some(option)) => match option.strip_prefix("threads=").map(str::parse::<usize>) {
            Some(Ok(threads)) if (1..=1024).contains(&threads) => {
                Ok(Name::Cpu { threads: Some(threads) })
            }
            _ => bail!("device `{name}`: write cpu or cpu:threads=N, with N from 1 to 1024"),
        },
        ("ascend", _) => Ok(Name::Ascend { ordinal: ordinal()? }),
        ("emu-ascend", _) => Ok(Name::EmulatedAscend { ordinal: ordinal()? }),
        _ => Err(unknown()),
    }
}

fn open_cpu(threads: Option<usize>) -> Result<CpuBackend> {
    Ok(CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_wrong_ones_say_how_to_write_them() {
        assert_eq!(parse("cpu:threads=3").unwrap(), Name::Cpu { threads: Some(3) });
        assert_eq!(parse("ascend:7").unwrap(), Name::Ascend { ordinal: 7 });
        assert_eq!(parse("emu-ascend:0").unwrap(), Name::EmulatedAscend { ordinal: 0 });
        for (name, hint) in
            [("ascend", "ascend:N"), ("emu-ascend:-1", "emu-ascend:N"), ("cpu:x", "threads=N")]
        {
            let error = parse(name).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
        assert!(parse("tpu:0").unwrap_err().to_string().contains("pontoon devices"));
    }
}
