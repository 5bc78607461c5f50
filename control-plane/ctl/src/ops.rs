//! Operations ports of workers and gateways, over HTTP: what must work while the control plane is down.

use crate::{
    connect::Admin,
    error::{CtlError, Peer},
};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use penstock_proto::v1::{ListGatewaysRequest, ListWorkersRequest};
use std::time::Duration;

/// One operations port.
#[derive(Debug)]
pub(crate) struct Ops {
    pub(crate) name: String,
    peer: Peer,
    timeout: Duration,
}

/// Whether a name is host:port, which needs nobody to look it up.
pub(crate) fn is_address(name: &str) -> bool {
    name.contains(':')
}

impl Ops {
    /// The port at host:port.
    pub(crate) fn at(what: &'static str, name: &str, address: &str, timeout: Duration) -> Self {
        let address = address
            .trim_start_matches("http://")
            .trim_end_matches('/')
            .to_owned();
        let (flag, variable) = match what {
            "gateway" => ("--gateway", "its name with --control-plane"),
            _ => ("its operations address", "its id with --control-plane"),
        };
        let peer = Peer {
            what,
            address,
            flag,
            variable,
        };
        Self {
            name: name.to_owned(),
            peer,
            timeout,
        }
    }

    /// The worker with this id, as the control plane knows it.
    pub(crate) async fn of_worker(admin: &mut Admin, id: &str) -> Result<Self, CtlError> {
        let reply = admin.rpc.list_workers(ListWorkersRequest {}).await;
        let workers = reply.map_err(|status| admin.failed(status))?.into_inner().workers;
        let known = workers.into_iter().map(|worker| (worker.id, worker.ops_address));
        named("worker", id, known.collect(), admin.timeout)
    }

    /// The gateway with this name, as the control plane knows it.
    pub(crate) async fn of_gateway(admin: &mut Admin, name: &str) -> Result<Self, CtlError> {
        let reply = admin.rpc.list_gateways(ListGatewaysRequest {}).await;
        let gateways = reply
            .map_err(|status| admin.failed(status))?
            .into_inner()
            .gateways;
        let known = gateways
            .into_iter()
            .map(|gateway| (gateway.node, gateway.ops_address));
        named("gateway", name, known.collect(), admin.timeout)
    }

    /// Sends a request and gives back the body of a good reply.
    pub(crate) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<String, CtlError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.peer.address));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let request = request.body(Full::new(body)).map_err(|_| CtlError::Address {
            peer: self.peer.clone(),
        })?;
        let silent = || CtlError::Silent {
            peer: self.peer.clone(),
            after: self.timeout,
        };
        let exchange = async {
            let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
            let reply = client
                .request(request)
                .await
                .map_err(|error| self.unreachable(&error))?;
            let status = reply.status();
            let body = reply.into_body().collect().await;
            let body = body.map_err(|error| self.unreachable(&error))?.to_bytes();
            Ok::<_, CtlError>((status, String::from_utf8_lossy(&body).into_owned()))
        };
        let (status, text) = tokio::time::timeout(self.timeout, exchange)
            .await
            .map_err(|_| silent())??;
        if status.is_success() {
            Ok(text)
        } else {
            Err(self.refused(status, text.trim()))
        }
    }

    /// Makes an error out of a reply that cannot be used.
    pub(crate) fn nonsense(&self, reason: impl Into<String>) -> CtlError {
        CtlError::Nonsense {
            peer: self.peer.clone(),
            reason: reason.into(),
        }
    }

    fn unreachable(&self, error: &dyn std::error::Error) -> CtlError {
        // hyper's own text is "client error (Connect)"; what helps is at the bottom.
        let mut cause = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        CtlError::Unreachable {
            peer: self.peer.clone(),
            cause: cause.to_string(),
        }
    }

    fn refused(&self, status: StatusCode, text: &str) -> CtlError {
        let Peer { what, address, .. } = &self.peer;
        // A gateway puts its words into an OpenAI error; a worker says them as they are.
        let told: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        let text = told["error"]["message"].as_str().unwrap_or(text);
        let line = format!("the {what} at {address} refuses ({status}): {text}");
        match status {
            StatusCode::NOT_FOUND => CtlError::NotFound(line),
            StatusCode::CONFLICT => CtlError::Conflict(line),
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => CtlError::Usage(line),
            _ => CtlError::Failed(line),
        }
    }
}

fn named(
    what: &'static str,
    name: &str,
    known: Vec<(String, String)>,
    timeout: Duration,
) -> Result<Ops, CtlError> {
    match known.iter().find(|(known, _)| known == name) {
        Some((_, address)) if address.is_empty() => Err(CtlError::NotFound(format!(
            "{what} {name} tells no operations address: name its host:port instead"
        ))),
        Some((_, address)) => Ok(Ops::at(what, name, address, timeout)),
        None => {
            let names: Vec<_> = known.into_iter().map(|(name, _)| name).collect();
            let names = if names.is_empty() {
                "none is known".to_owned()
            } else {
                names.join(", ")
            };
            Err(CtlError::NotFound(format!(
                "there is no {what} {name}; known: {names}"
            )))
        }
    }
}
