//! Two control planes on one store.

use penstock_client::AdminError;
use penstock_proto::v1::{self, sync_client::SyncClient};

use crate::harness::Running;

#[tokio::test]
async fn a_follower_refuses_writes_and_gateways_and_names_the_leader() {
    let leader = Running::start().await;
    let follower = Running::on(leader.store.clone()).await;
    let address = leader.address.trim_start_matches("http://");
    leader.create("v2").await.unwrap();
    follower
        .until("the follower knows the rollout", async |f| {
            f.store.health().await.is_ok()
                && f.admin.list_models().await.unwrap()[0].revisions[1].role == "canary"
        })
        .await;
    match follower.set(10_000, None).await {
        Err(AdminError::Unavailable { message, .. }) => assert!(message.contains(address), "{message}"),
        other => panic!("{other:?}"),
    }
    match follower.admin.list_gateways().await {
        Err(AdminError::Unavailable { message, .. }) => assert!(message.contains(address), "{message}"),
        other => panic!("{other:?}"),
    }
    let mut sync = SyncClient::connect(follower.address.clone()).await.unwrap();
    let refused = sync.sync(tokio_stream::pending::<v1::NodeMessage>()).await;
    let status = refused.expect_err("a follower does not speak to gateways");
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert!(status.message().contains(address), "{status}");
    assert_eq!(leader.set(10_000, None).await.unwrap().canary_ppm, 10_000);
}

#[tokio::test]
async fn a_new_leader_learns_acknowledgements_again_and_goes_on() {
    let first = Running::start().await;
    let second = Running::on(first.store.clone()).await;
    let mut gateway = Running::gateway_of("g1", &[&first, &second]);
    first.create("v2").await.unwrap();
    first.set(50_000, None).await.unwrap();
    gateway.has_share(50_000).await;
    let epoch = first.admin.get_snapshot().await.unwrap().epoch;

    first.stop.cancel();
    first.task.await.unwrap();
    second
        .until("the gateway comes over", async |second| {
            let gateways = second.admin.list_gateways().await.unwrap_or_default().gateways;
            gateways.iter().any(|g| g.live && g.acknowledged_epoch >= epoch)
        })
        .await;
    assert_eq!(
        second.admin.get_snapshot().await.unwrap().epoch,
        epoch,
        "a new leader makes no epoch"
    );
    second.set(200_000, None).await.unwrap();
    gateway.has_share(200_000).await;
    assert!(second.admin.get_snapshot().await.unwrap().epoch > epoch);
}
