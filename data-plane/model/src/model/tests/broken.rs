//! Broken checkpoints: each is refused with an error that names what is wrong.

use super::super::TensorParallel;
use std::{fs, path::Path};

use safetensors::{Dtype as FileDtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::golden_dir;
use crate::{CacheLayout, Device, LoadError, LoadOptions, Model};

/// A copy of a golden checkpoint, to be broken.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden_dir("llama").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn load(dir: &Path) -> Result<Model, LoadError> {
    let cache = CacheLayout {
        page_size: 16,
        num_pages: 4,
    };
    Model::load(
        dir,
        LoadOptions {
            dtype: None,
            cache,
            device: Device::Cpu,
            tensor_parallel: TensorParallel::default(),
            progress: &|_| {},
        },
    )
}

/// Loads, which must fail with a message that holds all of `parts`.
#[track_caller]
fn refused(dir: &Path, parts: &[&str]) {
    let Err(error) = load(dir) else { panic!("it loads") };
    let mut message = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    for part in parts {
        assert!(message.contains(part), "`{message}` does not name `{part}`");
    }
}

fn change_config(dir: &Path, change: impl Fn(&mut Value)) {
    let path = dir.join("config.json");
    let mut document = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut document);
    fs::write(&path, serde_json::to_vec(&document).unwrap()).unwrap();
}

/// Writes the tensors again, each as `change` leaves it.
fn change_tensors(dir: &Path, change: impl Fn(&str, &mut FileDtype, &mut Vec<usize>, &mut Vec<u8>) -> bool) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let mut kept = Vec::new();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let (mut dtype, mut shape, mut data) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        if change(&name, &mut dtype, &mut shape, &mut data) {
            kept.push((name, dtype, shape, data));
        }
    }
    let views = kept.iter().map(|(name, dtype, shape, data)| {
        (
            name.clone(),
            TensorView::new(*dtype, shape.clone(), data).unwrap(),
        )
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn the_copy_itself_loads() {
    load(copy().path()).unwrap();
}

#[test]
fn a_file_cut_short_is_named_with_its_size() {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for len in [0, 3, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        if len == 0 {
            // An empty file cannot even be mapped everywhere.
            refused(dir.path(), &["model.safetensors"]);
        } else {
            refused(
                dir.path(),
                &[
                    "model.safetensors is not a complete safetensors file",
                    &format!("({len} bytes)"),
                ],
            );
        }
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = copy();
    change_tensors(dir.path(), |name, _, _, _| {
        name != "model.layers.1.mlp.up_proj.weight"
    });
    refused(
        dir.path(),
        &[
            "`model.layers.1.mlp.up_proj.weight` is missing",
            "model.safetensors",
        ],
    );
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() {
    let dir = copy();
    change_tensors(dir.path(), |name, _, shape, _| {
        if name == "model.layers.0.self_attn.k_proj.weight" {
            shape.swap(0, 1);
        }
        true
    });
    refused(
        dir.path(),
        &[
            "`model.layers.0.self_attn.k_proj.weight`",
            "[16, 32]",
            "[32, 16]",
            "model.safetensors",
        ],
    );
}

#[test]
fn a_weight_that_is_not_a_number_is_named_with_its_place() {
    for bits in [0x7fc0_u16, 0x7f80, 0xff80] {
        let dir = copy();
        change_tensors(dir.path(), |name, _, _, data| {
            if name == "model.norm.weight" {
                data[14..16].copy_from_slice(&bits.to_le_bytes());
            }
            true
        });
        refused(dir.path(), &["`model.norm.weight`", "not finite", "element 7"]);
    }
}

#[test]
fn elements_of_a_kind_that_is_not_read_are_named() {
    let dir = copy();
    change_tensors(dir.path(), |name, dtype, _, _| {
        if name == "lm_head.weight" {
            *dtype = FileDtype::I16;
        }
        true
    });
    refused(dir.path(), &["`lm_head.weight`", "I16", "BF16, F16 and F32"]);
}

#[test]
fn an_unknown_architecture_is_named_with_what_is_supported() {
    let dir = copy();
    change_config(dir.path(), |config| {
        config["architectures"] = json!(["FalconForCausalLM"])
    });
    refused(
        dir.path(),
        &[
            "`FalconForCausalLM`",
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ],
    );
}

#[test]
fn wrong_fields_are_named() {
    let wrong = [
        ("hidden_size", json!(-1)),
        ("hidden_size", json!("many")),
        ("hidden_size", json!(1_u64 << 60)),
        ("num_hidden_layers", Value::Null),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(7)),
        ("rms_norm_eps", json!(0)),
        ("eos_token_id", json!([1, 96])),
        ("hidden_act", json!("gelu")),
        ("tie_word_embeddings", json!("yes")),
        ("torch_dtype", json!("int8")),
        ("quantization_config", json!({"bits": 4})),
        ("rope_parameters", json!([])),
        ("partial_rotary_factor", json!(0.5)),
        ("architectures", json!("LlamaForCausalLM")),
    ];
    for (field, value) in wrong {
        let dir = copy();
        change_config(dir.path(), |config| config[field] = value.clone());
        refused(dir.path(), &["config.json", &format!("`{field}`")]);
    }
    let nested = [
        ("rope_type", json!("longrope")),
        ("rope_type", json!(3)),
        ("partial_rotary_factor", json!(0.5)),
        ("factor", json!(0.5)),
        ("high_freq_factor", json!(0.5)),
        ("factor", Value::Null),
    ];
    for (field, value) in nested {
        let dir = copy();
        change_config(dir.path(), |config| {
            config["rope_parameters"][field] = value.clone()
        });
        refused(
            dir.path(),
            &["config.json", &format!("`rope_parameters.{field}`")],
        );
    }
}

#[test]
fn garbage_for_a_configuration_is_an_error() {
    for garbage in ["", "not json", "[]", "{", "{\"architectures\": []}", "\u{0}\u{1}"] {
        let dir = copy();
        fs::write(dir.path().join("config.json"), garbage).unwrap();
        refused(dir.path(), &["config.json"]);
    }
    let dir = copy();
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["cannot read", "config.json"]);
}

#[test]
fn a_directory_without_weights_is_named() {
    let dir = copy();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), &["holds neither model.safetensors nor"]);
}

#[test]
fn a_cache_that_cannot_be_had_is_refused() {
    for cache in [
        CacheLayout {
            page_size: 0,
            num_pages: 4,
        },
        CacheLayout {
            page_size: 16,
            num_pages: 0,
        },
        CacheLayout {
            page_size: 16,
            num_pages: usize::MAX / 2,
        },
        CacheLayout {
            page_size: 1 << 24,
            num_pages: 1 << 31,
        },
    ] {
        let options = LoadOptions {
            dtype: None,
            cache,
            device: Device::Cpu,
            tensor_parallel: TensorParallel::default(),
            progress: &|_| {},
        };
        let error = Model::load(&golden_dir("llama"), options)
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains("KV cache"), "{error}");
    }
}

/// Splits the checkpoint into two files and an index.
fn shard(dir: &Path, index: impl Fn(&mut serde_json::Map<String, Value>)) {
    let path = dir.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    for (number, file) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
        let views = tensors
            .tensors()
            .into_iter()
            .filter(|(name, _)| name.len() % 2 == number);
        let views: Vec<_> = views.collect();
        for (name, _) in &views {
            map.insert(name.clone(), json!(file));
        }
        fs::write(dir.join(file), safetensors::serialize(views, None).unwrap()).unwrap();
    }
    fs::remove_file(&path).unwrap();
    index(&mut map);
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(
        dir.join("model.safetensors.index.json"),
        serde_json::to_vec(&index).unwrap(),
    )
    .unwrap();
}

#[test]
fn a_sharded_checkpoint_gives_the_same_logits() {
    let (one, several) = (copy(), copy());
    shard(several.path(), |_| {});
    let logits = |dir: &Path| {
        let (mut batch, mut out) = (crate::Batch::default(), Vec::new());
        batch.push(&[5, 9, 77], 0, &[2], true);
        load(dir).unwrap().forward(&batch, &mut out).unwrap();
        out
    };
    assert_eq!(logits(one.path()), logits(several.path()));
}

#[test]
fn a_wrong_index_is_named() {
    let dir = copy();
    shard(dir.path(), |map| {
        map.insert("lm_head.weight".into(), json!("../../etc/passwd"));
    });
    refused(dir.path(), &["index.json", "`weight_map.lm_head.weight`"]);
    let dir = copy();
    shard(dir.path(), |map| {
        map.insert("lm_head.weight".into(), json!("c.safetensors"));
    });
    refused(dir.path(), &["cannot read", "c.safetensors"]);
    let dir = copy();
    shard(dir.path(), |map| {
        let other = if map["lm_head.weight"] == "a.safetensors" {
            "b.safetensors"
        } else {
            "a.safetensors"
        };
        map.insert("lm_head.weight".into(), json!(other));
    });
    refused(dir.path(), &["`lm_head.weight` is missing", ".safetensors"]);
}

#[test]
fn f16_and_f32_files_load_as_f32() {
    let bf16 = copy();
    let (mut batch, mut expected) = (crate::Batch::default(), Vec::new());
    batch.push(&[5, 9, 77], 0, &[2], true);
    change_config(bf16.path(), |config| config["torch_dtype"] = json!("float32"));
    load(bf16.path()).unwrap().forward(&batch, &mut expected).unwrap();
    let widened = copy();
    change_config(widened.path(), |config| config["torch_dtype"] = json!("float32"));
    change_tensors(widened.path(), |_, dtype, _, data| {
        *dtype = FileDtype::F32;
        *data = data
            .chunks_exact(2)
            .flat_map(|bits| [0, 0, bits[0], bits[1]])
            .collect();
        true
    });
    let mut out = Vec::new();
    load(widened.path()).unwrap().forward(&batch, &mut out).unwrap();
    assert_eq!(out, expected);
    let halved = copy();
    change_config(halved.path(), |config| config["torch_dtype"] = json!("float16"));
    change_tensors(halved.path(), |_, dtype, _, data| {
        *dtype = FileDtype::F16;
        let half = |bits: &[u8]| half::f16::from_f32(half::bf16::from_le_bytes([bits[0], bits[1]]).to_f32());
        *data = data
            .chunks_exact(2)
            .flat_map(|bits| half(bits).to_le_bytes())
            .collect();
        true
    });
    load(halved.path()).unwrap().forward(&batch, &mut out).unwrap();
    // bf16 weights of ordinary size are f16 numbers too, but for the very small ones.
    for (found, expected) in out.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-3);
    }
}
