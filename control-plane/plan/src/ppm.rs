//! Traffic shares in parts per million.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A share of traffic in parts per million, 0 to 1,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Ppm(u32);

/// A share that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a share: {reason}")]
pub struct PpmError {
    value: String,
    reason: &'static str,
}

impl Ppm {
    /// Nothing.
    pub const ZERO: Self = Self(0);
    /// Everything.
    pub const ALL: Self = Self(1_000_000);

    /// A share of `ppm` parts per million.
    ///
    /// # Errors
    /// More than 1,000,000.
    pub fn new(ppm: u32) -> Result<Self, PpmError> {
        if ppm > Self::ALL.0 {
            return Err(error(&ppm.to_string(), "it is above 1000000 parts per million"));
        }
        Ok(Self(ppm))
    }

    /// Parts per million.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// As a fraction of 1.
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / 1e6
    }
}

// === impl Ppm ===

impl TryFrom<u32> for Ppm {
    type Error = PpmError;

    fn try_from(ppm: u32) -> Result<Self, PpmError> {
        Self::new(ppm)
    }
}

impl From<Ppm> for u32 {
    fn from(share: Ppm) -> Self {
        share.0
    }
}

/// Percent, with as many decimals as it takes: `5%`, `0.5%`, `0.0001%`.
impl fmt::Display for Ppm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 10_000, self.0 % 10_000);
        if rest == 0 {
            return f.pad(&format!("{whole}%"));
        }
        let decimals = format!("{rest:04}");
        f.pad(&format!("{whole}.{}%", decimals.trim_end_matches('0')))
    }
}

/// `5%`, `0.5%` or `50000ppm`; a bare number is refused, because nobody knows which of the two it means.
impl FromStr for Ppm {
    type Err = PpmError;

    fn from_str(value: &str) -> Result<Self, PpmError> {
        let trimmed = value.trim();
        if let Some(ppm) = trimmed.strip_suffix("ppm") {
            let ppm = ppm
                .trim()
                .parse()
                .map_err(|_| error(value, "parts per million are a whole number"))?;
            return Self::new(ppm).map_err(|e| error(value, e.reason));
        }
        let Some(percent) = trimmed.strip_suffix('%') else {
            return Err(error(value, "write it as a percentage, for example 5%"));
        };
        let ppm = percent_to_ppm(percent.trim()).map_err(|reason| error(value, reason))?;
        Self::new(ppm).map_err(|_| error(value, "it is above 100%"))
    }
}

/// Decimal arithmetic on the digits: a share is exact or refused.
fn percent_to_ppm(percent: &str) -> Result<u32, &'static str> {
    const SHAPE: &str = "a percentage is a number from 0 to 100, for example 2.5%";
    let (whole, decimals) = percent.split_once('.').unwrap_or((percent, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty()
        || !digits(whole)
        || !digits(decimals)
        || (percent.contains('.') && decimals.is_empty())
    {
        return Err(SHAPE);
    }
    if decimals.trim_end_matches('0').len() > 4 {
        return Err("the smallest step is 0.0001%");
    }
    let whole: u32 = whole.parse().map_err(|_| SHAPE)?;
    let decimals = format!("{:0<4}", decimals.trim_end_matches('0'));
    let rest: u32 = decimals.parse().map_err(|_| SHAPE)?;
    whole
        .checked_mul(10_000)
        .and_then(|ppm| ppm.checked_add(rest))
        .ok_or(SHAPE)
}

fn error(value: &str, reason: &'static str) -> PpmError {
    PpmError {
        value: value.into(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_are_read_exactly() {
        for (text, ppm) in [
            ("5%", 50_000),
            ("0.5%", 5_000),
            ("0.0001%", 1),
            ("100%", 1_000_000),
            ("2.50 %", 25_000),
            ("20000ppm", 20_000),
        ] {
            assert_eq!(text.parse::<Ppm>().unwrap().get(), ppm, "{text}");
        }
    }

    #[test]
    fn what_is_no_share_is_refused_with_its_value() {
        for text in [
            "",
            "5",
            "%",
            "-1%",
            "101%",
            "0.00001%",
            "NaN%",
            "1e2%",
            "5.%",
            ".5%",
            "1000001ppm",
            "99999999999%",
        ] {
            let error = text.parse::<Ppm>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(ppm in 0u32..=1_000_000) {
            let share = Ppm::new(ppm).unwrap();
            prop_assert_eq!(share.to_string().parse::<Ppm>().unwrap(), share);
        }
    }
}
