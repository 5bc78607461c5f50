//! Trains and scores the bundled demo model: a small Llama that knows a few hundred facts.
//!
//! A development tool. No serving crate depends on it: they read the checkpoints that it writes, which
//! have Hugging Face's layout. It refuses to serve, to train on several devices and to read other models.
//!
//! ```text
//! corpus/*.txt ── corpus ──> facts ── dialogue ──> token batches ── train ──> v1/ v2/ v3/
//!                              │                     ▲                          │
//!                              └──── tokenizer ──────┘            score <───────┘
//! ```

pub mod checkpoint;
pub mod corpus;
pub mod dialogue;
pub mod generate;
pub mod model;
pub mod score;
pub mod tokenizer;
pub mod train;
