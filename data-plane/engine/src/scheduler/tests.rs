use std::time::Duration;

use penstock_kv::invariants;
use proptest::prelude::*;

use super::*;
use crate::{
    FinishReason, Finished, Runner, TokenStream, stream,
    stream::BUFFER,
    testing::{Heard, MemoryRunner, POISON, constrained_reply, grammar, reply, sequence},
};

mod constrained;
mod scoring;
mod turns;

/// A scheduler with a runner, one step at a time; every step ends with a check of the cache.
struct Bench {
    scheduler: Scheduler,
    runner: MemoryRunner,
    batch: Batch,
    context_length: usize,
    now: Instant,
}

fn config(num_pages: usize, page_size: usize) -> EngineConfig {
    EngineConfig {
        num_pages,
        page_size,
        max_running: 8,
        max_batch_tokens: 64,
        ..EngineConfig::default()
    }
}

impl Bench {
    fn new(config: EngineConfig) -> Self {
        Self {
            scheduler: Scheduler::new(&config, Arc::default()),
            runner: MemoryRunner::new(&config),
            batch: Batch::default(),
            context_length: config.num_pages * config.page_size,
            now: Instant::now(),
        }
    }

    fn submit(&mut self, sequence: crate::Sequence) -> TokenStream {
        let (sink, stream) = stream::channel();
        let place = QueuePlace::take(&self.scheduler.places);
        let running = Running::new(sequence, sink, place, self.context_length);
        self.scheduler.enqueue(running);
        stream
    }

    /// Runs one step; returns its number of tokens.
    fn step(&mut self) -> usize {
        self.scheduler.sweep(self.now);
        self.scheduler.schedule(self.now, &mut self.batch);
        if !self.batch.is_empty() {
            let mut sampled = Vec::new();
            let outcome = self
                .runner
                .step(&self.batch, &self.scheduler.samples(), &mut sampled);
            match outcome {
                Ok(()) => self.scheduler.advance(self.now, &mut sampled),
                Err(error) => self.scheduler.fail_step(&error.into()),
            }
        }
        self.check();
        self.batch.tokens.len()
    }

    fn check(&self) {
        invariants::check(&self.scheduler.cache).unwrap();
        let waiting = self.scheduler.places.load(std::sync::atomic::Ordering::Acquire);
        assert_eq!(waiting, self.scheduler.waiting.len());
        let own: usize = self.scheduler.running.iter().map(|s| s.pages.len()).sum();
        let stats = self.scheduler.cache.stats();
        assert!(
            stats.free_pages + stats.evictable_pages + own >= stats.total_pages,
            "pages leaked"
        );
    }

    /// Runs until nothing is left, reading every stream; panics if that takes unreasonably long.
    fn finish(&mut self, streams: &mut [TokenStream]) -> Vec<Heard> {
        let mut heard: Vec<Heard> = streams.iter().map(|_| Heard::default()).collect();
        for _ in 0..100_000 {
            for (heard, stream) in heard.iter_mut().zip(streams.iter_mut()) {
                heard.read(stream);
            }
            if self.scheduler.is_idle() {
                invariants::check_idle(&self.scheduler.cache).unwrap();
                assert!(self.scheduler.is_sound());
                return heard;
            }
            self.step();
        }
        panic!("no end after 100000 steps");
    }

    fn stats(&self) -> EngineStats {
        let mut stats = EngineStats::default();
        self.scheduler.fill(&mut stats);
        stats
    }
}

fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32)
        .map(|at| (seed * 31 + at * at * 7) % 200)
        .collect()
}

#[test]
fn replies_do_not_depend_on_page_size_or_chunking() {
    for page_size in [1, 16] {
        for max_batch_tokens in [1, 7, 512] {
            let mut bench = Bench::new(EngineConfig {
                max_batch_tokens,
                ..config(640 / page_size, page_size)
            });
            let prompts = [prompt(1, 40), prompt(2, 1), prompt(1, 50), prompt(3, 16)];
            let mut streams = prompts.each_ref().map(|p| bench.submit(sequence(p, 20)));
            for (heard, prompt) in bench.finish(&mut streams).iter().zip(&prompts) {
                assert_eq!(heard.tokens, reply(prompt, 20));
                assert!(heard.is_finished());
            }
        }
    }
}

#[test]
fn a_tiny_pool_retracts_and_yields_the_same_tokens() {
    // Two replies of 500 tokens are admitted on the strength of their first 256, and do not fit together.
    let mut bench = Bench::new(config(150, 4));
    let prompts = [prompt(1, 4), prompt(2, 4), prompt(3, 4)];
    let mut streams = prompts.each_ref().map(|p| bench.submit(sequence(p, 500)));
    for (heard, prompt) in bench.finish(&mut streams).iter().zip(&prompts) {
        assert_eq!(heard.tokens, reply(prompt, 500));
        assert_eq!(heard.started, 1);
    }
    assert!(bench.stats().retractions > 0);
}

#[test]
fn a_sequence_as_long_as_the_pool_runs() {
    let mut bench = Bench::new(config(10, 4));
    let mut streams = [bench.submit(sequence(&prompt(1, 30), 100))];
    let heard = bench.finish(&mut streams).remove(0);
    assert_eq!(heard.tokens, reply(&prompt(1, 30), 10));
    assert!(matches!(
        heard.closing,
        Some(Event::Finished(Finished {
            reason: FinishReason::Length,
            completion_tokens: 10,
            grammar_satisfied: None,
        }))
    ));
}

#[test]
fn a_stop_token_ends_the_reply_and_is_its_last() {
    let mut bench = Bench::new(config(64, 4));
    let expected = reply(&prompt(1, 10), 20);
    let stop = expected[7];
    let first = expected.iter().position(|&id| id == stop).unwrap();
    let mut one = sequence(&prompt(1, 10), 20);
    one.stop_token_ids = vec![stop];
    let mut streams = [bench.submit(one)];
    let heard = bench.finish(&mut streams).remove(0);
    assert_eq!(heard.tokens, expected[..=first]);
    assert!(matches!(
        heard.closing,
        Some(Event::Finished(Finished { reason: FinishReason::StopToken(id), .. })) if id == stop
    ));
}

#[test]
fn a_dropped_stream_frees_its_pages_within_one_step() {
    let mut bench = Bench::new(config(64, 4));
    let dropped = bench.submit(sequence(&prompt(1, 100), 50));
    let mut kept = bench.submit(sequence(&prompt(2, 10), 50));
    for _ in 0..4 {
        bench.step();
    }
    assert_eq!(bench.stats().running, 2);
    drop(dropped);
    bench.step();
    assert_eq!(bench.stats().running, 1);
    let mine = bench.scheduler.running[0].pages.len();
    let stats = bench.stats();
    assert_eq!(stats.free_pages + stats.cached_pages + mine, stats.total_pages);
    let heard = bench.finish(std::slice::from_mut(&mut kept)).remove(0);
    assert_eq!(heard.tokens, reply(&prompt(2, 10), 50));
}

#[test]
fn a_dropped_stream_leaves_the_queue() {
    let mut bench = Bench::new(EngineConfig {
        max_running: 1,
        ..config(64, 4)
    });
    let mut kept = bench.submit(sequence(&prompt(1, 10), 50));
    bench.step();
    let dropped = bench.submit(sequence(&prompt(2, 10), 50));
    bench.step();
    assert_eq!(bench.scheduler.waiting.len(), 1);
    drop(dropped);
    bench.step();
    assert!(bench.scheduler.waiting.is_empty());
    bench.finish(std::slice::from_mut(&mut kept));
}

#[test]
fn what_a_dropped_stream_generated_is_not_cached() {
    let mut bench = Bench::new(config(64, 1));
    let dropped = bench.submit(sequence(&prompt(1, 10), 50));
    for _ in 0..10 {
        bench.step();
    }
    drop(dropped);
    bench.step();
    let history: Vec<u32> = [prompt(1, 10), reply(&prompt(1, 10), 9)].concat();
    assert_eq!(bench.scheduler.cache.peek_prefix(0, &history), 10);
}

#[test]
fn a_deadline_ends_sequences_that_run_and_that_wait() {
    let mut bench = Bench::new(EngineConfig {
        max_running: 1,
        ..config(64, 4)
    });
    let due = |bench: &Bench, after| Some(bench.now + Duration::from_secs(after));
    let mut late = sequence(&prompt(1, 10), 50);
    late.deadline = due(&bench, 1);
    let mut streams = [bench.submit(late.clone()), bench.submit(late)];
    bench.step();
    bench.step();
    assert_eq!((bench.stats().running, bench.scheduler.waiting.len()), (1, 1));
    bench.now += Duration::from_secs(1);
    bench.step();
    let counts: Vec<usize> = bench
        .finish(&mut streams)
        .iter()
        .map(|heard| match heard.closing {
            Some(Event::Failed(SequenceError::DeadlineExceeded { completion_tokens })) => completion_tokens,
            ref other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(counts, [2, 0]);
}

#[test]
fn a_prefix_seen_before_is_not_computed_again() {
    let mut bench = Bench::new(config(64, 4));
    let mut first = [bench.submit(sequence(&prompt(1, 30), 8))];
    bench.finish(&mut first);
    assert_eq!(
        (
            bench.stats().prefix_lookup_tokens,
            bench.stats().prefix_hit_tokens
        ),
        (30, 0)
    );
    // The conversation goes on: prompt, reply (whose last token has no KV) and a new question.
    let next = [prompt(1, 30), reply(&prompt(1, 30), 8), prompt(9, 5)].concat();
    let mut second = [bench.submit(sequence(&next, 3))];
    let computed = bench.step();
    assert_eq!(computed, next.len() - 36);
    let heard = bench.finish(&mut second).remove(0);
    assert_eq!(heard.cached_tokens, 36);
    assert_eq!(heard.tokens, reply(&next, 3));
    assert_eq!(bench.stats().prefix_hit_tokens, 36);
    assert_eq!(bench.stats().prefix_lookup_tokens, 30 + next.len() as u64);
}

#[test]
fn namespaces_do_not_share_kv() {
    let mut bench = Bench::new(config(64, 4));
    let mut other = sequence(&prompt(1, 30), 2);
    other.namespace = 7;
    let mut first = [bench.submit(sequence(&prompt(1, 30), 2))];
    bench.finish(&mut first);
    let mut second = [bench.submit(other)];
    assert_eq!(bench.finish(&mut second)[0].cached_tokens, 0);
}

#[test]
fn a_prefix_that_is_being_computed_is_waited_for() {
    let mut bench = Bench::new(EngineConfig {
        max_batch_tokens: 16,
        ..config(256, 4)
    });
    let shared = prompt(1, 64);
    let prompts: Vec<Vec<u32>> = (0..6)
        .map(|tail| [shared.clone(), prompt(tail + 50, 3)].concat())
        .collect();
    let mut streams: Vec<_> = prompts.iter().map(|p| bench.submit(sequence(p, 4))).collect();
    let mut computed = 0;
    let mut heard: Vec<Heard> = Vec::new();
    while !bench.scheduler.is_idle() {
        computed += bench.step();
    }
    heard.extend(bench.finish(&mut streams));
    for (heard, prompt) in heard.iter().zip(&prompts) {
        assert_eq!(heard.tokens, reply(prompt, 4));
    }
    // The prefix once, six tails, and the three decode steps of each.
    assert_eq!(computed, 64 + 6 * 3 + 6 * 3);
}

#[test]
fn a_sequence_in_prefill_catches_up_with_the_tree() {
    let mut bench = Bench::new(EngineConfig {
        max_batch_tokens: 10,
        ..config(256, 4)
    });
    let shared = prompt(1, 64);
    // Nobody shares with the first one while it is passed over in favour of arrival order.
    let mut streams = vec![bench.submit(sequence(&shared, 2))];
    bench.step();
    // Meanwhile the rest of its prompt enters the tree some other way.
    let found = bench.scheduler.cache.match_prefix(0, &shared);
    let mut pages = found.pages.clone();
    let before = bench.scheduler.running[0].computed;
    assert!(before < 40 && bench.scheduler.cache.allocate_into(10 - pages.len(), &mut pages));
    let guard = bench
        .scheduler
        .cache
        .insert(found.guard, &shared[..40], &mut pages);
    bench.scheduler.cache.release(guard);
    bench.scheduler.catch_up(0);
    bench.check();
    assert_eq!(bench.scheduler.running[0].computed, 40);
    assert_eq!(bench.scheduler.running[0].pages, pages);
    drop(streams.pop());
    bench.finish(&mut streams);
}

#[test]
fn a_long_prompt_does_not_hold_up_replies() {
    let mut bench = Bench::new(EngineConfig {
        max_batch_tokens: 16,
        ..config(256, 4)
    });
    let mut talking = bench.submit(sequence(&prompt(1, 10), 50));
    bench.step();
    let mut long = bench.submit(sequence(&prompt(2, 200), 1));
    let mut heard = Heard::default();
    heard.read(&mut talking);
    for step in 1..=13 {
        assert_eq!(bench.step(), 16);
        heard.read(&mut talking);
        assert_eq!(heard.tokens.len(), 1 + step, "one token a step");
    }
    bench.step();
    let mut long_heard = Heard::default();
    long_heard.read(&mut long);
    assert!(long_heard.is_finished());
    bench.finish(std::slice::from_mut(&mut talking));
}

#[test]
fn the_longest_cached_prefix_goes_first_but_none_waits_for_ever() {
    let mut bench = Bench::new(EngineConfig {
        max_running: 1,
        ..config(256, 4)
    });
    let popular = prompt(1, 320);
    let mut first = [bench.submit(sequence(&popular, 1))];
    bench.finish(&mut first);
    let mut lonely = bench.submit(sequence(&prompt(2, 40), 1));
    let (mut others, mut heard, mut overtaken) = (Vec::new(), Heard::default(), 0);
    while heard.closing.is_none() {
        // There is always a newer one with 316 cached tokens.
        others.push(bench.submit(sequence(&popular, 1)));
        bench.step();
        heard.read(&mut lonely);
        overtaken += usize::from(heard.closing.is_none());
        assert!(overtaken < 20, "starved");
    }
    // 316 cached tokens are worth five admissions.
    assert_eq!(overtaken, 5);
    bench.finish(&mut others);
}

#[test]
fn a_full_batch_starves_no_running_sequence() {
    let mut bench = Bench::new(EngineConfig {
        max_running: 8,
        max_batch_tokens: 3,
        ..config(256, 4)
    });
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| prompt(seed, 5)).collect();
    let mut streams: Vec<_> = prompts.iter().map(|p| bench.submit(sequence(p, 30))).collect();
    for _ in 0..10 {
        bench.step();
    }
    assert_eq!(bench.stats().running, 3);
    for (heard, prompt) in bench.finish(&mut streams).iter().zip(&prompts) {
        assert_eq!(heard.tokens, reply(prompt, 30));
    }
}

#[test]
fn a_consumer_that_does_not_read_blocks_nobody_and_loses_nothing() {
    let mut bench = Bench::new(config(256, 4));
    let mut slow = bench.submit(sequence(&prompt(1, 10), 200));
    let mut quick = [bench.submit(sequence(&prompt(2, 10), 200))];
    let (mut heard, mut steps) = (Heard::default(), 0);
    while heard.closing.is_none() {
        bench.step();
        heard.read(&mut quick[0]);
        steps += 1;
    }
    assert_eq!((heard.tokens, steps), (reply(&prompt(2, 10), 200), 200));
    // Set aside: what it gets is what fits its channel, and one token held back.
    assert_eq!(bench.step(), 0);
    assert_eq!(bench.scheduler.running[0].generated(), BUFFER);
    let heard = bench.finish(std::slice::from_mut(&mut slow)).remove(0);
    assert_eq!(heard.tokens, reply(&prompt(1, 10), 200));
}

#[test]
fn a_consumer_that_does_not_read_gives_up_pages_that_others_need() {
    let mut bench = Bench::new(config(60, 4));
    let mut slow = bench.submit(sequence(&prompt(1, 100), 100));
    for _ in 0..BUFFER + 10 {
        bench.step();
    }
    assert!(bench.scheduler.running[0].sink.is_blocked());
    let mut other = [bench.submit(sequence(&prompt(2, 150), 50))];
    let mut heard = Heard::default();
    for _ in 0..100 {
        bench.step();
        heard.read(&mut other[0]);
    }
    assert_eq!(heard.tokens, reply(&prompt(2, 150), 50));
    let heard = bench.finish(std::slice::from_mut(&mut slow)).remove(0);
    assert_eq!(heard.tokens, reply(&prompt(1, 100), 100));
}

#[test]
fn a_row_without_numbers_fails_alone_and_stays_out_of_the_cache() {
    let mut bench = Bench::new(config(64, 4));
    let mut poisoned = prompt(1, 12);
    poisoned[11] = POISON;
    let sound = prompt(2, 12);
    let mut streams = [&poisoned, &sound].map(|p| bench.submit(sequence(p, 5)));
    let heard = bench.finish(&mut streams);
    assert!(
        matches!(&heard[0].closing, Some(Event::Failed(SequenceError::Runner(why))) if why.contains("not numbers"))
    );
    assert_eq!(heard[1].tokens, reply(&sound, 5));
    assert_eq!(
        bench
            .scheduler
            .cache
            .peek_prefix(0, &[&poisoned[..], &[0]].concat()),
        0
    );
}

#[test]
fn a_failed_step_fails_its_sequences_and_the_next_one_works() {
    let mut bench = Bench::new(config(64, 4));
    let mut steps = 0;
    bench.runner = MemoryRunner::with_hook(&config(64, 4), move |_| {
        steps += 1;
        match steps {
            3 => Err(RunnerError::Model("out of order".into())),
            _ => Ok(()),
        }
    });
    let mut failing = [1, 2].map(|seed| bench.submit(sequence(&prompt(seed, 12), 5)));
    for heard in bench.finish(&mut failing) {
        assert_eq!(heard.tokens.len(), 2);
        assert!(
            matches!(heard.closing, Some(Event::Failed(SequenceError::Runner(why))) if why == "out of order")
        );
    }
    let mut next = [bench.submit(sequence(&prompt(1, 12), 5))];
    let heard = bench.finish(&mut next).remove(0);
    assert_eq!(heard.tokens, reply(&prompt(1, 12), 5));
    assert_eq!(heard.cached_tokens, 8);
}

#[test]
fn broken_bookkeeping_loses_requests_but_not_the_engine() {
    let settings = config(64, 4);
    let mut bench = Bench::new(settings.clone());
    let mut lost = [1, 2].map(|seed| bench.submit(sequence(&prompt(seed, 12), 5)));
    bench.step();
    bench.scheduler = Scheduler::replacing(&mut bench.scheduler, &settings);
    bench.check();
    for heard in bench.finish(&mut lost) {
        assert!(matches!(
            heard.closing,
            Some(Event::Failed(SequenceError::Internal))
        ));
    }
    assert_eq!(
        (
            bench.stats().faults,
            bench.stats().free_pages,
            bench.stats().steps
        ),
        (1, 64, 1)
    );
    let mut next = [bench.submit(sequence(&prompt(1, 12), 5))];
    assert_eq!(bench.finish(&mut next)[0].tokens, reply(&prompt(1, 12), 5));
}

#[derive(Debug, Clone)]
enum Act {
    Submit {
        prompt: Vec<u32>,
        max_tokens: usize,
        namespace: u64,
        regex: Option<&'static str>,
    },
    Step,
    Read(usize),
    Drop(usize),
}

fn any_act() -> impl Strategy<Value = Act> {
    // Few different tokens, so that prefixes are shared often.
    let prompt = prop::collection::vec(0u32..2, 1..60);
    // Long forced texts, choices in between, and one that never ends by itself.
    let regex = prop::sample::select(vec![
        None,
        None,
        Some("(?:the quick brown fox (?:jumps|sleeps); ){1,9}over"),
        Some("(?:[ab]{3}===============================================================================)*"),
        Some("[0-9]{1,300}"),
    ]);
    prop_oneof![
        3 => (prompt, 1usize..400, 0u64..2, regex)
            .prop_map(|(prompt, max_tokens, namespace, regex)| Act::Submit { prompt, max_tokens, namespace, regex }),
        8 => Just(Act::Step),
        2 => (0usize..16).prop_map(Act::Read),
        1 => (0usize..16).prop_map(Act::Drop),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever happens, every reply that is not aborted is right and complete, and no page is lost.
    #[test]
    fn any_workload_ends_with_right_replies_and_every_page_free(
        acts in prop::collection::vec(any_act(), 1..80),
        page_size in prop::sample::select(vec![1usize, 4, 16]),
        num_tokens in 128usize..640,
        max_running in 1usize..6,
        max_batch_tokens in 1usize..80,
    ) {
        let mut bench = Bench::new(EngineConfig {
            max_running,
            max_batch_tokens,
            ..config(num_tokens.div_ceil(page_size), page_size)
        });
        let (mut streams, mut heard, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for act in acts {
            match act {
                Act::Submit { prompt, max_tokens, namespace, regex } => {
                    let most = max_tokens.min(bench.context_length - prompt.len());
                    let grammar = regex.map(grammar);
                    expected.push(match &grammar {
                        None => reply(&prompt, most),
                        Some(grammar) => constrained_reply(&prompt, most, grammar.clone()),
                    });
                    let prompt_logprobs = (prompt.len() % 3 == 0).then_some(0);
                    let one = crate::Sequence { namespace, grammar, prompt_logprobs, ..sequence(&prompt, max_tokens) };
                    streams.push(bench.submit(one));
                    heard.push(Heard::default());
                }
                Act::Step => {
                    prop_assert!(bench.step() <= max_batch_tokens);
                }
                Act::Read(index) if index < streams.len() => heard[index].read(&mut streams[index]),
                Act::Drop(index) if index < streams.len() => {
                    streams.swap_remove(index);
                    heard.swap_remove(index);
                    expected.swap_remove(index);
                }
                Act::Read(_) | Act::Drop(_) => {}
            }
        }
        let rest = bench.finish(&mut streams);
        for ((mut heard, rest), expected) in heard.into_iter().zip(rest).zip(expected) {
            heard.tokens.extend(rest.tokens);
            prop_assert_eq!(heard.tokens, expected);
            prop_assert_eq!(heard.started + rest.started, 1);
            prop_assert!(matches!(heard.closing.or(rest.closing), Some(Event::Finished(_))));
        }
    }
}
