//! Vocabularies, a source of chance, and walks through a grammar.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, LazyLock},
};

use penstock_grammar::{CompiledGrammar, Config, GrammarCompiler, Matcher, Vocabulary};
use tokenizers::Tokenizer;

/// Ends a reply of the byte vocabulary.
pub(crate) const EOS: u32 = 256;

/// The 256 bytes and [`EOS`].
pub(crate) fn bytes() -> Arc<Vocabulary> {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.push(b"<|end|>".to_vec());
    Vocabulary::new(tokens, &[EOS], &[EOS]).unwrap()
}

/// The demo model's tokenizer: byte-level BPE.
pub(crate) struct Demo {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) tokens: Vec<Vec<u8>>,
    pub(crate) special: Vec<u32>,
    pub(crate) eos: u32,
}

pub(crate) static DEMO: LazyLock<Demo> = LazyLock::new(Demo::load);

impl Demo {
    fn load() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo/v1/tokenizer.json");
        let tokenizer = Tokenizer::from_file(path).unwrap();
        let added = tokenizer.get_added_tokens_decoder();
        let special: Vec<u32> = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        let byte_of = byte_of_char();
        let tokens = (0..tokenizer.get_vocab_size(true) as u32)
            .map(|id| {
                let text = tokenizer.id_to_token(id).unwrap_or_default();
                match added.contains_key(&id) {
                    true => text.into_bytes(),
                    false => text.chars().map(|character| byte_of[&character]).collect(),
                }
            })
            .collect();
        let eos = *special.iter().min().unwrap();
        Self {
            tokenizer,
            tokens,
            special,
            eos,
        }
    }

    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer
            .encode_fast(text, false)
            .unwrap()
            .get_ids()
            .to_vec()
    }

    /// With the tokenizer, so that text is forced in its own tokens.
    pub(crate) fn vocabulary(&self) -> Arc<Vocabulary> {
        let tokenizer = self.tokenizer.clone();
        let tokenize = move |text: &str| tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
        Vocabulary::with_tokenizer(self.tokens.clone(), &self.special, &[self.eos], tokenize).unwrap()
    }

    /// Of the bytes alone.
    pub(crate) fn plain_vocabulary(&self) -> Arc<Vocabulary> {
        Vocabulary::new(self.tokens.clone(), &self.special, &[self.eos]).unwrap()
    }
}

/// GPT-2's table: printable characters stand for their own byte, the others come after U+0100.
fn byte_of_char() -> HashMap<char, u8> {
    let mut next = 256;
    (0..=255_u8)
        .map(|byte| match char::from(byte) {
            same @ ('!'..='~' | '\u{A1}'..='\u{AC}' | '\u{AE}'..='\u{FF}') => (same, byte),
            _ => {
                next += 1;
                (char::from_u32(next - 1).unwrap(), byte)
            }
        })
        .collect()
}

pub(crate) fn compiler(vocabulary: Arc<Vocabulary>) -> GrammarCompiler {
    GrammarCompiler::new(vocabulary, Config::default())
}

/// splitmix64: the same walk for the same seed, everywhere.
#[derive(Clone)]
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// What a walk came to.
pub(crate) struct Walk {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: Vec<u8>,
    pub(crate) has_ended: bool,
}

/// Follows allowed tokens at random until the grammar ends, checking at each step what masks promise. After
/// `patience` tokens it ends wherever it can and prefers what closes.
pub(crate) fn walk(
    compiled: &Arc<CompiledGrammar>,
    tokens: &[Vec<u8>],
    chance: &mut Chance,
    patience: usize,
) -> Walk {
    let mut matcher = compiled.matcher();
    let mut walked = Walk {
        tokens: Vec::new(),
        text: Vec::new(),
        has_ended: false,
    };
    for step in 0..patience * 3 {
        let ends = compiled.vocabulary().end_of_sequence();
        let may_stop = matcher.may_stop();
        let mask = matcher.mask().unwrap().clone();
        assert!(mask.count() > 0);
        assert_eq!(
            ends.iter().any(|&end| mask.allows(end)),
            may_stop,
            "after {:?}",
            walked.text
        );
        let token = choose(
            &shorten_numbers(&walked.text, mask.iter().collect(), tokens),
            tokens,
            ends,
            chance,
            step >= patience,
        );
        matcher.commit(token).unwrap();
        if ends.contains(&token) {
            walked.has_ended = true;
            assert!(matcher.is_stopped());
            break;
        }
        walked.tokens.push(token);
        walked.text.extend(&tokens[token as usize]);
    }
    walked
}

/// Without further digits, where there is another way, once a number has as many as a double holds exactly:
/// the judge computes with doubles.
fn shorten_numbers(text: &[u8], allowed: Vec<u32>, tokens: &[Vec<u8>]) -> Vec<u32> {
    let digits = text.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let before = text.iter().rev().nth(digits);
    let most = if before.is_some_and(|byte| b"eE+".contains(byte)) {
        2
    } else {
        8
    };
    let is_digit = |id: &u32| tokens[*id as usize].first().is_some_and(u8::is_ascii_digit);
    match digits >= most && !allowed.iter().all(is_digit) {
        true => allowed.into_iter().filter(|id| !is_digit(id)).collect(),
        false => allowed,
    }
}

fn choose(allowed: &[u32], tokens: &[Vec<u8>], ends: &[u32], chance: &mut Chance, is_impatient: bool) -> u32 {
    let only = |wanted: &[u8]| -> Vec<u32> {
        let starts = |id: &u32| {
            tokens[*id as usize]
                .first()
                .is_some_and(|byte| wanted.contains(byte))
        };
        allowed.iter().copied().filter(starts).collect()
    };
    if let Some(&end) = allowed.iter().find(|id| ends.contains(id))
        && (is_impatient || chance.one_in(4))
    {
        return end;
    }
    // A uniform choice would nearly never close a string, and would stay in white space.
    let closing = only(b"\"}]");
    if !closing.is_empty() && (is_impatient || chance.one_in(6)) {
        return *chance.pick(&closing);
    }
    let plain: Vec<u32> = match chance.one_in(3) {
        true => allowed.to_vec(),
        false => {
            let is_space = |id: &u32| tokens[*id as usize].first().is_some_and(u8::is_ascii_whitespace);
            allowed.iter().copied().filter(|id| !is_space(id)).collect()
        }
    };
    match plain.is_empty() {
        true => *chance.pick(allowed),
        false => *chance.pick(&plain),
    }
}

/// Whether the grammar takes these tokens, and may end after them.
pub(crate) fn takes(compiled: &Arc<CompiledGrammar>, tokens: &[u32]) -> bool {
    let mut matcher = compiled.matcher();
    tokens.iter().all(|&token| matcher.commit(token).is_ok()) && matcher.may_stop()
}

/// As [`takes`], by masks alone.
pub(crate) fn masks_take(mut matcher: Matcher, tokens: &[u32]) -> bool {
    for &token in tokens {
        if !matcher.mask().unwrap().allows(token) {
            return false;
        }
        matcher.commit(token).unwrap();
    }
    matcher.may_stop()
}
