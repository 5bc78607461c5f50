//! A watch that outlives its connections.

use std::time::Duration;

use etcd_client::{Client, Event, EventType, WatchOptions, WatchResponse};
use tokio::sync::mpsc;

use super::{LARGEST_ANSWER, TIMEOUT, entry, key, list, revision, signed, unsigned};
use crate::{Prefix, StoreError, WatchEvent};

/// Pauses between two attempts are drawn from 0 to a limit that grows from the one to the other (full jitter).
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// etcd says where it stands at least this often when nothing happens; silence for twice as long is a lost peer.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Why one stream ended.
enum End {
    /// Nobody listens any more.
    Closed,
    /// The connection is gone; the next revision to see stands.
    Lost,
    /// History up to the next revision is gone.
    Compacted,
}

/// Feeds `events` with every change from revision `next` on, until nobody listens.
pub(super) async fn follow(client: Client, prefix: Prefix, mut next: u64, events: mpsc::Sender<WatchEvent>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let before = next;
        let end = stream(&client, prefix, &mut next, &events).await;
        if before != next {
            pause = FIRST_PAUSE;
        }
        match end {
            End::Closed => return,
            End::Lost => {}
            End::Compacted => match list(&client, prefix).await {
                Ok(listing) => {
                    next = listing.revision + 1;
                    if events.send(WatchEvent::Resync(listing)).await.is_err() {
                        return;
                    }
                    continue;
                }
                Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "cannot list"),
            },
        }
        tokio::select! {
            () = tokio::time::sleep(pause.mul_f64(rand::random())) => {}
            () = events.closed() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One stream, from its creation to its end.
async fn stream(client: &Client, prefix: Prefix, next: &mut u64, events: &mpsc::Sender<WatchEvent>) -> End {
    let options = WatchOptions::new()
        .with_prefix()
        .with_start_revision(signed(*next))
        .with_progress_notify();
    let mut watcher = client.watch_client().max_decoding_message_size(LARGEST_ANSWER);
    let created = tokio::time::timeout(TIMEOUT, watcher.watch(prefix.as_str(), Some(options))).await;
    let Ok(Ok(mut stream)) = created else {
        return End::Lost;
    };
    let mut progress = tokio::time::interval(PROGRESS_EVERY);
    progress.tick().await;
    let mut heard = true;
    loop {
        let response = tokio::select! {
            response = stream.message() => response,
            _ = progress.tick() => {
                // Nothing was heard since it was asked last: the peer is gone.
                if !std::mem::take(&mut heard) || stream.request_progress().await.is_err() {
                    return End::Lost;
                }
                continue;
            }
            () = events.closed() => return End::Closed,
        };
        let Ok(Some(response)) = response else {
            return End::Lost;
        };
        heard = true;
        if response.compact_revision() > 0 {
            return End::Compacted;
        }
        if response.canceled() {
            return End::Lost;
        }
        for event in response.events() {
            let Ok(event) = convert(event).inspect_err(|error| tracing::warn!(%error, "ignored")) else {
                continue;
            };
            if events.send(event).await.is_err() {
                return End::Closed;
            }
        }
        // Events of one revision come in one response, so that what follows starts after it.
        if let Some(last) = response
            .events()
            .iter()
            .filter_map(|event| event.kv())
            .map(|kv| kv.mod_revision())
            .max()
        {
            *next = unsigned(last) + 1;
        } else if let Some(reached) = progress_of(&response) {
            *next = (*next).max(reached + 1);
        }
    }
}

/// The revision up to which etcd says, of its own accord, that everything was sent. What it answers to our own
/// question (no watcher's id) is not it: before 3.4.25 and 3.5.8 that may overtake events.
fn progress_of(response: &WatchResponse) -> Option<u64> {
    let unasked = response.watch_id() >= 0 && !response.created() && response.events().is_empty();
    unasked.then(|| revision(response.header()))
}

fn convert(event: &Event) -> Result<WatchEvent, StoreError> {
    let kv = event
        .kv()
        .ok_or_else(|| StoreError::Failed("an event without a key".into()))?;
    match event.event_type() {
        EventType::Put => entry(kv).map(WatchEvent::Put),
        EventType::Delete => Ok(WatchEvent::Delete {
            key: key(kv)?,
            mod_revision: unsigned(kv.mod_revision()),
        }),
    }
}
