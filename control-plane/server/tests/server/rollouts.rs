//! What operators do, and what gateways make of it.

use std::sync::Arc;

use penstock_client::{AdminError, SyncConfig, Veto, View, subscribe};
use penstock_proto::v1::{self, Phase};
use penstock_store::{Key, Operation, Prefix, Transaction};
use tokio_util::sync::CancellationToken;

use crate::harness::{PATIENCE, Running, put_worker};

#[tokio::test]
async fn a_share_is_acknowledged_by_every_live_gateway() {
    let running = Running::start().await;
    let (mut one, mut two) = (running.gateway("g1"), running.gateway("g2"));
    running.create("v2").await.unwrap();
    running
        .until("both connect", async |r| {
            r.admin.list_gateways().await.unwrap().gateways.len() == 2
        })
        .await;
    running.set(50_000, None).await.unwrap();
    one.has_share(50_000).await;
    two.has_share(50_000).await;
    let status = running.phase(Phase::Paused).await;
    assert_eq!((status.live_gateways, status.acknowledged), (2, 2));
    assert!(status.pending.is_empty() && status.epoch > 0, "{status:?}");
    assert_eq!((status.stable_endpoints, status.canary_endpoints), (1, 1));
}

#[tokio::test]
async fn a_promoted_canary_is_stable_even_after_a_restart() {
    let running = Running::start().await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(50_000, None).await.unwrap();
    gateway.has_share(50_000).await;
    running
        .admin
        .promote_rollout(v1::PromoteRolloutRequest::default())
        .await
        .unwrap();
    running.phase(Phase::Succeeded).await;
    gateway.has_share(0).await;
    let before = running.admin.get_snapshot().await.unwrap();
    assert_eq!(before.routes["demo"].stable.name, "v2");

    let running = running.restart().await;
    assert_eq!(
        running.admin.get_snapshot().await.unwrap(),
        before,
        "no epoch is made by a restart"
    );
    assert_eq!(running.create("v1").await.unwrap().stable, "v2");
}

#[tokio::test]
async fn an_abort_takes_share_and_pin_together() {
    let running = Running::start().await;
    let mut gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.set(500_000, None).await.unwrap();
    gateway.has_share(500_000).await;
    let aborted = running
        .admin
        .abort_rollout(v1::AbortRolloutRequest::default())
        .await
        .unwrap();
    gateway.has_share(0).await;
    let snapshot = running.admin.get_snapshot().await.unwrap();
    assert_eq!(snapshot.routes["demo"].revoked, ["v2"]);
    assert_eq!(aborted.phase(), Phase::Aborting);
    assert!(matches!(
        running.set(1, None).await,
        Err(AdminError::Forbidden(_))
    ));
    let other = v1::AbortRolloutRequest {
        uid: "another".into(),
        ..Default::default()
    };
    assert!(matches!(
        running.admin.abort_rollout(other).await,
        Err(AdminError::Conflict(_))
    ));
}

#[tokio::test]
async fn of_two_operators_one_wins_and_the_other_is_told() {
    let running = Running::start().await;
    let created = running.create("v2").await.unwrap();
    running.phase(Phase::Paused).await;
    let seen = running.status().await.rollout.unwrap().store_revision;
    assert!(seen >= created.store_revision);
    running.set(50_000, Some(seen)).await.unwrap();
    match running.set(10_000, Some(seen)).await {
        Err(AdminError::Conflict(message)) => assert!(message.contains("5%"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(running.status().await.rollout.unwrap().canary_ppm, 50_000);
}

#[tokio::test]
async fn a_refused_snapshot_is_shown_with_its_reason_and_nothing_goes_on() {
    let running = Running::start().await;
    let veto = |epoch| match epoch {
        ..=1 => Ok(()),
        _ => Err(Veto {
            code: "canary_unreachable".into(),
            field: "routes[demo]".into(),
            message: "no v2".into(),
        }),
    };
    let _gateway = running.gateway_that("g1", veto);
    running
        .until("it connects", async |r| {
            !r.admin.list_gateways().await.unwrap().gateways.is_empty()
        })
        .await;
    running.create("v2").await.unwrap();
    running
        .until("the refusal is known", async |r| {
            !r.status().await.nacks.is_empty()
        })
        .await;
    running
        .until("the refusal pauses it", async |r| {
            r.status().await.rollout.unwrap().phase() == Phase::Paused
        })
        .await;
    let status = running.status().await;
    assert_eq!(status.nacks[0].code, "canary_unreachable");
    let rollout = status.rollout.unwrap();
    assert_eq!(rollout.pause(), penstock_proto::v1::PauseReason::Nacked);
    assert!(rollout.cause.contains("no v2"), "{}", rollout.cause);
    assert_eq!(status.pending, ["g1"]);
}

#[tokio::test]
async fn a_gateway_that_never_acknowledges_is_named_and_waited_for_until_the_plan_gives_it_up() {
    let running = Running::start().await;
    let mut good = running.gateway("g1");
    let _silent = running.silent_gateway("mute");
    running
        .until("both connect", async |r| {
            r.admin.list_gateways().await.unwrap().gateways.len() == 2
        })
        .await;
    let plan = |patience: &str| {
        format!(
            "kind: Rollout\nmodel: demo\nstable: v1\ncanary: {{revision: v2}}\nunacknowledged: {{{patience}}}\n\
             steps: [{{canary: 5%, hold: 1h}}, {{canary: 25%, hold: 1h}}, {{canary: 100%, bake: 1h}}]\n"
        )
    };
    running.apply(&plan("proceed_after: 2s")).await;
    good.has_share(50_000).await;
    let status = running.status().await;
    let rollout = status.rollout.unwrap();
    assert_eq!(rollout.phase(), Phase::Converging);
    assert_eq!(status.pending, ["mute"]);
    assert!(
        rollout.message.contains("waiting for mute"),
        "{}",
        rollout.message
    );
    // The plan gives it up after two seconds, and it is still named.
    let status = running.phase(Phase::Soaking).await;
    assert_eq!(status.pending, ["mute"]);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_the_remedy() {
    let running = Running::start().await;
    match running.create("v9").await {
        Err(AdminError::NotFound(message)) => assert!(message.contains("v1, v2, v3"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(
        matches!(running.create("v1").await, Err(AdminError::Invalid(_))),
        "stable and canary are one"
    );
    // v3 is published, but nobody serves it.
    running.create("v3").await.unwrap();
    match running.set(10_000, None).await {
        Err(AdminError::Forbidden(message)) => assert!(message.contains("demo@v3"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        running.set(1_000_001, None).await,
        Err(AdminError::Invalid(_))
    ));
    assert!(matches!(
        running.create("v2").await,
        Err(AdminError::AlreadyExists(_))
    ));
    assert!(matches!(
        running.admin.get_rollout("other").await,
        Err(AdminError::NotFound(_))
    ));
}

#[tokio::test]
async fn a_worker_with_another_digest_is_named_and_not_routed_to() {
    let running = Running::start().await;
    put_worker(
        &*running.store,
        "w2",
        &[("v1", "something else"), ("v2", "digest of v2")],
    )
    .await;
    running
        .until("it is listed", async |r| {
            r.admin.list_workers().await.unwrap().len() == 2
        })
        .await;
    let workers = running.admin.list_workers().await.unwrap();
    assert!(workers[1].refused[0].contains("demo@v1"), "{workers:?}");
    let models = running.admin.list_models().await.unwrap();
    let serving: Vec<u32> = models[0]
        .revisions
        .iter()
        .map(|revision| revision.workers)
        .collect();
    assert_eq!(serving, [1, 2, 0]);
}

#[tokio::test]
async fn a_store_that_was_lost_does_not_send_gateways_back() {
    let first = Running::start().await;
    let mut gateway = first.gateway("g1");
    first.create("v2").await.unwrap();
    for ppm in [10_000, 20_000, 30_000] {
        first.set(ppm, None).await.unwrap();
        gateway.has_share(ppm).await;
    }
    let old = first.admin.get_snapshot().await.unwrap().epoch;

    // Another store, and a gateway that comes back with what it had.
    let second = Running::start().await;
    let view = gateway.view.borrow().as_ref().clone();
    let config = SyncConfig {
        initial: view,
        ..SyncConfig::new([second.address.as_str()], "g1", "boot-1")
    };
    let stop = CancellationToken::new();
    let subscription = subscribe(config, Box::new(|_| Ok(())), stop.clone()).unwrap();
    let mut view = subscription.view();
    let newer = |view: &Arc<View>| {
        view.snapshot
            .as_ref()
            .is_some_and(|snapshot| snapshot.epoch > old)
    };
    tokio::time::timeout(PATIENCE, view.wait_for(newer))
        .await
        .expect("it goes on above")
        .unwrap();
    assert!(second.admin.get_snapshot().await.unwrap().epoch > old);
    stop.cancel();
}

#[tokio::test]
async fn a_watch_shows_every_phase_until_it_has_converged() {
    let running = Running::start().await;
    let _gateway = running.gateway("g1");
    running.create("v2").await.unwrap();
    running.phase(Phase::Paused).await;
    let mut statuses = running.admin.watch_rollout("demo").await.unwrap();
    let set = running.set(50_000, None).await.unwrap();
    let converged = async {
        loop {
            let status = statuses.message().await.unwrap().expect("it goes on");
            let rollout = status.rollout.clone().unwrap();
            if rollout.generation == set.generation && rollout.phase() == Phase::Paused {
                return status;
            }
        }
    };
    let status = tokio::time::timeout(PATIENCE, converged)
        .await
        .expect("it converges");
    assert_eq!((status.live_gateways, status.acknowledged), (1, 1));
    assert!(status.pending.is_empty() && status.nacks.is_empty());
}

#[tokio::test]
async fn every_change_leaves_a_record_of_who_and_why() {
    let running = Running::start().await;
    running.create("v2").await.unwrap();
    let request = v1::SetRolloutRequest {
        canary_ppm: 50_000,
        actor: "ada".into(),
        reason: "looks good".into(),
        ..Default::default()
    };
    running.admin.set_rollout(request).await.unwrap();
    let records = running.store.list(Prefix::Audit).await.unwrap().entries;
    let records: Vec<serde_json::Value> = records
        .iter()
        .map(|entry| serde_json::from_slice(&entry.value).unwrap())
        .collect();
    let set = records
        .iter()
        .find(|record| record["operation"] == "SetRollout")
        .unwrap();
    assert_eq!(
        (&set["after"]["actor"], &set["after"]["reason"]),
        (&"ada".into(), &"looks good".into())
    );
    assert_ne!(set["before"]["share"], set["after"]["share"]);
}

#[tokio::test]
async fn a_share_can_always_be_lowered_but_raised_only_to_somebody() {
    let running = Running::start().await;
    running.create("v2").await.unwrap();
    running.set(500_000, None).await.unwrap();
    put_worker(&*running.store, "w1", &[("v1", "digest of v1")]).await;
    running
        .until("the canary is gone", async |r| {
            r.status().await.canary_endpoints == 0
        })
        .await;
    match running.set(600_000, None).await {
        Err(AdminError::Forbidden(message)) => assert!(message.contains("50%"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(running.set(100_000, None).await.unwrap().canary_ppm, 100_000);
}

#[tokio::test]
async fn a_worker_that_goes_makes_other_endpoints_but_no_epoch() {
    let running = Running::start().await;
    let mut gateway = running.gateway("g1");
    gateway
        .sees("the worker", |view| view.endpoints.endpoints.len() == 1)
        .await;
    let before = running.admin.get_snapshot().await.unwrap();
    let gone = Transaction {
        preconditions: vec![],
        operations: vec![Operation::Delete(Key::Worker("w1".into()))],
    };
    running.store.commit(gone).await.unwrap();
    gateway
        .sees("its end", |view| view.endpoints.endpoints.is_empty())
        .await;
    assert_eq!(running.admin.get_snapshot().await.unwrap(), before);
}
