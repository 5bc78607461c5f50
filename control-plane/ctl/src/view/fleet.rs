//! Workers, gateways, models and their revisions.

use super::Nack;
use crate::output::{View, columns};
use penstock_proto::v1;
use serde::Serialize;

/// `worker list`.
#[derive(Debug, Serialize)]
pub(crate) struct Workers {
    pub(crate) workers: Vec<Worker>,
}

/// One worker.
#[derive(Debug, Serialize)]
pub(crate) struct Worker {
    id: String,
    address: String,
    ops_address: String,
    region: String,
    runner: String,
    device: String,
    draining: bool,
    revisions: Vec<Served>,
    refused: Vec<String>,
    started_ms: u64,
    boot_id: String,
}

/// A revision that a worker serves.
#[derive(Debug, Serialize)]
struct Served {
    model: String,
    revision: String,
    digest: String,
    context_length: u32,
}

impl From<v1::ListWorkersResponse> for Workers {
    fn from(response: v1::ListWorkersResponse) -> Self {
        let served = |s: v1::ServedRevision| Served {
            model: s.model,
            revision: s.revision,
            digest: s.digest,
            context_length: s.context_length,
        };
        let worker = |w: v1::Worker| Worker {
            id: w.id,
            address: w.address,
            ops_address: w.ops_address,
            region: w.region,
            runner: w.runner,
            device: w.device,
            draining: w.draining,
            revisions: w.revisions.into_iter().map(served).collect(),
            refused: w.refused,
            started_ms: w.started_ms,
            boot_id: w.boot_id,
        };
        Self {
            workers: response.workers.into_iter().map(worker).collect(),
        }
    }
}

impl View for Workers {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .workers
            .iter()
            .map(|w| {
                let serves: Vec<_> = w
                    .revisions
                    .iter()
                    .map(|s| format!("{}@{}", s.model, s.revision))
                    .collect();
                let state = if w.draining { "draining" } else { "serving" };
                [
                    w.id.clone(),
                    w.address.clone(),
                    w.region.clone(),
                    w.runner.clone(),
                    w.device.clone(),
                    state.to_owned(),
                    serves.join(", "),
                    w.refused.join("; "),
                ]
            })
            .collect();
        columns(
            [
                "ID", "ADDRESS", "REGION", "RUNNER", "DEVICE", "STATE", "SERVES", "REFUSED",
            ],
            &rows,
        )
    }
}

/// `gateway list`.
#[derive(Debug, Serialize)]
pub(crate) struct Gateways {
    /// Epoch published.
    epoch: u64,
    gateways: Vec<Gateway>,
}

/// One gateway.
#[derive(Debug, Serialize)]
struct Gateway {
    node: String,
    region: String,
    ops_address: String,
    live: bool,
    acknowledged_epoch: u64,
    silent_ms: u64,
    nack: Option<Nack>,
    boot_id: String,
}

impl From<v1::ListGatewaysResponse> for Gateways {
    fn from(response: v1::ListGatewaysResponse) -> Self {
        let gateway = |g: v1::Gateway| Gateway {
            node: g.node,
            region: g.region,
            ops_address: g.ops_address,
            live: g.live,
            acknowledged_epoch: g.acknowledged_epoch,
            silent_ms: g.silent_ms,
            nack: g.nack.map(Nack::from),
            boot_id: g.boot_id,
        };
        Self {
            epoch: response.epoch,
            gateways: response.gateways.into_iter().map(gateway).collect(),
        }
    }
}

impl View for Gateways {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .gateways
            .iter()
            .map(|g| {
                let state = match g {
                    Gateway {
                        live: false,
                        silent_ms,
                        ..
                    } => format!("lost for {} s", silent_ms / 1000),
                    Gateway { nack: Some(nack), .. } => {
                        format!("refuses epoch {}: {}", nack.epoch, nack.message)
                    }
                    g if g.acknowledged_epoch < self.epoch => "behind".to_owned(),
                    _ => "current".to_owned(),
                };
                [
                    g.node.clone(),
                    g.region.clone(),
                    g.ops_address.clone(),
                    format!("{}/{}", g.acknowledged_epoch, self.epoch),
                    state,
                ]
            })
            .collect();
        columns(["NODE", "REGION", "OPS", "EPOCH", "STATE"], &rows)
    }
}

/// `model list`.
#[derive(Debug, Serialize)]
pub(crate) struct Models {
    models: Vec<Model>,
}

#[derive(Debug, Serialize)]
struct Model {
    name: String,
    revisions: Vec<Revision>,
}

#[derive(Debug, Serialize)]
struct Revision {
    name: String,
    role: String,
    workers: u32,
    digest: String,
    source: String,
    placements: Vec<Placement>,
}

/// What a worker has of a revision.
#[derive(Debug, Serialize)]
struct Placement {
    worker: String,
    state: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    message: String,
}

impl From<v1::PlacementStatus> for Placement {
    fn from(status: v1::PlacementStatus) -> Self {
        let revision = status.state.unwrap_or_default();
        Self {
            worker: status.worker,
            state: state(revision.state()),
            done_bytes: revision.done_bytes,
            total_bytes: revision.total_bytes,
            message: revision.message,
        }
    }
}

/// What a worker does with a revision, as operators read it.
pub(crate) fn state(state: v1::revision_state::State) -> &'static str {
    use v1::revision_state::State;
    match state {
        State::Unspecified => "unknown",
        State::Fetching => "fetching",
        State::Loading => "loading",
        State::Warming => "warming",
        State::Serving => "serving",
        State::Retiring => "retiring",
        State::Failed => "failed",
    }
}

impl From<v1::ListPublishedResponse> for Models {
    fn from(response: v1::ListPublishedResponse) -> Self {
        let revision = |r: v1::PublishedRevision| Revision {
            name: r.name,
            role: r.role,
            workers: r.workers,
            digest: r.digest,
            source: r.source,
            placements: r.placements.into_iter().map(Placement::from).collect(),
        };
        let model = |m: v1::PublishedModel| Model {
            name: m.name,
            revisions: m.revisions.into_iter().map(revision).collect(),
        };
        Self {
            models: response.models.into_iter().map(model).collect(),
        }
    }
}

impl View for Models {
    fn table(&self) -> String {
        let row = |model: &Model, revision: &Revision| {
            // Twelve characters tell revisions apart; `-o json` has them all.
            let digest = revision.digest.get(..12).unwrap_or(&revision.digest);
            [
                model.name.clone(),
                revision.name.clone(),
                revision.role.clone(),
                revision.workers.to_string(),
                digest.to_owned(),
            ]
        };
        let rows: Vec<_> = self
            .models
            .iter()
            .flat_map(|m| m.revisions.iter().map(move |r| row(m, r)))
            .collect();
        columns(["MODEL", "REVISION", "ROLE", "WORKERS", "DIGEST"], &rows)
    }
}
