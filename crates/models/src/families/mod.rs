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
    rows: Rows,
) -> Result<View, ModelError> {
    let table = builder.parameter(EMBEDDING)?;
    let mut residual = Residual::new(builder.embed(ids, table)?);
    let mut forward = Forward::new(config, builder, rows);
    for layer in 0..config.layer_count {
        let stem = format!("model.layers.{layer}");
        let x = forward.norm(&mut residual, &format!("{stem}.input_layernorm"))?;
        forward.builder.next_segment();
        let attended = match &config.family {
            Family::Llama => llama::attention(&mut forward, layer, x)?,
            Family::Qwen3 | Family::Qwen3Moe(_) => qwen3::attention(&mut forward, layer, x)?,
            Family::DeepseekV3(sizes) => deepseek_v3::attention(&mut forward, sizes, layer, x)?,
        };
        residual.add(attended);
        let x = forward.norm(&mut residual, &format!("{stem}.post_attention_layernorm"))?;
        let fed = match &config.family {
            Family::Llama | Family::Qwen3 => forward.mlp(&format!("{stem}.mlp"), x)?,
            Family::Qwen3Moe(experts) => qwen3::feed_forward(&mut forward, experts, layer, x)?,
            Family::DeepseekV3(sizes) => deepseek_v3::feed_forward(&mut forward, sizes, layer, x)?,
        };
        residual.add(fed);
    }
    forward.norm(&mut residual, "model.norm")
}
