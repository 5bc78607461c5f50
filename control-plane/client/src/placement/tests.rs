//! Against a real Sync server over in-memory connections, in paused time.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use tonic::Status;

use super::*;
use crate::subscription::tests::plane::{Plane, Session};

/// A worker that counts its reports in the number of bytes that it has.
struct Worker {
    placements: Arc<Mutex<Vec<v1::Placement>>>,
    changes: watch::Sender<u64>,
    shutdown: CancellationToken,
    ended: tokio::task::JoinHandle<()>,
}

impl Worker {
    fn start(control_planes: ControlPlanes, plane: &Plane) -> Self {
        let (changes, changed) = watch::channel(0);
        let placements = Arc::new(Mutex::new(Vec::new()));
        let (shutdown, applied) = (CancellationToken::new(), placements.clone());
        let reports = AtomicU64::new(0);
        let follower = Follower {
            config: PlacementConfig {
                control_planes,
                node: "worker-1".into(),
                boot_id: "boot-7".into(),
                region: "eu-west".into(),
                ops_address: "worker-1:8101".into(),
                report_every: Duration::from_secs(1),
            },
            report: Arc::new(move || report(reports.fetch_add(1, Ordering::Relaxed) + 1)),
            changed,
            apply: move |placement| applied.lock().unwrap().push(placement),
            applied: None,
            backoff: Backoff::new(BACKOFF_BASE, BACKOFF_CAP),
            connected: false,
            warned: false,
        };
        let (dialer, stop) = (plane.dialer(), shutdown.clone());
        let ended = tokio::spawn(async move { follower.run(&dialer, &stop).await });
        Self {
            placements,
            changes,
            shutdown,
            ended,
        }
    }
}

fn at(addresses: &[&str]) -> ControlPlanes {
    ControlPlanes::At(addresses.iter().map(ToString::to_string).collect())
}

fn report(number: u64) -> v1::WorkerReport {
    v1::WorkerReport {
        revisions: vec![v1::RevisionState {
            done_bytes: number,
            ..Default::default()
        }],
    }
}

fn placement(version: u64) -> v1::Placement {
    v1::Placement {
        version,
        revisions: vec![v1::PlacedRevision {
            model: "demo".into(),
            revision: "v2".into(),
            ..Default::default()
        }],
    }
}

/// The next message that is no report.
async fn answer(session: &mut Session) -> Message {
    loop {
        match session.next().await {
            Message::Worker(_) => {}
            other => return other,
        }
    }
}

fn attempted(plane: &Plane) -> Vec<String> {
    plane.attempts().into_iter().map(|(address, _)| address).collect()
}

fn ack(nonce: u64, version: Option<u64>) -> Message {
    let applied = version.map(|version| v1::ack::Applied::Placement(v1::AppliedPlacement { version }));
    Message::Ack(v1::Ack { nonce, applied })
}

#[tokio::test(start_paused = true)]
async fn a_stream_begins_with_who_the_worker_is_and_what_it_has() {
    let mut plane = Plane::start();
    let _worker = Worker::start(at(&["plane:8090"]), &plane);
    let mut session = plane.session().await;
    let expected = v1::Hello {
        role: v1::hello::Role::Worker.into(),
        node: "worker-1".into(),
        boot_id: "boot-7".into(),
        region: "eu-west".into(),
        ops_address: "worker-1:8101".into(),
        ..Default::default()
    };
    assert_eq!(session.next().await, Message::Hello(expected));
    assert_eq!(session.next().await, Message::Worker(report(1)));
}

#[tokio::test(start_paused = true)]
async fn a_placement_is_applied_and_acknowledged_with_its_version() {
    let mut plane = Plane::start();
    let worker = Worker::start(at(&["plane:8090"]), &plane);
    let mut session = plane.session().await;
    session.next().await;
    session
        .push(1, Resource::Heartbeat(v1::Heartbeat::default()))
        .await;
    assert_eq!(answer(&mut session).await, ack(1, None));
    session.push(2, Resource::Placement(placement(7))).await;
    assert_eq!(answer(&mut session).await, ack(2, Some(7)));
    session
        .push(3, Resource::Heartbeat(v1::Heartbeat::default()))
        .await;
    assert_eq!(answer(&mut session).await, ack(3, Some(7)));
    assert_eq!(*worker.placements.lock().unwrap(), [placement(7)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_for_gateways_is_refused_and_the_stream_goes_on() {
    let mut plane = Plane::start();
    let _worker = Worker::start(at(&["plane:8090"]), &plane);
    let mut session = plane.session().await;
    session.next().await;
    session.push(1, Resource::Snapshot(v1::Snapshot::default())).await;
    let Message::Nack(nack) = answer(&mut session).await else {
        panic!("not refused")
    };
    assert_eq!((nack.nonce, nack.code.as_str()), (1, "unknown_resource"));
    session.push(2, Resource::Placement(placement(1))).await;
    assert_eq!(answer(&mut session).await, ack(2, Some(1)));
}

#[tokio::test(start_paused = true)]
async fn it_reports_every_second_and_at_once_where_something_changes() {
    let mut plane = Plane::start();
    let worker = Worker::start(at(&["plane:8090"]), &plane);
    let mut session = plane.session().await;
    session.next().await;
    session.next().await;
    let connected = Instant::now();
    assert_eq!(session.next().await, Message::Worker(report(2)));
    assert_eq!(connected.elapsed().as_millis(), 1000);
    worker.changes.send_modify(|changes| *changes += 1);
    assert_eq!(session.next().await, Message::Worker(report(3)));
    assert_eq!(connected.elapsed().as_millis(), 1000);
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_is_followed_by_one_to_whoever_leads_then() {
    let mut plane = Plane::start();
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    let locate: LocateFn = Box::new(move || {
        let address = format!("plane-{}:8090", count.fetch_add(1, Ordering::Relaxed));
        Box::pin(std::future::ready(vec![address]))
    });
    let _worker = Worker::start(ControlPlanes::Located(locate), &plane);
    let mut session = plane.session().await;
    session.push(1, Resource::Placement(placement(1))).await;
    while session.next().await != ack(1, Some(1)) {}
    session.fail(Status::unavailable("the leader changed")).await;
    let mut session = plane.session().await;
    assert!(matches!(session.next().await, Message::Hello(_)));
    assert_eq!(attempted(&plane), ["http://plane-0:8090", "http://plane-1:8090"]);
}

#[tokio::test(start_paused = true)]
async fn every_address_is_tried_while_none_answers() {
    let mut plane = Plane::start();
    plane.refuse(true);
    let _worker = Worker::start(at(&["not an address", "plane-a:1", "plane-b:2"]), &plane);
    sleep(Duration::from_secs(30)).await;
    let attempts = attempted(&plane);
    assert_eq!(
        attempts[..4],
        [
            "http://plane-a:1",
            "http://plane-b:2",
            "http://plane-a:1",
            "http://plane-b:2"
        ]
    );
    plane.refuse(false);
    assert!(matches!(plane.session().await.next().await, Message::Hello(_)));
}

#[tokio::test(start_paused = true)]
async fn told_to_end_it_closes_its_stream_in_good_order() {
    let mut plane = Plane::start();
    let worker = Worker::start(at(&["plane:8090"]), &plane);
    let mut session = plane.session().await;
    session.next().await;
    session.next().await;
    worker.shutdown.cancel();
    session.until_left().await;
    drop(session);
    worker.ended.await.unwrap();
}
