//! Channels to the control plane and to a gateway; every call carries the command's trace context.

use crate::{
    config::Connection,
    error::{CtlError, Peer},
};
use penstock_proto::v1::{admin_client::AdminClient, inference_client::InferenceClient};
use penstock_telemetry::propagation::InjectTraceContext;
use std::time::Duration;
use tonic::{
    Code, Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

/// A channel whose calls carry the trace context.
pub(crate) type Traced = InterceptedService<Channel, InjectTraceContext>;

/// The control plane's Admin service.
pub(crate) struct Admin {
    pub(crate) rpc: AdminClient<Traced>,
    pub(crate) peer: Peer,
    pub(crate) timeout: Duration,
}

impl Admin {
    /// Connects.
    pub(crate) async fn connect(connection: &Connection) -> Result<Self, CtlError> {
        let peer = Peer {
            what: "control plane",
            address: with_scheme(&connection.control_plane),
            flag: "--control-plane",
            variable: "PENSTOCK_CONTROL_PLANE",
        };
        let channel = channel(&peer, connection.timeout()).await?;
        let rpc = AdminClient::with_interceptor(channel, InjectTraceContext);
        Ok(Self {
            rpc,
            peer,
            timeout: connection.timeout(),
        })
    }

    /// Makes an error out of a call's status.
    pub(crate) fn failed(&self, status: Status) -> CtlError {
        failed(&self.peer, self.timeout, status)
    }

    /// Makes an error out of a reply that cannot be used.
    pub(crate) fn nonsense(&self, reason: impl Into<String>) -> CtlError {
        CtlError::Nonsense {
            peer: self.peer.clone(),
            reason: reason.into(),
        }
    }
}

/// A gateway's Inference service.
pub(crate) struct Gateway {
    pub(crate) rpc: InferenceClient<Traced>,
    peer: Peer,
    timeout: Duration,
}

impl Gateway {
    /// Connects.
    pub(crate) async fn connect(connection: &Connection) -> Result<Self, CtlError> {
        let peer = Peer {
            what: "gateway",
            address: with_scheme(&connection.gateway),
            flag: "--gateway",
            variable: "PENSTOCK_GATEWAY",
        };
        let channel = channel(&peer, connection.timeout()).await?;
        let rpc = InferenceClient::with_interceptor(channel, InjectTraceContext);
        Ok(Self {
            rpc,
            peer,
            timeout: connection.timeout(),
        })
    }

    /// Makes an error out of a call's status.
    pub(crate) fn failed(&self, status: Status) -> CtlError {
        failed(&self.peer, self.timeout, status)
    }
}

async fn channel(peer: &Peer, timeout: Duration) -> Result<Channel, CtlError> {
    // Without TLS an https address would be spoken to in the clear.
    let endpoint = match Endpoint::from_shared(peer.address.clone()) {
        Ok(endpoint) if peer.address.starts_with("http://") => endpoint,
        _ => return Err(CtlError::Address { peer: peer.clone() }),
    };
    let endpoint = endpoint
        .connect_timeout(timeout)
        .timeout(timeout)
        .tcp_nodelay(true);
    endpoint.connect().await.map_err(|error| {
        // tonic's own text is "transport error"; what helps is at the bottom.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        CtlError::Unreachable {
            peer: peer.clone(),
            cause: cause.to_string(),
        }
    })
}

fn with_scheme(address: &str) -> String {
    if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    }
}

fn failed(peer: &Peer, timeout: Duration, status: Status) -> CtlError {
    let peer = peer.clone();
    match status.code() {
        // The channel's own limit, as opposed to a deadline that the server tells of. tonic keeps of it only
        // the text.
        Code::Cancelled if status.message() == tonic::TimeoutExpired(()).to_string() => {
            CtlError::Silent { peer, after: timeout }
        }
        _ => CtlError::Call { peer, status },
    }
}
