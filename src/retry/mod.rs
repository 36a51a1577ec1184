//! [`Retry`]: trying again, after a while, within limits.
//!
//! Some failures pass: a connection was reset, a replica was restarting. Trying again helps then, and does harm
//! otherwise, so a retry step has several limits, and the first one reached ends the call with the last error:
//!
//! | limit | setter | default | why |
//! | --- | --- | --- | --- |
//! | attempts, the first included | [`max_attempts`](Retry::max_attempts) | 3 | more rarely helps, and multiplies an outage |
//! | one delay, after jitter | [`max_delay`](Retry::max_delay) | 30 s, or the first delay if that is longer | nobody waits longer for one try |
//! | a peer's hint, or a gate's | [`max_hint`](Retry::max_hint) | 60 s | a garbled header must not park a call for years |
//! | time since the call's first poll | [`max_elapsed`](Retry::max_elapsed) | none | a deadline does it better |
//! | the deadline | a timeout step outside, or the caller's | none | a delay that doesn't fit is not slept |
//! | what an attempt takes at least | [`min_attempt`](Retry::min_attempt) | 0 | what can't end in time is work for nobody |
//! | retries of all calls together | [`budget`](Retry::budget) | none | see [`RetryBudget`] |
//!
//! Which results are tried again is the judge's business ([`Classify`](crate::Classify)): `Err` by default,
//! and a bad `Ok` if the judge says so. When attempts end on such an `Ok`, the caller is handed that `Ok`, and no
//! [`Stop`]: there is no error that could carry it. A caller who wants to know makes it an `Err` in the operation.
//!
//! # Hints
//!
//! A delay has a part that is waited in any case, and one that chance adds ([`Jitter`]). A hint of the peer
//! (`Retry-After`), or of a gate that refused, takes the place of the first part if it is longer; the second stays. So
//! nobody comes back before the hint, and a thousand callers who were all told "2 s" don't come back in one instant. The
//! wait is never longer than the hint, cut to `max_hint`, and `max_delay` together.
//!
//! # Refusals
//!
//! What a gate inside of the retry refuses is final, and the caller knows at once: right if it can do something else
//! meanwhile. A caller that can't loses nothing by coming back, and says so with [`OnRefusal::Retry`]: the call comes
//! back when the gate advised, until its deadline leaves no room.
//!
//! ```
//! use std::time::Duration;
//! use resile::{CircuitBreaker, OnRefusal, Policy, Retry};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let breaker = CircuitBreaker::builder().consecutive_failures(1).open_for(Duration::from_millis(300)).build()?;
//! let policy = Policy::named("users")
//!     .timeout(Duration::from_secs(1))
//!     .retry(Retry::exponential(Duration::from_millis(50)).on_refusal(OnRefusal::Retry))
//!     .gate(breaker.clone())
//!     .build()?;
//!
//! breaker.acquire().await?.failure();
//! assert_eq!(policy.run(|| async { Ok::<_, ()>(42) }).await.unwrap(), 42);
//! # Ok(()) }
//! ```
//!
//! Nobody was called, so a refusal uses up no attempt and no budget: the delay before it comes again, at most 1000 times.
//! A retry of an operation that did run is charged when it is scheduled, refunded if it is refused, and charged anew when
//! it is scheduled again, so that what stays spent are the attempts after the first.
//!
//! What it costs is the caller's time, and there is no way around that. The end of an outage saves those calls that are
//! waiting then. With 300 calls a second, 300 are waiting if each waits for a second; and in an outage most wait in vain.
//! [`min_attempt`](Retry::min_attempt) keeps those from waiting that could not be served any more.
//!
//! # Cancellation
//!
//! A call dropped in its backoff makes no further attempt, and the retry that was charged to the budget is refunded.
//!
//! # Cost
//!
//! A call that succeeds at once pays for two words in its future. A retry draws 64 random bits and, with the built-in
//! strategies, allocates nothing.

mod backoff;
pub mod budget;

#[cfg(all(test, resile_loom))]
mod loom;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use backoff::{Backoff, Jitter};
pub use budget::{RatioBuilder, RetryBudget, ShareBuilder};

pub(crate) use backoff::Delays;
use backoff::{Ask, Curve, Schedule, bits};

use crate::call::Call;
use crate::error::{ConfigError, Faults, Stop};
use crate::gate::{Framed, Needs};
use crate::internal::rng::entropy;
use crate::internal::time::{Moment, nanos};
use crate::least_time::LeastTime;
use crate::verdict::Verdict;

const DEFAULT_ATTEMPTS: u32 = 3;
const MOST_ATTEMPTS: u32 = 1000;
/// Refusals that one call comes back after: only a call without a deadline gets there.
const MOST_REFUSALS: u16 = 1000;
/// Attempts that one call gets for nothing because they never left the client.
const MOST_UNSENT: u8 = 3;
/// Who is refused comes back after the timer's grain at the earliest: sooner would be a spin.
const LEAST_AFTER_REFUSAL: u64 = 1_000_000;
const DEFAULT_MAX_DELAY: Duration = Duration::from_secs(30);
const DEFAULT_MAX_HINT: Duration = Duration::from_secs(60);
/// Longer settings are refused: a day is no backoff.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A retry step: when to try again, and after how long. See the [module](self) for its limits.
///
/// ```
/// use std::time::Duration;
/// use resile::{Policy, Retry};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let policy = Policy::named("users")
///     .retry(Retry::exponential(Duration::from_millis(50)).max_attempts(4))
///     .build()?;
///
/// let tried = std::cell::Cell::new(0);
/// let user = policy
///     .run(|| async {
///         tried.set(tried.get() + 1);
///         if tried.get() < 3 { Err(std::io::Error::other("reset")) } else { Ok("ann") }
///     })
///     .await?;
/// assert_eq!((user, tried.get()), ("ann", 3));
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a retry does nothing until it is a step of a policy"]
pub struct Retry {
    curve: Curve,
    jitter: Jitter,
    max_delay: Option<Duration>,
    max_attempts: u32,
    max_elapsed: Option<Duration>,
    max_hint: Duration,
    min_attempt: Duration,
    on_refusal: OnRefusal,
    budget: Option<RetryBudget>,
    seed: Option<u64>,
}

/// What a retry does when a gate inside of it refuses.
///
/// ```
/// # use resile::{OnRefusal, Policy, Retry, TokenBucket};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bucket = TokenBucket::per_second(10).burst(1).max_queue(0).build()?;
/// let policy = Policy::named("users").retry(Retry::immediate()).gate(bucket.clone()).build()?;
/// bucket.try_take(1)?;
/// let error = policy.run(|| async { Ok::<_, std::io::Error>(42) }).await.unwrap_err();
/// assert_eq!(OnRefusal::default(), OnRefusal::Stop);
/// assert_eq!((error.is_refused(), error.attempts()), (true, 0));
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OnRefusal {
    /// The refusal is final. The default: the gate protects somebody, and asking again at once helps nobody.
    #[default]
    Stop,
    /// Come back when the gate advises, as long as the deadline leaves room; see the [module](self#refusals). Refusals
    /// that can't change stay final.
    Retry,
}

impl Retry {
    const fn of(curve: Curve, jitter: Jitter) -> Self {
        Self {
            curve,
            jitter,
            max_delay: None,
            max_attempts: DEFAULT_ATTEMPTS,
            max_elapsed: None,
            max_hint: DEFAULT_MAX_HINT,
            min_attempt: Duration::ZERO,
            on_refusal: OnRefusal::Stop,
            budget: None,
            seed: None,
        }
    }

    /// Tries again without a delay: for peers of which there are many, behind a balancer that picks another one.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").retry(Retry::immediate()).timeout(Duration::from_secs(1)).build()?;
    /// let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.elapsed()), (3, Some(Duration::ZERO)));
    /// # Ok(()) }
    /// ```
    pub const fn immediate() -> Self {
        Self::of(Curve::Constant(0), Jitter::None)
    }

    /// The same delay before each retry, without jitter by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").retry(Retry::constant(Duration::from_millis(10)).max_attempts(4)).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_millis(10 + 10 + 10));
    /// # Ok(()) }
    /// ```
    pub const fn constant(delay: Duration) -> Self {
        Self::of(Curve::Constant(nanos(delay)), Jitter::None)
    }

    /// Delays of `first`, twice, three times that, and so on, without jitter by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").retry(Retry::linear(Duration::from_millis(10)).max_attempts(4)).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_millis(10 + 20 + 30));
    /// # Ok(()) }
    /// ```
    pub const fn linear(first: Duration) -> Self {
        Self::of(Curve::Linear(nanos(first)), Jitter::None)
    }

    /// Delays that double from `first` on, with full jitter by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Jitter, Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::exponential(Duration::from_millis(10)).jitter(Jitter::None).max_attempts(4);
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_millis(10 + 20 + 40));
    /// # Ok(()) }
    /// ```
    pub const fn exponential(first: Duration) -> Self {
        Self::of(Curve::Exponential { first: nanos(first), factor: 2.0 }, Jitter::Full)
    }

    /// Delays of `first` times 1, 1, 2, 3, 5, 8 and so on, without jitter by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").retry(Retry::fibonacci(Duration::from_millis(10)).max_attempts(5)).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_millis(10 + 10 + 20 + 30));
    /// # Ok(()) }
    /// ```
    pub const fn fibonacci(first: Duration) -> Self {
        Self::of(Curve::Fibonacci(nanos(first)), Jitter::None)
    }

    /// Delays of your own, without jitter by default; see [`Backoff`].
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry, Stop};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::with([Duration::from_millis(10), Duration::from_millis(100)]).max_attempts(10);
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let start = tokio::time::Instant::now();
    /// let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.stop()), (3, Stop::Attempts), "two delays, two retries");
    /// assert_eq!(start.elapsed(), Duration::from_millis(110));
    /// # Ok(()) }
    /// ```
    pub fn with(backoff: impl Backoff) -> Self {
        Self::of(Curve::Own(Arc::new(backoff)), Jitter::None)
    }

    /// By how much an exponential delay grows each time: 2 by default, 1 to 100. Other strategies ignore it.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Jitter, Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::exponential(Duration::from_millis(10)).factor(3.0).jitter(Jitter::None).max_attempts(4);
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_millis(10 + 30 + 90));
    /// # Ok(()) }
    /// ```
    pub fn factor(mut self, by: f64) -> Self {
        if let Curve::Exponential { factor, .. } = &mut self.curve {
            *factor = by;
        }
        self
    }

    /// How delays are spread.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Jitter, Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::constant(Duration::from_millis(100)).jitter(Jitter::Equal).max_attempts(11);
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// let waited = start.elapsed();
    /// assert!(waited >= 10 * Duration::from_millis(50) && waited < 10 * Duration::from_millis(100));
    /// # Ok(()) }
    /// ```
    pub const fn jitter(mut self, jitter: Jitter) -> Self {
        self.jitter = jitter;
        self
    }

    /// The longest delay, after jitter, at most a day. By default it is 30 s, or the strategy's first delay if that is
    /// longer. A [`constant`](Retry::constant) delay above it is a [`ConfigError`].
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::linear(Duration::from_secs(1)).max_delay(Duration::from_millis(1500)).max_attempts(4);
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let start = tokio::time::Instant::now();
    /// assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_millis(1000 + 1500 + 1500));
    /// # Ok(()) }
    /// ```
    pub const fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = Some(delay);
        self
    }

    /// How many attempts a call gets, the first one included: 3 by default, 1 to 1000. What a gate refused was none,
    /// nor were the first three that were [not sent](Verdict::NotSent).
    ///
    /// ```
    /// # use resile::{Policy, Retry, Stop};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = Policy::named("users").retry(Retry::immediate().max_attempts(5)).build()?;
    /// let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.stop()), (5, Stop::Attempts));
    /// # Ok(()) }
    /// ```
    pub const fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// No retry begins later than this after the call's first poll. Unlike a timeout it cuts no attempt short.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry, Stop};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::constant(Duration::from_millis(400)).max_attempts(10).max_elapsed(Duration::from_secs(1));
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.stop()), (3, Stop::Elapsed), "at 0, 400 and 800 ms");
    /// assert_eq!(error.elapsed(), Some(Duration::from_millis(800)), "and no wait for what would not come");
    /// # Ok(()) }
    /// ```
    pub const fn max_elapsed(mut self, elapsed: Duration) -> Self {
        self.max_elapsed = Some(elapsed);
        self
    }

    /// The longest hint that is honoured: 60 s by default, at most a day. A longer one is cut to this.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry, Verdict};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::immediate().max_attempts(2).max_hint(Duration::from_secs(2));
    /// let policy = Policy::named("users").retry(retry).build()?;
    /// let start = tokio::time::Instant::now();
    /// let answer = policy
    ///     .classify(|_: &Result<(), &str>| Verdict::Overloaded(Some(Duration::from_secs(3600))))
    ///     .run(|| async { Err("come back in an hour") })
    ///     .await;
    /// assert!(answer.is_err());
    /// assert_eq!(start.elapsed(), Duration::from_secs(2));
    /// # Ok(()) }
    /// ```
    pub const fn max_hint(mut self, hint: Duration) -> Self {
        self.max_hint = hint;
        self
    }

    /// How long an attempt takes at least: 0 by default. One that would have less before the deadline is not made, be it
    /// after a delay (the call ends with what it had) or after a wait in a queue (it is refused as [`Reason::TooLate`](crate::Reason::TooLate)).
    ///
    /// A peer that is behind then works for nobody who has gone before the answer comes. The limit of one attempt is a
    /// good value if the whole call has several times that.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry, Stop};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::constant(Duration::from_millis(400)).min_attempt(Duration::from_millis(300));
    /// let policy = Policy::named("users").timeout(Duration::from_secs(1)).retry(retry).build()?;
    /// let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!((error.attempts(), error.stop()), (2, Stop::Deadline), "at 800 ms only 200 were left");
    /// # Ok(()) }
    /// ```
    pub const fn min_attempt(mut self, time: Duration) -> Self {
        self.min_attempt = time;
        self
    }

    /// What to do when a gate inside of the retry refuses: [`OnRefusal::Stop`] by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{OnRefusal, Policy, Retry, TokenBucket};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let bucket = TokenBucket::per_second(10).burst(1).max_queue(0).build()?;
    /// let retry = Retry::immediate().on_refusal(OnRefusal::Retry);
    /// let policy = Policy::named("users").retry(retry).gate(bucket.clone()).build()?;
    ///
    /// bucket.try_take(1)?;
    /// let start = tokio::time::Instant::now();
    /// policy.run(|| async { Ok::<_, std::io::Error>(42) }).await?;
    /// assert_eq!(start.elapsed(), Duration::from_millis(100), "when the bucket said it would have a token");
    /// # Ok(()) }
    /// ```
    pub const fn on_refusal(mut self, on_refusal: OnRefusal) -> Self {
        self.on_refusal = on_refusal;
        self
    }

    /// A bound on the retries of many calls together.
    ///
    /// One budget for several policies that call the same peer:
    ///
    /// ```
    /// # use resile::{Policy, Retry, RetryBudget};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let budget = RetryBudget::ratio(0.1).reserve_per_second(0).build()?;
    /// let reads = Policy::named("reads").retry(Retry::immediate().budget(budget.clone())).build()?;
    /// let writes = Policy::named("writes").retry(Retry::immediate().budget(budget)).build()?;
    /// for _ in 0..10 {
    ///     reads.run(|| async { Ok::<_, &str>(()) }).await.unwrap();
    /// }
    /// let error = writes.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
    /// assert_eq!(error.attempts(), 2, "what the reads have paid for");
    /// # Ok(()) }
    /// ```
    pub fn budget(mut self, budget: RetryBudget) -> Self {
        self.budget = Some(budget);
        self
    }

    /// Makes the jitter repeatable: the n-th call that retries has the same delays in every run.
    ///
    /// By default the seed is random. Each call has a sequence of its own either way.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let retry = Retry::exponential(Duration::from_secs(1)).seed(7);
    /// let mut waits = Vec::new();
    /// for _ in 0..2 {
    ///     let policy = Policy::named("users").retry(retry.clone()).build()?;
    ///     let start = tokio::time::Instant::now();
    ///     assert!(policy.run(|| async { Err::<(), _>("down") }).await.is_err());
    ///     waits.push(start.elapsed());
    /// }
    /// assert_eq!(waits[0], waits[1]);
    /// # Ok(()) }
    /// ```
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Whether refusals are tried again, for `lint`.
    pub(crate) fn attempts(&self) -> u32 {
        self.max_attempts
    }

    pub(crate) fn retries_refusals(&self) -> bool {
        self.on_refusal == OnRefusal::Retry
    }

    pub(crate) fn build(self) -> Result<Plan, ConfigError> {
        let mut faults = Faults::of("retry");
        faults.check((1..=MOST_ATTEMPTS).contains(&self.max_attempts), "max_attempts", &self.max_attempts, "1 to 1000");
        if let Curve::Exponential { factor, .. } = self.curve {
            faults.check((1.0..=100.0).contains(&factor), "factor", &factor, "1 to 100");
        }
        let first = self.curve.first().map_or(Duration::ZERO, Duration::from_nanos);
        let max_delay = self.max_delay.unwrap_or(DEFAULT_MAX_DELAY.max(first.min(LONGEST)));
        // Other strategies are made to grow into their longest delay, a constant one would never be waited as written.
        if let Curve::Constant(_) = self.curve {
            faults.check(first <= LONGEST, "delay", &first, "0 to 24h");
            let fits = first <= max_delay || first > LONGEST;
            faults.check(fits, "max_delay", &max_delay, format!("the delay, {first:?}, to 24h"));
        }
        for (field, value) in [
            ("max_delay", max_delay),
            ("max_hint", self.max_hint),
            ("min_attempt", self.min_attempt),
            ("max_elapsed", self.max_elapsed.unwrap_or_default()),
        ] {
            faults.check(value <= LONGEST, field, &value, "0 to 24h");
        }
        faults.into_result()?;
        Ok(Plan {
            schedule: Schedule { curve: self.curve.clone(), jitter: self.jitter, cap: nanos(max_delay) },
            max_hint: nanos(self.max_hint),
            min_attempt: nanos(self.min_attempt),
            max_elapsed: self.max_elapsed.map_or(u64::MAX, nanos),
            seed: self.seed.unwrap_or_else(entropy),
            calls: AtomicU32::new(0),
            retry: self,
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "retry ×{} {}", self.retry.max_attempts, self.schedule.curve)
    }
}

/// A checked retry step: the machine that decides whether and when.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) retry: Retry,
    schedule: Schedule,
    max_hint: u64,
    min_attempt: u64,
    max_elapsed: u64,
    seed: u64,
    /// Numbers the calls that retry, so that each draws a sequence of its own.
    calls: AtomicU32,
}

/// What a retry step keeps in the lane while the call is further in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// Attempts so far, the running one included; at most [`MOST_ATTEMPTS`].
    attempts: u16,
    /// How often a gate has refused the call; at most [`MOST_REFUSALS`].
    refusals: u16,
    /// Attempts that never left the client and were not counted; at most [`MOST_UNSENT`].
    unsent: u8,
    /// The call's number among those that retry.
    call: u32,
    /// The delay before this attempt, in nanoseconds; below 2^61, so that three flags fit above it.
    previous: u64,
    /// The budget was charged for this attempt.
    charged: bool,
    /// The attempt that was charged has been made.
    made: bool,
    /// The operation was made in one of the attempts before.
    ran: bool,
}

const CHARGED: u64 = 1 << 63;
const MADE: u64 = 1 << 62;
const RAN: u64 = 1 << 61;

impl Frame {
    const FIRST: Self =
        Self { attempts: 1, refusals: 0, unsent: 0, call: 0, previous: 0, charged: false, made: false, ran: false };

    const fn words(self) -> [u64; 2] {
        let flags =
            if self.charged { CHARGED } else { 0 } | if self.made { MADE } else { 0 } | if self.ran { RAN } else { 0 };
        let counts = (self.attempts as u64) << 16 | (self.unsent as u64) << 12 | self.refusals as u64;
        [counts << 32 | self.call as u64, self.previous | flags]
    }

    pub(crate) fn attempt_made(self) -> Self {
        Self { made: true, ..self }
    }

    /// Whether the operation was made in an attempt before this one.
    pub(crate) fn ran(self) -> bool {
        self.ran
    }
}

impl Framed for Frame {
    #[inline]
    fn to_words(self) -> [u64; 2] {
        self.words()
    }

    #[inline]
    fn from_words([a, b]: [u64; 2]) -> Self {
        Self {
            attempts: (a >> 48) as u16,
            refusals: (a >> 32) as u16 & 0xfff,
            unsent: (a >> 44) as u8 & 0xf,
            call: a as u32,
            previous: b & (RAN - 1),
            charged: b & CHARGED != 0,
            made: b & MADE != 0,
            ran: b & RAN != 0,
        }
    }
}

/// How an attempt ended, as the retry around it sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ended {
    /// The operation ended with this verdict, or a limit inside of the step cut it.
    Judged(Verdict),
    /// A gate inside of the step refused, perhaps with a time to come back.
    Refused(Option<Duration>),
    /// Another attempt can change nothing.
    Finally,
}

/// What a retry step is told when an attempt is over.
pub(crate) struct Situation<'a> {
    pub(crate) ended: Ended,
    /// The operation ran in this attempt.
    pub(crate) started: bool,
    /// The step's place in the policy.
    pub(crate) place: usize,
    pub(crate) call: &'a Call,
    /// The call's first poll.
    pub(crate) begun: Moment,
    /// The operation can't be made again.
    pub(crate) once: bool,
    /// How much time an operation needs.
    pub(crate) least: &'a LeastTime,
}

impl Situation<'_> {
    /// What another attempt would wait for, or `None` if the end is final.
    fn verdict(&self, on_refusal: OnRefusal) -> Option<Verdict> {
        match self.ended {
            Ended::Judged(verdict) => Some(verdict),
            Ended::Refused(after) => (on_refusal == OnRefusal::Retry).then_some(Verdict::Overloaded(after)),
            Ended::Finally => None,
        }
        .filter(|verdict| verdict.is_retryable())
    }
}

impl Plan {
    /// A call comes by: its first frame.
    #[inline]
    pub(crate) fn enter(&self) -> Frame {
        if let Some(budget) = &self.retry.budget {
            budget.enter();
        }
        Frame::FIRST
    }

    /// How much time an attempt is to have at least, in nanoseconds.
    #[inline]
    pub(crate) fn min_attempt(&self) -> u64 {
        self.min_attempt
    }

    pub(crate) fn has_budget(&self) -> bool {
        self.retry.budget.is_some()
    }

    /// The call is over, or dropped.
    pub(crate) fn leave(&self, frame: Frame) {
        let Some(budget) = &self.retry.budget else { return };
        if frame.charged {
            budget.settle(frame.made);
        }
        budget.leave();
    }

    /// The call is over and its last attempt went well.
    #[inline]
    pub(crate) fn leave_well(&self, frame: Frame, call: &Call) {
        let Some(budget) = &self.retry.budget else { return };
        if frame.charged {
            budget.settle(frame.made);
        }
        budget.deposit(|| call.now());
        budget.leave();
    }

    /// An attempt is over: pays for what it earned and ends what it was charged.
    #[inline]
    pub(crate) fn settle(&self, frame: Frame, situation: &Situation<'_>) -> Frame {
        let Some(budget) = &self.retry.budget else { return frame };
        if frame.charged {
            budget.settle(frame.made);
        }
        if matches!(situation.ended, Ended::Judged(verdict) if verdict.is_healthy()) {
            budget.deposit(|| situation.call.now());
        }
        Frame { charged: false, made: false, ..frame }
    }

    /// Whether there is another attempt, and when: now if `None`.
    #[inline]
    pub(crate) fn next(
        &self,
        frame: Frame,
        situation: &Situation<'_>,
        delays: &mut Delays,
    ) -> Result<(Frame, Option<Moment>), Stop> {
        match situation.verdict(self.retry.on_refusal) {
            None => Err(Stop::Final),
            Some(_) if situation.once => Err(Stop::NoRetry),
            Some(Verdict::NotSent) if frame.unsent < MOST_UNSENT => {
                let frame = Frame { unsent: frame.unsent + 1, ..frame };
                self.schedule(frame, (Verdict::NotSent, true), situation, delays)
            }
            Some(_) if self.is_used_up(frame, situation.started) => Err(Stop::Attempts),
            Some(verdict) => self.schedule(frame, (verdict, false), situation, delays),
        }
    }

    /// Whether the call has had its attempts, or has been refused too often.
    fn is_used_up(&self, frame: Frame, started: bool) -> bool {
        if started { u32::from(frame.attempts) >= self.retry.max_attempts } else { frame.refusals >= MOST_REFUSALS }
    }

    fn schedule(
        &self,
        mut frame: Frame,
        (verdict, is_free): (Verdict, bool),
        situation: &Situation<'_>,
        delays: &mut Delays,
    ) -> Result<(Frame, Option<Moment>), Stop> {
        let started = situation.started;
        // An attempt that is not counted is not charged either.
        let counts = started && !is_free;
        // The first time that this call is repeated; a free attempt has been noted already.
        if frame.attempts == 1 && frame.refusals == 0 && frame.unsent == u8::from(is_free) {
            frame.call = self.calls.fetch_add(1, Ordering::Relaxed);
        }
        // A refused attempt was none: the delay before it comes again, with other dice.
        let n = u32::from(if counts { frame.attempts } else { (frame.attempts - 1).max(1) });
        let throw = u32::from(frame.refusals) << 16 | u32::from(frame.unsent) << 12 | n;
        let bits = bits(self.seed, frame.call, throw);
        let ask = Ask { place: situation.place, n, previous: frame.previous, bits };
        let delay = self.schedule.delay(&ask, delays).ok_or(Stop::Attempts)?;
        let hint = verdict.hint().map_or(0, |hint| nanos(hint).min(self.max_hint));
        let least = if started { 0 } else { LEAST_AFTER_REFUSAL };
        let wait = delay.not_before(hint).max(least);

        let now = situation.call.now();
        let at = now.plus_nanos(wait);
        if situation.begun != Moment::NEVER && at.nanos_since(situation.begun) > self.max_elapsed {
            return Err(Stop::Elapsed);
        }
        let ends = situation.call.ends();
        if ends != Moment::NEVER {
            let least = if situation.least.is_probe_due(now) { 0 } else { situation.least.required() };
            if at >= ends || at.plus_nanos(least) > ends || at > self.latest_start(ends) {
                return Err(Stop::Deadline);
            }
        }
        frame.ran |= started;
        // A call whose operation was never made adds no load by coming back: what it waits for is its first attempt.
        if let Some(budget) = self.retry.budget.as_ref().filter(|_| frame.ran && !is_free) {
            if !budget.take(now) {
                return Err(Stop::Budget);
            }
            frame.charged = true;
        }
        if counts {
            frame.attempts += 1;
            frame.previous = delay.plain();
        } else if !started {
            frame.refusals += 1;
        }
        Ok((frame, (wait > 0).then_some(at)))
    }

    /// The latest moment at which an attempt may begin that has to be over by `ends`.
    #[inline]
    pub(crate) fn latest_start(&self, ends: Moment) -> Moment {
        if self.min_attempt == 0 || ends == Moment::NEVER { Moment::NEVER } else { ends.minus_nanos(self.min_attempt) }
    }

    /// How much of the clock the step needs even if nothing is retried.
    pub(crate) fn needs(&self) -> Needs {
        if self.retry.max_elapsed.is_some() || self.retry.budget.as_ref().is_some_and(RetryBudget::needs_now) {
            Needs::Now
        } else {
            Needs::Nothing
        }
    }
}
