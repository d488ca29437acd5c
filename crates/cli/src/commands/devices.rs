//! `pontoon devices`: every device found, and why one was not usable.

use anyhow::Result;
use clap::Args;

use crate::devices::{self, Found};

/// The arguments of `pontoon devices`.
#[derive(Args)]
pub struct Arguments {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Lists the devices.
pub fn run(arguments: &Arguments) -> Result<()> {
    let found = devices::survey();
    if arguments.json {
        let (usable, other): (Vec<&Found>, Vec<&Found>) =
            found.iter().partition(|found| found.info.is_ok());
        let list: Vec<serde_json::Value> = usable
            .iter()
            .filter_map(|found| found.info.as_ref().ok())
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
        let unusable: Vec<serde_json::Value> = other
            .iter()
            .filter_map(|found| Some((&found.name, found.info.as_ref().err()?)))
            .map(|(name, error)| serde_json::json!({ "device": name, "reason": reason(error) }))
            .collect();
        println!("{}", serde_json::json!({ "devices": list, "unusable": unusable }));
        return Ok(());
    }
    for found in found {
        match found.info {
            Ok(info) => {
                let gib = info.memory_bytes as f64 / f64::from(1 << 30);
                let (device, chip, class) = (&info.device, &info.chip, &info.numeric_class);
                let units = match info.compute_units {
                    1 => String::new(),
                    units => format!("  {units} threads"),
                };
                let emulated = if info.emulated { "  emulated on the host" } else { "" };
                println!("{device}  {chip}  {class}{units}  {gib:.1} GiB{emulated}");
            }
            Err(error) => println!("{}  not usable: {}", found.name, reason(&error)),
        }
    }
    Ok(())
}

/// The innermost cause, which is what can be acted upon.
fn reason(error: &anyhow::Error) -> String {
    error.root_cause().to_string()
}
