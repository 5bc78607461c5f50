use proptest::prelude::*;

use super::*;
use crate::{Constraint, SamplingParams, testing::END};

fn request(params: &SamplingParams, index: u64) -> SampleRequest<'_> {
    SampleRequest {
        params,
        index,
        history: None,
        top_logprobs: None,
        follows: None,
        stop_token_ids: &[],
        grammar: None,
    }
}

fn sample(logits: &[f32], params: &SamplingParams, index: u64) -> u32 {
    Sampler::new()
        .sample(0, &mut logits.to_vec(), &request(params, index))
        .unwrap()
        .id
}

/// The distribution by the book: sort everything, cut, normalise.
fn reference(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut tokens: Vec<(usize, f64)> = logits
        .iter()
        .map(|&logit| f64::from((logit - max) / params.temperature).exp())
        .enumerate()
        .collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        tokens.truncate(params.top_k);
    }
    tokens.retain(|&(_, weight)| weight >= f64::from(params.min_p) * (1.0 - 1e-6));
    let total: f64 = tokens.iter().map(|t| t.1).sum();
    let (mut sum, mut kept) = (0.0, 0);
    while kept < tokens.len() && sum < f64::from(params.top_p) * total * (1.0 - 1e-6) {
        sum += tokens[kept].1;
        kept += 1;
    }
    tokens.truncate(kept.max(1));
    let total: f64 = tokens.iter().map(|t| t.1).sum();
    let mut probabilities = vec![0.0; logits.len()];
    for (id, weight) in tokens {
        probabilities[id] = weight / total;
    }
    probabilities
}

#[test]
fn greedy_takes_the_largest_and_the_lowest_id_of_equals() {
    let params = SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    };
    assert_eq!(sample(&[0.0, 3.0, 3.0, -1.0], &params, 0), 1);
}

#[test]
fn frequencies_follow_the_distribution() {
    let logits = [1.0, 0.5, 0.0, -0.5, -1.0, 2.0, 1.5, -3.0];
    for params in [
        SamplingParams::default(),
        SamplingParams {
            temperature: 0.5,
            ..SamplingParams::default()
        },
        SamplingParams {
            top_k: 3,
            ..SamplingParams::default()
        },
        SamplingParams {
            top_p: 0.6,
            ..SamplingParams::default()
        },
        SamplingParams {
            min_p: 0.2,
            ..SamplingParams::default()
        },
        SamplingParams {
            top_k: 5,
            top_p: 0.9,
            min_p: 0.05,
            temperature: 1.7,
            ..SamplingParams::default()
        },
    ] {
        let expected = reference(&logits, &params);
        let draws = 20_000;
        let mut counts = vec![0u32; logits.len()];
        for index in 0..draws {
            counts[sample(&logits, &params, index) as usize] += 1;
        }
        for (id, &probability) in expected.iter().enumerate() {
            let observed = f64::from(counts[id]) / draws as f64;
            let deviation = (probability * (1.0 - probability) / draws as f64).sqrt();
            assert!(
                (observed - probability).abs() <= 5.0 * deviation,
                "{params:?}: {id} {observed} {probability}"
            );
        }
    }
}

#[test]
fn a_seed_and_an_index_give_one_token() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 997) as f32 / 300.0).collect();
    let params = SamplingParams {
        seed: 42,
        top_k: 50,
        ..SamplingParams::default()
    };
    let first: Vec<u32> = (0..50).map(|index| sample(&logits, &params, index)).collect();
    let again: Vec<u32> = (0..50).map(|index| sample(&logits, &params, index)).collect();
    assert_eq!(first, again);
    let other = SamplingParams { seed: 43, ..params };
    assert_ne!(
        first,
        (0..50)
            .map(|index| sample(&logits, &other, index))
            .collect::<Vec<_>>()
    );
}

#[test]
fn penalties_change_only_what_was_seen() {
    let params = SamplingParams {
        temperature: 0.0,
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..SamplingParams::default()
    };
    let mut history = TokenHistory::of_prompt(&[0, 1]);
    history.generated(1);
    history.generated(1);
    history.generated(2);
    let mut logits = vec![4.0, 4.0, -1.0, 1.0];
    let request = SampleRequest {
        params: &params,
        index: 0,
        history: Some(&history),
        top_logprobs: None,
        follows: None,
        stop_token_ids: &[],
        grammar: None,
    };
    assert_eq!(Sampler::new().sample(0, &mut logits, &request).unwrap().id, 0);
    assert_eq!(logits, [2.0, 2.0 - 0.5 - 0.5, -2.0 - 0.5 - 0.25, 1.0]);
}

#[test]
fn log_probabilities_sum_to_one_and_come_likeliest_first() {
    let params = SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    };
    let request = SampleRequest {
        params: &params,
        index: 0,
        history: None,
        top_logprobs: Some(4),
        follows: None,
        stop_token_ids: &[],
        grammar: None,
    };
    let sampled = Sampler::new()
        .sample(0, &mut [0.0, 2.0, 1.0, -5.0], &request)
        .unwrap();
    let sum: f32 = sampled.top.iter().map(|(_, logprob)| logprob.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5);
    assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0, 3]);
    assert_eq!(sampled.logprob, Some(sampled.top[0].1));
}

#[test]
fn rows_that_are_no_numbers_are_an_error() {
    let params = SamplingParams::default();
    for row in [
        vec![0.0, f32::NAN],
        vec![f32::NEG_INFINITY; 3],
        vec![0.0, f32::INFINITY],
        vec![],
    ] {
        let error = Sampler::new()
            .sample(3, &mut row.clone(), &request(&params, 0))
            .unwrap_err();
        assert!(matches!(error, RunnerError::NotNumbers { row: 3 }), "{row:?}");
    }
}

#[test]
fn a_bias_moves_the_choice_and_the_log_probabilities() {
    let params = SamplingParams {
        temperature: 0.0,
        logit_bias: vec![(2, 3.0), (1, -100.0), (900, 5.0)],
        ..SamplingParams::default()
    };
    let request = SampleRequest {
        top_logprobs: Some(1),
        ..request(&params, 0)
    };
    let sampled = Sampler::new().sample(0, &mut [0.0, 2.0, 0.0], &request).unwrap();
    assert_eq!(sampled.id, 2);
    // Softmax of 0, -98 and 3.
    assert!((sampled.logprob.unwrap() + (1.0 + (-3.0f32).exp()).ln()).abs() < 1e-5);
}

#[test]
fn a_grammar_leaves_the_likeliest_of_what_it_allows() {
    let params = SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    };
    let grammar = Constraint::new(crate::testing::grammar("[bc]"));
    let mut logits: Vec<f32> = (0..256).map(|id| 300.0 - id as f32).collect();
    let request = SampleRequest {
        top_logprobs: Some(5),
        grammar: Some(&grammar),
        ..request(&params, 0)
    };
    let sampled = Sampler::new().sample(0, &mut logits, &request).unwrap();
    assert_eq!(sampled.id, u32::from(b'b'));
    // Of b and c alone; nothing that cannot be is reported.
    let both: f32 = sampled.top.iter().map(|(_, logprob)| logprob.exp()).sum();
    assert_eq!(sampled.top.len(), 2);
    assert!((both - 1.0).abs() < 1e-5);
}

#[test]
fn nothing_stops_a_reply_too_early_but_its_grammar() {
    let params = SamplingParams {
        temperature: 0.0,
        min_tokens: 2,
        ..SamplingParams::default()
    };
    let choose = |index, grammar| {
        let request = SampleRequest {
            stop_token_ids: &[7, END, 900],
            grammar,
            ..request(&params, index)
        };
        let mut logits = vec![0.0; 256];
        (logits[7], logits[9]) = (5.0, 4.0);
        Sampler::new().sample(0, &mut logits, &request).unwrap().id
    };
    assert_eq!([0, 1, 2, 3].map(|index| choose(index, None)), [9, 9, 7, 7]);
    let ended = crate::testing::grammar("a?");
    let mut ended = ended.clone();
    ended.commit(u32::from(b'a')).unwrap();
    assert_eq!(choose(1, Some(&Constraint::new(ended))), END);
}

#[test]
fn a_token_that_follows_is_reported_as_the_model_sees_it() {
    let params = SamplingParams {
        logit_bias: vec![(0, 50.0)],
        ..SamplingParams::default()
    };
    let grammar = Constraint::new(crate::testing::grammar("a"));
    let request = SampleRequest {
        follows: Some(2),
        grammar: Some(&grammar),
        top_logprobs: Some(1),
        ..request(&params, 0)
    };
    let told = Sampler::new().sample(0, &mut [1.0, 3.0, 2.0], &request).unwrap();
    let norm = (1.0f32.exp() + 3.0f32.exp() + 2.0f32.exp()).ln();
    assert_eq!((told.id, told.top[0].0), (2, 1));
    assert!((told.logprob.unwrap() - (2.0 - norm)).abs() < 1e-5);
}

/// The token that the naive distribution gives for the same random number, and how near that number is to the
/// border between two tokens.
fn naive_draw(logits: &[f32], params: &SamplingParams, index: u64) -> (u32, f64) {
    let mut tokens: Vec<(u32, f64)> = (0..).zip(reference(logits, params)).collect();
    if params.top_p < 1.0 {
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }
    let target = uniform(params.seed, index);
    let (mut sum, mut nearest) = (0.0, f64::INFINITY);
    let mut drawn = None;
    for (id, probability) in tokens {
        sum += probability;
        nearest = nearest.min((sum - target).abs());
        drawn = drawn.or((sum > target).then_some(id));
    }
    (drawn.unwrap_or(0), nearest)
}

proptest! {
    #[test]
    fn the_draw_is_that_of_the_naive_sampler(
        // Thousandths: no two weights differ by rounding alone.
        logits in prop::collection::vec((-6000i32..6000).prop_map(|logit| logit as f32 / 1000.0), 1..600),
        temperature in 0.2f32..3.0,
        top_k in prop::sample::select(vec![0usize, 0, 1, 5, 100, 1000]),
        top_p in prop::sample::select(vec![0.1f32, 0.5, 0.9, 0.99, 1.0]),
        seed in any::<u64>(),
        index in 0u64..1000,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, seed, ..SamplingParams::default() };
        let (expected, margin) = naive_draw(&logits, &params, index);
        // A last token more or less in the nucleus shifts every border a little.
        let drawn = sample(&logits, &params, index);
        let nucleus = |top_p| reference(&logits, &SamplingParams { top_p, ..params.clone() });
        let count = |weights: Vec<f64>| weights.iter().filter(|&&weight| weight > 0.0).count();
        let clear = count(nucleus(top_p * 0.99999)) == count(nucleus((top_p * 1.00001).min(1.0)));
        prop_assert!(drawn == expected || margin < 1e-5 || !clear, "{drawn} instead of {expected}");
    }

    #[test]
    fn only_tokens_that_the_cuts_leave_are_drawn(
        logits in prop::collection::vec(-8.0f32..8.0, 1..60),
        temperature in 0.1f32..3.0,
        top_k in 0usize..70,
        top_p in 0.05f32..=1.0,
        min_p in 0.0f32..0.9,
        index in 0u64..1000,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
        let id = sample(&logits, &params, index) as usize;
        let allowed = reference(&logits, &SamplingParams { min_p: min_p * 0.999, top_p: (top_p * 1.001).min(1.0), ..params });
        prop_assert!(allowed[id] > 0.0);
    }
}
