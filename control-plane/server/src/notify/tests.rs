use std::sync::{Arc, Mutex};

use axum::{Router, extract::State, http::HeaderMap, routing::post};
use penstock_plan::{Change, CreateRollout, Manifest, Ppm, Sticky};
use tokio_util::task::TaskTracker;

use super::*;

/// What a receiver got, and the codes that it answers with before it goes on with 200.
#[derive(Default)]
struct Received {
    messages: Vec<(HeaderMap, String)>,
    codes: Vec<u16>,
}

#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Received>>);

async fn receive(
    State(receiver): State<Receiver>,
    headers: HeaderMap,
    body: String,
) -> axum::http::StatusCode {
    let mut state = receiver.0.lock().unwrap();
    state.messages.push((headers, body));
    let code = if state.codes.is_empty() {
        200
    } else {
        state.codes.remove(0)
    };
    axum::http::StatusCode::from_u16(code).unwrap()
}

impl Receiver {
    async fn start(codes: &[u16]) -> (Self, String) {
        let receiver = Self::default();
        receiver.0.lock().unwrap().codes = codes.to_vec();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook/secret-path", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/hook/secret-path", post(receive))
            .with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (receiver, url)
    }

    async fn until(&self, count: usize) -> Vec<(HeaderMap, String)> {
        for _ in 0..400 {
            let got = self.0.lock().unwrap().messages.clone();
            if got.len() >= count {
                return got;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!(
            "{count} messages did not come: {:?}",
            self.0.lock().unwrap().messages
        );
    }
}

fn rollout() -> Rollout {
    let new = CreateRollout {
        uid: "r-1".into(),
        model: "demo".into(),
        stable: "v1".into(),
        canary: "v2".into(),
        share: Ppm::ZERO,
        plan: Manifest::manual("demo", "v2", &Sticky::default()),
    };
    Rollout::create(new, None, Change::default()).unwrap()
}

fn aborted() -> Rollout {
    let change = Change {
        actor: "ada".into(),
        reason: "errors <rise>".into(),
        ..Change::default()
    };
    rollout().abort("", change).unwrap()
}

fn notifier(targets: &[String]) -> (Notifier, CancellationToken) {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let targets = targets.iter().map(|target| target.parse().unwrap()).collect();
    (Notifier::start(targets, &tasks, &stop), stop)
}

#[tokio::test]
async fn a_change_is_told_once_signed_and_in_both_forms() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "s3cret\n").unwrap();
    let (json, json_url) = Receiver::start(&[]).await;
    let (slack, slack_url) = Receiver::start(&[]).await;
    let targets = [
        format!("{json_url},secret-file={}", secret.display()),
        format!("{slack_url},format=slack"),
    ];
    let (mut notifier, _stop) = notifier(&targets);
    notifier.look(&rollout());
    notifier.look(&aborted());
    notifier.look(&aborted());

    let (headers, body) = json.until(1).await.remove(0);
    let told: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (told["type"].as_str(), told["data"]["phase"].as_str()),
        (Some("penstock.rollout.aborting"), Some("aborting"))
    );
    assert_eq!(headers["idempotency-key"], told["id"].as_str().unwrap());
    let sent = headers["x-penstock-signature"].to_str().unwrap();
    let seconds = sent
        .split(',')
        .next()
        .unwrap()
        .strip_prefix("t=")
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(sent, signature(b"s3cret", seconds, &body));

    let (_, body) = slack.until(1).await.remove(0);
    let told: serde_json::Value = serde_json::from_str(&body).unwrap();
    let text = told["blocks"][0]["text"]["text"].as_str().unwrap();
    assert!(
        text.contains("v2 is being rolled back") && text.contains("errors &lt;rise&gt;"),
        "{text}"
    );
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((json.until(1).await.len(), slack.until(1).await.len()), (1, 1));
}

#[tokio::test]
async fn a_receiver_in_trouble_is_tried_again_and_a_refusal_is_final() {
    let (troubled, troubled_url) = Receiver::start(&[500, 429]).await;
    let (refusing, refusing_url) = Receiver::start(&[400]).await;
    let (mut notifier, _stop) = notifier(&[troubled_url, refusing_url]);
    notifier.look(&rollout());
    notifier.look(&aborted());
    let got = troubled.until(3).await;
    assert!(
        got.windows(2)
            .all(|pair| pair[0].0["idempotency-key"] == pair[1].0["idempotency-key"])
    );
    assert_eq!(refusing.until(1).await.len(), 1);
}

#[tokio::test]
async fn a_dead_receiver_holds_nobody_up() {
    let (alive, url) = Receiver::start(&[]).await;
    let (mut notifier, stop) = notifier(&["http://127.0.0.1:9/hook".into(), url]);
    notifier.look(&rollout());
    notifier.look(&aborted());
    alive.until(1).await;
    stop.cancel();
}

#[test]
fn hmac_is_that_of_the_standard() {
    // RFC 4231, test case 2, over its data with our prefix left out of the comparison.
    let mut mac = Hmac::<Sha256>::new_from_slice(b"Jefe").unwrap();
    mac.update(b"what do ya want for nothing?");
    assert_eq!(mac.finalize().into_bytes()[..4], [0x5b, 0xdc, 0xc1, 0x46]);
}

#[test]
fn what_is_no_target_is_refused_by_name_and_paths_stay_secret() {
    for (value, named) in [
        ("ftp://x/y", "ftp://x/y"),
        ("hook", "hook"),
        ("https://x/y,format=xml", "format=xml"),
        ("https://x/y,secret-file=/does/not/exist", "/does/not/exist"),
    ] {
        let error = value.parse::<Target>().unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    let target: Target = "https://hooks.example/services/T0/B0/XYZ".parse().unwrap();
    assert_eq!(format!("{target:?}"), "https://hooks.example");
}
