//! What can be wrong with a grammar, a vocabulary, or a token.

use std::time::Duration;

/// Why a grammar cannot be compiled.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// The grammar's text is longer than the limit.
    #[error("the grammar has {bytes} bytes, {limit} are allowed: send a smaller one")]
    TooLarge {
        /// Bytes of text sent.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The schema is not JSON, or nested too deeply.
    #[error("the schema is not JSON: {message}")]
    NotJson {
        /// What the parser said, with line and column.
        message: String,
    },
    /// A keyword, or one value of it, that cannot be enforced.
    #[error("schema keyword {keyword:?} at {pointer} is not supported: {remedy}")]
    Unsupported {
        /// The keyword.
        keyword: String,
        /// JSON pointer to its value.
        pointer: String,
        /// Why, or what to write instead.
        remedy: String,
    },
    /// A keyword whose value is not what JSON Schema allows there.
    #[error("schema keyword {keyword:?} at {pointer} is wrong: {message}")]
    InvalidKeyword {
        /// The keyword.
        keyword: String,
        /// JSON pointer to its value.
        pointer: String,
        /// What is wrong.
        message: String,
    },
    /// A schema that is neither an object nor a boolean.
    #[error("the schema at {pointer:?} must be an object or a boolean")]
    NotASchema {
        /// JSON pointer to it; empty for the root.
        pointer: String,
    },
    /// A regular expression that is not one, or that uses what an automaton cannot do.
    #[error("regular expression{}: {message}", at(pointer.as_deref()))]
    Regex {
        /// JSON pointer to it, where it is a schema's.
        pointer: Option<String>,
        /// What is wrong, and where.
        message: String,
    },
    /// A Lark grammar that does not parse, or that uses what is not supported.
    #[error("the Lark grammar is wrong: {message}")]
    Lark {
        /// What the compiler said, with the line.
        message: String,
    },
    /// No text at all satisfies the grammar.
    #[error("nothing satisfies the grammar: {reason}")]
    Empty {
        /// Which part contradicts itself.
        reason: String,
    },
    /// Something in the grammar can be begun but never ended.
    #[error("the grammar cannot end: {symbol} needs itself without a way out; give it an alternative")]
    Endless {
        /// The rule, or the JSON pointer of the definition.
        symbol: String,
    },
    /// An automaton would be larger than the limits.
    #[error("the grammar is too complex: {message}; shorten its repetitions or its alternatives")]
    TooComplex {
        /// Which limit.
        message: String,
    },
    /// What the schema asks for cannot be made an automaton.
    #[error("the schema cannot be enforced: {message}")]
    Schema {
        /// What the compiler said.
        message: String,
    },
    /// Compiling took longer than the limit.
    #[error("the grammar took longer than {} ms to compile: simplify it", limit.as_millis())]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// Every compiling thread is busy and the queue is full.
    #[error("{waiting} grammars wait to be compiled already: try again later")]
    Busy {
        /// Length of the queue.
        waiting: usize,
    },
    /// A fault in the compiler, caught here.
    #[error("compiling the grammar failed inside: {message}")]
    Internal {
        /// What is known of it.
        message: String,
    },
}

fn at(pointer: Option<&str>) -> String {
    pointer
        .map(|pointer| format!(" at {pointer}"))
        .unwrap_or_default()
}

// === impl GrammarError ===

impl GrammarError {
    /// Whether the same grammar may succeed later; the others are the caller's fault.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }

    /// Whether the fault is the server's, not the grammar's.
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::Internal { .. })
    }
}

/// Why a matcher cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MatcherError {
    /// The grammar does not allow this token here; the matcher is as it was.
    #[error("the grammar does not allow token {token} after {committed} tokens")]
    NotAllowed {
        /// The token.
        token: u32,
        /// Tokens committed before it.
        committed: usize,
    },
    /// More tokens to take back than were committed; the matcher is as it was.
    #[error("cannot take back {asked} tokens, {committed} were committed")]
    TooFarBack {
        /// Tokens to take back.
        asked: usize,
        /// Tokens committed.
        committed: usize,
    },
    /// No token can follow, for want of tokens that spell what the grammar asks for; the matcher is of no more
    /// use.
    #[error("no token of the vocabulary can follow after {committed} tokens")]
    DeadEnd {
        /// Tokens committed.
        committed: usize,
    },
    /// The next mask costs more than the limits allow; the matcher is of no more use.
    #[error("the grammar became too complex after {committed} tokens: {message}")]
    TooComplex {
        /// Tokens committed.
        committed: usize,
        /// Which limit.
        message: String,
    },
    /// A fault in the automaton; the matcher is of no more use.
    #[error("the grammar's automaton failed after {committed} tokens: {message}")]
    Failed {
        /// Tokens committed.
        committed: usize,
        /// What is known of it.
        message: String,
    },
}

/// Why a vocabulary cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VocabularyError {
    /// No tokens, or more than an automaton can number.
    #[error("a vocabulary of {tokens} tokens cannot be used: 1 to {limit} can")]
    Size {
        /// Tokens given.
        tokens: usize,
        /// Most tokens.
        limit: usize,
    },
    /// A special token that is not in the vocabulary.
    #[error("{role} token {id} is outside the vocabulary of {tokens} tokens")]
    Outside {
        /// `special` or `end-of-sequence`.
        role: &'static str,
        /// The id.
        id: u32,
        /// Tokens in the vocabulary.
        tokens: usize,
    },
    /// Nothing could end a reply.
    #[error("the vocabulary names no end-of-sequence token: give at least one id")]
    NoEndOfSequence,
    /// A fault in building the trie, caught here.
    #[error("building the vocabulary failed inside: {message}")]
    Internal {
        /// What is known of it.
        message: String,
    },
}
