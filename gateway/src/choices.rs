//! Several replies to one request. Each is a call of its own: it goes on elsewhere where its worker is lost, and counts
//! by itself. The first one fills the prefix cache; the others begin behind it and share its pages.

use futures_util::{
    StreamExt as _,
    future::try_join_all,
    stream::{self, BoxStream, SelectAll},
};
use penstock_proto::v1;
use tonic::Status;

use crate::{
    error,
    forward::Forwarder,
    replies::{self, Asker, Chunks, Origin, append},
};

/// Replies to one request at most.
pub(crate) const MOST: u32 = 16;

/// Chunks of one reply that came together, with the reply's index.
type Ready = (usize, Vec<v1::GenerateResponse>);

/// The chunks of all replies, as they come. Dropping it ends the sequences on their workers.
pub(crate) struct Choices {
    running: SelectAll<BoxStream<'static, Result<Ready, Status>>>,
    count: usize,
}

/// Asks for `count` replies. The seed of a reply is that of the first plus its index.
pub(crate) async fn ask(
    forwarder: &Forwarder,
    operation: &'static str,
    prefix: &str,
    asker: Asker,
    request: &v1::GenerateRequest,
    count: usize,
) -> Result<(Origin, Choices), Status> {
    let (origin, first) = replies::ask(forwarder, operation, prefix, asker.clone(), request).await?;
    let others = (1..count as u64).map(|index| {
        let mut request = request.clone();
        let sampling = request.sampling.get_or_insert_default();
        let seed = origin.seed().or(sampling.seed);
        sampling.seed = seed.map(|seed| seed.wrapping_add(index));
        let asker = asker.clone();
        async move { replies::ask(forwarder, operation, prefix, asker, &request).await }
    });
    let others = try_join_all(others).await.map_err(|status| origin.told(status))?;
    let mut all = vec![first];
    for (other, chunks) in others {
        if other.assigned.revision.name != origin.assigned.revision.name {
            // One response names one revision. A plan changed in between; it has settled when the client is back.
            return Err(error::unavailable("the revision changed between two choices"));
        }
        all.push(chunks);
    }
    Ok((origin, Choices::new(all)))
}

/// What all of them took. The prompt counts once.
pub(crate) fn usage<'r>(replies: impl IntoIterator<Item = &'r v1::GenerateResponse>) -> Option<v1::Usage> {
    let usages = replies.into_iter().filter_map(|reply| reply.usage);
    usages.reduce(|sum, usage| v1::Usage {
        completion_tokens: sum.completion_tokens + usage.completion_tokens,
        // Those behind the first find the prompt cached because of it.
        cached_tokens: sum.cached_tokens.min(usage.cached_tokens),
        ..sum
    })
}

/// The `count` likeliest replies, by the mean log-probability of their tokens, likeliest first.
pub(crate) fn best(mut replies: Vec<v1::GenerateResponse>, count: usize) -> Vec<v1::GenerateResponse> {
    if count < replies.len() {
        // Not a number where there is no token: such a reply comes last.
        let mean = |reply: &v1::GenerateResponse| {
            let sum: f32 = reply.logprobs.iter().map(|token| token.logprob).sum();
            let mean = sum / reply.logprobs.len() as f32;
            if mean.is_nan() { f32::NEG_INFINITY } else { mean }
        };
        replies.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        replies.truncate(count);
    }
    replies
}

// === impl Choices ===

impl Choices {
    pub(crate) fn new(replies: Vec<Chunks>) -> Self {
        let count = replies.len();
        let running = replies.into_iter().enumerate().map(|(index, chunks)| {
            let ready = stream::try_unfold(chunks, move |mut chunks| async move {
                Ok(chunks.next().await?.map(|ready| ((index, ready), chunks)))
            });
            ready.boxed()
        });
        Self {
            running: stream::select_all(running),
            count,
        }
    }

    /// Chunks of one of the replies; none when all are complete.
    pub(crate) async fn next(&mut self) -> Result<Option<Ready>, Status> {
        self.running.next().await.transpose()
    }

    /// Each reply as one chunk.
    pub(crate) async fn whole(mut self) -> Result<Vec<v1::GenerateResponse>, Status> {
        let mut whole = vec![v1::GenerateResponse::default(); self.count];
        while let Some((index, chunks)) = self.next().await? {
            for chunk in chunks {
                append(&mut whole[index], chunk);
            }
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(logprobs: &[f32], completion_tokens: u32) -> v1::GenerateResponse {
        let token = |&logprob| v1::TokenLogprob {
            logprob,
            ..Default::default()
        };
        v1::GenerateResponse {
            logprobs: logprobs.iter().map(token).collect(),
            usage: Some(v1::Usage {
                prompt_tokens: 9,
                completion_tokens,
                cached_tokens: completion_tokens,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_likeliest_token_by_token_are_best() {
        let replies = vec![
            reply(&[-1.0, -1.0], 1),
            reply(&[-1.5], 2),
            reply(&[], 3),
            reply(&[-0.5; 9], 4),
        ];
        let best = |count| {
            let best = best(replies.clone(), count);
            best.iter()
                .map(|reply| reply.usage.unwrap().completion_tokens)
                .collect::<Vec<_>>()
        };
        assert_eq!(best(3), [4, 1, 2]);
        // Nothing to choose: as they were asked for.
        assert_eq!(best(4), [1, 2, 3, 4]);
    }

    #[test]
    fn the_prompt_counts_once_and_completions_add_up() {
        let usage = usage(&[reply(&[], 5), reply(&[], 7)]).unwrap();
        assert_eq!(
            (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
            (9, 12, 5)
        );
    }
}
