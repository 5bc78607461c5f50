//! Several ranks against one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use penstock_kernels::{Collective, CollectiveError, LocalCollective};

use super::*;

fn split(family: &str, dtype: Dtype, size: usize) -> Model {
    let options = LoadOptions {
        tensor_parallel: TensorParallel {
            size,
            ..TensorParallel::default()
        },
        ..options(dtype, 16)
    };
    Model::load(&golden_dir(family), options).unwrap()
}

#[test]
fn any_number_of_ranks_yields_the_tokens_of_one_in_every_family() {
    for family in FAMILIES {
        let mut one = load(family, Dtype::F32, 16);
        for size in [2, 4] {
            let mut many = split(family, Dtype::F32, size);
            assert!(
                many.device().ends_with(&format!("{size} ranks)")),
                "{}",
                many.device()
            );
            let (first, second) = (pages(&one, 0), pages(&one, 1));
            for case in golden(family) {
                let whole = logits(&mut many, &case.ids, 0, usize::MAX, &first);
                for (found, expected) in whole
                    .iter()
                    .zip(logits(&mut one, &case.ids, 0, usize::MAX, &first))
                {
                    assert!(
                        (found - expected).abs() < 1e-3,
                        "{family} {size}: {found} {expected}"
                    );
                }
                assert_eq!(
                    greedy(&mut many, &case.ids, case.greedy.len(), &first),
                    case.greedy,
                    "{family}, {size} ranks"
                );
                // What holds for one rank holds for many: chunks and reused prefixes change no bit.
                for chunk in [1, 7, 64] {
                    assert_eq!(
                        whole,
                        logits(&mut many, &case.ids, 0, chunk, &second),
                        "{family} {size}"
                    );
                }
                let shared = case.ids.len().saturating_sub(1) / 16;
                let mixed = [&first[..shared], &pages(&many, 2)[shared..]].concat();
                let reused = logits(&mut many, &case.ids, shared * 16, usize::MAX, &mixed);
                assert_eq!(whole, reused, "{family} {size}");
            }
        }
    }
}

#[test]
fn ranks_share_a_batch_of_prefills_and_decodes() {
    for (family, dtype) in [
        ("llama", Dtype::F32),
        ("qwen3", Dtype::Bf16),
        ("mistral", Dtype::Int8),
    ] {
        let mut model = split(family, dtype, 2);
        let cases = golden(family);
        let last = pages(&model, 7);
        let alone: Vec<f32> = cases
            .iter()
            .flat_map(|case| logits(&mut model, &case.ids, 0, usize::MAX, &last))
            .collect();
        let (mut batch, mut out) = (Batch::default(), Vec::new());
        for (index, case) in cases.iter().enumerate().filter(|(index, _)| index % 2 == 1) {
            batch.push(&case.ids[..case.ids.len() - 1], 0, &pages(&model, index), false);
        }
        model.forward(&batch, &mut out).unwrap();
        batch.clear();
        for (index, case) in cases.iter().enumerate() {
            let computed = if index % 2 == 1 { case.ids.len() - 1 } else { 0 };
            batch.push(&case.ids[computed..], computed, &pages(&model, index), true);
        }
        model.forward(&batch, &mut out).unwrap();
        assert_eq!(out, alone, "{family} {dtype:?}");
    }
}

#[test]
fn narrow_dtypes_stay_near_the_f32_logits_on_two_ranks() {
    for (family, (dtype, bound)) in FAMILIES
        .into_iter()
        .flat_map(|family| [(Dtype::Bf16, 0.03_f32), (Dtype::Int8, 0.2)].map(|bound| (family, bound)))
    {
        let mut model = split(family, dtype, 2);
        let pages = pages(&model, 0);
        for case in golden(family) {
            let found = logits(&mut model, &case.ids, 0, usize::MAX, &pages);
            let squares: f32 = found.iter().zip(&case.logits).map(|(a, b)| (a - b).powi(2)).sum();
            let scale: f32 = case.logits.iter().map(|logit| logit.powi(2)).sum();
            let off = (squares / scale).sqrt();
            assert!(off < bound, "{family} {dtype:?}: off by {off}");
        }
    }
}

#[test]
fn a_size_that_does_not_divide_the_heads_is_refused_with_both_numbers() {
    for size in [0, 3, 8] {
        let options = LoadOptions {
            tensor_parallel: TensorParallel {
                size,
                ..TensorParallel::default()
            },
            ..options(Dtype::F32, 16)
        };
        let result = Model::load(&golden_dir("llama"), options);
        match size {
            // As good as one.
            0 => assert!(result.is_ok()),
            _ => {
                let error = result.map(drop).unwrap_err().to_string();
                assert!(
                    error.contains(&format!("{size} ranks")) && error.contains("4 heads"),
                    "{error}"
                );
            }
        }
    }
}

/// A rank that does not come while it is told so.
#[derive(Debug)]
struct Lazy {
    inner: LocalCollective,
    stuck: Arc<AtomicBool>,
}

impl Collective for Lazy {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        while self.rank() == 1 && self.stuck.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
        self.inner.all_reduce(values)
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn reset(&self) {
        self.inner.reset();
    }
}

#[test]
fn a_stuck_rank_fails_the_step_by_name_and_the_model_recovers_when_it_is_back() {
    let stuck = Arc::new(AtomicBool::new(false));
    let timeout = Duration::from_millis(300);
    let collectives = LocalCollective::group(2, timeout).into_iter().map(|inner| {
        let stuck = stuck.clone();
        Arc::new(Lazy { inner, stuck }) as Arc<dyn Collective>
    });
    let options = LoadOptions {
        tensor_parallel: TensorParallel { size: 2, timeout },
        ..options(Dtype::F32, 16)
    };
    let mut model = Model::load_with(&golden_dir("llama"), options, collectives.collect()).unwrap();
    let (pages, case) = (pages(&model, 0), &golden("llama")[0]);
    let expected = logits(&mut model, &case.ids, 0, usize::MAX, &pages);
    stuck.store(true, Ordering::SeqCst);
    let (mut batch, mut out) = (Batch::default(), Vec::new());
    batch.push(&case.ids, 0, &pages, true);
    let begun = Instant::now();
    let error = model.forward(&batch, &mut out).unwrap_err().to_string();
    assert!(error.contains("rank [1]") || error.contains("rank 1"), "{error}");
    assert!(begun.elapsed() < 20 * timeout, "{:?}", begun.elapsed());
    // While it is stuck nothing runs, and nothing waits for it again.
    let error = model.forward(&batch, &mut out).unwrap_err().to_string();
    assert!(error.contains("rank 1 has not come back"), "{error}");
    assert!(model.ready().is_err());
    stuck.store(false, Ordering::SeqCst);
    let patience = Instant::now();
    while model.ready().is_err() {
        assert!(patience.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(logits(&mut model, &case.ids, 0, usize::MAX, &pages), expected);
}
