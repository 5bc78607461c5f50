//! What the remote places need to know, from the environment.

use std::{collections::BTreeMap, fmt, time::Duration};

/// How checkpoints are reached.
#[derive(Clone)]
pub struct SourceConfig {
    /// Base URL of the Hugging Face Hub or of a mirror, `https://huggingface.co` by default.
    pub hf_endpoint: String,
    /// Token for repositories that are not public.
    pub hf_token: Option<String>,
    /// The `AWS_*` variables by name: credentials, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_SKIP_SIGNATURE` and what
    /// else [`object_store::aws::AmazonS3ConfigKey`] knows; others are ignored. An endpoint with `http://` is taken
    /// at its word. Profiles (`AWS_PROFILE`) are not read.
    pub aws: BTreeMap<String, String>,
    /// The wait before the first retry is at most this long; each later one may be twice as long.
    pub retry_backoff: Duration,
}

// === impl SourceConfig ===

impl SourceConfig {
    /// `HF_ENDPOINT`, `HF_TOKEN` and the `AWS_*` variables of this process.
    pub fn from_env() -> Self {
        // `vars` would panic over a variable that is no Unicode, though none of ours be.
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::from_vars(std::env::vars_os().filter_map(text))
    }

    /// The same from the variables `vars`. Empty ones count as absent.
    fn from_vars(vars: impl Iterator<Item = (String, String)>) -> Self {
        let mut config = Self::default();
        for (name, value) in vars.filter(|(_, value)| !value.is_empty()) {
            match name.as_str() {
                "HF_ENDPOINT" => config.hf_endpoint = value,
                "HF_TOKEN" => config.hf_token = Some(value),
                _ if name.starts_with("AWS_") => drop(config.aws.insert(name, value)),
                _ => {}
            }
        }
        config
    }
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            hf_endpoint: "https://huggingface.co".into(),
            hf_token: None,
            aws: BTreeMap::new(),
            retry_backoff: Duration::from_millis(500),
        }
    }
}

/// Leaves out secrets.
impl fmt::Debug for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceConfig")
            .field("hf_endpoint", &self.hf_endpoint)
            .field("hf_token", &self.hf_token.as_ref().map(|_| "***"))
            .field("aws", &self.aws.keys())
            .field("retry_backoff", &self.retry_backoff)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_gives_endpoint_token_and_aws_variables() {
        let vars = [
            ("HF_ENDPOINT", "https://mirror"),
            ("HF_TOKEN", "hf_secret"),
            ("AWS_SECRET_ACCESS_KEY", "aws_secret"),
            ("AWS_REGION", ""),
            ("HOME", "/root"),
        ];
        let config = SourceConfig::from_vars(
            vars.iter()
                .map(|(name, value)| (name.to_string(), value.to_string())),
        );
        assert_eq!(config.hf_endpoint, "https://mirror");
        assert_eq!(config.hf_token.as_deref(), Some("hf_secret"));
        assert_eq!(config.aws.keys().collect::<Vec<_>>(), ["AWS_SECRET_ACCESS_KEY"]);
        let shown = format!("{config:?}");
        assert!(
            !shown.contains("secret") && shown.contains("AWS_SECRET_ACCESS_KEY"),
            "{shown}"
        );
    }
}
