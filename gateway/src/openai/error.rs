//! Statuses as HTTP errors in OpenAI's form.

use axum::{
    Json,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use penstock_proto::metadata;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The response to a request that failed before its reply began.
pub(crate) fn response(status: &Status) -> Response {
    let code = http_status(status.code());
    let mut response = (code, Json(body(status))).into_response();
    let headers = response.headers_mut();
    assignment(status, headers);
    if matches!(
        code,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        headers.insert(header::RETRY_AFTER, retry_after(status));
    }
    response
}

/// The error in JSON.
pub(crate) fn body(status: &Status) -> Value {
    let violation = status
        .get_details_bad_request()
        .and_then(|details| details.field_violations.into_iter().next());
    json!({
        "error": {
            "message": status.message().replace("sampling.", ""),
            "type": kind(status.code()),
            "param": violation.map(|violation| param(&violation.field).to_owned()),
            "code": code(status.code()),
        }
    })
}

/// Seconds, rounded up: HTTP knows no fractions.
fn retry_after(status: &Status) -> HeaderValue {
    let delay = status
        .get_details_retry_info()
        .and_then(|info| info.retry_delay)
        .unwrap_or_default();
    let seconds = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
    seconds.max(1).into()
}

fn assignment(status: &Status, headers: &mut HeaderMap) {
    for name in [
        metadata::MODEL_VERSION,
        metadata::ROLLOUT_EPOCH,
        metadata::ASSIGNMENT_REASON,
        metadata::ASSIGNMENT_RULE,
    ] {
        let value = status
            .metadata()
            .get(name)
            .and_then(|value| HeaderValue::from_bytes(value.as_encoded_bytes()).ok());
        if let Some(value) = value {
            headers.insert(name, value);
        }
    }
}

/// The worker's field by the name that HTTP clients know.
fn param(field: &str) -> &str {
    let field = field.strip_prefix("sampling.").unwrap_or(field);
    match field.strip_prefix("chat.").unwrap_or(field) {
        "input" => "prompt",
        field => field,
    }
}

fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::OutOfRange => StatusCode::PAYLOAD_TOO_LARGE,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::FailedPrecondition => StatusCode::PRECONDITION_FAILED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn kind(code: Code) -> &'static str {
    match code {
        Code::InvalidArgument
        | Code::OutOfRange
        | Code::NotFound
        | Code::FailedPrecondition
        | Code::Unimplemented => "invalid_request_error",
        Code::ResourceExhausted => "rate_limit_error",
        Code::Cancelled => "cancelled_error",
        Code::Unavailable => "service_unavailable_error",
        Code::DeadlineExceeded => "timeout_error",
        _ => "server_error",
    }
}

fn code(code: Code) -> &'static str {
    match code {
        Code::NotFound => "model_not_found",
        Code::InvalidArgument => "invalid_value",
        Code::OutOfRange => "request_too_large",
        Code::FailedPrecondition => "wrong_revision",
        Code::ResourceExhausted => "queue_full",
        code => crate::error::outcome(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tonic_types::ErrorDetails;

    #[test]
    fn the_status_table_holds() {
        for (code, expected) in [
            (Code::InvalidArgument, 400),
            (Code::NotFound, 404),
            (Code::FailedPrecondition, 412),
            (Code::OutOfRange, 413),
            (Code::ResourceExhausted, 429),
            (Code::Cancelled, 499),
            (Code::Internal, 500),
            (Code::Unavailable, 503),
            (Code::DeadlineExceeded, 504),
        ] {
            assert_eq!(
                response(&Status::new(code, "x")).status().as_u16(),
                expected,
                "{code:?}"
            );
        }
    }

    #[test]
    fn a_full_queue_says_when_to_come_back_in_whole_seconds() {
        let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(1200)));
        let status = Status::with_error_details(Code::ResourceExhausted, "full", details);
        assert_eq!(response(&status).headers()["retry-after"], "2");
    }

    #[test]
    fn a_workers_field_gets_the_name_that_clients_know() {
        let status = crate::error::bad_request("sampling.top_p", "must be in (0, 1], not 2");
        let error = &body(&status)["error"];
        assert_eq!(
            (&error["param"], &error["message"]),
            (&json!("top_p"), &json!("top_p must be in (0, 1], not 2"))
        );
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("invalid_request_error"), &json!("invalid_value"))
        );
    }
}
