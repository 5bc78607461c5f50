//! Against a real Sync server over in-memory connections, in paused time.

pub(crate) mod plane;

use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use penstock_plan::Snapshot;
use penstock_proto::v1::{self, node_message::Message, push::Resource};
use tonic::Status;

use self::plane::{Plane, Session};
use super::*;
use crate::stream::SILENCE;

fn config() -> SyncConfig {
    SyncConfig {
        region: "eu-west".into(),
        ..SyncConfig::new(["plane:8090"], "gw-1", "boot-7")
    }
}

/// A subscription to `plane` that applies everything and counts how often.
struct Node {
    subscription: Subscription,
    applied: Arc<AtomicUsize>,
    shutdown: CancellationToken,
}

impl Node {
    fn start(config: SyncConfig, plane: &Plane) -> Self {
        let (applied, shutdown) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let count = applied.clone();
        let apply: ApplyFn = Box::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let subscription = start(config, apply, shutdown.clone(), plane.dialer()).unwrap();
        Self {
            subscription,
            applied,
            shutdown,
        }
    }

    fn view(&self) -> Arc<View> {
        self.subscription.view().borrow().clone()
    }

    fn epoch(&self) -> Option<u64> {
        self.view().snapshot.as_ref().map(|snapshot| snapshot.epoch)
    }

    async fn until(&self, condition: impl FnMut(&Arc<View>) -> bool) {
        self.subscription.view().wait_for(condition).await.unwrap();
    }
}

fn snapshot(epoch: u64) -> Snapshot {
    Snapshot {
        epoch,
        ..Snapshot::default()
    }
}

async fn push_snapshot(session: &Session, nonce: u64, epoch: u64) {
    session
        .push(nonce, Resource::Snapshot((&snapshot(epoch)).into()))
        .await;
}

fn ack(nonce: u64, epoch: u64) -> Message {
    let applied = v1::AppliedSnapshot {
        epoch,
        digest: snapshot(epoch).digest(),
    };
    Message::Ack(v1::Ack {
        nonce,
        applied: Some(v1::ack::Applied::Snapshot(applied)),
    })
}

fn hello(message: Message) -> v1::Hello {
    match message {
        Message::Hello(hello) => hello,
        other => panic!("not a Hello: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_begins_with_who_the_node_is_and_what_it_serves() {
    let mut plane = Plane::start();
    let initial = View {
        snapshot: Some(Arc::new(snapshot(5))),
        ..View::default()
    };
    let node = Node::start(
        SyncConfig {
            initial,
            ops_address: "gw-1:8081".into(),
            ..config()
        },
        &plane,
    );
    let expected = v1::Hello {
        role: v1::hello::Role::Gateway.into(),
        node: "gw-1".into(),
        boot_id: "boot-7".into(),
        region: "eu-west".into(),
        ops_address: "gw-1:8081".into(),
        applied_epoch: 5,
        applied_digest: snapshot(5).digest(),
        applied_endpoints: 0,
    };
    assert_eq!(hello(plane.session().await.next().await), expected);
    // It serves from the start, and does not take a mere connection for a control plane.
    assert_eq!((node.epoch(), node.view().connected), (Some(5), false));
}

#[tokio::test(start_paused = true)]
async fn what_is_pushed_is_shown_and_acknowledged() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    let mut session = plane.session().await;
    session.next().await;
    push_snapshot(&session, 1, 7).await;
    assert_eq!(session.next().await, ack(1, 7));
    assert_eq!((node.epoch(), node.view().connected), (Some(7), true));
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_keeps_the_view_and_the_next_one_applies_nothing_twice() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    let mut session = plane.session().await;
    session.next().await;
    push_snapshot(&session, 1, 7).await;
    session.next().await;

    session.fail(Status::unavailable("the leader changed")).await;
    node.until(|view| !view.connected).await;
    assert_eq!(node.epoch(), Some(7));

    let mut session = plane.session().await;
    let hello = hello(session.next().await);
    assert_eq!(
        (hello.applied_epoch, hello.applied_digest),
        (7, snapshot(7).digest())
    );
    push_snapshot(&session, 1, 7).await;
    assert_eq!(session.next().await, ack(1, 7));
    assert_eq!(node.applied.load(Ordering::Relaxed), 1);
    push_snapshot(&session, 2, 8).await;
    assert_eq!(session.next().await, ack(2, 8));
    assert_eq!(
        (node.applied.load(Ordering::Relaxed), node.view().connected),
        (2, true)
    );
}

#[tokio::test(start_paused = true)]
async fn a_garbled_push_is_refused_and_the_stream_goes_on() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    let mut session = plane.session().await;
    session.next().await;
    let garbled = v1::Snapshot {
        digest: "00".into(),
        ..(&snapshot(7)).into()
    };
    session.push(1, Resource::Snapshot(garbled)).await;
    let Message::Nack(nack) = session.next().await else {
        panic!("not refused")
    };
    assert_eq!(
        (nack.nonce, nack.epoch, nack.code.as_str()),
        (1, 7, "digest_mismatch")
    );
    assert_eq!(node.epoch(), None);
    push_snapshot(&session, 2, 7).await;
    assert_eq!(session.next().await, ack(2, 7));
}

#[tokio::test(start_paused = true)]
async fn a_node_says_that_it_is_alive_however_quiet_the_control_plane_is() {
    let mut plane = Plane::start();
    let config = SyncConfig {
        alive_every: Duration::from_secs(4),
        ..config()
    };
    let _node = Node::start(config, &plane);
    let mut session = plane.session().await;
    session.next().await;
    let connected = Instant::now();
    for nth in 1..=3 {
        assert_eq!(session.next().await, Message::Alive(v1::Alive {}));
        assert_eq!(connected.elapsed().as_secs(), nth * 4);
    }
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_falls_silent_is_given_up() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    let mut silent = plane.session().await;
    silent.next().await;
    push_snapshot(&silent, 1, 7).await;
    let since = Instant::now();
    node.until(|view| view.connected).await;
    node.until(|view| !view.connected).await;
    assert_eq!(since.elapsed().as_secs(), SILENCE.as_secs());

    let mut next = plane.session().await;
    assert_eq!(hello(next.next().await).applied_epoch, 7);
    // A heartbeat in time is all that it takes to keep the stream.
    for nonce in 1..=4 {
        next.push(nonce, Resource::Heartbeat(v1::Heartbeat::default()))
            .await;
        sleep(SILENCE - Duration::from_secs(1)).await;
    }
    assert!(node.view().connected);
}

#[tokio::test(start_paused = true)]
async fn addresses_are_tried_in_turn_ever_more_slowly_but_never_beyond_the_cap() {
    let plane = Plane::start();
    plane.refuse(true);
    let addresses = ["plane-0:8090", "plane-1:8090", "plane-2:8090"];
    let _node = Node::start(
        SyncConfig {
            control_planes: addresses.map(Into::into).into(),
            ..config()
        },
        &plane,
    );
    sleep(Duration::from_secs(600)).await;
    let attempts = plane.attempts();
    // Full jitter draws half the ceiling on average: some 240 attempts in ten minutes.
    assert!(
        (150..=400).contains(&attempts.len()),
        "{} attempts",
        attempts.len()
    );
    for (nth, pair) in attempts.windows(2).enumerate() {
        let ceiling = BACKOFF_CAP.min(BACKOFF_BASE * 2u32.saturating_pow(nth as u32));
        // The timer's resolution is a millisecond.
        assert!(
            pair[1].1 - pair[0].1 <= ceiling + Duration::from_millis(1),
            "attempt {nth} came too late"
        );
    }
    for (nth, (address, _)) in attempts.iter().enumerate() {
        assert_eq!(*address, format!("http://{}", addresses[nth % 3]));
    }
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_held_the_stream_is_tried_once_more_before_the_next() {
    let mut plane = Plane::start();
    let addresses = ["plane-0:8090", "plane-1:8090"];
    let node = Node::start(
        SyncConfig {
            control_planes: addresses.map(Into::into).into(),
            ..config()
        },
        &plane,
    );
    let mut session = plane.session().await;
    session.next().await;
    push_snapshot(&session, 1, 7).await;
    session.next().await;
    plane.refuse(true);
    drop(session);
    node.until(|view| !view.connected).await;
    sleep(Duration::from_secs(2)).await;
    let order: Vec<String> = plane
        .attempts()
        .into_iter()
        .map(|(address, _)| address)
        .take(3)
        .collect();
    assert_eq!(
        order,
        [
            "http://plane-0:8090",
            "http://plane-0:8090",
            "http://plane-1:8090"
        ]
    );
    plane.refuse(false);
    plane.session().await.next().await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_held_makes_the_next_attempt_prompt_and_one_that_broke_at_once_does_not() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    for _ in 0..12 {
        let mut session = plane.session().await;
        session.next().await;
        push_snapshot(&session, 1, 7).await;
        session.next().await;
        session.fail(Status::unavailable("draining")).await;
    }
    let gaps: Vec<Duration> = plane
        .attempts()
        .windows(2)
        .map(|pair| pair[1].1 - pair[0].1)
        .collect();
    assert!(gaps.iter().any(|gap| *gap > BACKOFF_BASE * 2), "{gaps:?}");

    let mut session = plane.session().await;
    session.next().await;
    push_snapshot(&session, 1, 7).await;
    session.next().await;
    sleep(STEADY).await;
    session.fail(Status::unavailable("draining")).await;
    let broken = Instant::now();
    node.until(|view| !view.connected).await;
    plane.session().await;
    assert!(broken.elapsed() <= BACKOFF_BASE + Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_the_stream_in_good_order() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    let mut session = plane.session().await;
    session.next().await;
    push_snapshot(&session, 1, 7).await;
    session.next().await;
    node.shutdown.cancel();
    let since = Instant::now();
    session.until_left().await;
    // The process may exit once it has ended, so it waits for the control plane's side.
    sleep(GOODBYE / 2).await;
    assert!(!node.subscription.task.is_finished());
    drop(session);
    node.subscription.ended().await;
    assert_eq!(since.elapsed(), GOODBYE / 2);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_for_no_control_plane() {
    let mut plane = Plane::start();
    let node = Node::start(config(), &plane);
    // This one never reacts.
    let mut session = plane.session().await;
    session.next().await;
    node.shutdown.cancel();
    let since = Instant::now();
    node.subscription.ended().await;
    assert!(since.elapsed() <= GOODBYE + Duration::from_millis(1));

    plane.refuse(true);
    let node = Node::start(config(), &plane);
    sleep(Duration::from_secs(60)).await;
    node.shutdown.cancel();
    let since = Instant::now();
    node.subscription.ended().await;
    assert_eq!(since.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn addresses_that_cannot_be_used_are_refused_at_once() {
    let subscribe_to = |addresses: &[&str]| {
        let config = SyncConfig::new(addresses.iter().copied(), "gw-1", "boot-7");
        subscribe(config, Box::new(|_| Ok(())), CancellationToken::new())
            .unwrap_err()
            .to_string()
    };
    assert!(subscribe_to(&[]).contains("no control plane is named"));
    assert!(subscribe_to(&["127.0.0.1:8090", "nonsense"]).contains("\"nonsense\""));
}

#[tokio::test(start_paused = true)]
async fn reports_go_out_every_second_and_after_an_apply_and_are_numbered_over_streams() {
    let mut plane = Plane::start();
    let counting = SyncConfig {
        stats: Some(Arc::new(v1::Stats::default)),
        alive_every: Duration::from_secs(3600),
        ..config()
    };
    let _node = Node::start(counting, &plane);
    let mut session = plane.session().await;
    session.next().await;
    let report = |sequence| {
        Message::Stats(v1::Stats {
            sequence,
            ..v1::Stats::default()
        })
    };
    let began = Instant::now();
    push_snapshot(&session, 1, 7).await;
    assert_eq!(session.next().await, ack(1, 7));
    assert_eq!(session.next().await, report(1));
    assert!(began.elapsed() < Duration::from_millis(100));
    push_snapshot(&session, 2, 7).await;
    assert_eq!(session.next().await, ack(2, 7), "nothing new, nothing to tell");
    assert_eq!(session.next().await, report(2));
    assert_eq!(began.elapsed().as_secs(), 1);
    session.fail(Status::unavailable("restart")).await;
    let mut session = plane.session().await;
    session.next().await;
    assert_eq!(session.next().await, report(3));
}

/// Four workers, all of which serve the canary.
fn four() -> penstock_plan::EndpointSet {
    let served = penstock_plan::ServedRevision {
        model: "demo".into(),
        revision: "v2".into(),
        digest: "bb".into(),
        context_length: 64,
    };
    let endpoint = |id: &str| penstock_plan::Endpoint {
        id: id.into(),
        address: format!("{id}:1"),
        region: String::new(),
        revisions: vec![served.clone()],
    };
    penstock_plan::EndpointSet {
        version: 1,
        endpoints: ["a", "b", "c", "d"].map(endpoint).into(),
    }
}

/// A subscription that reaches the workers in the list.
fn reaching(answering: &Arc<Mutex<Vec<String>>>) -> SyncConfig {
    let answering = answering.clone();
    SyncConfig {
        reach: Some(Arc::new(move |endpoint| {
            let answers = answering.lock().unwrap().contains(&endpoint.id);
            Box::pin(std::future::ready(answers))
        })),
        ..config()
    }
}

#[tokio::test(start_paused = true)]
async fn workers_that_vanish_all_at_once_stay_until_they_do_not_answer() {
    let mut plane = Plane::start();
    let answering = Arc::new(Mutex::new(vec!["a".to_owned(), "b".to_owned()]));
    let node = Node::start(reaching(&answering), &plane);
    let session = plane.session().await;
    let ids = |view: &View| -> Vec<String> {
        let endpoints = view.endpoints.endpoints.iter();
        endpoints.map(|endpoint| endpoint.id.clone()).collect()
    };
    session.push(1, Resource::Endpoints((&four()).into())).await;
    node.until(|view| ids(view).len() == 4).await;
    let none = penstock_plan::EndpointSet {
        version: 2,
        endpoints: vec![],
    };
    session.push(2, Resource::Endpoints((&none).into())).await;
    node.until(|view| view.endpoints.version == 2).await;
    assert_eq!(ids(&node.view()), ["a", "b", "c", "d"]);
    node.until(|view| ids(view).len() == 2).await;
    assert_eq!(ids(&node.view()), ["a", "b"]);
    answering.lock().unwrap().clear();
    node.until(|view| ids(view).is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_starts_from_disk_keeps_what_a_store_that_forgot_does_not_name() {
    let mut plane = Plane::start();
    let answering = Arc::new(Mutex::new(vec!["a".to_owned()]));
    let initial = View {
        endpoints: Arc::new(four()),
        ..View::default()
    };
    let node = Node::start(
        SyncConfig {
            initial,
            ..reaching(&answering)
        },
        &plane,
    );
    let session = plane.session().await;
    let none = penstock_plan::EndpointSet {
        version: 9,
        endpoints: vec![],
    };
    session.push(1, Resource::Endpoints((&none).into())).await;
    node.until(|view| view.endpoints.version == 9).await;
    assert_eq!(node.view().endpoints.endpoints.len(), 4);
    node.until(|view| view.endpoints.endpoints.len() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_offered_with_the_workers_that_answer_and_again_when_others_do() {
    let mut plane = Plane::start();
    let answering = Arc::new(Mutex::new(vec!["a".to_owned()]));
    let offered = Arc::new(Mutex::new(Vec::new()));
    let seen = offered.clone();
    let apply: ApplyFn = Box::new(move |candidate| {
        seen.lock().unwrap().push(candidate.reached.len());
        match candidate.reached.len() {
            0 | 1 => Err(crate::Veto {
                code: "canary_unreachable".into(),
                field: String::new(),
                message: "one is too few".into(),
            }),
            _ => Ok(()),
        }
    });
    let shutdown = CancellationToken::new();
    let _subscription = start(reaching(&answering), apply, shutdown, plane.dialer()).unwrap();
    let mut session = plane.session().await;
    session.next().await;
    session.push(1, Resource::Endpoints((&four()).into())).await;
    session.next().await;
    let route = penstock_plan::Route {
        model: "demo".into(),
        stable: penstock_plan::Revision::new("v1", "aa"),
        canary: Some(penstock_plan::Canary {
            revision: penstock_plan::Revision::new("v2", "bb"),
            share: penstock_plan::Ppm::ALL,
            min_ready: 2,
        }),
        rollout_uid: "r-1".into(),
        ..penstock_plan::Route::default()
    };
    let wanting = Snapshot {
        epoch: 1,
        routes: [("demo".to_owned(), route)].into(),
    };
    session.push(2, Resource::Snapshot((&wanting).into())).await;
    assert!(matches!(session.next().await, Message::Nack(_)));
    answering.lock().unwrap().push("c".into());
    let late = loop {
        match session.next().await {
            Message::Alive(_) => {}
            other => break other,
        }
    };
    assert!(matches!(late, Message::Ack(v1::Ack { nonce: 2, .. })), "{late:?}");
    assert_eq!(
        *offered.lock().unwrap(),
        [1, 2],
        "it is offered again only for a reason"
    );
}
