//! The wire of Penstock: messages and services of package `penstock.v1`, generated at build time from
//! `proto/penstock/v1/*.proto`, and the conversions between them and the plan's own types.
//!
//! This crate holds no logic beyond conversion; it refuses to decide anything.

/// Messages, clients and servers of package `penstock.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("penstock.v1");
}

pub mod convert;
pub mod metadata;

/// The encoded `FileDescriptorSet`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/penstock.v1.bin"));
