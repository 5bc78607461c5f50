//! From the engine's tokens to the stream of chunks, with the trailer at its end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::stream;
use penstock_engine::{Event, SequenceError, TokenStream};
use penstock_proto::{metadata as names, v1};
use prost::Message as _;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::{
    Code, Status,
    metadata::{MetadataMap, MetadataValue},
};

use super::{CallError, Observation, RelayParts, ReplyStream, reply::Reply};
use crate::catalogue::Served;

/// Tokens that are ready together leave in one chunk, up to so many.
const MAX_CHUNK_TOKENS: usize = 32;
/// The scheduler ends a sequence at its deadline; this much later the relay does so itself, in case no step
/// completes any more.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);

/// One reply under way. Dropping it drops the token stream, which aborts the sequence.
pub(crate) struct Relay {
    state: State,
    reply: Reply,
    served: Arc<Served>,
    prompt_tokens: u32,
    cached_tokens: u32,
    deadline: Option<Instant>,
    /// The reply does not satisfy its grammar.
    grammar_failed: bool,
    observation: Observation,
    _in_flight: TaskTrackerToken,
}

enum State {
    /// Tokens come.
    Open(TokenStream),
    /// The body is complete; the status is left.
    Closing(Box<Status>),
    Closed,
}

/// What an event did to the reply.
enum Step {
    Continue,
    /// The reply is complete, with this last chunk.
    Complete(v1::GenerateResponse),
    Failed(CallError),
}

impl Relay {
    pub(crate) fn new(
        parts: RelayParts,
        served: Arc<Served>,
        observation: Observation,
        deadline: Option<Instant>,
    ) -> Self {
        Self {
            state: State::Open(parts.tokens),
            reply: parts.reply,
            served,
            prompt_tokens: parts.prompt_tokens,
            cached_tokens: 0,
            deadline,
            grammar_failed: false,
            observation,
            _in_flight: parts.in_flight,
        }
    }

    pub(crate) fn into_stream(self) -> ReplyStream {
        Box::pin(stream::unfold(self, |mut relay| async move {
            relay.next().await.map(|item| (item, relay))
        }))
    }

    async fn next(&mut self) -> Option<Result<v1::GenerateResponse, Status>> {
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Closed => None,
            State::Closing(status) => Some(Err(*status)),
            State::Open(tokens) => Some(self.next_chunk(tokens).await),
        }
    }

    /// Waits for the next token, then takes those that are ready as well.
    async fn next_chunk(&mut self, mut tokens: TokenStream) -> Result<v1::GenerateResponse, Status> {
        loop {
            if let Some(chunk) = self.reply.take_chunk() {
                self.state = State::Open(tokens);
                return Ok(chunk);
            }
            let mut next = Some(self.wait(&mut tokens).await);
            let mut left = MAX_CHUNK_TOKENS;
            while let Some(event) = next.take() {
                match self.take(event) {
                    Step::Continue => {}
                    Step::Complete(last) => {
                        drop(tokens);
                        let status = self.complete(last.finish_reason());
                        self.state = State::Closing(Box::new(status));
                        return Ok(last);
                    }
                    Step::Failed(error) => {
                        drop(tokens);
                        return self.fail(error);
                    }
                }
                left -= 1;
                if left > 0 {
                    next = tokens.try_next().map(Ok);
                }
            }
        }
    }

    async fn wait(&self, tokens: &mut TokenStream) -> Result<Event, CallError> {
        let next = match self.deadline {
            None => tokens.next().await,
            Some(deadline) => {
                let late = tokio::time::Instant::from_std(deadline + DEADLINE_GRACE);
                let completion_tokens = self.reply.completion_tokens() as usize;
                tokio::time::timeout_at(late, tokens.next())
                    .await
                    .map_err(|_| SequenceError::DeadlineExceeded { completion_tokens })?
            }
        };
        next.ok_or(CallError::EngineGone)
    }

    fn take(&mut self, event: Result<Event, CallError>) -> Step {
        let event = match event {
            Ok(event) => event,
            Err(error) => return Step::Failed(error),
        };
        match event {
            Event::Started { at, cached_tokens } => {
                // What was resumed is computed like a prompt, and is none.
                self.cached_tokens = u32::try_from(cached_tokens)
                    .map_or(self.prompt_tokens, |cached| cached.min(self.prompt_tokens));
                self.observation.started(at, self.cached_tokens);
                Step::Continue
            }
            Event::Prompt(tokens) => {
                self.reply.echo_tokens(&tokens);
                Step::Continue
            }
            Event::Token(token) => {
                self.observation.token(token.at);
                match self.reply.push(&token) {
                    None => Step::Continue,
                    Some(stop) => Step::Complete(self.reply.stopped(stop, self.usage())),
                }
            }
            Event::Finished(finished) => {
                self.grammar_failed = finished.grammar_satisfied == Some(false);
                Step::Complete(self.reply.finished(finished.reason, self.usage()))
            }
            Event::Failed(error) => {
                self.grammar_failed = matches!(error, SequenceError::Grammar(_));
                Step::Failed(error.into())
            }
        }
    }

    /// Completion tokens are the reply's own to tell.
    fn usage(&self) -> v1::Usage {
        v1::Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: 0,
            cached_tokens: self.cached_tokens,
        }
    }

    fn complete(&mut self, reason: v1::FinishReason) -> Status {
        let stats = self.stats(reason);
        self.observation.completed(reason);
        Status::with_metadata(Code::Ok, "", trailer(&stats))
    }

    /// What was ready before the failure still leaves; the status follows.
    fn fail(&mut self, error: CallError) -> Result<v1::GenerateResponse, Status> {
        let stats = self.stats(v1::FinishReason::Unspecified);
        self.observation.failed(&error);
        let mut status = Status::from(error);
        for entry in trailer(&stats).iter() {
            if let tonic::metadata::KeyAndValueRef::Binary(name, value) = entry {
                status.metadata_mut().insert_bin(name, value.clone());
            }
        }
        match self.reply.take_chunk() {
            None => Err(status),
            Some(chunk) => {
                self.state = State::Closing(Box::new(status));
                Ok(chunk)
            }
        }
    }

    fn stats(&self, reason: v1::FinishReason) -> v1::RequestStats {
        let engine = self.served.engine.stats();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let times = self.observation.times();
        v1::RequestStats {
            queue_us: times.queue_us,
            ttft_us: times.ttft_us,
            tpot_us: times.tpot_us,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.reply.completion_tokens(),
            finish_reason: reason.into(),
            repetition: self.reply.repetition(),
            watch_word_hits: self.reply.watch_word_hits(),
            running: count(engine.running),
            waiting: count(engine.waiting),
            grammar_failed: self.grammar_failed,
        }
    }
}

fn trailer(stats: &v1::RequestStats) -> MetadataMap {
    let mut metadata = MetadataMap::new();
    metadata.insert_bin(
        names::STATS_TRAILER,
        MetadataValue::from_bytes(&stats.encode_to_vec()),
    );
    metadata
}
