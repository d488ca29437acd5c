//! What these tests share: a device that lies in one way, and steps of small real models.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]
#![allow(dead_code, reason = "each file of tests uses a part of this")]

use std::time::Duration;

use pontoon_cpu::simd::Isa;
use pontoon_cpu::{CpuBackend, CpuOptions};
use pontoon_models::{BatchShape, HostWeights, Model, compute_bytes, preset};
use pontoon_ops::philox::Stream;
use pontoon_ops::{Backend, DType, DeviceError, Op, OpName, RopeStyle, View};
use pontoon_program::{Class, Program, Recompute};
use pontoon_qualify::step::Step;

/// What a bad chip does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Nothing.
    None,
    /// A 16-bit result is cut instead of rounded.
    WrongRounding,
    /// The last columns of a product's last tile are never written.
    DroppedTail,
    /// Each row sees one key too many.
    MissingCausalEdge,
    /// A reduction starts from what the launch before it left behind.
    StaleWorkspace,
    /// A reduction's last bit depends on how often it ran.
    NonDeterministic,
    /// Halves are rotated as if they were neighbours.
    SwappedRopeHalves,
    /// A sum's low bits are lost on the way.
    Bf16Accumulation,
    /// Of equal experts the higher one wins.
    WrongExpertOnTies,
    /// One bit of one product is wrong, once, at this launch.
    LiesOnce(usize),
    /// Waiting never ends, from this launch on.
    Hangs(usize),
}

/// Every kind of lasting defect, with the operation it sits in.
pub const LASTING: [(Defect, OpName); 8] = [
    (Defect::WrongRounding, OpName::Matmul),
    (Defect::DroppedTail, OpName::Matmul),
    (Defect::MissingCausalEdge, OpName::Attention),
    (Defect::StaleWorkspace, OpName::RmsNormBwd),
    (Defect::NonDeterministic, OpName::RmsNormBwd),
    (Defect::SwappedRopeHalves, OpName::Rope),
    (Defect::Bf16Accumulation, OpName::Matmul),
    (Defect::WrongExpertOnTies, OpName::RouterTopK),
];

/// A good device with a defect planted in front of it.
pub struct Liar {
    inner: CpuBackend,
    defect: Defect,
    launches: usize,
    left_over: f32,
}

impl Liar {
    pub fn new(defect: Defect) -> Liar {
        Liar::on(Isa::detect().unwrap(), defect)
    }

    pub fn on(isa: Isa, defect: Defect) -> Liar {
        let inner = CpuBackend::new(CpuOptions { isa: Some(isa), threads: Some(2) }).unwrap();
        Liar { inner, defect, launches: 0, left_over: 0.0 }
    }

    /// Changes a view's bytes, first element to last, and puts them back.
    fn edit(&mut self, view: &View, change: impl FnOnce(&mut [u8])) -> Result<(), DeviceError> {
        let mut bytes = vec![0; view.span_bytes()];
        self.inner.download(view.buffer, view.byte_offset, &mut bytes)?;
        change(&mut bytes);
        self.inner.upload(view.buffer, view.byte_offset, &bytes)
    }

    fn lie(&mut self, op: &Op) -> Result<(), DeviceError> {
        match (self.defect, op) {
            (Defect::DroppedTail, Op::Matmul(op)) if op.c.dim(1) % 16 == 0 => {
                let size = op.c.dtype.bytes(1);
                self.edit(&op.c, |bytes| {
                    let tail = bytes.len() - size;
                    bytes[tail..].fill(0);
                })
            }
            (Defect::WrongRounding, Op::Matmul(op)) if op.c.dtype == DType::Bf16 => {
                // A result that was rounded up is one unit too large for one that is cut.
                self.edit(&op.c, |bytes| {
                    for number in bytes.chunks_mut(2) {
                        let cut = u16::from_le_bytes(number.try_into().unwrap()).wrapping_sub(1);
                        number.copy_from_slice(&cut.to_le_bytes());
                    }
                })
            }
            (Defect::Bf16Accumulation, Op::Matmul(op)) if op.c.dtype == DType::F32 => {
                // An f32 without its lower half is a bf16.
                self.edit(&op.c, |bytes| bytes.chunks_mut(4).for_each(|n| n[..2].fill(0)))
            }
            (Defect::StaleWorkspace, Op::RmsNormBwd(op)) => {
                let add = self.left_over;
                let mut kept = 0.0;
                self.edit(&op.dweight, |bytes| {
                    let first = f32::from_le_bytes(bytes[..4].try_into().unwrap());
                    kept = first;
                    bytes[..4].copy_from_slice(&(first + add).to_le_bytes());
                })?;
                self.left_over = kept;
                Ok(())
            }
            (Defect::NonDeterministic, Op::RmsNormBwd(op)) => {
                let odd = self.launches.is_multiple_of(2);
                self.edit(&op.dweight, |bytes| bytes[0] ^= u8::from(odd))
            }
            (Defect::WrongExpertOnTies, Op::RouterTopK(op)) => {
                let mut logits = vec![0; op.logits.span_bytes()];
                self.inner.download(op.logits.buffer, op.logits.byte_offset, &mut logits)?;
                let row: Vec<&[u8]> = logits.chunks(4).take(op.logits.dim(1)).collect();
                let last = row.len() - 1;
                if row[0] == row[last] {
                    let last = (last as i32).to_le_bytes();
                    return self.edit(&op.experts, |bytes| bytes[..4].copy_from_slice(&last));
                }
                Ok(())
            }
            (Defect::LiesOnce(at), Op::Matmul(op)) if self.launches >= at => {
                self.defect = Defect::None;
                self.edit(&op.c, |bytes| bytes[5] ^= 1)
            }
            _ => Ok(()),
        }
    }

    /// Queries move up by a row, so that each sees the key after its own.
    fn one_key_too_many(&mut self, op: &pontoon_ops::Attention) -> Result<(), DeviceError> {
        let rows = op.q.dim(0);
        let mut shifted = op.clone();
        shifted.q = op.q.slice(0, 0, rows - 1);
        shifted.k = op.k.slice(0, 1, rows - 1);
        shifted.v = op.v.slice(0, 1, rows - 1);
        shifted.out = op.out.slice(0, 0, rows - 1);
        shifted.lse = op.lse.slice(0, 0, rows - 1);
        let most = (rows - 1) as i32;
        let mut before = vec![0; op.documents.span_bytes()];
        self.inner.download(op.documents.buffer, op.documents.byte_offset, &mut before)?;
        self.edit(&op.documents, |bytes| {
            for start in bytes.chunks_mut(4) {
                let value = i32::from_le_bytes((&*start).try_into().unwrap());
                start.copy_from_slice(&value.min(most).to_le_bytes());
            }
        })?;
        self.inner.launch(&shifted.into())?;
        self.inner.upload(op.documents.buffer, op.documents.byte_offset, &before)
    }
}

impl Backend for Liar {
    pontoon_ops::delegate!(inner: info alloc free upload download supports memory_used);

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.launches += 1;
        match (self.defect, op) {
            (Defect::SwappedRopeHalves, Op::Rope(rope)) => {
                let style = match rope.style {
                    RopeStyle::HalfSplit => RopeStyle::Interleaved,
                    RopeStyle::Interleaved => RopeStyle::HalfSplit,
                };
                self.inner.launch(&pontoon_ops::Rope { style, ..rope.clone() }.into())?;
            }
            (Defect::MissingCausalEdge, Op::Attention(attention)) if attention.q.dim(0) > 1 => {
                self.inner.launch(op)?;
                self.one_key_too_many(attention)?;
            }
            _ => self.inner.launch(op)?,
        }
        self.lie(op)
    }

    fn wait(&mut self, deadline: Duration) -> Result<(), DeviceError> {
        match self.defect {
            Defect::Hangs(at) if self.launches >= at => {
                let text = format!("nothing finished within {deadline:?}");
                Err(DeviceError::new(pontoon_ops::DeviceErrorKind::Hang, text))
            }
            _ => self.inner.wait(deadline),
        }
    }
}

/// A preset with fresh weights. Routers are zeroed, so that all experts are equally good.
pub fn model(name: &str, layers: usize) -> (Model, HostWeights) {
    let mut config = preset(name).unwrap().with_vocab_size(300);
    config.layer_count = layers;
    let model = Model::new(config).unwrap();
    let mut weights = model.initialise(7);
    for slice in model.table.tensors() {
        if slice.class != Class::Frozen && slice.name.ends_with("mlp.gate.weight") {
            weights.tensor_mut(&slice).fill(0.0);
        }
    }
    (model, weights)
}

fn integers(values: impl Iterator<Item = usize>) -> Vec<u8> {
    values.flat_map(|value| (value as i32).to_le_bytes()).collect()
}

/// One packed batch of two documents of random tokens.
pub fn inputs(model: &Model, rows: usize) -> Vec<(String, Vec<u8>)> {
    let stream = Stream::new(3, 3);
    let token = |row: usize| stream.below(row as u64, model.config.vocab_size as u64) as usize;
    let first = rows / 3;
    let position = |row: usize| if row < first { row } else { row - first };
    vec![
        ("ids".to_owned(), integers((0..rows).map(token))),
        ("targets".to_owned(), integers((0..rows).map(|row| token(row + 1)))),
        ("positions".to_owned(), integers((0..rows).map(position))),
        ("documents".to_owned(), integers([0, first, rows].into_iter())),
        (
            "loss_weight".to_owned(),
            bytemuck::cast_slice(&vec![1.0_f32 / rows as f32; rows]).to_vec(),
        ),
    ]
}

/// A program of a model with its weights, constants and inputs.
pub fn step(model: &Model, weights: &HostWeights, program: Program, dtype: DType) -> Step {
    let rows = program.input("ids").unwrap().dim(0);
    let mut contents = inputs(model, rows);
    contents.push(("weights".to_owned(), compute_bytes(&weights.trainable, dtype)));
    if !weights.frozen.is_empty() {
        contents.push(("frozen".to_owned(), bytemuck::cast_slice(&weights.frozen).to_vec()));
    }
    contents.extend(model.constants(rows, rows).into_iter().map(|c| (c.name, c.bytes)));
    Step::new(program, contents).unwrap()
}

/// A training step.
pub fn training(name: &str, layers: usize, rows: usize, dtype: DType) -> Step {
    let (model, weights) = model(name, layers);
    let shape = BatchShape { rows, documents: 3, positions_max: rows };
    let program = model.training_program(shape, dtype, Recompute::Nothing).unwrap();
    step(&model, &weights, program, dtype)
}
