//! Conversions between wire messages and the plan's types.
//!
//! From the plan to the wire nothing can fail. From the wire to the plan everything that the plan's types cannot
//! hold is refused by name: a sub-message that is missing, a share above 100 %, an enum value that this build
//! does not know. A conversion never checks more than that; whether a snapshot makes sense is for
//! [`Snapshot::validate`](penstock_plan::Snapshot::validate).
//!
//! ```
//! use penstock_plan::Snapshot;
//! use penstock_proto::v1;
//!
//! let wire = v1::Snapshot { epoch: 7, ..Default::default() };
//! assert_eq!(Snapshot::try_from(wire)?.epoch, 7);
//!
//! let broken = v1::Snapshot { routes: vec![v1::Route { model: "demo".into(), ..Default::default() }], ..Default::default() };
//! let error = Snapshot::try_from(broken).unwrap_err();
//! assert_eq!(error.to_string(), "routes[demo].stable: it is missing");
//! # Ok::<(), penstock_proto::convert::ConvertError>(())
//! ```

mod rollout;
mod snapshot;
mod topology;

pub use rollout::rollout;

/// A message that cannot be converted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ConvertError {
    /// Path of the offending field, e.g. `routes[demo].canary.ppm`.
    pub field: String,
    /// What is wrong with it, with the offending value.
    pub message: String,
}

// === impl ConvertError ===

impl ConvertError {
    fn new(field: &str, message: impl Into<String>) -> Self {
        Self {
            field: field.to_owned(),
            message: message.into(),
        }
    }

    /// The same error, seen from the message that holds the field's own.
    fn within(self, outer: &str) -> Self {
        let separator = if self.field.starts_with('[') { "" } else { "." };
        Self {
            field: format!("{outer}{separator}{}", self.field),
            ..self
        }
    }
}

/// A sub-message that has to be there.
fn required<T>(value: Option<T>, field: &str) -> Result<T, ConvertError> {
    value.ok_or_else(|| ConvertError::new(field, "it is missing"))
}

#[cfg(test)]
mod tests;
