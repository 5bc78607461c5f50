//! The worker over real gRPC, with the fake runner, and once with the real one.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on panics, in its helpers too"
)]

mod demo;
mod generate;
mod harness;
mod lifecycle;
mod placement;
mod plane;
mod registration;
