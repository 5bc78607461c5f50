//! Grammars against independent judges: what a matcher lets through, a validator must call valid.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod generate;
mod matchers;
mod random;
mod structures;
mod support;
