//! How other processes talk to the control plane: a gateway's subscription to what it should serve, and the
//! operators' admin calls.
//!
//! ```text
//!            Push                 Candidate                 Arc<View>
//! Sync ──────────────▶ checks ───────────────▶ ApplyFn ────────────────▶ watch::Receiver
//!      ◀────────────── digest, epoch, fields     │ Veto
//!        Ack │ Nack ◀────────────────────────────┘
//! ```
//!
//! [`subscribe`] keeps one stream to one of the control planes and opens another when it breaks; while there is
//! none, the last view stays. It refuses to judge a plan beyond its integrity (that is the callback's part), to
//! write anything to disk, and to go back to an older epoch.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use penstock_client::{SyncConfig, subscribe};
//! use tokio_util::sync::CancellationToken;
//!
//! let config = SyncConfig { region: "eu-west".into(), ..SyncConfig::new(["127.0.0.1:8090"], "gw-1", "boot-7") };
//! let shutdown = CancellationToken::new();
//! let subscription = subscribe(config, Box::new(|_candidate| Ok(())), shutdown.clone())?;
//! let mut view = subscription.view();
//! view.changed().await?;
//! println!("{} routes", view.borrow().snapshot.as_ref().map_or(0, |snapshot| snapshot.routes.len()));
//! shutdown.cancel();
//! subscription.ended().await;
//! # Ok(())
//! # }
//! ```

mod address;
mod admin;
mod backoff;
mod mirror;
mod placement;
mod stream;
mod subscription;
mod vanished;
mod view;

/// The messages that calls take and give.
pub use penstock_proto::v1;

pub use address::{Address, AddressError};
pub use admin::{AdminClient, AdminError};
pub use placement::{ControlPlanes, LocateFn, PlacementConfig, ReportFn, follow_placement};
pub use subscription::{Subscription, SyncConfig, SyncConfigError, subscribe};
pub use view::{ApplyFn, Candidate, ReachFn, StatsFn, Veto, View};
