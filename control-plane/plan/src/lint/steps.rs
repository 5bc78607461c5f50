//! The ladder: it rises, not too fast, and ends with everything.

use super::Report;
use crate::{Manifest, Ppm};

pub(super) fn check(plan: &Manifest, report: &mut Report<'_>) {
    let Some(last) = plan.steps.len().checked_sub(1) else {
        return;
    };
    let mut before = Ppm::ZERO;
    for (index, step) in plan.steps.iter().enumerate() {
        let (path, share) = (format!("steps[{index}]"), step.canary.0);
        if share <= before {
            let message = match index {
                0 => "a step at 0% shows nobody the canary: give it a share, or use `mirror`".to_owned(),
                _ => format!("{share} is not above the {before} before it: steps only rise"),
            };
            report.error(format!("{path}.canary"), "steps-not-increasing", message);
        } else if let Some(most) = too_large(plan, before, share) {
            report.error(
                format!("{path}.canary"),
                "jump-too-large",
                format!(
                    "from {before} to {share} is a jump above max_jump {}: go to at most {most}, or raise max_jump",
                    plan.max_jump
                ),
            );
        }
        if step.bake.is_some() && index != last {
            report.error(
                format!("{path}.bake"),
                "bake-not-last",
                "only the last step bakes: write hold",
            );
        }
        if step.bake.is_some() && !step.hold.get().is_zero() {
            report.error(
                format!("{path}.hold"),
                "hold-and-bake",
                format!("hold: {} does nothing beside bake: keep one of them", step.hold),
            );
        }
        before = share;
    }
    if before < Ppm::ALL {
        report.warning(
            format!("steps[{last}].canary"),
            "last-step-below-100",
            format!("the last step is {before}: the rollout ends paused there; add a step of 100%"),
        );
    }
}

/// The largest share that may follow, where this one is above it. From nothing it is twice `max_jump` percent.
fn too_large(plan: &Manifest, before: Ppm, share: Ppm) -> Option<Ppm> {
    let most = match before.get() {
        0 => plan.max_jump * 2.0 * 10_000.0,
        ppm => plan.max_jump * f64::from(ppm),
    };
    (f64::from(share.get()) > most).then(|| Ppm::new(most as u32).unwrap_or(Ppm::ALL))
}
