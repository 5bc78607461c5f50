//! One worker, or two of which the first to begin is heard.

use std::pin::{Pin, pin};

use futures_util::future::{Either, select};
use tokio::time::{Instant, timeout};

use super::{Cure, Dispatch, Failed, Sent, is_transient};
use crate::pool::Picked;

/// What came of a race: the reply that has begun, and who failed before it did.
pub(super) type Raced = (Option<Sent>, Vec<(Picked, Failed)>);

impl Dispatch {
    /// Asks a worker; and another one too, if that one takes long and requests are hedged. Whoever is not heard is
    /// dropped, which ends the sequence there.
    pub(super) async fn race(&self, picked: &Picked) -> Raced {
        let asked = Instant::now();
        let mut first = pin!(self.attempt(picked));
        let delay = match self.generates() {
            true => self.forwarder.hedge.delay(self.want.namespace),
            false => None,
        };
        let early = match delay {
            Some(delay) => timeout(delay, first.as_mut()).await.ok(),
            None => None,
        };
        let second = delay
            .filter(|_| early.is_none())
            .and_then(|_| self.second(picked));
        let raced = match (early, second) {
            (Some(result), _) => alone(result, picked),
            (None, None) => alone(first.await, picked),
            (None, Some(second)) => self.both(first, picked, &second).await,
        };
        if self.generates() && raced.0.is_some() {
            self.forwarder.hedge.took(self.want.namespace, asked.elapsed());
        }
        raced
    }

    /// Another worker, if one has room and there are retries to spare.
    fn second(&self, first: &Picked) -> Option<Picked> {
        let mut tried = self.tried.clone();
        tried.insert(first.endpoint.clone());
        let endpoints = self.assigned.endpoints();
        let second = self.forwarder.pool.pick(endpoints, &tried, &self.want)?;
        (second.peer.is_spare(&self.want) && self.forwarder.budget.spend_spare()).then_some(second)
    }

    async fn both(
        &self,
        asked: Pin<&mut impl Future<Output = Result<Sent, Failed>>>,
        first: &Picked,
        second: &Picked,
    ) -> Raced {
        tracing::debug!(
            slow = first.endpoint,
            endpoint = second.endpoint,
            "a second worker is asked"
        );
        self.forwarder.metrics.hedged(&self.assigned.model);
        match select(asked, Box::pin(self.attempt(second))).await {
            Either::Left((result, rest)) => settled(result, first, rest, second).await,
            Either::Right((result, rest)) => settled(result, second, rest, first).await,
        }
    }
}

fn alone(result: Result<Sent, Failed>, by: &Picked) -> Raced {
    match result {
        Ok(sent) => (Some(sent), Vec::new()),
        Err(failed) => (None, vec![(by.clone(), failed)]),
    }
}

/// What came of a race after its first result; `rest` is the attempt of `other` that goes on.
async fn settled(
    result: Result<Sent, Failed>,
    by: &Picked,
    rest: impl Future<Output = Result<Sent, Failed>>,
    other: &Picked,
) -> Raced {
    let goes_on = |failed: &Failed| failed.cure != Cure::Nobody || is_transient(failed.status.code());
    match result {
        Err(failed) if goes_on(&failed) => {
            let (sent, mut failures) = alone(rest.await, other);
            failures.insert(0, (by.clone(), failed));
            (sent, failures)
        }
        result => alone(result, by),
    }
}
