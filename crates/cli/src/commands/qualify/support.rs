//! `pontoon qualify --support FILE`: what each kind of device that every machine has supports, from
//! runs of the conformance suite.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use pontoon_models::civil_date;
use pontoon_qualify::support::{Column, Sheet, Waiver, page};
use pontoon_qualify::{exchange, suite};

use crate::devices;

/// Runs the suites and writes the page. Exit code 1 if anything failed; the page says what.
pub fn run(path: &Path, seed: u64) -> Result<()> {
    let mut columns = Vec::new();
    let mut waivers = Vec::new();
    for pair in devices::supported() {
        eprintln!("{}", pair[0]);
        columns.push(column(&pair, seed)?);
        let of = devices::waivers(&pair[0])?.into_iter();
        waivers.extend(of.map(|(when, ops, reason)| {
            let device = pair[0].clone();
            Waiver { device, when, ops, reason }
        }));
    }
    let sheet = Sheet {
        date: today(),
        machine: machine()?,
        command: "cargo xtask support".to_owned(),
        seed,
        columns,
        waivers,
    };
    std::fs::write(path, page(&sheet))
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    let rows = sheet.columns.iter().flat_map(|one| one.conformance.rows.iter());
    let failed = rows.chain(sheet.columns.iter().flat_map(|one| one.exchange.rows.iter()));
    let failed = failed.filter(|row| !row.ok).count();
    let stopped =
        |one: &Column| one.conformance.stopped.is_some() || one.exchange.failure.is_some();
    if failed > 0 || sheet.columns.iter().any(stopped) {
        bail!("{failed} rows failed or a device stopped: see `{}`", path.display());
    }
    Ok(())
}

fn column(pair: &[String; 2], seed: u64) -> Result<Column> {
    let mut backend = devices::open(&pair[0])?;
    let conformance = suite::run(backend.as_mut(), seed, &mut |_| {});
    let info = backend.info().clone();
    drop(backend);
    let mut members = devices::group(pair)?;
    let exchange = exchange::check(&mut members, seed);
    Ok(Column {
        device: pair[0].clone(),
        numeric_class: info.numeric_class,
        emulated: info.emulated,
        conformance,
        exchange,
    })
}

fn machine() -> Result<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let chips: Vec<String> = devices::found()?.into_iter().map(|info| info.chip).collect();
    Ok(format!("{}, {cores} threads, {}", chips.join(", "), std::env::consts::ARCH))
}

fn today() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let days = since.map_or(0, |since| since.as_secs() / 86_400);
    let (year, month, day) = civil_date(days);
    format!("{year}-{month:02}-{day:02}")
}
