//! What people ask of a run while it lives, between the socket and the loop.
//!
//! Stops are kept here until the run has ended; the rest is the loop's. Read next: `trainer.rs`,
//! `supervised.rs`.

use std::sync::mpsc::{self, Receiver};

use pontoon_fleet::control::{Answer, Asked, Request};

use crate::error::TrainError;
use crate::trainer::{Observer, Run, Summary};

/// The requests of one run, from when its folder is ours until it has ended.
pub(crate) struct Requests {
    asked: Receiver<Asked>,
    stopping: Vec<Asked>,
    /// Held, never read: dropping it closes the socket.
    _listening: Option<Box<dyn Send>>,
}

impl Requests {
    /// Listens in the run folder. A folder that can hold no socket is no reason not to train.
    pub(crate) fn open(run: &Run<'_>, observer: &mut dyn Observer) -> Requests {
        let (to, asked) = mpsc::channel();
        let listening = run.control.listen(&run.dir, to);
        if let Err(error) = &listening {
            let dir = run.dir.display();
            observer.note(&format!("`{dir}` can hold no socket, so nobody can ask: {error}"));
        }
        Requests { asked, stopping: Vec::new(), _listening: listening.ok() }
    }

    /// The next request that is no stop.
    pub(crate) fn next(&mut self) -> Option<Asked> {
        while let Ok(asked) = self.asked.try_recv() {
            match asked.request {
                Request::Stop => self.stopping.push(asked),
                _ => return Some(asked),
            }
        }
        None
    }

    /// Whether someone has asked for a stop.
    pub(crate) fn stop(&self) -> bool {
        !self.stopping.is_empty()
    }

    /// Tells those who asked for a stop how the run ended.
    pub(crate) fn ended(&mut self, result: &Result<Summary, TrainError>) {
        let answer = match result {
            Err(error) => Answer::refused(error.to_string()),
            Ok(summary) => {
                let done = if summary.finished { "finished" } else { "stopped" };
                let text = format!("{done} at step {}; its state is saved", summary.steps);
                let answer = Answer::done(text).with("step", summary.steps);
                answer.with("weights_blake3", summary.weights_blake3.as_str())
            }
        };
        self.stopping.drain(..).for_each(|asked| asked.answer(answer.clone()));
    }
}
