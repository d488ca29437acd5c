//! The `pontoon` command: parses the command line, runs one command, prints one line on failure.
//!
//! Results go to stdout, words for people to stderr. Commands that are not built yet are not
//! offered. Read next: `commands/`, `devices.rs`.

mod commands;
mod devices;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use commands::{data, new, status, tokenizer, train};

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
    Devices(commands::devices::Arguments),
    /// Prepares training data.
    #[command(subcommand)]
    Data(data::Command),
    /// Makes tokenizers.
    #[command(subcommand)]
    Tokenizer(tokenizer::Command),
    /// Writes a run.toml to edit.
    #[command(after_help = "Example:\n  pontoon new qwen3-30m my-run")]
    New(new::Arguments),
    /// Trains a model; what was lost to a crash is made up by --resume, bit for bit.
    #[command(after_help = "Example:\n  pontoon train my-run/run.toml --set train.lr=1e-3")]
    Train(train::Arguments),
    /// Shows where a run stands.
    #[command(after_help = "Example:\n  pontoon status my-run/run")]
    Status(status::Arguments),
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
    match &arguments.command {
        Command::Devices(arguments) => commands::devices::run(arguments),
        Command::Data(command) => data::run(command),
        Command::Tokenizer(command) => tokenizer::run(command),
        Command::New(arguments) => new::run(arguments),
        Command::Train(arguments) => train::run(arguments),
        Command::Status(arguments) => status::run(arguments),
    }
}
