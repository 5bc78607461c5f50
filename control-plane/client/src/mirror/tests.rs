use std::sync::Mutex;

use penstock_plan::{Endpoint, Revision, Route, ServedRevision, Sticky};

use super::*;

fn route(stable: &str) -> Route {
    Route {
        model: "demo".into(),
        stable: Revision::new(stable, format!("digest-{stable}")),
        canary: None,
        rollout_uid: String::new(),
        generation: 0,
        sticky: Sticky::default(),
        pinnable: vec![],
        revoked: vec![],
        ..Route::default()
    }
}

fn snapshot(epoch: u64, stable: &str) -> Snapshot {
    Snapshot {
        epoch,
        routes: [("demo".to_owned(), route(stable))].into(),
    }
}

fn endpoints(version: u64, revisions: &[&str]) -> EndpointSet {
    let served = |revision: &&str| ServedRevision {
        model: "demo".into(),
        revision: (*revision).into(),
        digest: format!("digest-{revision}"),
        context_length: 256,
    };
    let revisions = revisions.iter().map(served).collect();
    let endpoint = Endpoint {
        id: "w1".into(),
        address: "w1:8100".into(),
        region: String::new(),
        revisions,
    };
    EndpointSet {
        version,
        endpoints: vec![endpoint],
    }
}

fn push(nonce: u64, resource: Resource) -> v1::Push {
    v1::Push {
        nonce,
        resource: Some(resource),
        traceparent: "00-aa-bb-01".into(),
    }
}

fn push_snapshot(nonce: u64, snapshot: &Snapshot) -> v1::Push {
    push(nonce, Resource::Snapshot(snapshot.into()))
}

fn push_endpoints(nonce: u64, endpoints: &EndpointSet) -> v1::Push {
    push(nonce, Resource::Endpoints(endpoints.into()))
}

fn acked(nonce: u64, snapshot: &Snapshot) -> v1::NodeMessage {
    let applied = v1::AppliedSnapshot {
        epoch: snapshot.epoch,
        digest: snapshot.digest(),
    };
    message(Message::Ack(v1::Ack {
        nonce,
        applied: Some(v1::ack::Applied::Snapshot(applied)),
    }))
}

fn acked_endpoints(nonce: u64, version: u64) -> v1::NodeMessage {
    let applied = v1::ack::Applied::Endpoints(v1::AppliedEndpoints { version });
    message(Message::Ack(v1::Ack {
        nonce,
        applied: Some(applied),
    }))
}

/// Nonce, epoch, code and field of the only answer, a Nack.
fn nacked(answers: Vec<v1::NodeMessage>) -> (u64, u64, String, String) {
    match answers.as_slice() {
        [
            v1::NodeMessage {
                message: Some(Message::Nack(nack)),
            },
        ] => {
            assert!(!nack.message.is_empty());
            (nack.nonce, nack.epoch, nack.code.clone(), nack.field.clone())
        }
        other => panic!("not one Nack: {other:?}"),
    }
}

/// Epoch and trace context of each snapshot that a node was offered.
type Offered = Arc<Mutex<Vec<(u64, Option<String>)>>>;

/// A mirror whose node applies a snapshot once every stable revision has an endpoint, and what it was offered.
fn mirror(initial: View) -> (Mirror, Offered) {
    let offered = Offered::default();
    let log = offered.clone();
    let apply: ApplyFn = Box::new(move |candidate: Candidate<'_>| {
        log.lock()
            .unwrap()
            .push((candidate.snapshot.epoch, candidate.traceparent.map(str::to_owned)));
        for (model, route) in &candidate.snapshot.routes {
            let Revision { name, digest } = &route.stable;
            if !candidate
                .endpoints
                .endpoints
                .iter()
                .any(|endpoint| endpoint.serves(model, name, digest))
            {
                let field = format!("routes[{model}].stable");
                return Err(refusal(
                    "unreachable",
                    &field,
                    format!("no endpoint serves {name}"),
                ));
            }
        }
        Ok(())
    });
    (Mirror::new(initial, apply), offered)
}

/// A mirror that serves epoch 5 with v1.
fn serving() -> (Mirror, Offered, Snapshot) {
    let snapshot = snapshot(5, "v1");
    let (mirror, offered) = mirror(View {
        snapshot: Some(Arc::new(snapshot.clone())),
        endpoints: Arc::new(endpoints(1, &["v1"])),
        connected: false,
    });
    (mirror, offered, snapshot)
}

fn in_force(mirror: &Mirror) -> Option<u64> {
    mirror
        .view
        .borrow()
        .snapshot
        .as_ref()
        .map(|snapshot| snapshot.epoch)
}

#[test]
fn a_new_snapshot_is_applied_shown_and_acknowledged() {
    let (mut mirror, offered, _) = serving();
    let next = snapshot(6, "v1");
    assert_eq!(mirror.handle(push_snapshot(3, &next)), [acked(3, &next)]);
    assert_eq!(in_force(&mirror), Some(6));
    assert_eq!(*offered.lock().unwrap(), [(6, Some("00-aa-bb-01".to_owned()))]);
}

#[test]
fn an_identical_snapshot_is_acknowledged_and_not_applied_again() {
    let (mut mirror, offered, current) = serving();
    let mut view = mirror.subscribe();
    view.mark_unchanged();
    assert_eq!(mirror.handle(push_snapshot(1, &current)), [acked(1, &current)]);
    assert!(offered.lock().unwrap().is_empty());
    assert!(!view.has_changed().unwrap());
}

#[test]
fn a_snapshot_that_differs_from_its_digest_is_refused() {
    let (mut mirror, offered, _) = serving();
    let mut wire = v1::Snapshot::from(&snapshot(6, "v1"));
    wire.routes[0].generation += 1;
    let answers = mirror.handle(push(2, Resource::Snapshot(wire)));
    assert_eq!(nacked(answers), (2, 6, "digest_mismatch".into(), "digest".into()));
    assert_eq!(in_force(&mirror), Some(5));
    assert!(offered.lock().unwrap().is_empty());
}

#[test]
fn an_epoch_that_is_not_above_the_one_in_force_is_refused() {
    for epoch in [1, 5] {
        let (mut mirror, offered, _) = serving();
        let answers = mirror.handle(push_snapshot(
            2,
            &Snapshot {
                epoch,
                ..Snapshot::default()
            },
        ));
        assert_eq!(nacked(answers), (2, epoch, "stale_epoch".into(), "epoch".into()));
        assert_eq!(in_force(&mirror), Some(5));
        assert!(offered.lock().unwrap().is_empty());
    }
}

#[test]
fn a_snapshot_that_cannot_be_read_or_makes_no_sense_is_refused_with_its_field() {
    let (mut mirror, ..) = serving();
    let mut unreadable = v1::Snapshot::from(&snapshot(6, "v1"));
    unreadable.routes[0].stable = None;
    let answers = mirror.handle(push(2, Resource::Snapshot(unreadable)));
    assert_eq!(
        nacked(answers),
        (2, 6, "invalid_route".into(), "routes[demo].stable".into())
    );

    let nonsense = snapshot(7, "");
    let answers = mirror.handle(push_snapshot(3, &nonsense));
    assert_eq!(
        nacked(answers),
        (3, 7, "invalid_route".into(), "routes[demo].stable.name".into())
    );
    assert_eq!(in_force(&mirror), Some(5));
}

#[test]
fn what_the_node_vetoes_is_refused_with_its_reason() {
    let (mut mirror, ..) = serving();
    let answers = mirror.handle(push_snapshot(2, &snapshot(6, "v2")));
    assert_eq!(
        nacked(answers),
        (2, 6, "unreachable".into(), "routes[demo].stable".into())
    );
    assert_eq!(in_force(&mirror), Some(5));
}

#[test]
fn a_vetoed_snapshot_is_acknowledged_late_once_the_endpoints_allow_it() {
    let (mut mirror, offered, _) = serving();
    let next = snapshot(6, "v2");
    nacked(mirror.handle(push_snapshot(2, &next)));
    // Still no endpoint of v2: offered again, refused again, and said once only.
    assert_eq!(
        mirror.handle(push_endpoints(3, &endpoints(2, &["v1"]))),
        [acked_endpoints(3, 2)]
    );
    let answers = mirror.handle(push_endpoints(4, &endpoints(3, &["v1", "v2"])));
    assert_eq!(answers, [acked_endpoints(4, 3), acked(2, &next)]);
    assert_eq!(in_force(&mirror), Some(6));
    assert_eq!(offered.lock().unwrap().len(), 3);
    // It is in force now: nothing is left to offer.
    mirror.handle(push_endpoints(5, &endpoints(4, &["v1", "v2"])));
    assert_eq!(offered.lock().unwrap().len(), 3);
}

#[test]
fn a_vetoed_snapshot_is_forgotten_when_another_comes_or_the_stream_ends() {
    let both = endpoints(9, &["v1", "v2"]);
    let (mut mirror, ..) = serving();
    nacked(mirror.handle(push_snapshot(2, &snapshot(6, "v2"))));
    mirror.handle(push_snapshot(3, &snapshot(7, "v1")));
    assert_eq!(mirror.handle(push_endpoints(4, &both)), [acked_endpoints(4, 9)]);
    assert_eq!(in_force(&mirror), Some(7));

    let (mut mirror, ..) = serving();
    nacked(mirror.handle(push_snapshot(2, &snapshot(6, "v2"))));
    mirror.set_connected(false);
    assert_eq!(mirror.handle(push_endpoints(1, &both)), [acked_endpoints(1, 9)]);
    assert_eq!(in_force(&mirror), Some(5));
}

#[test]
fn a_heartbeat_is_answered_with_what_is_in_force() {
    let heartbeat = || {
        push(
            8,
            Resource::Heartbeat(v1::Heartbeat {
                epoch: 9,
                endpoints_version: 9,
            }),
        )
    };
    let (mut serving, _, current) = serving();
    assert_eq!(serving.handle(heartbeat()), [acked(8, &current)]);
    let (mut empty, _) = mirror(View::default());
    let nothing = message(Message::Ack(v1::Ack {
        nonce: 8,
        applied: None,
    }));
    assert_eq!(empty.handle(heartbeat()), [nothing]);
}

#[test]
fn a_resource_of_a_later_version_is_refused() {
    let (mut mirror, ..) = serving();
    let answers = mirror.handle(v1::Push {
        nonce: 4,
        ..Default::default()
    });
    assert_eq!(
        nacked(answers),
        (4, 0, "unknown_resource".into(), "resource".into())
    );
}

#[test]
fn endpoints_are_taken_as_they_are_even_under_a_lower_version() {
    let (mut mirror, ..) = serving();
    let restarted = endpoints(0, &["v1", "v2"]);
    assert_eq!(
        mirror.handle(push_endpoints(1, &restarted)),
        [acked_endpoints(1, 0)]
    );
    assert_eq!(*mirror.view.borrow().endpoints, restarted);
}

#[test]
fn a_node_without_a_snapshot_says_so() {
    assert_eq!(mirror(View::default()).0.applied(), (0, String::new(), 0));
    let (mirror, _, current) = serving();
    assert_eq!(mirror.applied(), (5, current.digest(), 1));
}
