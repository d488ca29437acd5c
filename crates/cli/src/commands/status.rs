//! `pontoon status`: where a run stands, once or for as long as it lives.
//!
//! Read next: `run_status.rs`, where the facts come from; `watch.rs`, the view in a terminal.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::run_status::{RunStatus, Standing};
use super::{faults, show, watch};

/// How often a run is looked at that is watched.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The arguments of `pontoon status`.
#[derive(Args)]
pub struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// Keep looking until the run ends; q ends the view, not the run.
    #[arg(long, conflicts_with = "json")]
    watch: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Prints it.
pub fn run(arguments: &Arguments) -> Result<()> {
    let mut status = RunStatus::read(&arguments.dir)?;
    if arguments.json {
        println!("{}", status.to_json());
        return Ok(());
    }
    if arguments.watch && status.standing == Standing::Running {
        status = match std::io::stdout().is_terminal() {
            true => watch::run(status, LOOK_EVERY)?,
            false => follow(status)?,
        };
    }
    lines(&status).iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// A line for every step that is seen, until the run ends.
fn follow(mut status: RunStatus) -> Result<RunStatus> {
    let mut told = None;
    while status.standing == Standing::Running {
        let step = status.last()["step"].as_u64();
        if step != told {
            told = step;
            println!("{}", line(&status));
            std::io::stdout().flush()?;
        }
        std::thread::sleep(LOOK_EVERY);
        status = RunStatus::read(&status.dir)?;
    }
    Ok(status)
}

/// The run in one line.
pub fn line(status: &RunStatus) -> String {
    let last = status.last();
    let number = |key: &str| last[key].as_f64().unwrap_or(f64::NAN);
    let snapshot = status.snapshots.first().map_or("none".to_owned(), u64::to_string);
    let steps = status.steps.map_or(String::new(), |steps| format!("/{steps}"));
    let rest = status.rest_s().map_or(String::new(), |s| format!("  ETA {}", show::duration(s)));
    format!(
        "step {}{steps}  loss {:.4}  {} tokens/s  goodput {:.1}%  faults {}  snapshot {snapshot}  \
         {}{rest}",
        last["step"].as_u64().unwrap_or(0),
        number("loss"),
        show::count(number("tokens_per_s")),
        100.0 * number("goodput"),
        status.faults().len(),
        status.standing.name(),
    )
}

/// The run, its workers and its faults.
fn lines(status: &RunStatus) -> Vec<String> {
    let mut lines = vec![line(status)];
    lines.extend(status.fleet.iter().map(watch::worker_line));
    let faults = status.faults();
    if !faults.is_empty() {
        lines.extend(faults::table(&faults));
    }
    if matches!(status.standing, Standing::Died | Standing::Stopped) {
        lines.push(format!("go on with: pontoon train {} --resume", status.dir.display()));
    }
    lines
}
