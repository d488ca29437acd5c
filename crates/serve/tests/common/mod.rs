//! What the tests of serving share: a small random model, devices that fail on demand, and the
//! plainest HTTP client.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]
#![allow(dead_code, reason = "no test file uses all of it")]

pub mod wire;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::time::Duration;

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{
    ChatTemplate, HostTensors, HostWeights, Model, SamplingSettings, Tokenizer, preset,
};
use pontoon_ops::{Backend, DType, DeviceError, DeviceErrorKind, DeviceInfo, Op, OpName};
use pontoon_serve::engine::device::DeviceOptions;
use pontoon_serve::engine::draft::Speculation;
use pontoon_serve::engine::request::{Event, Generate, Request, Scored, Task, Ticket};
use pontoon_serve::pool::agreement::Distance;
use pontoon_serve::pool::{Pool, PoolParts};
use pontoon_serve::{App, AppParts, Limits, ServerOptions, serve};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// A number from the environment, or what a quick test takes.
pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Tells what a long test has found: a line that scripts look for.
pub fn report(value: &Value) {
    println!("report: {value}");
}

/// A million random parameters on the tests' tokenizer.
pub struct Small {
    pub tokenizer: Tokenizer,
    pub model: Arc<Model>,
    pub weights: Arc<HostWeights>,
    /// The share of requests that its pools score again.
    pub audit_share: f64,
    /// Origins whose pages may ask its servers.
    pub cors_origins: Vec<String>,
}

impl Small {
    pub fn new() -> Small {
        let folder =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data/tokenizer");
        // No token ends a text, so lengths are those asked for.
        let tokenizer = Tokenizer::from_folder(&folder).unwrap().with_eos(vec![299]);
        let config = preset("qwen3-1m").unwrap().with_vocab_size(tokenizer.vocab_size());
        let model = Arc::new(Model::new(config).unwrap());
        let weights = Arc::new(model.initialise(7));
        Small { tokenizer, model, weights, audit_share: 0.05, cors_origins: Vec::new() }
    }

    pub fn options(&self) -> DeviceOptions {
        DeviceOptions {
            dtype: DType::F32,
            context: 512,
            sequences: 8,
            blocks: 128,
            vocabulary: self.tokenizer.vocab_size(),
            step_deadline: Duration::from_secs(60),
            speculation: Speculation::Off,
            draft_tokens: 0,
        }
    }

    /// A pool of CPU devices, some of which may be set to fail.
    pub fn pool(&self, devices: &[&str], options: DeviceOptions, faults: &Arc<Faults>) -> Pool {
        let faults = Arc::clone(faults);
        let open = move |name: &str| -> Result<Box<dyn Backend>, String> {
            // A name may say another instruction set, which is another numeric class.
            let isa = name.ends_with("/portable").then_some(Isa::PORTABLE);
            let options = CpuOptions { threads: Some(1), isa };
            let inner = CpuBackend::new(options).map_err(|error| error.to_string())?;
            let mut info = inner.info().clone();
            info.device = name.to_owned();
            Ok(Box::new(Faulty { inner, info, faults: Arc::clone(&faults) }))
        };
        let float = Model::new(self.model.config.clone()).unwrap();
        Pool::start(PoolParts {
            devices: devices.iter().map(|&name| name.to_owned()).collect(),
            open: Arc::new(open),
            model: Arc::clone(&self.model),
            weights: Arc::new(HostTensors::new(float, HostWeights::clone(&self.weights))),
            adapters: None,
            options,
            rejoin_after: Duration::from_millis(20),
            limits: Arc::new(|spread| Distance {
                worst: 1e-4 * spread,
                typical: 1e-5 * spread,
                divergence: 1e-9,
            }),
            audit_share: self.audit_share,
            on_event: None,
        })
        .unwrap()
    }

    /// A server on a free port.
    pub fn server(&self, pool: Pool) -> Server {
        self.server_with(pool, Vec::new(), Limits::default())
    }

    pub fn server_with(&self, pool: Pool, api_keys: Vec<String>, limits: Limits) -> Server {
        let app = App::new(AppParts {
            model_name: "small".to_owned(),
            tokenizer: self.tokenizer.clone(),
            template: Some(ChatTemplate::from_source(TEMPLATE, serde_json::Map::new()).unwrap()),
            pool: pool.clone(),
            api_keys,
            limits,
            sampling_defaults: SamplingSettings::default(),
            cors_origins: self.cors_origins.clone(),
        });
        let (sender, receiver) = std::sync::mpsc::channel();
        let on_listening = Box::new(move |listening| sender.send(listening).unwrap());
        let options = ServerOptions { host: "127.0.0.1".to_owned(), port: 0, on_listening };
        let thread = std::thread::spawn(move || serve(app, options).unwrap());
        let listening = receiver.recv().unwrap();
        Server { address: listening.address, stop: listening.stop, thread: Some(thread), pool }
    }
}

/// A template that shows roles, tools and whether to think.
pub const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}\
    {% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}\
    {% if add_generation_prompt %}<assistant>\
    {% if enable_thinking %}<think>\n{% endif %}{% endif %}";

/// Which devices are to fail, and when.
#[derive(Default)]
pub struct Faults {
    /// Launches until the device of this name fails; below zero: it does not.
    pub launches: std::sync::Mutex<Vec<(String, Arc<AtomicI64>, Failure)>>,
    released: std::sync::OnceLock<()>,
}

/// How a device fails.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// With an error.
    Error,
    /// It panics.
    Panic,
    /// It does not come back for a long time.
    Hang,
    /// From here on, one bit of a product in every list of operations is wrong.
    Lie,
    /// It goes on when the test says so.
    Hold,
}

impl Faults {
    pub fn none() -> Arc<Faults> {
        Arc::new(Faults::default())
    }

    /// Lets a device fail at a launch counted from now, once.
    pub fn set(&self, device: &str, after_launches: i64, failure: Failure) {
        let counter = Arc::new(AtomicI64::new(after_launches));
        self.launches.lock().unwrap().push((device.to_owned(), counter, failure));
    }

    /// Lets devices fail no more.
    pub fn clear(&self) {
        self.launches.lock().unwrap().clear();
    }

    /// Lets devices that are held go on.
    pub fn release(&self) {
        self.released.set(()).unwrap();
    }

    fn hit(&self, device: &str) -> Option<Failure> {
        let list = self.launches.lock().unwrap();
        let counts = |entry: &&(String, Arc<AtomicI64>, Failure)| {
            let left = if entry.0 == device { entry.1.fetch_sub(1, SeqCst) } else { 1 };
            left == 0 || (left < 0 && entry.2 == Failure::Lie)
        };
        list.iter().find(counts).map(|entry| entry.2)
    }
}

struct Faulty {
    inner: CpuBackend,
    info: DeviceInfo,
    faults: Arc<Faults>,
}

impl Faulty {
    /// Flips a bit in the first number of the last product but one.
    fn lie(&mut self, ops: &[Op]) -> Result<(), DeviceError> {
        let products = ops.iter().enumerate().filter(|(_, op)| op.name() == OpName::Matmul);
        let at = products.map(|(at, _)| at).nth_back(1).unwrap_or(0);
        let (before, after) = ops.split_at(at + 1);
        self.inner.launch_all(before)?;
        let operands = before[at].operands();
        let written = operands.iter().find(|operand| operand.access.writes()).unwrap();
        let mut bytes = [0_u8; 4];
        self.inner.download(written.view.buffer, written.view.byte_offset, &mut bytes)?;
        bytes[2] ^= 0x40;
        self.inner.upload(written.view.buffer, written.view.byte_offset, &bytes)?;
        self.inner.launch_all(after)
    }
}

impl Backend for Faulty {
    pontoon_ops::delegate!(inner: alloc free upload download supports launch wait memory_used);

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn launch_all(&mut self, ops: &[Op]) -> Result<(), DeviceError> {
        match self.faults.hit(&self.info.device) {
            None => self.inner.launch_all(ops),
            Some(Failure::Error) => {
                Err(DeviceError::new(DeviceErrorKind::Lost, "the test took the device away"))
            }
            Some(Failure::Panic) => panic!("the test lets the device's thread panic"),
            Some(Failure::Hang) => {
                std::thread::park_timeout(Duration::from_secs(3600));
                self.inner.launch_all(ops)
            }
            Some(Failure::Lie) => self.lie(ops),
            Some(Failure::Hold) => {
                self.faults.released.wait();
                self.inner.launch_all(ops)
            }
        }
    }
}

/// A request to continue a prompt.
pub fn generate(prompt: Vec<u32>, sampling: SamplingSettings) -> Request {
    Request {
        prompt,
        adapter: None,
        task: Task::Generate(Generate {
            sampling,
            choice: 0,
            end_tokens: Vec::new(),
            tokens_min: 0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
            prompt_logprobs: None,
            constraint: None,
        }),
    }
}

/// Gives a request to a pool.
pub fn submit(pool: &Pool, request: Request) -> UnboundedReceiver<(usize, Event)> {
    let (sender, receiver) = unbounded_channel();
    pool.submit(Ticket::new(request, 0, sender));
    receiver
}

/// Waits for a request's end; gives its tokens and the devices that worked on it.
pub fn collect(mut receiver: UnboundedReceiver<(usize, Event)>) -> (Vec<Scored>, Vec<String>) {
    let (mut tokens, mut devices) = (Vec::new(), Vec::new());
    while let Some((_, event)) = receiver.blocking_recv() {
        match event {
            Event::Started { device, .. } => devices.push(device.to_string()),
            Event::Token(scored) => tokens.push(scored),
            Event::Finished(_) => return (tokens, devices),
            Event::Failed(reason) => panic!("the request failed: {reason}"),
            Event::Prompt(_) | Event::Embedding(_) => {}
        }
    }
    panic!("the answer has no end");
}

/// A server that runs in this process.
pub struct Server {
    pub address: SocketAddr,
    pub stop: tokio::sync::mpsc::UnboundedSender<()>,
    pub thread: Option<std::thread::JoinHandle<()>>,
    pub pool: Pool,
}

impl Server {
    /// Sends a request, reads the whole response.
    pub fn ask(&self, method: &str, path: &str, headers: &[&str], body: &str) -> (u16, String) {
        let mut stream = self.send(method, path, headers, body);
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        parse(&bytes)
    }

    /// Sends a request only.
    pub fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let more: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{more}\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        // A server that refuses early closes before all is sent.
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
        stream
    }

    /// The head of a response in small letters, and its status.
    pub fn head(&self, method: &str, path: &str, headers: &[&str]) -> (String, u16) {
        let mut stream = self.send(method, path, headers, "");
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        let head = text.split("\r\n\r\n").next().unwrap().to_owned();
        (head, parse(&bytes).0)
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        self.ask("GET", path, &[], "")
    }

    /// Posts JSON, expects success, gives JSON.
    pub fn post(&self, path: &str, body: &Value) -> Value {
        let (status, text) = self.ask("POST", path, &[], &body.to_string());
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Posts JSON, expects an error, gives its status and object.
    pub fn fails(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.ask("POST", path, &[], &body.to_string());
        assert!(status >= 400, "{path}: {text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        (status, value["error"].clone())
    }

    /// Posts JSON, gives the data of every event of the stream.
    pub fn events(&self, path: &str, body: &Value) -> Vec<String> {
        let (status, text) = self.ask("POST", path, &[], &body.to_string());
        assert_eq!(status, 200, "{path}: {text}");
        text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// A metric's value, summed over devices.
    pub fn metric(&self, name: &str) -> f64 {
        let (_, page) = self.get("/metrics");
        let value = |line: &str| {
            let (head, value) = line.rsplit_once(' ')?;
            (head.split('{').next() == Some(name)).then(|| value.parse::<f64>().unwrap())
        };
        page.lines().filter(|line| !line.starts_with('#')).filter_map(value).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

fn parse(bytes: &[u8]) -> (u16, String) {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole response");
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut body = &bytes[end + 4..];
    if !head.contains("transfer-encoding: chunked") {
        return (status, String::from_utf8_lossy(body).into_owned());
    }
    let mut text = Vec::new();
    while let Some(line) = body.windows(2).position(|two| two == b"\r\n") {
        let size = std::str::from_utf8(&body[..line]).unwrap();
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        if size == 0 {
            break;
        }
        text.extend_from_slice(&body[line + 2..][..size]);
        body = &body[line + 2 + size + 2..];
    }
    (status, String::from_utf8_lossy(&text).into_owned())
}
