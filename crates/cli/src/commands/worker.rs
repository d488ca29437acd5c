//! `pontoon worker`: one device of a supervised run. Started by `pontoon train`, not by people.
//!
//! It ends with the pipe its commands come through. Read next: `train.rs`, the other side.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use pontoon_fleet::exchange::Exchange;
use pontoon_fleet::protocol::{Report, Trouble};
use pontoon_fleet::worker::{Progress, Reports, serve};
use pontoon_fleet::world::{Launching, SystemClock};
use pontoon_sim::chaos::{ChaosDevice, ChaosReplica, Injector, Numbered, Place, Plan};
use pontoon_train::{RunConfig, TrainingReplica, WorkerRun};

use super::show;
use crate::{devices, snapshot_place};

/// How often it says how far it has come.
const BEAT: Duration = Duration::from_millis(50);

/// The arguments of `pontoon worker`.
#[derive(Args)]
pub struct Arguments {
    /// The run folder.
    dir: PathBuf,
    /// Where snapshots are.
    #[arg(long)]
    snapshots: PathBuf,
    /// The device.
    #[arg(long)]
    device: String,
    /// The number of the shared memory.
    #[arg(long)]
    exchange: i32,
    /// Faults to inject, as JSON.
    #[arg(long)]
    chaos: Option<String>,
}

/// Works until it is told to stop.
pub fn run(arguments: &Arguments) -> Result<()> {
    // Ctrl-C reaches every process of a terminal; the supervisor says when it is over.
    ctrlc::set_handler(|| {}).context("cannot catch Ctrl-C")?;
    let reports = Reports::new(Box::new(std::io::stdout()));
    let (lines, commands) = mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            if lines.send(line).is_err() {
                return;
            }
        }
        // Nobody needs the work in progress any more.
        std::process::exit(0);
    });
    let progress = Arc::new(Progress::default());
    let (of, to) = (Arc::clone(&progress), reports.clone());
    std::thread::spawn(move || {
        while to.say(&of.beat()).is_ok() {
            std::thread::sleep(BEAT);
        }
    });
    let work = || -> Result<()> {
        let config = RunConfig::read(&arguments.dir.join("run.toml"), &[])?;
        let mut backend = devices::open(&arguments.device)?;
        // A worker only reads them.
        let disk = snapshot_place::disk_of(&arguments.snapshots, &arguments.dir.join("upload"))?;
        let run = WorkerRun {
            config,
            snapshots: arguments.snapshots.clone(),
            exchange: Exchange::inherit(arguments.exchange)
                .context("cannot open the memory shared with the supervisor")?,
            progress,
            disk: &*disk,
            clock: &SystemClock,
        };
        let (commands, process) = (commands.into_iter(), std::process::id());
        let Some(faults) = &arguments.chaos else {
            let mut replica = TrainingReplica::new(run, backend.as_mut())?;
            return Ok(serve(&mut replica, commands, &reports, process)?);
        };
        let faults = serde_json::from_str(faults).context("--chaos")?;
        let (place, clock) = (Arc::new(Place::default()), &SystemClock);
        let injector =
            Injector { faults, place: Arc::clone(&place), reports: reports.clone(), clock };
        let mut device = ChaosDevice::new(backend.as_mut(), injector);
        let mut replica = ChaosReplica::new(TrainingReplica::new(run, &mut device)?, place);
        Ok(serve(&mut replica, commands, &reports, process)?)
    };
    if let Err(error) = work() {
        let text = show::error(&error);
        reports.say(&Report::Failed { trouble: Trouble::Run, text })?;
    }
    Ok(())
}

/// What every worker of a run is started with.
pub struct Command<'a> {
    /// The run folder.
    pub dir: &'a Path,
    /// Where snapshots are.
    pub snapshots: &'a Path,
    /// Faults to inject.
    pub chaos: Option<&'a Plan>,
}

impl Command<'_> {
    /// The command line that starts one.
    pub fn of(&self, what: &Launching) -> std::process::Command {
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("pontoon"));
        let mut command = std::process::Command::new(program);
        command.arg("worker").arg(self.dir).arg("--snapshots").arg(self.snapshots);
        command.arg("--device").arg(&what.device);
        command.arg("--exchange").arg(what.exchange.to_string());
        if let Some(plan) = self.chaos {
            let to_come = |(index, _): &&Numbered| !what.injected.contains(index);
            let faults: Vec<&Numbered> = plan.of_worker(what.worker).filter(to_come).collect();
            let faults = serde_json::to_string(&faults).expect("faults are plain values");
            command.arg("--chaos").arg(faults);
        }
        command
    }
}
