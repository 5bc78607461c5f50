//! What a rollout is, who gets which revision, and what happens next: pure functions over plain data.
//!
//! ```text
//! rollouts + published revisions ──route──▶ Snapshot ──assign(request)──▶ revision, reason
//! rollout + inventory ──planner::decide──▶ next phase, or what it waits for
//! ```
//!
//! The gateway, `ctl route test` and the tests call the same [`assign`]. This crate does no I/O, reads no clock
//! and draws no random number: whatever it needs is an argument.
//!
//! ```
//! use penstock_plan::{Attributes, Canary, Ppm, Reason, Revision, Route, assign};
//!
//! let route = Route {
//!     model: "demo".into(),
//!     stable: Revision::new("v1", "aa"),
//!     canary: Some(Canary { revision: Revision::new("v2", "bb"), share: Ppm::ALL, min_ready: 1 }),
//!     rollout_uid: "r-1".into(),
//!     generation: 1,
//!     ..Route::default()
//! };
//! let metadata = |name: &str| (name == "x-user-id").then_some("ada");
//! let assignment = assign(&route, &Attributes::new(&metadata), 0)?;
//! assert_eq!((assignment.revision.name.as_str(), assignment.reason), ("v2", Reason::Bucket));
//! # Ok::<(), penstock_plan::AssignError>(())
//! ```

mod assign;
mod human;
pub mod judge;
pub mod lint;
mod manifest;
mod observe;
pub mod parse;
pub mod planner;
mod ppm;
mod rollout;
mod route;
mod rule;
mod signal;
pub mod simulate;
mod snapshot;
mod topology;
pub mod window;

pub use assign::{AssignError, Assignment, Attributes, Reason, assign, bucket};
pub use human::{Limit, LimitError, Share, Span, SpanError};
pub use manifest::{
    Action, Analysis, CanarySpec, Day, InFlight, Kind, Manifest, Metric, MirrorSpec, OnAbort, OnInsufficient,
    OnNew, PrometheusQuery, RuleSpec, Side, Step, StickySpec, Stratify, Unacknowledged, Window,
};
pub use observe::{Ledger, ObservationKey, Observations, Sampled, Tally};
pub use penstock_analysis as analysis;
pub use ppm::{Ppm, PpmError};
pub use rollout::{Change, CreateRollout, Pause, PauseReason, Phase, Queued, Rollout, RolloutError};
pub use route::{
    Canary, OnMissing, Published, Revision, Route, Sticky, StickyKey, StickyKeyError, build_routes,
};
pub use rule::{DEVICE, FORWARDED_FOR, Mirror, REGION, Rule, Threshold, Trial, client_address};
pub use signal::{Outcome, RequestFacts, STRATA, Signal, SignalError};
pub use snapshot::{Snapshot, SnapshotError};
pub use topology::{Endpoint, EndpointSet, PublishedRevision, ServedRevision, WorkerRecord};
