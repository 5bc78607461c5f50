//! `penstock.v1.Inference` as the gateway serves it. Generate and Tokenize pass through; ListModels is answered here.

use std::time::Duration;

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::post,
};
use http::{HeaderMap, HeaderValue, Request, header};
use http_body_util::{BodyExt as _, Full};
use penstock_client::View;
use penstock_proto::{metadata, v1};
use penstock_telemetry::semconv::value;
use prost::Message as _;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::{
    error,
    forward::{self, Call, Forwarder, GENERATE, Reply, SCORE},
    frames::Message,
    observe::{self, Observation},
    reply_id::{self, ReplyId},
    timeout,
};

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Routes of the service.
pub(crate) fn router(forwarder: Forwarder) -> Router {
    Router::new()
        .route("/penstock.v1.Inference/Generate", post(generate))
        .route("/penstock.v1.Inference/Tokenize", post(tokenize))
        .route("/penstock.v1.Inference/Score", post(score))
        .route("/penstock.v1.Inference/ListModels", post(list_models))
        .route("/penstock.v1.Inference/Feedback", post(feedback))
        .with_state(forwarder)
}

async fn generate(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    pass(&forwarder, GENERATE, value::GENERATE, request).await
}

async fn tokenize(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    pass(&forwarder, "Tokenize", observe::TOKENIZE, request).await
}

async fn score(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    pass(&forwarder, SCORE, observe::SCORE, request).await
}

async fn list_models(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    match is_grpc(request.headers()) {
        true => answer(&models(&forwarder.view())),
        false => not_grpc(),
    }
}

async fn feedback(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    if !is_grpc(request.headers()) {
        return not_grpc();
    }
    let (parts, body) = request.into_parts();
    let given = async {
        let message = Message::read(&parts.headers, body).await?;
        let request = v1::FeedbackRequest::decode(message.payload())
            .map_err(|error| Status::invalid_argument(format!("the request cannot be read: {error}")))?;
        forwarder
            .judged
            .take(&forwarder.view(), &forwarder.ledger, &request)
    };
    match given.await {
        Ok(given) => answer(&given),
        Err(status) => status.into_http(),
    }
}

async fn pass(
    forwarder: &Forwarder,
    method: &'static str,
    operation: &'static str,
    request: Request<Body>,
) -> Response {
    if !is_grpc(request.headers()) {
        return not_grpc();
    }
    let (parts, body) = request.into_parts();
    let peer = forward::peer(&parts.extensions);
    let headers = parts.headers;
    let observe = |model: &str| Observation::start(forwarder.metrics.clone(), operation, model, &headers);
    let (message, deadline) = match read(&headers, body, forwarder.default_timeout).await {
        Ok(read) => read,
        Err(status) => {
            observe("").failed(&status);
            return status.into_http();
        }
    };
    let observation = observe(message.model().unwrap_or_default());
    let call = Call {
        method,
        headers,
        peer,
        message,
        deadline,
        observation,
    };
    match forwarder.call(call).await {
        Ok(reply) => respond(method, reply),
        Err(status) => status.into_http(),
    }
}

async fn read(
    headers: &HeaderMap,
    body: Body,
    default_timeout: Duration,
) -> Result<(Message, Option<Instant>), Status> {
    let deadline = timeout::deadline(headers, default_timeout)?;
    let message = match deadline {
        Some(at) => timeout_at(at, Message::read(headers, body))
            .await
            .unwrap_or_else(|_| Err(error::deadline()))?,
        None => Message::read(headers, body).await?,
    };
    Ok((message, deadline))
}

fn respond(method: &str, reply: Reply) -> Response {
    let Reply {
        headers,
        assigned,
        body,
    } = reply;
    let mut response = Response::new(Body::new(body));
    *response.headers_mut() = headers;
    // Those describe the hop behind.
    for name in [header::CONTENT_LENGTH, header::DATE] {
        response.headers_mut().remove(name);
    }
    for name in [
        Status::GRPC_STATUS,
        Status::GRPC_MESSAGE,
        Status::GRPC_STATUS_DETAILS,
    ] {
        response.headers_mut().remove(name);
    }
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    assigned.tell(response.headers_mut());
    if method == GENERATE
        && let Ok(id) = HeaderValue::try_from(ReplyId::draw(&assigned).text(reply_id::PREFIX))
    {
        response.headers_mut().insert(metadata::REPLY_ID, id);
    }
    response
}

/// A reply of one message.
fn answer(message: &impl prost::Message) -> Response {
    let mut trailers = HeaderMap::new();
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    let body =
        Full::new(Message::encode(message).framed()).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    response
}

fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .map_or(&b""[..], HeaderValue::as_bytes);
    kind.starts_with(b"application/grpc") && !kind.starts_with(b"application/grpc-web")
}

/// Whoever does not speak gRPC is told so in HTTP.
fn not_grpc() -> Response {
    let message = "this is a gRPC method: content-type must be application/grpc\n";
    (http::StatusCode::UNSUPPORTED_MEDIA_TYPE, message).into_response()
}

/// Models and revisions of the view.
fn models(view: &View) -> v1::ListModelsResponse {
    let routes = view.snapshot.iter().flat_map(|snapshot| snapshot.routes.values());
    let models = routes.map(|route| {
        let revisions = route.revisions().map(|revision| v1::RevisionInfo {
            name: revision.name.clone(),
            digest: revision.digest.clone(),
            context_length: context_length(view, &route.model, revision),
        });
        v1::ModelInfo {
            name: route.model.clone(),
            stable: route.stable.name.clone(),
            revisions: revisions.collect(),
        }
    });
    v1::ListModelsResponse {
        models: models.collect(),
    }
}

/// The least that a worker offers: a request may land on any; 0 where none serves the revision.
fn context_length(view: &View, model: &str, revision: &penstock_plan::Revision) -> u32 {
    let served = view
        .endpoints
        .endpoints
        .iter()
        .flat_map(|endpoint| &endpoint.revisions);
    let same = |served: &&penstock_plan::ServedRevision| {
        served.model == model && served.revision == revision.name && served.digest == revision.digest
    };
    served
        .filter(same)
        .map(|served| served.context_length)
        .min()
        .unwrap_or(0)
}
