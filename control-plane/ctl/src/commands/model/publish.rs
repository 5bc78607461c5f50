//! `ctl model publish`: makes a revision known and follows the workers that load it.

use super::all;
use crate::{
    config::Publish,
    connect::Admin,
    console::Console,
    error::CtlError,
    output::{Format, View, emit, time},
    view::state,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use penstock_proto::v1::{PlacementStatus, PublishModelRequest, PublishedRevision, revision_state::State};
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep};

/// How long workers may take where no limit is given: a large checkpoint is fetched in minutes.
const PATIENCE: Duration = Duration::from_secs(600);
/// Between two looks.
const EVERY: Duration = Duration::from_millis(300);

pub(super) async fn run(
    args: Publish,
    admin: &mut Admin,
    limit: Option<Duration>,
    output: Format,
    console: &mut Console,
) -> Result<(), CtlError> {
    let (model, revision) = (args.model.clone(), args.revision.clone());
    let no_wait = args.no_wait;
    let request = request(args)?;
    let reply = admin.rpc.publish_model(request).await;
    let published = reply.map_err(|status| admin.failed(status))?.into_inner();
    if no_wait {
        let published = Published::new(&model, &published, false);
        return emit(console, output, &published);
    }
    let mut progress = Progress::new(console);
    let limit = limit.unwrap_or(PATIENCE);
    let until = Instant::now() + limit;
    loop {
        let seen = look(admin, &model, &revision)
            .await?
            .unwrap_or_else(|| published.clone());
        progress.show(&seen.placements, console);
        match standing(&seen.placements) {
            Standing::Serving => {
                progress.finish();
                let published = Published::new(&model, &seen, true);
                return emit(console, output, &published);
            }
            Standing::Failed(failures) => {
                progress.finish();
                return Err(CtlError::Failed(format!(
                    "{model}@{revision} is published, but {failures}; publish it again once that is mended"
                )));
            }
            Standing::UnderWay if Instant::now() >= until => {
                progress.finish();
                return Err(CtlError::NotConverged(late(&model, &seen, limit)));
            }
            Standing::UnderWay => sleep(EVERY).await,
        }
    }
}

fn request(args: Publish) -> Result<PublishModelRequest, CtlError> {
    let prefixes: Result<Vec<_>, _> = args.warm_prefixes.into_iter().map(prefix).collect();
    Ok(PublishModelRequest {
        model: args.model,
        revision: args.revision,
        source: args.from,
        digest: args.digest,
        warm_prefixes: prefixes?,
        reason: args.why.reason,
        actor: args.why.actor,
    })
}

/// The text itself, or that of the file behind `@`.
fn prefix(text: String) -> Result<String, CtlError> {
    match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).map_err(|source| CtlError::Read {
            path: path.to_owned(),
            source,
        }),
        None => Ok(text),
    }
}

async fn look(admin: &mut Admin, model: &str, revision: &str) -> Result<Option<PublishedRevision>, CtlError> {
    let models = all(admin).await?;
    let model = models.into_iter().find(|found| found.name == model);
    Ok(model.and_then(|model| model.revisions.into_iter().find(|found| found.name == revision)))
}

#[derive(Debug, PartialEq, Eq)]
enum Standing {
    UnderWay,
    Serving,
    /// What failed, in words; every other worker serves.
    Failed(String),
}

/// Over when every worker that has the placement serves it or failed. Workers that are to have it but have said
/// nothing yet are waited for, so that nothing heard is not the end.
fn standing(placements: &[PlacementStatus]) -> Standing {
    let state = |placement: &PlacementStatus| placement.state.as_ref().map(|state| state.state());
    let settled = |placement: &PlacementStatus| {
        matches!(
            state(placement),
            Some(State::Serving | State::Failed | State::Retiring)
        )
    };
    if placements.is_empty() || !placements.iter().all(settled) {
        return Standing::UnderWay;
    }
    let failed = placements.iter().filter(|p| state(p) == Some(State::Failed));
    let failures: Vec<_> = failed
        .map(|placement| {
            let message = placement
                .state
                .as_ref()
                .map_or("", |state| state.message.as_str());
            format!("{} cannot serve it: {message}", placement.worker)
        })
        .collect();
    if failures.is_empty() {
        Standing::Serving
    } else {
        Standing::Failed(failures.join("; "))
    }
}

fn late(model: &str, seen: &PublishedRevision, limit: Duration) -> String {
    let workers: Vec<_> = seen.placements.iter().map(line).collect();
    let workers = if workers.is_empty() {
        "no worker has begun".to_owned()
    } else {
        workers.join(", ")
    };
    format!(
        "{model}@{} is published, but not served by all within {}: {workers}; follow it with `ctl model list`",
        seen.name,
        time(limit)
    )
}

fn line(placement: &PlacementStatus) -> String {
    let revision = placement.state.clone().unwrap_or_default();
    format!("{} {}", placement.worker, state(revision.state()))
}

/// A bar for each worker on a terminal, a line at each new state elsewhere; on stderr.
struct Progress {
    /// None without a terminal.
    bars: Option<MultiProgress>,
    workers: BTreeMap<String, (String, ProgressBar)>,
}

impl Progress {
    fn new(console: &Console) -> Self {
        Self {
            bars: console.shows_bars().then(MultiProgress::new),
            workers: BTreeMap::new(),
        }
    }

    fn show(&mut self, placements: &[PlacementStatus], console: &mut Console) {
        for placement in placements {
            let revision = placement.state.clone().unwrap_or_default();
            let now = state(revision.state());
            let bars = self.bars.as_ref();
            let entry = self.workers.entry(placement.worker.clone()).or_insert_with(|| {
                let bar = bars.map_or_else(ProgressBar::hidden, |bars| bars.add(bar(&placement.worker)));
                (String::new(), bar)
            });
            entry.1.set_length(revision.total_bytes.max(1));
            entry.1.set_position(match revision.state() {
                State::Serving => revision.total_bytes.max(1),
                _ => revision.done_bytes,
            });
            entry.1.set_message(now);
            if entry.0 != now && self.bars.is_none() {
                console.progress(&line(placement));
            }
            now.clone_into(&mut entry.0);
        }
    }

    /// Leaves the bars as they are.
    fn finish(&self) {
        for (_, bar) in self.workers.values() {
            bar.abandon();
        }
    }
}

fn bar(worker: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:20} [{bar:30}] {bytes}/{total_bytes} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(1)
        .with_style(style)
        .with_prefix(worker.to_owned())
}

/// What came of a publication.
#[derive(Debug, Serialize)]
struct Published {
    model: String,
    revision: String,
    digest: String,
    source: String,
    /// Whether every worker serves it; false where it was not waited for.
    served: bool,
    workers: Vec<String>,
}

impl Published {
    fn new(model: &str, revision: &PublishedRevision, served: bool) -> Self {
        Self {
            model: model.to_owned(),
            revision: revision.name.clone(),
            digest: revision.digest.clone(),
            source: revision.source.clone(),
            served,
            workers: revision.placements.iter().map(|p| p.worker.clone()).collect(),
        }
    }
}

impl View for Published {
    fn table(&self) -> String {
        let Self { model, revision, .. } = self;
        if !self.served {
            return format!("{model}@{revision} is published; not waited for workers\n");
        }
        let digest = self.digest.get(..12).unwrap_or(&self.digest);
        format!(
            "{model}@{revision} is served by {} (digest {digest})\n",
            self.workers.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_proto::v1::RevisionState;

    fn placement(worker: &str, state: State) -> PlacementStatus {
        let mut revision = RevisionState {
            message: "no space".into(),
            ..RevisionState::default()
        };
        revision.set_state(state);
        PlacementStatus {
            worker: worker.into(),
            state: Some(revision),
        }
    }

    #[test]
    fn it_is_over_when_every_worker_serves_or_failed() {
        let (serving, loading) = (placement("w1", State::Serving), placement("w2", State::Loading));
        assert_eq!(standing(&[]), Standing::UnderWay);
        assert_eq!(standing(&[serving.clone(), loading.clone()]), Standing::UnderWay);
        assert_eq!(standing(std::slice::from_ref(&serving)), Standing::Serving);
        assert_eq!(
            standing(&[loading, placement("w3", State::Failed)]),
            Standing::UnderWay
        );
        assert_eq!(
            standing(&[serving, placement("w3", State::Failed)]),
            Standing::Failed("w3 cannot serve it: no space".into())
        );
    }
}
