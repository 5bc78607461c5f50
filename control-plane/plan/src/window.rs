//! Calendar windows.

use jiff::{Timestamp, civil::Time, tz::TimeZone};

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

/// The first moment at or after `now_ms` when a window is open, to the minute; `None` within the next eight days.
pub fn opens(windows: &[Window], now_ms: u64) -> Option<u64> {
    const MINUTE_MS: u64 = 60_000;
    if is_open(windows, now_ms) {
        return Some(now_ms);
    }
    let start = now_ms / MINUTE_MS + 1;
    (start..start + 8 * 24 * 60)
        .map(|minute| minute * MINUTE_MS)
        .find(|at| is_open(windows, *at))
}

/// Whether one window holds the moment.
///
/// # Errors
/// A time of day or a time zone that cannot be read.
pub fn contains(window: &Window, now_ms: u64) -> Result<bool, WindowError> {
    let time = |text: &String| text.parse::<Time>().map_err(|_| WindowError::Time(text.clone()));
    let (from, to) = (time(&window.from)?, time(&window.to)?);
    let zone = TimeZone::get(&window.zone).map_err(|_| WindowError::Zone(window.zone.clone()))?;
    let Ok(now) = Timestamp::from_millisecond(i64::try_from(now_ms).unwrap_or(i64::MAX)) else {
        return Ok(false);
    };
    let local = now.to_zoned(zone).datetime();
    let allowed =
        |day: jiff::civil::Weekday| window.days.is_empty() || window.days.iter().any(|d| weekday(*d) == day);
    let (today, clock) = (local.weekday(), local.time());
    Ok(match from < to {
        true => allowed(today) && from <= clock && clock < to,
        // Over midnight: the hours after it belong to the day before.
        false => (allowed(today) && from <= clock) || (allowed(today.previous()) && clock < to),
    })
}

const fn weekday(day: Day) -> jiff::civil::Weekday {
    use jiff::civil::Weekday;
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
}
