//! Requests to a live run through a socket in its folder: one JSON object a line, answered by one.
//!
//! Carries them only: who listens decides what becomes of them. A socket that a killed process
//! left behind answers nobody and is replaced by the next. Read next: `world.rs` for the trait.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::world::Control;

/// The socket's name in a run folder.
pub const SOCKET: &str = "control.sock";
/// A request is a few words and device names; longer lines are no request.
const LINE_BYTES: u64 = 1 << 16;
/// Callers at a time: people and scripts are few, and each has a thread here.
const CALLERS: u32 = 16;
/// An ending run waits so long for its last answers to be written; a caller that does not read
/// must not keep it.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// A socket's address holds no longer path than this on any system we know.
const ADDRESS_BYTES: usize = 100;

/// What can be asked of a live run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Write a snapshot at the next step boundary and end; answered when that is done.
    Stop,
    /// Go on, on other devices; answered when it does, or when they are refused.
    Move {
        /// The devices.
        to: Vec<String>,
    },
    /// Say where the run stands.
    Status,
}

/// What a live run answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// One line for people.
    pub text: String,
    /// Facts for programs, by name.
    #[serde(flatten)]
    pub facts: Map<String, Value>,
}

impl Answer {
    /// It was done.
    pub fn done(text: impl Into<String>) -> Answer {
        Answer { ok: true, text: text.into(), facts: Map::new() }
    }

    /// It was not, and nothing has changed.
    pub fn refused(text: impl Into<String>) -> Answer {
        Answer { ok: false, text: text.into(), facts: Map::new() }
    }

    /// Adds a fact.
    pub fn with(mut self, name: &str, fact: impl Into<Value>) -> Answer {
        self.facts.insert(name.to_owned(), fact.into());
        self
    }
}

/// A request whose caller waits. Dropping it tells the caller that the run has ended.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    answer: Sender<Answer>,
}

impl Asked {
    /// A request, and where its answer will be sent.
    pub fn new(request: Request, answer: Sender<Answer>) -> Asked {
        Asked { request, answer }
    }

    /// Answers.
    pub fn answer(self, answer: Answer) {
        // A caller that has hung up is owed nothing.
        let _ = self.answer.send(answer);
    }
}

/// Reaches live runs of this machine through the socket in their folder.
#[derive(Clone, Copy, Debug, Default)]
pub struct ControlSocket;

impl Control for ControlSocket {
    fn listen(&self, dir: &Path, to: Sender<Asked>) -> io::Result<Box<dyn Send>> {
        let address = Address::of(dir)?;
        match std::fs::remove_file(&address.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&address.path)?;
        let calls = Arc::new(Calls::default());
        let of = Arc::clone(&calls);
        std::thread::spawn(move || {
            for caller in listener.incoming() {
                if of.over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(caller) = caller else { continue };
                let (of, to) = (Arc::clone(&of), to.clone());
                if of.begin() {
                    std::thread::spawn(move || {
                        // A caller that hangs up half way has lost its interest.
                        let _ = attend(&caller, &to);
                        of.end();
                    });
                }
            }
        });
        Ok(Box::new(Listening { address, calls }))
    }

    fn ask(&self, dir: &Path, request: &Request) -> io::Result<Option<Answer>> {
        let address = Address::of(dir)?;
        let mut stream = match UnixStream::connect(&address.path) {
            Ok(stream) => stream,
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => return Ok(None),
                _ => return Err(error),
            },
        };
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        if answer.is_empty() {
            let text = "the run ended before it answered";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
        }
        Ok(Some(serde_json::from_str(&answer)?))
    }
}

/// Takes one caller's requests until it hangs up.
fn attend(caller: &UnixStream, to: &Sender<Asked>) -> io::Result<()> {
    let mut lines = BufReader::new(caller);
    let mut writer = caller;
    loop {
        let mut line = String::new();
        if Read::by_ref(&mut lines).take(LINE_BYTES).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Err(error) => Answer::refused(format!("this is no request: {error}")),
            Ok(request) => {
                let (answer, answered) = mpsc::channel();
                let over = || Answer::refused("the run ended before it could answer");
                match to.send(Asked::new(request, answer)) {
                    Ok(()) => answered.recv().unwrap_or_else(|_| over()),
                    Err(_) => over(),
                }
            }
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        writer.write_all(&line)?;
        writer.flush()?;
    }
}

/// The callers that are being attended to.
#[derive(Default)]
struct Calls {
    over: AtomicBool,
    count: Mutex<u32>,
    fewer: Condvar,
}

impl Calls {
    fn begin(&self) -> bool {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let room = *count < CALLERS;
        *count += u32::from(room);
        room
    }

    fn end(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.fewer.notify_all();
    }
}

struct Listening {
    address: Address,
    calls: Arc<Calls>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.calls.over.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for callers; one that is gone needs no waking.
        let _ = UnixStream::connect(&self.address.path);
        // What cannot be removed answers nobody, and the next run replaces it.
        let _ = std::fs::remove_file(&self.address.path);
        let count = self.calls.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.calls.fewer.wait_timeout_while(count, LAST_ANSWERS, |count| *count > 0);
        drop(waited);
    }
}

/// Where the socket of a folder is, also where the folder's path is too long for an address.
struct Address {
    path: PathBuf,
    /// The folder, which keeps a path through its descriptor alive.
    _folder: Option<File>,
}

impl Address {
    fn of(dir: &Path) -> io::Result<Address> {
        let path = dir.join(SOCKET);
        if path.as_os_str().as_bytes().len() <= ADDRESS_BYTES {
            return Ok(Address { path, _folder: None });
        }
        let folder = File::open(dir)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()));
        Ok(Address { path, _folder: Some(folder) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every request with its own words.
    fn echo(dir: &Path) -> Box<dyn Send> {
        let (to, asked) = mpsc::channel::<Asked>();
        let listening = ControlSocket.listen(dir, to).unwrap();
        std::thread::spawn(move || {
            for asked in asked {
                let text = format!("{:?}", asked.request);
                asked.answer(Answer::done(text).with("step", 7));
            }
        });
        listening
    }

    #[test]
    fn a_request_reaches_the_run_and_its_answer_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a folder with a long name, ".repeat(6));
        std::fs::create_dir(&deep).unwrap();
        for dir in [dir.path(), &deep] {
            assert_eq!(ControlSocket.ask(dir, &Request::Status).unwrap(), None);
            let listening = echo(dir);
            let request = Request::Move { to: vec!["cpu".to_owned()] };
            let answer = ControlSocket.ask(dir, &request).unwrap().unwrap();
            assert_eq!(answer, Answer::done(format!("{request:?}")).with("step", 7));
            drop(listening);
            assert_eq!(ControlSocket.ask(dir, &Request::Status).unwrap(), None);
            assert!(!dir.join(SOCKET).exists());
        }
    }

    #[test]
    fn what_is_no_request_is_refused_in_a_line_and_the_next_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let _listening = echo(dir.path());
        let mut stream = UnixStream::connect(dir.path().join(SOCKET)).unwrap();
        stream.write_all(b"{\"do\":\"dance\"}\nnonsense\n{\"do\":\"stop\"}\n").unwrap();
        let mut answers = BufReader::new(stream).lines();
        let mut next =
            || serde_json::from_str::<Answer>(&answers.next().unwrap().unwrap()).unwrap();
        assert!(next().text.contains("unknown variant `dance`"));
        assert!(!next().ok);
        assert_eq!(next().text, "Stop");
    }

    #[test]
    fn a_socket_that_a_killed_run_left_behind_is_replaced_and_nobody_answers_on_it() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(dir.path().join(SOCKET)).unwrap());
        assert_eq!(ControlSocket.ask(dir.path(), &Request::Stop).unwrap(), None);
        let _listening = echo(dir.path());
        assert!(ControlSocket.ask(dir.path(), &Request::Stop).unwrap().unwrap().ok);
    }

    #[test]
    fn a_caller_whose_run_ends_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let (to, asked) = mpsc::channel::<Asked>();
        let listening = ControlSocket.listen(dir.path(), to).unwrap();
        let dir = dir.path().to_owned();
        let caller = std::thread::spawn(move || ControlSocket.ask(&dir, &Request::Stop));
        drop(asked.recv().unwrap());
        let answer = caller.join().unwrap().unwrap().unwrap();
        assert!(!answer.ok && answer.text.contains("ended"), "{answer:?}");
        drop(listening);
    }
}
