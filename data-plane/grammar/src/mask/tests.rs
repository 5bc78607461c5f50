#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn mask(len: usize, allowed: &[u32]) -> TokenMask {
    let mut words = vec![0; len.div_ceil(32)];
    for &id in allowed {
        words[id as usize / 32] |= 1 << (id % 32);
    }
    let mut mask = TokenMask::new(len);
    mask.copy_from(&words);
    mask
}

#[test]
fn apply_leaves_the_allowed_logits_and_no_others() {
    let allowed = [0, 31, 32, 63, 64, 69];
    let mask = mask(70, &allowed);
    // A row of logits padded to 96.
    let mut logits: Vec<f32> = (0..96).map(|id| id as f32).collect();
    mask.apply(&mut logits);
    for (id, &logit) in logits.iter().enumerate() {
        match allowed.contains(&(id as u32)) {
            true => assert_eq!(logit, id as f32),
            false => assert_eq!(logit, f32::NEG_INFINITY, "token {id}"),
        }
    }
}

#[test]
fn a_full_word_and_an_empty_one_take_the_same_way_as_the_others() {
    let allowed: Vec<u32> = (32..64).collect();
    let mask = mask(96, &allowed);
    let mut logits = vec![1.0; 96];
    mask.apply(&mut logits);
    let kept: Vec<u32> = (0..96).filter(|&id| logits[id as usize] == 1.0).collect();
    assert_eq!(kept, allowed);
}

#[test]
fn bits_past_the_last_token_are_dropped() {
    let mut mask = TokenMask::new(33);
    mask.copy_from(&[u32::MAX, u32::MAX, 7]);
    assert_eq!(mask.count(), 33);
    assert!(mask.allows(32) && !mask.allows(33) && !mask.allows(u32::MAX));
}

#[test]
fn only_names_the_single_token_and_nothing_else() {
    assert_eq!(mask(100, &[64]).only(), Some(64));
    assert_eq!(mask(100, &[64, 65]).only(), None);
    assert_eq!(mask(100, &[0, 65]).only(), None);
    assert_eq!(mask(100, &[]).only(), None);
}

#[test]
fn iter_yields_the_allowed_ids_in_order() {
    let allowed = [1, 31, 32, 90, 99];
    assert_eq!(mask(100, &allowed).iter().collect::<Vec<_>>(), allowed);
}
