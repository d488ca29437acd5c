//! `pontoon new`: a run.toml to edit.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use pontoon_models::preset;
use pontoon_train::RunConfig;

/// The arguments of `pontoon new`.
#[derive(Args)]
pub struct Arguments {
    /// A preset, such as qwen3-30m.
    preset: String,
    /// The folder to make.
    dir: PathBuf,
}

/// Writes the file; one that is there stays.
pub fn run(arguments: &Arguments) -> Result<()> {
    let model = preset(&arguments.preset)?;
    let path = arguments.dir.join("run.toml");
    ensure!(!path.exists(), "`{}` is there already; give another folder", path.display());
    let mut config = RunConfig::default();
    config.model.preset = Some(arguments.preset.clone());
    config.data.train = vec!["shards/*.bin".to_owned()];
    config.data.valid = vec!["shards/valid/*.bin".to_owned()];
    config.data.tokenizer = Some(PathBuf::from("tokenizer.json"));
    config.data.sequence = config.data.sequence.min(model.max_positions);
    std::fs::create_dir_all(&arguments.dir)
        .with_context(|| format!("cannot create `{}`", arguments.dir.display()))?;
    std::fs::write(&path, config.to_toml())
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    let dir = arguments.dir.display();
    eprintln!(
        "wrote {dir}/run.toml; next:\n  pontoon tokenizer train TEXTS --vocab {} --out \
         {dir}/tokenizer.json\n  pontoon data prepare TEXTS --tokenizer {dir}/tokenizer.json --out \
         {dir}/shards --valid-fraction 0.01\n  pontoon train {dir}/run.toml",
        model.vocab_size
    );
    Ok(())
}
