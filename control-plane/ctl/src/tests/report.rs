//! Explanations, history and waiting.

use super::*;
use penstock_proto::v1::{Counts, MetricVerdict, PauseReason, Phase, StepStatus, Verdict};

fn metric() -> MetricVerdict {
    MetricVerdict {
        metric: "error_rate".into(),
        rule: "at most 1%".into(),
        verdict: Verdict::Insufficient.into(),
        action: "abort".into(),
        canary: Some(Counts {
            requests: 120,
            bad: 3,
        }),
        stable: Some(Counts {
            requests: 10_000,
            bad: 100,
        }),
        canary_rate: Some(0.025),
        stable_rate: Some(0.01),
        lower: Some(0.004),
        upper: Some(0.081),
        log_evidence: 2.0,
        log_threshold: 8.0,
        would_change: "needs 180 more requests of the canary".into(),
        min_samples: 300,
    }
}

async fn judged() -> Fake {
    let fake = Fake::start().await;
    {
        let mut state = fake.state();
        state.rollout.set_phase(Phase::Judging);
        state.rollout.steps = 2;
        state.rollout.message = "needs 180 more requests of the canary".into();
        state.detail.metrics = vec![metric()];
        state.detail.steps = ["current", "ahead"]
            .map(|word| StepStatus {
                canary_ppm: 10_000,
                hold_ms: 3_600_000,
                min_samples: 300,
                state: word.into(),
                ..StepStatus::default()
            })
            .to_vec();
        state.detail.key_share = Some(0.0098);
        state.detail.next_ms = u64::MAX / 2;
    }
    fake
}

#[tokio::test]
async fn explain_tells_counts_rates_bounds_evidence_and_what_would_change_it() {
    let fake = judged().await;
    let ran = ctl(&fake, &["rollout", "explain"]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    for part in [
        "demo: v1 → v2 at 1%, judging, step 1/2; 2/2 gateways acknowledged epoch 8",
        "waits: needs 180 more requests of the canary",
        "next: in ",
        "counted: 0.98% of keys",
        "error_rate: insufficient; at most 1%, else abort",
        "3 bad of 120 (2.5%); stable 100 of 10000 (1%)",
        "canary's rate between 0.4% and 8.1%; 2.50 times stable's",
        "[█████···············] 25% of what fails it",
        "120 of 300",
        "1     1%     1h    300 samples  current",
    ] {
        assert!(ran.out.contains(part), "{part} in\n{}", ran.out);
    }
    let json = ctl(&fake, &["rollout", "explain", "-o", "json"]).await.out;
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["metrics"][0]["evidence"], 0.25);
    assert_eq!(value["steps"][1]["state"], "ahead");
}

#[tokio::test]
async fn history_is_of_the_one_rollouts_model_and_audit_of_all() {
    let fake = Fake::start().await;
    let history = ctl(&fake, &["rollout", "history"]).await;
    assert_eq!(history.code, 0, "{}", history.err);
    assert_eq!(history.out.lines().count(), 3, "{}", history.out);
    assert!(
        history
            .out
            .contains("2023-11-14T22:13:20Z  SetRollout  demo   ada"),
        "{}",
        history.out
    );
    let audit = ctl(&fake, &["audit"]).await.out;
    assert!(
        audit.contains("PublishModel") && audit.lines().count() == 4,
        "{audit}"
    );
    let one = ctl(&fake, &["audit", "--model", "other", "-o", "json"]).await.out;
    let value: serde_json::Value = serde_json::from_str(&one).unwrap();
    assert_eq!(value["records"].as_array().unwrap().len(), 1);
    assert_eq!(value["records"][0]["actor"], "bob");
}

#[tokio::test]
async fn wait_ends_with_the_exit_code_of_what_it_saw() {
    for (phase, pause, code, says) in [
        (Phase::Succeeded, PauseReason::Unspecified, 0, ""),
        (Phase::RolledBack, PauseReason::Unspecified, 7, "from v2 to v1"),
        (Phase::Paused, PauseReason::Approval, 9, "ctl rollout approve"),
        (Phase::Paused, PauseReason::Insufficient, 9, "too few samples"),
        (Phase::Paused, PauseReason::Manual, 9, "ctl rollout resume"),
    ] {
        let fake = Fake::start().await;
        {
            let mut state = fake.state();
            state.rollout.set_phase(phase);
            state.rollout.set_pause(pause);
        }
        let ran = ctl(&fake, &["rollout", "wait"]).await;
        assert_eq!(ran.code, code, "{phase:?} {}", ran.err);
        assert!(ran.err.contains(says), "{phase:?}: {}", ran.err);
        assert!(ran.out.starts_with("demo v1 → v2"), "{}", ran.out);
    }
}

#[tokio::test]
async fn wait_that_runs_out_of_time_is_exit_eight_and_tells_the_last_it_heard() {
    let fake = judged().await;
    let ran = ctl(&fake, &["rollout", "wait", "--timeout", "300ms"]).await;
    assert_eq!(ran.code, 8, "{}", ran.err);
    assert!(
        ran.err
            .contains("neither over nor paused after 300 ms: demo v1 → v2 1% judging"),
        "{}",
        ran.err
    );
}
