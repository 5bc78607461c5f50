use penstock_plan::{
    Canary, Endpoint, EndpointSet, OnMissing, Phase, Ppm, Revision, Route, ServedRevision, Snapshot, Sticky,
    WorkerRecord,
};
use proptest::{collection::vec, option, prelude::*};

use super::ConvertError;
use crate::v1;

fn revision() -> impl Strategy<Value = Revision> {
    (any::<String>(), any::<String>()).prop_map(|(name, digest)| Revision { name, digest })
}

fn sticky() -> impl Strategy<Value = Sticky> {
    let on_missing = prop_oneof![Just(OnMissing::Request), Just(OnMissing::Stable)];
    (vec("metadata:[a-z][a-z0-9_.-]{0,8}", 0..3), on_missing).prop_map(|(keys, on_missing)| Sticky {
        keys: keys.iter().map(|key| key.parse().unwrap()).collect(),
        on_missing,
        ..Sticky::default()
    })
}

prop_compose! {
    fn canary()(revision in revision(), ppm in 0..=1_000_000u32) -> Canary {
        Canary { revision, share: Ppm::new(ppm).unwrap(), ..Canary::default() }
    }
}

prop_compose! {
    fn route()(
        model in any::<String>(),
        stable in revision(),
        canary in option::of(canary()),
        rollout_uid in any::<String>(),
        generation in any::<u64>(),
        sticky in sticky(),
        pinnable in vec(revision(), 0..3),
        revoked in vec(any::<String>(), 0..3),
    ) -> Route {
        Route { model, stable, canary, rollout_uid, generation, sticky, pinnable, revoked, ..Route::default() }
    }
}

prop_compose! {
    fn snapshot()(epoch in any::<u64>(), routes in vec(route(), 0..4)) -> Snapshot {
        Snapshot { epoch, routes: routes.into_iter().map(|route| (route.model.clone(), route)).collect() }
    }
}

prop_compose! {
    fn served()(
        model in any::<String>(),
        revision in any::<String>(),
        digest in any::<String>(),
        context_length in any::<u32>(),
    ) -> ServedRevision {
        ServedRevision { model, revision, digest, context_length }
    }
}

prop_compose! {
    fn worker()(
        [id, boot_id, address, ops_address] in any::<[String; 4]>(),
        [region, runner, device] in any::<[String; 3]>(),
        draining in any::<bool>(),
        started_ms in any::<u64>(),
        revisions in vec(served(), 0..3),
    ) -> WorkerRecord {
        WorkerRecord {
            id, boot_id, address, ops_address, region, runner, device, draining, started_ms, revisions,
        }
    }
}

proptest! {
    #[test]
    fn a_snapshot_comes_back_as_it_went_and_under_its_digest(snapshot in snapshot()) {
        let wire = v1::Snapshot::from(&snapshot);
        let digest = wire.digest.clone();
        let back = Snapshot::try_from(wire).unwrap();
        prop_assert_eq!(back.digest(), digest);
        prop_assert_eq!(back, snapshot);
    }

    #[test]
    fn a_worker_comes_back_as_it_went(worker in worker()) {
        prop_assert_eq!(WorkerRecord::from(v1::Worker::from(&worker)), worker);
    }

    #[test]
    fn endpoints_come_back_as_they_went(workers in vec(worker(), 0..4), version in any::<u64>()) {
        let set = EndpointSet { version, endpoints: workers.iter().map(Endpoint::from).collect() };
        prop_assert_eq!(EndpointSet::from(v1::Endpoints::from(&set)), set);
    }
}

#[test]
fn a_phase_comes_back_as_it_went() {
    use Phase::{Aborting, Converging, Paused, Promoting, RolledBack, Succeeded};
    for phase in [Converging, Paused, Promoting, Succeeded, Aborting, RolledBack] {
        assert_eq!(Phase::try_from(v1::Phase::from(phase)), Ok(phase));
    }
    assert_eq!(
        Phase::try_from(v1::Phase::Unspecified).unwrap_err().field,
        "phase"
    );
}

fn wire_route() -> v1::Route {
    v1::Route {
        model: "demo".into(),
        stable: Some(v1::Revision {
            name: "v1".into(),
            digest: "aa".into(),
        }),
        canary: Some(v1::Canary {
            revision: Some(v1::Revision {
                name: "v2".into(),
                digest: "bb".into(),
            }),
            ppm: 50_000,
            ..v1::Canary::default()
        }),
        rollout_uid: "r-1".into(),
        generation: 1,
        sticky: Some(v1::Sticky {
            keys: vec!["metadata:x-user-id".into()],
            on_missing: 1,
            ..v1::Sticky::default()
        }),
        pinnable: vec![],
        revoked: vec![],
        ..v1::Route::default()
    }
}

fn refusal(spoil: impl FnOnce(&mut v1::Route)) -> ConvertError {
    let mut route = wire_route();
    Snapshot::try_from(v1::Snapshot {
        routes: vec![route.clone()],
        ..Default::default()
    })
    .unwrap();
    spoil(&mut route);
    Snapshot::try_from(v1::Snapshot {
        routes: vec![route],
        ..Default::default()
    })
    .unwrap_err()
}

#[test]
fn what_the_plan_cannot_hold_is_refused_with_its_field_and_value() {
    let cases: [(ConvertError, &str, &str); 6] = [
        (
            refusal(|route| route.stable = None),
            "routes[demo].stable",
            "missing",
        ),
        (
            refusal(|route| route.sticky = None),
            "routes[demo].sticky",
            "missing",
        ),
        (
            refusal(|route| route.canary.as_mut().unwrap().revision = None),
            "routes[demo].canary.revision",
            "missing",
        ),
        (
            refusal(|route| route.canary.as_mut().unwrap().ppm = 1_000_001),
            "routes[demo].canary.ppm",
            "1000001",
        ),
        (
            refusal(|route| route.sticky.as_mut().unwrap().keys.push("cookie:a".into())),
            "routes[demo].sticky.keys[1]",
            "cookie:a",
        ),
        (
            refusal(|route| route.sticky.as_mut().unwrap().on_missing = 9),
            "routes[demo].sticky.on_missing",
            "9",
        ),
    ];
    for (error, field, value) in cases {
        assert_eq!(error.field, field);
        assert!(error.message.contains(value), "{error}");
    }
}

#[test]
fn two_routes_of_one_model_are_refused() {
    let wire = v1::Snapshot {
        routes: vec![wire_route(), wire_route()],
        ..Default::default()
    };
    assert_eq!(Snapshot::try_from(wire).unwrap_err().field, "routes[demo]");
}
