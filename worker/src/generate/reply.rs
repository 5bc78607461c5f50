//! Tokens to chunks: text, stop strings, log-probabilities, usage.

use std::{sync::Arc, time::Instant};

use penstock_engine::{FinishReason, Token};
use penstock_proto::v1::{self, GenerateResponse, generate_response::StoppedBy};
use penstock_text::{Detokenizer, StopStrings, Tokenizer};

use super::{
    repetition::Repetition,
    watch_words::{WatchCounter, WatchWords},
};

/// Assembles one reply. Tokens are pushed as they come; [`Reply::take_chunk`] takes what is ready.
#[derive(Debug)]
pub(crate) struct Reply {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    stop_token_ids: Vec<u32>,
    logprobs: bool,
    /// Tokens before which no stop string counts.
    min_tokens: u32,
    /// What was not taken yet.
    chunk: GenerateResponse,
    /// Bytes of text in chunks that were taken.
    text_taken: u64,
    completion_tokens: u32,
    repetition: Repetition,
    watched: WatchCounter,
}

/// Why a reply cannot be gone on with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ResumeError {
    #[error("ends at a stop string with the token at {index}: there is nothing to go on with")]
    Over { index: usize },
    #[error("is {offset}, which is no boundary of a character in the {bytes} bytes that the tokens make")]
    Offset { offset: u64, bytes: usize },
}

impl Reply {
    /// An empty reply. Tokens of `stop_token_ids` end it and have no text.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        stop: Vec<String>,
        stop_token_ids: Vec<u32>,
        logprobs: bool,
    ) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer.clone(), true),
            tokenizer,
            stops: StopStrings::new(stop),
            stop_token_ids,
            logprobs,
            min_tokens: 0,
            chunk: GenerateResponse::default(),
            text_taken: 0,
            completion_tokens: 0,
            repetition: Repetition::default(),
            watched: WatchCounter::new(Arc::default()),
        }
    }

    /// Counts these words in the completion.
    pub(crate) fn watch(&mut self, words: Arc<WatchWords>) {
        self.watched = WatchCounter::new(words);
    }

    /// Stop strings that are complete before so many tokens do not count.
    pub(crate) fn at_least(&mut self, min_tokens: usize) {
        self.min_tokens = u32::try_from(min_tokens).unwrap_or(u32::MAX);
    }

    /// The prompt comes back as the first chunk; it is no part of the completion.
    pub(crate) fn echo(&mut self, ids: &[u32], text: &str) {
        self.chunk.token_ids.extend_from_slice(ids);
        self.chunk.text.push_str(text);
    }

    /// Tokens of the prompt come back with their log-probabilities.
    pub(crate) fn echo_tokens(&mut self, tokens: &[Token]) {
        for token in tokens {
            self.chunk.token_ids.push(token.id);
            let logprob = logprob(&self.tokenizer, token);
            self.chunk.logprobs.push(logprob);
        }
    }

    /// Takes the tokens that another worker generated. The client has them, and `text_offset` bytes of text.
    pub(crate) fn resume(&mut self, ids: &[u32], text_offset: u64) -> Result<(), ResumeError> {
        for (index, &id) in ids.iter().enumerate() {
            let token = Token {
                id,
                at: Instant::now(),
                logprob: None,
                top: Vec::new(),
            };
            if self.push(&token).is_some() {
                return Err(ResumeError::Over { index });
            }
        }
        let text = std::mem::take(&mut self.chunk).text;
        let rest = usize::try_from(text_offset)
            .ok()
            .and_then(|offset| text.get(offset..));
        self.chunk.text = rest
            .ok_or(ResumeError::Offset {
                offset: text_offset,
                bytes: text.len(),
            })?
            .to_owned();
        self.text_taken = text_offset;
        Ok(())
    }

    /// Takes the next token. Gives the stop string that it completes: then the reply is over, and later
    /// tokens, which the engine may have generated already, are no part of it.
    pub(crate) fn push(&mut self, token: &Token) -> Option<String> {
        self.completion_tokens += 1;
        self.repetition.push(token.id);
        self.chunk.token_ids.push(token.id);
        if self.logprobs {
            let logprob = logprob(&self.tokenizer, token);
            self.chunk.logprobs.push(logprob);
        }
        if self.stop_token_ids.contains(&token.id) {
            return None;
        }
        let text = self.detokenizer.push(token.id);
        if self.completion_tokens <= self.min_tokens {
            self.add_text(&text);
            return None;
        }
        let out = self.stops.push(&text);
        self.add_text(&out.text);
        out.matched
    }

    /// What is ready to be sent, if anything.
    pub(crate) fn take_chunk(&mut self) -> Option<GenerateResponse> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.token_ids.is_empty() && chunk.text.is_empty() {
            return None;
        }
        Some(self.placed(chunk))
    }

    /// The last chunk of a reply that a stop string ended.
    pub(crate) fn stopped(&mut self, stop: String, usage: v1::Usage) -> GenerateResponse {
        self.last(v1::FinishReason::Stop, Some(StoppedBy::StopString(stop)), usage)
    }

    /// The last chunk of a reply that the engine ended, with the text that was held back. That text may
    /// still complete a stop string.
    pub(crate) fn finished(&mut self, reason: FinishReason, usage: v1::Usage) -> GenerateResponse {
        let rest = self.detokenizer.finish();
        let out = self.stops.push(&rest);
        self.add_text(&out.text);
        if let Some(stop) = out.matched {
            return self.stopped(stop, usage);
        }
        let held = self.stops.finish();
        self.add_text(&held);
        match reason {
            FinishReason::StopToken(id) => {
                self.last(v1::FinishReason::Stop, Some(StoppedBy::StopTokenId(id)), usage)
            }
            FinishReason::Grammar => self.last(v1::FinishReason::Stop, None, usage),
            FinishReason::Length => self.last(v1::FinishReason::Length, None, usage),
        }
    }

    /// Tokens that the reply is billed for.
    pub(crate) fn completion_tokens(&self) -> u32 {
        self.completion_tokens
    }

    /// How often a watched word occurs in the completion.
    pub(crate) fn watch_word_hits(&self) -> u32 {
        self.watched.hits()
    }

    fn add_text(&mut self, text: &str) {
        self.watched.push(text);
        self.chunk.text.push_str(text);
    }

    /// Share of the reply's token 4-grams that occurred before in it.
    pub(crate) fn repetition(&self) -> f32 {
        self.repetition.share()
    }

    fn last(
        &mut self,
        reason: v1::FinishReason,
        stopped_by: Option<StoppedBy>,
        usage: v1::Usage,
    ) -> GenerateResponse {
        let chunk = std::mem::take(&mut self.chunk);
        let usage = v1::Usage {
            completion_tokens: self.completion_tokens,
            ..usage
        };
        GenerateResponse {
            finish_reason: reason.into(),
            stopped_by,
            usage: Some(usage),
            ..self.placed(chunk)
        }
    }

    fn placed(&mut self, mut chunk: GenerateResponse) -> GenerateResponse {
        chunk.text_offset = self.text_taken;
        self.text_taken += chunk.text.len() as u64;
        chunk
    }
}

fn logprob(tokenizer: &Tokenizer, token: &Token) -> v1::TokenLogprob {
    let bytes = |id| tokenizer.token_bytes_with_special(id).to_vec().into();
    let top = |&(id, logprob): &(u32, f32)| v1::TopLogprob {
        token_id: id,
        logprob,
        bytes: bytes(id),
    };
    v1::TokenLogprob {
        token_id: token.id,
        logprob: token.logprob.unwrap_or(f32::NAN),
        bytes: bytes(token.id),
        top: token.top.iter().map(top).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(id: u32) -> Token {
        Token {
            id,
            at: Instant::now(),
            logprob: Some(-0.5),
            top: vec![(id, -0.5)],
        }
    }

    fn reply(stop: &[&str]) -> Reply {
        let stop = stop.iter().map(|text| text.to_string()).collect();
        Reply::new(Arc::new(Tokenizer::bytes()), stop, vec![0], false)
    }

    /// Feeds bytes as tokens, taking a chunk after each where `take` says so.
    fn run(mut reply: Reply, bytes: &[u8], mut take: impl FnMut() -> bool) -> Vec<GenerateResponse> {
        let mut chunks = Vec::new();
        for &byte in bytes {
            if let Some(stop) = reply.push(&token(byte.into())) {
                chunks.push(reply.stopped(stop, v1::Usage::default()));
                return chunks;
            }
            if take() {
                chunks.extend(reply.take_chunk());
            }
        }
        chunks.push(reply.finished(FinishReason::Length, v1::Usage::default()));
        chunks
    }

    fn text(chunks: &[GenerateResponse]) -> String {
        chunks.iter().map(|chunk| chunk.text.as_str()).collect()
    }

    proptest! {
        #[test]
        fn offsets_and_text_do_not_depend_on_the_chunks(
            bytes in prop::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(0xE5u8), Just(0x9C), Just(0xB0)], 0..30),
            takes in prop::collection::vec(any::<bool>(), 30),
        ) {
            let whole = run(reply(&["abba"]), &bytes, || false);
            let mut takes = takes.into_iter();
            let chunks = run(reply(&["abba"]), &bytes, || takes.next().unwrap_or(false));
            prop_assert_eq!(text(&chunks), text(&whole));
            let mut offset = 0;
            for chunk in &chunks {
                prop_assert_eq!(chunk.text_offset, offset);
                offset += chunk.text.len() as u64;
            }
            let last = chunks.last().unwrap();
            prop_assert_eq!(&last.stopped_by, &whole[0].stopped_by);
            prop_assert_eq!(last.usage.unwrap().completion_tokens as usize, chunks.iter().map(|c| c.token_ids.len()).sum::<usize>());
        }
    }

    proptest! {
        #[test]
        fn what_is_resumed_anywhere_ends_the_same(
            bytes in prop::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(0xE5u8), Just(0x9C), Just(0xB0)], 1..30),
            cut in 0usize..30,
        ) {
            let whole = run(reply(&["abba"]), &bytes, || true);
            let ids = |chunks: &[GenerateResponse]| -> Vec<u32> {
                chunks.iter().flat_map(|chunk| chunk.token_ids.clone()).collect()
            };
            // The client has all chunks but the last ones.
            let had = &whole[..cut.min(whole.len() - 1)];
            let mut resumed = reply(&["abba"]);
            prop_assert_eq!(resumed.resume(&ids(had), text(had).len() as u64), Ok(()));
            let rest = run(resumed, &bytes[ids(had).len()..], || true);
            prop_assert_eq!(text(had) + &text(&rest), text(&whole));
            prop_assert_eq!([ids(had), ids(&rest)].concat(), ids(&whole));
            let (last, end) = (rest.last().unwrap(), whole.last().unwrap());
            prop_assert_eq!(last.usage.unwrap().completion_tokens, end.usage.unwrap().completion_tokens);
            prop_assert_eq!(&last.stopped_by, &end.stopped_by);
        }
    }

    #[test]
    fn an_offset_that_the_text_does_not_have_is_refused() {
        let bytes = 3;
        for offset in [1, 4, u64::MAX] {
            let resumed = reply(&[]).resume(&[0xE5, 0x9C, 0xB0], offset);
            assert_eq!(resumed, Err(ResumeError::Offset { offset, bytes }));
        }
        let resumed = reply(&["a"]).resume(&[97, 97], 0);
        assert_eq!(resumed, Err(ResumeError::Over { index: 0 }));
    }

    #[test]
    fn tokens_after_a_stop_string_are_not_billed() {
        let chunks = run(reply(&["END"]), b"okEND late", || false);
        assert_eq!(text(&chunks), "ok");
        let last = chunks.last().unwrap();
        assert_eq!(last.token_ids, b"okEND".map(u32::from));
        assert_eq!(last.usage.unwrap().completion_tokens, 5);
        assert_eq!(last.finish_reason(), v1::FinishReason::Stop);
        assert_eq!(last.stopped_by, Some(StoppedBy::StopString("END".into())));
    }

    #[test]
    fn stop_strings_do_not_count_too_early() {
        let mut reply = reply(&["b"]);
        reply.at_least(3);
        let stops: Vec<bool> = b"abcbd"
            .iter()
            .map(|&byte| reply.push(&token(byte.into())).is_some())
            .collect();
        assert_eq!(stops[..4], [false, false, false, true]);
        assert_eq!(reply.take_chunk().unwrap().text, "abc");
    }

    #[test]
    fn a_stop_token_is_told_and_has_no_text() {
        let mut reply = reply(&[]);
        assert_eq!(reply.push(&token(b'a'.into())), None);
        assert_eq!(reply.push(&token(0)), None);
        let last = reply.finished(FinishReason::StopToken(0), v1::Usage::default());
        assert_eq!(
            (last.text.as_str(), last.token_ids.as_slice()),
            ("a", &[97, 0][..])
        );
        assert_eq!(last.stopped_by, Some(StoppedBy::StopTokenId(0)));
    }

    #[test]
    fn held_text_leaves_at_the_end() {
        let chunks = run(reply(&["stop"]), b"a sto", || true);
        assert_eq!(text(&chunks), "a sto");
        assert_eq!(chunks.last().unwrap().text, "sto");
    }

    #[test]
    fn an_echoed_prompt_comes_first_and_is_not_billed() {
        let mut reply = reply(&[]);
        reply.echo(&[1, 2], "hé");
        let first = reply.take_chunk().unwrap();
        assert_eq!((first.token_ids.len(), first.text_offset), (2, 0));
        reply.push(&token(b'x'.into()));
        let last = reply.finished(FinishReason::Length, v1::Usage::default());
        assert_eq!((last.text_offset, last.usage.unwrap().completion_tokens), (3, 1));
    }

    #[test]
    fn watched_words_count_in_the_completion_alone_and_not_behind_a_stop() {
        let mut reply = reply(&["END"]);
        reply.watch(Arc::new(WatchWords::new(&["foo".into()]).unwrap()));
        reply.echo(&[1], "foo ");
        for byte in b"a foo, foo" {
            reply.push(&token((*byte).into()));
        }
        assert_eq!(reply.watch_word_hits(), 2);
        for byte in b"d END foo" {
            if reply.push(&token((*byte).into())).is_some() {
                break;
            }
        }
        assert_eq!(reply.watch_word_hits(), 1);
    }

    #[test]
    fn each_token_has_its_logprob_and_bytes() {
        let mut reply = Reply::new(Arc::new(Tokenizer::bytes()), vec![], vec![], true);
        reply.push(&token(0xE5));
        let chunk = reply.take_chunk().unwrap();
        assert_eq!(chunk.text, "");
        assert_eq!(chunk.logprobs.len(), 1);
        assert_eq!(chunk.logprobs[0].bytes.as_ref(), [0xE5]);
        assert_eq!(chunk.logprobs[0].top[0].logprob, -0.5);
    }
}
