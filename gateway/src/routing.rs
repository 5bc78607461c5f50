//! Which revision serves a request: the view's route for its model, and the assignment in it.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use penstock_client::View;
use penstock_plan::{AssignError, Attributes, Endpoint, Reason, Revision, Route, Snapshot};
use penstock_proto::metadata;
use tonic::{Status, metadata::MetadataMap};

use crate::error;

/// Where a request goes. Holds the view that decided, so that snapshot and endpoints belong together.
#[derive(Debug, Clone)]
pub(crate) struct Assigned {
    pub(crate) model: String,
    pub(crate) revision: Revision,
    pub(crate) reason: Reason,
    pub(crate) epoch: u64,
    view: Arc<View>,
}

/// Assigns a request for `model`, which may be empty where there is but one, or pin a revision as NAME@REVISION.
pub(crate) fn assign(view: &Arc<View>, model: &str, headers: &HeaderMap) -> Result<Assigned, Status> {
    let Some(snapshot) = &view.snapshot else {
        return Err(error::unavailable(
            "this gateway has no routes yet: no control plane has told it any",
        ));
    };
    let (name, suffix) = match model.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (model, None),
    };
    let route = route(snapshot, name)?;
    let header = text(headers, metadata::MODEL_VERSION);
    let pin = match (suffix, header) {
        (Some(suffix), Some(header)) if suffix != header => {
            let why = format!(
                "names revision {suffix:?}, {} names {header:?}",
                metadata::MODEL_VERSION
            );
            return Err(error::bad_request("model", why));
        }
        (suffix, header) => suffix.or(header),
    };
    let lookup = |name: &str| text(headers, name);
    let attributes = Attributes {
        pin,
        ..Attributes::new(&lookup)
    };
    let assignment =
        penstock_plan::assign(route, &attributes, rand::random()).map_err(|error| match &error {
            AssignError::UnknownRevision { .. } => Status::not_found(error.to_string()),
            _ => Status::internal(error.to_string()),
        })?;
    Ok(Assigned {
        model: route.model.clone(),
        revision: assignment.revision.clone(),
        reason: assignment.reason,
        epoch: snapshot.epoch,
        view: view.clone(),
    })
}

fn route<'s>(snapshot: &'s Snapshot, name: &str) -> Result<&'s Route, Status> {
    if let Some(route) = snapshot.routes.get(name) {
        return Ok(route);
    }
    let mut routes = snapshot.routes.values();
    match (name.is_empty(), routes.next(), routes.next()) {
        (true, Some(only), None) => Ok(only),
        (_, None, _) => Err(Status::not_found(format!(
            "model {name:?} is not served; no model is"
        ))),
        (true, ..) => Err(error::bad_request(
            "model",
            format!("is missing; there are {}", models(snapshot)),
        )),
        (false, ..) => Err(Status::not_found(format!(
            "model {name:?} is not served; there are {}",
            models(snapshot)
        ))),
    }
}

fn models(snapshot: &Snapshot) -> String {
    let names: Vec<&str> = snapshot.routes.keys().map(String::as_str).collect();
    names.join(", ")
}

/// A header's text; an empty one counts as absent. HTTP clients write names of users in UTF-8.
fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let value = headers.get(name)?;
    std::str::from_utf8(value.as_bytes())
        .ok()
        .filter(|value| !value.is_empty())
}

// === impl Assigned ===

impl Assigned {
    /// Whoever serves this very revision, by content.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let serves =
            |endpoint: &&Endpoint| endpoint.serves(&self.model, &self.revision.name, &self.revision.digest);
        self.view.endpoints.endpoints.iter().filter(serves)
    }

    /// Sets `x-model-version`, `x-rollout-epoch` and `x-assignment-reason`.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        // A name that no header can hold cannot be asked for in one either.
        if let Ok(revision) = HeaderValue::from_str(&self.revision.name) {
            headers.insert(metadata::MODEL_VERSION, revision);
        }
        headers.insert(metadata::ROLLOUT_EPOCH, self.epoch.into());
        headers.insert(
            metadata::ASSIGNMENT_REASON,
            HeaderValue::from_static(self.reason.as_str()),
        );
    }

    /// Writes the assignment into the metadata of an error.
    pub(crate) fn told(&self, mut status: Status) -> Status {
        let mut headers = std::mem::take(status.metadata_mut()).into_headers();
        self.tell(&mut headers);
        *status.metadata_mut() = MetadataMap::from_headers(headers);
        status
    }
}
