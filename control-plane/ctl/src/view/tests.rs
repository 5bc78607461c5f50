use super::*;

fn status() -> v1::RolloutStatus {
    v1::RolloutStatus {
        rollout: Some(v1::Rollout {
            uid: "r-1".into(),
            model: "demo".into(),
            stable: "v1".into(),
            canary: "v2".into(),
            canary_ppm: 50_000,
            phase: v1::Phase::Converging.into(),
            generation: 3,
            store_revision: 42,
            sticky: Some(v1::Sticky {
                keys: vec!["metadata:x-user-id".into()],
                on_missing: 1,
                ..v1::Sticky::default()
            }),
            created_ms: 1,
            updated_ms: 2,
            actor: "ada".into(),
            reason: "looks well".into(),
            message: "waits for 1 gateway".into(),
            ..v1::Rollout::default()
        }),
        epoch: 8123,
        live_gateways: 2,
        acknowledged: 1,
        pending: vec!["gw-2".into()],
        nacks: vec![v1::GatewayNack {
            gateway: "gw-2".into(),
            epoch: 8123,
            code: "canary_unreachable".into(),
            message: "no endpoint of v2".into(),
        }],
        stable_endpoints: 2,
        canary_endpoints: 1,
        ..v1::RolloutStatus::default()
    }
}

#[test]
fn a_rollout_as_a_table() {
    let expected = "\
model         demo
stable        v1 (2 endpoints)
canary        v2 (1 endpoint)
share         5%
phase         converging
message       waits for 1 gateway
generation    3
epoch         8123
acknowledged  1/2
pending       gw-2
sticky        metadata:x-user-id
actor         ada
reason        looks well
revision      42 (for --expect-revision)
uid           r-1
refused       gw-2 refuses epoch 8123: no endpoint of v2 (canary_unreachable)
";
    assert_eq!(Rollout::from(status()).table(), expected);
}

#[test]
fn a_rollout_as_json_and_yaml() {
    let rollout = Rollout::from(status());
    let json = serde_json::to_value(&rollout).unwrap();
    let expected = serde_json::json!({
        "model": "demo", "uid": "r-1", "stable": "v1", "canary": "v2", "share": "5%", "canary_ppm": 50_000,
        "phase": "converging", "pause": "", "cause": "", "step": 0, "steps": 0, "attempt": 0, "phase_since_ms": 0,
        "next_ms": 0, "key_share": null, "request_share": null, "token_share": null, "queued": "",
        "generation": 3, "epoch": 8123, "store_revision": 42, "live_gateways": 2,
        "acknowledged": 1, "pending": ["gw-2"],
        "nacks": [{"gateway": "gw-2", "epoch": 8123, "code": "canary_unreachable", "message": "no endpoint of v2"}],
        "stable_endpoints": 2, "canary_endpoints": 1, "sticky_keys": ["metadata:x-user-id"],
        "created_ms": 1, "updated_ms": 2, "actor": "ada", "reason": "looks well", "message": "waits for 1 gateway",
    });
    assert_eq!(json, expected);
    let yaml = serde_norway::to_string(&rollout).unwrap();
    assert!(
        yaml.starts_with("model: demo\nuid: r-1\nstable: v1\ncanary: v2\nshare: 5%\ncanary_ppm: 50000\n"),
        "{yaml}"
    );
    assert_eq!(
        serde_norway::from_str::<serde_json::Value>(&yaml).unwrap(),
        expected
    );
}

#[test]
fn a_watched_rollout_is_one_line() {
    let line = RolloutLine(status().into());
    assert_eq!(
        line.table(),
        "demo v1 → v2 5% converging; generation 3; epoch 8123; 1/2 acknowledged; waits for gw-2; waits for 1 gateway\n"
    );
    assert_eq!(serde_json::to_string(&line).unwrap().lines().count(), 1);
}

#[test]
fn a_message_that_counts_down_is_no_news_and_an_acknowledgement_is() {
    let news = |change: fn(&mut Rollout)| {
        let mut rollout = Rollout::from(status());
        change(&mut rollout);
        RolloutLine(rollout).news()
    };
    let before = news(|_| ());
    assert_eq!(news(|r| r.message = "needs 11 more requests".into()), before);
    assert_ne!(news(|r| r.acknowledged = 2), before);
}

#[test]
fn rollouts_as_a_table() {
    let expected = "\
MODEL  STABLE  CANARY  SHARE  PHASE       GENERATION  EPOCH  ACKNOWLEDGED
demo   v1      v2      5%     converging  3           8123   1/2
";
    assert_eq!(
        Rollouts {
            rollouts: vec![status().into()]
        }
        .table(),
        expected
    );
}

#[test]
fn workers_as_a_table() {
    let served = |revision: &str| v1::ServedRevision {
        model: "demo".into(),
        revision: revision.into(),
        digest: "d".repeat(64),
        context_length: 512,
    };
    let worker = v1::Worker {
        id: "w1".into(),
        address: "127.0.0.1:8100".into(),
        runner: "fake".into(),
        device: "cpu".into(),
        revisions: vec![served("v1"), served("v2")],
        ..v1::Worker::default()
    };
    let second = v1::Worker {
        id: "w2".into(),
        draining: true,
        refused: vec!["demo@v2: digest differs".into()],
        ..worker.clone()
    };
    let workers = Workers::from(v1::ListWorkersResponse {
        workers: vec![worker, second],
    });
    let expected = "\
ID  ADDRESS         REGION  RUNNER  DEVICE  STATE     SERVES            REFUSED
w1  127.0.0.1:8100          fake    cpu     serving   demo@v1, demo@v2
w2  127.0.0.1:8100          fake    cpu     draining  demo@v1, demo@v2  demo@v2: digest differs
";
    assert_eq!(workers.table(), expected);
}

#[test]
fn gateways_tell_whether_they_follow() {
    let gateway = |node: &str| v1::Gateway {
        node: node.into(),
        live: true,
        acknowledged_epoch: 8,
        ..v1::Gateway::default()
    };
    let nack = v1::GatewayNack {
        epoch: 9,
        message: "no endpoint of v2".into(),
        ..v1::GatewayNack::default()
    };
    let gateways = vec![
        v1::Gateway {
            acknowledged_epoch: 9,
            ..gateway("a")
        },
        gateway("b"),
        v1::Gateway {
            nack: Some(nack),
            ..gateway("c")
        },
        v1::Gateway {
            live: false,
            silent_ms: 20_400,
            ..gateway("d")
        },
    ];
    let expected = "\
NODE  REGION  OPS  EPOCH  STATE
a                  9/9    current
b                  8/9    behind
c                  8/9    refuses epoch 9: no endpoint of v2
d                  8/9    lost for 20 s
";
    assert_eq!(
        Gateways::from(v1::ListGatewaysResponse { epoch: 9, gateways }).table(),
        expected
    );
}

#[test]
fn models_as_a_table_shorten_the_digest_that_json_has_whole() {
    let revision = |name: &str, role: &str| v1::PublishedRevision {
        name: name.into(),
        digest: "0123456789abcdef".into(),
        workers: 2,
        role: role.into(),
        ..v1::PublishedRevision::default()
    };
    let revisions = vec![revision("v1", "stable"), revision("v2", "")];
    let models = Models::from(v1::ListPublishedResponse {
        models: vec![v1::PublishedModel {
            name: "demo".into(),
            revisions,
            ..v1::PublishedModel::default()
        }],
    });
    let expected = "\
MODEL  REVISION  ROLE    WORKERS  DIGEST
demo   v1        stable  2        0123456789ab
demo   v2                2        0123456789ab
";
    assert_eq!(models.table(), expected);
    assert!(
        serde_json::to_string(&models)
            .unwrap()
            .contains("\"0123456789abcdef\"")
    );
}

#[test]
fn a_share_above_the_whole_is_shown_as_it_came() {
    assert_eq!(share(2_000_000), "2000000ppm");
}
