use proptest::{collection::vec, option, prelude::*};

use super::*;
use crate::{Canary, OnMissing, Ppm, Sticky};

fn route(model: &str) -> Route {
    Route {
        model: model.into(),
        stable: Revision::new("v1", "aa"),
        canary: Some(Canary {
            revision: Revision::new("v2", "bb"),
            share: "5%".parse().unwrap(),
            ..Canary::default()
        }),
        rollout_uid: "r-1".into(),
        generation: 3,
        sticky: Sticky::default(),
        pinnable: vec![Revision::new("v3", "cc")],
        revoked: vec!["v0".into()],
        ..Route::default()
    }
}

fn snapshot(epoch: u64, routes: impl IntoIterator<Item = Route>) -> Snapshot {
    Snapshot {
        epoch,
        routes: routes
            .into_iter()
            .map(|route| (route.model.clone(), route))
            .collect(),
    }
}

/// Computed once with another implementation of BLAKE3 over the documented form. Two versions of this program
/// must agree on them, or none applies the other's snapshots.
#[test]
fn digests_are_those_that_they_always_were() {
    let empty = "a55a3b4dff977a51d0ffa7ed96102697798aede6d755390bbf4c4feb8973fa7b";
    let demo = "6f320fe31904976997754c96afa53935f4bca9f54d5741b61be23cc4de3b6f23";
    assert_eq!(snapshot(0, []).digest(), empty);
    assert_eq!(snapshot(7, [route("demo")]).digest(), demo);
}

#[test]
fn every_field_counts() {
    let changes: [fn(&mut Snapshot); 13] = [
        |s| s.epoch += 1,
        |s| drop(s.routes.insert("other".into(), route("other"))),
        |s| demo(s).model.push('x'),
        |s| demo(s).stable.name.push('x'),
        |s| demo(s).stable.digest.push('x'),
        |s| demo(s).canary = None,
        |s| demo(s).canary.as_mut().unwrap().share = Ppm::ALL,
        |s| demo(s).rollout_uid.push('x'),
        |s| demo(s).generation += 1,
        |s| demo(s).sticky.keys.clear(),
        |s| demo(s).sticky.on_missing = OnMissing::Stable,
        |s| demo(s).pinnable.clear(),
        |s| demo(s).revoked.clear(),
    ];
    let digests = changes.map(|change| {
        let mut snapshot = snapshot(7, [route("demo")]);
        change(&mut snapshot);
        snapshot.digest()
    });
    let mut all = BTreeSet::from(digests);
    all.insert(snapshot(7, [route("demo")]).digest());
    assert_eq!(all.len(), 14);
}

fn demo(snapshot: &mut Snapshot) -> &mut Route {
    snapshot.routes.get_mut("demo").unwrap()
}

#[test]
fn a_snapshot_that_makes_sense_is_valid() {
    assert_eq!(snapshot(1, [route("a"), route("b")]).validate(), Ok(()));
    assert_eq!(snapshot(1, []).validate(), Ok(()));
}

#[test]
fn what_makes_no_sense_is_refused_with_its_field() {
    type Spoil = fn(&mut Route);
    let cases: [(&str, Spoil); 9] = [
        ("model", |r| r.model = "other".into()),
        ("stable.name", |r| r.stable.name.clear()),
        ("stable.digest", |r| r.stable.digest.clear()),
        ("canary.revision.name", |r| {
            r.canary.as_mut().unwrap().revision.name = "v1".into()
        }),
        ("canary.revision.digest", |r| {
            r.canary.as_mut().unwrap().revision.digest.clear()
        }),
        ("pinnable[0].digest", |r| r.pinnable[0].digest.clear()),
        ("pinnable[1].name", |r| r.pinnable.push(Revision::new("v2", "bb"))),
        ("rollout_uid", |r| r.rollout_uid.clear()),
        ("revoked[1]", |r| r.revoked.push("v3".into())),
    ];
    for (field, spoil) in cases {
        let mut snapshot = snapshot(1, [route("demo")]);
        spoil(demo(&mut snapshot));
        let error = snapshot.validate().unwrap_err();
        assert_eq!(
            (error.code, error.field),
            ("invalid_route", format!("routes[demo].{field}"))
        );
    }
}

prop_compose! {
    fn any_revision()(name in "v?[0-9]?", digest in "[a-f]{0,2}") -> Revision {
        Revision { name, digest }
    }
}

prop_compose! {
    fn any_canary()(revision in any_revision(), ppm in 0..=1_000_000u32) -> Canary {
        Canary { revision, share: Ppm::new(ppm).unwrap(), ..Canary::default() }
    }
}

prop_compose! {
    fn any_route()(
        model in "[a-c]?",
        stable in any_revision(),
        canary in option::of(any_canary()),
        rollout_uid in ".{0,3}",
        generation in any::<u64>(),
        pinnable in vec(any_revision(), 0..3),
        revoked in vec("v[0-9]", 0..3),
    ) -> Route {
        Route { model, stable, canary, rollout_uid, generation, sticky: Sticky::default(), pinnable, revoked, ..Route::default() }
    }
}

proptest! {
    #[test]
    fn validation_ends_in_a_verdict_and_names_a_field(routes in vec(("[a-c]?", any_route()), 0..4)) {
        let snapshot = Snapshot { epoch: 1, routes: routes.into_iter().collect() };
        if let Err(error) = snapshot.validate() {
            prop_assert!(error.field.starts_with("routes["), "{}", error);
            prop_assert!(!error.message.is_empty());
        }
    }

    #[test]
    fn the_order_in_which_routes_arrive_does_not_matter(
        routes in proptest::sample::subsequence(vec!["a", "b", "c", "d", "e"], 0..=5).prop_shuffle(),
    ) {
        let shuffled = snapshot(1, routes.iter().map(|model| route(model)));
        let mut sorted = routes.clone();
        sorted.sort_unstable();
        prop_assert_eq!(shuffled.digest(), snapshot(1, sorted.iter().map(|model| route(model))).digest());
    }

    #[test]
    fn a_snapshot_survives_the_store(route in any_route()) {
        let stored = serde_json::to_string(&snapshot(1, [route])).unwrap();
        let back: Snapshot = serde_json::from_str(&stored).unwrap();
        prop_assert_eq!(serde_json::to_string(&back).unwrap(), stored);
    }
}
