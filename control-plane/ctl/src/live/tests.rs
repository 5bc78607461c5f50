use super::*;
use penstock_proto::v1::{ChartPoint, ChartSide, MetricVerdict, Phase, StepStatus, Verdict};
use ratatui::{Terminal, backend::TestBackend};

fn status(model: &str, phase: Phase, ppm: u32) -> RolloutStatus {
    let mut rollout = Rollout {
        uid: format!("r-{model}"),
        model: model.into(),
        stable: "v1".into(),
        canary: "v2".into(),
        canary_ppm: ppm,
        step: 1,
        steps: 3,
        message: "needs 12 more requests of the canary".into(),
        ..Rollout::default()
    };
    rollout.set_phase(phase);
    let step = |canary_ppm, state: &str| StepStatus {
        canary_ppm,
        hold_ms: 3_600_000,
        state: state.into(),
        ..StepStatus::default()
    };
    let metric = MetricVerdict {
        metric: "error_rate".into(),
        rule: "at most 1%".into(),
        verdict: Verdict::Insufficient.into(),
        canary_rate: Some(0.02),
        stable_rate: Some(0.01),
        log_evidence: 4.0,
        log_threshold: 8.0,
        would_change: "needs 12 more".into(),
        ..MetricVerdict::default()
    };
    let side = |ttft: f64, errors: u64| {
        Some(ChartSide {
            requests: 1000,
            errors,
            ttft_p99: Some(ttft),
            ..ChartSide::default()
        })
    };
    let point = |n: u32| ChartPoint {
        at_ms: u64::from(n),
        canary_ppm: ppm,
        stable: side(0.1, 1),
        canary: side(0.05 * f64::from(n), u64::from(n)),
    };
    RolloutStatus {
        rollout: Some(rollout),
        epoch: 8,
        live_gateways: 3,
        acknowledged: 2,
        pending: vec!["gw-3".into()],
        steps: vec![
            step(10_000, "done"),
            step(50_000, "current"),
            step(250_000, "ahead"),
        ],
        metrics: vec![metric],
        key_share: Some(0.0497),
        points: (1..=20).map(point).collect(),
        ..RolloutStatus::default()
    }
}

fn picture(live: &Live) -> String {
    let mut terminal = Terminal::new(TestBackend::new(110, 34)).unwrap();
    terminal.draw(|frame| draw::draw(frame, live)).unwrap();
    let buffer = terminal.backend().buffer();
    let cells: Vec<_> = buffer.content().iter().map(|cell| cell.symbol()).collect();
    cells.chunks(110).map(|row| row.concat() + "\n").collect()
}

fn shown(rollouts: Vec<RolloutStatus>) -> Live {
    let mut live = Live::default();
    live.show(rollouts, 1_700_000_000_000);
    live
}

#[test]
fn the_picture_tells_steps_evidence_shares_gateways_and_charts() {
    let text = picture(&shown(vec![status("demo", Phase::Judging, 50_000)]));
    for part in [
        "demo v1 → v2 5% judging, step 2/3",
        "gateways: 2/3 acknowledged epoch 8",
        "counted: 4.97% of keys",
        "waits: needs 12 more requests",
        "have not acknowledged: gw-3",
        "├─ ✓     1%  1h",
        "├─ ▶     5%  1h",
        "└─ ·    25%  1h",
        "insufficient error_rate       ██████······    50%  2% to 1%",
        "at most 1%; needs 12 more",
        "TTFT p99 stable: 100 ms (scale 1000)",
        "TTFT p99 canary: 1000 ms (scale 1000)",
        "errors canary: 20 ‰ (scale 20)",
        "q quit  p pause  r resume  a abort",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn an_action_wants_a_yes_and_any_other_key_is_a_no() {
    let mut live = shown(vec![status("demo", Phase::Judging, 50_000)]);
    assert_eq!(live.pressed(KeyCode::Char('a')), Step::Stay);
    assert!(picture(&live).contains("abort the rollout of demo? y: yes"));
    assert_eq!(live.pressed(KeyCode::Char('q')), Step::Stay);
    assert!(picture(&live).contains("not done: abort"));
    live.pressed(KeyCode::Char('p'));
    assert_eq!(live.pressed(KeyCode::Char('y')), Step::Do(Action::Pause));
    assert_eq!(live.pressed(KeyCode::Char('y')), Step::Stay);
    assert_eq!(live.pressed(KeyCode::Char('q')), Step::Quit);
    let mut empty = shown(vec![]);
    empty.pressed(KeyCode::Char('a'));
    assert_eq!(empty.pressed(KeyCode::Char('y')), Step::Stay);
}

#[test]
fn several_rollouts_are_listed_and_one_is_selected() {
    let rollouts = vec![
        status("a", Phase::Soaking, 10_000),
        status("b", Phase::Baking, 1_000_000),
    ];
    let mut live = shown(rollouts);
    assert!(picture(&live).contains("▶ a v1 → v2 1% soaking"));
    live.pressed(KeyCode::Down);
    live.pressed(KeyCode::Down);
    let text = picture(&live);
    assert!(
        text.contains("▶ b v1 → v2 100% baking") && text.contains("  a v1"),
        "{text}"
    );
    live.show(vec![status("a", Phase::Soaking, 10_000)], 0);
    assert_eq!(live.selection().map(name), Some("a"));
}

#[test]
fn a_change_is_told_once() {
    let mut live = shown(vec![status("demo", Phase::Judging, 50_000)]);
    live.show(vec![status("demo", Phase::Judging, 50_000)], 1);
    assert!(live.events.is_empty());
    live.show(vec![status("demo", Phase::Aborting, 0)], 1_700_000_000_000);
    assert_eq!(live.events.len(), 1);
    assert!(picture(&live).contains("2023-11-14T22:13:20Z demo v1 → v2 0% aborting"));
}

#[tokio::test]
async fn an_action_names_the_rollout_on_the_screen() {
    use crate::tests::fake::Fake;
    let fake = Fake::start().await;
    let connection = crate::config::Connection {
        control_plane: fake.address.clone(),
        gateway: String::new(),
        limit: None,
    };
    let mut admin = Admin::connect(&connection).await.unwrap();
    let mut live = Live::default();
    live.look(&mut admin, Some("demo")).await.unwrap();
    live.act(&mut admin, Action::Pause, "ada").await;
    assert_eq!(live.note, "pause: demo v1 → v2 1% paused");
    assert_eq!(fake.state().amended, [("pause".to_owned(), "r-1".to_owned())]);
    live.act(&mut admin, Action::Abort, "ada").await;
    assert_eq!(fake.state().aborted_uid.as_deref(), Some("r-1"));
    fake.state().fails = Some(tonic::Code::FailedPrecondition);
    live.act(&mut admin, Action::Resume, "ada").await;
    assert!(
        live.note.contains("resume of demo: the control plane"),
        "{}",
        live.note
    );
    fake.state().fails = Some(tonic::Code::Unavailable);
    live.look(&mut admin, Some("demo")).await.unwrap();
    assert!(live.note.contains("does not answer") && live.rollouts.len() == 1);
}
