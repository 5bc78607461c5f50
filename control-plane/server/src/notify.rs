//! Webhooks: phase changes, pauses and verdicts told to people, in a generic form or in Slack's.
//!
//! Telling never holds anything up: events go into a bounded queue per target and are sent by a task of its own,
//! signed, tried again with full jitter, and told once. What is told follows from the stored plan alone, so that
//! a control plane that takes over gives the same event the same id; a receiver that must not act twice keeps ids.

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use hmac::{Hmac, KeyInit as _, Mac as _};
use penstock_plan::{Phase, Rollout};
use sha2::Sha256;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

mod format;

/// Events that wait for one target.
const QUEUE: usize = 1024;
/// Tries for one event.
const TRIES: u32 = 8;
/// Longest pause between two tries, drawn from 0 to this much.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Longest that a receiver may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What still waits at the end is given this long.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where events are sent: `URL[,format=json|slack][,secret-file=PATH]`.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    url: reqwest::Url,
    format: Format,
    secret: Option<Vec<u8>>,
}

/// The form in which events are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// A JSON object in the manner of CloudEvents.
    Json,
    /// Slack's incoming webhooks.
    Slack,
}

/// A target that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The URL.
    #[error("{0:?} is not an http or https URL")]
    Url(String),
    /// Something after the URL.
    #[error("{0:?} is not an option of a webhook: there are format=json, format=slack and secret-file=PATH")]
    Option(String),
    /// The file of the secret.
    #[error("the secret file {path:?} cannot be read")]
    Secret {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// One thing worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// The same for the same event, whoever tells it.
    id: String,
    kind: &'static str,
    title: String,
    rollout: Box<Told>,
}

/// What is told of the rollout.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
struct Told {
    model: String,
    uid: String,
    stable: String,
    canary: String,
    canary_ppm: u32,
    phase: String,
    pause: String,
    cause: String,
    attempt: u32,
    generation: u64,
    actor: String,
    reason: String,
    at_ms: u64,
}

/// Tells events to every target.
#[derive(Debug, Default)]
pub(crate) struct Notifier {
    queues: Vec<mpsc::Sender<Event>>,
    /// The last state that was told or known, by model.
    known: BTreeMap<String, String>,
}

// === impl Target ===

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(value: &str) -> Result<Self, TargetError> {
        let mut parts = value.split(',');
        let url = parts.next().unwrap_or_default();
        let parsed = reqwest::Url::parse(url).ok();
        let parsed = parsed.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let mut target = Self {
            url: parsed.ok_or_else(|| TargetError::Url(url.to_owned()))?,
            format: Format::Json,
            secret: None,
        };
        for option in parts {
            match option.split_once('=') {
                Some(("format", "json")) => target.format = Format::Json,
                Some(("format", "slack")) => target.format = Format::Slack,
                Some(("secret-file", path)) => {
                    let read = std::fs::read_to_string(path).map_err(|source| TargetError::Secret {
                        path: path.to_owned(),
                        source,
                    })?;
                    target.secret = Some(read.trim().as_bytes().to_vec());
                }
                _ => return Err(TargetError::Option(option.to_owned())),
            }
        }
        Ok(target)
    }
}

/// A webhook's path is as good as a password: only scheme and host are shown.
impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.shown())
    }
}

impl Target {
    fn shown(&self) -> String {
        format!(
            "{}://{}",
            self.url.scheme(),
            self.url.host_str().unwrap_or_default()
        )
    }

    /// Sends what comes until the queue is closed or `stop`, then what is left for a moment.
    async fn run(self, mut queue: mpsc::Receiver<Event>, stop: CancellationToken) {
        let client = match reqwest::Client::builder().timeout(TIMEOUT).build() {
            Ok(client) => client,
            Err(error) => return tracing::error!(%error, "webhooks cannot be sent"),
        };
        while let Some(Some(event)) = stop.run_until_cancelled(queue.recv()).await {
            if stop
                .run_until_cancelled(self.tell(&client, &event))
                .await
                .is_none()
            {
                // It was being told: once more, without a second try.
                let _ = tokio::time::timeout(GOODBYE, self.send(&client, &event)).await;
                return;
            }
        }
    }

    /// Tries until it is told, or it is clear that it never will be.
    async fn tell(&self, client: &reqwest::Client, event: &Event) {
        for tried in 1..=TRIES {
            let wait = match self.send(client, event).await {
                Ok(()) => return,
                Err(Failure::Final(why)) => {
                    return tracing::warn!(
                        target = self.shown(),
                        event = event.id,
                        why,
                        "a webhook was refused"
                    );
                }
                Err(Failure::Again(_, Some(wait))) => wait.min(LONGEST_PAUSE),
                Err(Failure::Again(why, None)) if tried == TRIES => {
                    return tracing::warn!(
                        target = self.shown(),
                        event = event.id,
                        why,
                        "a webhook was given up"
                    );
                }
                Err(Failure::Again(..)) => {
                    let ceiling = Duration::from_millis(500) * 2_u32.pow(tried.min(10));
                    ceiling.min(LONGEST_PAUSE).mul_f64(rand::random())
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    async fn send(&self, client: &reqwest::Client, event: &Event) -> Result<(), Failure> {
        let body = match self.format {
            Format::Json => format::json(event),
            Format::Slack => format::slack(event),
        }
        .to_string();
        let mut request = client
            .post(self.url.clone())
            .header("content-type", "application/json")
            .header("idempotency-key", &event.id);
        if let Some(secret) = &self.secret {
            request = request.header(
                "x-penstock-signature",
                signature(secret, crate::now_ms() / 1000, &body),
            );
        }
        // The error would name the URL, whose path is a secret.
        let answer = request
            .body(body)
            .send()
            .await
            .map_err(|error| Failure::Again(error.without_url().to_string(), None))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let again = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
        if !again {
            return Err(Failure::Final(format!("it answered {status}")));
        }
        let after = answer
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok());
        let after = after
            .and_then(|seconds| seconds.parse().ok())
            .map(Duration::from_secs);
        Err(Failure::Again(format!("it answered {status}"), after))
    }
}

/// Why an event was not taken.
enum Failure {
    /// It never will be.
    Final(String),
    /// It may be, after this time if the receiver says so.
    Again(String, Option<Duration>),
}

/// `t=SECONDS,v1=HEX`: HMAC-SHA256 of `SECONDS.BODY`, so that an old message cannot be sent again as a new one.
fn signature(secret: &[u8], seconds: u64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
    mac.update(format!("{seconds}.{body}").as_bytes());
    let hex: String = mac
        .finalize()
        .into_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("t={seconds},v1={hex}")
}

// === impl Notifier ===

impl Notifier {
    /// Starts a task for each target.
    pub(crate) fn start(
        targets: Vec<Target>,
        tasks: &tokio_util::task::TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let start = |target: Target| {
            let (sender, queue) = mpsc::channel(QUEUE);
            tasks.spawn(target.run(queue, stop.clone()));
            sender
        };
        Self {
            queues: targets.into_iter().map(start).collect(),
            known: BTreeMap::new(),
        }
    }

    /// Looks at a rollout, and tells what has changed since it was looked at last. What is there at a start is known,
    /// not news.
    pub(crate) fn look(&mut self, rollout: &Rollout) {
        let event = event(rollout);
        let Some(before) = self.known.insert(rollout.model.clone(), event.id.clone()) else {
            return;
        };
        if before == event.id {
            return;
        }
        for queue in &self.queues {
            if queue.try_send(event.clone()).is_err() {
                tracing::warn!(event = event.id, "too many webhooks wait; one is left out");
            }
        }
    }
}

fn event(rollout: &Rollout) -> Event {
    let pause = rollout.pause.map(|pause| pause.why.as_str()).unwrap_or_default();
    let Rollout {
        uid,
        attempt,
        generation,
        phase,
        model,
        stable,
        canary,
        share,
        ..
    } = rollout;
    let kind = match phase {
        Phase::Paused => "penstock.rollout.paused",
        Phase::Aborting => "penstock.rollout.aborting",
        Phase::RolledBack => "penstock.rollout.rolled_back",
        Phase::Succeeded => "penstock.rollout.succeeded",
        _ => "penstock.rollout.phase_changed",
    };
    let title = match phase {
        Phase::Aborting => format!("{model}: {canary} is being rolled back; {stable} serves"),
        Phase::RolledBack => format!("{model}: {canary} is rolled back; {stable} serves"),
        Phase::Succeeded => format!("{model}: {canary} is stable"),
        Phase::Paused => format!("{model}: {canary} is paused at {share} ({pause})"),
        _ => format!("{model}: {canary} at {share}, {phase}"),
    };
    Event {
        id: format!("{uid}/{attempt}/{generation}/{phase}/{pause}"),
        kind,
        title,
        rollout: Box::new(Told {
            model: model.clone(),
            uid: uid.clone(),
            stable: stable.clone(),
            canary: canary.clone(),
            canary_ppm: share.get(),
            phase: phase.to_string(),
            pause: pause.to_owned(),
            cause: rollout.cause.clone(),
            attempt: *attempt,
            generation: *generation,
            actor: rollout.actor.clone(),
            reason: rollout.reason.clone(),
            at_ms: rollout.phase_since_ms,
        }),
    }
}

#[cfg(test)]
mod tests;
