//! What is meant where a name is left out.

use crate::error::CtlError;
use penstock_proto::v1::{Phase, Rollout, RolloutStatus};

/// The one rollout that can be meant: the only one, or the only one under way.
pub(super) fn only_rollout(mut rollouts: Vec<RolloutStatus>) -> Result<RolloutStatus, CtlError> {
    let is_over = |status: &RolloutStatus| {
        let phase = status.rollout.as_ref().map(Rollout::phase);
        matches!(phase, Some(Phase::Succeeded | Phase::RolledBack))
    };
    if rollouts.len() > 1 && rollouts.iter().filter(|status| !is_over(status)).count() == 1 {
        rollouts.retain(|status| !is_over(status));
    }
    let names = rollouts
        .iter()
        .filter_map(|status| Some(status.rollout.as_ref()?.model.clone()))
        .collect();
    only("rollout", "start one with `ctl rollout create`", names)?;
    rollouts
        .pop()
        .ok_or_else(|| CtlError::NotFound("there is no rollout".to_owned()))
}

/// The only name, or an error that says what to do.
pub(super) fn only(what: &str, remedy: &str, mut names: Vec<String>) -> Result<String, CtlError> {
    match names.as_slice() {
        [] => Err(CtlError::NotFound(format!("there is no {what}: {remedy}"))),
        [_] => Ok(names.remove(0)),
        _ => Err(CtlError::Usage(format!(
            "there are several {what}s: name one of {}",
            names.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(model: &str, phase: Phase) -> RolloutStatus {
        let rollout = Rollout {
            model: model.into(),
            phase: phase.into(),
            ..Rollout::default()
        };
        RolloutStatus {
            rollout: Some(rollout),
            ..RolloutStatus::default()
        }
    }

    fn picked(rollouts: Vec<RolloutStatus>) -> Result<String, u8> {
        only_rollout(rollouts)
            .map(|s| s.rollout.unwrap().model)
            .map_err(|error| error.code())
    }

    #[test]
    fn a_name_may_be_left_out_where_one_rollout_can_be_meant() {
        assert_eq!(picked(vec![status("a", Phase::RolledBack)]), Ok("a".into()));
        let over = || status("a", Phase::Succeeded);
        assert_eq!(picked(vec![over(), status("b", Phase::Paused)]), Ok("b".into()));
        assert_eq!(picked(vec![status("b", Phase::Paused), over()]), Ok("b".into()));
        assert_eq!(picked(vec![]), Err(3));
        assert_eq!(picked(vec![over(), over()]), Err(2));
        assert_eq!(
            picked(vec![status("a", Phase::Paused), status("b", Phase::Converging)]),
            Err(2)
        );
    }

    #[test]
    fn several_names_are_listed() {
        let error = only("model", "", vec!["a".into(), "b".into()]).unwrap_err();
        assert_eq!(error.to_string(), "there are several models: name one of a, b");
    }
}
