//! Collectives of a group of devices: every member in a thread of its own, each result against the
//! sum in f64, against the contract's tree bit by bit, twice, and timed.
//!
//! The group is made by the caller, who knows the vendor. What a finding means is judged in
//! `verdict.rs`. Read next: `conformance.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pontoon_ops::{
    AllGather, AllReduce, Backend, DType, DeviceError, DeviceErrorKind, Group, Op, OpName,
    ReduceScatter, Support, View,
};
use serde::Serialize;

use crate::cases::{Case, Flavour, Maker};
use crate::conformance::{Finding, Placed, assess_against, launch};
use crate::memory::{Memory, rounded};
use crate::reference::{Expected, exact, near};
use crate::suite::{Row, Unsupported, merge};

/// The operations that are checked here.
pub const OPS: [OpName; 3] = [OpName::AllReduce, OpName::AllGather, OpName::ReduceScatter];
/// The group that the caller has made.
const GROUP_ID: u16 = 0;
/// Elements of one member's part: one, odd, more than a vendor's tile.
const PARTS: [usize; 3] = [1, 37, 4099];
/// No exchange takes longer between devices that work.
const DEADLINE: Duration = Duration::from_secs(60);
/// Exchanges that are timed together, after one that warms up.
const RUNS: u32 = 8;
/// Draws of members start here, one for each, apart from those of other cases.
const SALT: usize = 900;

/// The speed of one exchange.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExchangeSpeed {
    /// The operation.
    pub op: &'static str,
    /// What was exchanged.
    pub dtype: String,
    /// Bytes of the larger of its two tensors.
    pub bytes: usize,
    /// Milliseconds until the last member has its result.
    pub ms: f64,
    /// Bytes a second that each member's link carried at least: what a ring would send.
    pub link_bytes_per_s: f64,
}

/// What was found of a group.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Exchange {
    /// Members of the group.
    pub devices: usize,
    /// One row for each operation, dtype and check.
    pub rows: Vec<Row>,
    /// What the members say they cannot do.
    pub unsupported: Vec<Unsupported>,
    /// The measurements.
    pub speed: Vec<ExchangeSpeed>,
    /// Why there is no group, or why it could not go on.
    pub failure: Option<String>,
}

/// One exchange: a case for each member, by rank.
struct Meeting {
    cases: Vec<Case>,
}

impl Meeting {
    fn op(&self) -> OpName {
        self.cases[0].op.name()
    }
}

/// Checks every exchange between the members of a group, which are given by rank.
pub fn check(members: &mut [Box<dyn Backend>], seed: u64) -> Exchange {
    let mut found = Exchange { devices: members.len(), ..Exchange::default() };
    let (mut rows, mut unsupported) = (BTreeMap::new(), BTreeSet::new());
    for meeting in meetings(seed, members.len()) {
        let (op, dtype) = (meeting.op().name(), meeting.cases[0].dtype.to_string());
        if let Some(reason) = refusal(members, &meeting) {
            unsupported.insert(Unsupported { op, dtype, reason: reason.to_owned() });
            continue;
        }
        let twice = |rank: usize, member: &mut dyn Backend| {
            let case = &meeting.cases[rank];
            Ok((launch(member, case)?, launch(member, case)?))
        };
        match together(members, twice) {
            Ok(got) => findings(&meeting, &got).into_iter().for_each(|one| merge(&mut rows, one)),
            Err((rank, error)) => {
                let case = &meeting.cases[rank].name;
                found.failure = Some(format!("member {rank}: {op} {dtype} ({case}): {error}"));
                break;
            }
        }
    }
    found.rows = rows.into_values().collect();
    found.unsupported = unsupported.into_iter().collect();
    found
}

/// Times every exchange that is supported; `elements` are those of the larger tensor.
pub fn measure(
    members: &mut [Box<dyn Backend>],
    dtypes: &[DType],
    elements: usize,
    clock: &(dyn Fn() -> Duration + Sync),
) -> Result<Vec<ExchangeSpeed>, String> {
    let ranks = members.len();
    let part = elements.div_ceil(ranks);
    let mut speed = Vec::new();
    for &dtype in dtypes {
        let maker = Maker { seed: 1, dtype, flavour: Flavour::Plain };
        for op in OPS {
            let meeting = meeting(maker, op, Placing::Apart, part, ranks);
            if refusal(members, &meeting).is_some() {
                continue;
            }
            let timed =
                |rank: usize, member: &mut dyn Backend| timed(member, &meeting.cases[rank], clock);
            let seconds = together(members, timed).map_err(|(rank, error)| {
                format!("member {rank}: {} {dtype}: {error}", op.name())
            })?;
            let slowest = seconds.into_iter().fold(1e-9, f64::max);
            let bytes = dtype.bytes(part * ranks);
            // A sum of everything is a sum of parts and a gathering of them.
            let passes = if op == OpName::AllReduce { 2.0 } else { 1.0 };
            let sent = passes * dtype.bytes(part * (ranks - 1)) as f64;
            speed.push(ExchangeSpeed {
                op: op.name(),
                dtype: dtype.to_string(),
                bytes,
                ms: 1e3 * slowest,
                link_bytes_per_s: sent / slowest,
            });
        }
    }
    Ok(speed)
}

/// Seconds of one exchange: members wait for one another in each, so none runs ahead.
fn timed(
    member: &mut dyn Backend,
    case: &Case,
    clock: &(dyn Fn() -> Duration + Sync),
) -> Result<f64, DeviceError> {
    let placed = Placed::new(member, case)?;
    let once = |member: &mut dyn Backend| -> Result<(), DeviceError> {
        member.launch(&placed.op)?;
        member.wait(DEADLINE)
    };
    once(member)?;
    let started = clock();
    for _ in 0..RUNS {
        once(member)?;
    }
    let seconds = clock().saturating_sub(started).as_secs_f64() / f64::from(RUNS);
    placed.free(member)?;
    Ok(seconds)
}

/// Runs the same work on every member at once. Of several failures the one that is no mere
/// waiting for the others is given, with its member's rank.
fn together<T: Send>(
    members: &mut [Box<dyn Backend>],
    work: impl Fn(usize, &mut dyn Backend) -> Result<T, DeviceError> + Sync,
) -> Result<Vec<T>, (usize, DeviceError)> {
    let work = &work;
    let results: Vec<Result<T, DeviceError>> = std::thread::scope(|scope| {
        let tasks: Vec<_> = members
            .iter_mut()
            .enumerate()
            .map(|(rank, member)| scope.spawn(move || work(rank, member.as_mut())))
            .collect();
        let lost = || DeviceError::new(DeviceErrorKind::Lost, "the backend panicked");
        tasks.into_iter().map(|task| task.join().unwrap_or_else(|_| Err(lost()))).collect()
    });
    let mut failures = Vec::new();
    let mut done = Vec::new();
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(result) => done.push(result),
            Err(error) => failures.push((rank, error)),
        }
    }
    failures.sort_by_key(|(_, error)| error.kind == DeviceErrorKind::Hang);
    failures.into_iter().next().map_or(Ok(done), Err)
}

fn refusal(members: &[Box<dyn Backend>], meeting: &Meeting) -> Option<&'static str> {
    let answers =
        members.iter().zip(&meeting.cases).map(|(member, case)| member.supports(&case.op));
    answers.into_iter().find_map(|answer| match answer {
        Support::Yes => None,
        Support::No(reason) => Some(reason),
    })
}

/// Where a sum lies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Placing {
    Apart,
    OverItsInput,
}

fn meetings(seed: u64, ranks: usize) -> Vec<Meeting> {
    let mut all = Vec::new();
    let flavours = [Flavour::Plain, Flavour::Large, Flavour::Special];
    for dtype in DType::FLOATS {
        for (flavour, part) in flavours.into_iter().flat_map(|f| PARTS.map(|part| (f, part))) {
            let maker = Maker { seed: seed + all.len() as u64, dtype, flavour };
            let apart = OPS.map(|op| meeting(maker, op, Placing::Apart, part, ranks));
            all.extend(apart);
            all.push(meeting(maker, OpName::AllReduce, Placing::OverItsInput, part, ranks));
        }
    }
    // Gathering moves whatever bits there are.
    let maker = Maker { seed, dtype: DType::I32, flavour: Flavour::Large };
    all.extend(PARTS.map(|part| meeting(maker, OpName::AllGather, Placing::Apart, part, ranks)));
    all
}

fn meeting(maker: Maker, op: OpName, placing: Placing, part: usize, ranks: usize) -> Meeting {
    let case = |rank: usize| {
        let mut draft = maker.start(SALT + rank);
        let (own, whole) = ([part], [part * ranks]);
        let group = Group { id: GROUP_ID, rank_index: rank as u16, rank_count: ranks as u16 };
        let (x_shape, y_shape) = match op {
            OpName::AllGather => (own, whole),
            OpName::ReduceScatter => (whole, own),
            _ => (whole, whole),
        };
        // What is only timed is drawn quickly.
        let x = match part > PARTS[PARTS.len() - 1] {
            true => draft.bulk(maker.dtype, &x_shape, 1.0),
            false => draft.floats(&x_shape),
        };
        let y = match placing {
            Placing::Apart => draft.poisoned(maker.dtype, &y_shape),
            Placing::OverItsInput => x,
        };
        let placed = if placing == Placing::Apart { "" } else { " in place" };
        let name = format!("{part} a member, {ranks} members{placed}");
        match op {
            OpName::AllGather => draft.done(name, AllGather { x, y, group }),
            OpName::ReduceScatter => draft.done(name, ReduceScatter { x, y, group }),
            _ => draft.done(name, AllReduce { x, y, group }),
        }
    };
    Meeting { cases: (0..ranks).map(case).collect() }
}

/// The two tensors of an exchange.
fn tensors(op: &Op) -> [View; 2] {
    let operands = op.operands();
    [operands[0].view, operands[1].view]
}

fn findings(meeting: &Meeting, got: &[(Memory, Memory)]) -> Vec<Finding> {
    let first = &meeting.cases[0];
    let finding = |check, (worst_error, detail): (f64, String)| Finding {
        op: first.op.name().name(),
        dtype: first.dtype.to_string(),
        check,
        case: first.name.clone(),
        worst_error,
        limit: 1.0,
        ok: detail.is_empty(),
        detail,
    };
    let inputs: Vec<Vec<f64>> =
        meeting.cases.iter().map(|case| case.memory.read(&tensors(&case.op)[0])).collect();
    let mut correct = (0.0, String::new());
    for (rank, (case, (got, _))) in meeting.cases.iter().zip(got).enumerate() {
        let (error, detail) = assess_against(case, &[wanted(case, &inputs, rank)], got);
        let worse = correct.1.is_empty() && (!detail.is_empty() || error > correct.0);
        if worse {
            let of = |detail| format!("member {rank}: {detail}");
            correct = (error, if detail.is_empty() { detail } else { of(detail) });
        }
    }
    let differs = got.iter().position(|(once, again)| once != again);
    let repeat = differs.map(|rank| format!("member {rank}: a second exchange gave other bits"));
    let repeat = (0.0, repeat.unwrap_or_default());
    let mut all = vec![finding("correct", correct), finding("repeat", repeat)];
    if meeting.op() != OpName::AllGather {
        let detail = disagreement(meeting, &inputs, got).unwrap_or_default();
        let error = if detail.is_empty() { 0.0 } else { f64::INFINITY };
        all.push(finding("agreement", (error, detail)));
    }
    all
}

/// What a member should hold, from what all brought.
fn wanted(case: &Case, inputs: &[Vec<f64>], rank: usize) -> Expected {
    let view = tensors(&case.op)[1];
    let sum = |index: usize| {
        let terms = || inputs.iter().map(|input| input[index]);
        near(terms().sum(), terms().map(f64::abs).sum())
    };
    let wants = match case.op {
        Op::AllGather(_) => inputs.iter().flatten().map(|&value| exact(value)).collect(),
        _ => (0..view.elements()).map(|index| sum(first(case, rank) + index)).collect(),
    };
    Expected { view, wants }
}

/// The first element of the sum that a member receives.
fn first(case: &Case, rank: usize) -> usize {
    match case.op {
        Op::ReduceScatter(_) => rank * tensors(&case.op)[1].elements(),
        _ => 0,
    }
}

/// Names an element that is not the one of the contract's tree, or not the same on every member.
fn disagreement(
    meeting: &Meeting,
    inputs: &[Vec<f64>],
    got: &[(Memory, Memory)],
) -> Option<String> {
    for (rank, (case, (memory, _))) in meeting.cases.iter().zip(got).enumerate() {
        let view = tensors(&case.op)[1];
        let start = first(case, rank);
        for (index, value) in memory.read(&view).into_iter().enumerate() {
            let parts: Vec<f32> = inputs.iter().map(|input| input[start + index] as f32).collect();
            let want = rounded(case.dtype, f64::from(tree(&parts)));
            if value != want && !(value.is_nan() && want.is_nan()) {
                return Some(format!(
                    "member {rank}: element {index} is {value}, along the contract's tree {want}"
                ));
            }
        }
        let (own, zeroth) = (memory.bits(&view), got[0].0.bits(&tensors(&meeting.cases[0].op)[1]));
        if meeting.op() == OpName::AllReduce && own != zeroth {
            return Some(format!("members 0 and {rank} hold other bits"));
        }
    }
    None
}

/// The sum along the contract's tree: split at the largest power of two below the number of parts.
fn tree(parts: &[f32]) -> f32 {
    match parts {
        [] => 0.0,
        [one] => *one,
        _ => {
            let (left, right) = parts.split_at(parts.len().next_power_of_two() / 2);
            tree(left) + tree(right)
        }
    }
}
