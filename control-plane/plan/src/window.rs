//! Calendar windows.

use jiff::{
    Timestamp, ToSpan as _, Zoned,
    civil::{Time, Weekday},
    tz::TimeZone,
};

use crate::{Day, Window};

/// Why a window cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// A time of day.
    #[error("{0:?} is not a time of day such as 09:00")]
    Time(String),
    /// A time zone.
    #[error("{0:?} is not a time zone such as Europe/Berlin or UTC")]
    Zone(String),
}

/// Whether a step may be taken now: within any of the windows, or always where there is none. A window that cannot be
/// read is never open; lint tells.
pub fn is_open(windows: &[Window], now_ms: u64) -> bool {
    windows.is_empty()
        || windows
            .iter()
            .any(|window| contains(window, now_ms).unwrap_or(false))
}

/// The first moment at or after `now_ms` when a window is open; `None` within the next week.
pub fn opens(windows: &[Window], now_ms: u64) -> Option<u64> {
    if is_open(windows, now_ms) {
        return Some(now_ms);
    }
    let next = |window| Hours::read(window).ok()?.next_opening(now_ms);
    windows.iter().filter_map(next).min()
}

/// Whether one window holds the moment.
///
/// # Errors
/// A time of day or a time zone that cannot be read.
pub fn contains(window: &Window, now_ms: u64) -> Result<bool, WindowError> {
    Ok(Hours::read(window)?.contain(now_ms))
}

/// A window that is read.
struct Hours<'a> {
    days: &'a [Day],
    from: Time,
    to: Time,
    zone: TimeZone,
}

// === impl Hours ===

impl<'a> Hours<'a> {
    fn read(window: &'a Window) -> Result<Self, WindowError> {
        let time = |text: &String| text.parse::<Time>().map_err(|_| WindowError::Time(text.clone()));
        Ok(Self {
            days: &window.days,
            from: time(&window.from)?,
            to: time(&window.to)?,
            zone: TimeZone::get(&window.zone).map_err(|_| WindowError::Zone(window.zone.clone()))?,
        })
    }

    fn contain(&self, now_ms: u64) -> bool {
        let Some(local) = self.local(now_ms).map(|now| now.datetime()) else {
            return false;
        };
        let (today, clock) = (local.weekday(), local.time());
        match self.from < self.to {
            true => self.allow(today) && self.from <= clock && clock < self.to,
            // Over midnight: the hours after it belong to the day before.
            false => {
                (self.allow(today) && self.from <= clock) || (self.allow(today.previous()) && clock < self.to)
            }
        }
    }

    /// When it opens next, where it is closed now.
    fn next_opening(&self, now_ms: u64) -> Option<u64> {
        let today = self.local(now_ms)?.date();
        let opening = |days: i64| {
            let date = today.checked_add(days.days()).ok()?;
            let opens = date.to_datetime(self.from).to_zoned(self.zone.clone()).ok()?;
            let at = u64::try_from(opens.timestamp().as_millisecond()).ok()?;
            // The hour in which it opens may not exist, when clocks are put forward.
            (at >= now_ms && self.contain(at)).then_some(at)
        };
        (0..=7).find_map(opening)
    }

    fn allow(&self, day: Weekday) -> bool {
        self.days.is_empty() || self.days.iter().any(|one| weekday(*one) == day)
    }

    fn local(&self, now_ms: u64) -> Option<Zoned> {
        let now = Timestamp::from_millisecond(i64::try_from(now_ms).ok()?).ok()?;
        Some(now.to_zoned(self.zone.clone()))
    }
}

const fn weekday(day: Day) -> Weekday {
    match day {
        Day::Mon => Weekday::Monday,
        Day::Tue => Weekday::Tuesday,
        Day::Wed => Weekday::Wednesday,
        Day::Thu => Weekday::Thursday,
        Day::Fri => Weekday::Friday,
        Day::Sat => Weekday::Saturday,
        Day::Sun => Weekday::Sunday,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-23 is a Monday.
    fn at(text: &str) -> u64 {
        text.parse::<Timestamp>()
            .unwrap()
            .as_millisecond()
            .cast_unsigned()
    }

    fn window(days: &[Day], from: &str, to: &str, zone: &str) -> Window {
        Window {
            days: days.to_vec(),
            from: from.into(),
            to: to.into(),
            zone: zone.into(),
        }
    }

    #[test]
    fn office_hours_follow_the_zone() {
        let office = [window(&[Day::Mon], "09:00", "17:00", "Europe/Berlin")];
        assert!(is_open(&office, at("2026-11-23T08:00:00Z")));
        assert!(!is_open(&office, at("2026-11-23T07:59:59Z")));
        assert!(!is_open(&office, at("2026-11-23T16:00:00Z")));
        assert!(!is_open(&office, at("2026-11-24T10:00:00Z")));
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_it_begins() {
        let night = [window(&[Day::Mon], "22:00", "06:00", "UTC")];
        assert!(is_open(&night, at("2026-11-23T23:00:00Z")));
        assert!(is_open(&night, at("2026-11-24T05:00:00Z")));
        assert!(!is_open(&night, at("2026-11-23T05:00:00Z")));
    }

    #[test]
    fn the_next_opening_is_told() {
        let office = [window(&[Day::Tue], "09:00", "17:00", "UTC")];
        assert_eq!(
            opens(&office, at("2026-11-23T12:00:30Z")),
            Some(at("2026-11-24T09:00:00Z"))
        );
        assert_eq!(opens(&[], 5), Some(5));
    }

    #[test]
    fn what_cannot_be_read_is_named_and_never_open() {
        for (from, zone, named) in [
            ("9 o'clock", "UTC", "9 o'clock"),
            ("09:00", "Mars/Base", "Mars/Base"),
        ] {
            let window = window(&[], from, "17:00", zone);
            let error = contains(&window, 0).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
            assert!(!is_open(&[window], 0));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Over a year with both changes of the clocks.
        #[test]
        fn a_window_opens_in_the_first_minute_in_which_it_holds(
            minute in 0..366 * 24 * 60_u64,
            from in 0..24_u8,
            to in 0..24_u8,
            day in prop_oneof![Just(Day::Mon), Just(Day::Fri), Just(Day::Sun)],
            zone in prop_oneof![Just("UTC"), Just("Europe/Berlin"), Just("America/New_York")],
        ) {
            const MINUTE_MS: u64 = 60_000;
            let start = at("2026-11-23T00:00:00Z") / MINUTE_MS + minute;
            let windows = [window(&[day], &format!("{from:02}:00"), &format!("{to:02}:00"), zone)];
            let naive = (start..start + 8 * 24 * 60)
                .map(|minute| minute * MINUTE_MS)
                .find(|at| is_open(&windows, *at));
            prop_assert_eq!(opens(&windows, start * MINUTE_MS), naive);
        }
    }
}
