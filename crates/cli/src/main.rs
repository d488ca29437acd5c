//! The `pontoon` command: parses the command line, runs one command, prints one line on failure.
//!
//! Results go to stdout, words for people to stderr. Commands that are not built yet are not
//! offered. Read next: `commands/`, `devices.rs`.

mod commands;
mod devices;
mod engine;
mod model_source;
mod snapshot_place;
mod steps;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use commands::show;
use commands::{
    bench, bisect, compare, data, demo, eval, export, generate, moving, new, qualify, score, serve,
    simulate, status, stop, tokenizer, train,
};

/// Trains and serves language models on whatever accelerators there are.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows the whole story on this machine, in about a minute.
    #[command(after_help = "Example:\n  pontoon demo --dir story")]
    Demo(demo::Arguments),
    /// Lists every device found.
    #[command(after_help = "Example:\n  pontoon devices --json")]
    Devices(commands::devices::Arguments),
    /// Prepares training data.
    #[command(
        subcommand,
        after_help = "Example:\n  \
            pontoon data prepare corpus/ --tokenizer tokenizer.json --out shards"
    )]
    Data(data::Command),
    /// Makes tokenizers.
    #[command(
        subcommand,
        after_help = "Example:\n  pontoon tokenizer train corpus/ --vocab 8192 --out t.json"
    )]
    Tokenizer(tokenizer::Command),
    /// Writes a run.toml to edit.
    #[command(after_help = "Example:\n  pontoon new qwen3-30m my-run")]
    New(new::Arguments),
    /// Trains a model; what was lost to a crash is made up by --resume, bit for bit.
    #[command(after_help = "Example:\n  pontoon train my-run/run.toml --set train.lr=1e-3")]
    Train(train::Arguments),
    /// Shows where a run stands.
    #[command(after_help = "Example:\n  pontoon status my-run/run --watch")]
    Status(status::Arguments),
    /// Moves a live run to other devices at the next step boundary, once they are seen to agree.
    #[command(after_help = "Example:\n  pontoon move my-run/run --to cpu:isa=avx2,cpu:isa=avx2")]
    Move(moving::Arguments),
    /// Has a live run save its state at the next step and end.
    #[command(after_help = "Example:\n  pontoon stop my-run/run")]
    Stop(stop::Arguments),
    /// Continues a prompt.
    #[command(after_help = "Example:\n  pontoon generate my-run/run -p '57+968=?'")]
    Generate(generate::Arguments),
    /// Prints a text's log-probabilities and perplexity.
    #[command(after_help = "Example:\n  pontoon score my-run/run --text story.txt --json")]
    Score(score::Arguments),
    /// Serves a model behind the OpenAI API.
    #[command(after_help = "Example:\n  pontoon serve my-run/run --port 8080")]
    Serve(serve::Arguments),
    /// Asks problems and counts exact matches.
    #[command(after_help = "Example:\n  pontoon eval my-run/run --task arithmetic")]
    Eval(eval::Arguments),
    /// Writes a folder that Hugging Face transformers loads unchanged.
    #[command(after_help = "Example:\n  pontoon export my-run/run my-model")]
    Export(export::Arguments),
    /// Says whether a device can be trusted, and with what: FIT, FIT WITH LIMITS or UNFIT.
    #[command(after_help = "Example:\n  pontoon qualify --device cpu --model qwen3-30m \
                            --minutes 5 --report cpu.json\n  pontoon qualify \
                            --device cpu,cpu --quick")]
    Qualify(qualify::Arguments),
    /// Certifies that devices agree on a model.
    #[command(
        after_help = "Example:\n  pontoon compare my-run/run --devices cpu,cpu:threads=1 --json"
    )]
    Compare(compare::Arguments),
    /// Finds the first operation on which two devices do not agree.
    #[command(after_help = "Example:\n  pontoon bisect qwen3-1m --devices cpu,cpu:threads=1")]
    Bisect(bisect::Arguments),
    /// Runs the supervisor against a simulated fleet: weeks of faults in seconds.
    #[command(
        after_help = "Examples:\n  pontoon simulate --seed 17\n  pontoon simulate --workers 512 \
                            --days 54 --rate published"
    )]
    Simulate(simulate::Arguments),
    /// One device of a supervised run; `train` starts it.
    #[command(hide = true)]
    Worker(commands::worker::Arguments),
    /// Measures training and decoding against the machine's limits.
    #[command(subcommand, after_help = "Example:\n  pontoon bench decode qwen3-0.6b --dtype bf16")]
    Bench(bench::Command),
}

fn main() -> ExitCode {
    end_quietly_when_nobody_reads();
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", show::error(&error));
            ExitCode::FAILURE
        }
    }
}

/// A reader that has seen enough, as `head` has, is no failure: the standard library's printing
/// would panic.
fn end_quietly_when_nobody_reads() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if text.starts_with("failed printing to stdout") && text.contains("Broken pipe") {
            std::process::exit(0);
        }
        usual(panic);
    }));
}

fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.command {
        Command::Demo(arguments) => demo::run(arguments),
        Command::Devices(arguments) => commands::devices::run(arguments),
        Command::Data(command) => data::run(command),
        Command::Tokenizer(command) => tokenizer::run(command),
        Command::New(arguments) => new::run(arguments),
        Command::Train(arguments) => train::run(arguments),
        Command::Status(arguments) => status::run(arguments),
        Command::Move(arguments) => moving::run(arguments),
        Command::Stop(arguments) => stop::run(arguments),
        Command::Generate(arguments) => generate::run(arguments),
        Command::Score(arguments) => score::run(arguments),
        Command::Serve(arguments) => serve::run(arguments),
        Command::Eval(arguments) => eval::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Qualify(arguments) => qualify::run(arguments),
        Command::Compare(arguments) => compare::run(arguments),
        Command::Bisect(arguments) => bisect::run(arguments),
        Command::Simulate(arguments) => simulate::run(arguments),
        Command::Worker(arguments) => commands::worker::run(arguments),
        Command::Bench(command) => bench::run(command),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Arguments;

    fn check(command: &clap::Command, path: &str) {
        let path = format!("{path} {}", command.get_name());
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("Example"), "`{path} --help` shows no example");
        for part in command.get_subcommands().filter(|part| !part.is_hide_set()) {
            check(part, &path);
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        let all = Arguments::command();
        all.get_subcommands().filter(|part| !part.is_hide_set()).for_each(|part| check(part, ""));
    }
}
