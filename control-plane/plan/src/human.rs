//! Values as people write them in a plan: `5%`, `24h`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{Ppm, PpmError};

/// A share that reads and shows as `5%`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share(pub Ppm);

/// A time span that reads and shows as `500ms`, `90s`, `24h`; also `1h30m` and `7d` are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(Duration);

/// A time span that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a time span such as 90s, 24h or 1h30m: {reason}")]
pub struct SpanError {
    value: String,
    reason: String,
}

/// What a metric may be at most, with its unit: `1%`, `2s`, `512`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub enum Limit {
    /// A share in [0, 1].
    Share(f64),
    /// Seconds.
    Seconds(f64),
    /// A bare number: tokens or events.
    Number(f64),
}

/// A limit that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a limit: write a share such as 1%, a time span such as 2s, or a number")]
pub struct LimitError(String);

/// A scalar of YAML, which reads `512` as a number and `1%` as a text.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "this is not a limit: write a share such as 1%, a time span such as 2s, or a number"
)]
enum Written {
    Number(f64),
    Text(String),
}

// === impl Share ===

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for Share {
    type Error = PpmError;

    fn try_from(value: String) -> Result<Self, PpmError> {
        value.parse().map(Self)
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        share.0.to_string()
    }
}

// === impl Span ===

impl Span {
    /// No time at all.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// A span of so many seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// As the standard library's type.
    pub const fn get(self) -> Duration {
        self.0
    }

    /// In whole milliseconds.
    pub fn as_ms(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

/// In the largest unit up to hours that needs no fraction.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.as_ms();
        let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
        let unit = units.iter().find(|(size, _)| ms > 0 && ms.is_multiple_of(*size));
        match unit {
            Some((size, name)) => f.pad(&format!("{}{name}", ms / size)),
            None if ms == 0 => f.pad("0s"),
            None => f.pad(&format!("{ms}ms")),
        }
    }
}

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(value: &str) -> Result<Self, SpanError> {
        let parsed = humantime::parse_duration(value.trim());
        parsed.map(Self).map_err(|error| SpanError {
            value: value.to_owned(),
            reason: error.to_string(),
        })
    }
}

impl TryFrom<String> for Span {
    type Error = SpanError;

    fn try_from(value: String) -> Result<Self, SpanError> {
        value.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

// === impl Limit ===

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Six decimals of a percent are far below what a share can mean.
            Self::Share(share) => f.pad(&format!("{}%", (share * 1e8).round() / 1e6)),
            Self::Seconds(seconds) if *seconds < 1.0 => {
                f.pad(&format!("{}ms", (seconds * 1e6).round() / 1e3))
            }
            Self::Seconds(seconds) => f.pad(&format!("{seconds}s")),
            Self::Number(number) => f.pad(&number.to_string()),
        }
    }
}

impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(value: &str) -> Result<Self, LimitError> {
        let text = value.trim();
        let sane = |number: &f64| number.is_finite() && *number >= 0.0;
        if let Some(percent) = text.strip_suffix('%') {
            let share = percent.trim().parse::<f64>().ok().map(|percent| percent / 100.0);
            let share = share.filter(|share| sane(share) && *share <= 1.0);
            return share.map(Self::Share).ok_or_else(|| LimitError(value.to_owned()));
        }
        if let Some(number) = text.parse::<f64>().ok().filter(sane) {
            return Ok(Self::Number(number));
        }
        // `1.5s` is how people write it; the span parser knows whole numbers only.
        let seconds = text
            .strip_suffix("ms")
            .map(|ms| (ms, 1e-3))
            .or_else(|| text.strip_suffix('s').map(|s| (s, 1.0)));
        let seconds = seconds.and_then(|(number, unit)| Some(number.trim().parse::<f64>().ok()? * unit));
        let span = || Some(text.parse::<Span>().ok()?.get().as_secs_f64());
        let seconds = seconds.or_else(span).filter(sane);
        seconds
            .map(Self::Seconds)
            .ok_or_else(|| LimitError(value.to_owned()))
    }
}

impl TryFrom<Written> for Limit {
    type Error = LimitError;

    fn try_from(value: Written) -> Result<Self, LimitError> {
        match value {
            Written::Number(number) => number.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<Limit> for String {
    fn from(limit: Limit) -> Self {
        limit.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_people_write_them_and_shown_in_one_unit() {
        for (text, ms, shown) in [
            ("500ms", 500, "500ms"),
            ("90s", 90_000, "90s"),
            ("1h30m", 5_400_000, "90m"),
            ("24h", 86_400_000, "24h"),
            ("7d", 604_800_000, "168h"),
            ("0s", 0, "0s"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!((span.as_ms(), span.to_string().as_str()), (ms, shown));
            assert_eq!(span.to_string().parse(), Ok(span));
        }
        for text in ["", "10", "-1s", "fast"] {
            let error = text.parse::<Span>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn limits_carry_their_unit() {
        for (text, limit, shown) in [
            ("1%", Limit::Share(0.01), "1%"),
            ("0.05%", Limit::Share(0.0005), "0.05%"),
            ("2s", Limit::Seconds(2.0), "2s"),
            ("1.5s", Limit::Seconds(1.5), "1.5s"),
            ("250ms", Limit::Seconds(0.25), "250ms"),
            ("1m", Limit::Seconds(60.0), "60s"),
            ("512", Limit::Number(512.0), "512"),
        ] {
            let read: Limit = text.parse().unwrap();
            assert_eq!((read, read.to_string().as_str()), (limit, shown));
        }
        for text in ["", "101%", "-1", "NaN", "inf", "2 bananas"] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
    }
}
