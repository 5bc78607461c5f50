//! Ids of replies, from which feedback finds its revision: they hold all it takes, so that no gateway has to remember
//! any.

use penstock_plan::{Revision, Route};
use xxhash_rust::xxh3::xxh3_64;

use crate::routing::Assigned;

/// What ids begin with where no API has its own word.
pub(crate) const PREFIX: &str = "rep-";
/// Hexadecimal digits: random, mark, scope, attempt, step, checksum.
const DIGITS: [usize; 6] = [16, 8, 4, 4, 4, 6];
/// Digits before the checksum.
const CHECKED: usize = 36;
/// Digits in all.
const ALL: usize = 42;

/// The id of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ReplyId {
    random: u64,
    /// First digits of the revision's digest.
    mark: u32,
    /// Hash of model and rollout.
    scope: u16,
    attempt: u16,
    step: u16,
}

/// A text that is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the id of a reply: give its x-reply-id, or the id of an OpenAI reply, unchanged")]
pub(crate) struct ReplyIdError(String);

impl ReplyId {
    /// An id for a reply of this assignment.
    pub(crate) fn draw(assigned: &Assigned) -> Self {
        let route = assigned.route();
        let trial = route.and_then(|route| route.trial.as_ref());
        Self {
            random: rand::random(),
            mark: mark(&assigned.revision),
            scope: route.map_or(0, scope),
            attempt: trial.map_or(0, |trial| saturate(trial.attempt)),
            step: trial.map_or(0, |trial| saturate(trial.step)),
        }
    }

    /// With what it begins.
    pub(crate) fn text(self, prefix: &str) -> String {
        let Self {
            random,
            mark,
            scope,
            attempt,
            step,
        } = self;
        let checked = format!("{random:016x}{mark:08x}{scope:04x}{attempt:04x}{step:04x}");
        format!("{prefix}{checked}{:06x}", checksum(&checked))
    }

    /// Reads an id, whatever it begins with.
    pub(crate) fn parse(text: &str) -> Result<Self, ReplyIdError> {
        let digits = text.rsplit('-').next().unwrap_or_default();
        read(digits).ok_or_else(|| ReplyIdError(text.chars().take(2 * ALL).collect()))
    }

    /// Whether the revision is the one that replied, as far as an id can tell.
    pub(crate) fn is_by(&self, revision: &Revision) -> bool {
        self.mark == mark(revision)
    }

    /// Attempt and step of the trial in which it was given, if that was of the rollout that `route` is in.
    pub(crate) fn trial(&self, route: &Route) -> Option<(u32, u32)> {
        (self.scope == scope(route)).then_some((self.attempt.into(), self.step.into()))
    }
}

fn read(digits: &str) -> Option<ReplyId> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if digits.len() != ALL || !digits.bytes().all(lower) {
        return None;
    }
    let mut rest = digits;
    let mut next = |digits: usize| {
        let (number, tail) = rest.split_at(digits);
        rest = tail;
        u64::from_str_radix(number, 16).ok()
    };
    let [random, mark, scope, attempt, step, sum] = DIGITS.map(&mut next);
    if sum? != checksum(&digits[..CHECKED]) {
        return None;
    }
    Some(ReplyId {
        random: random?,
        mark: u32::try_from(mark?).ok()?,
        scope: u16::try_from(scope?).ok()?,
        attempt: u16::try_from(attempt?).ok()?,
        step: u16::try_from(step?).ok()?,
    })
}

/// Against misspelling, not against malice: feedback is as trustworthy as whoever may send it.
fn checksum(checked: &str) -> u64 {
    xxh3_64(checked.as_bytes()) & 0xff_ffff
}

/// The first eight digits of a digest; of one that is not in hex, a hash.
fn mark(revision: &Revision) -> u32 {
    let digits = revision.digest.get(..8);
    let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    number.unwrap_or_else(|| xxh3_64(revision.digest.as_bytes()) as u32)
}

fn scope(route: &Route) -> u16 {
    xxh3_64(format!("{}\0{}", route.model, route.rollout_uid).as_bytes()) as u16
}

fn saturate(number: u32) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ReplyId = ReplyId {
        random: 7,
        mark: 0xdead_beef,
        scope: 3,
        attempt: 2,
        step: 5,
    };

    #[test]
    fn an_id_is_read_back_whatever_it_begins_with() {
        for prefix in ["", PREFIX, "chatcmpl-", "cmpl-"] {
            assert_eq!(ReplyId::parse(&ID.text(prefix)), Ok(ID));
        }
    }

    #[test]
    fn one_wrong_digit_is_noticed() {
        let text = ID.text(PREFIX);
        for at in PREFIX.len()..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[at] = if wrong[at] == b'0' { b'1' } else { b'0' };
            let wrong = String::from_utf8(wrong).unwrap();
            assert!(ReplyId::parse(&wrong).is_err(), "{wrong}");
        }
        for wrong in ["", "rep-", "chatcmpl-0123", &text[1..30], &text.to_uppercase()] {
            assert!(ReplyId::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_mark_tells_revisions_apart_by_their_digests() {
        let digest = |digest: &str| Revision::new("v", digest);
        assert_eq!(mark(&digest("deadbeef00")), 0xdead_beef);
        assert_ne!(mark(&digest("digest-v1")), mark(&digest("digest-v2")));
        assert_ne!(mark(&digest("aa")), mark(&digest("bb")));
        assert!(ID.is_by(&digest("deadbeef99")) && !ID.is_by(&digest("deadbeee99")));
    }
}
