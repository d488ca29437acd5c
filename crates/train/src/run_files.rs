//! The files of a run: what a snapshot holds, how it is written, and how a run goes on from one.
//!
//! Decides nothing about when. Read next: `trainer.rs`.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;

use pontoon_fleet::exchange::Exchange;
use pontoon_fleet::run_dir::{Event, EventKind, EventLog};
use pontoon_fleet::snapshot::{
    Bytes, Contents, ElementType, ExtraFile, Parts, Snapshot, SnapshotReader, SnapshotWriter,
    State, Tensor, TensorRef, Written, check_folder,
};
use pontoon_fleet::world::Disk;
use pontoon_models::{HostWeights, Model, companions};
use pontoon_ops::Backend;
use pontoon_program::{Class, TensorSlice};
use serde_json::{Value, json};

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::step::TrainingState;

/// The names of the optimiser's state in snapshots: those of PyTorch.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// The key under which `state.json` names the classes of devices that took part.
const CLASSES: &str = "classes";

/// Everything of a snapshot that does not change during a run.
pub(crate) struct SnapshotFrame {
    pub files: Vec<(String, Vec<u8>)>,
    pub slices: Vec<TensorSlice>,
    pub keep: NonZeroUsize,
}

impl SnapshotFrame {
    /// Collects `config.json` and the tokenizer's files.
    pub(crate) fn new(model: &Model, config: &RunConfig) -> Result<SnapshotFrame, TrainError> {
        let mut files = Vec::new();
        let text = serde_json::to_vec_pretty(&Value::Object(model.config.to_json()));
        files.push(("config.json".to_owned(), text.expect("a configuration is JSON")));
        if let Some(tokenizer) = &config.data.tokenizer {
            let read = |path: &Path| {
                let wrong = |source| TrainError::ReadFile { path: path.to_owned(), source };
                std::fs::read(path).map_err(wrong)
            };
            files.push(("tokenizer.json".to_owned(), read(tokenizer)?));
            for path in companions(tokenizer.parent().unwrap_or(Path::new("."))) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if files.iter().all(|(other, _)| *other != name) {
                    files.push((name, read(&path)?));
                }
            }
        }
        let keep = NonZeroUsize::new(config.snapshot.keep).expect("checked with the settings");
        Ok(SnapshotFrame { files, slices: model.table.tensors(), keep })
    }
}

/// Where the values of a snapshot are.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    /// In memory: the weights, and the optimiser's first and second moments.
    Held(&'a HostWeights, [&'a [f32]; 2]),
    /// In the memory that workers share, from a position on: trained weights, first and second
    /// moments, frozen weights.
    Shared(&'a Exchange, u64),
}

impl<'a> Values<'a> {
    fn weights(&self, model: &Model, slice: &TensorSlice) -> Bytes<'a> {
        match *self {
            Values::Held(weights, _) => Bytes::Held(bytemuck::cast_slice(weights.tensor(slice))),
            Values::Shared(..) => {
                let part = if slice.class == Class::Frozen { 3 } else { 0 };
                self.shared(model, part, slice)
            }
        }
    }

    fn moment(&self, model: &Model, index: usize, slice: &TensorSlice) -> Bytes<'a> {
        match *self {
            Values::Held(_, moments) => {
                let range = slice.element_offset..slice.element_offset + slice.elements();
                Bytes::Held(bytemuck::cast_slice(&moments[index][range]))
            }
            Values::Shared(..) => self.shared(model, 1 + index, slice),
        }
    }

    /// A tensor in one of the parts, of which all but the last are equally long.
    fn shared(&self, model: &Model, part: usize, slice: &TensorSlice) -> Bytes<'a> {
        let Values::Shared(store, from) = *self else {
            unreachable!("asked of shared values only")
        };
        let elements = part * model.table.trainable_elements() + slice.element_offset;
        Bytes::Stored { store, position: from + 4 * elements as u64, count: 4 * slice.elements() }
    }
}

/// What is saved besides the frame.
pub(crate) struct Saving<'a> {
    pub writer: &'a SnapshotWriter<'a>,
    pub frame: &'a SnapshotFrame,
    pub config: &'a RunConfig,
    pub model: &'a Model,
    pub values: Values<'a>,
    /// Of the device the state comes from.
    pub numeric_class: &'a str,
    /// Of all devices that took part so far.
    pub classes: &'a BTreeSet<String>,
    pub step: u64,
}

impl Saving<'_> {
    /// Writes the snapshot, then removes those beyond the number kept.
    pub(crate) fn write(&self) -> Result<Written, TrainError> {
        let written = self.write_one()?;
        self.writer.retain(self.frame.keep)?;
        Ok(written)
    }

    /// The same, but the snapshot is read and checked before any older one goes; it goes itself if
    /// it is damaged.
    pub(crate) fn write_checked(&self, disk: &dyn Disk) -> Result<Written, TrainError> {
        let written = self.write_one()?;
        if let Err(error) = check_folder(disk, &written.folder) {
            // What cannot be removed is passed over when it is read.
            let _ = disk.remove(&written.folder);
            return Err(error.into());
        }
        self.writer.retain(self.frame.keep)?;
        Ok(written)
    }

    fn write_one(&self) -> Result<Written, TrainError> {
        let frame = self.frame;
        let trained: Vec<&TensorSlice> =
            frame.slices.iter().filter(|slice| slice.class != Class::Frozen).collect();
        let names: Vec<[String; 2]> = trained
            .iter()
            .map(|slice| MOMENTS.map(|moment| format!("{}.{moment}", slice.name)))
            .collect();
        let mut optimizer = Vec::new();
        for (slice, names) in trained.iter().zip(&names) {
            for (index, name) in names.iter().enumerate() {
                let bytes = self.values.moment(self.model, index, slice);
                let shape = &slice.shape;
                optimizer.push(TensorRef { name, dtype: ElementType::F32, shape, bytes });
            }
        }
        let train = &self.config.train;
        let state = State {
            step: self.step,
            seed: train.seed,
            position: self.step * samples(self.config),
            backend: self.numeric_class.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extra: json!({ "arithmetic": arithmetic(self.config), (CLASSES): self.classes }),
        };
        let files: Vec<ExtraFile<'_>> =
            frame.files.iter().map(|(name, bytes)| ExtraFile { name, bytes }).collect();
        let mut model = Vec::with_capacity(frame.slices.len());
        for slice in &frame.slices {
            let (name, shape) = (&slice.name, &slice.shape);
            let bytes = self.values.weights(self.model, slice);
            model.push(TensorRef { name, dtype: ElementType::F32, shape, bytes });
        }
        let contents =
            Contents { state: &state, model: &model, optimizer: &optimizer, files: &files };
        Ok(self.writer.write(&contents)?)
    }
}

/// The classes of devices that took part in a run up to a snapshot.
pub(crate) fn classes_of(state: &State) -> Vec<String> {
    let listed = state.extra[CLASSES].as_array().into_iter().flatten();
    let listed = listed.filter_map(|class| class.as_str().map(str::to_owned));
    let all: BTreeSet<String> = listed.chain([state.backend.clone()]).collect();
    all.into_iter().collect()
}

/// Sequences of one step.
pub(crate) fn samples(config: &RunConfig) -> u64 {
    (config.train.micro_batch * config.train.micro_batches) as u64
}

/// The settings on which a step's bits depend; a run must not go on with others.
fn arithmetic(config: &RunConfig) -> Value {
    let train = &config.train;
    json!({
        "seed": train.seed,
        "sequence": config.data.sequence,
        "micro_batch": train.micro_batch,
        "micro_batches": train.micro_batches,
        "dtype": train.dtype,
        "optimizer": train.optimizer,
    })
}

/// Refuses to go on from a snapshot with settings that would change a step's bits.
fn expect_arithmetic(state: &State, folder: &Path, config: &RunConfig) -> Result<(), TrainError> {
    let (had, want) = (&state.extra["arithmetic"], arithmetic(config));
    for (key, value) in want.as_object().expect("made as an object") {
        if had[key] != *value {
            let what = format!(
                "was written with {key} = {}, but the settings say {value}; resume with the \
                 settings it began with",
                had[key]
            );
            return Err(TrainError::Folder { dir: folder.to_owned(), what });
        }
    }
    Ok(())
}

/// Refuses settings with which the newest snapshot cannot be gone on from, before anything is
/// changed or started: who loads it checks the rest.
pub(crate) fn expect_own(
    disk: &dyn Disk,
    snapshots: &Path,
    model: &Model,
    config: &RunConfig,
) -> Result<(), TrainError> {
    let outline = SnapshotReader::new(disk, snapshots).newest_outline()?;
    let Some(outline) = outline else { return Ok(()) };
    expect_arithmetic(&outline.state, &outline.folder, config)?;
    for slice in model.table.tensors() {
        let what = match outline.model.iter().find(|(name, _)| *name == slice.name) {
            None => missing(&slice.name),
            Some((_, shape)) if *shape != slice.shape => {
                format!("has `{}` as {shape:?}, but the model wants {:?}", slice.name, slice.shape)
            }
            Some(_) => continue,
        };
        return Err(TrainError::Folder { dir: outline.folder, what });
    }
    Ok(())
}

fn missing(tensor: &str) -> String {
    format!("has no tensor `{tensor}`; is it of this model?")
}

/// Reads the newest good snapshot and reports the ones passed over as events.
pub(crate) fn newest(
    disk: &dyn Disk,
    dir: &Path,
    events: &mut EventLog<'_>,
) -> Result<Option<Snapshot>, TrainError> {
    let newest = SnapshotReader::new(disk, dir).read_newest(Parts::All)?;
    for rejected in newest.rejected {
        let cause = Some(rejected.reason.to_string());
        let action = Some("passed over for an older snapshot".to_owned());
        let event = Event::new(rejected.step, EventKind::RolledBack);
        events.append(&Event { cause, action, ..event })?;
    }
    Ok(newest.snapshot)
}

/// The weights of a snapshot, in the model's layout.
pub(crate) fn restore_weights(
    snapshot: &Snapshot,
    model: &Model,
    config: &RunConfig,
) -> Result<HostWeights, TrainError> {
    expect_arithmetic(&snapshot.state, &snapshot.folder, config)?;
    let wrong = |what: String| TrainError::Folder { dir: snapshot.folder.clone(), what };
    let mut weights = HostWeights::zeros(model);
    fill(&mut weights, &snapshot.model, &model.table.tensors(), "").map_err(wrong)?;
    Ok(weights)
}

/// Puts a snapshot's optimiser state on the device.
pub(crate) fn restore_moments(
    snapshot: &Snapshot,
    model: &Model,
    state: &mut TrainingState,
    backend: &mut dyn Backend,
) -> Result<(), TrainError> {
    let wrong = |what: String| TrainError::Folder { dir: snapshot.folder.clone(), what };
    let slices: Vec<TensorSlice> = model.table.tensors();
    let slices: Vec<TensorSlice> =
        slices.into_iter().filter(|slice| slice.class != Class::Frozen).collect();
    let names: Vec<&'static str> = state.moments(backend)?.iter().map(|(name, _)| *name).collect();
    for (moment, name) in MOMENTS.iter().zip(names) {
        let mut values = HostWeights::zeros(model);
        let suffix = format!(".{moment}");
        fill(&mut values, &snapshot.optimizer, &slices, &suffix).map_err(wrong)?;
        state.set_moment(backend, name, bytemuck::cast_slice(&values.trainable))?;
    }
    Ok(())
}

fn fill(
    values: &mut HostWeights,
    tensors: &[Tensor],
    slices: &[TensorSlice],
    suffix: &str,
) -> Result<(), String> {
    for slice in slices {
        let name = format!("{}{suffix}", slice.name);
        let found = tensors.iter().find(|tensor| tensor.name == name);
        let found = found.ok_or_else(|| missing(&name))?;
        if found.shape != slice.shape || found.dtype != ElementType::F32 {
            return Err(format!(
                "has `{name}` as {:?} {}, but the model wants {:?} F32",
                found.shape,
                found.dtype.name(),
                slice.shape
            ));
        }
        let numbers = found.bytes.chunks_exact(4);
        for (slot, bytes) in values.tensor_mut(slice).iter_mut().zip(numbers) {
            *slot = f32::from_le_bytes(bytes.try_into().expect("chunks of four"));
        }
    }
    Ok(())
}
