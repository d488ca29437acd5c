//! What a model would need on a device and how long its training would take there.
//!
//! Everything here is arithmetic on measurements: no device is touched. Several devices are
//! reckoned as data-parallel copies; what their exchange costs is not in it. Read next:
//! `verdict.rs`.

use pontoon_ops::cost::cost;
use pontoon_ops::{DType, Op};
use pontoon_program::{Plan, Program};
use serde::Serialize;

use crate::speed::Speed;

/// Share of the roof assumed for an operation that was not measured.
const FRACTION_ASSUMED: f64 = 0.5;
/// Bytes of an f32 element's training state beside its compute copy: gradient and two moments.
const STATE_BYTES: usize = 12;
/// Seconds between snapshots.
const SNAPSHOT_EVERY_S: f64 = 600.0;
/// Bytes a second at which a snapshot reaches storage.
const SNAPSHOT_BYTES_PER_S: f64 = 1e9;
/// Seconds until a lost worker computes again.
const RESTART_S: f64 = 30.0;
/// Seconds of a day.
const DAY_S: f64 = 86_400.0;
/// The 95% bound on a rate after `t` without an event is `-ln(0.05) / t`.
const UPPER_EVENTS: f64 = 2.995_732;

/// The model and what is asked of it.
pub struct Question<'a> {
    /// The model's name.
    pub model: String,
    /// All its parameters.
    pub parameters: u64,
    /// What it computes in.
    pub dtype: DType,
    /// Trained elements with padding.
    pub trained: usize,
    /// Tokens of a sequence and sequences of a micro-batch.
    pub sequence: usize,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// Forward and backward over a micro-batch.
    pub training: &'a Program,
    /// One token of one sequence.
    pub decoding: &'a Program,
    /// Tokens to train on.
    pub tokens: f64,
    /// Devices, each with the whole model.
    pub devices: usize,
    /// Tokens a second of a measured step, where one ran.
    pub measured: Option<f64>,
    /// Faults a day and device, where the caller knows better than the soak.
    pub faults_per_day: Option<f64>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// The model's name.
    pub model: String,
    /// Its parameters.
    pub parameters: u64,
    /// What it computes in.
    pub dtype: DType,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// Bytes on each device in training.
    pub memory_bytes: usize,
    /// Of these: weights and masters.
    pub weights_bytes: usize,
    /// Of these: gradients and the optimiser's moments.
    pub state_bytes: usize,
    /// Of these: activations of one micro-batch.
    pub activation_bytes: usize,
    /// Bytes on each device to serve one sequence.
    pub serving_bytes: usize,
    /// Bytes the device has.
    pub device_bytes: u64,
    /// Whether training fits.
    pub fits: bool,
    /// Whether serving fits.
    pub fits_serving: bool,
    /// Tokens a second of all devices: measured where a step ran, else predicted.
    pub tokens_per_s: f64,
    /// The same from the operations' speeds.
    pub tokens_per_s_predicted: f64,
    /// The same from a step that ran.
    pub tokens_per_s_measured: Option<f64>,
    /// Tokens a second that one sequence decodes, from the operations' speeds.
    pub decode_tokens_per_s: f64,
    /// Tokens to train on.
    pub tokens: f64,
    /// Devices reckoned with.
    pub devices: usize,
    /// Days of training, faults included.
    pub days: f64,
    /// The same times devices, in hours.
    pub device_hours: f64,
    /// Faults a day and device that were reckoned with.
    pub faults_per_day: f64,
    /// What the rate is below with 95% certainty, by the soak alone.
    pub faults_per_day_upper: f64,
    /// Faults until the end.
    pub faults_expected: f64,
    /// Share of the time that goes into steps that count.
    pub goodput: f64,
}

/// What the soak says of faults.
#[derive(Clone, Copy, Debug)]
pub struct Soaked {
    /// Faults that were seen.
    pub faults: usize,
    /// How long it was watched.
    pub seconds: f64,
}

/// Answers.
pub fn forecast(
    question: &Question<'_>,
    speed: &Speed,
    soaked: Soaked,
    device_bytes: u64,
) -> Forecast {
    let Question { dtype, trained, devices, tokens, .. } = *question;
    let compute = dtype.bytes(trained);
    let masters = if dtype == DType::F32 { 0 } else { 4 * trained };
    let activation_bytes = Plan::new(question.training).arena_bytes;
    let (weights_bytes, state_bytes) = (compute + masters, STATE_BYTES * trained);
    let memory_bytes = weights_bytes + state_bytes + activation_bytes;
    let cache: usize = question.decoding.buffers.iter().skip(3).map(|buffer| buffer.bytes).sum();
    let serving_bytes = compute + cache;
    let rows = question.sequence * question.micro_batch;
    let step_s =
        seconds(question.training, speed, question.micro_batch) + update_seconds(question, speed);
    let predicted = rows as f64 / step_s;
    let one = question.measured.unwrap_or(predicted);
    let days_watched = soaked.seconds.max(1.0) / DAY_S;
    let measured_rate = soaked.faults as f64 / days_watched;
    let rate = question.faults_per_day.unwrap_or(measured_rate);
    let goodput = goodput(&Losses {
        rate_per_s: rate * devices as f64 / DAY_S,
        step_s: rows as f64 / one,
        snapshot_s: 12.0 * question.parameters as f64 / SNAPSHOT_BYTES_PER_S,
        devices,
    });
    let days = tokens / (one * devices as f64 * goodput) / DAY_S;
    Forecast {
        model: question.model.clone(),
        parameters: question.parameters,
        dtype,
        sequence: question.sequence,
        micro_batch: question.micro_batch,
        memory_bytes,
        weights_bytes,
        state_bytes,
        activation_bytes,
        serving_bytes,
        device_bytes,
        fits: memory_bytes as u64 <= device_bytes,
        fits_serving: serving_bytes as u64 <= device_bytes,
        tokens_per_s: one * devices as f64,
        tokens_per_s_predicted: predicted * devices as f64,
        tokens_per_s_measured: question.measured.map(|tokens| tokens * devices as f64),
        decode_tokens_per_s: 1.0 / seconds(question.decoding, speed, 1),
        tokens,
        devices,
        days,
        device_hours: days * 24.0 * devices as f64,
        faults_per_day: rate,
        faults_per_day_upper: (soaked.faults as f64 + UPPER_EVENTS) / days_watched,
        faults_expected: rate * devices as f64 * days,
        goodput,
    }
}

struct Losses {
    /// Faults a second of all devices.
    rate_per_s: f64,
    step_s: f64,
    snapshot_s: f64,
    devices: usize,
}

/// The share of time in steps that count. Peers keep a copy of the state, so that a fault costs a
/// restart and a step; a single device also repeats half a snapshot's interval.
fn goodput(losses: &Losses) -> f64 {
    let repeated = if losses.devices > 1 { 0.0 } else { SNAPSHOT_EVERY_S / 2.0 };
    // Of several devices, the others work on while one restarts.
    let away = RESTART_S / losses.devices as f64;
    let per_second = losses.snapshot_s / SNAPSHOT_EVERY_S
        + losses.rate_per_s * (away + losses.step_s + repeated);
    1.0 / (1.0 + per_second)
}

/// Predicted seconds of a program whose rows are so many sequences.
fn seconds(program: &Program, speed: &Speed, sequences: usize) -> f64 {
    program.ops.iter().map(|op| op_seconds(op, speed, sequences)).sum()
}

fn op_seconds(op: &Op, speed: &Speed, sequences: usize) -> f64 {
    let mut least = cost(op);
    // The cost of attention is that of one long document; rows see only their own sequence.
    if matches!(op, Op::Attention(_) | Op::AttentionBwd(_)) {
        least.matrix_flops /= sequences as f64;
    }
    let operands = op.operands();
    let floats = operands.iter().map(|operand| operand.view.dtype).find(|dtype| dtype.is_float());
    let dtype = floats.unwrap_or(DType::F32);
    let (floor, _) = speed.roofs.floor(&least, dtype);
    floor / fraction(op.name().name(), dtype, speed) + speed.roofs.latency
}

/// The median roof fraction of an operation's measurements, in its dtype where there is one.
fn fraction(op: &str, dtype: DType, speed: &Speed) -> f64 {
    let of = |dtype: Option<&str>| -> Vec<f64> {
        let same = |row: &&crate::speed::SpeedRow| {
            row.op == op && dtype.is_none_or(|dtype| row.dtype == dtype)
        };
        let mut list: Vec<f64> =
            speed.rows.iter().filter(same).map(|row| row.roof_fraction).collect();
        list.sort_by(f64::total_cmp);
        list
    };
    let mut list = of(Some(dtype.name()));
    if list.is_empty() {
        list = of(None);
    }
    list.get(list.len() / 2).copied().unwrap_or(FRACTION_ASSUMED).max(1e-6)
}

/// AdamW over all trained elements: it reads and writes masters and moments, reads gradients and
/// writes the compute copy.
fn update_seconds(question: &Question<'_>, speed: &Speed) -> f64 {
    let bytes = question.trained as f64 * (7.0 * 4.0 + question.dtype.bits() as f64 / 8.0);
    bytes / speed.roofs.memory.max(1.0) / fraction("AdamW", DType::F32, speed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodput_falls_with_faults_and_less_so_with_peers() {
        let with = |rate: f64, devices: usize| {
            let rate_per_s = rate / DAY_S;
            goodput(&Losses { rate_per_s, step_s: 1.0, snapshot_s: 0.0, devices })
        };
        assert_eq!(with(0.0, 1), 1.0);
        // A hundred faults a day, each 331 s, cost 38% on top of a day's work.
        assert!((with(100.0, 1) - 1.0 / (1.0 + 100.0 * 331.0 / DAY_S)).abs() < 1e-12);
        assert!(with(100.0, 8) > 0.99);
    }
}
