use super::*;

fn change(goal: Goal) -> Change {
    let written = Rollout {
        uid: "r-1".into(),
        model: "demo".into(),
        generation: 3,
        ..Rollout::default()
    };
    Change {
        goal,
        written,
        started: Instant::now(),
    }
}

fn status(phase: Phase, generation: u64, ppm: u32, (acknowledged, live): (u32, u32)) -> RolloutStatus {
    let rollout = Rollout {
        uid: "r-1".into(),
        model: "demo".into(),
        canary: "v2".into(),
        stable: "v1".into(),
        phase: phase.into(),
        generation,
        canary_ppm: ppm,
        actor: "bob".into(),
        ..Rollout::default()
    };
    RolloutStatus {
        rollout: Some(rollout),
        epoch: 9,
        live_gateways: live,
        acknowledged,
        pending: (acknowledged..live).map(|n| format!("gw-{n}")).collect(),
        ..RolloutStatus::default()
    }
}

#[test]
fn a_share_is_reached_when_the_rollout_has_settled_with_every_acknowledgement() {
    let set = change(Goal::Share(50_000));
    assert_eq!(
        set.judge(&status(Phase::Converging, 3, 50_000, (1, 2))),
        Progress::Waiting
    );
    assert_eq!(
        set.judge(&status(Phase::Converging, 3, 50_000, (2, 2))),
        Progress::Waiting
    );
    assert_eq!(
        set.judge(&status(Phase::Paused, 3, 50_000, (1, 2))),
        Progress::Waiting
    );
    assert_eq!(
        set.judge(&status(Phase::Paused, 3, 50_000, (2, 2))),
        Progress::Done
    );
    let unpublished = RolloutStatus {
        epoch: 0,
        ..status(Phase::Paused, 3, 50_000, (2, 2))
    };
    assert_eq!(set.judge(&unpublished), Progress::Waiting);
}

#[test]
fn news_of_an_older_generation_is_no_answer() {
    let set = change(Goal::Share(50_000));
    assert_eq!(
        set.judge(&status(Phase::Paused, 2, 10_000, (2, 2))),
        Progress::Waiting
    );
    assert_eq!(
        set.judge(&status(Phase::RolledBack, 2, 0, (2, 2))),
        Progress::Waiting
    );
}

#[test]
fn a_share_that_somebody_changed_again_is_superseded_and_an_abort_is_a_rollback() {
    let set = change(Goal::Share(50_000));
    assert_eq!(
        set.judge(&status(Phase::Converging, 4, 70_000, (0, 2))),
        Progress::Superseded
    );
    assert_eq!(
        set.judge(&status(Phase::Promoting, 4, 1_000_000, (0, 2))),
        Progress::Superseded
    );
    assert_eq!(
        set.judge(&status(Phase::Aborting, 4, 0, (0, 2))),
        Progress::RolledBack
    );
    let mut other = status(Phase::Paused, 1, 0, (2, 2));
    other.rollout.as_mut().unwrap().uid = "r-2".into();
    assert_eq!(set.judge(&other), Progress::Superseded);
}

#[test]
fn promotion_and_abort_end_in_their_own_phase() {
    let promote = change(Goal::Promoted);
    assert_eq!(
        promote.judge(&status(Phase::Promoting, 3, 1_000_000, (2, 2))),
        Progress::Waiting
    );
    assert_eq!(
        promote.judge(&status(Phase::Succeeded, 4, 1_000_000, (2, 2))),
        Progress::Done
    );
    assert_eq!(
        promote.judge(&status(Phase::Aborting, 4, 0, (2, 2))),
        Progress::RolledBack
    );
    let abort = change(Goal::RolledBack);
    assert_eq!(
        abort.judge(&status(Phase::Aborting, 3, 0, (2, 2))),
        Progress::Waiting
    );
    assert_eq!(
        abort.judge(&status(Phase::RolledBack, 4, 0, (2, 2))),
        Progress::Done
    );
}

#[test]
fn outcomes_read_as_the_command_line_promises() {
    let written = Rollout {
        canary_ppm: 50_000,
        generation: 3,
        ..status(Phase::Paused, 3, 50_000, (12, 12)).rollout.unwrap()
    };
    let line = |goal, status: &RolloutStatus| {
        Outcome::converged(goal, status, &written, Duration::from_millis(34)).table()
    };
    let mut all = status(Phase::Paused, 3, 50_000, (12, 12));
    all.epoch = 8123;
    assert_eq!(
        line(Goal::Share(50_000), &all),
        "5% desired; epoch 8123; 12/12 acknowledged in 34 ms\n"
    );
    assert_eq!(
        line(Goal::Promoted, &all),
        "demo: v2 promoted; epoch 8123; 12/12 acknowledged in 34 ms\n"
    );
    assert_eq!(
        line(Goal::RolledBack, &all),
        "demo: rolled back to v1; epoch 8123; 12/12 acknowledged in 34 ms\n"
    );
    let unwaited = Outcome::written(Goal::Share(50_000), &written).table();
    assert_eq!(
        unwaited,
        "5% desired; generation 3 is written; not waited for gateways\n"
    );
}

#[test]
fn what_is_missing_at_the_end_is_named() {
    let mut last = status(Phase::Converging, 3, 50_000, (1, 3));
    last.nacks = vec![penstock_proto::v1::GatewayNack {
        gateway: "gw-1".into(),
        epoch: 9,
        code: "canary_unreachable".into(),
        message: "no endpoint of v2".into(),
    }];
    let seen = Seen {
        last: Some(last),
        ..Seen::default()
    };
    let text = change(Goal::Share(50_000)).unfinished(&seen, Duration::from_secs(30));
    for part in [
        "1/3 gateways",
        "epoch 9",
        "30.0 s",
        "gw-1 refuses",
        "gw-2 has not answered",
        "ctl rollout abort",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
