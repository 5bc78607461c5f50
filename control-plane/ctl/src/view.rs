//! What commands answer: the wire's messages in the shape that operators and their programs read.

mod audit;
mod explain;
mod fleet;

pub(crate) use audit::Audit;
pub(crate) use explain::{Explanation, Step, ago, bar, moment};
pub(crate) use fleet::{Gateways, Models, Workers, state};

use crate::output::{View, columns, pairs};
use penstock_plan::Ppm;
use penstock_proto::v1;
use serde::Serialize;

/// A rollout and how far gateways have followed it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Rollout {
    pub(crate) model: String,
    pub(crate) uid: String,
    pub(crate) stable: String,
    pub(crate) canary: String,
    /// For a reader; `canary_ppm` is the exact figure.
    pub(crate) share: String,
    pub(crate) canary_ppm: u32,
    pub(crate) phase: &'static str,
    /// Why it is paused; empty where it is not.
    pub(crate) pause: &'static str,
    /// What made it roll back or pause.
    pub(crate) cause: String,
    /// Index of the present step, from 0, of how many; 0 of 0 for a rollout that is set by hand.
    pub(crate) step: u32,
    pub(crate) steps: u32,
    pub(crate) attempt: u32,
    pub(crate) phase_since_ms: u64,
    /// When the present hold ends at the earliest; 0 where nothing holds.
    pub(crate) next_ms: u64,
    /// Shares as counted in the present trial, in [0, 1].
    pub(crate) key_share: Option<f64>,
    pub(crate) request_share: Option<f64>,
    pub(crate) token_share: Option<f64>,
    /// Canary of the rollout that follows; empty for none.
    pub(crate) queued: String,
    pub(crate) generation: u64,
    pub(crate) epoch: u64,
    pub(crate) store_revision: u64,
    pub(crate) live_gateways: u32,
    pub(crate) acknowledged: u32,
    pub(crate) pending: Vec<String>,
    pub(crate) nacks: Vec<Nack>,
    pub(crate) stable_endpoints: u32,
    pub(crate) canary_endpoints: u32,
    pub(crate) sticky_keys: Vec<String>,
    pub(crate) created_ms: u64,
    pub(crate) updated_ms: u64,
    pub(crate) actor: String,
    pub(crate) reason: String,
    pub(crate) message: String,
}

/// A gateway's refusal of a snapshot.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Nack {
    pub(crate) gateway: String,
    pub(crate) epoch: u64,
    pub(crate) code: String,
    pub(crate) message: String,
}

impl From<v1::GatewayNack> for Nack {
    fn from(nack: v1::GatewayNack) -> Self {
        Self {
            gateway: nack.gateway,
            epoch: nack.epoch,
            code: nack.code,
            message: nack.message,
        }
    }
}

impl Nack {
    pub(crate) fn line(&self) -> String {
        format!(
            "{} refuses epoch {}: {} ({})",
            self.gateway, self.epoch, self.message, self.code
        )
    }
}

impl From<v1::RolloutStatus> for Rollout {
    fn from(status: v1::RolloutStatus) -> Self {
        let rollout = status.rollout.unwrap_or_default();
        Self {
            share: share(rollout.canary_ppm),
            phase: phase(rollout.phase()),
            pause: pause(rollout.pause()),
            cause: rollout.cause,
            step: rollout.step,
            steps: rollout.steps,
            attempt: rollout.attempt,
            phase_since_ms: rollout.phase_since_ms,
            next_ms: status.next_ms,
            key_share: status.key_share,
            request_share: status.request_share,
            token_share: status.token_share,
            queued: rollout.queued,
            sticky_keys: rollout.sticky.map(|sticky| sticky.keys).unwrap_or_default(),
            model: rollout.model,
            uid: rollout.uid,
            stable: rollout.stable,
            canary: rollout.canary,
            canary_ppm: rollout.canary_ppm,
            generation: rollout.generation,
            epoch: status.epoch,
            store_revision: rollout.store_revision,
            live_gateways: status.live_gateways,
            acknowledged: status.acknowledged,
            pending: status.pending,
            nacks: status.nacks.into_iter().map(Nack::from).collect(),
            stable_endpoints: status.stable_endpoints,
            canary_endpoints: status.canary_endpoints,
            created_ms: rollout.created_ms,
            updated_ms: rollout.updated_ms,
            actor: rollout.actor,
            reason: rollout.reason,
            message: rollout.message,
        }
    }
}

impl Rollout {
    /// Phase, why it is paused, and the step.
    fn stand(&self) -> String {
        let pause = match self.pause {
            "" => String::new(),
            why => format!(" ({why})"),
        };
        format!("{}{pause}{}", self.phase, step(self.step, self.steps))
    }

    fn acks(&self) -> String {
        format!("{}/{}", self.acknowledged, self.live_gateways)
    }
}

impl View for Rollout {
    fn table(&self) -> String {
        let mut text = pairs(&[
            ("model", self.model.clone()),
            (
                "stable",
                format!("{} ({})", self.stable, endpoints(self.stable_endpoints)),
            ),
            (
                "canary",
                format!("{} ({})", self.canary, endpoints(self.canary_endpoints)),
            ),
            ("share", self.share.clone()),
            ("counted", shares(self)),
            ("phase", self.stand()),
            ("cause", self.cause.clone()),
            ("queued", self.queued.clone()),
            ("message", self.message.clone()),
            ("generation", self.generation.to_string()),
            ("epoch", self.epoch.to_string()),
            ("acknowledged", self.acks()),
            ("pending", self.pending.join(", ")),
            ("sticky", self.sticky_keys.join(", ")),
            ("actor", self.actor.clone()),
            ("reason", self.reason.clone()),
            (
                "revision",
                format!("{} (for --expect-revision)", self.store_revision),
            ),
            ("uid", self.uid.clone()),
        ]);
        for nack in &self.nacks {
            text += &format!("refused       {}\n", nack.line());
        }
        text
    }
}

/// A rollout in one line, for `--watch`.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct RolloutLine(pub(crate) Rollout);

impl RolloutLine {
    /// What makes it news: all but the message, whose counts change every second.
    pub(crate) fn news(&self) -> String {
        let quiet = Rollout {
            message: String::new(),
            ..self.0.clone()
        };
        Self(quiet).table()
    }
}

impl View for RolloutLine {
    fn table(&self) -> String {
        let Rollout {
            model,
            stable,
            canary,
            share,
            generation,
            epoch,
            message,
            ..
        } = &self.0;
        let phase = self.0.stand();
        let pending = match self.0.pending.as_slice() {
            [] => String::new(),
            pending => format!("; waits for {}", pending.join(", ")),
        };
        let message = if message.is_empty() {
            String::new()
        } else {
            format!("; {message}")
        };
        format!(
            "{model} {stable} → {canary} {share} {phase}; generation {generation}; epoch {epoch}; \
             {} acknowledged{pending}{message}\n",
            self.0.acks()
        )
    }
}

/// `rollout list`.
#[derive(Debug, Serialize)]
pub(crate) struct Rollouts {
    pub(crate) rollouts: Vec<Rollout>,
}

impl View for Rollouts {
    fn table(&self) -> String {
        let rows: Vec<_> = self
            .rollouts
            .iter()
            .map(|r| {
                [
                    r.model.clone(),
                    r.stable.clone(),
                    r.canary.clone(),
                    r.share.clone(),
                    r.stand(),
                    r.generation.to_string(),
                    r.epoch.to_string(),
                    r.acks(),
                ]
            })
            .collect();
        columns(
            [
                "MODEL",
                "STABLE",
                "CANARY",
                "SHARE",
                "PHASE",
                "GENERATION",
                "EPOCH",
                "ACKNOWLEDGED",
            ],
            &rows,
        )
    }
}

/// A share as operators write it.
pub(crate) fn share(ppm: u32) -> String {
    // A share above the whole is a server's mistake; show the figure rather than hide it.
    Ppm::new(ppm).map_or_else(|_| format!("{ppm}ppm"), |share| share.to_string())
}

/// A phase as operators read it.
pub(crate) fn phase(phase: v1::Phase) -> &'static str {
    match phase {
        v1::Phase::Unspecified => "unknown",
        v1::Phase::Converging => "converging",
        v1::Phase::Paused => "paused",
        v1::Phase::Promoting => "promoting",
        v1::Phase::Succeeded => "succeeded",
        v1::Phase::Aborting => "aborting",
        v1::Phase::RolledBack => "rolled_back",
        v1::Phase::Pending => "pending",
        v1::Phase::Warming => "warming",
        v1::Phase::Soaking => "soaking",
        v1::Phase::Judging => "judging",
        v1::Phase::Baking => "baking",
        v1::Phase::Draining => "draining",
    }
}

/// Why a rollout is paused, as operators read it; empty where it is not.
pub(crate) fn pause(reason: v1::PauseReason) -> &'static str {
    match reason {
        v1::PauseReason::Unspecified => "",
        v1::PauseReason::Manual => "by hand",
        v1::PauseReason::Insufficient => "too few samples",
        v1::PauseReason::Approval => "waits for approval",
        v1::PauseReason::Nacked => "a gateway refused",
        v1::PauseReason::Window => "outside its window",
        v1::PauseReason::Verdict => "a metric failed",
    }
}

/// `, step 2/4`; nothing for a rollout that is set by hand.
pub(crate) fn step(index: u32, of: u32) -> String {
    match of {
        0 => String::new(),
        of => format!(", step {}/{of}", index + 1),
    }
}

/// A share in [0, 1] as percent with two decimals at most.
pub(crate) fn percent(share: f64) -> String {
    let text = format!("{:.2}", share * 100.0);
    format!("{}%", text.trim_end_matches('0').trim_end_matches('.'))
}

/// What was counted of the canary in the present trial; empty where nothing was.
pub(crate) fn shares(rollout: &Rollout) -> String {
    let parts = [
        (rollout.key_share, "keys"),
        (rollout.request_share, "requests"),
        (rollout.token_share, "tokens"),
    ];
    let part = |(share, what): (Option<f64>, &str)| Some(format!("{} of {what}", percent(share?)));
    parts.into_iter().filter_map(part).collect::<Vec<_>>().join(", ")
}

fn endpoints(count: u32) -> String {
    match count {
        1 => "1 endpoint".to_owned(),
        count => format!("{count} endpoints"),
    }
}

#[cfg(test)]
mod tests;
