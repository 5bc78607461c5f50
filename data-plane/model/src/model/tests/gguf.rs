//! GGUF files made of the golden checkpoints.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{
    Device as CandleDevice, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value as Field},
    },
};
use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;
use crate::{GgufText, TokenKind};

/// Families that llama.cpp's metadata can describe.
const DESCRIBED: [&str; 6] = ["llama", "llama-linear", "mistral", "qwen2", "qwen3", "qwen3-yarn"];

/// How a matrix is kept: in blocks, where its rows are whole blocks.
fn kept(matrix: &Tensor, dtype: GgmlDType) -> QTensor {
    let columns = matrix.dims().last().copied().unwrap();
    let fits = matrix.rank() == 2 && columns.is_multiple_of(dtype.block_size());
    QTensor::quantize(matrix, if fits { dtype } else { GgmlDType::F32 }).unwrap()
}

/// Rows of q and k as llama.cpp lays them out: the halves of a head become pairs.
fn paired(tensor: &Tensor, width: usize) -> Tensor {
    let (rows, rest) = (tensor.dims()[0], tensor.elem_count() / tensor.dims()[0]);
    tensor
        .reshape((rows / width, 2, width / 2, rest))
        .unwrap()
        .transpose(1, 2)
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape(tensor.shape())
        .unwrap()
}

fn metadata(config: &Value) -> Vec<(String, Field)> {
    let number = |name: &str| config[name].as_u64().map(|n| Field::U32(n as u32));
    let architecture = match config["architectures"][0].as_str().unwrap() {
        "LlamaForCausalLM" => "llama",
        "MistralForCausalLM" => "mistral",
        "Qwen2ForCausalLM" => "qwen2",
        _ => "qwen3",
    };
    let mut fields = vec![(
        "general.architecture".to_owned(),
        Field::String(architecture.into()),
    )];
    for (key, name) in [
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("context_length", "max_position_embeddings"),
        ("attention.sliding_window", "sliding_window"),
    ] {
        fields.extend(number(name).map(|value| (format!("{architecture}.{key}"), value)));
    }
    let real = |key: &str, value: f64| (format!("{architecture}.{key}"), Field::F32(value as f32));
    fields.push(real(
        "attention.layer_norm_rms_epsilon",
        config["rms_norm_eps"].as_f64().unwrap(),
    ));
    let rope = ["rope_parameters", "rope_scaling"].map(|name| &config[name]);
    let rope = rope.into_iter().find(|value| value.is_object());
    let theta = rope.and_then(|rope| rope["rope_theta"].as_f64());
    let theta = theta.or(config["rope_theta"].as_f64());
    fields.push(real("rope.freq_base", theta.unwrap()));
    if let Some(rope) = rope
        && let Some(kind) = rope["rope_type"]
            .as_str()
            .filter(|kind| ["linear", "yarn"].contains(kind))
    {
        fields.push((
            format!("{architecture}.rope.scaling.type"),
            Field::String(kind.into()),
        ));
        fields.push(real("rope.scaling.factor", rope["factor"].as_f64().unwrap()));
        if let Some(turns) = rope["beta_fast"].as_f64() {
            fields.push(real("rope.scaling.yarn_beta_fast", turns));
        }
        if let Some(original) = rope["original_max_position_embeddings"].as_u64() {
            let key = format!("{architecture}.rope.scaling.original_context_length");
            fields.push((key, Field::U32(original as u32)));
        }
    }
    fields
}

fn name(theirs: &str) -> String {
    crate::gguf::Translated::of(theirs)
}

/// Writes a family's checkpoint as GGUF.
fn write(family: &str, dtype: GgmlDType, to: &Path, more: &[(&str, Field)]) {
    write_as(family, |matrix| kept(matrix, dtype), to, more);
}

fn write_as(family: &str, keep: impl Fn(&Tensor) -> QTensor, to: &Path, more: &[(&str, Field)]) {
    let dir = golden_dir(family);
    let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let mut fields = metadata(&config);
    fields.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let loaded = candle_core::safetensors::load(dir.join("model.safetensors"), &CandleDevice::Cpu).unwrap();
    let head_dim = config["head_dim"].as_u64().unwrap_or_else(|| {
        config["hidden_size"].as_u64().unwrap() / config["num_attention_heads"].as_u64().unwrap()
    });
    let turns_neighbours = family.starts_with("llama") || family.starts_with("mistral");
    let kept: HashMap<String, QTensor> = tensors
        .names()
        .into_iter()
        .map(|theirs| {
            let tensor = loaded[theirs].to_dtype(candle_core::DType::F32).unwrap();
            let is_paired = turns_neighbours && (theirs.contains("q_proj") || theirs.contains("k_proj"));
            let tensor = match is_paired {
                true => paired(&tensor, head_dim as usize),
                false => tensor,
            };
            (name(theirs), keep(&tensor))
        })
        .collect();
    // Llama 3's stretching is written as what each frequency is divided by.
    let factors = (family == "llama").then(|| {
        let config = ModelConfig::load(&dir).unwrap();
        let plain = ModelConfig {
            rope_scaling: None,
            ..config.clone()
        };
        let turned = [plain, config].map(|config| crate::rotary::frequencies(&config, 10_000.0));
        let factors: Vec<f32> = turned[0].iter().zip(&turned[1]).map(|(a, b)| a / b).collect();
        let count = factors.len();
        let factors = Tensor::from_vec(factors, count, &CandleDevice::Cpu).unwrap();
        QTensor::quantize(&factors, GgmlDType::F32).unwrap()
    });
    let mut tensors: Vec<_> = kept
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    tensors.extend(factors.iter().map(|factors| ("rope_freqs.weight", factors)));
    let fields: Vec<_> = fields.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut fs::File::create(to).unwrap(), &fields, &tensors).unwrap();
}

fn load_gguf(path: &Path, dtype: Option<Dtype>) -> Result<Model, crate::LoadError> {
    let options = LoadOptions {
        dtype,
        ..options(Dtype::F32, 16)
    };
    Model::load(path, options)
}

#[test]
fn unquantized_files_yield_the_numbers_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for (family, dtype) in DESCRIBED
        .into_iter()
        .flat_map(|family| [GgmlDType::F32, GgmlDType::BF16].map(|dtype| (family, dtype)))
    {
        let path = dir.path().join("model.gguf");
        write(family, dtype, &path, &[]);
        // By the file and by its folder.
        for place in [path.as_path(), dir.path()] {
            let mut model = load_gguf(place, Some(Dtype::F32)).unwrap();
            let pages = pages(&model, 0);
            let exact = dtype == GgmlDType::F32;
            for case in golden(family) {
                let found = logits(&mut model, &case.ids, 0, usize::MAX, &pages);
                for (found, expected) in found.iter().zip(&case.logits) {
                    // The checkpoints are bf16 already where they say so; f32 ones lose 2⁻⁹ of each weight.
                    let bound = if exact { 1e-3 } else { 0.05 };
                    assert!(
                        (found - expected).abs() < bound,
                        "{family} {dtype:?}: {found} {expected}"
                    );
                }
                if exact {
                    let ids = greedy(&mut model, &case.ids, case.greedy.len(), &pages);
                    assert_eq!(ids, case.greedy, "{family}");
                }
            }
        }
    }
}

#[test]
fn quantized_files_are_the_models_that_their_values_are() {
    let dir = tempfile::tempdir().unwrap();
    let (path, widened) = (dir.path().join("model.gguf"), dir.path().join("widened"));
    fs::create_dir(&widened).unwrap();
    let widened = widened.join("model.gguf");
    for (blocks, family) in DESCRIBED
        .into_iter()
        .flat_map(|family| [GgmlDType::Q8_0, GgmlDType::Q4_0].map(|blocks| (blocks, family)))
    {
        write(family, blocks, &path, &[]);
        write_as(
            family,
            |matrix| {
                let values = kept(matrix, blocks).dequantize(&CandleDevice::Cpu).unwrap();
                QTensor::quantize(&values, GgmlDType::F32).unwrap()
            },
            &widened,
            &[],
        );
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8] {
            let mut model = load_gguf(&path, Some(dtype)).unwrap();
            let mut same = load_gguf(&widened, Some(dtype)).unwrap();
            let (first, second) = (pages(&model, 0), pages(&model, 1));
            for case in golden(family) {
                let found = logits(&mut model, &case.ids, 0, usize::MAX, &first);
                let expected = logits(&mut same, &case.ids, 0, usize::MAX, &first);
                assert_eq!(found, expected, "{family} {blocks:?} {dtype:?}");
                assert_eq!(found, logits(&mut model, &case.ids, 0, 7, &second), "{family}");
            }
        }
    }
    // What is quantized is kept in 8 bits where nobody says otherwise.
    write("llama", GgmlDType::Q8_0, &path, &[]);
    assert_eq!(load_gguf(&path, None).unwrap().dtype(), Dtype::Int8);
}

#[test]
fn every_kind_of_block_is_widened_as_candle_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let values: Vec<f32> = (0..4 * 512)
        .map(|at| ((at * 7919) % 1000) as f32 / 500.0 - 1.0)
        .collect();
    let matrix = Tensor::from_vec(values, (4, 512), &CandleDevice::Cpu).unwrap();
    for blocks in [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ] {
        let quantized = QTensor::quantize(&matrix, blocks).unwrap();
        let fields = [("general.architecture", &Field::String("qwen2".into()))];
        let tensors = [("output.weight", &quantized)];
        gguf_file::write(&mut fs::File::create(&path).unwrap(), &fields, &tensors).unwrap();
        let checkpoint = crate::checkpoint::Checkpoint::open(&path).unwrap();
        let weights = checkpoint.tensor("lm_head.weight", &[4, 512]).unwrap();
        let whole = quantized.dequantize(&CandleDevice::Cpu).unwrap();
        let whole: Vec<f32> = whole.flatten_all().unwrap().to_vec1().unwrap();
        // Across the borders of blocks and rows.
        for range in [0..2048, 5..700, 511..513, 1000..1001] {
            assert_eq!(weights.range(range.clone()), whole[range], "{blocks:?}");
        }
    }
}

#[test]
fn what_is_wrong_is_named_with_file_and_field() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let error = |path: &Path| load_gguf(path, None).map(drop).unwrap_err().to_string();
    write("qwen2", GgmlDType::F32, &path, &[]);
    let whole = fs::read(&path).unwrap();
    for cut in [0, 3, 20, 400, whole.len() / 2, whole.len() - 64] {
        fs::write(&path, &whole[..cut]).unwrap();
        let error = error(&path);
        assert!(error.contains("model.gguf is no complete GGUF"), "{cut}: {error}");
    }
    for (key, field, named) in [
        (
            "general.architecture",
            Field::String("rwkv".into()),
            "`rwkv` is not supported",
        ),
        ("general.architecture", Field::U32(1), "general.architecture"),
        (
            "qwen2.block_count",
            Field::String("many".into()),
            "qwen2.block_count",
        ),
        (
            "qwen2.rope.scaling.type",
            Field::String("longrope".into()),
            "longrope",
        ),
        ("general.alignment", Field::U32(0), "makes no sense"),
    ] {
        write("qwen2", GgmlDType::F32, &path, &[(key, field)]);
        let error = error(&path);
        assert!(error.contains(named) && error.contains("model.gguf"), "{error}");
    }
    write("qwen2", GgmlDType::F32, &path, &[]);
    fs::copy(&path, dir.path().join("other.gguf")).unwrap();
    assert!(error(dir.path()).contains("holds 2 GGUF files"));
    // A weight that is no number.
    let mut poisoned = whole.clone();
    let end = poisoned.len() - 64;
    poisoned[end..].fill(0xff);
    fs::write(&path, &poisoned).unwrap();
    assert!(error(&path).contains("not finite"), "{}", error(&path));
}

#[test]
fn tokenizers_are_read_with_their_kinds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let texts = |texts: &[&str]| Field::Array(texts.iter().map(|&text| Field::String(text.into())).collect());
    let fields = [
        ("tokenizer.ggml.model", Field::String("gpt2".into())),
        ("tokenizer.ggml.pre", Field::String("qwen2".into())),
        ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<|end|>"])),
        ("tokenizer.ggml.merges", texts(&["a b"])),
        (
            "tokenizer.ggml.token_type",
            Field::Array([1, 1, 4, 3].map(Field::I32).into()),
        ),
        ("tokenizer.ggml.eos_token_id", Field::U32(3)),
        ("tokenizer.chat_template", Field::String("{{ messages }}".into())),
    ];
    write("qwen2", GgmlDType::F32, &path, &fields);
    let text = GgufText::load(dir.path()).unwrap().unwrap();
    assert_eq!(
        (text.pre.as_str(), text.merges.as_slice()),
        ("qwen2", &["a b".to_owned()][..])
    );
    assert_eq!(text.kinds[2..], [TokenKind::UserDefined, TokenKind::Control]);
    assert_eq!((text.bos, text.eos, text.add_bos), (None, Some(3), false));
    assert_eq!(ModelConfig::load(&path).unwrap().eos_token_ids, [3]);
    let wrong = [&fields[..5], &[("tokenizer.ggml.eos_token_id", Field::U32(4))]].concat();
    write("qwen2", GgmlDType::F32, &path, &wrong);
    let error = GgufText::load(&path).unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.eos_token_id"), "{error}");
    assert_eq!(GgufText::load(&golden_dir("llama")).unwrap(), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever the bytes say, loading ends with a model or an error.
    #[test]
    fn a_broken_file_never_panics(changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..6), cut in 0.0f64..2.0) {
        thread_local! {
            static WHOLE: Vec<u8> = {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("model.gguf");
                write("llama", GgmlDType::Q8_0, &path, &[]);
                fs::read(&path).unwrap()
            };
        }
        let mut bytes = WHOLE.with(Clone::clone);
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        bytes.truncate((bytes.len() as f64 * cut.min(1.0)) as usize);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        fs::write(&path, &bytes).unwrap();
        if let Err(error) = load_gguf(&path, None) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
