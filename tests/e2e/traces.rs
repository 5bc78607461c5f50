//! One trace per request and one per plan change, received by a real OTLP receiver.

use anyhow::Result;
use penstock_tests::{Cluster, OtlpReceiver, ReceivedSpan, chat, connect, demo, generate};

const CLIENT_TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT_SPAN: &str = "00f067aa0ba902b7";

async fn cluster(otlp: &OtlpReceiver) -> Result<Cluster> {
    let mut cluster = Cluster::start(Some(otlp)).await?;
    let models = demo(&["v1", "v2"]);
    let models: Vec<&str> = models.iter().map(String::as_str).collect();
    cluster.add_worker(&models).await?;
    cluster.add_gateway().await?;
    cluster.add_gateway().await?;
    let create = cluster
        .ctl(&["rollout", "create", "demo", "--stable", "v1", "--canary", "v2"])
        .await?;
    assert!(
        create.status.success(),
        "{}",
        String::from_utf8_lossy(&create.stderr)
    );
    Ok(cluster)
}

fn child<'a>(spans: &'a [ReceivedSpan], parent: &str, service: &str, name: &str) -> Option<&'a ReceivedSpan> {
    spans
        .iter()
        .find(|span| span.parent == parent && span.service == service && span.name.contains(name))
}

#[tokio::test]
async fn a_request_is_one_trace_from_the_client_to_decode() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let otlp = OtlpReceiver::start(directory.path()).await?;
    let cluster = cluster(&otlp).await?;

    let mut client = connect(cluster.gateways[0].port).await?;
    let traceparent = format!("00-{CLIENT_TRACE}-{CLIENT_SPAN}-01");
    let headers = [("traceparent", traceparent.as_str()), ("x-model-version", "v2")];
    let reply = generate(&mut client, chat("demo", "Hello", 8), &headers).await?;
    assert_eq!(reply.revision, "v2");

    let spans = otlp
        .wait_for("every span of the request", |spans| {
            let gateway = child(spans, CLIENT_SPAN, "gateway", "demo")?;
            let worker = child(spans, &gateway.id, "worker", "demo")?;
            let parts: Option<Vec<_>> = ["queue", "prefill", "decode"]
                .iter()
                .map(|part| child(spans, &worker.id, "worker", part))
                .collect();
            Some(
                [vec![gateway, worker], parts?]
                    .concat()
                    .into_iter()
                    .cloned()
                    .collect::<Vec<_>>(),
            )
        })
        .await?;
    for span in &spans {
        assert_eq!(span.trace, CLIENT_TRACE, "{span:?}");
        for (key, value) in [
            ("penstock.model", "demo"),
            ("penstock.revision", "v2"),
            ("penstock.rollout.epoch", reply.epoch.as_str()),
            ("penstock.assignment.reason", "pin"),
        ] {
            assert_eq!(
                span.attributes.get(key).map(String::as_str),
                Some(value),
                "{key} of {span:?}"
            );
        }
        assert!(span.attributes.contains_key("penstock.endpoint"), "{span:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_plan_change_is_one_trace_from_ctl_to_each_gateway() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let otlp = OtlpReceiver::start(directory.path()).await?;
    let cluster = cluster(&otlp).await?;

    let set = cluster.ctl(&["rollout", "set", "--canary", "5%"]).await?;
    assert!(set.status.success(), "{}", String::from_utf8_lossy(&set.stderr));

    let (trace, swaps) = otlp
        .wait_for("the trace of the change", |spans| {
            let root = spans
                .iter()
                .find(|span| span.service == "ctl" && span.name.contains("rollout set"))?;
            let admin = child(spans, &root.id, "control-plane", "SetRollout")?;
            let commit = child(spans, &admin.id, "control-plane", "store.commit")?;
            let swaps: Vec<&ReceivedSpan> = spans
                .iter()
                .filter(|s| s.name == "snapshot.apply" && s.trace == root.trace)
                .collect();
            let ids: Vec<&str> = spans
                .iter()
                .filter(|s| s.trace == root.trace)
                .map(|s| s.id.as_str())
                .collect();
            let linked = swaps.iter().all(|swap| ids.contains(&swap.parent.as_str()));
            (swaps.len() == 2 && linked && commit.trace == root.trace)
                .then(|| (root.trace.clone(), swaps.len()))
        })
        .await?;
    assert_eq!(swaps, 2, "one swap per gateway in trace {trace}");
    Ok(())
}
