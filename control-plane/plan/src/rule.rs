//! Match rules, mirrors and trials: what a route says beside its split.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Attributes, Ppm, Sticky};

/// Header in which proxies tell for whom they ask, each adding the address that it saw at the end.
pub const FORWARDED_FOR: &str = "x-forwarded-for";
/// Metadata that names the caller's region.
pub const REGION: &str = "x-region";
/// Metadata that names the caller's kind of device.
pub const DEVICE: &str = "x-device";

/// Sends the requests that match it where it says; every condition that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Lower goes first; no two rules of a plan share one.
    pub priority: u32,
    /// Metadata or header in lower case, and the value that it must have.
    pub headers: BTreeMap<String, String>,
    /// Values of the sticky key, e.g. user ids.
    pub users: Vec<String>,
    /// Values of `x-region`.
    pub regions: Vec<String>,
    /// Values of `x-device`.
    pub devices: Vec<String>,
    /// Networks that hold the client's address.
    pub client_ip: Vec<IpNet>,
    /// Proxies in front of the gateway whose `x-forwarded-for` entries are believed.
    pub trusted_hops: u8,
    /// The canary's share of the keys that match: none is stable, all is canary.
    pub canary: Ppm,
}

/// Sends a copy of what stable serves to the canary; those replies are thrown away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Share of stable's requests.
    pub share: Ppm,
    /// Tokens that a mirrored request generates at most.
    pub max_output_tokens: u32,
}

/// One trial of a canary: counts of different trials are never added up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Counts the tries of the rollout, from 1.
    pub attempt: u32,
    /// Index of the step, from 0.
    pub step: u32,
    /// What counts as a bad event.
    pub thresholds: Vec<Threshold>,
    /// At most one bad event per key, metric and window is counted; seconds, 0 counts them all.
    pub window_s: u32,
}

/// A metric, and above which value a request counts as a bad event.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Threshold {
    /// As in the plan, e.g. `latency_p99`.
    pub metric: String,
    /// Seconds, tokens or a share, by metric; unused for plain events such as errors.
    pub over: f64,
}

/// The bits of a threshold compare: a NaN never gets here, lint and conversion refuse it.
impl Eq for Threshold {}
impl Eq for Trial {}

// === impl Rule ===

impl Rule {
    /// Whether every condition that is given holds. A rule without conditions matches everything.
    pub fn matches(&self, attributes: &Attributes<'_>, sticky: &Sticky) -> bool {
        let value = |name: &str| (attributes.metadata)(name).filter(|value| !value.is_empty());
        let listed = |list: &[String], value: Option<&str>| {
            list.is_empty() || value.is_some_and(|value| list.iter().any(|one| one == value))
        };
        self.headers
            .iter()
            .all(|(name, wanted)| (attributes.metadata)(name) == Some(wanted.as_str()))
            && (self.users.is_empty() || listed(&self.users, sticky.key(attributes).as_deref()))
            && listed(&self.regions, value(REGION))
            && listed(&self.devices, value(DEVICE))
            && (self.client_ip.is_empty() || self.matches_address(attributes))
    }

    fn matches_address(&self, attributes: &Attributes<'_>) -> bool {
        client_address(attributes, self.trusted_hops)
            .is_some_and(|address| self.client_ip.iter().any(|network| network.contains(&address)))
    }
}

/// The client's address behind `trusted_hops` proxies: with none it is the peer; with n it is the n-th entry of
/// `x-forwarded-for` from the right, since each proxy adds at the end whom it saw. Entries further left are
/// whatever a client cares to write. Too few entries give no address, so that no rule on addresses matches.
pub fn client_address(attributes: &Attributes<'_>, trusted_hops: u8) -> Option<IpAddr> {
    if trusted_hops == 0 {
        return attributes.peer.map(|address| address.to_canonical());
    }
    let forwarded = (attributes.metadata)(FORWARDED_FOR)?;
    let entry = forwarded.rsplit(',').nth(usize::from(trusted_hops) - 1)?.trim();
    let bare = entry.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse::<IpAddr>().ok();
    let address = address.or_else(|| entry.parse::<SocketAddr>().ok().map(|socket| socket.ip()));
    address.map(|address| address.to_canonical())
}
