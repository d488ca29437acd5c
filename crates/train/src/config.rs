//! A run's settings: `run.toml`, changes from the command line, defaults, and checks.
//!
//! Every key of the file is a field here; a key that is not is an error that names the nearest.
//! Opens no other file. Read next: `trainer.rs`, which acts on it.

use std::path::{Path, PathBuf};

use pontoon_models::nearest;
use pontoon_ops::DType;
use pontoon_program::Recompute;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// All settings of a run; `Default` is what a key has when it is not given.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunConfig {
    /// What is trained.
    pub model: ModelSection,
    /// On what.
    pub data: DataSection,
    /// How.
    pub train: TrainSection,
    /// How state is kept.
    pub snapshot: SnapshotSection,
    /// Where it runs.
    pub fleet: FleetSection,
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelSection {
    /// A preset's name; the vocabulary becomes the tokenizer's.
    pub preset: Option<String>,
    /// A `config.json`, instead of a preset.
    pub config: Option<PathBuf>,
    /// A folder whose weights the run starts from.
    pub init: Option<PathBuf>,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSection {
    /// Shards to train on; `*` and `?` stand for any characters.
    pub train: Vec<String>,
    /// Shards to validate on.
    pub valid: Vec<String>,
    /// The tokenizer that made the shards.
    pub tokenizer: Option<PathBuf>,
    /// Tokens of one sequence.
    pub sequence: usize,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainSection {
    /// Steps in all.
    pub steps: u64,
    /// Sequences that one pass through the model takes.
    pub micro_batch: usize,
    /// Passes a step; a power of two, as their gradients are summed along a binary tree.
    pub micro_batches: usize,
    /// Decides fresh weights and the order of data.
    pub seed: u64,
    /// What the model computes in; masters and moments are f32.
    pub dtype: ComputeDtype,
    /// Which optimiser.
    pub optimizer: OptimizerName,
    /// The learning rate after warmup.
    pub lr: f64,
    /// How the learning rate goes on.
    pub schedule: ScheduleName,
    /// Steps over which the learning rate rises from zero.
    pub warmup: u64,
    /// The share of all steps over which `wsd` decays at the end.
    pub decay: f64,
    /// The last learning rate as a share of `lr`.
    pub lr_min: f64,
    /// Decoupled weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Largest norm of the gradient; larger ones are scaled down. 0 for no limit.
    pub clip: f64,
    /// Decay of AdamW's first moment.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// Added to the root of AdamW's second moment.
    pub eps: f64,
    /// How far the bias by which a router chooses experts moves in a step against their load, where
    /// the model has such a bias. 0 leaves it.
    pub balance: f64,
    /// Momentum of Muon.
    pub momentum: f64,
    /// What is computed again in the backward pass instead of kept.
    pub recompute: RecomputeName,
    /// What becomes of a step whose loss or gradient is no finite number on any device.
    pub non_finite: NonFiniteName,
    /// Steps between validations; 0 for one at the end.
    pub valid_every: u64,
    /// Micro-batches of one validation at most.
    pub valid_batches: u64,
}

/// `[snapshot]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SnapshotSection {
    /// Steps between snapshots; 0 for one at the end.
    pub every: u64,
    /// Snapshots kept.
    pub keep: usize,
    /// Where they go instead of the run folder.
    pub to: Option<PathBuf>,
    /// Seconds over which a run on workers tries its last snapshot again while the disk is full or
    /// the store out of reach; then it ends with an error. 0 to try once.
    pub patience: f64,
}

/// `[fleet]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FleetSection {
    /// The devices that compute.
    pub devices: Vec<String>,
    /// Worker processes; the devices are dealt out in turn. Without it one for each device.
    pub workers: Option<usize>,
    /// The share of micro-batches that a second worker computes too, and of the time spent on it.
    pub audit: f64,
    /// Seconds of silence after which a worker is taken for hung, or "auto".
    pub hang_after: HangSetting,
    /// Whether products and tensors in memory are checked while they are computed with.
    pub checks: bool,
}

/// `fleet.hang_after`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum HangSetting {
    /// Seconds.
    Seconds(f64),
    /// `"auto"`.
    Word(String),
}

/// The dtypes a model computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// bfloat16.
    Bf16,
    /// float32.
    F32,
}

/// The optimisers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// AdamW for all parameters.
    Adamw,
    /// Muon for matrices inside the network, AdamW for the rest.
    Muon,
}

/// The learning-rate schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleName {
    /// Warmup, then half a cosine down to `lr_min`.
    Cosine,
    /// Warmup, stable, then linear decay over the last steps.
    Wsd,
    /// Warmup, then stable.
    Constant,
}

/// What is computed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeName {
    /// Nothing.
    Nothing,
    /// Norms and gated activations.
    Cheap,
    /// Whole layers.
    Layer,
}

/// What becomes of a step that gives no finite number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFiniteName {
    /// The run stops, its state from before the step kept.
    Stop,
    /// Its data is passed over; the weights stay as they are.
    Skip,
}

impl Default for DataSection {
    fn default() -> Self {
        DataSection { train: Vec::new(), valid: Vec::new(), tokenizer: None, sequence: 1024 }
    }
}

impl Default for TrainSection {
    fn default() -> Self {
        TrainSection {
            steps: 1000,
            micro_batch: 8,
            micro_batches: 1,
            seed: 1,
            dtype: ComputeDtype::Bf16,
            optimizer: OptimizerName::Adamw,
            lr: 3e-4,
            schedule: ScheduleName::Wsd,
            warmup: 100,
            decay: 0.2,
            lr_min: 0.0,
            weight_decay: 0.1,
            clip: 1.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            balance: 1e-3,
            momentum: 0.95,
            recompute: RecomputeName::Cheap,
            non_finite: NonFiniteName::Stop,
            valid_every: 0,
            valid_batches: 16,
        }
    }
}

impl Default for SnapshotSection {
    fn default() -> Self {
        SnapshotSection { every: 200, keep: 3, to: None, patience: 200.0 }
    }
}

impl Default for FleetSection {
    fn default() -> Self {
        FleetSection {
            devices: vec!["cpu".to_owned()],
            workers: None,
            audit: 0.0,
            hang_after: HangSetting::Word("auto".to_owned()),
            checks: true,
        }
    }
}

impl ComputeDtype {
    /// The waist's name for it.
    pub fn dtype(self) -> DType {
        match self {
            ComputeDtype::Bf16 => DType::Bf16,
            ComputeDtype::F32 => DType::F32,
        }
    }
}

impl RecomputeName {
    /// The policy it names.
    pub fn policy(self) -> Recompute {
        match self {
            RecomputeName::Nothing => Recompute::Nothing,
            RecomputeName::Cheap => Recompute::Cheap,
            RecomputeName::Layer => Recompute::Layer,
        }
    }
}

impl RunConfig {
    /// Reads a file and applies changes such as `train.lr=1e-3` on top.
    pub fn read(path: &Path, changes: &[String]) -> Result<RunConfig, TrainError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| TrainError::ReadFile { path: path.to_owned(), source })?;
        RunConfig::parse(&text, changes, &path.display().to_string())
    }

    /// Reads a text; `origin` names it in errors.
    pub fn parse(text: &str, changes: &[String], origin: &str) -> Result<RunConfig, TrainError> {
        let wrong = |what: String| TrainError::Config { origin: origin.to_owned(), what };
        let mut table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| wrong(one_line(&error)))?;
        for change in changes {
            set(&mut table, change)?;
        }
        known_keys_only(&table).map_err(wrong)?;
        let config: RunConfig = table.try_into().map_err(|error| wrong(one_line(&error)))?;
        config.check().map_err(wrong)?;
        Ok(config)
    }

    /// The whole configuration as TOML, every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("sections of plain values are always TOML")
    }

    /// Worker processes.
    pub fn workers(&self) -> usize {
        self.fleet.workers.unwrap_or(self.fleet.devices.len())
    }

    fn check(&self) -> Result<(), String> {
        let train = &self.train;
        let rules = [
            (self.data.sequence >= 2, "data.sequence should be at least 2"),
            (train.micro_batch >= 1, "train.micro_batch should be at least 1"),
            (train.micro_batches.is_power_of_two(), "train.micro_batches should be a power of two"),
            (train.lr.is_finite() && train.lr >= 0.0, "train.lr should be 0 or more"),
            ((0.0..=1.0).contains(&train.decay), "train.decay should be between 0 and 1"),
            ((0.0..=1.0).contains(&train.lr_min), "train.lr_min should be between 0 and 1"),
            (train.clip >= 0.0, "train.clip should be 0 (off) or more"),
            (train.weight_decay >= 0.0, "train.weight_decay should be 0 or more"),
            ((0.0..1.0).contains(&train.beta1), "train.beta1 should be in [0, 1)"),
            ((0.0..1.0).contains(&train.beta2), "train.beta2 should be in [0, 1)"),
            ((0.0..1.0).contains(&train.momentum), "train.momentum should be in [0, 1)"),
            (train.eps > 0.0, "train.eps should be positive"),
            ((0.0..=1.0).contains(&train.balance), "train.balance should be between 0 and 1"),
            ((0.0..=1.0).contains(&self.fleet.audit), "fleet.audit should be between 0 and 1"),
            (
                match &self.fleet.hang_after {
                    HangSetting::Seconds(seconds) => *seconds > 0.0 && *seconds < 1e6,
                    HangSetting::Word(word) => word == "auto",
                },
                "fleet.hang_after should be \"auto\" or a number of seconds",
            ),
            (!self.fleet.devices.is_empty(), "fleet.devices should name a device"),
            (self.fleet.workers != Some(0), "fleet.workers should be at least 1"),
            (
                self.fleet.audit == 0.0 || self.workers() > 1,
                "fleet.audit needs a second worker to audit the first: add --workers 2",
            ),
            (
                self.workers() <= train.micro_batches,
                "there are more workers than train.micro_batches; some would have nothing to do",
            ),
            (self.snapshot.keep >= 1, "snapshot.keep should be at least 1"),
            (
                (0.0..1e6).contains(&self.snapshot.patience),
                "snapshot.patience should be a number of seconds, 0 or more",
            ),
            (
                !(self.model.preset.is_some() && self.model.config.is_some()),
                "give model.preset or model.config, not both",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err((*rule).to_owned()),
            None => Ok(()),
        }
    }
}

/// Applies one `section.key=value`; a value that is no TOML is taken as text.
fn set(table: &mut toml::Table, change: &str) -> Result<(), TrainError> {
    let wrong = |what: &str| TrainError::Config {
        origin: format!("--set {change}"),
        what: format!("{what}; write --set section.key=value, as in --set train.lr=1e-3"),
    };
    let (key, value) = change.split_once('=').ok_or_else(|| wrong("there is no `=`"))?;
    let (section, key) = key.trim().split_once('.').ok_or_else(|| wrong("there is no section"))?;
    let parsed = format!("value = {value}").parse::<toml::Table>();
    let value = match parsed.ok().and_then(|mut table| table.remove("value")) {
        Some(value) => value,
        None => toml::Value::String(value.to_owned()),
    };
    let section = table.entry(section).or_insert_with(|| toml::Table::new().into());
    let section = section.as_table_mut().ok_or_else(|| wrong("this is no section"))?;
    section.insert(key.to_owned(), value);
    Ok(())
}

/// Every key is one that `RunConfig` has; the list is made from it, absent ones included.
fn known_keys_only(table: &toml::Table) -> Result<(), String> {
    let known = serde_json::to_value(RunConfig::default()).expect("plain values are JSON");
    let mut names = Vec::new();
    for (section, keys) in known.as_object().expect("a struct is an object") {
        let keys = keys.as_object().expect("every section is a struct");
        names.extend(keys.keys().map(|key| format!("{section}.{key}")));
    }
    for (section, value) in table {
        let is_section = known.get(section).is_some();
        let keys: Vec<String> = match value.as_table() {
            Some(keys) if is_section => keys.keys().map(|key| format!("{section}.{key}")).collect(),
            _ if is_section => return Err(format!("`{section}` should be a section [{section}]")),
            Some(keys) if !keys.is_empty() => {
                keys.keys().map(|key| format!("{section}.{key}")).collect()
            }
            _ => vec![section.clone()],
        };
        if let Some(key) = keys.iter().find(|key| !names.contains(key)) {
            let near = nearest(key, names.iter().map(String::as_str)).unwrap_or_default();
            return Err(format!("unknown key `{key}`; the nearest known one is `{near}`"));
        }
    }
    Ok(())
}

fn one_line(error: &toml::de::Error) -> String {
    error.message().split('\n').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, changes: &[&str]) -> Result<RunConfig, String> {
        let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
        RunConfig::parse(text, &changes, "run.toml").map_err(|error| error.to_string())
    }

    #[test]
    fn the_printed_configuration_reads_back_as_itself() {
        let text = "[model]\npreset = \"qwen3-1m\"\n[train]\nlr = 1e-3\noptimizer = \"muon\"\n";
        let config = parse(text, &["train.steps=7", "data.train=[\"a.bin\"]"]).unwrap();
        assert_eq!(config.train.steps, 7);
        assert_eq!(config.data.train, ["a.bin"]);
        assert_eq!(config.train.optimizer, OptimizerName::Muon);
        assert_eq!(parse(&config.to_toml(), &[]).unwrap(), config);
    }

    #[test]
    fn an_unknown_key_names_the_nearest_known_one() {
        let error = parse("[train]\nmicro_bathces = 4\n", &[]).unwrap_err();
        assert!(error.contains("`train.micro_bathces`"), "{error}");
        assert!(error.contains("`train.micro_batches`"), "{error}");
        let error = parse("[trian]\nlr = 4\n", &[]).unwrap_err();
        assert!(error.contains("`train.lr`"), "{error}");
        let error = parse("", &["trian.lr=1"]).unwrap_err();
        assert!(error.contains("`train.lr`"), "{error}");
        assert!(parse("lr = 4\n", &[]).unwrap_err().contains("`train.lr`"));
    }

    #[test]
    fn values_out_of_range_and_of_another_type_are_one_line() {
        for (text, want) in [
            ("[train]\nmicro_batches = 3\n", "power of two"),
            ("[train]\nlr = \"high\"\n", "invalid type"),
            ("[train]\nlr = \n", "run.toml"),
            ("[train]\noptimizer = \"sgd\"\n", "unknown variant `sgd`"),
            ("train = 3\n", "section"),
            ("[snapshot]\npatience = -1\n", "snapshot.patience"),
        ] {
            let error = parse(text, &[]).unwrap_err();
            assert!(error.contains(want), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(parse("", &["lr"]).unwrap_err().contains("--set"));
    }
}
