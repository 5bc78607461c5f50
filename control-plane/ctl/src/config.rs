//! The command line: clap and the environment, and nothing else.

mod fleet;
mod request;
mod rollout;

pub(crate) use fleet::{AuditArgs, Drain, GatewayVerb, ModelVerb, Override, Publish, Retire, WorkerVerb};
pub(crate) use request::{Feedback, Generate, RequestAttributes, RouteTest, RouteVerb};
pub(crate) use rollout::{
    Abort, Amend, Apply, Change, Create, Diff, Get, History, Lint, Promote, RolloutVerb, Set, Simulate, Step,
    Undo,
};

use crate::output::Format;
use clap::{Args as _, Subcommand};
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  ctl rollout apply -f rollout.yaml      start a rollout, or change the plan of the one under way
  ctl rollout get -w                     how it stands, live
  ctl rollout explain                    what the evidence says, and what would change it
  ctl rollout set --canary 5%            5% of the users to the canary
  ctl rollout promote                    the canary becomes the stable revision
  ctl rollout abort --reason 'repeats'   all traffic back to stable; never asks
  ctl route test --user alice            which revision alice gets, and why
  ctl generate --user alice 'What is the capital of France?'

Exit codes:
  0 ok            5 unavailable
  1 failed, or `diff` found differences
  2 usage         6 denied
  3 not found     7 rolled back
  4 conflict      8 timed out or not acknowledged by all
                  9 waiting for approval, samples or an operator";

/// Limit of a call where none is given.
const TIMEOUT: Duration = Duration::from_secs(30);

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

    /// Address of a gateway, for `generate` and `feedback`.
    #[arg(
        long,
        global = true,
        env = "PENSTOCK_GATEWAY",
        default_value = "http://127.0.0.1:8080",
        value_name = "URL"
    )]
    pub(crate) gateway: String,

    /// How long to wait for an answer, and for gateways to acknowledge [default: 30s; `rollout wait`: no limit;
    /// `model publish`: 10m].
    #[arg(id = "timeout", long, global = true, value_parser = duration, value_name = "TIME")]
    pub(crate) limit: Option<Duration>,
}

impl Connection {
    /// Limit of a call.
    pub(crate) fn timeout(&self) -> Duration {
        self.limit.unwrap_or(TIMEOUT)
    }

    /// The same servers with the usual limit of a call, for a command whose own limit is longer.
    pub(crate) fn patient(&self) -> Self {
        Self {
            limit: Some(self.timeout().min(TIMEOUT)),
            ..self.clone()
        }
    }
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Noun {
    /// Shift traffic between two revisions of a model.
    Rollout {
        #[command(subcommand)]
        verb: Box<RolloutVerb>,
    },
    /// Workers: who runs which revisions.
    Worker {
        #[command(subcommand)]
        verb: WorkerVerb,
    },
    /// Gateways: who applies which epoch, and who was taken out of the plan.
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
    /// Who changed what, when and why; newest first.
    #[command(after_help = "\
Examples:
  ctl audit
  ctl audit --model demo --limit 500 -o json")]
    Audit(AuditArgs),
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
    /// Tell a gateway whether a reply was good; it counts for the revision that gave it.
    #[command(after_help = "\
Examples:
  ctl feedback 0198c0de-0000-7000-8000-000000000001 --up
  ctl feedback chatcmpl-0198c0de --score 0.2 --comment 'repeats itself'")]
    Feedback(Feedback),
    /// Write a shell's completions to stdout.
    #[command(after_help = "\
Examples:
  ctl completions bash > /etc/bash_completion.d/ctl
  ctl completions zsh > ~/.zfunc/_ctl
  ctl completions fish > ~/.config/fish/completions/ctl.fish")]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

impl Noun {
    /// The command's words, which name its span.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Rollout { verb } => verb.name(),
            Self::Worker { verb } => match verb {
                WorkerVerb::List => "worker list",
                WorkerVerb::Drain(_) => "worker drain",
            },
            Self::Gateway { verb } => match verb {
                GatewayVerb::List => "gateway list",
                GatewayVerb::Override(_) => "gateway override",
                GatewayVerb::Overrides { .. } => "gateway overrides",
            },
            Self::Model { verb } => match verb {
                ModelVerb::List => "model list",
                ModelVerb::Publish(_) => "model publish",
                ModelVerb::Retire(_) => "model retire",
            },
            Self::Route {
                verb: RouteVerb::Test(_),
            } => "route test",
            Self::Audit(_) => "audit",
            Self::Generate(_) => "generate",
            Self::Feedback(_) => "feedback",
            Self::Completions { .. } => "completions",
        }
    }
}

/// Who does what a live view is told to.
pub(crate) fn actor() -> String {
    std::env::var("PENSTOCK_ACTOR").unwrap_or_else(|_| user())
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

#[cfg(test)]
mod tests;
