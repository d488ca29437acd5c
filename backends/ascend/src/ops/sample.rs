//! Drawing the next token: penalties, bias, temperature, filters, and one counter-based random
//! number per row.
//!
//! What is small and known to the host (settings, keys, history) is worked out there; everything
//! over the vocabulary happens on the device. The log-probability is the loss's own.

use std::collections::BTreeMap;

use pontoon_ops::philox::{philox4x32, unit};
use pontoon_ops::{self as ops, DeviceError, sampling};

use super::loss::exponentials;
use crate::core::{Core, Done, Order};
use crate::tensor::{Kind, Tensor};

/// What the host knows of the rows.
struct Rules {
    settings: Vec<f32>,
    /// One random number in [0, 1) for each row.
    random: Vec<f32>,
    rows: usize,
}

impl Rules {
    fn of(&self, setting: usize) -> Vec<f32> {
        self.settings.chunks(sampling::COUNT).map(|row| row[setting]).collect()
    }

    fn any(&self, setting: usize, wanted: impl Fn(f32) -> bool) -> bool {
        self.of(setting).into_iter().any(wanted)
    }

    /// A setting of every row on the device, `[rows, 1]`.
    fn column(&self, core: &mut Core, numbers: &[f32]) -> Result<Tensor, DeviceError> {
        core.floats(&[self.rows, 1], numbers)
    }
}

fn rules(core: &mut Core, op: &ops::Sample) -> Result<Rules, DeviceError> {
    let settings = core.fetch_floats(&op.settings)?;
    let keys = core.fetch_integers(&op.keys)?;
    let draw = |row: &[i32]| {
        let [first, second, third, fourth] = [0, 1, 2, 3].map(|index| row[index] as u32);
        unit(philox4x32([first, second], [third, fourth, 0, 0])[0])
    };
    let random = keys.chunks(4).map(draw).collect();
    Ok(Rules { settings, random, rows: op.logits.dim(0) })
}

/// A token's penalties in a row where it stands in the history.
struct Penalty {
    place: i32,
    repetition: f32,
    taken: f32,
}

/// Every touched logit, by its place in `[rows * vocabulary]`.
fn penalties(
    core: &mut Core,
    op: &ops::Sample,
    rules: &Rules,
) -> Result<Vec<Penalty>, DeviceError> {
    let Some(history) = &op.history else { return Ok(Vec::new()) };
    let tokens = core.fetch_integers(history)?;
    let longest = history.dim(1).max(1);
    let mut all = Vec::new();
    for (row, tokens) in tokens.chunks(longest).enumerate() {
        let own = &rules.settings[row * sampling::COUNT..][..sampling::COUNT];
        let prompt = own[sampling::PROMPT_TOKENS] as usize;
        let mut counts: BTreeMap<usize, u32> = BTreeMap::new();
        for (index, &token) in tokens.iter().enumerate() {
            if let Some(token) = usize::try_from(token).ok().filter(|&id| id < op.vocabulary) {
                *counts.entry(token).or_default() += u32::from(index >= prompt);
            }
        }
        for (token, generated) in counts {
            let frequency = own[sampling::FREQUENCY] * generated as f32;
            let taken = if generated > 0 { own[sampling::PRESENCE] + frequency } else { 0.0 };
            let place = (row * op.vocabulary + token) as i32;
            all.push(Penalty { place, repetition: own[sampling::REPETITION], taken });
        }
    }
    Ok(all)
}

/// Repetition divides positive and multiplies negative logits, then the rest is taken.
fn penalise(core: &mut Core, logits: Tensor, touched: &[Penalty]) -> Done {
    let count = touched.len();
    let list = |of: &dyn Fn(&Penalty) -> f32| touched.iter().map(of).collect::<Vec<f32>>();
    let places: Vec<i32> = touched.iter().map(|penalty| penalty.place).collect();
    let flat = logits.reshape(&[logits.elements()]);
    let index = core.integers(&[count], &places)?;
    let own = core.scratch(Kind::F32, &[count])?;
    core.select(flat, 0, index, own)?;
    let repetition = core.floats(&[count], &list(&|penalty| penalty.repetition))?;
    let (divided, multiplied) =
        (core.scratch(Kind::F32, &[count])?, core.scratch(Kind::F32, &[count])?);
    core.div(own, repetition, divided)?;
    core.mul(own, repetition, multiplied)?;
    let positive = core.is_positive(own)?;
    core.choose(positive, divided, multiplied, own)?;
    let taken = core.floats(&[count], &list(&|penalty| penalty.taken))?;
    core.sub(own, taken, own)?;
    let rows = logits.reshape(&[logits.elements(), 1]);
    core.place_rows(rows, index.reshape(&[count, 1]), own.reshape(&[count, 1]))
}

pub(super) fn sample(core: &mut Core, op: &ops::Sample) -> Done {
    let rules = rules(core, op)?;
    let (given, token) = (core.tensor(&op.logits)?, core.tensor(&op.token)?);
    let (rows, vocabulary) = (given.dim(0), op.vocabulary);
    let logits = core.scratch(Kind::F32, &[rows, vocabulary])?;
    core.copy(logits, given.slice(1, 0, vocabulary))?;
    let changed = rules.any(sampling::REPETITION, |factor| factor != 1.0)
        || rules.any(sampling::PRESENCE, |term| term != 0.0)
        || rules.any(sampling::FREQUENCY, |term| term != 0.0);
    let touched = if changed { penalties(core, op, &rules)? } else { Vec::new() };
    if !touched.is_empty() {
        penalise(core, logits, &touched)?;
    }
    if let Some(bias) = &op.bias {
        let bias = core.tensor(bias)?.slice(1, 0, vocabulary);
        core.add(logits, bias, logits)?;
    }
    let finite = core.is_finite(logits)?;
    let finite = core.wide(finite)?;
    let count = core.sum(finite, 1)?;
    let hopeless = core.is_zero(count)?;
    // NaN never wins, and counts for nothing.
    let nan = core.is_nan(logits)?;
    core.fill_where(logits, nan, f32::NEG_INFINITY)?;
    let chosen = choose(core, logits, &rules)?;
    let index = core.converted(chosen, Kind::I64)?;
    log_prob(core, op, given, index, hopeless)?;
    let none = core.integers(&[1, 1], &[-1])?;
    core.choose(hopeless, none, chosen, token.widen(1))
}

/// The token of each row, i32 `[rows, 1]`.
fn choose(core: &mut Core, logits: Tensor, rules: &Rules) -> Result<Tensor, DeviceError> {
    let temperatures = rules.of(sampling::TEMPERATURE);
    let greedy = temperatures.iter().filter(|&&temperature| temperature == 0.0).count();
    let best = match greedy {
        0 => None,
        _ => {
            let best = core.largest_index(logits)?;
            Some(core.converted(best, Kind::I32)?)
        }
    };
    if let (Some(best), true) = (best, greedy == rules.rows) {
        return Ok(best);
    }
    let drawn = draw(core, logits, rules)?;
    let Some(best) = best else { return Ok(drawn) };
    let is_greedy: Vec<u8> = temperatures.iter().map(|&t| u8::from(t == 0.0)).collect();
    let is_greedy = core.constant(Kind::Bool, &[rules.rows, 1], &is_greedy)?;
    let out = core.scratch(Kind::I32, &[rules.rows, 1])?;
    core.choose(is_greedy, best, drawn, out)?;
    Ok(out)
}

/// Draws from every row, whatever greedy rows would draw.
fn draw(core: &mut Core, logits: Tensor, rules: &Rules) -> Result<Tensor, DeviceError> {
    let (rows, vocabulary) = (logits.dim(0), logits.dim(1));
    let weights = core.scratch(Kind::F32, logits.dims())?;
    let peak = core.largest(logits, 1)?;
    core.sub(logits, peak, weights)?;
    let temperatures: Vec<f32> = rules.of(sampling::TEMPERATURE);
    let divisors: Vec<f32> = temperatures.iter().map(|&t| if t == 0.0 { 1.0 } else { t }).collect();
    let divisors = rules.column(core, &divisors)?;
    core.div(weights, divisors, weights)?;
    core.exp(weights, weights)?;
    // An infinite logit leaves no number; it counts for nothing, as in the contract's f64.
    let nan = core.is_nan(weights)?;
    core.fill_where(weights, nan, 0.0)?;
    filter(core, weights, rules)?;
    let running = core.running_sum(weights)?;
    let total = running.slice(1, vocabulary - 1, 1);
    let wanted = rules.column(core, &rules.random)?;
    let threshold = core.scratch(Kind::F32, &[rows, 1])?;
    core.mul(wanted, total, threshold)?;
    // The first token beyond the threshold comes after all that are not beyond it.
    let passed = core.scratch(Kind::Bool, logits.dims())?;
    core.at_most(running, threshold, passed)?;
    let passed = core.wide(passed)?;
    let count = core.sum(passed, 1)?;
    let last = last_kept(core, weights)?;
    let beyond = core.scratch(Kind::Bool, &[rows, 1])?;
    core.less(last, count, beyond)?;
    core.choose(beyond, last, count, count)?;
    core.converted(count, Kind::I32)
}

/// The last token with a weight, f32 `[rows, 1]`; zero if there is none.
fn last_kept(core: &mut Core, weights: Tensor) -> Result<Tensor, DeviceError> {
    let kept = core.is_positive(weights)?;
    let kept = core.wide(kept)?;
    let numbers: Vec<f32> = (0..weights.dim(1)).map(|token| token as f32).collect();
    let numbers = core.floats(&[1, weights.dim(1)], &numbers)?;
    core.mul(kept, numbers, kept)?;
    core.largest(kept, 1)
}

/// Top-k, then top-p, then min-p: what is dropped gets weight zero.
fn filter(core: &mut Core, weights: Tensor, rules: &Rules) -> Done {
    let vocabulary = weights.dim(1);
    let ranked = rules.any(sampling::TOP_K, |k| k > 0.0) || rules.any(sampling::TOP_P, |p| p < 1.0);
    if ranked {
        let (values, order) = core.sorted(weights, Order::Falling)?;
        let limit = |k: f32| if k > 0.0 { k.floor() } else { vocabulary as f32 };
        let limits: Vec<f32> = rules.of(sampling::TOP_K).into_iter().map(limit).collect();
        let limits = rules.column(core, &limits)?;
        let ranks: Vec<f32> = (0..vocabulary).map(|rank| rank as f32).collect();
        let ranks = core.floats(&[1, vocabulary], &ranks)?;
        let dropped = core.scratch(Kind::Bool, weights.dims())?;
        core.at_most(limits, ranks, dropped)?;
        core.fill_where(values, dropped, 0.0)?;
        let running = core.running_sum(values)?;
        let total = core.scratch(Kind::F32, &[weights.dim(0), 1])?;
        core.copy(total, running.slice(1, vocabulary - 1, 1))?;
        // A token is kept if those before it do not reach the share yet; the first always is.
        let before = core.scratch(Kind::F32, weights.dims())?;
        core.sub(running, values, before)?;
        let shares = rules.of(sampling::TOP_P);
        let wanted: Vec<f32> =
            shares.iter().map(|&p| if p < 1.0 { p } else { f32::INFINITY }).collect();
        let wanted = rules.column(core, &wanted)?;
        core.mul(total, wanted, total)?;
        core.at_most(total, before, dropped)?;
        let first = dropped.slice(1, 0, 1);
        let kept = core.constant(Kind::Bool, &[1, 1], &[0])?;
        core.copy(first, kept)?;
        core.fill_where(values, dropped, 0.0)?;
        core.scatter(weights, order, values)?;
    }
    if rules.any(sampling::MIN_P, |p| p > 0.0) {
        let best = core.largest(weights, 1)?;
        let shares = rules.of(sampling::MIN_P);
        let shares = rules.column(core, &shares)?;
        core.mul(best, shares, best)?;
        let dropped = core.scratch(Kind::Bool, weights.dims())?;
        core.less(weights, best, dropped)?;
        core.fill_where(weights, dropped, 0.0)?;
    }
    Ok(())
}

/// The tokens' log-probabilities before any penalty, over all rows of the head.
fn log_prob(
    core: &mut Core,
    op: &ops::Sample,
    given: Tensor,
    index: Tensor,
    hopeless: Tensor,
) -> Done {
    let logits = core.scratch(Kind::F32, given.dims())?;
    core.copy(logits, given)?;
    let own = core.gather(logits, index)?;
    let sums = exponentials(core, logits)?;
    let lse = sums.lse(core)?;
    let logprob = core.tensor(&op.logprob)?.widen(1);
    core.sub(own, lse, logprob)?;
    core.fill_where(logprob, hopeless, f32::NAN)
}
