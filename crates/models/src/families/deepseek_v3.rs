//! DeepSeek-V3 and R1: keys and values expanded from one compressed row (MLA), a rotated key
//! part that all heads share, and experts chosen by group beside shared ones.
//!
//! The cache of inference holds expanded keys and values, so that decoding and training agree bit
//! for bit; absorbing the expansion into the queries would change the order of sums.

use pontoon_ops::{Renormalise, RopeStyle, RouterRule, Scoring, View};

use crate::block::{Forward, Qkv};
use crate::config::{Deepseek, LayerKind, RotaryPairs, RouterWeights};
use crate::error::ModelError;

/// The published code builds these two norms with its class's default, whatever `rms_norm_eps` is.
const COMPRESSED_NORM_EPS: f32 = 1e-6;

/// Which elements rotate together.
pub(crate) fn rope_style(sizes: &Deepseek) -> RopeStyle {
    match sizes.rotary_pairs {
        RotaryPairs::Interleaved => RopeStyle::Interleaved,
        RotaryPairs::HalfSplit => RopeStyle::HalfSplit,
    }
}

/// Attention of one layer.
pub(super) fn attention(
    forward: &mut Forward<'_, '_>,
    sizes: &Deepseek,
    layer: usize,
    x: View,
) -> Result<View, ModelError> {
    let stem = format!("model.layers.{layer}.self_attn");
    let q = queries(forward, sizes, &stem, x)?;
    let (k, v) = keys_and_values(forward, sizes, &stem, x)?;
    let attended = forward.attend(layer, Qkv { q, k, v })?;
    forward.linear(&format!("{stem}.o_proj"), attended)
}

/// Queries [rows, heads, plain + rotated].
fn queries(
    forward: &mut Forward<'_, '_>,
    sizes: &Deepseek,
    stem: &str,
    x: View,
) -> Result<View, ModelError> {
    let heads = forward.config.head_count;
    let flat = match sizes.query_rank {
        None => forward.linear(&format!("{stem}.q_proj"), x)?,
        Some(_) => {
            let compressed = forward.linear(&format!("{stem}.q_a_proj"), x)?;
            let norm = format!("{stem}.q_a_layernorm");
            let compressed = forward.norm_with_eps(&norm, compressed, COMPRESSED_NORM_EPS)?;
            forward.linear(&format!("{stem}.q_b_proj"), compressed)?
        }
    };
    let unrotated = flat.split_last(heads);
    let (plain, rotary) = (sizes.plain_width, sizes.rotary_width);
    let q = forward.builder.temporary(flat.dtype, unrotated.dims());
    forward.builder.copy_into(unrotated.slice(2, 0, plain), q.slice(2, 0, plain))?;
    forward.rope_into(unrotated.slice(2, plain, rotary), q.slice(2, plain, rotary))?;
    Ok(q)
}

/// Keys [rows, heads, plain + rotated] and values [rows, heads, value width].
fn keys_and_values(
    forward: &mut Forward<'_, '_>,
    sizes: &Deepseek,
    stem: &str,
    x: View,
) -> Result<(View, View), ModelError> {
    let heads = forward.config.head_count;
    let (plain, rotary) = (sizes.plain_width, sizes.rotary_width);
    let both = forward.linear(&format!("{stem}.kv_a_proj_with_mqa"), x)?;
    let compressed = both.slice(1, 0, sizes.key_value_rank);
    let shared = both.slice(1, sizes.key_value_rank, rotary).split_last(1);

    let norm = format!("{stem}.kv_a_layernorm");
    let compressed = forward.norm_with_eps(&norm, compressed, COMPRESSED_NORM_EPS)?;
    let expanded = forward.linear(&format!("{stem}.kv_b_proj"), compressed)?.split_last(heads);
    let v = expanded.slice(2, plain, sizes.value_width);

    let k = forward.builder.temporary(both.dtype, &[both.dim(0), heads, plain + rotary]);
    forward.builder.copy_into(expanded.slice(2, 0, plain), k.slice(2, 0, plain))?;
    let rotated = forward.rope(shared)?;
    let repeated = rotated.broadcast(1, heads);
    forward.builder.copy_into(repeated, k.slice(2, plain, rotary))?;
    Ok((k, v))
}

/// The feed-forward part of one layer.
pub(super) fn feed_forward(
    forward: &mut Forward<'_, '_>,
    sizes: &Deepseek,
    layer: usize,
    x: View,
) -> Result<View, ModelError> {
    let stem = format!("model.layers.{layer}.mlp");
    if forward.config.layer_kind(layer) == LayerKind::Dense {
        return forward.mlp(&stem, x);
    }
    let rule = RouterRule {
        chosen: sizes.expert_count_per_token,
        scoring: Scoring::Sigmoid,
        groups: sizes.group_count,
        groups_kept: sizes.group_count_per_token,
        renormalise: match sizes.router_weights {
            RouterWeights::Normalised => Renormalise::Yes,
            RouterWeights::AsScored => Renormalise::No,
        },
        scale: sizes.router_scale as f32,
    };
    let bias = forward.builder.parameter(&format!("{stem}.gate.e_score_correction_bias"))?;
    let routed = forward.experts(&stem, x, rule, Some(bias))?;
    let shared = forward.mlp(&format!("{stem}.shared_experts"), x)?;
    Ok(forward.builder.add(routed, shared)?)
}
