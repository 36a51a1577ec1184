//! [`Blocking`] and [`Compute`]: work that would hold up the runtime, on other threads, so much at once and no more.
//!
//! A call that blocks (a file, a lock, a client without futures) or computes for long must not run on the threads of
//! the runtime: it keeps everything else there waiting. tokio's `spawn_blocking` takes it away, but its queue has no
//! bound, and what a caller that gave up has left there runs all the same. `Blocking` is a bulkhead around
//! `spawn_blocking`; `Compute` is for what computes, and has as many threads as there are cores.
//!
//! ```
//! use std::time::Duration;
//! use resile::{Blocking, ErrorKind};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let blocking = Blocking::builder().threads(8).max_queue(64).max_wait(Duration::from_secs(1)).build()?;
//!
//! let text = blocking.try_run(|_| std::fs::read_to_string("Cargo.toml")).await?;
//! assert!(text.contains("[package]"));
//!
//! let error = blocking.run(|_| -> u32 { panic!("a bug") }).await.unwrap_err();
//! assert_eq!(error.to_string(), "panicked in attempt 1: a bug");
//! assert_eq!(blocking.running(), 0);
//! # Ok(()) }
//! ```
//!
//! | | for | threads | who waits |
//! | --- | --- | --- | --- |
//! | [`Blocking`] | what waits: files, locks, clients that block | tokio's, at most `threads` of them | the caller, in the queue of a [`Semaphore`] |
//! | [`Compute`] | what computes: hashing, parsing, images | its own, one for each core | the job, in the queue of the threads |
//!
//! | setting | default | why |
//! | --- | --- | --- |
//! | [`threads`](BlockingBuilder::threads) | 32; for `Compute` the cores | tokio has 512, which all parts of a program share |
//! | [`max_queue`](BlockingBuilder::max_queue) | 1,024 | what waits holds on to what its closure captured |
//! | [`max_wait`](BlockingBuilder::max_wait) | none | a deadline does it better |
//!
//! # How it decides
//!
//! At the first poll a job takes one of `threads` permits, or waits in order, or is refused. The permit is *inside* the
//! closure: it goes back when the closure has really ended and what it captured is dropped, whatever has become of the
//! caller meanwhile. So a peer that hangs can take `threads` threads and not one more, also from callers that time out.
//! The permit is back before the caller has its answer.
//!
//! # Cancellation
//!
//! The closure is handed a [`Job`], which says whether the caller has left and how much time remains.
//!
//! | the caller leaves | what happens |
//! | --- | --- |
//! | before the first poll | nothing was taken; the closure is dropped |
//! | in the queue | it leaves its place; the closure is dropped where the caller is, and never runs |
//! | in tokio's own queue (all its threads are busy) | the permit stays until a thread gets to it; the closure never runs |
//! | while it runs | [`Job::is_cancelled`] turns true; permit and thread stay until the closure ends; [`abandoned`](Blocking::abandoned) counts it |
//! | when it has ended | the result is dropped with the future |
//!
//! A job inherits the [context](crate::context) of its caller's task, as calls under policies do: the earlier deadline
//! holds, a cancellation ends it with its reason, and the closure runs in the context.
//!
//! A closure that ignores the flag runs to its end and counts as abandoned; nothing can stop a thread. With `threads` of
//! these everybody else waits, and is refused in time: that is what the bound is for.
//!
//! # Panics
//!
//! A panic in the closure, or in the drop of what it captured, is the caller's [error](crate::ErrorKind::Panicked), with
//! its message. A result that nobody wants is dropped on the thread of the job, with the permit held; a panic in that
//! drop is caught and goes nowhere. With `panic = "abort"` there is no catching: the process ends.
//!
//! # Shutdown
//!
//! A runtime that is dropped drops the callers' futures first, which turns the flags on, and then waits for the closures
//! that run, as long as that takes; `shutdown_timeout` and `shutdown_background` leave them behind. Callers on another
//! runtime are answered: what tokio has in its queue is run or dropped as tokio sees fit, and the caller of a job that is
//! dropped is told that the place is [closed](crate::Reason::Closed). [`Compute`] says what it does when its last handle
//! goes.
//!
//! # In a policy
//!
//! A job ends in an [`Error`](crate::Error), as a nested policy does, and is judged as one: by
//! [`ByPolicy`](crate::ByPolicy), for which a queue that is full and a panic say nothing about the peer. (The judge of a
//! policy that was given none takes any error for the peer's fault, and tries again.) The policy's timeout cuts the wait
//! for a job; to let the closure know, hand the deadline on. [`Error::flatten`](crate::Error::flatten) makes one
//! error of the two.
//!
//! ```
//! use std::time::Duration;
//! use resile::{Blocking, ByPolicy, CircuitBreaker, Error, Policy, Retry, State};
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # fn query(_: u32, _: Duration) -> Result<&'static str, std::io::Error> { Ok("ann") }
//! let blocking = Blocking::builder().threads(8).max_queue(64).build()?;
//! let breaker = CircuitBreaker::builder().build()?;
//! let policy = Policy::named("users")
//!     .timeout(Duration::from_secs(2))
//!     .retry(Retry::exponential(Duration::from_millis(50)))
//!     .gate(breaker.clone())
//!     .build()?;
//!
//! let name = policy
//!     .classify(ByPolicy)
//!     .run_with(|call| blocking.try_run(|job| query(42, job.remaining())).deadline(call.deadline()))
//!     .await
//!     .map_err(Error::flatten)?;
//! assert_eq!(name, "ann");
//! # Ok(()) }
//! ```
//!
//! # Cost
//!
//! On top of what `spawn_blocking` costs: three allocations (two if the closure captures nothing), one compare-and-swap in
//! and one addition out. Waiting in the queue costs a fourth, and what it costs at a [`Semaphore`].
//!
//! # Not for
//!
//! Work without an end (a loop that reads a socket): give it a thread of its own. And a job that waits for another job of
//! the same place can wait for itself when all threads do so.

mod compute;
mod job;
mod offload;

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{ConfigError, Faults, Name, Reason, Refusal};
use crate::gate::Gate;
use crate::internal::queue::LONGEST_QUEUE;
use crate::semaphore::Semaphore;
use job::Abandoned;

pub use compute::{Compute, ComputeBuilder};
pub use job::Job;
pub use offload::Offload;

const DEFAULT_THREADS: u32 = 32;
const DEFAULT_QUEUE: u32 = 1024;
/// Eight times tokio's default.
const MOST_THREADS: u32 = 4096;
/// tokio's grain: less could not be told from no wait at all.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

fn check_size(faults: &mut Faults, threads: u32, max_queue: u32, max_wait: Option<Duration>) {
    faults.check((1..=MOST_THREADS).contains(&threads), "threads", &threads, "1 to 4096");
    faults.check(max_queue <= LONGEST_QUEUE, "max_queue", &max_queue, "0 to 16777216");
    if let Some(wait) = max_wait {
        faults.check(wait >= SHORTEST_WAIT, "max_wait", &wait, "1ms or more; max_queue(0) lets nobody wait");
    }
}

/// A bulkhead for code that blocks, around tokio's `spawn_blocking`; see the [module](self).
///
/// A cheap handle: clones share the permits.
#[derive(Clone)]
pub struct Blocking(Arc<Bulkhead>);

/// What the handles share.
struct Bulkhead {
    semaphore: Semaphore,
    abandoned: Arc<Abandoned>,
}

impl Bulkhead {
    fn refusal(&self, reason: Reason) -> Refusal {
        Refusal::new(self.semaphore.name().to_owned(), reason)
    }
}

/// Settings of a [`Blocking`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct BlockingBuilder {
    threads: u32,
    max_queue: u32,
    max_wait: Option<Duration>,
    name: Name,
}

impl BlockingBuilder {
    /// How many jobs run at once: 32 by default, at most 4,096. tokio gives it no more than its own
    /// `max_blocking_threads`, 512 by default, which it shares with all others.
    pub const fn threads(mut self, threads: u32) -> Self {
        self.threads = threads;
        self
    }

    /// How many may wait: 1,024 by default, at most 16,777,216. With 0 no caller waits.
    ///
    /// ```
    /// # use resile::{Blocking, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().threads(1).max_queue(0).build()?;
    /// let (end, told) = std::sync::mpsc::channel();
    /// let first = tokio::spawn(blocking.run(move |_| told.recv()));
    /// tokio::task::yield_now().await;
    ///
    /// let error = blocking.run(|_| 42).await.unwrap_err();
    /// assert_eq!(error.refusal().unwrap().reason(), Reason::QueueFull);
    /// end.send("over")?;
    /// assert_eq!(first.await??, Ok("over"));
    /// # Ok(()) }
    /// ```
    pub const fn max_queue(mut self, callers: u32) -> Self {
        self.max_queue = callers;
        self
    }

    /// How long one may wait: no limit by default, at least a millisecond.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use resile::{Blocking, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().threads(1).max_wait(Duration::from_secs(1)).build()?;
    /// let (end, told) = std::sync::mpsc::channel::<()>();
    /// let first = tokio::spawn(blocking.run(move |_| told.recv().is_ok()));
    /// tokio::task::yield_now().await;
    ///
    /// let second = tokio::spawn(blocking.run(|_| 42));
    /// tokio::task::yield_now().await;
    /// tokio::time::advance(Duration::from_secs(1)).await;
    /// assert_eq!(second.await?.unwrap_err().refusal().unwrap().reason(), Reason::QueueTimeout);
    /// # end.send(())?;
    /// # assert!(first.await??);
    /// # Ok(()) }
    /// ```
    pub const fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = Some(wait);
        self
    }

    /// The name that refusals carry: `blocking` by default.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = Name::from(name.into());
        self
    }

    /// The bulkhead. It starts no thread.
    ///
    /// # Errors
    ///
    /// Threads outside of 1 to 4,096, a queue above 16,777,216, a wait below a millisecond.
    pub fn build(self) -> Result<Blocking, ConfigError> {
        let mut faults = Faults::of("blocking");
        check_size(&mut faults, self.threads, self.max_queue, self.max_wait);
        faults.into_result()?;
        let mut semaphore =
            Semaphore::permits(self.threads).max_queue(self.max_queue).named(self.name.as_str().to_owned());
        if let Some(wait) = self.max_wait {
            semaphore = semaphore.max_wait(wait);
        }
        Ok(Blocking(Arc::new(Bulkhead { semaphore: semaphore.build()?, abandoned: Abandoned::new() })))
    }
}

impl Blocking {
    /// Begins a bulkhead with 32 threads.
    pub const fn builder() -> BlockingBuilder {
        BlockingBuilder {
            threads: DEFAULT_THREADS,
            max_queue: DEFAULT_QUEUE,
            max_wait: None,
            name: Name::Static("blocking"),
        }
    }

    /// Runs a closure on a thread that may block; see [`Offload`] for how it can end.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = resile::Blocking::builder().build()?;
    /// assert_eq!(blocking.run(|_| 6 * 7).await?, 42);
    /// # Ok(()) }
    /// ```
    pub fn run<T, C>(&self, code: C) -> Offload<T>
    where
        C: FnOnce(Job) -> T + Send + 'static,
        T: Send + 'static,
    {
        self.try_run(move |job| Ok::<_, Infallible>(code(job)))
    }

    /// Runs a closure that can fail: its error is kept in the one that the future ends in.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = resile::Blocking::builder().build()?;
    /// let error = blocking.try_run(|_| std::fs::read("no such file")).await.unwrap_err();
    /// assert_eq!(error.into_inner().unwrap().kind(), std::io::ErrorKind::NotFound);
    /// # Ok(()) }
    /// ```
    pub fn try_run<T, E, C>(&self, code: C) -> Offload<T, E>
    where
        C: FnOnce(Job) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        Offload::at_bulkhead(self.0.clone(), Box::new(code))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.semaphore.name()
    }

    /// How many jobs run at once.
    #[must_use]
    pub fn threads(&self) -> u32 {
        self.0.semaphore.limit()
    }

    /// How many jobs have a permit: those that run, and those that tokio has no thread for yet.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.0.semaphore.in_use()
    }

    /// How many callers wait.
    #[must_use]
    pub fn queued(&self) -> u32 {
        self.0.semaphore.queued()
    }

    /// How many callers may wait.
    #[must_use]
    pub fn max_queue(&self) -> u32 {
        self.0.semaphore.max_queue()
    }

    /// How many jobs run on although their callers have left: they have not looked at their flag yet, or never do.
    ///
    /// ```
    /// # use resile::Blocking;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().build()?;
    /// let ((begin, begun), (end, told)) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    /// let job = tokio::spawn(blocking.run(move |_| {
    ///     begin.send(()).unwrap();
    ///     told.recv().ok();                            // and no look at its flag
    /// }));
    /// tokio::task::yield_now().await;
    /// begun.recv()?;
    /// job.abort();
    /// assert!(job.await.is_err());
    /// assert_eq!((blocking.abandoned(), blocking.running()), (1, 1), "it keeps its thread");
    /// # drop(end);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn abandoned(&self) -> u32 {
        self.0.abandoned.count()
    }

    /// Closes it for good: whoever waits or comes is refused, whatever runs finishes.
    ///
    /// ```
    /// # use resile::{Blocking, Reason};
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let blocking = Blocking::builder().build()?;
    /// blocking.close();
    /// let error = blocking.run(|_| 42).await.unwrap_err();
    /// assert_eq!(error.refusal().unwrap().reason(), Reason::Closed);
    /// # Ok(()) }
    /// ```
    pub fn close(&self) {
        self.0.semaphore.close();
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.semaphore.is_closed()
    }
}

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocking")
            .field("name", &self.0.semaphore.name())
            .field("threads", &self.threads())
            .field("running", &self.running())
            .field("queued", &self.queued())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.semaphore.name(), self.threads())
    }
}
