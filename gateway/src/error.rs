//! The statuses that the gateway makes itself; workers' statuses pass through as they are.

use std::time::Duration;

use penstock_plan::Outcome;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// When a caller may come back to a gateway that found no worker.
const RETRY_LATER: Duration = Duration::from_secs(1);

/// A field that is not as it must be; `why` is the rest of the sentence.
pub(crate) fn bad_request(field: &str, why: impl std::fmt::Display) -> Status {
    let why = why.to_string();
    let message = format!("{field} {why}");
    Status::with_error_details(
        Code::InvalidArgument,
        message,
        ErrorDetails::with_bad_request_violation(field, why),
    )
}

/// Nobody can serve the request now.
pub(crate) fn unavailable(message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_retry_info(Some(RETRY_LATER));
    Status::with_error_details(Code::Unavailable, message, details)
}

/// There is no room, or the caller has had its share.
pub(crate) fn exhausted(message: impl Into<String>, retry_after: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(retry_after));
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// Whether a code tells of a worker that is out of order, and not of load or of a request that cannot be served.
pub(crate) fn is_workers(code: Code) -> bool {
    matches!(code, Code::Unknown | Code::Internal | Code::DataLoss)
}

/// The caller's time is up.
pub(crate) fn deadline() -> Status {
    Status::deadline_exceeded("the deadline of the request has passed")
}

/// What a code says of the service that gave it.
pub(crate) fn judged(code: Code) -> Outcome {
    match code {
        Code::Ok => Outcome::Ok,
        Code::DeadlineExceeded => Outcome::Timeout,
        // The caller left, or asked for what cannot be.
        Code::Cancelled
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Unauthenticated => Outcome::Excluded,
        // A failed precondition is a worker that does not serve what it was chosen for.
        Code::Unknown
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Outcome::Error,
    }
}

/// Name of a code as metrics and spans have it.
pub(crate) fn outcome(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}
