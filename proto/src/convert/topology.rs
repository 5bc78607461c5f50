//! Workers and where they can be reached.

use penstock_plan::{Endpoint, EndpointSet, ServedRevision, WorkerRecord};

use crate::v1;

impl From<&EndpointSet> for v1::Endpoints {
    fn from(set: &EndpointSet) -> Self {
        Self {
            version: set.version,
            endpoints: set.endpoints.iter().map(v1::Endpoint::from).collect(),
        }
    }
}

impl From<v1::Endpoints> for EndpointSet {
    fn from(wire: v1::Endpoints) -> Self {
        Self {
            version: wire.version,
            endpoints: wire.endpoints.into_iter().map(Endpoint::from).collect(),
        }
    }
}

impl From<&Endpoint> for v1::Endpoint {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            id: endpoint.id.clone(),
            address: endpoint.address.clone(),
            region: endpoint.region.clone(),
            revisions: endpoint.revisions.iter().map(v1::ServedRevision::from).collect(),
        }
    }
}

impl From<v1::Endpoint> for Endpoint {
    fn from(wire: v1::Endpoint) -> Self {
        Self {
            id: wire.id,
            address: wire.address,
            region: wire.region,
            revisions: wire.revisions.into_iter().map(ServedRevision::from).collect(),
        }
    }
}

impl From<&ServedRevision> for v1::ServedRevision {
    fn from(served: &ServedRevision) -> Self {
        Self {
            model: served.model.clone(),
            revision: served.revision.clone(),
            digest: served.digest.clone(),
            context_length: served.context_length,
        }
    }
}

impl From<v1::ServedRevision> for ServedRevision {
    fn from(wire: v1::ServedRevision) -> Self {
        Self {
            model: wire.model,
            revision: wire.revision,
            digest: wire.digest,
            context_length: wire.context_length,
        }
    }
}

/// `refused` stays empty: the record does not know what the control plane thinks of it.
impl From<&WorkerRecord> for v1::Worker {
    fn from(record: &WorkerRecord) -> Self {
        Self {
            id: record.id.clone(),
            address: record.address.clone(),
            ops_address: record.ops_address.clone(),
            region: record.region.clone(),
            runner: record.runner.clone(),
            device: record.device.clone(),
            draining: record.draining,
            revisions: record.revisions.iter().map(v1::ServedRevision::from).collect(),
            started_ms: record.started_ms,
            boot_id: record.boot_id.clone(),
            refused: Vec::new(),
        }
    }
}

/// Drops `refused`.
impl From<v1::Worker> for WorkerRecord {
    fn from(wire: v1::Worker) -> Self {
        Self {
            id: wire.id,
            boot_id: wire.boot_id,
            address: wire.address,
            ops_address: wire.ops_address,
            region: wire.region,
            runner: wire.runner,
            device: wire.device,
            draining: wire.draining,
            started_ms: wire.started_ms,
            revisions: wire.revisions.into_iter().map(ServedRevision::from).collect(),
        }
    }
}
