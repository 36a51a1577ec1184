//! [`BreakerBuilder`]: the settings of a breaker, and their defaults.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::state::{Machine, Settings};
use super::tally::{Ring, Tally};
use super::{CircuitBreaker, Listener, Locked, Rules, Shared, State, reaches, word};
use crate::error::{ConfigError, Faults, Name};
use crate::gate::IntoGate;
use crate::internal::rng::entropy;
use crate::internal::sync::AtomicU64;
use crate::internal::time::{Moment, nanos};
use crate::internal::window::Window;

const DEFAULT_RATE: f64 = 0.5;
/// At the default rate an outage is noticed after half of it.
const DEFAULT_OVER: Duration = Duration::from_secs(10);
const DEFAULT_MIN_CALLS: u32 = 20;
/// Long enough for a failover or a lost connection, and within what most callers wait.
const DEFAULT_OPEN_FOR: Duration = Duration::from_millis(500);
/// Others stay open for this long or longer from the first time on. It is the most that an outage is drawn out.
const DEFAULT_MAX_OPEN: Duration = Duration::from_secs(5);
const DEFAULT_GROWTH: f64 = 2.0;
const DEFAULT_JITTER: f64 = 0.1;
const DEFAULT_PROBES: u32 = 3;
const DEFAULT_HALF_OPEN_FOR: Duration = Duration::from_secs(60);
const DEFAULT_LEASE: Duration = Duration::from_secs(30);
/// Well past a healthy answer, and what an impatient client waits.
const ABANDONED_AFTER: Duration = Duration::from_secs(1);

/// Settings of a [`CircuitBreaker`]; the [module](super) has the defaults.
#[must_use = "a builder does nothing until it is built"]
pub struct BreakerBuilder {
    failure_rate: Option<f64>,
    over: Over,
    min_calls: Option<u32>,
    slow: Option<(Duration, f64)>,
    consecutive: Option<u32>,
    probes: u32,
    probe_failure_rate: Option<f64>,
    open_for: Duration,
    open_growth: f64,
    max_open_for: Duration,
    open_jitter: f64,
    half_open_for: Duration,
    probe_lease: Duration,
    abandoned_after: Option<Duration>,
    observe_only: bool,
    listener: Option<Listener>,
    seed: Option<u64>,
    name: Name,
}

#[derive(Clone, Copy, Debug)]
enum Over {
    Time(Duration),
    Calls(u32),
}

impl BreakerBuilder {
    pub(super) const fn new() -> Self {
        Self {
            failure_rate: None,
            over: Over::Time(DEFAULT_OVER),
            min_calls: None,
            slow: None,
            consecutive: None,
            probes: DEFAULT_PROBES,
            probe_failure_rate: None,
            open_for: DEFAULT_OPEN_FOR,
            open_growth: DEFAULT_GROWTH,
            max_open_for: DEFAULT_MAX_OPEN,
            open_jitter: DEFAULT_JITTER,
            half_open_for: DEFAULT_HALF_OPEN_FOR,
            probe_lease: DEFAULT_LEASE,
            abandoned_after: None,
            observe_only: false,
            listener: None,
            seed: None,
            name: Name::Static("breaker"),
        }
    }

    /// Opens when at least this share of the calls in the window failed, above 0 up to 1.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().failure_rate(0.25).min_calls(4).build()?;
    /// for _ in 0..3 {
    ///     breaker.try_acquire()?.success();
    /// }
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Open, "one of four");
    /// # Ok(()) }
    /// ```
    pub const fn failure_rate(mut self, rate: f64) -> Self {
        self.failure_rate = Some(rate);
        self
    }

    /// Counts over the last stretch of time, 1 ms to 1 h: 10 s by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().over(Duration::from_secs(1)).min_calls(2).build()?;
    /// breaker.try_acquire()?.failure();
    /// tokio::time::advance(Duration::from_secs(2)).await;
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Closed, "the first one is forgotten");
    /// assert_eq!(breaker.counts().calls, 1);
    /// # Ok(()) }
    /// ```
    pub const fn over(mut self, time: Duration) -> Self {
        self.over = Over::Time(time);
        self
    }

    /// Counts over the last `calls` calls, 1 to 1,000,000, however old they are.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().failure_rate(1.0).over_calls(2).build()?;
    /// breaker.try_acquire()?.success();
    /// breaker.try_acquire()?.failure();
    /// tokio::time::advance(Duration::from_secs(3600)).await;
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Open, "the last two, though an hour lies between them");
    /// # Ok(()) }
    /// ```
    pub const fn over_calls(mut self, calls: u32) -> Self {
        self.over = Over::Calls(calls);
        self
    }

    /// The fewest calls in the window for which there is a rate: at least 1, at most the window of `over_calls`. By default
    /// 20, or that window if it is shorter.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().min_calls(3).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Closed, "two are too few to judge by");
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Open);
    /// # Ok(()) }
    /// ```
    pub const fn min_calls(mut self, calls: u32) -> Self {
        self.min_calls = Some(calls);
        self
    }

    /// Opens when at least this share of the calls in the window lasted as long as this or longer, whatever came of
    /// them. Half-open asks the same of its probes.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().slow_calls(Duration::from_secs(1), 0.5).min_calls(2).build()?;
    /// breaker.try_acquire()?.success();
    /// let slow = breaker.try_acquire()?;
    /// tokio::time::advance(Duration::from_secs(1)).await;
    /// slow.success();
    /// assert_eq!(breaker.state(), State::Open, "one of two was slow, though neither failed");
    /// # Ok(()) }
    /// ```
    pub const fn slow_calls(mut self, threshold: Duration, rate: f64) -> Self {
        self.slow = Some((threshold, rate));
        self
    }

    /// Opens after this many failures in a row, at least 1. Without a `failure_rate` of its own the breaker has no other
    /// rule.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(2).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.try_acquire()?.success();                // ends the row
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Closed);
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Open);
    /// # Ok(()) }
    /// ```
    pub const fn consecutive_failures(mut self, failures: u32) -> Self {
        self.consecutive = Some(failures);
        self
    }

    /// How many calls a half-open circuit lets through to judge by, 1 to 1000.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, Reason, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).probes(2).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.wait_for(State::HalfOpen).await;
    ///
    /// let (first, second) = (breaker.try_acquire()?, breaker.try_acquire()?);
    /// assert_eq!(breaker.try_acquire().unwrap_err().reason(), Reason::Probing, "no third one");
    /// first.success();
    /// second.success();
    /// assert_eq!(breaker.state(), State::Closed);
    /// # Ok(()) }
    /// ```
    pub const fn probes(mut self, probes: u32) -> Self {
        self.probes = probes;
        self
    }

    /// Opens again when at least this share of the probes failed, above 0 up to 1: the failure rate by default, or
    /// 0.5. A probe that is slow and good counts for the rate of [`slow_calls`](Self::slow_calls) only.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let strict = CircuitBreaker::builder().consecutive_failures(1).probes(4).probe_failure_rate(0.25).build()?;
    /// strict.try_acquire()?.failure();
    /// strict.wait_for(State::HalfOpen).await;
    /// strict.try_acquire()?.failure();
    /// assert_eq!(strict.state(), State::Open, "one of four is enough");
    /// # Ok(()) }
    /// ```
    pub const fn probe_failure_rate(mut self, rate: f64) -> Self {
        self.probe_failure_rate = Some(rate);
        self
    }

    /// How long it stays open the first time, 1 ms to 24 h: 500 ms by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::CircuitBreaker;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let period = Duration::from_secs(2);
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).open_for(period).open_jitter(0.0).build()?;
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.try_acquire().unwrap_err().retry_after(), Some(period));
    /// # Ok(()) }
    /// ```
    pub const fn open_for(mut self, period: Duration) -> Self {
        self.open_for = period;
        self
    }

    /// By how much the period grows each time it opens again without having closed, 1 to 100.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).probes(1);
    /// let breaker = breaker.open_for(Duration::from_secs(1)).open_growth(3.0).open_jitter(0.0).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.wait_for(State::HalfOpen).await;         // a second later
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.try_acquire().unwrap_err().retry_after(), Some(Duration::from_secs(3)));
    /// # Ok(()) }
    /// ```
    pub const fn open_growth(mut self, factor: f64) -> Self {
        self.open_growth = factor;
        self
    }

    /// The longest period, up to 24 h: 5 s by default. A shorter one than `open_for` counts as that.
    ///
    /// Without growth, for callers with a short deadline:
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let period = Duration::from_millis(100);
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).probes(1).open_jitter(0.0);
    /// let breaker = breaker.open_for(period).max_open_for(period).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.wait_for(State::HalfOpen).await;
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.try_acquire().unwrap_err().retry_after(), Some(period));
    /// # Ok(()) }
    /// ```
    pub const fn max_open_for(mut self, period: Duration) -> Self {
        self.max_open_for = period;
        self
    }

    /// Up to this share of each period is taken off at random, 0 to 1.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::CircuitBreaker;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let second = Duration::from_secs(1);
    /// let mut waits = Vec::new();
    /// for seed in 0..100 {                             // a fleet that notices the same outage
    ///     let breaker = CircuitBreaker::builder().consecutive_failures(1).open_for(second);
    ///     let breaker = breaker.open_jitter(0.5).seed(seed).build()?;
    ///     breaker.try_acquire()?.failure();
    ///     waits.extend(breaker.try_acquire().unwrap_err().retry_after());
    /// }
    /// assert!(waits.iter().all(|wait| (second / 2..=second).contains(wait)));
    /// assert!(waits.iter().any(|wait| *wait < second * 6 / 10));
    /// # Ok(()) }
    /// ```
    pub const fn open_jitter(mut self, share: f64) -> Self {
        self.open_jitter = share;
        self
    }

    /// How long half-open may last from its first probe on, 1 ms to 24 h. Then it opens again if a probe failed or is
    /// missing. If all answers were good, it goes on with those that it has.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).probes(2);
    /// let breaker = breaker.half_open_for(Duration::from_secs(1)).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.wait_for(State::HalfOpen).await;
    /// breaker.try_acquire()?.success();
    /// tokio::time::advance(Duration::from_secs(1)).await;
    /// assert_eq!(breaker.state(), State::HalfOpen, "nothing speaks against the peer");
    ///
    /// let _hangs = breaker.try_acquire()?;
    /// tokio::time::advance(Duration::from_secs(1)).await;
    /// assert_eq!(breaker.state(), State::Open, "the second probe is missing");
    /// # Ok(()) }
    /// ```
    pub const fn half_open_for(mut self, time: Duration) -> Self {
        self.half_open_for = time;
        self
    }

    /// After how long a probe without an answer loses its place, and its vote, 1 ms to 24 h.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).probes(1);
    /// let breaker = breaker.probe_lease(Duration::from_secs(2)).build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.wait_for(State::HalfOpen).await;
    ///
    /// let _hangs = breaker.try_acquire()?;
    /// assert!(breaker.try_acquire().is_err());
    /// tokio::time::advance(Duration::from_secs(2)).await;
    /// breaker.try_acquire()?.success();
    /// assert_eq!(breaker.state(), State::Closed);
    /// # Ok(()) }
    /// ```
    pub const fn probe_lease(mut self, time: Duration) -> Self {
        self.probe_lease = time;
        self
    }

    /// An operation that had lasted so long when its caller gave up counts as a failure.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let limit = Duration::from_millis(200);
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).abandoned_after(limit).build()?;
    /// drop(breaker.try_acquire()?);
    /// assert_eq!(breaker.state(), State::Closed, "a caller that left at once says nothing");
    ///
    /// let guard = breaker.try_acquire()?;
    /// tokio::time::advance(limit).await;
    /// drop(guard);
    /// assert_eq!(breaker.state(), State::Open);
    /// # Ok(()) }
    /// ```
    pub const fn abandoned_after(mut self, time: Duration) -> Self {
        self.abandoned_after = Some(time);
        self
    }

    /// Counts and changes state as usual, but refuses nothing: for trying settings out.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).observe_only().build()?;
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::Open);
    /// breaker.try_acquire()?.success();
    /// assert_eq!(breaker.counts().would_refuse, 1);
    /// # Ok(()) }
    /// ```
    pub const fn observe_only(mut self) -> Self {
        self.observe_only = true;
        self
    }

    /// Called after each change of state with the old and the new one, once and in order, with no lock held.
    ///
    /// One thread at a time tells the changes, also those that others cause meanwhile, so the state may have moved on by
    /// then. A change that the listener itself causes is told after it has returned. If it panics, later changes are told
    /// all the same, and the panic goes on in the call that told it.
    ///
    /// ```
    /// # use std::sync::{Arc, Mutex};
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let log = Arc::new(Mutex::new(Vec::new()));
    /// let told = log.clone();
    /// let breaker = CircuitBreaker::builder()
    ///     .consecutive_failures(1)
    ///     .on_change(move |old, new| told.lock().unwrap().push((old, new)))
    ///     .build()?;
    /// breaker.try_acquire()?.failure();
    /// breaker.reset();
    /// assert_eq!(*log.lock().unwrap(), [(State::Closed, State::Open), (State::Open, State::Closed)]);
    /// # Ok(()) }
    /// ```
    pub fn on_change(mut self, listener: impl Fn(State, State) + Send + Sync + 'static) -> Self {
        self.listener = Some(Arc::new(listener));
        self
    }

    /// Makes the open periods repeatable; random by default.
    ///
    /// ```
    /// # use resile::CircuitBreaker;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let settings = || CircuitBreaker::builder().consecutive_failures(1).open_jitter(0.5).seed(7);
    /// let (one, other) = (settings().build()?, settings().build()?);
    /// one.try_acquire()?.failure();
    /// other.try_acquire()?.failure();
    /// assert_eq!(one.try_acquire().unwrap_err().retry_after(), other.try_acquire().unwrap_err().retry_after());
    /// # Ok(()) }
    /// ```
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// The name that refusals carry: `breaker` by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// The breaker.
    ///
    /// # Errors
    ///
    /// Every setting outside of the range that its method names.
    ///
    /// ```
    /// # use resile::CircuitBreaker;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let error = CircuitBreaker::builder().failure_rate(0.0).probes(0).build().unwrap_err();
    /// let fields: Vec<_> = error.faults().iter().map(|fault| fault.field()).collect();
    /// assert_eq!(fields, ["failure_rate", "probes"]);
    /// # }
    /// ```
    pub fn build(self) -> Result<CircuitBreaker, ConfigError> {
        self.check()?;
        let rate = match (self.failure_rate, self.consecutive) {
            (None, None) => Some(DEFAULT_RATE),
            (rate, _) => rate,
        };
        let counts = rate.is_some() || self.slow.is_some();
        let tally = match self.over {
            _ if !counts => Tally::Nothing,
            Over::Time(time) => Tally::Time(Window::new(time)),
            Over::Calls(calls) => Tally::Calls(Ring::new(calls)),
        };
        let slow_after = self.slow.map_or(u64::MAX, |(threshold, _)| nanos(threshold));
        let abandoned_after =
            self.abandoned_after.or(self.slow.map(|(threshold, _)| threshold)).unwrap_or(ABANDONED_AFTER);
        let probe_rate = self.probe_failure_rate.or(rate).unwrap_or(DEFAULT_RATE);
        let machine = Machine::new(Settings {
            probes: self.probes,
            fatal_probes: fewest(self.probes, probe_rate),
            fatal_slow: self.slow.map_or(self.probes + 1, |(_, rate)| fewest(self.probes, rate)),
            open_for: nanos(self.open_for),
            growth: self.open_growth,
            max_open: nanos(self.max_open_for.max(self.open_for)),
            jitter: self.open_jitter,
            half_open_for: nanos(self.half_open_for),
            lease: nanos(self.probe_lease),
            seed: self.seed.unwrap_or_else(entropy),
        });
        Ok(CircuitBreaker(Arc::new(Shared {
            word: AtomicU64::new(word(State::Closed, machine.generation())),
            until: AtomicU64::new(Moment::NEVER.nanos()),
            streak: AtomicU64::new(0),
            tally,
            rules: Rules {
                failure_rate: rate,
                slow_rate: self.slow.map(|(_, rate)| rate),
                slow_after,
                min_calls: self.minimum().into(),
                consecutive: self.consecutive.map(u64::from),
                abandoned_after: nanos(abandoned_after),
                max_open: nanos(self.max_open_for.max(self.open_for)),
                observe_only: self.observe_only,
            },
            would_refuse: AtomicU64::new(0),
            locked: Locked::new(machine),
            changed: Notify::new(),
            listener: self.listener,
            name: self.name,
        })))
    }

    fn minimum(&self) -> u32 {
        self.min_calls.unwrap_or(match self.over {
            Over::Time(_) => DEFAULT_MIN_CALLS,
            Over::Calls(calls) => DEFAULT_MIN_CALLS.min(calls),
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        const RATE: &str = "above 0 up to 1";
        let mut faults = Faults::of("breaker");
        let is_rate = |rate: f64| rate > 0.0 && rate <= 1.0;
        for (field, rate) in [
            ("failure_rate", self.failure_rate),
            ("slow_calls rate", self.slow.map(|(_, rate)| rate)),
            ("probe_failure_rate", self.probe_failure_rate),
        ] {
            if let Some(rate) = rate {
                faults.check(is_rate(rate), field, &rate, RATE);
            }
        }
        match self.over {
            Over::Time(time) => {
                let range = Duration::from_millis(1)..=Duration::from_secs(3600);
                faults.check(range.contains(&time), "over", &time, "1ms to 1h");
                faults.check(self.minimum() >= 1, "min_calls", &self.minimum(), "1 or more");
            }
            Over::Calls(calls) => {
                faults.check((1..=1_000_000).contains(&calls), "over_calls", &calls, "1 to 1000000");
                let fits = calls == 0 || (1..=calls).contains(&self.minimum());
                faults.check(fits, "min_calls", &self.minimum(), format!("1 to {calls}, the calls of the window"));
            }
        }
        if let Some(failures) = self.consecutive {
            faults.check(failures >= 1, "consecutive_failures", &failures, "1 or more");
        }
        faults.check((1..=1000).contains(&self.probes), "probes", &self.probes, "1 to 1000");
        faults.check((1.0..=100.0).contains(&self.open_growth), "open_growth", &self.open_growth, "1 to 100");
        faults.check((0.0..=1.0).contains(&self.open_jitter), "open_jitter", &self.open_jitter, "0 to 1");
        let range = Duration::from_millis(1)..=Duration::from_secs(24 * 3600);
        for (field, time) in [
            ("open_for", self.open_for),
            ("max_open_for", self.max_open_for),
            ("half_open_for", self.half_open_for),
            ("probe_lease", self.probe_lease),
            ("slow_calls threshold", self.slow.map_or(ABANDONED_AFTER, |(threshold, _)| threshold)),
            ("abandoned_after", self.abandoned_after.unwrap_or(ABANDONED_AFTER)),
        ] {
            faults.check(range.contains(&time), field, &time, "1ms to 24h");
        }
        faults.into_result()
    }
}

/// The fewest of so many probes that reach a rate: at least one.
fn fewest(probes: u32, rate: f64) -> u32 {
    (1..=probes).find(|count| reaches((*count).into(), probes.into(), rate)).unwrap_or(probes)
}

impl fmt::Debug for BreakerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BreakerBuilder").field("name", &self.name).field("over", &self.over).finish_non_exhaustive()
    }
}

impl IntoGate for BreakerBuilder {
    type Gate = CircuitBreaker;

    fn into_gate(self) -> Result<CircuitBreaker, ConfigError> {
        self.build()
    }
}
