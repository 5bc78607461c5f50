//! Text at the edge of the engine: tokenizer, chat template, incremental detokenizer, stop strings.
//!
//! It works on the files of a Hugging Face checkpoint directory and refuses to know models, requests or
//! the network.
//!
//! ```text
//! messages ─▶ ChatTemplate ─▶ text ─▶ Tokenizer ─▶ ids ─▶ (engine) ─▶ id ─▶ Detokenizer ─▶ StopStrings ─▶ text
//! ```
//!
//! Whatever the chunks in which ids arrive, the text that leaves is the same: concatenating every `push`
//! and the final `finish` gives what decoding all bytes at once would give.
//!
//! ```
//! use std::sync::Arc;
//! use penstock_text::{Detokenizer, StopStrings, Tokenizer};
//!
//! let tokenizer = Arc::new(Tokenizer::bytes());
//! let mut detokenizer = Detokenizer::new(tokenizer.clone(), true);
//! let mut stops = StopStrings::new(vec!["END".into()]);
//! let mut reply = String::new();
//! for id in tokenizer.encode("40,075 km — ENDless", false)? {
//!     let out = stops.push(&detokenizer.push(id));
//!     reply.push_str(&out.text);
//!     if out.matched.is_some() {
//!         break;
//!     }
//! }
//! assert_eq!(reply, "40,075 km — ");
//! # Ok::<(), penstock_text::TextError>(())
//! ```

mod chat;
mod detokenizer;
mod error;
mod json;
mod stop;
mod token_bytes;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatTemplate, Message};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use stop::{StopOutput, StopStrings};
pub use tokenizer::Tokenizer;
pub use vocabulary::BpeVocabulary;
