//! `grpc-timeout`: how long a caller waits (gRPC over HTTP/2, "Timeout").

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::Status;

use crate::error;

/// When the caller of a request that arrives now stops waiting; `default` counts where it does not say so.
/// A time that no clock reaches is no deadline.
pub(crate) fn deadline(headers: &HeaderMap, default: Duration) -> Result<Option<Instant>, Status> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(Instant::now().checked_add(default));
    };
    let timeout = value.to_str().ok().and_then(parse).ok_or_else(|| {
        error::bad_request(
            "grpc-timeout",
            format!("{value:?} is not up to eight digits and one of H, M, S, m, u, n"),
        )
    })?;
    Ok(Instant::now().checked_add(timeout))
}

fn parse(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// Writes a timeout in the finest unit whose eight digits hold it.
pub(crate) fn format(timeout: Duration) -> HeaderValue {
    let units = [
        (timeout.as_nanos(), 'n'),
        (timeout.as_micros(), 'u'),
        (timeout.as_millis(), 'm'),
        (timeout.as_secs().into(), 'S'),
    ];
    let fits = units.into_iter().find(|(amount, _)| *amount < 100_000_000);
    let (amount, unit) = fits.unwrap_or((99_999_999, 'S'));
    HeaderValue::try_from(format!("{amount}{unit}")).unwrap_or_else(|_| HeaderValue::from_static("99999999S"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for timeout in [
            Duration::ZERO,
            Duration::from_nanos(7),
            Duration::from_micros(1_500),
            Duration::from_millis(99_999),
            Duration::from_secs(86_400),
            Duration::from_secs(99_999_999),
        ] {
            assert_eq!(parse(format(timeout).to_str().unwrap()), Some(timeout));
        }
        assert_eq!(
            parse(format(Duration::MAX).to_str().unwrap()),
            Some(Duration::from_secs(99_999_999))
        );
    }

    #[test]
    fn other_texts_are_no_timeouts() {
        for value in ["S", "5", "-5S", "+5S", "5 S", "999999999S", "5s", "5é", ""] {
            assert_eq!(parse(value), None, "{value}");
        }
    }
}
