//! Llama 2 and 3: grouped-query attention with rotated halves; biases where the folder has them.

use pontoon_ops::View;

use crate::block::{Forward, Qkv};
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
    let (q, k) = (forward.rope(q)?, forward.rope(k)?);
    let attended = forward.attend(layer, Qkv { q, k, v })?;
    forward.linear(&format!("{stem}.o_proj"), attended)
}
