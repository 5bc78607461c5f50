//! What a step's token does to its reply.

use std::time::Instant;

use super::Running;
use crate::{Event, FinishReason, Finished, MatcherError, SampledToken, Token, runner::RunnerError};

/// Takes the rows of a step that tell of the prompt, and sends what they tell.
///
/// # Errors
/// That of the first row that failed; the others are taken all the same.
pub(super) fn score(
    sequence: &mut Running,
    rows: &mut impl Iterator<Item = Result<SampledToken, RunnerError>>,
    now: Instant,
) -> Result<(), RunnerError> {
    let Some(scored) = sequence.scored else {
        return Ok(());
    };
    let count = sequence.in_step - usize::from(sequence.samples_next());
    // All of them, whatever they are: what follows is another sequence's.
    let taken: Vec<_> = rows.take(count).collect();
    let first = (scored == 0).then(|| Token {
        id: sequence.tokens[0],
        at: now,
        logprob: None,
        top: Vec::new(),
    });
    let mut tokens: Vec<Token> = first.into_iter().collect();
    // After a retraction some are told already; row 0 tells of token 1.
    let told = scored.saturating_sub(1 + sequence.computed);
    for token in taken.into_iter().skip(told) {
        let SampledToken { id, logprob, top } = token?;
        tokens.push(Token {
            id,
            at: now,
            logprob,
            top,
        });
    }
    let computed = sequence.computed + sequence.in_step;
    sequence.scored = (computed < sequence.prompt_len).then_some(scored.max(computed + 1));
    if !tokens.is_empty() {
        sequence.sink.send(Event::Prompt(tokens));
    }
    Ok(())
}

/// Appends and sends a sampled token, and those that the grammar leaves no choice about after it; says how the
/// reply ended if it is complete.
///
/// # Errors
/// The grammar cannot be followed.
pub(super) fn accept(
    sequence: &mut Running,
    sampled: SampledToken,
    now: Instant,
) -> Result<Option<Finished>, MatcherError> {
    if let Some(finished) = append(sequence, sampled, now)? {
        return Ok(Some(finished));
    }
    let Some(grammar) = &sequence.grammar else {
        return Ok(None);
    };
    // What the consumer has no room for is sampled, one by one, with no other choice.
    let most = sequence.sink.room().min(sequence.remaining());
    for id in grammar.forced(most)? {
        let forced = sequence.forced_token(id);
        if let Some(finished) = append(sequence, forced, now)? {
            return Ok(Some(finished));
        }
    }
    Ok(None)
}

fn append(
    sequence: &mut Running,
    token: SampledToken,
    now: Instant,
) -> Result<Option<Finished>, MatcherError> {
    let id = token.id;
    if let Some(grammar) = &sequence.grammar {
        grammar.commit(id)?;
    }
    sequence.tokens.push(id);
    if let Some(history) = &mut sequence.history {
        history.generated(id);
    }
    sequence.sink.send(Event::Token(Token {
        id,
        at: now,
        logprob: token.logprob,
        top: token.top,
    }));
    Ok(reason(sequence, id).map(|reason| Finished {
        reason,
        completion_tokens: sequence.generated(),
        grammar_satisfied: sequence.grammar.as_ref().map(|grammar| grammar.may_stop()),
    }))
}

/// Why the reply ends with its last token, `id`, if it does.
fn reason(sequence: &Running, id: u32) -> Option<FinishReason> {
    let grammar_ended = sequence
        .grammar
        .as_ref()
        .is_some_and(|grammar| grammar.is_stopped());
    if sequence.stop_token_ids.contains(&id) && (grammar_ended || sequence.may_be_stopped()) {
        Some(FinishReason::StopToken(id))
    } else if grammar_ended {
        Some(FinishReason::Grammar)
    } else if sequence.remaining() == 0 {
        Some(FinishReason::Length)
    } else {
        None
    }
}
