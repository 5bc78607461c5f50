//! What can be measured of a request, and when a request counts as a bad event.
//!
//! Every metric is made a matter of counting: "the P99 is at most 2 s" says the same as "at most 1 % of the requests
//! take longer than 2 s", so one kind of test covers errors and latencies.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How a request ended, as its service is judged by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Outcome {
    /// A whole reply.
    #[default]
    Ok,
    /// The service failed.
    Error,
    /// The service took longer than the caller would wait.
    Timeout,
    /// The caller left, or asked for something that cannot be: says nothing of the service.
    Excluded,
}

/// What is known of one request when it is over.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RequestFacts {
    /// How it ended.
    pub outcome: Outcome,
    /// Arrival to first token, in seconds.
    pub ttft_s: Option<f64>,
    /// Mean time per token after the first, in seconds.
    pub tpot_s: Option<f64>,
    /// Arrival to end, in seconds.
    pub total_s: f64,
    /// Tokens of the prompt; `None` where the worker told nothing.
    pub prompt_tokens: Option<u32>,
    /// Those of them that were in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens of the reply; `None` where the worker told nothing.
    pub output_tokens: Option<u32>,
    /// Share of the reply's 4-grams that occurred before in it, in [0, 1].
    pub repetition: Option<f64>,
    /// Occurrences of watch-words in the reply.
    pub watch_word_hits: u32,
    /// The reply broke its grammar.
    pub grammar_failed: bool,
    /// A rule, a pin or an override assigned it, and not the split.
    pub chosen: bool,
}

/// Strata of requests: by the cached share of the prompt, below 10 %, below 60 % or above, since a cold cache makes a
/// canary look slow; first those that the split assigned, then, in the second half, those that a rule, a pin or an
/// override assigned. Only the split is drawn by lot: of the others one side may have the harder ones, so they are
/// held to thresholds and not compared.
pub const STRATA: usize = 6;

/// A metric that a plan may judge.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Signal {
    /// Share of requests that fail by the service's fault, timeouts among them.
    ErrorRate,
    /// Share of requests that ran into their deadline.
    TimeoutRate,
    /// A quantile, in percent, of the time from arrival to end.
    Latency(u8),
    /// A quantile, in percent, of the time to the first token.
    Ttft(u8),
    /// A quantile, in percent, of the time per output token.
    Tpot(u8),
    /// A quantile, in percent, of the reply's length in tokens.
    OutputLength(u8),
    /// Share of replies that repeat themselves more than the threshold says.
    Repetition,
    /// Share of replies with a watch-word.
    WatchWords,
    /// Share of replies that break their grammar.
    GrammarFailures,
    /// Share of replies without a token.
    EmptyReplies,
    /// Share of feedback that is bad.
    NegativeFeedback,
    /// Times that a worker of the canary ran out of memory.
    OutOfMemory,
    /// Restarts of the canary's workers.
    Restarts,
    /// A number that a Prometheus query gives.
    Prometheus(String),
}

/// A name that no metric has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a metric; there are error_rate, timeout_rate, latency_pNN, ttft_pNN, tpot_pNN, output_length_pNN, \
     repetition, watch_words, grammar_failures, empty_replies, negative_feedback, out_of_memory, restarts and \
     prometheus:NAME"
)]
pub struct SignalError(String);

// === impl RequestFacts ===

impl RequestFacts {
    /// Index of the stratum, below [`STRATA`].
    pub fn stratum(&self) -> usize {
        let cached = match self.prompt_tokens {
            Some(prompt) if prompt > 0 => f64::from(self.cached_tokens) / f64::from(prompt),
            _ => 0.0,
        };
        let by_cache = match cached {
            share if share < 0.1 => 0,
            share if share < 0.6 => 1,
            _ => 2,
        };
        by_cache + if self.chosen { STRATA / 2 } else { 0 }
    }
}

// === impl Signal ===

impl Signal {
    /// Repetition above which a reply counts as repetitive where the plan does not say.
    pub const REPETITIVE: f64 = 0.2;

    /// Whether the request is a bad event, `over` being the threshold in seconds, tokens or a share. `None` where the
    /// request says nothing about this metric.
    pub fn is_bad(&self, facts: &RequestFacts, over: f64) -> Option<bool> {
        if facts.outcome == Outcome::Excluded {
            return None;
        }
        let ok = facts.outcome == Outcome::Ok;
        let slow = |value: Option<f64>| match value {
            Some(value) => Some(value > over),
            // What failed before it was measured was not fast.
            None if !ok => Some(true),
            None => None,
        };
        match self {
            Self::ErrorRate => Some(!ok),
            Self::TimeoutRate => Some(facts.outcome == Outcome::Timeout),
            Self::Latency(_) => Some(facts.total_s > over || facts.outcome == Outcome::Timeout),
            Self::Ttft(_) => slow(facts.ttft_s),
            Self::Tpot(_) => facts.tpot_s.map(|tpot| tpot > over),
            Self::OutputLength(_) => facts.output_tokens.map(|tokens| f64::from(tokens) > over),
            Self::Repetition => facts
                .repetition
                .filter(|_| ok)
                .map(|repetition| repetition > over),
            Self::WatchWords => ok.then_some(facts.watch_word_hits > 0),
            Self::GrammarFailures => facts.output_tokens.map(|_| facts.grammar_failed),
            Self::EmptyReplies => facts.output_tokens.filter(|_| ok).map(|tokens| tokens == 0),
            Self::NegativeFeedback | Self::OutOfMemory | Self::Restarts | Self::Prometheus(_) => None,
        }
    }

    /// The share of requests that may be bad when the quantile holds exactly: 1 % for a P99.
    pub fn tail(&self) -> Option<f64> {
        match self {
            Self::Latency(q) | Self::Ttft(q) | Self::Tpot(q) | Self::OutputLength(q) => {
                Some(f64::from(100 - q) / 100.0)
            }
            _ => None,
        }
    }

    /// Whether gateways count it request by request.
    pub const fn is_counted(&self) -> bool {
        !matches!(self, Self::OutOfMemory | Self::Restarts | Self::Prometheus(_))
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ErrorRate => f.pad("error_rate"),
            Self::TimeoutRate => f.pad("timeout_rate"),
            Self::Latency(q) => f.pad(&format!("latency_p{q}")),
            Self::Ttft(q) => f.pad(&format!("ttft_p{q}")),
            Self::Tpot(q) => f.pad(&format!("tpot_p{q}")),
            Self::OutputLength(q) => f.pad(&format!("output_length_p{q}")),
            Self::Repetition => f.pad("repetition"),
            Self::WatchWords => f.pad("watch_words"),
            Self::GrammarFailures => f.pad("grammar_failures"),
            Self::EmptyReplies => f.pad("empty_replies"),
            Self::NegativeFeedback => f.pad("negative_feedback"),
            Self::OutOfMemory => f.pad("out_of_memory"),
            Self::Restarts => f.pad("restarts"),
            Self::Prometheus(name) => f.pad(&format!("prometheus:{name}")),
        }
    }
}

impl FromStr for Signal {
    type Err = SignalError;

    fn from_str(value: &str) -> Result<Self, SignalError> {
        let unknown = || SignalError(value.to_owned());
        if let Some(name) = value.strip_prefix("prometheus:").filter(|name| !name.is_empty()) {
            return Ok(Self::Prometheus(name.to_owned()));
        }
        if let Some((kind, quantile)) = value.rsplit_once("_p") {
            let quantile = quantile
                .parse()
                .ok()
                .filter(|q| (1..=99).contains(q))
                .ok_or_else(unknown)?;
            return match kind {
                "latency" => Ok(Self::Latency(quantile)),
                "ttft" => Ok(Self::Ttft(quantile)),
                "tpot" => Ok(Self::Tpot(quantile)),
                "output_length" => Ok(Self::OutputLength(quantile)),
                _ => Err(unknown()),
            };
        }
        match value {
            "error_rate" => Ok(Self::ErrorRate),
            "timeout_rate" => Ok(Self::TimeoutRate),
            "repetition" => Ok(Self::Repetition),
            "watch_words" => Ok(Self::WatchWords),
            "grammar_failures" => Ok(Self::GrammarFailures),
            "empty_replies" => Ok(Self::EmptyReplies),
            "negative_feedback" => Ok(Self::NegativeFeedback),
            "out_of_memory" => Ok(Self::OutOfMemory),
            "restarts" => Ok(Self::Restarts),
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for Signal {
    type Error = SignalError;

    fn try_from(value: String) -> Result<Self, SignalError> {
        value.parse()
    }
}

impl From<Signal> for String {
    fn from(signal: Signal) -> Self {
        signal.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_reads_back_as_it_shows() {
        for name in [
            "error_rate",
            "timeout_rate",
            "latency_p99",
            "ttft_p50",
            "tpot_p95",
            "output_length_p90",
            "repetition",
            "watch_words",
            "grammar_failures",
            "empty_replies",
            "negative_feedback",
            "out_of_memory",
            "restarts",
            "prometheus:gpu_temperature",
        ] {
            assert_eq!(name.parse::<Signal>().unwrap().to_string(), name);
        }
        for name in [
            "",
            "latency",
            "latency_p0",
            "latency_p100",
            "eror_rate",
            "prometheus:",
        ] {
            let error = name.parse::<Signal>().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("{name:?} is not a metric; there are error_rate")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_request_is_bad_above_its_threshold_only() {
        let facts = RequestFacts {
            total_s: 2.0,
            ttft_s: Some(0.5),
            ..RequestFacts::default()
        };
        assert_eq!(Signal::Latency(99).is_bad(&facts, 2.0), Some(false));
        assert_eq!(Signal::Latency(99).is_bad(&facts, 1.99), Some(true));
        assert_eq!(Signal::Ttft(50).is_bad(&facts, 0.4), Some(true));
        assert_eq!(Signal::Tpot(50).is_bad(&facts, 0.4), None);
    }

    #[test]
    fn what_failed_before_its_first_token_was_not_fast() {
        let failed = RequestFacts {
            outcome: Outcome::Error,
            ..RequestFacts::default()
        };
        assert_eq!(Signal::Ttft(99).is_bad(&failed, 1.0), Some(true));
        assert_eq!(Signal::ErrorRate.is_bad(&failed, 0.0), Some(true));
        assert_eq!(Signal::Repetition.is_bad(&failed, 0.2), None);
    }

    #[test]
    fn a_caller_who_left_says_nothing_of_the_service() {
        let left = RequestFacts {
            outcome: Outcome::Excluded,
            total_s: 99.0,
            ..RequestFacts::default()
        };
        for signal in [Signal::ErrorRate, Signal::Latency(99), Signal::WatchWords] {
            assert_eq!(signal.is_bad(&left, 0.0), None);
        }
    }

    #[test]
    fn strata_follow_the_cached_share() {
        let of = |cached| RequestFacts {
            prompt_tokens: Some(100),
            cached_tokens: cached,
            ..RequestFacts::default()
        };
        assert_eq!(
            [0, 9, 10, 59, 60, 100].map(|cached| of(cached).stratum()),
            [0, 0, 1, 1, 2, 2]
        );
        assert_eq!(RequestFacts::default().stratum(), 0);
        assert_eq!(
            RequestFacts {
                chosen: true,
                ..of(60)
            }
            .stratum(),
            5
        );
    }
}
