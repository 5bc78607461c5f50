//! What a node knows, and who decides whether it may serve it.

use std::{collections::HashSet, pin::Pin, sync::Arc};

use penstock_plan::{Endpoint, EndpointSet, Snapshot};
use penstock_proto::v1;

/// What the control plane said last and the node took over; it stays while no control plane can be reached.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The routes in force; `None` until the first snapshot is applied.
    pub snapshot: Option<Arc<Snapshot>>,
    /// The workers that can be reached.
    pub endpoints: Arc<EndpointSet>,
    /// Whether a control plane is connected and has said something.
    pub connected: bool,
}

/// A snapshot that has passed every check of its own and may be applied.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The snapshot.
    pub snapshot: &'a Arc<Snapshot>,
    /// The workers that can be reached now.
    pub endpoints: &'a Arc<EndpointSet>,
    /// Ids of the canaries' workers that answered just now. Asked are only the workers of canaries whose route
    /// wants a number of them, and only until so many have answered; without a [`ReachFn`] nobody is.
    pub reached: &'a HashSet<String>,
    /// W3C trace context of the change that caused it: the parent of the span in which it is applied.
    pub traceparent: Option<&'a str>,
}

/// Why a node does not apply a snapshot; goes back to the control plane as a Nack.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Veto {
    /// Machine-readable, e.g. `canary_unreachable`.
    pub code: String,
    /// Path of the field that is to blame, or empty.
    pub field: String,
    /// In words, with the value.
    pub message: String,
}

/// Applies a snapshot or refuses it; called once for each new snapshot, before it is seen in the [`View`] and
/// acknowledged.
///
/// A refused snapshot is offered again whenever the endpoints change, so that a canary whose workers come up a
/// moment later needs no second push. The callback must not block: while it runs, nothing is read.
///
/// It is also where a caller opens its span, with [`Candidate::traceparent`] as the parent.
pub type ApplyFn = Box<dyn FnMut(Candidate<'_>) -> Result<(), Veto> + Send>;

/// A node's counts, whole; called about once a second while there is a stream, and after a snapshot was applied.
/// The number of the report is written by the caller.
pub type StatsFn = Arc<dyn Fn() -> v1::Stats + Send + Sync>;

/// Whether a worker answers; it must not take longer than a few seconds.
pub type ReachFn = Arc<dyn Fn(Endpoint) -> Pin<Box<dyn Future<Output = bool> + Send>> + Send + Sync>;
