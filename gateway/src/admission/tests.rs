use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant as StdInstant,
};

use proptest::prelude::*;
use tokio::time::{Instant, sleep};

use super::{
    fair::FairQueue,
    gate::Shed,
    rate::{Exceeded, Tenants},
    *,
};

fn ask(tenant: u64, tokens: u64) -> Ask {
    Ask {
        tenant,
        tokens,
        deadline: None,
        limit: 100,
    }
}

fn gate(max_queue: usize, max_wait_ms: u64) -> Arc<Gate> {
    Arc::new(Gate::new(max_queue, Duration::from_millis(max_wait_ms)))
}

/// Keeps a gate at its limit and its pace at 100 tokens a second for some seconds.
async fn keep_busy(gate: &Arc<Gate>) -> Permit {
    let mut held = gate.admit(ask(9, 100)).await.unwrap();
    for _ in 0..10 {
        sleep(Duration::from_secs(1)).await;
        drop(held);
        held = gate.admit(ask(9, 100)).await.unwrap();
    }
    held
}

#[test]
fn a_rate_is_refused_with_the_time_when_it_is_not() {
    let start = StdInstant::now();
    let mut tenants = Tenants::new(Some(60), None);
    for _ in 0..60 {
        tenants.charge(1, 5, start).unwrap();
    }
    let exceeded: Exceeded = tenants.charge(1, 5, start).unwrap_err();
    assert_eq!(exceeded.retry_after(), Duration::from_secs(1));
    assert!(
        exceeded.to_string().contains("60 requests per minute"),
        "{exceeded}"
    );
    tenants.charge(2, 5, start).unwrap();
    let early = start + Duration::from_millis(900);
    assert!(tenants.charge(1, 5, early).is_err());
    tenants.charge(1, 5, start + Duration::from_secs(1)).unwrap();
}

#[test]
fn tokens_are_charged_as_expected_and_corrected_at_the_end() {
    let start = StdInstant::now();
    let mut tenants = Tenants::new(None, Some(600));
    tenants.charge(1, 500, start).unwrap();
    let exceeded = tenants.charge(1, 200, start).unwrap_err();
    assert_eq!(exceeded.retry_after(), Duration::from_secs(10));
    tenants.correct(1, 500, 300);
    tenants.charge(1, 200, start).unwrap();
    // Nobody could ever send what is larger than a minute's rate, were it not for a full minute's saving.
    assert!(tenants.charge(1, 5000, start).is_err());
    tenants.charge(1, 5000, start + Duration::from_secs(60)).unwrap();
    assert!(tenants.charge(1, 1, start + Duration::from_secs(120)).is_err());
}

#[test]
fn whoever_asks_for_little_does_not_wait_for_whoever_asks_for_much() {
    let mut queue = FairQueue::new();
    for index in 0..100 {
        queue.push(1, 50, ("heavy", index));
    }
    queue.push(2, 10, ("light", 0));
    let order: Vec<_> = std::iter::from_fn(|| queue.pop())
        .map(|(_, item)| item.0)
        .collect();
    assert_eq!(order[..3], ["heavy", "light", "heavy"]);
    assert_eq!(order.len(), 101);
}

proptest! {
    #[test]
    fn tenants_that_always_wait_get_the_same_tokens(
        sizes in prop::collection::vec((1u64..100, 1u64..100), 200),
    ) {
        let mut queue = FairQueue::new();
        for (first, second) in sizes {
            queue.push(1, first, 1);
            queue.push(2, second, 2);
        }
        let mut served = [0u64; 3];
        for _ in 0..150 {
            let (tokens, tenant) = queue.pop().unwrap();
            served[tenant] += tokens;
            prop_assert!(served[1].abs_diff(served[2]) <= 200, "{:?}", served);
        }
    }

    #[test]
    fn the_place_that_is_told_is_the_place_that_is_given(asked in prop::collection::vec((0u64..4, 1u64..50, any::<bool>()), 1..60)) {
        let mut queue = FairQueue::new();
        for (tenant, tokens, pop) in asked {
            let (place, _) = queue.place(tenant);
            prop_assert_eq!(queue.push(tenant, tokens, ()), place);
            if pop {
                queue.pop();
            }
        }
        while queue.pop().is_some() {}
        prop_assert!(queue.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_gets_in_when_somebody_leaves() {
    let gate = gate(10, 5000);
    let first = gate.admit(ask(1, 60)).await.unwrap();
    let _second = gate.admit(ask(1, 40)).await.unwrap();
    let waiting = tokio::spawn({
        let gate = gate.clone();
        async move { gate.admit(ask(1, 60)).await }
    });
    sleep(Duration::from_millis(10)).await;
    assert_eq!(gate.counts(), (100, 1));
    drop(first);
    let third = waiting.await.unwrap().unwrap();
    assert_eq!(gate.counts(), (100, 0));
    drop(third);
    assert_eq!(gate.counts(), (40, 0));
}

#[tokio::test(start_paused = true)]
async fn who_waits_gets_in_when_the_workers_are_found_to_take_more() {
    let gate = gate(10, 5000);
    let first = gate.admit(ask(1, 100)).await.unwrap();
    let waiting = tokio::spawn({
        let gate = gate.clone();
        async move { gate.admit(ask(1, 60)).await }
    });
    sleep(Duration::from_millis(10)).await;
    first.refresh(150);
    assert_eq!(gate.counts(), (100, 1));
    first.refresh(160);
    assert_eq!(gate.counts(), (160, 0));
    drop(waiting.await.unwrap().unwrap());
}

#[tokio::test(start_paused = true)]
async fn who_leaves_the_queue_leaves_nothing_behind() {
    let gate = gate(10, 5000);
    for granted in [false, true] {
        let held = gate.admit(ask(1, 100)).await.unwrap();
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.admit(ask(1, 10)).await.map(drop) }
        });
        sleep(Duration::from_millis(10)).await;
        assert_eq!(gate.counts(), (100, 1));
        if granted {
            drop(held);
            assert_eq!(gate.counts(), (10, 0));
            // It is gone before it hears of it.
            waiting.abort();
            waiting.await.unwrap_err();
        } else {
            waiting.abort();
            waiting.await.unwrap_err();
            assert_eq!(gate.counts(), (100, 0));
            drop(held);
        }
        assert_eq!(gate.counts(), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_in_time_is_refused_at_once_with_a_true_hint() {
    let gate = gate(100, 1500);
    let held = keep_busy(&gate).await;
    let began = Instant::now();
    // 250 tokens more than there is room for, at 100 a second.
    let Err(Shed::Long {
        wait, retry_after, ..
    }) = gate.admit(ask(1, 250)).await
    else {
        panic!("it would wait for two seconds and more");
    };
    assert!(
        wait > Duration::from_millis(1700) && wait < Duration::from_millis(3500),
        "{wait:?}"
    );
    assert_eq!(retry_after, wait - Duration::from_millis(1500));
    let late = Ask {
        deadline: Some(Instant::now() + Duration::from_millis(300)),
        ..ask(1, 80)
    };
    assert!(matches!(gate.admit(late).await, Err(Shed::Late { .. })));
    assert_eq!(Instant::now(), began, "nobody waited");
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_was_thought_shorter_ends_in_time() {
    let gate = gate(100, 500);
    let _held = gate.admit(ask(1, 100)).await.unwrap();
    let began = Instant::now();
    assert!(matches!(gate.admit(ask(1, 10)).await, Err(Shed::Full { .. })));
    assert_eq!(began.elapsed(), Duration::from_millis(500));
    let hurried = Ask {
        deadline: Some(Instant::now() + Duration::from_millis(100)),
        ..ask(1, 10)
    };
    assert!(gate.admit(hurried).await.is_err());
    assert_eq!(began.elapsed(), Duration::from_millis(600));
    assert_eq!(gate.counts(), (100, 0));
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_loses_whoever_asked_for_most() {
    let gate = gate(3, 60_000);
    let held = gate.admit(ask(1, 100)).await.unwrap();
    let refused = Arc::new(AtomicUsize::new(0));
    let mut waiting = tokio::task::JoinSet::new();
    for tenant in [1, 1, 1, 2] {
        let (gate, refused) = (gate.clone(), refused.clone());
        waiting.spawn(async move {
            match gate.admit(ask(tenant, 30)).await {
                Ok(permit) => drop(permit),
                Err(_) => {
                    refused.fetch_add(tenant as usize, Ordering::SeqCst);
                }
            }
        });
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(refused.load(Ordering::SeqCst), 1, "one of tenant 1 left");
    assert_eq!(gate.counts(), (100, 3));
    drop(held);
    while waiting.join_next().await.is_some() {}
    assert_eq!(gate.counts(), (0, 0));
}

/// Requests of one second each on 100 places, three times as many as fit.
#[tokio::test(start_paused = true)]
async fn at_three_times_the_load_the_work_goes_on_and_nobody_waits_long() {
    const MAX_WAIT: Duration = Duration::from_millis(200);
    let gate = gate(1024, 200);
    let done = Arc::new(AtomicUsize::new(0));
    let longest = Arc::new(AtomicUsize::new(0));
    let mut asked = tokio::task::JoinSet::new();
    for index in 0..6000u64 {
        // Evenly spread, 300 a second for 20 s.
        sleep(Duration::from_micros(3333)).await;
        let (gate, done, longest) = (gate.clone(), done.clone(), longest.clone());
        asked.spawn(async move {
            let began = Instant::now();
            if let Ok(permit) = gate.admit(ask(index % 7, 1)).await {
                let waited = began.elapsed();
                longest.fetch_max(waited.as_micros() as usize, Ordering::SeqCst);
                sleep(Duration::from_millis(900 + index * 37 % 200)).await;
                done.fetch_add(1, Ordering::SeqCst);
                drop(permit);
            }
        });
    }
    while asked.join_next().await.is_some() {}
    let done = done.load(Ordering::SeqCst);
    assert!(done >= 1900, "{done} of about 2000 that fit");
    let longest = Duration::from_micros(longest.load(Ordering::SeqCst) as u64);
    assert!(longest <= MAX_WAIT, "{longest:?}");
}

#[test]
fn a_tenant_is_known_by_its_credential_first() {
    let headers = |pairs: &[(&'static str, &'static str)]| {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()));
        HeaderMap::from_iter(pairs)
    };
    let key = ("authorization", "Bearer k");
    let tenant_of = |pairs: &[_]| tenant(&headers(pairs), None);
    assert_eq!(
        tenant_of(&[key, ("x-user-id", "a")]),
        tenant_of(&[key, ("x-user-id", "b")])
    );
    assert_ne!(tenant_of(&[("x-user-id", "a")]), tenant_of(&[("x-user-id", "b")]));
    assert_ne!(
        tenant_of(&[("x-user-id", "a")]),
        tenant_of(&[("x-tenant-id", "a")])
    );
    let address = |text: &str| tenant(&HeaderMap::new(), Some(text.parse().unwrap()));
    assert_eq!(address("2001:db8::1"), address("2001:db8::ffff"));
    assert_ne!(address("10.0.0.1"), address("10.0.0.2"));
}
