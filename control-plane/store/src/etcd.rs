//! The etcd backend.
//!
//! etcd's client neither resumes a watch nor notices that a server is gone: both are done here. A call that gets
//! no answer in time is an error; whether a commit was applied is then unknown, and its caller looks again.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, GetResponse, KeyValue, KvClient,
    PutOptions, ResponseHeader, Txn, TxnOp, TxnOpResponse,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{
    CommitError, Entry, Key, KeyError, Lease, LeaseId, Listing, Operation, Precondition, Prefix, Store,
    StoreError, Transaction, WatchStream, lease::Revoke,
};

mod keep_alive;
mod watch;

/// Pauses before a read is tried again.
const READ_PAUSES: [Duration; 3] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(300),
];
/// Longest that one call may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that answers no ping is given up.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// Largest answer that is read: a whole listing is one answer, and gRPC's default of 4 MiB is soon too little.
const LARGEST_ANSWER: usize = 256 << 20;
/// Events on their way to one consumer; etcd keeps the rest.
const EVENTS: usize = 256;

/// A real etcd.
#[derive(Clone)]
pub struct EtcdStore {
    client: Client,
    endpoints: Vec<String>,
}

// === impl EtcdStore ===

impl EtcdStore {
    /// Connects to etcd at one or several endpoints and asks it something, since connecting alone proves nothing.
    ///
    /// # Errors
    /// No endpoint answers, or one is no address; the error names the endpoints.
    pub async fn connect<E: AsRef<str>>(endpoints: &[E]) -> Result<Self, StoreError> {
        let endpoints: Vec<String> = endpoints
            .iter()
            .map(|endpoint| endpoint.as_ref().to_owned())
            .collect();
        let options = ConnectOptions::new()
            .with_connect_timeout(TIMEOUT)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let named = |error: StoreError| unreachable_at(&endpoints, &error);
        let client = limited(Client::connect(&endpoints, Some(options)))
            .await
            .map_err(named)?;
        let store = Self {
            client,
            endpoints: endpoints.clone(),
        };
        store.health().await.map_err(named)?;
        Ok(store)
    }
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore")
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &Key) -> Result<Option<Entry>, StoreError> {
        let response = read(|| kv_get(&self.client, key.to_string(), None)).await?;
        response.kvs().first().map(entry).transpose()
    }

    async fn list(&self, prefix: Prefix) -> Result<Listing, StoreError> {
        list(&self.client, prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<u64, CommitError> {
        transaction.changes_each_key_once()?;
        let compares: Vec<Compare> = transaction.preconditions.iter().map(compare).collect();
        let operations: Vec<TxnOp> = transaction.operations.iter().map(operation).collect();
        // The failing side reads what was compared, so that the error names the key.
        let looks: Vec<TxnOp> = transaction
            .preconditions
            .iter()
            .map(|p| TxnOp::get(p.key().to_string(), None))
            .collect();
        let txn = Txn::new().when(compares).and_then(operations).or_else(looks);
        let response = limited(kv(&self.client).txn(txn))
            .await
            .map_err(|error| lease_gone(error, &transaction))?;
        if response.succeeded() {
            return Ok(revision(response.header()));
        }
        let found = response.op_responses();
        let failed = transaction
            .preconditions
            .iter()
            .zip(&found)
            .find(|(wanted, found)| !holds(wanted, found));
        match failed
            .map(|(wanted, _)| wanted)
            .or(transaction.preconditions.first())
        {
            Some(wanted) => Err(CommitError::Conflict {
                key: wanted.key().clone(),
            }),
            None => {
                Err(StoreError::Failed("a transaction without preconditions was not committed".into()).into())
            }
        }
    }

    async fn watch(&self, prefix: Prefix, from_revision: u64) -> Result<WatchStream, StoreError> {
        let (events, receiver) = mpsc::channel(EVENTS);
        // To etcd, 0 is "from now on", which could not be resumed without a gap.
        let next = from_revision.max(1);
        tokio::spawn(watch::follow(self.client.clone(), prefix, next, events));
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        // Counted from before the grant, so that we never believe in a lease that etcd has ended.
        let asked = Instant::now();
        let granted = limited(self.client.lease_client().grant(seconds, None)).await?;
        let (id, ttl) = (granted.id(), Duration::from_secs(granted.ttl().unsigned_abs()));
        let lost = CancellationToken::new();
        let task = tokio::spawn(keep_alive::hold(
            self.client.clone(),
            id,
            ttl,
            asked + ttl,
            lost.clone(),
        ));
        let client = self.client.clone();
        let revoke: Revoke = Box::new(move || {
            Box::pin(async move {
                match limited(client.lease_client().revoke(id)).await {
                    Err(StoreError::LeaseGone(_)) | Ok(_) => Ok(()),
                    Err(error) => Err(error),
                }
            })
        });
        Ok(Lease::new(LeaseId(id), lost, task.abort_handle(), revoke))
    }

    async fn health(&self) -> Result<(), StoreError> {
        let options = GetOptions::new().with_count_only();
        limited(kv(&self.client).get(Key::Leader.to_string(), Some(options)))
            .await
            .map(drop)
    }
}

fn kv(client: &Client) -> KvClient {
    client.kv_client().max_decoding_message_size(LARGEST_ANSWER)
}

async fn list(client: &Client, prefix: Prefix) -> Result<Listing, StoreError> {
    let options = GetOptions::new().with_prefix();
    let response = read(|| kv_get(client, prefix.as_str().to_owned(), Some(options.clone()))).await?;
    // A key that is none of ours spoils nothing else.
    let known = |kv: &KeyValue| {
        entry(kv)
            .inspect_err(|error| tracing::warn!(%error, "ignored"))
            .ok()
    };
    let entries = response.kvs().iter().filter_map(known).collect();
    Ok(Listing {
        entries,
        revision: revision(response.header()),
    })
}

async fn kv_get(client: &Client, key: String, options: Option<GetOptions>) -> Result<GetResponse, Error> {
    kv(client).get(key, options).await
}

/// A read that fails is tried again: the next one asks another member, and asking twice does no harm.
async fn read<T, F: Future<Output = Result<T, Error>>>(call: impl Fn() -> F) -> Result<T, StoreError> {
    for pause in READ_PAUSES {
        match limited(call()).await {
            Err(StoreError::Unavailable(_)) => tokio::time::sleep(pause).await,
            done => return done,
        }
    }
    limited(call()).await
}

/// Ends a call that takes too long.
async fn limited<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(result) => result.map_err(|error| store_error(&error)),
        Err(_) => Err(StoreError::Timeout(TIMEOUT)),
    }
}

/// Says which etcd it is that does not answer.
fn unreachable_at(endpoints: &[String], error: &StoreError) -> StoreError {
    let message = format!("no etcd answers at {}: {error}", endpoints.join(", "));
    match error.is_retryable() {
        true => StoreError::Unavailable(message),
        false => StoreError::Failed(message),
    }
}

fn store_error(error: &Error) -> StoreError {
    match error {
        Error::GRpcStatus(status) if status.message().contains("requested lease not found") => {
            StoreError::LeaseGone(LeaseId(0))
        }
        Error::GRpcStatus(status) => {
            let message = format!("etcd: {}", status.message());
            match status.code() as i32 {
                // Cancelled, unknown, deadline exceeded, aborted, internal, unavailable: connections break in all
                // these ways.
                1 | 2 | 4 | 10 | 13 | 14 => StoreError::Unavailable(message),
                _ => StoreError::Failed(message),
            }
        }
        Error::TransportError(_) | Error::IoError(_) => StoreError::Unavailable(format!("etcd: {error}")),
        Error::InvalidUri(_) | Error::InvalidArgs(_) => {
            StoreError::Failed(format!("not an etcd endpoint: {error}"))
        }
        other => StoreError::Unavailable(format!("etcd: {other}")),
    }
}

/// etcd does not say which lease is gone; the transaction does.
fn lease_gone(error: StoreError, transaction: &Transaction) -> StoreError {
    let lease = transaction
        .operations
        .iter()
        .find_map(|operation| match operation {
            Operation::Put { lease, .. } => *lease,
            Operation::Delete(_) => None,
        });
    match (error, lease) {
        (StoreError::LeaseGone(_), Some(lease)) => StoreError::LeaseGone(lease),
        (error, _) => error,
    }
}

fn compare(precondition: &Precondition) -> Compare {
    let key = precondition.key().to_string();
    match precondition {
        Precondition::Absent(_) => Compare::create_revision(key, CompareOp::Equal, 0),
        Precondition::Exists(_) => Compare::create_revision(key, CompareOp::Greater, 0),
        // An absent key has 0 here, but it was not written at any revision.
        Precondition::ModRevision(_, 0) => Compare::mod_revision(key, CompareOp::Less, 0),
        Precondition::ModRevision(_, revision) => {
            Compare::mod_revision(key, CompareOp::Equal, signed(*revision))
        }
    }
}

fn operation(operation: &Operation) -> TxnOp {
    match operation {
        Operation::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.to_string(), value.to_vec(), options)
        }
        Operation::Delete(key) => TxnOp::delete(key.to_string(), None),
    }
}

fn holds(precondition: &Precondition, found: &TxnOpResponse) -> bool {
    let TxnOpResponse::Get(found) = found else {
        return true;
    };
    let found = found.kvs().first();
    match precondition {
        Precondition::Absent(_) => found.is_none(),
        Precondition::Exists(_) => found.is_some(),
        Precondition::ModRevision(_, revision) => {
            found.is_some_and(|kv| unsigned(kv.mod_revision()) == *revision)
        }
    }
}

fn entry(kv: &KeyValue) -> Result<Entry, StoreError> {
    Ok(Entry {
        key: key(kv)?,
        value: Bytes::copy_from_slice(kv.value()),
        mod_revision: unsigned(kv.mod_revision()),
        create_revision: unsigned(kv.create_revision()),
        lease: (kv.lease() != 0).then(|| LeaseId(kv.lease())),
    })
}

fn key(kv: &KeyValue) -> Result<Key, StoreError> {
    match std::str::from_utf8(kv.key()) {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Err(KeyError(String::from_utf8_lossy(kv.key()).into_owned()).into()),
    }
}

fn revision(header: Option<&ResponseHeader>) -> u64 {
    header.map_or(0, |header| unsigned(header.revision()))
}

fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn signed(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}
