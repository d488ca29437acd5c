//! Configurations by name: small ones to train from nothing, and published ones to measure with.
//!
//! Sizes of published models are facts from their config.json files. Holds no weights. A preset's
//! vocabulary is a default: `ModelConfig::with_vocab_size` fits it to a tokenizer.

use serde_json::{Value, json};

use crate::config::{Head, ModelConfig};
use crate::error::{ModelError, nearest};

/// Every preset, small to large.
pub const PRESETS: [&str; 11] = [
    "qwen3-1m",
    "qwen3-moe-8m",
    "deepseek-8m",
    "llama-30m",
    "qwen3-30m",
    "qwen3-0.6b",
    "llama-1b",
    "llama-8b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "deepseek-v3",
];

/// The configuration of this name.
pub fn preset(name: &str) -> Result<ModelConfig, ModelError> {
    let values = match name {
        "qwen3-1m" => qwen3([1024, 128, 4, 384], [4, 2, 32]),
        "qwen3-30m" => qwen3([8192, 512, 8, 1536], [8, 4, 64]),
        "qwen3-0.6b" => large_qwen3(qwen3([151_936, 1024, 28, 3072], [16, 8, 128])),
        "qwen3-8b" => {
            let values = large_qwen3(qwen3([151_936, 4096, 36, 12_288], [32, 8, 128]));
            with(values, json!({"tie_word_embeddings": false}))
        }
        "qwen3-moe-8m" => qwen3_moe(qwen3([8192, 192, 4, 512], [4, 2, 64]), [16, 4, 160]),
        "qwen3-30b-a3b" => {
            let dense = large_qwen3(qwen3([151_936, 2048, 48, 6144], [32, 4, 128]));
            let values = qwen3_moe(dense, [128, 8, 768]);
            with(values, json!({"tie_word_embeddings": false}))
        }
        "llama-30m" => llama([8192, 512, 8, 1376], [8, 8, 64], Head::Tied),
        "llama-1b" => llama3(llama([128_256, 2048, 16, 8192], [32, 8, 64], Head::Tied), 32.0),
        "llama-8b" => llama3(llama([128_256, 4096, 32, 14_336], [32, 8, 128], Head::Own), 8.0),
        "deepseek-8m" => deepseek_8m(),
        "deepseek-v3" => deepseek_v3(),
        _ => {
            return Err(ModelError::UnknownPreset {
                got: name.to_owned(),
                nearest: nearest(name, PRESETS).expect("the list is not empty").to_owned(),
                known: PRESETS.join(", "),
            });
        }
    };
    let Value::Object(map) = values else { unreachable!("presets are written as objects") };
    ModelConfig::from_json(map)
}

/// `base` with the keys of `changes` set.
fn with(mut base: Value, changes: Value) -> Value {
    let map = base.as_object_mut().expect("presets are written as objects");
    let Value::Object(changes) = changes else { unreachable!("changes are written as objects") };
    map.extend(changes);
    base
}

/// Keys every family has: [vocabulary, width, layers, inner width], [heads, kv heads, head width].
fn common(sizes: [usize; 4], heads: [usize; 3]) -> Value {
    json!({
        "vocab_size": sizes[0],
        "hidden_size": sizes[1],
        "num_hidden_layers": sizes[2],
        "intermediate_size": sizes[3],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "hidden_act": "silu",
        "attention_bias": false,
        "initializer_range": 0.02,
        "use_cache": true,
        "dtype": "bfloat16",
        "max_position_embeddings": 2048,
    })
}

fn llama(sizes: [usize; 4], heads: [usize; 3], head: Head) -> Value {
    let own = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "mlp_bias": false,
        "tie_word_embeddings": head == Head::Tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    });
    with(common(sizes, heads), own)
}

/// Llama 3.1 and 3.2: long contexts by stretched wavelengths.
fn llama3(base: Value, factor: f64) -> Value {
    let rope = json!({
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    with(base, json!({"max_position_embeddings": 131_072, "rope_parameters": rope}))
}

fn qwen3(sizes: [usize; 4], heads: [usize; 3]) -> Value {
    let own = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    });
    with(common(sizes, heads), own)
}

fn large_qwen3(base: Value) -> Value {
    with(base, json!({"max_position_embeddings": 40_960}))
}

/// Experts: [count, per token, inner width].
fn qwen3_moe(base: Value, experts: [usize; 3]) -> Value {
    let own = json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts[0],
        "num_experts_per_tok": experts[1],
        "moe_intermediate_size": experts[2],
        "norm_topk_prob": true,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    });
    with(base, own)
}

fn deepseek(base: Value, own: Value) -> Value {
    let always = json!({
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
        "norm_topk_prob": true,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "rope_interleave": true,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    });
    with(with(base, always), own)
}

fn deepseek_8m() -> Value {
    let own = json!({
        "q_lora_rank": 96, "kv_lora_rank": 64,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    });
    deepseek(common([8192, 192, 4, 512], [6, 6, 32]), own)
}

fn deepseek_v3() -> Value {
    let own = json!({
        "max_position_embeddings": 163_840,
        "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0,
            "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    });
    deepseek(common([129_280, 7168, 61, 18_432], [128, 128, 64]), own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_have_the_sizes_their_names_promise() {
        // Published totals: Qwen3-0.6B 0.6B, Llama-3.2-1B 1.24B, Llama-3.1-8B 8.03B, Qwen3-8B
        // 8.2B, Qwen3-30B-A3B 30.5B, DeepSeek-V3 671B (all from their model cards).
        for (name, millions) in [
            ("qwen3-1m", 0.9),
            ("qwen3-moe-8m", 8.1),
            ("deepseek-8m", 7.8),
            ("llama-30m", 29.5),
            ("qwen3-30m", 29.4),
            ("qwen3-0.6b", 596.0),
            ("llama-1b", 1236.0),
            ("llama-8b", 8030.0),
            ("qwen3-8b", 8191.0),
            ("qwen3-30b-a3b", 30_532.0),
            ("deepseek-v3", 671_026.0),
        ] {
            let got = preset(name).unwrap().parameter_count() as f64 / 1e6;
            assert!((got / millions - 1.0).abs() < 0.03, "{name}: {got} million");
        }
        assert_eq!(preset("llama-30m").unwrap().parameter_count(), 29_499_904);
        assert!(PRESETS.iter().all(|name| preset(name).is_ok()));
    }

    #[test]
    fn a_mistyped_preset_is_answered_with_the_nearest() {
        let text = preset("qwen-30m").unwrap_err().to_string();
        assert!(text.contains("the nearest is `qwen3-30m`"), "{text}");
    }

    #[test]
    fn a_preset_takes_another_vocabulary_and_survives_writing() {
        let config = preset("deepseek-8m").unwrap().with_vocab_size(300);
        let again = ModelConfig::from_json(config.to_json()).unwrap();
        assert_eq!(again.vocab_size, 300);
        assert_eq!(again.family, config.family);
    }
}
