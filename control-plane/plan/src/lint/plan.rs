//! The plan's head: names, shares beside the ladder, windows.

use super::Report;
use crate::{Manifest, Ppm, Span, window};

pub(super) fn check(plan: &Manifest, report: &mut Report<'_>) {
    names(plan, report);
    if plan.sticky.key.is_empty() {
        report.error(
            "sticky.key",
            "no-sticky-key",
            "without a key no user stays on one side: name one, for example metadata:x-user-id",
        );
    }
    if plan.hold_out.0 == Ppm::ALL {
        report.error(
            "hold_out",
            "hold-out-of-all",
            "100% are held out, so nobody gets the canary: hold out less",
        );
    }
    if let Some(mirror) = plan.mirror
        && (mirror.share.0 == Ppm::ZERO || mirror.max_output_tokens == 0)
    {
        report.warning(
            "mirror",
            "empty-mirror",
            "this mirrors nothing: give it a share and tokens above 0, or leave it out",
        );
    }
    if !(plan.max_jump.is_finite() && plan.max_jump > 1.0) {
        report.error(
            "max_jump",
            "bad-jump",
            format!(
                "{} is no factor between steps: write a number above 1",
                plan.max_jump
            ),
        );
    }
    windows(plan, report);
}

fn names(plan: &Manifest, report: &mut Report<'_>) {
    if plan.model.trim().is_empty() {
        report.error(
            "model",
            "empty-model",
            "\"\" is no model: name the model to roll out",
        );
    }
    if plan.canary.revision.trim().is_empty() {
        report.error(
            "canary.revision",
            "empty-revision",
            "\"\" is no revision: name the one to try",
        );
    }
    if plan.stable.as_ref() == Some(&plan.canary.revision) {
        report.error(
            "canary.revision",
            "same-revision",
            format!(
                "stable and canary are both {:?}: a rollout needs two revisions",
                plan.canary.revision
            ),
        );
    }
}

fn windows(plan: &Manifest, report: &mut Report<'_>) {
    for (index, one) in plan.windows.iter().enumerate() {
        if let Err(error) = window::contains(one, 0) {
            report.error(
                format!("windows[{index}]"),
                "window-unreadable",
                error.to_string(),
            );
            return;
        }
    }
    let (Some(limit), Some(closed)) = (plan.pause_limit(), longest_closed(plan)) else {
        return;
    };
    if limit <= closed && !plan.steps.is_empty() {
        report.error(
            "pause_limit",
            "pause-limit-within-window",
            format!("the windows are closed for up to {closed}: a pause that aborts after {limit} would end the rollout; make it longer"),
        );
    }
}

/// How long the windows are closed at a stretch, in a week that stands for all.
fn longest_closed(plan: &Manifest) -> Option<Span> {
    const QUARTER_S: u64 = 15 * 60;
    if plan.windows.is_empty() {
        return None;
    }
    let (mut longest, mut now) = (0_u64, 0_u64);
    // Two weeks, so that a stretch over the end of the first is seen whole.
    for quarter in 0..2 * 7 * 24 * 4 {
        now = match window::is_open(&plan.windows, quarter * QUARTER_S * 1000) {
            true => 0,
            false => now + QUARTER_S,
        };
        longest = longest.max(now);
    }
    Some(Span::from_secs(longest))
}
