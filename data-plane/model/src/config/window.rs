//! Which layers have a sliding window.

use serde_json::Value;

use super::{Architecture, Fields, LoadError, MAX_CONTEXT};

/// The window of each layer, by the rules of each architecture's configuration in transformers.
pub(super) fn attention_windows(
    fields: &Fields<'_>,
    architecture: Architecture,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, LoadError> {
    let windowed = match architecture {
        Architecture::Llama => false,
        Architecture::Mistral => true,
        Architecture::Qwen2 | Architecture::Qwen3 => fields.flag("use_sliding_window")?.unwrap_or(false),
    };
    let window = if windowed { window(fields)? } else { None };
    if window.is_none() || architecture == Architecture::Mistral {
        return Ok(vec![window; num_layers]);
    }
    if let Some(types) = fields.raw("layer_types") {
        return by_type(fields, types, window, num_layers);
    }
    let first = first_windowed_layer(fields)?;
    let layer = |index| window.filter(|_| index >= first);
    Ok((0..num_layers as u64).map(layer).collect())
}

/// `sliding_window`, where `null` means none but nothing at all means what transformers takes by default.
fn window(fields: &Fields<'_>) -> Result<Option<usize>, LoadError> {
    const DEFAULT: usize = 4096;
    if fields.is_absent("sliding_window") {
        return Ok(Some(DEFAULT));
    }
    fields.optional_size("sliding_window", MAX_CONTEXT)
}

fn by_type(
    fields: &Fields<'_>,
    types: &Value,
    window: Option<usize>,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, LoadError> {
    let layer = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Some(None),
        Some("sliding_attention") => Some(window),
        _ => None,
    };
    let windows: Option<Vec<_>> = types
        .as_array()
        .and_then(|types| types.iter().map(layer).collect());
    windows
        .filter(|windows| windows.len() == num_layers)
        .ok_or_else(|| {
            let problem = format!(
                "must be \"full_attention\" or \"sliding_attention\" for each of {num_layers} layers"
            );
            fields.error("layer_types", problem)
        })
}

/// `max_window_layers`: the layers before it see everything.
fn first_windowed_layer(fields: &Fields<'_>) -> Result<u64, LoadError> {
    const DEFAULT: u64 = 28;
    let field = "max_window_layers";
    match fields.raw(field) {
        None => Ok(DEFAULT),
        Some(value) => value
            .as_u64()
            .ok_or_else(|| fields.error(field, format!("is {value}; it must be a number of layers"))),
    }
}
