//! The token bucket around its arithmetic: one word that callers change, and the queue of those who wait.

mod keyed;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use super::pace::{Pace, Rate, Take};
use crate::call::Call;
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Entry, Gate, IntoGate, Needs, Outcome, Pass, Ticket};
use crate::guard::guarded;
use crate::internal::queue::{DEFAULT_MAX_QUEUE, Key, LONGEST_QUEUE, Queue, Status};
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Mutex, MutexGuard, Relaxed, Release};
use crate::internal::time::{Moment, nanos};

/// Somebody waits: newcomers go to the queue. Set and cleared under its lock.
const WAITERS: u64 = 1 << 62;
/// The rate is being changed: everybody goes to the lock. Set and cleared under it.
const BUSY: u64 = 1 << 63;
const STATE: u64 = WAITERS - 1;
/// The default burst is what comes in this part of a second.
const BURSTS_PER_SECOND: u64 = 10;

/// So many calls per second, with a burst: a fair queue of those who wait, no more than the rate in the long run.
///
/// In no interval of length `t` do more than `burst + ceil(rate × t)` tokens go out, and in the long run the rate is
/// exact, whatever fraction of a nanosecond lies between two tokens.
///
/// A call takes as many tokens as it costs. If they are there and nobody waits, it has them. Otherwise its place in the
/// queue tells when it would be served: if that is past its deadline or `max_wait`, it is refused at once and told when
/// to come back; else it waits in order. Tokens are taken when they are due, so leaving the queue costs nothing. A call
/// that never reached its operation puts its tokens back if nobody has taken any since.
///
/// | setting | default | why |
/// | --- | --- | --- |
/// | [`burst`](TokenBucketBuilder::burst) | a tenth of a second's tokens, at least 1 | smooths over timers, is no flood |
/// | [`max_wait`](TokenBucketBuilder::max_wait) | none | a deadline of the policy does it better |
/// | [`max_queue`](TokenBucketBuilder::max_queue) | 16,384 | a bound of memory |
///
/// tokio's timers have a grain of a millisecond, so at more than a thousand tokens a second a burst of 1 cannot be used
/// to the full: give a burst of several milliseconds.
///
/// A cheap handle: clones share the tokens. Cost: with tokens there, one compare-and-swap and a multiplication; waiting
/// takes a mutex, and a timer for the head of the queue only.
///
/// ```
/// use std::time::Duration;
/// use resile::TokenBucket;
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
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct TokenBucket(Arc<Shared>);

struct Shared {
    /// Up to when the tokens are spoken for, and the two flags.
    word: AtomicU64,
    /// The pace, in two words that change only while `BUSY` is set: who reads them between reading the word and
    /// swapping it has read them whole, or fails to swap.
    multiplier: AtomicU64,
    shape: AtomicU64,
    queue: Mutex<Queue>,
    max_queue: u32,
    /// In nanoseconds; the largest number for no limit.
    max_wait: u64,
    name: Name,
}

/// Settings of a [`TokenBucket`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct TokenBucketBuilder {
    rate: Rate,
    burst: Option<u32>,
    max_queue: u32,
    max_wait: Option<Duration>,
    name: Name,
}

impl TokenBucketBuilder {
    /// How many tokens a full bucket holds, at least 1: a tenth of a second's unless said.
    pub const fn burst(mut self, tokens: u32) -> Self {
        self.burst = Some(tokens);
        self
    }

    /// How many may wait: 16,384 unless said, at most 16,777,216. With 0 nobody waits.
    pub const fn max_queue(mut self, waiters: u32) -> Self {
        self.max_queue = waiters;
        self
    }

    /// How long one may wait: who would wait longer is refused at once. No limit unless said.
    pub const fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = Some(wait);
        self
    }

    /// The name that refusals carry: `bucket` unless said.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// The bucket, full.
    ///
    /// # Errors
    ///
    /// A rate of 0, above 10^9 per second, or with a period above 366 days; a burst of 0, or one that would take more
    /// than about nine years to fill; a queue above 16,777,216.
    pub fn build(self) -> Result<TokenBucket, ConfigError> {
        let burst = self.burst.unwrap_or_else(|| default_burst(self.rate));
        let mut faults = Faults::of("bucket");
        let pace = check(&mut faults, self.rate, burst);
        faults.check(self.max_queue <= LONGEST_QUEUE, "max_queue", &self.max_queue, "0 to 16777216");
        faults.into_result()?;
        Ok(TokenBucket(Arc::new(Shared {
            word: AtomicU64::new(0),
            multiplier: AtomicU64::new(pace.multiplier),
            shape: AtomicU64::new(shape(pace)),
            queue: Mutex::new(Queue::new()),
            max_queue: self.max_queue,
            max_wait: self.max_wait.map_or(u64::MAX, nanos),
            name: self.name,
        })))
    }
}

fn default_burst(rate: Rate) -> u32 {
    let per_second = u128::from(rate.count) * 1_000_000_000 / u128::from(rate.period.max(1));
    u32::try_from(per_second / u128::from(BURSTS_PER_SECOND)).unwrap_or(u32::MAX).max(1)
}

/// Checks a rate and a burst. The pace is to be used only if there were no faults.
fn check(faults: &mut Faults, rate: Rate, burst: u32) -> Pace {
    const NONE: Pace = Pace { multiplier: 1, bits: 0, burst: 1 };
    let year = Duration::from_secs(366 * 86_400);
    let period = Duration::from_nanos(rate.period);
    let fine = rate.count >= 1 && rate.count <= rate.period && period <= year;
    faults.check(
        fine,
        "rate",
        &format_args!("{} per {period:?}", rate.count),
        "1 to 10^9 per second, over a period up to 366 days",
    );
    faults.check(burst >= 1, "burst", &burst, "1 or more");
    if !fine || burst == 0 {
        return NONE;
    }
    let pace = Pace::new(rate, burst);
    faults.check(pace.is_some(), "burst", &burst, "what fills within nine years at this rate");
    pace.unwrap_or(NONE)
}

fn shape(pace: Pace) -> u64 {
    u64::from(pace.bits) << 32 | u64::from(pace.burst)
}

impl IntoGate for TokenBucketBuilder {
    type Gate = TokenBucket;

    fn into_gate(self) -> Result<TokenBucket, ConfigError> {
        self.build()
    }
}

guarded!(TokenBucket, "token", "tokens");

impl TokenBucket {
    /// Begins a bucket that gains so many tokens a second, 1 to 10^9.
    pub const fn per_second(tokens: u64) -> TokenBucketBuilder {
        Self::at(Rate::per_second(tokens))
    }

    /// Begins a bucket with any rate.
    pub const fn at(rate: Rate) -> TokenBucketBuilder {
        TokenBucketBuilder {
            rate,
            burst: None,
            max_queue: DEFAULT_MAX_QUEUE,
            max_wait: None,
            name: Name::Static("bucket"),
        }
    }

    /// Takes so many tokens if they are there and nobody waits; else changes nothing.
    ///
    /// # Errors
    ///
    /// A refusal that says when they would be there: waiting that long always suffices if nobody else comes. For more
    /// tokens than the burst it never will be, and the refusal says so.
    pub fn try_take(&self, tokens: u32) -> Result<(), Refusal> {
        match self.enter(&Call::alone(tokens, false)) {
            Entry::Pass(_) => Ok(()),
            Entry::Refused(refusal) => Err(refusal),
            Entry::Wait(ticket, _) => {
                self.abandon(ticket);
                Err(Refusal::by(self.0.name.clone(), Reason::Busy))
            }
        }
    }

    /// How many tokens are there now. Changes nothing.
    #[must_use]
    pub fn peek(&self) -> u32 {
        let _still = self.0.queue.lock();
        self.pace().available(self.0.word.load(Acquire) & STATE, Moment::now())
    }

    /// How many tokens a full bucket holds.
    #[must_use]
    pub fn burst(&self) -> u32 {
        self.pace().burst
    }

    /// How many wait.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.0.queue.lock().len()
    }

    /// Puts tokens back that were taken and not used. The bucket never holds more than its burst.
    pub fn refund(&self, tokens: u32) {
        let queue = self.0.queue.lock();
        let pace = self.pace();
        let cost = pace.cost(tokens.min(pace.burst));
        self.update(|word| Some(word & !STATE | (word & STATE).saturating_sub(cost)));
        self.wake_head(queue);
    }

    /// Changes the rate while in use. The tokens that are there stay there, and whoever waits is told anew when its turn
    /// comes.
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
        let queue = self.0.queue.lock();
        let old = self.pace();
        let mut faults = Faults::of("bucket");
        let new = check(&mut faults, rate, old.burst);
        faults.into_result()?;
        self.set_pace(queue, new, now);
        Ok(())
    }

    /// Has the pace changed under the lock, and the head of the queue look again.
    fn set_pace(&self, queue: MutexGuard<'_, Queue>, new: Pace, now: Moment) {
        let old = self.pace();
        let before = self.0.word.fetch_or(BUSY, AcqRel);
        self.0.multiplier.store(new.multiplier, Relaxed);
        self.0.shape.store(shape(new), Relaxed);
        // One unit, less than a nanosecond, in the callers' favour each time: a rate that changes there and back ends below
        // the word from before, by which somebody might swap in a state of the other pace.
        let state = old.convert(before & STATE, now, new).saturating_sub(1);
        let state = if state == before & STATE { state.saturating_sub(1) } else { state };
        self.0.word.store(before & WAITERS | state, Release);
        self.wake_head(queue);
    }

    #[inline]
    fn pace(&self) -> Pace {
        let shape = self.0.shape.load(Relaxed);
        Pace { multiplier: self.0.multiplier.load(Relaxed), bits: (shape >> 32) as u32, burst: shape as u32 }
    }

    /// Changes the word, or leaves it.
    fn update(&self, change: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        let mut seen = self.0.word.load(Acquire);
        loop {
            let next = change(seen)?;
            match self.0.word.compare_exchange_weak(seen, next, AcqRel, Acquire) {
                Ok(_) => return Some(next),
                Err(actual) => seen = actual,
            }
        }
    }

    /// Takes tokens under the queue's lock, where flags don't matter: the state after, or when they will be there.
    fn take_locked(&self, take: impl Fn(Pace, u64) -> Take) -> Take {
        let pace = self.pace();
        let mut seen = self.0.word.load(Acquire);
        loop {
            let next = match take(pace, seen & STATE) {
                Take::Now(next) => next,
                later @ Take::At(_) => return later,
            };
            match self.0.word.compare_exchange_weak(seen, seen & !STATE | next, AcqRel, Acquire) {
                Ok(_) => return Take::Now(next),
                Err(actual) => seen = actual,
            }
        }
    }

    #[inline]
    pub(crate) fn enter_at_once(&self, cost: u32, now: Moment) -> Option<Pass> {
        let mut seen = self.0.word.load(Acquire);
        // With a flag set the word is above every state.
        while seen <= STATE {
            let pace = self.pace();
            if cost > pace.burst {
                break;
            }
            let next = pace.take_now(seen, now, cost)?;
            match self.0.word.compare_exchange_weak(seen, next, AcqRel, Acquire) {
                Ok(_) => return Some(Pass::new(next, cost.into())),
                Err(actual) => seen = actual,
            }
        }
        None
    }

    #[inline]
    pub(crate) fn hear(&self, pass: &Pass, outcome: &Outcome) {
        if matches!(outcome, Outcome::NotStarted) {
            self.put_back(pass);
        }
    }

    /// Only if nobody has taken since: a later taker was told its time with these tokens gone.
    #[cold]
    fn put_back(&self, pass: &Pass) {
        let [state, cost] = pass.words();
        let back = state.saturating_sub(self.pace().cost(cost as u32));
        let next = self.update(|word| (word & STATE == state && word & BUSY == 0).then_some(word & !STATE | back));
        if next.is_some_and(|word| word & WAITERS != 0) {
            self.wake_head(self.0.queue.lock());
        }
    }

    /// Has the head of the queue look again: it may be due earlier than it thinks.
    #[allow(clippy::unused_self, reason = "says whose queue it is")]
    fn wake_head(&self, mut queue: MutexGuard<'_, Queue>) {
        let waker = queue.take_head_waker();
        drop(queue);
        waker.into_iter().for_each(Waker::wake);
    }

    #[cold]
    fn enter_queue(&self, call: &Call) -> Entry {
        let (cost, now) = (call.cost(), call.now());
        let mut queue = self.0.queue.lock();
        let pace = self.pace();
        if cost > pace.burst {
            let limit = pace.burst;
            drop(queue);
            return Entry::Refused(Refusal::by(self.0.name.clone(), Reason::CostAboveLimit { cost, limit }));
        }
        let due = if queue.is_empty() {
            match self.take_locked(|pace, state| pace.take(state, now, 0, cost)) {
                Take::Now(next) => return Entry::Pass(Pass::new(next, cost.into())),
                Take::At(due) => due,
            }
        } else {
            let ahead = queue.weight().saturating_mul(1 << pace.bits);
            match pace.take(self.0.word.load(Acquire) & STATE, now, ahead, cost) {
                Take::At(due) => due,
                // The head could have its tokens and has not come for them yet: nobody knows when it will.
                Take::Now(_) => now,
            }
        };
        let give_up = now.plus_nanos(self.0.max_wait);
        if let Some(reason) = self.why_not_wait(call, due, give_up, queue.len()) {
            drop(queue);
            let refusal = Refusal::by(self.0.name.clone(), reason);
            return Entry::Refused(if due > now { refusal.after(due.since(now)) } else { refusal });
        }
        self.0.word.fetch_or(WAITERS, AcqRel);
        let head = queue.is_empty();
        let key = queue.push(cost, give_up, None);
        Entry::Wait(Ticket::new(key.to_bits(), give_up.nanos()), head.then_some(due))
    }

    /// Why a call that would be served when it is due, behind so many others, is not to wait for it.
    fn why_not_wait(&self, call: &Call, due: Moment, give_up: Moment, queued: u32) -> Option<Reason> {
        if !call.may_wait() {
            Some(Reason::Busy)
        } else if due > give_up.min(call.ends()) {
            Some(Reason::TooLate)
        } else if queued >= self.0.max_queue {
            Some(Reason::QueueFull)
        } else {
            None
        }
    }

    /// Takes a waiter out, and tells whoever is first now.
    fn end_wait(&self, mut queue: MutexGuard<'_, Queue>, key: Key) {
        let (status, own) = queue.remove(key);
        if queue.is_empty() {
            self.0.word.fetch_and(!WAITERS, Release);
        }
        if status == (Status::Waiting { head: true }) {
            self.wake_head(queue);
        } else {
            drop(queue);
        }
        drop(own);
    }
}

impl Gate for TokenBucket {
    #[inline]
    fn enter(&self, call: &Call) -> Entry {
        match self.enter_at_once(call.cost(), call.now()) {
            Some(pass) => Entry::Pass(pass),
            None => self.enter_queue(call),
        }
    }

    #[inline]
    fn leave(&self, pass: Pass, outcome: Outcome) {
        self.hear(&pass, &outcome);
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        self.look_at(call)
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [bits, give_up] = ticket.words();
        let (key, give_up) = (Key::from_bits(bits), Moment::from_nanos(give_up));
        let waker = cx.waker().clone();
        let now = call.now();
        let mut queue = self.0.queue.lock();
        let due = if queue.status(key) == (Status::Waiting { head: true }) {
            match self.take_locked(|pace, state| pace.take_as_told(state, now, call.cost())) {
                Take::Now(next) => {
                    self.end_wait(queue, key);
                    return Entry::Pass(Pass::new(next, call.cost().into()));
                }
                // The rate was lowered meanwhile.
                Take::At(due) if due > give_up.min(call.ends()) => {
                    self.end_wait(queue, key);
                    let refusal = Refusal::by(self.0.name.clone(), Reason::TooLate);
                    return Entry::Refused(refusal.after(due.since(now)));
                }
                Take::At(due) => Some(due),
            }
        } else {
            None
        };
        let unused = queue.leave_waker(key, waker);
        drop(queue);
        drop(unused);
        Entry::Wait(ticket, due)
    }

    fn abandon(&self, ticket: Ticket) {
        self.end_wait(self.0.queue.lock(), Key::from_bits(ticket.words()[0]));
    }

    fn needs(&self) -> Needs {
        Needs::Now
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }
}

impl TokenBucket {
    /// The rate as it is drawn, rounded.
    fn per_second_now(&self) -> f64 {
        let pace = self.pace();
        let unit = pace.multiplier as f64 / (1_u64 << 62) as f64;
        unit * 1e9 / (1_u64 << pace.bits) as f64
    }
}

impl fmt::Debug for TokenBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenBucket")
            .field("name", &self.0.name)
            .field("per_second", &self.per_second_now())
            .field("burst", &self.burst())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for TokenBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = (self.per_second_now() * 1000.0).round() / 1000.0;
        write!(f, "{} {rate}/s", self.0.name.as_str())
    }
}
