//! The leaky bucket: one after the other, evenly.

use std::fmt;
use std::sync::Arc;

use super::pace::Pace;
use super::shell::{Shell, Waits, check_queue, limiter};
use super::units::Rate;
use super::word::{Book, Word};
use crate::error::{ConfigError, Faults, Name};
use crate::internal::time::Moment;

/// How many may wait by default. The last of them waits ten seconds at a hundred a second.
const DEFAULT_DEPTH: u32 = 1024;

/// So many calls per second, evenly spaced, without any burst: who comes too early waits in a queue of bounded depth.
///
/// Choose it where the peer minds bunches: a device, a mail relay, an API that counts per second or less and bans.
/// Where a burst does no harm a [`TokenBucket`](crate::TokenBucket) wastes less, since what an idle time saves up here
/// is nothing. There is no window, so no boundary at which two bursts could meet.
///
/// A call of cost 1 passes when one interval has gone by since the call before it; one of cost `n` passes just so, and
/// the next one waits `n` intervals. Who comes up to two milliseconds late counts as in time, since tokio's timers are
/// no finer and the rate could not be kept otherwise. So in an interval of length `t` no more than
/// `1 + ceil(rate × (t + 2 ms))` calls of cost 1 pass: up to some hundred a second they are spaced, and at many
/// thousands they come in bunches of two milliseconds' worth. A waiter that is polled later than that, on a runtime that is
/// busy, goes at once if its distance to the call that really went before it is kept, and else when it is.
///
/// | setting | default | why |
/// | --- | --- | --- |
/// | [`max_queue`](LeakyBucketBuilder::max_queue) | 1,024 | the depth of the bucket, a bound of memory and of delay |
/// | [`max_wait`](LeakyBucketBuilder::max_wait) | none | a deadline of the policy does it better |
///
/// Who cannot be served before its deadline is refused at once, as is who finds the queue full, each with the time.
///
/// # Cost
///
/// It is a [`TokenBucket`](crate::TokenBucket) with a burst of 1, and costs what that does.
///
/// ```
/// use std::time::Duration;
/// use resile::LeakyBucket;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mails = LeakyBucket::per_second(10).max_queue(100).build()?;
/// let start = tokio::time::Instant::now();
/// for _ in 0..4 {
///     mails.acquire().await?.success();
/// }
/// assert_eq!(start.elapsed(), Duration::from_millis(300));
///
/// let refusal = mails.try_take(1).unwrap_err();
/// assert_eq!(refusal.retry_after(), Some(Duration::from_millis(100)));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct LeakyBucket(pub(super) Arc<Shell<Word<true>>>);

/// Settings of a [`LeakyBucket`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct LeakyBucketBuilder {
    rate: Rate,
    waits: Waits,
}

limiter!(LeakyBucket, LeakyBucketBuilder, u32);

impl LeakyBucketBuilder {
    /// The bucket, with nobody in it.
    ///
    /// # Errors
    ///
    /// A rate of 0, above 10^9 per second, or with a period above 366 days; a queue above 16,777,216.
    pub fn build(self) -> Result<LeakyBucket, ConfigError> {
        let mut faults = Faults::of("leaky bucket");
        let pace = check(&mut faults, self.rate);
        check_queue(&mut faults, self.waits.max_queue);
        faults.into_result()?;
        Ok(LeakyBucket(Arc::new(Shell::new(Word::new(pace), Book::default(), self.waits))))
    }
}

/// Checks a rate. The pace is to be used only if there were no faults; a burst of 1 fits whatever the rate is.
fn check(faults: &mut Faults, rate: Rate) -> Pace {
    if rate.check(faults) { Pace::new(rate, 1, true).unwrap_or(Pace::NONE) } else { Pace::NONE }
}

impl LeakyBucket {
    /// Begins a bucket that lets `calls` out a second, 1 to 10^9.
    pub const fn per_second(calls: u64) -> LeakyBucketBuilder {
        Self::at(Rate::per_second(calls))
    }

    /// Begins a bucket with any rate.
    pub const fn at(rate: Rate) -> LeakyBucketBuilder {
        let waits = Waits { max_queue: DEFAULT_DEPTH, max_wait: None, name: Name::Static("leaky") };
        LeakyBucketBuilder { rate, waits }
    }

    /// Changes the rate while in use. The part of an interval that has gone by stays gone by, and whoever waits is told
    /// anew when its turn comes.
    ///
    /// # Errors
    ///
    /// As [`build`](LeakyBucketBuilder::build). Nothing has changed then.
    ///
    /// ```
    /// # use resile::{LeakyBucket, Rate};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = LeakyBucket::per_second(1).build()?;
    /// bucket.try_take(1)?;
    /// bucket.set_rate(Rate::per_second(1000))?;
    /// assert!(bucket.try_take(1).unwrap_err().retry_after() <= Some(std::time::Duration::from_millis(1)));
    /// # Ok(()) }
    /// ```
    pub fn set_rate(&self, rate: Rate) -> Result<(), ConfigError> {
        let now = Moment::now();
        let mut faults = Faults::of("leaky bucket");
        let pace = check(&mut faults, rate);
        faults.into_result()?;
        self.0.change(|word, book| word.set_pace(book, now, pace));
        Ok(())
    }
}

impl fmt::Debug for LeakyBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeakyBucket")
            .field("name", self.0.name())
            .field("per_second", &self.0.meter.pace().per_second())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for LeakyBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/s", self.0.name().as_str(), self.0.meter.pace().per_second())
    }
}
