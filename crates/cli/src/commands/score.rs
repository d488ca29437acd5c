//! `pontoon score`: how likely a text is, token by token.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use pontoon_models::{GeneratorOptions, SpecialTokens};
use serde_json::json;

use crate::engine::{Engine, dtype, weight_format};
use crate::model_source::ModelSource;

/// The arguments of `pontoon score`.
#[derive(Args)]
pub struct Arguments {
    /// A model, snapshot or run folder.
    model: PathBuf,
    /// The text's file.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The device, as in `pontoon devices`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// How weights are stored: as --dtype says, int8 or int4 (integers with a scale per group).
    #[arg(long)]
    weights: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Scores.
pub fn run(arguments: &Arguments) -> Result<()> {
    let path = &arguments.text;
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    let source = ModelSource::open(&arguments.model)?;
    let tokenizer = source.tokenizer()?;
    let tokens = tokenizer.encode_as_document(&text)?;
    let (count, most) = (tokens.len(), source.model.config.max_positions);
    ensure!(count >= 2, "`{}` has {count} tokens; at least 2 can be scored", path.display());
    ensure!(
        count <= most,
        "`{}` has {count} tokens, but the model allows {most}; cut the text",
        path.display()
    );
    let options = GeneratorOptions::new(dtype(&arguments.dtype)?, count, 1);
    let model = source.stored(weight_format(arguments.weights.as_deref(), &arguments.dtype)?)?;
    let tensors = source.tensors()?;
    let mut engine = Engine::load_from(&arguments.device, &model, &tensors, options)?;
    let scores = engine.generator.score(engine.backend.as_mut(), &tokens)?;
    let sum: f64 = scores.iter().map(|&score| f64::from(score)).sum();
    let perplexity = (-sum / scores.len() as f64).exp();
    if arguments.json {
        let logprobs: Vec<Option<f32>> =
            std::iter::once(None).chain(scores.iter().copied().map(Some)).collect();
        println!("{}", json!({ "tokens": tokens, "logprobs": logprobs, "perplexity": perplexity }));
        return Ok(());
    }
    for (&token, score) in tokens[1..].iter().zip(&scores) {
        println!("{score:>9.4}  {:?}", tokenizer.decode(&[token], SpecialTokens::Show)?);
    }
    eprintln!("{count} tokens, perplexity {perplexity:.3}");
    Ok(())
}
