//! Follows the control plane: checks each snapshot against the endpoints, keeps the view on disk, tells metrics.

use std::sync::Arc;

use opentelemetry::{
    KeyValue, global,
    trace::{Span as _, SpanKind, Status as SpanStatus, Tracer as _},
};
use penstock_client::{Candidate, Subscription, SyncConfig, SyncConfigError, Veto, View, subscribe};
use penstock_plan::{EndpointSet, Snapshot};
use penstock_telemetry::{
    instruments::GatewayMetrics,
    propagation,
    semconv::{attribute, span, value},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{pool::Pool, state::StateDir};

/// Starts to follow; without a control plane the view stays what it is at first.
pub(crate) fn follow(
    config: SyncConfig,
    metrics: GatewayMetrics,
    stop: CancellationToken,
) -> Result<(watch::Receiver<Arc<View>>, Option<Subscription>), SyncConfigError> {
    if let Some(snapshot) = &config.initial.snapshot {
        metrics.applied(snapshot.epoch);
    }
    if config.control_planes.is_empty() {
        return Ok((watch::Sender::new(Arc::new(config.initial)).subscribe(), None));
    }
    let node = config.node.clone();
    let apply = move |candidate: Candidate<'_>| apply(candidate, &node, &metrics);
    let subscription = subscribe(config, Box::new(apply), stop)?;
    Ok((subscription.view(), Some(subscription)))
}

fn apply(candidate: Candidate<'_>, node: &str, metrics: &GatewayMetrics) -> Result<(), Veto> {
    let epoch = candidate.snapshot.epoch;
    let parent = candidate
        .traceparent
        .map(propagation::context_from_traceparent)
        .unwrap_or_default();
    let tracer = global::tracer("penstock");
    let builder = tracer
        .span_builder(span::SNAPSHOT_APPLY)
        .with_kind(SpanKind::Internal)
        .with_attributes([
            KeyValue::new(attribute::COMPONENT, value::GATEWAY),
            KeyValue::new(attribute::EPOCH, i64::try_from(epoch).unwrap_or(i64::MAX)),
            KeyValue::new(attribute::GATEWAY, node.to_owned()),
        ]);
    let mut span = tracer.build_with_context(builder, &parent);
    let result = check(candidate.snapshot, candidate.endpoints);
    match &result {
        Ok(()) => {
            metrics.applied(epoch);
            tracing::info!(
                epoch,
                routes = candidate.snapshot.routes.len(),
                "applied a snapshot"
            );
        }
        Err(veto) => {
            metrics.refused(&veto.code);
            span.set_attribute(KeyValue::new(attribute::CODE, veto.code.clone()));
            span.set_status(SpanStatus::error(veto.message.clone()));
            tracing::warn!(
                epoch,
                code = veto.code,
                reason = veto.message,
                "refused a snapshot"
            );
        }
    }
    span.end();
    result
}

/// A canary that nobody serves would fail its share of the users.
fn check(snapshot: &Snapshot, endpoints: &EndpointSet) -> Result<(), Veto> {
    for route in snapshot.routes.values() {
        let Some(canary) = route.canary.as_ref().filter(|canary| canary.share.get() > 0) else {
            continue;
        };
        let revision = &canary.revision;
        if !endpoints
            .endpoints
            .iter()
            .any(|e| e.serves(&route.model, &revision.name, &revision.digest))
        {
            return Err(Veto {
                code: "canary_unreachable".into(),
                field: format!("routes[{}].canary", route.model),
                message: format!(
                    "no worker that this gateway knows serves {}@{}",
                    route.model, revision.name
                ),
            });
        }
    }
    Ok(())
}

/// Acts on every change of the view until `stop`.
pub(crate) fn keep(
    mut view: watch::Receiver<Arc<View>>,
    pool: Arc<Pool>,
    state: Option<StateDir>,
    metrics: GatewayMetrics,
    stop: CancellationToken,
) -> JoinHandle<()> {
    let keep = async move {
        let mut saved: Option<Arc<View>> = None;
        loop {
            let now = view.borrow_and_update().clone();
            metrics.endpoints(now.endpoints.endpoints.len());
            metrics.connected(now.connected);
            pool.retain(&now.endpoints.endpoints);
            let same =
                |before: &Arc<View>| before.snapshot == now.snapshot && before.endpoints == now.endpoints;
            if let Some(state) = state
                .as_ref()
                .filter(|_| now.snapshot.is_some() && !saved.as_ref().is_some_and(same))
            {
                save(state.clone(), now.clone()).await;
                saved = Some(now);
            }
            if view.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::spawn(async move {
        let _ = stop.run_until_cancelled_owned(keep).await;
    })
}

async fn save(state: StateDir, view: Arc<View>) {
    match tokio::task::spawn_blocking(move || state.save(&view)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::error!(%error, "cannot keep the view; a restart without a control plane would be blind")
        }
        Err(error) => tracing::error!(%error, "keeping the view panicked"),
    }
}

#[cfg(test)]
mod tests {
    use penstock_plan::{Canary, Endpoint, Ppm, Revision, Route, ServedRevision, Sticky};
    use penstock_telemetry::Metrics;

    use super::*;

    fn snapshot(share: Ppm) -> Arc<Snapshot> {
        let route = Route {
            model: "demo".into(),
            stable: Revision::new("v1", "aa"),
            canary: Some(Canary {
                revision: Revision::new("v2", "bb"),
                share,
                ..Canary::default()
            }),
            rollout_uid: "r-1".into(),
            generation: 1,
            sticky: Sticky::default(),
            pinnable: vec![],
            revoked: vec![],
            ..Route::default()
        };
        Arc::new(Snapshot {
            epoch: 7,
            routes: [("demo".into(), route)].into(),
        })
    }

    /// One worker that serves `v2` of `demo` with this digest.
    fn endpoints(digest: &str) -> Arc<EndpointSet> {
        let served = ServedRevision {
            model: "demo".into(),
            revision: "v2".into(),
            digest: digest.into(),
            context_length: 512,
        };
        let endpoint = Endpoint {
            id: "w".into(),
            address: "127.0.0.1:1".into(),
            region: String::new(),
            revisions: vec![served],
        };
        Arc::new(EndpointSet {
            version: 1,
            endpoints: vec![endpoint],
        })
    }

    fn offer(share: Ppm, digest: &str) -> (Result<(), Veto>, String) {
        let metrics = Metrics::local();
        let candidate = Candidate {
            snapshot: &snapshot(share),
            endpoints: &endpoints(digest),
            traceparent: None,
        };
        let result = apply(candidate, "gw", &GatewayMetrics::new(&metrics));
        (result, metrics.prometheus_text())
    }

    #[test]
    fn a_canary_that_nobody_serves_by_content_is_refused_and_counted() {
        let (result, text) = offer("5%".parse().unwrap(), "another");
        let veto = result.unwrap_err();
        assert_eq!(
            (veto.code.as_str(), veto.field.as_str()),
            ("canary_unreachable", "routes[demo].canary")
        );
        assert!(veto.message.contains("demo@v2"), "{veto}");
        assert!(text.contains("canary_unreachable"), "{text}");
    }

    #[test]
    fn a_canary_that_is_served_or_has_no_share_is_applied() {
        let (result, text) = offer("5%".parse().unwrap(), "bb");
        assert_eq!(result, Ok(()));
        let epoch = text
            .lines()
            .find(|line| line.starts_with("penstock_gateway_epoch"))
            .unwrap();
        assert!(epoch.ends_with(" 7"), "{epoch}");
        let (result, _) = offer("0%".parse().unwrap(), "another");
        assert_eq!(result, Ok(()), "a share of 0 sends nobody there");
    }
}
