//! What gateways are told to apply.

use std::collections::BTreeMap;

use penstock_plan::{
    Canary, Mirror, OnMissing, Ppm, Revision, Route, Rule, Snapshot, Sticky, Threshold, Trial,
};

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
            rules: route.rules.iter().map(v1::Rule::from).collect(),
            holdout_ppm: route.holdout.get(),
            mirror: route.mirror.map(|mirror| v1::Mirror {
                ppm: mirror.share.get(),
                max_output_tokens: mirror.max_output_tokens,
            }),
            trial: route.trial.as_ref().map(v1::Trial::from),
        }
    }
}

impl TryFrom<v1::Route> for Route {
    type Error = ConvertError;

    fn try_from(wire: v1::Route) -> Result<Self, ConvertError> {
        let stable = required(wire.stable, "stable")?.into();
        let canary = wire.canary.map(Canary::try_from).transpose();
        let sticky = Sticky::try_from(required(wire.sticky, "sticky")?);
        let rules = wire.rules.into_iter().enumerate().map(|(index, rule)| {
            Rule::try_from(rule).map_err(|error| error.within(&format!("rules[{index}]")))
        });
        let mirror = wire.mirror.map(|mirror| {
            Ok(Mirror {
                share: ppm(mirror.ppm, "mirror.ppm")?,
                max_output_tokens: mirror.max_output_tokens,
            })
        });
        Ok(Self {
            model: wire.model,
            stable,
            canary: canary.map_err(|error| error.within("canary"))?,
            rollout_uid: wire.rollout_uid,
            generation: wire.generation,
            sticky: sticky.map_err(|error| error.within("sticky"))?,
            pinnable: wire.pinnable.into_iter().map(Revision::from).collect(),
            revoked: wire.revoked,
            rules: rules.collect::<Result<_, _>>()?,
            holdout: ppm(wire.holdout_ppm, "holdout_ppm")?,
            mirror: mirror.transpose()?,
            trial: wire.trial.map(Trial::try_from).transpose()?,
        })
    }
}

impl From<&Trial> for v1::Trial {
    fn from(trial: &Trial) -> Self {
        let threshold = |threshold: &Threshold| v1::Threshold {
            metric: threshold.metric.clone(),
            over: threshold.over,
        };
        Self {
            attempt: trial.attempt,
            step: trial.step,
            thresholds: trial.thresholds.iter().map(threshold).collect(),
            window_s: trial.window_s,
        }
    }
}

impl TryFrom<v1::Trial> for Trial {
    type Error = ConvertError;

    fn try_from(wire: v1::Trial) -> Result<Self, ConvertError> {
        let threshold = |(index, threshold): (usize, v1::Threshold)| {
            if threshold.over.is_nan() {
                let field = format!("trial.thresholds[{index}].over");
                return Err(ConvertError::new(&field, "it is not a number"));
            }
            Ok(Threshold {
                metric: threshold.metric,
                over: threshold.over,
            })
        };
        Ok(Self {
            attempt: wire.attempt,
            step: wire.step,
            thresholds: wire
                .thresholds
                .into_iter()
                .enumerate()
                .map(threshold)
                .collect::<Result<_, _>>()?,
            window_s: wire.window_s,
        })
    }
}

impl From<&Rule> for v1::Rule {
    fn from(rule: &Rule) -> Self {
        Self {
            priority: rule.priority,
            headers: rule.headers.clone().into_iter().collect(),
            users: rule.users.clone(),
            regions: rule.regions.clone(),
            devices: rule.devices.clone(),
            client_ip: rule.client_ip.iter().map(ToString::to_string).collect(),
            trusted_hops: rule.trusted_hops.into(),
            canary_ppm: rule.canary.get(),
        }
    }
}

impl TryFrom<v1::Rule> for Rule {
    type Error = ConvertError;

    fn try_from(wire: v1::Rule) -> Result<Self, ConvertError> {
        let network = |(index, network): (usize, &String)| {
            network.parse().map_err(|_| {
                let message = format!("{network:?} is not a network such as 10.0.0.0/8");
                ConvertError::new(&format!("client_ip[{index}]"), message)
            })
        };
        Ok(Self {
            client_ip: wire
                .client_ip
                .iter()
                .enumerate()
                .map(network)
                .collect::<Result<_, _>>()?,
            priority: wire.priority,
            headers: wire.headers.into_iter().collect(),
            users: wire.users,
            regions: wire.regions,
            devices: wire.devices,
            trusted_hops: hops(wire.trusted_hops)?,
            canary: ppm(wire.canary_ppm, "canary_ppm")?,
        })
    }
}

fn ppm(value: u32, field: &str) -> Result<Ppm, ConvertError> {
    Ppm::new(value).map_err(|error| ConvertError::new(field, error.to_string()))
}

fn hops(value: u32) -> Result<u8, ConvertError> {
    u8::try_from(value)
        .map_err(|_| ConvertError::new("trusted_hops", format!("{value} hops are more than 255")))
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
            min_ready: canary.min_ready,
        }
    }
}

impl TryFrom<v1::Canary> for Canary {
    type Error = ConvertError;

    fn try_from(wire: v1::Canary) -> Result<Self, ConvertError> {
        Ok(Self {
            revision: required(wire.revision, "revision")?.into(),
            share: ppm(wire.ppm, "ppm")?,
            min_ready: wire.min_ready,
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
            trusted_hops: sticky.trusted_hops.into(),
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
            trusted_hops: hops(wire.trusted_hops)?,
        })
    }
}
