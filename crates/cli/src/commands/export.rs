//! `pontoon export`: a folder that Hugging Face transformers loads unchanged.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use pontoon_models::{ExportTarget, ExportTensor, companions, compute_bytes};

use super::show;
use crate::engine::dtype;
use crate::model_source::ModelSource;

/// Bytes of one weight file at most: what transformers writes by default.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// The arguments of `pontoon export`.
#[derive(Args)]
pub struct Arguments {
    /// A model, snapshot or run folder.
    model: PathBuf,
    /// The folder to make.
    out: PathBuf,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16")]
    dtype: String,
}

/// Exports.
pub fn run(arguments: &Arguments) -> Result<()> {
    let source = ModelSource::open(&arguments.model)?;
    let weights = source.weights()?;
    let dtype = dtype(&arguments.dtype)?;
    let config = source.model.config.clone().unquantised(dtype);
    let target = ExportTarget {
        folder: &arguments.out,
        config: &config,
        shard_bytes_max: SHARD_BYTES_MAX,
        companions: companions(&source.folder),
    };
    let slices = source.model.table.tensors();
    let mut bytes = 0;
    let tensors = slices.iter().map(|slice| {
        let content = compute_bytes(weights.tensor(slice), dtype);
        bytes += content.len();
        Ok(ExportTensor {
            name: slice.name.clone(),
            dtype,
            shape: slice.shape.clone(),
            bytes: content,
        })
    });
    pontoon_models::export(&target, tensors)?;
    let size = show::bytes(bytes as f64);
    eprintln!("{} tensors, {size} in {}", slices.len(), arguments.out.display());
    Ok(())
}
