//! Emergency overrides: an operator sends everything for a model to one revision on this gateway, for a while and
//! whatever the plan says. They need no control plane, which hears of them later.

use std::{
    sync::{
        PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use penstock_client::View;
use penstock_proto::v1;
use serde::{Deserialize, Serialize};
use tonic::Status;

use crate::{
    error::{self, bad_request},
    routing,
    state::{StateDir, StateError},
};

/// How long an override lasts where nobody says.
const DEFAULT_TTL: Duration = Duration::from_secs(3600);
/// How long one may last: an emergency that takes longer is a plan.
const LONGEST_TTL: Duration = Duration::from_secs(24 * 3600);
/// One that ended is told of for so long.
const KEEP: Duration = Duration::from_secs(3600);
/// Name of the file in the state directory.
const FILE: &str = "overrides.json";

/// The overrides of this gateway, kept on disk where there is a state directory.
#[derive(Debug, Default)]
pub(crate) struct Overrides {
    /// Whether there are any at all, so that requests of quiet times need no lock.
    any: AtomicBool,
    records: RwLock<Vec<Override>>,
    state: Option<StateDir>,
}

/// An override, in force or ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Override {
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) revision: String,
    pub(crate) actor: String,
    pub(crate) reason: String,
    /// Milliseconds since the Unix epoch, like all of them.
    pub(crate) since_ms: u64,
    pub(crate) until_ms: u64,
    /// 0 while it is in force.
    pub(crate) ended_ms: u64,
}

/// What an operator asks for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wish {
    pub(crate) model: String,
    pub(crate) revision: String,
    /// Seconds.
    pub(crate) ttl_s: Option<u32>,
    pub(crate) actor: String,
    pub(crate) reason: String,
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    millis(now)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

// === impl Overrides ===

impl Overrides {
    /// Those that were kept on disk.
    pub(crate) fn open(state: Option<StateDir>) -> Result<Self, StateError> {
        let records: Vec<Override> = match &state {
            Some(state) => state.read(FILE)?.unwrap_or_default(),
            None => Vec::new(),
        };
        for record in records.iter().filter(|record| record.is_in_force(now_ms())) {
            tracing::warn!(
                model = record.model,
                revision = record.revision,
                "an override is still in force"
            );
        }
        Ok(Self {
            any: AtomicBool::new(!records.is_empty()),
            records: RwLock::new(records),
            state,
        })
    }

    /// The revision that gets everything for `model`, if there is an override.
    pub(crate) fn revision(&self, model: &str) -> Option<String> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        let (records, now) = (
            self.records.read().unwrap_or_else(PoisonError::into_inner),
            now_ms(),
        );
        let found = records.iter().find(|r| r.model == model && r.is_in_force(now));
        found.map(|record| record.revision.clone())
    }

    /// Puts one in force; it takes the place of another for the same model.
    pub(crate) fn set(&self, view: &View, wish: Wish, now: u64) -> Result<Override, Status> {
        check(view, &wish)?;
        let ttl = wish
            .ttl_s
            .map_or(DEFAULT_TTL, |seconds| Duration::from_secs(seconds.into()));
        let record = Override {
            id: uuid::Uuid::new_v4().to_string(),
            model: wish.model,
            revision: wish.revision,
            actor: wish.actor,
            reason: wish.reason,
            since_ms: now,
            until_ms: now.saturating_add(millis(ttl)),
            ended_ms: 0,
        };
        let mut records = self.swept(now);
        for before in records
            .iter_mut()
            .filter(|r| r.model == record.model && r.ended_ms == 0)
        {
            before.ended_ms = now;
        }
        records.push(record.clone());
        self.any.store(true, Ordering::Relaxed);
        tracing::warn!(
            model = record.model,
            revision = record.revision,
            actor = record.actor,
            reason = record.reason,
            until_ms = record.until_ms,
            "an override sends everything to one revision"
        );
        Ok(record)
    }

    /// Ends the one in force for `model`.
    pub(crate) fn end(&self, model: &str, now: u64) -> Result<Override, Status> {
        let mut records = self.swept(now);
        let found = records.iter_mut().find(|r| r.model == model && r.ended_ms == 0);
        let record =
            found.ok_or_else(|| Status::not_found(format!("no override is in force for model {model:?}")))?;
        record.ended_ms = now;
        tracing::warn!(model, revision = record.revision, "an override was ended");
        Ok(record.clone())
    }

    /// Those in force and those that ended within the last hour.
    pub(crate) fn list(&self, now: u64) -> Vec<Override> {
        self.swept(now).clone()
    }

    /// Keeps them on disk. Returns whether a restart will know them.
    pub(crate) fn save(&self) -> bool {
        let Some(state) = &self.state else {
            return false;
        };
        let records = self.list(now_ms());
        match state.write(FILE, &records) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(%error, "cannot keep the overrides; a restart would end them");
                false
            }
        }
    }

    /// The records, ended where their time is up and without those that ended long ago.
    fn swept(&self, now: u64) -> RwLockWriteGuard<'_, Vec<Override>> {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        for record in records.iter_mut() {
            if record.ended_ms == 0 && record.until_ms <= now {
                record.ended_ms = record.until_ms;
            }
        }
        records.retain(|record| record.ended_ms == 0 || record.ended_ms.saturating_add(millis(KEEP)) > now);
        self.any.store(!records.is_empty(), Ordering::Relaxed);
        records
    }
}

fn check(view: &View, wish: &Wish) -> Result<(), Status> {
    if wish.actor.is_empty() {
        return Err(bad_request("actor", "is missing: say who overrides the plan"));
    }
    if let Some(ttl) = wish.ttl_s
        && (ttl == 0 || u64::from(ttl) > LONGEST_TTL.as_secs())
    {
        let why = format!("must be from 1 to {} seconds, not {ttl}", LONGEST_TTL.as_secs());
        return Err(bad_request("ttl_s", why));
    }
    if wish.model.is_empty() {
        return Err(bad_request("model", "is missing"));
    }
    let snapshot = view
        .snapshot
        .as_ref()
        .ok_or_else(|| error::unavailable("this gateway has no routes yet: there is nothing to override"))?;
    let route = routing::route(snapshot, &wish.model)?;
    let known: Vec<&str> = route.revisions().map(|revision| revision.name.as_str()).collect();
    if known.contains(&wish.revision.as_str()) {
        return Ok(());
    }
    let (model, revision) = (&wish.model, &wish.revision);
    let message = match route.revoked.contains(revision) {
        true => format!("revision {revision:?} of model {model} was aborted; there are "),
        false => format!("model {model} has no revision {revision:?}; it has "),
    };
    Err(Status::not_found(message + &known.join(", ")))
}

// === impl Override ===

impl Override {
    /// Whether it decides at `now`.
    pub(crate) fn is_in_force(&self, now: u64) -> bool {
        self.ended_ms == 0 && now < self.until_ms
    }
}

impl From<Override> for v1::OverrideRecord {
    fn from(record: Override) -> Self {
        Self {
            id: record.id,
            model: record.model,
            revision: record.revision,
            actor: record.actor,
            reason: record.reason,
            since_ms: record.since_ms,
            until_ms: record.until_ms,
            ended_ms: record.ended_ms,
        }
    }
}

#[cfg(test)]
mod tests;
