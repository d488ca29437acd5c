//! MODEL on the command line: a Hugging Face folder, a snapshot, a run folder, or one of a store.
//!
//! A snapshot is checked against its hashes before it is used. Read next: `commands/generate.rs`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pontoon_fleet::snapshot::{
    Newest, Parts, STATE_FILE, SnapshotReader, is_url, place, read_folder, split,
};
use pontoon_fleet::world::{Clock, RealDisk, SystemClock};
use pontoon_models::{
    ChatRequest, ChatTemplate, ExtraLayer, HostWeights, Model, ModelConfig, ModelError, Tokenizer,
    WeightFormat, Weights,
};
use pontoon_train::RunConfig;
use serde_json::{Map, json};
use tempfile::TempDir;

use crate::snapshot_place::disk_of;

/// A model on disk.
pub struct ModelSource {
    /// The folder its files lie in.
    pub folder: PathBuf,
    /// Its configuration, with places for its parameters.
    pub model: Model,
    /// Keeps what came from a store for as long as it is used.
    _fetched: Option<TempDir>,
}

impl ModelSource {
    /// Finds the folder and reads the configuration.
    pub fn open(path: &Path) -> Result<ModelSource> {
        let snapshots = if is_url(path) { Some(path.to_owned()) } else { snapshots_of(path) };
        let mut fetched = None;
        let folder = if path.join("config.json").is_file() {
            path.to_owned()
        } else if let Some(url) = snapshots.as_deref().filter(|place| is_url(place)) {
            let (folder, holder) = fetch(path, url)?;
            fetched = Some(holder);
            folder
        } else if let Some(snapshots) = snapshots {
            let reader = SnapshotReader::new(&RealDisk, &snapshots);
            usable(path, reader.read_newest(Parts::Model)?)?
        } else if path.is_dir() {
            bail!("`{}` is no model: it has no config.json and no snapshots", path.display());
        } else {
            bail!("there is no folder `{}`; give a model, snapshot or run folder", path.display());
        };
        if fetched.is_none() && folder.join(STATE_FILE).is_file() {
            read_folder(&RealDisk, &folder, Parts::Model)?;
        }
        let model = Model::new(ModelConfig::from_folder(&folder)?)?;
        Ok(ModelSource { folder, model, _fetched: fetched })
    }

    /// Reads the weights.
    pub fn weights(&self) -> Result<HostWeights> {
        Ok(self.model.load(&Weights::open(&self.folder)?)?)
    }

    /// Opens the weights, to be read tensor by tensor.
    pub fn tensors(&self) -> Result<Weights> {
        Ok(Weights::open(&self.folder)?)
    }

    /// The same model with its matrices stored in a format.
    pub fn stored(&self, format: WeightFormat) -> Result<Model> {
        Ok(Model::stored(self.model.config.clone(), format, ExtraLayer::Absent)?)
    }

    /// Reads the tokenizer, which must fit the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::from_folder(&self.folder)?;
        tokenizer.padding_of(&self.model.config)?;
        Ok(tokenizer)
    }

    /// The chat template, if the folder has one; one that cannot be used is an error.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        match ChatTemplate::from_folder(&self.folder, None) {
            Ok(template) => Ok(Some(template)),
            Err(ModelError::NoTemplate { known, .. }) if known.is_empty() => Ok(None),
            Err(error) => bail!(
                "the chat template in `{}` cannot be used: {error}; mend it or remove it",
                self.folder.display()
            ),
        }
    }
}

/// One question as the model expects it.
pub fn chat_prompt(template: &ChatTemplate, system: Option<&str>, user: &str) -> Result<String> {
    let mut messages = Vec::new();
    messages.extend(system.map(|text| json!({ "role": "system", "content": text })));
    messages.push(json!({ "role": "user", "content": user }));
    Ok(template.render(&ChatRequest {
        messages,
        tools: None,
        add_generation_prompt: true,
        variables: Map::new(),
        now_unix_seconds: SystemClock.unix_time().as_secs(),
    })?)
}

/// Where the snapshots of a run folder are; nothing if it is none.
fn snapshots_of(run: &Path) -> Option<PathBuf> {
    let settings = RunConfig::read(&run.join("run.toml"), &[]).ok();
    let to = settings.as_ref().and_then(|settings| settings.snapshot.to.as_deref());
    let snapshots = place(to, run, run);
    (settings.is_some() || snapshots.is_dir()).then_some(snapshots)
}

/// Copies a snapshot from a store to a temporary folder: weights are read from files.
fn fetch(named: &Path, url: &Path) -> Result<(PathBuf, TempDir)> {
    let holder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let (place, step) = split(url);
    let disk = disk_of(place, &holder.path().join("upload"))?;
    let newest = SnapshotReader::new(&*disk, place).fetch(step, &RealDisk, holder.path())?;
    Ok((usable(named, newest)?, holder))
}

/// The folder of the snapshot that was found; says which newer ones are damaged.
fn usable(named: &Path, newest: Newest) -> Result<PathBuf> {
    for rejected in &newest.rejected {
        eprintln!("passed over: {}", rejected.reason);
    }
    match newest.snapshot {
        Some(snapshot) => Ok(snapshot.folder),
        None => bail!("`{}` has no usable snapshot yet", named.display()),
    }
}
