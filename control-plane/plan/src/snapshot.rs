//! Everything that gateways are told to apply, as one value.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::{Deserialize, Serialize};

use crate::{Ppm, Route};

/// The routes of every model, under one number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Grows by one with every change of a route; never goes back.
    pub epoch: u64,
    /// Routes by model.
    pub routes: BTreeMap<String, Route>,
}

/// Why a snapshot cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct SnapshotError {
    /// Machine-readable reason.
    pub code: &'static str,
    /// Path of the offending field.
    pub field: String,
    /// The reason in words, with the offending value.
    pub message: String,
}

// === impl Snapshot ===

impl Snapshot {
    /// BLAKE3 of the canonical form, in hex.
    ///
    /// The canonical form is every field in the order of its declaration, each text and list preceded by its
    /// length, each integer in eight little-endian bytes; it does not depend on any serialization library.
    pub fn digest(&self) -> String {
        let mut form = Canonical::default();
        form.text("penstock.snapshot.v1");
        form.number(self.epoch);
        form.number(self.routes.len() as u64);
        for route in self.routes.values() {
            form.route(route);
        }
        form.0.finalize().to_hex().to_string()
    }

    /// Checks what a gateway relies on.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), SnapshotError> {
        for (model, route) in &self.routes {
            let field = |rest: &str| format!("routes[{model}].{rest}");
            let wrong = |code, rest: &str, message: String| Err(SnapshotError { code, field: field(rest), message });
            if *model != route.model {
                return wrong("invalid_route", "model", format!("the route is for {:?}", route.model));
            }
            let mut names = BTreeSet::new();
            for revision in route.revisions() {
                if revision.name.is_empty() || revision.digest.is_empty() {
                    return wrong("invalid_route", "revision", format!("{revision:?} lacks its name or digest"));
                }
                if !names.insert(&revision.name) {
                    return wrong("invalid_route", "revision", format!("{:?} is named twice", revision.name));
                }
            }
            if let Some(canary) = &route.canary {
                if route.rollout_uid.is_empty() {
                    return wrong("invalid_route", "rollout_uid", "a canary needs the uid of its rollout".into());
                }
                if canary.share > Ppm::ALL {
                    return wrong("invalid_route", "canary.ppm", format!("{} is above 1000000", canary.share.get()));
                }
            }
            if let Some(name) = route.revoked.iter().find(|name| names.contains(name)) {
                return wrong("invalid_route", "revoked", format!("{name:?} serves and is revoked"));
            }
        }
        Ok(())
    }
}

/// Hashes fields so that no two different snapshots have the same bytes.
#[derive(Default)]
struct Canonical(blake3::Hasher);

impl Canonical {
    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    fn revision(&mut self, revision: &crate::Revision) {
        self.text(&revision.name);
        self.text(&revision.digest);
    }

    fn route(&mut self, route: &Route) {
        self.text(&route.model);
        self.revision(&route.stable);
        self.number(u64::from(route.canary.is_some()));
        if let Some(canary) = &route.canary {
            self.revision(&canary.revision);
            self.number(u64::from(canary.share.get()));
        }
        self.text(&route.rollout_uid);
        self.number(route.generation);
        self.number(route.sticky.keys.len() as u64);
        let mut key_text = String::new();
        for key in &route.sticky.keys {
            key_text.clear();
            // Writing to a String cannot fail.
            let _ = write!(key_text, "{key}");
            self.text(&key_text);
        }
        self.number(match route.sticky.on_missing {
            crate::OnMissing::Request => 1,
            crate::OnMissing::Stable => 2,
        });
        self.number(route.pinnable.len() as u64);
        for revision in &route.pinnable {
            self.revision(revision);
        }
        self.number(route.revoked.len() as u64);
        for name in &route.revoked {
            self.text(name);
        }
    }
}

#[cfg(test)]
mod tests;
