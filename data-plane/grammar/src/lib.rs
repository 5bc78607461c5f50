//! Constrained decoding: a grammar and a vocabulary become, at each step, the set of tokens that may come next.
//!
//! ```text
//! Grammar ──GrammarCompiler (own threads, time limit, cache)──▶ Arc<CompiledGrammar> ──matcher()──▶ Matcher
//!    ▲                                                                                   │  ▲
//!    └ checked first: what is not supported is refused by name            mask, forced ◀─┘  └─ commit, rollback
//! ```
//!
//! The automata are llguidance's. What this crate adds is what a server needs around them: a schema's keyword
//! is enforced or refused with its JSON pointer, never ignored; a grammar that allows nothing, or nothing
//! that ends, is refused; nothing that a caller sends can panic, take a thread for long, or fill the memory;
//! and one sequence that exhausts an automaton does not spoil it for the others.
//!
//! It refuses to know about logits' owners, tokenizer files and models: a [`Vocabulary`] is byte strings, a
//! [`TokenMask`] is bits. It never compiles on the caller's thread, and it does no I/O.
//!
//! ```
//! use penstock_grammar::{Config, Grammar, GrammarCompiler, Vocabulary};
//!
//! // The 256 bytes, and token 256 that ends a reply.
//! let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
//! tokens.push(b"<eos>".to_vec());
//! let vocabulary = Vocabulary::new(tokens, &[256], &[256]).expect("it is well formed");
//! let compiler = GrammarCompiler::new(vocabulary, Config::default());
//!
//! let yes_or_no = compiler.compile(&Grammar::Regex("yes|no".into())).expect("it is a regex");
//! let mut matcher = yes_or_no.matcher();
//! let mask = matcher.mask().expect("nothing has failed");
//! assert!(mask.allows(u32::from(b'y')) && mask.allows(u32::from(b'n')));
//! assert_eq!(mask.count(), 2);
//! matcher.commit(u32::from(b'n')).expect("the mask allows it");
//! assert_eq!(matcher.forced().expect("nothing has failed"), [u32::from(b'o')]);
//! ```

mod cache;
mod compiled;
mod compiler;
mod error;
mod grammar;
mod language;
mod lark;
mod mask;
mod matcher;
mod regex;
mod schema;
mod vocabulary;
mod workers;

pub use compiled::CompiledGrammar;
pub use compiler::{Config, GrammarCompiler};
pub use error::{GrammarError, MatcherError, VocabularyError};
pub use grammar::Grammar;
pub use mask::TokenMask;
pub use matcher::Matcher;
pub use vocabulary::Vocabulary;
