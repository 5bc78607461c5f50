//! Rollouts.

use super::user;
use clap::Subcommand;
use penstock_plan::{Ppm, simulate::Approve};
use std::path::PathBuf;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum RolloutVerb {
    /// Start a rollout of a new revision beside the one that serves.
    #[command(after_help = "\
Examples:
  ctl rollout create demo --canary v2       stable is what serves now
  ctl rollout create demo --stable v1 --canary v2 --canary-share 1%")]
    Create(Create),
    /// Start a rollout from its manifest, or change the plan of the one under way.
    #[command(after_help = "\
Examples:
  ctl rollout apply -f rollout.yaml --reason 'fewer repeats'
  ctl rollout apply -f - < rollout.yaml
  ctl rollout apply -f rollout.yaml --dry-run          checks, compares, writes nothing
  ctl rollout apply -f rollout.yaml --expect-revision 42

A smallest manifest:
  kind: Rollout
  model: demo
  canary: {revision: v2}
  steps:
    - {canary: 1%, hold: 1h}
    - {canary: 5%, hold: 4h, min_samples: 2000}
    - {canary: 25%, hold: 4h, approval: true}
    - {canary: 100%, bake: 1h}

What is wrong or doubtful is told as FILE:LINE; an error means exit code 2, and nothing is written.")]
    Apply(Apply),
    /// Show one rollout: share, phase, epoch, who has acknowledged.
    #[command(after_help = "\
Examples:
  ctl rollout get
  ctl rollout get -w              live on a terminal; a line at every change elsewhere
  ctl rollout get -w -o json      one object a line")]
    Get(Get),
    /// List all rollouts.
    List(List),
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
    /// Go to another step of the plan at once, without waiting for the hold of the present one.
    #[command(after_help = "\
Examples:
  ctl rollout step           the next step
  ctl rollout step 3         the third step, as `rollout explain` numbers them")]
    Step(Step),
    /// Stop at the present share until it is resumed.
    Pause(Amend),
    /// Go on from a pause, at the next higher step.
    Resume(Amend),
    /// Give the approval that the present step waits for.
    Approve(Amend),
    /// Make the canary the stable revision, and wait until every live gateway has acknowledged.
    Promote(Promote),
    /// Send all traffic back to stable, and wait until every live gateway has acknowledged. Never asks.
    Abort(Abort),
    /// Try an aborted rollout again from its first step.
    Retry(Amend),
    /// Go back to the revision that was stable before the last promotion, as a rollout of its own. Asks first.
    #[command(after_help = "\
Examples:
  ctl rollout undo --reason 'complaints'
  ctl rollout undo demo -y")]
    Undo(Undo),
    /// Show what happened to a model's rollouts: who or what changed them, when and why; newest first.
    History(History),
    /// Explain where a rollout stands: why it waits, what every metric's evidence says, what would change it.
    Explain(Named),
    /// Compare the manifest in force with a file: unified diff, exit code 1 where they differ.
    #[command(after_help = "\
Examples:
  ctl rollout diff -f rollout.yaml")]
    Diff(Diff),
    /// Check a manifest, without asking anybody; exit code 2 where it has errors.
    #[command(after_help = "\
Examples:
  ctl rollout lint -f rollout.yaml
  ctl rollout lint -f rollout.yaml --rate 20/s     are the holds long enough for that traffic?")]
    Lint(Lint),
    /// Run a plan in virtual time: what happens when, how soon a worse canary shows, the odds of a false abort.
    #[command(after_help = "\
Examples:
  ctl rollout simulate                                    the plan in force, under the traffic of now
  ctl rollout simulate -f rollout.yaml --rate 20/s        a plan to come; nobody is asked
  ctl rollout simulate -f rollout.yaml --rate 20/s --error-rate 0.5% --canary-error-rate 5%")]
    Simulate(Simulate),
    /// Wait until a rollout is over or needs somebody.
    #[command(after_help = "\
Examples:
  ctl rollout wait && ./announce.sh
  ctl rollout wait demo --timeout 6h

Exit codes: 0 succeeded, 7 rolled back, 8 timed out, 9 paused: waits for approval, samples or an operator.")]
    Wait(Wait),
}

impl RolloutVerb {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Create(_) => "rollout create",
            Self::Apply(_) => "rollout apply",
            Self::Get(_) => "rollout get",
            Self::List(_) => "rollout list",
            Self::Set(_) => "rollout set",
            Self::Step(_) => "rollout step",
            Self::Pause(_) => "rollout pause",
            Self::Resume(_) => "rollout resume",
            Self::Approve(_) => "rollout approve",
            Self::Promote(_) => "rollout promote",
            Self::Abort(_) => "rollout abort",
            Self::Retry(_) => "rollout retry",
            Self::Undo(_) => "rollout undo",
            Self::History(_) => "rollout history",
            Self::Explain(_) => "rollout explain",
            Self::Diff(_) => "rollout diff",
            Self::Lint(_) => "rollout lint",
            Self::Simulate(_) => "rollout simulate",
            Self::Wait(_) => "rollout wait",
        }
    }
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
pub(crate) struct Apply {
    /// Manifest, YAML or JSON; - is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) change: Change,
    #[command(flatten)]
    pub(crate) expect: Expect,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Diff {
    /// Manifest, YAML or JSON; - is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Lint {
    /// Manifest, YAML or JSON; - is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Requests of the model, e.g. 20/s or 300/m, to check whether holds and samples fit them.
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) rate: Option<f64>,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Simulate {
    /// Model whose plan in force is simulated; may be left out where one rollout exists.
    #[arg(conflicts_with = "file")]
    pub(crate) model: Option<String>,
    /// Manifest, YAML or JSON; - is stdin.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Requests of the model, e.g. 20/s or 300/m [default: what gateways count now].
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Share of stable's requests that fail.
    #[arg(long, value_name = "SHARE", default_value = "0.5%")]
    pub(crate) error_rate: Ppm,
    /// Share of the canary's requests that fail [default: stable's].
    #[arg(long, value_name = "SHARE")]
    pub(crate) canary_error_rate: Option<Ppm>,
    /// When approvals are given: at-once, never, or a time after they are asked for, e.g. 4h.
    #[arg(long, value_name = "WHEN", default_value = "at-once", value_parser = approvals)]
    pub(crate) approvals: Approve,
    /// Seed of the requests' fates.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

/// A rollout by its model.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Named {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Get {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    /// Follow it: live on a terminal, else a line at every change until interrupted.
    #[arg(short, long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct List {
    /// Follow them: live on a terminal, else a line at every change until interrupted.
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
pub(crate) struct Step {
    /// Which step, from 1 [default: the next].
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) step: Option<u32>,
    /// Model; may be left out where one rollout exists.
    #[arg(long)]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) change: Change,
    #[command(flatten)]
    pub(crate) consent: Consent,
    #[command(flatten)]
    pub(crate) expect: Expect,
}

/// Pause, resume, approve and retry.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Amend {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) change: Change,
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
    /// Taken for the sake of scripts: an abort never asks.
    #[arg(short, long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) change: Change,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Undo {
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
pub(crate) struct History {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
    /// At most this many records.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub(crate) limit: u32,
}

/// `--timeout` limits it; without one it waits as long as it takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Wait {
    /// Model; may be left out where one rollout exists.
    pub(crate) model: Option<String>,
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
    /// Do not ask before a jump of more than 5× (from 0 %: to above 10 %), all of the traffic, or an undo.
    #[arg(short, long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Expect {
    /// Refuse, with exit code 4, unless the rollout is still at this store revision (see `rollout get`).
    #[arg(long, value_name = "N")]
    pub(crate) expect_revision: Option<u64>,
}

/// `at-once`, `never` or a time.
fn approvals(text: &str) -> Result<Approve, String> {
    match text {
        "at-once" => Ok(Approve::AtOnce),
        "never" => Ok(Approve::Never),
        time => time
            .parse()
            .map(Approve::After)
            .map_err(|error| format!("write at-once, never or a time such as 4h: {error}")),
    }
}

/// `20/s`, `300/m` or `5000/h`, in requests a second.
fn rate(text: &str) -> Result<f64, String> {
    let (number, seconds) = match text.split_once('/') {
        Some((number, "s")) => (number, 1.0),
        Some((number, "m")) => (number, 60.0),
        Some((number, "h")) => (number, 3600.0),
        _ => (text, f64::NAN),
    };
    let rate = number.parse::<f64>().map_or(f64::NAN, |number| number / seconds);
    if rate > 0.0 && rate.is_finite() {
        Ok(rate)
    } else {
        Err("write requests and their time, e.g. 20/s, 300/m or 5000/h".to_owned())
    }
}
