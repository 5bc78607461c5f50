//! Against transformers' numbers (tests/golden) and against itself in other batches.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;

mod broken;
mod gguf;
mod manifest;
mod parallel;

const FAMILIES: [&str; 8] = [
    "llama",
    "llama-linear",
    "llama-dynamic",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-yarn",
];
const VOCAB: usize = 96;

/// One prompt and what transformers makes of it.
struct Golden {
    ids: Vec<u32>,
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn golden_dir(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(family)
}

fn golden(family: &str) -> Vec<Golden> {
    let text = std::fs::read(golden_dir(family).join("golden.json")).unwrap();
    let document: Value = serde_json::from_slice(&text).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|number| number.as_f64().unwrap())
            .collect()
    };
    let ids = |value: &Value| numbers(value).into_iter().map(|id| id as u32).collect();
    let cases = document["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    let case = |case: &Value| Golden {
        ids: ids(&case["ids"]),
        logits: numbers(&case["logits"])
            .into_iter()
            .map(|logit| logit as f32)
            .collect(),
        greedy: ids(&case["greedy"]),
    };
    cases.iter().map(case).collect()
}

fn options(dtype: Dtype, page_size: usize) -> LoadOptions<'static> {
    LoadOptions {
        dtype: Some(dtype),
        cache: CacheLayout {
            page_size,
            num_pages: 2048 / page_size,
        },
        device: Device::Cpu,
        tensor_parallel: TensorParallel::default(),
        progress: &|_| {},
    }
}

fn load(family: &str, dtype: Dtype, page_size: usize) -> Model {
    Model::load(&golden_dir(family), options(dtype, page_size)).unwrap()
}

/// Pages of the `index`th of several sequences, in no order.
fn pages(model: &Model, index: usize) -> Vec<u32> {
    let count = 256 / model.cache.page_size as u32;
    (0..count).rev().map(|page| page + index as u32 * count).collect()
}

/// Logits of the last token of `ids`, computed in chunks of `chunk` tokens from position `computed` on.
fn logits(model: &mut Model, ids: &[u32], computed: usize, chunk: usize, pages: &[u32]) -> Vec<f32> {
    let (mut batch, mut out, mut at) = (Batch::default(), Vec::new(), computed);
    while at < ids.len() {
        let end = at.saturating_add(chunk).min(ids.len());
        batch.clear();
        batch.push(&ids[at..end], at, pages, end == ids.len());
        model.forward(&batch, &mut out).unwrap();
        assert_eq!(out.len(), if end == ids.len() { VOCAB } else { 0 });
        at = end;
    }
    out
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.unwrap() as u32
}

fn greedy(model: &mut Model, ids: &[u32], count: usize, pages: &[u32]) -> Vec<u32> {
    let (mut sequence, mut computed) = (ids.to_vec(), 0);
    for _ in 0..count {
        let logits = logits(model, &sequence, computed, usize::MAX, pages);
        computed = sequence.len();
        sequence.push(argmax(&logits));
    }
    sequence.split_off(ids.len())
}

#[test]
fn logits_and_greedy_ids_equal_those_of_transformers() {
    for family in FAMILIES {
        for page_size in [1, 16] {
            let mut model = load(family, Dtype::F32, page_size);
            let pages = pages(&model, 1);
            for case in golden(family) {
                let found = logits(&mut model, &case.ids, 0, usize::MAX, &pages);
                for (found, expected) in found.iter().zip(&case.logits) {
                    assert!(
                        (found - expected).abs() < 1e-3,
                        "{family}: {found} instead of {expected}"
                    );
                }
                assert_eq!(
                    greedy(&mut model, &case.ids, case.greedy.len(), &pages),
                    case.greedy,
                    "{family}"
                );
            }
        }
    }
}

#[test]
fn bf16_and_int8_stay_near_the_f32_logits() {
    // 2⁻⁸ a rounding of bf16, some tens of roundings deep. int8 is off by 2 to 7 % for rows as short as these,
    // 12 % at worst.
    let bounds = [(Dtype::Bf16, 0.03_f32), (Dtype::Int8, 0.15)];
    for (family, (dtype, bound)) in FAMILIES
        .into_iter()
        .flat_map(|family| bounds.map(|bound| (family, bound)))
    {
        let mut model = load(family, dtype, 16);
        let pages = pages(&model, 0);
        for case in golden(family) {
            let found = logits(&mut model, &case.ids, 0, usize::MAX, &pages);
            let squares: f32 = found.iter().zip(&case.logits).map(|(a, b)| (a - b).powi(2)).sum();
            let scale: f32 = case.logits.iter().map(|logit| logit.powi(2)).sum();
            assert!(
                squares / scale < bound.powi(2),
                "{family} {dtype:?}: off by {}",
                (squares / scale).sqrt()
            );
        }
    }
}

#[test]
fn chunked_prefill_and_prefix_reuse_change_no_bit() {
    for (family, dtype) in FAMILIES
        .into_iter()
        .flat_map(|name| [(name, Dtype::F32), (name, Dtype::Bf16), (name, Dtype::Int8)])
    {
        let mut model = load(family, dtype, 16);
        let (whole_pages, other_pages) = (pages(&model, 0), pages(&model, 1));
        for case in golden(family) {
            let whole = logits(&mut model, &case.ids, 0, usize::MAX, &whole_pages);
            for chunk in [1, 7, 16, 64] {
                let chunked = logits(&mut model, &case.ids, 0, chunk, &other_pages);
                assert_eq!(whole, chunked, "{family}: chunks of {chunk}");
            }
            // The first pages of the whole run, then pages of its own.
            let shared = case.ids.len().saturating_sub(1) / 16;
            let mixed = [&whole_pages[..shared], &pages(&model, 2)[shared..]].concat();
            let reused = logits(&mut model, &case.ids, shared * 16, usize::MAX, &mixed);
            assert_eq!(whole, reused, "{family}: {shared} shared pages");
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_what_it_is_batched_with() {
    for (family, dtype) in FAMILIES
        .into_iter()
        .flat_map(|name| [(name, Dtype::F32), (name, Dtype::Bf16), (name, Dtype::Int8)])
    {
        let mut model = load(family, dtype, 16);
        let cases = golden(family);
        assert_eq!(cases.len(), 8);
        let last = pages(&model, 7);
        let alone: Vec<_> = cases
            .iter()
            .map(|case| logits(&mut model, &case.ids, 0, usize::MAX, &last))
            .collect();
        // Half of them are prefills, half have all but their last token computed; one wants no logits.
        let (mut batch, mut out) = (Batch::default(), Vec::new());
        for (index, case) in cases.iter().enumerate().filter(|(index, _)| index % 2 == 1) {
            batch.push(&case.ids[..case.ids.len() - 1], 0, &pages(&model, index), false);
        }
        model.forward(&batch, &mut out).unwrap();
        assert!(out.is_empty());
        batch.clear();
        for (index, case) in cases.iter().enumerate() {
            let computed = if index % 2 == 1 { case.ids.len() - 1 } else { 0 };
            batch.push(&case.ids[computed..], computed, &pages(&model, index), index != 3);
        }
        model.forward(&batch, &mut out).unwrap();
        let expected: Vec<f32> = alone
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != 3)
            .flat_map(|(_, row)| row.clone())
            .collect();
        assert_eq!(out, expected, "{family}");
    }
}

#[test]
fn a_batch_that_contradicts_itself_is_refused_and_the_next_one_runs() {
    let mut model = load("llama", Dtype::F32, 16);
    let (pages, mut out) = (pages(&model, 0), Vec::new());
    let good = || {
        let mut batch = Batch::default();
        batch.push(&[5, 6, 7], 0, &pages, true);
        batch
    };
    type Change = fn(&mut Batch);
    let changes: [(Change, &str); 9] = [
        (|batch| batch.tokens[1] = 96, "vocabulary"),
        (|batch| batch.positions[2] = 9, "positions"),
        (|batch| batch.positions.truncate(2), "positions"),
        (|batch| batch.sequences[0].query_len = 2, "positions"),
        (|batch| batch.sequences[0].query_start = usize::MAX, "tokens"),
        (|batch| batch.sequences[0].context_len = 2, "context"),
        (|batch| batch.sequences[0].context_len = 300, "context"),
        (|batch| batch.sequences[0].page_count = 99, "pages"),
        (|batch| batch.page_tables[0] = 128, "page 128"),
    ];
    model.forward(&good(), &mut out).unwrap();
    let expected = out.clone();
    for (change, names) in changes {
        let mut batch = good();
        change(&mut batch);
        let error = model.forward(&batch, &mut out).unwrap_err().to_string();
        assert!(error.contains(names), "{error}");
    }
    model.forward(&good(), &mut out).unwrap();
    assert_eq!(out, expected);
}

#[test]
fn kv_bytes_count_both_halves_of_all_layers() {
    let config = ModelConfig::load(&golden_dir("llama")).unwrap();
    assert_eq!(
        Model::kv_bytes_per_token(&config, Some(Dtype::F32), 1),
        2 * 2 * 2 * 8 * 4
    );
    // The checkpoint says bfloat16.
    assert_eq!(Model::kv_bytes_per_token(&config, None, 1), 2 * 2 * 2 * 8 * 2);
}

#[test]
fn progress_ends_at_the_total() {
    let seen = std::cell::RefCell::new(Vec::new());
    let progress = |progress: LoadProgress| seen.borrow_mut().push(progress);
    let cache = CacheLayout {
        page_size: 16,
        num_pages: 4,
    };
    let options = LoadOptions {
        dtype: None,
        cache,
        device: Device::Cpu,
        tensor_parallel: TensorParallel::default(),
        progress: &progress,
    };
    Model::load(&golden_dir("qwen3"), options).unwrap();
    let seen = seen.into_inner();
    assert!(seen.is_sorted_by_key(|progress| progress.loaded_bytes) && seen.len() > 10);
    assert_eq!(
        seen.last().map(|last| last.loaded_bytes),
        seen.first().map(|first| first.total_bytes)
    );
}
