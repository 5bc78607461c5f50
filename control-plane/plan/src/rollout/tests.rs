use super::*;

fn new(uid: &str, stable: &str, canary: &str) -> CreateRollout {
    CreateRollout {
        uid: uid.into(),
        model: "demo".into(),
        stable: stable.into(),
        canary: canary.into(),
        share: Ppm::ZERO,
        plan: Manifest::manual("demo", canary, &Sticky::default()),
    }
}

fn change(actor: &str, now_ms: u64) -> Change {
    Change {
        actor: actor.into(),
        reason: "because".into(),
        now_ms,
        traceparent: "00-a-b-01".into(),
    }
}

fn rollout() -> Rollout {
    Rollout::create(new("r-1", "v1", "v2"), None, change("ada", 100)).unwrap()
}

fn in_phase(phase: Phase) -> Rollout {
    rollout().in_phase(phase, 100)
}

const ALL: [Phase; 6] = [
    Phase::Converging,
    Phase::Paused,
    Phase::Promoting,
    Phase::Succeeded,
    Phase::Aborting,
    Phase::RolledBack,
];

#[test]
fn a_new_rollout_is_the_first_plan() {
    let rollout = rollout();
    assert_eq!(
        (rollout.generation, rollout.parent, rollout.phase),
        (1, None, Phase::Converging)
    );
    assert_eq!(
        (rollout.created_ms, rollout.updated_ms, rollout.actor.as_str()),
        (100, 100, "ada")
    );
}

#[test]
fn a_change_is_the_child_of_the_plan_that_it_replaces() {
    let next = in_phase(Phase::Paused)
        .set("5%".parse().unwrap(), change("bob", 200))
        .unwrap();
    assert_eq!(
        (next.generation, next.parent, next.phase),
        (2, Some(1), Phase::Converging)
    );
    assert_eq!((next.uid.as_str(), next.share.get()), ("r-1", 50_000));
    assert_eq!(
        (next.created_ms, next.updated_ms, next.actor.as_str()),
        (100, 200, "bob")
    );
    assert_eq!(
        (next.reason.as_str(), next.traceparent.as_str()),
        ("because", "00-a-b-01")
    );
}

#[test]
fn a_share_is_set_and_a_canary_promoted_only_while_the_share_is_the_operators() {
    for phase in ALL {
        let free = matches!(phase, Phase::Converging | Phase::Paused);
        assert_eq!(
            in_phase(phase).set(Ppm::ALL, Change::default()).is_ok(),
            free,
            "set while {phase}"
        );
        assert_eq!(
            in_phase(phase).promote(Change::default()).is_ok(),
            free,
            "promote while {phase}"
        );
    }
}

#[test]
fn a_change_that_the_phase_forbids_says_what_to_do_instead() {
    let error = in_phase(Phase::RolledBack)
        .set(Ppm::ALL, Change::default())
        .unwrap_err();
    let text = "the rollout of demo is rolled_back: setting a share is not possible; it is over; create a new rollout";
    assert_eq!(error.to_string(), text);
}

#[test]
fn an_abort_takes_share_and_pins_together() {
    for phase in [Phase::Converging, Phase::Paused, Phase::Promoting] {
        let rollout = Rollout {
            share: Ppm::ALL,
            ..in_phase(phase)
        };
        let aborted = rollout.abort("r-1", change("ada", 300)).unwrap();
        assert_eq!(
            (aborted.phase, aborted.share, aborted.generation),
            (Phase::Aborting, Ppm::ZERO, 2)
        );
        assert_eq!(aborted.revoked, ["v2"]);
    }
}

#[test]
fn a_second_abort_changes_nothing() {
    for phase in [Phase::Aborting, Phase::RolledBack] {
        assert_eq!(
            in_phase(phase).abort("", change("bob", 300)).unwrap(),
            in_phase(phase)
        );
    }
}

#[test]
fn an_abort_that_was_meant_for_another_rollout_does_nothing() {
    let error = rollout().abort("r-0", Change::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the rollout of demo is r-1, not r-0; nothing was aborted"
    );
}

#[test]
fn a_success_cannot_be_aborted() {
    assert!(matches!(
        in_phase(Phase::Succeeded).abort("", Change::default()),
        Err(RolloutError::Phase { .. })
    ));
}

#[test]
fn a_rollout_under_way_is_not_replaced() {
    for phase in ALL {
        let previous = in_phase(phase);
        let stable = previous.serving_stable().to_owned();
        let created = Rollout::create(new("r-2", &stable, "v3"), Some(&previous), Change::default());
        assert_eq!(created.is_ok(), phase.is_final(), "create while {phase}");
    }
}

#[test]
fn a_rollout_starts_from_what_serves() {
    let previous = in_phase(Phase::Succeeded);
    let error = Rollout::create(new("r-2", "v1", "v3"), Some(&previous), Change::default()).unwrap_err();
    assert!(
        matches!(&error, RolloutError::NotServing { serving, .. } if serving == "v2"),
        "{error}"
    );
    Rollout::create(new("r-2", "v2", "v3"), Some(&previous), Change::default()).unwrap();
}

#[test]
fn stable_and_canary_are_two() {
    let error = Rollout::create(new("r-1", "v1", "v1"), None, Change::default()).unwrap_err();
    assert_eq!(error, RolloutError::SameRevision("v1".into()));
}

#[test]
fn an_aborted_revision_stays_revoked_until_it_is_tried_again() {
    let aborted = rollout()
        .abort("", Change::default())
        .unwrap()
        .in_phase(Phase::RolledBack, 300);
    let other = Rollout::create(new("r-2", "v1", "v3"), Some(&aborted), Change::default()).unwrap();
    assert_eq!(other.revoked, ["v2"]);
    let again = Rollout::create(new("r-3", "v1", "v2"), Some(&aborted), Change::default()).unwrap();
    assert!(again.revoked.is_empty());
}

#[test]
fn a_plan_survives_the_store() {
    let rollout = rollout();
    let stored = serde_json::to_string(&rollout).unwrap();
    assert_eq!(serde_json::from_str::<Rollout>(&stored).unwrap(), rollout);
}
