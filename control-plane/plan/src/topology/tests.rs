use super::*;

fn worker() -> WorkerRecord {
    WorkerRecord {
        id: "w1".into(),
        boot_id: "b".into(),
        address: "w1:8100".into(),
        ops_address: "w1:8101".into(),
        region: "eu-west".into(),
        runner: "fake".into(),
        device: "cpu".into(),
        draining: true,
        started_ms: 1,
        revisions: vec![ServedRevision {
            model: "demo".into(),
            revision: "v1".into(),
            digest: "aa".into(),
            context_length: 256,
        }],
    }
}

#[test]
fn the_digest_decides_what_an_endpoint_serves() {
    let endpoint = Endpoint::from(&worker());
    assert!(endpoint.serves("demo", "v1", "aa"));
    for (model, revision, digest) in [("demo", "v1", "bb"), ("demo", "v2", "aa"), ("other", "v1", "aa")] {
        assert!(
            !endpoint.serves(model, revision, digest),
            "{model}@{revision} {digest}"
        );
    }
}

#[test]
fn a_worker_survives_the_store() {
    let stored = serde_json::to_string(&worker()).unwrap();
    assert_eq!(serde_json::from_str::<WorkerRecord>(&stored).unwrap(), worker());
}

#[test]
fn a_revision_that_was_published_before_sources_were_known_is_read() {
    let stored = r#"{"model":"demo","revision":"v1","digest":"aa","published_ms":7}"#;
    let expected = PublishedRevision {
        model: "demo".into(),
        revision: "v1".into(),
        digest: "aa".into(),
        published_ms: 7,
        ..PublishedRevision::default()
    };
    assert_eq!(
        serde_json::from_str::<PublishedRevision>(stored).unwrap(),
        expected
    );
}
