use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::*;
use crate::{
    Event, FakeConfig, FakeRunner, FinishReason, SamplingParams, SequenceError,
    testing::{Heard, MemoryRunner, VOCAB_SIZE, constrained_reply, grammar, reply, sequence},
};

fn config() -> EngineConfig {
    EngineConfig {
        name: "test".into(),
        num_pages: 64,
        page_size: 4,
        max_running: 4,
        max_waiting: 2,
        ..EngineConfig::default()
    }
}

fn start(config: EngineConfig) -> Engine {
    let runner = MemoryRunner::new(&config);
    Engine::start(config, Box::new(runner)).unwrap()
}

/// An engine each of whose steps says that it begins and then waits to be let go.
fn gated(config: EngineConfig) -> (Engine, Receiver<()>, SyncSender<()>) {
    let (begins, begun) = sync_channel(1000);
    let (let_go, gate) = sync_channel::<()>(1000);
    let runner = MemoryRunner::with_hook(&config, move |_| {
        begins.send(()).ok();
        // Once the test dropped its end, steps run freely.
        gate.recv().ok();
        Ok(())
    });
    (Engine::start(config, Box::new(runner)).unwrap(), begun, let_go)
}

/// Waits for something that the engine's thread does on its own; a test that hangs here has found a bug.
fn until(engine: &Engine, holds: impl Fn(&EngineStats) -> bool) -> EngineStats {
    for _ in 0..10_000 {
        let stats = engine.stats();
        if holds(&stats) {
            return stats;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("it never came true: {:?}", engine.stats());
}

fn is_idle(stats: &EngineStats) -> bool {
    let idle = stats.running == 0 && stats.waiting == 0;
    idle && stats.free_pages + stats.cached_pages == stats.total_pages
}

#[test]
fn many_threads_get_their_own_replies() {
    let engine = start(EngineConfig {
        max_waiting: 100,
        ..config()
    });
    thread::scope(|scope| {
        for seed in 0..20u32 {
            let engine = &engine;
            scope.spawn(move || {
                let prompt = [1, 2, 3, 4, 5, seed];
                let mut stream = engine.submit(sequence(&prompt, 30)).unwrap();
                let heard = Heard::all(&mut stream);
                assert_eq!(heard.tokens, reply(&prompt, 30));
                assert!(heard.is_finished());
            });
        }
    });
    let stats = until(&engine, is_idle);
    assert_eq!(stats.tokens_generated, 20 * 30);
    assert_eq!(stats.prefix_lookup_tokens, 20 * 6);
    // All but the first found the page that they have in common.
    assert_eq!(stats.prefix_hit_tokens, 19 * 4);
    assert_eq!(stats.faults, 0);
    assert!(stats.last_step_at.is_some());
}

#[test]
fn a_reply_begun_elsewhere_goes_on_as_if_it_had_begun_here() {
    let engine = start(config());
    let prompt = [1, 2, 3, 4, 5];
    let whole = reply(&prompt, 12);
    for had in 0..=12 {
        let resumed = Sequence {
            resumed: had,
            ..sequence(&[&prompt, &whole[..had]].concat(), 12)
        };
        let heard = Heard::all(&mut engine.submit(resumed).unwrap());
        assert_eq!(heard.tokens, whole[had..], "{had} tokens were there");
        let Some(Event::Finished(finished)) = heard.closing else {
            panic!("it is finished");
        };
        assert_eq!(
            (finished.reason, finished.completion_tokens),
            (FinishReason::Length, 12)
        );
    }
    let over = Sequence {
        resumed: 2,
        stop_token_ids: vec![whole[1]],
        ..sequence(&[&prompt, &whole[..2]].concat(), 12)
    };
    let heard = Heard::all(&mut engine.submit(over).unwrap());
    let Some(Event::Finished(finished)) = heard.closing else {
        panic!("it is finished");
    };
    assert_eq!(finished.reason, FinishReason::StopToken(whole[1]));
    let nothing = Sequence {
        resumed: 3,
        ..sequence(&[1, 2, 3], 12)
    };
    assert!(matches!(engine.submit(nothing), Err(SubmitError::EmptyPrompt)));
}

#[test]
fn a_constrained_reply_begun_elsewhere_goes_on_where_its_grammar_stands() {
    let engine = start(config());
    let prompt = [1, 2, 3, 4, 5];
    let regex = "[a-f]{3}: (?:yes|no), sir";
    let whole = constrained_reply(&prompt, 40, grammar(regex));
    for had in 1..=whole.len() {
        let mut matcher = grammar(regex);
        whole[..had].iter().for_each(|&id| matcher.commit(id).unwrap());
        let resumed = Sequence {
            resumed: had,
            grammar: Some(matcher),
            ..sequence(&[&prompt, &whole[..had]].concat(), 40)
        };
        let heard = Heard::all(&mut engine.submit(resumed).unwrap());
        assert_eq!(heard.tokens, whole[had..], "{had} tokens were there");
        let Some(Event::Finished(finished)) = heard.closing else {
            panic!("it is finished");
        };
        assert_eq!(finished.reason, FinishReason::Grammar);
        assert_eq!(
            (finished.completion_tokens, finished.grammar_satisfied),
            (whole.len(), Some(true))
        );
    }
}

#[test]
fn a_full_queue_is_an_error_that_says_when_to_come_back() {
    let (engine, begun, let_go) = gated(EngineConfig {
        max_running: 1,
        ..config()
    });
    let mut first = engine.submit(sequence(&[1], 2)).unwrap();
    begun.recv().unwrap();
    let mut waiting = [2, 3].map(|id| engine.submit(sequence(&[id], 2)).unwrap());
    match engine.submit(sequence(&[4], 2)) {
        Err(SubmitError::QueueFull {
            waiting: 2,
            retry_after,
        }) => assert!(retry_after > Duration::ZERO),
        other => panic!("{other:?}"),
    }
    assert_eq!(engine.stats().waiting, 2);
    drop(let_go);
    assert!(Heard::all(&mut first).is_finished());
    for stream in &mut waiting {
        assert!(Heard::all(stream).is_finished());
    }
    until(&engine, is_idle);
    assert!(engine.submit(sequence(&[4], 2)).is_ok());
}

#[test]
fn what_cannot_run_is_refused_and_named() {
    let engine = start(config());
    let context = engine.context_length();
    assert_eq!(context, 256);
    let refused = |sequence| engine.submit(sequence).unwrap_err().to_string();
    assert_eq!(refused(sequence(&[], 1)), "the prompt is empty");
    assert_eq!(
        refused(sequence(&vec![1; context], 1)),
        "the prompt has 256 tokens, the context holds 256 and at least one must be generated"
    );
    assert_eq!(
        refused(sequence(&[1, VOCAB_SIZE as u32], 1)),
        "token id 256 at position 1 is outside the vocabulary of 256"
    );
    let mut hot = sequence(&[1], 1);
    hot.sampling = SamplingParams {
        temperature: -1.0,
        ..SamplingParams::default()
    };
    assert_eq!(refused(hot), "temperature must be from 0 to 100, not -1");
    assert_eq!(engine.stats().waiting, 0);
}

#[test]
fn a_limit_of_zero_does_not_start() {
    let zero = EngineConfig {
        max_batch_tokens: 0,
        ..config()
    };
    let runner = Box::new(MemoryRunner::new(&zero));
    let error = Engine::start(zero, runner).unwrap_err();
    assert_eq!(error.to_string(), "max_batch_tokens must be at least 1");
}

#[test]
fn a_dropped_stream_costs_one_step_at_most() {
    let (engine, begun, let_go) = gated(config());
    let dropped = engine.submit(sequence(&[1; 20], 200)).unwrap();
    for _ in 0..3 {
        begun.recv().unwrap();
        let_go.send(()).unwrap();
    }
    begun.recv().unwrap();
    drop(dropped);
    let_go.send(()).unwrap();
    // Should another step begin, it would wait at the gate and this would never come true.
    let stats = until(&engine, is_idle);
    assert_eq!(stats.steps, 4);
}

#[test]
fn a_panic_of_the_runner_fails_its_sequences_and_no_others() {
    let mut steps = 0;
    let runner = MemoryRunner::with_hook(&config(), move |_| {
        steps += 1;
        assert_ne!(steps, 2, "a bug");
        Ok(())
    });
    let engine = Engine::start(config(), Box::new(runner)).unwrap();
    let heard = Heard::all(&mut engine.submit(sequence(&[1, 2, 3, 4, 5], 9)).unwrap());
    assert_eq!(heard.tokens.len(), 1);
    assert!(
        matches!(heard.closing, Some(Event::Failed(SequenceError::Runner(why))) if why.contains("panicked"))
    );
    let heard = Heard::all(&mut engine.submit(sequence(&[1, 2, 3, 4, 5], 9)).unwrap());
    assert_eq!(heard.tokens, reply(&[1, 2, 3, 4, 5], 9));
    until(&engine, is_idle);
}

#[test]
fn a_runner_that_yields_too_few_tokens_fails_the_step() {
    struct Mute;
    impl Runner for Mute {
        fn vocab_size(&self) -> usize {
            10
        }
        fn context_length(&self) -> usize {
            10
        }
        fn describe(&self) -> RunnerInfo {
            RunnerInfo {
                name: "mute",
                device: "none".into(),
            }
        }
        fn step(
            &mut self,
            _: &Batch,
            _: &[crate::SampleRequest<'_>],
            _: &mut Vec<Result<SampledToken, RunnerError>>,
        ) -> Result<(), RunnerError> {
            Ok(())
        }
    }
    let engine = Engine::start(config(), Box::new(Mute)).unwrap();
    let heard = Heard::all(&mut engine.submit(sequence(&[1], 2)).unwrap());
    assert!(matches!(
        heard.closing,
        Some(Event::Failed(SequenceError::Runner(_)))
    ));
}

#[test]
fn shutting_down_fails_what_is_left_and_refuses_more() {
    let (engine, begun, let_go) = gated(EngineConfig {
        max_running: 1,
        ..config()
    });
    let mut streams = [1, 2].map(|id| engine.submit(sequence(&[id], 200)).unwrap());
    begun.recv().unwrap();
    engine.shutdown();
    assert!(matches!(
        engine.submit(sequence(&[3], 2)),
        Err(SubmitError::ShuttingDown)
    ));
    drop(let_go);
    for stream in &mut streams {
        let closing = Heard::all(stream).closing;
        assert!(matches!(
            closing,
            Some(Event::Failed(SequenceError::ShuttingDown))
        ));
    }
    until(&engine, is_idle);
}

#[test]
fn the_last_handle_lets_replies_finish_and_ends_the_thread() {
    let (ended, end) = sync_channel::<()>(1);
    let runner = MemoryRunner::with_hook(&config(), move |_| {
        // Dropped with the runner, when the thread ends.
        let _alive = &ended;
        Ok(())
    });
    let engine = Engine::start(config(), Box::new(runner)).unwrap();
    let mut stream = engine.submit(sequence(&[1, 2], 50)).unwrap();
    drop(engine);
    assert_eq!(Heard::all(&mut stream).tokens, reply(&[1, 2], 50));
    assert!(end.recv().is_err());
}

#[test]
fn a_step_that_does_not_end_shows_as_a_stall() {
    let (engine, begun, let_go) = gated(EngineConfig {
        stall_after: Duration::ZERO,
        ..config()
    });
    assert!(!engine.stats().progress_stalled);
    let mut stream = engine.submit(sequence(&[1], 1)).unwrap();
    begun.recv().unwrap();
    until(&engine, |stats| stats.progress_stalled);
    let_go.send(()).unwrap();
    assert!(Heard::all(&mut stream).is_finished());
    until(&engine, |stats| !stats.progress_stalled && is_idle(stats));
}

#[test]
fn the_fake_runner_repeats_itself() {
    let engine = Engine::start(config(), Box::new(FakeRunner::new(FakeConfig::default()))).unwrap();
    assert_eq!(engine.runner().name, "fake");
    let [first, again] = [(); 2].map(|()| Heard::all(&mut engine.submit(sequence(&[7; 40], 12)).unwrap()));
    assert_eq!(first.tokens.len(), 12);
    assert_eq!(first.tokens, again.tokens);
    assert_eq!((first.cached_tokens, again.cached_tokens), (0, 36));
    assert!(first.tokens.iter().all(|id| (97..123).contains(id)));
}

#[tokio::test]
async fn streams_can_be_awaited() {
    let engine = start(config());
    let mut stream = engine.submit(sequence(&[1, 2], 5)).unwrap();
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        if let Event::Token(token) = event {
            tokens.push(token.id);
        }
    }
    assert_eq!(tokens, reply(&[1, 2], 5));
}

#[test]
fn an_engine_is_gone_with_its_last_reply_and_not_before() {
    let (engine, begun, let_go) = gated(config());
    let end = engine.end();
    let mut stream = engine.submit(sequence(&[1, 2, 3], 20)).unwrap();
    drop(engine);
    begun.recv().unwrap();
    assert!(!end.is_over());
    drop(let_go);
    let heard = Heard::all(&mut stream);
    assert!(heard.is_finished(), "{heard:?}");
    for _ in 0..10_000 {
        if end.is_over() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("the engine outlives its handles");
}

#[test]
fn steps_without_memory_are_counted_and_the_engine_goes_on() {
    let mut failures = 2;
    let runner = MemoryRunner::with_hook(&config(), move |_| match failures {
        0 => Ok(()),
        _ => {
            failures -= 1;
            Err(RunnerError::OutOfMemory("4 GiB asked for".into()))
        }
    });
    let engine = Engine::start(config(), Box::new(runner)).unwrap();
    for _ in 0..2 {
        let heard = Heard::all(&mut engine.submit(sequence(&[1, 2, 3], 4)).unwrap());
        let Some(Event::Failed(SequenceError::Runner(reason))) = &heard.closing else {
            panic!("{heard:?}")
        };
        assert_eq!(reason, "out of memory: 4 GiB asked for");
    }
    let heard = Heard::all(&mut engine.submit(sequence(&[1, 2, 3], 4)).unwrap());
    assert_eq!(heard.tokens, reply(&[1, 2, 3], 4));
    let stats = until(&engine, is_idle);
    assert_eq!((stats.out_of_memory, stats.faults), (2, 0));
}
