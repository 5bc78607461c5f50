//! Why a call fails, and the status that says so.

use std::time::Duration;

use penstock_engine::{MatcherError, SequenceError, SubmitError};
use penstock_grammar::GrammarError;
use penstock_text::TextError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::request::Violation;
use crate::readiness::Readiness;

/// When a caller may come back to a worker that is loading, draining or stalled. Another worker may serve
/// at once.
const RETRY_LATER: Duration = Duration::from_secs(1);

/// Why a call cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("{}", sentence(.0))]
    Invalid(Vec<Violation>),
    #[error("model {model:?} is not served here; {served}")]
    UnknownModel { model: String, served: String },
    #[error("revision {revision:?} of model {model:?} is not served here; {served}")]
    WrongRevision {
        model: String,
        revision: String,
        served: String,
    },
    #[error("this worker is {0}")]
    NotReady(Readiness),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    #[error("the engine ended without finishing the reply")]
    EngineGone,
}

impl From<Violation> for CallError {
    fn from(violation: Violation) -> Self {
        Self::Invalid(vec![violation])
    }
}

impl CallError {
    /// Names the failure in spans and metrics (`error.type`).
    pub(crate) fn kind(&self) -> &'static str {
        match self.code() {
            Code::InvalidArgument => "invalid_argument",
            Code::NotFound => "not_found",
            Code::FailedPrecondition => "failed_precondition",
            Code::ResourceExhausted => "resource_exhausted",
            Code::Unavailable => "unavailable",
            Code::DeadlineExceeded => "deadline_exceeded",
            _ => "internal",
        }
    }

    /// Whether the fault is the worker's, not the caller's or the load's.
    pub(crate) fn is_ours(&self) -> bool {
        let lost = matches!(
            self,
            Self::EngineGone | Self::Sequence(SequenceError::Internal | SequenceError::Unavailable(_))
        );
        lost || self.code() == Code::Internal
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::UnknownModel { .. } => Code::NotFound,
            Self::WrongRevision { .. } => Code::FailedPrecondition,
            Self::NotReady(_) => Code::Unavailable,
            Self::Submit(error) => match error {
                SubmitError::QueueFull { .. } => Code::ResourceExhausted,
                SubmitError::ShuttingDown => Code::Unavailable,
                _ => Code::InvalidArgument,
            },
            Self::Grammar(error) if error.is_retryable() => Code::ResourceExhausted,
            Self::Grammar(error) if error.is_internal() => Code::Internal,
            Self::Grammar(_) => Code::InvalidArgument,
            Self::Text(TextError::Encode(_) | TextError::Render(_)) => Code::InvalidArgument,
            Self::Text(_) => Code::Internal,
            Self::Sequence(error) => match error {
                SequenceError::DeadlineExceeded { .. } => Code::DeadlineExceeded,
                // Another worker can go on with the reply.
                SequenceError::ShuttingDown | SequenceError::Internal | SequenceError::Unavailable(_) => {
                    Code::Unavailable
                }
                // Only as the reply goes on does it show how large an automaton becomes.
                SequenceError::Grammar(MatcherError::TooComplex { .. } | MatcherError::DeadEnd { .. }) => {
                    Code::InvalidArgument
                }
                _ => Code::Internal,
            },
            Self::EngineGone => Code::Unavailable,
        }
    }

    fn violations(&self) -> Vec<Violation> {
        let one = |field: &str| vec![Violation::new(field, self.to_string())];
        match self {
            Self::Invalid(violations) => violations.clone(),
            Self::Submit(SubmitError::PromptTooLong { .. } | SubmitError::EmptyPrompt) => one("input"),
            Self::Submit(SubmitError::TokenOutOfRange { position, .. }) => {
                one(&format!("input_ids.ids[{position}]"))
            }
            Self::Submit(SubmitError::Sampling(error)) => one(&format!("sampling.{}", error.field)),
            Self::Grammar(_) | Self::Sequence(SequenceError::Grammar(_))
                if self.code() == Code::InvalidArgument =>
            {
                one("grammar")
            }
            Self::Text(TextError::Render(_)) => one("chat.messages"),
            Self::Text(TextError::Encode(_)) => one("input"),
            _ => Vec::new(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Submit(SubmitError::QueueFull { retry_after, .. }) => Some(*retry_after),
            Self::Grammar(error) if error.is_retryable() => Some(RETRY_LATER),
            _ if self.code() == Code::Unavailable => Some(RETRY_LATER),
            _ => None,
        }
    }
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        let mut details = ErrorDetails::new();
        for violation in error.violations() {
            details.add_bad_request_violation(violation.field, violation.description);
        }
        if let Some(after) = error.retry_after() {
            details.set_retry_info(Some(after));
        }
        Status::with_error_details(error.code(), error.to_string(), details)
    }
}

fn sentence(violations: &[Violation]) -> String {
    let sentences: Vec<String> = violations
        .iter()
        .map(|violation| format!("{} {}", violation.field, violation.description))
        .collect();
    sentences.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_violation_is_in_the_message_and_in_the_details() {
        let violations = vec![
            Violation::new("input", "is missing"),
            Violation::new("sampling.top_p", "must be in (0, 1], not 2"),
        ];
        let status = Status::from(CallError::Invalid(violations));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(
            status.message(),
            "input is missing; sampling.top_p must be in (0, 1], not 2"
        );
        let details = status.get_details_bad_request().unwrap();
        let fields: Vec<&str> = details
            .field_violations
            .iter()
            .map(|violation| violation.field.as_str())
            .collect();
        assert_eq!(fields, ["input", "sampling.top_p"]);
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let error = SubmitError::QueueFull {
            waiting: 8,
            retry_after: Duration::from_millis(250),
        };
        let status = Status::from(CallError::from(error));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(
            status.get_details_retry_info().unwrap().retry_delay,
            Some(Duration::from_millis(250))
        );
    }

    #[test]
    fn the_status_table_holds() {
        for (error, code) in [
            (
                SubmitError::PromptTooLong {
                    prompt: 9,
                    context: 8,
                }
                .into(),
                Code::InvalidArgument,
            ),
            (SubmitError::ShuttingDown.into(), Code::Unavailable),
            (
                SequenceError::DeadlineExceeded { completion_tokens: 3 }.into(),
                Code::DeadlineExceeded,
            ),
            (SequenceError::Runner("nan".into()).into(), Code::Internal),
            (SequenceError::Internal.into(), Code::Unavailable),
            (CallError::EngineGone, Code::Unavailable),
            (CallError::NotReady(Readiness::Draining), Code::Unavailable),
            (TextError::Render("roles".into()).into(), Code::InvalidArgument),
            (GrammarError::Busy { waiting: 64 }.into(), Code::ResourceExhausted),
            (
                GrammarError::TooLarge { bytes: 9, limit: 8 }.into(),
                Code::InvalidArgument,
            ),
            (
                SequenceError::Grammar(MatcherError::DeadEnd { committed: 4 }).into(),
                Code::InvalidArgument,
            ),
        ] {
            let error: CallError = error;
            assert_eq!(Status::from(error).code(), code);
        }
    }
}
