//! [`CircuitBreaker`]: stops calling a peer that keeps failing, and finds out gently when it is back.
//!
//! ```text
//!              too many failures, or too many slow calls
//!   Closed ───────────────────────────────────────────────▶ Open ◀──────────┐
//!     ▲                                                       │ its period  │ too many probes failed,
//!     │                                                       ▼ is over     │ or did not come back
//!     └──────────────────────────────────────────────────  HalfOpen ────────┘
//!                       enough probes went well
//! ```
//!
//! ```
//! use std::time::Duration;
//! use resile::{CircuitBreaker, State};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let breaker = CircuitBreaker::builder()
//!     .failure_rate(0.5)
//!     .over(Duration::from_secs(30))
//!     .min_calls(4)
//!     .open_for(Duration::from_secs(5))
//!     .build()?;
//!
//! for _ in 0..4 {
//!     breaker.acquire().await?.failure();
//! }
//! assert_eq!(breaker.state(), State::Open);
//! assert!(breaker.acquire().await.unwrap_err().retry_after() <= Some(Duration::from_secs(5)));
//!
//! tokio::time::advance(Duration::from_secs(5)).await;
//! assert_eq!(breaker.state(), State::HalfOpen, "by the clock, without a call");
//! # Ok(()) }
//! ```
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`failure_rate`](BreakerBuilder::failure_rate) | 0.5 | half of the calls failing is an outage, a tenth is a bad day |
//! | [`over`](BreakerBuilder::over) | 10 s | long enough to hold the minimum, short enough to forget; see below |
//! | [`min_calls`](BreakerBuilder::min_calls) | 20 | a rate of fewer is noise |
//! | [`slow_calls`](BreakerBuilder::slow_calls) | none | what is slow is for you to say |
//! | [`consecutive_failures`](BreakerBuilder::consecutive_failures) | none | for peers with few calls |
//! | [`open_for`](BreakerBuilder::open_for) | 500 ms, doubling to 5 s | every second after the peer is back is an outage of the breaker's own; see below |
//! | [`open_jitter`](BreakerBuilder::open_jitter) | 0.1 | so that a fleet does not probe at once |
//! | [`probes`](BreakerBuilder::probes) | 3 | one lucky answer is no proof |
//! | [`half_open_for`](BreakerBuilder::half_open_for) | 60 s | probes that fail or don't come back in that time are an answer, too |
//! | [`probe_lease`](BreakerBuilder::probe_lease) | 30 s | a probe that hangs must not keep the others out |
//! | [`abandoned_after`](BreakerBuilder::abandoned_after) | the slow-call threshold, or 1 s | see below |
//!
//! # How it decides
//!
//! A verdict of [`Transient`](crate::Verdict::Transient) or [`Overloaded`](crate::Verdict::Overloaded) is a failure,
//! [`Success`](crate::Verdict::Success) and [`Permanent`](crate::Verdict::Permanent) are successes,
//! [`Ignored`](crate::Verdict::Ignored) is nothing. The rule is applied when a failure or a slow call is counted: with at
//! least `min_calls` in the window, a share of failures (or of slow calls) at or above the rate opens the circuit. A
//! quick success never does. Time windows are counted in 16 slices.
//!
//! Half-open admits `probes` calls and judges them by ratio, as soon as the rest can't change the verdict: failures by
//! `probe_failure_rate`, slow answers by the rate of `slow_calls`, where a slow answer that is good counts for that rate
//! only. If `half_open_for` passes first, a failed or unanswered probe opens the circuit again; if all answers so far were
//! good, it goes on, so that a peer with few calls closes after as many as it takes. Results of
//! calls that were let in under an earlier state move nothing. (A good call that is being counted in the very moment in
//! which the state changes may be counted in the next one.)
//!
//! An open circuit refuses with the time at which it will be half open. While all probes are on their way, nobody knows
//! when they will be answered; most likely after about the length of a call. The advice then is a quarter of the time that
//! the youngest has been out already, at least 10 ms, and at most the end of the first lease. (The lease alone would send
//! callers away for far too long: it is there for peers that hang.)
//!
//! # Choosing the times
//!
//! The defaults are for a service in between; two questions say what yours needs.
//!
//! *How soon must an outage be noticed?* After steady traffic it takes `failure_rate` times `over`, however many calls
//! there are: 5 s as it is. Failures that pass sooner don't open the circuit. About one to two whole-call timeouts is a
//! good window where those are short, as long as it holds `min_calls`.
//!
//! *How soon must its end be noticed?* Up to one open period later, and until then the breaker refuses calls that would
//! have gone well. A period that is longer than the callers' deadline also means that whoever was refused can't come back
//! in time ([`OnRefusal::Retry`](crate::OnRefusal::Retry)). Long periods buy little: a peer that is down sees `probes`
//! calls per period and client, which at the longest default is less than one a second. Callers with a short deadline and
//! much traffic are served well by a tenth of the deadline, without growth (`max_open_for` the same); a fleet of many
//! clients with few calls each wants longer periods, since together their probes are a load.
//!
//! # Cancellation
//!
//! A caller that gives up says little about the peer: a dropped call counts as nothing, and a dropped probe gives its
//! place back. But if every caller gives up on a peer that hangs, somebody should notice: an operation that had already
//! lasted `abandoned_after` when it was dropped counts as a failure.
//!
//! # Cost
//!
//! Closed, a call costs one load to enter. To leave, with a time window, it looks once more and adds to a word that only
//! its thread writes: no locked instruction. As many threads as there are cores, at most 16, own such words; all others
//! share one set of them, by compare-and-swap. A window of calls is one ring for all threads. No lock is taken until
//! something fails, nor while the circuit is open: a refusal is two loads. Memory: 384 bytes for each set of a time
//! window, one byte per call for a count.

mod builder;
mod keyed;
mod state;
mod tally;

#[cfg(all(test, resile_loom))]
mod loom;

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::call::Call;
use crate::error::{Name, Reason, Refusal, Time};
use crate::gate::{Entry, FastGate, Gate, Needs, Outcome, Pass, Times, by_reference};
use crate::guard::guarded;
use crate::internal::sync::{Acquire, AtomicU64, Mutex, Relaxed, Release};
use crate::internal::time::Moment;
use crate::verdict::Verdict;
pub use builder::BreakerBuilder;
use state::{Admission, Machine, No, UNCOUNTED};
use tally::{Counts, Sample, Tally};

/// Stops calling a peer that keeps failing; see the [module](self).
///
/// A cheap handle: clones share the state.
#[derive(Clone)]
pub struct CircuitBreaker(Arc<Shared>);

/// What a circuit breaker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// Calls go through and are counted.
    Closed,
    /// Calls are refused until its period is over.
    Open,
    /// A few calls go through to find out whether the peer is back.
    HalfOpen,
    /// Calls are refused until somebody says otherwise.
    ForcedOpen,
    /// Calls go through uncounted until somebody says otherwise.
    ForcedClosed,
}

/// What a closed circuit has counted in its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BreakerCounts {
    /// Calls that were judged.
    pub calls: u64,
    /// Those that failed.
    pub failures: u64,
    /// Those that were slow, failed or not.
    pub slow: u64,
    /// How many calls an observing breaker would have refused, since it was built.
    pub would_refuse: u64,
}

type Listener = Arc<dyn Fn(State, State) + Send + Sync>;

struct Shared {
    /// The state and its generation as one word, for the path that takes no lock. Written under the lock.
    word: AtomicU64,
    /// When an open circuit becomes half open, in nanoseconds. Written before the word that says it is open, so whoever has
    /// read that word finds this period or a later one.
    until: AtomicU64,
    /// The failures in a row.
    streak: AtomicU64,
    tally: Tally,
    rules: Rules,
    would_refuse: AtomicU64,
    locked: Mutex<Locked>,
    changed: Notify,
    listener: Option<Listener>,
    name: Name,
}

/// What the lock guards.
#[derive(Debug)]
struct Locked {
    machine: Machine,
    /// Changes that the listener has not been told, oldest first.
    untold: VecDeque<(State, State)>,
    /// A thread is telling them.
    telling: bool,
}

impl Locked {
    fn new(machine: Machine) -> Mutex<Self> {
        Mutex::new(Self { machine, untold: VecDeque::new(), telling: false })
    }
}

/// Whether so many of so many calls are at least this share. By division: a product of the share would be rounded up past
/// the count that it stands for (0.07 × 100 is more than 7).
fn reaches(count: u64, calls: u64, rate: f64) -> bool {
    count as f64 / calls as f64 >= rate
}

#[derive(Clone, Debug)]
struct Rules {
    failure_rate: Option<f64>,
    slow_rate: Option<f64>,
    /// In nanoseconds; the largest number if nothing is slow.
    slow_after: u64,
    min_calls: u64,
    consecutive: Option<u64>,
    abandoned_after: u64,
    /// The longest open period, in nanoseconds.
    max_open: u64,
    observe_only: bool,
}

/// The low bits of the word.
const CODE_BITS: u32 = 3;
const CLOSED: u64 = 0;
const OPEN: u64 = 1;
const FORCED_OPEN: u64 = 3;
const FORCED_CLOSED: u64 = 4;

fn word(state: State, generation: u64) -> u64 {
    let code = match state {
        State::Closed => CLOSED,
        State::Open => OPEN,
        State::HalfOpen => 2,
        State::ForcedOpen => FORCED_OPEN,
        State::ForcedClosed => FORCED_CLOSED,
    };
    generation << CODE_BITS | code
}

by_reference!(CircuitBreaker);
guarded!(CircuitBreaker, "passage");

impl CircuitBreaker {
    /// Begins a breaker. As it is it opens at half of at least 20 calls failing within 10 s.
    pub const fn builder() -> BreakerBuilder {
        BreakerBuilder::new()
    }

    /// What it is doing now. An open circuit becomes half open by the clock, without a call.
    #[must_use]
    pub fn state(&self) -> State {
        self.change(|machine| {
            machine.tick(Moment::now());
            machine.state()
        })
    }

    /// What it has counted in its window, for tests and health pages.
    ///
    /// ```
    /// # use resile::CircuitBreaker;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().build()?;
    /// breaker.try_acquire()?.success();
    /// breaker.try_acquire()?.failure();
    /// breaker.try_acquire()?.ignore();
    /// let counts = breaker.counts();
    /// assert_eq!((counts.calls, counts.failures), (2, 1), "what is ignored is not counted");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn counts(&self) -> BreakerCounts {
        let Counts { calls, failures, slow } = self.0.tally.counts(Moment::now());
        BreakerCounts { calls, failures, slow, would_refuse: self.0.would_refuse.load(Relaxed) }
    }

    /// Refuses everything until [`reset`](CircuitBreaker::reset) or [`force_closed`](CircuitBreaker::force_closed).
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{CircuitBreaker, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().build()?;
    /// breaker.force_open();
    /// tokio::time::advance(Duration::from_secs(24 * 3600)).await;
    /// let refusal = breaker.try_acquire().unwrap_err();
    /// assert_eq!((refusal.reason(), refusal.retry_after()), (Reason::ForcedOpen, None));
    /// breaker.reset();
    /// breaker.try_acquire()?.success();
    /// # Ok(()) }
    /// ```
    pub fn force_open(&self) {
        self.change(|machine| machine.force(true));
    }

    /// Lets everything through uncounted until [`reset`](CircuitBreaker::reset) or
    /// [`force_open`](CircuitBreaker::force_open).
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).build()?;
    /// breaker.force_closed();
    /// breaker.try_acquire()?.failure();
    /// assert_eq!(breaker.state(), State::ForcedClosed);
    /// assert_eq!(breaker.counts().calls, 0);
    /// # Ok(()) }
    /// ```
    pub fn force_closed(&self) {
        self.change(|machine| machine.force(false));
    }

    /// Closes it and forgets everything. Calls that are on their way don't count any more.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// let breaker = CircuitBreaker::builder().build()?;
    /// breaker.force_open();
    /// assert_eq!(breaker.state(), State::ForcedOpen);
    /// breaker.reset();
    /// assert_eq!(breaker.state(), State::Closed);
    /// # Ok::<(), resile::ConfigError>(())
    /// ```
    pub fn reset(&self) {
        self.change(Machine::reset);
    }

    /// Waits until it is in this state, which may be now; also for those changes that come by the clock alone.
    ///
    /// A state that comes and goes before the task is run may be missed.
    ///
    /// # Cancel safety
    ///
    /// Loses nothing.
    ///
    /// ```
    /// # use resile::{CircuitBreaker, State};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let breaker = CircuitBreaker::builder().consecutive_failures(1).build()?;
    /// breaker.acquire().await?.failure();
    /// breaker.wait_for(State::HalfOpen).await;
    /// # Ok(()) }
    /// ```
    pub async fn wait_for(&self, state: State) {
        loop {
            // It hears of what changes from here on.
            let changed = self.0.changed.notified();
            if self.state() == state {
                return;
            }
            let due = self.0.locked.lock().machine.due();
            match due.to_instant() {
                Some(at) if due < Moment::NEVER => _ = tokio::time::timeout_at(at, changed).await,
                _ => changed.await,
            }
        }
    }

    /// How long it stays open the first time, for `lint`.
    pub(crate) fn open_for(&self) -> Duration {
        Duration::from_nanos(self.0.locked.lock().machine.open_for())
    }

    /// Changes the machine under the lock, then tells the word, and after the lock is released the world.
    fn change<R>(&self, change: impl FnOnce(&mut Machine) -> R) -> R {
        let mut locked = self.0.locked.lock();
        let Locked { machine, untold, telling } = &mut *locked;
        let (generation, due) = (machine.generation(), machine.due());
        let result = change(machine);
        let changes = machine.take_changes();
        if machine.generation() != generation && machine.state() == State::Closed {
            // Before anybody can count in the new generation.
            self.0.tally.clear();
            self.0.streak.store(0, Relaxed);
        }
        let moved = machine.generation() != generation || machine.due() != due;
        if moved {
            self.0.until.store(machine.due().nanos(), Relaxed);
            self.0.word.store(word(machine.state(), machine.generation()), Release);
        }
        let mut tells = false;
        if self.0.listener.is_some() && !changes.is_empty() {
            untold.extend(changes);
            tells = !std::mem::replace(telling, true);
        }
        drop(locked);
        if moved {
            self.0.changed.notify_waiters();
        }
        if tells {
            self.tell();
        }
        result
    }

    /// Tells the listener what it has not been told, in order, also what other threads add meanwhile: they leave it to
    /// this one. No lock is held while the listener runs. If it panics, the rest is told all the same, and the first panic
    /// goes on.
    #[cold]
    fn tell(&self) {
        let Some(listener) = &self.0.listener else { return };
        let mut panic = None;
        loop {
            let mut locked = self.0.locked.lock();
            let Some((from, to)) = locked.untold.pop_front() else {
                locked.telling = false;
                break;
            };
            drop(locked);
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| listener(from, to))) {
                panic.get_or_insert(payload);
            }
        }
        if let Some(payload) = panic {
            // A second panic while one unwinds would abort.
            if !std::thread::panicking() {
                resume_unwind(payload);
            }
        }
    }

    #[inline]
    fn enter_closed(&self) -> Option<Pass> {
        let word = self.0.word.load(Acquire);
        (word & ((1 << CODE_BITS) - 1) == CLOSED).then(|| Pass::new(word >> CODE_BITS, 0))
    }

    /// What a circuit that is not closed says without its lock, if it can: refusing is what it is asked most in an outage.
    ///
    /// A period that is over, or that a clock from further ahead has set, is for the lock to decide.
    fn decide_unlocked(&self, now: Moment) -> Option<Result<Admission, No>> {
        let word = self.0.word.load(Acquire);
        Some(match word & ((1 << CODE_BITS) - 1) {
            OPEN => {
                let at = Moment::from_nanos(self.0.until.load(Relaxed));
                let left = at.nanos_since(now);
                (1..=self.0.rules.max_open).contains(&left).then_some(Err(No { reason: Reason::CircuitOpen, at }))?
            }
            FORCED_OPEN => Err(No { reason: Reason::ForcedOpen, at: Moment::NEVER }),
            FORCED_CLOSED => Ok(UNCOUNTED),
            _ => return None,
        })
    }

    /// The same by the machine. If the clock has changed the state, a listener is told before the call is let in: should
    /// it panic, no probe's place is lost.
    fn decide(&self, now: Moment) -> Result<Admission, No> {
        let decided = self.change(|machine| {
            machine.tick(now);
            (!machine.has_changes()).then(|| machine.admit(now))
        });
        decided.unwrap_or_else(|| self.change(|machine| machine.admit(now)))
    }

    #[cold]
    fn enter_unclosed(&self, now: Moment) -> Entry {
        match self.decide_unlocked(now).unwrap_or_else(|| self.decide(now)) {
            Ok(Admission { generation, probe }) => Entry::Pass(Pass::new(generation, probe)),
            Err(_) if self.0.rules.observe_only => {
                self.0.would_refuse.fetch_add(1, Relaxed);
                Entry::Pass(Pass::new(UNCOUNTED.generation, UNCOUNTED.probe))
            }
            Err(no) => Entry::Refused(self.refusal(no, now)),
        }
    }

    fn refusal(&self, no: No, now: Moment) -> Refusal {
        let refusal = Refusal::by(self.0.name.clone(), no.reason);
        if no.at == Moment::NEVER { refusal } else { refusal.after(no.at.since(now)) }
    }

    /// What an outcome says about the peer, if anything.
    #[cold]
    fn sample(&self, outcome: &Outcome) -> Option<(Sample, Moment)> {
        let rules = &self.0.rules;
        match *outcome {
            Outcome::NotStarted => None,
            Outcome::Judged(verdict, times) => {
                let good = verdict.is_healthy();
                if !good && !verdict.is_failure() {
                    return None;
                }
                Some((Sample { good, slow: times.ended.nanos_since(times.started) >= rules.slow_after }, times.ended))
            }
            Outcome::Abandoned(times) => {
                let lasted = times.ended.nanos_since(times.started);
                let slow = lasted >= rules.slow_after;
                (lasted >= rules.abandoned_after).then_some((Sample { good: false, slow }, times.ended))
            }
        }
    }

    /// Counts a failure or a slow call, and opens if that was one too many: one step under the lock, so that of two who
    /// cross a threshold together one sees it, and none counts in a generation that is not its own.
    #[cold]
    fn judge(&self, generation: u64, sample: Sample, now: Moment) {
        let Shared { rules, tally, streak, .. } = &*self.0;
        self.change(|machine| {
            if machine.generation() != generation {
                return;
            }
            tally.add(sample, now);
            let streak = if sample.good { 0 } else { streak.load(Relaxed) + 1 };
            self.0.streak.store(streak, Relaxed);
            let counts = tally.counts(now);
            let share = |count, rate: Option<f64>| rate.is_some_and(|rate| reaches(count, counts.calls, rate));
            let enough = counts.calls >= rules.min_calls;
            let bad = enough && (share(counts.failures, rules.failure_rate) || share(counts.slow, rules.slow_rate));
            if bad || rules.consecutive.is_some_and(|limit| streak >= limit) {
                machine.trip(generation, now);
            }
        });
    }

    /// What almost all calls end in, apart from the rest: the peer is well.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "measured: a sixth of what counting a call costs")]
    fn record_success(&self, generation: u64, probe: u64, times: Times) {
        let quick = times.ended.nanos_since(times.started) < self.0.rules.slow_after;
        if probe != 0 || !quick {
            return self.record(generation, probe, &Outcome::Judged(Verdict::Success, times));
        }
        if self.0.word.load(Acquire) == generation << CODE_BITS | CLOSED {
            self.0.tally.add_good(times.ended);
            if self.0.streak.load(Relaxed) > 0 {
                self.0.streak.store(0, Relaxed);
            }
        }
    }

    #[cold]
    fn record(&self, generation: u64, probe: u64, outcome: &Outcome) {
        if probe != 0 {
            return self.leave_unclosed(Admission { generation, probe }, outcome);
        }
        if self.0.word.load(Acquire) == generation << CODE_BITS | CLOSED {
            if let Some((sample, now)) = self.sample(outcome) {
                self.judge(generation, sample, now);
            }
        }
    }

    #[cold]
    fn leave_unclosed(&self, admission: Admission, outcome: &Outcome) {
        let sample = self.sample(outcome);
        let now = sample.map_or_else(Moment::now, |(_, now)| now);
        self.change(|machine| machine.report(admission, sample.map(|(sample, _)| sample), now));
    }
}

impl FastGate for CircuitBreaker {
    const REVALIDATES: bool = true;

    #[inline]
    fn enter_now(&self, _: u32, _: Moment) -> Option<Pass> {
        self.enter_closed()
    }

    #[inline]
    fn leave_well(&self, pass: Pass, _: Verdict, times: Times) {
        let [generation, probe] = pass.words();
        self.record_success(generation, probe, times);
    }

    #[inline]
    fn leave_as(&self, pass: Pass, outcome: &Outcome) {
        let [generation, probe] = pass.words();
        match *outcome {
            Outcome::Judged(Verdict::Success | Verdict::Permanent, times) => {
                self.record_success(generation, probe, times);
            }
            _ => self.record(generation, probe, outcome),
        }
    }
}

impl Gate for CircuitBreaker {
    #[inline]
    fn enter(&self, call: &Call) -> Entry {
        match self.enter_closed() {
            Some(pass) => Entry::Pass(pass),
            None => self.enter_unclosed(call.now()),
        }
    }

    #[inline]
    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.leave_as(pass, &outcome);
    }

    fn still(&self, pass: &Pass, call: &Call) -> Result<(), Refusal> {
        let [generation, _] = pass.words();
        let word = self.0.word.load(Acquire);
        if word >> CODE_BITS == generation || word & ((1 << CODE_BITS) - 1) == CLOSED || self.0.rules.observe_only {
            return Ok(());
        }
        // Nobody passes from a queue into a peer whose circuit has opened meanwhile.
        let now = call.now();
        match self.decide_unlocked(now) {
            Some(Err(no)) => return Err(self.refusal(no, now)),
            Some(Ok(_)) => return Ok(()),
            None => {}
        }
        let (state, no) = self.change(|machine| {
            machine.tick(now);
            (machine.state(), machine.no(now))
        });
        match state {
            State::Closed | State::ForcedClosed => Ok(()),
            State::Open | State::HalfOpen | State::ForcedOpen => Err(self.refusal(no, now)),
        }
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        self.look_at(call.now())
    }

    fn needs(&self) -> Needs {
        if self.0.rules.slow_rate.is_some() { Needs::Elapsed } else { Needs::Now }
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for CircuitBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CircuitBreaker")
            .field("name", &self.0.name)
            .field("state", &self.0.locked.lock().machine.state())
            .field("counts", &self.counts())
            .field("rules", &self.0.rules)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for CircuitBreaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rules { failure_rate, slow_rate, slow_after, min_calls, consecutive, .. } = &self.0.rules;
        f.write_str(self.0.name.as_str())?;
        let percent = |rate: &f64| format!("{} %", (rate * 1000.0).round() / 10.0);
        let window = |f: &mut fmt::Formatter<'_>| match &self.0.tally {
            Tally::Time(window) => write!(f, "of {min_calls} in {}", Time(window.length())),
            tally => write!(f, "of the last {}", tally.places()),
        };
        let mut rules = 0;
        if let Some(failures) = consecutive {
            write!(f, " {failures} in a row")?;
            rules += 1;
        }
        if let Some(rate) = failure_rate {
            write!(f, "{} {} ", if rules > 0 { " or" } else { "" }, percent(rate))?;
            window(f)?;
            rules += 1;
        }
        if let Some(rate) = slow_rate {
            let slow = Time(Duration::from_nanos(*slow_after));
            write!(f, "{} {} above {slow} ", if rules > 0 { " or" } else { "" }, percent(rate))?;
            window(f)?;
        }
        Ok(())
    }
}
