//! `pontoon data prepare`: texts to shards.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use pontoon_train::data::{Import, Prepare};

use super::show;

/// What is done with data.
#[derive(Subcommand)]
pub enum Command {
    /// Tokenises txt, md, jsonl (also .gz and .zst) and parquet files into shards.
    #[command(after_help = "Example:\n  pontoon data prepare corpus/ more.jsonl.zst \
                            --tokenizer tokenizer.json --out shards")]
    Prepare(PrepareArguments),
}

/// The arguments of `pontoon data prepare`.
#[derive(Args)]
pub struct PrepareArguments {
    /// Files, folders, or patterns with * and ?.
    #[arg(required = true)]
    inputs: Vec<String>,
    /// The tokenizer.json to use.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// The folder of shards to make.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The field or column that holds the text.
    #[arg(long, default_value = "text")]
    field: String,
    /// The share of documents put aside in OUT/valid.
    #[arg(long, default_value_t = 0.0)]
    valid_fraction: f32,
    /// Broken records that may be left out before the command fails.
    #[arg(long, default_value_t = 100)]
    broken_max: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs a data command.
pub fn run(command: &Command) -> Result<()> {
    let Command::Prepare(arguments) = command;
    let share = arguments.valid_fraction;
    ensure!((0.0..1.0).contains(&share), "--valid-fraction should be in [0, 1) but is {share}");
    let import = Import::open(&arguments.inputs, &arguments.field, arguments.broken_max)?;
    let prepare = Prepare {
        import: &import,
        tokenizer: &arguments.tokenizer,
        out: &arguments.out,
        valid_fraction: share,
    };
    let done = import.bytes_done();
    let prepared = show::with_bytes(import.bytes_total(), &done, || prepare.run())?;
    if arguments.json {
        println!("{}", serde_json::to_string(&prepared)?);
        return Ok(());
    }
    for example in &prepared.broken_examples {
        eprintln!("left out {example}");
    }
    if prepared.end_token.is_none() {
        eprintln!("the tokenizer has no token that ends a document; documents only border");
    }
    eprintln!(
        "{} documents, {} tokens in {}; {} documents for validation; {} records left out",
        prepared.documents,
        show::count(prepared.tokens as f64),
        arguments.out.display(),
        prepared.valid_documents,
        prepared.broken,
    );
    Ok(())
}
