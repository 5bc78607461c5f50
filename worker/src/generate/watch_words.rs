//! Words that operators watch for, counted in replies.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, BuildError};

/// Words to count, compiled once for all replies.
#[derive(Debug, Default)]
pub(crate) struct WatchWords {
    /// In lower case; `None` without a word.
    matcher: Option<AhoCorasick>,
    /// Bytes of the longest word.
    longest: usize,
}

/// Counts in one reply whose text comes in pieces.
#[derive(Debug)]
pub(crate) struct WatchCounter {
    words: Arc<WatchWords>,
    /// The end of the text so far, in lower case: long enough for a word and the character before it.
    window: String,
    /// Matches that end before this byte of the window are judged.
    judged: usize,
    hits: u32,
}

// === impl WatchWords ===

impl WatchWords {
    /// Compiles `words`; case does not matter, and neither do empty and repeated ones.
    pub(crate) fn new(words: &[String]) -> Result<Self, BuildError> {
        let mut lower: Vec<String> = words.iter().map(|word| lower_case(word.trim())).collect();
        lower.retain(|word| !word.is_empty());
        lower.sort_unstable();
        lower.dedup();
        if lower.is_empty() {
            return Ok(Self::default());
        }
        Ok(Self {
            matcher: Some(AhoCorasick::new(&lower)?),
            longest: lower.iter().map(String::len).max().unwrap_or(0),
        })
    }

    /// How often whole words end within `ends` of `text`.
    fn count(&self, text: &str, ends: std::ops::RangeInclusive<usize>) -> u32 {
        let Some(matcher) = &self.matcher else { return 0 };
        let found = matcher.find_overlapping_iter(text);
        let whole =
            found.filter(|found| ends.contains(&found.end()) && is_whole(text, found.start(), found.end()));
        u32::try_from(whole.count()).unwrap_or(u32::MAX)
    }
}

// === impl WatchCounter ===

impl WatchCounter {
    pub(crate) fn new(words: Arc<WatchWords>) -> Self {
        Self {
            words,
            window: String::new(),
            judged: 0,
            hits: 0,
        }
    }

    /// The reply goes on with `text`.
    pub(crate) fn push(&mut self, text: &str) {
        if self.words.matcher.is_none() || text.is_empty() {
            return;
        }
        self.window.push_str(&lower_case(text));
        // A word at the very end may go on with the next piece.
        let end = self.window.len();
        self.hits += self.words.count(&self.window, self.judged..=end - 1);
        let keep = self.words.longest + char::MAX.len_utf8();
        let mut cut = end.saturating_sub(keep);
        while !self.window.is_char_boundary(cut) {
            cut -= 1;
        }
        self.window.drain(..cut);
        self.judged = end - cut;
    }

    /// Hits in the reply if it ends here.
    pub(crate) fn hits(&self) -> u32 {
        let end = self.window.len();
        match end {
            0 => self.hits,
            _ => self.hits + self.words.count(&self.window, self.judged.max(1)..=end),
        }
    }
}

/// Character by character, so that the pieces of a text make no difference. (A Greek sigma at the end of a word
/// becomes a medial one.)
fn lower_case(text: &str) -> String {
    text.chars().flat_map(char::to_lowercase).collect()
}

/// A match is none where it goes on as a word on either side: `art` is not in `start`.
fn is_whole(text: &str, start: usize, end: usize) -> bool {
    let joined = |left: Option<char>, right: Option<char>| match (left, right) {
        (Some(left), Some(right)) => is_spaced(left) && is_spaced(right),
        _ => false,
    };
    let word = &text[start..end];
    !joined(text[..start].chars().next_back(), word.chars().next())
        && !joined(word.chars().next_back(), text[end..].chars().next())
}

/// A letter or digit of a script that puts spaces between its words. (Chinese, Japanese and Thai put none, so that
/// their words are found wherever they stand.)
fn is_spaced(character: char) -> bool {
    let unspaced = matches!(u32::from(character),
        0x0E00..=0x0EFF | 0x1000..=0x109F | 0x1780..=0x17FF | 0x3040..=0x30FF | 0x3400..=0x9FFF
        | 0xF900..=0xFAFF | 0x20000..=0x3FFFF);
    character.is_alphanumeric() && !unspaced
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(words: &[&str]) -> Arc<WatchWords> {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        Arc::new(WatchWords::new(&words).unwrap())
    }

    fn hits(list: &[&str], pieces: &[&str]) -> u32 {
        let mut counter = WatchCounter::new(words(list));
        pieces.iter().for_each(|piece| counter.push(piece));
        counter.hits()
    }

    #[test]
    fn whole_words_are_counted_whatever_their_case() {
        assert_eq!(
            hits(&["refund"], &["Refund! No REFUND, but refunds and prerefund."]),
            2
        );
        assert_eq!(hits(&["art"], &["start artful art"]), 1);
        assert_eq!(hits(&["sorry", "i can't"], &["I'm sorry, I can't. I can'ts."]), 2);
        assert_eq!(hits(&["straße"], &["Die STRASSE, die Straße"]), 1);
    }

    #[test]
    fn marks_are_found_anywhere_and_so_are_words_of_scripts_without_spaces() {
        assert_eq!(hits(&["<|im_end|>", "??"], &["a<|im_end|>b??c???"]), 4);
        assert_eq!(hits(&["退款"], &["我要退款吗?退款"]), 2);
    }

    #[test]
    fn a_word_may_lie_across_pieces_and_a_piece_may_end_in_its_middle() {
        assert_eq!(hits(&["refund"], &["a re", "fu", "nd", " is due"]), 1);
        assert_eq!(hits(&["refund"], &["refund", "s are due"]), 0);
        assert_eq!(hits(&["refund"], &["pre", "refund", ""]), 0);
        assert_eq!(hits(&["refund"], &["", "refund"]), 1);
    }

    #[test]
    fn nothing_is_found_without_words() {
        assert_eq!(hits(&[], &["anything"]), 0);
        assert_eq!(hits(&["", "  "], &["anything", " "]), 0);
    }

    proptest! {
        #[test]
        fn the_pieces_make_no_difference(
            text in "[abAB .é款]{0,40}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let list = ["ab", "a", "b.", "款", "ba b"];
            let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
            at.sort_unstable();
            at.push(text.len());
            let mut from = 0;
            let pieces: Vec<&str> = at.iter().map(|&to| &text[std::mem::replace(&mut from, to)..to]).collect();
            // One whole word after the other, looked for by hand.
            let lower = text.to_lowercase();
            let mut expected = 0;
            for word in list {
                for (start, _) in lower.char_indices() {
                    if lower[start..].starts_with(word) && is_whole(&lower, start, start + word.len()) {
                        expected += 1;
                    }
                }
            }
            prop_assert_eq!(hits(&list, &pieces), expected);
        }
    }
}
