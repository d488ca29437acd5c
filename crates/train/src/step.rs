//! One training step on one device: gradients of all micro-batches along the fixed tree, the
//! norm, the update.
//!
//! After the first step nothing is allocated. It reads no clock and no file, and decides nothing
//! about failures: `trainer.rs` does. Read next: `step/combine.rs`, where workers' gradients meet.

mod combine;

use std::time::Duration;

use pontoon_fleet::protocol::{Rates, StateDigest};
use pontoon_fleet::snapshot::{Bytes, ElementType, TensorRef};
use pontoon_fleet::world::Clock;
use pontoon_models::{BatchShape, HostWeights, Model};
use pontoon_ops::cost::cost;
use pontoon_ops::sums::Ask;
use pontoon_ops::{Add, Backend, BufferId, DType, DeviceError, Op, OpName, View};
use pontoon_program::{Executor, Memory, Program};

use crate::config::{RunConfig, TrainSection};
use crate::data::Batch;
use crate::digests::{Part, StateParts, Told};
use crate::error::TrainError;
use crate::gradient_tree::{Move, buffers, moves};
use crate::optimizer::{FIRST, GRADIENT, Optimizer, SECOND, changed, download};

pub(crate) use combine::{STAGE, digest_gradient, digest_of_host, stages};

/// No single operation takes longer on a device that works.
const PROFILE_DEADLINE: Duration = Duration::from_secs(60);

/// What is done with the gradient buffer of a leaf or subtree.
pub(crate) type WithBuffer<'a> =
    dyn FnMut(&mut dyn Backend, usize, BufferId) -> Result<(), TrainError> + 'a;

/// A step whose computation is found wrong this often is given up.
const TRIES: usize = 3;

/// A model in training on a device.
#[derive(Debug)]
pub struct TrainingState {
    memory: Memory,
    leaves: Vec<Executor>,
    scoring: Executor,
    /// `adds[i]` adds gradient buffer i + 1 to buffer i.
    adds: Vec<Op>,
    moves: Vec<Move>,
    optimizer: Optimizer,
    elements: usize,
    loss: Vec<f32>,
    loss_weight: Vec<f32>,
    model_flops: f64,
    /// The word sums of the gradient buffers as they were written, if they are checked.
    sums: Option<Vec<u32>>,
    /// What was found wrong and computed again.
    found: Vec<String>,
    parts: StateParts,
}

/// Whether products and tensors in memory are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checking {
    /// They are not.
    Off,
    /// They are, where the device has the means.
    On,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// The mean loss of the step's targets.
    pub loss: f64,
    /// The gradient's norm before clipping.
    pub gradient_norm: f64,
    /// The learning rate it was applied with.
    pub lr: f64,
    /// By what share of the mean load the busiest expert was above it, where the model's routers
    /// have a bias that is moved against it.
    pub imbalance: Option<f64>,
}

/// Floating-point operations of a step's matrix products, as [`TrainingState::model_flops`].
pub(crate) fn model_flops(model: &Model, config: &RunConfig) -> Result<f64, TrainError> {
    let (train, sequence) = (&config.train, config.data.sequence);
    let rows = train.micro_batch * sequence;
    let shape = BatchShape { rows, documents: rows + 1, positions_max: sequence };
    Ok(flops_of(&model.scoring_program(shape, train.dtype.dtype())?, train))
}

fn flops_of(scoring: &Program, train: &TrainSection) -> f64 {
    // Backward takes two products for each one of forward; recomputation is no useful work.
    let sequences = train.micro_batch as f64;
    let forward: f64 = scoring.ops.iter().map(|op| forward_flops(op, sequences)).sum();
    3.0 * forward * train.micro_batches as f64
}

impl TrainingState {
    /// Loads programs, weights and an empty optimiser.
    pub fn load(
        backend: &mut dyn Backend,
        model: &Model,
        config: &RunConfig,
        weights: &HostWeights,
    ) -> Result<TrainingState, TrainError> {
        let (train, sequence) = (&config.train, config.data.sequence);
        let rows = train.micro_batch * sequence;
        fits(model, sequence)?;
        let mut memory = Memory::new();
        let optimizer = Optimizer::load(backend, &mut memory, model, train, weights)?;
        model.upload_constants(backend, &mut memory, sequence, sequence)?;
        let shape = BatchShape { rows, documents: rows + 1, positions_max: sequence };
        let dtype = train.dtype.dtype();
        let program = model.training_program(shape, dtype, train.recompute.policy())?;
        let mut leaves: Vec<Executor> = Vec::new();
        for index in 0..buffers(train.micro_batches) {
            let name = format!("gradients.{index}");
            let arena = leaves.first().map(Executor::arena);
            let renamed = [("gradients", name.as_str())];
            let leaf = Executor::load_with(backend, &mut memory, &program, &renamed, arena)?;
            leaves.push(leaf);
        }
        let scoring = model.scoring_program(shape, dtype)?;
        let model_flops = flops_of(&scoring, train);
        // Scoring keeps no activations, so it always fits the arena of training.
        let arena = Some(leaves[0].arena());
        let scoring = Executor::load_with(backend, &mut memory, &scoring, &[], arena)?;
        assert!(scoring.plan().arena_bytes <= leaves[0].plan().arena_bytes);
        let elements = model.table.trainable_elements();
        let parts = state_parts(model, &memory, &optimizer);
        let mut state = TrainingState {
            adds: adds(&memory, leaves.len(), model.table.gradient_elements()),
            memory,
            leaves,
            scoring,
            moves: moves(train.micro_batches),
            optimizer,
            elements,
            loss: vec![0.0; rows],
            loss_weight: vec![0.0; rows],
            model_flops,
            sums: None,
            found: Vec::new(),
            parts,
        };
        let checking = if config.fleet.checks { Checking::On } else { Checking::Off };
        state.check(backend, checking);
        Ok(state)
    }

    /// Decides whether the steps that follow are checked.
    pub fn check(&mut self, backend: &dyn Backend, checking: Checking) {
        let on = checking == Checking::On && backend.sums_in_place();
        self.sums = on.then(|| vec![0; self.leaves.len()]);
    }

    /// What checks found wrong in the steps so far, for whoever tells of it; the steps computed it
    /// again.
    pub fn take_findings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.found)
    }

    /// The time of every operation of one micro-batch, launched one by one, in list order.
    pub fn profile(
        &mut self,
        backend: &mut dyn Backend,
        clock: &dyn Clock,
        batch: &Batch,
    ) -> Result<Vec<(OpName, Duration)>, TrainError> {
        self.leaf(backend, 0, batch, 1.0 / batch.valid.max(1) as f32)?;
        let mut times = Vec::new();
        for op in self.leaves[0].ops() {
            let started = clock.now();
            backend.launch(op)?;
            backend.wait(PROFILE_DEADLINE)?;
            times.push((op.name(), clock.now().duration_since(started)));
        }
        Ok(times)
    }

    /// Floating-point operations of a step's matrix products, recomputation left out; attention
    /// as if each sequence were one document.
    pub fn model_flops(&self) -> f64 {
        self.model_flops
    }

    /// Bytes of one micro-batch's activations at their peak.
    pub fn arena_bytes(&self) -> usize {
        self.leaves[0].plan().arena_bytes
    }

    /// Computes and applies step `step` (the first is 1) from its micro-batches. A loss or norm
    /// that is not finite is an error, and then nothing was applied.
    pub fn step(
        &mut self,
        backend: &mut dyn Backend,
        step: u64,
        batches: &[Batch],
    ) -> Result<StepResult, TrainError> {
        let loss = loop {
            match self.gradient(backend, batches) {
                Err(error) if self.found.len() < TRIES && error.is_corrupt() => {
                    self.found.push(error.to_string());
                }
                loss => break loss?,
            }
        };
        let finite = |what, value: f64| match value.is_finite() {
            true => Ok(value),
            false => Err(TrainError::NonFinite { step, what, value, kept: step - 1 }),
        };
        let loss = finite("the loss", loss)?;
        let norm = self.optimizer.gradient_norm(backend)?;
        let gradient_norm = finite("the gradient's norm", norm)?;
        let sum = self.gradient_sum();
        let rates = self.optimizer.apply(backend, step, gradient_norm, sum, None)?;
        let Rates { lr, imbalance } = rates;
        Ok(StepResult { loss, gradient_norm, lr, imbalance })
    }

    /// The mean loss of batches, without training on them.
    pub fn score(
        &mut self,
        backend: &mut dyn Backend,
        batches: &[Batch],
    ) -> Result<f64, TrainError> {
        let valid: usize = batches.iter().map(|batch| batch.valid).sum();
        let mut sum = 0.0;
        for batch in batches {
            write(&self.scoring, backend, batch)?;
            self.scoring.run(backend)?;
            self.scoring.read(backend, "loss", bytemuck::cast_slice_mut(&mut self.loss))?;
            sum += total(&self.loss, batch);
        }
        Ok(sum / valid.max(1) as f64)
    }

    fn gradient(
        &mut self,
        backend: &mut dyn Backend,
        batches: &[Batch],
    ) -> Result<f64, TrainError> {
        let valid: usize = batches.iter().map(|batch| batch.valid).sum();
        let weight = 1.0 / valid.max(1) as f32;
        let mut sum = 0.0;
        for index in 0..self.moves.len() {
            match self.moves[index] {
                Move::Add { buffer } => self.add(backend, buffer)?,
                Move::Leaf { leaf, buffer } => {
                    sum += self.leaf(backend, buffer, &batches[leaf], weight)?;
                }
            }
        }
        Ok(sum / valid.max(1) as f64)
    }

    /// The gradient of one micro-batch into a buffer; returns the sum of its losses.
    fn leaf(
        &mut self,
        backend: &mut dyn Backend,
        buffer: usize,
        batch: &Batch,
        weight: f32,
    ) -> Result<f64, TrainError> {
        let executor = &self.leaves[buffer];
        write(executor, backend, batch)?;
        for (slot, &target) in self.loss_weight.iter_mut().zip(&batch.targets) {
            *slot = if target < 0 { 0.0 } else { weight };
        }
        executor.write(backend, "loss_weight", bytemuck::cast_slice(&self.loss_weight))?;
        match &mut self.sums {
            None => executor.run(backend)?,
            Some(sums) => {
                let written = executor.run_checked(backend)?;
                let (gradients, _) = gradient(&self.memory, buffer);
                let found = written.into_iter().find(|(of, _)| *of == gradients);
                sums[buffer] = found.expect("a leaf writes its gradient").1;
            }
        }
        executor.read(backend, "loss", bytemuck::cast_slice_mut(&mut self.loss))?;
        Ok(total(&self.loss, batch))
    }

    /// The gradient of leaves `first..first + count`, summed along their tree, into the first
    /// gradient buffer; returns each leaf's loss. `seen` is shown every leaf's own gradient.
    pub(crate) fn subtree(
        &mut self,
        backend: &mut dyn Backend,
        batches: &[Batch],
        leaves: std::ops::Range<usize>,
        seen: &mut WithBuffer<'_>,
    ) -> Result<Vec<f64>, TrainError> {
        let valid: usize = batches.iter().map(|batch| batch.valid).sum();
        let weight = 1.0 / valid.max(1) as f32;
        let mut losses = Vec::with_capacity(leaves.len());
        for move_ in moves(leaves.len()) {
            match move_ {
                Move::Add { buffer } => self.add(backend, buffer)?,
                Move::Leaf { leaf, buffer } => {
                    let leaf = leaves.start + leaf;
                    losses.push(self.leaf(backend, buffer, &batches[leaf], weight)?);
                    seen(backend, leaf, self.gradient_buffer(buffer))?;
                }
            }
        }
        Ok(losses)
    }

    /// Adds a gradient buffer and the one above it.
    fn add(&mut self, backend: &mut dyn Backend, buffer: usize) -> Result<(), TrainError> {
        let Some(sums) = &mut self.sums else {
            return Ok(backend.launch(&self.adds[buffer])?);
        };
        let found = backend.launch_summed(&self.adds[buffer], ADD_SUMS)?;
        if found.read[..2] != sums[buffer..buffer + 2] {
            return Err(changed("a gradient", "it was added to another").into());
        }
        sums[buffer] = found.written[2];
        Ok(())
    }

    /// The word sum of the sum of gradients, if it is known.
    pub(crate) fn gradient_sum(&self) -> Option<u32> {
        self.sums.as_ref().map(|sums| sums[0])
    }

    /// One of the buffers along the tree; the first has the step's sum at its end.
    pub(crate) fn gradient_buffer(&self, index: usize) -> BufferId {
        gradient(&self.memory, index).0
    }

    /// The norm of the sum.
    pub(crate) fn gradient_norm(&self, backend: &mut dyn Backend) -> Result<f64, TrainError> {
        self.optimizer.gradient_norm(backend)
    }

    /// Applies the sum; gives the digests of the state after it. A state that is not what was
    /// digested last is a `Corrupt`.
    pub(crate) fn apply(
        &mut self,
        backend: &mut dyn Backend,
        step: u64,
        norm: f64,
    ) -> Result<(Rates, StateDigest), TrainError> {
        let (sum, mut told) = (self.gradient_sum(), Told::default());
        let rates = self.optimizer.apply(backend, step, norm, sum, Some(&mut told))?;
        Ok((rates, self.parts.after(backend, &told)?))
    }

    /// The digests of the whole state.
    pub(crate) fn digest(&mut self, backend: &mut dyn Backend) -> Result<StateDigest, DeviceError> {
        self.parts.digest(backend)
    }

    /// The digests before a step is applied: of the weights as they are, of what only the update
    /// reads as they were told last.
    pub(crate) fn digest_before(
        &mut self,
        backend: &mut dyn Backend,
    ) -> Result<StateDigest, DeviceError> {
        self.parts.before(backend)
    }

    /// The parts of the state that outlives a step, in the order in which they are copied.
    pub(crate) fn state_parts(&self) -> &[Part] {
        self.parts.state()
    }

    /// The buffer of the f32 weights.
    pub(crate) fn masters(&self) -> BufferId {
        self.optimizer.masters()
    }

    /// The buffer of what is not trained, if there is any.
    pub(crate) fn frozen(&self) -> Option<BufferId> {
        self.memory.get("frozen").map(|(buffer, _)| buffer)
    }

    /// Replaces the f32 weights, and those that are computed with.
    pub(crate) fn set_weights(
        &mut self,
        backend: &mut dyn Backend,
        weights: &HostWeights,
        dtype: DType,
    ) -> Result<(), TrainError> {
        weights.upload(backend, &mut self.memory, dtype)?;
        backend.upload(self.optimizer.masters(), 0, bytemuck::cast_slice(&weights.trainable))?;
        Ok(())
    }

    /// The f32 weights as they are now.
    pub fn weights(
        &self,
        backend: &mut dyn Backend,
        model: &Model,
    ) -> Result<HostWeights, TrainError> {
        let trainable = download(backend, self.optimizer.masters(), self.elements)?;
        let frozen = match self.memory.get("frozen") {
            Some((buffer, _)) => download(backend, buffer, model.table.frozen_elements())?,
            None => Vec::new(),
        };
        Ok(HostWeights { trainable, frozen })
    }

    /// The optimiser's state as it is now, by name.
    pub fn moments(
        &self,
        backend: &mut dyn Backend,
    ) -> Result<Vec<(&'static str, Vec<f32>)>, TrainError> {
        let read = |name: &'static str| -> Result<_, TrainError> {
            let (buffer, _) = self.memory.get(name).expect("loading made it");
            Ok((name, download(backend, buffer, self.elements)?))
        };
        [FIRST, SECOND].into_iter().map(read).collect()
    }

    /// Sets the optimiser's state of a name; `false` if there is no such state.
    pub fn set_moment(
        &mut self,
        backend: &mut dyn Backend,
        name: &str,
        bytes: &[u8],
    ) -> Result<bool, TrainError> {
        match self.memory.get(name) {
            Some((buffer, size)) if [FIRST, SECOND].contains(&name) && size == bytes.len() => {
                backend.upload(buffer, 0, bytes)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// The sums that an addition of gradients is asked for.
const ADD_SUMS: Ask = Ask { read: 0b11, written: 0b100, changed: 0, digested: 0 };

/// Whether the model takes sequences of this length.
pub(crate) fn fits(model: &Model, sequence: usize) -> Result<(), TrainError> {
    let most = model.config.max_positions;
    if sequence <= most {
        return Ok(());
    }
    Err(TrainError::Config {
        origin: "data.sequence".to_owned(),
        what: format!("{sequence} is longer than the model allows: {most}"),
    })
}

/// The tensors of a model as a snapshot stores them.
pub fn tensor_refs<'a>(
    model: &Model,
    slices: &'a [pontoon_program::TensorSlice],
    weights: &'a HostWeights,
) -> Vec<TensorRef<'a>> {
    assert_eq!(slices.len(), model.table.tensors().len());
    let tensor = |slice: &'a pontoon_program::TensorSlice| TensorRef {
        name: &slice.name,
        dtype: ElementType::F32,
        shape: &slice.shape,
        bytes: Bytes::Held(bytemuck::cast_slice(weights.tensor(slice))),
    };
    slices.iter().map(tensor).collect()
}

/// One of the buffers along the tree, and its bytes.
fn gradient(memory: &Memory, index: usize) -> (BufferId, usize) {
    let found = memory.get(&format!("gradients.{index}"));
    found.expect("every leaf's program has a gradient")
}

/// The state that outlives a step in the order in which it is copied, and the weights that are
/// computed with.
fn state_parts(model: &Model, memory: &Memory, optimizer: &Optimizer) -> StateParts {
    let of = |name: &str| memory.get(name).into_iter();
    let masters = (optimizer.masters(), 4 * model.table.trainable_elements());
    let state = [masters].into_iter().chain(of(FIRST)).chain(of(SECOND)).chain(of("frozen"));
    let (state, weights): (Vec<_>, Vec<_>) = (state.collect(), of("weights").collect());
    StateParts::new(&model.table, &state, &weights, &optimizer.digested())
}

fn adds(memory: &Memory, count: usize, elements: usize) -> Vec<Op> {
    let view = |index: usize| View::contiguous(gradient(memory, index).0, DType::F32, [elements]);
    debug_assert_eq!(GRADIENT, "gradients.0");
    let add = |index: usize| Add { a: view(index), b: view(index + 1), y: view(index) };
    (0..count - 1).map(|index| Op::from(add(index))).collect()
}

fn write(executor: &Executor, backend: &mut dyn Backend, batch: &Batch) -> Result<(), TrainError> {
    executor.write(backend, "ids", bytemuck::cast_slice(&batch.ids))?;
    executor.write(backend, "targets", bytemuck::cast_slice(&batch.targets))?;
    executor.write(backend, "positions", bytemuck::cast_slice(&batch.positions))?;
    executor.write(backend, "documents", bytemuck::cast_slice(&batch.documents))?;
    Ok(())
}

/// What forward's matrix products cost on sequences that do not attend to each other.
fn forward_flops(op: &Op, sequences: f64) -> f64 {
    let flops = cost(op).matrix_flops;
    if op.name() == OpName::Attention { flops / sequences } else { flops }
}

/// The losses of targets that count, summed in the order of rows.
fn total(loss: &[f32], batch: &Batch) -> f64 {
    let counted = loss.iter().zip(&batch.targets).filter(|(_, target)| **target >= 0);
    counted.map(|(loss, _)| f64::from(*loss)).sum()
}
