//! Where a control plane listens.

use std::{error::Error, fmt, str::FromStr, time::Duration};

use tonic::transport::Endpoint;

/// A control plane's address: `HOST:PORT`, or the same as an `http://` URL.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address(String);

/// An address that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a control plane's address: write HOST:PORT, for example 127.0.0.1:8090")]
pub struct AddressError(String);

// === impl Address ===

impl Address {
    /// How to connect, for as long as `timeout`, with probes that tell a dead peer from a quiet one.
    pub(crate) fn endpoint(&self, timeout: Duration) -> Endpoint {
        Endpoint::from_shared(self.0.clone())
            .expect("checked when the address was read")
            .connect_timeout(timeout)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(value: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(value.to_owned());
        let url = match value.trim().trim_end_matches('/') {
            // Without TLS an https address would be spoken to in the clear.
            url if url.contains("://") && !url.starts_with("http://") => return Err(wrong()),
            url if url.starts_with("http://") => url.to_owned(),
            authority => format!("http://{authority}"),
        };
        let endpoint = Endpoint::from_shared(url.clone()).map_err(|_| wrong())?;
        let uri = endpoint.uri();
        let plain = uri.path() == "/" && uri.query().is_none();
        if uri.host().is_none_or(str::is_empty) || uri.port_u16().is_none_or(|port| port == 0) || !plain {
            return Err(wrong());
        }
        Ok(Self(url))
    }
}

/// The last cause of an error. Where tonic says only "transport error", it is the part that helps.
pub(crate) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_may_be_left_out() {
        for text in [
            "127.0.0.1:8090",
            "http://127.0.0.1:8090",
            " http://127.0.0.1:8090/ ",
        ] {
            assert_eq!(
                text.parse::<Address>().unwrap().to_string(),
                "http://127.0.0.1:8090"
            );
        }
        assert_eq!(
            "[::1]:8090".parse::<Address>().unwrap().to_string(),
            "http://[::1]:8090"
        );
        assert_eq!(
            "plane-0.plane:8090".parse::<Address>().unwrap().to_string(),
            "http://plane-0.plane:8090"
        );
    }

    #[test]
    fn what_is_no_address_is_refused_with_its_value() {
        for text in [
            "",
            "plane",
            ":8090",
            "plane:0",
            "plane:99999",
            "https://plane:8090",
            "plane:8090/path",
            "a b:1",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
