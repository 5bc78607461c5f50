//! Requests: generating, feedback and routing.

use clap::Subcommand;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum RouteVerb {
    /// Ask which revision a request would get, and why: the gateway's own assignment, on the snapshot that
    /// gateways are told to apply. Sends no request.
    #[command(after_help = "\
Examples:
  ctl route test --user alice
  ctl route test demo --user alice --model-version v2     with a pin
  ctl route test --header x-user-id=alice -o json")]
    Test(RouteTest),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RouteTest {
    /// Model; may be left out where one model exists.
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) request: RequestAttributes,
}

/// What a request says of itself.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct RequestAttributes {
    /// The user, as `x-user-id`.
    #[arg(long, value_name = "ID")]
    pub(crate) user: Option<String>,
    /// The revision asked for (a pin), as `x-model-version`.
    #[arg(long, value_name = "REVISION")]
    pub(crate) model_version: Option<String>,
    /// Any other metadata; repeatable.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub(crate) headers: Vec<(String, String)>,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Generate {
    /// What to say to the model.
    pub(crate) prompt: String,
    /// Model; may be left out where one model is served.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Take the prompt as it stands, without a chat template.
    #[arg(long)]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) request: RequestAttributes,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// 0 is greedy.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Seed of the random numbers; the same seed gives the same text.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("value").required(true))]
pub(crate) struct Feedback {
    /// The reply: `x-reply-id` of its metadata, or the `id` of an OpenAI reply.
    pub(crate) reply_id: String,
    /// It was good.
    #[arg(long, group = "value")]
    pub(crate) up: bool,
    /// It was bad.
    #[arg(long, group = "value")]
    pub(crate) down: bool,
    /// From 0 to 1; below 0.5 is bad.
    #[arg(long, group = "value", value_parser = score)]
    pub(crate) score: Option<f32>,
    /// Why, for the gateway's telemetry; at most 4096 bytes.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) comment: String,
}

fn score(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(score) if (0.0..=1.0).contains(&score) => Ok(score),
        _ => Err("write a number from 0 to 1, e.g. 0.8".to_owned()),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or("write NAME=VALUE, e.g. x-region=eu-west")?;
    let name = name.trim().to_ascii_lowercase();
    if tonic::metadata::AsciiMetadataKey::from_bytes(name.as_bytes()).is_err() {
        return Err(format!("`{name}` is no name of request metadata"));
    }
    if tonic::metadata::AsciiMetadataValue::try_from(value).is_err() {
        return Err(format!(
            "the value of `{name}` has characters that metadata cannot carry"
        ));
    }
    Ok((name, value.to_owned()))
}
