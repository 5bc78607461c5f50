//! Names of the metadata that requests and replies carry.

/// The user a request is for; the everyday key of sticky assignment.
pub const USER_ID: &str = "x-user-id";
/// Request: the revision asked for (a pin). Response and worker hop: the revision that serves.
pub const MODEL_VERSION: &str = "x-model-version";
/// Where the request comes from.
pub const REGION: &str = "x-region";
/// Whose rates and share a request without a credential counts against.
pub const TENANT_ID: &str = "x-tenant-id";
/// On the hop to a worker: who the request counts for, as a number that names nobody.
pub const TENANT: &str = "x-penstock-tenant";
/// What kind of device the request comes from.
pub const DEVICE: &str = "x-device";
/// Requests of one session prefer one worker.
pub const SESSION_ID: &str = "x-session-id";
/// The epoch of the snapshot that assigned the request.
pub const ROLLOUT_EPOCH: &str = "x-rollout-epoch";
/// Why the request was assigned to its revision.
pub const ASSIGNMENT_REASON: &str = "x-assignment-reason";
/// Priority of the match rule that decided, where one did.
pub const ASSIGNMENT_RULE: &str = "x-assignment-rule";
/// The id by which feedback names a reply.
pub const REPLY_ID: &str = "x-reply-id";
/// `1` on the hop to a worker where the request is a copy whose reply nobody reads.
pub const MIRROR: &str = "x-penstock-mirror";
/// The seed in use, given back where the request named none.
pub const SEED: &str = "x-seed";
/// Trailer: a serialized [`RequestStats`](crate::v1::RequestStats).
pub const STATS_TRAILER: &str = "penstock-stats-bin";
