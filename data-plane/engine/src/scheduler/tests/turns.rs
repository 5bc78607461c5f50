//! Whose turn it is.

use super::*;

/// One place to run in, so that the order of admission shows.
fn one_place() -> Bench {
    Bench::new(EngineConfig {
        max_running: 1,
        ..config(256, 1)
    })
}

fn of(tenant: u64, priority: i32, first: u32) -> crate::Sequence {
    crate::Sequence {
        tenant,
        priority,
        ..sequence(&[first, first + 1, first + 2], 2)
    }
}

/// Runs until all streams have ended; their indices in the order of their ends.
fn order(bench: &mut Bench, streams: &mut [TokenStream]) -> Vec<usize> {
    let mut heard: Vec<Heard> = streams.iter().map(|_| Heard::default()).collect();
    let mut ended = Vec::new();
    for _ in 0..10_000 {
        bench.step();
        for (index, stream) in streams.iter_mut().enumerate() {
            heard[index].read(stream);
            if heard[index].is_finished() && !ended.contains(&index) {
                ended.push(index);
            }
        }
        if ended.len() == streams.len() {
            return ended;
        }
    }
    panic!("only {ended:?} have ended");
}

#[test]
fn a_higher_priority_goes_first_whatever_is_cached_and_has_waited() {
    let mut bench = one_place();
    let mut cached = vec![bench.submit(of(0, 0, 10))];
    order(&mut bench, &mut cached);
    let mut streams: Vec<_> = [(0, 10), (-1, 10), (5, 40), (0, 50), (5, 60)]
        .map(|(priority, first)| bench.submit(of(0, priority, first)))
        .into();
    assert_eq!(order(&mut bench, &mut streams), [2, 4, 0, 3, 1]);
}

#[test]
fn a_tenant_with_many_requests_does_not_keep_another_waiting() {
    for crowd in [40, 400] {
        let mut bench = one_place();
        let prompt = |seed: u32| (0..200).map(|at| seed * 1000 + at).collect::<Vec<_>>();
        let large = |tenant, seed| crate::Sequence {
            tenant,
            ..sequence(&prompt(seed), 1)
        };
        let mut streams: Vec<_> = (0..crowd).map(|seed| bench.submit(large(1, seed))).collect();
        streams.extend((0..3).map(|seed| bench.submit(large(2, 500 + seed))));
        let ended = order(&mut bench, &mut streams);
        let at = |index: u32| ended.iter().position(|&ended| ended == index as usize).unwrap();
        // The quantum is 4,096 tokens, 20 requests of the first tenant.
        assert!(at(crowd + 2) < 27, "{} of {crowd}", at(crowd + 2));
    }
}

#[test]
fn who_was_away_has_saved_nothing_up() {
    let mut bench = one_place();
    let mut waiting = Waiting::default();
    let running = |tenant| {
        let (sink, _) = stream::channel();
        let place = QueuePlace::take(&bench.scheduler.places);
        Running::new(of(tenant, 0, 1), sink, place, 100)
    };
    waiting.arrived(running(1));
    waiting.serve(1, 1_000_000, 0);
    waiting.arrived(running(2));
    waiting.serve(2, 10, 0);
    // Both are at a million now, give or take ten: the second came late.
    assert_eq!(waiting.served_for_test(2), waiting.served_for_test(1) + 10);
    // Leaving and coming back forgives nothing.
    waiting.retain_mut(|sequence| sequence.tenant == 1);
    waiting.arrived(running(2));
    assert_eq!(waiting.served_for_test(2), waiting.served_for_test(1) + 10);
    bench.scheduler.waiting = waiting;
    assert_eq!(bench.scheduler.waiting.len(), 2);
}

#[test]
fn ten_thousand_tenants_are_not_remembered_for_ever() {
    let bench = one_place();
    let mut waiting = Waiting::default();
    for tenant in 0..20_000 {
        let (sink, _stream) = stream::channel();
        let place = QueuePlace::take(&bench.scheduler.places);
        waiting.arrived(Running::new(of(tenant, 0, 1), sink, place, 100));
        waiting.serve(tenant, 5, 0);
        waiting.retain_mut(|_| false);
    }
    assert!(waiting.known_for_test() < 5_000);
}
