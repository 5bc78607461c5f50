//! The web dashboard: one page, its state as server-sent events, and the operators' buttons.
//!
//! The page is embedded; it loads nothing from anywhere else. What it shows is what `Admin` says, and its buttons
//! do what the calls of the same names do, with the same audit.

use std::{convert::Infallible, time::Duration};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{
        Html, IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
    routing::{get, post},
};
use penstock_proto::v1::{self, admin_server::Admin as _};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Code, Request, Status};

use crate::admin::AdminService;

mod json;

const PAGE: &str = include_str!("dashboard/page.html");
/// The state is told this often while somebody looks.
const EVERY: Duration = Duration::from_secs(1);
/// Audit records that are shown.
const RECORDS: u32 = 50;
/// What the page may do: nothing but talk to this server.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What a button sends.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Press {
    uid: String,
    expect_revision: Option<u64>,
    reason: String,
}

/// The dashboard's routes.
pub(crate) fn router(admin: AdminService) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/api/state", get(state))
        .route("/api/events", get(events))
        .route("/api/rollouts/{model}/{action}", post(act))
        .with_state(admin)
}

async fn page() -> Response {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(PAGE)).into_response()
}

async fn state(State(admin): State<AdminService>) -> Response {
    match json::state(&admin, RECORDS).await {
        Ok(state) => Json(state).into_response(),
        Err(status) => failed(&status),
    }
}

/// The whole state each second: a page that comes back needs nothing from before.
async fn events(State(admin): State<AdminService>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let (told, stream) = mpsc::channel(1);
    let (streams, stop) = (admin.streams.clone(), admin.stop.clone());
    streams.spawn(async move {
        loop {
            let event = match json::state(&admin, RECORDS).await {
                Ok(state) => Event::default().data(state.to_string()),
                Err(status) => Event::default().event("trouble").data(one_line(status.message())),
            };
            if told.send(Ok(event)).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = stop.cancelled() => return,
            }
        }
    });
    Sse::new(ReceiverStream::new(stream)).keep_alive(KeepAlive::default())
}

/// A button. Only pages of this server may press it: a browser says where a request comes from.
async fn act(
    State(admin): State<AdminService>,
    Path((model, action)): Path<(String, String)>,
    headers: HeaderMap,
    Json(press): Json<Press>,
) -> Response {
    if !same_origin(&headers) {
        return (StatusCode::FORBIDDEN, "pages of other sites may not do this\n").into_response();
    }
    let done = call(&admin, model, &action, press).await;
    match done {
        Ok(rollout) => Json(json::rollout(&rollout)).into_response(),
        Err(status) => failed(&status),
    }
}

async fn call(
    admin: &AdminService,
    model: String,
    action: &str,
    press: Press,
) -> Result<v1::Rollout, Status> {
    let actor = "dashboard".to_owned();
    let change = v1::ChangeRolloutRequest {
        model: model.clone(),
        uid: press.uid.clone(),
        expect_revision: press.expect_revision,
        reason: press.reason.clone(),
        actor: actor.clone(),
        dry_run: false,
    };
    let answer = match action {
        "pause" => admin.pause_rollout(Request::new(change)).await,
        "resume" => admin.resume_rollout(Request::new(change)).await,
        "approve" => admin.approve_rollout(Request::new(change)).await,
        "retry" => admin.retry_rollout(Request::new(change)).await,
        "promote" => {
            let request = v1::PromoteRolloutRequest {
                model,
                expect_revision: press.expect_revision,
                reason: press.reason,
                actor,
                dry_run: false,
            };
            admin.promote_rollout(Request::new(request)).await
        }
        "abort" => {
            let request = v1::AbortRolloutRequest {
                model,
                uid: press.uid,
                reason: press.reason,
                actor,
                dry_run: false,
            };
            admin.abort_rollout(Request::new(request)).await
        }
        other => return Err(Status::not_found(format!("there is no action {other:?}"))),
    };
    answer.map(tonic::Response::into_inner)
}

/// Whether a request comes from a page of this server, or from no page at all.
fn same_origin(headers: &HeaderMap) -> bool {
    let text = |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    match (text(header::ORIGIN), text(header::HOST)) {
        (None, _) => true,
        (Some(origin), Some(host)) => origin
            .split_once("://")
            .is_some_and(|(_, authority)| authority == host),
        (Some(_), None) => false,
    }
}

fn failed(status: &Status) -> Response {
    let code = match status.code() {
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Aborted | Code::FailedPrecondition | Code::AlreadyExists => StatusCode::CONFLICT,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    (code, Json(serde_json::json!({ "error": status.message() }))).into_response()
}

fn one_line(text: &str) -> String {
    text.replace(['\r', '\n'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_this_server_may_press_buttons() {
        let with = |origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, "127.0.0.1:8090".parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            same_origin(&headers)
        };
        assert!(with(None) && with(Some("http://127.0.0.1:8090")));
        assert!(
            !with(Some("http://evil.example"))
                && !with(Some("null"))
                && !with(Some("http://127.0.0.1:80900"))
        );
    }

    #[test]
    fn the_page_loads_nothing_from_elsewhere_and_is_small() {
        assert!(
            !PAGE.contains("http://") && !PAGE.contains("https://"),
            "a link leads away"
        );
        assert!(PAGE.len() < 40_000, "{} bytes", PAGE.len());
    }
}
