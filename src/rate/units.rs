//! [`Rate`]: how many in how long.

use std::fmt;
use std::time::Duration;

use crate::error::{ConfigError, Faults};
use crate::internal::time::nanos;

/// The longest period: a leap year.
pub(super) const LONGEST_PERIOD: Duration = Duration::from_secs(366 * 86_400);
pub(super) const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// How finely a rate that was given as a float is kept.
const FLOAT_PERIOD: u64 = 10_000_000;

/// So many per so long, as an exact fraction.
///
/// ```
/// use std::time::Duration;
/// use resile::{Rate, TokenBucket};
///
/// let slow = Rate::new(3, Duration::from_secs(7));
/// assert_eq!(slow.to_string(), "3 per 7s");
///
/// let bucket = TokenBucket::at(slow).burst(1).build()?;
/// assert_eq!(Rate::per_minute(60), Rate::new(60, Duration::from_secs(60)));
/// # let _ = bucket;
/// # Ok::<(), resile::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub(super) count: u64,
    pub(super) period: u64,
}

impl Rate {
    /// `count` in each `period`. What a rate allows is checked where it is built into something.
    #[must_use]
    pub const fn new(count: u64, period: Duration) -> Self {
        Self { count, period: nanos(period) }
    }

    /// `count` in each second.
    #[must_use]
    pub const fn per_second(count: u64) -> Self {
        Self::new(count, Duration::from_secs(1))
    }

    /// `count` in each minute.
    #[must_use]
    pub const fn per_minute(count: u64) -> Self {
        Self::new(count, Duration::from_secs(60))
    }

    /// `count` in each hour.
    #[must_use]
    pub const fn per_hour(count: u64) -> Self {
        Self::new(count, Duration::from_secs(3600))
    }

    /// `count` in each 24 hours.
    #[must_use]
    pub const fn per_day(count: u64) -> Self {
        Self::new(count, Duration::from_secs(86_400))
    }

    /// A rate from a setting that is a float. A number of at most seven decimals is kept exactly, any other to the
    /// nearest ten-millionth.
    ///
    /// # Errors
    ///
    /// What is not a number from 10<sup>-7</sup> to 10<sup>9</sup>: NaN, infinities, zero and less.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::Rate;
    ///
    /// assert_eq!(Rate::per_second_f64(0.2)?, Rate::new(1, Duration::from_secs(5)));
    /// assert_eq!(Rate::per_second_f64(f64::NAN).unwrap_err().to_string(), "rate: per_second must be 1e-7 to 1e9, is NaN");
    /// # Ok::<(), resile::ConfigError>(())
    /// ```
    pub fn per_second_f64(per_second: f64) -> Result<Self, ConfigError> {
        let mut faults = Faults::of("rate");
        faults.check((1e-7..=1e9).contains(&per_second), "per_second", &per_second, "1e-7 to 1e9");
        faults.into_result()?;
        let count = (per_second * FLOAT_PERIOD as f64).round() as u64;
        let common = greatest_common_divisor(count, FLOAT_PERIOD);
        Ok(Self::new(count / common, Duration::from_secs(FLOAT_PERIOD / common)))
    }

    /// Notes a fault unless it is a rate that a limiter can keep; whether it is.
    pub(super) fn check(self, faults: &mut Faults) -> bool {
        let period = Duration::from_nanos(self.period);
        // No more than one in each nanosecond.
        let fine = self.count >= 1 && self.count <= self.period && period <= LONGEST_PERIOD;
        let allowed = "1 to 10^9 per second, over a period up to 366 days";
        faults.check(fine, "rate", &format_args!("{} per {period:?}", self.count), allowed);
        fine
    }
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.period == NANOS_PER_SECOND {
            write!(f, "{}/s", self.count)
        } else {
            write!(f, "{} per {:?}", self.count, Duration::from_nanos(self.period))
        }
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_kept_exactly() {
        for (float, count, seconds) in
            [(0.1, 1, 10), (1.0, 1, 1), (2.5, 5, 2), (0.000_000_1, 1, 10_000_000), (1e9, 1_000_000_000, 1)]
        {
            assert_eq!(Rate::per_second_f64(float), Ok(Rate::new(count, Duration::from_secs(seconds))), "{float}");
        }
        let third = Rate::per_second_f64(1.0 / 3.0).unwrap();
        assert_eq!(third, Rate::new(3_333_333, Duration::from_secs(10_000_000)));
    }

    #[test]
    fn floats_that_are_no_rates_are_told() {
        for float in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, -1.0, 1e-8, 1.1e9] {
            let error = Rate::per_second_f64(float).unwrap_err();
            assert_eq!((error.faults()[0].field(), error.faults()[0].value()), ("per_second", &*format!("{float:?}")));
        }
    }
}
