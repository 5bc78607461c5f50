//! Checks a regular expression before an automaton is made of it.

use regex_syntax::hir::{Hir, HirKind, Look};

use crate::error::GrammarError;

/// Most characters that a pattern may stand for with its repetitions written out: an automaton has a state
/// for each.
const MOST_CHARACTERS: u64 = 100_000;

/// Checks `pattern`, found at `pointer` of a schema or standing alone.
///
/// # Errors
/// Syntax, look-around inside, the group name that llguidance gives a meaning, too many repetitions, and a
/// pattern that matches nothing.
pub(crate) fn check(pattern: &str, pointer: Option<&str>) -> Result<(), GrammarError> {
    let wrong = |message: String| GrammarError::Regex {
        pointer: pointer.map(str::to_owned),
        message,
    };
    let hir = regex_syntax::parse(pattern).map_err(|error| wrong(explain(&error)))?;
    if has_look_inside(&hir) {
        return Err(wrong(
            "^ and $ are supported at its ends only, \\b and \\B not at all".into(),
        ));
    }
    if has_stop_group(&hir) {
        return Err(wrong(
            "a group may not be named \"stop\": choose another name".into(),
        ));
    }
    let characters = weight(&hir);
    if characters > MOST_CHARACTERS {
        return Err(GrammarError::TooComplex {
            message: format!(
                "a regular expression{} stands for {characters} characters with its repetitions written out, \
                 {MOST_CHARACTERS} are allowed",
                pointer
                    .map(|pointer| format!(" at {pointer}"))
                    .unwrap_or_default()
            ),
        });
    }
    if hir.properties().minimum_len().is_none() {
        return Err(GrammarError::Empty {
            reason: format!("the regular expression {pattern:?} matches no text"),
        });
    }
    Ok(())
}

/// In one line, with the place; the crate's own message draws a picture.
fn explain(error: &regex_syntax::Error) -> String {
    match error {
        regex_syntax::Error::Parse(error) => {
            format!("{} (byte {})", error.kind(), error.span().start.offset)
        }
        regex_syntax::Error::Translate(error) => {
            format!("{} (byte {})", error.kind(), error.span().start.offset)
        }
        error => error.to_string(),
    }
}

/// Whether an assertion stands where it could fail: `^` and `$` at the ends of the whole are true there.
fn has_look_inside(hir: &Hir) -> bool {
    fn inside(hir: &Hir, at_start: bool, at_end: bool) -> bool {
        match hir.kind() {
            HirKind::Look(Look::Start) => !at_start,
            HirKind::Look(Look::End) => !at_end,
            HirKind::Look(_) => true,
            HirKind::Capture(capture) => inside(&capture.sub, at_start, at_end),
            HirKind::Alternation(subs) => subs.iter().any(|sub| inside(sub, at_start, at_end)),
            HirKind::Concat(subs) => {
                let is = |look| move |sub: &Hir| !matches!(sub.kind(), HirKind::Look(l) if *l == look);
                let first = subs.iter().position(is(Look::Start)).unwrap_or(subs.len());
                let last = subs.iter().rposition(is(Look::End)).unwrap_or(0);
                subs.iter()
                    .enumerate()
                    .any(|(index, sub)| inside(sub, at_start && index <= first, at_end && index >= last))
            }
            HirKind::Repetition(repetition) => inside(&repetition.sub, false, false),
            HirKind::Empty | HirKind::Literal(_) | HirKind::Class(_) => false,
        }
    }
    inside(hir, true, true)
}

/// derivre reads the group name `stop` as a look-ahead.
fn has_stop_group(hir: &Hir) -> bool {
    let named = matches!(hir.kind(), HirKind::Capture(capture) if capture.name.as_deref() == Some("stop"));
    named || hir.kind().subs().iter().any(has_stop_group)
}

/// Characters of the pattern with bounded repetitions written out.
fn weight(hir: &Hir) -> u64 {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => 0,
        HirKind::Literal(bytes) => bytes.0.len() as u64,
        HirKind::Class(_) => 1,
        HirKind::Repetition(repetition) => {
            let times = repetition.max.unwrap_or(repetition.min).max(1);
            weight(&repetition.sub).saturating_mul(u64::from(times))
        }
        HirKind::Capture(capture) => weight(&capture.sub),
        HirKind::Concat(subs) | HirKind::Alternation(subs) => {
            subs.iter().fold(0, |sum, sub| sum.saturating_add(weight(sub)))
        }
    }
}
