//! A jump that could hurt asks first.

use crate::{console::Console, error::CtlError};
use penstock_plan::Ppm;

/// More than this many times the share at once is a jump.
const MAX_FACTOR: u32 = 5;
/// From nothing, more than this is a jump: 10 %.
const MAX_FIRST_PPM: u32 = 100_000;

/// True when raising the share from `current` to `desired`, both in parts per million, is a jump.
fn is_jump(current: u32, desired: u32) -> bool {
    match current {
        0 => desired > MAX_FIRST_PPM,
        current => desired > current.saturating_mul(MAX_FACTOR),
    }
}

/// True where raising the share asks first: a jump, or the whole traffic.
pub(crate) fn asks(current: u32, desired: u32) -> bool {
    is_jump(current, desired) || (desired == Ppm::ALL.get() && current < desired)
}

/// Lets a step pass; asks before a jump or the whole traffic, or wants `-y` where there is nobody to ask.
pub(crate) fn confirm(
    console: &mut Console,
    model: &str,
    canary: &str,
    (current, desired): (Ppm, Ppm),
    yes: bool,
) -> Result<(), CtlError> {
    if yes || !asks(current.get(), desired.get()) {
        return Ok(());
    }
    let jump = match desired.get().checked_div(current.get()) {
        Some(factor) => format!("from {current} to {desired} of {model}, {factor} times as much"),
        None => format!("from {current} to {desired} of {model}"),
    };
    affirmed(console, &format!("Raise {canary} {jump}?"), || {
        let size = if is_jump(current.get(), desired.get()) {
            "is a large jump"
        } else {
            "is all of the traffic"
        };
        format!("raising {canary} {jump}, {size}: say -y to do it, or take smaller steps")
    })
}

/// Asks, or refuses with `unasked` where there is nobody to ask.
pub(crate) fn affirmed(
    console: &mut Console,
    question: &str,
    unasked: impl FnOnce() -> String,
) -> Result<(), CtlError> {
    if !console.can_ask() {
        return Err(CtlError::Usage(unasked()));
    }
    match console.ask(question)? {
        true => Ok(()),
        false => Err(CtlError::Declined),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_is_more_than_fivefold_or_from_nothing_above_ten_percent() {
        for (current, desired, jump) in [
            (0, 0, false),
            (0, 100_000, false),
            (0, 100_001, true),
            (10_000, 50_000, false),
            (10_000, 50_001, true),
            (50_000, 1_000_000, true),
            (200_000, 1_000_000, false),
            (1_000_000, 0, false),
            (500_000, 10_000, false),
        ] {
            assert_eq!(is_jump(current, desired), jump, "{current} → {desired}");
        }
    }

    #[test]
    fn all_of_the_traffic_asks_even_where_it_is_no_jump() {
        assert!(asks(500_000, 1_000_000) && asks(10_000, 60_000));
        assert!(!asks(500_000, 999_999) && !asks(1_000_000, 1_000_000) && !asks(0, 100_000));
    }
}
