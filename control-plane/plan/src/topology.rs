//! Workers, what they serve, and where they are.

use serde::{Deserialize, Serialize};

/// One revision of a model as a worker serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedRevision {
    /// Name of the model.
    pub model: String,
    /// Name of the revision.
    pub revision: String,
    /// BLAKE3 digest of the revision's manifest, in hex.
    pub digest: String,
    /// Context length in tokens.
    pub context_length: u32,
}

/// A worker's entry in the store, under a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Unique among all workers, stable over restarts.
    pub id: String,
    /// Chosen anew at each start.
    pub boot_id: String,
    /// `host:port` of its Inference service.
    pub address: String,
    /// `host:port` of its operations port.
    pub ops_address: String,
    /// Region, or empty.
    #[serde(default)]
    pub region: String,
    /// `candle` or `fake`.
    pub runner: String,
    /// What it runs on, e.g. `cpu (avx512, amx)`.
    pub device: String,
    /// It takes no new requests.
    #[serde(default)]
    pub draining: bool,
    /// When it started, in milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// What it serves, in the order in which it was told.
    pub revisions: Vec<ServedRevision>,
}

/// A revision that some worker registered first, or an operator published: the reference that others are held to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedRevision {
    /// Name of the model.
    pub model: String,
    /// Name of the revision.
    pub revision: String,
    /// BLAKE3 digest of its manifest, in hex; empty until the first worker has loaded what an operator published
    /// without one.
    pub digest: String,
    /// Where its checkpoint is: a path, `hf://`, `s3://` or `https://`. Empty where workers have it from their
    /// command lines.
    #[serde(default)]
    pub source: String,
    /// Prompts that are computed before it serves, so that their KV is there.
    #[serde(default)]
    pub warm_prefixes: Vec<String>,
    /// An operator took it back: it is placed nowhere any more.
    #[serde(default)]
    pub retired: bool,
    /// When, in milliseconds since the Unix epoch.
    #[serde(default)]
    pub published_ms: u64,
}

/// Where a worker can be reached, as gateways are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Worker id.
    pub id: String,
    /// `host:port` of its Inference service.
    pub address: String,
    /// Region, or empty.
    #[serde(default)]
    pub region: String,
    /// What it serves.
    pub revisions: Vec<ServedRevision>,
}

/// Every endpoint; numbered apart from snapshots, so that a flapping lease makes no epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSet {
    /// Grows with every change while one control plane leads.
    pub version: u64,
    /// In the order of their ids.
    pub endpoints: Vec<Endpoint>,
}

// === impl Endpoint ===

impl Endpoint {
    /// Whether it serves this revision: the digest decides, not the name alone.
    pub fn serves(&self, model: &str, revision: &str, digest: &str) -> bool {
        self.revisions
            .iter()
            .any(|r| r.model == model && r.revision == revision && r.digest == digest)
    }
}

impl From<&WorkerRecord> for Endpoint {
    fn from(worker: &WorkerRecord) -> Self {
        Self {
            id: worker.id.clone(),
            address: worker.address.clone(),
            region: worker.region.clone(),
            revisions: worker.revisions.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
