//! Replies that follow a grammar.

use super::*;
use crate::testing::END;

fn constrained(prompt: &[u32], max_tokens: usize, regex: &str) -> crate::Sequence {
    crate::Sequence {
        grammar: Some(grammar(regex)),
        stop_token_ids: vec![END],
        ..sequence(prompt, max_tokens)
    }
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn text_without_a_choice_takes_no_steps_of_its_own() {
    let mut bench = Bench::new(config(64, 4));
    let mut one = constrained(&prompt(1, 10), 100, "The answer is (?:yes|no), of course\\.");
    one.top_logprobs = Some(1);
    let mut streams = [bench.submit(one)];
    let heard = bench.finish(&mut streams).remove(0);
    let text: Vec<u8> = heard
        .tokens
        .iter()
        .filter(|&&id| id < END)
        .map(|&id| id as u8)
        .collect();
    let text = String::from_utf8(text).unwrap();
    assert!(["The answer is yes, of course.", "The answer is no, of course."].contains(&text.as_str()));
    let stats = bench.stats();
    // Three were sampled: the first, the one with a choice, and the end.
    assert_eq!(stats.tokens_generated, heard.tokens.len() as u64);
    assert_eq!(stats.forced_tokens + stats.steps, stats.tokens_generated);
    assert!(stats.steps <= 3, "{stats:?}");
    // What had no choice was certain.
    assert_eq!(
        heard
            .logprobs
            .iter()
            .filter(|&&logprob| logprob == Some(0.0))
            .count() as u64,
        stats.forced_tokens
    );
}

#[test]
fn a_reply_ends_where_its_grammar_ends() {
    let mut bench = Bench::new(config(64, 4));
    let endless = crate::Sequence {
        stop_token_ids: vec![],
        ..constrained(&prompt(1, 10), 100, "abc")
    };
    let mut streams = [
        bench.submit(endless),
        bench.submit(constrained(&prompt(2, 10), 100, "abc")),
    ];
    let heard = bench.finish(&mut streams);
    for heard in &heard {
        assert!(heard.tokens.starts_with(&ids("abc")), "{heard:?}");
        let Some(Event::Finished(finished)) = &heard.closing else {
            panic!("{heard:?}")
        };
        assert_eq!(finished.grammar_satisfied, Some(true));
        assert_ne!(finished.reason, FinishReason::Length);
    }
}

#[test]
fn a_reply_cut_short_says_that_its_grammar_is_not_satisfied() {
    let mut bench = Bench::new(config(64, 4));
    let mut streams = [
        bench.submit(constrained(&prompt(1, 10), 5, "[a-z]{9}")),
        bench.submit(constrained(&prompt(1, 10), 5, "[a-z]{3,9}")),
    ];
    let satisfied = bench
        .finish(&mut streams)
        .into_iter()
        .map(|heard| match heard.closing {
            Some(Event::Finished(finished)) => finished.grammar_satisfied.unwrap(),
            other => panic!("{other:?}"),
        });
    let satisfied: Vec<bool> = satisfied.collect();
    assert!(!satisfied[0] && satisfied[1], "{satisfied:?}");
}

#[test]
fn a_stop_token_among_forced_ones_ends_the_reply_there() {
    let mut bench = Bench::new(config(64, 4));
    let mut one = constrained(&prompt(1, 10), 100, "abcdefgh");
    one.stop_token_ids = vec![u32::from(b'd')];
    let mut early = one.clone();
    early.sampling.min_tokens = 4;
    let mut streams = [bench.submit(one), bench.submit(early)];
    let heard = bench.finish(&mut streams);
    assert_eq!(heard[0].tokens, ids("abcd"));
    assert!(heard[1].tokens.starts_with(&ids("abcdefgh")), "{heard:?}");
}

#[test]
fn forced_tokens_stop_at_max_tokens() {
    let mut bench = Bench::new(config(64, 4));
    let mut streams = [bench.submit(constrained(&prompt(1, 10), 6, "abcdefgh"))];
    let heard = bench.finish(&mut streams).remove(0);
    assert_eq!(heard.tokens, ids("abcdef"));
}

#[test]
fn a_consumer_that_does_not_read_loses_no_forced_token() {
    let mut bench = Bench::new(config(200, 4));
    let text = "x".repeat(3 * BUFFER);
    let mut streams = [bench.submit(constrained(&prompt(1, 10), 1000, &text))];
    for _ in 0..10 {
        bench.step();
    }
    let heard = bench.finish(&mut streams).remove(0);
    assert_eq!(heard.tokens[..3 * BUFFER], ids(&text));
}

#[test]
fn a_token_that_the_grammar_does_not_have_fails_its_reply_alone() {
    let mut bench = Bench::new(config(64, 4));
    let mut streams = [
        bench.submit(constrained(&prompt(1, 10), 20, "[a-z]{20}")),
        bench.submit(sequence(&prompt(2, 10), 20)),
    ];
    bench.scheduler.schedule(bench.now, &mut bench.batch);
    let token = |id| {
        Ok(SampledToken {
            id,
            logprob: None,
            top: vec![],
        })
    };
    bench
        .scheduler
        .advance(bench.now, &mut vec![token(5), token(reply(&prompt(2, 10), 1)[0])]);
    let mut failed = Heard::default();
    failed.read(&mut streams[0]);
    assert!(
        matches!(failed.closing, Some(Event::Failed(SequenceError::Grammar(_)))),
        "{failed:?}"
    );
}
