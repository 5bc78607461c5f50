use penstock_proto::v1::{self, generate_request::Input};
use proptest::prelude::*;
use prost::Message as _;

use super::*;

fn chat(turns: &[&str]) -> v1::GenerateRequest {
    let roles = ["system", "user", "assistant"];
    let message = |(index, text): (usize, &&str)| v1::ChatMessage {
        role: roles[if index == 0 { 0 } else { 2 - index % 2 }].into(),
        content: text.repeat(100),
    };
    let messages = turns.iter().enumerate().map(message).collect();
    v1::GenerateRequest {
        model: "m".into(),
        input: Some(Input::Chat(v1::Chat { messages })),
        ..Default::default()
    }
}

fn want(balancer: &Balancer, request: &v1::GenerateRequest, session: Option<&str>) -> Want {
    let encoded = request.encode_to_vec();
    let glance = Glance::of(&encoded).unwrap();
    balancer.want(&glance, 0, session.map(str::as_bytes))
}

fn candidates(loads: &[u64]) -> Vec<Candidate> {
    let candidate = |(id, &load): (usize, &u64)| Candidate { id: id as u64, load };
    loads.iter().enumerate().map(candidate).collect()
}

fn balancer() -> Balancer {
    Balancer::new(Policy::Prefix, 1 << 12)
}

#[test]
fn a_conversation_keeps_its_hashes_as_it_grows() {
    let balancer = balancer();
    let first = want(&balancer, &chat(&["be kind ", "hello "]), None).prefix;
    let later = want(&balancer, &chat(&["be kind ", "hello ", "hi ", "well "]), None).prefix;
    assert!(first.nodes().len() > 5);
    assert_eq!(first.nodes(), &later.nodes()[..first.nodes().len()]);
    assert_eq!((first.anchor(), first.head()), (later.anchor(), later.head()));
    let other = want(&balancer, &chat(&["be kind ", "hullo "]), None).prefix;
    assert_ne!(first.anchor(), other.anchor());
    let shared = first.nodes().iter().zip(other.nodes()).filter(|(a, b)| a == b);
    assert!(shared.count() >= 5, "the system prompt is shared");
}

#[test]
fn a_conversation_stays_where_it_began_unless_that_worker_is_busy() {
    let balancer = balancer();
    let first = want(&balancer, &chat(&["be kind ", "hello "]), None);
    balancer.sent(&first, 2);
    let later = want(&balancer, &chat(&["be kind ", "hello ", "hi ", "well "]), None);
    for draw in 0..50 {
        assert_eq!(
            balancer.choose(&later, &candidates(&[0, 0, 100, 0]), draw),
            Some(2)
        );
        let elsewhere = balancer.choose(&later, &candidates(&[0, 0, 90_000, 0]), draw);
        assert_ne!(elsewhere, Some(2));
    }
}

#[test]
fn gateways_that_know_nothing_agree() {
    let mut chosen = std::collections::HashSet::new();
    for text in ["a ", "b ", "c ", "d ", "e ", "f ", "g ", "h "] {
        let request = chat(&["be kind ", text]);
        let pick = |draw| {
            let balancer = balancer();
            let want = want(&balancer, &request, None);
            balancer.choose(&want, &candidates(&[10, 20, 0, 5]), draw)
        };
        assert_eq!(pick(1), pick(u64::MAX / 3));
        chosen.insert(pick(1));
    }
    assert!(chosen.len() > 1, "not all conversations go to one worker");
}

#[test]
fn a_session_stays_whatever_it_says() {
    for policy in [Policy::Prefix, Policy::Session] {
        let balancer = Balancer::new(policy, 1 << 12);
        let first = want(&balancer, &chat(&["", "one "]), Some("s"));
        let home = balancer.choose(&first, &candidates(&[0; 4]), 1).unwrap();
        balancer.sent(&first, home as u64);
        let other = want(&balancer, &chat(&["x ", "two "]), Some("s"));
        for draw in 0..20 {
            assert_eq!(balancer.choose(&other, &candidates(&[9; 4]), draw), Some(home));
        }
    }
}

#[test]
fn two_choices_never_take_the_busiest_of_many() {
    let balancer = Balancer::new(Policy::TwoChoices, 1);
    let want = Want::default();
    let mut seen = [0; 3];
    for draw in 0..200u64 {
        let draw = hash(draw, b"");
        seen[balancer.choose(&want, &candidates(&[5, 1, 9]), draw).unwrap()] += 1;
    }
    assert!(seen[1] > seen[0] && seen[0] > 0 && seen[2] == 0, "{seen:?}");
    assert_eq!(balancer.choose(&want, &[], 1), None);
}

#[test]
fn a_worker_that_forgets_is_not_trusted_with_old_prefixes() {
    let balancer = balancer();
    let first = want(&balancer, &chat(&["be kind ", "hello "]), None);
    balancer.sent(&first, 3);
    let grown = Ended {
        prompt_tokens: 10_000,
        ..Ended::default()
    };
    balancer.ended(&first, 3, Expected::default(), grown);
    let expected = balancer.expects(&first, 3);
    assert_eq!(expected.age, 10_000);
    assert_eq!(expected.bytes, first.prefix.nodes().last().unwrap().1);
    for _ in 0..4 {
        balancer.ended(
            &first,
            3,
            expected,
            Ended {
                prompt_tokens: 500,
                ..Ended::default()
            },
        );
    }
    assert_eq!(balancer.expects(&first, 3), Expected::default());
}

#[test]
fn the_index_is_bounded_and_keeps_what_is_used() {
    let mut index = Index::new(100);
    for hash in 1..1000 {
        index.insert(&[(0, 1), (hash, 2)], 1);
        assert!(index.len() <= 100);
    }
    assert_eq!(index.holders(0), [1]);
    assert_eq!(index.holders(5), Vec::<u64>::new());
    index.retain(|_| false);
    assert_eq!(index.holders(0), Vec::<u64>::new());
}

#[test]
fn work_that_ended_fades_and_reports_of_others_expire() {
    use std::time::{Duration, Instant};
    let start = Instant::now();
    let mut load = Load::new(start);
    load.begin(100);
    load.begin(50);
    load.reported(5, start);
    assert_eq!(load.total(10, start), 150 + 3 * 10);
    load.end(100, start);
    assert_eq!((load.requests(), load.in_flight()), (1, 50));
    assert_eq!(load.total(10, start), 180);
    assert_eq!(load.total(10, start + Duration::from_secs(10)), 100);
}

#[test]
fn a_limit_settles_at_what_the_worker_runs() {
    // A worker of 32 places, before which there are always as many as the limit lets in. Each asks for 100 tokens,
    // is served in a second, and reports one life later.
    for (first, most) in [(1, 1 << 20), (400, 1 << 20), (90, 1 << 20)] {
        let mut limit = Limit::new(most);
        let mut there = vec![first];
        for round in 0..2000usize {
            let began = there[round.saturating_sub(32)];
            let queue_s = (f64::from(began) / 32.0 - 1.0).max(0.0);
            let life = Life {
                queue_s,
                step_s: 0.02,
                total_s: 1.0 + queue_s,
            };
            limit.reported(life, u64::from(began) * 100, 100);
            there.push(u32::try_from(limit.tokens() / 100).unwrap());
        }
        let settled = &there[1500..];
        assert!(
            settled.iter().all(|there| (31..=36).contains(there)),
            "{:?} from {first}",
            &settled[..20]
        );
    }
    let mut idle = Limit::new(1 << 20);
    for _ in 0..1000 {
        let life = Life {
            total_s: 1.0,
            ..Life::default()
        };
        idle.reported(life, 100, 100);
        idle.began(100, 100);
    }
    assert_eq!(
        idle,
        Limit::new(1 << 20),
        "nothing is learnt of a limit that is far away"
    );
    idle.began(8000, 100);
    assert_eq!(idle.tokens(), 8292);
    idle.refused(5_000);
    assert_eq!(idle.tokens(), 4_500);
}

#[test]
fn a_worker_that_cannot_be_reached_is_tried_again_by_one_request_at_a_time() {
    use std::time::{Duration, Instant};
    let start = Instant::now();
    let after = |ms| start + Duration::from_millis(ms);
    let mut breaker = Breaker::new();
    assert!(!breaker.is_open(start));
    breaker.eject(start);
    // Others of the same failure change nothing.
    breaker.eject(after(10));
    assert!(breaker.is_open(after(1999)) && !breaker.is_open(after(2000)));
    breaker.sent(after(2000));
    assert!(breaker.is_open(after(2001)), "one finds out for the others");
    breaker.eject(after(2002));
    assert!(breaker.is_open(after(5999)), "twice as long");
    breaker.sent(after(6100));
    breaker.succeeded(after(6200));
    assert!(!breaker.is_open(after(6200)));
    for _ in 0..40 {
        breaker.succeeded(after(6300));
    }
    breaker.eject(after(7000));
    assert!(!breaker.is_open(after(9000)), "what was long ago is forgotten");
}

#[test]
fn a_worker_that_fails_half_of_its_requests_is_ejected_and_a_single_failure_is_none() {
    use std::time::Instant;
    let now = Instant::now();
    let mut breaker = Breaker::new();
    for _ in 0..4 {
        breaker.failed(now);
    }
    assert!(!breaker.is_open(now));
    for _ in 0..20 {
        breaker.succeeded(now);
    }
    breaker.failed(now);
    assert!(!breaker.is_open(now), "5 of 25");
    for _ in 0..30 {
        breaker.failed(now);
    }
    assert!(breaker.is_open(now));
}

proptest! {
    #[test]
    fn whatever_decodes_is_seen_as_it_is(
        prompt in ".{0,40}",
        ids in prop::collection::vec(any::<u32>(), 0..9),
        kind in 0..3,
        max_tokens in prop::option::of(any::<u32>()),
    ) {
        let input = match kind {
            0 => Input::Prompt(prompt.clone()),
            1 => Input::InputIds(v1::TokenIds { ids }),
            _ => Input::Chat(v1::Chat {
                messages: vec![v1::ChatMessage { role: "user".into(), content: prompt }],
            }),
        };
        let sampling = v1::SamplingParams { max_tokens, seed: Some(1), ..Default::default() };
        let request = v1::GenerateRequest { input: Some(input), sampling: Some(sampling), ..Default::default() };
        let encoded = request.encode_to_vec();
        let glance = Glance::of(&encoded).unwrap();
        prop_assert_eq!(glance.max_tokens(), max_tokens);
        let read = match request.input.unwrap() {
            Input::Prompt(text) => glance.input() == text.as_bytes(),
            Input::InputIds(ids) => ids.ids.is_empty() || ids.encode_to_vec().ends_with(glance.input()),
            Input::Chat(chat) => glance.input() == chat.encode_to_vec() && glance.head() == glance.input().len(),
        };
        prop_assert!(read);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), head in 0usize..300) {
        if let Some(glance) = Glance::of(&bytes) {
            prop_assert!(glance.head() <= glance.input().len());
        }
        let prefix = Prefix::of(&bytes, head, 1);
        prop_assert!(prefix.head() <= bytes.len());
    }
}
