//! The tensors a configuration implies: names as on disk, shapes, and what each is.
//!
//! From this list a folder is checked before anything is allocated, parameters are counted and
//! work is forecast. Reads no file. Read next: `weights.rs`.

use crate::config::{Bias, Deepseek, Family, Head, LayerKind, ModelConfig};

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// The name on disk.
    pub name: String,
    /// The extents on disk: `[out, in]` for a linear map.
    pub shape: Vec<usize>,
    /// What it is, for counting work.
    pub role: Role,
}

/// What a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The token embedding: rows are looked up, not multiplied.
    Embedding,
    /// The output head.
    Head,
    /// A matrix every token is multiplied with.
    Matrix,
    /// A matrix only the tokens routed to it are multiplied with.
    Expert,
    /// A norm's weight or a bias.
    Vector,
    /// Used but not trained by gradient.
    Frozen,
}

impl ModelConfig {
    /// Every tensor of the main model, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut list = List { config: self, specs: Vec::new() };
        let table = [self.vocab_size, self.width];
        list.push("model.embed_tokens.weight".into(), &table, Role::Embedding);
        for layer in 0..self.layer_count {
            list.layer(layer);
        }
        list.push("model.norm.weight".into(), &[self.width], Role::Vector);
        if self.head == Head::Own {
            list.push("lm_head.weight".into(), &table, Role::Head);
        }
        list.specs
    }

    /// The tensors of the first layer after the last, which predicts the token after the next;
    /// none if the model has no such layer.
    pub fn extra_tensors(&self) -> Vec<TensorSpec> {
        let mut list = List { config: self, specs: Vec::new() };
        if self.extra_layer_count() == 0 {
            return list.specs;
        }
        let stem = format!("model.layers.{}", self.layer_count);
        let table = [self.vocab_size, self.width];
        list.push(format!("{stem}.embed_tokens.weight"), &table, Role::Embedding);
        for norm in ["enorm", "hnorm"] {
            list.push(format!("{stem}.{norm}.weight"), &[self.width], Role::Vector);
        }
        list.linear(format!("{stem}.eh_proj"), [self.width, 2 * self.width], self.mlp_bias);
        list.layer(self.layer_count);
        list.push(format!("{stem}.shared_head.norm.weight"), &[self.width], Role::Vector);
        list.push(format!("{stem}.shared_head.head.weight"), &table, Role::Head);
        list.specs
    }

    /// All parameters of the main model; a tied head counts once, extra layers do not count.
    pub fn parameter_count(&self) -> u64 {
        self.tensors().iter().map(TensorSpec::elements).sum()
    }

    /// Floating point operations of one token's forward pass, averaged over a sequence of `tokens`.
    ///
    /// 2 for every weight the token is multiplied with (of routed experts, only those it is sent
    /// to; the embedding's look-up is free; the head counts whether tied or not), plus attention:
    /// in each layer 2 × heads × (key width + value width) × (tokens + 1) / 2, as a token
    /// attends to itself and those before it. A training step is three times this, without
    /// recomputation.
    pub fn forward_flops_per_token(&self, tokens: usize) -> f64 {
        let (chosen, all) = match &self.family {
            Family::Llama | Family::Qwen3 => (1, 1),
            Family::Qwen3Moe(e) => (e.expert_count_per_token, e.expert_count),
            Family::DeepseekV3(d) => (d.expert_count_per_token, d.expert_count),
        };
        let head_tied = (self.vocab_size * self.width) as f64;
        let used = |spec: &TensorSpec| match (spec.role, self.head) {
            (Role::Matrix | Role::Head, _) => spec.elements() as f64,
            (Role::Expert, _) => spec.elements() as f64 * chosen as f64 / all as f64,
            (Role::Embedding, Head::Tied) => head_tied,
            (Role::Embedding | Role::Vector | Role::Frozen, _) => 0.0,
        };
        let weights: f64 = self.tensors().iter().map(used).sum();
        let widths = (self.head_count * (self.key_width() + self.value_width())) as f64;
        let attended = (tokens as f64 + 1.0) / 2.0;
        2.0 * weights + 2.0 * self.layer_count as f64 * widths * attended
    }
}

impl TensorSpec {
    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&extent| extent as u64).product()
    }
}

struct List<'a> {
    config: &'a ModelConfig,
    specs: Vec<TensorSpec>,
}

impl List<'_> {
    fn push(&mut self, name: String, shape: &[usize], role: Role) {
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), role });
    }

    /// A linear map `[out, in]`, with its bias where there is one.
    fn linear(&mut self, stem: String, shape: [usize; 2], bias: Bias) {
        self.push(format!("{stem}.weight"), &shape, Role::Matrix);
        if bias == Bias::Present {
            self.push(format!("{stem}.bias"), &shape[..1], Role::Vector);
        }
    }

    fn layer(&mut self, layer: usize) {
        let stem = format!("model.layers.{layer}");
        let config = self.config;
        self.push(format!("{stem}.input_layernorm.weight"), &[config.width], Role::Vector);
        match &config.family {
            Family::DeepseekV3(deepseek) => self.latent_attention(&stem, deepseek),
            _ => self.attention(&stem),
        }
        self.push(format!("{stem}.post_attention_layernorm.weight"), &[config.width], Role::Vector);
        match (config.layer_kind(layer), &config.family) {
            (LayerKind::Sparse, Family::Qwen3Moe(experts)) => {
                self.experts(&stem, experts.expert_count, experts.expert_width);
            }
            (LayerKind::Sparse, Family::DeepseekV3(deepseek)) => {
                self.experts(&stem, deepseek.expert_count, deepseek.expert_width);
                let bias = format!("{stem}.mlp.gate.e_score_correction_bias");
                self.push(bias, &[deepseek.expert_count], Role::Frozen);
                let width = deepseek.expert_width * deepseek.shared_expert_count;
                self.mlp(format!("{stem}.mlp.shared_experts"), width);
            }
            _ => self.mlp(format!("{stem}.mlp"), config.mlp_width),
        }
    }

    fn attention(&mut self, stem: &str) {
        let config = self.config;
        let (width, head) = (config.width, config.head_width);
        let (queries, keys) = (config.head_count * head, config.key_value_head_count * head);
        let shapes = [
            ("q_proj", [queries, width]),
            ("k_proj", [keys, width]),
            ("v_proj", [keys, width]),
            ("o_proj", [width, queries]),
        ];
        for (name, shape) in shapes {
            self.linear(format!("{stem}.self_attn.{name}"), shape, config.attention_bias);
        }
        if !matches!(config.family, Family::Llama) {
            for name in ["q_norm", "k_norm"] {
                self.push(format!("{stem}.self_attn.{name}.weight"), &[head], Role::Vector);
            }
        }
    }

    fn latent_attention(&mut self, stem: &str, deepseek: &Deepseek) {
        let config = self.config;
        let (width, heads) = (config.width, config.head_count);
        let (bias, stem) = (config.attention_bias, format!("{stem}.self_attn"));
        let queries = heads * config.key_width();
        match deepseek.query_rank {
            Some(rank) => {
                self.linear(format!("{stem}.q_a_proj"), [rank, width], bias);
                self.push(format!("{stem}.q_a_layernorm.weight"), &[rank], Role::Vector);
                self.linear(format!("{stem}.q_b_proj"), [queries, rank], Bias::Absent);
            }
            None => self.linear(format!("{stem}.q_proj"), [queries, width], Bias::Absent),
        }
        let rank = deepseek.key_value_rank;
        let compressed = [rank + deepseek.rotary_width, width];
        self.linear(format!("{stem}.kv_a_proj_with_mqa"), compressed, bias);
        self.push(format!("{stem}.kv_a_layernorm.weight"), &[rank], Role::Vector);
        let expanded = [heads * (deepseek.plain_width + deepseek.value_width), rank];
        self.linear(format!("{stem}.kv_b_proj"), expanded, Bias::Absent);
        self.linear(format!("{stem}.o_proj"), [width, heads * deepseek.value_width], bias);
    }

    fn mlp(&mut self, stem: String, inner: usize) {
        let (width, bias) = (self.config.width, self.config.mlp_bias);
        for name in ["gate_proj", "up_proj"] {
            self.linear(format!("{stem}.{name}"), [inner, width], bias);
        }
        self.linear(format!("{stem}.down_proj"), [width, inner], bias);
    }

    fn experts(&mut self, stem: &str, count: usize, inner: usize) {
        let width = self.config.width;
        self.push(format!("{stem}.mlp.gate.weight"), &[count, width], Role::Matrix);
        for expert in 0..count {
            for name in ["gate_proj", "up_proj"] {
                let name = format!("{stem}.mlp.experts.{expert}.{name}.weight");
                self.push(name, &[inner, width], Role::Expert);
            }
            let name = format!("{stem}.mlp.experts.{expert}.down_proj.weight");
            self.push(name, &[width, inner], Role::Expert);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::golden;
    use crate::weights::Weights;

    #[test]
    fn the_tensors_implied_are_those_transformers_wrote() {
        for case in golden::CASES {
            let config = ModelConfig::from_folder(&golden::folder(case)).unwrap();
            let weights = Weights::open(&golden::folder(case)).unwrap();
            let want: BTreeSet<_> = config.tensors().into_iter().map(|spec| spec.name).collect();
            let extra = format!("model.layers.{}.", config.layer_count);
            let got: BTreeSet<_> = weights
                .names()
                .filter(|name| !name.starts_with(&extra) && !name.ends_with("_scale_inv"))
                .map(str::to_owned)
                .collect();
            assert_eq!(want, got, "{case}");
            for spec in config.tensors() {
                assert_eq!(weights.tensor(&spec.name).unwrap().shape, spec.shape, "{}", spec.name);
            }
        }
    }

    #[test]
    fn flops_follow_the_formula() {
        let config = crate::presets::preset("llama-30m").unwrap();
        let layer = 4 * 512 * 512 + 3 * 512 * 1376;
        let weights = 8 * layer + 8192 * 512;
        let attention = 2.0 * 8.0 * (8.0 * 128.0) * (257.0 / 2.0);
        assert_eq!(config.forward_flops_per_token(256), 2.0 * weights as f64 + attention);
    }
}
