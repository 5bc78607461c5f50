//! One module a noun.

pub(crate) mod audit;
pub(crate) mod feedback;
pub(crate) mod gateway;
pub(crate) mod generate;
pub(crate) mod model;
mod pick;
pub(crate) mod rollout;
pub(crate) mod route;
pub(crate) mod worker;

use crate::{config::RequestAttributes, console::Console, error::CtlError};
use penstock_proto::metadata;

/// `ctl completions`.
pub(crate) fn completions(shell: clap_complete::Shell, console: &mut Console) -> Result<(), CtlError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::command(), "ctl", &mut script);
    console.data(&String::from_utf8_lossy(&script))
}

impl RequestAttributes {
    /// The request metadata that these stand for.
    fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        let named = [
            (metadata::USER_ID, &self.user),
            (metadata::MODEL_VERSION, &self.model_version),
        ];
        named
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.as_deref()?)))
            .chain(
                self.headers
                    .iter()
                    .map(|(name, value)| (name.as_str(), value.as_str())),
            )
    }
}
