//! Routes: which revisions serve a model, and with what share.

use std::{borrow::Cow, collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{Attributes, Mirror, Phase, Ppm, PublishedRevision, Rollout, Rule, Trial, client_address};

/// A revision by name and content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Name, e.g. `v2`.
    pub name: String,
    /// BLAKE3 digest of its manifest, in hex.
    pub digest: String,
}

/// The side of a split that is being tried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// The revision being tried.
    pub revision: Revision,
    /// Its share of the keys.
    pub share: Ppm,
    /// Workers that a gateway must reach before it applies the route.
    #[serde(default)]
    pub min_ready: u32,
}

/// Where requests for one model go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Name of the model.
    pub model: String,
    /// Serves whatever nothing else claims.
    pub stable: Revision,
    /// The revision being tried, if any.
    pub canary: Option<Canary>,
    /// The rollout's uid, salt of the bucket; empty without a rollout.
    pub rollout_uid: String,
    /// Which of the rollout's plans this is; 0 without a rollout.
    pub generation: u64,
    /// What keeps a user on one side.
    pub sticky: Sticky,
    /// Revisions that a pin may name, beside stable and canary.
    pub pinnable: Vec<Revision>,
    /// Names of aborted revisions: a pin to one is ignored.
    pub revoked: Vec<String>,
    /// In the order of their priority; the first that matches decides.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Share of the keys that no rollout of this model touches.
    #[serde(default)]
    pub holdout: Ppm,
    /// Copies of requests to the canary.
    #[serde(default)]
    pub mirror: Option<Mirror>,
    /// What is being observed; absent without a rollout.
    #[serde(default)]
    pub trial: Option<Trial>,
}

/// What keeps a user on one side of a split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sticky {
    /// Tried in order; the first that a request has is its key.
    pub keys: Vec<StickyKey>,
    /// What happens to a request that has none.
    pub on_missing: OnMissing,
    /// Proxies in front of the gateway whose `x-forwarded-for` entries are believed, for `client_ip`.
    #[serde(default)]
    pub trusted_hops: u8,
}

/// A request attribute that may be a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum StickyKey {
    /// `metadata:NAME`: an entry of gRPC metadata or an HTTP header, in lower case.
    Metadata(String),
    /// `auth:subject`: who authenticated.
    Subject,
    /// `client_ip`: the client's address.
    ClientIp,
}

/// A sticky key that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a sticky key: write metadata:NAME, for example metadata:x-user-id, auth:subject or client_ip"
)]
pub struct StickyKeyError(String);

/// What happens to a request without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMissing {
    /// A key is drawn for this request alone.
    #[default]
    Request,
    /// Stable serves it.
    Stable,
}

/// Published revisions by model, in the order in which they were published.
pub type Published = BTreeMap<String, Vec<PublishedRevision>>;

/// The routes of every model: those with a rollout, and the first revision of those without.
///
/// A rollout whose stable revision is not published has no route: there is nothing to hold a worker to.
pub fn build_routes(rollouts: &[Rollout], published: &Published) -> BTreeMap<String, Route> {
    let mut routes = BTreeMap::new();
    for (model, revisions) in published {
        let rollout = rollouts.iter().find(|rollout| rollout.model == *model);
        let route = match rollout {
            Some(rollout) => rollout_route(rollout, revisions),
            None => plain_route(model, revisions),
        };
        if let Some(route) = route {
            routes.insert(model.clone(), route);
        }
    }
    routes
}

fn plain_route(model: &str, revisions: &[PublishedRevision]) -> Option<Route> {
    let first = Revision::from(revisions.first()?);
    Some(Route {
        model: model.to_owned(),
        pinnable: others(revisions, &[&first.name], &[]),
        stable: first,
        ..Route::default()
    })
}

fn rollout_route(rollout: &Rollout, revisions: &[PublishedRevision]) -> Option<Route> {
    let find = |name: &str| revisions.iter().find(|r| r.revision == name).map(Revision::from);
    let stable = find(rollout.serving_stable())?;
    let canary = find(&rollout.canary)
        .filter(|_| rollout.routes_canary())
        .map(|revision| Canary {
            revision,
            share: rollout.share,
            min_ready: if rollout.share > Ppm::ZERO {
                rollout.plan.canary.min_ready
            } else {
                0
            },
        });
    // Rules and mirror are for the canary: they come and go with it.
    let tried = canary.is_some() && rollout.phase != Phase::Promoting;
    let routed = [
        stable.name.as_str(),
        canary.as_ref().map_or("", |c| &c.revision.name),
    ];
    Some(Route {
        model: rollout.model.clone(),
        pinnable: others(revisions, &routed, &rollout.revoked),
        stable,
        rollout_uid: rollout.uid.clone(),
        generation: rollout.generation,
        sticky: rollout.sticky.clone(),
        revoked: rollout.revoked.clone(),
        rules: if tried { rollout.plan.rules() } else { Vec::new() },
        holdout: if tried { rollout.plan.hold_out.0 } else { Ppm::ZERO },
        mirror: rollout.plan.mirror().filter(|_| tried),
        trial: canary.is_some().then(|| Trial {
            attempt: rollout.attempt,
            step: rollout.trial,
            thresholds: rollout.plan.thresholds(),
            window_s: u32::try_from(rollout.plan.analysis.window.get().as_secs()).unwrap_or(u32::MAX),
        }),
        canary,
    })
}

fn others(revisions: &[PublishedRevision], routed: &[&str], revoked: &[String]) -> Vec<Revision> {
    let free =
        |r: &&PublishedRevision| !routed.contains(&r.revision.as_str()) && !revoked.contains(&r.revision);
    revisions.iter().filter(free).map(Revision::from).collect()
}

// === impl Revision ===

impl Revision {
    /// A revision by name and digest.
    pub fn new(name: impl Into<String>, digest: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            digest: digest.into(),
        }
    }
}

impl From<&PublishedRevision> for Revision {
    fn from(published: &PublishedRevision) -> Self {
        Self::new(&published.revision, &published.digest)
    }
}

// === impl Route ===

impl Route {
    /// Every revision that a request can reach: stable, canary, then what a pin may name.
    pub fn revisions(&self) -> impl Iterator<Item = &Revision> {
        let canary = self.canary.iter().map(|canary| &canary.revision);
        std::iter::once(&self.stable).chain(canary).chain(&self.pinnable)
    }
}

// === impl Sticky ===

/// By user: `metadata:x-user-id`; a request without one is drawn for by itself.
impl Default for Sticky {
    fn default() -> Self {
        Self {
            keys: vec![StickyKey::Metadata("x-user-id".into())],
            on_missing: OnMissing::Request,
            trusted_hops: 0,
        }
    }
}

impl Sticky {
    /// The request's key: the first of the attributes that it has.
    pub fn key<'a>(&self, attributes: &Attributes<'a>) -> Option<Cow<'a, str>> {
        self.keys.iter().find_map(|key| match key {
            StickyKey::Metadata(name) => (attributes.metadata)(name)
                .filter(|value| !value.is_empty())
                .map(Cow::Borrowed),
            StickyKey::Subject => attributes.subject.map(Cow::Borrowed),
            StickyKey::ClientIp => {
                client_address(attributes, self.trusted_hops).map(|address| address.to_string().into())
            }
        })
    }
}

// === impl StickyKey ===

impl fmt::Display for StickyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Metadata(name) => write!(f, "metadata:{name}"),
            Self::Subject => f.pad("auth:subject"),
            Self::ClientIp => f.pad("client_ip"),
        }
    }
}

impl FromStr for StickyKey {
    type Err = StickyKeyError;

    fn from_str(value: &str) -> Result<Self, StickyKeyError> {
        match value {
            "auth:subject" => return Ok(Self::Subject),
            "client_ip" => return Ok(Self::ClientIp),
            _ => {}
        }
        let name = value
            .strip_prefix("metadata:")
            .or_else(|| value.strip_prefix("header:"))
            .unwrap_or_default();
        let token = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty() || !name.bytes().all(token) {
            return Err(StickyKeyError(value.to_owned()));
        }
        Ok(Self::Metadata(name.to_ascii_lowercase()))
    }
}

impl TryFrom<String> for StickyKey {
    type Error = StickyKeyError;

    fn try_from(value: String) -> Result<Self, StickyKeyError> {
        value.parse()
    }
}

impl From<StickyKey> for String {
    fn from(key: StickyKey) -> Self {
        key.to_string()
    }
}

#[cfg(test)]
mod tests;
