//! Stability: memory patterns, and products and attention repeated for minutes, each result held
//! against the first one bit by bit, each wait under a deadline.
//!
//! It says what happened; what that means is judged in `verdict.rs`. The clock is the caller's.

use std::time::Duration;

use pontoon_ops::{Backend, BufferId, DType, DeviceError, DeviceErrorKind, Fill, Op, Support};
use serde::Serialize;

use crate::cases::{self, Case};
use crate::conformance::Placed;

/// Bytes of one buffer of the memory test.
const PIECE_BYTES: usize = 16 << 20;
/// Lies that are described; more are only counted.
const LIES_KEPT: usize = 8;
/// Points of the times that are kept for the plot.
const POINTS_MAX: usize = 240;
/// Rounds whose times say how fast the soak began and ended.
const ENDS: usize = 10;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct StressOptions {
    /// How long to soak.
    pub soak: Duration,
    /// Bytes of device memory to write patterns into.
    pub memory_bytes: usize,
    /// How long one wait may take: beyond it the device hangs.
    pub deadline: Duration,
}

/// What happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stability {
    /// Rounds of the soak; in each one, every soaked operation ran once.
    pub rounds: usize,
    /// Operations in a round.
    pub ops_per_round: usize,
    /// How long it took.
    pub seconds: f64,
    /// Results that differed from the first one.
    pub lies: usize,
    /// The first of them, in words.
    pub lies_detail: Vec<String>,
    /// A wait that did not end in time.
    pub hang: Option<String>,
    /// Another failure of the device.
    pub failure: Option<String>,
    /// Bytes of memory that were written and read back.
    pub memory_bytes: usize,
    /// Bytes that did not hold what was written.
    pub memory_errors: usize,
    /// The first of them, in words.
    pub memory_detail: Vec<String>,
    /// The hash of all first results: equal on devices of one numeric class.
    pub hash: String,
    /// Milliseconds of a round: median, the slowest of a hundred, the slowest.
    pub round_ms: [f64; 3],
    /// The median time of the last rounds over that of the first.
    pub slowdown: f64,
    /// Milliseconds of rounds over time, thinned out.
    pub times_ms: Vec<f64>,
}

impl Stability {
    /// Faults of any kind that were seen.
    pub fn faults(&self) -> usize {
        let happened = usize::from(self.hang.is_some()) + usize::from(self.failure.is_some());
        self.lies + usize::from(self.memory_errors > 0) + happened
    }
}

/// Stresses a device. `progress` hears how far it is, from 0 to 1.
pub fn run(
    backend: &mut dyn Backend,
    options: &StressOptions,
    clock: &dyn Fn() -> Duration,
    progress: &mut dyn FnMut(f64),
) -> Stability {
    let mut seen = Stability::default();
    if let Err(error) = stress(backend, options, clock, progress, &mut seen) {
        match error.kind {
            DeviceErrorKind::Hang => seen.hang = Some(error.to_string()),
            _ => seen.failure = Some(error.to_string()),
        }
    }
    seen
}

fn stress(
    backend: &mut dyn Backend,
    options: &StressOptions,
    clock: &dyn Fn() -> Duration,
    progress: &mut dyn FnMut(f64),
    seen: &mut Stability,
) -> Result<(), DeviceError> {
    let mut pieces = Vec::new();
    for _ in 0..options.memory_bytes.div_ceil(PIECE_BYTES) {
        pieces.push(backend.alloc(PIECE_BYTES)?);
    }
    seen.memory_bytes = pieces.len() * PIECE_BYTES;
    for pattern in PATTERNS {
        fill(backend, &pieces, pattern)?;
        verify(backend, &pieces, pattern, seen)?;
    }
    // The last pattern stays while the soak heats the device, and is read again after it.
    let outcome = soak(backend, options, clock, progress, seen);
    if outcome.is_ok() {
        verify(backend, &pieces, PATTERNS[PATTERNS.len() - 1], seen)?;
        pieces.into_iter().try_for_each(|piece| backend.free(piece))?;
    }
    outcome
}

/// What is written into memory: the byte at each place of a piece.
type Pattern = fn(usize, usize) -> u8;

/// All bits off and on, neighbours opposed, and last each place its own address, mixed.
const PATTERNS: [Pattern; 5] = [
    |_, _| 0x00,
    |_, _| 0xff,
    |_, _| 0x55,
    |_, _| 0xaa,
    |piece, at| {
        let address = (piece * PIECE_BYTES + at / 4) as u32;
        address.wrapping_mul(0x9e37_79b1).to_le_bytes()[at % 4]
    },
];

fn fill(
    backend: &mut dyn Backend,
    pieces: &[BufferId],
    pattern: Pattern,
) -> Result<(), DeviceError> {
    for (index, &piece) in pieces.iter().enumerate() {
        let bytes: Vec<u8> = (0..PIECE_BYTES).map(|at| pattern(index, at)).collect();
        backend.upload(piece, 0, &bytes)?;
    }
    Ok(())
}

fn verify(
    backend: &mut dyn Backend,
    pieces: &[BufferId],
    pattern: Pattern,
    seen: &mut Stability,
) -> Result<(), DeviceError> {
    let mut bytes = vec![0; PIECE_BYTES];
    for (index, &piece) in pieces.iter().enumerate() {
        backend.download(piece, 0, &mut bytes)?;
        for (at, &got) in bytes.iter().enumerate() {
            let want = pattern(index, at);
            if got != want {
                seen.memory_errors += 1;
                if seen.memory_detail.len() < LIES_KEPT {
                    seen.memory_detail.push(format!(
                        "byte {at} of piece {index} is {got:#04x}, {want:#04x} was written"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// A soaked operation on the device.
struct Soaked {
    case: Case,
    placed: Placed,
    /// Clears the results, so that an operation that does not run shows.
    clear: Vec<Op>,
    /// The first result of each written buffer.
    first: Vec<(usize, Vec<u8>)>,
}

fn soak(
    backend: &mut dyn Backend,
    options: &StressOptions,
    clock: &dyn Fn() -> Duration,
    progress: &mut dyn FnMut(f64),
    seen: &mut Stability,
) -> Result<(), DeviceError> {
    let mut soaked = Vec::new();
    for case in [DType::F32, DType::Bf16].into_iter().flat_map(cases::soaked) {
        if backend.supports(&case.op) == Support::Yes {
            soaked.push(Soaked::new(backend, case)?);
        }
    }
    seen.ops_per_round = soaked.len();
    let begun = clock();
    let mut times = Vec::new();
    loop {
        let started = clock();
        for one in &mut soaked {
            one.round(backend, options.deadline, seen)?;
        }
        if seen.rounds == 0 {
            let mut hasher = blake3::Hasher::new();
            for (_, bytes) in soaked.iter().flat_map(|one| &one.first) {
                hasher.update(bytes);
            }
            seen.hash = hasher.finalize().to_hex().to_string();
        }
        seen.rounds += 1;
        let now = clock();
        times.push(1e3 * now.saturating_sub(started).as_secs_f64());
        let spent = now.saturating_sub(begun);
        seen.seconds = spent.as_secs_f64();
        progress(spent.as_secs_f64() / options.soak.as_secs_f64().max(1e-9));
        // A result is repeated at least once, however short the soak.
        if spent >= options.soak && seen.rounds >= 2 {
            break;
        }
    }
    summarise(&times, seen);
    soaked.into_iter().try_for_each(|one| one.placed.free(backend))
}

impl Soaked {
    fn new(backend: &mut dyn Backend, case: Case) -> Result<Soaked, DeviceError> {
        let placed = Placed::new(backend, &case)?;
        let operands = placed.op.operands();
        let results = operands.iter().filter(|operand| operand.access.writes());
        let clear =
            |operand: &pontoon_ops::Operand| Op::from(Fill { dst: operand.view, value: f32::NAN });
        let clear: Vec<Op> = results.map(clear).collect();
        let able = clear.iter().all(|op| backend.supports(op) == Support::Yes);
        Ok(Soaked { case, clear: if able { clear } else { Vec::new() }, placed, first: Vec::new() })
    }

    /// Runs the operation once and compares its results with the first ones.
    fn round(
        &mut self,
        backend: &mut dyn Backend,
        deadline: Duration,
        seen: &mut Stability,
    ) -> Result<(), DeviceError> {
        backend.launch_all(&self.clear)?;
        backend.launch(&self.placed.op)?;
        backend.wait(deadline)?;
        let mut results = Vec::new();
        for operand in self.case.op.operands().iter().filter(|o| o.access.writes()) {
            let index = operand.view.buffer.0 as usize;
            let mut bytes = vec![0; self.case.memory.buffers()[index].len()];
            backend.download(self.placed.buffers[index], 0, &mut bytes)?;
            results.push((index, bytes));
        }
        if self.first.is_empty() {
            self.first = results;
            return Ok(());
        }
        for ((index, first), (_, now)) in self.first.iter().zip(&results) {
            if first == now {
                continue;
            }
            seen.lies += 1;
            if seen.lies_detail.len() < LIES_KEPT {
                let at = first.iter().zip(now).position(|(a, b)| a != b).unwrap_or(0);
                seen.lies_detail.push(format!(
                    "round {}: {} {} {}: byte {at} of buffer {index} is {:#04x}, it was {:#04x}",
                    seen.rounds + 1,
                    self.case.op.name().name(),
                    self.case.dtype,
                    self.case.name,
                    now[at],
                    first[at],
                ));
            }
        }
        Ok(())
    }
}

/// Medians, the slow tail, and the course of times.
fn summarise(times: &[f64], seen: &mut Stability) {
    // The first round fills caches and compiles kernels.
    let steady = if times.len() > 2 { &times[1..] } else { times };
    let at = |values: &[f64], share: f64| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * share).round() as usize]
    };
    seen.round_ms = [at(steady, 0.5), at(steady, 0.99), at(steady, 1.0)];
    let ends = ENDS.min(steady.len().div_ceil(2));
    let (early, late) = (at(&steady[..ends], 0.5), at(&steady[steady.len() - ends..], 0.5));
    seen.slowdown = if early > 0.0 { late / early } else { 1.0 };
    let step = steady.len().div_ceil(POINTS_MAX).max(1);
    seen.times_ms = steady.chunks(step).map(|chunk| at(chunk, 0.5)).collect();
}
