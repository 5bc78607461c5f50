//! What a matcher promises to the sampling loop.

use penstock_grammar::{Grammar, MatcherError};

use crate::support::{Chance, DEMO, EOS, bytes, compiler, walk};

#[test]
fn forced_tokens_are_the_tokenizers_and_are_taken() {
    let schema = r#"{"type":"object","properties":{"temperature":{"const":"very cold"}},"required":["temperature"],
        "additionalProperties":false}"#;
    let compiled = compiler(DEMO.vocabulary())
        .compile(&Grammar::JsonSchema(schema.into()))
        .unwrap();
    let mut matcher = compiled.matcher();
    // White space is free: one way through it is taken, then text is forced.
    for token in DEMO.encode("{") {
        matcher.commit(token).unwrap();
    }
    let before = matcher.clone();
    for token in DEMO.encode("\"temper") {
        matcher.commit(token).unwrap();
    }
    let forced = matcher.forced().unwrap();
    assert!(!forced.is_empty());
    for &token in &forced {
        matcher.commit(token).unwrap();
    }
    let text: Vec<u8> = forced
        .iter()
        .flat_map(|&id| DEMO.tokens[id as usize].clone())
        .collect();
    assert!(
        b"ature\"".starts_with(&text),
        "{}",
        String::from_utf8_lossy(&text)
    );
    assert_eq!(
        before.committed() + DEMO.encode("\"temper").len() + forced.len(),
        matcher.committed()
    );
}

#[test]
fn taking_tokens_back_is_never_having_committed_them() {
    let compiled = compiler(bytes())
        .compile(&Grammar::Regex("(?:[a-f]{2},)*[0-9]+".into()))
        .unwrap();
    let tokens: Vec<Vec<u8>> = (0..=255)
        .map(|byte| vec![byte])
        .chain([b"<|end|>".to_vec()])
        .collect();
    for seed in 0..50 {
        let mut chance = Chance(seed);
        let walked = walk(&compiled, &tokens, &mut chance, 40).tokens;
        let mut masks = Vec::new();
        let mut matcher = compiled.matcher();
        for &token in &walked {
            masks.push(matcher.mask().unwrap().clone());
            matcher.commit(token).unwrap();
        }
        while matcher.committed() > 0 {
            let back = 1 + chance.below(matcher.committed());
            matcher.rollback(back).unwrap();
            let expected = &masks[matcher.committed()];
            assert_eq!(matcher.mask().unwrap(), expected);
        }
    }
}

#[test]
fn clones_go_their_own_ways() {
    let compiled = compiler(bytes())
        .compile(&Grammar::Regex("ab|cd".into()))
        .unwrap();
    let mut one = compiled.matcher();
    let mut other = one.clone();
    one.commit(u32::from(b'a')).unwrap();
    other.commit(u32::from(b'c')).unwrap();
    assert_eq!(one.mask().unwrap().only(), Some(u32::from(b'b')));
    assert_eq!(other.mask().unwrap().only(), Some(u32::from(b'd')));
}

#[test]
fn a_token_that_is_not_allowed_leaves_the_matcher_where_it_was() {
    let compiled = compiler(bytes()).compile(&Grammar::Regex("ab".into())).unwrap();
    let mut matcher = compiled.matcher();
    matcher.commit(u32::from(b'a')).unwrap();
    for wrong in [u32::from(b'a'), EOS, 9999] {
        let error = matcher.commit(wrong).unwrap_err();
        assert_eq!(
            error,
            MatcherError::NotAllowed {
                token: wrong,
                committed: 1
            }
        );
    }
    matcher.commit(u32::from(b'b')).unwrap();
    assert!(matcher.may_stop());
    assert_eq!(matcher.mask().unwrap().only(), Some(EOS));
}
