//! A model: its configuration, where its parameters lie, and the programs it runs as.
//!
//! The forward function itself stands in `families/`, on the blocks of `block.rs`; what is here
//! gives it inputs and a head. Values of parameters are in `values.rs`; this file touches none.

use pontoon_ops::DType;
use pontoon_program::{
    Builder, Class, ParameterSpec, ParameterTable, Program, Recompute, differentiate, recompute,
};

use crate::adapters::AdapterShapes;
use crate::block::{self, Adapting, Attending, CacheInputs, Rows};
use crate::config::{Family, Head, ModelConfig};
use crate::error::ModelError;
use crate::families;
use crate::layout::{Role, TensorSpec};
use crate::quantise::WeightFormat;

/// The output head's name.
const HEAD: &str = "lm_head.weight";

/// A configuration with its parameters placed.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// The sizes.
    pub config: ModelConfig,
    /// Every parameter and its place.
    pub table: ParameterTable,
    /// How its matrices are stored on a device.
    pub format: WeightFormat,
    /// The adapters that programs on a cache have beside it.
    pub adapters: Option<AdapterShapes>,
    /// Whether the layer that predicts the token after the next is there.
    pub extra_layer: ExtraLayer,
}

/// Whether a model is used with its layer for multi-token prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExtraLayer {
    /// Its weights are left on disk.
    #[default]
    Absent,
    /// Programs on a cache fill the layer's own cache, and [`Model::guess_program`] runs it.
    Present,
}

/// The sizes of one micro-batch of whole documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchShape {
    /// Tokens in all: sequences times their length.
    pub rows: usize,
    /// Elements of the `documents` input: `rows + 1` holds any packing.
    pub documents: usize,
    /// Rows of the rotary tables: the longest document.
    pub positions_max: usize,
}

/// The sizes of a program that extends cached sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PagedShape {
    /// New tokens in all.
    pub rows: usize,
    /// Sequences they belong to, at most.
    pub sequences: usize,
    /// Positions in one block of the cache.
    pub block: usize,
    /// Blocks in the cache.
    pub blocks: usize,
    /// Blocks of one sequence, at most.
    pub sequence_blocks: usize,
    /// Rows of the rotary tables: the longest sequence.
    pub positions_max: usize,
}

/// What a program that extends cached sequences computes of its last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagedHead {
    /// Nothing: keys and values are cached, and that is all.
    CacheOnly,
    /// Output `logprob` f32 [rows] of input `targets`.
    Score,
    /// Outputs `token` i32 and `logprob` f32 [rows], drawn by inputs `settings` and `keys`;
    /// tokens from `vocabulary` on are never drawn.
    Sample {
        /// Tokens that exist.
        vocabulary: usize,
    },
    /// As `Sample`, with input `history` i32 [rows, longest] for penalties.
    SampleWithHistory {
        /// Tokens that exist.
        vocabulary: usize,
    },
    /// As `Sample`, with output `logits` f32 [rows, vocabulary] for those who ask for more than
    /// the drawn token's; in `Full` also with inputs `history` and `bias`.
    Serve {
        /// Tokens that exist.
        vocabulary: usize,
        /// What the draw reads besides logits.
        reads: DrawReads,
    },
    /// As `Score`, with output `logits` f32 [rows, vocabulary].
    ScoreWithLogits,
    /// Output `hidden` [rows, width] in the program's dtype: what the output head would read.
    Hidden,
}

/// What the draw of a serving step reads besides the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DrawReads {
    /// Settings and keys alone.
    Plain,
    /// Also `history` i32 [rows, longest], and `bias` f32 [rows, vocabulary], which is added.
    Full,
}

impl Model {
    /// Places the parameters of a configuration.
    pub fn new(config: ModelConfig) -> Result<Model, ModelError> {
        Model::stored(config, WeightFormat::Float, ExtraLayer::Absent)
    }

    /// The same with matrices stored in this format, routed experts included. The embedding, norms,
    /// biases and routers stay float.
    pub fn stored(
        config: ModelConfig,
        format: WeightFormat,
        extra_layer: ExtraLayer,
    ) -> Result<Model, ModelError> {
        let mut specs = parameter_specs(&config, &config.tensors());
        if extra_layer == ExtraLayer::Present {
            let extra = config.extra_tensors();
            if extra.is_empty() {
                let what = "this model has no layer for multi-token prediction".to_owned();
                return Err(ModelError::Request { what });
            }
            specs.extend(parameter_specs(&config, &extra));
        }
        if format != WeightFormat::Float {
            if config.head == Head::Tied {
                // The embedding is looked up as it is, and multiplied with as integers.
                let shape = [config.vocab_size, config.width];
                let head = ParameterSpec::whole(HEAD, &shape, Class::Embedding);
                let tensors = vec![block::EMBEDDING.to_owned()];
                specs.push(ParameterSpec { tensors, ..head });
            }
            specs.iter_mut().for_each(|spec| spec.storage = format.storage(spec));
        }
        let table = ParameterTable::new(specs);
        Ok(Model { config, table, format, adapters: None, extra_layer })
    }

    /// The same with adapters beside it.
    #[must_use]
    pub fn with_adapters(self, shapes: AdapterShapes) -> Model {
        Model { adapters: Some(shapes), ..self }
    }

    /// Forward and backward over a micro-batch.
    ///
    /// Inputs `ids`, `targets` (-100 counts for nothing), `positions` i32 [rows], `documents`
    /// i32 [documents], `loss_weight` f32 [rows]: the gradient of each row's loss. Output `loss`
    /// f32 [rows]. Writes the buffer `gradients`.
    pub fn training_program(
        &self,
        shape: BatchShape,
        dtype: DType,
        policy: Recompute,
    ) -> Result<Program, ModelError> {
        let forward = self.loss_program(format!("train {} {dtype}", shape.rows), shape, dtype)?;
        let loss = forward.output("loss")?;
        Ok(recompute(&differentiate(forward, &[(loss, "loss_weight")])?, policy)?)
    }

    /// The forward part alone: the same inputs without `loss_weight`, output `loss`.
    pub fn scoring_program(&self, shape: BatchShape, dtype: DType) -> Result<Program, ModelError> {
        self.loss_program(format!("score {} {dtype}", shape.rows), shape, dtype)
    }

    /// The forward part with all logits: output `logits` f32 [rows, vocabulary]. For comparing
    /// with other implementations; training and sampling never hold all logits.
    pub fn logits_program(&self, shape: BatchShape, dtype: DType) -> Result<Program, ModelError> {
        let name = format!("logits {} {dtype}", shape.rows);
        let mut builder = Builder::new(name, &self.table, dtype);
        let hidden = self.hidden_of_documents(&mut builder, shape)?;
        let head = self.head(&builder)?;
        let logits = builder.linear_f32(hidden, head)?;
        builder.output("logits", logits);
        Ok(builder.finish())
    }

    /// New tokens of sequences whose earlier keys and values are in a paged cache.
    ///
    /// Inputs `ids`, `positions`, `slots` i32 [rows] (slot -1: a row that is not in use), `blocks`
    /// i32 [sequences, sequence_blocks], `lengths` i32 [sequences], `queries` i32 [sequences + 1],
    /// as `PagedAttention` says; with adapters, `adapters` i32 [adapters + 1]: where the rows of
    /// each begin, and from where on rows have none; and the head's.
    pub fn paged_program(
        &self,
        shape: PagedShape,
        dtype: DType,
        head: PagedHead,
    ) -> Result<Program, ModelError> {
        let name = format!("extend {}x{} {dtype}", shape.sequences, shape.rows);
        let mut builder = Builder::new(name, &self.table, dtype);
        let ids = builder.input("ids", DType::I32, &[shape.rows]);
        let mut rows = cached_rows(&mut builder, shape);
        rows.adapting = self.adapters.as_ref().map(|shapes| {
            let offsets = builder.input("adapters", DType::I32, &[shapes.count + 1]);
            Adapting { shapes, offsets }
        });
        let hidden = families::hidden(&self.config, &mut builder, ids, rows)?;
        if self.extra_layer == ExtraLayer::Present {
            match head {
                PagedHead::CacheOnly => {
                    let next_ids = builder.input("next_ids", DType::I32, &[shape.rows]);
                    let rows = Rows { adapting: None, ..rows };
                    families::extra_hidden(&self.config, &mut builder, (hidden, next_ids), rows)?;
                }
                PagedHead::Serve { .. } => builder.output("hidden", hidden),
                _ => {}
            }
        }
        self.paged_head(&mut builder, hidden, head, shape)?;
        Ok(builder.finish())
    }

    /// Guesses at the tokens after those that follow rows of hidden states, by the extra layer.
    ///
    /// Inputs as [`Model::paged_program`]'s, of positions whose following token is `ids`, without
    /// adapters; `given` [rows, width] in the program's dtype: what the output head read there;
    /// `settings` and `keys` of the draws that are guessed at. Outputs `token`, `logits`, and
    /// `hidden`, to guess on from.
    pub fn guess_program(
        &self,
        shape: PagedShape,
        dtype: DType,
        vocabulary: usize,
    ) -> Result<Program, ModelError> {
        let name = format!("guess {}x{} {dtype}", shape.sequences, shape.rows);
        let mut builder = Builder::new(name, &self.table, dtype);
        let ids = builder.input("ids", DType::I32, &[shape.rows]);
        let given = builder.input("given", dtype, &[shape.rows, self.config.width]);
        let rows = cached_rows(&mut builder, shape);
        let hidden = families::extra_hidden(&self.config, &mut builder, (given, ids), rows)?;
        builder.output("hidden", hidden);
        let head = format!("model.layers.{}.shared_head.head.weight", self.config.layer_count);
        let head = builder.parameter(&head)?;
        let count = pontoon_ops::sampling::COUNT;
        let settings = builder.input("settings", DType::F32, &[shape.rows, count]);
        let keys = builder.input("keys", DType::U32, &[shape.rows, 4]);
        let logits = builder.linear_f32(hidden, head)?;
        builder.output("logits", logits);
        let (bias, history) = (None, None);
        let inputs =
            pontoon_program::SampleInputs { logits, bias, history, settings, keys, vocabulary };
        let (token, _) = builder.sample(inputs)?;
        builder.output("token", token);
        Ok(builder.finish())
    }

    fn loss_program(
        &self,
        name: String,
        shape: BatchShape,
        dtype: DType,
    ) -> Result<Program, ModelError> {
        let mut builder = Builder::new(name, &self.table, dtype);
        let hidden = self.hidden_of_documents(&mut builder, shape)?;
        let targets = builder.input("targets", DType::I32, &[shape.rows]);
        let head = self.head(&builder)?;
        let loss = builder.cross_entropy(hidden, head, targets)?;
        builder.output("loss", loss);
        Ok(builder.finish())
    }

    fn hidden_of_documents(
        &self,
        builder: &mut Builder<'_>,
        shape: BatchShape,
    ) -> Result<pontoon_ops::View, ModelError> {
        let ids = builder.input("ids", DType::I32, &[shape.rows]);
        let positions = builder.input("positions", DType::I32, &[shape.rows]);
        let documents = builder.input("documents", DType::I32, &[shape.documents]);
        let attending = Attending::Documents(documents);
        let positions_max = shape.positions_max;
        let rows = Rows { positions, positions_max, attending, adapting: None };
        families::hidden(&self.config, builder, ids, rows)
    }

    fn paged_head(
        &self,
        builder: &mut Builder<'_>,
        hidden: pontoon_ops::View,
        head: PagedHead,
        shape: PagedShape,
    ) -> Result<(), ModelError> {
        if head == PagedHead::Hidden {
            builder.output("hidden", hidden);
            return Ok(());
        }
        let weight = self.head(builder)?;
        let rows = shape.rows;
        let with_history = |builder: &mut Builder<'_>| {
            Some(builder.input("history", DType::I32, &[rows, shape.positions_max]))
        };
        let (vocabulary, history, biased) = match head {
            PagedHead::CacheOnly | PagedHead::Hidden => return Ok(()),
            PagedHead::Score | PagedHead::ScoreWithLogits => {
                let targets = builder.input("targets", DType::I32, &[rows]);
                let (logprob, _) = builder.token_log_prob(hidden, weight, targets, 1.0)?;
                builder.output("logprob", logprob);
                if head == PagedHead::ScoreWithLogits {
                    let logits = builder.linear_f32(hidden, weight)?;
                    builder.output("logits", logits);
                }
                return Ok(());
            }
            PagedHead::Sample { vocabulary } => (vocabulary, None, false),
            PagedHead::SampleWithHistory { vocabulary } => {
                (vocabulary, with_history(builder), false)
            }
            PagedHead::Serve { vocabulary, reads: DrawReads::Plain } => (vocabulary, None, false),
            PagedHead::Serve { vocabulary, reads: DrawReads::Full } => {
                (vocabulary, with_history(builder), true)
            }
        };
        let count = pontoon_ops::sampling::COUNT;
        let settings = builder.input("settings", DType::F32, &[rows, count]);
        let keys = builder.input("keys", DType::U32, &[rows, 4]);
        let logits = builder.linear_f32(hidden, weight)?;
        if matches!(head, PagedHead::Serve { .. }) {
            builder.output("logits", logits);
        }
        let bias =
            biased.then(|| builder.input("bias", DType::F32, &[rows, self.config.vocab_size]));
        let inputs =
            pontoon_program::SampleInputs { logits, bias, history, settings, keys, vocabulary };
        let (token, logprob) = builder.sample(inputs)?;
        builder.output("token", token);
        builder.output("logprob", logprob);
        Ok(())
    }

    fn head(&self, builder: &Builder<'_>) -> Result<pontoon_ops::View, ModelError> {
        Ok(builder.parameter(match self.config.head {
            Head::Tied if self.format == WeightFormat::Float => block::EMBEDDING,
            Head::Tied | Head::Own => HEAD,
        })?)
    }
}

/// The inputs that place a program's rows in cached sequences.
fn cached_rows(builder: &mut Builder<'_>, shape: PagedShape) -> Rows<'static> {
    let positions = builder.input("positions", DType::I32, &[shape.rows]);
    let sequences = shape.sequences;
    let cache = CacheInputs {
        slots: builder.input("slots", DType::I32, &[shape.rows]),
        blocks: builder.input("blocks", DType::I32, &[sequences, shape.sequence_blocks]),
        lengths: builder.input("lengths", DType::I32, &[sequences]),
        queries: builder.input("queries", DType::I32, &[sequences + 1]),
        block_count: shape.blocks,
        block: shape.block,
    };
    let attending = Attending::Cache(cache);
    Rows { positions, positions_max: shape.positions_max, attending, adapting: None }
}

/// The parameters as programs see them: the experts of a layer are one parameter.
fn parameter_specs(config: &ModelConfig, tensors: &[TensorSpec]) -> Vec<ParameterSpec> {
    let count = match &config.family {
        Family::Llama | Family::Qwen3 => 0,
        Family::Qwen3Moe(experts) => experts.expert_count,
        Family::DeepseekV3(deepseek) => deepseek.expert_count,
    };
    tensors.iter().filter_map(|tensor| parameter_spec(tensor, count)).collect()
}

fn parameter_spec(tensor: &TensorSpec, expert_count: usize) -> Option<ParameterSpec> {
    let class = match tensor.role {
        Role::Embedding | Role::Head => Class::Embedding,
        Role::Matrix | Role::Expert => Class::Matrix,
        Role::Vector => Class::Vector,
        Role::Frozen => Class::Frozen,
    };
    if tensor.role != Role::Expert {
        return Some(ParameterSpec::whole(tensor.name.as_str(), &tensor.shape, class));
    }
    // The first expert stands for all of its layer.
    let (stem, rest) = tensor.name.split_once(".experts.0.")?;
    let pattern = format!("{stem}.experts.{{}}.{rest}");
    Some(ParameterSpec::stacked(pattern, expert_count, &tensor.shape, class))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn every_tensor_of_the_layout_has_a_place_of_its_shape() {
        for case in golden::CASES {
            let config = ModelConfig::from_folder(&golden::folder(case)).unwrap();
            let mut want: Vec<(String, Vec<usize>)> =
                config.tensors().into_iter().map(|spec| (spec.name, spec.shape)).collect();
            want.sort();
            let count = config.parameter_count();
            let model = Model::new(config).unwrap();
            let slices = model.table.tensors().into_iter();
            let got: Vec<_> = slices.map(|slice| (slice.name, slice.shape)).collect();
            assert_eq!(got, want, "{case}");
            assert_eq!(model.table.parameter_count() as u64, count, "{case}");
        }
    }
}
