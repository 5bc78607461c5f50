//! What gateways are told to apply.

use std::collections::BTreeMap;

use penstock_plan::{Canary, OnMissing, Ppm, Revision, Route, Snapshot, Sticky};

use super::{ConvertError, required};
use crate::v1;

/// The routes in the order of their models, under the digest of the whole.
impl From<&Snapshot> for v1::Snapshot {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            epoch: snapshot.epoch,
            digest: snapshot.digest(),
            routes: snapshot.routes.values().map(v1::Route::from).collect(),
        }
    }
}

/// The digest is left to the caller to compare with [`Snapshot::digest`]: a snapshot that was garbled on its way
/// and one that cannot be read are told apart.
impl TryFrom<v1::Snapshot> for Snapshot {
    type Error = ConvertError;

    fn try_from(wire: v1::Snapshot) -> Result<Self, ConvertError> {
        let mut routes = BTreeMap::new();
        for route in wire.routes {
            let model = route.model.clone();
            let field = format!("routes[{model}]");
            let route = Route::try_from(route).map_err(|error| error.within(&field))?;
            if routes.insert(model, route).is_some() {
                return Err(ConvertError::new(&field, "the model has two routes"));
            }
        }
        Ok(Self {
            epoch: wire.epoch,
            routes,
        })
    }
}

impl From<&Route> for v1::Route {
    fn from(route: &Route) -> Self {
        Self {
            model: route.model.clone(),
            stable: Some((&route.stable).into()),
            canary: route.canary.as_ref().map(v1::Canary::from),
            rollout_uid: route.rollout_uid.clone(),
            generation: route.generation,
            sticky: Some((&route.sticky).into()),
            pinnable: route.pinnable.iter().map(v1::Revision::from).collect(),
            revoked: route.revoked.clone(),
        }
    }
}

impl TryFrom<v1::Route> for Route {
    type Error = ConvertError;

    fn try_from(wire: v1::Route) -> Result<Self, ConvertError> {
        let stable = required(wire.stable, "stable")?.into();
        let canary = wire.canary.map(Canary::try_from).transpose();
        let sticky = Sticky::try_from(required(wire.sticky, "sticky")?);
        Ok(Self {
            model: wire.model,
            stable,
            canary: canary.map_err(|error| error.within("canary"))?,
            rollout_uid: wire.rollout_uid,
            generation: wire.generation,
            sticky: sticky.map_err(|error| error.within("sticky"))?,
            pinnable: wire.pinnable.into_iter().map(Revision::from).collect(),
            revoked: wire.revoked,
        })
    }
}

impl From<&Revision> for v1::Revision {
    fn from(revision: &Revision) -> Self {
        Self {
            name: revision.name.clone(),
            digest: revision.digest.clone(),
        }
    }
}

impl From<v1::Revision> for Revision {
    fn from(wire: v1::Revision) -> Self {
        Self {
            name: wire.name,
            digest: wire.digest,
        }
    }
}

impl From<&Canary> for v1::Canary {
    fn from(canary: &Canary) -> Self {
        Self {
            revision: Some((&canary.revision).into()),
            ppm: canary.share.get(),
        }
    }
}

impl TryFrom<v1::Canary> for Canary {
    type Error = ConvertError;

    fn try_from(wire: v1::Canary) -> Result<Self, ConvertError> {
        let share = Ppm::new(wire.ppm).map_err(|error| ConvertError::new("ppm", error.to_string()))?;
        Ok(Self {
            revision: required(wire.revision, "revision")?.into(),
            share,
        })
    }
}

impl From<&Sticky> for v1::Sticky {
    fn from(sticky: &Sticky) -> Self {
        let on_missing = match sticky.on_missing {
            OnMissing::Request => v1::OnMissing::Request,
            OnMissing::Stable => v1::OnMissing::Stable,
        };
        Self {
            keys: sticky.keys.iter().map(ToString::to_string).collect(),
            on_missing: on_missing.into(),
        }
    }
}

/// What is left out has its default: a key is drawn for a request that has none.
impl TryFrom<v1::Sticky> for Sticky {
    type Error = ConvertError;

    fn try_from(wire: v1::Sticky) -> Result<Self, ConvertError> {
        let on_missing = match v1::OnMissing::try_from(wire.on_missing) {
            Ok(v1::OnMissing::Unspecified | v1::OnMissing::Request) => OnMissing::Request,
            Ok(v1::OnMissing::Stable) => OnMissing::Stable,
            Err(_) => {
                return Err(ConvertError::new(
                    "on_missing",
                    format!("{} is not a known value", wire.on_missing),
                ));
            }
        };
        let keys = wire.keys.iter().enumerate().map(|(index, key)| {
            key.parse()
                .map_err(|error| ConvertError::new(&format!("keys[{index}]"), format!("{error}")))
        });
        Ok(Self {
            keys: keys.collect::<Result<_, _>>()?,
            on_missing,
        })
    }
}
