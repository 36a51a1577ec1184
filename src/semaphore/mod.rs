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
//! Uncontended, one compare-and-swap to enter and one addition to leave. Waiting takes a mutex and a slot of 40 bytes.
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
use std::task::Context;
use std::time::Duration;

use crate::call::Call;
use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::{Entry, Gate, IntoGate, Needs, Outcome, Pass, Ticket};
use crate::guard::guarded;
use crate::internal::queue::{DEFAULT_MAX_QUEUE, Key, LONGEST_QUEUE, Queue, Status, WakeList};
use crate::internal::sync::{AcqRel, Acquire, AtomicU64, Mutex, MutexGuard, Relaxed, Release};
use crate::internal::time::{Moment, nanos};
use word::{CLOSED, MOST_PERMITS, WAITERS, Word, in_use};

/// A fair, weighted, resizable limit on what runs at once; see the [module](self).
///
/// A cheap handle: clones share the permits.
#[derive(Clone)]
pub struct Semaphore(Arc<Shared>);

struct Shared {
    word: AtomicU64,
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
    /// How many may wait: 16,384 unless said, at most 16,777,216. With 0 nobody waits.
    pub const fn max_queue(mut self, waiters: u32) -> Self {
        self.max_queue = waiters;
        self
    }

    /// How long one may wait: no limit unless said.
    pub const fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = Some(wait);
        self
    }

    /// The name that refusals carry: `semaphore` unless said.
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

guarded!(Semaphore, "permit", "permits");

impl Semaphore {
    /// Begins a semaphore with so many permits, 1 to 2,147,483,647.
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
    #[must_use]
    pub fn available(&self) -> u32 {
        self.read().available()
    }

    /// How many wait.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.0.queue.lock().len()
    }

    /// Changes the limit while in use.
    ///
    /// Raised, it serves the queue at once. Lowered, it takes nothing away: no permit is granted until enough have come
    /// back. Who waits for more than the new limit is refused on reaching the head of the queue. A closed semaphore
    /// stays closed.
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
        let queue = self.0.queue.lock();
        let _always = self.update(|word| Some(word.with_limit(permits)));
        self.serve(queue).wake();
        Ok(())
    }

    /// Closes it for good: whoever waits or comes is refused, whoever is in finishes.
    pub fn close(&self) {
        let mut queue = self.0.queue.lock();
        self.0.word.fetch_or(CLOSED, AcqRel);
        let mut wakers = WakeList::default();
        while !queue.is_empty() {
            wakers.push(queue.reject_head());
        }
        self.0.word.fetch_and(!WAITERS, Release);
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
    pub(crate) fn enter_at_once(&self, cost: u32) -> Option<Pass> {
        // Closed or waited for, the word is above every reading without flags.
        let took = self.update(|word| if word.0 < WAITERS { word.take(cost) } else { None });
        took.ok().map(|_| Pass::new(cost.into(), 0))
    }

    #[cold]
    fn refuse(&self, reason: Reason) -> Entry {
        Entry::Refused(Refusal::by(self.0.name.clone(), reason))
    }

    /// Not at once: refuses, or stands in the queue.
    #[cold]
    fn enter_queue(&self, call: &Call) -> Entry {
        let cost = call.cost();
        let give_up = match self.0.max_wait {
            u64::MAX => Moment::NEVER,
            wait => call.now().plus_nanos(wait),
        };
        let mut queue = self.0.queue.lock();
        // Limit and closing change under the lock only: what is decided on them here holds until it is released.
        let word = self.read();
        let reason = if word.is_closed() {
            Some(Reason::Closed)
        } else if cost > word.limit() {
            Some(Reason::CostAboveLimit { cost, limit: word.limit() })
        } else if !call.may_wait() {
            Some(Reason::Busy)
        } else if queue.len() >= self.0.max_queue {
            Some(Reason::QueueFull)
        } else if self.0.max_wait == 0 {
            Some(Reason::QueueTimeout)
        } else {
            None
        };
        if let Some(reason) = reason {
            drop(queue);
            return self.refuse(reason);
        }
        // From here on whoever gives permits back comes to the queue (invariant 2 of the word).
        self.0.word.fetch_or(WAITERS, AcqRel);
        if queue.is_empty() && self.update(|word| word.take(cost)).is_ok() {
            self.0.word.fetch_and(!WAITERS, Release);
            return Entry::Pass(Pass::new(cost.into(), 0));
        }
        let key = queue.push(cost);
        Entry::Wait(Ticket::new(key.to_bits(), give_up.nanos()), (give_up != Moment::NEVER).then_some(give_up))
    }

    /// Grants permits in order as long as the head fits, and lets go of the lock: who is to be woken.
    fn serve(&self, mut queue: MutexGuard<'_, Queue>) -> WakeList {
        let mut wakers = WakeList::default();
        while let Some(need) = queue.head() {
            match self.update(|word| word.take(need)) {
                Ok(_) => wakers.push(queue.serve_head()),
                Err(word) if need > word.limit() => wakers.push(queue.reject_head()),
                Err(_) => return wakers,
            }
        }
        self.0.word.fetch_and(!WAITERS, Release);
        wakers
    }

    #[inline]
    pub(crate) fn give_back(&self, pass: &Pass) {
        let [permits, _] = pass.words();
        // Cannot underflow: each pass was added once and is taken back once.
        let before = Word(self.0.word.fetch_sub(in_use(permits as u32), AcqRel));
        if before.has_waiters() {
            self.serve_queue();
        }
    }

    #[cold]
    fn serve_queue(&self) {
        self.serve(self.0.queue.lock()).wake();
    }

    /// Ends a wait, whatever it came to: grants that are not used go to the next in line.
    fn end_wait(&self, mut queue: MutexGuard<'_, Queue>, key: Key, used: bool) {
        let (status, need, waker) = queue.remove(key);
        let wakers = match status {
            Status::Served if !used => {
                self.0.word.fetch_sub(in_use(need), AcqRel);
                self.serve(queue)
            }
            // A large request that leaves the head lets small ones pass.
            Status::Waiting { head: true } => self.serve(queue),
            Status::Waiting { head: false } | Status::Served | Status::Rejected | Status::Gone => {
                drop(queue);
                WakeList::default()
            }
        };
        wakers.wake();
        drop(waker);
    }
}

impl Gate for Semaphore {
    #[inline]
    fn enter(&self, call: &Call) -> Entry {
        match self.enter_at_once(call.cost()) {
            Some(pass) => Entry::Pass(pass),
            None => self.enter_queue(call),
        }
    }

    #[inline]
    fn leave(&self, pass: Pass, _: Outcome) {
        self.give_back(&pass);
    }

    fn poll_wait(&self, ticket: Ticket, call: &Call, cx: &mut Context<'_>) -> Entry {
        let [bits, give_up] = ticket.words();
        let (key, give_up) = (Key::from_bits(bits), Moment::from_nanos(give_up));
        let waker = cx.waker().clone();
        let mut queue = self.0.queue.lock();
        match queue.status(key) {
            Status::Served => {
                self.end_wait(queue, key, true);
                Entry::Pass(Pass::new(call.cost().into(), 0))
            }
            Status::Waiting { .. } if give_up != Moment::NEVER && call.now() >= give_up => {
                self.end_wait(queue, key, false);
                self.refuse(Reason::QueueTimeout)
            }
            Status::Waiting { .. } => {
                let unused = queue.leave_waker(key, waker);
                drop(queue);
                drop(unused);
                Entry::Wait(ticket, (give_up != Moment::NEVER).then_some(give_up))
            }
            Status::Rejected | Status::Gone => {
                self.end_wait(queue, key, false);
                // It asked for more than a limit that was, or everybody was sent away. What holds now decides.
                match self.enter_queue(call) {
                    Entry::Wait(ticket, _) => self.poll_wait(ticket, call, cx),
                    entry => entry,
                }
            }
        }
    }

    fn abandon(&self, ticket: Ticket) {
        self.end_wait(self.0.queue.lock(), Key::from_bits(ticket.words()[0]), false);
    }

    fn look(&self, call: &Call) -> Result<(), Refusal> {
        self.look_at(call.cost())
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn name(&self) -> &str {
        self.0.name.as_str()
    }
}

impl fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.read();
        f.debug_struct("Semaphore")
            .field("name", &self.0.name)
            .field("limit", &word.limit())
            .field("in_use", &word.in_use())
            .field("closed", &word.is_closed())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Semaphore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.name.as_str(), self.limit())
    }
}
