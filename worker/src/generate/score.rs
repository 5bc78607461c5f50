//! How likely the model finds given continuations of one prompt.

use std::{sync::Arc, time::Instant};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use penstock_engine::{Event, SamplingParams, Sequence, SubmitError, Token};
use penstock_proto::v1::{self, continuation::Kind, score_request};
use tonic::metadata::MetadataMap;

use super::{
    CallError, CallMetadata, InferenceService, Input, Violation, off_thread,
    request::{self, Standing},
};
use crate::catalogue::Served;

/// Continuations of one request at most.
const MOST_CONTINUATIONS: usize = 256;
/// Text of one request at most, the prompt counted with each continuation, in bytes: all of it is tokenized.
const MOST_TEXT: usize = 16 << 20;
/// Continuations of one request that are with the engine at once.
const AT_ONCE: usize = 32;

/// A continuation behind its prompt.
#[derive(Debug, PartialEq, Eq)]
struct Scored {
    ids: Vec<u32>,
    /// Index of its first token.
    start: usize,
}

impl InferenceService {
    /// Scores all continuations of a request. The first one computes the prompt; the others find it cached.
    pub(super) async fn score_all(
        &self,
        metadata: &MetadataMap,
        message: v1::ScoreRequest,
    ) -> Result<(CallMetadata, Arc<Served>, v1::ScoreResponse), CallError> {
        let _in_flight = self.in_flight.token();
        self.ready()?;
        let call = CallMetadata::read(metadata, Instant::now())?;
        let served = self.catalogue.find(&message.model, call.revision.as_deref())?;
        let standing = Standing::read(message.priority, &message.cache_salt)?;
        let (input, continuations) = read(message.input, message.continuations)?;
        let bytes = text_bytes(&input, &continuations);
        if bytes > MOST_TEXT {
            let description = format!(
                "are {bytes} bytes of text, each with the prompt; at most {MOST_TEXT} are possible: send fewer"
            );
            return Err(Violation::new("continuations", description).into());
        }
        let encoding = served.clone();
        let scored = off_thread(bytes, move || encode(&encoding, input, continuations)).await?;
        self.ready()?;
        let sequences = scored.into_iter().enumerate().map(|(index, scored)| {
            let sequence = Sequence {
                sampling: SamplingParams {
                    temperature: 0.0,
                    ..SamplingParams::default()
                },
                prompt_logprobs: Some(scored.start),
                // Whether it is the likeliest is wanted too.
                top_logprobs: Some(1),
                deadline: call.deadline,
                namespace: standing.namespace,
                priority: standing.priority,
                tenant: call.tenant,
                prompt: scored.ids,
                ..Sequence::default()
            };
            one(&served, index, sequence)
        });
        let scores: Vec<(v1::ContinuationScore, v1::Usage)> =
            stream::iter(sequences).buffered(AT_ONCE).try_collect().await?;
        let mut response = v1::ScoreResponse::default();
        let mut total = v1::Usage::default();
        for (mut score, usage) in scores {
            total.prompt_tokens = total.prompt_tokens.saturating_add(usage.prompt_tokens);
            total.cached_tokens = total.cached_tokens.saturating_add(usage.cached_tokens);
            if !message.token_logprobs {
                score.token_logprobs = Vec::new();
            }
            response.scores.push(score);
        }
        response.usage = Some(total);
        Ok((call, served, response))
    }
}

fn read(
    input: Option<score_request::Input>,
    continuations: Vec<v1::Continuation>,
) -> Result<(Input, Vec<Kind>), Violation> {
    let input = match input {
        None => {
            return Err(Violation::new(
                "input",
                "is missing: give prompt, input_ids or chat",
            ));
        }
        Some(score_request::Input::Prompt(prompt)) => Input::Prompt(prompt),
        Some(score_request::Input::InputIds(ids)) => Input::Ids(ids.ids),
        Some(score_request::Input::Chat(chat)) => Input::Chat(request::messages(chat)?),
    };
    let count = continuations.len();
    if !(1..=MOST_CONTINUATIONS).contains(&count) {
        let description = format!("must be 1 to {MOST_CONTINUATIONS}, not {count}");
        return Err(Violation::new("continuations", description));
    }
    let kind = |(index, continuation): (usize, v1::Continuation)| {
        let is_empty = match &continuation.kind {
            None => true,
            Some(Kind::Text(text)) => text.is_empty(),
            Some(Kind::Ids(ids)) => ids.ids.is_empty(),
        };
        let field = || format!("continuations[{index}]");
        continuation
            .kind
            .filter(|_| !is_empty)
            .ok_or_else(|| Violation::new(field(), "is empty: give text or ids"))
    };
    let kinds: Result<_, _> = continuations.into_iter().enumerate().map(kind).collect();
    Ok((input, kinds?))
}

fn text_bytes(input: &Input, continuations: &[Kind]) -> usize {
    let prompt = input.text_bytes();
    let each = continuations.iter().map(|continuation| match continuation {
        Kind::Text(text) => prompt + text.len(),
        Kind::Ids(_) => 0,
    });
    each.sum()
}

fn encode(served: &Served, input: Input, continuations: Vec<Kind>) -> Result<Vec<Scored>, CallError> {
    // A chat's template writes the special tokens itself.
    let add_special_tokens = matches!(input, Input::Prompt(_));
    let prompt = served.encode(input)?;
    if prompt.ids.is_empty() {
        return Err(Violation::new("input", "is empty: a score needs at least one token before it").into());
    }
    let behind = |ids: &[u32]| Scored {
        start: prompt.ids.len(),
        ids: [&prompt.ids, ids].concat(),
    };
    let one = |continuation| match (continuation, &prompt.text) {
        (Kind::Ids(ids), _) => Ok(behind(&ids.ids)),
        (Kind::Text(text), None) => Ok(behind(&served.tokenizer.encode(&text, false)?)),
        (Kind::Text(text), Some(before)) => {
            let whole = served
                .tokenizer
                .encode(&format!("{before}{text}"), add_special_tokens)?;
            match together(&prompt.ids, whole) {
                Some(scored) => Ok(scored),
                None => Ok(behind(&served.tokenizer.encode(&text, false)?)),
            }
        }
    };
    continuations.into_iter().map(one).collect()
}

/// The tokens of prompt and continuation as one text; those that differ from the prompt's are scored. `None` where
/// nothing of the prompt is left before them, or nothing after.
fn together(prompt: &[u32], whole: Vec<u32>) -> Option<Scored> {
    let same = prompt.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    (same > 0 && same < whole.len()).then_some(Scored {
        ids: whole,
        start: same,
    })
}

/// Scores one continuation. Where the queue is full, the first one says so; the others, whose prompt is computed, wait
/// for room.
async fn one(
    served: &Served,
    index: usize,
    sequence: Sequence,
) -> Result<(v1::ContinuationScore, v1::Usage), CallError> {
    let (prompt_tokens, deadline) = (sequence.prompt.len(), sequence.deadline);
    let mut events = loop {
        match served.engine.submit(sequence.clone()) {
            Ok(events) => break events,
            Err(SubmitError::QueueFull { retry_after, .. })
                if index > 0 && deadline.is_none_or(|at| Instant::now() + retry_after < at) =>
            {
                tokio::time::sleep(retry_after).await;
            }
            Err(error) => return Err(blamed(error, index)),
        }
    };
    let mut score = v1::ContinuationScore {
        is_greedy: true,
        ..Default::default()
    };
    let mut usage = v1::Usage {
        prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
        ..Default::default()
    };
    while let Some(event) = events.next().await {
        match event {
            Event::Started { cached_tokens, .. } => {
                usage.cached_tokens = u32::try_from(cached_tokens).unwrap_or(u32::MAX);
            }
            Event::Prompt(tokens) => tokens.iter().for_each(|token| add(&mut score, token)),
            Event::Failed(error) => return Err(error.into()),
            Event::Finished(_) => return Ok((score, usage)),
            // The engine generates at least one; nobody asked for it.
            Event::Token(_) => {}
        }
    }
    Err(CallError::EngineGone)
}

fn add(score: &mut v1::ContinuationScore, token: &Token) {
    let logprob = token.logprob.unwrap_or(f32::NAN);
    score.logprob += f64::from(logprob);
    score.token_ids.push(token.id);
    score.token_logprobs.push(logprob);
    score.is_greedy &= token.top.first().is_some_and(|&(id, _)| id == token.id);
}

/// Names the continuation whose tokens cannot be taken.
fn blamed(error: SubmitError, index: usize) -> CallError {
    match error {
        SubmitError::PromptTooLong { .. } | SubmitError::TokenOutOfRange { .. } => Violation::new(
            format!("continuations[{index}]"),
            format!("with its prompt: {error}"),
        )
        .into(),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_spans_both_is_the_continuations() {
        let scored = |ids: &[u32], start| {
            Some(Scored {
                ids: ids.to_vec(),
                start,
            })
        };
        assert_eq!(together(&[1, 2], vec![1, 2, 3, 4]), scored(&[1, 2, 3, 4], 2));
        assert_eq!(together(&[1, 2], vec![1, 9, 4]), scored(&[1, 9, 4], 1));
        assert_eq!(together(&[1, 2], vec![7, 8]), None);
        assert_eq!(together(&[1, 2], vec![1]), None);
    }
}
