//! OpenAI's HTTP API: chat and text completions, and the list of models.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod error;
pub(crate) mod reply;
pub(crate) mod request;
pub(crate) mod sse;

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::{HeaderMap, Request};
use penstock_proto::v1;
use serde_json::{Value, json};
use tonic::Status;

use crate::{
    choices,
    fields::{self, Fields},
    forward::Forwarder,
    frames,
    observe::Observation,
    replies::Asker,
};
use reply::Head;
use request::Asked;

/// One way to ask and to be answered.
pub(crate) trait Shape: Sized + Send + 'static {
    /// Name of the operation in telemetry.
    const OPERATION: &'static str;
    /// What ids begin with.
    const PREFIX: &'static str;

    /// Reads a request.
    fn read(fields: Fields<'_>) -> Result<(Asked, Self), Status>;
    /// The name of the response in one piece.
    const OBJECT: &'static str;
    /// The choice of this index in one piece.
    fn choice(&self, index: usize, reply: &v1::GenerateResponse) -> Value;
    /// The chunk before a reply's first token, if there is one.
    fn opening(&self, head: &Head, index: usize) -> Option<Value>;
    /// Chunks for what a worker sent of the reply of this index.
    fn chunks(&mut self, head: &Head, index: usize, reply: &v1::GenerateResponse) -> Vec<Value>;
    /// The chunk with the usage, after all others.
    fn usage(&self, head: &Head, usage: Value) -> Value;
}

/// Routes of the API.
pub(crate) fn router(forwarder: Forwarder) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(complete::<chat::ChatShape>))
        .route("/v1/completions", post(complete::<completions::CompletionShape>))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .with_state(forwarder)
}

async fn complete<S: Shape>(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let mut asker = Asker::from(parts);
    let (asked, shape) = match read::<S>(&mut asker.headers, body).await {
        Ok(read) => read,
        Err(status) => {
            Observation::start(forwarder.metrics.clone(), S::OPERATION, "", &asker.headers).failed(&status);
            return error::response(&status);
        }
    };
    answer(&forwarder, asker, asked, shape)
        .await
        .unwrap_or_else(|status| error::response(&status))
}

async fn read<S: Shape>(headers: &mut HeaderMap, body: Body) -> Result<(Asked, S), Status> {
    let body = frames::read_whole(body, frames::MAX_REQUEST_BYTES).await?;
    let value = fields::parse(&body)?;
    let fields =
        Fields::of(&value).ok_or_else(|| Status::invalid_argument("the body is not a JSON object"))?;
    request::identify(fields, headers)?;
    S::read(fields)
}

async fn answer<S: Shape>(
    forwarder: &Forwarder,
    asker: Asker,
    asked: Asked,
    shape: S,
) -> Result<Response, Status> {
    let (request, candidates) = (&asked.request, asked.candidates);
    let (origin, chunks) =
        choices::ask(forwarder, S::OPERATION, S::PREFIX, asker, request, candidates).await?;
    let head = Head::new(&origin);
    let mut response = match asked.stream {
        true => sse::respond(chunks, Events::new(head, shape, &asked)),
        false => {
            let replies = chunks.whole().await.map_err(|status| origin.told(status))?;
            Json(whole(&shape, &head, replies, asked.choices)).into_response()
        }
    };
    origin.tell(&mut response);
    Ok(response)
}

/// The response in one piece.
fn whole<S: Shape>(shape: &S, head: &Head, replies: Vec<v1::GenerateResponse>, count: usize) -> Value {
    let usage = choices::usage(&replies);
    let replies = choices::best(replies, count);
    let choices = replies.iter().enumerate();
    json!({
        "id": head.id,
        "object": S::OBJECT,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": choices.map(|(index, reply)| shape.choice(index, reply)).collect::<Vec<_>>(),
        "usage": reply::usage(usage.as_ref()),
    })
}

/// The events of a completion.
pub(crate) struct Events<S> {
    head: Head,
    shape: S,
    choices: usize,
    include_usage: bool,
    usage: Option<v1::Usage>,
}

impl<S: Shape> Events<S> {
    pub(crate) fn new(head: Head, shape: S, asked: &Asked) -> Self {
        Self {
            head,
            shape,
            choices: asked.choices,
            include_usage: asked.include_usage,
            usage: None,
        }
    }

    /// With `include_usage`, chunks without usage say so.
    fn write(&self, mut chunk: Value, out: &mut String) {
        if self.include_usage && chunk["usage"].is_null() {
            chunk["usage"] = Value::Null;
        }
        sse::event(out, chunk);
    }
}

impl<S: Shape> sse::Events for Events<S> {
    fn open(&mut self, out: &mut String) {
        for index in 0..self.choices {
            if let Some(opening) = self.shape.opening(&self.head, index) {
                self.write(opening, out);
            }
        }
    }

    fn chunk(&mut self, index: usize, chunk: v1::GenerateResponse, out: &mut String) {
        let sofar = v1::GenerateResponse {
            usage: self.usage,
            ..Default::default()
        };
        self.usage = choices::usage([&sofar, &chunk]);
        for chunk in self.shape.chunks(&self.head, index, &chunk) {
            self.write(chunk, out);
        }
    }

    fn close(&mut self, out: &mut String) {
        if self.include_usage {
            let usage = self.shape.usage(&self.head, reply::usage(self.usage.as_ref()));
            self.write(usage, out);
        }
    }
}

async fn models(State(forwarder): State<Forwarder>) -> Response {
    let view = forwarder.view();
    let routes = view.snapshot.iter().flat_map(|snapshot| snapshot.routes.keys());
    let data: Vec<Value> = routes.map(|name| described(name)).collect();
    Json(json!({ "object": "list", "data": data })).into_response()
}

async fn model(State(forwarder): State<Forwarder>, Path(name): Path<String>) -> Response {
    match forwarder
        .view()
        .snapshot
        .as_ref()
        .is_some_and(|snapshot| snapshot.routes.contains_key(&name))
    {
        true => Json(described(&name)).into_response(),
        false => error::response(&Status::not_found(format!("model {name:?} is not served"))),
    }
}

/// When a model was made is not known here: 0.
fn described(name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "penstock" })
}
