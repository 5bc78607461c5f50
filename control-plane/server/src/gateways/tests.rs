#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn hello(node: &str) -> v1::Hello {
    v1::Hello {
        node: node.into(),
        boot_id: "boot-1".into(),
        ..Default::default()
    }
}

fn nack(epoch: u64) -> v1::GatewayNack {
    v1::GatewayNack {
        gateway: "g1".into(),
        epoch,
        code: "canary_unreachable".into(),
        message: "no v2".into(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_gateway_is_lost_after_15_seconds_and_forgotten_after_an_hour() {
    let gateways = Gateways::new();
    let session = gateways.hello(&hello("g1"), 3);
    tokio::time::advance(Duration::from_millis(14_999)).await;
    assert!(gateways.views()[0].live);
    gateways.said(&session);
    tokio::time::advance(Duration::from_millis(14_999)).await;
    assert!(gateways.views()[0].live);
    tokio::time::advance(Duration::from_millis(1)).await;
    let views = gateways.views();
    assert!(!views[0].live);
    assert_eq!(views[0].acknowledged_epoch, 3, "it is named with what it had");
    tokio::time::advance(FORGET_AFTER).await;
    assert_eq!(gateways.views(), []);
}

#[tokio::test]
async fn a_goodbye_is_not_a_loss_but_a_broken_stream_may_be() {
    let gateways = Gateways::new();
    let (left, broken) = (gateways.hello(&hello("g1"), 0), gateways.hello(&hello("g2"), 0));
    gateways.disconnected(&left, true);
    gateways.disconnected(&broken, false);
    let views = gateways.views();
    assert_eq!(views.len(), 1);
    assert!(views[0].node == "g2" && views[0].live);
}

#[tokio::test]
async fn an_older_stream_of_the_same_gateway_is_of_no_account() {
    let gateways = Gateways::new();
    let old = gateways.hello(&hello("g1"), 1);
    let new = gateways.hello(&hello("g1"), 2);
    assert!(!gateways.acknowledged(&old, 9));
    gateways.refused(&old, nack(9));
    gateways.disconnected(&old, true);
    let view = &gateways.views()[0];
    assert_eq!((view.acknowledged_epoch, &view.refused), (2, &None));
    assert!(gateways.acknowledged(&new, 3));
}

#[tokio::test]
async fn a_later_acknowledgement_takes_a_refusal_back_and_an_earlier_one_does_not() {
    let gateways = Gateways::new();
    let session = gateways.hello(&hello("g1"), 1);
    gateways.refused(&session, nack(5));
    gateways.acknowledged(&session, 4);
    assert!(gateways.views()[0].refused.is_some());
    gateways.acknowledged(&session, 5);
    assert_eq!(gateways.views()[0].refused, None);
}

#[tokio::test]
async fn a_new_term_begins_without_what_was_said_in_another() {
    let gateways = Gateways::new();
    gateways.hello(&hello("g1"), 7);
    gateways.listen(1234);
    let inventory = gateways.inventory(Some(7));
    assert_eq!((inventory.gateways, inventory.listening_since_ms), (vec![], 1234));
}
