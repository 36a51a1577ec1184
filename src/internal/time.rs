//! The clock as an integer, and the one timer of a lane.

use std::fmt;
use std::future::Future;
use std::ops::Add;
use std::pin::Pin;
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project::pin_project;
use tokio::time::{Instant, Sleep};

/// How late a timer of tokio's may fire, in nanoseconds.
pub(crate) const TIMER_GRAIN: u64 = 2_000_000;

/// Where the anchor lies on the scale: the middle, so that readings before it are still positive.
const ORIGIN: u64 = 1 << 62;

/// The standard library's instant that stands for [`ORIGIN`].
///
/// It is taken from the standard clock, not from tokio's: a paused runtime's clock starts where the real one stood and
/// then goes its own way, so several paused runtimes in one process each find their own time on this one scale.
fn anchor() -> std::time::Instant {
    static ANCHOR: OnceLock<std::time::Instant> = OnceLock::new();
    *ANCHOR.get_or_init(std::time::Instant::now)
}

/// A point in time, in whole nanoseconds on one scale for the whole process.
///
/// Machines compute with moments instead of [`Instant`]s because integer arithmetic is cheap and saturates: adding a
/// duration that is too long gives [`Moment::NEVER`], and a difference that would be negative is zero. A moment
/// reaches 146 years before the process and 438 years after.
///
/// ```
/// use std::time::Duration;
/// use resile::Moment;
///
/// let start = Moment::from(std::time::Instant::now());
/// let end = start + Duration::from_millis(5);
/// assert_eq!(end.since(start), Duration::from_millis(5));
/// assert_eq!(start.since(end), Duration::ZERO);
/// assert_eq!(start + Duration::MAX, Moment::NEVER);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// Later than every other moment; as a deadline, none at all.
    pub const NEVER: Self = Self(u64::MAX);

    /// Reads `tokio::time`'s clock, which a test may have paused.
    ///
    /// Cost: one clock reading, about 25 ns; the crate itself takes one per call and hands it to every gate.
    #[must_use]
    pub fn now() -> Self {
        let instant = Instant::now().into_std();
        match instant.checked_duration_since(anchor()) {
            // No clock that ticks gets as far as the cast could cut.
            Some(after) => Self(ORIGIN.saturating_add(after.as_nanos() as u64)),
            None => Self::early(instant),
        }
    }

    /// Of an instant before the anchor; away from the path that almost all readings take.
    #[cold]
    fn early(instant: std::time::Instant) -> Self {
        instant.into()
    }

    /// The time from `earlier` to here, or zero if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The same moment as an instant, or `None` where the platform's clock cannot hold it.
    #[must_use]
    pub fn to_instant(self) -> Option<Instant> {
        let instant = if self.0 >= ORIGIN {
            anchor().checked_add(Duration::from_nanos(self.0 - ORIGIN))
        } else {
            anchor().checked_sub(Duration::from_nanos(ORIGIN - self.0))
        };
        instant.map(Instant::from_std)
    }

    /// Nanoseconds on the inner scale, for machines that keep a moment in an atomic.
    pub(crate) const fn nanos(self) -> u64 {
        self.0
    }

    pub(crate) const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// A moment `nanos` after the anchor, for machines under test.
    #[cfg(test)]
    pub(crate) const fn at(nanos: u64) -> Self {
        Self(ORIGIN.saturating_add(nanos))
    }

    pub(crate) const fn plus_nanos(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }

    pub(crate) const fn minus_nanos(self, nanos: u64) -> Self {
        Self(self.0.saturating_sub(nanos))
    }

    pub(crate) const fn nanos_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A duration in whole nanoseconds, saturating at 584 years.
pub(crate) const fn nanos(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(duration.subsec_nanos() as u64)
}

impl From<std::time::Instant> for Moment {
    fn from(instant: std::time::Instant) -> Self {
        let anchor = anchor();
        match instant.checked_duration_since(anchor) {
            Some(after) => Self(ORIGIN.saturating_add(nanos(after))),
            None => Self(ORIGIN.saturating_sub(nanos(anchor - instant))),
        }
    }
}

impl From<Instant> for Moment {
    fn from(instant: Instant) -> Self {
        instant.into_std().into()
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        self.plus_nanos(nanos(duration))
    }
}

impl fmt::Debug for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::NEVER {
            return f.write_str("never");
        }
        let (sign, distance) = if self.0 >= ORIGIN { ('+', self.0 - ORIGIN) } else { ('-', ORIGIN - self.0) };
        write!(f, "{sign}{:?}", Duration::from_nanos(distance))
    }
}

/// The one timer of a lane: made when something is first pending, moved afterwards.
///
/// tokio registers a sleep when it is first polled and moves it to a later instant without a lock, so a lane that waits
/// several times pays for one registration.
#[pin_project]
#[derive(Debug)]
pub(crate) struct Timer(#[pin] Option<Sleep>);

impl Timer {
    pub(crate) const fn idle() -> Self {
        Self(None)
    }

    /// Ready once `at` has come. Never early; late by up to tokio's tick of a millisecond.
    ///
    /// The sleep is polled outside of the cooperative budget: an operation that spends the whole budget in each poll
    /// would otherwise starve its own timeout.
    pub(crate) fn poll_until(self: Pin<&mut Self>, at: Moment, cx: &mut Context<'_>) -> Poll<()> {
        // Beyond what the clock can hold there is nothing to wait for.
        let Some(at) = (at < Moment::NEVER).then(|| at.to_instant()).flatten() else {
            return Poll::Pending;
        };
        let mut slot = self.project().0;
        match slot.as_mut().as_pin_mut() {
            None => slot.set(Some(tokio::time::sleep_until(at))),
            Some(sleep) if sleep.deadline() == at => {}
            Some(sleep) => sleep.reset(at),
        }
        match slot.as_pin_mut() {
            Some(sleep) => Pin::new(&mut tokio::task::unconstrained(sleep)).poll(cx),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_survives_the_trip_to_an_instant_and_back() {
        for offset in [0, 1, 1_000_000_007, 86_400_000_000_000] {
            let moment = Moment::at(offset);
            assert_eq!(moment.to_instant().map(Moment::from), Some(moment));
        }
    }

    #[test]
    fn an_instant_before_the_anchor_is_an_earlier_moment() {
        let after = std::time::Instant::now() + Duration::from_secs(1);
        anchor();
        if let Some(before) = anchor().checked_sub(Duration::from_secs(5)) {
            assert!(Moment::from(before) < Moment::at(0));
            assert_eq!(Moment::at(0).since(before.into()), Duration::from_secs(5));
        }
        assert!(Moment::from(after) > Moment::at(0));
    }

    #[test]
    fn absurd_durations_saturate() {
        assert_eq!(Moment::at(7) + Duration::MAX, Moment::NEVER);
        assert_eq!(Moment::at(0).since(Moment::NEVER), Duration::ZERO);
    }
}
