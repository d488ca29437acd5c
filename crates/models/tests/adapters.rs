//! Adapters against PEFT, several in one batch with the model itself: logits of the small model
//! `tests/golden/data/qwen3` with the adapters that `tests/golden/make_serving_goldens.py` made.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{Adapters, Model, ModelConfig, PagedHead, PagedShape, Weights};
use pontoon_ops::{DType, IGNORED};
use pontoon_program::{Executor, Memory};

const BLOCK: usize = 16;

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/data").join(case)
}

/// The golden input: two sequences.
struct Input {
    ids: Vec<i32>,
    tokens: usize,
}

impl Input {
    fn open() -> Input {
        let golden = Weights::open_file(&folder("qwen3").join("golden.safetensors")).unwrap();
        let ids = golden.tensor("input_ids").unwrap();
        let values = ids.to_i64().unwrap().into_iter().map(|id| id as i32).collect();
        Input { ids: values, tokens: ids.shape[1] }
    }

    fn sequence(&self, index: usize) -> &[i32] {
        &self.ids[index * self.tokens..][..self.tokens]
    }
}

/// The two adapters, and the model that knows of them.
fn adapted() -> (Model, Adapters) {
    let config = ModelConfig::from_folder(&folder("qwen3")).unwrap();
    let folders = ["plain", "rooted"].map(|name| (name.to_owned(), folder("lora").join(name)));
    let adapters = Adapters::open(&config, &folders).unwrap();
    let model = Model::new(config).unwrap().with_adapters(adapters.shapes().clone());
    (model, adapters)
}

/// Logits of sequences that each go through an adapter or none, in the order adapters must have.
fn logits(
    (model, adapters): (&Model, Option<&Adapters>),
    dtype: DType,
    sequences: &[(&[i32], Option<usize>)],
) -> Vec<f32> {
    let tokens = sequences[0].0.len();
    let rows = sequences.len() * tokens;
    let shape = PagedShape {
        rows,
        sequences: sequences.len(),
        block: BLOCK,
        blocks: sequences.len(),
        sequence_blocks: 1,
        positions_max: BLOCK,
    };
    let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let mut memory = Memory::new();
    let weights = Weights::open(&folder("qwen3")).unwrap();
    model.upload(&weights, &mut backend, &mut memory, dtype).unwrap();
    model.upload_constants(&mut backend, &mut memory, BLOCK, BLOCK).unwrap();
    let program = model.paged_program(shape, dtype, PagedHead::ScoreWithLogits).unwrap();
    let program = Executor::load(&mut backend, &mut memory, &program).unwrap();
    let mut write = |name: &str, values: &[i32]| {
        program.write(&mut backend, name, bytemuck::cast_slice(values)).unwrap();
    };
    let ids: Vec<i32> = sequences.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
    let at = |row: usize| ((row / tokens) as i32, (row % tokens) as i32);
    write("ids", &ids);
    write("positions", &(0..rows).map(|row| at(row).1).collect::<Vec<_>>());
    write("slots", &(0..rows).map(|row| at(row).0 * BLOCK as i32 + at(row).1).collect::<Vec<_>>());
    write("blocks", &(0..sequences.len() as i32).collect::<Vec<_>>());
    write("lengths", &vec![tokens as i32; sequences.len()]);
    let ends = (0..=sequences.len()).map(|index| (index * tokens) as i32);
    write("queries", &ends.collect::<Vec<_>>());
    write("targets", &vec![IGNORED; rows]);
    if let Some(adapters) = adapters {
        let below = |count: usize| {
            let is = |adapter: &Option<usize>| adapter.is_some_and(|adapter| adapter < count);
            (sequences.iter().filter(|(_, adapter)| is(adapter)).count() * tokens) as i32
        };
        let count = adapters.shapes().count;
        write("adapters", &(0..=count).map(below).collect::<Vec<_>>());
        adapters.upload(&mut backend, &mut memory, dtype).unwrap();
    }
    program.run_and_wait(&mut backend, Duration::from_secs(60)).unwrap();
    let mut values = vec![0.0_f32; rows * model.config.vocab_size];
    program.read(&mut backend, "logits", bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

fn worst(got: &[f32], want: &[f32]) -> f32 {
    let size = want.iter().fold(0.0, |size: f32, value| size.max(value.abs()));
    let error = got.iter().zip(want).fold(0.0, |e: f32, (a, b)| e.max((a - b).abs()));
    error / size
}

#[test]
fn each_adapter_in_one_batch_gives_the_logits_of_peft() {
    let input = Input::open();
    let (model, adapters) = adapted();
    let golden = Weights::open_file(&folder("lora").join("golden.safetensors")).unwrap();
    let plain = Weights::open_file(&folder("qwen3").join("golden.safetensors")).unwrap();
    let sequences: Vec<_> = [Some(0), Some(1), None]
        .into_iter()
        .flat_map(|adapter| [0, 1].map(|index| (input.sequence(index), adapter)))
        .collect();
    let got = logits((&model, Some(&adapters)), DType::F32, &sequences);
    let size = got.len() / 3;
    let wants = [(&golden, "logits.plain"), (&golden, "logits.rooted"), (&plain, "logits")];
    for ((source, name), got) in wants.into_iter().zip(got.chunks(size)) {
        let want = source.tensor(name).unwrap().to_f32().unwrap();
        assert!(worst(got, &want) < 1e-4, "{name}: {}", worst(got, &want));
    }
    assert!(worst(&got[..size], &got[2 * size..]) > 0.1, "the adapter changes the answer");
}

#[test]
fn a_sequence_has_the_same_bits_alone_and_beside_those_of_other_adapters() {
    let input = Input::open();
    let (model, adapters) = adapted();
    let bare = Model::new(model.config.clone()).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let sequences: Vec<_> = [Some(0), Some(1), None]
            .into_iter()
            .map(|adapter| (input.sequence(0), adapter))
            .collect();
        let together = logits((&model, Some(&adapters)), dtype, &sequences);
        let size = together.len() / 3;
        for (sequence, got) in sequences.iter().zip(together.chunks(size)) {
            let alone = logits((&model, Some(&adapters)), dtype, &[*sequence]);
            assert_eq!(alone, got, "{dtype} {:?}", sequence.1);
        }
        let without = logits((&bare, None), dtype, &[(input.sequence(0), None)]);
        assert_eq!(without, together[2 * size..], "{dtype}, a server without adapters");
    }
}

#[test]
fn an_adapter_of_another_model_or_kind_is_refused_with_its_reason() {
    let config = ModelConfig::from_folder(&folder("llama2")).unwrap();
    let named = |path: &Path| [("one".to_owned(), path.to_owned())];
    let text = Adapters::open(&config, &named(&folder("lora").join("rooted"))).unwrap_err();
    assert!(text.to_string().contains("should have shape"), "{text}");
    let config = ModelConfig::from_folder(&folder("qwen3")).unwrap();
    let copy = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = folder("lora").join("plain").join(file);
        std::fs::copy(from, copy.path().join(file)).unwrap();
    }
    let path = copy.path().join("adapter_config.json");
    let whole = std::fs::read_to_string(&path).unwrap();
    for (from, to, reason) in [
        ("\"use_dora\": false", "\"use_dora\": true", "`use_dora` is true"),
        ("\"r\": 4", "\"r\": 5", "has rank 4, but r is 5"),
        ("\"r\": 4", "\"r\": 0", "`r` should be from 1 to"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "`bias` is \"all\""),
    ] {
        std::fs::write(&path, whole.replace(from, to)).unwrap();
        let text = Adapters::open(&config, &named(copy.path())).unwrap_err().to_string();
        assert!(text.contains(reason), "{text}");
    }
    let text = Adapters::open(&config, &named(&folder("nowhere"))).unwrap_err().to_string();
    assert!(text.contains("adapter_config.json"), "{text}");
}
