//! The tokens, as bytes, in the shape that automata walk.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc};

use llguidance::{
    ParserFactory,
    toktrie::{TokEnv, TokRxInfo, TokTrie, TokenizerEnv},
};

use crate::error::VocabularyError;

/// Ids take 24 bits of a trie's node, one value of which means "none".
const MOST_TOKENS: usize = 0xff_fffe;
/// Longer tokens would overrun the stack of toktrie's walk (300 states); they are never allowed.
const LONGEST_TOKEN: usize = 255;

/// Bytes of every token, once per tokenizer and shared by all of its grammars.
///
/// Building one takes a tenth of a second or more for a large vocabulary: do it where a model is loaded.
pub struct Vocabulary {
    factory: ParserFactory,
    end_of_sequence: Vec<u32>,
    len: usize,
    forces_text: bool,
}

/// Cuts a text into tokens as the model's tokenizer does, without special tokens.
type Tokenize = Box<dyn Fn(&str) -> Vec<u32> + Send + Sync>;

struct Tokens {
    trie: TokTrie,
    tokenize: Option<Tokenize>,
}

// === impl Vocabulary ===

impl Vocabulary {
    /// A vocabulary whose token `id` stands for the bytes `tokens[id]`; tokens without bytes are never allowed.
    ///
    /// `special` tokens (`end_of_sequence` among them, whether listed or not) are markup: no text that a grammar
    /// allows is ever spelled with them. `end_of_sequence` tokens end a reply where the grammar may end.
    ///
    /// # Errors
    /// No tokens or too many, ids outside the vocabulary, no `end_of_sequence`.
    pub fn new(
        tokens: Vec<Vec<u8>>,
        special: &[u32],
        end_of_sequence: &[u32],
    ) -> Result<Arc<Self>, VocabularyError> {
        Self::build(tokens, special, end_of_sequence, None)
    }

    /// As [`Vocabulary::new`], with the tokenizer itself. Text that a grammar leaves no choice about is then
    /// forced in the tokens that the model saw in training, several at once; without it, only tokens that have
    /// no alternative are forced.
    ///
    /// # Errors
    /// As [`Vocabulary::new`].
    pub fn with_tokenizer(
        tokens: Vec<Vec<u8>>,
        special: &[u32],
        end_of_sequence: &[u32],
        tokenize: impl Fn(&str) -> Vec<u32> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, VocabularyError> {
        Self::build(tokens, special, end_of_sequence, Some(Box::new(tokenize)))
    }

    fn build(
        mut tokens: Vec<Vec<u8>>,
        special: &[u32],
        end_of_sequence: &[u32],
        tokenize: Option<Tokenize>,
    ) -> Result<Arc<Self>, VocabularyError> {
        let len = tokens.len();
        if !(1..=MOST_TOKENS).contains(&len) {
            return Err(VocabularyError::Size {
                tokens: len,
                limit: MOST_TOKENS,
            });
        }
        let &[first_end, ..] = end_of_sequence else {
            return Err(VocabularyError::NoEndOfSequence);
        };
        let roles = [("special", special), ("end-of-sequence", end_of_sequence)];
        for (role, &id) in roles
            .iter()
            .flat_map(|(role, ids)| ids.iter().map(move |id| (*role, id)))
        {
            if id as usize >= len {
                return Err(VocabularyError::Outside {
                    role,
                    id,
                    tokens: len,
                });
            }
        }
        for token in tokens.iter_mut().filter(|token| token.len() > LONGEST_TOKEN) {
            token.clear();
        }
        let mut markup: Vec<u32> = special.iter().chain(end_of_sequence).copied().collect();
        markup.sort_unstable();
        markup.dedup();
        for id in markup {
            // No UTF-8 text holds this byte, so no text is spelled with the token.
            tokens[id as usize].insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
        let forces_text = tokenize.is_some();
        let built = std::panic::catch_unwind(AssertUnwindSafe(|| -> Result<_, String> {
            let info = TokRxInfo::new(len as u32, first_end);
            let trie = TokTrie::from(&info, &tokens).with_eos_tokens(end_of_sequence);
            let env: TokEnv = Arc::new(Tokens { trie, tokenize });
            let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
            factory.quiet();
            Ok(factory)
        }));
        let message = match built {
            Ok(Ok(factory)) => {
                return Ok(Arc::new(Self {
                    factory,
                    end_of_sequence: end_of_sequence.to_vec(),
                    len,
                    forces_text,
                }));
            }
            Ok(Err(message)) => message,
            Err(_) => "the trie's builder panicked".to_owned(),
        };
        Err(VocabularyError::Internal { message })
    }

    /// Tokens in the vocabulary, special ones included: the length of its masks.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a vocabulary has at least one token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tokens that end a reply.
    pub fn end_of_sequence(&self) -> &[u32] {
        &self.end_of_sequence
    }

    /// Whether forced text comes in the tokenizer's own tokens.
    pub(crate) fn forces_text(&self) -> bool {
        self.forces_text
    }

    pub(crate) fn factory(&self) -> &ParserFactory {
        &self.factory
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("len", &self.len)
            .field("end_of_sequence", &self.end_of_sequence)
            .finish_non_exhaustive()
    }
}

// === impl Tokens ===

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        if let Some(tokenize) = &self.tokenize {
            let tokens = self.trie.tokenize_with_greedy_fallback(bytes, tokenize);
            // A tokenizer that prepends a space, or that takes a text for markup, spells another text.
            if tokens.iter().flat_map(|&token| self.trie.token(token)).eq(bytes) {
                return tokens;
            }
        }
        self.trie.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.tokenize.is_some()
    }
}
