//! Workers, gateways, models and the audit log.

use super::{duration, user};
use clap::Subcommand;
use std::time::Duration;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum WorkerVerb {
    /// List workers, what they run on and the revisions they serve.
    List,
    /// Let a worker take no new requests; those that run end there. The process goes on until it is told to end.
    #[command(after_help = "\
Examples:
  ctl worker drain w1
  ctl worker drain 10.0.0.7:9101        its operations port, with the control plane down")]
    Drain(Drain),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Drain {
    /// Id of the worker, or host:port of its operations port.
    pub(crate) worker: String,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum GatewayVerb {
    /// List gateways, whether they are live and which epoch they apply.
    List,
    /// In an emergency, make one gateway send everything to one revision, whatever the plan says, for a while.
    #[command(after_help = "\
Examples:
  ctl gateway override --gateway gw-1 --model demo --to v1 --ttl 1h --reason 'v2 leaks memory'
  ctl gateway override --gateway 10.0.0.5:9100 --model demo --to v1 --reason outage
  ctl gateway override --gateway gw-1 --model demo --clear

With host:port of its operations port it works while the control plane is down. It ends by itself.")]
    Override(Override),
    /// List the overrides in force.
    Overrides {
        /// Name of one gateway or host:port of its operations port [default: every live gateway].
        #[arg(value_name = "GATEWAY")]
        name: Option<String>,
    },
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Override {
    /// Name of the gateway, or host:port of its operations port.
    #[arg(long, value_name = "NAME|ADDRESS")]
    pub(crate) gateway: String,
    /// Model.
    #[arg(long)]
    pub(crate) model: String,
    /// The revision that gets everything.
    #[arg(
        long,
        value_name = "REVISION",
        required_unless_present = "clear",
        conflicts_with = "clear"
    )]
    pub(crate) to: Option<String>,
    /// When it ends by itself.
    #[arg(long, default_value = "1h", value_parser = duration, value_name = "TIME")]
    pub(crate) ttl: Duration,
    /// End the override that is in force.
    #[arg(long)]
    pub(crate) clear: bool,
    /// Why, kept in the audit log.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) reason: String,
    /// Who, kept in the audit log [default: $USER].
    #[arg(long, env = "PENSTOCK_ACTOR", default_value_t = user(), hide_default_value = true)]
    pub(crate) actor: String,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ModelVerb {
    /// List models, their revisions and who serves them.
    List,
    /// Make a checkpoint known as a revision of a model, and wait until every worker serves it.
    #[command(after_help = "\
Examples:
  ctl model publish demo v2 --from /models/demo-v2
  ctl model publish demo v2 --from hf://org/name@main --warm-prefix 'You are a helpful assistant.'
  ctl model publish demo v2 --from s3://bucket/demo-v2 --warm-prefix @system-prompt.txt --no-wait")]
    Publish(Publish),
    /// Take a revision out of service on every worker; requests that run on it end there.
    #[command(after_help = "\
Examples:
  ctl model retire demo v1 --reason 'replaced by v2'")]
    Retire(Retire),
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Publish {
    /// Model.
    pub(crate) model: String,
    /// Name of the new revision.
    pub(crate) revision: String,
    /// Where it is: a directory that every worker can read, hf://, s3:// or https://.
    #[arg(long, value_name = "URI")]
    pub(crate) from: String,
    /// BLAKE3 of the checkpoint's manifest, in hex [default: that of the first worker that loads it].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) digest: String,
    /// Prompt computed before the revision serves, or @FILE with one; repeatable.
    #[arg(long = "warm-prefix", value_name = "TEXT|@FILE")]
    pub(crate) warm_prefixes: Vec<String>,
    /// Return as soon as the revision is known, before workers have it.
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) why: Why,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Retire {
    /// Model.
    pub(crate) model: String,
    /// Revision.
    pub(crate) revision: String,
    #[command(flatten)]
    pub(crate) why: Why,
}

/// Who does something, and why.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Why {
    /// Why, kept in the audit log.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) reason: String,
    /// Who, kept in the audit log [default: $USER].
    #[arg(long, env = "PENSTOCK_ACTOR", default_value_t = user(), hide_default_value = true)]
    pub(crate) actor: String,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct AuditArgs {
    /// One model only.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) model: String,
    /// At most this many records.
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(crate) limit: u32,
}
