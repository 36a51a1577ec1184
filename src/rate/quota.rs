//! Quotas: so many per second, minute, hour, day or month of the calendar, or per stretch of time from the first use.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::calendar::{Calendar, Unit, east};
use super::ledger::{Planned, UnderLock};
use super::periods::{Run, Window, Windows};
use super::shell::{Shell, Waits, check_queue, limiter};
use super::sliding::DEFAULT_WINDOW_QUEUE;
use super::units::LONGEST_PERIOD;
use crate::error::{ConfigError, Faults, Name};
use crate::internal::time::{Moment, nanos};

/// No clock on earth is further off.
const LONGEST_OFFSET: Duration = Duration::from_secs(18 * 3600);
/// What can be carried over, and told in a field.
const MOST_CARRIED: u64 = 1_000_000_000_000_000;

/// So many in each second, minute, hour, day or month of the calendar, or in each stretch of time that a first use
/// begins.
///
/// Choose it where the limit is a contract: a plan of 10,000 calls a month, a peer that says it counts by the minute.
/// It is what most peers do, so that a client with a quota like the peer's is never refused there, if their clocks
/// agree. To protect something that can be overloaded, a [`TokenBucket`](crate::TokenBucket) or a
/// [`SlidingWindow`](crate::SlidingWindow) does better: **at a boundary twice the limit can pass in no time**, the old
/// window's just before it and the new one's just after, and whoever waits for the boundary comes at once with all
/// others who do.
///
/// A window of the calendar begins with its second, minute, hour, day or month in UTC, or so far
/// [east](QuotaBuilder::east_of_utc) or [west](QuotaBuilder::west_of_utc) of it; changes to summer time and back are
/// not followed. The wall clock is read once, when the quota is built, and counted on by tokio's clock: a step of the
/// wall clock is not followed either. A window from first use begins when something is taken and none runs.
///
/// A call may cost up to the limit, and with [carry-over](QuotaBuilder::carry_over) that much more. What a cost that is
/// settled afterwards takes above what is left is owed, and comes off the following windows until it is paid; from first
/// use, too, one follows the other until then. What a settled cost took too much, or a call that never started, comes
/// back if its window still runs; and what is [refunded](Self::refund) goes back into the window that runs, so refund what
/// was taken in it and no more.
///
/// | setting | default | why |
/// | --- | --- | --- |
/// | [`carry_over`](QuotaBuilder::carry_over) | 0 | what a peer has not promised it does not give |
/// | [`east_of_utc`](QuotaBuilder::east_of_utc) | 0 | peers count in UTC |
/// | [`max_queue`](QuotaBuilder::max_queue) | 1,024 | a bound of memory, and of the work of telling a newcomer its time |
/// | [`max_wait`](QuotaBuilder::max_wait) | none | a deadline of the policy does it better |
///
/// Waiting, deadlines and refunds are as at a [`TokenBucket`](crate::TokenBucket). A newcomer that finds others waiting
/// is told its time by playing the queue forward, which takes some nanoseconds for each of them.
///
/// # Cost
///
/// A mutex, and a division when a window has ended.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use resile::Quota;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let leap_day = SystemTime::UNIX_EPOCH + Duration::from_secs(1_709_164_800);    // 29 February 2024, 00:00 UTC
/// let plan = Quota::per_month(10_000).wall_clock(leap_day).build()?;
/// plan.try_take(10_000)?;
///
/// let refusal = plan.try_take(1).unwrap_err();
/// assert_eq!(refusal.retry_after(), Some(Duration::from_secs(86_400)), "March is a day away");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Quota(pub(super) Arc<Shell<UnderLock<Windows>>>);

/// Settings of a [`Quota`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct QuotaBuilder {
    limit: u64,
    window: Window,
    carry_over: u64,
    /// In nanoseconds.
    east: i128,
    wall: Option<SystemTime>,
    waits: Waits,
}

limiter!(Quota, QuotaBuilder, u64);

impl QuotaBuilder {
    /// How many of those that a window leaves over are added to the next one, at most: none by default. They add up
    /// over idle windows, never to more than this. A burst at a boundary can be so much larger. Only for windows of the
    /// calendar: from first use nothing is left of a window that nobody began.
    ///
    /// ```
    /// # use resile::Quota;
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let quota = Quota::per_day(100).carry_over(50).build()?;
    /// quota.try_take(30)?;
    /// tokio::time::advance(Duration::from_secs(86_400)).await;
    /// assert_eq!(quota.peek(), 150, "of the 70 that were left, 50 are carried over");
    /// # Ok(()) }
    /// ```
    pub const fn carry_over(mut self, most: u64) -> Self {
        self.carry_over = most;
        self
    }

    /// How far ahead of UTC the clock is by whose calendar the windows begin, up to 18 hours: not at all by default.
    /// Only for windows of the calendar.
    pub fn east_of_utc(mut self, offset: Duration) -> Self {
        self.east = east(offset);
        self
    }

    /// How far behind UTC the clock is by whose calendar the windows begin, up to 18 hours.
    /// Only for windows of the calendar.
    pub fn west_of_utc(mut self, offset: Duration) -> Self {
        self.east = -east(offset);
        self
    }

    /// Takes this for what the wall clock shows when the quota is built, instead of reading it: for tests, and for
    /// clocks that are known to be off. Only for windows of the calendar.
    pub const fn wall_clock(mut self, shows: SystemTime) -> Self {
        self.wall = Some(shows);
        self
    }

    /// The quota, with nothing used of the running window.
    ///
    /// # Errors
    ///
    /// A limit of 0 or above 10^9 per second; a window of 0 or above 366 days; a carry-over above 10^15; an offset
    /// above 18 hours; a queue above 16,777,216. From first use any carry-over, offset or wall clock.
    pub fn build(self) -> Result<Quota, ConfigError> {
        let mut faults = Faults::of("quota");
        check(&mut faults, self.limit, self.window);
        // From first use there is nothing to carry over, and no calendar.
        let of_calendar = matches!(self.window, Window::Calendar(_));
        let most = if of_calendar { MOST_CARRIED } else { 0 };
        faults.check(self.carry_over <= most, "carry_over", &self.carry_over, "0 to 10^15, 0 from first use");
        let offset = Duration::from_nanos(u64::try_from(self.east.unsigned_abs()).unwrap_or(u64::MAX));
        let longest = if of_calendar { LONGEST_OFFSET } else { Duration::ZERO };
        faults.check(offset <= longest, "offset", &offset, "0 to 18 hours, 0 from first use");
        let needless = self.wall.is_some() && !of_calendar;
        faults.check(!needless, "wall_clock", &format_args!("given"), "none from first use");
        check_queue(&mut faults, self.waits.max_queue);
        faults.into_result()?;
        let now = Moment::now();
        let run = match self.window {
            Window::Calendar(unit) => {
                let calendar = Calendar::new(unit, self.wall.unwrap_or_else(SystemTime::now), now, self.east);
                Run::on(calendar, calendar.index(now))
            }
            Window::FromFirstUse(length) => Run::FromFirstUse { length: nanos(length), begun: None },
        };
        let windows = Windows::new(self.limit, self.carry_over, run);
        Ok(Quota(Arc::new(Shell::new(UnderLock::METER, Planned::new(windows), self.waits))))
    }
}

/// Checks a limit in a window.
fn check(faults: &mut Faults, limit: u64, window: Window) {
    let shortest = match window {
        Window::Calendar(unit) => unit.shortest(),
        Window::FromFirstUse(length) => length,
    };
    let fine = shortest > Duration::ZERO && shortest <= LONGEST_PERIOD;
    faults.check(fine, "window", &shortest, "above 0 up to 366 days");
    // No more than one in each nanosecond.
    faults.check(!fine || (1..=nanos(shortest)).contains(&limit), "limit", &limit, "1 to 10^9 per second");
}

impl Quota {
    /// Begins a quota for each second.
    pub const fn per_second(limit: u64) -> QuotaBuilder {
        Self::begin(limit, Window::Calendar(Unit::Second))
    }

    /// Begins a quota for each minute.
    pub const fn per_minute(limit: u64) -> QuotaBuilder {
        Self::begin(limit, Window::Calendar(Unit::Minute))
    }

    /// Begins a quota for each hour.
    pub const fn per_hour(limit: u64) -> QuotaBuilder {
        Self::begin(limit, Window::Calendar(Unit::Hour))
    }

    /// Begins a quota for each day, from midnight to midnight.
    pub const fn per_day(limit: u64) -> QuotaBuilder {
        Self::begin(limit, Window::Calendar(Unit::Day))
    }

    /// Begins a quota for each month of the calendar.
    pub const fn per_month(limit: u64) -> QuotaBuilder {
        Self::begin(limit, Window::Calendar(Unit::Month))
    }

    /// Begins a quota for a stretch of time that begins with the first use after the one before has ended.
    pub const fn from_first_use(limit: u64, window: Duration) -> QuotaBuilder {
        Self::begin(limit, Window::FromFirstUse(window))
    }

    const fn begin(limit: u64, window: Window) -> QuotaBuilder {
        let waits = Waits { max_queue: DEFAULT_WINDOW_QUEUE, max_wait: None, name: Name::Static("quota") };
        QuotaBuilder { limit, window, carry_over: 0, east: 0, wall: None, waits }
    }

    /// How many are allowed in a window.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.read(|_, locked| locked.ledger.limit)
    }

    /// Changes the limit while in use, also that of the running window: what was used of it stays used, and what is more
    /// than a lower limit allows is not owed.
    ///
    /// # Errors
    ///
    /// A limit of 0 or above 10^9 per second. Nothing has changed then.
    ///
    /// ```
    /// # use resile::Quota;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let plan = Quota::per_month(100).build()?;
    /// plan.try_take(80)?;
    /// plan.set_limit(1000)?;
    /// assert_eq!((plan.limit(), plan.peek()), (1000, 920));
    /// # Ok(()) }
    /// ```
    pub fn set_limit(&self, limit: u64) -> Result<(), ConfigError> {
        let now = Moment::now();
        let mut faults = Faults::of("quota");
        self.0.read(|_, locked| check(&mut faults, limit, locked.ledger.run.window()));
        faults.into_result()?;
        self.0.change(|_, locked| locked.ledger.set_limit(now, limit));
        Ok(())
    }
}

impl fmt::Debug for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let windows = self.0.read(|_, locked| locked.ledger);
        f.debug_struct("Quota")
            .field("name", self.0.name())
            .field("limit", &windows.limit)
            .field("window", &format_args!("{}", windows.run.window()))
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let windows = self.0.read(|_, locked| locked.ledger);
        write!(f, "{} {} per {}", self.0.name().as_str(), windows.limit, windows.run.window())
    }
}
