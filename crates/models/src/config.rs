//! A model's configuration: config.json of Hugging Face, read, checked and written back.
//!
//! Reads both transformers 4's keys (`rope_theta` + `rope_scaling`, `torch_dtype`) and 5's
//! (`rope_parameters`, `dtype`); keys it does not know are kept and written back unchanged.
//! Holds no weights and builds no program. Read next: `layout.rs` for the tensors it implies.

use std::path::Path;

use pontoon_ops::DType;
use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::keys::Keys;
use crate::rope::Rope;

/// The model types that are implemented, as config.json spells them.
pub const MODEL_TYPES: [&str; 4] = ["llama", "qwen3", "qwen3_moe", "deepseek_v3"];

/// Everything a forward function needs to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture, with what only it has.
    pub family: Family,
    /// Rows of the embedding; may exceed the tokenizer's ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Inner width of the dense feed-forward layers.
    pub mlp_width: usize,
    /// Decoder layers, without multi-token-prediction layers.
    pub layer_count: usize,
    /// Query heads.
    pub head_count: usize,
    /// Key and value heads; divides `head_count`.
    pub key_value_head_count: usize,
    /// Width of a query, key and value head; for DeepSeek see [`Deepseek`] instead.
    pub head_width: usize,
    /// The longest sequence.
    pub max_positions: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Rotary positions.
    pub rope: Rope,
    /// Whether the output head is the embedding.
    pub head: Head,
    /// Biases on q, k, v and o (for DeepSeek: q_a, kv_a and o).
    pub attention_bias: Bias,
    /// Biases in the dense feed-forward layers.
    pub mlp_bias: Bias,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// The element type of the weights on disk, where stated.
    pub dtype: DType,
    /// The token that starts a text.
    pub bos: Option<u32>,
    /// The tokens that end one.
    pub eos: Vec<u32>,
    raw: Map<String, Value>,
}

/// The architecture.
#[derive(Clone, Debug, PartialEq)]
pub enum Family {
    /// Llama 2 and 3, and the many models in their format.
    Llama,
    /// Qwen3 dense: norms on each query and key head.
    Qwen3,
    /// Qwen3 with experts.
    Qwen3Moe(Qwen3Experts),
    /// DeepSeek-V3 and R1.
    DeepseekV3(Box<Deepseek>),
}

/// What Qwen3-MoE adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Qwen3Experts {
    /// Experts in a sparse layer.
    pub expert_count: usize,
    /// Experts a token is sent to.
    pub expert_count_per_token: usize,
    /// Inner width of an expert.
    pub expert_width: usize,
    /// Whether the chosen weights are divided by their sum.
    pub router_weights: RouterWeights,
    /// Layers that are dense although `sparse_step` would make them sparse.
    pub dense_layers: Vec<usize>,
    /// Every how many layers one is sparse.
    pub sparse_step: usize,
}

/// What DeepSeek-V3 adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Deepseek {
    /// Width of the compressed query; `None` projects queries directly.
    pub query_rank: Option<usize>,
    /// Width of the compressed keys and values.
    pub key_value_rank: usize,
    /// Rotated dimensions of a query and key head.
    pub rotary_width: usize,
    /// Dimensions of a query and key head that are not rotated.
    pub plain_width: usize,
    /// Width of a value head.
    pub value_width: usize,
    /// Routed experts.
    pub expert_count: usize,
    /// Routed experts a token is sent to.
    pub expert_count_per_token: usize,
    /// Inner width of a routed expert; a shared one's is a multiple.
    pub expert_width: usize,
    /// Experts every token is sent to.
    pub shared_expert_count: usize,
    /// Groups the routed experts fall into.
    pub group_count: usize,
    /// Groups a token may choose experts from.
    pub group_count_per_token: usize,
    /// Factor on the chosen weights.
    pub router_scale: f64,
    /// Whether the chosen weights are divided by their sum.
    pub router_weights: RouterWeights,
    /// Leading layers without experts.
    pub dense_layer_count: usize,
    /// Multi-token-prediction layers on disk after the model's; not used in the main model.
    pub extra_layer_count: usize,
    /// How rotated dimensions are paired.
    pub rotary_pairs: RotaryPairs,
}

/// The output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The embedding, used again.
    Tied,
    /// A matrix of its own, `lm_head.weight`.
    Own,
}

/// Whether linear maps have biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// They have not.
    Absent,
    /// They have.
    Present,
}

/// Whether the weights of the chosen experts are made to sum to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterWeights {
    /// Divided by their sum.
    Normalised,
    /// Used as the router gives them.
    AsScored,
}

/// Which dimensions are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryPairs {
    /// Neighbours: (0, 1), (2, 3), ...
    Interleaved,
    /// Across the halves: (0, n/2), (1, n/2 + 1), ...
    HalfSplit,
}

/// The kind of feed-forward layer at one depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// One SwiGLU layer.
    Dense,
    /// A router and experts.
    Sparse,
}

impl ModelConfig {
    /// Reads `folder/config.json`.
    pub fn from_folder(folder: &Path) -> Result<ModelConfig, ModelError> {
        ModelConfig::from_file(&folder.join("config.json"))
    }

    /// Reads one file in config.json's format.
    pub fn from_file(path: &Path) -> Result<ModelConfig, ModelError> {
        let text = std::fs::read_to_string(path).map_err(ModelError::io("read", path))?;
        let wrong =
            |reason| ModelError::Format { path: path.to_owned(), format: "a JSON object", reason };
        match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => ModelConfig::from_json(map),
            Ok(_) => Err(wrong("it is JSON of another kind".to_owned())),
            Err(error) => Err(wrong(error.to_string())),
        }
    }

    /// Checks and reads the content of a config.json.
    pub fn from_json(raw: Map<String, Value>) -> Result<ModelConfig, ModelError> {
        let keys = Keys::new(&raw);
        let model_type = keys.text("model_type")?.ok_or_else(|| {
            keys.wrong("model_type", format!("one of {}", MODEL_TYPES.join(", ")))
        })?;
        let width = keys.size_needed("hidden_size")?;
        let head_count = keys.size_needed("num_attention_heads")?;
        let layer_count = keys.size_needed("num_hidden_layers")?;
        let family = match model_type {
            "llama" => Family::Llama,
            "qwen3" => Family::Qwen3,
            "qwen3_moe" => Family::Qwen3Moe(Qwen3Experts::from_keys(&keys, layer_count)?),
            "deepseek_v3" => Family::DeepseekV3(Box::new(Deepseek::from_keys(&keys)?)),
            _ => {
                let (got, known) = (model_type.to_owned(), MODEL_TYPES.join(", "));
                return Err(ModelError::UnknownModelType { got, known });
            }
        };
        let (theta_default, eps_default) = match family {
            Family::Qwen3 | Family::Qwen3Moe(_) => (1_000_000.0, 1e-6),
            Family::Llama | Family::DeepseekV3(_) => (10_000.0, 1e-6),
        };
        let config = ModelConfig {
            vocab_size: keys.size_needed("vocab_size")?,
            width,
            mlp_width: keys.size_needed("intermediate_size")?,
            layer_count,
            head_count,
            key_value_head_count: keys.size_or("num_key_value_heads", head_count)?,
            head_width: head_width(&keys, &family, width, head_count)?,
            max_positions: keys.size_or("max_position_embeddings", 2048)?,
            rms_norm_eps: keys.float_or("rms_norm_eps", eps_default)?,
            rope: Rope::from_keys(&keys, theta_default)?,
            head: if keys.flag_or("tie_word_embeddings", false)? { Head::Tied } else { Head::Own },
            attention_bias: bias(&keys, "attention_bias")?,
            mlp_bias: bias(&keys, "mlp_bias")?,
            initializer_range: keys.float_or("initializer_range", 0.02)?,
            dtype: dtype(&keys)?,
            bos: keys.ids("bos_token_id")?.first().copied(),
            eos: keys.ids("eos_token_id")?,
            family,
            raw: Map::new(),
        };
        config.check(&keys)?;
        Ok(ModelConfig { raw, ..config })
    }

    /// Rules between keys, and values that are read but not implemented.
    fn check(&self, keys: &Keys<'_>) -> Result<(), ModelError> {
        if !self.head_count.is_multiple_of(self.key_value_head_count) {
            let want = format!("a divisor of num_attention_heads ({})", self.head_count);
            return Err(keys.wrong("num_key_value_heads", want));
        }
        if !self.rotary_width().is_multiple_of(2) {
            let key = match self.family {
                Family::DeepseekV3(_) => "qk_rope_head_dim",
                _ => "head_dim",
            };
            return Err(keys.wrong(key, "even, as dimensions rotate in pairs"));
        }
        if self.rms_norm_eps <= 0.0 {
            return Err(keys.wrong("rms_norm_eps", "a number above 0"));
        }
        if keys.text("hidden_act")?.unwrap_or("silu") != "silu" {
            return Err(keys.wrong("hidden_act", "silu (no other is implemented)"));
        }
        if keys.flag_or("use_sliding_window", false)? {
            return Err(keys.wrong("use_sliding_window", "false (windows are not implemented)"));
        }
        if let Some(id) = self.bos.iter().chain(&self.eos).find(|&&i| i as usize >= self.vocab_size)
        {
            let key = if self.bos == Some(*id) { "bos_token_id" } else { "eos_token_id" };
            return Err(keys.wrong(key, format!("below vocab_size ({})", self.vocab_size)));
        }
        match &self.family {
            Family::DeepseekV3(deepseek) => deepseek.check(keys, self),
            Family::Qwen3Moe(experts) if experts.expert_count_per_token > experts.expert_count => {
                let want = format!("at most num_experts ({})", experts.expert_count);
                Err(keys.wrong("num_experts_per_tok", want))
            }
            _ => Ok(()),
        }
    }

    /// `model_type` as config.json spells it.
    pub fn model_type(&self) -> &'static str {
        match self.family {
            Family::Llama => "llama",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe(_) => "qwen3_moe",
            Family::DeepseekV3(_) => "deepseek_v3",
        }
    }

    /// Dimensions of each head that are rotated.
    pub fn rotary_width(&self) -> usize {
        match &self.family {
            Family::DeepseekV3(deepseek) => deepseek.rotary_width,
            _ => self.head_width,
        }
    }

    /// Width of a query or key head.
    pub fn key_width(&self) -> usize {
        match &self.family {
            Family::DeepseekV3(deepseek) => deepseek.rotary_width + deepseek.plain_width,
            _ => self.head_width,
        }
    }

    /// Width of a value head.
    pub fn value_width(&self) -> usize {
        match &self.family {
            Family::DeepseekV3(deepseek) => deepseek.value_width,
            _ => self.head_width,
        }
    }

    /// The factor on attention scores before the softmax.
    pub fn softmax_scale(&self) -> f64 {
        let plain = (self.key_width() as f64).powf(-0.5);
        match self.family {
            Family::DeepseekV3(_) => plain * self.rope.softmax_factor(),
            _ => plain,
        }
    }

    /// Layers after the last that predict further tokens.
    pub fn extra_layer_count(&self) -> usize {
        match &self.family {
            Family::DeepseekV3(deepseek) => deepseek.extra_layer_count,
            _ => 0,
        }
    }

    /// Whether the layer at this depth has experts.
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        let extra = self.extra_layer_count();
        assert!(layer < self.layer_count + extra, "layer {layer} of {}", self.layer_count);
        let sparse = match &self.family {
            Family::Llama | Family::Qwen3 => false,
            Family::Qwen3Moe(experts) => {
                let due = (layer + 1).is_multiple_of(experts.sparse_step);
                due && !experts.dense_layers.contains(&layer)
            }
            Family::DeepseekV3(deepseek) => layer >= deepseek.dense_layer_count,
        };
        if sparse { LayerKind::Sparse } else { LayerKind::Dense }
    }

    /// Routed experts a token goes to; 0 where there are none.
    pub fn experts_per_token(&self) -> usize {
        match &self.family {
            Family::Llama | Family::Qwen3 => 0,
            Family::Qwen3Moe(experts) => experts.expert_count_per_token,
            Family::DeepseekV3(deepseek) => deepseek.expert_count_per_token,
        }
    }

    /// The same model with another vocabulary, as for a tokenizer of one's own.
    ///
    /// Ids that end or start a text are dropped where they no longer exist.
    pub fn with_vocab_size(mut self, vocab_size: usize) -> ModelConfig {
        assert!(vocab_size > 0, "a vocabulary has at least one token");
        self.vocab_size = vocab_size;
        self.bos = self.bos.filter(|&id| (id as usize) < vocab_size);
        self.eos.retain(|&id| (id as usize) < vocab_size);
        self
    }

    /// The content of a config.json that transformers loads as this model.
    ///
    /// What was read comes back as it stood; only keys whose value has changed are replaced.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = self.raw.clone();
        let id_list = match self.eos.as_slice() {
            [] => Value::Null,
            [one] => (*one).into(),
            many => many.into(),
        };
        let dtype_name = match self.dtype {
            DType::Bf16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        let before = ModelConfig::from_json(self.raw.clone()).ok();
        let before = before.as_ref();
        let mut set = |key: &str, kept: Option<bool>, value: Value| {
            if kept != Some(true) {
                map.insert(key.to_owned(), value);
            }
        };
        let rope_kept = before.map(|b| b.rope == self.rope);
        let dtype_key = if self.raw.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        set("vocab_size", before.map(|b| b.vocab_size == self.vocab_size), self.vocab_size.into());
        let positions_kept = before.map(|b| b.max_positions == self.max_positions);
        set("max_position_embeddings", positions_kept, self.max_positions.into());
        set("bos_token_id", before.map(|b| b.bos == self.bos), self.bos.into());
        set("eos_token_id", before.map(|b| b.eos == self.eos), id_list);
        set(dtype_key, before.map(|b| b.dtype == self.dtype), dtype_name.into());
        set("rope_parameters", rope_kept, self.rope.to_json());
        if rope_kept != Some(true) {
            map.remove("rope_theta");
            map.remove("rope_scaling");
        }
        map
    }

    /// The same model as its weights stand after reading: not quantised, in this element type.
    pub fn unquantised(mut self, dtype: DType) -> ModelConfig {
        self.raw.shift_remove("quantization_config");
        self.dtype = dtype;
        self
    }

    /// The `quantization_config` object, where the folder has one.
    pub fn quantization(&self) -> Option<&Map<String, Value>> {
        self.raw.get("quantization_config").and_then(Value::as_object)
    }
}

impl Qwen3Experts {
    fn from_keys(keys: &Keys<'_>, layer_count: usize) -> Result<Qwen3Experts, ModelError> {
        let dense_layers = keys.ids("mlp_only_layers")?;
        if dense_layers.iter().any(|&layer| layer as usize >= layer_count) {
            let want = format!("a list of layers below num_hidden_layers ({layer_count})");
            return Err(keys.wrong("mlp_only_layers", want));
        }
        // Published files say num_experts; transformers 5 writes num_local_experts.
        let count_key =
            if keys.has("num_local_experts") { "num_local_experts" } else { "num_experts" };
        Ok(Qwen3Experts {
            expert_count: keys.size_needed(count_key)?,
            expert_count_per_token: keys.size_needed("num_experts_per_tok")?,
            expert_width: keys.size_needed("moe_intermediate_size")?,
            router_weights: router_weights(keys, RouterWeights::AsScored)?,
            dense_layers: dense_layers.iter().map(|&layer| layer as usize).collect(),
            sparse_step: keys.size_or("decoder_sparse_step", 1)?,
        })
    }
}

impl Deepseek {
    fn from_keys(keys: &Keys<'_>) -> Result<Deepseek, ModelError> {
        let interleaved = keys.flag_or("rope_interleave", true)?;
        Ok(Deepseek {
            query_rank: keys.size("q_lora_rank")?,
            key_value_rank: keys.size_needed("kv_lora_rank")?,
            rotary_width: keys.size_needed("qk_rope_head_dim")?,
            plain_width: keys.size_needed("qk_nope_head_dim")?,
            value_width: keys.size_needed("v_head_dim")?,
            expert_count: keys.size_needed("n_routed_experts")?,
            expert_count_per_token: keys.size_needed("num_experts_per_tok")?,
            expert_width: keys.size_needed("moe_intermediate_size")?,
            shared_expert_count: keys.size_or("n_shared_experts", 1)?,
            group_count: keys.size_or("n_group", 8)?,
            group_count_per_token: keys.size_or("topk_group", 4)?,
            router_scale: keys.float_or("routed_scaling_factor", 2.5)?,
            router_weights: router_weights(keys, RouterWeights::Normalised)?,
            dense_layer_count: keys.count("first_k_dense_replace")?.unwrap_or(3),
            extra_layer_count: keys.count("num_nextn_predict_layers")?.unwrap_or(0),
            rotary_pairs: if interleaved {
                RotaryPairs::Interleaved
            } else {
                RotaryPairs::HalfSplit
            },
        })
    }

    fn check(&self, keys: &Keys<'_>, config: &ModelConfig) -> Result<(), ModelError> {
        if config.key_value_head_count != config.head_count {
            let want = format!("num_attention_heads ({}), as MLA has it", config.head_count);
            return Err(keys.wrong("num_key_value_heads", want));
        }
        if !self.expert_count.is_multiple_of(self.group_count) {
            let want = format!("a divisor of n_routed_experts ({})", self.expert_count);
            return Err(keys.wrong("n_group", want));
        }
        let group_size = self.expert_count / self.group_count;
        if group_size < 2 {
            // A group's score is the sum of its two best experts.
            return Err(keys.wrong("n_group", "at most half of n_routed_experts"));
        }
        if self.group_count_per_token > self.group_count {
            return Err(keys.wrong("topk_group", format!("at most n_group ({})", self.group_count)));
        }
        let reachable = self.group_count_per_token * group_size;
        if self.expert_count_per_token > reachable {
            let want = format!("at most the {reachable} experts in topk_group groups");
            return Err(keys.wrong("num_experts_per_tok", want));
        }
        for (key, only) in [("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")] {
            if keys.text(key)?.unwrap_or(only) != only {
                return Err(keys.wrong(key, format!("{only} (no other is implemented)")));
            }
        }
        Ok(())
    }
}

fn head_width(
    keys: &Keys<'_>,
    family: &Family,
    width: usize,
    head_count: usize,
) -> Result<usize, ModelError> {
    if let Family::DeepseekV3(deepseek) = family {
        return Ok(deepseek.rotary_width);
    }
    if let Some(stated) = keys.size("head_dim")? {
        return Ok(stated);
    }
    match family {
        // The default of Qwen3's own configuration class.
        Family::Qwen3 => Ok(128),
        _ if width.is_multiple_of(head_count) => Ok(width / head_count),
        _ => {
            let want = format!("a divisor of hidden_size ({width}) unless head_dim is given");
            Err(keys.wrong("num_attention_heads", want))
        }
    }
}

fn bias(keys: &Keys<'_>, key: &str) -> Result<Bias, ModelError> {
    Ok(if keys.flag_or(key, false)? { Bias::Present } else { Bias::Absent })
}

fn router_weights(keys: &Keys<'_>, default: RouterWeights) -> Result<RouterWeights, ModelError> {
    let normalised = keys.flag_or("norm_topk_prob", default == RouterWeights::Normalised)?;
    Ok(if normalised { RouterWeights::Normalised } else { RouterWeights::AsScored })
}

fn dtype(keys: &Keys<'_>) -> Result<DType, ModelError> {
    let key = if keys.has("dtype") { "dtype" } else { "torch_dtype" };
    match keys.text(key)?.unwrap_or("float32") {
        "float32" => Ok(DType::F32),
        "bfloat16" => Ok(DType::Bf16),
        "float16" => Ok(DType::F16),
        _ => Err(keys.wrong(key, "one of float32, bfloat16, float16")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::rope::RopeScaling;

    fn llama(changes: Value) -> Result<ModelConfig, ModelError> {
        let mut value = serde_json::json!({
            "model_type": "llama", "hidden_size": 48, "num_attention_heads": 6,
            "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64,
            "vocab_size": 100, "max_position_embeddings": 4096
        });
        let map = value.as_object_mut().unwrap();
        for (key, change) in changes.as_object().unwrap() {
            map.insert(key.clone(), change.clone());
        }
        ModelConfig::from_json(map.clone())
    }

    fn message(changes: Value) -> String {
        llama(changes).unwrap_err().to_string()
    }

    #[test]
    fn keys_of_transformers_4_and_5_mean_the_same() {
        let four = llama(serde_json::json!({
            "torch_dtype": "bfloat16", "rope_theta": 500000.0,
            "rope_scaling": {"type": "linear", "factor": 4}
        }));
        let five = llama(serde_json::json!({
            "dtype": "bfloat16",
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
        }));
        let (four, five) = (four.unwrap(), five.unwrap());
        assert_eq!(four.rope, five.rope);
        assert_eq!(four.rope.scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!((four.dtype, five.dtype), (DType::Bf16, DType::Bf16));
    }

    #[test]
    fn every_golden_config_comes_back_unchanged() {
        for case in golden::CASES {
            let path = golden::folder(case).join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            let config = ModelConfig::from_file(&path).unwrap();
            assert_eq!(
                Value::Object(config.to_json()),
                serde_json::from_str::<Value>(&text).unwrap()
            );
        }
    }

    #[test]
    fn unknown_keys_and_old_rope_keys_survive_a_change_elsewhere() {
        let config = llama(serde_json::json!({"rope_theta": 7.0, "a_key_of_tomorrow": [1, 2]}));
        let written = config.unwrap().with_vocab_size(50).to_json();
        assert_eq!(written["vocab_size"], 50);
        assert_eq!(written["rope_theta"], 7.0);
        assert_eq!(written["a_key_of_tomorrow"], serde_json::json!([1, 2]));
        assert!(!written.contains_key("rope_parameters"));
    }

    #[test]
    fn a_changed_rope_is_written_in_the_new_form_and_reads_back_the_same() {
        for case in golden::CASES {
            let rope = ModelConfig::from_folder(&golden::folder(case)).unwrap().rope;
            let mut config = llama(serde_json::json!({"rope_theta": 7.0})).unwrap();
            config.rope = rope.clone();
            let written = config.to_json();
            assert!(!written.contains_key("rope_theta"));
            assert_eq!(ModelConfig::from_json(written).unwrap().rope, rope, "{case}");
        }
    }

    #[test]
    fn an_unknown_architecture_is_refused_with_the_known_ones() {
        let text = message(serde_json::json!({"model_type": "mamba"}));
        assert_eq!(
            text,
            "model_type `mamba` is not implemented; the known ones are \
             llama, qwen3, qwen3_moe, deepseek_v3"
        );
    }

    #[test]
    fn bad_values_are_named_with_what_was_wanted() {
        let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for (change, want) in [
            (
                r#"{"hidden_size": null}"#,
                "`hidden_size` should be a whole number above 0 but is null",
            ),
            (r#"{"num_hidden_layers": 0}"#, "`num_hidden_layers` should be a whole number above 0"),
            (
                r#"{"vocab_size": "big"}"#,
                "`vocab_size` should be a whole number above 0 but is \"big\"",
            ),
            (r#"{"num_key_value_heads": 4}"#, "a divisor of num_attention_heads (6) but is 4"),
            (r#"{"hidden_size": 50}"#, "a divisor of hidden_size (50)"),
            (r#"{"head_dim": 7}"#, "`head_dim` should be even"),
            (r#"{"hidden_act": "gelu"}"#, "`hidden_act` should be silu"),
            (r#"{"rms_norm_eps": -1}"#, "`rms_norm_eps` should be a number above 0 but is -1"),
            (r#"{"eos_token_id": [3, 100]}"#, "`eos_token_id` should be below vocab_size (100)"),
            (
                r#"{"rope_scaling": {"type": "su"}}"#,
                "one of default, linear, dynamic, llama3, yarn",
            ),
            (
                r#"{"rope_scaling": {"type": "linear"}}"#,
                "`rope_parameters.factor` should be a number",
            ),
            (r#"{"torch_dtype": "int8"}"#, "one of float32, bfloat16, float16 but is \"int8\""),
        ] {
            let got = message(json(change));
            assert!(got.contains(want), "{change}: {got}");
        }
    }

    #[test]
    fn layers_are_sparse_where_transformers_makes_them_so() {
        let kinds = |case| {
            let config = ModelConfig::from_folder(&golden::folder(case)).unwrap();
            (0..config.layer_count)
                .map(|layer| config.layer_kind(layer) == LayerKind::Sparse)
                .collect::<Vec<_>>()
        };
        assert_eq!(kinds("qwen3_moe_mixed"), [false, false, false, true]);
        assert_eq!(kinds("deepseek_v3"), [false, true, true]);
        assert_eq!(kinds("llama2"), [false, false]);
    }

    #[test]
    fn a_file_that_is_not_json_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "{ \"model_type\": ").unwrap();
        let text = ModelConfig::from_folder(folder.path()).unwrap_err().to_string();
        assert!(text.contains("config.json` is not a JSON object: EOF"), "{text}");
    }
}
