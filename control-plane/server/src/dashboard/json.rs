//! What the page is told.

use penstock_proto::v1::{self, admin_server::Admin as _};
use serde_json::{Value, json};
use tonic::{Request, Status};

use crate::admin::AdminService;

/// Everything that the page shows, with the newest `records` of the audit log.
pub(super) async fn state(admin: &AdminService, records: u32) -> Result<Value, Status> {
    let rollouts = admin
        .list_rollouts(Request::new(v1::ListRolloutsRequest {}))
        .await?
        .into_inner();
    let gateways = admin
        .list_gateways(Request::new(v1::ListGatewaysRequest {}))
        .await?
        .into_inner();
    let models = admin
        .list_models(Request::new(v1::ListPublishedRequest {}))
        .await?
        .into_inner();
    let request = v1::ListAuditRequest {
        limit: records,
        ..v1::ListAuditRequest::default()
    };
    // The rest is known from memory; a store that is down takes the log alone away.
    let audit = admin
        .list_audit(Request::new(request))
        .await
        .map(tonic::Response::into_inner)
        .ok();
    Ok(json!({
        "epoch": gateways.epoch,
        "rollouts": rollouts.rollouts.iter().map(status).collect::<Vec<_>>(),
        "gateways": gateways.gateways.iter().map(gateway).collect::<Vec<_>>(),
        "models": models.models.iter().map(model).collect::<Vec<_>>(),
        "audit": audit.map(|audit| audit.records.iter().map(record).collect::<Vec<_>>()),
    }))
}

/// A rollout by itself.
pub(super) fn rollout(rollout: &v1::Rollout) -> Value {
    json!({
        "model": rollout.model,
        "uid": rollout.uid,
        "stable": rollout.stable,
        "canary": rollout.canary,
        "ppm": rollout.canary_ppm,
        "phase": word(rollout.phase().as_str_name(), "PHASE_"),
        "pause": word(rollout.pause().as_str_name(), "PAUSE_REASON_"),
        "message": rollout.message,
        "cause": rollout.cause,
        "generation": rollout.generation,
        "revision": rollout.store_revision,
        "attempt": rollout.attempt,
        "queued": rollout.queued,
        "actor": rollout.actor,
        "reason": rollout.reason,
        "since_ms": rollout.phase_since_ms,
    })
}

fn status(status: &v1::RolloutStatus) -> Value {
    let step = |step: &v1::StepStatus| {
        json!({
            "ppm": step.canary_ppm, "hold_ms": step.hold_ms, "approval": step.approval, "bake": step.bake,
            "state": step.state, "began_ms": step.began_ms,
        })
    };
    let point = |point: &v1::ChartPoint| {
        json!([
            point.at_ms,
            point.canary_ppm,
            side(point.stable),
            side(point.canary)
        ])
    };
    json!({
        "rollout": status.rollout.as_ref().map(rollout),
        "epoch": status.epoch,
        "live": status.live_gateways,
        "acknowledged": status.acknowledged,
        "pending": status.pending,
        "nacks": status.nacks.iter().map(|nack| format!("{}: {}", nack.gateway, nack.message)).collect::<Vec<_>>(),
        "endpoints": [status.stable_endpoints, status.canary_endpoints],
        "steps": status.steps.iter().map(step).collect::<Vec<_>>(),
        "metrics": status.metrics.iter().map(metric).collect::<Vec<_>>(),
        "shares": { "key": status.key_share, "request": status.request_share, "token": status.token_share },
        "requests": [requests(status.stable_stats.as_ref()), requests(status.canary_stats.as_ref())],
        "next_ms": status.next_ms,
        "points": status.points.iter().map(point).collect::<Vec<_>>(),
    })
}

fn requests(stats: Option<&v1::RevisionStats>) -> u64 {
    stats.map_or(0, |stats| stats.requests)
}

/// Requests, errors, TTFT p50 and p99 in seconds.
fn side(side: Option<v1::ChartSide>) -> Value {
    side.map_or(Value::Null, |side| {
        json!([side.requests, side.errors, side.ttft_p50, side.ttft_p99])
    })
}

fn metric(metric: &v1::MetricVerdict) -> Value {
    let counts = |counts: Option<v1::Counts>| {
        let counts = counts.unwrap_or_default();
        json!([counts.requests, counts.bad])
    };
    json!({
        "metric": metric.metric,
        "rule": metric.rule,
        "verdict": word(metric.verdict().as_str_name(), "VERDICT_"),
        "action": metric.action,
        "canary": counts(metric.canary),
        "stable": counts(metric.stable),
        "rates": [metric.canary_rate, metric.stable_rate],
        "bounds": [metric.lower, metric.upper],
        "evidence": metric.log_evidence,
        "threshold": metric.log_threshold,
        "would_change": metric.would_change,
    })
}

fn gateway(gateway: &v1::Gateway) -> Value {
    json!({
        "node": gateway.node,
        "region": gateway.region,
        "epoch": gateway.acknowledged_epoch,
        "live": gateway.live,
        "silent_ms": gateway.silent_ms,
        "nack": gateway.nack.as_ref().map(|nack| nack.message.clone()),
    })
}

fn model(model: &v1::PublishedModel) -> Value {
    let placed = |placed: &v1::PlacementStatus| {
        let state = placed.state.clone().unwrap_or_default();
        json!({ "worker": placed.worker, "state": word(state.state().as_str_name(), "STATE_"), "message": state.message })
    };
    let revision = |revision: &v1::PublishedRevision| {
        json!({
            "name": revision.name, "role": revision.role, "workers": revision.workers, "source": revision.source,
            "placements": revision.placements.iter().map(placed).collect::<Vec<_>>(),
        })
    };
    json!({
        "name": model.name,
        "rate": model.requests_per_second,
        "revisions": model.revisions.iter().map(revision).collect::<Vec<_>>(),
    })
}

fn record(record: &v1::AuditRecord) -> Value {
    json!({
        "at_ms": record.at_ms, "operation": record.operation, "model": record.model, "actor": record.actor,
        "reason": record.reason, "change": record.change,
    })
}

/// `PHASE_ROLLED_BACK` as `rolled back`.
fn word(name: &str, prefix: &str) -> String {
    let word = name
        .strip_prefix(prefix)
        .unwrap_or(name)
        .to_ascii_lowercase()
        .replace('_', " ");
    if word == "unspecified" {
        String::new()
    } else {
        word
    }
}
