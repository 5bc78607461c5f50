//! Follows the control plane: checks each snapshot against the endpoints, keeps the view on disk, tells metrics.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use opentelemetry::{
    KeyValue, global,
    trace::{Span as _, SpanKind, Status as SpanStatus, Tracer as _},
};
use penstock_client::{Candidate, Subscription, SyncConfig, SyncConfigError, Veto, View, subscribe};
use penstock_plan::{Endpoint, Ppm, Route, Snapshot};
use penstock_proto::v1;
use penstock_telemetry::{
    instruments::GatewayMetrics,
    propagation,
    semconv::{attribute, span, value},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    counts::Ledger,
    overrides::{self, Overrides},
    pool::Pool,
    state::StateDir,
};

/// What it takes to follow.
pub(crate) struct Follow {
    pub(crate) sync: SyncConfig,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) pool: Arc<Pool>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) overrides: Arc<Overrides>,
}

impl Follow {
    /// Starts; without a control plane the view stays what it is at first.
    pub(crate) fn start(
        self,
        stop: CancellationToken,
    ) -> Result<(watch::Receiver<Arc<View>>, Option<Subscription>), SyncConfigError> {
        let Self {
            sync,
            metrics,
            pool,
            ledger,
            overrides,
        } = self;
        let mut in_force = sync.initial.snapshot.clone();
        if let Some(snapshot) = &in_force {
            metrics.applied(snapshot.epoch);
        }
        if sync.control_planes.is_empty() {
            return Ok((watch::Sender::new(Arc::new(sync.initial)).subscribe(), None));
        }
        let node = sync.node.clone();
        // The newest snapshot, as reports know it: the view itself is made by the subscription, which makes them.
        let reported = Arc::new(Mutex::new(in_force.clone()));
        let newest = reported.clone();
        let apply = move |candidate: Candidate<'_>| {
            apply(candidate, in_force.as_deref(), &node, &metrics)?;
            in_force = Some(candidate.snapshot.clone());
            newest
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone_from(&in_force);
            Ok(())
        };
        let sync = SyncConfig {
            stats: Some(Arc::new(move || {
                let snapshot = reported.lock().unwrap_or_else(PoisonError::into_inner).clone();
                v1::Stats {
                    revisions: ledger.report(snapshot.as_deref(), Instant::now()),
                    overrides: overrides
                        .list(overrides::now_ms())
                        .into_iter()
                        .map(Into::into)
                        .collect(),
                    ..v1::Stats::default()
                }
            })),
            reach: Some(Arc::new(move |endpoint: Endpoint| {
                let peer = pool.peer(&endpoint.address);
                Box::pin(async move { peer.serves().await })
            })),
            ..sync
        };
        let subscription = subscribe(sync, Box::new(apply), stop)?;
        Ok((subscription.view(), Some(subscription)))
    }
}

fn apply(
    candidate: Candidate<'_>,
    in_force: Option<&Snapshot>,
    node: &str,
    metrics: &GatewayMetrics,
) -> Result<(), Veto> {
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
    let result = check(candidate, in_force);
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

/// A canary that nobody serves would fail its share of the users. One that gets no more than it has already cannot
/// be made worse: lowering a share must work above all when its workers are gone.
fn check(candidate: Candidate<'_>, in_force: Option<&Snapshot>) -> Result<(), Veto> {
    for route in candidate.snapshot.routes.values() {
        let before = in_force.and_then(|snapshot| snapshot.routes.get(&route.model));
        let Some(canary) = route.canary.as_ref().filter(|_| gets_more(route, before)) else {
            continue;
        };
        let revision = &canary.revision;
        let endpoints = candidate.endpoints.endpoints.iter();
        let serving: Vec<&Endpoint> = endpoints
            .filter(|e| e.serves(&route.model, &revision.name, &revision.digest))
            .collect();
        let reached = serving
            .iter()
            .filter(|e| candidate.reached.contains(&e.id))
            .count();
        let message = match canary.min_ready {
            0 if serving.is_empty() => format!(
                "no worker that this gateway knows serves {}@{}",
                route.model, revision.name
            ),
            least if reached < least as usize => format!(
                "this gateway reaches {reached} workers of {}@{}, knows {}, and needs {least} (canary.min_ready)",
                route.model,
                revision.name,
                serving.len(),
            ),
            _ => continue,
        };
        return Err(Veto {
            code: "canary_unreachable".into(),
            field: format!("routes[{}].canary", route.model),
            message,
        });
    }
    Ok(())
}

/// Whether a route sends somebody to its canary whom the one before did not.
fn gets_more(route: &Route, before: Option<&Route>) -> bool {
    let traffic = |route: &Route| {
        let share = route.canary.as_ref().map_or(Ppm::ZERO, |canary| canary.share);
        let ruled = route.rules.iter().map(|rule| rule.canary).max();
        share.max(ruled.unwrap_or(Ppm::ZERO))
    };
    let revision = |route: &Route| route.canary.as_ref().map(|canary| canary.revision.clone());
    let same = before.filter(|before| revision(before) == revision(route) && before.rules == route.rules);
    traffic(route) > same.map_or(Ppm::ZERO, traffic)
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
    use std::collections::HashSet;

    use penstock_plan::{Canary, EndpointSet, Revision, ServedRevision, Sticky};
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

    /// Offers a snapshot, with these workers reached, where `in_force` is what serves.
    fn offer_over(
        in_force: Option<&Snapshot>,
        next: &Arc<Snapshot>,
        digest: &str,
        reached: &[&str],
    ) -> (Result<(), Veto>, String) {
        let metrics = Metrics::local();
        let candidate = Candidate {
            snapshot: next,
            endpoints: &endpoints(digest),
            reached: &HashSet::from_iter(reached.iter().map(ToString::to_string)),
            traceparent: None,
        };
        let result = apply(candidate, in_force, "gw", &GatewayMetrics::new(&metrics));
        (result, metrics.prometheus_text())
    }

    fn offer(share: Ppm, digest: &str) -> (Result<(), Veto>, String) {
        offer_over(None, &snapshot(share), digest, &[])
    }

    fn percent(share: &str) -> Ppm {
        share.parse().unwrap()
    }

    /// The same with a canary that wants so many workers.
    fn wanting(share: Ppm, min_ready: u32) -> Arc<Snapshot> {
        let mut wanting = Snapshot::clone(&snapshot(share));
        let route = wanting.routes.get_mut("demo").unwrap();
        route.canary.as_mut().unwrap().min_ready = min_ready;
        Arc::new(wanting)
    }

    #[test]
    fn a_canary_that_nobody_serves_by_content_is_refused_and_counted() {
        let (result, text) = offer(percent("5%"), "another");
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
        let (result, text) = offer(percent("5%"), "bb");
        assert_eq!(result, Ok(()));
        let epoch = text
            .lines()
            .find(|line| line.starts_with("penstock_gateway_epoch"))
            .unwrap();
        assert!(epoch.ends_with(" 7"), "{epoch}");
        let (result, _) = offer(percent("0%"), "another");
        assert_eq!(result, Ok(()), "a share of 0 sends nobody there");
    }

    #[test]
    fn a_canary_that_wants_workers_must_be_reached_and_not_only_known() {
        let wants_one = wanting(percent("5%"), 1);
        let (result, _) = offer_over(None, &wants_one, "bb", &[]);
        let veto = result.unwrap_err();
        assert_eq!(veto.code, "canary_unreachable");
        assert!(
            veto.message.contains("reaches 0") && veto.message.contains("knows 1"),
            "{veto}"
        );
        assert_eq!(offer_over(None, &wants_one, "bb", &["w"]).0, Ok(()));
        let (result, _) = offer_over(None, &wanting(percent("5%"), 2), "bb", &["w"]);
        assert!(result.unwrap_err().message.contains("needs 2"));
    }

    #[test]
    fn a_share_can_be_lowered_when_its_workers_are_gone_and_not_raised() {
        let five = wanting(percent("5%"), 1);
        for (share, applied) in [("1%", true), ("5%", true), ("6%", false)] {
            let (result, _) = offer_over(Some(&five), &wanting(percent(share), 1), "another", &[]);
            assert_eq!(result.is_ok(), applied, "{share}");
        }
        let mut ruled = Snapshot::clone(&five);
        ruled.routes.get_mut("demo").unwrap().rules = vec![penstock_plan::Rule {
            canary: Ppm::ALL,
            ..Default::default()
        }];
        let (result, _) = offer_over(Some(&five), &Arc::new(ruled), "another", &[]);
        assert!(result.is_err(), "a rule sends everybody there");
    }
}
