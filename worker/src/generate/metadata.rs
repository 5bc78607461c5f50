//! What a call's metadata says.

use std::time::{Duration, Instant};

use penstock_proto::metadata as names;
use tonic::metadata::{MetadataMap, MetadataValue};

use super::request::Violation;

/// Metadata of a Generate call.
#[derive(Debug, Default)]
pub(crate) struct CallMetadata {
    /// The revision that must serve, chosen by the gateway or pinned by a direct client.
    pub(crate) revision: Option<String>,
    /// Epoch of the snapshot that assigned the request.
    pub(crate) epoch: Option<String>,
    /// Why it was assigned so.
    pub(crate) reason: Option<String>,
    /// Who the request counts for; 0 where nobody said so.
    pub(crate) tenant: u64,
    /// When the caller stops waiting.
    pub(crate) deadline: Option<Instant>,
}

impl CallMetadata {
    /// Reads it. `arrived` is when the call came in: `grpc-timeout` counts from there.
    pub(crate) fn read(metadata: &MetadataMap, arrived: Instant) -> Result<Self, Violation> {
        let text = |name| -> Result<Option<String>, Violation> {
            let Some(value) = metadata.get(name) else {
                return Ok(None);
            };
            let value = value
                .to_str()
                .map_err(|_| Violation::new(name, "is not ASCII text"))?;
            Ok((!value.is_empty()).then(|| value.to_string()))
        };
        let deadline = match text("grpc-timeout")? {
            None => None,
            // A time that no clock reaches is no deadline.
            Some(value) => arrived.checked_add(parse_timeout(&value)?),
        };
        let tenant = match text(names::TENANT)? {
            None => 0,
            Some(value) => value
                .parse()
                .map_err(|_| Violation::new(names::TENANT, format!("{value:?} is not a number")))?,
        };
        Ok(Self {
            tenant,
            revision: text(names::MODEL_VERSION)?,
            epoch: text(names::ROLLOUT_EPOCH)?,
            reason: text(names::ASSIGNMENT_REASON)?,
            deadline,
        })
    }

    /// Epoch and reason as they are told on; a direct call has no epoch.
    pub(crate) fn epoch(&self) -> &str {
        self.epoch.as_deref().unwrap_or("0")
    }

    /// Why the request runs here.
    pub(crate) fn reason(&self) -> &str {
        match (&self.reason, &self.revision) {
            (Some(reason), _) => reason,
            (None, Some(_)) => "pin",
            (None, None) => "direct",
        }
    }

    /// Response metadata: who answers, why, and with which seed.
    pub(crate) fn respond(&self, revision: &str, seed: u64, metadata: &mut MetadataMap) {
        metadata.insert(names::SEED, seed.into());
        self.tell(revision, metadata);
    }

    /// Response metadata of a reply without random numbers.
    pub(crate) fn tell(&self, revision: &str, metadata: &mut MetadataMap) {
        for (name, value) in [
            (names::MODEL_VERSION, revision),
            (names::ROLLOUT_EPOCH, self.epoch()),
            (names::ASSIGNMENT_REASON, self.reason()),
        ] {
            // Values read from metadata can be written there; a revision's name was checked at start-up.
            if let Ok(value) = MetadataValue::try_from(value) {
                metadata.insert(name, value);
            }
        }
    }
}

/// Reads a `grpc-timeout`: at most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn parse_timeout(value: &str) -> Result<Duration, Violation> {
    let invalid = || {
        Violation::new(
            "grpc-timeout",
            format!("{value:?} is not up to eight digits and one of H, M, S, m, u, n"),
        )
    };
    let split = value
        .len()
        .checked_sub(1)
        .filter(|&at| value.is_char_boundary(at))
        .ok_or_else(invalid)?;
    let (digits, unit) = value.split_at(split);
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid());
    }
    let amount: u64 = digits.parse().map_err(|_| invalid())?;
    match unit {
        "H" => Ok(Duration::from_secs(amount * 3600)),
        "M" => Ok(Duration::from_secs(amount * 60)),
        "S" => Ok(Duration::from_secs(amount)),
        "m" => Ok(Duration::from_millis(amount)),
        "u" => Ok(Duration::from_micros(amount)),
        "n" => Ok(Duration::from_nanos(amount)),
        _ => Err(invalid()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_of_grpc_timeout_is_read() {
        for (value, expected) in [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("99999999S", Duration::from_secs(99_999_999)),
            ("250m", Duration::from_millis(250)),
            ("5u", Duration::from_micros(5)),
            ("0n", Duration::ZERO),
        ] {
            assert_eq!(parse_timeout(value).unwrap(), expected, "{value}");
        }
    }

    #[test]
    fn other_timeouts_are_refused() {
        for value in ["S", "5", "-5S", "+5S", "5 S", "999999999S", "5s", "5é", ""] {
            assert_eq!(parse_timeout(value).unwrap_err().field, "grpc-timeout", "{value}");
        }
    }

    #[test]
    fn a_direct_call_says_so() {
        let call = CallMetadata::read(&MetadataMap::new(), Instant::now()).unwrap();
        assert_eq!(
            (call.epoch(), call.reason(), call.deadline),
            ("0", "direct", None)
        );
    }

    #[test]
    fn what_the_gateway_decided_is_echoed() {
        let mut metadata = MetadataMap::new();
        metadata.insert("x-model-version", "v2".parse().unwrap());
        metadata.insert("x-rollout-epoch", "7".parse().unwrap());
        metadata.insert("x-assignment-reason", "bucket".parse().unwrap());
        metadata.insert("grpc-timeout", "1S".parse().unwrap());
        let arrived = Instant::now();
        let call = CallMetadata::read(&metadata, arrived).unwrap();
        assert_eq!(call.deadline, Some(arrived + Duration::from_secs(1)));
        let mut reply = MetadataMap::new();
        call.respond("v2", u64::MAX, &mut reply);
        assert_eq!(reply.get("x-rollout-epoch").unwrap(), "7");
        assert_eq!(reply.get("x-assignment-reason").unwrap(), "bucket");
        assert_eq!(reply.get("x-seed").unwrap(), "18446744073709551615");
    }
}
