use super::*;

fn worker(id: &str, served: &[(&str, &str)]) -> WorkerRecord {
    WorkerRecord {
        id: id.into(),
        boot_id: "b".into(),
        address: format!("{id}:8100"),
        ops_address: format!("{id}:8101"),
        region: String::new(),
        runner: "fake".into(),
        device: "cpu".into(),
        draining: false,
        started_ms: 1,
        revisions: served
            .iter()
            .map(|(revision, digest)| ServedRevision {
                model: "demo".into(),
                revision: (*revision).into(),
                digest: (*digest).into(),
                context_length: 256,
            })
            .collect(),
    }
}

fn published() -> Published {
    let revision = |revision: &str, digest: &str| PublishedRevision {
        model: "demo".into(),
        revision: revision.into(),
        digest: digest.into(),
        published_ms: 0,
    };
    Published::from([("demo".into(), vec![revision("v1", "aa"), revision("v2", "bb")])])
}

#[test]
fn endpoints_come_in_the_order_of_their_ids() {
    let workers = [
        worker("w2", &[("v2", "bb")]),
        worker("w1", &[("v1", "aa"), ("v2", "bb")]),
    ];
    let topology = build_topology(&workers, &published());
    assert_eq!(
        topology.endpoints,
        [Endpoint::from(&workers[1]), Endpoint::from(&workers[0])]
    );
    assert!(topology.refused.is_empty());
}

#[test]
fn another_checkpoint_under_a_published_name_is_not_routed_to() {
    let topology = build_topology(&[worker("w1", &[("v1", "aa"), ("v2", "xx")])], &published());
    assert!(topology.endpoints[0].serves("demo", "v1", "aa"));
    assert!(!topology.endpoints[0].serves("demo", "v2", "xx"));
    assert_eq!(
        topology.refused["w1"],
        ["demo@v2 is published with digest bb, it serves xx"]
    );
}

#[test]
fn a_worker_with_nothing_to_offer_is_no_endpoint() {
    let draining = WorkerRecord {
        draining: true,
        ..worker("w1", &[("v1", "aa")])
    };
    let topology = build_topology(&[draining, worker("w2", &[("v9", "cc")])], &published());
    assert_eq!(topology.endpoints, []);
    assert_eq!(topology.refused["w2"], ["demo@v9 is not published"]);
}

#[test]
fn the_digest_decides_what_an_endpoint_serves() {
    let endpoint = Endpoint::from(&worker("w1", &[("v1", "aa")]));
    assert!(endpoint.serves("demo", "v1", "aa"));
    assert!(!endpoint.serves("demo", "v1", "bb") && !endpoint.serves("other", "v1", "aa"));
}
