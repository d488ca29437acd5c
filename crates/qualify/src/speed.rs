//! Speed: every operation, as large as a model's, against the device's measured matrix and memory
//! roofs.
//!
//! A roof is the fastest that anything ran here, or that the caller measured in another way. The
//! clock is the caller's. Read next: `forecast.rs`.

use std::collections::BTreeMap;
use std::time::Duration;

use pontoon_ops::cost::{Cost, cost};
use pontoon_ops::{Backend, DType, DeviceError, Fill, Op, OpName, Support, View};
use serde::Serialize;

use crate::cases::{Case, Size, sized};
use crate::conformance::Placed;

/// No operation takes longer on a device that works.
const DEADLINE: Duration = Duration::from_secs(60);
/// Runs that are timed at least and at most.
const RUNS: [usize; 2] = [3, 50];
/// Launches of the smallest operation that are timed for its overhead.
const LATENCY_RUNS: usize = 50;

/// What bounds an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Floating-point operations of matrix products.
    Matrix,
    /// Bytes moved.
    Memory,
}

/// One operation's speed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SpeedRow {
    /// The operation.
    pub op: &'static str,
    /// What it was computed in.
    pub dtype: String,
    /// Its largest operand, or a product's extents.
    pub shape: String,
    /// Milliseconds, the median of several runs.
    pub ms: f64,
    /// Floating-point operations of its matrix products a second.
    pub flops_per_s: f64,
    /// Bytes a second, each operand touched once.
    pub bytes_per_s: f64,
    /// Which roof it is nearer to.
    pub bound: Bound,
    /// The time it would take at the roofs, over the time it took.
    pub roof_fraction: f64,
}

/// What a device can do at most.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Roofs {
    /// Floating-point operations a second, by dtype.
    pub matrix: BTreeMap<String, f64>,
    /// Bytes a second.
    pub memory: f64,
    /// Seconds to launch and await the smallest operation.
    pub latency: f64,
}

impl Roofs {
    /// The least time an operation can take, and what bounds it.
    pub fn floor(&self, cost: &Cost, dtype: DType) -> (f64, Bound) {
        let peak = self.matrix.get(dtype.name()).copied().unwrap_or(f64::INFINITY);
        let (matrix, memory) = (cost.matrix_flops / peak, cost.bytes / self.memory.max(1.0));
        if matrix > memory { (matrix, Bound::Matrix) } else { (memory, Bound::Memory) }
    }
}

/// All measurements.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Speed {
    /// The roofs.
    pub roofs: Roofs,
    /// One row for each operation and dtype.
    pub rows: Vec<SpeedRow>,
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct SpeedOptions {
    /// The dtypes to measure in.
    pub dtypes: Vec<DType>,
    /// How large.
    pub size: Size,
    /// How long to time one operation, once it has run three times.
    pub budget: Duration,
    /// Roofs that were measured otherwise; the higher ones count.
    pub known: Roofs,
}

struct Timed {
    op: OpName,
    dtype: DType,
    shape: String,
    cost: Cost,
    seconds: f64,
}

/// Measures. `progress` hears how far it is, from 0 to 1.
pub fn run(
    backend: &mut dyn Backend,
    options: &SpeedOptions,
    clock: &dyn Fn() -> Duration,
    progress: &mut dyn FnMut(f64),
) -> Result<Speed, DeviceError> {
    let latency = latency(backend, clock)?;
    let mut timed = Vec::new();
    for (turn, &dtype) in options.dtypes.iter().enumerate() {
        let cases = sized(dtype, options.size);
        let count = cases.len() as f64;
        for (index, case) in cases.into_iter().enumerate() {
            progress((turn as f64 + index as f64 / count) / options.dtypes.len() as f64);
            if backend.supports(&case.op) == Support::Yes {
                let seconds = time(backend, &case, options.budget, clock)?;
                let (op, cost) = (case.op.name(), cost(&case.op));
                timed.push(Timed { op, dtype, shape: case.name, cost, seconds });
            }
        }
    }
    let roofs = roofs(&timed, &options.known, latency);
    let rows = timed.into_iter().map(|one| row(one, &roofs)).collect();
    Ok(Speed { roofs, rows })
}

fn time(
    backend: &mut dyn Backend,
    case: &Case,
    budget: Duration,
    clock: &dyn Fn() -> Duration,
) -> Result<f64, DeviceError> {
    let placed = Placed::new(backend, case)?;
    let once = |backend: &mut dyn Backend| -> Result<f64, DeviceError> {
        let started = clock();
        backend.launch(&placed.op)?;
        backend.wait(DEADLINE)?;
        Ok(clock().saturating_sub(started).as_secs_f64())
    };
    once(backend)?;
    let (begun, mut times) = (clock(), Vec::new());
    while times.len() < RUNS[0] || (times.len() < RUNS[1] && clock().saturating_sub(begun) < budget)
    {
        times.push(once(backend)?);
    }
    placed.free(backend)?;
    times.sort_by(f64::total_cmp);
    // A clock may stand still between two looks.
    Ok(times[times.len() / 2].max(1e-9))
}

/// Seconds to launch and await the smallest operation.
fn latency(backend: &mut dyn Backend, clock: &dyn Fn() -> Duration) -> Result<f64, DeviceError> {
    let buffer = backend.alloc(64)?;
    let op = Op::from(Fill { dst: View::contiguous(buffer, DType::F32, [1]), value: 0.0 });
    if backend.supports(&op) != Support::Yes {
        backend.free(buffer)?;
        return Ok(0.0);
    }
    let started = clock();
    for _ in 0..LATENCY_RUNS {
        backend.launch(&op)?;
        backend.wait(DEADLINE)?;
    }
    let seconds = clock().saturating_sub(started).as_secs_f64() / LATENCY_RUNS as f64;
    backend.free(buffer)?;
    Ok(seconds)
}

/// The fastest product of each dtype and the fastest mover of bytes.
fn roofs(timed: &[Timed], known: &Roofs, latency: f64) -> Roofs {
    let mut roofs = Roofs { latency, ..known.clone() };
    for one in timed {
        if one.op == OpName::Matmul {
            let peak = roofs.matrix.entry(one.dtype.name().to_owned()).or_default();
            *peak = peak.max(one.cost.matrix_flops / one.seconds);
        }
        if [OpName::Copy, OpName::Add, OpName::Scale].contains(&one.op) {
            roofs.memory = roofs.memory.max(one.cost.bytes / one.seconds);
        }
    }
    roofs
}

fn row(one: Timed, roofs: &Roofs) -> SpeedRow {
    let (floor, bound) = roofs.floor(&one.cost, one.dtype);
    SpeedRow {
        op: one.op.name(),
        dtype: one.dtype.to_string(),
        shape: one.shape,
        ms: 1e3 * one.seconds,
        flops_per_s: one.cost.matrix_flops / one.seconds,
        bytes_per_s: one.cost.bytes / one.seconds,
        bound,
        roof_fraction: floor / one.seconds,
    }
}
