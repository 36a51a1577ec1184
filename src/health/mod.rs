//! [`Health`]: whether the process is alive and wants traffic, read from what really happens in it.
//!
//! A health page that always says yes is no help, and one that asks the database on each request takes the whole fleet
//! away when the database is slow. Two questions are asked of a process, and they want different answers:
//!
//! * *Is it alive?* A no has it restarted. Only what a restart would cure may count: a runtime that is stuck.
//! * *Is it ready?* A no takes traffic away for a while. What counts is whether a call would fare better elsewhere: an
//!   event loop that lags, a peer behind an open circuit, a queue that is nearly full, a shutdown that has begun.
//!
//! ```
//! use std::time::Duration;
//! use resile::health::{Check, Signal};
//! use resile::{CircuitBreaker, Health, Semaphore};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let draining = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
//! let users = CircuitBreaker::builder().named("users").build()?;
//! let db = Semaphore::permits(16).max_queue(64).named("db").build()?;
//!
//! let health = Health::builder()
//!     .critical(&users)
//!     .check(Check::queue(&db, 0.5..0.9))
//!     .signal("shutdown", move || match draining.load(std::sync::atomic::Ordering::Relaxed) {
//!         false => Signal::Good,
//!         true => Signal::bad("it has begun"),
//!     })
//!     .build()?;
//! assert!(health.live().ok);
//! assert!(health.ready().ok);
//!
//! users.force_open();
//! tokio::time::sleep(Duration::from_secs(1)).await;
//! let report = health.ready();
//! assert!(!report.ok);
//! assert_eq!(report.reasons[0].signal, "users");
//! assert!(health.live().ok, "a restart would not help the peer");
//! # Ok(()) }
//! ```
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`every`](HealthBuilder::every) | 500 ms | well within the seconds in which orchestrators ask |
//! | [`bad_after`](HealthBuilder::bad_after) | 3 readings | 1.5 s: a bad second is no reason to shift traffic |
//! | [`good_after`](HealthBuilder::good_after) | 6 readings | 3 s: slower back than away, so that nothing flaps |
//! | [`lag`](HealthBuilder::lag) | 100 ms | people notice it, and every timeout in the process is off by as much |
//! | [`stuck`](HealthBuilder::stuck) | 10 s | far beyond any load; a restart loses what is in flight |
//! | rows of a [critical](HealthBuilder::critical) breaker | 1 and 1 | a breaker has a patience of its own |
//!
//! # How it decides
//!
//! A probe task wakes every so often, sees how late it is, and reads all signals. Each signal is good, bad or
//! [unclear](Signal::Unclear); so many bad readings in a row flip it to bad, so many good ones flip it back, and an unclear
//! one ends either row. The first reading, in `build()`, sets the state at once.
//!
//! *Lag* is how late the probe's timer comes to its turn: bad from the limit on, good below half of it. A stall counts as
//! as many readings as it has swallowed, and it is seen from other threads while it lasts: a reading of the health finds
//! that the probe is overdue. A stall as long as `stuck` means that the process is not alive, at once, and for as long as it
//! lasts: a process that was frozen and goes on is alive again with its next beat.
//!
//! *A signal* that takes as long as that to be read is bad itself ([`Symptom::Slow`]), and no lag of the event loop.
//!
//! *A breaker* is bad while it is open or held open. Half open is good: a breaker gets well by calls that are let through
//! as probes, so a process that stayed away from traffic until the breaker is closed would stay away for ever.
//!
//! *A queue* is bad from the upper share of its bound on, and good below the lower one.
//!
//! What makes the process not alive makes it not ready too.
//!
//! # Which to mark critical
//!
//! A breaker whose peer all instances share opens in all of them at once, and then no instance is ready and nobody
//! serves even what needs no such peer. Mark a breaker as critical if other instances can fare better (a sidecar, a
//! shard, a zone), or if without this peer there is nothing to serve.
//!
//! # Cancellation
//!
//! The probe's task ends when the last handle is dropped, or with its runtime; a runtime that is gone is not alive.
//!
//! # Cost
//!
//! A reading takes a lock for as long as it takes to copy the reasons, about 0.1 µs if there are none, and runs no code
//! of yours. Signals are read by the probe's task, with no lock held: they must not block. One that panics is bad, and
//! says so.
//!
//! # Not for
//!
//! Deciding about a single call: that is what gates are for. A thread that hangs in one worker of many is not seen as lag
//! as long as the others serve the probe.

mod check;
mod report;
mod track;

use std::borrow::Cow;
use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use crate::breaker::CircuitBreaker;
use crate::error::{ConfigError, Faults};
use crate::internal::time::{Moment, Timer};
use track::{Bad, Lag, Pulse, Rows, Track, judge};

pub use check::{Check, QueueSource};
pub use report::{HealthReason, HealthReport, Signal, Symptom};

const DEFAULT_EVERY: Duration = Duration::from_millis(500);
const DEFAULT_BAD_AFTER: u32 = 3;
const DEFAULT_GOOD_AFTER: u32 = 6;
const DEFAULT_LAG: Duration = Duration::from_millis(100);
const DEFAULT_STUCK: Duration = Duration::from_secs(10);
/// Twice tokio's lateness, halved where it turns good again.
const SHORTEST_LAG: Duration = Duration::from_millis(5);
const SHORTEST_EVERY: Duration = Duration::from_millis(1);
const LONGEST_EVERY: Duration = Duration::from_secs(3600);
/// The signal that is always there.
const LOOP: &str = "event loop";

/// Answers whether the process is alive and ready; see the [module](self).
///
/// A cheap handle: clones share the probe.
#[derive(Clone)]
pub struct Health(Arc<Owner>);

/// Ends the probe when the last handle goes.
struct Owner {
    shared: Arc<Shared>,
    probe: AbortHandle,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.probe.abort();
    }
}

struct Shared {
    checks: Vec<Check>,
    lag: Duration,
    stuck: Duration,
    state: Mutex<Sampled>,
}

struct Sampled {
    pulse: Pulse,
    lag: Track,
    /// One for each check.
    tracks: Vec<Track>,
    /// The check that is being read, and since when: what is overdue meanwhile is its doing.
    reading: Option<(usize, Moment)>,
}

/// Settings of a [`Health`].
#[derive(Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct HealthBuilder {
    checks: Vec<Check>,
    every: Duration,
    rows: Rows,
    lag: Duration,
    stuck: Duration,
}

impl HealthBuilder {
    /// Has a signal of your own count: it is read in `build()` and then by the probe. The name is for people, and no two
    /// may have the same.
    pub fn signal(self, name: impl Into<Cow<'static, str>>, read: impl Fn() -> Signal + Send + Sync + 'static) -> Self {
        self.check(Check::new(name, read))
    }

    /// Has an open circuit count: not ready while it is open; see the [module](self) for which to take.
    pub fn critical(self, breaker: &CircuitBreaker) -> Self {
        self.check(Check::breaker(breaker))
    }

    /// Has a check count, with what was said about it.
    pub fn check(mut self, check: Check) -> Self {
        self.checks.push(check);
        self
    }

    /// How often the probe wakes: 500 ms by default, 1 ms to an hour.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::{AtomicBool, Ordering};
    /// # use std::time::Duration;
    /// # use resile::Health;
    /// # use resile::health::Signal;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let full = Arc::new(AtomicBool::new(false));
    /// let disk = full.clone();
    /// let health = Health::builder()
    ///     .signal("disk", move || if disk.load(Ordering::Relaxed) { Signal::bad("full") } else { Signal::Good })
    ///     .every(Duration::from_millis(100))
    ///     .bad_after(1)
    ///     .build()?;
    /// full.store(true, Ordering::Relaxed);
    /// assert!(health.ready().ok, "not read since");
    /// tokio::time::sleep(Duration::from_millis(110)).await;
    /// assert!(!health.ready().ok);
    /// # Ok(()) }
    /// ```
    pub const fn every(mut self, period: Duration) -> Self {
        self.every = period;
        self
    }

    /// How many bad readings in a row flip a signal: 3 by default, at most 1,000.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::{AtomicBool, Ordering};
    /// # use std::time::Duration;
    /// # use resile::Health;
    /// # use resile::health::Signal;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let full = Arc::new(AtomicBool::new(false));
    /// # let disk = full.clone();
    /// # let read = move || if disk.load(Ordering::Relaxed) { Signal::bad("full") } else { Signal::Good };
    /// let health = Health::builder().signal("disk", read).bad_after(2).build()?;
    /// full.store(true, Ordering::Relaxed);             // from here on the signal is bad
    /// tokio::time::sleep(Duration::from_millis(600)).await;
    /// assert!(health.ready().ok, "one reading");
    /// tokio::time::sleep(Duration::from_millis(500)).await;
    /// assert!(!health.ready().ok, "two in a row");
    /// # Ok(()) }
    /// ```
    pub const fn bad_after(mut self, readings: u32) -> Self {
        self.rows.bad_after = readings;
        self
    }

    /// How many good readings in a row flip it back: 6 by default, at most 1,000.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use std::sync::atomic::{AtomicBool, Ordering};
    /// # use std::time::Duration;
    /// # use resile::Health;
    /// # use resile::health::Signal;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let full = Arc::new(AtomicBool::new(true));
    /// # let disk = full.clone();
    /// # let read = move || if disk.load(Ordering::Relaxed) { Signal::bad("full") } else { Signal::Good };
    /// let health = Health::builder().signal("disk", read).good_after(2).build()?;
    /// assert!(!health.ready().ok, "the first reading sets the state");
    /// full.store(false, Ordering::Relaxed);            // from here on the signal is good
    /// tokio::time::sleep(Duration::from_millis(600)).await;
    /// assert!(!health.ready().ok, "one reading");
    /// tokio::time::sleep(Duration::from_millis(500)).await;
    /// assert!(health.ready().ok, "two in a row");
    /// # Ok(()) }
    /// ```
    pub const fn good_after(mut self, readings: u32) -> Self {
        self.rows.good_after = readings;
        self
    }

    /// The lag of the event loop from which on the process is not ready: 100 ms by default, at least 5 ms.
    /// [`Duration::MAX`] turns it off.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Health;
    /// # use resile::health::Symptom;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let health = Health::builder().lag(Duration::from_millis(50)).bad_after(1).build()?;
    /// tokio::time::advance(Duration::from_millis(580)).await;      // the probe was due after 500
    /// let report = health.ready();
    /// assert_eq!(report.reasons[0].signal, "event loop");
    /// assert!(matches!(report.reasons[0].symptom, Symptom::Lagging { lag, .. } if lag == Duration::from_millis(80)));
    /// assert!(health.live().ok);
    /// # Ok(()) }
    /// ```
    pub const fn lag(mut self, limit: Duration) -> Self {
        self.lag = limit;
        self
    }

    /// The lag from which on the process is not alive: 10 s by default, at least 5 ms. [`Duration::MAX`] turns it off.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::Health;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let health = Health::builder().stuck(Duration::from_secs(5)).build()?;
    /// assert!(health.live().ok);
    /// tokio::time::advance(Duration::from_secs(6)).await;          // nothing else ran meanwhile
    /// assert!(!health.live().ok);
    /// # Ok(()) }
    /// ```
    pub const fn stuck(mut self, limit: Duration) -> Self {
        self.stuck = limit;
        self
    }

    /// Reads all signals once and starts the probe on the runtime that this is called in.
    ///
    /// # Errors
    ///
    /// A setting outside of its range, a name that is there twice, a queue that has no places, or no tokio runtime. A
    /// runtime whose timer is not enabled is not noticed here: its probe cannot run, and it will count as stuck.
    pub fn build(self) -> Result<Health, ConfigError> {
        let mut faults = Faults::of("health");
        let (every, rows) = (self.every, self.rows);
        faults.check((SHORTEST_EVERY..=LONGEST_EVERY).contains(&every), "every", &every, "1ms to 3600s");
        rows.check(&mut faults);
        faults.check(self.lag >= SHORTEST_LAG, "lag", &self.lag, "5ms or more");
        faults.check(self.stuck >= SHORTEST_LAG, "stuck", &self.stuck, "5ms or more");
        for (place, check) in self.checks.iter().enumerate() {
            let taken = check.name == LOOP || self.checks[..place].iter().any(|other| other.name == check.name);
            faults.check(!taken, "name", &check.name, "one that no other signal has");
            if let Err(part) = check.faults(rows) {
                faults.absorb(|own, _| format!("{own}: {}", check.name), part);
            }
        }
        let runtime = Handle::try_current();
        faults.check(runtime.is_ok(), "runtime", &format_args!("none"), "a tokio runtime, in which to build it");
        faults.into_result()?;

        let now = Moment::now();
        let quiet = Track::new(rows, Signal::Good, now);
        let tracks = self.checks.iter().map(|check| Track::new(check.rows(rows), check.read(), now)).collect();
        let state = Sampled { pulse: Pulse::new(every, now), lag: quiet, tracks, reading: None };
        let shared = Shared { checks: self.checks, lag: self.lag, stuck: self.stuck, state: Mutex::new(state) };
        let shared = Arc::new(shared);
        let Ok(runtime) = runtime else { unreachable!("it was a fault to have none") };
        let probe = runtime.spawn(probe(shared.clone())).abort_handle();
        Ok(Health(Arc::new(Owner { shared, probe })))
    }
}

impl Health {
    /// Begins with the event loop as the only signal.
    pub const fn builder() -> HealthBuilder {
        HealthBuilder {
            checks: Vec::new(),
            every: DEFAULT_EVERY,
            rows: Rows { bad_after: DEFAULT_BAD_AFTER, good_after: DEFAULT_GOOD_AFTER },
            lag: DEFAULT_LAG,
            stuck: DEFAULT_STUCK,
        }
    }

    /// Whether the process is alive: if not, a restart may help.
    #[must_use]
    pub fn live(&self) -> HealthReport {
        self.report(true)
    }

    /// Whether the process wants traffic: if not, calls would fare better elsewhere for now.
    #[must_use]
    pub fn ready(&self) -> HealthReport {
        self.report(false)
    }

    fn report(&self, live_only: bool) -> HealthReport {
        let shared = &*self.0.shared;
        let now = Moment::now();
        let state = shared.state.lock();
        let mut bad: Vec<(Cow<'static, str>, Bad)> = Vec::new();
        if let Some((check, since)) = state.reading {
            let (took, limit) = (now.since(since), if live_only { shared.stuck } else { shared.lag });
            if took >= limit {
                let symptom = Symptom::Slow { took, limit };
                bad.push((shared.checks[check].name.clone(), Bad { since, symptom }));
            }
        }
        let lag = if state.reading.is_some() { Lag::NONE } else { state.pulse.lag(now) };
        // A beat that came clears it: whoever is stuck is so now.
        let stuck = match judge(lag.late, shared.stuck) {
            Signal::Bad(symptom) => Some(Bad { since: lag.due, symptom }),
            _ => None,
        };
        let lagging = if live_only { None } else { as_of(&state.lag, lag, shared.lag) };
        // Stuck is the worse of the two, and lagging tells nothing beside it.
        bad.extend(stuck.or(lagging).map(|bad| (LOOP.into(), bad)));
        for (check, track) in shared.checks.iter().zip(&state.tracks) {
            let is_told = bad.iter().any(|(name, _)| *name == check.name);
            if !is_told && (check.live || !live_only) {
                bad.extend(track.bad().map(|bad| (check.name.clone(), bad.clone())));
            }
        }
        drop(state);
        let reason = |(signal, Bad { since, symptom })| HealthReason { signal, symptom, lasting: now.since(since) };
        HealthReport { ok: bad.is_empty(), reasons: bad.into_iter().map(reason).collect() }
    }
}

/// A lag's state, with the beat that is overdue now taken into account. One that is not late yet says nothing.
fn as_of(track: &Track, lag: Lag, limit: Duration) -> Option<Bad> {
    let signal = judge(lag.late, limit);
    if !matches!(signal, Signal::Bad(_)) {
        return track.bad().cloned();
    }
    let mut track = track.clone();
    track.read(signal, lag.weight, lag.due);
    track.bad().cloned()
}

/// The probe: wakes, sees how late it is, and reads the signals.
async fn probe(shared: Arc<Shared>) {
    let mut timer = pin!(Timer::idle());
    let mut due = shared.state.lock().pulse.due();
    loop {
        poll_fn(|cx| timer.as_mut().poll_until(due, cx)).await;
        due = shared.sample();
    }
}

impl Shared {
    /// Takes a reading of everything: when the next one is due.
    fn sample(&self) -> Moment {
        let mut now = Moment::now();
        // First of all, so that the time which signals take is no lag of the loop.
        {
            let mut state = self.state.lock();
            let lag = state.pulse.beat(now);
            state.lag.read(judge(lag.late, self.lag), lag.weight, lag.due);
        }
        for (place, check) in self.checks.iter().enumerate() {
            let since = now;
            self.state.lock().reading = Some((place, since));
            let signal = check.read();
            now = Moment::now();
            let (took, limit) = (now.since(since), self.lag);
            let signal = if took >= limit { Signal::Bad(Symptom::Slow { took, limit }) } else { signal };
            let mut state = self.state.lock();
            state.tracks[place].read(signal, 1, since);
            state.reading = None;
        }
        let mut state = self.state.lock();
        state.pulse.resume(now);
        state.pulse.due()
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").field("ready", &self.ready()).finish_non_exhaustive()
    }
}
