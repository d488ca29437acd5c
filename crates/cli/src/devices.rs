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
use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_cuda::CudaBackend;
use pontoon_ops::waivers::Waiver;
use pontoon_ops::{Accumulate, Backend, Copy, DType, DeviceInfo, Layout, Matmul, Op, View};

/// Longest one measurement may take on a device that works.
const MEASURE_MAX: Duration = Duration::from_secs(60);
/// Times an operation is repeated to be measured, after one that warms up.
const MEASURE_TIMES: u32 = 4;

/// A device as its name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Cpu(CpuOptions),
    Ascend { ordinal: i32 },
    EmulatedAscend { ordinal: i32 },
    Cuda { ordinal: i32 },
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
    let counted = cuda_library().and_then(|library| Ok(CudaBackend::count(&library)?));
    names.extend((0..counted.unwrap_or(0).max(1)).map(|ordinal| format!("cuda:{ordinal}")));
    let look = |name: String| {
        let info = open(&name).map(|backend| backend.info().clone());
        Found { name, info }
    };
    names.into_iter().map(look).collect()
}

/// An emulated chip that every build of this program has.
pub fn emulated() -> &'static str {
    "emu-ascend:0"
}

/// Where a run goes that leaves its chips: two workers on the CPU.
pub fn destination() -> Vec<String> {
    vec!["cpu".to_owned(); 2]
}

/// Opens a device by its name, such as `cpu`, `cpu:threads=1,isa=avx2` or `ascend:0`.
pub fn open(name: &str) -> Result<Box<dyn Backend>> {
    let with_name = || format!("device `{name}` cannot be used");
    match parse(name)? {
        Name::Cpu(options) => Ok(Box::new(open_cpu(options).with_context(with_name)?)),
        Name::Ascend { ordinal } => {
            let library = ascend_library().with_context(with_name)?;
            let opened = AscendBackend::open(&library, name, ordinal);
            Ok(Box::new(opened.with_context(with_name)?))
        }
        Name::EmulatedAscend { ordinal } => {
            let opened = AscendBackend::open(emulated_library(), name, ordinal);
            Ok(Box::new(opened.with_context(with_name)?))
        }
        Name::Cuda { ordinal } => {
            let library = cuda_library().with_context(with_name)?;
            let opened = CudaBackend::open(&library, name, ordinal);
            Ok(Box::new(opened.with_context(with_name)?))
        }
    }
}

/// Opens devices of one kind as a group whose members exchange with one another.
pub fn group(names: &[String]) -> Result<Vec<Box<dyn Backend>>> {
    let parsed: Vec<Name> = names.iter().map(|name| parse(name)).collect::<Result<_>>()?;
    let with_name = || format!("devices {} cannot be a group", names.join(", "));
    let ordinals = |of: fn(&Name) -> Option<i32>| -> Option<Vec<(String, i32)>> {
        let ordinals: Option<Vec<i32>> = parsed.iter().map(of).collect();
        ordinals.map(|ordinals| names.iter().cloned().zip(ordinals).collect())
    };
    let real =
        |name: &Name| if let Name::Ascend { ordinal } = name { Some(*ordinal) } else { None };
    let emulated = |name: &Name| match name {
        Name::EmulatedAscend { ordinal } => Some(*ordinal),
        _ => None,
    };
    if let [Name::Cpu(options), rest @ ..] = parsed.as_slice()
        && rest.iter().all(|name| *name == Name::Cpu(*options))
    {
        let members = CpuBackend::group(parsed.len() as u16, *options).with_context(with_name)?;
        return Ok(boxed(members));
    }
    if parsed.iter().all(|name| matches!(name, Name::Cuda { .. })) {
        bail!("devices {}: this kind's do not exchange with one another yet", names.join(", "));
    }
    let (library, devices) = match (ordinals(real), ordinals(emulated)) {
        (Some(devices), _) => (&ascend_library().with_context(with_name)?, devices),
        (_, Some(devices)) => (emulated_library(), devices),
        _ => bail!("devices {} are of several kinds and cannot exchange", names.join(", ")),
    };
    Ok(boxed(AscendBackend::group(library, &devices).with_context(with_name)?))
}

fn boxed<T: Backend + 'static>(members: Vec<T>) -> Vec<Box<dyn Backend>> {
    members.into_iter().map(|member| Box::new(member) as Box<dyn Backend>).collect()
}

/// What the page of supported operations covers: the CPU with each of its instruction sets and an
/// emulated chip; each with a second one of its kind, to exchange with.
pub fn supported() -> Vec<[String; 2]> {
    let sets = Isa::available().into_iter().rev();
    let mut all: Vec<[String; 2]> = sets
        .map(|isa| format!("cpu:isa={}", isa.name()))
        .map(|name| [name.clone(), name])
        .collect();
    all.push(["emu-ascend:0".to_owned(), "emu-ascend:1".to_owned()]);
    all
}

/// What devices of a kind refuse, and when, beyond what they refuse here: `(when, operations,
/// reason)`.
pub fn waivers(name: &str) -> Result<Vec<(String, String, String)>> {
    let published = match parse(name)? {
        Name::Cpu(_) => return Ok(Vec::new()),
        Name::Ascend { .. } | Name::EmulatedAscend { .. } => pontoon_ascend::needs::waivers(),
        Name::Cuda { .. } => pontoon_cuda::needs::waivers(),
    };
    let row = |(when, waiver): (&String, &Waiver)| {
        (when.clone(), waiver.ops.join(", "), waiver.reason.clone())
    };
    Ok(published.iter().map(row).collect())
}

/// Names with commas between them, where a comma may also stand before an option of a name.
pub fn listed(given: &[String]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for part in given.iter().flat_map(|text| text.split(',')) {
        let is_option = part.contains('=') && !part.contains(':');
        match names.last_mut().filter(|_| is_option) {
            Some(name) => *name += &format!(",{part}"),
            None => names.push(part.to_owned()),
        }
    }
    names
}

/// The device of each worker. Workers on the same CPU share its cores, unless their names say how
/// many threads they have. Devices whose library is a vendor's are not opened here: that happens in
/// the workers, which may be lost.
pub fn dealt(names: &[String], workers: usize) -> Result<Vec<String>> {
    let dealt: Vec<&String> = names.iter().cycle().take(workers).collect();
    let shares =
        |name: &str| matches!(parse(name), Ok(Name::Cpu(CpuOptions { threads: None, .. })));
    let sharing = dealt.iter().filter(|name| shares(name)).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / sharing.max(1)).max(1);
    let named = |name: &&String| match shares(name) {
        true => with_threads(name, threads),
        false => (*name).clone(),
    };
    let dealt: Vec<String> = dealt.iter().map(named).collect();
    dealt.iter().try_for_each(|name| match parse(name)? {
        Name::Ascend { .. } | Name::Cuda { .. } => Ok(()),
        Name::Cpu(_) | Name::EmulatedAscend { .. } => open(name).map(drop),
    })?;
    Ok(dealt)
}

/// The name of the same CPU device with a number of threads.
fn with_threads(name: &str, threads: usize) -> String {
    match name.split_once(':') {
        Some((cpu, options)) if options != "0" => format!("{cpu}:threads={threads},{options}"),
        _ => format!("cpu:threads={threads}"),
    }
}

/// Floating-point operations per second of matrix products, measured now: in about 0.1 s on a CPU,
/// by a few products elsewhere.
pub fn peak_flops(name: &str, dtype: DType) -> Result<f64> {
    if let Name::Cpu(options) = parse(name)? {
        let cpu = open_cpu(options)?;
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
    if let Name::Cpu(options) = parse(name)? {
        let cpu = open_cpu(options)?;
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

/// The driver and the run-time compiler, opened once, or why they cannot be.
fn cuda_library() -> Result<Arc<pontoon_cuda::Library>> {
    static LIBRARY: OnceLock<Result<Arc<pontoon_cuda::Library>, String>> = OnceLock::new();
    let open = || pontoon_cuda::Library::open().map(Arc::new).map_err(|error| error.text);
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
        ("cpu", None | Some("0")) => Ok(Name::Cpu(CpuOptions::default())),
        ("cpu", Some(given)) => Ok(Name::Cpu(cpu_options(name, given)?)),
        ("ascend", _) => Ok(Name::Ascend { ordinal: ordinal()? }),
        ("emu-ascend", _) => Ok(Name::EmulatedAscend { ordinal: ordinal()? }),
        ("cuda", _) => Ok(Name::Cuda { ordinal: ordinal()? }),
        _ => Err(unknown()),
    }
}

/// The options of a CPU's name: `threads=N` and `isa=NAME`, with a comma between.
fn cpu_options(name: &str, given: &str) -> Result<CpuOptions> {
    let mut options = CpuOptions::default();
    for option in given.split(',') {
        let number = |text: &str| text.parse().ok().filter(|count| (1..=1024).contains(count));
        match option.split_once('=') {
            Some(("threads", count)) if number(count).is_some() => options.threads = number(count),
            Some(("isa", set)) => {
                let isa = Isa::from_name(set).with_context(|| format!("device `{name}`"))?;
                options.isa = Some(isa);
            }
            _ => bail!(
                "device `{name}`: write cpu, cpu:threads=N with N from 1 to 1024, cpu:isa=NAME, \
                 or both with a comma between"
            ),
        }
    }
    Ok(options)
}

fn open_cpu(options: CpuOptions) -> Result<CpuBackend> {
    Ok(CpuBackend::new(options)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_can_be_named_with_threads_and_an_instruction_set_in_any_order() {
        for name in ["cpu:threads=1,isa=portable", "cpu:isa=portable,threads=1"] {
            let info = open(name).unwrap().info().clone();
            assert_eq!((info.numeric_class.as_str(), info.compute_units), ("cpu/portable", 1));
        }
        for (name, want) in [
            ("cpu:isa=abacus", "unknown instruction set `abacus`"),
            ("cpu:threads=0", "threads=N with N from 1 to 1024"),
            ("cpu:2", "cpu:isa=NAME"),
            ("chip:0", "no device `chip:0`"),
        ] {
            let error = format!("{:#}", open(name).err().unwrap());
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn a_comma_before_an_option_belongs_to_the_name() {
        let given = ["cpu,cpu:isa=avx2,threads=1,cpu:0".to_owned(), "chip:1".to_owned()];
        let want = ["cpu", "cpu:isa=avx2,threads=1", "cpu:0", "chip:1"];
        assert_eq!(listed(&given), want);
    }

    #[test]
    fn workers_that_name_no_threads_share_the_cores() {
        let names = ["cpu", "cpu:isa=portable", "cpu:threads=1"].map(str::to_owned);
        let dealt = dealt(&names, 3).unwrap();
        let threads = (std::thread::available_parallelism().unwrap().get() / 2).max(1);
        let want = [
            format!("cpu:threads={threads}"),
            format!("cpu:threads={threads},isa=portable"),
            "cpu:threads=1".to_owned(),
        ];
        assert_eq!(dealt, want);
    }

    #[test]
    fn names_are_parsed_and_wrong_ones_say_how_to_write_them() {
        let threads = CpuOptions { threads: Some(3), ..CpuOptions::default() };
        assert_eq!(parse("cpu:threads=3").unwrap(), Name::Cpu(threads));
        assert_eq!(parse("ascend:7").unwrap(), Name::Ascend { ordinal: 7 });
        assert_eq!(parse("emu-ascend:0").unwrap(), Name::EmulatedAscend { ordinal: 0 });
        assert_eq!(parse("cuda:1").unwrap(), Name::Cuda { ordinal: 1 });
        for (name, hint) in
            [("ascend", "ascend:N"), ("emu-ascend:-1", "emu-ascend:N"), ("cpu:x", "threads=N")]
        {
            let error = parse(name).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
        assert!(parse("tpu:0").unwrap_err().to_string().contains("pontoon devices"));
    }
}
