//! Names of tensors.

/// A tensor in llama.cpp's words.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Translated {
    pub(crate) name: String,
    /// It makes queries or keys, whose rows may be laid out in pairs.
    pub(crate) paired: bool,
}

const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Translates Hugging Face's name; one that is not known stays as it is, and is missing by that name.
pub(crate) fn translate(name: &str) -> Translated {
    let whole = |name: &str| Translated {
        name: name.to_owned(),
        paired: false,
    };
    match name {
        "model.embed_tokens.weight" => return whole("token_embd.weight"),
        "lm_head.weight" => return whole("output.weight"),
        "model.norm.weight" => return whole("output_norm.weight"),
        _ => {}
    }
    let layer = || {
        let (number, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (_, ours) = LAYER.iter().find(|(theirs, _)| *theirs == part)?;
        Some(Translated {
            name: format!("blk.{number}.{ours}.{kind}"),
            paired: matches!(*ours, "attn_q" | "attn_k"),
        })
    };
    layer().unwrap_or_else(|| whole(name))
}

#[cfg(test)]
impl Translated {
    /// The name alone.
    pub(crate) fn of(name: &str) -> String {
        translate(name).name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_have_their_names_in_llama_cpp() {
        for (theirs, ours, paired) in [
            ("lm_head.weight", "output.weight", false),
            (
                "model.layers.12.self_attn.k_proj.bias",
                "blk.12.attn_k.bias",
                true,
            ),
            (
                "model.layers.0.mlp.down_proj.weight",
                "blk.0.ffn_down.weight",
                false,
            ),
            ("model.layers.0.what.weight", "model.layers.0.what.weight", false),
        ] {
            let name = ours.to_owned();
            assert_eq!(translate(theirs), Translated { name, paired });
        }
    }
}
