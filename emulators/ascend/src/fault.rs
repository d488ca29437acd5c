//! Failing on demand: what can be asked for, when it strikes, and how it shows.
//!
//! A fault is armed for a device, waits for the calls it is about, strikes some number of times and
//! is gone. What each kind is in the words of those who met it stands in the README. Faults come
//! from `inject`, from `pontoonEmuInject` and from the environment variable [`VARIABLE`].

use std::sync::{Mutex, PoisonError};

use serde::Deserialize;

use crate::code;
use crate::failure::{Done, Failure};

/// The environment variable that holds faults as JSON: one object or a list.
pub const VARIABLE: &str = "PONTOON_EMU_FAULTS";

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The stream never goes on; waits run out of time.
    Hang,
    /// A matrix core does not finish (507014).
    AicoreTimeout,
    /// A vector core does not finish (507034).
    VectorTimeout,
    /// The task scheduler does not finish a fused task (507048).
    FftsTimeout,
    /// A matrix core traps (507015).
    AicoreException,
    /// A vector core traps (507035).
    VectorException,
    /// Device memory fails (507053); the address is listed.
    DeviceMemory,
    /// Device memory has an error that cannot be corrected (507054); the address is listed.
    HbmFault,
    /// Device memory may have failed (507055).
    SuspectMemory,
    /// A link between devices fails (507056).
    LinkDown,
    /// A peer may have failed (507057).
    SuspectRemote,
    /// A collective fails again after a retry (507904).
    CollectiveRetry,
    /// The scheduler's heartbeat is lost (507010), for good.
    LostHeartbeat,
    /// The host's link to the device closes (507901), for good.
    SocketClosed,
    /// A task runs out of device memory (207018).
    TaskOutOfMemory,
    /// An allocation finds no memory (207001).
    OutOfMemory,
    /// An operator has no binary for this chip (561003).
    NoKernel,
    /// The package of binaries is not installed (561112).
    NoPackage,
    /// No stream is left (207008).
    NoStream,
    /// No event is left (207007).
    NoEvent,
    /// A symbol is missing, as in an older version; `name` says which.
    SymbolMissing,
    /// A communicator cannot be set up: the port is taken.
    PortTaken,
    /// Freed memory is not given back.
    Leak,
    /// Tasks take `factor` times as long.
    Slow,
    /// Bit `bit` of an output's first element is flipped.
    Bitflip,
    /// An output's first element becomes NaN.
    NanGradient,
    /// Results in 16 bits are cut instead of rounded.
    WrongRounding,
    /// The last elements of what is no whole tile are left out.
    DroppedTail,
    /// Causal attention sees one key behind a row's own.
    CausalEdge,
    /// A sum starts from what stands in the workspace.
    StaleWorkspace,
    /// Sums differ from run to run.
    Nondeterministic,
    /// The two halves of a rotated head change places: in RotaryPositionEmbedding, and where heads
    /// are rotated by products and their difference.
    SwappedRope,
    /// Sums are rounded to bf16 on their way.
    Bf16Accumulation,
    /// Of equal values the one with the higher index wins.
    WrongTie,
    /// Products of more than `rows` rows lose accuracy; fewer do not.
    OnePath,
    /// A row's result depends on how many rows there are.
    BatchVariant,
}

/// One fault as it is asked for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What goes wrong.
    pub kind: Kind,
    /// The device; all devices if absent.
    pub device: Option<i32>,
    /// The operator it is about, such as `aclnnMatmul`, or a part of its name; all if absent.
    pub op: Option<String>,
    /// Calls it is about that pass before it strikes.
    #[serde(default)]
    pub after: u64,
    /// How often it strikes; 0 for always. Quiet defects strike always unless told otherwise.
    pub times: Option<u64>,
    /// How many times as long tasks take.
    #[serde(default = "default_factor")]
    pub factor: f64,
    /// The bit that is flipped, counted from the lowest.
    #[serde(default = "default_bit")]
    pub bit: u32,
    /// The missing symbol.
    pub name: Option<String>,
    /// Rows up to which [`Kind::OnePath`] is accurate.
    #[serde(default = "default_rows")]
    pub rows: u64,
}

fn default_factor() -> f64 {
    5.0
}

fn default_bit() -> u32 {
    14
}

fn default_rows() -> u64 {
    8
}

impl Fault {
    /// A fault of a kind with everything else as by default.
    pub fn new(kind: Kind) -> Fault {
        Fault {
            kind,
            device: None,
            op: None,
            after: 0,
            times: None,
            factor: default_factor(),
            bit: default_bit(),
            name: None,
            rows: default_rows(),
        }
    }

    /// On one device only.
    #[must_use]
    pub fn on(mut self, device: i32) -> Fault {
        self.device = Some(device);
        self
    }

    /// About one operator only.
    #[must_use]
    pub fn about(mut self, op: &str) -> Fault {
        self.op = Some(op.to_owned());
        self
    }

    /// After some calls.
    #[must_use]
    pub fn after(mut self, calls: u64) -> Fault {
        self.after = calls;
        self
    }
}

/// Where in the library a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// When a task runs.
    Task,
    /// When an operator is planned.
    Plan,
    /// When memory is allocated.
    Allocate,
    /// When memory is freed.
    Free,
    /// When a stream is made.
    Stream,
    /// When an event is made.
    Event,
    /// When a symbol is looked up.
    Symbol,
    /// When a communicator is made.
    Connect,
    /// While an operator computes.
    Arithmetic,
}

impl Kind {
    /// Where it strikes.
    pub fn place(self) -> Place {
        match self {
            Kind::OutOfMemory => Place::Allocate,
            Kind::NoKernel | Kind::NoPackage => Place::Plan,
            Kind::NoStream => Place::Stream,
            Kind::NoEvent => Place::Event,
            Kind::SymbolMissing => Place::Symbol,
            Kind::PortTaken => Place::Connect,
            Kind::Leak => Place::Free,
            Kind::WrongRounding
            | Kind::DroppedTail
            | Kind::CausalEdge
            | Kind::StaleWorkspace
            | Kind::Nondeterministic
            | Kind::SwappedRope
            | Kind::Bf16Accumulation
            | Kind::WrongTie
            | Kind::OnePath
            | Kind::BatchVariant => Place::Arithmetic,
            _ => Place::Task,
        }
    }

    /// How often it strikes if nothing is said.
    fn times(self) -> u64 {
        match self {
            Kind::SymbolMissing | Kind::NoKernel | Kind::NoPackage | Kind::Slow | Kind::Leak => 0,
            _ if self.place() == Place::Arithmetic => 0,
            _ => 1,
        }
    }

    /// Code and text of a task, a plan or another call that fails so; none for those that do not
    /// fail at once.
    pub fn failure(self, what: &str) -> Option<Failure> {
        let (code, text) = match self {
            Kind::AicoreTimeout => (code::AICORE_TIMEOUT, "reason=[aicore timeout]"),
            Kind::VectorTimeout => (code::VECTOR_TIMEOUT, "reason=[vector core timeout]"),
            Kind::FftsTimeout => (code::FFTS_TIMEOUT, "reason=[ffts+ timeout]"),
            Kind::AicoreException => (code::AICORE_EXCEPTION, "reason=[aicore exception]"),
            Kind::VectorException => (code::VECTOR_EXCEPTION, "reason=[vector core exception]"),
            Kind::DeviceMemory => (code::DEVICE_MEMORY, "reason=[device mem error]"),
            Kind::HbmFault => (code::HBM_ECC, "reason=[hbm multi-bit ecc error]"),
            Kind::SuspectMemory => (code::SUSPECT_MEMORY, "reason=[suspect device mem error]"),
            Kind::LinkDown => (code::LINK, "reason=[link error]"),
            Kind::SuspectRemote => (code::SUSPECT_REMOTE, "reason=[suspect remote error]"),
            Kind::CollectiveRetry => (code::COLLECTIVE_RETRY, "reason=[hccl op retry failed]"),
            Kind::LostHeartbeat => (code::LOST_HEARTBEAT, "reason=[lost heartbeat]"),
            Kind::SocketClosed => (code::SOCKET_CLOSED, "reason=[hdc disconnect]"),
            Kind::TaskOutOfMemory => (code::DEVICE_OUT_OF_MEMORY, "reason=[device oom]"),
            Kind::OutOfMemory => (code::MEMORY_ALLOCATION, "device memory is used up"),
            Kind::NoKernel => (code::OP_NO_KERNEL, "op has no binary: kernel not found"),
            Kind::NoPackage => (code::OP_NO_PACKAGE, "the kernel package is not installed"),
            Kind::NoStream => (code::NO_STREAM, "no stream resource is left"),
            Kind::NoEvent => (code::NO_EVENT, "no event resource is left"),
            Kind::PortTaken => (code::HCCL_CONNECT, "cannot bind: the port is already in use"),
            _ => return None,
        };
        Some(Failure::new(code, format!("{what}: {text}")))
    }
}

struct Armed {
    fault: Fault,
    passed: u64,
    left: Option<u64>,
}

/// The faults of one device.
#[derive(Default)]
pub struct Faults {
    armed: Mutex<Vec<Armed>>,
}

impl Faults {
    /// Arms a fault.
    pub fn arm(&self, fault: &Fault) {
        let times = fault.times.unwrap_or_else(|| fault.kind.times());
        let left = (times > 0).then_some(times);
        let mut fault = fault.clone();
        if fault.kind == Kind::SymbolMissing {
            fault.op = fault.name.take();
        }
        let armed = Armed { fault, passed: 0, left };
        self.armed.lock().unwrap_or_else(PoisonError::into_inner).push(armed);
    }

    /// Disarms everything.
    pub fn clear(&self) {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The faults that strike a call now.
    pub fn strike(&self, place: Place, name: &str) -> Vec<Fault> {
        let mut armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut struck = Vec::new();
        armed.retain_mut(|armed| {
            let fault = &armed.fault;
            let about = fault.op.as_deref().is_none_or(|op| name.contains(op));
            if fault.kind.place() != place || !about {
                return true;
            }
            armed.passed += 1;
            if armed.passed <= fault.after {
                return true;
            }
            struck.push(fault.clone());
            armed.left = armed.left.map(|left| left - 1);
            armed.left != Some(0)
        });
        struck
    }
}

/// Reads faults from JSON: one object or a list.
pub fn parse(text: &str) -> Done<Vec<Fault>> {
    let one = |value| serde_json::from_value::<Fault>(value);
    let parsed = serde_json::from_str(text).and_then(|value| match value {
        serde_json::Value::Array(list) => list.into_iter().map(one).collect(),
        value => one(value).map(|fault| vec![fault]),
    });
    parsed.map_err(|error| Failure::parameter(format!("faults `{text}`: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_after_the_calls_it_is_about_and_as_often_as_asked() {
        let faults = Faults::default();
        let text = r#"{"kind": "hang", "op": "Matmul", "after": 1, "times": 2}"#;
        faults.arm(&parse(text).unwrap()[0]);
        let strike = |name| faults.strike(Place::Task, name).len();
        let counts = ["aclnnAdd", "aclnnMatmul", "aclnnMatmul", "aclnnMatmul", "aclnnMatmul"];
        assert_eq!(counts.map(strike), [0, 0, 1, 1, 0]);
    }

    #[test]
    fn a_wrong_fault_is_refused_with_its_text() {
        let error = parse(r#"{"kind": "explode"}"#).unwrap_err();
        assert!(error.text.contains("explode"), "{error:?}");
    }
}
