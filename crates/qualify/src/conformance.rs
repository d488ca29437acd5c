//! Holds a backend's results against the reference, element by element, and bit against bit.
//!
//! Decides nothing about what a finding means for a chip. Read next: `cases.rs`.

use std::time::Duration;

use pontoon_ops::tolerance::tolerance;
use pontoon_ops::{Backend, BufferId, DType, DeviceError, Op, Support};
use serde::Serialize;

use crate::cases::Case;
use crate::memory::{Memory, offsets};
use crate::reference::{Expected, Want, reference};

/// No case takes longer on a device that works.
const DEADLINE: Duration = Duration::from_secs(60);

/// The result of one check of one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The operation.
    pub op: &'static str,
    /// What it was computed in.
    pub dtype: String,
    /// `correct` or `repeat`.
    pub check: &'static str,
    /// The case's name.
    pub case: String,
    /// The largest error, as a share of what is allowed where it occurred.
    pub worst_error: f64,
    /// What `worst_error` may be.
    pub limit: f64,
    /// Whether it passed.
    pub ok: bool,
    /// What is wrong, and where.
    pub detail: String,
}

/// Runs a case: results against the reference, untouched bytes untouched, a second run the same
/// bits. Also gives the memory as the backend left it, to compare with other runs.
pub fn check(
    backend: &mut dyn Backend,
    case: &Case,
) -> Result<(Vec<Finding>, Memory), DeviceError> {
    let finding = |check, error: f64, detail: String| Finding {
        op: case.op.name().name(),
        dtype: case.dtype.to_string(),
        check,
        case: case.name.clone(),
        worst_error: error,
        limit: 1.0,
        ok: detail.is_empty(),
        detail,
    };
    if let Support::No(reason) = backend.supports(&case.op) {
        let detail = format!("not supported: {reason}");
        return Ok((vec![finding("correct", f64::INFINITY, detail)], case.memory.clone()));
    }
    let got = launch(backend, case)?;
    let (error, detail) = assess(case, &got);
    let again = launch(backend, case)?;
    let repeat = match again == got {
        true => String::new(),
        false => "a second run gave other bits".to_owned(),
    };
    Ok((vec![finding("correct", error, detail), finding("repeat", 0.0, repeat)], got))
}

/// Uploads a case, launches it once, and downloads everything.
pub(crate) fn launch(backend: &mut dyn Backend, case: &Case) -> Result<Memory, DeviceError> {
    let placed = Placed::new(backend, case)?;
    let launched = backend.launch(&placed.op).and_then(|()| backend.wait(DEADLINE));
    let mut memory = case.memory.clone();
    for (bytes, &buffer) in memory.buffers_mut().iter_mut().zip(&placed.buffers) {
        backend.download(buffer, 0, bytes)?;
    }
    placed.free(backend)?;
    launched.map(|()| memory)
}

/// A case on a device.
pub(crate) struct Placed {
    /// The operation, on the device's buffers.
    pub op: Op,
    /// The device's buffers, in the order of the case's.
    pub buffers: Vec<BufferId>,
}

impl Placed {
    /// Uploads a case.
    pub fn new(backend: &mut dyn Backend, case: &Case) -> Result<Placed, DeviceError> {
        let mut buffers = Vec::new();
        for bytes in case.memory.buffers() {
            let buffer = backend.alloc(bytes.len())?;
            backend.upload(buffer, 0, bytes)?;
            buffers.push(buffer);
        }
        let mut op = case.op.clone();
        for view in op.views_mut() {
            *view = view.rebased(buffers[view.buffer.0 as usize], 0);
        }
        Ok(Placed { op, buffers })
    }

    /// Gives the buffers back.
    pub fn free(self, backend: &mut dyn Backend) -> Result<(), DeviceError> {
        self.buffers.into_iter().try_for_each(|buffer| backend.free(buffer))
    }
}

/// Holds what a device left of a case against the reference: the worst error as a share of what
/// is allowed, and what is wrong, empty if nothing is.
pub(crate) fn assess(case: &Case, got: &Memory) -> (f64, String) {
    assess_against(case, &reference(&case.op, &case.memory), got)
}

/// The same against results that the caller knows.
pub(crate) fn assess_against(case: &Case, wanted: &[Expected], got: &Memory) -> (f64, String) {
    let (error, detail) = judge(case, wanted, got);
    let detail = if detail.is_empty() { stray_write(case, wanted, got) } else { detail };
    (error, detail)
}

/// The worst error as a share of its limit, and what is wrong if it is above one.
fn judge(case: &Case, wanted: &[Expected], got: &Memory) -> (f64, String) {
    let row = tolerance(case.op.name());
    let mut worst = (0.0, String::new());
    for Expected { view, wants } in wanted {
        let before = case.memory.bits(view);
        let (values, bits) = (got.read(view), got.bits(view));
        for (index, want) in wants.iter().enumerate() {
            let (share, want) = match *want {
                Want::Unjudged => continue,
                Want::Kept => {
                    (if bits[index] == before[index] { 0.0 } else { f64::INFINITY }, None)
                }
                Want::Near { value, magnitude, argument } => {
                    let limit = row.limit(view.dtype, case.dtype, value, magnitude)
                        + row.accumulate * DType::F32.epsilon() * argument
                        + smallest(view.dtype).max(smallest(case.dtype)) * underflow(case);
                    (share_of(values[index], value, limit, view.dtype), Some(value))
                }
            };
            if share > worst.0 {
                let text = format!("element {index} of {:?} is {}", view.dims(), values[index]);
                worst = match want {
                    Some(want) => (share, format!("{text}, should be {want}")),
                    None => (share, format!("{text}, should not have been touched")),
                };
            }
        }
    }
    if worst.0 <= 1.0 { (worst.0, String::new()) } else { worst }
}

/// An error as a share of its limit; numbers that are not finite must be met as they are.
fn share_of(got: f64, want: f64, limit: f64, dtype: DType) -> f64 {
    let most = match dtype {
        DType::F16 => 65_504.0,
        _ => f64::from(f32::MAX),
    };
    if want.is_nan() {
        return if got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if want.is_infinite() {
        return if got == want { 0.0 } else { f64::INFINITY };
    }
    // What lies beyond the type may be infinite; what rounds near its end may be either.
    if want.abs() + limit > most && (got == f64::INFINITY.copysign(want) || got == want) {
        return 0.0;
    }
    let error = (got - want).abs();
    match () {
        () if error == 0.0 => 0.0,
        () if error.is_nan() || limit == 0.0 => f64::INFINITY,
        () => error / limit,
    }
}

/// Half the distance between the smallest numbers of a dtype, below which nothing can be told.
fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2_f64.powi(-24),
        // A device may flush subnormal numbers to zero.
        _ => f64::from(f32::MIN_POSITIVE),
    }
}

/// What a product that fell below the smallest number may still be multiplied by: a gate's rounded
/// sigmoid meets up to three factors, which in the cases are below 2^9; a logit's rounded gradient
/// meets one.
fn underflow(case: &Case) -> f64 {
    let gates = matches!(case.op, Op::SwiGlu(_) | Op::SwiGluBwd(_));
    let logits = matches!(case.op, Op::CrossEntropyBwd(_) | Op::TokenLogProbBwd(_));
    match case.dtype {
        DType::F16 if gates || logits => 2_f64.powi(9),
        _ if gates => 2_f64.powi(27),
        _ => 1.0,
    }
}

/// Names a byte that changed outside what the operation writes.
fn stray_write(case: &Case, wanted: &[Expected], got: &Memory) -> String {
    let (before, after) = (case.memory.buffers(), got.buffers());
    for (index, (before, after)) in before.iter().zip(after).enumerate() {
        let mut may_change = vec![false; before.len()];
        let own = |expected: &&Expected| expected.view.buffer == BufferId(index as u32);
        for Expected { view, .. } in wanted.iter().filter(own) {
            for bits in offsets(view) {
                let at = view.byte_offset + bits / 8;
                may_change[at..at + view.dtype.bits().div_ceil(8)].fill(true);
            }
        }
        let stray = (0..before.len()).find(|&at| !may_change[at] && before[at] != after[at]);
        if let Some(at) = stray {
            return format!("byte {at} of buffer {index} changed, which is no part of a result");
        }
    }
    String::new()
}

/// Whether an operation of this name is in a list of cases.
pub fn covers(cases: &[Case], op: pontoon_ops::OpName) -> bool {
    cases.iter().any(|case| Op::name(&case.op) == op)
}
