//! Model families as Hugging Face folders: configuration, weights, tokenizer and chat template.
//!
//! A folder is read in four steps, each of which can fail with one [`ModelError`] that says what
//! is wrong: [`ModelConfig::from_folder`], [`Weights::open`], [`Tokenizer::from_folder`] and
//! [`ChatTemplate::from_folder`]. A [`Model`] turns a configuration into programs. This crate knows
//! no vendor. Read next: `config.rs`, then `model.rs` and `families/mod.rs`.

mod adapters;
mod block;
mod chat_json;
mod chat_syntax;
mod chat_template;
mod config;
mod error;
mod export;
mod families;
mod generate;
#[cfg(test)]
mod golden;
mod keys;
mod layout;
mod map;
mod model;
mod presets;
mod quantise;
mod rope;
mod tokenizer;
mod upload;
mod values;
mod weights;

pub use adapters::{AdapterShapes, Adapters};
pub use chat_template::{ChatRequest, ChatTemplate, civil_date};
pub use config::{
    Bias, Deepseek, Family, Head, LayerKind, MODEL_TYPES, ModelConfig, Qwen3Experts, RotaryPairs,
    RouterWeights,
};
pub use error::{ModelError, nearest};
pub use export::{COMPANION_FILES, ExportTarget, ExportTensor, companions, export};
pub use generate::{
    Completion, Drawn, Finish, Generator, GeneratorOptions, PromptLogprobs, SamplingSettings,
};
pub use layout::{Role, TensorSpec};
pub use model::{BatchShape, DrawReads, ExtraLayer, Model, PagedHead, PagedShape};
pub use presets::{PRESETS, preset};
pub use quantise::WeightFormat;
pub use rope::{Frequencies, RampEnds, Rope, RopeScaling, Yarn};
pub use tokenizer::{SpecialTokens, StreamDecoder, Tokenizer};
pub use upload::{HostTensors, Rows as TensorRows, TensorSource};
pub use values::{Constant, HostWeights, compute_bytes};
pub use weights::{INDEX_FILE, SINGLE_FILE, TensorView, Weights};
