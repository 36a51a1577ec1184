//! [`Check`]: a signal with a name, and how it is read from the parts of the crate.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::track::Rows;
use super::{Signal, Symptom};
use crate::blocking::{Blocking, Compute};
use crate::breaker::{CircuitBreaker, State};
use crate::drain::{Drain, Phase};
use crate::error::{ConfigError, Faults};
use crate::gate::Gate;
use crate::semaphore::Semaphore;

/// A signal with a name, and what is special about it.
///
/// ```
/// use resile::health::{Check, Signal};
/// use resile::{Compute, Health};
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # fn beats() -> bool { true }
/// let compute = Compute::builder().threads(1).max_queue(100).build()?;
/// let health = Health::builder()
///     .check(Check::queue(&compute, 0.5..0.9).bad_after(10))
///     .check(Check::new("consumer", || if beats() { Signal::Good } else { Signal::bad("hangs") }).for_liveness())
///     .build()?;
/// assert!(health.ready().ok);
/// # Ok(()) }
/// ```
#[must_use = "a check does nothing until it is given to a builder"]
pub struct Check {
    pub(super) name: Cow<'static, str>,
    read: Box<dyn Fn() -> Signal + Send + Sync>,
    bad_after: Option<u32>,
    good_after: Option<u32>,
    pub(super) live: bool,
    /// What a queue's check was made of, to be looked at when it is built.
    queue: Option<(Range<f64>, u32)>,
}

impl Check {
    /// A signal of your own. It is read by the probe and must not block.
    pub fn new(name: impl Into<Cow<'static, str>>, read: impl Fn() -> Signal + Send + Sync + 'static) -> Self {
        Self { name: name.into(), read: Box::new(read), bad_after: None, good_after: None, live: false, queue: None }
    }

    /// Bad while the circuit is open or held open. It flips with one reading, and has the breaker's name.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::health::Check;
    /// # use resile::{CircuitBreaker, Health, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).open_for(Duration::from_secs(5)).build()?;
    /// let health = Health::builder().check(Check::breaker(&breaker)).build()?;
    /// breaker.acquire().await?.failure();
    /// tokio::time::sleep(Duration::from_millis(600)).await;
    /// assert!(!health.ready().ok);
    ///
    /// breaker.wait_for(State::HalfOpen).await;
    /// tokio::time::sleep(Duration::from_millis(600)).await;
    /// assert!(health.ready().ok, "it gets well by the calls that come");
    /// # Ok(()) }
    /// ```
    pub fn breaker(breaker: &CircuitBreaker) -> Self {
        let name = breaker.name().to_owned();
        let breaker = breaker.clone();
        let read = move || match breaker.state() {
            state @ (State::Open | State::ForcedOpen) => Signal::Bad(Symptom::Circuit(state)),
            _ => Signal::Good,
        };
        Self::new(name, read).bad_after(1).good_after(1)
    }

    /// Bad from when a drain begins to close until it is opened again, so that no new traffic is sent here. It flips with
    /// one reading, and has the drain's name.
    ///
    /// ```
    /// use std::time::Duration;
    /// use resile::health::Check;
    /// use resile::{Drain, Health};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let drain = Drain::new();
    /// let health = Health::builder().check(Check::drain(&drain)).build()?;
    ///
    /// drain.close(Duration::from_secs(5)).await;
    /// tokio::time::sleep(Duration::from_secs(1)).await;
    /// assert!(!health.ready().ok, "no new traffic");
    /// assert!(health.live().ok, "no reason to be killed");
    /// # Ok(()) }
    /// ```
    pub fn drain(drain: &Drain) -> Self {
        let name = drain.name().to_owned();
        let drain = drain.clone();
        let read = move || match drain.phase() {
            Phase::Open => Signal::Good,
            phase => Signal::Bad(Symptom::Draining(phase)),
        };
        Self::new(name, read).bad_after(1).good_after(1)
    }

    /// Bad from the upper share of a queue's bound on, good below the lower one. It has the queue's name.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::health::Check;
    /// # use resile::{Health, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let db = Semaphore::permits(1).max_queue(10).named("db").build()?;
    /// let health = Health::builder().check(Check::queue(&db, 0.2..0.5)).bad_after(1).build()?;
    /// let _held = db.acquire().await?;
    /// let waiting: Vec<_> = (0..5).map(|_| tokio::spawn(db.acquire())).collect();
    /// tokio::time::sleep(Duration::from_millis(600)).await;
    /// assert_eq!(health.ready().to_string(), "not ok: db: 5 wait in a queue for 10 (for 100ms)");
    /// # waiting.iter().for_each(|task| task.abort());
    /// # Ok(()) }
    /// ```
    pub fn queue(source: &impl QueueSource, band: Range<f64>) -> Self {
        let (name, most) = (source.queue_name().to_owned(), source.most_queued());
        let (source, Range { start, end }) = (source.clone(), band.clone());
        let read = move || {
            let (queued, max_queue) = (source.now_queued(), source.most_queued());
            let share = f64::from(queued) / f64::from(max_queue);
            if share >= end {
                Signal::Bad(Symptom::Queue { queued, max_queue })
            } else if share < start {
                Signal::Good
            } else {
                Signal::Unclear
            }
        };
        Self { queue: Some((band, most)), ..Self::new(name, read) }
    }

    /// Another name.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// How many bad readings in a row flip it, if other than the builder's.
    pub fn bad_after(mut self, readings: u32) -> Self {
        self.bad_after = Some(readings);
        self
    }

    /// How many good readings in a row flip it back, if other than the builder's.
    pub fn good_after(mut self, readings: u32) -> Self {
        self.good_after = Some(readings);
        self
    }

    /// Has it count for [`Health::live`](super::Health::live) too: for what only a restart cures.
    ///
    /// ```
    /// # use resile::Health;
    /// # use resile::health::{Check, Signal};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let check = || Check::new("consumer", || Signal::bad("hangs"));
    /// let health = Health::builder().check(check()).build()?;
    /// assert_eq!((health.ready().ok, health.live().ok), (false, true));
    /// let health = Health::builder().check(check().for_liveness()).build()?;
    /// assert_eq!((health.ready().ok, health.live().ok), (false, false));
    /// # Ok(()) }
    /// ```
    pub fn for_liveness(mut self) -> Self {
        self.live = true;
        self
    }

    pub(super) fn rows(&self, general: Rows) -> Rows {
        Rows {
            bad_after: self.bad_after.unwrap_or(general.bad_after),
            good_after: self.good_after.unwrap_or(general.good_after),
        }
    }

    pub(super) fn read(&self) -> Signal {
        // What it broke is its own: the probe only looks at what it returns.
        catch_unwind(AssertUnwindSafe(&self.read)).unwrap_or_else(|_| Signal::bad("its signal panicked"))
    }

    /// What is wrong with its own settings.
    pub(super) fn faults(&self, general: Rows) -> Result<(), ConfigError> {
        let mut faults = Faults::of("");
        self.rows(general).check(&mut faults);
        if let Some((band, max_queue)) = &self.queue {
            let fine = 0.0 <= band.start && band.start <= band.end && 0.0 < band.end && band.end <= 1.0;
            faults.check(fine, "band", band, "shares between 0 and 1, the lower one first, the upper one above 0");
            faults.check(*max_queue > 0, "max_queue", max_queue, "1 or more: what has no queue has none that fills");
        }
        faults.into_result()
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check").field("name", &self.name).field("live", &self.live).finish_non_exhaustive()
    }
}

/// Something with a bounded queue: a [`Semaphore`], a [`Blocking`], a [`Compute`].
pub trait QueueSource: sealed::Sealed + Clone + Send + Sync + 'static {
    #[doc(hidden)]
    fn queue_name(&self) -> &str;
    #[doc(hidden)]
    fn now_queued(&self) -> u32;
    #[doc(hidden)]
    fn most_queued(&self) -> u32;
}

mod sealed {
    pub trait Sealed {}
}

/// All three spell it alike.
macro_rules! queue_sources {
    ($($source:ty),*) => {$(
        impl sealed::Sealed for $source {}

        impl QueueSource for $source {
            fn queue_name(&self) -> &str {
                self.name()
            }

            fn now_queued(&self) -> u32 {
                self.queued()
            }

            fn most_queued(&self) -> u32 {
                self.max_queue()
            }
        }
    )*};
}
queue_sources!(Semaphore, Blocking, Compute);
