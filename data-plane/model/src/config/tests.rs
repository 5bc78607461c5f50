#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use serde_json::{Value, json};

use super::*;

/// The smallest configuration of three layers, with `fields` put in.
fn parse(architecture: &str, fields: &Value) -> Result<ModelConfig, String> {
    let mut document = json!({
        "architectures": [architecture], "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 80, "vocab_size": 96, "max_position_embeddings": 256,
    });
    let document = document.as_object_mut().unwrap();
    document.extend(fields.as_object().unwrap().clone());
    ModelConfig::parse(Path::new("config.json"), document).map_err(|error| error.to_string())
}

#[test]
fn windows_follow_each_architectures_rules() {
    let cases = [
        ("LlamaForCausalLM", json!({"sliding_window": 8}), [None; 3]),
        ("MistralForCausalLM", json!({"sliding_window": 8}), [Some(8); 3]),
        ("MistralForCausalLM", json!({"sliding_window": null}), [None; 3]),
        ("MistralForCausalLM", json!({}), [Some(4096); 3]),
        ("Qwen2ForCausalLM", json!({"sliding_window": 8}), [None; 3]),
        (
            "Qwen2ForCausalLM",
            json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 1}),
            [None, Some(8), Some(8)],
        ),
        (
            "Qwen3ForCausalLM",
            json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3}),
            [None; 3],
        ),
        (
            "Qwen3ForCausalLM",
            json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
            [Some(8), None, Some(8)],
        ),
    ];
    for (architecture, fields, windows) in cases {
        let config = parse(architecture, &fields).unwrap();
        assert_eq!(config.attention_windows, windows, "{architecture} with {fields}");
    }
}

#[test]
fn wrong_windows_are_named() {
    let types = |types: Value| json!({"use_sliding_window": true, "layer_types": types});
    let cases = [
        (json!({"use_sliding_window": 1}), "`use_sliding_window`"),
        (
            json!({"use_sliding_window": true, "sliding_window": 0}),
            "`sliding_window`",
        ),
        (
            json!({"use_sliding_window": true, "max_window_layers": -1}),
            "`max_window_layers`",
        ),
        (types(json!(["full_attention"])), "each of 3 layers"),
        (
            types(json!(["full_attention", "full_attention", "linear_attention"])),
            "`layer_types`",
        ),
    ];
    for (fields, named) in cases {
        let error = parse("Qwen2ForCausalLM", &fields).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn yarn_and_dynamic_scaling_lengthen_the_context_and_others_do_not() {
    let cases = [
        (json!({"type": "linear", "factor": 2}), 256),
        (json!({"type": "dynamic", "factor": 2}), 512),
        (json!({"rope_type": "yarn", "factor": 4}), 1024),
        (
            json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64}),
            256,
        ),
        (
            json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128}),
            512,
        ),
    ];
    for (scaling, context) in cases {
        let config = parse("LlamaForCausalLM", &json!({"rope_scaling": scaling})).unwrap();
        assert_eq!(config.max_position_embeddings, context, "{scaling}");
    }
}

#[test]
fn the_sharpness_of_yarn_is_given_or_follows_from_the_factor() {
    let sharpness = 0.1 * 4.0_f32.ln() + 1.0;
    let cases = [
        (json!({}), sharpness),
        (json!({"attention_factor": 0.5}), 0.5),
        (json!({"mscale": 1, "mscale_all_dim": 1}), 1.0),
        (
            json!({"mscale": 2, "mscale_all_dim": 1}),
            (0.2 * 4.0_f32.ln() + 1.0) / sharpness,
        ),
    ];
    for (fields, expected) in cases {
        let mut scaling = json!({"rope_type": "yarn", "factor": 4});
        let scaling_fields = scaling.as_object_mut().unwrap();
        scaling_fields.extend(fields.as_object().unwrap().clone());
        let config = parse("LlamaForCausalLM", &json!({"rope_scaling": scaling})).unwrap();
        let Some(RopeScaling::Yarn { attention_factor, .. }) = config.rope_scaling else {
            panic!("{:?}", config.rope_scaling)
        };
        assert!(
            (attention_factor - expected).abs() < 1e-6,
            "{fields}: {attention_factor}"
        );
    }
}

#[test]
fn yarn_that_cannot_be_computed_is_named() {
    let cases = [
        (json!({"rope_type": "yarn"}), "`rope_scaling.factor`"),
        (
            json!({"rope_type": "yarn", "factor": 4, "rope_theta": 1}),
            "`rope_scaling.rope_theta`",
        ),
        (
            json!({"rope_type": "yarn", "factor": 4, "beta_fast": 1}),
            "`rope_scaling.beta_fast`",
        ),
    ];
    for (scaling, named) in cases {
        let error = parse("LlamaForCausalLM", &json!({"rope_scaling": scaling})).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}
