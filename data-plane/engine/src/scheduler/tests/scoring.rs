//! Prompts whose log-probabilities are told.

use super::*;

fn scoring(prompt: &[u32], max_tokens: usize) -> crate::Sequence {
    crate::Sequence {
        prompt_logprobs: Some(0),
        ..sequence(prompt, max_tokens)
    }
}

/// The runner tells the position of the token before as the log-probability.
fn scores(prompt: &[u32]) -> Vec<(u32, Option<f32>)> {
    let told = |(position, &id): (usize, &u32)| (id, position.checked_sub(1).map(|before| -(before as f32)));
    prompt.iter().enumerate().map(told).collect()
}

#[test]
fn a_prompt_is_told_before_its_reply_whatever_is_cached_and_however_it_is_chunked() {
    for (page_size, max_batch_tokens) in [(1, 3), (4, 64), (16, 200)] {
        let mut bench = Bench::new(EngineConfig {
            max_batch_tokens,
            ..config(640 / page_size, page_size)
        });
        for length in [1, 2, 64, 65, 150] {
            let prompt = prompt(1, length);
            for _ in 0..2 {
                let mut streams = [
                    bench.submit(scoring(&prompt, 20)),
                    bench.submit(sequence(&prompt, 20)),
                ];
                let heard = bench.finish(&mut streams);
                assert_eq!(heard[0].prompt, scores(&prompt), "{length} tokens");
                assert_eq!(heard[1].prompt, []);
                assert!(heard.iter().all(|heard| heard.tokens == reply(&prompt, 20)));
                assert_eq!(heard[0].cached_tokens, 0);
            }
        }
    }
}

#[test]
fn a_prompt_that_was_told_in_part_is_told_from_there() {
    let mut bench = Bench::new(config(160, 4));
    let prompt = prompt(1, 100);
    for told in [0, 1, 2, 63, 64, 99, 100] {
        let rest = crate::Sequence {
            prompt_logprobs: Some(told),
            ..sequence(&prompt, 5)
        };
        let mut streams = [bench.submit(rest)];
        let heard = bench.finish(&mut streams).remove(0);
        assert_eq!(heard.prompt, scores(&prompt)[told..], "{told} were told");
        assert_eq!(heard.tokens, reply(&prompt, 5));
    }
}

#[test]
fn a_retracted_prompt_is_told_once() {
    let mut bench = Bench::new(config(64, 4));
    let prompt = prompt(1, 150);
    let mut streams = [bench.submit(scoring(&prompt, 20))];
    let steps = [1, 2, 5];
    for count in steps {
        for _ in 0..count {
            bench.step();
        }
        bench.scheduler.retract(0);
        bench.check();
    }
    let heard = bench.finish(&mut streams).remove(0);
    assert_eq!(heard.prompt, scores(&prompt));
    assert_eq!(heard.tokens, reply(&prompt, 20));
}

#[test]
fn a_consumer_that_does_not_read_loses_no_part_of_its_prompt() {
    let mut bench = Bench::new(EngineConfig {
        max_batch_tokens: 1,
        ..config(64, 4)
    });
    let prompt = prompt(1, 2 * BUFFER);
    let mut streams = [bench.submit(scoring(&prompt, 5))];
    for _ in 0..3 * BUFFER {
        bench.step();
    }
    let heard = bench.finish(&mut streams).remove(0);
    assert_eq!(heard.prompt, scores(&prompt));
    assert_eq!(heard.tokens, reply(&prompt, 5));
}
