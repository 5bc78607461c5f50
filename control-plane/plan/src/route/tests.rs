use super::*;
use crate::{Change, CreateRollout, Manifest};

fn published(names: &[&str]) -> Published {
    let revision = |name: &&str| PublishedRevision {
        model: "demo".into(),
        revision: (*name).into(),
        digest: format!("digest-{name}"),
        published_ms: 0,
        ..PublishedRevision::default()
    };
    Published::from([("demo".into(), names.iter().map(revision).collect())])
}

fn rollout() -> Rollout {
    let new = CreateRollout {
        uid: "r-1".into(),
        model: "demo".into(),
        stable: "v1".into(),
        canary: "v2".into(),
        share: "5%".parse().unwrap(),
        plan: Manifest::manual("demo", "v2", &Sticky::default()),
    };
    Rollout::create(new, None, Change::default()).unwrap()
}

fn route(rollout: &Rollout) -> Route {
    build_routes(
        std::slice::from_ref(rollout),
        &published(&["v0", "v1", "v2", "v3"]),
    )
    .remove("demo")
    .unwrap()
}

fn names(revisions: &[Revision]) -> Vec<&str> {
    revisions.iter().map(|revision| revision.name.as_str()).collect()
}

#[test]
fn a_model_without_a_rollout_serves_its_first_revision_and_lets_the_others_be_pinned() {
    let route = build_routes(&[], &published(&["v2", "v1"]))
        .remove("demo")
        .unwrap();
    assert_eq!(route.stable, Revision::new("v2", "digest-v2"));
    assert_eq!(
        (route.canary.as_ref(), names(&route.pinnable)),
        (None, vec!["v1"])
    );
    assert_eq!((route.rollout_uid.as_str(), route.generation), ("", 0));
}

#[test]
fn a_rollout_splits_between_stable_and_canary() {
    let route = route(&rollout());
    assert_eq!(route.stable, Revision::new("v1", "digest-v1"));
    let canary = route.canary.as_ref().unwrap();
    assert_eq!(
        (&canary.revision, canary.share.get()),
        (&Revision::new("v2", "digest-v2"), 50_000)
    );
    assert_eq!(
        (names(&route.pinnable), &route.revoked),
        (vec!["v0", "v3"], &vec![])
    );
    assert_eq!((route.rollout_uid.as_str(), route.generation), ("r-1", 1));
}

#[test]
fn a_promotion_sends_everything_to_the_canary_before_and_after_it_is_stable() {
    let promoting = rollout().promote(Change::default()).unwrap();
    assert_eq!(route(&promoting).canary.unwrap().share, Ppm::ALL);
    let route = route(&promoting.replanned(Phase::Succeeded, Change::default()));
    assert_eq!((route.stable.name.as_str(), route.canary.as_ref()), ("v2", None));
    assert_eq!(names(&route.pinnable), ["v0", "v1", "v3"]);
}

#[test]
fn an_abort_leaves_stable_alone_and_revokes_the_canary() {
    let aborting = rollout().abort("", Change::default()).unwrap();
    for rollout in [aborting.in_phase(Phase::RolledBack, 9), aborting] {
        let route = route(&rollout);
        assert_eq!((route.stable.name.as_str(), route.canary.as_ref()), ("v1", None));
        assert_eq!(
            (names(&route.pinnable), route.revoked),
            (vec!["v0", "v3"], vec!["v2".to_owned()])
        );
    }
}

#[test]
fn revisions_that_nobody_published_are_left_out() {
    let routes = |names: &[&str]| build_routes(&[rollout()], &published(names));
    assert_eq!(routes(&["v1"])["demo"].canary, None);
    assert!(routes(&["v2"]).is_empty());
}

#[test]
fn sticky_keys_are_read_in_lower_case_and_shown_in_one_form() {
    for text in ["metadata:x-user-id", "header:X-User-Id"] {
        let key: StickyKey = text.parse().unwrap();
        assert_eq!(key, StickyKey::Metadata("x-user-id".into()));
        assert_eq!(key.to_string(), "metadata:x-user-id");
    }
    for text in ["auth:subject", "client_ip"] {
        assert_eq!(text.parse::<StickyKey>().unwrap().to_string(), text);
    }
}

#[test]
fn what_is_no_sticky_key_is_refused_with_its_value() {
    for text in [
        "",
        "x-user-id",
        "metadata:",
        "metadata:x user",
        "cookie:session",
        "metadata:ключ",
    ] {
        let error = text.parse::<StickyKey>().unwrap_err().to_string();
        assert!(error.contains(&format!("{text:?}")), "{error}");
    }
}
