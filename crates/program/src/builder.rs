//! Traces a forward function into a [`Program`]: each method appends one operation and gives back
//! the views of its results.
//!
//! Results are always fresh buffers or fresh parts of one, so that the list is in single-assignment
//! form and differentiation needs no copies. Read next: `autodiff.rs`.
// t rows (tokens), d width, h heads, g key heads, e head width, v vocabulary

use std::collections::BTreeMap;

use pontoon_ops as ops;
use pontoon_ops::{Accumulate, BufferId, DType, Op, RopeStyle, RouterRule, View};

use crate::error::ProgramError;
use crate::parameters::ParameterTable;
use crate::program::{BufferKind, INTEGERS, Program, SCALES};

type Built<T> = Result<T, ProgramError>;

/// Builds one program over one model's parameters.
pub struct Builder<'a> {
    program: Program,
    table: &'a ParameterTable,
    dtype: DType,
    segment: u32,
}

/// Rotary tables, one row per position.
#[derive(Clone, Copy, Debug)]
pub struct RopeTables {
    /// Cosines.
    pub cos: View,
    /// Sines.
    pub sin: View,
    /// Which elements form a pair.
    pub style: RopeStyle,
}

/// What attention over whole documents reads.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs {
    /// Queries [t, h, e].
    pub q: View,
    /// Keys [t, g, e].
    pub k: View,
    /// Values [t, g, e'].
    pub v: View,
    /// Cumulative document starts.
    pub documents: View,
    /// Factor on the scores.
    pub scale: f32,
}

/// What attention to a paged cache reads.
#[derive(Clone, Copy, Debug)]
pub struct PagedInputs {
    /// Queries [t, h, e].
    pub q: View,
    /// Cached keys.
    pub k_cache: View,
    /// Cached values.
    pub v_cache: View,
    /// Each sequence's blocks.
    pub blocks: View,
    /// Cached positions of each sequence.
    pub lengths: View,
    /// Where each sequence's rows begin.
    pub queries: View,
    /// Factor on the scores.
    pub scale: f32,
}

/// Rows sorted by expert, and how to find them again.
#[derive(Clone, Copy, Debug)]
pub struct Permuted {
    /// The sorted rows.
    pub rows: View,
    /// Where each expert's rows begin.
    pub offsets: View,
    /// Where each copy of each row went.
    pub slots: View,
}

/// What sampling reads.
#[derive(Clone, Copy, Debug)]
pub struct SampleInputs {
    /// Logits [t, v], f32.
    pub logits: View,
    /// Added to the logits.
    pub bias: Option<View>,
    /// Tokens so far.
    pub history: Option<View>,
    /// Numbers per row.
    pub settings: View,
    /// Random keys.
    pub keys: View,
    /// Tokens that exist.
    pub vocabulary: usize,
}

impl<'a> Builder<'a> {
    /// A builder for a program that computes in `dtype`.
    pub fn new(name: impl Into<String>, table: &'a ParameterTable, dtype: DType) -> Self {
        assert!(dtype.is_float(), "a program computes in a float dtype, not {dtype}");
        let mut program = Program {
            name: name.into(),
            buffers: Vec::new(),
            ops: Vec::new(),
            segments: Vec::new(),
            forward_count: 0,
            inputs: BTreeMap::new(),
            outputs: BTreeMap::new(),
        };
        let trainable = [table.trainable_elements()];
        let kind = BufferKind::Persistent;
        program.add_buffer("weights", kind, dtype, &trainable);
        program.add_buffer("gradients", kind, DType::F32, &[table.gradient_elements()]);
        program.add_buffer("frozen", kind, DType::F32, &[table.frozen_elements()]);
        if table.integer_bytes() > 0 {
            program.add_buffer(INTEGERS, kind, DType::I8, &[table.integer_bytes()]);
            program.add_buffer(SCALES, kind, DType::F32, &[table.scale_count()]);
        }
        Builder { program, table, dtype, segment: 0 }
    }

    /// The dtype activations are stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Begins the next segment (layer).
    pub fn next_segment(&mut self) {
        self.segment += 1;
    }

    /// A parameter of the model.
    pub fn parameter(&self, name: &str) -> Built<View> {
        self.table.weight(name, self.dtype)
    }

    /// A buffer that outlives the program under its name and that the owner fills once.
    pub fn persistent(&mut self, name: &str, dtype: DType, shape: &[usize]) -> View {
        let known = self
            .program
            .buffers
            .iter()
            .find(|buffer| buffer.kind == BufferKind::Persistent && buffer.name == name);
        match known {
            Some(buffer) => buffer.view.reshape(shape),
            None => self.program.add_buffer(name, BufferKind::Persistent, dtype, shape),
        }
    }

    /// A tensor the host writes before each run.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[usize]) -> View {
        let view = self.program.add_buffer(name, BufferKind::Input, dtype, shape);
        self.program.inputs.insert(name.to_owned(), view);
        view
    }

    /// Names a result so that the host may read it after each run.
    pub fn output(&mut self, name: &str, view: View) {
        let buffer = &mut self.program.buffers[view.buffer.0 as usize];
        if buffer.kind == BufferKind::Temporary {
            buffer.kind = BufferKind::Output;
        }
        self.program.outputs.insert(name.to_owned(), view);
    }

    /// A fresh temporary, to be filled part by part.
    pub fn temporary(&mut self, dtype: DType, shape: &[usize]) -> View {
        let name = format!("t{}", self.program.buffers.len());
        self.program.add_buffer(name, BufferKind::Temporary, dtype, shape)
    }

    /// Appends an operation as it is.
    pub fn push(&mut self, op: impl Into<Op>) -> Built<()> {
        self.program.push(op, self.segment)
    }

    /// The finished forward program.
    pub fn finish(self) -> Program {
        let mut program = self.program;
        program.forward_count = program.ops.len();
        program
    }

    fn like(&mut self, view: &View) -> View {
        self.temporary(view.dtype, view.dims())
    }

    /// Rows of the table named by ids: [t] -> [t, d].
    pub fn embed(&mut self, ids: View, table: View) -> Built<View> {
        let y = self.temporary(table.dtype, &[ids.dim(0), table.dim(1)]);
        self.push(ops::Embed { ids, table, y })?;
        Ok(y)
    }

    /// Normalised rows.
    pub fn rms_norm(&mut self, x: View, weight: View, eps: f32) -> Built<View> {
        let y = self.like(&x);
        let rstd = self.temporary(DType::F32, &[x.dim(0)]);
        self.push(ops::RmsNorm { x, weight, eps, y, rstd })?;
        Ok(y)
    }

    /// The sum of two streams, and its normalised rows.
    pub fn add_rms_norm(
        &mut self,
        x: View,
        residual: View,
        weight: View,
        eps: f32,
    ) -> Built<(View, View)> {
        let (sum, y) = (self.like(&x), self.like(&x));
        let rstd = self.temporary(DType::F32, &[x.dim(0)]);
        self.push(ops::AddRmsNorm { x, residual, weight, eps, sum, y, rstd })?;
        Ok((sum, y))
    }

    /// `x weight^T + bias` in the compute dtype.
    pub fn linear(&mut self, x: View, weight: View, bias: Option<View>) -> Built<View> {
        let c = self.temporary(x.dtype, &[x.dim(0), weight.dim(0)]);
        self.matmul(x, weight, bias, c)?;
        Ok(c)
    }

    /// `x weight^T` with an f32 result (router and sampling logits).
    pub fn linear_f32(&mut self, x: View, weight: View) -> Built<View> {
        let c = self.temporary(DType::F32, &[x.dim(0), weight.dim(0)]);
        self.matmul(x, weight, None, c)?;
        Ok(c)
    }

    fn matmul(&mut self, a: View, b: View, bias: Option<View>, c: View) -> Built<()> {
        if let Some((scales, block_k)) = self.table.scales_of(&b) {
            let (x, weight) = (a, b);
            return self.push(ops::MatmulQuant { x, weight, scales, block_n: 1, block_k, bias, c });
        }
        let layout = ops::Layout::Nt;
        self.push(ops::Matmul { layout, a, b, bias, c, accumulate: Accumulate::Overwrite })
    }

    /// One product per expert: x [rows, d], weight [experts, n, d] -> [rows, n].
    pub fn grouped_linear(&mut self, x: View, weight: View, offsets: View) -> Built<View> {
        let c = self.temporary(x.dtype, &[x.dim(0), weight.dim(1)]);
        if let Some((scales, block_k)) = self.table.scales_of(&weight) {
            let block_n = 1;
            let op = ops::GroupedMatmulQuant { x, weight, scales, block_n, block_k, offsets, c };
            self.push(op)?;
            return Ok(c);
        }
        let (layout, accumulate) = (ops::Layout::Nt, Accumulate::Overwrite);
        self.push(ops::GroupedMatmul { layout, a: x, b: weight, offsets, c, accumulate })?;
        Ok(c)
    }

    /// Rotated heads in a fresh buffer.
    pub fn rope(&mut self, x: View, positions: View, tables: RopeTables) -> Built<View> {
        let y = self.like(&x);
        self.rope_into(x, positions, tables, y)?;
        Ok(y)
    }

    /// Rotated heads into a part of another buffer.
    pub fn rope_into(
        &mut self,
        x: View,
        positions: View,
        tables: RopeTables,
        y: View,
    ) -> Built<()> {
        let RopeTables { cos, sin, style } = tables;
        let direction = ops::Direction::Forward;
        self.push(ops::Rope { x, positions, cos, sin, style, direction, y })
    }

    /// Moves elements into a part of another buffer.
    pub fn copy_into(&mut self, src: View, dst: View) -> Built<()> {
        self.push(ops::Copy { src, dst })
    }

    /// Attention within documents: [t, h, e'].
    pub fn attention(&mut self, inputs: AttentionInputs) -> Built<View> {
        let AttentionInputs { q, k, v, documents, scale } = inputs;
        let out = self.temporary(q.dtype, &[q.dim(0), q.dim(1), v.dim(2)]);
        let lse = self.temporary(DType::F32, &[q.dim(0), q.dim(1)]);
        self.push(ops::Attention { q, k, v, documents, scale, out, lse })?;
        Ok(out)
    }

    /// Attention to a paged cache: [t, h, e'].
    pub fn paged_attention(&mut self, inputs: PagedInputs) -> Built<View> {
        let PagedInputs { q, k_cache, v_cache, blocks, lengths, queries, scale } = inputs;
        let out = self.temporary(q.dtype, &[q.dim(0), q.dim(1), v_cache.dim(3)]);
        self.push(ops::PagedAttention {
            q,
            k_cache,
            v_cache,
            blocks,
            lengths,
            queries,
            scale,
            out,
        })?;
        Ok(out)
    }

    /// Gated activation.
    pub fn swiglu(&mut self, gate: View, up: View) -> Built<View> {
        let y = self.like(&gate);
        self.push(ops::SwiGlu { gate, up, y })?;
        Ok(y)
    }

    /// The chosen experts' weights and numbers, each [t, chosen].
    pub fn router(
        &mut self,
        logits: View,
        bias: Option<View>,
        rule: RouterRule,
    ) -> Built<(View, View)> {
        let shape = [logits.dim(0), rule.chosen];
        let weights = self.temporary(DType::F32, &shape);
        let experts = self.temporary(DType::I32, &shape);
        self.push(ops::RouterTopK { logits, bias, rule, weights, experts })?;
        Ok((weights, experts))
    }

    /// Rows sorted by expert.
    pub fn permute(&mut self, x: View, experts: View, expert_count: usize) -> Built<Permuted> {
        let chosen = experts.dim(1);
        let rows = self.temporary(x.dtype, &[x.dim(0) * chosen, x.dim(1)]);
        let offsets = self.temporary(DType::I32, &[expert_count + 1]);
        let slots = self.temporary(DType::I32, &[x.dim(0), chosen]);
        self.push(ops::Permute { x, experts, y: rows, offsets, slots })?;
        Ok(Permuted { rows, offsets, slots })
    }

    /// The experts' results joined per row.
    pub fn unpermute(&mut self, x: View, weights: View, slots: View) -> Built<View> {
        let y = self.temporary(x.dtype, &[slots.dim(0), x.dim(1)]);
        self.push(ops::Unpermute { x, weights, slots, y })?;
        Ok(y)
    }

    /// Sum of two tensors.
    pub fn add(&mut self, a: View, b: View) -> Built<View> {
        let y = self.like(&a);
        self.push(ops::Add { a, b, y })?;
        Ok(y)
    }

    /// A tensor times a number.
    pub fn scale(&mut self, x: View, factor: f32) -> Built<View> {
        let y = self.like(&x);
        self.push(ops::Scale { x, factor, y })?;
        Ok(y)
    }

    /// A tensor in another dtype.
    pub fn cast(&mut self, src: View, dtype: DType) -> Built<View> {
        let dst = self.temporary(dtype, src.dims());
        self.push(ops::Cast { src, dst })?;
        Ok(dst)
    }

    /// Each row's loss.
    pub fn cross_entropy(&mut self, x: View, head: View, targets: View) -> Built<View> {
        let loss = self.temporary(DType::F32, &[x.dim(0)]);
        let lse = self.temporary(DType::F32, &[x.dim(0)]);
        self.push(ops::CrossEntropy { x, head, targets, loss, lse })?;
        Ok(loss)
    }

    /// Each row's log-probability and entropy.
    pub fn token_log_prob(
        &mut self,
        x: View,
        head: View,
        targets: View,
        temperature: f32,
    ) -> Built<(View, View)> {
        let logprob = self.temporary(DType::F32, &[x.dim(0)]);
        let entropy = self.temporary(DType::F32, &[x.dim(0)]);
        let (scales, block_k) = match self.table.scales_of(&head) {
            Some((scales, block_k)) => (Some(scales), block_k),
            None => (None, 0),
        };
        self.push(ops::TokenLogProb {
            x,
            head,
            scales,
            block_k,
            targets,
            temperature,
            logprob,
            entropy,
        })?;
        Ok((logprob, entropy))
    }

    /// One drawn token per row and its log-probability.
    pub fn sample(&mut self, inputs: SampleInputs) -> Built<(View, View)> {
        let SampleInputs { logits, bias, history, settings, keys, vocabulary } = inputs;
        let token = self.temporary(DType::I32, &[logits.dim(0)]);
        let logprob = self.temporary(DType::F32, &[logits.dim(0)]);
        self.push(ops::Sample {
            logits,
            bias,
            history,
            settings,
            keys,
            vocabulary,
            token,
            logprob,
        })?;
        Ok((token, logprob))
    }

    /// The buffer a view lies in.
    pub fn kind(&self, buffer: BufferId) -> BufferKind {
        self.program.buffer(buffer).kind
    }
}
