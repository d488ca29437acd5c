//! Every model family against Hugging Face transformers: logits, loss and all gradients on the
//! small random models of `tests/golden/data`, made by `tests/golden/make_goldens.py`.
//!
//! The device is the CPU backend, so this is at once the widest test of its kernels.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{BatchShape, Model, ModelConfig, Weights};
use pontoon_ops::{Backend, DType};
use pontoon_program::{Class, Executor, Memory, Program, Recompute};

const CASES: [&str; 12] = [
    "llama2",
    "llama3",
    "llama_bias",
    "llama_dynamic",
    "llama_linear",
    "llama_yarn",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_mixed",
    "deepseek_v3",
    "deepseek_v3_plain_mtp",
    "deepseek_v3_fp8",
];

/// One golden case, loaded.
struct Case {
    model: Model,
    weights: Weights,
    golden: Weights,
    ids: Vec<i32>,
    sequences: usize,
    tokens: usize,
}

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(case)
}

impl Case {
    fn open(name: &str) -> Self {
        let folder = folder(name);
        let config = ModelConfig::from_folder(&folder).unwrap();
        let golden = Weights::open_file(&folder.join("golden.safetensors")).unwrap();
        let input = golden.tensor("input_ids").unwrap();
        let (sequences, tokens) = (input.shape[0], input.shape[1]);
        let ids = input.to_i64().unwrap().iter().map(|&id| id as i32).collect();
        let weights = Weights::open(&folder).unwrap();
        Case { model: Model::new(config).unwrap(), weights, golden, ids, sequences, tokens }
    }

    fn shape(&self) -> BatchShape {
        let rows = self.ids.len();
        BatchShape { rows, documents: rows + 1, positions_max: self.tokens }
    }

    fn golden(&self, name: &str) -> Vec<f32> {
        self.golden.tensor(name).unwrap().to_f32().unwrap()
    }

    /// The target of each row: the next token of its sequence, none for the last.
    fn targets(&self) -> Vec<i32> {
        let next = |row: usize| {
            if (row + 1).is_multiple_of(self.tokens) { -100 } else { self.ids[row + 1] }
        };
        (0..self.ids.len()).map(next).collect()
    }

    /// Loads a program with this case's weights and inputs.
    fn load(&self, device: &mut Device, program: &Program, dtype: DType) -> Executor {
        let (backend, memory) = (&mut device.backend, &mut device.memory);
        let values = self.model.load(&self.weights).unwrap();
        values.upload(backend, memory, dtype).unwrap();
        self.model.upload_constants(backend, memory, self.tokens, self.tokens).unwrap();
        let executor = Executor::load(backend, memory, program).unwrap();
        let rows = self.ids.len();
        let positions: Vec<i32> = (0..rows).map(|row| (row % self.tokens) as i32).collect();
        let start = |at: usize| (at.min(self.sequences) * self.tokens) as i32;
        let documents: Vec<i32> = (0..=rows).map(start).collect();
        let weight = 1.0 / (self.sequences * (self.tokens - 1)) as f32;
        let weights: Vec<f32> =
            self.targets().iter().map(|&t| if t < 0 { 0.0 } else { weight }).collect();
        executor.write(backend, "ids", bytemuck::cast_slice(&self.ids)).unwrap();
        executor.write(backend, "positions", bytemuck::cast_slice(&positions)).unwrap();
        executor.write(backend, "documents", bytemuck::cast_slice(&documents)).unwrap();
        if program.inputs.contains_key("targets") {
            executor.write(backend, "targets", bytemuck::cast_slice(&self.targets())).unwrap();
        }
        if program.inputs.contains_key("loss_weight") {
            executor.write(backend, "loss_weight", bytemuck::cast_slice(&weights)).unwrap();
        }
        executor.run_and_wait(backend, Duration::from_secs(60)).unwrap();
        executor
    }

    fn logits(&self, dtype: DType) -> Vec<f32> {
        let mut device = Device::new();
        let program = self.model.logits_program(self.shape(), dtype).unwrap();
        let executor = self.load(&mut device, &program, dtype);
        let mut logits = vec![0.0; program.output("logits").unwrap().elements()];
        let bytes = bytemuck::cast_slice_mut(&mut logits);
        executor.read(&mut device.backend, "logits", bytes).unwrap();
        logits
    }

    /// The loss, and the raw gradients buffer.
    fn gradients(&self, policy: Recompute) -> (f32, Vec<f32>) {
        self.gradients_on(Device::new(), policy)
    }

    fn gradients_on(&self, device: Device, policy: Recompute) -> (f32, Vec<f32>) {
        let mut device = device;
        let program = self.model.training_program(self.shape(), DType::F32, policy).unwrap();
        let executor = self.load(&mut device, &program, DType::F32);
        let mut losses = vec![0.0_f32; self.ids.len()];
        let bytes = bytemuck::cast_slice_mut(&mut losses);
        executor.read(&mut device.backend, "loss", bytes).unwrap();
        let loss = losses.iter().sum::<f32>() / (self.sequences * (self.tokens - 1)) as f32;
        let mut gradients = vec![0.0_f32; self.model.table.trainable_elements()];
        let (buffer, _) = device.memory.get("gradients").unwrap();
        let bytes = bytemuck::cast_slice_mut(&mut gradients);
        device.backend.download(buffer, 0, bytes).unwrap();
        (loss, gradients)
    }
}

struct Device {
    backend: CpuBackend,
    memory: Memory,
}

impl Device {
    fn new() -> Self {
        Device::open(CpuOptions::default())
    }

    fn open(options: CpuOptions) -> Self {
        Device { backend: CpuBackend::new(options).unwrap(), memory: Memory::new() }
    }
}

/// The largest difference over the largest wanted magnitude.
fn error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(0.0_f32, |scale, w| scale.max(w.abs()));
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    let worst = worst.fold(0.0_f32, |a, b| if b.is_nan() || b > a { b } else { a });
    if worst == 0.0 { 0.0 } else { worst / scale }
}

#[test]
fn logits_in_f32_agree_within_1e_4_of_the_largest() {
    for name in CASES {
        let case = Case::open(name);
        let worst = error(&case.logits(DType::F32), &case.golden("logits"));
        assert!(worst < 1e-4, "{name}: {worst:e}");
    }
}

#[test]
fn logits_in_bf16_are_as_near_to_f32_as_the_reference_in_bf16() {
    for name in CASES {
        let case = Case::open(name);
        let exact = case.golden("logits");
        let reference = error(&case.golden("logits_bf16"), &exact);
        let worst = error(&case.logits(DType::Bf16), &exact);
        assert!(worst < 2.0 * reference, "{name}: {worst:e}, the reference {reference:e}");
    }
}

#[test]
fn loss_and_all_gradients_agree() {
    for name in CASES.iter().filter(|name| **name != "deepseek_v3_fp8") {
        let case = Case::open(name);
        let (loss, gradients) = case.gradients(Recompute::Nothing);
        let want = case.golden("loss")[0];
        assert!((loss - want).abs() < 1e-4 * want.abs(), "{name}: loss {loss}, wanted {want}");
        for tensor in case.model.table.tensors() {
            if tensor.class == Class::Frozen {
                continue;
            }
            let want = case.golden(&format!("grad.{}", tensor.name));
            let got = &gradients[tensor.element_offset..][..tensor.elements()];
            let worst = error(got, &want);
            assert!(worst < 1e-3, "{name}: gradient of {} is off by {worst:e}", tensor.name);
        }
    }
}

#[test]
fn recomputation_changes_no_bit_of_the_gradients() {
    for name in ["llama3", "qwen3_moe", "deepseek_v3"] {
        let case = Case::open(name);
        let (_, kept) = case.gradients(Recompute::Nothing);
        for policy in [Recompute::Cheap, Recompute::Layer] {
            let (_, again) = case.gradients(policy);
            let same = kept.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: {policy:?}");
        }
    }
}

#[test]
fn gradients_have_the_same_bits_at_any_thread_count() {
    for name in ["llama3", "qwen3_moe", "deepseek_v3"] {
        let case = Case::open(name);
        let with = |threads| {
            let options = CpuOptions { threads: Some(threads), ..CpuOptions::default() };
            case.gradients_on(Device::open(options), Recompute::Nothing).1
        };
        let one = with(1);
        for threads in [2, 3] {
            let same = one.iter().zip(with(threads)).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: {threads} threads");
        }
    }
}

#[test]
fn the_loss_agrees_on_every_instruction_set() {
    for isa in Isa::available() {
        let case = Case::open("llama3");
        let options = CpuOptions { isa: Some(isa), ..CpuOptions::default() };
        let (loss, _) = case.gradients_on(Device::open(options), Recompute::Nothing);
        let want = case.golden("loss")[0];
        assert!((loss - want).abs() < 1e-4 * want.abs(), "{}: {loss}", isa.name());
    }
}
