//! The layer for multi-token prediction against DeepSeek's published formula, computed by
//! `tests/golden/make_serving_goldens.py` with transformers' own layer.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{
    DrawReads, ExtraLayer, Model, ModelConfig, PagedHead, PagedShape, WeightFormat, Weights,
};
use pontoon_ops::{DType, sampling};
use pontoon_program::{Executor, Memory};

const BLOCK: usize = 16;

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(case)
}

fn assert_near(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    let size = want.iter().fold(0.0, |size: f32, value| size.max(value.abs()));
    let error = got.iter().zip(want).fold(0.0, |e: f32, (a, b)| e.max((a - b).abs()));
    assert!(error < 1e-4 * size, "{name}: off by {error} of {size}");
}

/// Two sequences of so many rows, each in a block of its own.
fn write_rows(program: &Executor, backend: &mut CpuBackend, ids: &[i32], tokens: usize) {
    let rows = ids.len();
    let sequences = rows / tokens;
    let mut write = |name: &str, values: &[i32]| {
        program.write(backend, name, bytemuck::cast_slice(values)).unwrap();
    };
    let position = |row: usize| (row % tokens) as i32;
    write("ids", ids);
    write("positions", &(0..rows).map(position).collect::<Vec<_>>());
    let slot = |row: usize| (row / tokens * BLOCK) as i32 + position(row);
    write("slots", &(0..rows).map(slot).collect::<Vec<_>>());
    write("blocks", &(0..sequences as i32).collect::<Vec<_>>());
    write("lengths", &vec![tokens as i32; sequences]);
    write("queries", &(0..=sequences).map(|at| (at * tokens) as i32).collect::<Vec<_>>());
    program.write(backend, "settings", &vec![0; rows * sampling::COUNT * 4]).unwrap();
    program.write(backend, "keys", &vec![0; rows * 16]).unwrap();
    program.run_and_wait(backend, Duration::from_secs(60)).unwrap();
}

fn read(program: &Executor, backend: &mut CpuBackend, name: &str, count: usize) -> Vec<f32> {
    let mut values = vec![0.0_f32; count];
    program.read(backend, name, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

#[test]
fn hidden_states_and_guesses_are_those_of_the_formula() {
    let folder = folder("deepseek_v3_plain_mtp");
    let golden = Weights::open_file(&folder.join("mtp.safetensors")).unwrap();
    let config = ModelConfig::from_folder(&folder).unwrap();
    let (vocabulary, width) = (config.vocab_size, config.width);
    let model = Model::stored(config, WeightFormat::Float, ExtraLayer::Present).unwrap();
    let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let mut memory = Memory::new();
    let weights = Weights::open(&folder).unwrap();
    model.upload(&weights, &mut backend, &mut memory, DType::F32).unwrap();
    model.upload_constants(&mut backend, &mut memory, BLOCK, BLOCK).unwrap();
    let next = golden.tensor("next_ids").unwrap();
    let (sequences, tokens) = (next.shape[0], next.shape[1]);
    let rows = sequences * tokens;
    let shape = PagedShape {
        rows,
        sequences,
        block: BLOCK,
        blocks: sequences,
        sequence_blocks: 1,
        positions_max: BLOCK,
    };
    // The main model's rows, of the tokens before those that follow.
    let whole = Weights::open_file(&folder.join("golden.safetensors")).unwrap();
    let all: Vec<i32> = whole
        .tensor("input_ids")
        .unwrap()
        .to_i64()
        .unwrap()
        .chunks(tokens + 1)
        .flat_map(|ids| ids[..tokens].iter().map(|&id| id as i32))
        .collect();
    let head = PagedHead::Serve { vocabulary, reads: DrawReads::Plain };
    let program = model.paged_program(shape, DType::F32, head).unwrap();
    let program = Executor::load(&mut backend, &mut memory, &program).unwrap();
    write_rows(&program, &mut backend, &all, tokens);
    let hidden = read(&program, &mut backend, "hidden", rows * width);
    assert_near("hidden", &hidden, &golden.tensor("hidden").unwrap().to_f32().unwrap());

    let program = model.guess_program(shape, DType::F32, vocabulary).unwrap();
    let program = Executor::load(&mut backend, &mut memory, &program).unwrap();
    program.write(&mut backend, "given", bytemuck::cast_slice(&hidden)).unwrap();
    let next: Vec<i32> = next.to_i64().unwrap().into_iter().map(|id| id as i32).collect();
    write_rows(&program, &mut backend, &next, tokens);
    let want = golden.tensor("mtp_hidden").unwrap().to_f32().unwrap();
    assert_near("guesses' hidden", &read(&program, &mut backend, "hidden", rows * width), &want);
    let want = golden.tensor("mtp_logits").unwrap().to_f32().unwrap();
    let logits = read(&program, &mut backend, "logits", rows * vocabulary);
    assert_near("guesses' logits", &logits, &want);
    let mut guessed = vec![0_i32; rows];
    program.read(&mut backend, "token", bytemuck::cast_slice_mut(&mut guessed)).unwrap();
    for (row, logits) in want.chunks(vocabulary).enumerate() {
        let largest = (0..vocabulary).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        assert_eq!(guessed[row], largest as i32, "row {row}");
    }
}

#[test]
fn a_model_without_the_layer_says_so() {
    let config = ModelConfig::from_folder(&folder("qwen3")).unwrap();
    let error = Model::stored(config, WeightFormat::Float, ExtraLayer::Present).unwrap_err();
    assert!(error.to_string().contains("no layer for multi-token prediction"), "{error}");
}
