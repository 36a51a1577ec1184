//! Times as people read them: no more digits than matter.

use std::fmt;
use std::time::Duration;

/// A duration in words: three digits below a minute, whole seconds above, and *no limit* for what the clock cannot hold.
///
/// Rounded up, so that waiting as long as a message says suffices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Time(pub(crate) Duration);

/// As long as this is for ever: a century.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 86_400);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(time) = *self;
        if time >= FOR_EVER {
            return f.write_str("no limit");
        }
        if time > Duration::from_secs(60) || time == Duration::from_secs(60) {
            return long(time, f);
        }
        // Three digits, rounded up.
        let nanos = time.as_nanos();
        let digits = nanos.checked_ilog10().unwrap_or(0);
        let unit = 10_u128.pow(digits.saturating_sub(2));
        let rounded = nanos.div_ceil(unit) * unit;
        if rounded >= 60_000_000_000 {
            return f.write_str("1m");
        }
        write!(f, "{:?}", Duration::from_nanos(rounded as u64))
    }
}

fn long(time: Duration, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    let parts = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let mut first = true;
    for (count, unit) in parts.into_iter().filter(|(count, _)| *count > 0) {
        if !std::mem::take(&mut first) {
            f.write_str(" ")?;
        }
        write!(f, "{count}{unit}")?;
    }
    Ok(())
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    #[test]
    fn times_have_no_more_digits_than_matter() {
        for (time, text) in [
            (Duration::ZERO, "0ns"),
            (Duration::from_nanos(7), "7ns"),
            (Duration::from_nanos(193_999_001), "194ms"),
            (Duration::from_millis(1200), "1.2s"),
            (Duration::from_micros(1_234_567), "1.24s"),
            (Duration::from_millis(59_999), "1m"),
            (Duration::from_secs(60), "1m"),
            (Duration::from_millis(60_001), "1m 1s"),
            (Duration::from_secs(8 * 3600 + 13 * 60 + 30), "8h 13m 30s"),
            (Duration::from_secs(2 * 86_400), "2d"),
            (Duration::MAX, "no limit"),
        ] {
            assert_eq!(Time(time).to_string(), text);
        }
    }
}
