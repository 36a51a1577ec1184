//! The calendar: in which second, minute, hour, day or month a moment lies, and when that begins.
//!
//! Days are counted as in the proleptic Gregorian calendar. The count of days to the first of a month is the
//! `days_from_civil` of Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": a year that begins in March has
//! its leap day at its end, so that the days before a month are a linear function of its number, rounded down.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::internal::time::{Moment, nanos};

const SECOND: i128 = 1_000_000_000;
const DAY: i128 = 86_400 * SECOND;
/// From 1 March of year 0 to 1 January 1970.
const DAYS_TO_1970: i64 = 719_468;
const DAYS_IN_400_YEARS: i64 = 146_097;
/// Further from 1970 than the scale reaches.
const LAST_MONTH: i64 = 1 << 32;

/// A stretch of the calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Second,
    Minute,
    Hour,
    Day,
    Month,
}

impl Unit {
    /// `None` for a month.
    const fn length(self) -> Option<i128> {
        match self {
            Self::Second => Some(SECOND),
            Self::Minute => Some(60 * SECOND),
            Self::Hour => Some(3600 * SECOND),
            Self::Day => Some(DAY),
            Self::Month => None,
        }
    }

    /// The length of the shortest.
    pub(super) const fn shortest(self) -> Duration {
        match self.length() {
            Some(length) => Duration::from_secs((length / SECOND) as u64),
            None => Duration::from_secs(28 * 86_400),
        }
    }
}

/// The local time that belongs to a moment: read once, and counted on by tokio's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Calendar {
    unit: Unit,
    /// The local time at moment zero of the scale, in nanoseconds from 1970.
    zero: i128,
}

impl Calendar {
    /// The calendar of a place so far east of Greenwich, where the wall clock in UTC shows `wall` at the moment `now`.
    pub(super) fn new(unit: Unit, wall: SystemTime, now: Moment, east: i128) -> Self {
        let wall = match wall.duration_since(UNIX_EPOCH) {
            Ok(after) => i128::from(nanos(after)),
            Err(before) => -i128::from(nanos(before.duration())),
        };
        Self { unit, zero: wall + east - i128::from(now.nanos()) }
    }

    pub(super) fn unit(&self) -> Unit {
        self.unit
    }

    /// The number of the unit in which a moment lies, counted from 1970.
    pub(super) fn index(&self, now: Moment) -> i64 {
        let local = self.zero + i128::from(now.nanos());
        let index = match self.unit.length() {
            Some(length) => local.div_euclid(length),
            None => i128::from(month_of(local.div_euclid(DAY) as i64)),
        };
        index as i64
    }

    /// When a unit begins; the scale's ends for what lies beyond them.
    pub(super) fn start(&self, index: i64) -> Moment {
        let local = match self.unit.length() {
            Some(length) => i128::from(index) * length,
            None => i128::from(first_day(index.clamp(-LAST_MONTH, LAST_MONTH))) * DAY,
        };
        Moment::from_nanos((local - self.zero).clamp(0, i128::from(u64::MAX)) as u64)
    }
}

/// The first day of a month, in days from 1970. Months are counted from January 1970.
fn first_day(month: i64) -> i64 {
    // Months since March 1970, of which none is split by the leap day.
    let (year, month) = ((month - 2).div_euclid(12) + 1970, (month - 2).rem_euclid(12));
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    365 * year + leap_days + (153 * month + 2) / 5 - DAYS_TO_1970
}

/// The month in which a day lies.
fn month_of(day: i64) -> i64 {
    // A month is 30.4 days: the guess is off by one at most.
    let guess = (i128::from(day) * 4800).div_euclid(i128::from(DAYS_IN_400_YEARS)) as i64;
    (guess - 1..=guess + 1).rev().find(|month| first_day(*month) <= day).unwrap_or(guess)
}

/// So far east, as the calendar takes it.
pub(super) fn east(of_utc: Duration) -> i128 {
    i128::from(nanos(of_utc))
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn is_leap(year: i64) -> bool {
        year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
    }

    fn days_in(year: i64, month: i64) -> i64 {
        match month {
            2 => 28 + i64::from(is_leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        }
    }

    /// Day by day, for eight hundred years either side.
    #[test]
    fn every_day_lies_in_its_month() {
        let mut day = 0;
        for month in 0..9600 {
            assert_eq!(first_day(month), day, "month {month}");
            for _ in 0..days_in(1970 + month / 12, month % 12 + 1) {
                assert_eq!(month_of(day), month, "day {day}");
                day += 1;
            }
        }
        let mut day = 0;
        for month in (-9600..0).rev() {
            let (year, name) = (1970 + i64::div_euclid(month, 12), i64::rem_euclid(month, 12) + 1);
            for _ in 0..days_in(year, name) {
                day -= 1;
                assert_eq!(month_of(day), month, "day {day}");
            }
            assert_eq!(first_day(month), day, "month {month}");
        }
    }

    #[test]
    fn months_begin_where_the_calendar_says() {
        for (year, month, seconds) in [(2000, 3, 951_868_800), (2024, 2, 1_706_745_600), (2038, 1, 2_145_916_800_i64)] {
            assert_eq!(first_day((year - 1970) * 12 + month - 1) * 86_400, seconds);
        }
    }

    #[test]
    fn a_unit_begins_at_its_start_and_not_before() {
        let wall = UNIX_EPOCH + Duration::from_secs(1_706_745_600 - 1);
        let now = Moment::at(0);
        for unit in [Unit::Second, Unit::Minute, Unit::Hour, Unit::Day, Unit::Month] {
            let calendar = Calendar::new(unit, wall, now, 0);
            let next = calendar.start(calendar.index(now) + 1);
            assert_eq!(next, Moment::at(1_000_000_000), "{unit:?}");
            assert_eq!(calendar.index(next), calendar.index(now) + 1);
            assert_eq!(calendar.index(Moment::at(999_999_999)), calendar.index(now));
            let ends = [Moment::from_nanos(0), Moment::NEVER].map(|end| calendar.start(calendar.index(end)) <= end);
            assert_eq!(ends, [true, true]);
        }
    }

    #[test]
    fn what_begins_beyond_the_scale_begins_at_its_end() {
        for unit in [Unit::Second, Unit::Minute, Unit::Hour, Unit::Day, Unit::Month] {
            let calendar = Calendar::new(unit, UNIX_EPOCH, Moment::at(0), 0);
            assert_eq!([i64::MIN, i64::MAX].map(|index| calendar.start(index)), [Moment::from_nanos(0), Moment::NEVER]);
        }
    }

    proptest! {
        /// From a wall clock in 1786 to one in 2553, at any moment of the scale.
        #[test]
        fn every_moment_lies_in_its_unit(
            seconds in -5_800_000_000_i64..18_400_000_000, now in any::<u64>(), then in any::<u64>(), hours in -18_i128..=18,
        ) {
            let since = Duration::from_secs(seconds.unsigned_abs());
            let wall = if seconds < 0 { UNIX_EPOCH - since } else { UNIX_EPOCH + since };
            let (now, then) = (Moment::from_nanos(now), Moment::from_nanos(then));
            for unit in [Unit::Second, Unit::Minute, Unit::Hour, Unit::Day, Unit::Month] {
                let calendar = Calendar::new(unit, wall, now, hours * 3600 * SECOND);
                let index = calendar.index(then);
                let (start, end) = (calendar.start(index), calendar.start(index + 1));
                prop_assert!(start <= then && (then < end || end == Moment::NEVER));
                prop_assert_eq!(calendar.index(start), index);
                if unit != Unit::Month && start.nanos() > 0 && end != Moment::NEVER {
                    prop_assert_eq!(end.since(start), unit.shortest());
                }
                if unit == Unit::Day {
                    // Midnight there, as the wall clock counts.
                    let local = i128::from(seconds) * SECOND + i128::from(start.nanos()) - i128::from(now.nanos());
                    prop_assert!(start.nanos() == 0 || (local + hours * 3600 * SECOND).rem_euclid(DAY) == 0);
                }
            }
        }
    }
}
