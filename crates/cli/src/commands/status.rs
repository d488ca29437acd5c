//! `pontoon status`: where a run stands, from its files alone.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use pontoon_fleet::run_dir::read_lines;
use pontoon_fleet::snapshot::SnapshotReader;
use pontoon_fleet::world::RealDisk;
use serde_json::{Value, json};

use super::{faults, show};

/// The arguments of `pontoon status`.
#[derive(Args)]
pub struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Prints it.
pub fn run(arguments: &Arguments) -> Result<()> {
    let dir = &arguments.dir;
    let path = dir.join("metrics.jsonl");
    ensure!(path.is_file(), "`{}` is no run folder: it has no metrics.jsonl", dir.display());
    let metrics = read_lines(&RealDisk, &path)?;
    let events = read_lines(&RealDisk, &dir.join("events.jsonl"))?;
    let snapshots = SnapshotReader::new(&RealDisk, &dir.join("snapshots")).list()?;
    let kind = |event: &Value| event["kind"].as_str().unwrap_or_default().to_owned();
    let survived: Vec<Value> = events.iter().filter(|of| faults::is_fault(of)).cloned().collect();
    let finished = events.last().is_some_and(|event| kind(event) == "finished");
    let last = metrics.last().cloned().unwrap_or(Value::Null);
    if arguments.json {
        let status = json!({
            "step": last["step"],
            "loss": last["loss"],
            "tokens_per_s": last["tokens_per_s"],
            "goodput": last["goodput"],
            "workers": last["workers"],
            "faults": survived.len(),
            "snapshots": snapshots,
            "finished": finished,
        });
        println!("{status}");
        return Ok(());
    }
    let number = |key: &str| last[key].as_f64().unwrap_or(f64::NAN);
    let snapshot = snapshots.first().map_or("none".to_owned(), u64::to_string);
    println!(
        "step {}  loss {:.4}  {} tokens/s  goodput {:.1}%  faults {}  snapshot {snapshot}{}",
        last["step"],
        number("loss"),
        show::count(number("tokens_per_s")),
        100.0 * number("goodput"),
        survived.len(),
        if finished { "  finished" } else { "" },
    );
    if !survived.is_empty() {
        faults::table(&survived).iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}
