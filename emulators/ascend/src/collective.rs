//! Collectives among emulated devices of one process: every rank brings its bytes, and each then
//! computes its own result in the order of ranks, so results never depend on who came first.
//!
//! There is no algorithm of rings or trees here and no network: links fail only on demand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use half::{bf16, f16};

use crate::code;
use crate::device::stream::fresh_number;
use crate::failure::{Done, Failure};

/// How long ranks wait for each other while they connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(120);
/// The environment variable that limits a collective, in seconds, as for the chip.
const EXECUTION_VARIABLE: &str = "HCCL_EXEC_TIMEOUT";
/// The limit if it is not set.
const EXECUTION_SECONDS: u64 = 1836;
/// How often those who wait look whether they were called off.
const LOOK: Duration = Duration::from_millis(10);

/// What each rank must bring alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The collective.
    pub what: What,
    /// Elements as the call counts them.
    pub count: u64,
    /// `HcclDataType`.
    pub dtype: i32,
    /// `HcclReduceOp`; 255 where nothing is reduced.
    pub op: i32,
}

/// A collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The sum of all, to all.
    AllReduce,
    /// All parts, to all.
    AllGather,
    /// The sum of all, a part to each.
    ReduceScatter,
    /// The root's bytes, to all.
    Broadcast(u32),
    /// Nothing but waiting.
    Barrier,
}

struct Round {
    kind: Kind,
    brought: Vec<Option<Arc<Vec<u8>>>>,
    taken: usize,
}

#[derive(Default)]
struct State {
    joined: Vec<bool>,
    rounds: HashMap<u64, Round>,
}

/// Ranks that belong together.
pub struct Group {
    size: usize,
    state: Mutex<State>,
    told: Condvar,
}

/// One rank's end of a group.
pub struct Communicator {
    /// Its rank.
    pub rank: usize,
    group: Arc<Group>,
    calls: AtomicU64,
    /// What `HcclGetCommAsyncError` says.
    pub failed: AtomicI32,
    /// Whether it is suspended.
    pub suspended: AtomicBool,
}

static GROUPS: LazyLock<Mutex<HashMap<u64, Arc<Group>>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Group {
    /// A group of `size` ranks, none of which has joined.
    pub fn new(size: usize) -> Arc<Group> {
        let state = State { joined: vec![false; size], rounds: HashMap::new() };
        Arc::new(Group { size, state: Mutex::new(state), told: Condvar::new() })
    }

    /// A number by which ranks find each other.
    pub fn announce() -> u64 {
        fresh_number()
    }

    /// The group of a number, made by whoever comes first.
    pub fn find(number: u64, size: usize) -> Done<Arc<Group>> {
        let mut groups = lock(&GROUPS);
        let group = groups.entry(number).or_insert_with(|| Group::new(size));
        if group.size != size {
            let text = format!("the group has {} ranks, not {size}", group.size);
            return Err(Failure::new(code::HCCL_PARAMETER, text));
        }
        Ok(Arc::clone(group))
    }

    /// Joins as a rank.
    pub fn join(self: &Arc<Group>, rank: usize) -> Done<Communicator> {
        let mut state = lock(&self.state);
        match state.joined.get_mut(rank) {
            Some(joined) if !*joined => *joined = true,
            _ => {
                let text = format!("rank {rank} of {} has joined or does not exist", self.size);
                return Err(Failure::new(code::HCCL_PARAMETER, text));
            }
        }
        drop(state);
        self.told.notify_all();
        Ok(Communicator {
            rank,
            group: Arc::clone(self),
            calls: AtomicU64::new(0),
            failed: AtomicI32::new(code::SUCCESS),
            suspended: AtomicBool::new(false),
        })
    }

    /// Waits until all ranks have joined.
    pub fn wait_joined(&self) -> Done {
        let deadline = Instant::now() + CONNECT_LIMIT;
        let mut state = lock(&self.state);
        while !state.joined.iter().all(|joined| *joined) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing: Vec<usize> =
                    (0..self.size).filter(|&rank| !state.joined[rank]).collect();
                let text = format!("ranks {missing:?} did not connect");
                return Err(Failure::new(code::HCCL_TIMEOUT, text));
            }
            let waited = self.told.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Brings a rank's bytes and waits for everyone's.
    fn exchange(
        &self,
        (call, rank): (u64, usize),
        (kind, bytes): (Kind, Vec<u8>),
        is_called_off: &dyn Fn() -> bool,
    ) -> Done<Vec<Arc<Vec<u8>>>> {
        let seconds = std::env::var(EXECUTION_VARIABLE).ok().and_then(|text| text.parse().ok());
        let deadline = Instant::now() + Duration::from_secs(seconds.unwrap_or(EXECUTION_SECONDS));
        let mut state = lock(&self.state);
        let fresh = || Round { kind, brought: vec![None; self.size], taken: 0 };
        let round = state.rounds.entry(call).or_insert_with(fresh);
        if round.kind != kind {
            let text = format!("ranks disagree: {:?} here, {:?} there", kind, round.kind);
            return Err(Failure::new(code::SUSPECT_REMOTE, text));
        }
        round.brought[rank] = Some(Arc::new(bytes));
        self.told.notify_all();
        loop {
            let round = state.rounds.get_mut(&call).expect("a round stays until all have taken");
            if round.brought.iter().all(Option::is_some) {
                let all = round.brought.iter().flatten().cloned().collect();
                round.taken += 1;
                if round.taken == self.size {
                    state.rounds.remove(&call);
                }
                return Ok(all);
            }
            if is_called_off() || Instant::now() >= deadline {
                let text = "a rank did not come: reason=[suspect remote error]";
                return Err(Failure::new(code::SUSPECT_REMOTE, text));
            }
            let waited = self.told.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Communicator {
    /// Ranks in the group.
    pub fn size(&self) -> usize {
        self.group.size
    }

    /// Numbers a call; ranks make the same calls in the same order.
    pub fn call(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    /// Exchanges bytes and computes this rank's result.
    pub fn meet(
        &self,
        call: u64,
        (kind, bytes): (Kind, Vec<u8>),
        is_called_off: &dyn Fn() -> bool,
    ) -> Done<Vec<u8>> {
        let all = self.group.exchange((call, self.rank), (kind, bytes), is_called_off)?;
        match kind.what {
            What::Barrier => Ok(Vec::new()),
            What::Broadcast(root) => Ok(all[root as usize].to_vec()),
            What::AllGather => Ok(all.iter().flat_map(|part| part.iter().copied()).collect()),
            What::AllReduce => reduce(&all, kind),
            What::ReduceScatter => {
                let sum = reduce(&all, kind)?;
                let len = sum.len() / self.size();
                Ok(sum[self.rank * len..][..len].to_vec())
            }
        }
    }
}

/// Bytes of an element of a `HcclDataType`.
pub fn element_bytes(dtype: i32) -> Done<usize> {
    match dtype {
        0 | 7 => Ok(1),
        1 | 3 | 8 | 11 => Ok(2),
        2 | 4 | 9 => Ok(4),
        5 | 6 | 10 => Ok(8),
        _ => {
            let text = format!("there is no data type {dtype}");
            Err(Failure::new(code::HCCL_PARAMETER, text))
        }
    }
}

/// Combines everyone's elements in the order of ranks; 16-bit floats in f32, rounded once.
fn reduce(all: &[Arc<Vec<u8>>], kind: Kind) -> Done<Vec<u8>> {
    macro_rules! fold {
        ($type:ty, $wide:ty, $raw:ident => $up:expr, $sum:ident => $down:expr) => {{
            let size = size_of::<$type>();
            let read = |part: &[u8], at: usize| -> $wide {
                let $raw = bytemuck::pod_read_unaligned::<$type>(&part[at * size..][..size]);
                $up
            };
            let mut out = Vec::with_capacity(all[0].len());
            for at in 0..all[0].len() / size {
                let mut value = read(&all[0], at);
                for part in &all[1..] {
                    let other = read(part, at);
                    value = match kind.op {
                        0 => value + other,
                        1 => value * other,
                        2 => {
                            if other > value {
                                other
                            } else {
                                value
                            }
                        }
                        _ => {
                            if other < value {
                                other
                            } else {
                                value
                            }
                        }
                    };
                }
                let $sum = value;
                out.extend_from_slice(bytemuck::bytes_of(&$down));
            }
            Ok(out)
        }};
    }
    use std::num::Wrapping;
    match kind.dtype {
        4 => fold!(f32, f32, v => v, v => v),
        3 => fold!(f16, f32, v => v.to_f32(), v => f16::from_f32(v)),
        11 => fold!(bf16, f32, v => v.to_f32(), v => bf16::from_f32(v)),
        2 => fold!(i32, Wrapping<i32>, v => Wrapping(v), v => v.0),
        5 => fold!(i64, Wrapping<i64>, v => Wrapping(v), v => v.0),
        0 => fold!(i8, Wrapping<i8>, v => Wrapping(v), v => v.0),
        other => {
            let text = format!("data type {other} is not reduced");
            Err(Failure::new(code::HCCL_UNSUPPORTED, text))
        }
    }
}
