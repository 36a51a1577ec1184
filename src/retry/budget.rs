//! [`RetryBudget`]: how many retries a service can afford in all.
//!
//! `max_attempts` bounds one call. When a peer is down, every call fails, every call is retried, and the peer gets
//! three or four times its usual load just when it can least bear it. A budget bounds the retries of all calls together:
//! a few failures are retried as before, an outage is not multiplied.
//!
//! There are two styles. [`RetryBudget::ratio`] counts over time, as in Finagle: each call that went well pays for a
//! fraction of a retry, what was paid in expires after a while, and a small reserve keeps quiet services going.
//! [`RetryBudget::share`] counts what is in flight, as in Envoy: so many of the calls that run now may be retries.
//!
//! ```
//! use std::time::Duration;
//! use resile::{Policy, Retry, RetryBudget};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let budget = RetryBudget::ratio(0.1).reserve_per_second(0).build()?;
//! let policy = Policy::named("users").retry(Retry::immediate().budget(budget.clone())).build()?;
//!
//! for _ in 0..10 {
//!     policy.run(|| async { Ok::<_, ()>(()) }).await.unwrap();
//! }
//! assert_eq!(budget.available(), 1);
//!
//! let error = policy.run(|| async { Err::<(), _>("down") }).await.unwrap_err();
//! assert_eq!(error.attempts(), 2);
//! assert!(error.budget_exhausted());
//! # Ok(()) }
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{ConfigError, Faults};
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Mutex, Relaxed};
use crate::internal::time::{Moment, nanos};
use crate::internal::window::Window;

/// A fraction is kept in millionths, so that 0.75 pays for exactly 7,500 retries in 10,000 calls.
const UNIT: u64 = 1_000_000;
/// Finagle's: enough for a service that makes a few calls a second.
const DEFAULT_RESERVE: u32 = 10;
/// Finagle's.
const DEFAULT_EXPIRY: Duration = Duration::from_secs(10);
/// Envoy's.
const DEFAULT_FLOOR: u32 = 3;
const SLICES: usize = 16;

/// A bound on the retries of many calls together; see the [module](self).
///
/// A cheap handle: clones share one budget, so several policies can draw on it.
///
/// Deciding is one atomic step: two retries never spend the same token, and a refusal writes nothing. A retry is charged
/// when it is scheduled and counts while it waits; if its attempt is never made, it is refunded.
///
/// Cost: a call that went well adds to a counter of its thread's; a retry takes a mutex (ratio) or one
/// compare-and-swap (share).
#[derive(Clone)]
pub struct RetryBudget(Arc<Style>);

#[derive(Debug)]
enum Style {
    Ratio(Ratio),
    Share(Share),
}

/// Settings of a [`RetryBudget`] that counts over time.
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct RatioBuilder {
    ratio: f64,
    reserve: u32,
    expiry: Duration,
}

impl RatioBuilder {
    /// How many retries a second are allowed whatever the traffic: 10 by default, at most 1,000,000. What the reserve
    /// gives over one expiry can be spent at once.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::RetryBudget;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let budget = RetryBudget::ratio(0.1).reserve_per_second(2).expiry(Duration::from_secs(10)).build()?;
    /// assert_eq!(budget.available(), 20, "two a second for ten seconds, without any traffic");
    /// # Ok(()) }
    /// ```
    pub const fn reserve_per_second(mut self, retries: u32) -> Self {
        self.reserve = retries;
        self
    }

    /// How long a call goes on paying, and a retry goes on counting: 10 s by default, 1 ms to 1 h.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Policy, Retry, RetryBudget};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let budget = RetryBudget::ratio(1.0).reserve_per_second(0).expiry(Duration::from_secs(1)).build()?;
    /// let policy = Policy::named("users").retry(Retry::immediate().budget(budget.clone())).build()?;
    /// policy.run(|| async { Ok::<_, std::io::Error>(()) }).await?;
    /// assert_eq!(budget.available(), 1);
    /// tokio::time::advance(Duration::from_secs(2)).await;
    /// assert_eq!(budget.available(), 0);
    /// # Ok(()) }
    /// ```
    pub const fn expiry(mut self, expiry: Duration) -> Self {
        self.expiry = expiry;
        self
    }

    /// The budget.
    ///
    /// # Errors
    ///
    /// A ratio outside of 0 to 10, a reserve above 1,000,000 per second, or an expiry outside of 1 ms to 1 h.
    pub fn build(self) -> Result<RetryBudget, ConfigError> {
        let mut faults = Faults::of("retry budget");
        check_fraction(&mut faults, "ratio", self.ratio);
        faults.check(self.reserve <= 1_000_000, "reserve_per_second", &self.reserve, "0 to 1000000");
        let range = Duration::from_millis(1)..=Duration::from_secs(3600);
        faults.check(range.contains(&self.expiry), "expiry", &self.expiry, "1ms to 1h");
        faults.into_result()?;
        Ok(RetryBudget(Arc::new(Style::Ratio(Ratio {
            price: millionths(self.ratio),
            // Millionths of a retry that the reserve gives over one expiry.
            reserve: u128::from(self.reserve) * u128::from(nanos(self.expiry)) / 1_000,
            slice: nanos(self.expiry) / SLICES as u64,
            calls: Window::new(self.expiry),
            spent: Mutex::new(Spent { slices: [0; SLICES], newest: 0, left: None }),
        }))))
    }
}

/// Settings of a [`RetryBudget`] that counts what is in flight.
#[derive(Clone, Copy, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct ShareBuilder {
    share: f64,
    floor: u32,
}

impl ShareBuilder {
    /// How many retries may be in flight whatever the traffic: 3 by default, so that a quiet service can retry at all.
    ///
    /// ```
    /// # use resile::RetryBudget;
    /// let quiet = RetryBudget::share(0.2).floor(1).build()?;
    /// assert_eq!(quiet.available(), 1, "a fifth of nothing is nothing, but one may be retried");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub const fn floor(mut self, retries: u32) -> Self {
        self.floor = retries;
        self
    }

    /// The budget.
    ///
    /// # Errors
    ///
    /// A share outside of 0 to 10, or a floor above 1,000,000.
    pub fn build(self) -> Result<RetryBudget, ConfigError> {
        let mut faults = Faults::of("retry budget");
        check_fraction(&mut faults, "share", self.share);
        faults.check(self.floor <= 1_000_000, "floor", &self.floor, "0 to 1000000");
        faults.into_result()?;
        let (price, floor) = (millionths(self.share), u64::from(self.floor));
        Ok(RetryBudget(Arc::new(Style::Share(Share { price, floor, word: AtomicU64::new(0) }))))
    }
}

fn check_fraction(faults: &mut Faults, field: &'static str, fraction: f64) {
    faults.check((0.0..=10.0).contains(&fraction), field, &fraction, "0 to 10");
}

fn millionths(fraction: f64) -> u64 {
    (fraction * UNIT as f64).round() as u64
}

impl RetryBudget {
    /// A budget of so many retries per call that went well, counted over time: 0.1 allows one retry in ten calls.
    pub const fn ratio(ratio: f64) -> RatioBuilder {
        RatioBuilder { ratio, reserve: DEFAULT_RESERVE, expiry: DEFAULT_EXPIRY }
    }

    /// A budget of so many retries per call in flight: 0.2 allows ten retries beside fifty calls. A call that waits to
    /// be retried is still in flight, and so is its retry.
    ///
    /// ```
    /// # use resile::{Policy, Retry, RetryBudget};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let budget = RetryBudget::share(0.5).floor(0).build()?;
    /// let policy = Policy::named("users").retry(Retry::immediate().budget(budget.clone())).build()?;
    /// let calls: Vec<_> = (0..4)
    ///     .map(|_| tokio::spawn(policy.clone().into_run(|| std::future::pending::<Result<(), &str>>())))
    ///     .collect();
    /// tokio::task::yield_now().await;
    /// assert_eq!(budget.available(), 2, "half of the four in flight");
    /// # calls.iter().for_each(|call| call.abort());
    /// # Ok(()) }
    /// ```
    pub const fn share(share: f64) -> ShareBuilder {
        ShareBuilder { share, floor: DEFAULT_FLOOR }
    }

    /// How many retries the budget would allow now.
    #[must_use]
    pub fn available(&self) -> u64 {
        match &*self.0 {
            Style::Ratio(ratio) => ratio.available(Moment::now()),
            Style::Share(share) => share.available(),
        }
    }

    /// A call begins.
    pub(crate) fn enter(&self) {
        if let Style::Share(share) = &*self.0 {
            share.word.fetch_add(CALL, Relaxed);
        }
    }

    /// A call is over.
    pub(crate) fn leave(&self) {
        if let Style::Share(share) = &*self.0 {
            share.word.fetch_sub(CALL, Relaxed);
        }
    }

    /// An attempt went well.
    #[inline]
    pub(crate) fn deposit(&self, now: impl FnOnce() -> Moment) {
        if let Style::Ratio(ratio) = &*self.0 {
            ratio.calls.add(0, now());
        }
    }

    /// Takes one retry out, or changes nothing.
    pub(crate) fn take(&self, now: Moment) -> bool {
        match &*self.0 {
            Style::Ratio(ratio) => ratio.take(now),
            Style::Share(share) => share.take(),
        }
    }

    /// A retry that was taken is over, or was never made.
    pub(crate) fn settle(&self, made: bool) {
        match &*self.0 {
            Style::Ratio(ratio) if !made => ratio.refund(),
            Style::Ratio(_) => {}
            Style::Share(share) => {
                share.word.fetch_sub(RETRY, Relaxed);
            }
        }
    }

    /// Whether deposits need the clock.
    pub(crate) fn needs_now(&self) -> bool {
        matches!(&*self.0, Style::Ratio(_))
    }
}

impl fmt::Debug for RetryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (style, price) = match &*self.0 {
            Style::Ratio(ratio) => ("ratio", ratio.price),
            Style::Share(share) => ("share", share.price),
        };
        f.debug_struct("RetryBudget").field(style, &(price as f64 / UNIT as f64)).finish_non_exhaustive()
    }
}

/// Retries over time: what the calls of the last `expiry` paid for, less the retries of the last `expiry`.
#[derive(Debug)]
struct Ratio {
    /// Millionths of a retry per call.
    price: u64,
    reserve: u128,
    slice: u64,
    calls: Window<1>,
    spent: Mutex<Spent>,
}

/// The retries of the last 16 slices of time.
#[derive(Debug)]
struct Spent {
    slices: [u32; SLICES],
    newest: u64,
    /// Where the clock of another runtime was left, if that was further ahead than all slices.
    left: Option<u64>,
}

impl Spent {
    /// Drops the slices that time has passed by. A clock that goes back changes nothing, unless it is one of another
    /// runtime that was further ahead than all slices: then what was spent counts as spent now, and expires from now on.
    /// The same on the way forth to where that clock was left.
    fn advance(&mut self, to: u64) {
        let span = SLICES as u64;
        let back = self.newest >= to.saturating_add(span);
        let forth = to >= self.newest.saturating_add(span) && self.left.is_some_and(|left| to.abs_diff(left) < span);
        if back || forth {
            let total = u32::try_from(self.total()).unwrap_or(u32::MAX);
            self.slices = [0; SLICES];
            self.slices[to as usize % SLICES] = total;
            self.left = Some(self.newest);
            self.newest = to;
        }
        let gone = to.saturating_sub(self.newest).min(SLICES as u64);
        for age in 0..gone {
            self.slices[to.wrapping_sub(age) as usize % SLICES] = 0;
        }
        self.newest = self.newest.max(to);
    }

    fn total(&self) -> u128 {
        self.slices.iter().map(|count| u128::from(*count)).sum()
    }
}

impl Ratio {
    fn allowance(&self, now: Moment) -> u128 {
        let [calls] = self.calls.sum(now);
        self.reserve + u128::from(calls) * u128::from(self.price)
    }

    fn take(&self, now: Moment) -> bool {
        let mut spent = self.spent.lock();
        spent.advance(now.nanos() / self.slice);
        if (spent.total() + 1) * u128::from(UNIT) > self.allowance(now) {
            return false;
        }
        let newest = spent.newest as usize % SLICES;
        spent.slices[newest] += 1;
        true
    }

    /// Gives the latest retry back; if all have expired meanwhile there is nothing to give.
    fn refund(&self) {
        let mut spent = self.spent.lock();
        let newest = spent.newest;
        for age in 0..SLICES as u64 {
            let slice = &mut spent.slices[newest.wrapping_sub(age) as usize % SLICES];
            if *slice > 0 {
                *slice -= 1;
                return;
            }
        }
    }

    fn available(&self, now: Moment) -> u64 {
        let mut spent = self.spent.lock();
        spent.advance(now.nanos() / self.slice);
        let allowed = self.allowance(now) / u128::from(UNIT);
        u64::try_from(allowed.saturating_sub(spent.total())).unwrap_or(u64::MAX)
    }
}

/// Retries in flight: calls in the high half of one word, retries in the low.
#[derive(Debug)]
struct Share {
    /// Millionths of a retry per call in flight.
    price: u64,
    floor: u64,
    word: AtomicU64,
}

const CALL: u64 = 1 << 32;
const RETRY: u64 = 1;

impl Share {
    fn allowed(&self, word: u64) -> u64 {
        // A price of at most 10 million times a count below 2^32 stays below 2^56.
        ((word >> 32) * self.price / UNIT).max(self.floor)
    }

    fn take(&self) -> bool {
        let mut word = self.word.load(Relaxed);
        while (word & (CALL - 1)) < self.allowed(word) {
            match self.word.compare_exchange_weak(word, word + RETRY, AcqRel, Acquire) {
                Ok(_) => return true,
                Err(actual) => word = actual,
            }
        }
        false
    }

    fn available(&self) -> u64 {
        let word = self.word.load(Relaxed);
        self.allowed(word).saturating_sub(word & (CALL - 1))
    }
}

#[cfg(all(test, not(resile_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take_all(budget: &RetryBudget, now: Moment) -> u32 {
        (0..100_000).take_while(|_| budget.take(now)).count() as u32
    }

    /// It stayed empty for as long as the other clock was ahead.
    #[test]
    fn a_clock_that_was_far_ahead_is_forgotten_after_one_expiry() {
        let budget = RetryBudget::ratio(0.1).reserve_per_second(1).build().unwrap();
        let hour = 3_600_000_000_000;
        assert_eq!(take_all(&budget, Moment::at(hour)), 10);
        assert_eq!(take_all(&budget, Moment::at(0)), 0, "spent is spent");
        assert_eq!(take_all(&budget, Moment::at(11_000_000_000)), 10);
    }

    /// B2: integer prices gave 10,000 for 0.75, 5,000 for 0.4 and 3,333 for 0.3.
    #[test]
    fn a_ratio_gives_exactly_its_fraction_of_ten_thousand_calls() {
        for (ratio, retries) in [(0.0001, 1), (0.1, 1000), (0.3, 3000), (0.4, 4000), (0.75, 7500), (2.0, 20_000)] {
            let budget = RetryBudget::ratio(ratio).reserve_per_second(0).build().unwrap();
            (0..10_000).for_each(|_| budget.deposit(|| Moment::at(0)));
            assert_eq!(take_all(&budget, Moment::at(0)), retries, "{ratio}");
        }
    }

    #[test]
    fn deposits_and_retries_expire() {
        let budget = RetryBudget::ratio(0.5).reserve_per_second(0).expiry(Duration::from_secs(16)).build().unwrap();
        (0..10).for_each(|_| budget.deposit(|| Moment::at(0)));
        assert_eq!(take_all(&budget, Moment::at(1_000_000_000)), 5);
        let later = Moment::at(20_000_000_000);
        assert!(!budget.take(later), "what was paid in has expired");
        (0..10).for_each(|_| budget.deposit(|| later));
        assert_eq!(take_all(&budget, later), 5, "and so has what was spent");
    }

    #[test]
    fn the_reserve_is_there_without_traffic() {
        let budget = RetryBudget::ratio(0.0).reserve_per_second(2).build().unwrap();
        assert_eq!(take_all(&budget, Moment::at(0)), 20);
    }

    /// B5: a refund is worth one retry, once.
    #[test]
    fn a_refund_gives_one_retry_back() {
        let budget = RetryBudget::ratio(0.0).reserve_per_second(1).build().unwrap();
        assert_eq!(take_all(&budget, Moment::at(0)), 10);
        budget.settle(false);
        budget.settle(true);
        assert_eq!(take_all(&budget, Moment::at(0)), 1);
    }

    #[test]
    fn a_share_follows_the_calls_in_flight() {
        let budget = RetryBudget::share(0.2).floor(1).build().unwrap();
        budget.enter();
        assert_eq!(take_all(&budget, Moment::at(0)), 1, "the floor");
        (0..49).for_each(|_| budget.enter());
        assert_eq!(take_all(&budget, Moment::at(0)), 9);
        budget.settle(true);
        assert_eq!(budget.available(), 1);
    }

    #[test]
    fn wrong_settings_are_named() {
        for ratio in [-0.1, 10.1, f64::NAN, f64::INFINITY] {
            let error = RetryBudget::ratio(ratio).build().unwrap_err();
            assert_eq!(error.faults()[0].field(), "ratio");
            let error = RetryBudget::share(ratio).build().unwrap_err();
            assert_eq!(error.faults()[0].field(), "share");
        }
        let error = RetryBudget::ratio(0.1).expiry(Duration::ZERO).reserve_per_second(u32::MAX).build().unwrap_err();
        assert_eq!(error.faults().len(), 2);
    }

    proptest! {
        /// Law: a naive list of dated calls and retries, cut to the same slices, allows the same.
        #[test]
        fn the_ratio_agrees_with_a_list_of_dates(
            ops in proptest::collection::vec((0_u64..40, 0_u8..4), 1..300),
            ratio in 0.0_f64..2.0,
        ) {
            // Slices of a power of two, so that the list can be cut at the same places.
            let slice = 1_u64 << 20;
            let budget = RetryBudget::ratio(ratio)
                .reserve_per_second(0)
                .expiry(Duration::from_nanos(slice * 16))
                .build()
                .unwrap();
            let (mut calls, mut retries) = (Vec::<u64>::new(), Vec::<u64>::new());
            let mut now = Moment::at(0);
            for (step, op) in ops {
                now = now.plus_nanos(step * slice / 8);
                let current = now.nanos() / slice;
                let live = |dates: &Vec<u64>| dates.iter().filter(|date| current - **date < 16).count() as u64;
                if op == 0 {
                    let fits = (live(&retries) + 1) * UNIT <= live(&calls) * millionths(ratio);
                    prop_assert_eq!(budget.take(now), fits);
                    if fits {
                        retries.push(current);
                    }
                } else {
                    budget.deposit(|| now);
                    calls.push(current);
                }
            }
        }
    }
}
