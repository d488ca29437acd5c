//! Qwen3: Llama's attention with a norm on each query and key head; experts in the MoE sizes.

use pontoon_ops::{Renormalise, RouterRule, Scoring, View};

use crate::block::{Forward, Qkv};
use crate::config::{LayerKind, Qwen3Experts, RouterWeights};
use crate::error::ModelError;

/// Attention of one layer.
pub(super) fn attention(
    forward: &mut Forward<'_, '_>,
    layer: usize,
    x: View,
) -> Result<View, ModelError> {
    let stem = format!("model.layers.{layer}.self_attn");
    let (heads, kv_heads) = (forward.config.head_count, forward.config.key_value_head_count);
    let q = forward.heads(&format!("{stem}.q_proj"), x, heads)?;
    let k = forward.heads(&format!("{stem}.k_proj"), x, kv_heads)?;
    let v = forward.heads(&format!("{stem}.v_proj"), x, kv_heads)?;
    let q = forward.head_norm(&format!("{stem}.q_norm"), q)?;
    let k = forward.head_norm(&format!("{stem}.k_norm"), k)?;
    let (q, k) = (forward.rope(q)?, forward.rope(k)?);
    let attended = forward.attend(layer, Qkv { q, k, v })?;
    forward.linear(&format!("{stem}.o_proj"), attended)
}

/// The feed-forward part of one layer of a mixture.
pub(super) fn feed_forward(
    forward: &mut Forward<'_, '_>,
    experts: &Qwen3Experts,
    layer: usize,
    x: View,
) -> Result<View, ModelError> {
    let stem = format!("model.layers.{layer}.mlp");
    if forward.config.layer_kind(layer) == LayerKind::Dense {
        return forward.mlp(&stem, x);
    }
    let rule = RouterRule {
        chosen: experts.expert_count_per_token,
        scoring: Scoring::Softmax,
        groups: 1,
        groups_kept: 1,
        renormalise: match experts.router_weights {
            RouterWeights::Normalised => Renormalise::Yes,
            RouterWeights::AsScored => Renormalise::No,
        },
        scale: 1.0,
    };
    forward.experts(&stem, x, rule, None)
}
