use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{Canary, Ppm, Sticky};

fn route(share: &str) -> Route {
    Route {
        model: "demo".into(),
        stable: Revision::new("v1", "aa"),
        canary: Some(Canary {
            revision: Revision::new("v2", "bb"),
            share: share.parse().unwrap(),
            ..Canary::default()
        }),
        rollout_uid: "r-1".into(),
        generation: 1,
        sticky: Sticky::default(),
        pinnable: vec![Revision::new("v3", "cc")],
        revoked: vec!["v0".into()],
        ..Route::default()
    }
}

/// Revision, reason and bucket of a request with this pin and this metadata.
fn assigned(
    route: &Route,
    pin: Option<&str>,
    metadata: &[(&str, &str)],
    draw: u64,
) -> Result<(String, Reason, Option<u32>), AssignError> {
    let metadata: BTreeMap<&str, &str> = metadata.iter().copied().collect();
    let lookup = |name: &str| metadata.get(name).copied();
    let assignment = assign(
        route,
        &Attributes {
            pin,
            ..Attributes::new(&lookup)
        },
        draw,
    )?;
    Ok((
        assignment.revision.name.clone(),
        assignment.reason,
        assignment.bucket,
    ))
}

fn of_user(route: &Route, user: &str) -> String {
    assigned(route, None, &[("x-user-id", user)], 0).unwrap().0
}

/// Computed once with another implementation (xxHash's own, from Python). They must never change: every user of
/// every running rollout would move.
#[test]
fn buckets_are_those_that_they_always_were() {
    let long = "x".repeat(300);
    for (salt, key, expected) in [
        ("r-1", "", 950_637),
        ("r-1", "ada", 949_232),
        ("r-1", "u1", 855_596),
        ("r-1", "u2", 66_208),
        ("r-2", "u1", 666_947),
        ("0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b", "地球", 334_493),
        ("r-1", &long, 298_736),
        ("", "r-1", 203_969),
    ] {
        assert_eq!(bucket(salt, key.as_bytes()), expected, "{salt:?} {key:?}");
    }
}

#[test]
fn salt_and_key_cannot_run_into_each_other() {
    assert_ne!(bucket("r-1", b"1"), bucket("r-", b"11"));
}

#[test]
fn the_lowest_and_the_highest_draw_stay_in_range() {
    assert_eq!((scale(0), scale(u64::MAX)), (0, 999_999));
}

#[test]
fn a_pin_goes_before_the_bucket() {
    let pinned = |pin| assigned(&route("100%"), Some(pin), &[("x-user-id", "ada")], 0).unwrap();
    for revision in ["v1", "v2", "v3"] {
        assert_eq!(pinned(revision), (revision.into(), Reason::Pin, None));
    }
}

#[test]
fn a_pin_to_an_aborted_revision_is_ignored() {
    assert_eq!(
        assigned(&route("100%"), Some("v0"), &[], 0).unwrap(),
        ("v1".into(), Reason::PinRevoked, None)
    );
}

#[test]
fn a_pin_to_an_unknown_revision_is_an_error_that_names_the_known_ones() {
    let error = assigned(&route("5%"), Some("v9"), &[], 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"model demo has no revision "v9"; it has v1, v2, v3"#
    );
}

#[test]
fn without_a_rollout_stable_serves() {
    let route = Route {
        canary: None,
        ..route("0%")
    };
    let expected = ("v1".into(), Reason::NoRollout, None);
    assert_eq!(
        assigned(&route, None, &[("x-user-id", "ada")], 0).unwrap(),
        expected
    );
}

#[test]
fn a_request_without_a_key_is_drawn_for_or_goes_to_stable() {
    let mut route = route("50%");
    for metadata in [&[][..], &[("x-user-id", "")]] {
        assert_eq!(
            assigned(&route, None, metadata, 0).unwrap(),
            ("v2".into(), Reason::Request, Some(0))
        );
        let (revision, reason, _) = assigned(&route, None, metadata, u64::MAX).unwrap();
        assert_eq!((revision.as_str(), reason), ("v1", Reason::Request));
    }
    route.sticky.on_missing = OnMissing::Stable;
    assert_eq!(
        assigned(&route, None, &[], 0).unwrap(),
        ("v1".into(), Reason::MissingKey, None)
    );
}

#[test]
fn the_first_key_that_a_request_has_counts() {
    let mut route = route("50%");
    route.sticky.keys = vec![
        "metadata:x-session-id".parse().unwrap(),
        "metadata:x-user-id".parse().unwrap(),
    ];
    let bucket_of = |metadata: &[(&str, &str)]| assigned(&route, None, metadata, 0).unwrap().2.unwrap();
    assert_eq!(
        bucket_of(&[("x-user-id", "u1"), ("x-session-id", "s1")]),
        bucket("r-1", b"s1")
    );
    assert_eq!(bucket_of(&[("x-user-id", "u1")]), bucket("r-1", b"u1"));
}

#[test]
fn a_share_of_the_keys_is_about_that_share_of_the_users() {
    let users: Vec<String> = (0..20_000).map(|n| format!("user-{n}")).collect();
    for (share, low, high) in [
        ("0%", 0, 0),
        ("1%", 144, 256),
        ("5%", 877, 1123),
        ("50%", 9717, 10_283),
    ] {
        let route = route(share);
        let canary = users.iter().filter(|user| of_user(&route, user) == "v2").count();
        // Four standard deviations on either side.
        assert!((low..=high).contains(&canary), "{canary} of 20000 at {share}");
    }
    assert!(users.iter().all(|user| of_user(&route("100%"), user) == "v2"));
}

#[test]
fn another_rollout_tries_other_users() {
    let (first, second) = (
        route("5%"),
        Route {
            rollout_uid: "r-2".into(),
            ..route("5%")
        },
    );
    let canaries = |route: &Route| {
        (0..20_000)
            .map(|n| format!("user-{n}"))
            .filter(|user| of_user(route, user) == "v2")
            .collect::<Vec<_>>()
    };
    let (first, second) = (canaries(&first), canaries(&second));
    let both = first.iter().filter(|user| second.contains(user)).count();
    // By chance it is 5 % of 5 %: 50, give or take 7.
    assert!((20..=80).contains(&both), "{both} users are in both");
}

proptest! {
    #[test]
    fn raising_the_share_moves_nobody_off_the_canary(
        users in proptest::collection::vec(".{1,12}", 1..60),
        low in 0..=1_000_000u32,
        high in 0..=1_000_000u32,
    ) {
        let (low, high) = (low.min(high), low.max(high));
        let at = |ppm| {
            let mut route = route("0%");
            route.canary.as_mut().unwrap().share = Ppm::new(ppm).unwrap();
            route
        };
        let (low, high) = (at(low), at(high));
        for user in &users {
            prop_assert!(of_user(&low, user) == "v1" || of_user(&high, user) == "v2", "{user:?} moved back");
        }
    }

    #[test]
    fn nothing_is_drawn_for_a_request_with_a_key(user in ".{1,12}", draws in any::<[u64; 2]>()) {
        let route = route("50%");
        let [first, second] = draws.map(|draw| assigned(&route, None, &[("x-user-id", &user)], draw).unwrap());
        prop_assert_eq!(first, second);
    }
}
