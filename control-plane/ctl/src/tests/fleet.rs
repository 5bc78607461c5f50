//! Models, workers, gateways and feedback.

use super::*;
use axum::{
    Json, Router,
    extract::Path,
    http::StatusCode,
    routing::{delete, get, post},
};
use penstock_proto::v1::{feedback_request::Value, revision_state::State as Placed};

/// An operations port that remembers what was asked of it.
async fn ops() -> (String, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let note = {
        let asked = asked.clone();
        move |line: String| asked.lock().unwrap().push(line)
    };
    let (drain, set, clear) = (note.clone(), note.clone(), note);
    let router = Router::new()
        .route(
            "/drain",
            post(move || {
                drain("drain".to_owned());
                std::future::ready("draining, 3 in flight\n")
            }),
        )
        .route(
            "/override",
            post(move |Json(body): Json<serde_json::Value>| {
                let known = body["revision"] != "v9";
                set(body.to_string());
                let answer = if known {
                    (
                        StatusCode::OK,
                        Json(serde_json::json!({"workers": 0, "kept": true})),
                    )
                } else {
                    let error = serde_json::json!({"error": {"message": "no revision v9"}});
                    (StatusCode::NOT_FOUND, Json(error))
                };
                std::future::ready(answer)
            }),
        )
        .route(
            "/overrides",
            get(|| {
                let one = |revision: &str, ended_ms: u64| {
                    serde_json::json!({
                        "id": "o-1", "model": "demo", "revision": revision, "actor": "ada",
                        "reason": "outage", "since_ms": 1, "until_ms": 2_000_000_000_000_u64,
                        "ended_ms": ended_ms,
                    })
                };
                let both = serde_json::json!({"overrides": [one("v1", 0), one("v0", 5)]});
                std::future::ready(Json(both))
            }),
        )
        .route(
            "/override/{model}",
            delete(move |Path(model): Path<String>| {
                clear(format!("clear {model}"));
                std::future::ready("")
            }),
        );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, asked)
}

#[tokio::test]
async fn publish_waits_until_the_worker_serves_and_tells_each_state() {
    let fake = Fake::start().await;
    fake.state().placements = vec![
        Placed::Fetching,
        Placed::Loading,
        Placed::Warming,
        Placed::Serving,
    ];
    let prefixes = ["--warm-prefix", "You are kind.", "--warm-prefix", "@/nowhere"];
    let words = ["model", "publish", "demo", "v3", "--from", "/models/v3"];
    let missing = ctl(&fake, &[&words[..], &prefixes].concat()).await;
    assert_eq!(missing.code, 2);
    assert!(fake.state().last_publish.is_none());
    let ran = ctl(&fake, &[&words[..], &prefixes[..2]].concat()).await;
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (0, "w1 fetching\nw1 loading\nw1 warming\nw1 serving\n")
    );
    assert_eq!(ran.out, "demo@v3 is served by w1 (digest dddddddddddd)\n");
    let sent = fake.state().last_publish.clone().unwrap();
    assert_eq!(
        (sent.source.as_str(), sent.warm_prefixes.as_slice()),
        ("/models/v3", &["You are kind.".to_owned()][..])
    );
}

#[tokio::test]
async fn a_publication_that_fails_or_takes_too_long_says_on_which_worker() {
    let fake = Fake::start().await;
    let words = ["model", "publish", "demo", "v3", "--from", "/models/v3"];
    fake.state().placements = vec![Placed::Failed];
    let failed = ctl(&fake, &words).await;
    assert_eq!(failed.code, 1);
    assert!(
        failed.err.contains("w1 cannot serve it: no space"),
        "{}",
        failed.err
    );
    fake.state().placements = vec![Placed::Loading; 9];
    let late = ctl(&fake, &[&words[..], &["--timeout", "100ms"]].concat()).await;
    assert_eq!(late.code, 8);
    assert!(late.err.contains("within 100 ms: w1 loading"), "{}", late.err);
    let unwaited = ctl(&fake, &[&words[..], &["--no-wait"]].concat()).await;
    assert_eq!(
        (unwaited.code, unwaited.out.as_str()),
        (0, "demo@v3 is published; not waited for workers\n")
    );
}

#[tokio::test]
async fn retire_tells_and_a_revision_in_use_is_a_conflict() {
    let fake = Fake::start().await;
    let ran = ctl(&fake, &["model", "retire", "demo", "v3"]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.starts_with("demo@v3 is retired"), "{}", ran.out);
    assert_eq!(ctl(&fake, &["model", "retire", "demo", "v1"]).await.code, 4);
}

#[tokio::test]
async fn a_worker_is_drained_by_its_id_or_its_address() {
    let (address, asked) = ops().await;
    let fake = Fake::start().await;
    fake.state().ops_address.clone_from(&address);
    let ran = ctl(&fake, &["worker", "drain", "w1"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (0, "w1: draining, 3 in flight\n"));
    let unknown = ctl(&fake, &["worker", "drain", "w9"]).await;
    assert_eq!(unknown.code, 3);
    assert!(
        unknown.err.contains("there is no worker w9; known: w1"),
        "{}",
        unknown.err
    );
    let alone = answered("http://127.0.0.1:1", None, &["worker", "drain", &address]).await;
    assert_eq!(alone.code, 0, "{}", alone.err);
    assert_eq!(asked.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn an_override_works_with_the_control_plane_down() {
    let (address, asked) = ops().await;
    let down = "http://127.0.0.1:1";
    let set = [
        "gateway", "override", "--model", "demo", "--to", "v1", "--ttl", "1h", "--reason", "outage",
        "--actor", "ada",
    ];
    let words = [
        "ctl",
        "--control-plane",
        down,
        "gateway",
        "override",
        "--gateway",
        &address,
        "--model",
        "a/b",
        "--clear",
    ];
    let run = async |line: Vec<&str>| {
        let args = Args::from_arg_matches(&command().try_get_matches_from(line).unwrap()).unwrap();
        let (out, err) = (Buffer::default(), Buffer::default());
        let mut console = Console::new(Box::new(out.clone()), Box::new(err.clone()), None);
        let code = run_on(args, &mut console).await;
        (code, out.text(), err.text())
    };
    let at = ["--gateway", &address, "--control-plane", down];
    let (code, out, err) = run([&["ctl"], &set[..], &at].concat()).await;
    assert_eq!(code, 0, "{err}");
    assert_eq!(out, format!("{address}: all of demo goes to v1; ends in 1h\n"));
    assert!(err.contains("no worker that it knows serves v1"), "{err}");
    let body: serde_json::Value = serde_json::from_str(&asked.lock().unwrap()[0]).unwrap();
    assert_eq!(
        body,
        serde_json::json!({"model": "demo", "revision": "v1", "ttl_s": 3600, "actor": "ada", "reason": "outage"})
    );
    let (code, out, err) = run(words.to_vec()).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("a/b follows the plan again"), "{out}");
    assert_eq!(asked.lock().unwrap()[1], "clear a/b");
    let refused = [
        "ctl",
        "gateway",
        "override",
        "--gateway",
        &address,
        "--model",
        "demo",
        "--to",
        "v9",
    ];
    let (code, _, err) = run(refused.to_vec()).await;
    assert_eq!(code, 3);
    assert!(err.contains("refuses (404 Not Found): no revision v9"), "{err}");
    let (code, out, err) = run(vec!["ctl", "gateway", "overrides", &address]).await;
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("demo   v1") && !out.contains("v0"), "{out}");
}

#[tokio::test]
async fn overrides_of_every_live_gateway_are_listed() {
    let (address, _asked) = ops().await;
    let fake = Fake::start().await;
    fake.state().ops_address = address;
    let ran = ctl(&fake, &["gateway", "overrides", "-o", "json"]).await;
    assert_eq!(ran.code, 0, "{}", ran.err);
    let value: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(value["overrides"][0]["gateway"], "gw-1");
    assert_eq!(value["overrides"][0]["reason"], "outage");
    let unknown = ctl(&fake, &["gateway", "overrides", "gw-9"]).await;
    assert_eq!(unknown.code, 3);
}

#[tokio::test]
async fn an_operations_port_that_nobody_listens_on_is_exit_five() {
    let ran = answered("http://127.0.0.1:1", None, &["worker", "drain", "127.0.0.1:1"]).await;
    assert_eq!(ran.code, 5, "{}", ran.err);
    assert!(
        ran.err.contains("cannot reach the worker at 127.0.0.1:1"),
        "{}",
        ran.err
    );
}

#[tokio::test]
async fn feedback_counts_for_the_revision_that_replied() {
    let fake = Fake::start().await;
    let up = ctl(&fake, &["feedback", "r-7", "--up", "--comment", "kind"]).await;
    assert_eq!(
        (up.code, up.out.as_str()),
        (0, "counted for demo@v2\n"),
        "{}",
        up.err
    );
    let sent = fake.state().last_feedback.clone().unwrap();
    assert_eq!(
        (sent.value, sent.comment.as_str()),
        (Some(Value::ThumbUp(true)), "kind")
    );
    assert_eq!(ctl(&fake, &["feedback", "r-7", "--down"]).await.code, 0);
    assert_eq!(
        fake.state().last_feedback.as_ref().unwrap().value,
        Some(Value::ThumbUp(false))
    );
    assert_eq!(ctl(&fake, &["feedback", "r-7", "--score", "0.25"]).await.code, 0);
    assert_eq!(
        fake.state().last_feedback.as_ref().unwrap().value,
        Some(Value::Score(0.25))
    );
    assert_eq!(ctl(&fake, &["feedback", "r-0", "--up"]).await.code, 3);
}

#[tokio::test]
async fn completions_name_the_verbs() {
    let fake = Fake::start().await;
    for shell in ["bash", "zsh", "fish"] {
        let ran = ctl(&fake, &["completions", shell]).await;
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert!(
            ran.out.contains("rollout") && ran.out.contains("approve"),
            "{shell}: {}",
            ran.out
        );
    }
}
