//! SGLang's native HTTP API: `/generate`.

use std::time::Instant;

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::post,
};
use http::Request;
use penstock_proto::v1::{self, FinishReason, generate_request::Input, generate_response::StoppedBy};
use penstock_telemetry::semconv::value;
use serde_json::{Map, Value, json};
use tonic::Status;

use crate::{
    choices,
    error::bad_request,
    fields::{self, Fields, is_empty},
    forward::Forwarder,
    frames, grammar,
    observe::Observation,
    openai::{error, sse},
    replies::{self, Asker},
    reply_id::PREFIX,
};

/// What SGLang generates where a request does not say.
const MAX_NEW_TOKENS: u32 = 128;
/// Stop texts of one request at most.
const MAX_STOPS: usize = 16;

/// Routes of the API.
pub(crate) fn router(forwarder: Forwarder) -> Router {
    Router::new()
        .route("/generate", post(generate).put(generate))
        .with_state(forwarder)
}

/// A request that was read.
pub(crate) struct Asked {
    pub(crate) request: v1::GenerateRequest,
    stream: bool,
    id: Option<String>,
}

async fn generate(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    match read(body).await {
        Ok(asked) => answer(&forwarder, parts.into(), asked, began)
            .await
            .unwrap_or_else(|status| error::response(&status)),
        Err(status) => {
            Observation::start(forwarder.metrics.clone(), value::GENERATE, "", &parts.headers)
                .failed(&status);
            error::response(&status)
        }
    }
}

async fn answer(
    forwarder: &Forwarder,
    asker: Asker,
    asked: Asked,
    began: Instant,
) -> Result<Response, Status> {
    let request = &asked.request;
    let (origin, chunks) = choices::ask(forwarder, value::GENERATE, PREFIX, asker, request, 1).await?;
    let sofar = SoFar {
        id: asked.id.unwrap_or_else(|| origin.id.clone()),
        version: origin.assigned.revision.name.clone(),
        logprobs: asked.request.top_logprobs,
        began,
        reply: v1::GenerateResponse::default(),
    };
    let mut response = match asked.stream {
        true => sse::respond(chunks, sofar),
        false => {
            let mut replies = chunks.whole().await.map_err(|status| origin.told(status))?;
            let reply = replies.pop().unwrap_or_default();
            Json(SoFar { reply, ..sofar }.value()).into_response()
        }
    };
    origin.tell(&mut response);
    Ok(response)
}

async fn read(body: Body) -> Result<Asked, Status> {
    understand(&frames::read_whole(body, frames::MAX_REQUEST_BYTES).await?)
}

pub(crate) fn understand(body: &[u8]) -> Result<Asked, Status> {
    let value = fields::parse(body)?;
    let fields =
        Fields::of(&value).ok_or_else(|| Status::invalid_argument("the body is not a JSON object"))?;
    for name in [
        "image_data",
        "audio_data",
        "video_data",
        "input_embeds",
        "lora_path",
        "session_params",
    ] {
        fields.refuse(name, is_empty)?;
    }
    let top = fields.integer("top_logprobs_num", 0, 20)?.unwrap_or(0);
    let empty = Map::new();
    let params = fields.object("sampling_params")?.unwrap_or(Fields::new(&empty));
    let request = v1::GenerateRequest {
        model: fields.text("model")?.unwrap_or_default().to_owned(),
        input: Some(input(fields)?),
        sampling: Some(sampling(params)?),
        top_logprobs: fields.flag("return_logprob")?.then_some(top),
        echo: false,
        resume: None,
        grammar: grammar::of_generate(params)?,
        priority: fields.signed("priority", -100, 100)?.unwrap_or(0),
        cache_salt: fields.text("extra_key")?.unwrap_or_default().to_owned(),
    };
    Ok(Asked {
        request,
        stream: fields.flag("stream")?,
        id: fields.text("rid")?.map(str::to_owned),
    })
}

/// One text or one list of token ids; batches are not served.
fn input(fields: Fields<'_>) -> Result<Input, Status> {
    match (fields.text("text")?, fields.ids("input_ids")?) {
        (Some(text), None) => Ok(Input::Prompt(text.to_owned())),
        (None, Some(ids)) => Ok(Input::InputIds(v1::TokenIds { ids })),
        (Some(_), Some(_)) => Err(bad_request("input_ids", "and text are both given: give one")),
        (None, None) => Err(bad_request("text", "is missing: give text or input_ids")),
    }
}

fn sampling(fields: Fields<'_>) -> Result<v1::SamplingParams, Status> {
    for name in ["structural_tag", "stop_regex"] {
        fields.refuse(name, is_empty)?;
    }
    fields.refuse("n", |n| n.as_u64() == Some(1))?;
    // -1 keeps all tokens, as 0 does elsewhere.
    let top_k = match fields.get("top_k") {
        Some(all) if all.as_i64() == Some(-1) => Some(0),
        _ => fields.integer("top_k", 0, u32::MAX)?,
    };
    let seed = fields.seed("sampling_seed")?;
    Ok(v1::SamplingParams {
        temperature: fields.number("temperature")?,
        top_p: fields.number("top_p")?,
        top_k,
        min_p: fields.number("min_p")?,
        repetition_penalty: fields.number("repetition_penalty")?,
        presence_penalty: fields.number("presence_penalty")?,
        frequency_penalty: fields.number("frequency_penalty")?,
        seed: seed.or(fields.seed("seed")?),
        max_tokens: Some(
            fields
                .integer("max_new_tokens", 1, u32::MAX)?
                .unwrap_or(MAX_NEW_TOKENS),
        ),
        stop: fields.texts("stop", MAX_STOPS)?,
        stop_token_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: Some(fields.flag("ignore_eos")?),
        logit_bias: grammar::logit_bias(fields)?,
        min_tokens: fields.integer("min_new_tokens", 0, u32::MAX)?,
    })
}

/// The reply so far: each event of SGLang's holds all of it.
struct SoFar {
    id: String,
    version: String,
    logprobs: Option<u32>,
    began: Instant,
    reply: v1::GenerateResponse,
}

impl SoFar {
    fn value(&self) -> Value {
        let usage = self.reply.usage.unwrap_or_default();
        let counted = u32::try_from(self.reply.token_ids.len()).unwrap_or(u32::MAX);
        let mut meta = json!({
            "id": self.id,
            "finish_reason": self.finish_reason(),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": if self.reply.usage.is_some() { usage.completion_tokens } else { counted },
            "cached_tokens": usage.cached_tokens,
            "weight_version": self.version,
            "e2e_latency": self.began.elapsed().as_secs_f64(),
        });
        if let Some(top) = self.logprobs {
            // SGLang's own triples: log-probability, id, and no text.
            let tokens = &self.reply.logprobs;
            meta["output_token_logprobs"] = tokens
                .iter()
                .map(|token| json!([token.logprob, token.token_id, null]))
                .collect();
            if top > 0 {
                let alternatives = |token: &v1::TokenLogprob| -> Value {
                    token
                        .top
                        .iter()
                        .map(|top| json!([top.logprob, top.token_id, null]))
                        .collect()
                };
                meta["output_top_logprobs"] = tokens.iter().map(alternatives).collect();
            }
        }
        json!({ "text": self.reply.text, "output_ids": self.reply.token_ids, "meta_info": meta })
    }

    fn finish_reason(&self) -> Value {
        match (self.reply.finish_reason(), &self.reply.stopped_by) {
            (FinishReason::Unspecified, _) => Value::Null,
            (FinishReason::Length, _) => {
                json!({ "type": "length", "length": self.reply.usage.unwrap_or_default().completion_tokens })
            }
            (FinishReason::Stop, Some(StoppedBy::StopString(text))) => {
                json!({ "type": "stop", "matched": text })
            }
            (FinishReason::Stop, Some(StoppedBy::StopTokenId(id))) => {
                json!({ "type": "stop", "matched": id })
            }
            (FinishReason::Stop, None) => json!({ "type": "stop" }),
        }
    }
}

impl sse::Events for SoFar {
    fn open(&mut self, _: &mut String) {}

    fn chunk(&mut self, _: usize, chunk: v1::GenerateResponse, out: &mut String) {
        replies::append(&mut self.reply, chunk);
        sse::event(out, self.value());
    }

    fn close(&mut self, _: &mut String) {}
}
