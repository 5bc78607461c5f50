//! The command line: clap and the environment, and nothing else.

use crate::output::Format;
use clap::{Args as _, Subcommand};
use penstock_plan::Ppm;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  ctl rollout get                        how the rollout stands
  ctl rollout set --canary 5%            5% of the users to the canary
  ctl rollout promote                    the canary becomes the stable revision
  ctl rollout abort --reason 'repeats'   all traffic back to stable; never asks
  ctl route test --user alice            which revision alice gets, and why
  ctl generate --user alice 'What is the capital of France?'

Exit codes:
  0 ok            3 not found     6 denied
  1 failed        4 conflict      7 rolled back
  2 usage         5 unavailable   8 timed out or not acknowledged by all";

/// `ctl` as a command of its own.
pub fn command() -> clap::Command {
    Args::augment_args(clap::Command::new("ctl").version(env!("CARGO_PKG_VERSION")))
}

/// Operate Penstock: shift traffic between revisions of a model, and see what serves it.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    pub(crate) connection: Connection,

    /// How data is written to stdout.
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    pub(crate) output: Format,

    /// What is logged to stderr, e.g. `debug` or `ctl=debug` [default: warn].
    #[arg(long, global = true, value_name = "FILTER", hide_short_help = true)]
    pub(crate) log: Option<String>,

    #[command(subcommand)]
    pub(crate) noun: Noun,
}

/// Whom to talk to.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Connection {
    /// Address of the control plane.
    #[arg(
        long,
        global = true,
        env = "PENSTOCK_CONTROL_PLANE",
        default_value = "http://127.0.0.1:8090",
        value_name = "URL"
    )]
    pub(crate) control_plane: String,

    /// Address of a gateway, for `generate`.
    #[arg(
        long,
        global = true,
        env = "PENSTOCK_GATEWAY",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub(crate) gateway: String,

    /// How long to wait for an answer, and for gateways to acknowledge.
    #[arg(long, global = true, default_value = "30s", value_parser = duration, value_name = "TIME")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Noun {
    /// Shift traffic between two revisions of a model.
    Rollout {
        #[command(subcommand)]
        verb: RolloutVerb,
    },
    /// Workers: who runs which revisions.
    Worker {
        #[command(subcommand)]
        verb: WorkerVerb,
    },
    /// Gateways: who applies which epoch.
    Gateway {
        #[command(subcommand)]
        verb: GatewayVerb,
    },
    /// Models and their revisions.
    Model {
        #[command(subcommand)]
        verb: ModelVerb,
    },
    /// Where a request would go.
    Route {
        #[command(subcommand)]
        verb: RouteVerb,
    },
    /// Generate text through a gateway, streamed to stdout.
    #[command(after_help = "\
Examples:
  ctl generate 'What is the capital of France?'
  ctl generate --user alice --max-tokens 20 'Tell me a fact.'
  ctl generate --model-version v2 --temperature 0 'Tell me a fact.'
  ctl generate --raw 'Once upon a time'         no chat template
  ctl generate --header x-region=eu-west 'Hello'
stderr tells which revision answered, the epoch, and why it was chosen.")]
    Generate(Box<Generate>),
}

impl Noun {
    /// The command's words, which name its span.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Rollout { verb } => match verb {
                RolloutVerb::Create(_) => "rollout create",
                RolloutVerb::Get(_) => "rollout get",
                RolloutVerb::List => "rollout list",
                RolloutVerb::Set(_) => "rollout set",
                RolloutVerb::Promote(_) => "rollout promote",
                RolloutVerb::Abort(_) => "rollout abort",
            },
            Self::Worker {
                verb: WorkerVerb::List,
            } => "worker list",
            Self::Gateway {
                verb: GatewayVerb::List,
            } => "gateway list",
            Self::Model {
                verb: ModelVerb::List,
            } => "model list",
            Self::Route {
                verb: RouteVerb::Test(_),
            } => "route test",
            Self::Generate(_) => "generate",
        }
    }
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum RolloutVerb {
    /// Start a rollout of a new revision beside the one that serves.
    #[command(after_help = "\
Examples:
  ctl rollout create demo --canary v2       stable is what serves now
  ctl rollout create demo --stable v1 --canary v2 --canary-share 1%")]
    Create(Create),
    /// Show one rollout: share, phase, epoch, who has acknowledged.
    Get(Get),
    /// List all rollouts.
    List,
    /// Set the canary's share of the users and wait until every live gateway has acknowledged it.
    #[command(after_help = "\
Examples:
  ctl rollout set --canary 5%              the everyday call: one rollout exists
  ctl rollout set demo --canary 0.5%
  ctl rollout set --canary 50% -y          a large jump, without being asked
  ctl rollout set --canary 5% --dry-run    what would change
  ctl rollout set --canary 5% --expect-revision 42

Raising the share moves no user back from the canary to stable.")]
    Set(Set),
    /// Make the canary the stable revision, and wait until every live gateway has acknowledged.
    Promote(Promote),
    /// Send all traffic back to stable, and wait until every live gateway has acknowledged. Never asks.
    Abort(Abort),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Create {
    /// Model; may be left out where one model exists.
    pub(crate) model: Option<String>,
    /// Revision that serves [default: the one that serves now].
    #[arg(long, value_name = "REVISION")]
    pub(crate) stable: Option<String>,
    /// Revision to try.
    #[arg(long, value_name = "REVISION")]
    pub(crate) canary: String,
    /// The canary's first share, e.g. 1%.
    #[arg(long, default_value = "0%", value_name = "SHARE")]
    pub(crate) canary_share: Ppm,
    #[command(flatten)]
    pub(crate) change: Change,
    #[command(flatten)]
    pub(crate) consent: Consent,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Get {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    /// Print a line at every change until interrupted.
    #[arg(short, long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Set {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    /// The canary's share: 5%, 0.5% or 20000ppm.
    #[arg(long, value_name = "SHARE")]
    pub(crate) canary: Ppm,
    #[command(flatten)]
    pub(crate) change: Change,
    #[command(flatten)]
    pub(crate) consent: Consent,
    #[command(flatten)]
    pub(crate) expect: Expect,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Promote {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) change: Change,
    #[command(flatten)]
    pub(crate) consent: Consent,
    #[command(flatten)]
    pub(crate) expect: Expect,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Abort {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) change: Change,
}

/// What every change has.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Change {
    /// Why, kept with the rollout.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) reason: String,
    /// Who, kept with the rollout [default: $USER].
    #[arg(long, env = "PENSTOCK_ACTOR", default_value_t = user(), hide_default_value = true)]
    pub(crate) actor: String,
    /// Return as soon as the change is written, before gateways have it.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Say what would change and write nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Consent {
    /// Do not ask before a jump of more than 5× (from 0 %: to above 10 %).
    #[arg(short, long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Expect {
    /// Refuse, with exit code 4, unless the rollout is still at this store revision (see `rollout get`).
    #[arg(long, value_name = "N")]
    pub(crate) expect_revision: Option<u64>,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum WorkerVerb {
    /// List workers, what they run on and the revisions they serve.
    List,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum GatewayVerb {
    /// List gateways, whether they are live and which epoch they apply.
    List,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ModelVerb {
    /// List models, their revisions and who serves them.
    List,
}

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

fn user() -> String {
    std::env::var("USER").unwrap_or_default()
}

/// `30s`, `500ms`, `2m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    match number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(scale))
    {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err("write a time above zero with its unit, e.g. 500ms, 30s or 2m".to_owned()),
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

#[cfg(test)]
mod tests;
