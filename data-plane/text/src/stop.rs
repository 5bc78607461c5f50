//! Stop strings with hold-back.

/// Finds the first stop string in a text that comes in pieces. Text that might be the beginning of one is
/// held back until it is decided.
///
/// The first stop string to be complete wins; of several complete at the same byte, the longest. So the
/// result is the same for every split of the text.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text not given out yet: the longest end of the text that begins a stop string.
    held: String,
    done: bool,
}

/// What a piece of text gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that is certainly part of the reply.
    pub text: String,
    /// The stop string that ended the reply. Nothing comes after it.
    pub matched: Option<String>,
}

impl StopStrings {
    /// Looks for `stops`; empty ones are left out, since every text contains them.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        // The longest first, so that it wins where several end at the same byte.
        stops.sort_by_key(|stop| std::cmp::Reverse(stop.len()));
        Self {
            stops,
            held: String::new(),
            done: false,
        }
    }

    /// Takes the next piece of text. After a match everything is dropped.
    pub fn push(&mut self, piece: &str) -> StopOutput {
        if self.done {
            return StopOutput {
                text: String::new(),
                matched: None,
            };
        }
        if self.stops.is_empty() {
            return StopOutput {
                text: piece.into(),
                matched: None,
            };
        }
        let searched = self.held.len();
        let mut text = std::mem::take(&mut self.held) + piece;
        if let Some((start, stop)) = self.find(&text, searched) {
            self.done = true;
            text.truncate(start);
            return StopOutput {
                text,
                matched: Some(stop),
            };
        }
        let certain = text.len() - self.undecided(&text);
        self.held = text.split_off(certain);
        StopOutput { text, matched: None }
    }

    /// What was held back, once no more text can come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The first match that ends behind byte `searched`, as its start and the stop string.
    fn find(&self, text: &str, searched: usize) -> Option<(usize, String)> {
        let bytes = text.as_bytes();
        (searched + 1..=bytes.len()).find_map(|end| {
            let stop = self
                .stops
                .iter()
                .find(|stop| bytes[..end].ends_with(stop.as_bytes()))?;
            Some((end - stop.len(), stop.clone()))
        })
    }

    /// Bytes at the end of `text` that may be the beginning of a stop string.
    fn undecided(&self, text: &str) -> usize {
        let longest = |stop: &String| {
            let most = text.len().min(stop.len() - 1);
            (1..=most)
                .rev()
                .find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, read naively: the shortest prefix of `text` that ends with a stop string.
    fn naive(stops: &[String], text: &str) -> (String, Option<String>) {
        for end in 1..=text.len() {
            let ended = stops
                .iter()
                .filter(|stop| text.as_bytes()[..end].ends_with(stop.as_bytes()));
            if let Some(stop) = ended.max_by_key(|stop| stop.len()) {
                return (text[..end - stop.len()].into(), Some(stop.clone()));
            }
        }
        (text.into(), None)
    }

    fn run<'a>(stops: &[String], pieces: impl Iterator<Item = &'a str>) -> (String, Option<String>) {
        let (mut search, mut text, mut matched) = (StopStrings::new(stops.to_vec()), String::new(), None);
        for piece in pieces {
            let out = search.push(piece);
            text += &out.text;
            matched = matched.or(out.matched);
        }
        text += &search.finish();
        (text, matched)
    }

    proptest! {
        /// A small alphabet makes overlaps and near misses common.
        #[test]
        fn every_split_gives_what_the_whole_gives(
            stops in prop::collection::vec("[ab地]{1,4}", 0..4),
            pieces in prop::collection::vec("[ab地]{0,4}", 0..10),
        ) {
            let text = pieces.concat();
            let expected = naive(&stops, &text);
            prop_assert_eq!(run(&stops, std::iter::once(text.as_str())), expected.clone());
            prop_assert_eq!(run(&stops, pieces.iter().map(String::as_str)), expected);
        }

        #[test]
        fn only_a_possible_beginning_is_held(pieces in prop::collection::vec("[ab]{0,4}", 0..10)) {
            let stop = "abba";
            let mut search = StopStrings::new(vec![stop.into()]);
            for piece in &pieces {
                if search.push(piece).matched.is_some() {
                    break;
                }
                prop_assert!(stop.starts_with(search.held.as_str()) && search.held.len() < stop.len());
            }
        }
    }

    #[test]
    fn a_stop_string_across_pieces_is_left_out() {
        let mut search = StopStrings::new(vec!["</s>".into()]);
        assert_eq!(search.push("done<").text, "done");
        assert_eq!(search.push("/s").text, "");
        let out = search.push("> late");
        assert_eq!(
            out,
            StopOutput {
                text: String::new(),
                matched: Some("</s>".into())
            }
        );
        assert_eq!(search.push("later").text, "");
        assert_eq!(search.finish(), "");
    }

    #[test]
    fn a_near_miss_is_given_back() {
        let mut search = StopStrings::new(vec!["abac".into()]);
        assert_eq!(search.push("aba").text, "");
        assert_eq!(
            search.push("bac"),
            StopOutput {
                text: "ab".into(),
                matched: Some("abac".into())
            }
        );
    }
}
