//! The parts that model families share, traced over a builder: norms, linear maps by name, rotary
//! heads, attention, feed-forward layers and experts.
//!
//! Attention is the one part that differs between training and inference, so it is chosen here by
//! [`Attending`] and a family is written once. Read next: `families/mod.rs`.

use pontoon_ops as ops;
use pontoon_ops::{DType, RopeStyle, RouterRule, View};
use pontoon_program::{AttentionInputs, Builder, PagedInputs, RopeTables};

use crate::adapters::{AdapterShapes, stack_names};
use crate::config::{Bias, Family, ModelConfig};
use crate::error::ModelError;

/// The token embedding's name.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";

/// What attention reads beside its rows.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "one value per traced program, passed by copy")]
pub(crate) enum Attending {
    /// Whole documents, packed: their cumulative starts.
    Documents(View),
    /// New rows of cached sequences.
    Cache(CacheInputs),
}

/// The inputs that place rows in a paged cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheInputs {
    pub slots: View,
    pub blocks: View,
    pub lengths: View,
    pub queries: View,
    pub block_count: usize,
    pub block: usize,
}

/// Where the rows of a program stand in their sequences.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'m> {
    pub positions: View,
    pub positions_max: usize,
    pub attending: Attending,
    pub adapting: Option<Adapting<'m>>,
}

/// Which adapter each row goes through: those of each follow one another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adapting<'m> {
    pub shapes: &'m AdapterShapes,
    /// Where each adapter's rows begin, and where the last one's end.
    pub offsets: View,
}

/// Queries, keys and values of one layer, each [rows, heads, width].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qkv {
    pub q: View,
    pub k: View,
    pub v: View,
}

/// The residual stream, with the last layer part's result not yet added: the next norm adds it.
#[derive(Debug)]
pub(crate) struct Residual {
    sum: View,
    pending: Option<View>,
}

impl Residual {
    pub(crate) fn new(sum: View) -> Residual {
        Residual { sum, pending: None }
    }

    pub(crate) fn add(&mut self, part: View) {
        assert!(self.pending.is_none(), "a norm stands between two additions");
        self.pending = Some(part);
    }
}

/// The names of the cosine and sine tables for so many positions.
pub(crate) fn rope_table_names(positions_max: usize) -> [String; 2] {
    ["cos", "sin"].map(|part| format!("rope.{part}.{positions_max}"))
}

/// One forward pass being traced.
pub(crate) struct Forward<'b, 'a> {
    pub config: &'b ModelConfig,
    pub builder: &'b mut Builder<'a>,
    rows: Rows<'b>,
    tables: RopeTables,
}

type Traced = Result<View, ModelError>;

impl<'b, 'a> Forward<'b, 'a> {
    pub(crate) fn new(
        config: &'b ModelConfig,
        builder: &'b mut Builder<'a>,
        rows: Rows<'b>,
    ) -> Forward<'b, 'a> {
        let shape = [rows.positions_max, config.rotary_width() / 2];
        let [cos, sin] = rope_table_names(rows.positions_max);
        let style = match &config.family {
            Family::DeepseekV3(sizes) => crate::families::rope_style(sizes),
            _ => RopeStyle::HalfSplit,
        };
        let tables = RopeTables {
            cos: builder.persistent(&cos, DType::F32, &shape),
            sin: builder.persistent(&sin, DType::F32, &shape),
            style,
        };
        Forward { config, builder, rows, tables }
    }

    /// Adds what is pending to the residual stream and gives its normalised rows.
    pub(crate) fn norm(&mut self, residual: &mut Residual, name: &str) -> Traced {
        let eps = self.config.rms_norm_eps as f32;
        let Some(pending) = residual.pending.take() else {
            return self.norm_with_eps(name, residual.sum, eps);
        };
        let weight = self.builder.parameter(&format!("{name}.weight"))?;
        let (sum, y) = self.builder.add_rms_norm(pending, residual.sum, weight, eps)?;
        residual.sum = sum;
        Ok(y)
    }

    /// Normalised rows.
    pub(crate) fn norm_with_eps(&mut self, name: &str, x: View, eps: f32) -> Traced {
        let weight = self.builder.parameter(&format!("{name}.weight"))?;
        Ok(self.builder.rms_norm(x, weight, eps)?)
    }

    /// Each head normalised by itself.
    pub(crate) fn head_norm(&mut self, name: &str, x: View) -> Traced {
        let (rows, heads, width) = (x.dim(0), x.dim(1), x.dim(2));
        let eps = self.config.rms_norm_eps as f32;
        let y = self.norm_with_eps(name, x.reshape([rows * heads, width]), eps)?;
        Ok(y.reshape([rows, heads, width]))
    }

    /// A linear map by its name on disk, with its bias where it has one.
    pub(crate) fn linear(&mut self, name: &str, x: View) -> Traced {
        let weight = self.builder.parameter(&format!("{name}.weight"))?;
        let bias = match self.bias_of(name) {
            Bias::Absent => None,
            Bias::Present => Some(self.builder.parameter(&format!("{name}.bias"))?),
        };
        let y = self.builder.linear(x, weight, bias)?;
        self.adapt(name, x, y)?;
        Ok(y)
    }

    /// Adds to a map's result what the rows' adapters make of its input.
    fn adapt(&mut self, name: &str, x: View, y: View) -> Result<(), ModelError> {
        let Some(Adapting { shapes, offsets }) = self.rows.adapting else { return Ok(()) };
        let Some(&[out, into]) = shapes.maps.get(name) else { return Ok(()) };
        let (count, rank) = (shapes.count, shapes.rank);
        let [a_name, b_name] = stack_names(name);
        let a = self.builder.persistent(&a_name, x.dtype, &[count, rank, into]);
        let b = self.builder.persistent(&b_name, x.dtype, &[count, out, rank]);
        let inner = self.builder.grouped_linear(x, a, offsets)?;
        let (layout, accumulate) = (ops::Layout::Nt, ops::Accumulate::Add);
        let product = ops::GroupedMatmul { layout, a: inner, b, offsets, c: y, accumulate };
        Ok(self.builder.push(product)?)
    }

    /// As `layout.rs` lists biases: of attention, all but the maps DeepSeek never gives one.
    fn bias_of(&self, name: &str) -> Bias {
        let never = [".q_b_proj", ".kv_b_proj"];
        let latent = matches!(self.config.family, Family::DeepseekV3(_));
        if !name.contains(".self_attn.") {
            return self.config.mlp_bias;
        }
        if never.iter().any(|end| name.ends_with(end)) || latent && name.ends_with(".q_proj") {
            return Bias::Absent;
        }
        self.config.attention_bias
    }

    /// A linear map whose result is split into heads.
    pub(crate) fn heads(&mut self, name: &str, x: View, heads: usize) -> Traced {
        Ok(self.linear(name, x)?.split_last(heads))
    }

    /// Heads rotated by their rows' positions.
    pub(crate) fn rope(&mut self, x: View) -> Traced {
        Ok(self.builder.rope(x, self.rows.positions, self.tables)?)
    }

    /// Heads rotated into a part of another buffer.
    pub(crate) fn rope_into(&mut self, x: View, y: View) -> Result<(), ModelError> {
        Ok(self.builder.rope_into(x, self.rows.positions, self.tables, y)?)
    }

    /// Attention, its heads joined: [rows, heads * value width].
    pub(crate) fn attend(&mut self, layer: usize, qkv: Qkv) -> Traced {
        let Qkv { q, k, v } = qkv;
        let scale = self.config.softmax_scale() as f32;
        let out = match self.rows.attending {
            Attending::Documents(documents) => {
                self.builder.attention(AttentionInputs { q, k, v, documents, scale })?
            }
            Attending::Cache(cache) => {
                let [k_cache, v_cache] = self.caches(layer, &cache, &k, &v);
                let CacheInputs { slots, blocks, lengths, queries, .. } = cache;
                self.builder.push(ops::KvWrite { k, v, slots, k_cache, v_cache })?;
                let inputs = PagedInputs { q, k_cache, v_cache, blocks, lengths, queries, scale };
                self.builder.paged_attention(inputs)?
            }
        };
        Ok(out.reshape([out.dim(0), out.dim(1) * out.dim(2)]))
    }

    /// A layer's caches; programs of one cache size share them by name.
    fn caches(&mut self, layer: usize, cache: &CacheInputs, k: &View, v: &View) -> [View; 2] {
        let (count, block) = (cache.block_count, cache.block);
        [("keys", k), ("values", v)].map(|(what, view)| {
            let name = format!("cache.{what}.{layer}.{count}x{block}");
            let shape = [count, block, view.dim(1), view.dim(2)];
            self.builder.persistent(&name, view.dtype, &shape)
        })
    }

    /// A gated feed-forward layer.
    pub(crate) fn mlp(&mut self, stem: &str, x: View) -> Traced {
        let gate = self.linear(&format!("{stem}.gate_proj"), x)?;
        let up = self.linear(&format!("{stem}.up_proj"), x)?;
        let inner = self.builder.swiglu(gate, up)?;
        self.linear(&format!("{stem}.down_proj"), inner)
    }

    /// Routed experts: each row goes through those its router chooses.
    pub(crate) fn experts(
        &mut self,
        stem: &str,
        x: View,
        rule: RouterRule,
        bias: Option<View>,
    ) -> Traced {
        let router = self.builder.parameter(&format!("{stem}.gate.weight"))?;
        let weight = |name: &str| format!("{stem}.experts.{{}}.{name}.weight");
        let gate_weight = self.builder.parameter(&weight("gate_proj"))?;
        let up_weight = self.builder.parameter(&weight("up_proj"))?;
        let down_weight = self.builder.parameter(&weight("down_proj"))?;
        let logits = self.builder.linear_f32(x, router)?;
        let (weights, experts) = self.builder.router(logits, bias, rule)?;
        let sorted = self.builder.permute(x, experts, router.dim(0))?;
        let gate = self.builder.grouped_linear(sorted.rows, gate_weight, sorted.offsets)?;
        let up = self.builder.grouped_linear(sorted.rows, up_weight, sorted.offsets)?;
        let inner = self.builder.swiglu(gate, up)?;
        let down = self.builder.grouped_linear(inner, down_weight, sorted.offsets)?;
        Ok(self.builder.unpermute(down, weights, sorted.slots)?)
    }
}
