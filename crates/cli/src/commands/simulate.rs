//! `pontoon simulate`: the supervisor's decisions against a simulated fleet, for weeks in seconds.
//!
//! With --days a long run at a rate of faults, to see what they cost; without, trials drawn from
//! seeds, in which every promise is checked. Read next: `crates/sim`.

use std::ops::RangeInclusive;

use anyhow::{Result, bail, ensure};
use clap::Args;
use pontoon_sim::{
    Long, Scenario, Summary, published_rate, replay_command, simulate, simulate_seen,
};
use serde_json::json;

/// The arguments of `pontoon simulate`.
#[derive(Args)]
pub struct Arguments {
    /// Decides everything; alone, it names a trial.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run the trials of so many seeds, from --seed on.
    #[arg(long, value_name = "N", conflicts_with = "days")]
    seeds: Option<u64>,
    /// A long run of so many simulated days instead.
    #[arg(long)]
    days: Option<f64>,
    /// Workers of the long run.
    #[arg(long, default_value_t = 512, requires = "days")]
    workers: usize,
    /// Faults a day in the long run, all workers together; "published" for those that the Llama 3
    /// report lists on 16,384 devices, "per-device" for its rate on as many devices as workers.
    #[arg(long, default_value = "per-device", requires = "days")]
    rate: String,
    /// Seconds of a step in the long run.
    #[arg(long, default_value_t = 120.0, requires = "days")]
    step_seconds: f64,
    /// Minutes between snapshots in the long run.
    #[arg(long, default_value_t = 15.0, requires = "days")]
    snapshot_minutes: f64,
    /// The share of micro-batches that a second worker computes too.
    #[arg(long, default_value_t = 0.0, requires = "days")]
    audit: f64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Simulates.
pub fn run(arguments: &Arguments) -> Result<()> {
    match (arguments.days, arguments.seeds) {
        (Some(days), _) => long(arguments, days),
        (None, Some(0)) => bail!("--seeds should be at least 1"),
        (None, Some(count)) => {
            let last = arguments.seed.saturating_add(count - 1);
            sweep(arguments.seed..=last, arguments.json)
        }
        (None, None) => trial(arguments),
    }
}

/// One trial, told line by line.
fn trial(arguments: &Arguments) -> Result<()> {
    let scenario = Scenario::trial(arguments.seed);
    let mut tell = |at: std::time::Duration, line: &str| {
        eprintln!("{:10.3}  {line}", at.as_secs_f64());
    };
    let outcome = simulate_seen(&scenario, &mut tell)?;
    let summary = Summary::of(&outcome);
    if arguments.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        println!(
            "seed {}: {} steps on {} workers, {} faults; every promise held",
            arguments.seed, summary.steps, scenario.workers, summary.faults
        );
    }
    Ok(())
}

/// Many trials, of which only those that broke a promise are told.
fn sweep(seeds: RangeInclusive<u64>, as_json: bool) -> Result<()> {
    let (first, mut faults, mut steps, mut count) = (*seeds.start(), 0, 0, 0_u64);
    let mut broken = Vec::new();
    for seed in seeds {
        count += 1;
        match simulate(&Scenario::trial(seed)) {
            Ok(outcome) => {
                let summary = Summary::of(&outcome);
                (faults, steps) = (faults + summary.faults, steps + summary.steps);
            }
            Err(violation) => {
                eprintln!("{}   # {violation}", replay_command(seed));
                broken.push(seed);
            }
        }
    }
    if as_json {
        println!(
            "{}",
            json!({ "first": first, "seeds": count, "steps": steps, "faults": faults,
                    "broken": broken })
        );
    } else {
        println!("{count} seeds: {steps} steps, {faults} faults, {} broke a promise", broken.len());
    }
    ensure!(broken.is_empty(), "{} of {count} trials broke a promise; see above", broken.len());
    Ok(())
}

fn long(arguments: &Arguments, days: f64) -> Result<()> {
    let rate = match arguments.rate.as_str() {
        "published" => published_rate(None),
        "per-device" => published_rate(Some(arguments.workers)),
        text => match text.parse::<f64>() {
            Ok(rate) if rate >= 0.0 && rate.is_finite() => rate,
            _ => bail!("--rate is `{text}`; give faults a day, \"published\" or \"per-device\""),
        },
    };
    let rules = [
        ((1..=65_536).contains(&arguments.workers), "--workers should be from 1 to 65536"),
        (days > 0.0 && days <= 3650.0, "--days should be above 0 and at most 3650"),
        (
            (0.1..=86_400.0).contains(&arguments.step_seconds),
            "--step-seconds should be from 0.1 to 86400",
        ),
        (arguments.snapshot_minutes > 0.0, "--snapshot-minutes should be above 0"),
        ((0.0..=1.0).contains(&arguments.audit), "--audit should be from 0 to 1"),
        (
            arguments.audit == 0.0 || arguments.workers > 1,
            "--audit needs a second worker; add --workers or set --audit 0",
        ),
    ];
    if let Some((_, what)) = rules.iter().find(|(holds, _)| !holds) {
        bail!("{what}");
    }
    let long = Long {
        seed: arguments.seed,
        workers: arguments.workers,
        days,
        faults_a_day: rate,
        step_seconds: arguments.step_seconds,
        snapshot_minutes: arguments.snapshot_minutes,
        audit: arguments.audit,
    };
    let summary = Summary::of(&simulate(&Scenario::long(&long))?);
    if arguments.json {
        let settings = json!({
            "seed": long.seed, "workers": long.workers, "days": days, "faults_a_day": rate,
            "step_seconds": long.step_seconds, "snapshot_minutes": long.snapshot_minutes,
            "audit": long.audit,
        });
        println!("{}", json!({ "settings": settings, "result": summary }));
    } else {
        table(&long, &summary).iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

/// The run as people read it.
fn table(long: &Long, of: &Summary) -> Vec<String> {
    let mut lines = vec![format!(
        "{} workers, {:.1} days, {} steps of {} s, {} faults: goodput {:.2}%, no wrong bit",
        long.workers,
        of.days,
        of.steps,
        long.step_seconds,
        of.faults,
        100.0 * of.goodput
    )];
    lines.push(format!(
        "{:<18} {:>6} {:>9} {:>22} {:>22}",
        "fault", "count", "harmless", "found after (s)", "recovered after (s)"
    ));
    let spread = |spread: Option<pontoon_sim::Spread>| match spread {
        Some(of) => format!("{:.2}, at most {:.1}", of.median, of.max),
        None => "-".to_owned(),
    };
    for (kind, of) in &of.by_kind {
        let (found, recovered) = (spread(of.found_s), spread(of.recovered_s));
        lines.push(format!(
            "{kind:<18} {:>6} {:>9} {found:>22} {recovered:>22}",
            of.count, of.harmless
        ));
    }
    lines.push(format!("{:<18} {:>10} {:>9}", "lost to", "hours", "of all"));
    let mut lost: Vec<(&String, &f64)> = of.lost_s.iter().filter(|(_, s)| **s > 0.0).collect();
    lost.sort_by(|a, b| b.1.total_cmp(a.1));
    for (cause, seconds) in lost {
        let share = 100.0 * seconds / (of.days * 86_400.0);
        lines.push(format!("{cause:<18} {:>10.2} {share:>8.3}%", seconds / 3600.0));
    }
    lines
}
