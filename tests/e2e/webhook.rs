//! Webhooks of a real control plane: signed, tried again, told once; in the generic form and in Slack's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, process::Command, time::Duration};

use anyhow::Result;
use penstock_tests::{Cluster, Message, Webhook, demo, eventually};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const SECRET: &str = "s3cret-of-the-test";

/// Python's standard library says what the signature of a body is.
fn expected_signature(seconds: &str, body: &str) -> Result<String> {
    const SCRIPT: &str = "import hmac, sys; \
        print(hmac.new(sys.argv[1].encode(), (sys.argv[2] + '.' + sys.argv[3]).encode(), 'sha256').hexdigest())";
    let output = Command::new("python3")
        .args(["-c", SCRIPT, SECRET, seconds, body])
        .output()?;
    anyhow::ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn kinds(messages: &[Message]) -> Vec<(String, String)> {
    let delivered = messages.iter().filter(|message| message.answered == 200);
    delivered
        .map(|message| {
            let event: Value = serde_json::from_str(&message.body).unwrap();
            (
                event["type"].as_str().unwrap().to_owned(),
                event["data"]["phase"].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

#[tokio::test]
async fn webhooks_tell_of_phases_pauses_and_aborts_signed_and_once() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let secret = directory.path().join("secret");
    fs::write(&secret, format!("{SECRET}\n"))?;
    let (generic, slack) = (Webhook::start(2).await?, Webhook::start(0).await?);
    let to_generic = format!("{}/hook,secret-file={}", generic.url, secret.display());
    let to_slack = format!("{}/services/T0/B0/x,format=slack", slack.url);
    let arguments = ["--notify", &to_generic, "--notify", &to_slack];
    let mut cluster = Cluster::start_with(None, &arguments).await?;
    let models = demo(&["v1", "v2"]);
    let mut arguments = vec!["--runner", "fake"];
    arguments.extend(models.iter().map(String::as_str));
    cluster.add_worker(&arguments).await?;
    cluster.add_gateway().await?;
    let done = async |words: &[&str]| -> Result<()> {
        let output = cluster.ctl(words).await?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        anyhow::ensure!(output.status.success(), "{words:?}: {told}");
        Ok(())
    };
    eventually("a rollout", PATIENCE, || async {
        let create = ["rollout", "create", "demo", "--stable", "v1", "--canary", "v2"];
        Ok(done(&create).await.ok())
    })
    .await?;
    done(&["rollout", "set", "demo", "--canary", "5%", "-y"]).await?;
    done(&["rollout", "pause", "demo", "--reason", "lunch"]).await?;
    done(&["rollout", "abort", "demo", "--reason", "complaints"]).await?;
    eventually("the end of the rollout at both receivers", PATIENCE, || async {
        let rolled_back = |messages: Vec<Message>| {
            let mut delivered = messages.iter().filter(|message| message.answered == 200);
            delivered
                .any(|message| message.body.contains("rolled back") || message.body.contains("rolled_back"))
        };
        Ok((rolled_back(generic.messages()) && rolled_back(slack.messages())).then_some(()))
    })
    .await?;
    // What would come twice would come by now.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let messages = generic.messages();
    let told = kinds(&messages);
    for kind in ["paused", "aborting", "rolled_back"] {
        let kind = format!("penstock.rollout.{kind}");
        assert!(told.iter().any(|(found, _)| *found == kind), "{kind} in {told:?}");
    }
    let mut deliveries: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    for message in &messages {
        let (sent, delivered) = deliveries.entry(message.header("idempotency-key")).or_default();
        *sent += 1;
        *delivered += u32::from(message.answered == 200);
        let signature = message.header("x-penstock-signature");
        let (seconds, hex) = signature.strip_prefix("t=").unwrap().split_once(",v1=").unwrap();
        assert_eq!(hex, expected_signature(seconds, &message.body)?);
        assert_eq!(message.path, "/hook");
    }
    assert!(
        deliveries.values().all(|(_, delivered)| *delivered == 1),
        "{deliveries:?}"
    );
    let sent: u32 = deliveries.values().map(|(sent, _)| sent).sum();
    assert_eq!(
        sent as usize,
        deliveries.len() + 2,
        "two were refused and sent again"
    );

    for message in slack.messages() {
        let body: Value = serde_json::from_str(&message.body)?;
        assert!(body["text"].as_str().unwrap().contains("demo"), "{body}");
        assert_eq!(body["blocks"][0]["type"], "section");
        assert_eq!(
            message.header("x-penstock-signature"),
            "",
            "no secret, no signature"
        );
    }
    Ok(())
}
