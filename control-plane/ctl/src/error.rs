//! Everything that can end a command, its one line and its exit code.

use penstock_telemetry::TelemetryError;
use std::{error::Error, io, time::Duration};
use tonic::{Code, Status};

/// A server that `ctl` talks to, and how the operator says where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) what: &'static str,
    pub(crate) address: String,
    pub(crate) flag: &'static str,
    pub(crate) variable: &'static str,
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
    #[error("not changed: you did not say yes")]
    Declined,
    #[error("{0}")]
    RolledBack(String),
    #[error("{0}")]
    NotConverged(String),
    /// The rollout is paused: somebody is to do something.
    #[error("{0}")]
    Waiting(String),
    /// The answer of `diff`; it has been written, and there is nothing to add.
    #[error("they differ")]
    Differs,
    #[error("cannot read {path}")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
    /// What is wrong has been written.
    #[error("{path} has {errors}; nothing is written")]
    Findings { path: String, errors: String },
    #[error("{0}")]
    Failed(String),
    #[error(
        "`{}` is no address of the {}: write http://host:port ({} or {})",
        peer.address, peer.what, peer.flag, peer.variable
    )]
    Address { peer: Peer },
    #[error(
        "cannot reach the {} at {}: {cause}; is it running there? say where with {} or {}",
        peer.what, peer.address, peer.flag, peer.variable
    )]
    Unreachable { peer: Peer, cause: String },
    #[error("the {} at {} {}", peer.what, peer.address, told(status))]
    Call { peer: Peer, status: Status },
    #[error("the {} at {} did not answer within {}", peer.what, peer.address, crate::output::time(*after))]
    Silent { peer: Peer, after: Duration },
    #[error("the {} sent what this version of ctl cannot use: {reason}", peer.what)]
    Nonsense { peer: Peer, reason: String },
    #[error("cannot write to stdout")]
    Output(#[source] io::Error),
    #[error("cannot write {format}: {reason}")]
    Encode { format: &'static str, reason: String },
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
}

impl CtlError {
    /// Exit code of the process.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Usage(_)
            | Self::Address { .. }
            | Self::Telemetry(_)
            | Self::Read { .. }
            | Self::Findings { .. } => 2,
            Self::NotFound(_) => 3,
            Self::Conflict(_) => 4,
            Self::Unreachable { .. } => 5,
            Self::RolledBack(_) => 7,
            Self::NotConverged(_) | Self::Silent { .. } => 8,
            Self::Waiting(_) => 9,
            Self::Call { status, .. } => code_of(status.code()),
            Self::Declined
            | Self::Differs
            | Self::Failed(_)
            | Self::Nonsense { .. }
            | Self::Output(_)
            | Self::Encode { .. } => 1,
        }
    }
}

/// The exit code's word, for `error.type` of the command's span.
pub(crate) fn kind(code: u8) -> &'static str {
    match code {
        2 => "usage",
        3 => "not_found",
        4 => "conflict",
        5 => "unavailable",
        6 => "denied",
        7 => "rolled_back",
        8 => "timed_out",
        9 => "waiting",
        _ => "failed",
    }
}

/// Exit code for a gRPC status.
fn code_of(code: Code) -> u8 {
    match code {
        Code::Ok => 0,
        Code::InvalidArgument | Code::OutOfRange => 2,
        Code::NotFound => 3,
        Code::AlreadyExists | Code::Aborted | Code::FailedPrecondition => 4,
        Code::Unavailable | Code::ResourceExhausted => 5,
        Code::PermissionDenied | Code::Unauthenticated => 6,
        Code::DeadlineExceeded => 8,
        Code::Cancelled | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => 1,
    }
}

/// What a server's refusal means to an operator.
fn told(status: &Status) -> String {
    let message = status.message();
    let verb = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => "refuses the request",
        Code::NotFound => "does not find it",
        Code::AlreadyExists => "has it already",
        Code::Aborted => "refuses: somebody else changed it first (see `ctl rollout get`)",
        Code::FailedPrecondition => "refuses in this state",
        Code::Unavailable => "is unavailable; try again",
        Code::ResourceExhausted => "is full; try again",
        Code::PermissionDenied | Code::Unauthenticated => "denies it",
        Code::DeadlineExceeded => "did not answer in time",
        Code::Unimplemented => "does not know this call; is it of another version?",
        _ => "failed",
    };
    if message.is_empty() {
        verb.to_owned()
    } else {
        format!("{verb}: {message}")
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some errors repeat their cause in their own text.
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(code: Code, message: &str) -> CtlError {
        let peer = Peer {
            what: "control plane",
            address: "http://cp:8090".into(),
            flag: "--control-plane",
            variable: "PENSTOCK_CONTROL_PLANE",
        };
        CtlError::Call {
            peer,
            status: Status::new(code, message),
        }
    }

    #[test]
    fn each_status_has_the_exit_code_of_the_command_lines_table() {
        let table = [
            (Code::InvalidArgument, 2),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 4),
            (Code::Aborted, 4),
            (Code::FailedPrecondition, 4),
            (Code::Unavailable, 5),
            (Code::PermissionDenied, 6),
            (Code::Unauthenticated, 6),
            (Code::DeadlineExceeded, 8),
            (Code::Internal, 1),
        ];
        for (code, exit) in table {
            assert_eq!(call(code, "").code(), exit, "{code:?}");
        }
        assert_eq!(CtlError::RolledBack(String::new()).code(), 7);
        assert_eq!(CtlError::NotConverged(String::new()).code(), 8);
        assert_eq!(CtlError::Waiting(String::new()).code(), 9);
    }

    #[test]
    fn a_refusal_is_one_line_that_names_the_server_and_its_words() {
        let line = chain(&call(Code::NotFound, "no rollout\nof `demo`"));
        assert_eq!(
            line,
            "the control plane at http://cp:8090 does not find it: no rollout of `demo`"
        );
    }
}
