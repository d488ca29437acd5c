//! The only list of vendors: which devices exist here and how each is opened.
//!
//! It runs nothing on them. A new backend is added here and nowhere else.

use anyhow::{Context, Result, bail};
use pontoon_cpu::peak::{PeakType, measure_bandwidth, measure_peak};
use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_ops::{Backend, DType, DeviceInfo};

/// Every device found on this machine.
pub fn found() -> Result<Vec<DeviceInfo>> {
    let cpu = CpuBackend::new(CpuOptions::default()).context("the CPU cannot be used")?;
    Ok(vec![cpu.info().clone()])
}

/// Opens a device by its name, such as `cpu` or `cpu:threads=1,isa=avx2`.
pub fn open(name: &str) -> Result<Box<dyn Backend>> {
    Ok(Box::new(open_cpu(name)?))
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
/// many threads they have.
pub fn dealt(names: &[String], workers: usize) -> Result<Vec<String>> {
    let dealt: Vec<&String> = names.iter().cycle().take(workers).collect();
    let shares = |name: &str| cpu_options(name).is_ok_and(|options| options.threads.is_none());
    let sharing = dealt.iter().filter(|name| shares(name)).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / sharing.max(1)).max(1);
    let named = |name: &&String| match shares(name) {
        true => with_threads(name, threads),
        false => (*name).clone(),
    };
    let dealt: Vec<String> = dealt.iter().map(named).collect();
    dealt.iter().try_for_each(|name| open(name).map(drop))?;
    Ok(dealt)
}

/// The name of the same CPU device with a number of threads.
fn with_threads(name: &str, threads: usize) -> String {
    match name.split_once(':') {
        Some((cpu, options)) if options != "0" => format!("{cpu}:threads={threads},{options}"),
        _ => format!("cpu:threads={threads}"),
    }
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
    CpuBackend::new(cpu_options(name)?).with_context(|| format!("device `{name}` cannot be used"))
}

/// The options in a name: `cpu`, `cpu:0`, or `cpu:` with `threads=N` and `isa=NAME`, by commas.
fn cpu_options(name: &str) -> Result<CpuOptions> {
    let mut options = CpuOptions::default();
    let given = match name.split_once(':') {
        None if name == "cpu" => return Ok(options),
        Some(("cpu", "0")) => return Ok(options),
        Some(("cpu", given)) => given,
        _ => bail!("there is no device `{name}` here; `pontoon devices` lists those there are"),
    };
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
}
