//! `pontoon devices`: every device found.

use anyhow::Result;
use clap::Args;

use crate::devices;

/// The arguments of `pontoon devices`.
#[derive(Args)]
pub struct Arguments {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Lists the devices.
pub fn run(arguments: &Arguments) -> Result<()> {
    let found = devices::found()?;
    if arguments.json {
        let list: Vec<serde_json::Value> = found
            .iter()
            .map(|info| {
                serde_json::json!({
                    "device": info.device,
                    "chip": info.chip,
                    "numeric_class": info.numeric_class,
                    "emulated": info.emulated,
                    "memory_bytes": info.memory_bytes,
                    "compute_units": info.compute_units,
                })
            })
            .collect();
        println!("{}", serde_json::json!({ "devices": list }));
        return Ok(());
    }
    for info in found {
        let gib = info.memory_bytes as f64 / f64::from(1 << 30);
        let (device, chip, class) = (&info.device, &info.chip, &info.numeric_class);
        println!("{device}  {chip}  {class}  {} threads  {gib:.1} GiB", info.compute_units);
    }
    Ok(())
}
