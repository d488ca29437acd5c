//! Workers as real processes: commands go to their standard input, reports come from their
//! standard output. The end of either pipe is the end of the other side.
//!
//! Decides nothing. Read next: `world.rs` for the traits, `supervisor.rs` for who asks.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command as Process, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use crate::protocol::{Command, Report};
use crate::supervisor::Input;
use crate::world::{Launcher, Launching, Link};

/// Starts workers as children of this process.
pub struct Processes<F> {
    /// Makes the command line of a worker.
    pub command: F,
}

impl<F: FnMut(&Launching) -> Process> Launcher for Processes<F> {
    fn launch(&mut self, what: &Launching, to: Sender<Input>) -> io::Result<Box<dyn Link>> {
        let mut process = (self.command)(what);
        let mut child = process.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let commands = child.stdin.take();
        let reports = child.stdout.take().expect("it was asked for");
        let child = Arc::new(Mutex::new(child));
        let (worker, incarnation) = (what.worker, what.incarnation);
        let of = Arc::clone(&child);
        std::thread::spawn(move || {
            for line in BufReader::new(reports).lines().map_while(Result::ok) {
                match serde_json::from_str::<Report>(&line) {
                    // The run is over when nobody listens any more.
                    Ok(report) => {
                        if to.send(Input::Report { worker, incarnation, report }).is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        let cause = format!("it said something that is no report: {error}");
                        let _ = to.send(Input::Gone { worker, incarnation, cause });
                        return;
                    }
                }
            }
            let cause = format!("its process ended: {}", end(&of));
            let _ = to.send(Input::Gone { worker, incarnation, cause });
        });
        Ok(Box::new(Pipe { child, commands }))
    }
}

struct Pipe {
    child: Arc<Mutex<Child>>,
    commands: Option<ChildStdin>,
}

impl Link for Pipe {
    fn send(&mut self, command: &Command) -> io::Result<()> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        match &mut self.commands {
            Some(pipe) => pipe.write_all(&line).and_then(|()| pipe.flush()),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn kill(&mut self) {
        self.commands = None;
        end(&self.child);
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ends a process that may have ended already, and waits until it is gone.
fn end(child: &Mutex<Child>) -> String {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    // It may have ended by itself; then waiting tells how.
    let _ = child.kill();
    match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}
