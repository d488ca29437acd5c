//! The `pontoon` command: parses the command line, runs one command, prints one line on failure.
//!
//! Results go to stdout, words for people to stderr. Commands that are not built yet are not
//! offered. Read next: `devices.rs`.

mod devices;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Trains and serves language models on whatever accelerators there are.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists every device found.
    #[command(after_help = "Example:\n  pontoon devices --json")]
    Devices {
        /// Prints one JSON object.
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    match arguments.command {
        Command::Devices { json } => print_devices(json),
    }
}

fn print_devices(json: bool) -> Result<()> {
    let found = devices::found()?;
    if json {
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
