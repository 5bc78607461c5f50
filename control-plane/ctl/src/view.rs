//! What commands answer: the wire's messages in the shape that operators and their programs read.

use crate::output::{View, columns, pairs};
use penstock_plan::Ppm;
use penstock_proto::v1;
use serde::Serialize;

/// A rollout and how far gateways have followed it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Rollout {
    pub(crate) model: String,
    pub(crate) uid: String,
    pub(crate) stable: String,
    pub(crate) canary: String,
    /// For a reader; `canary_ppm` is the exact figure.
    pub(crate) share: String,
    pub(crate) canary_ppm: u32,
    pub(crate) phase: &'static str,
    pub(crate) generation: u64,
    pub(crate) epoch: u64,
    pub(crate) store_revision: u64,
    pub(crate) live_gateways: u32,
    pub(crate) acknowledged: u32,
    pub(crate) pending: Vec<String>,
    pub(crate) nacks: Vec<Nack>,
    pub(crate) stable_endpoints: u32,
    pub(crate) canary_endpoints: u32,
    pub(crate) sticky_keys: Vec<String>,
    pub(crate) created_ms: u64,
    pub(crate) updated_ms: u64,
    pub(crate) actor: String,
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// A gateway's refusal of a snapshot.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Nack {
    pub(crate) gateway: String,
    pub(crate) epoch: u64,
    pub(crate) code: String,
    pub(crate) message: String,
}

impl From<v1::GatewayNack> for Nack {
    fn from(nack: v1::GatewayNack) -> Self {
        Self {
            gateway: nack.gateway,
            epoch: nack.epoch,
            code: nack.code,
            message: nack.message,
        }
    }
}

impl Nack {
    pub(crate) fn line(&self) -> String {
        format!(
            "{} refuses epoch {}: {} ({})",
            self.gateway, self.epoch, self.message, self.code
        )
    }
}

impl From<v1::RolloutStatus> for Rollout {
    fn from(status: v1::RolloutStatus) -> Self {
        let rollout = status.rollout.unwrap_or_default();
        Self {
            share: share(rollout.canary_ppm),
            phase: phase(rollout.phase()),
            sticky_keys: rollout.sticky.map(|sticky| sticky.keys).unwrap_or_default(),
            model: rollout.model,
            uid: rollout.uid,
            stable: rollout.stable,
            canary: rollout.canary,
            canary_ppm: rollout.canary_ppm,
            generation: rollout.generation,
            epoch: status.epoch,
            store_revision: rollout.store_revision,
            live_gateways: status.live_gateways,
            acknowledged: status.acknowledged,
            pending: status.pending,
            nacks: status.nacks.into_iter().map(Nack::from).collect(),
            stable_endpoints: status.stable_endpoints,
            canary_endpoints: status.canary_endpoints,
            created_ms: rollout.created_ms,
            updated_ms: rollout.updated_ms,
            actor: rollout.actor,
            reason: rollout.reason,
            message: rollout.message,
        }
    }
}

impl Rollout {
    fn acks(&self) -> String {
        format!("{}/{}", self.acknowledged, self.live_gateways)
    }
}

impl View for Rollout {
    fn table(&self) -> String {
        let mut text = pairs(&[
            ("model", self.model.clone()),
            (
                "stable",
                format!("{} ({})", self.stable, endpoints(self.stable_endpoints)),
            ),
            (
                "canary",
                format!("{} ({})", self.canary, endpoints(self.canary_endpoints)),
            ),
            ("share", self.share.clone()),
            ("phase", self.phase.to_owned()),
            ("message", self.message.clone()),
            ("generation", self.generation.to_string()),
            ("epoch", self.epoch.to_string()),
            ("acknowledged", self.acks()),
            ("pending", self.pending.join(", ")),
            ("sticky", self.sticky_keys.join(", ")),
            ("actor", self.actor.clone()),
            ("reason", self.reason.clone()),
            (
                "revision",
                format!("{} (for --expect-revision)", self.store_revision),
            ),
            ("uid", self.uid.clone()),
        ]);
        for nack in &self.nacks {
            text += &format!("refused       {}\n", nack.line());
        }
        text
    }
}

/// A rollout in one line, for `--watch`.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct RolloutLine(pub(crate) Rollout);

impl View for RolloutLine {
    fn table(&self) -> String {
        let Rollout {
            model,
            stable,
            canary,
            share,
            phase,
            generation,
            epoch,
            message,
            ..
        } = &self.0;
        let pending = match self.0.pending.as_slice() {
            [] => String::new(),
            pending => format!("; waits for {}", pending.join(", ")),
        };
        let message = if message.is_empty() {
            String::new()
        } else {
            format!("; {message}")
        };
        format!(
            "{model} {stable} → {canary} {share} {phase}; generation {generation}; epoch {epoch}; \
             {} acknowledged{pending}{message}\n",
            self.0.acks()
        )
    }
}

/// `rollout list`.
#[derive(Debug, Serialize)]
pub(crate) struct Rollouts {
    pub(crate) rollouts: Vec<Rollout>,
}

impl View for Rollouts {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .rollouts
            .iter()
            .map(|r| {
                [
                    r.model.clone(),
                    r.stable.clone(),
                    r.canary.clone(),
                    r.share.clone(),
                    r.phase.to_owned(),
                    r.generation.to_string(),
                    r.epoch.to_string(),
                    r.acks(),
                ]
            })
            .collect();
        columns(
            [
                "MODEL",
                "STABLE",
                "CANARY",
                "SHARE",
                "PHASE",
                "GENERATION",
                "EPOCH",
                "ACKNOWLEDGED",
            ],
            &rows,
        )
    }
}

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
}

impl From<v1::ListPublishedResponse> for Models {
    fn from(response: v1::ListPublishedResponse) -> Self {
        let revision = |r: v1::PublishedRevision| Revision {
            name: r.name,
            role: r.role,
            workers: r.workers,
            digest: r.digest,
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

/// A share as operators write it.
pub(crate) fn share(ppm: u32) -> String {
    // A share above the whole is a server's mistake; show the figure rather than hide it.
    Ppm::new(ppm).map_or_else(|_| format!("{ppm}ppm"), |share| share.to_string())
}

/// A phase as operators read it.
pub(crate) fn phase(phase: v1::Phase) -> &'static str {
    match phase {
        v1::Phase::Unspecified => "unknown",
        v1::Phase::Converging => "converging",
        v1::Phase::Paused => "paused",
        v1::Phase::Promoting => "promoting",
        v1::Phase::Succeeded => "succeeded",
        v1::Phase::Aborting => "aborting",
        v1::Phase::RolledBack => "rolled_back",
        v1::Phase::Pending => "pending",
        v1::Phase::Warming => "warming",
        v1::Phase::Soaking => "soaking",
        v1::Phase::Judging => "judging",
        v1::Phase::Baking => "baking",
        v1::Phase::Draining => "draining",
    }
}

fn endpoints(count: u32) -> String {
    match count {
        1 => "1 endpoint".to_owned(),
        count => format!("{count} endpoints"),
    }
}

#[cfg(test)]
mod tests;
