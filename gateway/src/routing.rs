//! Which revision serves a request: the view's route for its model, and the assignment in it.

use std::{borrow::Cow, net::IpAddr, sync::Arc};

use http::{HeaderMap, HeaderValue};
use penstock_client::View;
use penstock_plan::{
    AssignError, Attributes, Endpoint, EndpointSet, FORWARDED_FOR, Reason, Revision, Route, Snapshot,
};
use penstock_proto::metadata;
use tonic::{Status, metadata::MetadataMap};

use crate::{
    counts::{self, Entry, Ledger},
    error,
    overrides::Overrides,
};

/// Where a request goes. Holds the view that decided, so that snapshot and endpoints belong together.
#[derive(Debug, Clone)]
pub(crate) struct Assigned {
    pub(crate) model: String,
    pub(crate) revision: Revision,
    pub(crate) reason: Reason,
    /// Priority of the rule that decided, if one did.
    pub(crate) rule: Option<u32>,
    pub(crate) epoch: u64,
    /// Hash of the sticky key, if the request has one.
    pub(crate) key: Option<u64>,
    view: Arc<View>,
    endpoints: Arc<EndpointSet>,
}

/// What assignment looks at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller<'c> {
    pub(crate) headers: &'c HeaderMap,
    /// Address of the other end of the connection.
    pub(crate) peer: Option<IpAddr>,
}

/// Assigns a request for `model`, which may be empty where there is but one, or pin a revision as NAME@REVISION.
pub(crate) fn assign(
    view: &Arc<View>,
    overrides: &Overrides,
    model: &str,
    caller: Caller<'_>,
) -> Result<Assigned, Status> {
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
    let forwarded = forwarded(caller.headers);
    let lookup = |name: &str| match name {
        FORWARDED_FOR => forwarded.as_deref(),
        name => text(caller.headers, name),
    };
    let overridden = overrides.revision(&route.model);
    let attributes = Attributes {
        override_to: overridden.as_deref(),
        pin: pin(suffix, text(caller.headers, metadata::MODEL_VERSION))?,
        peer: caller.peer,
        ..Attributes::new(&lookup)
    };
    let assignment =
        penstock_plan::assign(route, &attributes, rand::random()).map_err(|error| match &error {
            AssignError::UnknownRevision { .. } => Status::not_found(error.to_string()),
            _ => Status::internal(error.to_string()),
        })?;
    let key = route.sticky.key(&attributes);
    Ok(Assigned {
        model: route.model.clone(),
        revision: assignment.revision.clone(),
        reason: assignment.reason,
        rule: assignment.rule,
        epoch: snapshot.epoch,
        key: key.map(|key| counts::key_hash(&key)),
        view: view.clone(),
        endpoints: view.endpoints.clone(),
    })
}

/// The revision asked for, by the model's name or by metadata.
fn pin<'p>(suffix: Option<&'p str>, header: Option<&'p str>) -> Result<Option<&'p str>, Status> {
    match (suffix, header) {
        (Some(suffix), Some(header)) if suffix != header => {
            let why = format!(
                "names revision {suffix:?}, {} names {header:?}",
                metadata::MODEL_VERSION
            );
            Err(error::bad_request("model", why))
        }
        (suffix, header) => Ok(suffix.or(header)),
    }
}

/// A proxy may add its entry as a header of its own: together they are one list, and what counts is its end.
fn forwarded(headers: &HeaderMap) -> Option<Cow<'_, str>> {
    let mut lines = headers.get_all(FORWARDED_FOR).iter();
    let first = std::str::from_utf8(lines.next()?.as_bytes()).ok()?;
    lines.try_fold(Cow::Borrowed(first), |sofar, line| {
        let line = std::str::from_utf8(line.as_bytes()).ok()?;
        Some(Cow::Owned(format!("{sofar},{line}")))
    })
}

/// The route of a model; of the only one where no name is given.
pub(crate) fn route<'s>(snapshot: &'s Snapshot, name: &str) -> Result<&'s Route, Status> {
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
    /// The route that decided.
    pub(crate) fn route(&self) -> Option<&Route> {
        self.view.snapshot.as_ref()?.routes.get(&self.model)
    }

    /// Where the request counts: with its revision, in the trial that its route was in.
    pub(crate) fn counts(&self, ledger: &Ledger) -> Option<Arc<Entry>> {
        Some(ledger.entry(self.route()?, &self.revision))
    }

    /// The same request as the canary would get it, and the tokens that it may generate there, where the route wants
    /// copies of such requests and `draw`, 0 to 999,999, says that this is one. Who was put on stable by name, by
    /// hold-out or for want of a key has no part in the rollout, and neither has a copy.
    pub(crate) fn mirrored(&self, draw: u32) -> Option<(Self, u32)> {
        let route = self.route()?;
        let (mirror, canary) = (route.mirror.as_ref()?, route.canary.as_ref()?);
        let takes_part = matches!(self.reason, Reason::Bucket | Reason::Request | Reason::Rule);
        let is_one = takes_part && self.revision == route.stable && draw < mirror.share.get();
        is_one.then(|| {
            let copy = Self {
                revision: canary.revision.clone(),
                ..self.clone()
            };
            (copy, mirror.max_output_tokens)
        })
    }

    /// Looks at the workers of a newer view. Revision, epoch and counts stay those that decided.
    pub(crate) fn refresh(&mut self, newer: Arc<View>) {
        self.endpoints = newer.endpoints.clone();
    }

    /// Whoever serves this very revision, by content.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let serves =
            |endpoint: &&Endpoint| endpoint.serves(&self.model, &self.revision.name, &self.revision.digest);
        self.endpoints.endpoints.iter().filter(serves)
    }

    /// Sets `x-model-version`, `x-rollout-epoch`, `x-assignment-reason` and `x-assignment-rule`.
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
        match self.rule {
            Some(priority) => headers.insert(metadata::ASSIGNMENT_RULE, priority.into()),
            None => headers.remove(metadata::ASSIGNMENT_RULE),
        };
    }

    /// Writes the assignment into the metadata of an error.
    pub(crate) fn told(&self, mut status: Status) -> Status {
        let mut headers = std::mem::take(status.metadata_mut()).into_headers();
        self.tell(&mut headers);
        *status.metadata_mut() = MetadataMap::from_headers(headers);
        status
    }
}
