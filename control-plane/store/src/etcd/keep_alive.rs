//! Keeping a lease alive over lost connections, and knowing when it is not.

use std::time::Duration;

use etcd_client::{Client, Error};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::TIMEOUT;

/// Pause after a failed attempt.
const RETRY: Duration = Duration::from_millis(200);

/// Why a stream of keep-alives ended.
enum End {
    /// The lease is gone.
    Gone,
    /// The connection is.
    Lost,
}

/// Keeps the lease alive until it is gone or nobody could be told for as long as it lives; cancels `lost` then.
pub(super) async fn hold(
    client: Client,
    id: i64,
    ttl: Duration,
    mut expires: Instant,
    lost: CancellationToken,
) {
    loop {
        let end = stream(&client, id, ttl, &mut expires).await;
        if matches!(end, End::Gone) || Instant::now() >= expires {
            lost.cancel();
            return;
        }
        tokio::time::sleep_until(expires.min(Instant::now() + RETRY)).await;
    }
}

/// One stream; each answer moves `expires` to its question's time plus `ttl`, and none is awaited for longer.
async fn stream(client: &Client, id: i64, ttl: Duration, expires: &mut Instant) -> End {
    let mut leases = client.lease_client();
    // A stream that does not answer soon leaves time for another attempt.
    let patience = TIMEOUT.min(ttl / 2);
    let asked = Instant::now();
    let until = (*expires).min(asked + patience);
    let opened = tokio::time::timeout_at(until, leases.keep_alive(id)).await;
    let (mut keeper, mut answers) = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(error)) => return end(&error),
        Err(_) => return End::Lost,
    };
    // Opening was a first keep-alive.
    *expires = asked + ttl;
    loop {
        tokio::time::sleep(ttl / 3).await;
        let asked = Instant::now();
        if keeper.keep_alive().await.is_err() {
            return End::Lost;
        }
        match tokio::time::timeout_at((*expires).min(asked + patience), answers.message()).await {
            Ok(Ok(Some(answer))) if answer.ttl() > 0 => *expires = asked + ttl,
            Ok(Ok(Some(_))) => return End::Gone,
            Ok(Err(error)) => return end(&error),
            Ok(Ok(None)) | Err(_) => return End::Lost,
        }
    }
}

fn end(error: &Error) -> End {
    match error {
        Error::LeaseKeepAliveError(reason) if reason.contains("not found") => End::Gone,
        Error::GRpcStatus(status) if status.message().contains("requested lease not found") => End::Gone,
        _ => End::Lost,
    }
}
