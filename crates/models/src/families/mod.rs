//! The forward function of each model family, from token ids to the last norm's rows.
//!
//! One file per family; what they share is in `block.rs`. Each layer is a segment for
//! recomputation: it begins after its first norm, so that one tensor passes between layers.

mod deepseek_v3;
mod llama;
mod qwen3;

use pontoon_ops::View;
use pontoon_program::Builder;

use crate::block::{EMBEDDING, Forward, Residual, Rows};
use crate::config::{Family, ModelConfig};
use crate::error::ModelError;

pub(crate) use self::deepseek_v3::rope_style;

/// The last norm's rows for these token ids.
pub(crate) fn hidden(
    config: &ModelConfig,
    builder: &mut Builder<'_>,
    ids: View,
    rows: Rows<'_>,
) -> Result<View, ModelError> {
    let table = builder.parameter(EMBEDDING)?;
    let mut residual = Residual::new(builder.embed(ids, table)?);
    let mut forward = Forward::new(config, builder, rows);
    for layer in 0..config.layer_count {
        block(&mut forward, layer, &mut residual)?;
    }
    forward.norm(&mut residual, "model.norm")
}

/// What the extra layer makes of hidden states and of the tokens drawn after them: the rows from
/// which its own head predicts the token after.
pub(crate) fn extra_hidden(
    config: &ModelConfig,
    builder: &mut Builder<'_>,
    (hidden, next_ids): (View, View),
    rows: Rows<'_>,
) -> Result<View, ModelError> {
    let (layer, width) = (config.layer_count, config.width);
    let stem = format!("model.layers.{layer}");
    let table = builder.parameter(&format!("{stem}.embed_tokens.weight"))?;
    let embedded = builder.embed(next_ids, table)?;
    let mut forward = Forward::new(config, builder, rows);
    let eps = config.rms_norm_eps as f32;
    let embedded = forward.norm_with_eps(&format!("{stem}.enorm"), embedded, eps)?;
    let hidden = forward.norm_with_eps(&format!("{stem}.hnorm"), hidden, eps)?;
    let joined = forward.builder.temporary(hidden.dtype, &[hidden.dim(0), 2 * width]);
    forward.builder.copy_into(embedded, joined.slice(1, 0, width))?;
    forward.builder.copy_into(hidden, joined.slice(1, width, width))?;
    let mut residual = Residual::new(forward.linear(&format!("{stem}.eh_proj"), joined)?);
    block(&mut forward, layer, &mut residual)?;
    forward.norm(&mut residual, &format!("{stem}.shared_head.norm"))
}

/// One layer: attention and feed-forward, each added to the residual stream.
fn block(
    forward: &mut Forward<'_, '_>,
    layer: usize,
    residual: &mut Residual,
) -> Result<(), ModelError> {
    let config = forward.config;
    let stem = format!("model.layers.{layer}");
    let x = forward.norm(residual, &format!("{stem}.input_layernorm"))?;
    forward.builder.next_segment();
    let attended = match &config.family {
        Family::Llama => llama::attention(forward, layer, x)?,
        Family::Qwen3 | Family::Qwen3Moe(_) => qwen3::attention(forward, layer, x)?,
        Family::DeepseekV3(sizes) => deepseek_v3::attention(forward, sizes, layer, x)?,
    };
    residual.add(attended);
    let x = forward.norm(residual, &format!("{stem}.post_attention_layernorm"))?;
    let fed = match &config.family {
        Family::Llama | Family::Qwen3 => forward.mlp(&format!("{stem}.mlp"), x)?,
        Family::Qwen3Moe(experts) => qwen3::feed_forward(forward, experts, layer, x)?,
        Family::DeepseekV3(sizes) => deepseek_v3::feed_forward(forward, sizes, layer, x)?,
    };
    residual.add(fed);
    Ok(())
}
