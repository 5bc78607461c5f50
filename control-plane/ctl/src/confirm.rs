//! A jump that could hurt asks first.

use crate::{console::Console, error::CtlError};
use penstock_plan::Ppm;

/// More than this many times the share at once is a jump.
const MAX_FACTOR: u32 = 5;
/// From nothing, more than this is a jump: 10 %.
const MAX_FIRST_PPM: u32 = 100_000;

/// True when raising the share from `current` to `desired`, both in parts per million, is a jump.
pub(crate) fn is_jump(current: u32, desired: u32) -> bool {
    match current {
        0 => desired > MAX_FIRST_PPM,
        current => desired > current.saturating_mul(MAX_FACTOR),
    }
}

/// Lets a step pass; asks before a jump, or wants `-y` where there is nobody to ask.
pub(crate) fn confirm(
    console: &mut Console,
    model: &str,
    canary: &str,
    (current, desired): (Ppm, Ppm),
    yes: bool,
) -> Result<(), CtlError> {
    if yes || !is_jump(current.get(), desired.get()) {
        return Ok(());
    }
    let jump = match desired.get().checked_div(current.get()) {
        Some(factor) => format!("from {current} to {desired} of {model}, {factor} times as much"),
        None => format!("from {current} to {desired} of {model}"),
    };
    affirmed(console, &format!("Raise {canary} {jump}?"), || {
        format!("raising {canary} {jump}, is a large jump: say -y to do it, or take smaller steps")
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
}
