//! The token bucket: a burst, and then so many per second.

use std::fmt;
use std::sync::Arc;

use super::pace::Pace;
use super::purse::Purses;
use super::shell::{Meter as _, Shell, Waits, check_queue, limiter};
use super::units::Rate;
use super::word::{Book, Word};
use crate::error::{ConfigError, Faults, Name};
use crate::gate::{FastGate, Outcome, Pass};
use crate::internal::queue::DEFAULT_MAX_QUEUE;
use crate::internal::stripe;
use crate::internal::time::Moment;

/// The default burst is what comes in this part of a second.
const BURSTS_PER_SECOND: u64 = 10;

/// So many calls per second, with a burst: a fair queue of those who wait, no more than the rate in the long run.
///
/// Choose it unless you have a reason for another [limiter](crate::rate): it is the smallest and fastest, and a burst
/// does little harm to most peers. There is no window and so no boundary; after an idle time the whole burst can go at
/// once, and what goes after it goes at the rate.
///
/// In no interval of length `t` do more than `burst + ceil(rate × t)` tokens go out, and in the long run the rate is
/// exact, whatever fraction of a nanosecond lies between two tokens.
///
/// A call takes as many tokens as it costs. If they are there and nobody waits, it has them. Otherwise its place in the
/// queue tells when it would be served: if that is past its deadline or `max_wait`, it is refused at once and told when
/// to come back; else it waits in order. Tokens are taken when they are due, so leaving the queue costs nothing. A call
/// that never reached its operation puts back what it took, less what has come in since, in whichever order calls leave.
/// A cost that is settled afterwards above what was taken is owed: everybody waits until it has come in. No more is owed
/// than comes in four years.
///
/// | setting | default | why |
/// | --- | --- | --- |
/// | [`burst`](TokenBucketBuilder::burst) | a tenth of a second's tokens, at least 1 | smooths over timers, is no flood |
/// | [`batch`](TokenBucketBuilder::batch) | none | exact |
/// | [`max_wait`](TokenBucketBuilder::max_wait) | none | a deadline of the policy does it better |
/// | [`max_queue`](TokenBucketBuilder::max_queue) | 16,384 | a bound of memory |
///
/// tokio's timers have a grain of a millisecond, so at more than a thousand tokens a second a burst of 1 cannot be used
/// to the full: give a burst of several milliseconds.
///
/// A cheap handle: clones share the tokens. Cost: with tokens there, one compare-and-swap and a multiplication, or with
/// a [`batch`](TokenBucketBuilder::batch) a subtraction most of the time; waiting takes a mutex and a timer: each
/// waiter has its own, and is served as of the moment when it was due, so one that nobody polls holds up nobody.
///
/// ```
/// use std::time::Duration;
/// use resile::{Moment, TokenBucket};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bucket = TokenBucket::per_second(10).burst(3).build()?;
/// bucket.try_take(3)?;
///
/// let refusal = bucket.try_take(1).unwrap_err();
/// assert_eq!(refusal.retry_after(), Some(Duration::from_millis(100)));
///
/// let start = tokio::time::Instant::now();
/// let _token = bucket.acquire().await?;
/// assert_eq!(start.elapsed(), Duration::from_millis(100));
///
/// let now = Moment::now();                     // one reading of the clock for several decisions
/// assert!(bucket.try_take_at(1, now).is_err());
/// bucket.refund(2);
/// assert_eq!(bucket.peek(), 2);
/// bucket.try_take_at(2, now)?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct TokenBucket(pub(super) Arc<Shell<Word<false>>>);

/// Settings of a [`TokenBucket`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct TokenBucketBuilder {
    rate: Rate,
    burst: Option<u32>,
    batch: Option<u32>,
    waits: Waits,
}

limiter!(TokenBucket, TokenBucketBuilder, u32);

impl TokenBucketBuilder {
    /// How many tokens a full bucket holds, at least 1: a tenth of a second's by default.
    ///
    /// ```
    /// # use resile::TokenBucket;
    /// assert_eq!(TokenBucket::per_second(500).build()?.burst(), 50);
    /// let bucket = TokenBucket::per_second(500).burst(2).build()?;
    /// bucket.try_take(2)?;
    /// assert!(bucket.try_take(1).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn burst(mut self, tokens: u32) -> Self {
        self.burst = Some(tokens);
        self
    }

    /// Lets threads take up to so many tokens ahead, 1 to the burst: for a bucket that many cores share and that is
    /// asked millions of times a second.
    ///
    /// Most calls then take a token that their thread has already, which changes nothing that other threads read and
    /// takes no locked instruction. That is for as many threads as there are cores and two more, 16 at most; others do
    /// as if there were no batch. The price is that the limit is loose by what lies ahead, `batch` tokens for each such
    /// thread: in no interval of length `t` do more than `burst + ceil(rate × t) + batch × threads`
    /// tokens go out, and a call may be refused while that many lie there. Nothing is lost: the tokens stay with their
    /// thread until it uses them, and in the long run the rate is exact; but those that a call took from there and did
    /// not use stay spent if the thread that puts them back has no room for them. A thread takes no more ahead than a
    /// quarter of what is there, so that where tokens are scarce the bucket is exact again. Whoever waits is not
    /// overtaken by tokens that lie ahead. [`peek`](TokenBucket::peek) and [`snapshot`](TokenBucket::snapshot) do not
    /// count them.
    ///
    /// The buckets of a [`Keyed`](crate::Keyed) take nothing ahead: a key that is one of many is rarely so hot.
    ///
    /// ```
    /// # use resile::TokenBucket;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = TokenBucket::per_second(1_000_000).burst(10_000).batch(64).build()?;
    /// bucket.try_take(1)?;
    /// let left = bucket.peek();
    /// assert!((10_000 - 1 - 64..=10_000 - 1).contains(&left));
    /// bucket.try_take(1)?;                         // out of the 64, if the thread has taken them
    /// # Ok(()) }
    /// ```
    pub const fn batch(mut self, tokens: u32) -> Self {
        self.batch = Some(tokens);
        self
    }

    /// The bucket, full.
    ///
    /// # Errors
    ///
    /// A rate of 0, above 10^9 per second, or with a period above 366 days; a burst of 0, or one that would take more
    /// than about nine years to fill; a batch of 0 or above the burst; a queue above 16,777,216.
    pub fn build(self) -> Result<TokenBucket, ConfigError> {
        let burst = self.burst.unwrap_or_else(|| default_burst(self.rate));
        let mut faults = Faults::of("bucket");
        let pace = check(&mut faults, self.rate, burst);
        check_queue(&mut faults, self.waits.max_queue);
        if let Some(batch) = self.batch {
            faults.check((1..=burst.max(1)).contains(&batch), "batch", &batch, "1 to the burst");
        }
        faults.into_result()?;
        let word = match self.batch {
            Some(batch) => Word::batched(pace, Purses::new(batch, stripe::count())),
            None => Word::new(pace),
        };
        Ok(TokenBucket(Arc::new(Shell::new(word, Book::default(), self.waits))))
    }
}

fn default_burst(rate: Rate) -> u32 {
    let per_second = u128::from(rate.count) * 1_000_000_000 / u128::from(rate.period.max(1));
    u32::try_from(per_second / u128::from(BURSTS_PER_SECOND)).unwrap_or(u32::MAX).max(1)
}

/// Checks a rate and a burst. The pace is to be used only if there were no faults.
fn check(faults: &mut Faults, rate: Rate, burst: u32) -> Pace {
    let fine = rate.check(faults);
    faults.check(burst >= 1, "burst", &burst, "1 or more");
    if !fine || burst == 0 {
        return Pace::NONE;
    }
    let pace = Pace::new(rate, burst, false);
    faults.check(pace.is_some(), "burst", &burst, "what fills within nine years at this rate");
    pace.unwrap_or(Pace::NONE)
}

impl TokenBucket {
    /// Begins a bucket that gains `tokens` a second, 1 to 10^9.
    pub const fn per_second(tokens: u64) -> TokenBucketBuilder {
        Self::at(Rate::per_second(tokens))
    }

    /// Begins a bucket with any rate.
    pub const fn at(rate: Rate) -> TokenBucketBuilder {
        let waits = Waits { max_queue: DEFAULT_MAX_QUEUE, max_wait: None, name: Name::Static("bucket") };
        TokenBucketBuilder { rate, burst: None, batch: None, waits }
    }

    /// How many tokens a full bucket holds.
    #[must_use]
    pub fn burst(&self) -> u32 {
        self.0.meter.pace().burst
    }

    /// Changes the rate while in use, and not the burst: [`set`](Self::set) changes both. The tokens that are there stay
    /// there, as do those that are owed, and waiters are told anew when their turn comes.
    ///
    /// # Errors
    ///
    /// As [`build`](TokenBucketBuilder::build). Nothing has changed then.
    ///
    /// ```
    /// # use resile::{Rate, TokenBucket};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = TokenBucket::per_second(1).burst(1).build()?;
    /// bucket.try_take(1)?;
    /// bucket.set_rate(Rate::per_second(1000))?;
    /// assert!(bucket.try_take(1).unwrap_err().retry_after() <= Some(std::time::Duration::from_millis(1)));
    /// # Ok(()) }
    /// ```
    pub fn set_rate(&self, rate: Rate) -> Result<(), ConfigError> {
        let now = Moment::now();
        self.0.change(|word, book| {
            let mut faults = Faults::of("bucket");
            let pace = check(&mut faults, rate, word.pace().burst);
            faults.into_result()?;
            word.set_pace(book, now, pace);
            Ok(())
        })
    }

    /// Changes rate, burst and the bounds of the queue while in use, all or nothing. The tokens that are there stay there
    /// up to the new burst, as do those that are owed; waiters keep their places and are told anew.
    ///
    /// What the builder does not say is as by default: a burst of a tenth of a second's tokens, above all.
    ///
    /// # Errors
    ///
    /// As [`build`](TokenBucketBuilder::build), or another `batch` than the bucket has. Nothing has changed then. The name
    /// stays what it is.
    ///
    /// ```
    /// # use resile::TokenBucket;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = TokenBucket::per_second(10).build()?;
    /// assert_eq!(bucket.burst(), 1);
    /// bucket.set(TokenBucket::per_second(5000))?;
    /// assert_eq!(bucket.burst(), 500);
    /// # Ok(()) }
    /// ```
    pub fn set(&self, builder: TokenBucketBuilder) -> Result<(), ConfigError> {
        let now = Moment::now();
        let waits = builder.waits.clone();
        let (new, batch) = (builder.build()?, self.0.meter.batch());
        let mut faults = Faults::of("bucket");
        let other = new.0.meter.batch();
        faults.check(other == batch, "batch", &other, format!("{batch}, which can't be changed"));
        faults.into_result()?;
        self.0.set_waits(&waits);
        self.0.change(|word, book| word.set_pace(book, now, new.0.meter.pace()));
        Ok(())
    }
}

impl FastGate for TokenBucket {
    /// A token that an operation has used stays spent.
    const RECORDS_SUCCESS: bool = false;

    #[inline]
    fn enter_now(&self, cost: u32, now: Moment) -> Option<Pass> {
        self.0.take_at_once(now, cost)
    }

    #[inline]
    fn leave_as(&self, pass: Pass, outcome: &Outcome) {
        self.0.leave(&pass, outcome);
    }
}

impl fmt::Debug for TokenBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenBucket")
            .field("name", self.0.name())
            .field("per_second", &self.0.meter.pace().per_second())
            .field("burst", &self.burst())
            .field("batch", &self.0.meter.batch())
            .field("available", &self.0.read(|word, book| word.facts(book, Moment::now()).remaining))
            .field("queued", &self.queued())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for TokenBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pace = self.0.meter.pace();
        write!(f, "{} {}/s burst {}", self.0.name().as_str(), pace.per_second(), pace.burst)
    }
}
