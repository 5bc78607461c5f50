//! Which revision serves a request, and why.

use std::{fmt, hash::Hasher as _};

use xxhash_rust::xxh3::Xxh3;

use crate::{OnMissing, Revision, Route};

/// Written before salt and key, so that another scheme gives other buckets.
const SCHEME: &[u8] = b"penstock.bucket.v1";

/// What assignment looks at.
pub struct Attributes<'a> {
    /// Revision asked for by `x-model-version`.
    pub pin: Option<&'a str>,
    /// Looks up a metadata entry by its lower-case name.
    pub metadata: &'a dyn Fn(&str) -> Option<&'a str>,
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
}

/// Why a request was assigned to its revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
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

/// Assigns a request: an authorised pin, then the bucket of its key, else stable.
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
    let stable = |reason, bucket| Assignment {
        revision: &route.stable,
        reason,
        bucket,
    };
    if let Some(pin) = attributes.pin {
        if route.revoked.iter().any(|name| name == pin) {
            return Ok(stable(Reason::PinRevoked, None));
        }
        return match route.revisions().find(|revision| revision.name == pin) {
            Some(revision) => Ok(Assignment {
                revision,
                reason: Reason::Pin,
                bucket: None,
            }),
            None => Err(AssignError::UnknownRevision {
                model: route.model.clone(),
                revision: pin.to_owned(),
                known: route.revisions().map(|revision| revision.name.clone()).collect(),
            }),
        };
    }
    let Some(canary) = &route.canary else {
        return Ok(stable(Reason::NoRollout, None));
    };
    let key = route
        .sticky
        .keys
        .iter()
        .find_map(|key| (attributes.metadata)(key.metadata()).filter(|v| !v.is_empty()));
    let (bucket, reason) = match (key, route.sticky.on_missing) {
        (Some(key), _) => (bucket(&route.rollout_uid, key.as_bytes()), Reason::Bucket),
        (None, OnMissing::Request) => (scale(draw), Reason::Request),
        (None, OnMissing::Stable) => return Ok(stable(Reason::MissingKey, None)),
    };
    if bucket < canary.share.get() {
        return Ok(Assignment {
            revision: &canary.revision,
            reason,
            bucket: Some(bucket),
        });
    }
    Ok(stable(reason, Some(bucket)))
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

// === impl Reason ===

impl Reason {
    /// As it stands in metadata and telemetry.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pin => "pin",
            Self::PinRevoked => "pin_revoked",
            Self::Bucket => "bucket",
            Self::Request => "request",
            Self::MissingKey => "missing_key",
            Self::NoRollout => "no_rollout",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests;
