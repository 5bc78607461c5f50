//! A change that somebody else was faster than: what was seen, what is there now, what was asked for.

use crate::{console::Console, error::CtlError, output::columns, view};
use penstock_plan::{Manifest, Ppm};
use penstock_proto::v1::Rollout;
use similar::TextDiff;

/// What the operator saw, or had seen where only its revision is known.
pub(crate) struct Seen<'a> {
    revision: u64,
    rollout: Option<&'a Rollout>,
}

/// What the operator asked for.
pub(crate) struct Asked<'a> {
    /// The command's verb.
    pub(crate) what: &'static str,
    pub(crate) share: Option<Ppm>,
    pub(crate) manifest: Option<&'a str>,
}

impl<'a> Seen<'a> {
    /// Only the revision that `--expect-revision` named.
    pub(crate) fn unknown(revision: u64) -> Self {
        Self {
            revision,
            rollout: None,
        }
    }

    pub(crate) fn known(rollout: &'a Rollout) -> Self {
        Self {
            revision: rollout.store_revision,
            rollout: Some(rollout),
        }
    }
}

/// Tells the three sides on stderr; the error is one line.
pub(crate) fn moved_on(console: &mut Console, seen: &Seen<'_>, now: &Rollout, asked: &Asked<'_>) -> CtlError {
    console.progress(compared(seen, now, asked).trim_end());
    let who = if now.actor.is_empty() {
        String::new()
    } else {
        format!(", last changed by {}", now.actor)
    };
    CtlError::Conflict(format!(
        "the rollout of {} is at revision {} by now, not at {}: {} at {}{who}; look at it with `ctl rollout get`, \
         then try again",
        now.model,
        now.store_revision,
        seen.revision,
        view::phase(now.phase()),
        view::share(now.canary_ppm)
    ))
}

fn compared(seen: &Seen<'_>, now: &Rollout, asked: &Asked<'_>) -> String {
    let was = |value: fn(&Rollout) -> String| seen.rollout.map_or_else(|| "not known".to_owned(), value);
    let row = |name: &str, value: fn(&Rollout) -> String, asked: String| {
        [name.to_owned(), was(value), value(now), asked]
    };
    let share = asked.share.map_or_else(String::new, |share| share.to_string());
    let rows = [
        row("share", |r| view::share(r.canary_ppm), share),
        row("phase", |r| view::phase(r.phase()).to_owned(), String::new()),
        row("canary", |r| r.canary.clone(), String::new()),
        row("by", |r| r.actor.clone(), String::new()),
        row("reason", |r| r.reason.clone(), String::new()),
    ];
    let titles = [
        String::new(),
        format!("SEEN AT {}", seen.revision),
        format!("NOW AT {}", now.store_revision),
        format!("ASKED: {}", asked.what),
    ];
    let mut text = columns(titles.each_ref().map(String::as_str), &rows);
    if let Some(seen) = seen.rollout {
        text += &unified(
            ("manifest as seen", &seen.manifest),
            ("manifest now", &now.manifest),
        );
    }
    if let Some(manifest) = asked.manifest {
        text += &unified(("manifest now", &now.manifest), ("manifest asked for", manifest));
    }
    text
}

/// A unified diff of two manifests, each with its name; empty where they say the same.
pub(crate) fn unified(old: (&str, &str), new: (&str, &str)) -> String {
    let (before, after) = (canonical(old.1), canonical(new.1));
    if before == after {
        return String::new();
    }
    TextDiff::from_lines(&before, &after)
        .unified_diff()
        .header(old.0, new.0)
        .to_string()
}

/// A manifest with its fields in order and without its comments, so that a difference is one of meaning. What
/// cannot be read is compared as it stands.
fn canonical(text: &str) -> String {
    let manifest: Option<Manifest> = serde_norway::from_str(text).ok();
    manifest
        .and_then(|manifest| serde_norway::to_string(&manifest).ok())
        .unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rollout(revision: u64, ppm: u32, actor: &str) -> Rollout {
        Rollout {
            model: "demo".into(),
            canary: "v2".into(),
            canary_ppm: ppm,
            store_revision: revision,
            actor: actor.into(),
            ..Rollout::default()
        }
    }

    #[test]
    fn the_three_sides_stand_side_by_side() {
        let (before, now) = (rollout(7, 10_000, "ada"), rollout(9, 20_000, "bob"));
        let asked = Asked {
            what: "set",
            share: "5%".parse().ok(),
            manifest: None,
        };
        let text = compared(&Seen::known(&before), &now, &asked);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[1], ["share", "1%", "2%", "5%"]);
        assert_eq!(lines[4], ["by", "ada", "bob"]);
        let unknown = compared(&Seen::unknown(6), &now, &asked);
        assert!(unknown.contains("not known  2%"), "{unknown}");
    }

    #[test]
    fn manifests_that_mean_the_same_do_not_differ() {
        let one = "kind: Rollout\nmodel: demo\ncanary: {revision: v2}\n";
        let same = "# a comment\nmodel: demo\nkind: Rollout\ncanary:\n  revision: v2\n";
        let other = "kind: Rollout\nmodel: demo\ncanary: {revision: v3}\n";
        assert_eq!(unified(("a", one), ("b", same)), "");
        let diff = unified(("a", one), ("b", other));
        assert!(diff.starts_with("--- a\n+++ b\n"), "{diff}");
        assert!(
            diff.contains("-  revision: v2\n") && diff.contains("+  revision: v3\n"),
            "{diff}"
        );
    }
}
