//! The control plane over real stores, with real gRPC clients: operators and gateways.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[cfg(feature = "etcd")]
mod etcd;
mod harness;
mod leadership;
mod outage;
mod ports;
mod rollouts;
