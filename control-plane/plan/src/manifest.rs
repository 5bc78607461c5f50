//! A rollout as its users write it.
//!
//! Every field but `kind`, `model` and `canary` has a default; an unknown field is an error, never ignored.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Limit, Mirror, OnMissing, Ppm, Rule, Share, Signal, Span, Sticky, StickyKey, Threshold};

/// The plan of a rollout.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `Rollout`.
    pub kind: Kind,
    /// Name of the model.
    pub model: String,
    /// The revision that serves now; may be left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<String>,
    /// The revision to try.
    pub canary: CanarySpec,
    /// What keeps a user on one side.
    #[serde(default)]
    pub sticky: StickySpec,
    /// Rules that go before the split.
    #[serde(default, rename = "match", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<RuleSpec>,
    /// Share of the keys that no rollout of the model touches.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hold_out: Share,
    /// Copies of stable's requests for the canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorSpec>,
    /// The ladder; without one the share is set by hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// What is judged, and how surely.
    #[serde(default)]
    pub analysis: Analysis,
    /// What becomes of requests that run when traffic moves.
    #[serde(default, skip_serializing_if = "is_default")]
    pub in_flight: InFlight,
    /// What happens when another rollout of the model is applied.
    #[serde(default, skip_serializing_if = "is_default")]
    pub on_new: OnNew,
    /// When steps may be taken; always where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<Window>,
    /// A pause that lasts longer aborts the rollout. Default for stepped rollouts: 168h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_limit: Option<Span>,
    /// Largest factor between two steps. From nothing the first may be twice as many percent.
    #[serde(default = "default_jump", skip_serializing_if = "is_default_jump")]
    pub max_jump: f64,
    /// What happens when a live gateway does not acknowledge.
    #[serde(default, skip_serializing_if = "is_default")]
    pub unacknowledged: Unacknowledged,
    /// Changes need a reason.
    #[serde(default, skip_serializing_if = "is_default")]
    pub require_reason: bool,
}

/// `kind: Rollout`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The only kind.
    #[default]
    Rollout,
}

/// The revision to try.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanarySpec {
    /// Its name.
    pub revision: String,
    /// Workers that must serve it before it gets traffic.
    #[serde(default = "one")]
    pub min_ready: u32,
    /// Prompts whose KV the workers compute before they serve it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warm_prefixes: Vec<String>,
}

/// What keeps a user on one side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StickySpec {
    /// Tried in order: `metadata:x-user-id`, `auth:subject`, `client_ip`.
    #[serde(default = "default_keys")]
    pub key: Vec<StickyKey>,
    /// What happens to a request without one.
    #[serde(default)]
    pub on_missing: OnMissing,
    /// Proxies in front whose `x-forwarded-for` entries are believed, for `client_ip`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub trusted_hops: u8,
}

/// Sends the requests that match it to one side; every condition that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// Lower goes first.
    pub priority: u32,
    /// Metadata or header, and the value that it must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub header: BTreeMap<String, String>,
    /// Values of the sticky key.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub user: Vec<String>,
    /// Values of `x-region`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub region: Vec<String>,
    /// Values of `x-device`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device: Vec<String>,
    /// Networks of clients.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub client_ip: Vec<IpNet>,
    /// Proxies in front whose `x-forwarded-for` entries are believed.
    #[serde(default, skip_serializing_if = "is_default")]
    pub trusted_hops: u8,
    /// The side that gets them all; or else `canary`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Side>,
    /// The canary's share of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Share>,
}

/// One side of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The revision that served before.
    Stable,
    /// The revision being tried.
    Canary,
}

/// Copies of stable's requests for the canary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSpec {
    /// Share of stable's requests.
    pub share: Share,
    /// Tokens that a copy generates at most.
    #[serde(default = "default_mirror_tokens")]
    pub max_output_tokens: u32,
}

/// One rung of the ladder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The canary's share of the keys.
    pub canary: Share,
    /// How long it stays, from when every live gateway has acknowledged it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hold: Span,
    /// Requests of the canary without which nothing is concluded. Default: what the metrics need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_samples: Option<u64>,
    /// An operator must agree before the next step.
    #[serde(default, skip_serializing_if = "is_default")]
    pub approval: bool,
    /// Like `hold`, for the last step: how long the canary is watched before it becomes stable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bake: Option<Span>,
}

/// What is judged, and how surely.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Analysis {
    /// Chance that a canary that is no worse is rolled back by the whole rollout, at most.
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// What happens when the hold is over and the samples do not suffice.
    #[serde(default)]
    pub on_insufficient: OnInsufficient,
    /// With `extend`: how long to wait for samples at most, as a multiple of the hold; then it is paused.
    #[serde(default = "default_extend")]
    pub extend_limit: f64,
    /// At most one bad event per key, metric and window is counted, since users who try again cluster errors.
    #[serde(default = "default_window")]
    pub window: Span,
    /// Words that workers look for in replies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub watch_words: Vec<String>,
    /// The metrics.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<Metric>,
}

/// One rule on one metric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// E.g. `error_rate`, `latency_p99`.
    pub name: Signal,
    /// The canary's value may be this at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<Limit>,
    /// The canary's rate of bad events may be this many times stable's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ratio: Option<f64>,
    /// Value above which a single reply counts as bad, where `max` does not say it: `repetition`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<Limit>,
    /// Compare within groups of like requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stratify: Option<Stratify>,
    /// What follows when it fails.
    #[serde(default, skip_serializing_if = "is_default")]
    pub action: Action,
    /// Requests of the canary without which it passes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_samples: Option<u64>,
    /// For `prometheus:NAME`: where to ask what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<PrometheusQuery>,
}

/// A query of Prometheus that gives one number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrometheusQuery {
    /// Base URL, e.g. `http://127.0.0.1:9090`.
    pub url: String,
    /// PromQL; `{{stable}}`, `{{canary}}` and `{{model}}` are filled in.
    pub query: String,
    /// Time between two evaluations.
    #[serde(default = "default_every")]
    pub every: Span,
    /// Evaluations above the limit, one after the other, that make it fail.
    #[serde(default = "three")]
    pub failures: u32,
}

/// Groups of like requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stratify {
    /// By the share of the prompt that was in the prefix cache.
    CachedRatio,
}

/// What follows when a metric fails.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The rollout is rolled back.
    #[default]
    Abort,
    /// The rollout waits for an operator.
    Pause,
    /// It is told, and nothing else.
    Warn,
}

/// What happens when the hold is over and the samples do not suffice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnInsufficient {
    /// Wait for more of them.
    #[default]
    Extend,
    /// Wait for an operator.
    Pause,
    /// Roll back.
    Fail,
}

/// What becomes of requests that run when traffic moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// Requests on the canary when it is aborted.
    #[serde(default)]
    pub on_abort: OnAbort,
    /// How long the old revision may take to end its requests after a promotion.
    #[serde(default = "default_drain")]
    pub max_drain: Span,
}

/// Requests on the canary when it is aborted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnAbort {
    /// They run to their end.
    #[default]
    Drain,
}

/// What happens when another rollout of the model is applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNew {
    /// It is refused.
    #[default]
    Reject,
    /// It waits until this one is over.
    Queue,
    /// This one is aborted, and it follows.
    Supersede,
}

/// Hours in which steps may be taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// `mon` to `sun`; every day where none is named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub days: Vec<Day>,
    /// `09:00`.
    pub from: String,
    /// `17:00`; below `from` it ends on the next day.
    pub to: String,
    /// Name of a time zone.
    #[serde(default = "utc")]
    pub zone: String,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// What happens when a live gateway does not acknowledge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unacknowledged {
    /// Go on without it after this time; without one the rollout waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proceed_after: Option<Span>,
}

// === impl Manifest ===

impl Manifest {
    /// A plan without steps: the share is set by hand.
    pub fn manual(model: &str, canary: &str, sticky: &Sticky) -> Self {
        Self {
            model: model.to_owned(),
            canary: CanarySpec {
                revision: canary.to_owned(),
                ..CanarySpec::default()
            },
            sticky: sticky.into(),
            max_jump: default_jump(),
            ..Self::default()
        }
    }

    /// The rules in the order of their priority, as gateways apply them.
    pub fn rules(&self) -> Vec<Rule> {
        let mut rules: Vec<Rule> = self.rules.iter().map(Rule::from).collect();
        rules.sort_by_key(|rule| rule.priority);
        rules
    }

    /// The mirror as gateways apply it.
    pub fn mirror(&self) -> Option<Mirror> {
        self.mirror.map(|mirror| Mirror {
            share: mirror.share.0,
            max_output_tokens: mirror.max_output_tokens,
        })
    }

    /// What gateways count.
    pub fn thresholds(&self) -> Vec<Threshold> {
        let counted = self
            .analysis
            .metrics
            .iter()
            .filter(|metric| metric.name.is_counted());
        let mut thresholds: Vec<Threshold> = counted
            .map(|metric| Threshold {
                metric: metric.name.to_string(),
                over: metric.over(),
            })
            .collect();
        thresholds.dedup_by(|a, b| a.metric == b.metric);
        thresholds
    }

    /// The longest pause, if there is one.
    pub fn pause_limit(&self) -> Option<Span> {
        let stepped = (!self.steps.is_empty()).then_some(Span::from_secs(7 * 24 * 3600));
        self.pause_limit.or(stepped)
    }
}

// === impl Metric ===

impl Metric {
    /// Value above which a single request is a bad event.
    pub fn over(&self) -> f64 {
        let value = |limit: Limit| match limit {
            Limit::Share(value) | Limit::Seconds(value) | Limit::Number(value) => value,
        };
        match (self.name.tail(), self.threshold) {
            (Some(_), _) => self.max.map_or(f64::MAX, value),
            (None, Some(threshold)) => value(threshold),
            (None, None) if self.name == Signal::Repetition => Signal::REPETITIVE,
            (None, None) => 0.0,
        }
    }

    /// The share of requests that may be bad, where `max` says so.
    pub fn max_rate(&self) -> Option<f64> {
        match (self.name.tail(), self.max?) {
            (Some(tail), _) => Some(tail),
            (None, Limit::Share(share)) => Some(share),
            (None, _) => None,
        }
    }

    /// The rule in words.
    pub fn rule(&self) -> String {
        let max = self.max.map(|max| format!("at most {max}"));
        let ratio = self
            .max_ratio
            .map(|ratio| format!("at most {ratio} times stable's"));
        [max, ratio].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

// === impl Step ===

impl Step {
    /// How long it stays.
    pub fn stays(&self) -> Span {
        self.bake.unwrap_or(self.hold)
    }
}

// === conversions ===

impl From<&RuleSpec> for Rule {
    fn from(spec: &RuleSpec) -> Self {
        let canary = match (spec.to, spec.canary) {
            (Some(Side::Stable), _) => Ppm::ZERO,
            (Some(Side::Canary), _) => Ppm::ALL,
            (None, share) => share.unwrap_or_default().0,
        };
        Self {
            priority: spec.priority,
            headers: spec
                .header
                .iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
                .collect(),
            users: spec.user.clone(),
            regions: spec.region.clone(),
            devices: spec.device.clone(),
            client_ip: spec.client_ip.clone(),
            trusted_hops: spec.trusted_hops,
            canary,
        }
    }
}

impl From<&StickySpec> for Sticky {
    fn from(spec: &StickySpec) -> Self {
        Self {
            keys: spec.key.clone(),
            on_missing: spec.on_missing,
            trusted_hops: spec.trusted_hops,
        }
    }
}

impl From<&Sticky> for StickySpec {
    fn from(sticky: &Sticky) -> Self {
        Self {
            key: sticky.keys.clone(),
            on_missing: sticky.on_missing,
            trusted_hops: sticky.trusted_hops,
        }
    }
}

impl Default for StickySpec {
    fn default() -> Self {
        Self::from(&Sticky::default())
    }
}

impl Default for Analysis {
    fn default() -> Self {
        Self {
            alpha: default_alpha(),
            on_insufficient: OnInsufficient::default(),
            extend_limit: default_extend(),
            window: default_window(),
            watch_words: Vec::new(),
            metrics: Vec::new(),
        }
    }
}

impl Default for InFlight {
    fn default() -> Self {
        Self {
            on_abort: OnAbort::default(),
            max_drain: default_drain(),
        }
    }
}

// === defaults ===

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_default_jump(value: &f64) -> bool {
    value.total_cmp(&default_jump()).is_eq()
}

const fn default_jump() -> f64 {
    5.0
}

const fn one() -> u32 {
    1
}

const fn three() -> u32 {
    3
}

const fn default_mirror_tokens() -> u32 {
    32
}

const fn default_alpha() -> f64 {
    0.01
}

const fn default_extend() -> f64 {
    3.0
}

const fn default_window() -> Span {
    Span::from_secs(60)
}

const fn default_drain() -> Span {
    Span::from_secs(120)
}

const fn default_every() -> Span {
    Span::from_secs(15)
}

fn default_keys() -> Vec<StickyKey> {
    Sticky::default().keys
}

fn utc() -> String {
    "UTC".to_owned()
}
