//! What users thought of replies, counted where the reply counted.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Json, Router,
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::post,
};
use http::Request;
use penstock_client::View;
use penstock_plan::{Revision, Route};
use penstock_proto::v1::{self, feedback_request::Value};
use serde_json::json;
use tonic::Status;

use crate::{
    counts::{Entry, Ledger, Subject},
    error::bad_request,
    fields::{self, Fields},
    forward::Forwarder,
    frames,
    openai::error,
    reply_id::ReplyId,
};

/// Ids remembered at most, so that a reply is judged once; older ones could be judged again.
const MOST: usize = 65_536;
const MAX_COMMENT_BYTES: usize = 4096;

/// Replies that were judged.
#[derive(Debug, Default)]
pub(crate) struct Judged(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    ids: HashSet<ReplyId>,
    order: VecDeque<ReplyId>,
}

/// Routes over HTTP.
pub(crate) fn router(forwarder: Forwarder) -> Router {
    Router::new()
        .route("/v1/feedback", post(over_http))
        .with_state(forwarder)
}

async fn over_http(State(forwarder): State<Forwarder>, request: Request<Body>) -> Response {
    let given = async {
        let body = frames::read_whole(request.into_body(), frames::MAX_REQUEST_BYTES).await?;
        let request = read(&body)?;
        forwarder
            .judged
            .take(&forwarder.view(), &forwarder.ledger, &request)
    };
    match given.await {
        Ok(given) => Json(json!({ "model": given.model, "revision": given.revision })).into_response(),
        Err(status) => error::response(&status),
    }
}

pub(crate) fn read(body: &[u8]) -> Result<v1::FeedbackRequest, Status> {
    let value = fields::parse(body)?;
    let fields =
        Fields::of(&value).ok_or_else(|| Status::invalid_argument("the body is not a JSON object"))?;
    let value = match (fields.number("score")?, fields.text("thumb")?) {
        (Some(score), None) => Value::Score(score),
        (None, Some("up")) => Value::ThumbUp(true),
        (None, Some("down")) => Value::ThumbUp(false),
        (None, Some(other)) => {
            return Err(bad_request("thumb", format!("must be up or down, not {other:?}")));
        }
        (Some(_), Some(_)) => return Err(bad_request("thumb", "and score are both given: give one")),
        (None, None) => {
            return Err(bad_request(
                "score",
                "is missing: give a score from 0 to 1, or thumb: up or down",
            ));
        }
    };
    let text = |name| fields.text(name).map(|text| text.unwrap_or_default().to_owned());
    Ok(v1::FeedbackRequest {
        reply_id: text("id")?,
        value: Some(value),
        comment: text("comment")?,
    })
}

// === impl Judged ===

impl Judged {
    /// Counts feedback where its reply counted; once per reply, however often it is sent.
    pub(crate) fn take(
        &self,
        view: &View,
        ledger: &Ledger,
        request: &v1::FeedbackRequest,
    ) -> Result<v1::FeedbackResponse, Status> {
        let bad = is_bad(request)?;
        let id = ReplyId::parse(&request.reply_id)
            .map_err(|error| bad_request("reply_id", format!("is wrong: {error}")))?;
        let (route, revision) = find(view, id).ok_or_else(|| {
            Status::not_found(format!(
                "reply {:?} was given by a revision that is not in the plan any more",
                request.reply_id
            ))
        })?;
        if self.first(id) {
            entry(ledger, id, route, revision).judged(bad);
            tracing::info!(
                reply = request.reply_id,
                model = route.model,
                revision = revision.name,
                bad,
                comment = request.comment,
                "feedback"
            );
        }
        Ok(v1::FeedbackResponse {
            model: route.model.clone(),
            revision: revision.name.clone(),
        })
    }

    fn first(&self, id: ReplyId) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.ids.insert(id) {
            return false;
        }
        seen.order.push_back(id);
        if seen.order.len() > MOST
            && let Some(oldest) = seen.order.pop_front()
        {
            seen.ids.remove(&oldest);
        }
        true
    }
}

/// Where a reply counted. One of a trial that is over and forgotten here counts outside of all trials: begun anew, its
/// counts would look as if they had shrunk.
fn entry(ledger: &Ledger, id: ReplyId, route: &Route, revision: &Revision) -> Arc<Entry> {
    let present = Subject::of(route, revision);
    let then = id.trial(route).map(|(attempt, step)| Subject {
        attempt,
        step,
        ..present
    });
    if then == Some(present) {
        return ledger.entry(route, revision);
    }
    let outside = Subject {
        rollout_uid: "",
        attempt: 0,
        step: 0,
        ..present
    };
    let found = then.and_then(|then| ledger.find(then));
    found.unwrap_or_else(|| ledger.entry_of(outside, None))
}

fn is_bad(request: &v1::FeedbackRequest) -> Result<bool, Status> {
    if request.comment.len() > MAX_COMMENT_BYTES {
        let why = format!("is longer than {MAX_COMMENT_BYTES} bytes");
        return Err(bad_request("comment", why));
    }
    match request.value {
        Some(Value::ThumbUp(up)) => Ok(!up),
        Some(Value::Score(score)) if (0.0..=1.0).contains(&score) => Ok(score < 0.5),
        Some(Value::Score(score)) => Err(bad_request("score", format!("must be from 0 to 1, not {score}"))),
        None => Err(bad_request("value", "is missing: give a thumb or a score")),
    }
}

/// The revision that gave a reply; where two models have the same one, that of the same rollout.
fn find(view: &View, id: ReplyId) -> Option<(&Route, &Revision)> {
    let routes = view.snapshot.as_ref()?.routes.values();
    let all = routes.flat_map(|route| route.revisions().map(move |revision| (route, revision)));
    let by: Vec<(&Route, &Revision)> = all.filter(|(_, revision)| id.is_by(revision)).collect();
    let same = by.iter().find(|(route, _)| id.trial(route).is_some());
    same.or(by.first()).copied()
}
