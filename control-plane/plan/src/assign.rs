//! Which revision serves a request, and why.

use std::{fmt, hash::Hasher as _, net::IpAddr};

use xxhash_rust::xxh3::Xxh3;

use crate::{Canary, OnMissing, Ppm, Revision, Route};

/// Written before salt and key, so that another scheme gives other buckets.
const SCHEME: &[u8] = b"penstock.bucket.v1";

/// What assignment looks at.
pub struct Attributes<'a> {
    /// Revision that an operator's emergency override sends everything to.
    pub override_to: Option<&'a str>,
    /// Revision asked for by `x-model-version`.
    pub pin: Option<&'a str>,
    /// Looks up a metadata entry by its lower-case name.
    pub metadata: &'a dyn Fn(&str) -> Option<&'a str>,
    /// Address of the other end of the connection.
    pub peer: Option<IpAddr>,
    /// Who authenticated, where somebody did.
    pub subject: Option<&'a str>,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assignment<'a> {
    /// The revision that serves it.
    pub revision: &'a Revision,
    /// Why.
    pub reason: Reason,
    /// Its bucket, 0 to 999,999, where one decided.
    pub bucket: Option<u32>,
    /// Priority of the rule that matched, if one did.
    pub rule: Option<u32>,
}

/// Why a request was assigned to its revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// An operator's emergency override on this gateway.
    Override,
    /// Its key is held out of every rollout of the model; stable serves.
    HoldOut,
    /// A match rule decided.
    Rule,
    /// The canary could not take it; stable serves.
    Spill,
    /// It asked for this revision.
    Pin,
    /// It asked for a revision that was aborted; stable serves.
    PinRevoked,
    /// The bucket of its key decided.
    Bucket,
    /// It has no key: a bucket was drawn for it alone.
    Request,
    /// It has no key: the plan sends such requests to stable.
    MissingKey,
    /// Nothing is being rolled out.
    NoRollout,
}

/// Why a request cannot be assigned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AssignError {
    /// It asks for a revision that nobody published.
    #[error("model {model} has no revision {revision:?}; it has {}", known.join(", "))]
    UnknownRevision {
        /// The model.
        model: String,
        /// What was asked for.
        revision: String,
        /// What could have been asked for.
        known: Vec<String>,
    },
}

/// Assigns a request: override, pin, hold-out, match rules by priority, the bucket of its key, else stable.
///
/// `draw` is a random number for this request, used only where it has no key and the plan draws for such
/// requests.
///
/// # Errors
/// A pin to an unknown revision.
pub fn assign<'r>(
    route: &'r Route,
    attributes: &Attributes<'_>,
    draw: u64,
) -> Result<Assignment<'r>, AssignError> {
    let find = |name: &str| route.revisions().find(|revision| revision.name == name);
    if let Some(revision) = attributes.override_to.and_then(find) {
        return Ok(decided(revision, Reason::Override));
    }
    if let Some(pin) = attributes.pin {
        if route.revoked.iter().any(|name| name == pin) {
            return Ok(decided(&route.stable, Reason::PinRevoked));
        }
        return find(pin)
            .map(|revision| decided(revision, Reason::Pin))
            .ok_or_else(|| AssignError::UnknownRevision {
                model: route.model.clone(),
                revision: pin.to_owned(),
                known: route.revisions().map(|revision| revision.name.clone()).collect(),
            });
    }
    match &route.canary {
        Some(canary) => Ok(split(route, canary, attributes, draw)),
        None => Ok(decided(&route.stable, Reason::NoRollout)),
    }
}

/// The part of assignment that depends on the rollout.
fn split<'r>(route: &'r Route, canary: &'r Canary, attributes: &Attributes<'_>, draw: u64) -> Assignment<'r> {
    let key = route.sticky.key(attributes);
    let held_out = |key: &str| bucket(&holdout_salt(&route.model), key.as_bytes()) < route.holdout.get();
    if route.holdout > Ppm::ZERO && key.as_deref().is_some_and(held_out) {
        return decided(&route.stable, Reason::HoldOut);
    }
    let rule = route
        .rules
        .iter()
        .find(|rule| rule.matches(attributes, &route.sticky));
    let share = rule.map_or(canary.share, |rule| rule.canary);
    let priority = rule.map(|rule| rule.priority);
    let whole = rule.is_some() && (share == Ppm::ZERO || share == Ppm::ALL);
    let (bucket, reason) = match (&key, route.sticky.on_missing) {
        (None, OnMissing::Stable) if !whole => {
            return Assignment {
                rule: priority,
                ..decided(&route.stable, Reason::MissingKey)
            };
        }
        (Some(key), _) => (bucket(&route.rollout_uid, key.as_bytes()), Reason::Bucket),
        (None, _) => (scale(draw), Reason::Request),
    };
    let revision = if bucket < share.get() {
        &canary.revision
    } else {
        &route.stable
    };
    Assignment {
        revision,
        reason: if rule.is_some() { Reason::Rule } else { reason },
        bucket: (!whole).then_some(bucket),
        rule: priority,
    }
}

const fn decided(revision: &Revision, reason: Reason) -> Assignment<'_> {
    Assignment {
        revision,
        reason,
        bucket: None,
        rule: None,
    }
}

/// The hold-out's salt is the model's, so that the same keys stay out of every rollout.
fn holdout_salt(model: &str) -> String {
    format!("holdout/{model}")
}

/// The bucket of a key, 0 to 999,999: `(xxh3_64(scheme ‖ 0 ‖ salt ‖ 0 ‖ key) · 1,000,000) >> 64`.
///
/// The canary gets the buckets below its share, so raising the share moves nobody back and lowering it takes
/// back those who came last.
pub fn bucket(salt: &str, key: &[u8]) -> u32 {
    let mut hash = Xxh3::new();
    for part in [SCHEME, &[0], salt.as_bytes(), &[0]] {
        hash.write(part);
    }
    hash.write(key);
    scale(hash.finish())
}

/// Maps 64 random bits to 0..1,000,000 without a division and without bias that counts (below 1 in 10¹³).
fn scale(bits: u64) -> u32 {
    // The product is below 10⁶ · 2⁶⁴, so the shifted value fits.
    ((u128::from(bits) * 1_000_000) >> 64) as u32
}

// === impl Attributes ===

impl<'a> Attributes<'a> {
    /// A request that has this metadata and nothing else.
    pub const fn new(metadata: &'a dyn Fn(&str) -> Option<&'a str>) -> Self {
        Self {
            override_to: None,
            pin: None,
            metadata,
            peer: None,
            subject: None,
        }
    }
}

// === impl Reason ===

impl Reason {
    /// As it stands in metadata and telemetry.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Override => "override",
            Self::HoldOut => "hold_out",
            Self::Rule => "rule",
            Self::Spill => "spill",
            Self::Pin => "pin",
            Self::PinRevoked => "pin_revoked",
            Self::Bucket => "bucket",
            Self::Request => "request",
            Self::MissingKey => "missing_key",
            Self::NoRollout => "no_rollout",
        }
    }
}

impl Reason {
    /// Whether the split decided, by a key or by lot: only such requests may be compared between its sides.
    pub const fn is_split(self) -> bool {
        matches!(self, Self::Bucket | Self::Request)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests;
