//! Losses and log-probabilities fused with the output head: logits exist for a chunk of rows at a
//! time.

use pontoon_ops::{self as ops, Accumulate, DType, DeviceError, Extents, Layout, View};

use super::linear::{Matrix, Product, Quant};
use crate::core::{Core, Done, blocks, row_stride};
use crate::ffi::session::Args;
use crate::modules::{Source, Unit};

/// Logits held at a time: 256 MB.
const CHUNK_LOGITS: usize = 64 << 20;
/// Rows of a chunk; a multiple of the products' tiles.
const CHUNK_ROWS: [usize; 2] = [128, 8192];
/// Threads that sum a row; fixed, because it fixes the order.
pub const ROW_THREADS: usize = 512;
/// Rows of logits begin at multiples of so many elements, as fast loads want it.
const ROW_MULTIPLE: usize = 8;

/// Rows per chunk: a function of the vocabulary alone, because it fixes the order of sums.
fn chunk_rows(vocabulary: usize) -> usize {
    let rows = CHUNK_LOGITS / vocabulary.max(1) / CHUNK_ROWS[0] * CHUNK_ROWS[0];
    rows.clamp(CHUNK_ROWS[0], CHUNK_ROWS[1])
}

/// What all four operations read.
struct Head<'a> {
    x: &'a View,
    head: &'a View,
    quant: Option<Quant>,
    targets: &'a View,
    temperature: f32,
}

/// Where a row's numbers go; 0 for nowhere.
#[derive(Clone, Copy)]
struct Results {
    first: usize,
    second: usize,
    lse: usize,
    /// Whether `first` is a log-probability and `second` an entropy.
    log_probs: bool,
}

/// Where gradients go.
struct Gradients<'a> {
    upstream: usize,
    sign: f32,
    dx: &'a View,
    dhead: &'a View,
    accumulate: Accumulate,
}

/// Rows of a chunk, and where its logits lie.
#[derive(Clone, Copy)]
struct Chunk {
    start: usize,
    rows: usize,
    logits: usize,
    stride: usize,
}

impl Head<'_> {
    fn extents(&self) -> (usize, usize, usize) {
        (self.x.dim(0), self.head.dim(0), self.x.dim(1))
    }

    fn x_from(&self, core: &Core, row: usize) -> Result<Matrix, DeviceError> {
        let x = Matrix::of(core, self.x)?;
        Ok(Matrix { at: x.at + self.x.dtype.bytes(row * x.stride), ..x })
    }

    fn logits(&self, core: &mut Core, chunk: Chunk) -> Done {
        let (_, vocabulary, width) = self.extents();
        let product = Product {
            layout: Layout::Nt,
            dtype: self.x.dtype,
            a: self.x_from(core, chunk.start)?,
            b: Matrix { at: core.at(self.head)?, stride: width },
            c: Matrix { at: chunk.logits, stride: chunk.stride },
            out: DType::F32,
            bias: 0,
            extents: Extents { m: chunk.rows, n: vocabulary, k: width },
            accumulate: Accumulate::Overwrite,
            groups: None,
            quant: self.quant,
        };
        product.run(core)
    }

    fn row_args(&self, core: &Core, chunk: Chunk) -> Result<Args, DeviceError> {
        let targets = core.at(self.targets)? + 4 * chunk.start;
        let args = Args::new().at(chunk.logits).int(chunk.stride).int(self.head.dim(0));
        Ok(args.at(targets).float(1.0 / self.temperature))
    }

    fn results(&self, core: &mut Core, chunk: Chunk, results: Results) -> Done {
        let from = |at: usize| if at == 0 { 0 } else { at + 4 * chunk.start };
        let args = self.row_args(core, chunk)?.at(from(results.first)).at(from(results.second));
        let args = args.at(from(results.lse)).flag(results.log_probs);
        let unit = Unit::new(Source::Loss, self.x.dtype);
        core.run(&unit, c"row_losses", blocks(chunk.rows, ROW_THREADS), args)
    }

    fn run(&self, core: &mut Core, results: Results, gradients: Option<&Gradients<'_>>) -> Done {
        let (rows, vocabulary, _) = self.extents();
        let most = chunk_rows(vocabulary).min(rows);
        let stride = vocabulary.next_multiple_of(ROW_MULTIPLE);
        let logits = core.room(DType::F32, most * stride)?;
        let mut dlogits = 0;
        if gradients.is_some() {
            dlogits = core.room(self.x.dtype, most * stride)?;
        }
        for start in (0..rows).step_by(most.max(1)) {
            let chunk = Chunk { start, rows: most.min(rows - start), logits, stride };
            self.logits(core, chunk)?;
            self.results(core, chunk, results)?;
            if let Some(to) = gradients {
                self.gradients(core, chunk, (results.lse, dlogits), to)?;
            }
        }
        Ok(())
    }

    fn gradients(
        &self,
        core: &mut Core,
        chunk: Chunk,
        (lse, dlogits): (usize, usize),
        to: &Gradients<'_>,
    ) -> Done {
        let (_, vocabulary, width) = self.extents();
        let from = 4 * chunk.start;
        let args = self.row_args(core, chunk)?.at(lse + from).at(to.upstream + from);
        let args = args.float(to.sign).at(dlogits);
        let unit = Unit::new(Source::Loss, self.x.dtype);
        core.run(&unit, c"logit_gradients", blocks(chunk.rows, ROW_THREADS), args)?;
        let dx = Matrix::of(core, to.dx)?;
        let dlogits = Matrix { at: dlogits, stride: chunk.stride };
        let input = Product {
            layout: Layout::Nn,
            dtype: self.x.dtype,
            a: dlogits,
            b: Matrix { at: core.at(self.head)?, stride: width },
            c: Matrix { at: dx.at + self.x.dtype.bytes(chunk.start * dx.stride), ..dx },
            out: self.x.dtype,
            bias: 0,
            extents: Extents { m: chunk.rows, n: width, k: vocabulary },
            accumulate: Accumulate::Overwrite,
            groups: None,
            quant: None,
        };
        input.run(core)?;
        let adds = chunk.start > 0 || to.accumulate == Accumulate::Add;
        let weight = Product {
            layout: Layout::Tn,
            b: self.x_from(core, chunk.start)?,
            c: Matrix { at: core.at(to.dhead)?, stride: row_stride(to.dhead) },
            out: DType::F32,
            extents: Extents { m: vocabulary, n: width, k: chunk.rows },
            accumulate: if adds { Accumulate::Add } else { Accumulate::Overwrite },
            ..input
        };
        weight.run(core)
    }
}

pub fn cross_entropy(core: &mut Core, op: &ops::CrossEntropy) -> Done {
    let ops::CrossEntropy { x, head, targets, loss, lse } = op;
    let head = Head { x, head, quant: None, targets, temperature: 1.0 };
    let (first, lse) = (core.at(loss)?, core.at(lse)?);
    head.run(core, Results { first, second: 0, lse, log_probs: false }, None)
}

pub fn token_log_prob(core: &mut Core, op: &ops::TokenLogProb) -> Done {
    let (x, targets, temperature) = (&op.x, &op.targets, op.temperature);
    let quant = match &op.scales {
        None => None,
        Some(scales) => Some(Quant {
            dtype: op.head.dtype,
            scales: core.at(scales)?,
            block: [1, op.block_k],
            stride: row_stride(scales),
            group: 0,
        }),
    };
    let head = Head { x, head: &op.head, quant, targets, temperature };
    let (first, second) = (core.at(&op.logprob)?, core.at(&op.entropy)?);
    head.run(core, Results { first, second, lse: 0, log_probs: true }, None)
}

pub fn cross_entropy_bwd(core: &mut Core, op: &ops::CrossEntropyBwd) -> Done {
    let ops::CrossEntropyBwd { x, head, targets, dloss, loss, lse, dx, dhead, accumulate } = op;
    let head = Head { x, head, quant: None, targets, temperature: 1.0 };
    let (first, lse) = (core.at(loss)?, core.at(lse)?);
    let (upstream, accumulate) = (core.at(dloss)?, *accumulate);
    let gradients = Gradients { upstream, sign: 1.0, dx, dhead, accumulate };
    head.run(core, Results { first, second: 0, lse, log_probs: false }, Some(&gradients))
}

pub fn token_log_prob_bwd(core: &mut Core, op: &ops::TokenLogProbBwd) -> Done {
    let ops::TokenLogProbBwd { x, head, targets, temperature, dlogprob, dx, dhead, accumulate } =
        op;
    let (upstream, accumulate) = (core.at(dlogprob)?, *accumulate);
    let lse = core.room(DType::F32, x.dim(0))?;
    let head = Head { x, head, quant: None, targets, temperature: *temperature };
    let gradients = Gradients { upstream, sign: -1.0, dx, dhead, accumulate };
    head.run(core, Results { first: 0, second: 0, lse, log_probs: true }, Some(&gradients))
}
