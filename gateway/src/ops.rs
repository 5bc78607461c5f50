//! The operations port's own calls: emergency overrides.

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    response::{IntoResponse as _, Response},
    routing::{delete, get, post},
};
use http::Request;
use serde_json::{Value, json};
use tonic::Status;

use crate::{
    fields::{self, Fields},
    forward::Forwarder,
    frames,
    openai::error,
    overrides::{self, Override, Wish},
};

/// Routes of the port, beside those that every process has.
pub(crate) fn router(forwarder: Forwarder) -> Router {
    Router::new()
        .route("/override", post(set))
        .route("/override/{*model}", delete(end))
        .route("/overrides", get(list))
        .with_state(forwarder)
}

async fn set(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    let done = async {
        let body = frames::read_whole(request.into_body(), frames::MAX_REQUEST_BYTES).await?;
        let wish = read(&body)?;
        let view = forwarder.view();
        let record = forwarder.overrides.set(&view, wish, overrides::now_ms())?;
        // An override without workers is no error: they may be what the operator starts next.
        let workers = view.endpoints.endpoints.iter().filter(|endpoint| {
            let mut served = endpoint.revisions.iter();
            served.any(|served| served.model == record.model && served.revision == record.revision)
        });
        let mut shown = shown(&record);
        shown["workers"] = workers.count().into();
        shown["kept"] = save(&forwarder).await.into();
        Ok(shown)
    };
    answer(done.await)
}

async fn end(State(forwarder): State<Forwarder>, Path(model): Path<String>) -> Response {
    let done = async {
        let record = forwarder.overrides.end(&model, overrides::now_ms())?;
        save(&forwarder).await;
        Ok(shown(&record))
    };
    answer(done.await)
}

async fn list(State(forwarder): State<Forwarder>) -> Response {
    let records = forwarder.overrides.list(overrides::now_ms());
    let records: Vec<Value> = records.iter().map(shown).collect();
    Json(json!({ "overrides": records })).into_response()
}

fn read(body: &[u8]) -> Result<Wish, Status> {
    let value = fields::parse(body)?;
    let fields =
        Fields::of(&value).ok_or_else(|| Status::invalid_argument("the body is not a JSON object"))?;
    let text = |name| fields.text(name).map(|text| text.unwrap_or_default().to_owned());
    Ok(Wish {
        model: text("model")?,
        revision: text("revision")?,
        ttl_s: fields.integer("ttl_s", 0, u32::MAX)?,
        actor: text("actor")?,
        reason: text("reason")?,
    })
}

/// Whether a restart will know of it.
async fn save(forwarder: &Forwarder) -> bool {
    let overrides = forwarder.overrides.clone();
    tokio::task::spawn_blocking(move || overrides.save())
        .await
        .unwrap_or(false)
}

fn shown(record: &Override) -> Value {
    json!({
        "id": record.id,
        "model": record.model,
        "revision": record.revision,
        "actor": record.actor,
        "reason": record.reason,
        "since_ms": record.since_ms,
        "until_ms": record.until_ms,
        "ended_ms": record.ended_ms,
    })
}

fn answer(done: Result<Value, Status>) -> Response {
    match done {
        Ok(value) => Json(value).into_response(),
        Err(status) => error::response(&status),
    }
}
