//! The model that a qualification is asked about: its programs, a few real steps, the forecast.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use pontoon_models::{BatchShape, Model, ModelConfig, PagedHead, PagedShape, preset};
use pontoon_ops::{Backend, DType, Op};
use pontoon_program::{Program, Recompute};
use pontoon_qualify::forecast::{Forecast, Question, Soaked, forecast};
use pontoon_qualify::speed::Speed;
use pontoon_qualify::stress::Stability;
use pontoon_train::data::{Batch, WholeDocuments};
use pontoon_train::{RunConfig, TrainingState};

use super::Arguments;
use crate::engine::dtype;
use crate::model_source::ModelSource;

/// Tokens to train on for each parameter, where none are given: what is spent on a model that is
/// as good as its training compute allows.
const TOKENS_PER_PARAMETER: f64 = 20.0;
/// Models up to this size run a real training step; larger ones are reckoned.
const MEASURED_PARAMETERS_MAX: u64 = 50_000_000;
/// The same with `--quick`.
const QUICK_PARAMETERS_MAX: u64 = 2_000_000;
/// Tokens of the measured step, in sequences as long as the model's.
const MEASURED_TOKENS: usize = 1024;

/// The model that is asked about.
pub struct Asked {
    name: String,
    model: Model,
    dtype: DType,
    sequence: usize,
    training: Program,
    decoding: Program,
}

impl Asked {
    /// Reads the model's configuration and writes its programs.
    pub fn new(arguments: &Arguments, name: &str) -> Result<Asked> {
        let path = Path::new(name);
        let config = match () {
            () if path.is_dir() => ModelSource::open(path)?.model.config,
            () if path.is_file() => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read `{name}`"))?;
                let map = serde_json::from_str(&text)
                    .with_context(|| format!("`{name}` is no JSON object"))?;
                ModelConfig::from_json(map)?
            }
            () => preset(name)?,
        };
        let model = Model::new(config)?;
        let compute = dtype(&arguments.dtype)?;
        let sequence = arguments.sequence.clamp(2, model.config.max_positions);
        let rows = sequence * arguments.micro_batch.max(1);
        let shape = BatchShape { rows, documents: rows + 1, positions_max: sequence };
        let training = model.training_program(shape, compute, Recompute::Cheap)?;
        let block = 16;
        let blocks = sequence.div_ceil(block);
        let shape = PagedShape {
            rows: 1,
            sequences: 1,
            block,
            blocks,
            sequence_blocks: blocks,
            positions_max: sequence,
        };
        let head = PagedHead::Sample { vocabulary: model.config.vocab_size };
        let decoding = model.paged_program(shape, compute, head)?;
        Ok(Asked { name: name.to_owned(), model, dtype: compute, sequence, training, decoding })
    }

    /// Tokens a second of real training steps, for models small enough; the second step counts.
    fn measure(&self, backend: &mut dyn Backend, parameters_max: u64) -> Result<Option<f64>> {
        let large = self.model.config.parameter_count() > parameters_max;
        if large || self.dtype == DType::F16 {
            return Ok(None);
        }
        let sequence = MEASURED_TOKENS.min(self.sequence);
        let count = (MEASURED_TOKENS / sequence).max(1);
        let settings = format!(
            "[data]\nsequence = {sequence}\n[train]\nmicro_batch = {count}\nmicro_batches = 1\n\
             dtype = \"{}\"\nwarmup = 0\nschedule = \"constant\"\n",
            self.dtype
        );
        let config = RunConfig::parse(&settings, &[], "the measurement's settings")?;
        let weights = self.model.initialise(1);
        let mut state = TrainingState::load(backend, &self.model, &config, &weights)?;
        let rows = count * sequence;
        let token = |row: usize| (row * 31 % self.model.config.vocab_size) as i32;
        let batch = Batch::of(WholeDocuments { count, tokens: sequence }, token);
        let mut best = f64::INFINITY;
        for step in 1..=3 {
            let started = Instant::now();
            state.step(backend, step, std::slice::from_ref(&batch))?;
            let seconds = started.elapsed().as_secs_f64();
            best = if step == 1 { best } else { best.min(seconds) };
        }
        Ok(Some(rows as f64 / best))
    }

    /// Every operation of its programs.
    pub fn ops(&self) -> impl Iterator<Item = &Op> {
        self.training.ops.iter().chain(&self.decoding.ops)
    }

    /// What to expect of the device for this model.
    pub fn forecast(
        &self,
        arguments: &Arguments,
        backend: &mut dyn Backend,
        speed: &Speed,
        stability: &Stability,
    ) -> Result<Forecast> {
        let limits = [MEASURED_PARAMETERS_MAX, QUICK_PARAMETERS_MAX];
        let parameters = self.model.config.parameter_count();
        let measured = self.measure(backend, limits[usize::from(arguments.quick)])?;
        let question = Question {
            model: self.name.clone(),
            parameters,
            dtype: self.dtype,
            trained: self.model.table.trainable_elements(),
            sequence: self.sequence,
            micro_batch: arguments.micro_batch.max(1),
            training: &self.training,
            decoding: &self.decoding,
            tokens: arguments.tokens.unwrap_or(TOKENS_PER_PARAMETER * parameters as f64),
            devices: arguments.count(),
            measured,
            faults_per_day: arguments.faults_per_day,
        };
        let soaked = Soaked { faults: stability.faults(), seconds: stability.seconds };
        Ok(forecast(&question, speed, soaked, backend.info().memory_bytes))
    }
}
