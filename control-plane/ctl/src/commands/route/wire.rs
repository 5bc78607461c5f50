//! The pushed snapshot as the plan's own type.

use penstock_plan::{Canary, OnMissing, Ppm, Revision, Route, Snapshot, Sticky};
use penstock_proto::v1;

/// Reads a snapshot; the error names what is missing or cannot be.
pub(super) fn snapshot(wire: v1::Snapshot) -> Result<Snapshot, String> {
    let routes = wire.routes.into_iter().map(|wire| {
        let model = wire.model.clone();
        let route = route(wire).map_err(|reason| format!("the route of `{model}` has {reason}"))?;
        Ok((model, route))
    });
    Ok(Snapshot {
        epoch: wire.epoch,
        routes: routes.collect::<Result<_, String>>()?,
    })
}

fn route(wire: v1::Route) -> Result<Route, String> {
    let sticky = wire.sticky.ok_or("no sticky keys")?;
    let keys = sticky
        .keys
        .iter()
        .map(|key| key.parse().map_err(|error| format!("a bad key: {error}")));
    Ok(Route {
        sticky: Sticky {
            keys: keys.collect::<Result<_, String>>()?,
            on_missing: match sticky.on_missing() {
                v1::OnMissing::Unspecified | v1::OnMissing::Request => OnMissing::Request,
                v1::OnMissing::Stable => OnMissing::Stable,
            },
        },
        model: wire.model,
        stable: revision(wire.stable.ok_or("no stable revision")?),
        canary: wire.canary.map(canary).transpose()?,
        rollout_uid: wire.rollout_uid,
        generation: wire.generation,
        pinnable: wire.pinnable.into_iter().map(revision).collect(),
        revoked: wire.revoked,
    })
}

fn canary(wire: v1::Canary) -> Result<Canary, String> {
    let share = Ppm::new(wire.ppm).map_err(|error| format!("a bad share: {error}"))?;
    Ok(Canary {
        revision: revision(wire.revision.ok_or("a canary without its revision")?),
        share,
    })
}

fn revision(wire: v1::Revision) -> Revision {
    Revision {
        name: wire.name,
        digest: wire.digest,
    }
}
