//! The Inference service: validate, admit, render, tokenize, submit, relay.

mod error;
mod metadata;
mod observation;
mod relay;
mod repetition;
mod reply;
mod request;
mod score;
mod watch_words;

use std::{pin::Pin, sync::Arc, time::Instant};

use futures_util::Stream;
use penstock_engine::Sequence;
use penstock_proto::v1::{self, inference_server::Inference};
use penstock_telemetry::instruments::WorkerMetrics;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    catalogue::{Catalogue, Prompt, Served},
    readiness::{Readiness, ReadinessGate},
};
pub(crate) use error::CallError;
use metadata::CallMetadata;
use observation::Observation;
use relay::Relay;
use reply::{Reply, ResumeError};
use request::Generation;
pub(crate) use request::{Input, Violation};
pub(crate) use watch_words::WatchWords;

/// Texts above this length are tokenized off the async threads; shorter ones take less than a millisecond.
const LONG_TEXT_BYTES: usize = 4096;

/// The service. Clones share everything.
#[derive(Debug, Clone)]
pub(crate) struct InferenceService {
    pub(crate) catalogue: Catalogue,
    pub(crate) gate: ReadinessGate,
    pub(crate) metrics: WorkerMetrics,
    /// Name of this worker in spans and metrics.
    pub(crate) endpoint: Arc<str>,
    /// Holds a token per call in flight.
    pub(crate) in_flight: TaskTracker,
}

/// The chunks of a reply.
pub(crate) type ReplyStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = ReplyStream;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<ReplyStream>, Status> {
        let (metadata, _, message) = request.into_parts();
        let mut observation = Observation::start(self.metrics.clone(), &self.endpoint, &metadata, &message);
        match self.admit(&metadata, message, &mut observation).await {
            Ok(admitted) => Ok(admitted.respond(observation)),
            Err(error) => {
                observation.failed(&error);
                Err(error.into())
            }
        }
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        Ok(self.encode_only(&metadata, message).await.map(Response::new)?)
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let (call, served, scored) = self.score_all(&metadata, message).await?;
        let mut response = Response::new(scored);
        call.tell(&served.revision, response.metadata_mut());
        Ok(response)
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(self.catalogue.list()))
    }

    async fn feedback(
        &self,
        _: Request<v1::FeedbackRequest>,
    ) -> Result<Response<v1::FeedbackResponse>, Status> {
        Err(Status::unimplemented("feedback goes to a gateway"))
    }
}

/// A call whose sequence the engine has taken.
struct Admitted {
    call: CallMetadata,
    served: Arc<Served>,
    seed: u64,
    relay: RelayParts,
}

/// What the relay needs beside the observation.
struct RelayParts {
    tokens: penstock_engine::TokenStream,
    reply: Reply,
    prompt_tokens: u32,
    in_flight: tokio_util::task::task_tracker::TaskTrackerToken,
}

impl InferenceService {
    async fn admit(
        &self,
        metadata: &MetadataMap,
        message: v1::GenerateRequest,
        observation: &mut Observation,
    ) -> Result<Admitted, CallError> {
        let in_flight = self.in_flight.token();
        self.ready()?;
        let call = CallMetadata::read(metadata, observation.arrived())?;
        let served = self.catalogue.find(&message.model, call.revision.as_deref())?;
        observation.resolved(&served, &call);
        let generation = request::parse(message, rand::random).map_err(CallError::Invalid)?;
        let grammar = served.grammars.compile(generation.grammar.clone(), call.deadline);
        let ((generation, prompt), grammar) = tokio::try_join!(encode(served.clone(), generation), grammar)?;
        // Drained while the text was tokenized: nothing new enters the engine.
        self.ready()?;
        let prompt_tokens = u32::try_from(prompt.ids.len()).unwrap_or(u32::MAX);
        let seed = generation.sampling.seed;
        observation.requested(&generation, prompt_tokens);
        let (reply, mut sequence) = compose(&served, generation, prompt, &call)?;
        sequence.grammar = grammar;
        follow_resumed(&mut sequence)?;
        // Before the call: the engine may start the sequence before it returns.
        let submitted = Instant::now();
        let tokens = served.engine.submit(sequence)?;
        observation.submitted(submitted);
        Ok(Admitted {
            call,
            served,
            seed,
            relay: RelayParts {
                tokens,
                reply,
                prompt_tokens,
                in_flight,
            },
        })
    }

    async fn encode_only(
        &self,
        metadata: &MetadataMap,
        message: v1::TokenizeRequest,
    ) -> Result<v1::TokenizeResponse, CallError> {
        self.ready()?;
        let call = CallMetadata::read(metadata, Instant::now())?;
        let served = self.catalogue.find(&message.model, call.revision.as_deref())?;
        let input = match message.input {
            None => return Err(Violation::new("input", "is missing: give prompt or chat").into()),
            Some(v1::tokenize_request::Input::Prompt(prompt)) => Input::Prompt(prompt),
            Some(v1::tokenize_request::Input::Chat(chat)) => Input::Chat(request::messages(chat)?),
        };
        let prompt = off_thread(input.text_bytes(), move || served.encode(input)).await?;
        Ok(v1::TokenizeResponse {
            ids: prompt.ids,
            text: prompt.text.unwrap_or_default(),
        })
    }

    fn ready(&self) -> Result<(), CallError> {
        match self.gate.get() {
            // A stalled engine may recover, and a full queue says so itself; health tells the gateways.
            Readiness::Serving | Readiness::Stalled(_) => Ok(()),
            other => Err(CallError::NotReady(other)),
        }
    }
}

impl Admitted {
    fn respond(self, observation: Observation) -> Response<ReplyStream> {
        let relay = Relay::new(self.relay, self.served.clone(), observation, self.call.deadline);
        let mut response = Response::new(relay.into_stream());
        self.call
            .respond(&self.served.revision, self.seed, response.metadata_mut());
        response
    }
}

/// The engine's sequence, and the reply that its tokens will make.
fn compose(
    served: &Served,
    generation: Generation,
    prompt: Prompt,
    call: &CallMetadata,
) -> Result<(Reply, Sequence), CallError> {
    let vocab_size = served.engine.vocab_size();
    if let Some(id) = generation
        .stop_token_ids
        .iter()
        .find(|&&id| id as usize >= vocab_size)
    {
        let description = format!("has id {id}, which is outside the vocabulary of {vocab_size}");
        return Err(Violation::new("sampling.stop_token_ids", description).into());
    }
    let biased = &generation.sampling.logit_bias;
    if let Some((id, _)) = biased.iter().find(|&&(id, _)| id as usize >= vocab_size) {
        let description = format!("has id {id}, which is outside the vocabulary of {vocab_size}");
        return Err(Violation::new("sampling.logit_bias", description).into());
    }
    let mut stop_token_ids = generation.stop_token_ids;
    if !generation.ignore_eos {
        stop_token_ids.extend_from_slice(&served.eos_token_ids);
    }
    let logprobs = generation.top_logprobs.is_some();
    let mut reply = Reply::new(
        served.tokenizer.clone(),
        generation.stop,
        stop_token_ids.clone(),
        logprobs,
    );
    reply.watch(served.watch_words());
    reply.at_least(generation.sampling.min_tokens);
    if generation.echo {
        let text = served.prompt_text(&prompt);
        match logprobs {
            // Its tokens come back as the engine tells of them.
            true => reply.echo(&[], &text),
            false => reply.echo(&prompt.ids, &text),
        }
    }
    let resumed = match &generation.resume {
        Some(resume) => resume_reply(
            &mut reply,
            resume,
            generation.echo.then_some(&prompt.ids),
            logprobs,
        )?,
        None => &[],
    };
    let prompt_told = generation
        .resume
        .as_ref()
        .map_or(0, |resume| resume.token_ids.len());
    let rest = served
        .engine
        .context_length()
        .saturating_sub(prompt.ids.len())
        .max(1);
    let sequence = Sequence {
        max_tokens: generation.max_tokens.map_or(rest, |tokens| tokens.min(rest)),
        prompt: [&prompt.ids, resumed].concat(),
        resumed: resumed.len(),
        sampling: generation.sampling,
        stop_token_ids,
        top_logprobs: generation.top_logprobs,
        deadline: call.deadline,
        namespace: generation.standing.namespace,
        priority: generation.standing.priority,
        tenant: call.tenant,
        grammar: None,
        prompt_logprobs: (generation.echo && logprobs).then_some(prompt_told),
    };
    Ok((reply, sequence))
}

/// Puts the reply where another worker left it; the tokens that it generated.
fn resume_reply<'r>(
    reply: &mut Reply,
    resume: &'r v1::Resume,
    echoed: Option<&Vec<u32>>,
    logprobs: bool,
) -> Result<&'r [u32], Violation> {
    let echoed = echoed.map_or(&[][..], Vec::as_slice);
    let tokens = match resume.token_ids.strip_prefix(echoed) {
        Some(tokens) => tokens,
        // Of a prompt that comes with log-probabilities the client may have a part.
        None if logprobs && echoed.starts_with(&resume.token_ids) => &[],
        None => {
            let description = "does not begin with the prompt, which is echoed";
            return Err(Violation::new("resume.token_ids", description));
        }
    };
    reply
        .resume(tokens, resume.text_offset)
        .map_err(|error| match error {
            ResumeError::Over { .. } => Violation::new("resume.token_ids", error.to_string()),
            ResumeError::Offset { .. } => Violation::new("resume.text_offset", error.to_string()),
        })?;
    Ok(tokens)
}

/// Puts the grammar where another worker left it.
fn follow_resumed(sequence: &mut Sequence) -> Result<(), Violation> {
    let resumed = &sequence.prompt[sequence.prompt.len() - sequence.resumed..];
    let Some(grammar) = &mut sequence.grammar else {
        return Ok(());
    };
    resumed
        .iter()
        .try_for_each(|&id| grammar.commit(id))
        .map_err(|error| Violation::new("resume.token_ids", format!("do not follow the grammar: {error}")))
}

async fn encode(served: Arc<Served>, mut generation: Generation) -> Result<(Generation, Prompt), CallError> {
    let input = std::mem::replace(&mut generation.input, Input::Ids(Vec::new()));
    let prompt = off_thread(input.text_bytes(), move || served.encode(input)).await?;
    Ok((generation, prompt))
}

/// Runs `work` here if its text is short, else on a thread that may block.
async fn off_thread<T: Send + 'static>(
    text_bytes: usize,
    work: impl FnOnce() -> Result<T, CallError> + Send + 'static,
) -> Result<T, CallError> {
    if text_bytes <= LONG_TEXT_BYTES {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
