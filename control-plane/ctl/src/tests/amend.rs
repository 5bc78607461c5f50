//! Steps, pauses, approvals, retries and the way back.

use super::*;

async fn amended(words: &[&str]) -> (Ran, Vec<(String, String)>) {
    let fake = Fake::start().await;
    let ran = ctl(&fake, words).await;
    let amended = fake.state().amended.clone();
    (ran, amended)
}

#[tokio::test]
async fn each_amendment_names_the_rollout_it_saw_and_tells_where_it_stands() {
    for (verb, says) in [
        ("pause", "demo: paused at 1%; epoch 8; 2/2 acknowledged in "),
        (
            "resume",
            "demo: v1 → v2 at 2%, paused; epoch 8; 2/2 acknowledged in ",
        ),
        (
            "approve",
            "demo: v1 → v2 at 5%, paused; epoch 8; 2/2 acknowledged in ",
        ),
        ("retry", "demo: v1 → v2 at 0%, warming; epoch 8; "),
    ] {
        let (ran, amended) = amended(&["rollout", verb, "--reason", "why"]).await;
        assert_eq!(ran.code, 0, "{verb}: {}", ran.err);
        assert!(ran.out.starts_with(says), "{verb}: {}", ran.out);
        assert_eq!(amended, [(verb.to_owned(), "r-1".to_owned())]);
    }
}

#[tokio::test]
async fn a_dry_run_shows_what_would_be_and_a_wrong_revision_is_a_conflict() {
    let (dry, written) = amended(&["rollout", "resume", "--dry-run"]).await;
    assert_eq!((dry.code, written.len()), (0, 0), "{}", dry.err);
    assert!(
        dry.out.starts_with("demo: v1 → v2 at 2%, converging"),
        "{}",
        dry.out
    );
    assert!(dry.err.contains("a dry run"), "{}", dry.err);
    let (wrong, written) = amended(&["rollout", "resume", "--expect-revision", "6"]).await;
    assert_eq!((wrong.code, written.len()), (4, 0));
    assert!(
        wrong.err.contains("SEEN AT 6") && wrong.err.contains("NOW AT 7"),
        "{}",
        wrong.err
    );
    let (right, written) = amended(&["rollout", "resume", "--expect-revision", "7"]).await;
    assert_eq!((right.code, written.len()), (0, 1), "{}", right.err);
}

#[tokio::test]
async fn steps_are_numbered_from_one_and_a_jump_asks() {
    let fake = Fake::start().await;
    fake.state().detail.steps = [10_000, 50_000, 500_000]
        .map(|canary_ppm| penstock_proto::v1::StepStatus {
            canary_ppm,
            ..penstock_proto::v1::StepStatus::default()
        })
        .to_vec();
    let next = ctl(&fake, &["rollout", "step"]).await;
    assert_eq!(next.code, 0, "{}", next.err);
    fake.state().rollout.canary_ppm = 10_000;
    let jump = ctl(&fake, &["rollout", "step", "3"]).await;
    assert_eq!(jump.code, 2, "{}", jump.err);
    assert!(jump.err.contains("from 1% to 50%"), "{}", jump.err);
    let third = ctl(&fake, &["rollout", "step", "3", "-y"]).await;
    assert_eq!(third.code, 0, "{}", third.err);
    let verbs: Vec<_> = fake
        .state()
        .amended
        .iter()
        .map(|(verb, _)| verb.clone())
        .collect();
    assert_eq!(verbs, ["step", "step 2"]);
}

#[tokio::test]
async fn undo_asks_and_wants_a_flag_where_nobody_answers() {
    let (silent, written) = amended(&["rollout", "undo"]).await;
    assert_eq!((silent.code, written.len()), (2, 0));
    assert!(
        silent.err.contains("from v2 back to v1: say -y"),
        "{}",
        silent.err
    );
    let fake = Fake::start().await;
    let no = answered(&fake.address, Some("n\n"), &["rollout", "undo"]).await;
    assert_eq!(no.code, 1);
    let yes = answered(&fake.address, Some("yes\n"), &["rollout", "undo"]).await;
    assert_eq!(yes.code, 0, "{}", yes.err);
    assert!(yes.out.contains("succeeded"), "{}", yes.out);
    let (flag, written) = amended(&["rollout", "undo", "-y", "--no-wait"]).await;
    assert_eq!((flag.code, written.len()), (0, 1), "{}", flag.err);
}

#[tokio::test]
async fn an_abort_while_an_amendment_spreads_is_exit_seven() {
    let fake = Fake::start().await;
    fake.state().aborts = true;
    assert_eq!(ctl(&fake, &["rollout", "resume"]).await.code, 7);
}
