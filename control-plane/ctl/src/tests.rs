//! Whole commands against a control plane and a gateway that only pretend.

use super::*;
use clap::FromArgMatches as _;
use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

mod amend;
pub(crate) mod fake;
mod fleet;
mod manifest;
mod report;

use fake::Fake;

#[derive(Clone, Default)]
struct Buffer(Arc<Mutex<Vec<u8>>>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Buffer {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

struct Ran {
    code: u8,
    out: String,
    err: String,
}

async fn answered(address: &str, answer: Option<&'static str>, words: &[&str]) -> Ran {
    let at = ["--control-plane", address, "--gateway", address];
    let line = [&["ctl"], words, &at].concat();
    let args = Args::from_arg_matches(&command().try_get_matches_from(line).unwrap()).unwrap();
    let (out, err) = (Buffer::default(), Buffer::default());
    let mut console = Console::new(Box::new(out.clone()), Box::new(err.clone()), answer);
    let code = run_on(args, &mut console).await;
    Ran {
        code,
        out: out.text(),
        err: err.text(),
    }
}

async fn ctl(fake: &Fake, words: &[&str]) -> Ran {
    answered(&fake.address, None, words).await
}

#[tokio::test]
async fn set_writes_over_what_it_saw_waits_and_tells_epoch_count_and_time() {
    let fake = Fake::start().await;
    let ran = ctl(
        &fake,
        &[
            "rollout",
            "set",
            "--canary",
            "5%",
            "--reason",
            "looks well",
            "--actor",
            "ada",
        ],
    )
    .await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(
        ran.out.starts_with("5% desired; epoch 8; 2/2 acknowledged in "),
        "{}",
        ran.out
    );
    let set = fake.state().last_set.clone().unwrap();
    assert_eq!(
        (set.model.as_str(), set.canary_ppm, set.expect_revision),
        ("demo", 50_000, Some(7))
    );
    assert_eq!((set.reason.as_str(), set.actor.as_str()), ("looks well", "ada"));
}

#[tokio::test]
async fn set_in_json_is_one_object_on_stdout() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["rollout", "set", "demo", "--canary", "5%", "-o", "json"]).await;
    let value: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(value["canary_ppm"], 50_000);
    assert_eq!(value["epoch"], 8);
    assert_eq!(value["acknowledged"], 2);
    assert!(value["acknowledged_ms"].is_u64(), "{value}");
}

#[tokio::test]
async fn a_jump_wants_a_yes_from_the_terminal_or_the_flag() {
    let fake = Fake::start().await;
    let jump = ["rollout", "set", "--canary", "50%"];
    let silent = ctl(&fake, &jump).await;
    assert_eq!(silent.code, 2);
    assert!(silent.err.contains("-y"), "{}", silent.err);
    let no = answered(&fake.address, Some("n\n"), &jump).await;
    assert_eq!(no.code, 1);
    assert!(
        no.err
            .contains("Raise v2 from 1% to 50% of demo, 50 times as much? [y/N]"),
        "{}",
        no.err
    );
    assert!(fake.state().last_set.is_none());
    assert_eq!(answered(&fake.address, Some("y\n"), &jump).await.code, 0);
    assert_eq!(fake.state().last_set.as_ref().unwrap().canary_ppm, 500_000);
}

#[tokio::test]
async fn the_flag_says_yes_beforehand() {
    let fake = Fake::start().await;
    assert_eq!(
        ctl(&fake, &["rollout", "set", "--canary", "50%", "-y"])
            .await
            .code,
        0
    );
}

#[tokio::test]
async fn a_dry_run_and_a_wrong_revision_write_nothing() {
    let fake = Fake::start().await;
    let dry = ctl(&fake, &["rollout", "set", "--canary", "50%", "--dry-run"]).await;
    assert_eq!(dry.code, 0);
    assert!(
        dry.out
            .starts_with("set would move v2 from 1% to 50% of demo; nothing is written"),
        "{}",
        dry.out
    );
    let wrong = ctl(
        &fake,
        &["rollout", "set", "--canary", "5%", "--expect-revision", "6"],
    )
    .await;
    assert_eq!(wrong.code, 4);
    assert!(wrong.err.contains("revision 7 by now, not at 6"), "{}", wrong.err);
    assert!(fake.state().last_set.is_none());
    for words in [
        ["rollout", "promote", "--dry-run"],
        ["rollout", "abort", "--dry-run"],
    ] {
        let dry = ctl(&fake, &words).await;
        assert_eq!(dry.code, 0, "{}", dry.err);
        assert!(dry.out.contains("nothing is written"), "{}", dry.out);
    }
    assert_eq!(fake.state().rollout.generation, 3);
}

#[tokio::test]
async fn a_write_of_the_controller_in_between_is_no_conflict_and_an_operators_is() {
    let fake = Fake::start().await;
    fake.state().interfere = Some(None);
    assert_eq!(ctl(&fake, &["rollout", "set", "--canary", "5%"]).await.code, 0);
    assert_eq!(fake.state().last_set.as_ref().unwrap().expect_revision, Some(8));
    let fake = Fake::start().await;
    fake.state().interfere = Some(Some(20_000));
    let ran = ctl(&fake, &["rollout", "set", "--canary", "5%"]).await;
    assert_eq!(ran.code, 4);
    assert!(
        ran.err.contains("paused at 2%, last changed by bob"),
        "{}",
        ran.err
    );
    let share = ran.err.lines().find(|line| line.starts_with("share")).unwrap();
    assert_eq!(
        share.split_whitespace().collect::<Vec<_>>(),
        ["share", "1%", "2%", "5%"],
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn gateways_that_do_not_acknowledge_end_the_wait_with_their_names() {
    let fake = Fake::start().await;
    fake.state().refuses = true;
    let ran = ctl(&fake, &["rollout", "set", "--canary", "5%", "--timeout", "300ms"]).await;
    assert_eq!(ran.code, 8);
    assert_eq!(ran.out, "");
    assert!(
        ran.err
            .contains("gw-2 refuses epoch 8: no endpoint of v2 (canary_unreachable)"),
        "{}",
        ran.err
    );
    assert!(
        ran.err
            .contains("1/2 gateways acknowledged epoch 8 within 300 ms"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn no_wait_returns_what_is_written() {
    let fake = Fake::start().await;
    fake.state().refuses = true;
    let ran = ctl(&fake, &["rollout", "set", "--canary", "5%", "--no-wait"]).await;
    assert_eq!(
        (ran.code, ran.out.as_str()),
        (
            0,
            "5% desired; generation 4 is written; not waited for gateways\n"
        )
    );
}

#[tokio::test]
async fn an_abort_under_the_wait_is_exit_seven() {
    let fake = Fake::start().await;
    fake.state().aborts = true;
    let ran = ctl(&fake, &["rollout", "set", "--canary", "5%"]).await;
    assert_eq!(ran.code, 7);
    assert!(ran.err.contains("was rolled back"), "{}", ran.err);
}

#[tokio::test]
async fn promote_and_abort_wait_for_their_phase() {
    let fake = Fake::start().await;
    fake.state().rollout.canary_ppm = 500_000;
    let silent = ctl(&fake, &["rollout", "promote"]).await;
    assert_eq!(silent.code, 2);
    assert!(
        silent.err.contains("is all of the traffic: say -y"),
        "{}",
        silent.err
    );
    let promoted = ctl(&fake, &["rollout", "promote", "-y"]).await;
    assert_eq!(promoted.code, 0, "{}", promoted.err);
    assert!(
        promoted
            .out
            .starts_with("demo: v2 promoted; epoch 8; 2/2 acknowledged in "),
        "{}",
        promoted.out
    );
    let fake = Fake::start().await;
    let aborted = ctl(&fake, &["rollout", "abort", "--reason", "repeats"]).await;
    assert_eq!(aborted.code, 0, "{}", aborted.err);
    assert!(
        aborted.out.starts_with("demo: rolled back to v1; epoch 8;"),
        "{}",
        aborted.out
    );
    assert_eq!(fake.state().aborted_uid.as_deref(), Some("r-1"));
}

#[tokio::test]
async fn create_names_the_only_model_and_waits() {
    let fake = Fake::start().await;
    let ran = ctl(
        &fake,
        &["rollout", "create", "--canary", "v2", "--canary-share", "1%"],
    )
    .await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.starts_with("1% desired; epoch 8; 2/2"), "{}", ran.out);
    assert!(
        ran.err.contains("rollout of demo created: stable v1, canary v2"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn a_watch_prints_a_line_at_every_change_and_ends_with_the_control_plane() {
    let fake = Fake::start().await;
    fake.state().ends_watch = true;
    let ran = ctl(&fake, &["rollout", "get", "-w"]).await;
    assert_eq!(ran.code, 5);
    let lines: Vec<_> = ran.out.lines().collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines.iter().all(|line| line.starts_with("demo v1 → v2 1% ")),
        "{lines:?}"
    );
    let json = ctl(&fake, &["rollout", "get", "-w", "-o", "json"]).await.out;
    assert_eq!(
        json.lines()
            .filter(|line| serde_json::from_str::<serde_json::Value>(line).is_ok())
            .count(),
        2
    );
}

#[tokio::test]
async fn lists_and_get_answer_in_every_format() {
    let fake = Fake::start().await;
    for words in [
        ["rollout", "list"],
        ["rollout", "get"],
        ["rollout", "explain"],
        ["rollout", "history"],
        ["audit", "--limit=2"],
        ["worker", "list"],
        ["gateway", "list"],
        ["model", "list"],
    ] {
        let table = ctl(&fake, &words).await;
        assert_eq!(table.code, 0, "{words:?} {}", table.err);
        assert!(!table.out.is_empty());
        let json = ctl(&fake, &[&words[..], &["-o", "json"]].concat()).await.out;
        let yaml = ctl(&fake, &[&words[..], &["-o", "yaml"]].concat()).await.out;
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            serde_norway::from_str::<serde_json::Value>(&yaml).unwrap(),
            json,
            "{words:?}"
        );
    }
}

#[tokio::test]
async fn refusals_have_their_exit_codes_and_one_line() {
    let fake = Fake::start().await;
    for (code, exit) in [
        (tonic::Code::NotFound, 3),
        (tonic::Code::FailedPrecondition, 4),
        (tonic::Code::Unavailable, 5),
        (tonic::Code::PermissionDenied, 6),
    ] {
        fake.state().fails = Some(code);
        let ran = ctl(&fake, &["rollout", "get", "demo"]).await;
        assert_eq!(ran.code, exit, "{code:?}");
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        assert!(
            ran.err
                .starts_with("error: the control plane at http://127.0.0.1:"),
            "{}",
            ran.err
        );
    }
}

#[tokio::test]
async fn an_absent_server_is_named_with_the_way_to_say_where_it_is() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let address = free.to_string();
    let ran = answered(&address, None, &["worker", "list"]).await;
    assert_eq!(ran.code, 5);
    for part in [
        "cannot reach the control plane",
        &address,
        "--control-plane",
        "PENSTOCK_CONTROL_PLANE",
        "refused",
    ] {
        assert!(ran.err.contains(part), "{part} in {}", ran.err);
    }
    let ran = answered(&address, None, &["generate", "hi"]).await;
    assert_eq!(ran.code, 5);
    assert!(ran.err.contains("PENSTOCK_GATEWAY"), "{}", ran.err);
}

#[tokio::test]
async fn an_address_that_is_none_is_a_usage_error() {
    for address in ["https://cp:8090", "http://", "not an address"] {
        let ran = answered(address, None, &["worker", "list"]).await;
        assert_eq!(ran.code, 2, "{address}: {}", ran.err);
        assert!(ran.err.contains("http://host:port"), "{}", ran.err);
    }
}

#[tokio::test]
async fn a_server_that_never_answers_ends_with_the_timeout() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let ran = answered(&address, None, &["worker", "list", "--timeout", "300ms"]).await;
    assert!([5, 8].contains(&ran.code), "{} {}", ran.code, ran.err);
    assert!(ran.err.contains(&address), "{}", ran.err);
}

#[tokio::test]
async fn generate_streams_text_and_tells_who_answered_on_stderr() {
    let fake = Fake::start().await;
    let ran = ctl(
        &fake,
        &[
            "generate",
            "hi",
            "--user",
            "u1",
            "--model-version",
            "v2",
            "--header",
            "x-region=eu",
            "--seed",
            "3",
            "--max-tokens",
            "2",
        ],
    )
    .await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "Hello world\n"), "{}", ran.err);
    assert!(
        ran.err.contains("revision v2; epoch 8; reason pin; reply r-7"),
        "{}",
        ran.err
    );
    assert!(
        ran.err
            .contains("3 prompt tokens (1 cached), 2 generated; length; seed 3"),
        "{}",
        ran.err
    );
    let request = fake.state().last_generate.clone().unwrap();
    assert_eq!(
        request,
        "chat=user:hi user=u1 pin=v2 region=eu seed=3 max=2 temperature=None"
    );
}

#[tokio::test]
async fn generate_raw_sends_the_prompt_as_it_stands_and_json_is_one_object() {
    let fake = Fake::start().await;
    let ran = ctl(
        &fake,
        &["generate", "--raw", "Once", "--temperature", "0", "-o", "json"],
    )
    .await;
    let value: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(
        (&value["text"], &value["revision"]),
        (&"Hello world".into(), &"v2".into())
    );
    assert!(
        fake.state()
            .last_generate
            .as_ref()
            .unwrap()
            .starts_with("prompt=Once ")
    );
}

#[tokio::test]
async fn route_test_assigns_on_the_pushed_snapshot() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["route", "test", "--user", "u1", "-o", "json"]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    let value: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let bucket = penstock_plan::bucket("r-1", b"u1");
    assert_eq!(value["bucket"], bucket);
    assert_eq!(value["revision"], if bucket < 10_000 { "v2" } else { "v1" });
    assert_eq!((&value["reason"], &value["epoch"]), (&"bucket".into(), &8.into()));
}

#[tokio::test]
async fn every_call_carries_the_commands_trace() {
    use opentelemetry::trace::TracerProvider as _;
    use tracing_subscriber::layer::SubscriberExt as _;
    let provider = opentelemetry_sdk::trace::SdkTracerProvider::builder().build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("t"));
    let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    let fake = Fake::start().await;
    assert_eq!(ctl(&fake, &["rollout", "set", "--canary", "5%"]).await.code, 0);
    let parents = fake.state().traceparents.clone();
    let traces: std::collections::BTreeSet<_> = parents
        .iter()
        .map(|p| p.as_ref().map(|p| p[..35].to_owned()))
        .collect();
    assert!(parents.len() >= 3, "{parents:?}");
    assert!(traces.len() == 1 && !traces.contains(&None), "{parents:?}");
}
