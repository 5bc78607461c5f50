//! The whole key schema, as one enum.

use std::{fmt, str::FromStr};

/// Below this lies everything.
const ROOT: &str = "/penstock/";

/// A key of the store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// `/penstock/workers/{id}`, under the worker's lease: its record.
    Worker(String),
    /// `/penstock/rollouts/{model}`: the present plan of the model's rollout.
    Rollout(String),
    /// `/penstock/snapshots/{epoch}`: what gateways were told at that epoch.
    Snapshot(u64),
    /// `/penstock/snapshot`: the epoch that gateways are to apply.
    SnapshotPointer,
    /// `/penstock/models/{model}/{revision}`: a published revision.
    Model {
        /// Name of the model.
        model: String,
        /// Name of the revision.
        revision: String,
    },
    /// `/penstock/audit/{time}-{id}`: who changed what, when and why.
    Audit {
        /// Milliseconds since the Unix epoch.
        time_ms: u64,
        /// Unique among changes of one millisecond.
        id: String,
    },
    /// `/penstock/observations/{model}`: what was counted in the present trial of the model's rollout.
    Observations(String),
    /// `/penstock/leader`, under the leader's lease: its address.
    Leader,
}

/// Keys that can be listed and watched together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Prefix {
    /// Everything.
    All,
    /// Every [`Key::Worker`].
    Workers,
    /// Every [`Key::Rollout`].
    Rollouts,
    /// Every [`Key::Snapshot`].
    Snapshots,
    /// Every [`Key::Model`].
    Models,
    /// Every [`Key::Audit`].
    Audit,
    /// Every [`Key::Observations`].
    Observations,
}

/// A key that is none of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a key of Penstock")]
pub struct KeyError(pub(crate) String);

// === impl Prefix ===

impl Prefix {
    /// As it stands in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::All => "/penstock/",
            Self::Workers => "/penstock/workers/",
            Self::Rollouts => "/penstock/rollouts/",
            Self::Snapshots => "/penstock/snapshots/",
            Self::Models => "/penstock/models/",
            Self::Audit => "/penstock/audit/",
            Self::Observations => "/penstock/observations/",
        }
    }

    /// Whether a key lies below it.
    pub fn contains(self, key: &Key) -> bool {
        key.to_string().starts_with(self.as_str())
    }
}

// === impl Key ===

/// Names may hold anything, so that `/` and `%` in them are written as `%2F` and `%25`.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker(id) => write!(f, "{ROOT}workers/{}", escape(id)),
            Self::Rollout(model) => write!(f, "{ROOT}rollouts/{}", escape(model)),
            // Twenty digits: the order of the keys is the order of the epochs.
            Self::Snapshot(epoch) => write!(f, "{ROOT}snapshots/{epoch:020}"),
            Self::SnapshotPointer => write!(f, "{ROOT}snapshot"),
            Self::Model { model, revision } => {
                write!(f, "{ROOT}models/{}/{}", escape(model), escape(revision))
            }
            Self::Audit { time_ms, id } => write!(f, "{ROOT}audit/{time_ms:020}-{}", escape(id)),
            Self::Observations(model) => write!(f, "{ROOT}observations/{}", escape(model)),
            Self::Leader => write!(f, "{ROOT}leader"),
        }
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        parse(text).ok_or_else(|| KeyError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Key> {
    let rest = text.strip_prefix(ROOT)?;
    if rest == "snapshot" {
        return Some(Key::SnapshotPointer);
    }
    if rest == "leader" {
        return Some(Key::Leader);
    }
    let (kind, name) = rest.split_once('/')?;
    match kind {
        "workers" => unescape(name).map(Key::Worker),
        "rollouts" => unescape(name).map(Key::Rollout),
        "snapshots" => number(name).map(Key::Snapshot),
        "observations" => unescape(name).map(Key::Observations),
        "models" => {
            let (model, revision) = name.split_once('/')?;
            Some(Key::Model {
                model: unescape(model)?,
                revision: unescape(revision)?,
            })
        }
        "audit" => {
            let (time, id) = name.split_once('-')?;
            Some(Key::Audit {
                time_ms: number(time)?,
                id: unescape(id)?,
            })
        }
        _ => None,
    }
}

fn number(text: &str) -> Option<u64> {
    (text.len() == 20 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

fn escape(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

fn unescape(name: &str) -> Option<String> {
    if name.contains('/') {
        return None;
    }
    let whole = name
        .split('%')
        .skip(1)
        .all(|rest| rest.starts_with("25") || rest.starts_with("2F"));
    whole.then(|| name.replace("%2F", "/").replace("%25", "%"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_key() -> impl Strategy<Value = Key> {
        prop_oneof![
            any::<String>().prop_map(Key::Worker),
            any::<String>().prop_map(Key::Rollout),
            any::<u64>().prop_map(Key::Snapshot),
            Just(Key::SnapshotPointer),
            any::<(String, String)>().prop_map(|(model, revision)| Key::Model { model, revision }),
            any::<(u64, String)>().prop_map(|(time_ms, id)| Key::Audit { time_ms, id }),
            any::<String>().prop_map(Key::Observations),
            Just(Key::Leader),
        ]
    }

    proptest! {
        #[test]
        fn a_key_is_read_back_from_its_text(key in any_key()) {
            prop_assert_eq!(key.to_string().parse::<Key>(), Ok(key));
        }

        #[test]
        fn two_keys_have_two_texts(a in any_key(), b in any_key()) {
            prop_assert_eq!(a == b, a.to_string() == b.to_string());
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            let text = format!("/penstock/{text}");
            if let Ok(key) = text.parse::<Key>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }

    #[test]
    fn prefixes_hold_their_keys_and_no_others() {
        assert!(Prefix::Snapshots.contains(&Key::Snapshot(3)));
        assert!(!Prefix::Snapshots.contains(&Key::SnapshotPointer));
        assert!(Prefix::All.contains(&Key::Leader));
    }

    #[test]
    fn epochs_are_in_order() {
        assert!(Key::Snapshot(9).to_string() < Key::Snapshot(10).to_string());
    }
}
