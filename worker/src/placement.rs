//! Revisions without restarts: what the control plane placed here is fetched, loaded, warmed and served, and what
//! it took away is retired.
//!
//! ```text
//! Sync ─▶ Placement ─▶ Reconciler ─▶ fetch ─▶ load ─▶ warm ─▶ Catalogue ─▶ Registration
//!      ◀─ WorkerReport ◀─ Board ◀──────┴────────┴───────┘
//! ```
//!
//! What the command line names is served whatever the placement says; of such a revision a placement changes the
//! watched words alone.

mod board;
mod bring_up;
mod cache;
mod link;
mod reconciler;

pub(crate) use board::{Board, RevisionName};
pub(crate) use link::Link;
pub(crate) use reconciler::Reconciler;

/// An error and its causes, for a report.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
