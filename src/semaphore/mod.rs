//! [`Semaphore`]: so many at once, the others in a queue, first come first served.
//!
//! A peer that can do 64 things at once does 65 of them slower, and 6,400 not at all. A semaphore keeps the number of
//! calls in flight below a limit, lets a bounded number wait in order, and refuses the rest at once.
//!
//! ```
//! use resile::Semaphore;
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let semaphore = Semaphore::permits(2).max_queue(1).build()?;
//!
//! let first = semaphore.acquire().await?;
//! let second = semaphore.acquire().await?;
//! assert!(semaphore.try_acquire().is_err());
//!
//! drop(first);
//! assert_eq!(semaphore.available(), 1);
//! second.success();
//! # Ok(()) }
//! ```
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`max_queue`](SemaphoreBuilder::max_queue) | 16,384 | a bound of memory; choose what is worth waiting behind |
//! | [`max_wait`](SemaphoreBuilder::max_wait) | none | a deadline of the policy does it better |
//!
//! # How it decides
//!
//! A call takes as many permits as it costs. If they are free and nobody waits, it has them; if it costs more than the
//! limit, it is refused; otherwise it stands at the end of the queue, unless that is full. Nobody passes a waiter by:
//! a large request at the head holds up small ones behind it. Shrinking the limit takes no permit away: nothing is
//! granted until enough have come back.
//!
//! # Cancellation
//!
//! A dropped waiter leaves the queue at once, and those behind it move up; if it had been granted permits in the same
//! moment, they go to the next. A dropped guard or call gives its permits back.
//!
//! # Cost
//!
//! Uncontended, one compare-and-swap to enter and one addition to leave. A wait takes a mutex twice, once to stand in the
//! queue and once by whoever gives the permits; who was given them sees so without it. A place in the queue is 40 bytes
//! of a ring, which grows by doubling and is kept.
//!
//! # Not for
//!
//! A task that takes a second permit while it holds the first can wait for itself; so can two tasks that each wait for
//! the other's. Nothing detects that: set `max_wait` or a deadline. For calls per second there is
//! [`TokenBucket`](crate::TokenBucket).

mod keyed;
mod word;

#[cfg(all(test, resile_loom))]
mod loom;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use crate::call::Call;
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Entry, FastGate, Gate, IntoGate, Needs, Outcome, Pass, Ticket, Times, by_reference};
use crate::guard::guarded;
use crate::internal::queue::{DEFAULT_MAX_QUEUE, Key, LONGEST_QUEUE, Queue, Status, WakeList};
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Mutex, MutexGuard, Relaxed, Release};
use crate::internal::time::{Moment, nanos};
use crate::verdict::Verdict;
use word::{CLOSED, MOST_PERMITS, WAITERS, Word, in_use};

/// The number in the ticket of a call that has not taken its place yet; its other word says when it is to give up. In a
/// place, it is the permits that are waited for.
const OUTSIDE: u64 = u64::MAX;

/// A fair, weighted, resizable limit on what runs at once; see the [module](self).
///
/// A cheap handle: clones share the permits.
#[derive(Clone)]
pub struct Semaphore(Arc<Shared>);

struct Shared {
    word: AtomicU64,
    /// The queue's own, for those who wait. Stored under its lock.
    progress: AtomicU64,
    queue: Mutex<Queue>,
    max_queue: u32,
    /// In nanoseconds; the largest number for no limit.
    max_wait: u64,
    name: Name,
}

/// Settings of a [`Semaphore`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct SemaphoreBuilder {
    permits: u32,
    max_queue: u32,
    max_wait: Option<Duration>,
    name: Name,
}

impl SemaphoreBuilder {
    /// How many may wait: 16,384 by default, at most 16,777,216. With 0 no caller waits.
    ///
    /// ```
    /// # use resile::{Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let semaphore = Semaphore::permits(1).max_queue(0).build()?;
    /// let _held = semaphore.acquire().await?;
    /// let refusal = semaphore.acquire().await.unwrap_err();
    /// assert_eq!(refusal.reason(), Reason::QueueFull);
    /// # Ok(()) }
    /// ```
    pub const fn max_queue(mut self, waiters: u32) -> Self {
        self.max_queue = waiters;
        self
    }

    /// How long one may wait: no limit by default.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let semaphore = Semaphore::permits(1).max_wait(Duration::from_millis(50)).build()?;
    /// let _held = semaphore.acquire().await?;
    /// let start = tokio::time::Instant::now();
    /// let refusal = semaphore.acquire().await.unwrap_err();
    /// assert_eq!((refusal.reason(), start.elapsed()), (Reason::QueueTimeout, Duration::from_millis(50)));
    /// # Ok(()) }
    /// ```
    pub const fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = Some(wait);
        self
    }

    /// The name that refusals carry: `semaphore` by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// The semaphore.
    ///
    /// # Errors
    ///
    /// Permits outside of 1 to 2,147,483,647, or a queue above 16,777,216.
    pub fn build(self) -> Result<Semaphore, ConfigError> {
        let mut faults = Faults::of("semaphore");
        check_permits(&mut faults, self.permits);
        faults.check(self.max_queue <= LONGEST_QUEUE, "max_queue", &self.max_queue, "0 to 16777216");
        faults.into_result()?;
        Ok(Semaphore(Arc::new(Shared {
            word: AtomicU64::new(Word::of(self.permits).0),
            progress: AtomicU64::new(0),
            queue: Mutex::new(Queue::new()),
            max_queue: self.max_queue,
            max_wait: self.max_wait.map_or(u64::MAX, nanos),
            name: self.name,
        })))
    }
}

impl IntoGate for SemaphoreBuilder {
    type Gate = Semaphore;

    fn into_gate(self) -> Result<Semaphore, ConfigError> {
        self.build()
    }
}

fn check_permits(faults: &mut Faults, permits: u32) {
    faults.check((1..=MOST_PERMITS).contains(&permits), "permits", &permits, "1 to 2147483647");
}

by_reference!(Semaphore);
guarded!(Semaphore, "permit", "permits");

impl Semaphore {
    /// Begins a semaphore with this many permits, 1 to 2,147,483,647.
    pub const fn permits(permits: u32) -> SemaphoreBuilder {
        SemaphoreBuilder { permits, max_queue: DEFAULT_MAX_QUEUE, max_wait: None, name: Name::Static("semaphore") }
    }

    /// The limit.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.read().limit()
    }

    /// How many permits are out. More than the limit just after it was lowered.
    #[must_use]
    pub fn in_use(&self) -> u32 {
        self.read().in_use()
    }

    /// How many permits are free. Those in the queue come first, so a free permit is not always for the taking.
    ///
    /// A request that needs more than is free holds up those behind it:
    ///
    /// ```
    /// # use resile::{Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let semaphore = Semaphore::permits(3).build()?;
    /// let held = semaphore.acquire_many(2).await?;
    /// let large = tokio::spawn(semaphore.acquire_many(3));
    /// tokio::task::yield_now().await;
    /// assert_eq!(semaphore.available(), 1);
    /// assert_eq!(semaphore.try_acquire().unwrap_err().reason(), Reason::Busy);
    /// drop(held);
    /// large.await??.success();
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn available(&self) -> u32 {
        self.read().available()
    }

    /// How many wait.
    ///
    /// ```
    /// # use resile::Semaphore;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let semaphore = Semaphore::permits(1).build()?;
    /// let held = semaphore.acquire().await?;
    /// let waits = tokio::spawn(semaphore.acquire());
    /// tokio::task::yield_now().await;
    /// assert_eq!(semaphore.queued(), 1);
    /// drop(held);
    /// waits.await??.success();
    /// assert_eq!(semaphore.queued(), 0);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.0.queue.lock().len()
    }

    /// How many may wait.
    #[must_use]
    pub fn max_queue(&self) -> u32 {
        self.0.max_queue
    }

    /// Changes the limit while in use.
    ///
    /// Raised, it serves the queue at once. Lowered, it takes nothing away: no permit is granted until enough have come
    /// back. A request above the new limit is refused when it reaches the head of the queue. If the limit is
    /// raised again before that waiter has noticed, it has its old place and its `max_wait`. A closed semaphore stays closed.
    ///
    /// # Errors
    ///
    /// Permits outside of 1 to 2,147,483,647.
    ///
    /// ```
    /// # use resile::Semaphore;
    /// let semaphore = Semaphore::permits(2).build()?;
    /// let held = (semaphore.try_acquire()?, semaphore.try_acquire()?);
    /// semaphore.resize(1)?;
    /// assert_eq!((semaphore.in_use(), semaphore.available()), (2, 0));
    /// drop(held);
    /// assert_eq!(semaphore.available(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn resize(&self, permits: u32) -> Result<(), ConfigError> {
        let mut faults = Faults::of("semaphore");
        check_permits(&mut faults, permits);
        faults.into_result()?;
        let mut queue = self.0.queue.lock();
        // In one step with the limit, so that nobody who comes now passes a waiter by that is recalled.
        let recalls = !self.read().is_closed() && queue.can_recall(permits);
        let flag = if recalls { WAITERS } else { 0 };
        let _always = self.update(|word| Some(Word(word.with_limit(permits).0 | flag)));
        if recalls {
            queue.recall(permits);
        }
        let mut wakers = WakeList::default();
        self.serve(&mut queue, &mut wakers);
        drop(queue);
        wakers.wake();
        Ok(())
    }

    /// Closes it for good: whoever waits or comes is refused, whoever is in finishes.
    ///
    /// ```
    /// # use resile::{Reason, Semaphore};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let semaphore = Semaphore::permits(1).build()?;
    /// let held = semaphore.acquire().await?;
    /// let waits = tokio::spawn(semaphore.acquire());
    /// tokio::task::yield_now().await;
    ///
    /// semaphore.close();
    /// assert_eq!(waits.await?.unwrap_err().reason(), Reason::Closed);
    /// held.success();
    /// assert_eq!(semaphore.try_acquire().unwrap_err().reason(), Reason::Closed, "although a permit is free");
    /// # Ok(()) }
    /// ```
    pub fn close(&self) {
        let mut queue = self.0.queue.lock();
        self.0.word.fetch_or(CLOSED, AcqRel);
        let mut wakers = WakeList::default();
        while !queue.is_empty() {
            wakers.push(queue.reject_head());
        }
        self.publish(&queue);
        drop(queue);
        wakers.wake();
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.read().is_closed()
    }

    fn read(&self) -> Word {
        Word(self.0.word.load(Relaxed))
    }

    /// Changes the word, or leaves it: the reading on which that was decided.
    #[inline]
    fn update(&self, change: impl Fn(Word) -> Option<Word>) -> Result<Word, Word> {
        let mut seen = self.0.word.load(Acquire);
        loop {
            let Some(next) = change(Word(seen)) else { return Err(Word(seen)) };
            match self.0.word.compare_exchange_weak(seen, next.0, AcqRel, Acquire) {
                Ok(_) => return Ok(Word(seen)),
                Err(actual) => seen = actual,
            }
        }
    }

    #[inline]
    fn take_now(&self, cost: u32) -> Option<Pass> {
        // Closed or waited for, the word is above every reading without flags.
        let took = self.update(|word| if word.0 < WAITERS { word.take(cost) } else { None });
        took.ok().map(|_| Pass::new(in_use(cost), 0))
    }

    #[cold]
    fn refuse(&self, reason: Reason) -> Entry {
        Entry::Refused(Refusal::by(self.0.name.clone(), reason))
    }

    /// Slow path: returns a ticket. `poll_wait` comes in the same poll and enqueues it with the waker under one lock.
    #[cold]
    fn enter_later(&self, call: &Call) -> Entry {
        let reason = match never(self.read(), call.cost()) {
            None if !call.may_wait() => Some(Reason::Busy),
            None if self.0.max_queue == 0 => Some(Reason::QueueFull),
            reason => reason,
        };
        if let Some(reason) = reason {
            return self.refuse(reason);
        }
        let until = match self.0.max_wait {
            u64::MAX => Moment::NEVER,
            wait => call.now().plus_nanos(wait),
        };
        Entry::Wait(Ticket::new(OUTSIDE, until.nanos()), at(until))
    }

    /// Stands in the queue, or is refused.
    fn queue_up(&self, cost: u32, until: Moment, waker: Waker) -> Entry {
        let mut queue = self.0.queue.lock();
        // Limit and closing change under the lock only: what is decided on them here holds until it is released.
        let word = self.read();
        let reason = match never(word, cost) {
            None if queue.len() >= self.0.max_queue => Some(Reason::QueueFull),
            None if self.0.max_wait == 0 => Some(Reason::QueueTimeout),
            reason => reason,
        };
        if let Some(reason) = reason {
            drop(queue);
            drop(waker);
            return self.refuse(reason);
        }
        // From here on whoever gives permits back comes to the queue (invariant 2 of the word).
        if queue.is_empty() {
            self.0.word.fetch_or(WAITERS, AcqRel);
            if self.update(|word| word.take(cost)).is_ok() {
                self.0.word.fetch_and(!WAITERS, Release);
                drop(queue);
                drop(waker);
                return Entry::Pass(Pass::new(in_use(cost), 0));
            }
        }
        let key = queue.push(cost, until, Some(waker));
        Entry::Wait(Ticket::new(key.to_bits(), cost.into()), at(until))
    }

    /// Grants permits in order as long as the head fits, and publishes how far the queue has come.
    #[inline]
    fn serve(&self, queue: &mut Queue, wakers: &mut WakeList) {
        while let Some(need) = queue.head() {
            match self.update(|word| word.take(need)) {
                Ok(_) => wakers.push(queue.serve_head()),
                Err(word) if need > word.limit() => wakers.push(queue.reject_head()),
                Err(_) => break,
            }
        }
        self.publish(queue);
    }

    #[inline]
    fn publish(&self, queue: &Queue) {
        self.0.progress.store(queue.progress(), Release);
        if queue.is_empty() {
            self.0.word.fetch_and(!WAITERS, Release);
        }
    }

    /// Takes back what was [added](in_use) to the word.
    #[inline]
    fn give_back(&self, added: u64) {
        // Cannot underflow: each pass was added once and is taken back once.
        let before = Word(self.0.word.fetch_sub(added, AcqRel));
        if before.has_waiters() {
            self.serve_queue();
        }
    }

    #[cold]
    fn serve_queue(&self) {
        let mut wakers = WakeList::default();
        self.serve(&mut self.0.queue.lock(), &mut wakers);
        wakers.wake();
    }

    /// Asked again, and not served as far as can be seen without the lock.
    #[cold]
    fn look(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [number, need] = ticket.words();
        let key = Key::from_bits(number);
        let waker = cx.waker().clone();
        // Who has no limit of waiting reads no clock.
        let now = (self.0.max_wait != u64::MAX).then(|| call.now());
        let mut queue = self.0.queue.lock();
        match queue.status(key) {
            Status::Served => {
                drop(queue);
                Entry::Pass(Pass::new(in_use(need as u32), 0))
            }
            Status::Waiting { .. } => {
                let until = queue.until(key);
                if now.is_some_and(|now| now >= until) {
                    self.end_wait(queue, key, need as u32);
                    let refusal = Refusal::by(self.0.name.clone(), Reason::QueueTimeout);
                    return Entry::Refused(refusal.with_wait(Duration::from_nanos(self.0.max_wait), false));
                }
                let unused = queue.leave_waker(key, waker);
                drop(queue);
                drop(unused);
                Entry::Wait(ticket, at(until))
            }
            Status::Rejected => {
                // Had the limit been raised above what it asks for, it would have been recalled under this lock.
                let cost = need as u32;
                let reason = never(self.read(), cost).unwrap_or(Reason::CostAboveLimit { cost, limit: self.limit() });
                self.end_wait(queue, key, cost);
                self.refuse(reason)
            }
        }
    }

    /// Ends a wait, whatever it came to: a grant goes to the next in line.
    fn end_wait(&self, mut queue: MutexGuard<'_, Queue>, key: Key, need: u32) {
        let mut wakers = WakeList::default();
        let (status, waker) = queue.remove(key);
        if status == Status::Served {
            self.0.word.fetch_sub(in_use(need), AcqRel);
        }
        // A large request that leaves the head lets small ones pass.
        if status != (Status::Waiting { head: false }) {
            self.serve(&mut queue, &mut wakers);
        }
        drop(queue);
        wakers.wake();
        drop(waker);
    }
}

/// Why a call can't be let in however long it waits.
fn never(word: Word, cost: u32) -> Option<Reason> {
    if word.is_closed() {
        Some(Reason::Closed)
    } else if cost > word.limit() {
        Some(Reason::CostAboveLimit { cost, limit: word.limit() })
    } else {
        None
    }
}

/// The moment that goes with a ticket.
fn at(until: Moment) -> Option<Moment> {
    (until != Moment::NEVER).then_some(until)
}

impl FastGate for Semaphore {
    #[inline]
    fn enter_now(&self, cost: u32, _: Moment) -> Option<Pass> {
        self.take_now(cost)
    }

    #[inline]
    fn leave_well(&self, pass: Pass, _: Verdict, _: Times) {
        self.give_back(pass.words()[0]);
    }
}

impl Gate for Semaphore {
    #[inline]
    fn enter(&self, call: &Call) -> Entry {
        match self.take_now(call.cost()) {
            Some(pass) => Entry::Pass(pass),
            None => self.enter_later(call),
        }
    }

    #[inline]
    fn leave(&self, pass: Pass, _: Outcome) {
        self.give_back(pass.words()[0]);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [number, note] = ticket.words();
        if number == OUTSIDE {
            self.queue_up(call.cost(), Moment::from_nanos(note), cx.waker().clone())
        } else if Key::from_bits(number).is_served(self.0.progress.load(Acquire)) {
            Entry::Pass(Pass::new(in_use(note as u32), 0))
        } else {
            self.look(ticket, call, cx)
        }
    }

    fn abandon(&self, ticket: Ticket) {
        let [number, need] = ticket.words();
        if number != OUTSIDE {
            self.end_wait(self.0.queue.lock(), Key::from_bits(number), need as u32);
        }
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        self.look_at(call.cost())
    }

    fn places(&self) -> Option<u32> {
        Some(self.max_queue())
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }

    fn draw(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.read();
        f.debug_struct("Semaphore")
            .field("name", &self.0.name)
            .field("limit", &word.limit())
            .field("in_use", &word.in_use())
            .field("queued", &self.queued())
            .field("closed", &word.is_closed())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.name.as_str(), self.limit())
    }
}
