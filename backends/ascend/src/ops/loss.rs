//! Losses and log-probabilities over the output head, by chunks of rows, so that logits never
//! stand whole in memory.
//!
//! Sums of exponentials are made in the open (maximum, difference, exponential, sum) rather than
//! by a fused call, so that drawing a token and scoring it give the same bits.

use pontoon_ops::{self as ops, Accumulate, DeviceError, IGNORED, View};

use super::linear::Quantised;
use crate::core::{Core, Done};
use crate::tensor::{Kind, Tensor};

/// Logits that stand in memory at a time: 64 MiB of f32.
const LOGITS_MAX: usize = 16 << 20;
/// Gradients of logits that wait for the products at a time: their sum over rows is then one
/// product for most batches.
const GRADIENTS_MAX: usize = 256 << 20;

/// What all four operations read.
struct Head {
    x: Tensor,
    /// One row per token of the vocabulary; of a quantised head only its extents count.
    head: Tensor,
    quantised: Option<Quantised>,
    targets: Targets,
    temperature: f32,
}

/// The right token of each row.
struct Targets {
    /// In range, i64 `[rows, 1]`.
    index: Tensor,
    /// Rows whose target does not exist, ignored ones among them, `[rows, 1]`.
    bad: Option<Tensor>,
    /// Rows that count for nothing, `[rows, 1]`.
    ignored: Option<Tensor>,
}

impl Head {
    fn new(
        core: &mut Core,
        x: &View,
        head: &View,
        targets: &View,
        temperature: f32,
    ) -> Result<Head, DeviceError> {
        let (x, head) = (core.tensor(x)?, core.tensor(head)?);
        let rows = x.dim(0);
        let safe = super::memory::in_range(core, targets, head.dim(0))?;
        let index = core.dense(safe.index)?;
        let index = core.converted(index, Kind::I64)?.reshape(&[rows, 1]);
        let ignored = match safe.bad {
            None => None,
            Some(_) => {
                let given = core.tensor(targets)?;
                Some(core.equals(given, i64::from(IGNORED))?.reshape(&[rows, 1]))
            }
        };
        let targets = Targets { index, bad: safe.bad, ignored };
        Ok(Head { x, head, quantised: None, targets, temperature })
    }

    fn rows_at_once(&self) -> usize {
        (LOGITS_MAX / self.head.dim(0)).clamp(1, self.x.dim(0))
    }

    /// The statistics of some rows.
    fn rows(&self, core: &mut Core, first: usize, count: usize) -> Result<Rows, DeviceError> {
        let logits = core.scratch(Kind::F32, &[count, self.head.dim(0)])?;
        self.logits(core, self.x.slice(0, first, count), logits)?;
        if self.temperature != 1.0 {
            core.scale(logits, 1.0 / self.temperature, logits)?;
        }
        let index = self.targets.index.slice(0, first, count);
        let target = core.gather(logits, index)?;
        let sums = exponentials(core, logits)?;
        Ok(Rows { first, count, target, index, sums })
    }

    fn logits(&self, core: &mut Core, x: Tensor, logits: Tensor) -> Done {
        let Some(quantised) = &self.quantised else {
            return core.product(x, self.head.transpose(0, 1), logits);
        };
        let (x, vocabulary) = (core.wide(x)?, self.head.dim(0));
        let at_once = quantised.rows_at_once();
        for first in (0..vocabulary).step_by(at_once) {
            let count = at_once.min(vocabulary - first);
            let mark = core.scratch.mark();
            let values = quantised.rows(core, first, count)?;
            core.product(x, values.transpose(0, 1), logits.slice(1, first, count))?;
            core.scratch.release(mark);
        }
        Ok(())
    }

    /// Sets what a row gives whose target counts for nothing, or does not exist.
    fn mark(&self, core: &mut Core, rows: &Rows, result: Tensor) -> Done {
        let own = |mask: Tensor| mask.slice(0, rows.first, rows.count);
        if let Some(bad) = self.targets.bad {
            core.fill_where(result, own(bad), f32::NAN)?;
        }
        match self.targets.ignored {
            Some(ignored) => core.fill_where(result, own(ignored), 0.0),
            None => Ok(()),
        }
    }
}

/// Some rows' softmax in parts.
struct Rows {
    first: usize,
    count: usize,
    /// The target's logit, `[rows, 1]`.
    target: Tensor,
    index: Tensor,
    sums: Exponentials,
}

/// A row's exponentials, taken from its largest logit.
pub(super) struct Exponentials {
    /// `exp(logit - peak)`, where the logits stood.
    pub terms: Tensor,
    /// The largest logit, `[rows, 1]`.
    pub peak: Tensor,
    /// The terms' sum, `[rows, 1]`.
    pub sum: Tensor,
}

/// Replaces logits by their exponentials.
pub(super) fn exponentials(core: &mut Core, logits: Tensor) -> Result<Exponentials, DeviceError> {
    let peak = core.largest(logits, 1)?;
    core.sub(logits, peak, logits)?;
    core.exp(logits, logits)?;
    let sum = core.sum(logits, 1)?;
    Ok(Exponentials { terms: logits, peak, sum })
}

impl Exponentials {
    /// The logarithm of the sum of exponentials, `[rows, 1]`.
    pub fn lse(&self, core: &mut Core) -> Result<Tensor, DeviceError> {
        let lse = core.scratch(Kind::F32, self.sum.dims())?;
        core.log(self.sum, lse)?;
        core.add(lse, self.peak, lse)?;
        Ok(lse)
    }
}

/// Some rows of a vector, `[rows, 1]`.
fn column(core: &Core, view: &View, first: usize, count: usize) -> Result<Tensor, DeviceError> {
    Ok(core.tensor(view)?.slice(0, first, count).widen(1))
}

fn losses(core: &mut Core, head: &Head, rows: &Rows, loss: &View, lse: &View) -> Done {
    let loss = column(core, loss, rows.first, rows.count)?;
    let own = rows.sums.lse(core)?;
    core.sub(own, rows.target, loss)?;
    head.mark(core, rows, loss)?;
    let lse = column(core, lse, rows.first, rows.count)?;
    core.copy(lse, own)
}

pub(super) fn cross_entropy(core: &mut Core, op: &ops::CrossEntropy) -> Done {
    let head = Head::new(core, &op.x, &op.head, &op.targets, 1.0)?;
    let (all, step) = (head.x.dim(0), head.rows_at_once());
    for first in (0..all).step_by(step) {
        let mark = core.scratch.mark();
        let rows = head.rows(core, first, step.min(all - first))?;
        losses(core, &head, &rows, &op.loss, &op.lse)?;
        core.scratch.release(mark);
    }
    Ok(())
}

pub(super) fn token_log_prob(core: &mut Core, op: &ops::TokenLogProb) -> Done {
    let mut head = Head::new(core, &op.x, &op.head, &op.targets, op.temperature)?;
    if let Some(scales) = &op.scales {
        head.quantised = Some(Quantised::new(core, &op.head, scales, [1, op.block_k])?);
    }
    let (all, step) = (head.x.dim(0), head.rows_at_once());
    for first in (0..all).step_by(step) {
        let mark = core.scratch.mark();
        let rows = head.rows(core, first, step.min(all - first))?;
        let logprob = column(core, &op.logprob, rows.first, rows.count)?;
        let lse = rows.sums.lse(core)?;
        core.sub(rows.target, lse, logprob)?;
        head.mark(core, &rows, logprob)?;
        entropy(core, &rows.sums, column(core, &op.entropy, rows.first, rows.count)?)?;
        core.scratch.release(mark);
    }
    Ok(())
}

/// `log(sum) - sum(e (logit - peak)) / sum`, where `logit - peak` is the logarithm of `e`; an
/// exponential that fell to zero counts for nothing.
fn entropy(core: &mut Core, sums: &Exponentials, out: Tensor) -> Done {
    let terms = sums.terms;
    let logs = core.scratch(Kind::F32, terms.dims())?;
    core.log(terms, logs)?;
    core.mul(logs, terms, logs)?;
    let gone = core.is_zero(terms)?;
    core.fill_where(logs, gone, 0.0)?;
    let mean = core.sum(logs, 1)?;
    core.div(mean, sums.sum, mean)?;
    let log = core.scratch(Kind::F32, sums.sum.dims())?;
    core.log(sums.sum, log)?;
    core.sub(log, mean, out)
}

/// Where gradients come from and go to.
struct Gradients<'a> {
    /// Gradient of each row's loss.
    upstream: &'a View,
    /// Turns it into the factor of `softmax - onehot`.
    factor: f32,
    dx: &'a View,
    dhead: &'a View,
    accumulate: Accumulate,
    /// Where losses and log-sums go, if they are wanted too.
    losses: Option<(&'a View, &'a View)>,
}

pub(super) fn cross_entropy_bwd(core: &mut Core, op: &ops::CrossEntropyBwd) -> Done {
    let head = Head::new(core, &op.x, &op.head, &op.targets, 1.0)?;
    let gradients = Gradients {
        upstream: &op.dloss,
        factor: 1.0,
        dx: &op.dx,
        dhead: &op.dhead,
        accumulate: op.accumulate,
        losses: Some((&op.loss, &op.lse)),
    };
    gradients.run(core, &head)
}

pub(super) fn token_log_prob_bwd(core: &mut Core, op: &ops::TokenLogProbBwd) -> Done {
    let head = Head::new(core, &op.x, &op.head, &op.targets, op.temperature)?;
    let gradients = Gradients {
        upstream: &op.dlogprob,
        factor: -1.0 / op.temperature,
        dx: &op.dx,
        dhead: &op.dhead,
        accumulate: op.accumulate,
        losses: None,
    };
    gradients.run(core, &head)
}

impl Gradients<'_> {
    fn run(&self, core: &mut Core, head: &Head) -> Done {
        let (dx, dhead) = (core.tensor(self.dx)?, core.tensor(self.dhead)?);
        let (all, vocabulary) = (head.x.dim(0), head.head.dim(0));
        if all == 0 {
            return match self.accumulate {
                Accumulate::Overwrite => core.zero(dhead),
                Accumulate::Add => Ok(()),
            };
        }
        let step = (GRADIENTS_MAX / vocabulary).clamp(1, all);
        for first in (0..all).step_by(step) {
            let mark = core.scratch.mark();
            let count = step.min(all - first);
            let dlogits = core.scratch(head.x.kind, &[count, vocabulary])?;
            self.logits(core, head, first, dlogits)?;
            core.product(dlogits, head.head, dx.slice(0, first, count))?;
            let (rows, turned) = (head.x.slice(0, first, count), dlogits.transpose(0, 1));
            if first == 0 && self.accumulate == Accumulate::Overwrite {
                core.product(turned, rows, dhead)?;
            } else {
                let sum = core.scratch(Kind::F32, dhead.dims())?;
                core.product(turned, rows, sum)?;
                core.add(dhead, sum, dhead)?;
            }
            core.scratch.release(mark);
        }
        Ok(())
    }

    /// Fills the gradients of some rows' logits.
    fn logits(&self, core: &mut Core, head: &Head, first: usize, dlogits: Tensor) -> Done {
        let (all, step) = (dlogits.dim(0), head.rows_at_once());
        for start in (0..all).step_by(step) {
            let mark = core.scratch.mark();
            let count = step.min(all - start);
            let rows = head.rows(core, first + start, count)?;
            if let Some((loss, lse)) = self.losses {
                losses(core, head, &rows, loss, lse)?;
            }
            let own = dlogits.slice(0, start, count);
            let upstream = column(core, self.upstream, rows.first, count)?;
            let scaled = core.scratch(Kind::F32, &[count, 1])?;
            core.scale(upstream, self.factor, scaled)?;
            head.mark(core, &rows, scaled)?;
            let share = core.scratch(Kind::F32, &[count, 1])?;
            core.div(scaled, rows.sums.sum, share)?;
            core.mul(rows.sums.terms, share, own)?;
            let hit = core.gather(rows.sums.terms, rows.index)?;
            core.mul(hit, share, hit)?;
            core.sub(hit, scaled, hit)?;
            let hit = core.converted(hit, dlogits.kind)?;
            core.scatter(own, rows.index, hit)?;
            if let Some(ignored) = head.targets.ignored {
                // Its products are with zeros, whatever its logits are.
                core.fill_where(own, ignored.slice(0, rows.first, count), 0.0)?;
            }
            core.scratch.release(mark);
        }
        Ok(())
    }
}
