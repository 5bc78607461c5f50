//! The gateway in this process, in front of workers whose behaviour the tests choose.

// The lint knows tests by their attribute; their helpers have none.
#![allow(clippy::unwrap_used)]

mod any_bytes;
mod feedback;
mod grpc;
mod hedge;
mod http_api;
mod mirror;
mod overload;
mod overriding;
mod plan_changes;
mod plane;
mod process;
mod reports;
mod resume;
mod rules;
mod support;
