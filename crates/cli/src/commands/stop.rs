//! `pontoon stop`: asks a live run to save its state at the next step and to end, and waits.
//!
//! The run decides when. Read next: `crates/fleet/src/control.rs`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pontoon_fleet::control::{ControlSocket, Request};
use pontoon_fleet::world::Control;
use serde_json::json;

use super::run_status::{self, Standing};

/// The arguments of `pontoon stop`.
#[derive(Args)]
pub struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Stops it.
pub fn run(arguments: &Arguments) -> Result<()> {
    let dir = &arguments.dir;
    run_status::expect_run(dir)?;
    eprintln!("stopping `{}` at the next step; its state is saved first", dir.display());
    let asked = ControlSocket.ask(dir, &Request::Stop);
    let Some(answer) =
        asked.with_context(|| format!("cannot reach the run in `{}`", dir.display()))?
    else {
        match run_status::standing(dir)? {
            Standing::Running => bail!(
                "the run in `{}` takes no requests; stop its process with Ctrl-C or SIGTERM",
                dir.display()
            ),
            _ => bail!("nothing runs in `{0}`; see `pontoon status {0}`", dir.display()),
        }
    };
    ensure!(answer.ok, "{}", answer.text);
    if arguments.json {
        let step = answer.facts.get("step");
        println!("{}", json!({ "stopped": true, "step": step, "text": answer.text }));
    } else {
        println!("{}", answer.text);
        if answer.text.starts_with("stopped") {
            eprintln!("go on with: pontoon train {} --resume", dir.display());
        }
    }
    Ok(())
}
