use super::*;

fn plain() -> SampleRow<'static> {
    SampleRow {
        uniform: 0.0,
        temperature: 0.0,
        top_p: 1.0,
        min_p: 0.0,
        top_k: 0,
        penalties: [1.0, 0.0, 0.0],
        seen: &[],
        bias: &[],
        stops: &[],
        mask: None,
        logprob: true,
    }
}

/// Runs rows over the same logits.
fn run(emulated: &Emulated, logits: &[f32], rows: &[SampleRow<'_>]) -> Vec<Option<(u32, f32)>> {
    let mut words = Vec::new();
    let entries = SampleRow::lay_out(rows, &mut words);
    // A double comes first in a row.
    assert_eq!(words.as_ptr().align_offset(8), 0);
    let mut all = logits.repeat(rows.len());
    let (mut tokens, mut logprobs) = (vec![7_777_777_u32; rows.len()], vec![f32::NAN; rows.len()]);
    let (to, logprob, through) = (tokens.as_mut_ptr(), logprobs.as_mut_ptr(), all.as_mut_ptr());
    let (first, entry) = (words.as_ptr(), words[entries..].as_ptr());
    kernel!(emulated, b"sample", [rows.len(), 1, 1], 1024, to => *mut u32, logprob => *mut f32,
        through => *mut f32, first => *const u32, entry => *const u32, first => *const u32,
        logits.len() as u32 => u32);
    let answer = |(&token, &logprob): (&u32, &f32)| (token != u32::MAX).then_some((token, logprob));
    tokens.iter().zip(&logprobs).map(answer).collect()
}

fn check(emulated: &Emulated, logits: &[f32], rows: &[SampleRow<'_>]) {
    for (found, row) in run(emulated, logits, rows).into_iter().zip(rows) {
        let expected = reference::sample(&mut logits.to_vec(), row);
        assert_eq!(
            found.map(|found| found.0),
            expected.map(|expected| expected.0),
            "{row:?}"
        );
        if let (Some((_, found)), Some((_, expected))) = (found, expected) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{found} instead of {expected}, {row:?}"
            );
        }
    }
}

#[test]
fn draws_agree_with_the_reference() {
    let (emulated, seed) = (Emulated::compile("sample", &[]), seed());
    let mut logits: Vec<f32> = reference::noise(seed, 1500)
        .iter()
        .map(|value| 8.0 * value)
        .collect();
    // Ties, at the top and elsewhere.
    (logits[1400], logits[77]) = (7.5, 7.5);
    logits[100..160].fill(6.0);
    let uniform = |at: u64| (reference::noise(seed ^ at, 1)[0] as f64 + 1.0) / 2.0 * 0.999_999;
    let rows: Vec<SampleRow<'_>> = (0..12)
        .map(|at| SampleRow {
            uniform: uniform(at),
            temperature: [0.3, 1.0, 2.5][at as usize % 3],
            top_p: [1.0, 0.9, 0.3, 1.0][at as usize % 4],
            min_p: [0.0, 0.02][at as usize % 2],
            top_k: [0, 40, 1][at as usize / 4],
            ..plain()
        })
        .collect();
    check(&emulated, &logits, &rows);
}

#[test]
fn edits_agree_with_the_reference() {
    let (emulated, seed) = (Emulated::compile("sample", &[]), seed());
    let logits = reference::noise(seed, 333);
    let best = reference::sample(&mut logits.clone(), &plain()).unwrap().0;
    let mut mask = vec![u32::MAX; 11];
    mask[best as usize / 32] &= !(1 << (best % 32));
    let mut only_best = vec![0; 11];
    only_best[best as usize / 32] = 1 << (best % 32);
    let seen = [(best, 3), (5, 0), (6, 1)];
    let bias = [(9, 1.5), (best, -4.0), (9, 1.0)];
    let stops = [best, 300, 4000];
    let rows = [
        plain(),
        SampleRow {
            seen: &seen,
            penalties: [1.7, 0.3, 0.2],
            ..plain()
        },
        SampleRow {
            bias: &bias,
            temperature: 1.0,
            uniform: 0.5,
            ..plain()
        },
        SampleRow {
            stops: &stops,
            ..plain()
        },
        SampleRow {
            mask: Some(&mask),
            ..plain()
        },
        // The stop token is all that the grammar leaves.
        SampleRow {
            mask: Some(&only_best),
            stops: &stops,
            temperature: 1.0,
            ..plain()
        },
    ];
    check(&emulated, &logits, &rows);
}

#[test]
fn logits_that_are_not_numbers_yield_no_token() {
    let emulated = Emulated::compile("sample", &[]);
    let mut logits = vec![0.5; 100];
    logits[99] = f32::NAN;
    assert_eq!(run(&emulated, &logits, &[plain()]), [None]);
    assert_eq!(run(&emulated, &[f32::NEG_INFINITY; 100], &[plain()]), [None]);
    let even = run(&emulated, &[0.0, -0.0, -1.0], &[plain()]);
    assert_eq!(even[0].unwrap().0, 0, "the lowest id wins a tie");
}
