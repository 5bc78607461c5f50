//! Whether the gateway can serve anybody.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use penstock_client::View;
use tokio::{sync::watch, task::JoinHandle};

use crate::pool::Pool;

/// How often workers are asked until one serves.
const PROBE_EVERY: Duration = Duration::from_millis(200);
/// Workers asked at once.
const PROBES: usize = 8;

/// Why nobody can be served now; nothing when somebody can.
pub(crate) type Readiness = Result<(), &'static str>;

/// Follows the view. What a view from disk says of workers is old: the gateway is not ready before one of them has
/// answered once; from then on the control plane's word counts.
pub(crate) fn watch(
    mut view: watch::Receiver<Arc<View>>,
    pool: Arc<Pool>,
) -> (watch::Receiver<Readiness>, JoinHandle<()>) {
    let (sender, receiver) = watch::channel(Err("starting"));
    let task = tokio::spawn(async move {
        let mut answered = false;
        loop {
            let now = view.borrow_and_update().clone();
            answered = answered || any_serves(&pool, &now).await;
            let next = readiness(&now, answered);
            sender.send_if_modified(|readiness| std::mem::replace(readiness, next) != next);
            // Without a control plane the view never changes again, and that is known at once.
            let changed = async {
                if view.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(PROBE_EVERY), if !answered => {}
            }
        }
    });
    (receiver, task)
}

fn readiness(view: &View, answered: bool) -> Readiness {
    match (&view.snapshot, view.endpoints.endpoints.is_empty(), answered) {
        (None, ..) => Err("no snapshot yet"),
        (_, true, _) => Err("no worker yet"),
        (.., false) => Err("no worker answers yet"),
        (.., true) => Ok(()),
    }
}

async fn any_serves(pool: &Pool, view: &View) -> bool {
    let mut probes = Vec::new();
    for endpoint in &view.endpoints.endpoints {
        let peer = pool.peer(&endpoint.address);
        probes.push(async move { peer.serves().await });
    }
    let answers = stream::iter(probes).buffer_unordered(PROBES);
    std::pin::pin!(answers.filter(|serves| std::future::ready(*serves)))
        .next()
        .await
        .is_some()
}
