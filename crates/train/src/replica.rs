//! A copy of the run's state on one device, as the fleet's worker drives it.
//!
//! Gradients and state pass through the exchange in pieces. Read next: `step.rs`, what a device
//! does in a step; `supervised.rs`, the other side.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pontoon_fleet::exchange::{Exchange, Layout};
use pontoon_fleet::protocol::{
    Against, Apart, Area, DeviceFacts, Node, Publish, Rates, Source, StateDigest, Trouble,
};
use pontoon_fleet::snapshot::{Parts, SnapshotReader};
use pontoon_fleet::worker::{Combined, Computed, Fault, Progress, Replayed, Replica};
use pontoon_fleet::world::{Clock, Disk};
use pontoon_models::{HostWeights, Model, Weights};
use pontoon_ops::digest::{Blocks, of_digests};
use pontoon_ops::sums::{Ask, Sums, of_row};
use pontoon_ops::{Backend, BufferId, DeviceError, DeviceErrorKind, Op, View};
use pontoon_program::{Class, TensorSlice};

use crate::config::RunConfig;
use crate::data::Batch;
use crate::digests::Part;
use crate::error::TrainError;
use crate::optimizer::changed;
use crate::run_files::{classes_of, restore_moments, restore_weights, samples};
use crate::step::{STAGE, TrainingState, digest_gradient, digest_of_host, stages};
use crate::trainer::{Data, model_of};

/// Where the parts of a run's exchange lie.
pub fn layout(model: &Model, config: &RunConfig) -> Layout {
    let gradient = 4 * model.table.gradient_elements() as u64;
    let trainable = 4 * model.table.trainable_elements() as u64;
    let frozen = 4 * model.table.frozen_elements() as u64;
    let leaves = config.train.micro_batches as u32;
    Layout { gradient, leaves, state: 3 * trainable + frozen }
}

/// What a worker is given.
pub struct WorkerRun<'a> {
    /// The run's settings, with absolute paths.
    pub config: RunConfig,
    /// Where snapshots are.
    pub snapshots: PathBuf,
    /// The memory shared with the others.
    pub exchange: Exchange,
    /// Told of every operation.
    pub progress: Arc<Progress>,
    /// The disk.
    pub disk: &'a dyn Disk,
    /// The clock.
    pub clock: &'a dyn Clock,
}

/// The replica of one worker.
pub struct TrainingReplica<'a> {
    run: WorkerRun<'a>,
    backend: Watched<'a>,
    model: Model,
    layout: Layout,
    /// The tensors that have a gradient.
    slices: Vec<TensorSlice>,
    data: Data,
    state: Option<TrainingState>,
    /// The micro-batches of a step, and the step.
    batches: (u64, Vec<Batch>),
    piece: Vec<u8>,
    /// What it published last and still has in the first gradient buffer.
    held: Option<Held>,
    norm: f64,
    passed_over: Vec<(u64, String)>,
    /// The class that wrote the snapshot it loaded, and all that took part before.
    written_by: Option<String>,
    classes: Vec<String>,
}

/// A subtree's gradient that stands in the first gradient buffer as it was published.
#[derive(Clone, Copy)]
struct Held {
    step: u64,
    node: Node,
    digest: u64,
}

impl Held {
    /// Its index among a step's nodes, if it need not be read back to be added to the others: see
    /// [`TrainingState::sum`].
    fn place_among(&self, nodes: &[Node]) -> Option<usize> {
        let index = nodes.iter().position(|node| *node == self.node)?;
        let first_pair = index == 1 && nodes[0].count == nodes[1].count;
        (index == 0 || first_pair).then_some(index)
    }
}

impl<'a> TrainingReplica<'a> {
    /// Opens model and data; the device stays empty until it is told to load.
    pub fn new(
        run: WorkerRun<'a>,
        backend: &'a mut dyn Backend,
    ) -> Result<TrainingReplica<'a>, TrainError> {
        let base = PathBuf::new();
        let model = model_of(&run.config, &base)?;
        let data = Data::open(&run.config, &model, &base)?;
        let (progress, clock) = (Arc::clone(&run.progress), run.clock);
        Ok(TrainingReplica {
            backend: Watched { inner: backend, progress, clock, last: clock.now() },
            layout: layout(&model, &run.config),
            slices: trained(&model),
            batches: (0, vec![Batch::default(); run.config.train.micro_batches]),
            run,
            model,
            data,
            state: None,
            piece: vec![0; STAGE],
            held: None,
            norm: 0.0,
            passed_over: Vec::new(),
            written_by: None,
            classes: Vec::new(),
        })
    }

    fn fill(&mut self, step: u64) {
        if self.batches.0 == step {
            return;
        }
        let size = self.run.config.train.micro_batch;
        for (index, batch) in self.batches.1.iter_mut().enumerate() {
            let position = (step - 1) * samples(&self.run.config) + (index * size) as u64;
            self.data.train.batch(position, size, batch);
        }
        self.batches.0 = step;
    }

    fn digest_state(&mut self) -> Result<StateDigest, TrainError> {
        Ok(loaded(&mut self.state).digest(&mut self.backend)?)
    }

    fn first_state(&mut self, from: Source) -> Result<(u64, Option<StateDigest>), TrainError> {
        let config = &self.run.config;
        let snapshot = match from {
            Source::Snapshot => {
                let reader = SnapshotReader::new(self.run.disk, &self.run.snapshots);
                let newest = reader.read_newest(Parts::All)?;
                let rejected = newest.rejected.into_iter();
                self.passed_over = rejected.map(|of| (of.step, of.reason.to_string())).collect();
                newest.snapshot
            }
            _ => None,
        };
        let weights = match (&snapshot, &config.model.init) {
            _ if from == Source::Nothing => HostWeights::zeros(&self.model),
            (Some(snapshot), _) => restore_weights(snapshot, &self.model, config)?,
            (None, Some(folder)) => self.model.load(&Weights::open(folder)?)?,
            (None, None) => self.model.initialise(config.train.seed),
        };
        let mut state = TrainingState::load(&mut self.backend, &self.model, config, &weights)?;
        if let Some(snapshot) = &snapshot {
            restore_moments(snapshot, &self.model, &mut state, &mut self.backend)?;
        }
        self.state = Some(state);
        if let Some(snapshot) = &snapshot {
            self.written_by = Some(snapshot.state.backend.clone());
            self.classes = classes_of(&snapshot.state);
        }
        let step = snapshot.map_or(0, |snapshot| snapshot.state.step);
        match from {
            Source::Nothing => Ok((step, None)),
            _ => Ok((step, Some(self.digest_state()?))),
        }
    }

    fn take_state(&mut self) -> Result<StateDigest, TrainError> {
        let mut weights = HostWeights::zeros(&self.model);
        let mut position = self.layout.area(Area::Join);
        let state = loaded(&mut self.state);
        for &Part { buffer, byte_offset, bytes } in state.state_parts() {
            let values = if buffer == state.masters() {
                Some(&mut weights.trainable)
            } else if Some(buffer) == state.frozen() {
                Some(&mut weights.frozen)
            } else {
                None
            };
            let exchange = &self.run.exchange;
            match values {
                Some(values) => {
                    let place = bytemuck::cast_slice_mut(values);
                    let place = &mut place[byte_offset..][..bytes];
                    exchange.read(position, place).map_err(TrainError::Exchange)?;
                }
                None => {
                    for (at, size) in stages(bytes) {
                        let piece = &mut self.piece[..size];
                        exchange.read(position + at as u64, piece).map_err(TrainError::Exchange)?;
                        self.backend.upload(buffer, byte_offset + at, piece)?;
                    }
                }
            }
            position += bytes as u64;
        }
        state.set_weights(&mut self.backend, &weights, self.run.config.train.dtype.dtype())?;
        self.digest_state()
    }

    fn compute_subtree(
        &mut self,
        step: u64,
        node: Node,
        digests: &[u32],
        publish: Publish,
    ) -> Result<Computed, TrainError> {
        self.fill(step);
        self.held = None;
        let begun = self.run.clock.now();
        let bytes = self.layout.gradient as usize;
        let leaves = node.first as usize..(node.first + node.count) as usize;
        let state = loaded(&mut self.state);
        let mut of_leaves = Vec::new();
        let mut seen = |backend: &mut dyn Backend, leaf: usize, buffer: BufferId| {
            if digests.contains(&(leaf as u32)) {
                of_leaves.push((leaf as u32, digest_gradient(backend, buffer, bytes)?));
            }
            Ok(())
        };
        let losses = state.subtree(&mut self.backend, &self.batches.1, leaves, &mut seen)?;
        let digest = match publish {
            Publish::Local => 0,
            Publish::Shared => {
                let digest = self.publish(node)?;
                self.held = Some(Held { step, node, digest });
                digest
            }
        };
        let seconds = self.run.clock.now().duration_since(begun).as_secs_f64();
        Ok(Computed { digest, leaves: of_leaves, losses, seconds })
    }

    /// Puts the gradient that was just computed into its place in the exchange; gives its digest.
    fn publish(&mut self, node: Node) -> Result<u64, TrainError> {
        let (state, slot) = (loaded(&mut self.state), self.layout.slot(node.first));
        let buffer = state.gradient_buffer(0);
        let (mut digests, mut words) = (Vec::new(), 0_u32);
        for (at, size) in stages(self.layout.gradient as usize) {
            // Of what lies on the device, and it is then near to be copied.
            digests.push(self.backend.digest(buffer, at, size)?);
            shown(&mut self.backend, (buffer, at), &mut self.piece[..size], |stage| {
                words = words.wrapping_add(of_row(stage));
                let written = self.run.exchange.write_gradient(slot + at as u64, stage);
                written.map_err(TrainError::Exchange)
            })?;
        }
        if state.gradient_sum().is_some_and(|sum| sum != words) {
            return Err(changed("the gradient", "it was published").into());
        }
        Ok(of_digests(&digests))
    }

    /// How far the gradient that was just computed is from the one in a leaf's place in the
    /// exchange, by the tensor that is furthest.
    fn compare_with_published(&mut self, leaf: u32) -> Result<Apart, TrainError> {
        let slot = self.layout.slot(leaf);
        let mine = loaded(&mut self.state).gradient_buffer(0);
        let mut theirs = vec![0_u8; self.layout.gradient as usize];
        self.run.exchange.read_gradient(slot, &mut theirs).map_err(TrainError::Exchange)?;
        let mut worst = (0.0, String::new());
        for slice in &self.slices {
            let mut distance = Distance::default();
            let at = 4 * slice.element_offset;
            let part = (mine, at, 4 * slice.elements());
            ranges(&mut self.backend, part, &mut self.piece, |from, piece| {
                distance.add(piece, &theirs[from..from + piece.len()]);
                Ok(())
            })?;
            let error = distance.relative();
            if error > worst.0 || error.is_nan() || worst.1.is_empty() {
                worst = (error, slice.name.clone());
                if error.is_nan() {
                    break;
                }
            }
        }
        let (error, tensor) = (worst.0.into(), worst.1);
        Ok(Apart { published: digest_of_host(&theirs), error, tensor })
    }

    fn sum_up(&mut self, step: u64, nodes: &[Node]) -> Result<Combined, TrainError> {
        let bytes = self.layout.gradient as usize;
        let state = loaded(&mut self.state);
        let before = state.digest_before(&mut self.backend)?;
        let counts: Vec<u32> = nodes.iter().map(|node| node.count).collect();
        let held = self.held.take().filter(|held| held.step == step);
        let place = held.and_then(|held| held.place_among(nodes));
        let mut read = vec![held.map_or(0, |held| held.digest); nodes.len()];
        let mut from = |index: usize, at: usize, stage: &mut [u8]| {
            let slot = self.layout.slot(nodes[index].first);
            let found = self.run.exchange.read_gradient(slot + at as u64, stage);
            found.map_err(TrainError::Exchange)
        };
        let mut gradient = 0;
        // One that computes alone has nobody to compare its sum with.
        if !nodes.is_empty() {
            let sum = state.sum(&mut self.backend, &counts, place, bytes, &mut from)?;
            sum.read.into_iter().for_each(|(index, digest)| read[index] = digest);
            gradient = sum.digest;
        }
        self.norm = state.gradient_norm(&mut self.backend)?;
        Ok(Combined { before, nodes: read, gradient, norm: self.norm })
    }

    fn copy_out(&mut self, area: Area) -> Result<u64, TrainError> {
        let mut position = self.layout.area(area);
        let mut digests = Vec::new();
        for &Part { buffer, byte_offset, bytes } in loaded(&mut self.state).state_parts() {
            let mut digest = Blocks::default();
            ranges(
                &mut self.backend,
                (buffer, byte_offset, bytes),
                &mut self.piece,
                |_, piece| {
                    digest.push(piece);
                    self.run.exchange.write(position, piece).map_err(TrainError::Exchange)?;
                    position += piece.len() as u64;
                    Ok(())
                },
            )?;
            digests.push(digest.finish());
        }
        Ok(of_digests(&digests))
    }

    fn validate(&mut self) -> Result<f64, TrainError> {
        let batches = self.data.validation(&self.run.config);
        loaded(&mut self.state).score(&mut self.backend, &batches)
    }
}

impl Replica for TrainingReplica<'_> {
    fn load(&mut self, from: Source) -> Result<(u64, Option<StateDigest>), Fault> {
        self.first_state(from).map_err(fault)
    }

    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            numeric_class: self.backend.info().numeric_class.clone(),
            memory_bytes: self.backend.memory_used() as u64,
            passed_over: self.passed_over.clone(),
            written_by: self.written_by.clone(),
            classes: self.classes.clone(),
        }
    }

    fn import(&mut self, _step: u64) -> Result<StateDigest, Fault> {
        self.take_state().map_err(fault)
    }

    fn compute(
        &mut self,
        step: u64,
        node: Node,
        digests: &[u32],
        publish: Publish,
    ) -> Result<Computed, Fault> {
        self.compute_subtree(step, node, digests, publish).map_err(fault)
    }

    fn replay(&mut self, step: u64, leaf: u32, against: Against) -> Result<Replayed, Fault> {
        let node = Node { first: leaf, count: 1 };
        let computed = self.compute_subtree(step, node, &[leaf], Publish::Local).map_err(fault)?;
        let apart = match against {
            Against::Nothing => None,
            Against::Published => Some(self.compare_with_published(leaf).map_err(fault)?),
        };
        Ok(Replayed { digest: computed.leaves[0].1, loss: computed.losses[0], apart })
    }

    fn check(&mut self) -> Result<StateDigest, Fault> {
        self.digest_state().map_err(fault)
    }

    fn combine(&mut self, step: u64, nodes: &[Node]) -> Result<Combined, Fault> {
        self.sum_up(step, nodes).map_err(fault)
    }

    fn apply(&mut self, step: u64) -> Result<(Rates, StateDigest), Fault> {
        let state = loaded(&mut self.state);
        state.apply(&mut self.backend, step, self.norm).map_err(fault)
    }

    fn export(&mut self, area: Area) -> Result<u64, Fault> {
        self.copy_out(area).map_err(fault)
    }

    fn score(&mut self) -> Result<f64, Fault> {
        self.validate().map_err(fault)
    }
}

fn trained(model: &Model) -> Vec<TensorSlice> {
    let slices = model.table.tensors().into_iter();
    slices.filter(|slice| slice.class != Class::Frozen).collect()
}

fn loaded(state: &mut Option<TrainingState>) -> &mut TrainingState {
    state.as_mut().expect("the supervisor sends Load before anything else")
}

fn fault(error: TrainError) -> Fault {
    let text = error.to_string();
    let Some(device) = error.device() else { return Fault { trouble: Trouble::Run, text } };
    let trouble = match device.kind {
        DeviceErrorKind::Lost => Trouble::Lost,
        DeviceErrorKind::Hang => Trouble::Hang,
        DeviceErrorKind::MemoryFault => Trouble::MemoryFault,
        DeviceErrorKind::Corrupt => Trouble::Corrupt,
        DeviceErrorKind::OutOfMemory => Trouble::OutOfMemory,
        DeviceErrorKind::LinkDown => Trouble::LinkDown,
        DeviceErrorKind::Unsupported | DeviceErrorKind::BadArgument => Trouble::Run,
    };
    Fault { trouble, text }
}

/// Shows bytes of a buffer, as many as `copy` has: where they are, or copied to the host.
fn shown(
    backend: &mut dyn Backend,
    (buffer, at): (BufferId, usize),
    copy: &mut [u8],
    show: impl FnOnce(&[u8]) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    if let Some(bytes) = backend.mapped(buffer, at, copy.len())? {
        return show(bytes);
    }
    backend.download(buffer, at, copy)?;
    show(copy)
}

/// Shows a range of a buffer's bytes piece by piece, each with its place.
fn ranges(
    backend: &mut dyn Backend,
    (buffer, from, bytes): (BufferId, usize, usize),
    piece: &mut [u8],
    mut show: impl FnMut(usize, &[u8]) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    for (at, size) in stages(bytes).map(|(at, size)| (from + at, size)) {
        shown(backend, (buffer, at), &mut piece[..size], |piece| show(at, piece))?;
    }
    Ok(())
}

/// How far one run of numbers is from another.
#[derive(Default)]
struct Distance {
    apart: f64,
    mine: f64,
    theirs: f64,
}

impl Distance {
    fn add(&mut self, mine: &[u8], theirs: &[u8]) {
        let number =
            |four: &[u8]| f64::from(f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
        for (mine, theirs) in mine.chunks_exact(4).zip(theirs.chunks_exact(4)) {
            let (mine, theirs) = (number(mine), number(theirs));
            self.apart += (mine - theirs).powi(2);
            self.mine += mine * mine;
            self.theirs += theirs * theirs;
        }
    }

    /// The norm of the difference over the norm of the larger, so that it does not matter whose
    /// word is asked; nothing where both are zero, as for an expert that no row went to.
    fn relative(&self) -> f64 {
        let norm = self.mine.max(self.theirs);
        if norm == 0.0 { 0.0 } else { (self.apart / norm).sqrt() }
    }
}

/// A device that tells of its progress.
struct Watched<'a> {
    inner: &'a mut dyn Backend,
    progress: Arc<Progress>,
    clock: &'a dyn Clock,
    last: Instant,
}

impl Watched<'_> {
    fn tell<T>(&mut self, result: T) -> T {
        let now = self.clock.now();
        self.progress.done(now.duration_since(self.last));
        self.last = now;
        result
    }

    fn begin(&mut self) {
        self.last = self.clock.now();
    }
}

impl Backend for Watched<'_> {
    pontoon_ops::delegate!(inner: info alloc free supports sums_in_place wait memory_used);

    fn upload(&mut self, buffer: BufferId, at: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.begin();
        let result = self.inner.upload(buffer, at, bytes);
        self.tell(result)
    }

    fn download(
        &mut self,
        buffer: BufferId,
        at: usize,
        bytes: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.begin();
        let result = self.inner.download(buffer, at, bytes);
        self.tell(result)
    }

    fn mapped(
        &mut self,
        buffer: BufferId,
        at: usize,
        bytes: usize,
    ) -> Result<Option<&mut [u8]>, DeviceError> {
        self.progress.done(Duration::ZERO);
        self.inner.mapped(buffer, at, bytes)
    }

    fn digest(&mut self, buffer: BufferId, at: usize, bytes: usize) -> Result<u64, DeviceError> {
        self.begin();
        let result = self.inner.digest(buffer, at, bytes);
        self.tell(result)
    }

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.begin();
        let result = self.inner.launch(op);
        self.tell(result)
    }

    fn sums(&mut self, views: &[View]) -> Result<Vec<u32>, DeviceError> {
        self.begin();
        let result = self.inner.sums(views);
        self.tell(result)
    }

    fn launch_summed(&mut self, op: &Op, ask: Ask) -> Result<Sums, DeviceError> {
        self.begin();
        let result = self.inner.launch_summed(op, ask);
        self.tell(result)
    }
}
