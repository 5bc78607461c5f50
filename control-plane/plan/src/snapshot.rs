//! Everything that gateways are told to apply, as one value.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use serde::{Deserialize, Serialize};

use crate::{Revision, Route, Rule};

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
        form.text("penstock.snapshot.v2");
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
        self.routes.iter().try_for_each(|(model, route)| {
            check(model, route).map_err(|(field, message)| SnapshotError {
                code: "invalid_route",
                field: format!("routes[{model}].{field}"),
                message,
            })
        })
    }
}

/// The first field of a route that is wrong, and why.
fn check(model: &str, route: &Route) -> Result<(), (String, String)> {
    if model.is_empty() || *model != route.model {
        return Err((
            "model".into(),
            format!("the route of {model:?} says that it is for {:?}", route.model),
        ));
    }
    let mut names = BTreeSet::new();
    for (field, revision) in revisions(route) {
        if revision.name.is_empty() {
            return Err((format!("{field}.name"), "it is empty".into()));
        }
        if revision.digest.is_empty() {
            return Err((
                format!("{field}.digest"),
                format!("revision {:?} has none", revision.name),
            ));
        }
        if !names.insert(revision.name.as_str()) {
            return Err((
                format!("{field}.name"),
                format!("{:?} is named twice", revision.name),
            ));
        }
    }
    if route.canary.is_some() && route.rollout_uid.is_empty() {
        return Err((
            "rollout_uid".into(),
            "a canary needs the uid of its rollout, the salt of the bucket".into(),
        ));
    }
    let misplaced = route
        .rules
        .windows(2)
        .position(|pair| pair[0].priority >= pair[1].priority);
    if let Some(at) = misplaced {
        let priority = route.rules[at + 1].priority;
        return Err((
            format!("rules[{}].priority", at + 1),
            format!("{priority} is not above the rule's before it"),
        ));
    }
    let revoked = route
        .revoked
        .iter()
        .position(|name| names.contains(name.as_str()));
    revoked.map_or(Ok(()), |at| {
        Err((
            format!("revoked[{at}]"),
            format!("{:?} is revoked and can be reached", route.revoked[at]),
        ))
    })
}

/// Every revision that a request can reach, with the path of its field.
fn revisions(route: &Route) -> impl Iterator<Item = (String, &Revision)> {
    let canary = route
        .canary
        .iter()
        .map(|canary| ("canary.revision".into(), &canary.revision));
    let pinnable = route
        .pinnable
        .iter()
        .enumerate()
        .map(|(at, revision)| (format!("pinnable[{at}]"), revision));
    std::iter::once(("stable".into(), &route.stable))
        .chain(canary)
        .chain(pinnable)
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

    fn revision(&mut self, revision: &Revision) {
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
        self.number(u64::from(route.sticky.trusted_hops));
        self.number(
            route
                .canary
                .as_ref()
                .map_or(0, |canary| u64::from(canary.min_ready)),
        );
        self.number(route.rules.len() as u64);
        for rule in &route.rules {
            self.rule(rule);
        }
        self.number(u64::from(route.holdout.get()));
        self.number(u64::from(route.mirror.is_some()));
        if let Some(mirror) = &route.mirror {
            self.number(u64::from(mirror.share.get()));
            self.number(u64::from(mirror.max_output_tokens));
        }
        self.number(u64::from(route.trial.is_some()));
        if let Some(trial) = &route.trial {
            self.number(u64::from(trial.attempt));
            self.number(u64::from(trial.step));
            self.number(u64::from(trial.window_s));
            self.number(trial.thresholds.len() as u64);
            for threshold in &trial.thresholds {
                self.text(&threshold.metric);
                self.number(threshold.over.to_bits());
            }
        }
    }

    fn rule(&mut self, rule: &Rule) {
        self.number(u64::from(rule.priority));
        self.number(rule.headers.len() as u64);
        for (name, value) in &rule.headers {
            self.text(name);
            self.text(value);
        }
        for list in [&rule.users, &rule.regions, &rule.devices] {
            self.number(list.len() as u64);
            for value in list {
                self.text(value);
            }
        }
        self.number(rule.client_ip.len() as u64);
        for network in &rule.client_ip {
            self.text(&network.to_string());
        }
        self.number(u64::from(rule.trusted_hops));
        self.number(u64::from(rule.canary.get()));
    }
}

#[cfg(test)]
mod tests;
