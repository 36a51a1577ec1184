//! The sliding window: so many in any stretch of time of one length.

use std::fmt;
use std::sync::Arc;

use super::ledger::{Planned, UnderLock};
use super::shell::{Shell, Waits, check_queue, limiter};
use super::units::Rate;
use super::window::Counting;
use crate::error::{ConfigError, Faults, Name};
use crate::internal::time::Moment;

/// How many may wait at a window by default: a newcomer is told its time by playing the queue forward.
pub(super) const DEFAULT_WINDOW_QUEUE: u32 = 1024;
/// Up to this limit every call can be remembered: a megabyte.
const LONGEST_LOG: u32 = 65_536;

/// So many calls in any stretch of time of one length, wherever it begins.
///
/// Choose it where a peer counts so ("no more than 100 in the last 60 seconds"), or where no boundary may let twice the
/// limit through, as at a [`Quota`](crate::Quota). The limit can go all at once, and does so again one window later to
/// the nanosecond, since all that was taken at once comes back at once. If the peer does not ask for that, a
/// [`TokenBucket`](crate::TokenBucket) is smoother, smaller and faster.
///
/// # How it counts
///
/// It keeps **a log**, and is exact: in no stretch of time shorter than the window does more than the limit pass. A limit
/// above 65,536 is too much for a log.
///
/// If that is [asked for](SlidingWindowBuilder::estimated), it keeps **two counters**, of the running window and of the
/// one before it, and takes the calls of the one before to have come evenly. With `x` the part of the running window that
/// is over and `b` the count of the one before,
///
/// ```text
/// estimate = current + b × (1 - x)        estimate - b × (1 - x)  ≤  exact count  ≤  estimate + b × x
/// ```
///
/// So calls that came evenly are counted right, to one. Calls that all came at the end of the window before are counted
/// too low: in the worst case the limit passes just before a boundary and as much again in the course of the window
/// after it, never more than `limit × (1 + t / window)` in a time `t` up to a window. Calls that all came at its
/// beginning are counted too high, and refused though an exact count would let them by.
///
/// What a cost that is settled afterwards takes above what there was counts as of then, and is gone after one window,
/// or two where they are counted by two counters.
///
/// | setting | default | why |
/// | --- | --- | --- |
/// | [`estimated`](SlidingWindowBuilder::estimated) | off | up to twice the limit in one window is another promise |
/// | [`max_queue`](SlidingWindowBuilder::max_queue) | 1,024 | a bound of memory, and of the work of telling a newcomer its time |
/// | [`max_wait`](SlidingWindowBuilder::max_wait) | none | a deadline of the policy does it better |
///
/// Waiting, deadlines and refunds are as at a [`TokenBucket`](crate::TokenBucket). What is [refunded](Self::refund) comes
/// off the oldest that count, so refund within the window what was taken in it. A newcomer that finds others waiting is
/// told its time by a copy that is ahead by the queue. The copy is made when the first one asks, and again after a waiter
/// left or tokens came back: some nanoseconds for each that waits and each entry of the log.
///
/// # Cost
///
/// A mutex; with a log, 16 bytes for each moment at which something was taken in the window.
///
/// ```
/// use std::time::Duration;
/// use resile::{Rate, SlidingWindow};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let window = SlidingWindow::at(Rate::per_minute(2)).build()?;
/// window.try_take(1)?;
/// tokio::time::advance(Duration::from_secs(50)).await;
/// window.try_take(1)?;
///
/// let refusal = window.try_take(1).unwrap_err();
/// assert_eq!(refusal.retry_after(), Some(Duration::from_secs(10)), "the first one is a minute old then");
/// let refusal = window.try_take(2).unwrap_err();
/// assert_eq!(refusal.retry_after(), Some(Duration::from_secs(60)));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct SlidingWindow(pub(super) Arc<Shell<UnderLock<Counting>>>);

/// Settings of a [`SlidingWindow`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct SlidingWindowBuilder {
    rate: Rate,
    exact_up_to: Option<u32>,
    waits: Waits,
}

limiter!(SlidingWindow, SlidingWindowBuilder, u64);

impl SlidingWindowBuilder {
    /// Estimates from two counters instead of a log, for any limit: less memory, and another promise. In the worst case up
    /// to twice the limit passes in one window.
    ///
    /// ```
    /// # use resile::SlidingWindow;
    /// assert!(SlidingWindow::per_minute(5000).build()?.is_exact());
    /// let error = SlidingWindow::per_minute(100_000).build().unwrap_err();
    /// assert_eq!(error.faults()[0].allowed(), "1 to 65536 with a log; estimated() takes more");
    /// assert!(!SlidingWindow::per_minute(100_000).estimated().build()?.is_exact());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn estimated(self) -> Self {
        self.exact_up_to(0)
    }

    /// Remembers every call up to this limit, at most 65,536, and [estimates](Self::estimated) above it.
    ///
    /// ```
    /// # use resile::SlidingWindow;
    /// let window = |limit| SlidingWindow::per_minute(limit).exact_up_to(5000).build();
    /// assert!(window(5000)?.is_exact() && !window(5001)?.is_exact());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn exact_up_to(mut self, limit: u32) -> Self {
        self.exact_up_to = Some(limit);
        self
    }

    /// The window, with nothing in it.
    ///
    /// # Errors
    ///
    /// A rate of 0, above 10^9 per second, or with a window above 366 days; a limit above 65,536 unless it is
    /// [`estimated`](Self::estimated); a queue above 16,777,216.
    pub fn build(self) -> Result<SlidingWindow, ConfigError> {
        let mut faults = Faults::of("window");
        let fine = self.rate.check(&mut faults);
        let longest = self.exact_up_to.unwrap_or(LONGEST_LOG);
        faults.check(longest <= LONGEST_LOG, "exact_up_to", &longest, "0 to 65536");
        let exact = self.rate.count <= u64::from(longest);
        let chosen = !fine || exact || self.exact_up_to.is_some();
        faults.check(chosen, "limit", &self.rate.count, "1 to 65536 with a log; estimated() takes more");
        check_queue(&mut faults, self.waits.max_queue);
        faults.into_result()?;
        let counting = if exact { Counting::exact(self.rate) } else { Counting::weighted(self.rate) };
        Ok(SlidingWindow(Arc::new(Shell::new(UnderLock::METER, Planned::new(counting), self.waits))))
    }
}

impl SlidingWindow {
    /// Begins a window of a second.
    pub const fn per_second(limit: u64) -> SlidingWindowBuilder {
        Self::at(Rate::per_second(limit))
    }

    /// Begins a window of a minute.
    pub const fn per_minute(limit: u64) -> SlidingWindowBuilder {
        Self::at(Rate::per_minute(limit))
    }

    /// Begins a window with any rate, of which the count is the limit and the period the window.
    pub const fn at(rate: Rate) -> SlidingWindowBuilder {
        let waits = Waits { max_queue: DEFAULT_WINDOW_QUEUE, max_wait: None, name: Name::Static("window") };
        SlidingWindowBuilder { rate, exact_up_to: None, waits }
    }

    /// How many are allowed in how long.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.0.read(|_, locked| locked.ledger.rate())
    }

    /// Whether it remembers every call, or estimates from two counters. Only new settings of a [`Keyed`](crate::Keyed)
    /// that it is in change that.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.0.read(|_, locked| locked.ledger.is_exact())
    }

    /// Changes limit and window while in use. What was taken still counts, but what had already left a shorter window
    /// is not known any more; with two counters, another length of the window makes all that counts count as of now.
    ///
    /// # Errors
    ///
    /// A rate that [`build`](SlidingWindowBuilder::build) would not take, or for an exact window a limit above 65,536.
    /// Nothing has changed then.
    ///
    /// ```
    /// # use resile::{Rate, SlidingWindow};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let window = SlidingWindow::per_minute(10).build()?;
    /// window.try_take(6)?;
    /// window.set_rate(Rate::per_minute(8))?;
    /// assert_eq!((window.peek(), window.rate(), window.is_exact()), (2, Rate::per_minute(8), true));
    /// # Ok(()) }
    /// ```
    pub fn set_rate(&self, rate: Rate) -> Result<(), ConfigError> {
        let now = Moment::now();
        let mut faults = Faults::of("window");
        let fine = rate.check(&mut faults);
        let fits = !fine || !self.is_exact() || rate.count <= LONGEST_LOG.into();
        faults.check(fits, "limit", &rate.count, "1 to 65536 with a log");
        faults.into_result()?;
        self.0.change(|_, locked| locked.ledger.set_rate(now, rate));
        Ok(())
    }
}

impl fmt::Debug for SlidingWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SlidingWindow")
            .field("name", self.0.name())
            .field("rate", &format_args!("{}", self.rate()))
            .field("exact", &self.is_exact())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for SlidingWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.name().as_str(), self.rate())
    }
}
