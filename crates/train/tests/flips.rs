//! Bits flipped at random while a step is computed: every one that changes the step's result must
//! be found before the step is applied.
//!
//! `PONTOON_FLIPS=3000 cargo test --release -p pontoon-train --test flips -- --nocapture` prints
//! the rates by operation; the test itself makes do with fewer.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::collections::BTreeMap;

use pontoon_cpu::gemm::Flip;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{Model, preset};
use pontoon_ops::philox::Stream;
use pontoon_ops::sums::{Ask, Sums};
use pontoon_ops::{Backend, DType, DeviceError, Op, View};
use pontoon_train::data::Batch;
use pontoon_train::{RunConfig, TrainingState};

/// Flips of a test that runs always.
const FLIPS: u64 = 60;
const SEED: u64 = 20_261_125;

/// Where a bit flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// In memory, right after an operation has stored its result.
    Stored,
    /// In the f32 sums of a product, before they are rounded and stored.
    Sums,
}

/// Flips one bit at one launch of a step.
struct Flipper {
    inner: CpuBackend,
    launches: u64,
    at: Option<(u64, Target)>,
    random: Stream,
    draws: u64,
    /// What was flipped.
    flipped: Option<String>,
    /// The operations of a step, to choose from.
    seen: Vec<Op>,
}

impl Flipper {
    fn below(&mut self, bound: usize) -> usize {
        self.draws += 1;
        self.random.below(self.draws, bound as u64) as usize
    }

    /// A sign or exponent bit of an element.
    fn bit(&mut self, dtype: DType) -> usize {
        match dtype {
            DType::F32 => 23 + self.below(9),
            _ => 7 + self.below(9),
        }
    }

    fn flip_stored(&mut self, op: &Op) {
        let floats = |view: &View| matches!(view.dtype, DType::F32 | DType::Bf16);
        let written: Vec<(&str, View)> = op
            .operands()
            .iter()
            .filter(|operand| operand.access.writes() && floats(&operand.view))
            .map(|operand| (operand.name, operand.view))
            .collect();
        let (name, view) = written[self.below(written.len())];
        let mut rest = self.below(view.elements());
        let mut element = 0;
        for axis in (0..view.dims().len()).rev() {
            element += rest % view.dim(axis) * view.stride(axis);
            rest /= view.dim(axis);
        }
        let size = view.dtype.bytes(1);
        let bit = self.bit(view.dtype);
        let mut bytes = vec![0; size];
        let at = view.byte_offset + element * size;
        self.inner.download(view.buffer, at, &mut bytes).unwrap();
        bytes[bit / 8] ^= 1 << (bit % 8);
        self.inner.upload(view.buffer, at, &bytes).unwrap();
        self.flipped = Some(format!("{}.{name}", op.name().name()));
    }

    fn launch_with<T>(
        &mut self,
        op: &Op,
        launch: impl FnOnce(&mut CpuBackend) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        self.seen.push(op.clone());
        self.launches += 1;
        let now = self.at.filter(|(at, _)| *at == self.launches - 1).map(|(_, target)| target);
        if let (Some(Target::Sums), Op::Matmul(product)) = (now, op) {
            let (row, column) = (self.below(product.c.dim(0)), self.below(product.c.dim(1)));
            let bit = self.bit(DType::F32) as u32;
            self.inner.spoil_next_product(Flip { row, column, bit });
            self.flipped = Some("Matmul's f32 sums".to_owned());
        }
        let result = launch(&mut self.inner)?;
        if now == Some(Target::Stored) {
            self.flip_stored(op);
        }
        Ok(result)
    }
}

impl Backend for Flipper {
    pontoon_ops::delegate!(inner: info alloc free upload download supports sums wait memory_used);

    fn sums_in_place(&self) -> bool {
        true
    }
    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.launch_with(op, |inner| inner.launch(op))
    }
    fn launch_summed(&mut self, op: &Op, ask: Ask) -> Result<Sums, DeviceError> {
        self.launch_with(op, |inner| inner.launch_summed(op, ask))
    }
}

/// Learning rate and decay are zero, so that every step computes the same gradient.
const SETTINGS: &str = "[data]\nsequence = 32\n[train]\nmicro_batch = 1\nmicro_batches = 2\n\
    lr = 0.0\nweight_decay = 0.0\nwarmup = 0\n";

struct Bench {
    device: Flipper,
    state: TrainingState,
    batches: Vec<Batch>,
    step: u64,
}

impl Bench {
    fn new(name: &str) -> Bench {
        let config = RunConfig::parse(SETTINGS, &[], "the test's settings").unwrap();
        let model = Model::new(preset(name).unwrap().with_vocab_size(300)).unwrap();
        let options = CpuOptions { threads: Some(2), ..CpuOptions::default() };
        let mut device = Flipper {
            inner: CpuBackend::new(options).unwrap(),
            launches: 0,
            at: None,
            random: Stream::new(SEED, 7),
            draws: 0,
            flipped: None,
            seen: Vec::new(),
        };
        let weights = model.initialise(3);
        let state = TrainingState::load(&mut device, &model, &config, &weights).unwrap();
        let stream = Stream::new(1, 2);
        let batch = |index: u64| {
            let tokens: Vec<i32> =
                (0..33).map(|place| stream.below(100 * index + place, 300) as i32).collect();
            Batch {
                ids: tokens[..32].to_vec(),
                targets: tokens[1..].to_vec(),
                positions: (0..32).collect(),
                documents: std::iter::once(0).chain(std::iter::repeat_n(32, 32)).collect(),
                valid: 32,
            }
        };
        Bench { device, state, batches: vec![batch(0), batch(1)], step: 0 }
    }

    /// The loss's and norm's bits, and what was found.
    fn step(&mut self, at: Option<(u64, Target)>) -> (Option<[u64; 2]>, Vec<String>) {
        self.step += 1;
        (self.device.launches, self.device.at, self.device.flipped) = (0, at, None);
        self.device.seen.clear();
        let result = self.state.step(&mut self.device, self.step, &self.batches);
        let mut found = self.state.take_findings();
        let bits = match result {
            Ok(result) => Some([result.loss.to_bits(), result.gradient_norm.to_bits()]),
            Err(error) => {
                found.push(error.to_string());
                None
            }
        };
        (bits, found)
    }
}

fn sweep(model: &str, flips: u64) {
    let mut bench = Bench::new(model);
    let (clean, found) = bench.step(None);
    assert!(found.is_empty(), "a false alarm: {found:?}");
    let ops = bench.device.seen.clone();
    let mut rates: BTreeMap<String, [u64; 3]> = BTreeMap::new();
    let floats =
        |op: &Op| op.operands().iter().any(|o| o.access.writes() && o.view.dtype.is_float());
    // Weights and moments outlive the step: replicas compare their digests, and a flip here would
    // spoil the steps that follow.
    let passes = |op: &Op| floats(op) && !matches!(op, Op::AdamW(_));
    let stored: Vec<u64> = (0..ops.len()).filter(|i| passes(&ops[*i])).map(|i| i as u64).collect();
    let products: Vec<u64> =
        (0..ops.len()).filter(|i| matches!(ops[*i], Op::Matmul(_))).map(|i| i as u64).collect();
    for flip in 0..flips {
        let (list, target) =
            if flip % 3 == 0 { (&products, Target::Sums) } else { (&stored, Target::Stored) };
        let at = list[bench.device.below(list.len())];
        let (bits, found) = bench.step(Some((at, target)));
        let Some(what) = bench.device.flipped.clone() else { continue };
        let rate = rates.entry(what.clone()).or_default();
        rate[0] += 1;
        match (found.is_empty(), bits == clean) {
            (false, _) => rate[1] += 1,
            // Nobody read the bit: it did no harm.
            (true, true) => rate[2] += 1,
            (true, false) => {}
        }
        if !found.is_empty() {
            assert!(bits.is_none() || bits == clean, "{what}: computed again to other bits");
        }
    }
    let (mut all, mut caught) = (0, 0);
    for (what, [flips, found, harmless]) in &rates {
        println!("{model}: {what}: {flips} flips, {found} found, {harmless} without effect");
        all += flips - harmless;
        caught += found;
    }
    println!("{model}: all: {caught} of {all} found");
    assert!(caught * 100 >= all * 99, "seed {SEED}: {caught} of {all} found: {rates:?}");
}

#[test]
fn flipped_bits_that_change_a_step_are_found_before_it_is_applied() {
    let flips = std::env::var("PONTOON_FLIPS").ok().and_then(|text| text.parse().ok());
    let flips = flips.unwrap_or(FLIPS);
    sweep("qwen3-1m", flips);
    sweep("qwen3-moe-8m", flips);
}

#[test]
fn clean_steps_raise_no_alarm() {
    let mut bench = Bench::new("qwen3-1m");
    let steps: u64 =
        std::env::var("PONTOON_CLEAN_STEPS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    for step in 0..steps {
        let (bits, found) = bench.step(None);
        assert!(bits.is_some() && found.is_empty(), "step {step}: {found:?}");
    }
    println!("{steps} clean steps, no alarm");
}
