//! The optimiser on the device: masters, moments, and the operations that apply a gradient.
//!
//! All parameters of a class are one range, so a step is a handful of operations. The state's
//! names in snapshots are those of the buffers. Read next: `step.rs`.

use pontoon_fleet::protocol::Rates;
use pontoon_models::{HostWeights, Model};
use pontoon_ops::sums::{Ask, asked};
use pontoon_ops::{
    AdamW, Backend, BufferId, DType, DeviceError, DeviceErrorKind, Muon, Op, SumSquares, View,
    hyper,
};
use pontoon_program::{Class, Memory, ProgramError};

use crate::balance::Balance;
use crate::config::{OptimizerName, TrainSection};
use crate::digests::Told;
use crate::error::TrainError;
use crate::schedule::learning_rate;

/// The gradient's buffer, as a step leaves it.
pub(crate) const GRADIENT: &str = "gradients.0";
/// First moments, or momentum under Muon.
pub(crate) const FIRST: &str = "moment.first";
/// Second moments.
pub(crate) const SECOND: &str = "moment.second";

/// The ways in which a range of parameters is updated; each has its own numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Decayed,
    Plain,
    Muon,
}

/// The loaded operations of an update.
#[derive(Debug)]
pub(crate) struct Optimizer {
    train: TrainSection,
    ops: Vec<Op>,
    numbers: [(Rule, BufferId); 3],
    sum_squares: Op,
    sum: BufferId,
    masters: BufferId,
    balance: Option<Balance>,
}

impl Optimizer {
    /// Puts weights on the device and makes room for moments, which are zero.
    pub(crate) fn load(
        backend: &mut dyn Backend,
        memory: &mut Memory,
        model: &Model,
        train: &TrainSection,
        weights: &HostWeights,
    ) -> Result<Optimizer, TrainError> {
        let dtype = train.dtype.dtype();
        weights.upload(backend, memory, dtype)?;
        let bytes = 4 * model.table.trainable_elements();
        let compute = memory.get("weights").map(|(buffer, _)| buffer);
        let compute = compute.expect("the line above put them there");
        let masters = match dtype {
            DType::F32 => compute,
            _ => {
                let masters = memory.ensure(backend, "masters", bytes)?;
                backend.upload(masters, 0, bytemuck::cast_slice(&weights.trainable))?;
                masters
            }
        };
        let mut named = |name: &str, bytes: usize| memory.ensure(backend, name, bytes);
        let state = Buffers {
            masters,
            compute: (dtype != DType::F32).then_some((compute, dtype)),
            gradient: named(GRADIENT, 4 * model.table.gradient_elements())?,
            first: named(FIRST, bytes)?,
            second: named(SECOND, bytes)?,
        };
        let size = 4 * hyper::COUNT;
        let numbers = [
            (Rule::Decayed, named("numbers.decayed", size)?),
            (Rule::Plain, named("numbers.plain", size)?),
            (Rule::Muon, named("numbers.muon", size)?),
        ];
        let sum = named("gradient.sum_squares", 4)?;
        let whole = flat(state.gradient, DType::F32, 0..model.table.trainable_elements());
        let y = flat(sum, DType::F32, 0..1);
        let sum_squares = Op::from(SumSquares { x: whole, y });
        let ops = update_ops(model, train.optimizer, &state, &numbers);
        for op in ops.iter().chain([&sum_squares]) {
            op.check().expect("ranges of one table fit each other");
        }
        let balance = Balance::load(memory, model, train.balance);
        Ok(Optimizer { train: train.clone(), ops, numbers, sum_squares, sum, masters, balance })
    }

    /// The norm of the whole gradient.
    pub(crate) fn gradient_norm(&self, backend: &mut dyn Backend) -> Result<f64, TrainError> {
        backend.launch(&self.sum_squares)?;
        let mut sum = [0.0_f32];
        backend.download(self.sum, 0, bytemuck::cast_slice_mut(&mut sum))?;
        Ok(f64::from(sum[0]).sqrt())
    }

    /// Where the operations begin that digest the state they write.
    pub(crate) fn digested(&self) -> Vec<(BufferId, usize)> {
        let of = |op: &Op| {
            let operands = op.operands();
            asked(&operands, digested(op)).map(|(_, view)| place(&view)).collect::<Vec<_>>()
        };
        self.ops.iter().flat_map(of).collect()
    }

    /// Applies the gradient, and the counts behind it, as step `step` (the first is 1). A gradient
    /// that is not the one of the word sum given is a `Corrupt`; then the state is spoilt. `told`
    /// gets the digests of the state, where they are asked for.
    pub(crate) fn apply(
        &mut self,
        backend: &mut dyn Backend,
        step: u64,
        gradient_norm: f64,
        gradient_sum: Option<u32>,
        told: Option<&mut Told>,
    ) -> Result<Rates, TrainError> {
        let train = &self.train;
        let lr = learning_rate(train, step);
        let clip = train.clip;
        let scale = if clip > 0.0 && gradient_norm > clip { clip / gradient_norm } else { 1.0 };
        for (rule, buffer) in self.numbers {
            let mut numbers = [0.0_f32; hyper::COUNT];
            let decay = if rule == Rule::Plain { 0.0 } else { train.weight_decay };
            let beta1 = if rule == Rule::Muon { train.momentum } else { train.beta1 };
            let power = |beta: f64| 1.0 - beta.powf(step as f64);
            for (place, value) in [
                (hyper::LR, lr),
                (hyper::BETA1, beta1),
                (hyper::BETA2, train.beta2),
                (hyper::EPS, train.eps),
                (hyper::WEIGHT_DECAY, decay),
                (hyper::BIAS1, power(beta1)),
                (hyper::BIAS2, power(train.beta2)),
                (hyper::GRAD_SCALE, scale),
            ] {
                numbers[place] = value as f32;
            }
            backend.upload(buffer, 0, bytemuck::cast_slice(&numbers))?;
        }
        let balanced = self.balance.as_mut().map(|balance| balance.apply(backend)).transpose()?;
        let rates = Rates { lr, imbalance: balanced.map(|of| of.imbalance) };
        if gradient_sum.is_none() && told.is_none() {
            backend.launch_all(&self.ops)?;
            return Ok(rates);
        }
        let sum = self.launch(backend, gradient_sum.is_some(), told)?;
        let sum = sum.wrapping_add(balanced.map_or(0, |of| of.words));
        match gradient_sum.is_none_or(|wanted| wanted == sum) {
            true => Ok(rates),
            false => Err(changed("the gradient", "it was applied").into()),
        }
    }

    /// Launches the update; gives the word sum of the gradient, if it is asked for.
    fn launch(
        &self,
        backend: &mut dyn Backend,
        sums_gradient: bool,
        mut told: Option<&mut Told>,
    ) -> Result<u32, DeviceError> {
        let mut sum = 0_u32;
        for op in &self.ops {
            let operands = op.operands();
            let gradient = operands.iter().position(|operand| operand.name == "grad");
            let gradient = gradient.expect("every update reads a gradient");
            let ask = Ask {
                read: if sums_gradient { 1 << gradient } else { 0 },
                digested: if told.is_some() { digested(op) } else { 0 },
                ..Ask::default()
            };
            let found = backend.launch_summed(op, ask)?;
            sum = sum.wrapping_add(found.read[gradient]);
            let Some(told) = &mut told else { continue };
            for (index, view) in asked(&operands, ask.digested) {
                told.written.insert(place(&view), found.digest_written[index]);
                if operands[index].access.reads() {
                    told.read.insert(place(&view), found.digest_read[index]);
                }
            }
        }
        Ok(sum)
    }

    /// The buffer of the f32 weights.
    pub(crate) fn masters(&self) -> BufferId {
        self.masters
    }
}

/// The operands of an update that it digests: it works on the ranges that digests are formed over.
fn digested(op: &Op) -> u32 {
    let Op::AdamW(_) = op else { return 0 };
    let written = op.operands().into_iter().enumerate().filter(|(_, of)| of.access.writes());
    written.fold(0, |mask, (place, _)| mask | 1 << place)
}

fn place(view: &View) -> (BufferId, usize) {
    (view.buffer, view.byte_offset)
}

/// A tensor in memory that is no longer what it was.
pub(crate) fn changed(what: &str, before: &str) -> DeviceError {
    let text = format!("{what} changed in memory before {before}");
    DeviceError::new(DeviceErrorKind::Corrupt, text)
}

struct Buffers {
    masters: BufferId,
    compute: Option<(BufferId, DType)>,
    gradient: BufferId,
    first: BufferId,
    second: BufferId,
}

fn flat(buffer: BufferId, dtype: DType, range: std::ops::Range<usize>) -> View {
    View::contiguous(buffer, dtype, [range.len()]).rebased(buffer, dtype.bytes(range.start))
}

fn update_ops(
    model: &Model,
    optimizer: OptimizerName,
    state: &Buffers,
    numbers: &[(Rule, BufferId); 3],
) -> Vec<Op> {
    let hyper = |rule: Rule| {
        let (_, buffer) = numbers.iter().find(|(of, _)| *of == rule).expect("every rule is there");
        View::contiguous(*buffer, DType::F32, [hyper::COUNT])
    };
    let mut ops = Vec::new();
    let mut adamw = |class: Class, rule: Rule| {
        let range = model.table.class_range(class);
        if range.is_empty() {
            return;
        }
        let of = |buffer: BufferId| flat(buffer, DType::F32, range.clone());
        ops.push(Op::from(AdamW {
            weight: of(state.masters),
            grad: of(state.gradient),
            m: of(state.first),
            v: of(state.second),
            compute: state.compute.map(|(buffer, dtype)| flat(buffer, dtype, range.clone())),
            hyper: hyper(rule),
        }));
    };
    adamw(Class::Embedding, Rule::Decayed);
    adamw(Class::Vector, Rule::Plain);
    if optimizer == OptimizerName::Adamw {
        adamw(Class::Matrix, Rule::Decayed);
        return ops;
    }
    let matrices = model.table.parameters().iter().filter(|p| p.spec.class == Class::Matrix);
    for parameter in matrices {
        let of = |buffer: BufferId, dtype: DType| {
            View::contiguous(buffer, dtype, parameter.spec.shape.as_slice())
                .rebased(buffer, dtype.bytes(parameter.element_offset))
        };
        ops.push(Op::from(Muon {
            weight: of(state.masters, DType::F32),
            grad: of(state.gradient, DType::F32),
            momentum: of(state.first, DType::F32),
            compute: state.compute.map(|(buffer, dtype)| of(buffer, dtype)),
            hyper: hyper(Rule::Muon),
        }));
    }
    ops
}

/// Reads a whole f32 buffer.
pub(crate) fn download(
    backend: &mut dyn Backend,
    buffer: BufferId,
    elements: usize,
) -> Result<Vec<f32>, ProgramError> {
    let mut values = vec![0.0_f32; elements];
    backend.download(buffer, 0, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}
