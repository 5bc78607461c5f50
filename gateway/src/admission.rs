//! Who gets in when more is asked for than can be served. Nothing waits that cannot be served in time.
//!
//! ```text
//! request ─▶ the tenant's rates ─▶ gate of the revision ─▶ worker
//!                 │                  │ full: fair queue, bounded by time and number
//!                 └── 429 ◀──────────┘ with the time after which it is worth to come back
//! ```

mod fair;
mod gate;
mod rate;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderMap, header};
use penstock_proto::metadata;
use tokio::time::Instant;
use tonic::Status;

use crate::{balance, error};
use gate::Gate;
pub(crate) use gate::{Ask, Permit};
use rate::Tenants;

/// Gates kept at most; those of revisions that nobody asks for leave.
const GATES: usize = 1024;

/// What bounds the work that a gateway takes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overload {
    /// A request waits so long for a worker at most, and is refused at once if it would be longer.
    pub max_queue_wait: Duration,
    /// Requests that wait for one revision at most.
    pub max_queue: usize,
    /// Tokens in flight at one worker at most; how many it really takes is learnt from its queue.
    pub max_worker_tokens: u64,
    /// Requests of one tenant in a minute.
    pub tenant_requests_per_minute: Option<u64>,
    /// Tokens of one tenant in a minute, prompts and replies.
    pub tenant_tokens_per_minute: Option<u64>,
}

/// Admits requests.
#[derive(Debug)]
pub(crate) struct Admission {
    config: Overload,
    tenants: Mutex<Tenants>,
    gates: Mutex<HashMap<u64, Arc<Gate>>>,
}

// === impl Overload ===

impl Default for Overload {
    fn default() -> Self {
        Self {
            max_queue_wait: Duration::from_secs(5),
            max_queue: 1024,
            max_worker_tokens: 1 << 20,
            tenant_requests_per_minute: None,
            tenant_tokens_per_minute: None,
        }
    }
}

// === impl Admission ===

impl Admission {
    pub(crate) fn new(config: Overload) -> Self {
        Self {
            tenants: Mutex::new(Tenants::new(
                config.tenant_requests_per_minute,
                config.tenant_tokens_per_minute,
            )),
            gates: Mutex::default(),
            config,
        }
    }

    /// Counts a request of so many tokens against its tenant's rates.
    pub(crate) fn charge(&self, tenant: u64, tokens: u64) -> Result<(), Status> {
        self.tenants()
            .charge(tenant, tokens, Instant::now().into_std())
            .map_err(|exceeded| error::exhausted(exceeded.to_string(), exceeded.retry_after()))
    }

    /// A request turned out to be so many tokens.
    pub(crate) fn correct(&self, tenant: u64, expected: u64, real: u64) {
        self.tenants().correct(tenant, expected, real);
    }

    /// Waits for room at the workers of a revision, `pool`.
    pub(crate) async fn admit(&self, pool: u64, ask: Ask) -> Result<Permit, Status> {
        self.gate(pool)
            .admit(ask)
            .await
            .map_err(|shed| error::exhausted(shed.to_string(), shed.retry_after()))
    }

    fn gate(&self, pool: u64) -> Arc<Gate> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if gates.len() >= GATES && !gates.contains_key(&pool) {
            // Whoever holds a permit or waits holds the gate.
            gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        let new = || Arc::new(Gate::new(self.config.max_queue, self.config.max_queue_wait));
        gates.entry(pool).or_insert_with(new).clone()
    }

    fn tenants(&self) -> std::sync::MutexGuard<'_, Tenants> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who a request counts for: its credential, else its `x-tenant-id`, its `x-user-id`, its address.
pub(crate) fn tenant(headers: &HeaderMap, peer: Option<IpAddr>) -> u64 {
    let named = [
        header::AUTHORIZATION.as_str(),
        metadata::TENANT_ID,
        metadata::USER_ID,
    ]
    .into_iter()
    .zip(1..)
    .find_map(|(name, kind)| {
        let value = headers.get(name).filter(|value| !value.is_empty())?;
        Some(balance::hash(kind, value.as_bytes()))
    });
    named.unwrap_or_else(|| match peer {
        Some(IpAddr::V4(address)) => balance::hash(4, &address.octets()),
        // Whoever has one IPv6 address has 2^64.
        Some(IpAddr::V6(address)) => balance::hash(6, &address.octets()[..8]),
        None => 0,
    })
}
