//! How much a reply repeats itself.

use std::collections::HashSet;

/// Length of the token runs that are compared: long enough that ordinary phrases of a language rarely
/// repeat, short enough to see a loop within a few dozen tokens.
const GRAM: usize = 4;

/// The share of a reply's token 4-grams that occurred before in it.
#[derive(Debug, Default)]
pub(crate) struct Repetition {
    window: [u32; GRAM],
    tokens: usize,
    seen: HashSet<[u32; GRAM]>,
    repeated: usize,
}

impl Repetition {
    /// Takes the reply's next token.
    pub(crate) fn push(&mut self, id: u32) {
        self.window.rotate_left(1);
        self.window[GRAM - 1] = id;
        self.tokens += 1;
        if self.tokens >= GRAM && !self.seen.insert(self.window) {
            self.repeated += 1;
        }
    }

    /// The share in [0, 1]; 0 for replies of fewer than four tokens.
    pub(crate) fn share(&self) -> f32 {
        let grams = (self.tokens + 1).saturating_sub(GRAM);
        if grams == 0 {
            0.0
        } else {
            self.repeated as f32 / grams as f32
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(ids: &[u32]) -> f32 {
        let mut repetition = Repetition::default();
        ids.iter().for_each(|&id| repetition.push(id));
        repetition.share()
    }

    #[test]
    fn distinct_tokens_do_not_repeat() {
        assert_eq!(share(&(0..50).collect::<Vec<_>>()), 0.0);
    }

    #[test]
    fn a_loop_of_one_token_repeats_all_but_the_first_gram() {
        assert_eq!(share(&[7; 14]), 10.0 / 11.0);
    }

    #[test]
    fn half_of_a_doubled_text_repeats() {
        // 1..=8 twice: 13 grams, of which the 5 inside the second copy occurred before.
        let ids: Vec<u32> = (1..=8).chain(1..=8).collect();
        assert_eq!(share(&ids), 5.0 / 13.0);
    }

    #[test]
    fn short_replies_do_not_repeat() {
        assert_eq!(share(&[]), 0.0);
        assert_eq!(share(&[1, 1, 1]), 0.0);
    }
}
