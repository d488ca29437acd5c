//! `pontoon tokenizer train`: a byte-level BPE vocabulary from texts.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use pontoon_train::data::{Import, train_tokenizer};

use super::show;

/// What is done with tokenizers.
#[derive(Subcommand)]
pub enum Command {
    /// Trains a byte-level BPE tokenizer, with a chat template beside it.
    #[command(after_help = "Example:\n  pontoon tokenizer train corpus/ --vocab 8192 \
                            --out tokenizer.json")]
    Train(TrainArguments),
}

/// The arguments of `pontoon tokenizer train`.
#[derive(Args)]
pub struct TrainArguments {
    /// Files, folders, or patterns with * and ?.
    #[arg(required = true)]
    inputs: Vec<String>,
    /// Tokens of the vocabulary, special ones included.
    #[arg(long, value_name = "N")]
    vocab: usize,
    /// The tokenizer.json to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The field or column that holds the text.
    #[arg(long, default_value = "text")]
    field: String,
    /// Broken records that may be left out before the command fails.
    #[arg(long, default_value_t = 100)]
    broken_max: u64,
}

/// Runs a tokenizer command.
pub fn run(command: &Command) -> Result<()> {
    let Command::Train(arguments) = command;
    let import = Import::open(&arguments.inputs, &arguments.field, arguments.broken_max)?;
    let done = import.bytes_done();
    let trained = show::with_bytes(import.bytes_total(), &done, || {
        train_tokenizer(&import, arguments.vocab, &arguments.out)
    })?;
    for example in &trained.imported.examples {
        eprintln!("left out {example}");
    }
    let (tokens, size) = (trained.vocabulary, show::bytes(trained.text_bytes as f64));
    eprintln!("{tokens} tokens from {size} of text in {}", arguments.out.display());
    if tokens < arguments.vocab {
        eprintln!("the text holds no more pairs that occur twice; more text makes more tokens");
    }
    Ok(())
}
