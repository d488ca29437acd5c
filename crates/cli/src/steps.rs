//! A model's programs with everything they read, for the commands that hold devices against each
//! other.
//!
//! The only place where models meet the qualification suite, which knows none. Runs nothing. Read
//! next: `commands/compare.rs`, `commands/bisect.rs`.

use std::path::Path;

use anyhow::Result;
use half::{bf16, f16};
use pontoon_models::{
    BatchShape, HostWeights, Model, PagedHead, PagedShape, compute_bytes, preset,
};
use pontoon_ops::philox::Stream;
use pontoon_ops::{DType, IGNORED, Op, View, sampling};
use pontoon_program::{Class, GRADIENTS, Program, Recompute, WEIGHTS};
use pontoon_qualify::compare::{Experts, Sizes};
use pontoon_qualify::step::Step;

use crate::model_source::ModelSource;

/// Positions in one block of a cache.
const BLOCK: usize = 16;

/// A model and its weights: a folder's, or a preset's with fresh ones.
pub fn model_of(name: &str, seed: u64) -> Result<(Model, HostWeights)> {
    if Path::new(name).is_dir() {
        let source = ModelSource::open(Path::new(name))?;
        let weights = source.weights()?;
        return Ok((source.model, weights));
    }
    let model = Model::new(preset(name)?)?;
    let weights = model.initialise(seed);
    Ok((model, weights))
}

/// The sizes of a model from which the limits of a comparison follow.
pub fn sizes(model: &Model, dtype: DType, steps: usize) -> Sizes {
    Sizes {
        dtype,
        layers: model.config.layer_count,
        width: model.config.width.max(model.config.mlp_width),
        steps,
        experts: match model.config.experts_per_token() {
            0 => Experts::None,
            _ => Experts::Some,
        },
    }
}

/// Documents packed into one batch.
pub struct Packed {
    ids: Vec<i32>,
    targets: Vec<i32>,
    positions: Vec<i32>,
    documents: Vec<i32>,
    longest: usize,
}

impl Packed {
    /// Packs documents one after another; a document's last row has no target.
    pub fn new(documents: &[Vec<u32>]) -> Packed {
        let mut packed = Packed {
            ids: Vec::new(),
            targets: Vec::new(),
            positions: Vec::new(),
            documents: vec![0],
            longest: documents.iter().map(Vec::len).max().unwrap_or(0),
        };
        for document in documents {
            packed.ids.extend(document.iter().map(|&id| id as i32));
            packed.targets.extend(document[1..].iter().map(|&id| id as i32).chain([IGNORED]));
            packed.positions.extend(0..document.len() as i32);
            packed.documents.push(packed.ids.len() as i32);
        }
        packed
    }

    /// The batch's sizes.
    pub fn shape(&self) -> BatchShape {
        let (rows, documents) = (self.ids.len(), self.documents.len());
        BatchShape { rows, documents, positions_max: self.longest }
    }

    fn contents(&self) -> Vec<(String, Vec<u8>)> {
        let valid = self.targets.iter().filter(|&&target| target != IGNORED).count();
        let weight = 1.0 / valid.max(1) as f32;
        let of = |&target: &i32| if target == IGNORED { 0.0 } else { weight };
        let loss_weight: Vec<f32> = self.targets.iter().map(of).collect();
        vec![
            ("ids".to_owned(), bytes(&self.ids)),
            ("targets".to_owned(), bytes(&self.targets)),
            ("positions".to_owned(), bytes(&self.positions)),
            ("documents".to_owned(), bytes(&self.documents)),
            ("loss_weight".to_owned(), bytes(&loss_weight)),
        ]
    }
}

fn bytes<T: bytemuck::NoUninit>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Random documents, for presets and where no text is given.
pub fn random_documents(count: usize, length: usize, vocabulary: usize) -> Vec<Vec<u32>> {
    let stream = Stream::new(17, 4);
    let token = |index: usize| stream.below(index as u64, vocabulary as u64) as u32;
    (0..count).map(|one| (0..length).map(|at| token(one * length + at)).collect()).collect()
}

/// A model as steps see it.
pub struct Steps<'a> {
    /// The model.
    pub model: &'a Model,
    /// Its weights.
    pub weights: &'a HostWeights,
    /// What it computes in.
    pub dtype: DType,
}

impl Steps<'_> {
    /// All logits of a batch.
    pub fn logits(&self, batch: &Packed) -> Result<Step> {
        let program = self.model.logits_program(batch.shape(), self.dtype)?;
        self.with(program, batch.contents(), batch.longest)
    }

    /// Loss and gradients of a batch.
    pub fn training(&self, batch: &Packed) -> Result<Step> {
        let policy = Recompute::Nothing;
        let program = self.model.training_program(batch.shape(), self.dtype, policy)?;
        self.with(program, batch.contents(), batch.longest)
    }

    /// A prompt on an empty cache, and the draw of its next token, greedily.
    pub fn drawing(&self, prompt: &[u32]) -> Result<Step> {
        let rows = prompt.len();
        let blocks = rows.div_ceil(BLOCK);
        let shape = PagedShape {
            rows,
            sequences: 1,
            block: BLOCK,
            blocks,
            sequence_blocks: blocks,
            positions_max: rows,
        };
        let head = PagedHead::Sample { vocabulary: self.model.config.vocab_size };
        let program = self.model.paged_program(shape, self.dtype, head)?;
        let row = |length: usize| (0..length as i32).collect::<Vec<i32>>();
        let ids: Vec<i32> = prompt.iter().map(|&id| id as i32).collect();
        let contents = vec![
            ("ids".to_owned(), bytes(&ids)),
            ("positions".to_owned(), bytes(&row(rows))),
            ("slots".to_owned(), bytes(&row(rows))),
            ("blocks".to_owned(), bytes(&row(blocks))),
            ("lengths".to_owned(), bytes(&[rows as i32])),
            ("queries".to_owned(), bytes(&[0, rows as i32])),
            ("settings".to_owned(), bytes(&vec![0.0_f32; rows * sampling::COUNT])),
        ];
        self.with(program, contents, rows)
    }

    /// The same model in f32 with the weights that this dtype rounds to: what the truth is
    /// computed from.
    pub fn widened(&self) -> HostWeights {
        let round: fn(f32) -> f32 = match self.dtype {
            DType::Bf16 => |value| bf16::from_f32(value).to_f32(),
            DType::F16 => |value| f16::from_f32(value).to_f32(),
            _ => |value| value,
        };
        let trainable = self.weights.trainable.iter().map(|&value| round(value)).collect();
        HostWeights { trainable, frozen: self.weights.frozen.clone() }
    }

    fn with(
        &self,
        program: Program,
        mut contents: Vec<(String, Vec<u8>)>,
        positions: usize,
    ) -> Result<Step> {
        contents.push(("weights".to_owned(), compute_bytes(&self.weights.trainable, self.dtype)));
        if !self.weights.frozen.is_empty() {
            contents.push(("frozen".to_owned(), bytes(&self.weights.frozen)));
        }
        let constants = self.model.constants(positions, positions);
        contents.extend(constants.into_iter().map(|constant| (constant.name, constant.bytes)));
        Ok(Step::new(program, contents)?)
    }
}

/// The names on disk of the parameters that an operation reads or whose gradient it writes.
pub fn parameters_of(model: &Model, dtype: DType, op: &Op) -> Vec<String> {
    let element = |view: &View| match view.buffer {
        WEIGHTS => Some(view.byte_offset * 8 / dtype.bits()),
        GRADIENTS => Some(view.byte_offset / 4),
        _ => None,
    };
    let mut names = Vec::new();
    for at in op.operands().iter().filter_map(|operand| element(&operand.view)) {
        let holds = |parameter: &&pontoon_program::Parameter| {
            let start = parameter.element_offset;
            let trained = parameter.spec.class != Class::Frozen;
            trained && (start..start + parameter.elements().max(1)).contains(&at)
        };
        let found = model.table.parameters().iter().find(holds);
        names.extend(found.map(|parameter| parameter.spec.name.clone()));
    }
    names.dedup();
    names
}

/// The decoder layer that an operation belongs to: its parameter's, else its segment's.
pub fn layer_of(parameters: &[String], segment: u32) -> Option<usize> {
    let of = |name: &String| name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok();
    match parameters.first() {
        Some(name) => of(name),
        None => segment.checked_sub(1).map(|layer| layer as usize),
    }
}
